"""The server on real sockets: clients that behave, clients that do not, and who may ask for what."""

import asyncio
import contextlib
import gc
import http.client
import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support import wait_for
from test_http1 import BODY_REFUSED, HEAD_REFUSED

import dvai_bridge as dvai
from dvai_bridge import (
    Access,
    AccessPolicy,
    Caller,
    ConnectionPhase,
    ConnectionState,
    HttpResponse,
    HttpServer,
    HttpServerOptions,
    RequestParser,
    RouteClass,
    UsageError,
    build_json_response,
    choose_access,
    choose_admission,
)

TLS = Path(__file__).parent / "tls"
HOST = b"Host: localhost\r\n"
LOGGERS = [logging.getLogger(name) for name in ("dvai_bridge", "asyncio")]


class Recorder(logging.Handler):
    """Keeps what is logged, as it would be written."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        self.lines.append(logging.Formatter().format(record))


class Running:
    """A server in a thread of its own, with routes for these tests."""

    def __init__(self, identify=None, **options):
        self.options = HttpServerOptions(port=0, **options)
        self.identify = identify
        self.log = Recorder()
        self.cancelled = []
        self.closed = []
        self.given_bytes = 0
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self):
        for logger in LOGGERS:
            logger.addHandler(self.log)
        self.levels = [logger.level for logger in LOGGERS]
        LOGGERS[0].setLevel(logging.DEBUG)
        self.thread.start()
        self.server = self.call(self.make_server())
        self.port = self.server.port
        self.expect_bugs = False
        self.start_state = self.resources()
        self.start_mib = read_resident_mib()
        return self

    async def make_server(self):
        server = HttpServer(self.options, self.answer, **({"identify": self.identify} if self.identify else {}))
        await server.start()
        return server

    def __exit__(self, kind, value, traceback):
        try:
            if kind is None:
                self.check_recovered()
        finally:
            self.call(self.server.stop(grace_s=0.1))
            remaining = self.call(self.list_tasks())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()
            self.loop.close()
            for logger, level in zip(LOGGERS, self.levels, strict=True):
                logger.removeHandler(self.log)
                logger.setLevel(level)
        assert not remaining, "every task is awaited at shutdown"

    def call(self, work, timeout_s=30):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    async def list_tasks(self):
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    def resources(self):
        """Descriptors (where the system shows them), tasks and connections."""
        gc.collect()
        descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        return descriptors, len(self.call(self.list_tasks())), self.server.connection_count

    def check_recovered(self):
        """What must be true after every hostile case."""
        started_at = time.monotonic()
        assert self.request("GET", "/health")[0] == 200
        assert time.monotonic() - started_at < 1
        wait_for(lambda: self.resources() == self.start_state, 5, "descriptors and tasks are back")
        assert read_resident_mib() - self.start_mib < 64
        if not self.expect_bugs:
            assert not [line for line in self.log.lines if "Traceback" in line]

    # -- routes --

    async def answer(self, request):
        route = getattr(self, "route_" + request.path.strip("/").replace("-", "_"), None)
        if request.path in ("/health", "/v1/health", "/v1/dvai/health"):
            return build_json_response({"status": "ok", "full": request.is_known_caller})
        if route is not None:
            return await route(request)
        seen = {"method": request.method, "path": request.path, "query": request.query, "bytes": len(request.body)}
        where = {"address": request.client_address, "loopback": request.is_loopback, "tls": request.is_tls}
        return build_json_response({**seen, **where, "caller": request.caller.name})

    async def route_json(self, request):
        return build_json_response(request.parse_body())

    async def route_stream(self, request):
        return HttpResponse(headers=[("Content-Type", "text/event-stream")], body=self.events(5))

    async def events(self, count):
        try:
            for i in range(count):
                yield dvai.encode_sse_event(str(i))
                await asyncio.sleep(0.001)
        finally:
            self.closed.append("events")

    async def route_endless(self, request):
        async def give():
            try:
                while True:
                    self.given_bytes += 16384
                    yield b"x" * 16384
            finally:
                self.closed.append("endless")

        return HttpResponse(body=give())

    async def route_never(self, request):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled.append("never")
            raise

    async def route_first_then_never(self, request):
        async def give():
            yield b"first"
            try:
                await asyncio.sleep(3600)
            finally:
                self.cancelled.append("first-then-never")

        return HttpResponse(body=give())

    async def route_slow_stream(self, request):
        async def give():
            for i in range(5):
                yield b"%d" % i
                await asyncio.sleep(0.1)

        return HttpResponse(body=give())

    async def route_big(self, request):
        return HttpResponse(body=b"x" * 20_000_000)

    async def route_overloaded(self, request):
        raise dvai.OverloadedError("the queue is full", retry_after_s=7)

    async def route_bug(self, request):
        raise KeyError("a secret")

    async def route_bad_field(self, request):
        return HttpResponse(headers=[("X-Peer", "a\r\nSet-Cookie: b")])

    async def route_torn(self, request):
        async def give():
            yield b"data: 1\n\n"
            raise dvai.EngineError("the engine died")

        return HttpResponse(body=give())

    async def route_torn_by_a_bug(self, request):
        async def give():
            yield b"data: 1\n\n"
            raise KeyError("a secret")

        return HttpResponse(body=give())

    # -- clients --

    def request(self, method, path, body=None, headers=None, host="127.0.0.1"):
        """(status, headers, body) of one request on a connection of its own."""
        connection = http.client.HTTPConnection(host, self.port, timeout=10)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"} | (headers or {}) if body is not None else headers or {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    @contextlib.contextmanager
    def connect(self, data=b"", address="127.0.0.1"):
        with socket.create_connection((address, self.port), timeout=10) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(data)
            yield sock

    def talk(self, data, byte_by_byte=False):
        """Everything the server says until it closes."""
        with self.connect() as sock:
            with contextlib.suppress(ConnectionError):  # it may have closed already
                for start in range(0, len(data), 1 if byte_by_byte else len(data)):
                    sock.sendall(data[start : start + 1] if byte_by_byte else data)
            return read_all(sock)


def read_resident_mib():
    """Memory of this process, where the system shows it."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / dvai.MIB
    return 0


def read_all(sock):
    received = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            received += data
    return received


def read_responses(sock, count):
    """(status, body) of `count` responses on one connection."""
    file, responses = sock.makefile("rb"), []
    with file:
        for _ in range(count):
            status = int(file.readline().split()[1])
            headers = {}
            while line := file.readline().strip().decode():
                name, _, value = line.partition(": ")
                headers[name] = value
            responses.append((status, file.read(int(headers.get("Content-Length", 0)))))
    return responses


def is_open(sock):
    """Whether the server still holds this connection."""
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        sock.settimeout(10)


def error_of(body):
    error = json.loads(body)["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return error


@pytest.fixture
def server():
    with Running() as running:
        yield running


# -- clients that behave --


def test_get_post_head_and_keep_alive(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/a%20b?x=1")
        response = connection.getresponse()
        assert response.status == 200 and response.version == 11
        assert json.loads(response.read()) == {
            "method": "GET", "path": "/a b", "query": "x=1", "bytes": 0,
            "address": "127.0.0.1", "loopback": True, "tls": False, "caller": "LOOPBACK",
        }  # fmt: skip
        assert response.headers["Content-Type"] == "application/json"
        assert time.strptime(response.headers["Date"], "%a, %d %b %Y %H:%M:%S GMT")
        assert response.headers["X-Request-Id"].startswith("req_") and "Connection" not in response.headers
        sock = connection.sock
        connection.request("HEAD", "/a")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"") and int(response.headers["Content-Length"]) > 100
        connection.request("POST", "/json", b'{"a": [1]}', {"Content-Type": "Application/JSON; charset=UTF-8"})
        assert connection.getresponse().read() == b'{"a":[1]}'
        connection.request("GET", "/stream")
        assert connection.getresponse().read() == b"".join(b"data: %d\n\n" % i for i in range(5))
        connection.request("HEAD", "/stream")
        response = connection.getresponse()
        assert response.read() == b"" and response.headers["Content-Type"] == "text/event-stream"
        connection.request("GET", "/end", headers={"Connection": "close"})
        assert connection.getresponse().headers["Connection"] == "close"
        assert connection.sock is None or connection.sock is sock, "one connection served them all"


def test_http_1_0(server):
    response = server.talk(b"GET /stream HTTP/1.0\r\n" + HOST + b"\r\n")
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head and b"\r\nConnection: close" in head
    assert body == b"".join(b"data: %d\n\n" % i for i in range(5))
    assert b"Connection: close" in server.talk(b"GET / HTTP/1.0\r\n" + HOST + b"\r\n")
    with server.connect(b"GET / HTTP/1.0\r\n" + HOST + b"Connection: keep-alive\r\n\r\n") as sock:
        assert b"\r\nConnection: keep-alive\r\n" in sock.recv(65536)
        sock.sendall(b"GET / HTTP/1.0\r\n" + HOST + b"\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_request_ids(server):
    assert server.request("GET", "/", headers={"X-Request-Id": "abc-1.2:3_X"})[1]["X-Request-Id"] == "abc-1.2:3_X"
    for hostile in ("a b", "x" * 129, "é", "<script>"):
        given = server.request("GET", "/", headers={"X-Request-Id": hostile.encode("latin-1")})[1]["X-Request-Id"]
        assert given.startswith("req_") and len(given) == 28


def test_pipelining(server):
    one = b"POST /json HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    bodies = [b'{"n":%d}' % i for i in range(100)]
    with server.connect(b"".join(one % (len(body), body) for body in bodies)) as sock:
        assert read_responses(sock, 100) == [(200, body) for body in bodies]


def test_pipelining_byte_by_byte(server):
    data = (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") * 5
    with server.connect() as sock:
        for i in range(len(data)):
            sock.sendall(data[i : i + 1])
        assert [status for status, _ in read_responses(sock, 5)] == [200] * 5


def test_chunked_request(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        pieces = [b'{"a":', b"1", b"}"]
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/json", iter(pieces), headers, encode_chunked=True)
        assert connection.getresponse().read() == b'{"a":1}'


def test_expect_100_continue(server):
    head = b"POST /json HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 2\r\n"
    with server.connect(head + b"Expect: 100-continue\r\n\r\n") as sock:
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert read_responses(sock, 1) == [(200, b"{}")]
    with server.connect(head + b"Expect: 100-continue\r\n\r\n{}") as sock:
        assert read_responses(sock, 1) == [(200, b"{}")], "whoever does not wait is not told to go on"
    for line, status in [(b"Host: evil\r\n", 403), (HOST + b"Expect: more\r\n", 417)]:
        expect = b"" if status == 417 else b"Expect: 100-continue\r\n"
        answer = server.talk(b"POST / HTTP/1.1\r\n" + line + expect + b"Content-Length: 2\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), "a refusal comes instead of the 100"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server, tmp_path):
    def curl(*arguments):
        command = ["curl", "-sS", "--noproxy", "*", "--max-time", "10", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    url, kind = f"http://127.0.0.1:{server.port}", "Content-Type: application/json"
    (tmp_path / "big.json").write_bytes(b'{"a":"' + b"x" * 3_000_000 + b'"}')
    big = f"@{tmp_path / 'big.json'}"
    assert json.loads(curl(url + "/a"))["path"] == "/a"
    assert curl("-d", '{"a":1}', "-H", kind, url + "/json") == '{"a":1}'
    assert len(curl("--data-binary", big, "-H", kind, url + "/json")) == 3_000_008
    assert (
        json.loads(curl("--data-binary", big, "-H", kind, "-H", "Expect: 100-continue", url + "/x"))["bytes"]
        == 3_000_008
    )
    assert json.loads(curl("-d", "{}", "-H", kind, "-H", "Transfer-Encoding: chunked", url + "/x"))["bytes"] == 2
    assert curl("-I", url).startswith("HTTP/1.1 200")
    assert curl("-0", url + "/stream").count("data: ") == 5
    assert curl("-N", url + "/stream", url + "/stream").count("data: ") == 10


def test_bodies_are_json_objects(server):
    for body in (b"null", b"[]", b"{", b"[" * 100_000, b'{"a":1e999}', b'{"a":' + b"9" * 5000 + b"}", b'"\xff"', b""):
        status, _, answer = server.request("POST", "/json", body)
        assert status == 400 and error_of(answer)["type"] == "invalid_request_error"


def test_errors(server):
    status, headers, body = server.request("GET", "/overloaded")
    assert (status, headers["Retry-After"], error_of(body)["type"]) == (429, "7", "rate_limit_error")
    server.expect_bugs = True
    for path in ("/bug", "/bad-field"):
        status, headers, body = server.request("GET", path)
        assert status == 500 and error_of(body)["message"] == "internal error" and "Set-Cookie" not in headers
        request_id = headers["X-Request-Id"]
        assert any("Traceback" in line and request_id in line for line in server.log.lines)


def test_error_response_fields():
    response = dvai.build_error_response(dvai.MethodNotAllowedError("no", allow=("GET", "HEAD")))
    assert response.status == 405 and ("Allow", "GET, HEAD") in response.headers
    response = dvai.build_error_response(dvai.AuthenticationError("no"))
    assert ("WWW-Authenticate", "Bearer") in response.headers and ("x-should-retry", "false") in response.headers
    error = dvai.ContextLengthError("long", param="messages", extra={"n_ctx": 5})
    assert json.loads(dvai.build_error_response(error).body) == {
        "error": {
            "message": "long", "type": "invalid_request_error", "param": "messages",
            "code": "context_length_exceeded", "n_ctx": 5,
        }
    }  # fmt: skip
    for wanted, sent in ((0, "1"), (30, "30"), (1000, "60")):
        response = dvai.build_error_response(dvai.OverloadedError("full", retry_after_s=wanted))
        assert ("Retry-After", sent) in response.headers


@pytest.mark.parametrize("path", ["/torn", "/torn-by-a-bug"])
def test_a_torn_answer_is_not_taken_for_a_whole_one(server, path):
    server.expect_bugs = path == "/torn-by-a-bug"
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        with pytest.raises(http.client.IncompleteRead) as caught:
            response.read()
        assert caught.value.partial == b"data: 1\n\n", "what was given is delivered"
    assert not any("a secret" in line for line in server.log.lines if "Traceback" not in line)


def test_no_delay_and_dead_peer_detection_are_on(server):
    with server.connect(b"GET /never HTTP/1.1\r\n" + HOST + b"\r\n"):
        connection = wait_for(lambda: next(iter(server.server._connections), None), 5, "the connection is known")
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


# -- clients that leave --


@pytest.mark.parametrize("path", ["/never", "/first-then-never"])
@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
def test_leaving_cancels_the_handler(server, path, how):
    with server.connect(b"GET %b HTTP/1.1\r\n" % path.encode() + HOST + b"\r\n") as sock:
        wait_for(
            lambda: any(c.phase is ConnectionPhase.ANSWERING for c in list(server.server._connections)), 5, "it runs"
        )
        if path != "/never":
            assert sock.recv(1000).endswith(b"\r\n\r\n5\r\nfirst\r\n"), "head and first chunk in one segment"
        if how == "half-close":
            sock.shutdown(socket.SHUT_WR)
        elif how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how != "half-close":
            sock.close()
        wait_for(lambda: server.cancelled, 1, "the handler is cancelled")


def test_leaving_during_a_request_or_an_answer(server):
    for data in (b"", b"GET", b"GET / HTTP/1.1\r\nHo", b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 9\r\n\r\n1"):
        with server.connect(data):
            pass
        with server.connect(data) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock) == b"" or data.startswith(b"POST"), "half a connection is of no use"
    with server.connect(b"GET /endless HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
        sock.recv(1000)
    wait_for(lambda: server.closed == ["endless"], 5, "the iterator is closed")


# -- clients that do not behave --

HOSTILE = [case for case in HEAD_REFUSED + BODY_REFUSED if len(case[0]) < 2000] + HEAD_REFUSED[-4:]


@pytest.mark.parametrize("byte_by_byte", [False, True])
def test_hostile_bytes(byte_by_byte):
    with Running(loopback_body_limit_bytes=1000) as server:
        for data, (_, status) in HOSTILE:
            data = data.replace(b"POST / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Type: application/json\r\n")
            answer = server.talk(data, byte_by_byte)
            assert answer.startswith(b"HTTP/1.1 %d " % status) and b"\r\nConnection: close\r\n" in answer, data
            assert error_of(answer.partition(b"\r\n\r\n")[2])["message"]


def test_refusals_reach_a_client_that_is_still_sending():
    with Running(loopback_body_limit_bytes=1000) as server:
        status, headers, body = server.request("POST", "/", b"x" * 4_000_000)
        assert (status, headers["Connection"], error_of(body)["code"]) == (413, "close", "content_too_large")
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        with contextlib.closing(connection):
            pieces = (b"x" * 900 for _ in range(2))
            connection.request("POST", "/", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
            assert connection.getresponse().status == 413
        assert server.request("GET", "/" + "x" * 9000)[0] == 414
        assert server.request("GET", "/", headers={"A": "b" * 9000})[0] == 431
        assert server.request("POST", "/", b"{}", {"Content-Type": "text/plain"})[0] == 415
        assert server.request("POST", "/", b"x" * 999)[0] == 200


def test_slow_headers_do_not_delay_others():
    with Running(header_deadline_s=1.5) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect(b"GET / HT")) for _ in range(200)]
        for byte in b"TP/1":
            for sock in socks:
                sock.send(bytes([byte]))
            started_at = time.monotonic()
            assert server.request("GET", "/health")[0] == 200
            assert time.monotonic() - started_at < 1
        wait_for(lambda: server.server.connection_count == 0, 10, "the deadline is absolute")
        assert all(read_all(sock).startswith(b"HTTP/1.1 408 ") for sock in socks)


def test_a_thousand_idle_connections():
    resource = pytest.importorskip("resource", reason="needs a limit on descriptors that can be raised")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard > 0 else 4096, hard))
    try:
        with Running() as server, contextlib.ExitStack() as stack:
            socks = [stack.enter_context(server.connect()) for _ in range(1000)]
            assert server.request("GET", "/health")[0] == 200
            assert server.server.connection_count <= dvai.CONNECTIONS_LIMIT
            assert not any(is_open(sock) for sock in socks[:700]) and all(is_open(sock) for sock in socks[-200:])
            stack.close()
            wait_for(lambda: server.server.connection_count == 0, 5, "all are gone")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_full_of_answers_refuses_and_recovers():
    with Running(connections_limit=4) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(server.connect(b"GET /never HTTP/1.1\r\n" + HOST + b"\r\n")) for _ in range(4)]
        wait_for(lambda: server.server.connection_count == 4 and len(server.server._tasks) == 4, 5, "all are served")
        with server.connect(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
            assert read_all(sock) == b"", "answers that run are not given up for a newcomer"
        socks[0].close()
        wait_for(lambda: server.server.connection_count == 3, 5, "one has left")
        assert server.request("GET", "/health")[0] == 200


def has_address(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family) as sock:
        sock.bind((address, 0))
        return True
    return False


@pytest.mark.skipif(not has_address("127.0.0.2"), reason="needs a second loopback address")
def test_foreign_addresses_are_limited_and_cannot_keep_this_machine_out(monkeypatch):
    monkeypatch.setattr(dvai, "is_loopback_address", lambda address: address == "127.0.0.1")
    with Running(host="127.0.0.2", foreign_body_limit_bytes=10) as server, contextlib.ExitStack() as stack:

        def connect():
            sock = socket.socket()
            stack.enter_context(sock)
            sock.bind(("127.0.0.2", 0))
            sock.settimeout(10)
            sock.connect(("127.0.0.2", server.port))
            return sock

        socks = [connect() for _ in range(dvai.CONNECTIONS_PER_ADDRESS_LIMIT)]
        assert read_all(connect()) == b"", "the seventeenth is closed"
        host = b"Host: 127.0.0.2\r\n"
        for head, status in [(b"GET /v1/models", 401), (b"GET /health", 200), (b"GET /v1/dvai/pairings", 403)]:
            socks[0].sendall(head + b" HTTP/1.1\r\n" + host + b"\r\n")
            assert read_responses(socks[0], 1)[0][0] == status
        socks[1].sendall(b"POST / HTTP/1.1\r\n" + host + b"Content-Length: 11\r\n\r\n")
        assert read_all(socks[1]).startswith(b"HTTP/1.1 413 ")
        stack.close()
        server.request = lambda method, path: Running.request(server, method, path, host="127.0.0.2")
        wait_for(lambda: server.server.connection_count == 0, 5, "all are gone")


def test_slow_bodies_and_idle_connections_end():
    with Running(body_deadline_s=0.2, keep_alive_idle_s=0.2) as server:
        post = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        for data in (
            post,
            post + b"x" * 99,
            post.replace(b"Content-Length: 100", b"Transfer-Encoding: chunked") + b"5\r\n",
        ):
            assert server.talk(data).startswith(b"HTTP/1.1 408 ")
        with server.connect(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
            assert read_responses(sock, 1)[0][0] == 200
            assert read_all(sock) == b"", "an idle connection ends without a word"


def test_a_connection_that_never_speaks_ends():
    with Running(header_deadline_s=0.2) as server:
        with server.connect() as sock:
            assert read_all(sock) == b""
        with server.connect(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
            assert read_responses(sock, 1)[0][0] == 200
            sock.sendall(b"G")
            assert read_all(sock).startswith(b"HTTP/1.1 408 "), "the deadline holds for every request"


@pytest.mark.parametrize("path", ["/endless", "/big"])
def test_a_reader_that_stops_costs_no_memory_and_is_let_go(path):
    with Running(write_stall_s=0.4) as server:
        sock = socket.socket()
        with contextlib.closing(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            sock.settimeout(10)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(b"GET %b HTTP/1.1\r\n" % path.encode() + HOST + b"\r\n")
            wait_for(lambda: server.server.connection_count == 1, 5, "the connection is known")
            wait_for(lambda: server.server.connection_count == 0, 5, "the connection is ended")
            assert server.given_bytes < 4 * dvai.MIB, "what the kernel holds, no more"
        assert server.closed == (["endless"] if path == "/endless" else [])
        assert any("took nothing" in line for line in server.log.lines)


def test_a_slow_reader_that_goes_on_is_served():
    with Running(write_stall_s=0.6) as server, server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        sock.sendall(b"GET /big HTTP/1.1\r\n" + HOST + b"\r\n")
        received = len(sock.recv(1000).partition(b"\r\n\r\n")[2])
        for _ in range(10):
            time.sleep(0.1)
            received += len(sock.recv(300_000))
        while received < 20_000_000 and (data := sock.recv(1_000_000)):
            received += len(data)
        assert received == 20_000_000
        sock.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        assert read_responses(sock, 1)[0][0] == 200


def test_an_answer_without_a_pause_leaves_the_loop_to_others(server):
    with server.connect(b"GET /endless HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
        stop = threading.Event()

        def read():
            while not stop.is_set() and sock.recv(1 << 20):
                pass

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(5):
                started_at = time.monotonic()
                assert server.request("GET", "/health")[0] == 200
                assert time.monotonic() - started_at < 1
        finally:
            stop.set()
            reader.join()


def test_a_client_that_half_closes_and_then_takes_the_rest_leaves_nothing_behind(server):
    """asyncio ends a transport that is closing once its rest is written, and can then no longer abort it."""
    with server.connect(b"GET /endless HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
        wait_for(lambda: server.server.connection_count == 1, 5, "it is known")
        connection = next(iter(server.server._connections))
        wait_for(lambda: connection._transport.get_write_buffer_size() > 0, 5, "the client is full")
        sock.shutdown(socket.SHUT_WR)
        wait_for(connection._transport.is_closing, 5, "the server has seen that nothing more comes")
        assert connection._transport.get_write_buffer_size() > 0
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 20):
                pass
        wait_for(lambda: server.server.connection_count == 0, 5, "the connection has ended")
        gc.collect()


def test_requests_sent_far_ahead_are_not_read(server):
    with server.connect(b"GET /never HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                sock.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n" + b"x" * 100_000)
            pytest.fail("somebody takes 20 MB of requests in advance")
        connection = next(iter(server.server._connections))
        assert connection._parser.buffered_bytes < 1 * dvai.MIB
        wait_for(lambda: server.server.connection_count == 1, 5, "it is known")
        server.loop.call_soon_threadsafe(connection.abort)
        wait_for(lambda: server.cancelled, 5, "the handler is cancelled")


def test_pipelining_without_reading_the_answers(server):
    with server.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(3000):
                sock.sendall((b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n") * 100)
            pytest.fail("300,000 answers wait for somebody to take them")
        connection = next(iter(server.server._connections))
        assert connection._transport.get_write_buffer_size() < 2 * dvai.WRITE_BUFFER_LIMIT_BYTES


# -- who may speak --


def head_of(method="GET", path="/v1/models", **fields):
    parser = RequestParser(body_limit_bytes=10)
    fields = {"host": "localhost", **{name.replace("_", "-"): value for name, value in fields.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    parser.receive(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode())
    return parser.next_event()


def decide(policy=None, loopback=True, local_address="192.168.1.5", **request):
    policy = policy or AccessPolicy()
    return choose_access(policy, head_of(**request), is_loopback=loopback, local_address=local_address)


def status_of(decision):
    return 200 if decision.refusal is None else decision.refusal.status


SIGNED = {f"x_dvai_{name}": "x" for name in ("peer_device_id", "app_id", "nonce", "signature")}
KEYED = AccessPolicy(api_keys=(b"k1", "schlüssel".encode()), control_token=b"token")
PATHS = {
    RouteClass.INFERENCE: ["/v1/chat/completions", "/models", "/v1/models/a/b", "/nothing", "/v1/dvai/nothing", "/"],
    RouteClass.CAPABILITY: ["/v1/dvai/capability"],
    RouteClass.HEALTH: ["/health", "/v1/health", "/v1/dvai/health"],
    RouteClass.PEERS: ["/v1/dvai/peers", "/v1/dvai/probe", "/metrics"],
    RouteClass.HANDSHAKE: ["/v1/dvai/handshake", "/v1/dvai/tunnel"],
    RouteClass.CONTROL: ["/v1/dvai/pair-qr", "/v1/dvai/pair-scan", "/v1/dvai/pairings", "/v1/dvai/pairings/x/approve"],
}
ROUTES = [
    RouteClass.INFERENCE,
    RouteClass.CAPABILITY,
    RouteClass.PEERS,
    RouteClass.HEALTH,
    RouteClass.HANDSHAKE,
    RouteClass.CONTROL,
]
TABLE = [
    # who, policy, from loopback, header fields, status of each of ROUTES, full health
    ("loopback, no key set", AccessPolicy(), True, {}, [200, 200, 200, 200, 200, 403], True),
    ("loopback, any key", AccessPolicy(), True, {"authorization": "Bearer x"}, [200, 200, 200, 200, 200, 403], True),
    ("loopback with key", KEYED, True, {"authorization": "Bearer k1"}, [200, 200, 200, 200, 200, 403], True),
    ("loopback without key", KEYED, True, {}, [401, 401, 401, 200, 200, 403], False),
    ("loopback, wrong key", KEYED, True, {"authorization": "Bearer k2"}, [401, 401, 401, 200, 200, 403], False),
    ("elsewhere with key", KEYED, False, {"authorization": "bearer  k1 "}, [200, 200, 200, 200, 200, 403], True),
    ("elsewhere without", KEYED, False, {}, [401, 401, 401, 200, 200, 403], False),
    ("elsewhere, no key set", AccessPolicy(), False, {"authorization": "Bearer x"},
     [401, 401, 401, 200, 200, 403], False),
    ("paired", AccessPolicy(), False, SIGNED, [200, 200, 403, 200, 200, 403], True),
    ("paired, on loopback", KEYED, True, SIGNED, [200, 200, 403, 200, 200, 403], True),
    ("paired, with what it copied", KEYED, False,
     {**SIGNED, "authorization": "Bearer wrong", "origin": "http://evil", "sec_fetch_site": "cross-site"},
     [200, 200, 403, 200, 200, 403], True),
    ("paired, control token", KEYED, True, {**SIGNED, "x_dvai_control": "token"}, [200, 200, 403, 200, 200, 403], True),
    ("paired, wrong host", KEYED, False, {**SIGNED, "host": "evil.example"}, [403] * 6, False),
    ("one field of a signature", KEYED, False, {"x_dvai_nonce": "x"}, [200, 200, 403, 200, 200, 403], True),
    ("anonymous LAN", AccessPolicy(allow_anonymous_lan=True), False, {}, [200, 401, 401, 200, 200, 403], False),
    ("page allowed", AccessPolicy(cors_origins=frozenset(["http://app"])), True, {"origin": "http://app"},
     [200, 200, 403, 200, 403, 403], True),
    ("page allowed, elsewhere", AccessPolicy(cors_origins=frozenset(["http://app"])), False, {"origin": "http://app"},
     [401, 401, 403, 200, 403, 403], False),
    ("page of another origin", AccessPolicy(cors_origins=frozenset(["http://app"])), True, {"origin": "http://evil"},
     [403] * 6, False),
    ("page, no origin allowed", AccessPolicy(), True, {"origin": "null"}, [403] * 6, False),
    ("page without origin", AccessPolicy(), True, {"sec_fetch_site": "cross-site"}, [403] * 6, False),
    ("wrong host", AccessPolicy(), True, {"host": "evil.example"}, [403] * 6, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "loopback", "fields", "statuses", "full"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_access_table(policy, loopback, fields, statuses, full):
    for route, status in zip(ROUTES, statuses, strict=True):
        for path in PATHS[route]:
            assert dvai.classify_route(path) is route
            decision = decide(policy, loopback, path=path, **fields)
            assert status_of(decision) == status, path
            if route is RouteClass.HEALTH and status == 200:
                assert (dvai.ACCESS_TABLE[decision.caller][RouteClass.CAPABILITY] is Access.ALLOWED) == full


def test_a_signature_is_verified_when_the_body_is_here():
    seen = []

    def identify(request):
        seen.append(request.body)
        if request.headers.get("x-dvai-signature") != "good":
            raise dvai.SignatureError
        return dvai.Pairing(device_id="phone", app_id="app", device_name="Phone", paired_at_ms=1, last_used_at_ms=1)

    fields = {"X-DVAI-Peer-Device-Id": "phone", "X-DVAI-App-Id": "app", "X-DVAI-Nonce": "n"}
    with Running(identify=identify, api_keys=("k",)) as server:
        for signature, expected in (("good", 200), ("bad", 401)):
            signed = fields | {"X-DVAI-Signature": signature, "Origin": "http://copied.example"}
            status, _, body = server.request("POST", "/json", b'{"a": 1}', signed)
            assert status == expected and seen.pop() == b'{"a": 1}'
            if expected == 401:
                assert error_of(body)["code"] == "invalid_signature"
        status, _, body = server.request("GET", "/who", headers=fields | {"X-DVAI-Signature": "good"})
        assert (status, json.loads(body)["caller"]) == (200, "PAIRED")
        assert server.request("GET", "/who", headers={"X-DVAI-App-Id": "app"})[0] == 401
        assert server.request("GET", "/v1/dvai/peers", headers=fields | {"X-DVAI-Signature": "good"})[0] == 403


def test_signed_requests_are_refused_where_nobody_can_be_paired():
    with Running() as server:
        assert server.request("GET", "/who", headers={"X-DVAI-Nonce": "n", "X-DVAI-Signature": "s"})[0] == 401


def test_what_a_revoked_device_runs_ends():
    pairing = dvai.Pairing(device_id="phone", app_id="app", device_name="Phone", paired_at_ms=1, last_used_at_ms=1)
    with Running(identify=lambda request: pairing) as server:
        signed = b"GET /first-then-never HTTP/1.1\r\n" + HOST + b"X-DVAI-Nonce: n\r\n\r\n"
        unsigned = b"GET /first-then-never HTTP/1.1\r\n" + HOST + b"\r\n"
        with server.connect(signed) as mine, server.connect(unsigned) as other:
            for client in (mine, other):
                assert client.recv(10) == b"HTTP/1.1 2"

            async def revoke():
                server.server.end_requests(lambda request: request.pairing is pairing)

            server.call(revoke())
            wait_for(lambda: server.cancelled == ["first-then-never"], 5, "the device's answer ends")
            assert server.server.connection_count == 1


def test_control_needs_loopback_and_token():
    path = "/v1/dvai/pairings"
    key = {"authorization": "Bearer k1"}
    assert status_of(decide(KEYED, path=path, x_dvai_control="token", **key)) == 200
    assert status_of(decide(KEYED, path=path, x_dvai_control="tokem", **key)) == 403
    assert status_of(decide(KEYED, path=path, x_dvai_control="t\xf6ken", **key)) == 403
    assert status_of(decide(KEYED, False, path=path, x_dvai_control="token", **key)) == 403
    assert status_of(decide(path=path, x_dvai_control="")) == 403, "no token set: nobody has it"


@pytest.mark.parametrize(
    "text",
    ["", "k1", "Basic k1", "Bearer", "Bearer k", "Bearer k11", "Bearer k1,k1", "Bearer \xe9", "Bearer schl\xfcssel"],
)
def test_wrong_keys_are_401_not_500(text):
    parser = RequestParser(body_limit_bytes=10)
    parser.receive(b"GET / HTTP/1.1\r\n" + HOST + b"Authorization: " + text.encode("latin-1") + b"\r\n\r\n")
    decision = choose_access(KEYED, parser.next_event(), is_loopback=True, local_address="127.0.0.1")
    assert status_of(decision) == 401 and decision.caller is Caller.STRANGER


def test_keys_outside_ascii():
    parser = RequestParser(body_limit_bytes=10)
    parser.receive(b"GET / HTTP/1.1\r\n" + HOST + "Authorization: Bearer schlüssel\r\n\r\n".encode())
    assert status_of(choose_access(KEYED, parser.next_event(), is_loopback=False, local_address="localhost")) == 200


def test_keys_are_not_in_reprs():
    options = HttpServerOptions(api_keys=("secret",), control_token="secret")
    assert "secret" not in repr(options) + repr(dvai.build_access_policy(options, "box")) + repr(KEYED)


HOSTS = [
    ("localhost", True), ("LOCALHOST:1", True), ("127.0.0.1:38883", True), ("127.8.9.1", True), ("[::1]:5", True),
    ("[::ffff:127.0.0.1]", True), ("192.168.1.5:80", True), ("[::ffff:192.168.1.5]", True), ("box.local", True),
    ("Box.Local:38883", True), ("allowed.example", True), ("[fd00::7]", True),
    ("localhost.", False), ("localhost.evil.example", False), ("xlocalhost", False), ("box", False),
    ("a.box.local", False),
    ("127.0.0.1.evil.example", False), ("127.1", False), ("0x7f000001", False), ("2130706433", False),
    ("0.0.0.0", False),
    ("[::]", False), ("192.168.1.6", False), ("sub.allowed.example", False), ("[fd00::8]", False),
]  # fmt: skip


@pytest.mark.parametrize(("host", "own"), HOSTS)
def test_host_names_that_are_ours(host, own):
    policy = dvai.build_access_policy(HttpServerOptions(allowed_hosts=("Allowed.example", "[fd00::7]")), "Box.lan")
    assert status_of(decide(policy, host=host)) == (200 if own else 403)
    assert status_of(decide(policy, path=f"http://{host}/v1/models")) == (200 if own else 400)
    for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
        assert (status_of(decide(policy, method=method, host=host)) == 403) != own


def test_media_types():
    def status(method, **fields):
        return status_of(decide(method=method, **fields))

    for good in (
        "application/json",
        "APPLICATION/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
    ):
        assert status("POST", content_type=good) == 200
    for bad in ("", "text/plain", "text/json", "application/x-www-form-urlencoded", "application/json; charset=utf-16",
                "multipart/form-data", "application/jsonx", "text/plain; application/json"):  # fmt: skip
        assert status("POST", content_type=bad) == 415
    assert status("POST") == status("PUT") == status("PATCH") == 415
    assert status("GET") == status("DELETE") == status("GET", content_type="text/plain") == 200


def test_drive_by_pages_and_rebinding(server):
    for headers in (
        {"Origin": "http://evil"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "evil.example"},
    ):
        for method, path in (
            ("GET", "/health"),
            ("POST", "/json"),
            ("OPTIONS", "/v1/models"),
            ("GET", "/nowhere"),
            ("DELETE", "/x"),
        ):
            status, answer, body = server.request(method, path, b"{}" if method == "POST" else None, headers)
            assert (status, error_of(body)["type"]) == (403, "permission_error")
            assert not any(name.lower().startswith("access-control") for name in answer)
    assert server.request("GET", "/", headers={"Sec-Fetch-Site": "none"})[0] == 200
    preflight = {"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
    assert server.request("OPTIONS", "/v1/models", headers=preflight)[0] == 403
    assert b" 400 " in server.talk(b"GET http://evil/ HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")[:13]


def test_cors_for_an_allowed_origin():
    page = {"Origin": "http://App.example:5173"}
    with Running(cors_origins=("http://app.example:5173/",), api_keys=("k",)) as server:
        asks = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-os",
        }
        private = {"Access-Control-Request-Private-Network": "true"}
        status, headers, body = server.request("OPTIONS", "/v1/chat/completions", headers=page | asks | private)
        assert (status, body) == (204, b"") and "Content-Length" not in headers
        assert headers["Access-Control-Allow-Origin"] == page["Origin"] and headers["Vary"] == "Origin"
        assert headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert headers["Access-Control-Allow-Private-Network"] == "true"
        for extra, status in (({"Authorization": "Bearer k", "Sec-Fetch-Site": "cross-site"}, 200), ({}, 401)):
            answer = server.request("POST", "/json", b"{}", page | extra)
            assert answer[0] == status and answer[1]["Access-Control-Allow-Origin"] == page["Origin"]
            assert "X-Request-Id" in answer[1]["Access-Control-Expose-Headers"]
        assert server.request("GET", "/v1/dvai/peers", headers=page | {"Authorization": "Bearer k"})[0] == 403
        assert server.request("GET", "/health")[1]["Vary"] == "Origin"
        assert server.request("GET", "/health", headers={"Origin": "http://app.example:5174"})[0] == 403
    with Running(cors_origins=("*",)) as server:
        assert server.request("GET", "/", headers={"Origin": "null"})[1]["Access-Control-Allow-Origin"] == "null"


def test_keys_over_the_wire():
    with Running(api_keys=("first", "second")) as server:
        for path in ("/health", "/v1/health", "/v1/dvai/health"):
            assert json.loads(server.request("GET", path)[2]) == {"status": "ok", "full": False}
        status, headers, body = server.request("GET", "/v1/models")
        assert (status, headers["WWW-Authenticate"], error_of(body)["code"]) == (401, "Bearer", "invalid_api_key")
        for key in ("first", "second"):
            assert server.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})[0] == 200
        assert server.request("POST", "/json", b"x" * 100_000, {"Authorization": "Bearer third"})[0] == 401
        assert not any(key in line for key in ("first", "second", "third") for line in server.log.lines)


# -- admission --


def crowd(count, phase, loopback=False, address="10.0.0.{}", since=0.0):
    return [
        ConnectionState(address=address.format(i), is_loopback=loopback, phase=phase, since=since + i)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("states", "loopback", "admitted", "evicted"),
    [
        ([], True, True, None),
        (crowd(99, ConnectionPhase.ANSWERING, loopback=True), True, True, None),
        (crowd(100, ConnectionPhase.ANSWERING, loopback=True), True, False, None),
        (crowd(100, ConnectionPhase.IDLE, loopback=True), True, True, 0),
        (crowd(100, ConnectionPhase.IDLE, loopback=True, since=-5)[::-1], True, True, 99),
        (
            crowd(90, ConnectionPhase.IDLE, loopback=True) + crowd(10, ConnectionPhase.HEADERS, loopback=True),
            True,
            True,
            90,
        ),
        (crowd(99, ConnectionPhase.HEADERS, loopback=True) + crowd(1, ConnectionPhase.BODY), True, True, 99),
        (crowd(83, ConnectionPhase.ANSWERING), False, True, None),
        (crowd(84, ConnectionPhase.ANSWERING), False, False, None),
        (crowd(84, ConnectionPhase.ANSWERING), True, True, None),
        (crowd(84, ConnectionPhase.HEADERS), False, True, 0),
        (crowd(84, ConnectionPhase.HEADERS, loopback=True), False, False, None),
        (crowd(15, ConnectionPhase.IDLE, address="10.9.9.9"), False, True, None),
        (crowd(16, ConnectionPhase.IDLE, address="10.9.9.9"), False, False, None),
        (crowd(99, ConnectionPhase.IDLE, address="127.0.0.1", loopback=True), True, True, None),
    ],
)
def test_admission(states, loopback, admitted, evicted):
    address = "127.0.0.1" if loopback else "10.9.9.9"
    admission = choose_admission(states, address=address, is_loopback=loopback, limit=100, limit_per_address=16)
    assert (admission.is_admitted, admission.evicted) == (admitted, evicted)


# -- TLS --


def trust():
    return ssl.create_default_context(cafile=str(TLS / "cert.pem"))


def test_tls():
    with Running(ssl_cert_file=str(TLS / "cert.pem"), ssl_key_file=str(TLS / "key.pem")) as server:
        connection = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=trust())
        server.request = lambda method, path: request_tls(server, method, path)
        with contextlib.closing(connection):
            for _ in range(2):
                connection.request("POST", "/x", b"y" * 300_000, {"Content-Type": "application/json"})
                answer = json.loads(connection.getresponse().read())
                assert (answer["tls"], answer["bytes"], answer["address"]) == (True, 300_000, "127.0.0.1")
            connection.request("GET", "/stream")
            assert connection.getresponse().read().count(b"data: ") == 5
        assert server.server.base_url == f"https://127.0.0.1:{server.port}/v1"
        with server.connect(b"GET / HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
            assert b"HTTP/1.1 200" not in read_all(sock), "plain text is not answered"
        with server.connect() as sock, trust().wrap_socket(sock, server_hostname="localhost") as tls:
            tls.sendall(b"GET /never HTTP/1.1\r\n" + HOST + b"\r\n")
            wait_for(lambda: len(server.server._tasks) == 1, 5, "the handler runs")
        wait_for(lambda: server.cancelled, 1, "leaving cancels the handler")
        with server.connect() as sock, trust().wrap_socket(sock, server_hostname="localhost") as tls:
            tls.sendall(b"GET /..\r\n\r\n")
            assert tls.recv(1000).startswith(b"HTTP/1.1 400 ")


def request_tls(server, method, path):
    connection = http.client.HTTPSConnection("localhost", server.port, timeout=10, context=trust())
    with contextlib.closing(connection):
        connection.request(method, path)
        return (connection.getresponse().status,)


def test_tls_handshakes_that_never_come_are_counted_and_end():
    options = {"ssl_cert_file": str(TLS / "cert.pem"), "ssl_key_file": str(TLS / "key.pem")}
    with Running(header_deadline_s=0.5, connections_limit=20, **options) as server, contextlib.ExitStack() as stack:
        server.request = lambda method, path: request_tls(server, method, path)
        socks = [stack.enter_context(server.connect(b"\x16\x03\x01")) for _ in range(50)]
        wait_for(lambda: server.server.connection_count == 20, 5, "no more than the limit")
        assert request_tls(server, "GET", "/health") == (200,)
        wait_for(lambda: server.server.connection_count == 0, 5, "the deadline ends them")
        assert all(read_all(sock) == b"" for sock in socks)


@pytest.mark.parametrize(
    ("cert", "key", "message"),
    [
        ("missing.pem", "key.pem", "cannot read .*missing.pem"),
        ("cert.pem", "missing.pem", "cannot read .*missing.pem"),
        ("cert.pem", "other-key.pem", "KEY_VALUES_MISMATCH"),
        ("cert.pem", "encrypted-key.pem", "encrypted"),
        ("../support.py", "key.pem", "cannot use"),
        ("cert.pem", None, "both"),
        (None, "key.pem", "both"),
    ],
)
def test_wrong_tls_files_are_named(cert, key, message):
    options = HttpServerOptions(port=0, ssl_cert_file=cert and str(TLS / cert), ssl_key_file=key and str(TLS / key))
    with pytest.raises(UsageError, match=message):
        asyncio.run(HttpServer(options, None).start())


# -- ports and addresses --


def test_port_fall_back(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(dvai, "DEFAULT_PORT", port)

        def bind(wanted):
            sockets = asyncio.run(dvai.bind_sockets("127.0.0.1", wanted))
            try:
                return sockets[0].getsockname()[1]
            finally:
                for sock in sockets:
                    sock.close()

        assert port < bind(None) < port + dvai.PORT_ATTEMPTS
        with pytest.raises(UsageError, match=f"port {port}: another program"):
            bind(port)
        monkeypatch.setattr(dvai, "PORT_ATTEMPTS", 1)
        with pytest.raises(UsageError, match="all taken"):
            bind(None)


@pytest.mark.parametrize("host", ["203.0.113.1", "a..b"])
def test_addresses_that_are_not_ours_are_an_error(host):
    with pytest.raises(UsageError, match=host):
        asyncio.run(dvai.bind_sockets(host, None))


def test_localhost():
    with Running(host="localhost") as server:
        assert {port for _, port in server.server.addresses} == {server.port}
        for host, _ in server.server.addresses:
            assert server.request("GET", "/health", host=host)[0] == 200


@pytest.mark.skipif(not has_address("::1"), reason="needs IPv6 on loopback")
def test_ipv6():
    with Running(host="::1") as server:
        assert json.loads(server.request("GET", "/x", host="::1")[2])["address"] == "::1"
        assert server.server.base_url == f"http://[::1]:{server.port}/v1"
        server.request = lambda method, path: Running.request(server, method, path, host="::1")
    with Running(host="::") as server:
        for host, address in (("::1", "::1"), ("127.0.0.1", "127.0.0.1")):
            answer = json.loads(server.request("GET", "/x", host=host)[2])
            assert (answer["address"], answer["loopback"], answer["caller"]) == (address, True, "LOOPBACK")


def test_socket_addresses():
    assert dvai.parse_socket_address(("::ffff:10.0.0.1", 5, 0, 0)) == ("10.0.0.1", 5)
    assert dvai.parse_socket_address(("fe80::1%eth0", 5, 0, 2)) == ("fe80::1", 5)
    loopback = {
        "127.0.0.1": True,
        "127.9.9.9": True,
        "::1": True,
        "10.0.0.1": False,
        "::": False,
        "": False,
        "x": False,
    }
    assert {address: dvai.is_loopback_address(address) for address in loopback} == loopback


# -- stopping --


def test_stop_lets_answers_finish(server):
    with server.connect(b"GET /slow-stream HTTP/1.1\r\n" + HOST + b"\r\n") as sock, server.connect() as idle:
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.server.connection_count == 2, 5, "both are there")
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(grace_s=10), server.loop)
        assert read_all(idle) == b"", "idle connections end at once"
        assert read_all(sock).endswith(b"4\r\n0\r\n\r\n"), "the stream is complete, then the connection ends"
        stopping.result(5)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
    server.check_recovered = lambda: None


@pytest.mark.parametrize("how", ["deadline", "second stop"])
def test_stop_ends_what_does_not_finish(server, how):
    with server.connect(b"GET /never HTTP/1.1\r\n" + HOST + b"\r\n") as sock:
        wait_for(lambda: len(server.server._tasks) == 1, 5, "the handler runs")
        started_at = time.monotonic()
        stopping = asyncio.run_coroutine_threadsafe(
            server.server.stop(grace_s=0.3 if how == "deadline" else 60), server.loop
        )
        if how != "deadline":
            wait_for(lambda: server.server._is_stopping, 5, "it is stopping")
            server.call(server.server.stop())
        stopping.result(5)
        assert time.monotonic() - started_at < 5
        assert server.cancelled == ["never"] and read_all(sock) == b""
    server.check_recovered = lambda: None


def test_deadline_fires_once_and_late_enough():
    async def run():
        loop, passed, times = asyncio.get_running_loop(), asyncio.Event(), []

        def note():
            times.append(loop.time())
            passed.set()

        deadline, started_at = dvai.Deadline(loop, note), loop.time()
        deadline.set_after(0.01)
        deadline.set_after(0.05)  # later: the same timer looks again
        await passed.wait()
        assert times[0] - started_at >= 0.05
        passed.clear()
        deadline.set_after(10)
        deadline.set_after(0.01)  # earlier: a new timer
        deadline.clear()
        deadline.set_after(0.02)
        await asyncio.wait_for(passed.wait(), 5)
        deadline.set_after(0.001)
        deadline.close()
        await asyncio.sleep(0.02)
        assert len(times) == 2

    asyncio.run(run())
