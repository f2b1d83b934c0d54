"""Open WebSockets: real ones between our two sides and those of the package `websockets`, and others that go wrong."""

import asyncio
import base64
import contextlib
import importlib
import socket
import ssl
import struct
import sys
from pathlib import Path

import pytest
from support import require

import dvai_bridge as dvai
from dvai_bridge import (
    CLOSE_ABNORMAL,
    CLOSE_GOING_AWAY,
    CLOSE_INVALID_DATA,
    CLOSE_NORMAL,
    CLOSE_PROTOCOL_ERROR,
    CLOSE_TOO_BIG,
    CLOSE_WITHOUT_CODE,
    KIB,
    OPCODE_BINARY,
    OPCODE_CLOSE,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
    UpstreamConnectError,
    UpstreamError,
    UpstreamLostError,
    UpstreamTimeoutError,
    UsageError,
    WebSocketConnection,
    WebSocketParser,
    WebSocketPhase,
    choose_proxy,
    connect_websocket,
    encode_websocket_close,
    encode_websocket_frame,
    parse_http_url,
)

TLS = Path(__file__).parent / "tls"
PATIENCE_S = 30  # for what has to happen at all
LIMIT_BYTES = 96 * KIB


def run(work):
    """Runs a test, and sees that it leaves no task behind."""

    async def whole():
        async with asyncio.timeout(PATIENCE_S):
            await work
            await until(lambda: len(asyncio.all_tasks()) == 1)

    asyncio.run(whole())


async def until(condition):
    while not condition():  # noqa: ASYNC110 - conditions of any kind
        await asyncio.sleep(0.005)


# -- against the package `websockets` as server --


@contextlib.asynccontextmanager
async def serve_theirs(handler, **options):
    require("websockets")
    server = importlib.import_module("websockets.asyncio.server")
    async with server.serve(handler, "127.0.0.1", 0, compression=None, max_size=LIMIT_BYTES, **options) as running:
        yield f"{'wss' if options.get('ssl') else 'ws'}://127.0.0.1:{running.sockets[0].getsockname()[1]}/pair?x=1"


async def echo(connection):
    with contextlib.suppress(require("websockets").ConnectionClosed):
        while True:
            await connection.send(await connection.recv())


MESSAGES = ["", "hello", "κόσμε" * 100, b"", b"\x00\xff", bytes(125), bytes(126), bytes(65535), bytes(65536)]


def test_messages_of_all_kinds_to_a_server_of_others():
    async def play():
        async with serve_theirs(echo) as url:
            connection = await connect_websocket(url)
            for message in [*MESSAGES, bytes(range(256)) * (LIMIT_BYTES // 256)]:
                await (connection.send_text if isinstance(message, str) else connection.send_binary)(message)
                assert await connection.receive() == message
            await connection.close(4000, "enough")
            assert (connection.close_code, connection.close_reason) == (4000, "enough"), "it echoes both"
            assert await connection.receive() is None
            with pytest.raises(ConnectionError):
                await connection.send_text("late")
            await connection.close()

    run(play())


def test_the_handshake_says_where_and_what_for():
    seen = {}

    async def look(connection):
        seen["path"] = connection.request.path
        seen["authorization"] = connection.request.headers["Authorization"]
        await connection.close(CLOSE_GOING_AWAY, "bye")

    async def play():
        async with serve_theirs(look, subprotocols=["other", "dvai-relay.2"]) as url:
            headers = [("Authorization", "Bearer abc")]
            connection = await connect_websocket(url, subprotocols=["dvai-relay.2", "dvai-relay.1"], headers=headers)
            assert connection.subprotocol == "dvai-relay.2"
            assert await connection.receive() is None
            assert (connection.close_code, connection.close_reason) == (CLOSE_GOING_AWAY, "bye")
            await connection.close()
        assert seen == {"path": "/pair?x=1", "authorization": "Bearer abc"}

    run(play())


def test_fragments_and_pings_of_others():
    async def send(connection):
        await connection.send(iter(["frag", "ment", "s"]))
        await (await connection.ping(b"are you there"))  # resolved by our pong
        await connection.send(iter([b"\x00"] * 60))
        await connection.wait_closed()

    async def play():
        async with serve_theirs(send) as url:
            connection = await connect_websocket(url)
            assert await connection.receive() == "fragments"
            assert await connection.receive() == bytes(60)
            await connection.close()

    run(play())


def test_messages_beyond_the_limit_close_the_websocket():
    closed = None

    async def send(connection):
        await connection.send(bytes(1001))
        await connection.wait_closed()
        closed.set_result(connection.close_code)

    async def play():
        nonlocal closed
        closed = asyncio.get_running_loop().create_future()
        async with serve_theirs(send) as url:
            connection = await connect_websocket(url, limit_bytes=1000)
            assert await connection.receive() is None
            assert connection.close_code == CLOSE_TOO_BIG
            assert await closed == CLOSE_TOO_BIG
            await connection.close()

    run(play())


def test_tls_and_who_is_believed():
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")

    async def play():
        async with serve_theirs(echo, ssl=server_context) as url:
            url = url.replace("127.0.0.1", "localhost")
            trusting = ssl.create_default_context(cafile=TLS / "cert.pem")
            connection = await connect_websocket(url, tls_context=trusting)
            for message in MESSAGES:
                await (connection.send_text if isinstance(message, str) else connection.send_binary)(message)
                assert await connection.receive() == message
            await connection.close()
            assert connection.close_code == CLOSE_NORMAL
            with pytest.raises(UpstreamConnectError, match="no TLS"):
                await connect_websocket(url)

    run(play())


# -- against servers that do what a test says --


@contextlib.asynccontextmanager
async def serve_script(script):
    """A server whose every connection is `script(request, reader, writer)`, once the request's head has come."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await script(await reader.readuntil(b"\r\n\r\n"), reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


def build_101(request, **change):
    key = next(line for line in request.decode().split("\r\n") if line.startswith("Sec-WebSocket-Key: "))
    fields = dict(dvai.build_upgrade_response_fields(key.partition(": ")[2])) | change
    return dvai.encode_response_head(101, fields.items())


def answering(data):
    async def script(request, reader, writer):
        writer.write(data(request) if callable(data) else data)
        await reader.read()

    return script


PAGE = b"Content-Type: text/html\r\nContent-Length: 5\r\n\r\nlogin"


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (b"HTTP/1.1 200 OK\r\n" + PAGE, UpstreamError, "captive portal or a proxy"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://portal/\r\n" + PAGE, UpstreamError, "captive portal or a proxy"),
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n" + PAGE, UpstreamError, "proxy .* login"),
        (b"HTTP/1.1 429 Too Many Requests\r\n" + PAGE, UpstreamError, "refused .*429"),
        (lambda r: build_101(r, **{"Sec-WebSocket-Accept": "x"}), UpstreamError, "Accept"),
        (lambda r: build_101(r, **{"Sec-WebSocket-Protocol": "other"}), UpstreamError, "not offered"),
        (lambda r: build_101(r, Upgrade="h2c"), UpstreamError, "something else"),
        (lambda r: build_101(r, **{"Content-Length": "x"}), UpstreamError, "broke HTTP"),
        (b"SSH-2.0-OpenSSH_9.0\r\n", UpstreamError, "broke HTTP"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20, UpstreamError, "interim"),
    ],
)
def test_an_answer_that_is_no_websocket_is_explained(answer, kind, says):
    async def play():
        async with serve_script(answering(answer)) as url:
            with pytest.raises(kind, match=says):
                await connect_websocket(url)

    run(play())


def test_servers_that_go_or_say_nothing_or_are_not_there():
    async def leave(request, reader, writer):
        pass

    async def play():
        async with serve_script(leave) as url:
            with pytest.raises(UpstreamLostError, match="closed the connection"):
                await connect_websocket(url)
        async with serve_script(answering(b"")) as url:
            with pytest.raises(UpstreamTimeoutError, match=r"within 0\.2 s"):
                await connect_websocket(url, timeout_s=0.2)
        with pytest.raises(UpstreamConnectError, match="refused"):
            await connect_websocket(url)

    run(play())


@pytest.mark.parametrize("url", ["http://localhost/", "localhost", "ws:", "ws://user@localhost/", "ws://localhost/#a"])
def test_urls_that_are_none(url):
    async def play():
        with pytest.raises(ValueError):
            await connect_websocket(url)

    run(play())


def test_a_cancelled_connect_leaves_nothing_behind():
    async def play():
        begun, ended = asyncio.Event(), asyncio.Event()

        async def script(request, reader, writer):
            begun.set()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            ended.set()

        async with serve_script(script) as url:
            task = asyncio.create_task(connect_websocket(url))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await ended.wait()

    run(play())


def test_frames_that_come_with_the_101_are_read():
    async def play():
        both = encode_websocket_frame(OPCODE_TEXT, b"early") + encode_websocket_close(1000, "done")
        async with serve_script(answering(lambda request: build_101(request) + both)) as url:
            connection = await connect_websocket(url)
            assert await connection.receive() == "early"
            assert await connection.receive() is None
            assert (connection.close_code, connection.close_reason) == (1000, "done")
            await connection.close()

    run(play())


# -- a connection of either side, and a socket that plays the other --


class Peer:
    """A WebSocketConnection over a socket pair, and the other end of it, which sends and reads what it likes."""

    def __init__(self, connection, sock, lost):
        self.connection, self.sock, self.lost = connection, sock, lost
        self.parser = WebSocketParser(expects_mask=connection._is_client, limit_bytes=1 << 30)
        self.events = []

    async def send(self, data):
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def send_frame(self, opcode, payload=b"", **options):
        mask = None if self.connection._is_client else b"\x01\x02\x03\x04"
        await self.send(encode_websocket_frame(opcode, payload, mask=mask, **options))

    async def read_event(self):
        while not self.events:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            if not data:
                return None
            self.events += self.parser.feed(data)
        return self.events.pop(0)


@contextlib.asynccontextmanager
async def connect_peer(*, is_client=True, limit_bytes=LIMIT_BYTES, **options):
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    connection = WebSocketConnection(is_client=is_client, limit_bytes=limit_bytes, **options)
    lost = asyncio.Event()
    writer = dvai.TransportWriter(transport, stall_s=PATIENCE_S)
    connection.take_over(transport, writer, b"", lambda exc: lost.set())
    try:
        yield Peer(connection, theirs, lost)
    finally:
        connection.abort()
        await lost.wait()
        theirs.close()
        assert connection.phase is WebSocketPhase.CLOSED


SIDES = pytest.mark.parametrize("is_client", [True, False], ids=["client", "server"])


@SIDES
def test_they_close_first(is_client):
    async def play():
        async with connect_peer(is_client=is_client) as peer:
            await peer.send_frame(OPCODE_TEXT, b"last")
            await peer.send_frame(OPCODE_CLOSE, struct.pack("!H", 3001) + "schön".encode())
            assert await peer.connection.receive() == "last"
            assert await peer.connection.receive() is None
            assert (peer.connection.close_code, peer.connection.close_reason) == (3001, "schön")
            assert await peer.read_event() == (OPCODE_CLOSE, "") and peer.parser.close_code == 3001
            if not is_client:  # the server ends the connection
                assert await peer.read_event() is None
            else:
                assert not peer.lost.is_set()
                peer.sock.close()
            await peer.lost.wait()

    run(play())


@SIDES
def test_a_close_without_a_code_is_answered_by_one(is_client):
    async def play():
        async with connect_peer(is_client=is_client) as peer:
            await peer.send_frame(OPCODE_CLOSE)
            assert await peer.connection.receive() is None
            assert peer.connection.close_code == CLOSE_WITHOUT_CODE
            assert await peer.read_event() == (OPCODE_CLOSE, "") and peer.parser.close_code == CLOSE_WITHOUT_CODE

    run(play())


@SIDES
def test_we_close_first_and_what_comes_meanwhile_is_dropped(is_client):
    async def play():
        async with connect_peer(is_client=is_client) as peer:
            await peer.send_frame(OPCODE_TEXT, b"never received")
            await until(lambda: peer.connection._messages)
            closing = asyncio.create_task(peer.connection.close(1001, "going"))
            assert await peer.read_event() == (OPCODE_CLOSE, "going") and peer.parser.close_code == 1001
            assert await peer.connection.receive() is None
            await peer.send_frame(OPCODE_TEXT, b"dropped")
            await peer.send_frame(OPCODE_PING, b"not answered")
            await peer.send_frame(OPCODE_CLOSE, struct.pack("!H", 1001))
            if is_client:
                peer.sock.close()
            await closing
            assert peer.connection.close_code == 1001

    run(play())


@SIDES
def test_a_close_that_is_never_answered_ends_by_the_deadline(is_client, monkeypatch):
    monkeypatch.setattr(dvai, "WEBSOCKET_CLOSE_S", 0.05)

    async def play():
        async with connect_peer(is_client=is_client) as peer:
            await asyncio.gather(peer.connection.close(), peer.connection.close())
            assert peer.connection.close_code == CLOSE_ABNORMAL

    run(play())


@SIDES
def test_the_connection_ends_without_a_close_frame(is_client):
    async def play():
        async with connect_peer(is_client=is_client) as peer:
            receiving = asyncio.create_task(peer.connection.receive())
            await peer.send_frame(OPCODE_TEXT, b"begun", is_final=False)
            peer.sock.close()
            assert await receiving is None
            await peer.lost.wait()
            assert peer.connection.close_code == CLOSE_ABNORMAL
            with pytest.raises(ConnectionError):
                await peer.connection.send_binary(b"late")
            await peer.connection.close()

    run(play())


FAULTS = {
    "a reserved bit": (b"\xc1\x80", CLOSE_PROTOCOL_ERROR),
    "a reserved opcode": (b"\x83\x80", CLOSE_PROTOCOL_ERROR),
    "a fragment out of turn": (b"\x80\x80", CLOSE_PROTOCOL_ERROR),
    "a giant length": (b"\x82\xff" + b"\x7f" + b"\xff" * 7, CLOSE_TOO_BIG),
    "no UTF-8": (b"\x81\x81\x00\x00\x00\x00\xff", CLOSE_INVALID_DATA),
    "a bad close code": (b"\x88\x82\x00\x00\x00\x00\x03\xec", CLOSE_PROTOCOL_ERROR),
}


@SIDES
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_said_after_what_came_before_them(fault, is_client):
    data, code = FAULTS[fault]
    if is_client:  # a server's frames are not masked
        data = data[:1] + bytes((data[1] & 0x7F,)) + data[2:].replace(bytes(4), b"", 1)

    async def play():
        async with connect_peer(is_client=is_client) as peer:
            await peer.send_frame(OPCODE_TEXT, b"before")
            await peer.send(data + bytes(1000))
            assert await peer.connection.receive() == "before"
            assert await peer.connection.receive() is None
            assert peer.connection.close_code == code
            opcode, reason = await peer.read_event()
            assert (opcode, peer.parser.close_code) == (OPCODE_CLOSE, code) and reason
            with contextlib.suppress(ConnectionError):
                await peer.send(bytes(100_000))
            peer.sock.close()
            await peer.lost.wait()

    run(play())


@SIDES
def test_frames_must_be_masked_by_clients_and_only_by_them(is_client):
    async def play():
        async with connect_peer(is_client=is_client) as peer:
            mask = bytes(4) if is_client else None
            await peer.send(encode_websocket_frame(OPCODE_TEXT, b"hello", mask=mask))
            assert await peer.connection.receive() is None
            assert peer.connection.close_code == CLOSE_PROTOCOL_ERROR

    run(play())


def test_every_mask_is_another():
    async def play():
        async with connect_peer(is_client=True) as peer:
            masks = set()
            for _ in range(50):
                await peer.connection.send_binary(b"")
            data = b""
            while len(data) < 50 * 6:
                data += await asyncio.get_running_loop().sock_recv(peer.sock, 1 << 16)
            masks = {data[i + 2 : i + 6] for i in range(0, len(data), 6)}
            assert len(masks) > 45

    run(play())


@SIDES
def test_pings_are_answered_and_pongs_are_not(is_client):
    async def play():
        async with connect_peer(is_client=is_client) as peer:
            await peer.send_frame(OPCODE_PONG, b"nobody asked")
            for payload in (b"", b"one", bytes(125)):
                await peer.send_frame(OPCODE_PING, payload)
                assert await peer.read_event() == (OPCODE_PONG, payload)

    run(play())


def test_pings_of_one_that_does_not_read_are_answered_once_it_does():
    async def play():
        async with connect_peer(is_client=False) as peer:
            count = 20_000
            flood = b"".join(encode_websocket_frame(OPCODE_PING, b"%0100d" % i, mask=bytes(4)) for i in range(count))
            await peer.send(flood)
            await peer.send_frame(OPCODE_TEXT, b"behind")
            assert await peer.connection.receive() == "behind"
            assert peer.connection._is_write_paused
            assert peer.connection._transport.get_write_buffer_size() < 1024 * KIB, "not an answer for each"
            pongs = []
            while not pongs or pongs[-1] != b"%0100d" % (count - 1):
                opcode, payload = await peer.read_event()
                assert opcode == OPCODE_PONG
                pongs.append(payload)
            assert len(pongs) < count and pongs == sorted(pongs)

    run(play())


def test_what_one_pass_sends_leaves_as_one_write():
    class Counting:
        def __init__(self, transport):
            self.transport, self.writes = transport, []

        def write(self, data):
            self.writes.append(len(data))
            self.transport.write(data)

        def __getattr__(self, name):
            return getattr(self.transport, name)

    async def play():
        async with connect_peer(is_client=False) as peer:
            counting = peer.connection._writer._transport = Counting(peer.connection._transport)
            await asyncio.gather(*[peer.connection.send_binary(bytes(10)) for _ in range(200)])
            assert await peer.read_event() == (OPCODE_BINARY, bytes(10))
            assert counting.writes == [200 * 12]

    run(play())


@SIDES
def test_a_receiver_that_waits_stops_the_sender(is_client):
    """Reading pauses at the bound, and goes on when there is room."""

    async def play():
        async with connect_peer(is_client=is_client) as peer:
            count, payload = 400, bytes(16 * KIB)

            async def send_all():
                for _ in range(count):
                    await peer.send_frame(OPCODE_BINARY, payload)

            sending = asyncio.create_task(send_all())
            await until(lambda: not peer.connection._is_reading)
            assert not sending.done()
            assert peer.connection._held_bytes < dvai.WEBSOCKET_QUEUE_LIMIT_BYTES + 512 * KIB
            for _ in range(count):
                assert await peer.connection.receive() == payload
            await sending
            assert peer.connection._is_reading and peer.connection._held_bytes == 0

    run(play())


def test_small_messages_are_bounded_by_their_number():
    async def play():
        async with connect_peer() as peer:
            for _ in range(dvai.WEBSOCKET_QUEUE_LIMIT):
                await peer.send_frame(OPCODE_TEXT, b"")
            await until(lambda: not peer.connection._is_reading)
            assert len(peer.connection._messages) == dvai.WEBSOCKET_QUEUE_LIMIT
            await peer.connection.receive()
            assert peer.connection._is_reading

    run(play())


def test_a_sender_waits_for_one_that_does_not_read():
    async def play():
        async with connect_peer() as peer:
            sent = 0

            async def send_all():
                nonlocal sent
                for _ in range(1000):
                    await peer.connection.send_binary(bytes(16 * KIB))
                    sent += 1

            sending = asyncio.create_task(send_all())
            await until(lambda: peer.connection._is_write_paused)
            assert sent < 100
            for _ in range(1000):
                assert await peer.read_event() == (OPCODE_BINARY, bytes(16 * KIB))
            await sending

    run(play())


def test_a_sender_that_waits_learns_that_the_connection_is_gone():
    async def play():
        async with connect_peer() as peer:

            async def send_all():
                while True:
                    await peer.connection.send_binary(bytes(16 * KIB))

            sending = asyncio.create_task(send_all())
            await until(lambda: peer.connection._is_write_paused)
            peer.sock.close()
            with pytest.raises(ConnectionError):
                await sending

    run(play())


@SIDES
def test_one_that_says_nothing_is_asked_and_then_given_up(is_client):
    async def play():
        async with connect_peer(is_client=is_client, ping_interval_s=0.02) as peer:
            pings = [await peer.read_event() for _ in range(dvai.WEBSOCKET_PINGS_MISSED_LIMIT)]
            assert pings == [(OPCODE_PING, b"")] * dvai.WEBSOCKET_PINGS_MISSED_LIMIT
            assert await peer.connection.receive() is None
            await peer.lost.wait()
            assert peer.connection.close_code == CLOSE_ABNORMAL

    run(play())


def test_one_that_answers_pings_stays():
    async def play():
        async with connect_peer(ping_interval_s=0.2) as peer:
            for _ in range(dvai.WEBSOCKET_PINGS_MISSED_LIMIT + 2):
                assert await peer.read_event() == (OPCODE_PING, b"")
                await peer.send_frame(OPCODE_PONG)
            await peer.send_frame(OPCODE_TEXT, b"still here")
            assert await peer.connection.receive() == "still here"

    run(play())


def test_only_one_receives_and_being_cancelled_loses_nothing():
    async def play():
        async with connect_peer() as peer:
            first = asyncio.create_task(peer.connection.receive())
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="already"):
                await peer.connection.receive()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            await peer.send_frame(OPCODE_TEXT, b"kept")
            assert await peer.connection.receive() == "kept"

    run(play())


# -- proxies --


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("https://relay.example/", {}, None),
        ("https://relay.example/", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://relay.example/", {"HTTPS_PROXY": ""}, None),
        ("https://relay.example/", {"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:1"}, "http://low:1"),
        ("https://relay.example/", {"HTTP_PROXY": "http://p:1"}, None),
        ("https://relay.example/", {"ALL_PROXY": "socks5h://p:1"}, "socks5h://p:1"),
        ("https://relay.example/", {"HTTPS_PROXY": "http://p:1", "wss_proxy": "http://w:1"}, "http://w:1"),
        ("http://relay.example/", {"HTTP_PROXY": "http://p:1"}, "http://p:1"),
        ("https://relay.example/", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "a.b, .example"}, None),
        ("https://relay.example/", {"HTTPS_PROXY": "http://p:1", "no_proxy": "*"}, None),
        ("https://relay.example:8443/", {"HTTPS_PROXY": "http://p:1", "no_proxy": "relay.example:8443"}, None),
        ("https://relay.example/", {"HTTPS_PROXY": "http://p:1", "NO_PROXY": "other.example"}, "http://p:1"),
        ("https://localhost/", {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://127.0.0.1/", {"HTTPS_PROXY": "http://p:1"}, None),
        ("https://[::1]/", {"HTTPS_PROXY": "http://p:1"}, None),
    ],
)
def test_which_proxy_is_used(url, environ, proxy):
    assert choose_proxy(parse_http_url(url), environ) == proxy


async def copy_stream(reader, writer):
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def serve_proxy(target_url, status=b"200 OK", login=None):
    """An HTTP proxy that takes every CONNECT to one server of ours; `asked`: what it was asked for."""
    asked, tasks = [], set()
    port = parse_http_url(target_url.replace("ws", "http", 1)).port

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.split("\r\n")[0])
        if login is not None and f"Basic {base64.b64encode(login).decode()}" not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        writer.write(b"HTTP/1.1 " + status + b"\r\n\r\n")
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy_stream(reader, far_writer), copy_stream(far_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()
        await asyncio.wait(tasks)


def test_through_a_proxy_with_a_login():
    async def play():
        theirs = serve_theirs(echo, subprotocols=["dvai-relay.2"])
        async with theirs as url, serve_proxy(url, login=b"me:secret") as (port, asked):
            environ = {"HTTP_PROXY": f"http://me:secret@127.0.0.1:{port}"}
            connection = await connect_websocket(
                "ws://relay.invalid/pair", subprotocols=["dvai-relay.2"], environ=environ
            )
            assert asked == ["CONNECT relay.invalid:80 HTTP/1.1"]
            assert connection.subprotocol == "dvai-relay.2" and connection.close_code is None
            for message in MESSAGES:
                await (connection.send_text if isinstance(message, str) else connection.send_binary)(message)
                assert await connection.receive() == message
            await connection.close(4000, "enough")
            assert connection.close_code == 4000 and await connection.receive() is None
            with pytest.raises(ConnectionError):
                await connection.send_text("late")

    run(play())


@contextlib.asynccontextmanager
async def serve_socks(target_url):
    """A SOCKS 5 proxy (RFC 1928) that takes every CONNECT by name to one server of ours."""
    asked, tasks = [], set()
    target_port = parse_http_url(target_url.replace("ws", "http", 1)).port

    async def serve(reader, writer):
        tasks.add(asyncio.current_task())
        _, count = await reader.readexactly(2)
        await reader.readexactly(count)
        writer.write(b"\x05\x00")
        assert await reader.readexactly(4) == b"\x05\x01\x00\x03"
        name = await reader.readexactly((await reader.readexactly(1))[0])
        asked.append((name, int.from_bytes(await reader.readexactly(2), "big")))
        writer.write(b"\x05\x00\x00\x01" + bytes(6))
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target_port)
        await asyncio.gather(copy_stream(reader, far_writer), copy_stream(far_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], asked
    finally:
        server.close()
        await asyncio.wait(tasks)


def test_through_a_socks_proxy():
    require("python_socks")

    async def play():
        async with serve_theirs(echo) as url, serve_socks(url) as (port, asked):
            environ = {"ALL_PROXY": f"socks5h://127.0.0.1:{port}"}
            connection = await connect_websocket("ws://relay.invalid:8080/pair", environ=environ)
            assert asked == [(b"relay.invalid", 8080)], "the name is resolved over there"
            await connection.send_binary(bytes(1000))
            assert await connection.receive() == bytes(1000)
            await connection.close()
            assert connection.close_code == CLOSE_NORMAL

    run(play())


def test_a_socks_proxy_without_its_package_names_it(monkeypatch):
    require("websockets")
    monkeypatch.delitem(sys.modules, "websockets.asyncio.client", raising=False)  # it looks when it is imported
    for name in ("python_socks", "python_socks.async_", "python_socks.async_.asyncio"):
        monkeypatch.setitem(sys.modules, name, None)

    async def play():
        with pytest.raises(UsageError, match="package python-socks: pip install"):
            await connect_websocket("ws://relay.invalid/", environ={"ALL_PROXY": "socks5h://127.0.0.1:9"})

    run(play())


def test_proxies_that_do_not_help_are_named_without_their_password():
    require("websockets")

    async def connect(proxy):
        with pytest.raises((UpstreamError, UsageError)) as failed:
            await connect_websocket("ws://relay.invalid/", environ={"HTTP_PROXY": proxy})
        assert "secret" not in str(failed.value)
        return failed.value

    async def play():
        async with serve_script(answering(b"HTTP/1.1 200 OK\r\n" + PAGE)) as url:
            async with serve_proxy(url, login=b"me:secret") as (port, _):
                refused = await connect(f"http://you:secret@127.0.0.1:{port}")
                assert isinstance(refused, UpstreamConnectError) and "407" in refused.message
            async with serve_proxy(url) as (port, _):
                page = await connect(f"http://127.0.0.1:{port}")
                assert "captive portal or a proxy" in page.message
        assert "the proxy that the environment names" in (await connect("nonsense://me:secret@127.0.0.1")).message
        gone = await connect(f"http://me:secret@127.0.0.1:{port}")
        assert isinstance(gone, UpstreamConnectError)

    run(play())


def test_a_proxy_without_the_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets.asyncio.client", None)
    monkeypatch.setitem(sys.modules, "websockets", None)

    async def play():
        with pytest.raises(UsageError, match="package websockets"):
            await connect_websocket("wss://relay.invalid/", environ={"HTTPS_PROXY": "http://127.0.0.1:9"})

    run(play())
