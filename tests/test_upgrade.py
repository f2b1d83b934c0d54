"""Routes that become a WebSocket, on a real server: who may, what counts, and clients that mean no good."""

import asyncio
import contextlib
import importlib
import json
import socket
import struct
import threading

import pytest
from support import require, wait_for
from test_http_server import Running, error_of

import dvai_bridge as dvai
from dvai_bridge import (
    CLOSE_GOING_AWAY,
    CLOSE_INTERNAL_ERROR,
    CLOSE_INVALID_DATA,
    CLOSE_NORMAL,
    CLOSE_POLICY_VIOLATION,
    CLOSE_PROTOCOL_ERROR,
    CLOSE_TOO_BIG,
    OPCODE_BINARY,
    OPCODE_CLOSE,
    OPCODE_CONTINUATION,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
    TUNNEL_MESSAGE_LIMIT_BYTES,
    WebSocketParser,
    accept_websocket,
    connect_websocket,
    encode_websocket_close,
    encode_websocket_frame,
)

SUBPROTOCOL = "dvai-noise.1"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
MASK = b"\x37\xfa\x21\x3d"


class Upgrading(Running):
    """A server whose `/v1/dvai/tunnel` echoes, and says how each of its WebSockets ended."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ends = []
        self.may_go_on = threading.Event()

    async def answer(self, request):
        if request.path != "/v1/dvai/tunnel":
            return await super().answer(request)
        run = {"raise": self.run_bug, "lose": self.run_error, "idle": self.run_idle}.get(request.query, self.run_echo)
        return accept_websocket(request, run, subprotocols=[SUBPROTOCOL, "second"])

    async def run_echo(self, connection):
        while (message := await connection.receive()) is not None:
            await (connection.send_text if isinstance(message, str) else connection.send_binary)(message)
        await connection.close()
        self.ends.append(connection.close_code)

    async def run_bug(self, connection):
        raise KeyError("a secret")

    async def run_error(self, connection):
        raise dvai.SignatureError

    async def run_idle(self, connection):
        while not self.may_go_on.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.005)

    @contextlib.contextmanager
    def open(self, query="", **fields):
        """A raw WebSocket whose handshake is done."""
        with self.connect(build_request(query, **fields)) as sock:
            head = read_head(sock)
            assert head.startswith(b"HTTP/1.1 101 Switching Protocols\r\n"), head
            yield RawClient(sock)


def build_request(query="", method="GET", version="1.1", **changes):
    """A handshake; `changes`: fields by name, underscores for hyphens, None leaves one out."""
    fields = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "keep-alive, Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": SUBPROTOCOL,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    query = f"?{query}" if query else ""
    return f"{method} /v1/dvai/tunnel{query} HTTP/{version}\r\n{''.join(lines)}\r\n".encode()


def read_head(sock):
    """The head of an answer, byte by byte, so that nothing behind it is taken."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (data := sock.recv(1)):
        head += data
    return head


class RawClient:
    """What a client sends that no library would."""

    def __init__(self, sock):
        self.sock = sock
        self.parser = WebSocketParser(expects_mask=False, limit_bytes=1 << 30)
        self.events = []

    def send(self, opcode, payload=b"", **options):
        self.sock.sendall(encode_websocket_frame(opcode, payload, mask=MASK, **options))

    def read(self):
        """The next event, None at the end of the connection."""
        while not self.events:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self.events += self.parser.feed(data)
        return self.events.pop(0)

    def read_close(self):
        """The code of the close frame that comes next, and that nothing follows."""
        opcode, _ = self.read()
        assert opcode == OPCODE_CLOSE
        return self.parser.close_code


@pytest.fixture
def server():
    with Upgrading() as running:
        yield running


# -- clients that behave --


def test_a_client_of_others(server):
    require("websockets")
    client = importlib.import_module("websockets.sync.client")
    for path in ("?x=1", ""):
        with client.connect(
            f"ws://127.0.0.1:{server.port}/v1/dvai/tunnel{path}", subprotocols=["x", SUBPROTOCOL]
        ) as ws:
            assert ws.subprotocol == SUBPROTOCOL
            assert "sec-websocket-extensions" not in ws.response.headers, "compression is not spoken here"
            for message in ("", "κόσμε", b"", bytes(125), bytes(126), bytes(TUNNEL_MESSAGE_LIMIT_BYTES)):
                ws.send(message)
                assert ws.recv() == message
            ws.send(["in", "pie", "ces"])
            assert ws.recv() == "inpieces"
            assert ws.ping(b"there?").wait(10)
            ws.close(4001, "done")
            assert ws.protocol.close_code == 4001
    wait_for(lambda: server.ends == [4001, 4001], 10, "both ended")


def test_our_own_client(server):
    async def play():
        url = f"ws://127.0.0.1:{server.port}/v1/dvai/tunnel"
        connection = await connect_websocket(url, subprotocols=["second"])
        assert connection.subprotocol == "second"
        for message in ("", "κόσμε", b"", bytes(range(256)) * 68):
            await (connection.send_text if isinstance(message, str) else connection.send_binary)(message)
            assert await connection.receive() == message
        many = [str(i) for i in range(2000)]
        sending = asyncio.create_task(send_all(connection, many))
        assert [await connection.receive() for _ in many] == many
        await sending
        await connection.close(4002, "done")
        assert connection.close_code == 4002

    async def send_all(connection, messages):
        for message in messages:
            await connection.send_text(message)

    asyncio.run(asyncio.wait_for(play(), 30))
    wait_for(lambda: server.ends == [4002], 10, "it ended")


def test_over_tls(tmp_path):
    import ssl

    from test_http_server import TLS

    with Upgrading(ssl_cert_file=str(TLS / "cert.pem"), ssl_key_file=str(TLS / "key.pem")) as server:
        server.request = lambda method, path: (200,)  # the check at the end speaks no TLS

        async def play():
            trusting = ssl.create_default_context(cafile=TLS / "cert.pem")
            url = f"wss://localhost:{server.port}/v1/dvai/tunnel"
            connection = await connect_websocket(url, subprotocols=[SUBPROTOCOL], tls_context=trusting)
            await connection.send_binary(bytes(10_000))
            assert await connection.receive() == bytes(10_000)
            await connection.close()
            assert connection.close_code == CLOSE_NORMAL

        asyncio.run(asyncio.wait_for(play(), 30))
        wait_for(lambda: server.ends == [CLOSE_NORMAL], 10, "it ended")


def test_frames_sent_with_the_request_are_read(server):
    frame = encode_websocket_frame(OPCODE_TEXT, b"eager", mask=MASK)
    with server.connect(build_request() + frame) as sock:
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in read_head(sock)
        assert RawClient(sock).read() == (OPCODE_TEXT, "eager")


def test_the_answer_says_no_more_than_it_must(server):
    with server.connect(build_request()) as sock:
        head = read_head(sock)
    assert head.lower().count(b"\r\nconnection:") == 1 and b"\r\nConnection: Upgrade\r\n" in head
    assert f"\r\nSec-WebSocket-Protocol: {SUBPROTOCOL}\r\n".encode() in head
    assert b"Content-Length" not in head and b"Transfer-Encoding" not in head
    with server.connect(build_request(Connection="Upgrade, close")) as sock:
        head = read_head(sock)
    assert head.startswith(b"HTTP/1.1 101 ") and b"close" not in head


# -- handshakes that are none, and callers who may not --


@pytest.mark.parametrize(
    ("request_data", "status"),
    [
        (build_request(Upgrade=None), 426),
        (build_request(Upgrade="h2c"), 426),
        (build_request(Sec_WebSocket_Version="8"), 426),
        (build_request(Sec_WebSocket_Version=None), 426),
        (build_request(version="1.0"), 400),
        (build_request(Connection="keep-alive"), 400),
        (build_request(Sec_WebSocket_Key=None), 400),
        (build_request(Sec_WebSocket_Key="c2hvcnQ="), 400),
        (build_request(Sec_WebSocket_Protocol=None), 400),
        (build_request(Sec_WebSocket_Protocol="other"), 400),
        (build_request(Sec_WebSocket_Protocol="a b"), 400),
        (build_request(Content_Length="2") + b"{}", 400),
        (build_request(method="POST", Content_Type="application/json", Content_Length="2") + b"{}", 400),
    ],
)
def test_handshakes_that_are_none(server, request_data, status):
    with server.connect(request_data) as sock:
        head = read_head(sock)
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert error_of(sock.makefile("rb").read(int(head.partition(b"Content-Length: ")[2].split()[0])))
    if status == 426:
        assert b"\r\nUpgrade: websocket\r\n" in head and b"\r\nSec-WebSocket-Version: 13\r\n" in head


@pytest.mark.parametrize("origins", [(), ("https://page.example",), ("*",)])
@pytest.mark.parametrize(
    "field", [{"Origin": "https://page.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"}]
)
def test_no_web_page_gets_a_websocket(origins, field):
    with Upgrading(cors_origins=origins) as server, server.connect(build_request(**field)) as sock:
        assert read_head(sock).startswith(b"HTTP/1.1 403 ")


def test_another_name_is_refused_and_a_stranger_may_connect():
    with Upgrading(api_keys=("secret",)) as server:
        with server.connect(build_request(Host="rebound.example")) as sock:
            assert read_head(sock).startswith(b"HTTP/1.1 403 ")
        assert server.request("GET", "/v1/models")[0] == 401, "no key was given"
        with server.open() as client:
            client.send(OPCODE_TEXT, b"hello")
            assert client.read() == (OPCODE_TEXT, "hello")


# -- limits, stopping, ending --


def test_open_websockets_count_and_give_way_to_nobody():
    with Upgrading(connections_limit=3) as server:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(server.open()) for _ in range(3)]
            assert server.server.connection_count == 3
            with contextlib.suppress(ConnectionError), server.connect(build_request()) as sock:
                assert read_head(sock) == b"", "one too many"
            for client in clients:
                client.send(OPCODE_TEXT, b"still here")
                assert client.read() == (OPCODE_TEXT, "still here")
        wait_for(lambda: server.server.connection_count == 0, 10, "their places are free")


def test_a_stop_closes_websockets_as_going_away():
    with Upgrading() as server:
        with server.open() as client, server.open() as other:
            stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
            for each in (client, other):
                assert each.read_close() == CLOSE_GOING_AWAY
                each.sock.sendall(encode_websocket_close(CLOSE_GOING_AWAY, mask=MASK))
                assert each.read() is None
            stopping.result(30)
            assert server.ends == [CLOSE_GOING_AWAY] * 2
        server.check_recovered = lambda: None  # it has stopped


def test_a_stop_ends_clients_that_do_not_answer(monkeypatch):
    monkeypatch.setattr(dvai, "WEBSOCKET_CLOSE_S", 0.05)
    with Upgrading() as server:
        with server.open():
            server.call(server.server.stop())
            assert server.server.connection_count == 0
        server.check_recovered = lambda: None  # it has stopped


def test_ending_a_callers_requests_ends_its_websocket(server):
    with server.open() as client:
        server.loop.call_soon_threadsafe(server.server.end_requests, lambda r: r.path == "/v1/dvai/tunnel")
        assert client.read() is None


def test_a_route_that_returns_closes_and_one_that_fails_says_so(server):
    with server.open("idle") as client:
        server.may_go_on.set()
        assert client.read_close() == CLOSE_NORMAL
        client.sock.sendall(encode_websocket_close(CLOSE_NORMAL, mask=MASK))
        assert client.read() is None
    for query in ("lose", "raise"):
        with server.open(query) as client:
            assert client.read_close() == CLOSE_INTERNAL_ERROR
    server.expect_bugs = True
    assert sum("Traceback" in line for line in server.log.lines) == 1, "only a bug has one"
    assert not any("a secret" in line for line in server.log.lines if "Traceback" not in line)


def test_a_client_that_leaves_without_a_word(server):
    with server.open() as client:
        client.send(OPCODE_TEXT, b"begun", is_final=False)
    wait_for(lambda: server.ends == [dvai.CLOSE_ABNORMAL], 10, "it ended")


def test_a_client_that_resets(server):
    with server.open() as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: server.ends == [dvai.CLOSE_ABNORMAL], 10, "it ended")


# -- hostile frames; the health route answers after each (Running.check_recovered) --

HOSTILE = {
    "unmasked": (encode_websocket_frame(OPCODE_TEXT, b"hello"), CLOSE_PROTOCOL_ERROR),
    "reserved bits": (b"\xf2\x80" + MASK, CLOSE_PROTOCOL_ERROR),
    "a reserved opcode": (b"\x8b\x80" + MASK, CLOSE_PROTOCOL_ERROR),
    "a giant length": (b"\x82\xff\x7f" + b"\xff" * 7 + MASK, CLOSE_TOO_BIG),
    "a length with the highest bit": (b"\x82\xff" + b"\xff" * 8 + MASK, CLOSE_PROTOCOL_ERROR),
    "one byte too many": (
        encode_websocket_frame(OPCODE_BINARY, bytes(TUNNEL_MESSAGE_LIMIT_BYTES + 1), mask=MASK),
        CLOSE_TOO_BIG,
    ),
    "a fragmented ping": (encode_websocket_frame(OPCODE_PING, b"", mask=MASK, is_final=False), CLOSE_PROTOCOL_ERROR),
    "a fragment flood": (
        encode_websocket_frame(OPCODE_TEXT, b"a", mask=MASK, is_final=False)
        + encode_websocket_frame(OPCODE_CONTINUATION, b"", mask=MASK, is_final=False) * 100_000,
        CLOSE_POLICY_VIOLATION,
    ),
    "fragments that add up": (
        encode_websocket_frame(OPCODE_BINARY, bytes(1024), mask=MASK, is_final=False)
        + encode_websocket_frame(OPCODE_CONTINUATION, bytes(1024), mask=MASK, is_final=False) * 30,
        CLOSE_TOO_BIG,
    ),
    "text that is none": (encode_websocket_frame(OPCODE_TEXT, b"\xed\xa0\x80", mask=MASK), CLOSE_INVALID_DATA),
    "a close code that is none": (
        encode_websocket_frame(OPCODE_CLOSE, struct.pack("!H", 1005), mask=MASK),
        CLOSE_PROTOCOL_ERROR,
    ),
    "HTTP again": (build_request(), CLOSE_PROTOCOL_ERROR),
    "noise": (bytes(range(255, 0, -1)) * 2000, CLOSE_PROTOCOL_ERROR),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused_with_a_reason(server, name):
    data, code = HOSTILE[name]
    with server.open() as client:
        with contextlib.suppress(ConnectionError):  # it may not have read all of it
            client.sock.sendall(data)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.read_close() == code
    wait_for(lambda: server.ends == [code], 10, "the route has learnt it")


def test_hostile_frames_byte_by_byte(server):
    for data, code in HOSTILE.values():
        if len(data) < 200:
            with server.open() as client:
                client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with contextlib.suppress(ConnectionError):
                    for i in range(len(data)):
                        client.sock.sendall(data[i : i + 1])
                assert client.read_close() == code


def test_a_ping_flood_of_one_that_does_not_read(server):
    """Memory stays bounded (check_recovered measures it), and whoever asks meanwhile is answered."""
    flood = encode_websocket_frame(OPCODE_PING, bytes(125), mask=MASK) * 1000
    with server.open() as client:
        client.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                client.sock.sendall(flood)
        assert server.request("GET", "/health")[0] == 200
        client.sock.settimeout(10)
        assert client.read() == (OPCODE_PONG, bytes(125))


def test_an_echo_flood_of_one_that_does_not_read_stops_being_read(server):
    message = encode_websocket_frame(OPCODE_BINARY, bytes(16_384), mask=MASK)
    with server.open() as client:
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            for _ in range(4000):
                client.sock.sendall(message)
        assert server.request("GET", "/health")[0] == 200


def test_a_frame_that_never_ends_holds_up_nobody(server):
    with server.open() as slow, server.open() as client:
        for byte in b"\x82\xfe\x40\x00" + MASK + bytes(50):
            slow.sock.sendall(bytes((byte,)))
            client.send(OPCODE_TEXT, b"meanwhile")
            assert client.read() == (OPCODE_TEXT, "meanwhile")
        assert server.request("GET", "/health")[0] == 200


def test_many_small_messages_of_one_client(server):
    with server.open() as client:
        count = 20_000
        frames = b"".join(encode_websocket_frame(OPCODE_TEXT, b"%d" % i, mask=MASK) for i in range(count))
        sender = threading.Thread(target=client.sock.sendall, args=(frames,))
        sender.start()
        assert [client.read() for _ in range(count)] == [(OPCODE_TEXT, str(i)) for i in range(count)]
        sender.join()


def test_errors_are_of_the_openai_shape(server):
    status, headers, body = server.request("GET", "/v1/dvai/tunnel")
    assert status == 426 and headers["Upgrade"] == "websocket"
    assert json.loads(body)["error"]["code"] == "upgrade_required"
