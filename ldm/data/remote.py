"""Shards over http: fetched whole into a cache of this machine, and from then on local files.

    cache_dir/<hash of the URL>-<hash of ETag and size>/<name>.tar    with lock, entry.json and the shard's index,
                                                                and failed.json while the server gives it to nobody

A shard is written beside that name in sequential ranges, compared with what the server said of it, synced and renamed,
by one process of the machine while the others wait. When the cache is full, the shards that were used longest ago go;
their indexes stay, and a shard that is needed again is fetched again and must have the bytes of before.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.web import Client, Exhausted, Seen, Unreachable, Url, check_hosts, parse_url, plain_host
from ldm.errors import LdmError

_LOOKS = 16  # servers are asked about so many shards at a time
_AT_ONCE = 16  # shards that a cache smaller than the set must hold: two for each of eight lanes
_PATIENCE_S = 60  # before a shard that could not be fetched is asked for again
_ENTRY = {"url": str, "size": int, "etag": str, "sha256": str, "fetched": float}  # entry.json
_FAILED = {"at": float, "reason": str}  # failed.json


@dataclass(frozen=True)
class _Entry:
    url: Url
    seen: Seen
    error: str = ""  # why the server could not tell


class Remote:
    """Shards at http(s) URLs.

    allow: hosts that may be asked; a private address only if it stands here itself.
    cache_dir: on a disk of this machine; None = `ldm/shards` in the user's cache.   cache_gb: what it may hold, of all
    runs that share it.
    retries: further attempts at a request that failed.   timeout_s: without a byte, after which an attempt has failed;
    a server that is silent is given up after (1 + retries) attempts and their pauses, 124 s by default, one that drips
    after twice that, and both is less than the loader's timeout.
    offline: ask nobody and use what the cache holds.

    keeps_all: whether the cache has room for all shards that were asked for.
    """

    def __init__(
        self,
        allow: Sequence[str] = (),
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        retries: int = 3,
        timeout_s: float = 30.0,
        offline: bool = False,
    ) -> None:
        names = [allow] if isinstance(allow, str) or not isinstance(allow, Sequence) else list(allow)
        hosts = [plain_host(name) if isinstance(name, str) else None for name in names]
        if None in hosts:
            hint = "host names or addresses, without scheme, port and wildcards: [data.example.org]"
            raise LdmError("CONFIG", f"{names[hosts.index(None)]!r} is no host", where="data.remote.allow", next=hint)
        for key, value, fits, limit in (
            ("cache_dir", cache_dir, cache_dir is None or isinstance(cache_dir, str), "a folder, or null"),
            ("cache_gb", cache_gb, isinstance(cache_gb, int | float) and 0 < cache_gb <= 1e9, "above 0, up to 1e9"),
            ("retries", retries, isinstance(retries, int) and 0 <= retries <= 1e9, "a whole number, 0 to 1e9"),
            ("timeout_s", timeout_s, isinstance(timeout_s, int | float) and 0 < timeout_s <= 1e9, "above 0, up to 1e9"),
            ("offline", offline, isinstance(offline, bool), "true or false"),
        ):
            if not fits or (isinstance(value, bool) and key != "offline"):
                raise LdmError("CONFIG", f"{key}={value!r}", where=f"data.remote.{key}", limit=limit)
        self.allow = tuple(host for host in hosts if host)
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.cache_dir = Path(cache_dir).expanduser().absolute() if cache_dir else caches / "ldm" / "shards"
        self.cache_bytes = round(cache_gb * 1e9)
        self.offline = offline
        self._client = Client(frozenset(self.allow), retries, timeout_s, self._is_stopped)
        self._entries: dict[Path, _Entry] = {}
        self._asked: set[Url] = set()
        self._began = time.time()
        self._failed: dict[Path, tuple[float, str]] = {}
        self.keeps_all = True
        self._stopped = False

    def paths(self, urls: Sequence[str], where: str = "data.path") -> list[Path]:
        """Where the shards lie, or will lie once they are needed. Asks for the size and ETag of each.

        A shard that the server does not give has a path, too, and `ensure` says why. Raises LdmError where a URL or
        its host is refused, or the cache is too small.
        """
        parsed = [parse_url(url, where) for url in urls]
        if self.offline:
            entries = [self._kept(url) for url in parsed]
        else:
            check_hosts(parsed, self.allow, where)
            self._client.check(self._asked | set(parsed))  # the token's one host is that of all calls
            self._asked |= set(parsed)
            with ThreadPoolExecutor(_LOOKS) as pool:
                try:
                    entries = list(pool.map(self._look, parsed))
                except BaseException:
                    self.stop()
                    raise
        found = [self._path(entry) for entry in entries]
        self._entries |= dict(zip(found, entries, strict=True))
        self.keeps_all = sum(entry.seen.size for entry in self._entries.values()) <= self.cache_bytes
        if not self.offline:
            self._check_room()
        return found

    def holds(self, path: Path) -> bool:
        return path in self._entries

    def url(self, path: Path) -> str:
        return str(self._entries[path].url)

    def signature(self, path: Path) -> str:
        """Differs for every version of the shard, whether it is in the cache or not."""
        return path.parent.name

    def ensure(self, path: Path) -> None:
        """Fetch the shard unless it is there. Raises Unreachable."""
        entry = self._entries[path]
        if entry.error:
            raise Unreachable(entry.error)
        if _touched(path, entry.seen.size):
            return
        if self.offline:
            raise Unreachable("not in the cache, and data.remote.offline=true")
        self._refuse_failed(path)
        try:
            with _locked(path.parent / "lock"):
                if not _touched(path, entry.seen.size):
                    self._refuse_failed(path)  # who had to wait for one that failed does not do it all again
                    self._try(entry, path)
        except OSError as error:
            raise Unreachable(self._unwritable(error)) from error

    def stop(self) -> None:
        """End what other threads are asking for."""
        self._stopped = True

    def _is_stopped(self) -> bool:
        return self._stopped

    def open(self, path: Path) -> io.FileIO:
        """A file to read from, a shard at a URL fetched anew where it was given up meanwhile. Raises Unreachable."""
        if not self.holds(path):
            return io.FileIO(path)
        for _ in range(3):
            self.ensure(path)
            try:
                return io.FileIO(path)
            except FileNotFoundError:  # given up between the two lines
                continue
        raise Unreachable("the cache is too small: data.remote.cache_gb")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_failed": {}}

    # ---- failures

    def _refuse_failed(self, path: Path) -> None:
        """Raise Unreachable if the shard has just failed: in this process, or in any since this run began."""
        told = _note(path.with_name("failed.json"), _FAILED)
        for at, reason in (self._failed.get(path, (0.0, "")), (told.get("at", 0.0), told.get("reason", ""))):
            if max(self._began, time.time() - _PATIENCE_S) < at <= time.time():
                raise Unreachable(reason)

    def _try(self, entry: _Entry, path: Path) -> None:
        """Fetch the shard, or leave word why not. Of what took long, also for those who wait."""
        told = path.with_name("failed.json")
        try:
            self._fetch(entry, path)
            told.unlink(missing_ok=True)
        except (Unreachable, OSError) as error:
            reason = str(error) if isinstance(error, Unreachable) else self._unwritable(error)
            self._failed[path] = time.time(), reason
            if isinstance(error, Exhausted):
                with suppress(OSError):
                    told.write_text(json.dumps({"at": time.time(), "reason": reason}), encoding="utf-8")
            raise Unreachable(reason) from error

    def _unwritable(self, error: OSError) -> str:
        return f"cannot write into {self.cache_dir}: {error.strerror}"

    # ---- entries

    def _look(self, url: Url) -> _Entry:
        try:
            entry = _Entry(url, self._client.look(url))
        except Unreachable as error:
            kept = not self._kept(url).error
            hint = "; data.remote.offline=true uses the copy in the cache" if kept else ""
            return _Entry(url, Seen(0, ""), f"{error}{hint}")
        if not entry.seen.size:
            return _Entry(url, entry.seen, "the file is empty")
        return entry

    def _kept(self, url: Url) -> _Entry:
        """The whole shard that was fetched last from there."""
        newest = (0.0, _Entry(url, Seen(0, ""), "not in the cache, and data.remote.offline=true"))
        for note in self.cache_dir.glob(f"{_hash(str(url))}-*/entry.json"):
            written = _note(note, _ENTRY)
            if not written:
                continue
            entry = _Entry(url, Seen(written["size"], written["etag"]))
            if _is_whole(self._path(entry), entry.seen.size):
                newest = max(newest, (written["fetched"], entry), key=lambda item: item[0])
        return newest[1]

    def _path(self, entry: _Entry) -> Path:
        version = _hash(f"{entry.seen.etag}\0{entry.seen.size}")
        return self.cache_dir / f"{_hash(str(entry.url))}-{version}" / entry.url.name

    # ---- room

    def _check_room(self) -> None:
        sizes = {path: entry.seen.size for path, entry in self._entries.items() if not entry.error}
        total, largest = sum(sizes.values()), max(sizes.values(), default=0)
        away = sum(size for path, size in sizes.items() if not _is_whole(path, size))
        place = (
            f"{self.cache_dir}: {_gb(total)} in {len(sizes)} shards, data.remote.cache_gb={self.cache_bytes / 1e9:g}"
        )
        if not self.keeps_all and _AT_ONCE * largest > self.cache_bytes:
            what = f"the cache holds neither all shards nor {_AT_ONCE} of the largest, {_gb(largest)}"
            hint = f"set data.remote.cache_gb={total / 1e9:.3g} or more, at least {_AT_ONCE * largest / 1e9:.3g}"
            raise LdmError("DATA", what, where=place, next=hint)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            room = away if self.keeps_all else self.cache_bytes - (total - away)
            free = shutil.disk_usage(self.cache_dir).free
            free += sum(size for _, size, file in self._files() if file not in sizes)  # of other runs: it may give way
        except OSError as error:
            what = f"cannot make the cache folder: {error.strerror}"
            raise LdmError("DATA", what, where=str(self.cache_dir), next="set data.remote.cache_dir") from error
        if room > free:
            what = f"{_gb(free)} are free on the disk of the cache, {_gb(room)} are to be fetched"
            hint = "set data.remote.cache_dir to a larger disk, or a smaller data.remote.cache_gb"
            raise LdmError("DATA", what, where=place, next=hint)
        if away:
            less = "" if self.keeps_all else "; it is smaller than the set: shards are fetched again in every epoch"
            print(f"remote: {_gb(away)} to fetch into {place}{less}", file=sys.stderr)

    def _make_room(self, size: int, part: Path) -> None:
        """Reserve `size` bytes by giving up what was used longest ago, never a shard of a set that fits."""
        with _locked(self.cache_dir / "lock"):
            part.unlink(missing_ok=True)
            files = self._files()
            used, free = sum(count for _, count, _ in files), shutil.disk_usage(self.cache_dir).free
            for _, count, file in files:
                if used + size <= self.cache_bytes and size <= free:
                    break
                mine = self.keeps_all and file in self._entries
                if not mine and (file.suffix != ".part" or _is_abandoned(file)):
                    file.unlink(missing_ok=True)
                    used, free = used - count, free + count
            if used + size > self.cache_bytes:
                raise Unreachable(f"the cache is full: {_gb(used)} in use, data.remote.cache_gb")
            with open(part, "wb") as file_of_part:
                file_of_part.truncate(size)  # so that others count it

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use, bytes, file) of every shard that is there or coming, of any run; the oldest first."""
        files = [file for file in self.cache_dir.glob("*/*") if file.suffix.lower() in (".tar", ".part")]
        return sorted((stat.st_atime_ns, stat.st_size, file) for file in files if (stat := _stat(file)))

    # ---- one shard

    def _fetch(self, entry: _Entry, path: Path) -> None:
        part, note = path.with_name(f"{path.name}.part"), path.with_name("entry.json")
        self._make_room(entry.seen.size, part)
        try:
            with open(part, "r+b") as file:
                sink = _Part(file)
                self._client.fetch(entry.url, entry.seen, sink)
                file.flush()
                os.fsync(file.fileno())
            before = _note(note, _ENTRY).get("sha256", sink.sha256)
            if sink.sha256 != before:
                raise Unreachable("other bytes than before under the same ETag and size: empty the cache, start again")
            written = {"url": str(entry.url), **entry.seen._asdict(), "sha256": sink.sha256, "fetched": time.time()}
            temporary = path.with_name("entry.json.tmp")
            temporary.write_text(json.dumps(written), encoding="utf-8")
            os.replace(temporary, note)
            with _locked(self.cache_dir / "lock"):  # a shard between two names would be counted under neither
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class _Part:
    """The shard while it is fetched: bytes in order, and their hash."""

    def __init__(self, file: io.BufferedRandom) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        self.at = 0
        self._file.seek(0)
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.at += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Alone among the threads and processes of the machine; the end of a process ends its lock."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_abandoned(part: Path) -> bool:
    """Whether nobody is writing: its process has ended."""
    with open(part.with_name("lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _touched(path: Path, size: int) -> bool:
    """Whether the whole shard is there; it then counts as used now."""
    if not _is_whole(path, size):
        return False
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except OSError:  # given up by another process just now, or the cache of another user
        return path.exists()
    return True


def _is_whole(path: Path, size: int) -> bool:
    stat = _stat(path)
    return stat is not None and stat.st_size == size > 0


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _note(file: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """A JSON object that has these keys with these types; anything else counts as never written."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(note, dict) and all(type(note.get(key)) is kind for key, kind in kinds.items())
    return note if whole else {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]  # an ETag is bytes


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
