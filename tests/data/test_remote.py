"""Shards over http, from a real server on this machine that stalls, cuts, lies and changes its mind."""

import http.server
import inspect
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest

from ldm.data import web
from ldm.data.remote import Remote
from ldm.data.shards import open_dataset
from ldm.data.splits import open_splits
from ldm.errors import LdmError
from tests.data.making import sample, write_shards, write_tar

pytest.importorskip("aiohttp")

RANGE = 4096


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with ranges and ETags. Before it answers a GET as it should, the next of `faults` may answer.

    A fault is called with (handler, data, start, stop), the file and the part that was asked for, and returns whether
    it has answered. seen: (method, path, headers) of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: deque = deque()
        self.seen: list = []
        self.ranges, self.dates, self.redirect, self.head, self.heard = True, False, {}, {}, True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, name: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def gets(self) -> list:
        return [(path, headers.get("Range")) for method, path, headers in self.seen if method == "GET"]

    def serve(self, folder: Path, at: str = "") -> "Server":
        for file in sorted(folder.glob("*.tar")):
            self.files[f"/{at}{file.name}"] = file.read_bytes()
        return self


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        if location := self.server.redirect.get(self.path):
            return self.reply(302, b"", {"Location": location})
        data = self.server.files.get(self.path)
        if data is None:
            return self.reply(404, b"<html>nothing here</html>")
        said = self.headers.get("Range") if self.server.ranges else None
        start, stop = (int(n) for n in said[6:].split("-")) if said else (0, len(data) - 1)
        stop = min(stop + 1, len(data))
        if body and self.server.faults and self.server.faults.popleft()(self, data, start, stop):
            return None
        matches = self.headers.get("If-Range", self.etag(data)) == self.etag(data)
        if not body:
            return self.reply(200, b"", {"Content-Length": str(len(data)), **self.same(data), **self.server.head})
        if said and matches:
            return self.part(data, start, stop)
        return self.reply(200, data, self.same(data))

    def part(self, data: bytes, start: int, stop: int, **other: str) -> None:
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", **self.same(data)}
        self.reply(206, data[start:stop], headers | {name.replace("_", "-"): value for name, value in other.items()})

    def etag(self, data: bytes) -> str:
        return f'"{hash(data):x}"'

    def same(self, data: bytes) -> dict[str, str]:
        return {"Last-Modified": f"{hash(data):x}"} if self.server.dates else {"ETag": self.etag(data)}

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with Server() as running:
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small ranges; pauses are noted and not made."""
    pauses: list[float] = []
    monkeypatch.setattr(web, "RANGE", RANGE)
    monkeypatch.setattr(web.time, "sleep", pauses.append)
    monkeypatch.setattr("ldm.data.remote._PATIENCE_S", 0)
    for name in ("LDM_HTTP_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    web._down.clear()
    return pauses


@pytest.fixture
def remote(tmp_path):
    def made(**settings) -> Remote:
        defaults = {"allow": ["127.0.0.1"], "cache_dir": str(tmp_path / "cache"), "retries": 2, "timeout_s": 0.5}
        return Remote(**{**defaults, **settings})

    return made


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", [3, 70, 5])


def texts(dataset) -> list[bytes]:
    return [dataset.read(i)["txt"] for i in range(dataset.num_samples)]


def refusal(path, remote, **settings) -> str:
    with pytest.raises(LdmError) as refused:
        open_dataset(path, remote=remote, **settings)
    assert refused.value.exit_code == 2
    return str(refused.value)


def left(tmp_path) -> list[str]:
    """What lies in the cache that is, or could be taken for, a shard."""
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.suffix in (".tar", ".part"))


ALL = "train-{000000..000002}.tar"


# ---- what works


def test_shards_are_those_of_the_folder(server, remote, shards, tmp_path, capsys):
    server.serve(shards)
    local, far = open_dataset(str(shards)), open_dataset(server.url(ALL), remote=remote())
    assert texts(far) == texts(local) == [b"caption %d" % n for n in range(78)]
    assert far.manifest_hash == local.manifest_hash  # a run may go on from the one with the other
    assert far.shard_name(77) == "train-000002.tar"
    assert "remote: 0.18 MB to fetch into" in capsys.readouterr().err
    # ranges one after another, nothing twice, nothing but what was asked for
    size = len(server.files["/train-000001.tar"])
    cuts = [f"bytes={a}-{min(a + RANGE, size) - 1}" for a in range(0, size, RANGE)]
    assert [said for path, said in server.gets() if path == "/train-000001.tar"] == cuts
    header = next(headers for method, _, headers in server.seen if method == "GET")
    assert header["User-Agent"] == "ldm/0.1.0" and header["Accept-Encoding"] == "identity" and header["If-Range"]
    assert set(header) <= {"Host", "Accept", "Range", "If-Range", "User-Agent", "Accept-Encoding"}
    # the next start asks whether they changed, and fetches nothing
    server.seen.clear()
    again = open_dataset(server.url(ALL), remote=remote())
    assert again.manifest == far.manifest and len(server.seen) == 3 and not server.gets()
    assert "indexed" not in capsys.readouterr().err


def test_lists_mixed_with_folders_repeats_and_validation(server, remote, shards, tmp_path):
    server.serve(shards)
    near = write_shards(tmp_path / "near", [2])
    far = [server.url("train-000002.tar"), str(near), server.url("train-{000000,000002}.tar")]
    data = open_dataset(far, remote=remote())
    assert [path.name for path in data.shards] == ["train-000002.tar", "train-000000.tar", "train-000000.tar"]
    assert data.num_samples == 5 + 2 + 3
    train, val = open_splits(
        server.url("train-000001.tar"), server.url("train-000000.tar"), repeats=[2], remote=remote()
    )
    assert train.repeats.sum() == 140 and val.num_samples == 3
    train, val = open_splits([server.url("train-000001.tar"), str(near)], remote=remote())
    assert train.num_samples == 72 and val is None


def test_equal_names_are_not_mixed_up(server, remote, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "etag", lambda *_: '"same"')
    for number, folder in enumerate("ab"):
        write_tar(tmp_path / "00000.tar", sample(number))
        server.serve(tmp_path, f"{folder}/")
    data = open_dataset([server.url("a/00000.tar"), server.url("b/00000.tar")], remote=remote())
    assert texts(data) == [b"caption 0", b"caption 1"]
    next((tmp_path / "cache").rglob("00000.tar")).unlink()
    assert texts(pickle.loads(pickle.dumps(data))) == [b"caption 0", b"caption 1"]  # in a process that was spawned


def test_torch_is_not_imported_and_aiohttp_only_for_urls(server, shards, tmp_path):
    server.serve(shards)
    program = """
import sys
from ldm.data.remote import Remote
from ldm.data.shards import open_dataset
remote = Remote(allow=["127.0.0.1"], cache_dir=sys.argv[3])
open_dataset(sys.argv[1], remote=remote)
assert "aiohttp" not in sys.modules and "fsspec" not in sys.modules
open_dataset(sys.argv[2], remote=remote)
assert "aiohttp" in sys.modules and "torch" not in sys.modules
"""
    paths = [str(shards), server.url(ALL), str(tmp_path / "cache")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)


# ---- a server with bad days


def unavailable(handler, data, start, stop):
    return handler.reply(503, b"come back later") or True


def cut(handler, data, start, stop):
    """Ten bytes of what was promised, then the line goes dead."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    handler.send_header("Content-Length", str(stop - start))
    handler.send_header("ETag", handler.etag(data))
    handler.end_headers()
    handler.wfile.write(data[start : start + 10])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def stall(handler, data, start, stop, after=10):
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    handler.send_header("Content-Length", str(stop - start))
    handler.send_header("ETag", handler.etag(data))
    handler.end_headers()
    handler.wfile.write(data[start : start + after])
    handler.wfile.flush()
    threading.Event().wait(1)
    handler.close_connection = True
    return True


def drip(handler, data, start, stop):
    """A byte now and then: never silent, never done."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    handler.send_header("Content-Length", str(stop - start))
    handler.send_header("ETag", handler.etag(data))
    handler.end_headers()
    try:
        for byte in range(start, stop):
            handler.wfile.write(data[byte : byte + 1])
            handler.wfile.flush()
            threading.Event().wait(0.05)
    except OSError:
        pass
    handler.close_connection = True
    return True


def nothing(handler, data, start, stop):
    """A body without a length that ends at once."""
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("ETag", handler.etag(data))
    handler.end_headers()
    handler.wfile.write(b"0\r\n\r\n")
    return True


def well(*_):
    return False


@pytest.mark.parametrize("fault", [unavailable, cut, stall], ids=lambda f: f.__name__)
def test_a_failure_is_tried_again_from_where_it_broke(server, remote, shards, quick, fault):
    server.serve(shards)
    server.faults.extend([well, fault, fault])
    data = open_dataset(server.url("train-000001.tar"), remote=remote())
    assert texts(data) == [b"caption %d" % n for n in range(3, 73)]
    began = [int(said[6:].split("-")[0]) for _, said in server.gets()]
    step = 0 if fault is unavailable else 10
    assert began[:4] == [0, RANGE, RANGE + step, RANGE + 2 * step] and began[4] == 2 * RANGE
    assert quick == [0.5, 1.0]


def test_retries_are_bounded_and_all_failures_are_in_one_report(server, remote, shards, tmp_path):
    server.serve(shards)
    server.faults.extend([unavailable] * 3)
    line = refusal([server.url("train-000000.tar"), server.url("train-000009.tar"), server.url("none.tar")], remote())
    assert "3 of 3 shards cannot be used" in line
    assert "train-000000.tar: the server answers 503 Service Unavailable; attempt 3 of 3" in line
    assert "train-000009.tar: the server answers 404 Not Found" in line and "none.tar: " in line
    assert server.url("train-000000.tar") in line and "cache" not in line
    assert "<html>" not in line and "come back" not in line
    assert len(server.gets()) == 3 and left(tmp_path) == []
    assert open_dataset(server.url("train-000000.tar"), remote=remote()).num_samples == 3


@pytest.mark.parametrize("fault", [cut, drip, nothing], ids=lambda f: f.__name__)
def test_no_attempt_goes_on_for_ever(server, remote, shards, tmp_path, fault):
    server.serve(shards)
    server.faults.extend([fault] * 3)
    began = time.monotonic()
    line = refusal(server.url("train-000001.tar"), remote(timeout_s=0.2))
    assert {cut: "cut off", nothing: "cut off at byte 0;", drip: "silent or too slow"}[fault] in line
    assert time.monotonic() - began < 5 and len(server.gets()) == 3 and left(tmp_path) == []


def test_a_host_that_is_down_is_not_waited_for_a_thousand_times(server, remote, shards, quick, tmp_path):
    server.serve(shards)
    open_dataset(server.url("train-000000.tar"), remote=remote())
    port = server.server_port
    server.shutdown()
    server.server_close()
    web._filesystem.cache_clear()  # and with it the connections that are open
    line = refusal(f"http://127.0.0.1:{port}/train-{{000000..000199}}.tar", remote(retries=2))
    assert "200 of 200" in line and "no connection (Connection refused)" in line and len(quick) <= 2 * 16
    assert "train-000000.tar: no connection" in line
    assert line.count("data.remote.offline=true uses the copy in the cache") == 1


def test_a_host_that_swallows_connections_is_down_as_well(remote, quick):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first, socket.socket() as second:
        for client in (first, second):  # its queue is full: the system answers no further one
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        far = remote(timeout_s=0.2, retries=1)
        urls = [f"http://127.0.0.1:{full.getsockname()[1]}/{n}.tar" for n in range(2)]
        lines = [refusal(url, far) for url in urls]
    assert "0.tar: no connection (no answer); attempt 2 of 2" in lines[0]
    assert "1.tar: no connection (no answer); attempt 1 of 2" in lines[1] and quick == [0.5]


# ---- a server that lies


def other_range(handler, data, start, stop):
    return handler.part(data, start, stop, Content_Range=f"bytes {start + 1}-{stop}/{len(data)}") or True


def other_total(handler, data, start, stop):
    return handler.part(data, start, stop, Content_Range=f"bytes {start}-{stop - 1}/{len(data) + 512}") or True


def no_range(handler, data, start, stop):
    return handler.part(data, start, stop, Content_Range="") or True


def less_than_asked(handler, data, start, stop):
    return handler.part(data, start, start + 1) or True


def longer_body(handler, data, start, stop):
    headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", "ETag": handler.etag(data)}
    return handler.reply(206, data[start:stop] + b"more", headers) or True


def longer_file(handler, data, start, stop):
    return handler.reply(200, data + bytes(512), {"ETag": handler.etag(data)}) or True


def endless(handler, data, start, stop):
    """No length, chunk after chunk."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("ETag", handler.etag(data))
    handler.end_headers()
    try:
        for _ in range(1000):
            handler.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")
    except OSError:
        pass
    handler.close_connection = True
    return True


def compressed(handler, data, start, stop):
    return handler.part(data, start, stop, Content_Encoding="gzip") or True


def other_etag(handler, data, start, stop):
    return handler.part(data, start, stop, ETag='"other"') or True


def no_etag(handler, data, start, stop):
    return handler.part(data, start, stop, ETag="") or True


def digits(handler, data, start, stop):
    return handler.part(data, start, stop, Content_Range=f"bytes {start}-{stop - 1}/{'1' * 5000}") or True


def other_digits(handler, data, start, stop):
    """Arabic ones, which int() reads."""
    total = "".join(chr(0x660 + int(digit)) for digit in str(len(data))).encode().decode("latin-1")
    return handler.part(data, start, stop, Content_Range=f"bytes {start}-{stop - 1}/{total}") or True


LIES = {
    other_range: "another range",
    other_total: "another range",
    no_range: "another range",
    less_than_asked: "another range",
    longer_body: "more than bytes",
    longer_file: "another number of bytes",
    endless: "more than bytes",
    compressed: "compresses",
    other_etag: "changed on the server",
    no_etag: "changed on the server",
    digits: "another range",
    other_digits: "another range",
}


@pytest.mark.parametrize("fault", LIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("first", [0, 2])
def test_lies_are_refused(server, remote, shards, tmp_path, fault, first):
    server.serve(shards)
    server.faults.extend([well] * first + [fault])
    line = refusal(server.url("train-000001.tar"), remote())
    assert LIES[fault] in line and len(server.gets()) == first + 1 and left(tmp_path) == []
    assert open_dataset(server.url("train-000001.tar"), remote=remote()).num_samples == 70


@pytest.mark.parametrize(
    "head, words", [({"Content-Length": ""}, "how long"), ({"Content-Length": "0"}, "the file is empty")]
)
def test_a_size_is_needed(server, remote, shards, head, words):
    server.serve(shards).head = head
    assert words in refusal(server.url("train-000001.tar"), remote()) and not server.gets()


def test_a_page_instead_of_a_shard(server, remote):
    server.files["/train-000000.tar"] = b"<!doctype html><title>Sign in</title>" + b" " * 2000
    assert "train-000000.tar" in (line := refusal(server.url("train-000000.tar"), remote())) and "HTML" in line


@pytest.mark.parametrize("etag", ['"\xff\xfe"', '"\xc3\xa9"', '"a\tb"'])
def test_an_etag_is_any_bytes(server, remote, shards, etag, monkeypatch):
    monkeypatch.setattr(Handler, "etag", lambda *_: etag)
    server.serve(shards)
    before = open_dataset(server.url(ALL), remote=remote())
    assert before.num_samples == 78 and not any("If-Range" in headers for _, _, headers in server.seen)
    server.seen.clear()
    assert open_dataset(server.url(ALL), remote=remote()).manifest == before.manifest and not server.gets()
    assert open_dataset(server.url(ALL), remote=remote(offline=True)).manifest == before.manifest


def test_an_answer_that_cannot_be_read(server, remote, shards, monkeypatch):
    """Whatever a header makes Python's own functions raise."""

    def raising(answer):
        raise UnicodeEncodeError("utf-8", "secret", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(web, "_etag", raising)
    line = refusal(server.serve(shards).url("train-000000.tar"), remote())
    assert "train-000000.tar: an answer that cannot be read (UnicodeEncodeError)" in line and "secret" not in line


@pytest.mark.parametrize("how", ["etag", "date", "if-range", "whole"])
def test_two_versions_are_never_joined(server, remote, tmp_path, how):
    """The file is replaced by one of the same size while it is fetched."""
    server.dates, server.ranges = how == "date", how != "whole"
    for name, first in (("old", 0), ("new", 500)):
        write_tar(tmp_path / f"{name}.tar", [member for n in range(first, first + 60) for member in sample(n)])
    old, new = ((tmp_path / f"{name}.tar").read_bytes() for name in ("old", "new"))
    assert len(old) == len(new)
    server.files["/a.tar"] = old

    def change(handler, data, start, stop):
        server.files["/a.tar"] = new
        if how == "etag":  # who does not heed If-Range
            return handler.part(new, start, stop) or True
        return handler.reply(503, b"") or True

    server.faults.extend([change] if how == "whole" else [well, well, change])
    assert "changed on the server while it was fetched" in refusal(server.url("a.tar"), remote())
    assert left(tmp_path) == []
    after = open_dataset(server.url("a.tar"), remote=remote())
    assert texts(after) == [b"caption %d" % n for n in range(500, 560)]


def test_a_changed_shard_is_fetched_and_indexed_anew(server, remote, shards, tmp_path):
    server.serve(shards)
    before = open_dataset(server.url(ALL), remote=remote())
    write_tar(tmp_path / "new.tar", sample(900) + sample(901))
    server.files["/train-000001.tar"] = (tmp_path / "new.tar").read_bytes()
    server.seen.clear()
    after = open_dataset(server.url(ALL), remote=remote())
    assert after.num_samples == 3 + 2 + 5 and after.manifest_hash != before.manifest_hash
    assert {path for path, _ in server.gets()} == {"/train-000001.tar"}
    assert texts(before)[3] == b"caption 3"  # who began with the old one goes on with it


def test_a_server_without_ranges(server, remote, shards, tmp_path):
    server.serve(shards).ranges = False

    def cut_whole(handler, data, start, stop):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("ETag", handler.etag(data))
        handler.end_headers()
        handler.wfile.write(data[:9000])
        handler.close_connection = True
        return True

    server.faults.extend([cut_whole, cut_whole])
    data = open_dataset(server.url("train-000001.tar"), remote=remote())
    assert texts(data) == [b"caption %d" % n for n in range(3, 73)] and len(server.gets()) == 3
    server.faults.extend([cut_whole] * 3)
    assert "cut off" in refusal(server.url("train-000002.tar"), remote())

    def stall_whole(handler, data, start, stop):
        handler.reply(200, b"", {"Content-Length": str(len(data)), "ETag": handler.etag(data)})
        handler.wfile.write(data[:10])
        threading.Event().wait(10)
        return True

    began = time.monotonic()  # the time that the whole file may take is long; silence is noticed all the same
    server.faults.append(stall_whole)
    assert open_dataset(server.url("train-000002.tar"), remote=remote(timeout_s=2)).num_samples == 5
    assert time.monotonic() - began < 9


# ---- where requests may go


def test_hosts_must_be_allowed(server, remote, shards):
    server.serve(shards)
    line = refusal([server.url(ALL), "https://example.org/{a,b}.tar"], remote(allow=["localhost"]))
    assert "127.0.0.1, example.org" in line and "set data.remote.allow=[localhost,127.0.0.1,example.org]" in line
    assert "not a local path" in refusal(server.url(ALL), None)
    assert not server.seen
    for bad in ("*", "*.example.org", "http://example.org", "example.org:80", "", "a/b", "a@b"):
        with pytest.raises(LdmError, match=r"data\.remote\.allow"):
            remote(allow=[bad])
    for key, value in {"cache_gb": 0, "timeout_s": "soon", "retries": -1}.items():
        with pytest.raises(LdmError, match=rf"data\.remote\.{key}"):
            remote(**{key: value})
    assert remote(allow="Example.org").allow == ("example.org",)
    infinite, no_number = float("inf"), float("nan")
    for key, values in {
        "allow": [5, [5], None, {"a": 1}, b"h"],
        "cache_dir": [5, True],
        "cache_gb": ["5", True, infinite, no_number, 10**400, -1],
        "retries": [0.5, 3.0, True, "3", None, 10**400],
        "timeout_s": [infinite, no_number, 0, True, "30"],
        "offline": ["no", 0, None],
    }.items():
        for value in values:
            with pytest.raises(LdmError, match=rf"CONFIG.*data\.remote\.{key}"):
                remote(**{key: value})
    assert remote(allow=["::1", "[0:0::2]"]).allow == ("[::1]", "[::2]")


@pytest.mark.parametrize(
    "url, words",
    {
        "http://user:secret@h/a.tar": "a user or a password",
        "http://user:sec/ret@h/a.tar": "without a plain host name",
        "https://h/a.tar?sig=secret": "? or #",
        "https://h?secret/a.tar": "? or #",
        "https://h/a.tar#secret": "? or #",
        "http://h/": "not the name of a .tar",
        "http://h": "not the name of a .tar",
        "http://h/shards/": "not the name of a .tar",
        "http://h/*.tar": "cannot be searched",
        "http://h/[ab].tar": "cannot be searched",
        "http://h/a b.tar": "write a space as %20",
        "http://h/../a.tar": "no . or ..",
        "http://h/ä.tar": "must be encoded",
        "http://h/a\r\nX: y.tar": "must be encoded",
        "http:///a.tar": "without a plain host name",
        "http://h\\@g/a.tar": "a user or a password",
        "http://h\\g/a.tar": "without a plain host name",
        "http://h:0/a.tar": "without a plain host name",
        "http://h:99999/a.tar": "without a plain host name",
        "http://[::1/a.tar": "without a plain host name",
        "http://hé/a.tar": "without a plain host name",
        "http://h/.tar": "not the name of a .tar",
        "http://h/x/..TAR": "not the name of a .tar",
        f"http://h/a{'.' * 300}.tar": "not the name of a .tar",
    }.items(),
)
def test_urls(url, words, remote):
    line = refusal(url, remote(allow=["h"]))
    assert words in line and "sec" not in line and "\n" not in line


@pytest.mark.parametrize(
    "path", ["pipe:cat x", "s3://b/a.tar", "http://h/a.tar::b.tar", "hf://a/b.tar", "file:///a.tar"]
)
def test_other_schemes_stay_refused(path, remote):
    refusal(path, remote(allow=["h"]))


def test_names_and_ports():
    assert str(web.parse_url("HTTPS://H.org:443/x/a%20b.tar", "")) == "https://h.org/x/a%20b.tar"
    assert str(web.parse_url("http://[::1]:8080/a.tar", "")) == "http://[::1]:8080/a.tar"
    assert web.parse_url("http://h/x/a%20b=.tar", "").name == "a_20b_.tar"
    assert web.parse_url("http://h/.a.tar", "").name == "a.tar"
    assert len(web.parse_url(f"http://h/{'a' * 999}.tar", "").name) == 200


@pytest.fixture
def found(monkeypatch):
    """Says where hosts are; counts the questions."""
    places, asked = {}, []

    def getaddrinfo(host, port, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, port)) for place in places[host]]

    monkeypatch.setattr(web.socket, "getaddrinfo", getaddrinfo)
    web.addresses.cache_clear()
    yield places, asked
    web.addresses.cache_clear()


PRIVATE = ["10.0.0.5", "127.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0", "::1", "fe80::1%eth0", "fd00::1"]
PRIVATE += ["224.0.0.1", "100.64.0.1"]


INSIDE = {  # an IPv4 address that an IPv6 address stands for
    "::ffff:10.0.0.5": "10.0.0.5",
    "64:ff9b::a9fe:a9fe": "169.254.169.254",
    "2002:a00:5::1": "10.0.0.5",
    "::127.0.0.1": "127.0.0.1",
    "::10.0.0.5": "10.0.0.5",
}
PRIVATE += [*INSIDE, "64:ff9b:1::a00:5", "fec0::1", "2001:0:4136:e378:8000:63bf:f5ff:fffa", "::"]


@pytest.mark.parametrize("place", PRIVATE)
def test_private_addresses_are_refused(found, remote, place):
    places, _ = found
    places["data.example.org"] = ["93.184.216.34", place]
    line = refusal("http://data.example.org/a.tar", remote(allow=["data.example.org"]))
    address = INSIDE.get(place, place.partition("%")[0])
    assert f"private address {address}" in line and "data.remote.allow" in line
    named = frozenset(["data.example.org", web.plain_host(address)])
    assert web.addresses("data.example.org", named) == ("93.184.216.34", place)


def test_public_addresses_and_localhost(found):
    places, _ = found
    places |= {"a.org": ["93.184.216.34"], "localhost": ["127.0.0.1", "::1"], "2130706433": ["127.0.0.1"]}
    places["6.org"] = ["2606:2800:220:1::1", "64:ff9b::5db8:d822", "2002:5db8:d822::1", "::ffff:93.184.216.34"]
    assert web.addresses("a.org", frozenset()) == ("93.184.216.34",)
    assert web.addresses("6.org", frozenset()) == tuple(places["6.org"])
    assert web.addresses("localhost", frozenset(["localhost"])) == ("127.0.0.1", "::1")
    with pytest.raises(LdmError, match="private"):  # an address in disguise
        web.addresses("2130706433", frozenset(["2130706433"]))


def test_addresses_are_pinned(found, server, remote, shards):
    """The name is asked for once: that it leads elsewhere a moment later changes nothing."""
    places, asked = found
    places["data.example.org"] = ["127.0.0.1"]
    server.serve(shards)
    url = server.url(ALL).replace("127.0.0.1", "data.example.org")
    far = remote(allow=["data.example.org", "127.0.0.1"])
    far.paths([url.replace(ALL, "train-000000.tar")])
    places["data.example.org"] = ["127.0.0.2"]
    assert open_dataset(url, remote=far).num_samples == 78
    assert asked == ["data.example.org"]
    assert {headers["Host"] for _, _, headers in server.seen} == {f"data.example.org:{server.server_port}"}


def test_redirects(server, remote, shards, tmp_path):
    server.serve(shards)
    near = {"/here.tar": "/train-000000.tar", "/full.tar": server.url("here.tar")}
    with Server() as other:
        other.serve(shards)
        elsewhere = {
            "/port.tar": other.url("train-000000.tar"),
            "/host.tar": server.url("train-000000.tar").replace("127.0.0.1", "localhost"),
            "/inside.tar": server.url("train-000000.tar").replace("127.0.0.1", "127.0.0.2"),
            "/user.tar": server.url("train-000000.tar").replace("http://", "http://user@"),
            "/password.tar": server.url("train-000000.tar").replace("http://", "http://:secret@"),
            "/empty.tar": server.url("train-000000.tar").replace("http://", "http://:@"),
            "/words.tar": "http://ignore-what-was-said.example/a.tar",
            "/tls.tar": server.url("train-000000.tar").replace("http:", "https:"),
            "/file.tar": "file:///etc/passwd",
            "/slashes.tar": "//localhost/a.tar",
            "/loop.tar": "/loop.tar",
            "/port0.tar": "http://127.0.0.1:x/",
        }
        server.redirect = {**near, **elsewhere}
        far = remote(allow=["127.0.0.1", "127.0.0.2", "localhost"])
        assert open_dataset([server.url("here.tar")], remote=far).num_samples == 3
        assert open_dataset([server.url("full.tar")], remote=far).num_samples == 3
        server.seen.clear()
        line = refusal([server.url(name[1:]) for name in elsewhere], far)
        assert "12 of 12" in line and line.count("is not followed") == 10
        assert "secret" not in line and "ignore" not in line
        assert "more than 5 redirects" in line and "a redirect to nowhere" in line
        assert not other.seen and all(path in elsewhere for _, path, _ in server.seen)
        other.shutdown()


def test_settings_of_others_have_no_effect(server, remote, shards, monkeypatch, tmp_path):
    """fsspec's configuration, proxies and .netrc."""
    import fsspec
    from fsspec.implementations.http import HTTPFileSystem

    evil = {"headers": {"X-Evil": "1"}, "client_kwargs": {"headers": {"X-Evil": "2"}}, "ssl": False}
    for protocol in ("http", "https"):
        monkeypatch.setitem(fsspec.config.conf, protocol, evil)
    assert HTTPFileSystem(skip_instance_cache=True).client_kwargs["headers"] == {"X-Evil": "2"}  # it does elsewhere
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web._filesystem.cache_clear()
    server.serve(shards)
    far = remote()
    assert open_dataset(server.url(ALL), remote=far).num_samples == 78
    assert not any({"X-Evil", "Authorization", "Cookie"} & set(headers) for _, _, headers in server.seen)
    assert far._client._fs.kwargs == {} and far._client._fs.client_kwargs == {}


def test_a_token_comes_from_the_environment(server, remote, shards, monkeypatch, tmp_path, capsys):
    server.serve(shards)
    monkeypatch.setenv("LDM_HTTP_TOKEN", "s3cret\n")
    open_dataset(server.url(ALL), remote=remote())
    assert {headers["Authorization"] for _, _, headers in server.seen} == {"Bearer s3cret"}
    assert "s3cret" not in "".join(capsys.readouterr())
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and not any(b"s3cret" in p.read_bytes() for p in files)
    server.seen.clear()
    far = remote(allow=["127.0.0.1", "localhost", "127.0.0.2"])
    for path in ([server.url(ALL), "https://localhost/a.tar"], server.url(ALL).replace("127.0.0.1", "127.0.0.2")):
        line = refusal(path, far)
        assert "LDM_HTTP_TOKEN" in line and "s3cret" not in line
    assert not server.seen
    for token in ("s3cret\nX-Evil: 1", "s3crét"):
        monkeypatch.setenv("LDM_HTTP_TOKEN", token)
        line = refusal(server.url(ALL), far)
        assert "LDM_HTTP_TOKEN has characters that no token has" in line and "s3c" not in line
    assert not server.seen


def test_the_token_goes_to_one_host_in_all(server, remote, shards, monkeypatch):
    """The sets for training and validation are asked for one after the other."""
    server.serve(shards)
    monkeypatch.setenv("LDM_HTTP_TOKEN", "s3cret")
    there = server.url(ALL).replace("127.0.0.1", "localhost")
    far = remote(allow=["127.0.0.1", "localhost"])
    with pytest.raises(LdmError, match="LDM_HTTP_TOKEN goes to a single host"):
        open_splits(server.url(ALL), there, remote=far)
    assert {headers["Host"] for _, _, headers in server.seen} == {f"127.0.0.1:{server.server_port}"}
    train, val = open_splits(server.url("train-000001.tar"), server.url("train-000000.tar"), remote=far)
    assert (train.num_samples, val.num_samples) == (70, 3)


def test_tls_is_verified(server, remote, shards, tmp_path):
    import ssl

    if not shutil.which("openssl"):
        pytest.skip("needs the program openssl")
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    made += " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    subprocess.run(made.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server.serve(shards).socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    line = refusal(server.url(ALL).replace("http:", "https:"), remote())
    assert "no trusted connection" in line and not server.seen


def test_without_the_package(remote, monkeypatch, server, shards):
    web._filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    line = refusal(server.serve(shards).url(ALL), remote())
    assert "aiohttp" in line and 'pip install "ldm[remote]"' in line


# ---- the cache


def test_one_process_fetches_and_the_others_wait(server, shards, tmp_path):
    server.serve(shards)
    program = """
import sys
from ldm.data import web
from ldm.data.remote import Remote
from ldm.data.shards import open_dataset
web.RANGE = 4096
print(open_dataset(sys.argv[1], remote=Remote(allow=["127.0.0.1"], cache_dir=sys.argv[2])).num_samples)
"""
    server.faults.extend([lambda *_: bool(threading.Event().wait(0.5))] * 3)  # time for the others to come
    args = [sys.executable, "-c", program, server.url(ALL), str(tmp_path / "cache")]
    running = [subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [process.communicate(timeout=60)[0] for process in running] == [b"78\n"] * 3
    assert len(server.gets()) == len(set(server.gets()))
    assert sum(method == "HEAD" for method, _, _ in server.seen) == 9


def test_those_who_waited_for_a_failure_do_not_repeat_it(server, remote, shards, monkeypatch, tmp_path):
    monkeypatch.setattr("ldm.data.remote._PATIENCE_S", 60)
    server.serve(shards)
    runs = [remote(timeout_s=5) for _ in range(3)]
    (path,) = {run.paths([server.url("train-000000.tar")])[0] for run in runs}
    go, reasons = threading.Event(), []
    server.faults.extend([lambda *args: go.wait(5) and unavailable(*args), unavailable, unavailable])

    def wait(run):
        with pytest.raises(web.Unreachable) as failed:
            run.ensure(path)
        reasons.append(str(failed.value))

    threads = [threading.Thread(target=wait, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    threading.Event().wait(0.3)  # all are at the lock
    go.set()
    for thread in threads:
        thread.join()
    assert reasons == ["the server answers 503 Service Unavailable; attempt 3 of 3"] * 3 and len(server.gets()) == 3
    with pytest.raises(web.Unreachable, match="503"):  # and who comes a moment later
        runs[1].ensure(path)
    assert len(server.gets()) == 3
    # a run that begins afterwards has its own attempts, and what is there is there for all
    assert open_dataset(server.url("train-000000.tar"), remote=remote()).num_samples == 3
    assert runs[0].ensure(path) is None and not list((tmp_path / "cache").rglob("failed.json"))


def test_quick_refusals_are_not_passed_on(server, remote, shards, monkeypatch, tmp_path):
    """Another run may have another cache_gb, or another token."""
    monkeypatch.setattr("ldm.data.remote._PATIENCE_S", 60)
    server.serve(shards)
    one, other = remote(), remote()
    (path,) = {run.paths([server.url("train-000000.tar")])[0] for run in (one, other)}
    server.faults.append(lambda handler, *_: handler.reply(403, b"") or True)
    for _ in range(2):
        with pytest.raises(web.Unreachable, match="403"):
            one.ensure(path)
    assert len(server.gets()) == 1
    other.ensure(path)
    assert path.exists()


def test_a_silent_server_makes_bad_samples_before_the_loader_gives_up():
    """By default, each attempt being as slow as it may be."""
    from ldm.data.loader import Stream

    ours = {name: given.default for name, given in inspect.signature(Remote).parameters.items()}
    pauses = [0.5 * 2**attempt for attempt in range(ours["retries"])]
    longest = (1 + ours["retries"]) * 2 * ours["timeout_s"] + sum(pauses)
    assert longest < inspect.signature(Stream).parameters["timeout_s"].default - 30


def test_a_shard_changes_its_name_under_the_lock_of_the_cache(server, remote, shards, tmp_path, monkeypatch):
    """Who adds up what lies there would else see it under neither name."""
    import fcntl

    server.serve(shards)
    replace, held = os.replace, []

    def watched(source, target):
        if str(target).endswith(".tar"):
            with open(tmp_path / "cache" / "lock", "ab") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(False)
                except BlockingIOError:
                    held.append(True)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    open_dataset(server.url(ALL), remote=remote())
    assert held == [True] * 3


def test_a_crash_leaves_nothing_that_is_taken_for_whole(server, remote, shards, tmp_path):
    server.serve(shards)
    program = """
import sys
from ldm.data import web
from ldm.data.remote import Remote
web.RANGE = 4096
remote = Remote(allow=["127.0.0.1"], cache_dir=sys.argv[2])
remote.ensure(remote.paths([sys.argv[1]])[0])
"""
    server.faults.extend([well, well, lambda *a: stall(*a, after=1000)])
    args = [sys.executable, "-c", program, server.url("train-000001.tar"), str(tmp_path / "cache")]
    process = subprocess.Popen(args, stderr=subprocess.DEVNULL)
    while len(server.gets()) < 3:
        assert process.poll() is None
        threading.Event().wait(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left(tmp_path) == ["train-000001.tar.part"]
    part = next((tmp_path / "cache").rglob("*.part"))
    assert part.stat().st_size == len(server.files["/train-000001.tar"])  # as long as the whole: the name tells
    server.faults.clear()
    data = open_dataset(server.url("train-000001.tar"), remote=remote())
    assert texts(data) == [b"caption %d" % n for n in range(3, 73)]
    assert left(tmp_path) == ["train-000001.tar"]
    # what another run left behind gives way when room is needed
    part.touch()
    os.truncate(part, 10**6)
    os.utime(part, (1, 1))  # longer ago than the shard: a clock that ticks coarsely may say otherwise
    open_dataset(server.url("train-000000.tar"), remote=remote(cache_gb=0.0005))
    assert left(tmp_path) == ["train-000000.tar", "train-000001.tar"]


def test_ctrl_c_does_not_wait_for_a_shard(server, remote, shards, tmp_path):
    server.serve(shards)
    server.faults.extend([well, drip])

    def interrupt():
        while len(server.gets()) < 2:
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        open_dataset(server.url("train-000001.tar"), remote=remote(timeout_s=60))
    assert time.monotonic() - began < 10 and left(tmp_path) == []


def test_a_shortened_file_is_fetched_again(server, remote, shards, tmp_path):
    server.serve(shards)
    open_dataset(server.url("train-000000.tar"), remote=remote())
    path = next((tmp_path / "cache").rglob("*.tar"))
    os.truncate(path, 5000)
    assert open_dataset(server.url("train-000000.tar"), remote=remote()).read(2)["txt"] == b"caption 2"


def test_what_was_used_longest_ago_gives_way(server, remote, tmp_path):
    server.serve(write_shards(tmp_path / "many", [1] * 4))
    size = len(server.files["/train-000000.tar"])
    for number in (0, 1, 2, 0):
        open_dataset(server.url(f"train-00000{number}.tar"), remote=remote(cache_gb=3 * size / 1e9))
    open_dataset(server.url("train-000003.tar"), remote=remote(cache_gb=3 * size / 1e9))
    assert left(tmp_path) == ["train-000000.tar", "train-000002.tar", "train-000003.tar"]
    server.seen.clear()
    data = open_dataset(server.url("train-000001.tar"), remote=remote())
    assert texts(data) == [b"caption 1"] and len(server.gets()) == -(-size // RANGE)


def test_a_cache_that_is_too_small_is_refused(server, remote, tmp_path, monkeypatch):
    server.serve(write_shards(tmp_path / "many", [1] * 20))
    size = len(server.files["/train-000000.tar"])
    url = server.url("train-{000000..000019}.tar")
    line = refusal(url, remote(cache_gb=15 * size / 1e9))
    assert "neither all shards nor 16 of the largest" in line and "0.20 MB in 20 shards" in line
    assert f"data.remote.cache_gb={20 * size / 1e9:.3g} or more" in line
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "are free on the disk of the cache" in refusal(url, remote())
    assert not server.gets()
    # what other runs left there may give way, though the cache itself could hold more
    (tmp_path / "cache" / "other").mkdir(parents=True)
    (tmp_path / "cache" / "other" / "old.tar").write_bytes(bytes(30 * size))
    assert open_dataset(url, remote=remote()).num_samples == 20
    assert "old.tar" not in left(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_larger_than_the_cache_is_streamed(server, remote, tmp_path, capsys, num_workers):
    from ldm.data.datamodule import DataModule

    server.serve(write_shards(tmp_path / "many", [2] * 40))
    size = len(server.files["/train-000000.tar"])
    far = remote(cache_gb=20 * size / 1e9)
    data = DataModule(server.url("train-{000000..000039}.tar"), image_size=8, remote=far)
    data.configure(seed=0, batch_size=8, num_workers=num_workers, timeout_s=60)
    assert "fetched again in every epoch" in capsys.readouterr().err
    assert len(left(tmp_path)) <= 20
    stream = data.train_dataloader()
    keys = [key for batch in itertools.islice(stream, 30) for key in batch.keys]  # three epochs
    stream.close()
    assert all(sorted(keys[80 * e : 80 * e + 80]) == sorted(set(keys)) for e in range(3)) and len(set(keys)) == 80
    assert not data.ledger.counts
    held = [p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.suffix in (".tar", ".part")]
    assert sum(held) <= far.cache_bytes
    fetched = [path for path, said in server.gets() if said.startswith("bytes=0-")]
    assert len(fetched) > 40


def test_a_shard_that_another_process_gives_up_while_it_is_opened_is_read(tmp_path):
    from ldm.data.shards import Handles

    def opened(path):
        file = io.FileIO(path)
        path.unlink()
        return file

    handles = Handles(opened)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        assert os.pread(handles.get(tmp_path / name), 1, 0) == name.encode()
    assert list(handles._open) == [tmp_path / "b"]  # the first has no room on the disk any more


def test_a_shard_that_cannot_be_fetched_again_is_bad_samples(server, remote, tmp_path):
    server.serve(write_shards(tmp_path / "many", [1] * 20))
    size = len(server.files["/train-000000.tar"])
    data = open_dataset(server.url("train-{000000..000019}.tar"), remote=remote(cache_gb=16 * size / 1e9))
    away = next(i for i, path in enumerate(data.shards) if not path.exists())
    server.faults.extend([unavailable] * 3)
    from ldm.data.decode import BadSample

    with pytest.raises(BadSample) as bad:
        data.read(away)
    assert bad.value.kind == "fetch" and "503" in bad.value.reason
    assert data.read(away)["txt"] == b"caption %d" % away  # later


def test_other_bytes_under_the_same_name_are_refused(server, remote, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "etag", lambda *_: '"same"')
    server.serve(shards)
    open_dataset(server.url("train-000000.tar"), remote=remote())
    next((tmp_path / "cache").rglob("*.tar")).unlink()
    data = bytearray(server.files["/train-000000.tar"])
    data[600] ^= 1
    server.files["/train-000000.tar"] = bytes(data)
    assert "other bytes than before" in refusal(server.url("train-000000.tar"), remote())


def test_offline(server, remote, shards, tmp_path):
    server.serve(shards)
    before = open_dataset(server.url(ALL), remote=remote())
    server.seen.clear()
    there = remote(offline=True, allow=[])
    assert open_dataset(server.url(ALL), remote=there).manifest == before.manifest
    line = refusal(server.url("train-{000002..000003}.tar"), there)
    assert "1 of 2" in line and "train-000003.tar: not in the cache, and data.remote.offline=true" in line
    assert not server.seen
    # what is damaged counts as never written
    notes = {note: note.read_text() for note in (tmp_path / "cache").rglob("entry.json")}
    whole = json.loads(next(iter(notes.values())))
    damaged = [{**whole, key: value} for key in whole for value in (None, [], True)]
    for text in ["[]", "5", "{}", "null", "[" * 10**5, "\0", *map(json.dumps, damaged)]:
        for note in notes:
            note.write_text(text)
        assert "3 of 3" in refusal(server.url(ALL), there)
    for note in notes:
        note.write_text(json.dumps({**whole, "etag": "\ud800"}))
    assert "3 of 3" in refusal(server.url(ALL), there)
    for note, text in notes.items():
        note.write_text(text)
    # of two versions the one that came last
    write_tar(tmp_path / "new.tar", sample(900))
    server.files["/train-000000.tar"] = (tmp_path / "new.tar").read_bytes()
    open_dataset(server.url(ALL), remote=remote())
    assert texts(open_dataset(server.url(ALL), remote=there))[0] == b"caption 900"


def test_a_full_disk(server, remote, shards, tmp_path, monkeypatch):
    server.serve(shards)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm.data.remote._Part.write", full)
    line = refusal(server.url("train-000000.tar"), remote())
    assert "No space left on device" in line and str(tmp_path / "cache") in line and left(tmp_path) == []
    (tmp_path / "file").write_text("")
    assert "cannot make the cache folder" in refusal(server.url(ALL), remote(cache_dir=str(tmp_path / "file" / "x")))


def test_the_note_beside_a_shard(server, remote, shards, tmp_path):
    import hashlib

    server.serve(shards)
    open_dataset(server.url("train-000000.tar"), remote=remote())
    note = json.loads(next((tmp_path / "cache").rglob("entry.json")).read_text())
    data = server.files["/train-000000.tar"]
    assert note["sha256"] == hashlib.sha256(data).hexdigest() and note["size"] == len(data)
    assert note["url"] == server.url("train-000000.tar")
