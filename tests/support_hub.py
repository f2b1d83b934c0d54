"""A Hugging Face hub on loopback, which serves what it is given and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import ssl
import struct
import threading
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Asked:
    """A request that the hub has seen."""

    target: str
    headers: dict[str, str]

    @property
    def token(self):
        return self.headers.get("authorization")


@dataclass
class Hub:
    """`files`: "user/repo/path" → bytes. `listing`: changes to entries of a listing, by the same name.

    `misbehave`: what the next answers do instead; each is called with the handler and the name that was asked for,
    and returns True if it wants a sound answer to follow. Files are misbehaved about, listings by `misbehave_listing`.
    """

    port: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    listing: dict[str, dict] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    misbehave: deque = field(default_factory=deque)
    misbehave_listing: deque = field(default_factory=deque)
    asked: list[Asked] = field(default_factory=list)
    knows_ranges: bool = True
    knows_etags: bool = True
    host: str = "127.0.0.1"
    scheme: str = "http"

    @property
    def url(self):
        return f"{self.scheme}://{self.host}:{self.port}"

    def downloads(self):
        """The requests for files, without those for listings."""
        return [each for each in self.asked if not each.target.startswith("/api/")]

    def build_listing(self, repo):
        siblings = [{"rfilename": ".gitattributes", "size": 12}, {"rfilename": "README.md", "size": 3}]
        for name, data in self.files.items():
            if name.startswith(repo + "/"):
                stored = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 133}
                entry = {"rfilename": name[len(repo) + 1 :], "size": len(data), "blobId": "0" * 40, "lfs": stored}
                siblings.append(entry | self.listing.get(name, {}))
        return {"id": repo, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}


class Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(Asked(self.path, {name.lower(): value for name, value in self.headers.items()}))
        with contextlib.suppress(ConnectionError):
            if path.startswith("/api/models/"):
                repo = path.removeprefix("/api/models/")
                if not hub.misbehave_listing or hub.misbehave_listing.popleft()(self, repo):
                    self.answer_listing(repo)
                return
            name = path.removeprefix("/").replace(f"/resolve/{COMMIT}/", "/").replace("/resolve/main/", "/")
            if not hub.misbehave or hub.misbehave.popleft()(self, name):
                self.answer_file(name)

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for header, value in dict(headers).items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_listing(self, repo):
        if not any(name.startswith(repo + "/") for name in self.hub.files):
            self.answer(401, {"X-Error-Code": "RepoNotFound"}, b'{"error":"Repository not found"}')
            return
        body = json.dumps(self.hub.build_listing(repo)).encode()
        self.answer(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}, body)

    def answer_file(self, name, data=None):
        """The file, or the part that was asked for: Range and If-Range of RFC 9110."""
        data = self.hub.files.get(name) if data is None else data
        if data is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"no")
            return
        start, headers = self.find_start(data), dict(self.hub.headers)
        if self.hub.knows_etags:
            headers["ETag"] = build_etag(data)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers.setdefault("Content-Length", str(len(data) - start))
        self.answer(206 if start else 200, headers, data[start:])

    def find_start(self, data):
        wanted = self.headers.get("Range")
        is_same = self.headers.get("If-Range") in (None, build_etag(data))
        if not self.hub.knows_ranges or not wanted or not is_same:
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))


def build_etag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


# Ways to misbehave


def break_after(size, *, reset=False):
    """Announces the whole, sends `size` bytes of it and closes (or resets) the connection."""

    def act(handler, name):
        data = handler.hub.files[name]
        start = handler.find_start(data)
        headers = {"ETag": build_etag(data), "Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.answer(206 if start else 200, headers, data[start : start + size])
        handler.wfile.flush()
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    return act


def answer_status(status, headers=(), body=b"no"):
    def act(handler, name):
        handler.answer(status, headers, body)
        return False

    return act


def redirect(url, status=302, headers=()):
    """Redirects to `url`, or what it makes of the name."""

    def act(handler, name):
        handler.answer(status, {"Location": url(name) if callable(url) else url, **dict(headers)})
        return False

    return act


def hold(seen, release):
    """Sends the head and one KiB of the file, says so, and nothing more until it is released."""

    def act(handler, name):
        data = handler.hub.files[name]
        handler.answer(200, {"ETag": build_etag(data), "Content-Length": str(len(data))}, data[:1024])
        handler.wfile.flush()
        seen.set()
        release.wait(60)
        return False

    return act


def answer_data(data, headers=()):
    """Another file in the place of this one, with ranges as usual."""

    def act(handler, name):
        handler.hub.headers.update(headers)
        handler.answer_file(name, data)
        return False

    return act


def answer_chunks(pieces):
    """A body of no announced length, in chunks, each a segment of its own."""

    def act(handler, name):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")
        return False

    return act


def drip(stop, start):
    """Sends `start`, and then a byte now and again until it is stopped or nobody listens."""

    def act(handler, name):
        with contextlib.suppress(OSError):
            handler.wfile.write(start)
            while not stop.wait(0.02):
                handler.wfile.write(b"x")
        return False

    return act


@contextlib.contextmanager
def start_hub(files=None, *, tls=None, **options):
    """A running hub; ended, with its connections, on leaving. `tls`: (certificate, key) files for https://localhost."""
    hub = Hub(files=dict(files or {}), **options)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        hub.host, hub.scheme = "localhost", "https"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
