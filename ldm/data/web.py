"""Files on a web server, read in ranges: addresses of shards, and a client that goes nowhere else.

fsspec's HTTPFileSystem gives the session and its event loop; what it would let through is closed here: its
configuration (`FSSPEC_*`), redirects, proxies and `.netrc`, cookies, private addresses, compressed bodies. fsspec and
aiohttp are imported when the first request is made; torch never is.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import Any, NamedTuple, Protocol

import ldm
from ldm.errors import LdmError

TOKEN = "LDM_HTTP_TOKEN"  # environment variable
RANGE = 8 << 20  # bytes of one request
_MAX_REDIRECTS = 5
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_PATH = re.compile(r"[A-Za-z0-9._~!$&'()+,;=:@%/-]+")
_NUMBER = r"[0-9]{1,18}"
_CONTENT_RANGE = re.compile(rf"bytes ({_NUMBER})-({_NUMBER})/({_NUMBER})")
_NAT64, _COMPATIBLE = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96")  # RFC 6052, RFC 4291
_LOCAL = ipaddress.ip_network("64:ff9b:1::/48"), ipaddress.ip_network("fec0::/10")  # RFC 8215, RFC 3879


class Unreachable(Exception):
    """A shard could not be fetched. The text says why, without the URL."""


class Exhausted(Unreachable):
    """Every attempt at a request has failed."""


class _Again(Unreachable):
    """A failure that may pass."""


class _NoConnection(_Again):
    pass


@dataclass(frozen=True)
class Url:
    """scheme://host:port/path, checked. host: as the allow-list spells it; an IPv6 address in brackets."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        default = {"http": 80, "https": 443}[self.scheme]
        return f"{self.scheme}://{self.host}{'' if self.port == default else f':{self.port}'}{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path, as a plain file name."""
        return re.sub(r"[^A-Za-z0-9._-]", "_", self.path.rpartition("/")[2])[-200:].lstrip(".")


def plain_host(text: str) -> str | None:
    """A host name or an address, in one spelling; None for anything else."""
    host = text.lower()
    if ":" not in host:
        return host if _HOST.fullmatch(host) else None
    try:
        return f"[{ipaddress.IPv6Address(host.removeprefix('[').removesuffix(']'))}]"
    except ValueError:
        return None


def is_url(text: str) -> bool:
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def parse_url(text: str, where: str) -> Url:
    """The URL of a shard. Raises LdmError; what may be a secret (user, password, query) is in no message."""
    scheme, _, rest = text.partition("://")
    authority, slash, path = rest.partition("/")
    path, scheme = slash + path, scheme.lower()
    name, port = authority, ""
    if matched := re.fullmatch(r"(.*):(\d{1,5})", authority):
        name, port = matched.groups()
    host = plain_host(name) if "[" in name or ":" not in name else None
    number = int(port or {"http": 80, "https": 443}[scheme])

    def refused(what: str, hint: str) -> LdmError:
        return LdmError("DATA", what, where=where, limit=f"a URL at {host}" if host else "", next=hint)

    if "@" in authority:
        raise refused("a URL with a user or a password", f"set the environment variable {TOKEN} instead")
    if "?" in authority + path or "#" in authority + path:
        raise refused("a URL with ? or #", f"signatures would reach the logs: use plain URLs, and {TOKEN} for access")
    if host is None or not 0 < number < 65536:
        raise refused("a URL without a plain host name", "write http(s)://host/path/name.tar")
    if "*" in path or "[" in path or not path.lower().endswith(".tar"):
        hint = "a web server cannot be searched; name the shards, in braces or as a list: .../{00000..00041}.tar"
        raise refused(f"{path or '/'} is not the name of a .tar", hint)
    if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise refused("a URL with characters that must be encoded", "write a space as %20, and no . or .. as a folder")
    url = Url(scheme, host, number, path)
    if not url.name.lower().endswith(".tar"):  # nothing, or dots only, before the suffix
        raise refused(f"{path} is not the name of a .tar", "name the shard: .../00000.tar")
    return url


def check_hosts(urls: Iterable[Url], allow: Iterable[str], where: str) -> None:
    """Refuse what is not allowed, all at once, and name the key."""
    missing = sorted({url.host for url in urls} - set(allow))
    if missing:
        raise LdmError(
            "DATA",
            f"hosts that are not allowed: {', '.join(missing)}",
            where=where,
            limit=f"data.remote.allow=[{','.join(allow)}]",
            next=f"if you trust them, set data.remote.allow=[{','.join([*allow, *missing])}]",
        )


@functools.lru_cache(maxsize=1000)
def addresses(host: str, allow: frozenset[str]) -> tuple[str, ...]:
    """Where a host is, asked once in the life of a process. Raises LdmError if that is a private address.

    Private, loopback and link-local addresses have to be in the allow-list themselves; localhost stands for its own.
    """
    bare = host.strip("[]")
    try:
        infos = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except OSError as error:
        hint = "check the name and the network; data.remote.offline=true uses what the cache holds"
        what = f"cannot find the host {host}"
        raise LdmError("DATA", what, where="data.path", limit=str(error.strerror), next=hint) from error
    found = tuple(dict.fromkeys(str(info[4][0]) for info in infos))
    for text in found:
        address = _meant(ipaddress.ip_address(text.partition("%")[0]))
        public = address.is_global and not address.is_multicast and not any(address in local for local in _LOCAL)
        named = plain_host(str(address)) in allow or (bare == "localhost" and address.is_loopback)
        if not public and not named:
            raise LdmError(
                "DATA",
                f"{host} is at the private address {address}",
                where="data.path",
                next=f"if that is meant, add {address} itself to data.remote.allow",
            )
    return found


def _meant(address: Any) -> Any:
    """The IPv4 address that an IPv6 address stands for, where it does: mapped, translated (NAT64), 6to4, compatible.

    Teredo addresses are not public, whatever they carry.
    """
    if address.version == 4:
        return address
    if address in _NAT64 or (address in _COMPATIBLE and int(address) > 1):  # :: and ::1 are IPv6's own
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


class Seen(NamedTuple):
    """What a server says of a file. etag: its ETag, else its time of change, else empty."""

    size: int
    etag: str


class Sink(Protocol):
    """Takes the bytes of a file in order. at: how many it has."""

    at: int

    def write(self, data: bytes) -> None: ...

    def restart(self) -> None: ...


@dataclass(frozen=True)
class Client:
    """Requests to the allowed hosts. Every method raises Unreachable where the server or the network fails.

    allow: hosts.   retries: further attempts at one request, with growing pauses.   timeout_s: without a byte.
    stopped: whether nothing is wanted any more.
    """

    allow: frozenset[str]
    retries: int
    timeout_s: float
    stopped: Callable[[], bool]

    def check(self, urls: Iterable[Url]) -> None:
        """Whether the requests can be made: packages, addresses, the use of the token. Raises LdmError."""
        urls = list(urls)
        _filesystem(os.getpid(), self.allow, self.timeout_s)
        for host in {url.host for url in urls}:
            addresses(host, self.allow)
        plain = {url.host for url in urls if url.scheme == "http"} - {"localhost", "127.0.0.1"}
        if not re.fullmatch(r"[!-~]*", _token()):
            hint = "set it to the token alone, or unset it"
            raise LdmError("DATA", f"{TOKEN} has characters that no token has", where="data.path", next=hint)
        if _token() and (plain or len({url.host for url in urls}) > 1):
            hint = f"unset {TOKEN}, or use https URLs of one host"
            raise LdmError("DATA", f"{TOKEN} goes to a single host, over https only", where="data.path", next=hint)

    def look(self, url: Url) -> Seen:
        """Size and ETag of a file."""
        return self._retried(url, self._look)

    def fetch(self, url: Url, seen: Seen, sink: Sink) -> None:
        """The whole file, in ranges one after another; an attempt goes on at the byte where the last one broke.

        Raises Unreachable also when the file is no longer that of `seen`.
        """
        while sink.at < seen.size:
            self._retried(url, self._fetch_range, seen, sink)

    async def _look(self, url: Url) -> Seen:
        async with self._answer("HEAD", url, {}) as (answer, _):
            _check(answer)
            if not re.fullmatch(_NUMBER, answer.headers.get("Content-Length", "")):
                raise Unreachable("the server does not say how long the file is")
            return Seen(int(answer.headers["Content-Length"]), _etag(answer))

    async def _fetch_range(self, url: Url, seen: Seen, sink: Sink) -> None:
        """Bytes from where `sink` is to the end of that range, or the whole file from a server that knows no ranges."""
        start = sink.at
        stop = min((start // RANGE + 1) * RANGE, seen.size)
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if re.fullmatch('"[ -~]*"', seen.etag):  # only a strong ETag may stand there; the answer is compared anyway
            headers["If-Range"] = seen.etag
        async with self._answer("GET", url, headers) as (answer, limit):
            _check(answer)
            _check_same(answer, seen)
            if answer.status == HTTPStatus.PARTIAL_CONTENT:
                said = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                if said is None or tuple(map(int, said.groups())) != (start, stop - 1, seen.size):
                    raise Unreachable(f"the server sent another range than bytes {start}-{stop - 1} of {seen.size}")
            else:
                sink.restart()
                start, stop = 0, seen.size
            ranges = -(-(stop - start) // RANGE)
            limit.reschedule(asyncio.get_running_loop().time() + ranges * 2 * self.timeout_s)
            async for data in answer.content.iter_chunked(1 << 20):
                if self.stopped():
                    raise Unreachable("stopped")
                if sink.at + len(data) > stop:
                    raise Unreachable(f"the server sent more than bytes {start}-{stop - 1}")
                sink.write(data)
        if sink.at < stop:
            raise _Again(f"the body was cut off at byte {sink.at}")

    @asynccontextmanager
    async def _answer(
        self, method: str, url: Url, headers: dict[str, str]
    ) -> AsyncIterator[tuple[Any, asyncio.Timeout]]:
        """The response, after redirects on the same host, and its limit: a steady drip is no silence to a socket."""
        import yarl

        addresses(url.host, self.allow)  # again here: no resolver is asked about a host that is an address
        session = await self._fs.set_session()
        headers = headers | ({"Authorization": f"Bearer {_token()}"} if _token() else {})
        start = at = yarl.URL(str(url), encoded=True)
        async with asyncio.timeout(2 * self.timeout_s) as limit:
            for _ in range(_MAX_REDIRECTS + 1):
                async with session.request(method, at, headers=headers, allow_redirects=False) as answer:
                    if answer.status not in (301, 302, 303, 307, 308):
                        yield answer, limit
                        return
                    at = _redirected(start, at, answer.headers.get("Location", ""))
            raise Unreachable(f"more than {_MAX_REDIRECTS} redirects")

    @property
    def _fs(self) -> Any:
        return _filesystem(os.getpid(), self.allow, self.timeout_s)

    def _retried(self, url: Url, request: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
        for attempt in count(1):
            try:
                found = _run(self._fs.loop, request(url, *args))
                _down.discard(url.host)
                return found
            except _Again as error:
                hopeless = isinstance(error, _NoConnection) and url.host in _down
                if attempt > self.retries or hopeless or self.stopped():
                    if isinstance(error, _NoConnection):
                        _down.add(url.host)
                    kind = Unreachable if self.stopped() else Exhausted
                    raise kind(f"{error}; attempt {attempt} of {1 + self.retries}") from error
                time.sleep(min(0.5 * 2 ** min(attempt - 1, 6), 30))


def _run(loop: Any, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result, from fsspec's event loop, its failures as Unreachable."""
    import aiohttp
    from fsspec.asyn import sync

    async def translated() -> Any:
        try:
            return await coroutine
        except aiohttp.ConnectionTimeoutError as error:
            raise _NoConnection("no connection (no answer)") from error
        except TimeoutError as error:  # aiohttp's are of this class
            raise _Again("the server was silent or too slow") from error
        except aiohttp.ClientSSLError as error:
            raise Unreachable(f"no trusted connection ({type(error).__name__}); TLS is always verified") from error
        except aiohttp.ClientConnectorError as error:
            raise _NoConnection(f"no connection ({os.strerror(error.os_error.errno or 0)})") from error
        except aiohttp.ClientPayloadError as error:
            raise _Again("the body was cut off") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _Again(f"the connection failed ({type(error).__name__})") from error
        except ValueError as error:  # a header that is no number, no text, no address
            raise Unreachable(f"an answer that cannot be read ({type(error).__name__})") from error

    return sync(loop, translated)


def _redirected(start: Any, at: Any, location: str) -> Any:
    """Where a redirect leads: the same scheme, host and port as at the start, or https instead of http."""
    try:
        target = at.join(type(at)(location))
        same = target.host == start.host and target.raw_user is None and target.raw_password is None
        upgrade = (start.scheme, start.port, target.scheme, target.port) == ("http", 80, "https", 443)
        if same and (upgrade or target.origin() == start.origin()):
            return target
    except ValueError as error:
        raise Unreachable("a redirect to nowhere") from error
    raise Unreachable("a redirect to another host or port, or with a password, is not followed")


def _check(answer: Any) -> None:
    """Whether the answer has the file. Its words are not repeated: they are the server's."""
    if answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        known = answer.status in {status.value for status in HTTPStatus}
        words = f"{answer.status} {HTTPStatus(answer.status).phrase}" if known else f"status {answer.status}"
        raise (_Again if answer.status in _TRANSIENT else Unreachable)(f"the server answers {words}")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise Unreachable("the server compresses what it was asked to send as it is")


def _check_same(answer: Any, seen: Seen) -> None:
    """Whether this is still the file that was looked at: nothing of two versions is ever joined."""
    etag, whole = _etag(answer), answer.status == HTTPStatus.OK
    dated = "ETag" not in answer.headers and not seen.etag.endswith('"')  # a part need not repeat the time of change
    if not (etag == seen.etag or (dated and not etag)):
        raise Unreachable("the file changed on the server while it was fetched: start again")
    if whole and answer.headers.get("Content-Length", str(seen.size)) != str(seen.size):
        raise Unreachable(f"the server sends another number of bytes than the {seen.size} it had said")


def _etag(answer: Any) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _token() -> str:
    return os.environ.get(TOKEN, "").strip()


_down: set[str] = set()  # hosts that refused every attempt: a thousand shards need not wait for each


@functools.lru_cache(maxsize=8)
def _filesystem(process: int, allow: frozenset[str], timeout_s: float) -> Any:
    """fsspec's web file system for one process: its event loop does not survive a fork."""
    try:
        import aiohttp
        from aiohttp.abc import AbstractResolver
        from fsspec.implementations.http import HTTPFileSystem
    except ImportError as error:
        raise LdmError(
            "DATA", f"shards over http need {error.name}", where="data.path", next='pip install "ldm[remote]"'
        ) from error

    class Pinned(AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[Any]:
            return [
                {
                    "hostname": host,
                    "host": address,
                    "port": port,
                    "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
                    "proto": 0,
                    "flags": socket.AI_NUMERICHOST,
                }
                for address in addresses(host, allow)
            ]

        async def close(self) -> None:
            pass

    class Plain(HTTPFileSystem):
        protocol = ()  # fsspec's configuration files and FSSPEC_* reach a class by its protocol

    async def session(**_: Any) -> Any:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=Pinned(), use_dns_cache=False, limit=64),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s),
            headers={"User-Agent": f"ldm/{ldm.__version__}", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,  # no proxy and no .netrc
        )

    return Plain(get_client=session, skip_instance_cache=True)
