"""Requests to real loopback servers that answer well, slowly, wrongly or not at all."""

import asyncio
import contextlib
import errno
import os
import socket
import ssl

import pytest

import dvai_bridge
from dvai_bridge import (
    KIB,
    MIB,
    RESPONSE_BUFFER_LIMIT_BYTES,
    ClientPhase,
    HttpBudgets,
    HttpClient,
    UpstreamConnectError,
    UpstreamError,
    UpstreamLostError,
    UpstreamTimeoutError,
    explain_connect_error,
    parse_http_url,
)
from tests.support import MODULE

HELLO = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CERTIFICATE = MODULE.parent / "tests" / "tls"
PATIENCE_S = 30  # for what has to happen at all


class Server:
    """A server on loopback that plays `script(server, reader, writer)` on every connection.

    `requests`: the heads and bodies that came; `ends`: set for each connection that the client closed.
    """

    def __init__(self, script, tls=None):
        self.script, self.tls = script, tls
        self.connections, self.requests, self.left = 0, [], asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=self.tls)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()

    async def serve(self, reader, writer):
        self.connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self.script(self, reader, writer)
        finally:
            writer.close()

    async def read_request(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
        self.requests.append((head, body))

    async def wait_left(self, reader):
        """Until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        self.left.set()


def answering(*answers, closes=True):
    """A script that gives one answer per request; behind the last it closes, or waits for the client to."""

    async def script(server, reader, writer):
        for answer in answers:
            await server.read_request(reader)
            writer.write(answer)
        await writer.drain()
        if not closes:
            await server.wait_left(reader)

    return script


def run(work, *, script, tls=None, client_tls=None):
    """`await work(client, server)` with a client and a server that plays `script`."""

    async def main():
        client = HttpClient(tls_context=client_tls)
        async with asyncio.timeout(PATIENCE_S), Server(script, tls) as server:
            try:
                return await work(client, server)
            finally:
                await client.close()
                assert not client._connections and not client._idle

    return asyncio.run(main())


async def fetch(client, url, method="GET", **options):
    async with client.request(method, url, **options) as response:
        return response.status, await response.read(MIB)


def fetch_once(answer, method="GET", **options):
    async def work(client, server):
        return await fetch(client, server.url + "/x", method, **options)

    return run(work, script=answering(answer))


# What is sent and read


def test_a_request_and_its_answer():
    async def work(client, server):
        async with client.request("POST", server.url + "/v1/x?a=b", headers=[("X-A", "1")], body=b"{}") as response:
            assert response.headers.get("content-length") == "5"
            assert await response.read(5) == b"hello"
        port = server.url.rpartition(":")[2]
        head, body = server.requests[0]
        assert body == b"{}"
        assert head.decode().split("\r\n") == [
            "POST /v1/x?a=b HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            "Accept-Encoding: identity",
            "X-A: 1",
            "Content-Length: 2",
            "",
            "",
        ]

    run(work, script=answering(HELLO))


@pytest.mark.parametrize(
    ("answer", "method", "expected"),
    [
        (CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n", "GET", (200, b"hello")),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", "GET", (200, b"until the end")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "DELETE", (204, b"")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", "HEAD", (200, b"")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO, "POST", (200, b"hello")),
        (b"HTTP/1.1 302 Found\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n", "GET", (302, b"")),
    ],
)
def test_forms_of_answers(answer, method, expected):
    assert fetch_once(answer, method) == expected


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", UpstreamLostError),
        (b"HTTP/1.1 200 OK\r\n", UpstreamLostError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nhello", UpstreamLostError),
        (CHUNKED + b"5\r\nhello\r\n", UpstreamLostError),
        (b"SSH-2.0-x\r\n\r\n", UpstreamError),
        (CHUNKED + b"xyz\r\nhello\r\n", UpstreamError),
        (HELLO.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), UpstreamError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 2_000_000, UpstreamError),
    ],
)
def test_answers_that_are_none(answer, error):
    with pytest.raises(error) as raised:
        fetch_once(answer)
    assert type(raised.value) is error and raised.value.status == 502


def test_pieces_come_as_they_are_sent():
    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(CHUNKED)
        for _ in range(3):
            await asyncio.wait_for(server.asked.acquire(), PATIENCE_S)
            writer.write(b"1\r\nx\r\n")
        writer.write(b"0\r\n\r\n")

    async def work(client, server):
        server.asked = asyncio.Semaphore(0)
        async with client.request("GET", server.url) as response:
            for _ in range(3):
                server.asked.release()
                assert await anext(response) == b"x", "each before the next is sent"
            assert [piece async for piece in response] == []

    run(work, script=script)


def send_letters(*steps):
    """A script whose answer goes on by one of the steps each time it is asked to; an empty one ends it."""

    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(CHUNKED)
        for letters in steps:
            await asyncio.wait_for(server.asked.acquire(), PATIENCE_S)
            writer.write(b"%x\r\n%b\r\n" % (len(letters), letters))
        await server.wait_left(reader)

    return script


def test_a_relay_gives_each_piece_when_it_comes_until_it_is_stopped():
    async def work(client, server):
        server.asked, taken = asyncio.Semaphore(0), []

        def receive(piece):
            assert asyncio.current_task() is None, "in the moment it comes, not in a step of the task that waits"
            taken.append(piece)
            server.asked.release()
            return piece != b"c"

        async def relay(response):
            reading = asyncio.create_task(response.relay(receive))
            await asyncio.sleep(0)
            server.asked.release()
            return await reading

        async with client.request("GET", server.url) as response:
            assert await relay(response) is True and taken == [b"a", b"b", b"c"]
            assert await response.read_piece() == b"d", "what comes behind waits for whoever asks"
            assert await relay(response) is False and taken == [b"a", b"b", b"c", b"e"], "the body has ended"

    run(work, script=send_letters(b"a", b"b", b"c", b"d", b"e", b""))


def test_a_relay_begins_with_what_has_come():
    async def work(client, server):
        taken = []
        async with client.request("GET", server.url) as response:
            await wait_until(lambda: response._connection._pieces)
            assert await response.relay(lambda piece: bool(taken.append(piece))) is True
        assert taken == [b"hello"]

    run(work, script=answering(HELLO))


def test_an_error_of_the_receiver_ends_its_relay_and_the_connection():
    async def work(client, server):
        server.asked = asyncio.Semaphore(0)

        def receive(piece):
            raise UpstreamError("not what was asked for")

        with pytest.raises(UpstreamError, match="asked for"):
            async with client.request("GET", server.url) as response:
                reading = asyncio.create_task(response.relay(receive))
                await asyncio.sleep(0)
                server.asked.release()
                await reading
        await server.left.wait()
        assert not client._idle

    run(work, script=send_letters(b"a"))


@pytest.mark.parametrize("how", ["silence", "cut", "nonsense", "cancel"])
def test_a_relay_ends_with_what_ends_reading(how):
    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(CHUNKED + b"1\r\na\r\n")
        await asyncio.wait_for(server.asked.acquire(), PATIENCE_S)
        if how == "nonsense":
            writer.write(b"no chunk\r\n")
        if how != "cut":
            await server.wait_left(reader)

    errors = {"silence": UpstreamTimeoutError, "cut": UpstreamLostError, "cancel": asyncio.CancelledError}

    async def work(client, server):
        server.asked = asyncio.Semaphore(0)
        idle_s = 0.05 if how == "silence" else PATIENCE_S
        with pytest.raises(errors.get(how, UpstreamError)):
            async with client.request("GET", server.url, budgets=HttpBudgets(idle_s=idle_s)) as response:
                assert await response.read_piece() == b"a"
                reading = asyncio.create_task(response.relay(lambda piece: True))
                await asyncio.sleep(0)
                server.asked.release()
                if how == "cancel":
                    reading.cancel()
                await reading
        await wait_until(lambda: not client._connections)

    run(work, script=script)


# The pool


def test_connections_are_kept():
    async def work(client, server):
        for _ in range(3):
            assert await fetch(client, server.url) == (200, b"hello")
        return server.connections

    assert run(work, script=answering(HELLO, HELLO, HELLO)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        HELLO + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_connections_that_cannot_be_kept(answer):
    async def work(client, server):
        for _ in range(2):
            assert await fetch(client, server.url) == (200, b"hello")
        return server.connections

    assert run(work, script=answering(answer, closes=False)) == 2


def test_a_stale_connection_is_replaced_once():
    async def script(server, reader, writer):
        await server.read_request(reader)
        if server.connections <= 2:
            writer.write(HELLO)
            await server.read_request(reader)  # and closes without a byte, as if it had just timed out

    async def work(client, server):
        assert await fetch(client, server.url, "POST", body=b"1") == (200, b"hello")
        assert await fetch(client, server.url, "POST", body=b"2") == (200, b"hello")
        with pytest.raises(UpstreamLostError):
            await fetch(client, server.url, "POST", body=b"3")
        return server.connections, [body for _, body in server.requests]

    connections, bodies = run(work, script=script)
    assert (connections, bodies[:3], bodies.count(b"3")) == (3, [b"1", b"2", b"2"], 2)


def test_an_answer_that_began_is_not_asked_for_twice():
    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(HELLO)
        await server.read_request(reader)
        writer.write(b"HTTP/1.1 2")

    async def work(client, server):
        await fetch(client, server.url)
        with pytest.raises(UpstreamLostError):
            await fetch(client, server.url)
        return server.connections

    assert run(work, script=script) == 1


def test_the_rest_of_an_answer_is_taken_in_the_background():
    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(CHUNKED + b"1\r\nx\r\n")
        await asyncio.wait_for(server.go_on.wait(), PATIENCE_S)
        writer.write(b"0\r\n\r\n")
        await server.read_request(reader)
        writer.write(HELLO)

    async def work(client, server):
        server.go_on = asyncio.Event()
        async with client.request("GET", server.url) as response:
            await anext(response)
            response.leave_rest()
            connection = response._connection
        assert connection.phase is ClientPhase.LINGERING and not client._idle
        server.go_on.set()
        await wait_until(lambda: connection.phase is ClientPhase.IDLE)
        assert await fetch(client, server.url) == (200, b"hello")
        return server.connections

    assert run(work, script=script) == 1


async def wait_until(condition):
    """Lets the loop run until `condition()`; the caller's own deadline ends it."""
    while not condition():  # noqa: ASYNC110 - there is nothing to be woken by
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("how", ["speaks unasked", "closes"])
def test_what_happens_to_a_connection_in_the_pool(how):
    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(HELLO)
        await asyncio.wait_for(server.go_on.wait(), PATIENCE_S)
        if how == "speaks unasked":
            writer.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            await server.wait_left(reader)

    async def work(client, server):
        server.go_on = asyncio.Event()
        await fetch(client, server.url)
        assert len(client._idle) == 1
        server.go_on.set()
        await wait_until(lambda: not client._idle and not client._connections)

    run(work, script=script)


def test_the_pool_is_bounded_and_empties_itself(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "POOL_LIMIT", 2)
    monkeypatch.setattr(dvai_bridge, "POOL_IDLE_S", 0.05)

    async def work(client, server):
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                response = await stack.enter_async_context(client.request("GET", server.url))
                await response.read(MIB)
        assert len(client._idle) <= 2
        await wait_until(lambda: not client._idle and not client._connections)

    run(work, script=answering(HELLO, closes=False))


def test_connections_are_bounded(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "CLIENT_CONNECTIONS_LIMIT", 1)

    async def work(client, server):
        async with client.request("GET", server.url):
            with pytest.raises(UpstreamConnectError):
                await fetch(client, server.url)

    run(work, script=answering(HELLO, closes=False))


# Time


async def never(server, reader, writer):
    await server.wait_left(reader)


async def stop_in_the_middle(server, reader, writer):
    await server.read_request(reader)
    writer.write(CHUNKED + b"5\r\nhello\r\n")
    await server.wait_left(reader)


@pytest.mark.parametrize(
    ("script", "budgets"),
    [
        (never, HttpBudgets(first_byte_s=0.05)),
        (never, HttpBudgets(total_s=0.05)),
        (stop_in_the_middle, HttpBudgets(idle_s=0.05)),
        (stop_in_the_middle, HttpBudgets(total_s=0.05)),
    ],
)
def test_a_budget_that_passes_closes_the_connection(script, budgets):
    async def work(client, server):
        with pytest.raises(UpstreamTimeoutError) as raised:
            await fetch(client, server.url, budgets=budgets)
        assert raised.value.status == 504
        await server.left.wait()

    run(work, script=script)


def test_the_total_can_be_changed_on_the_way():
    async def work(client, server):
        async with client.request("GET", server.url, budgets=HttpBudgets(total_s=60)) as response:
            assert await anext(response) == b"hello"
            response.end_within(0.05)
            with pytest.raises(UpstreamTimeoutError):
                await anext(response)

    run(work, script=stop_in_the_middle)


def test_nobody_there():
    async def work(client, server):
        server.server.close()
        await server.server.wait_closed()
        with pytest.raises(UpstreamConnectError) as raised:
            await fetch(client, server.url)
        assert raised.value.code == "upstream_unreachable" and "127.0.0.1" in raised.value.message
        with pytest.raises(UpstreamConnectError):
            await fetch(client, "http://no-such-name.invalid/")

    run(work, script=never)


def test_a_handshake_that_never_ends_is_no_connection():
    async def work(client, server):
        with pytest.raises(UpstreamConnectError):
            await fetch(client, server.url.replace("http:", "https:"), budgets=HttpBudgets(connect_s=0.1))

    run(work, script=never, client_tls=ssl.create_default_context())


def test_cancelling_closes_the_connection():
    async def work(client, server):
        for url in (server.url, server.url):
            server.left.clear()
            task = asyncio.create_task(fetch(client, url))
            await wait_until(lambda: client._connections)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.left.wait()
            assert not client._idle

    run(work, script=stop_in_the_middle)


def test_leaving_early_closes_the_connection():
    async def work(client, server):
        async with client.request("GET", server.url) as response:
            assert response.status == 200
        await server.left.wait()
        assert not client._idle

    run(work, script=stop_in_the_middle)


def test_closing_the_client_ends_what_waits():
    async def work(client, server):
        task = asyncio.create_task(fetch(client, server.url))
        await wait_until(lambda: client._connections)
        await client.close()
        with pytest.raises(UpstreamLostError):
            await task
        with pytest.raises(UpstreamConnectError):
            await fetch(client, server.url)

    run(work, script=never)


def test_a_slow_consumer_slows_the_server_down():
    size = 16 * MIB

    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // (64 * KIB)):
            writer.write(bytes(64 * KIB))
            await writer.drain()

    async def work(client, server):
        async with client.request("GET", server.url) as response:
            connection = response._connection
            await wait_until(lambda: not connection._is_reading)
            assert connection._held_bytes <= RESPONSE_BUFFER_LIMIT_BYTES + 512 * KIB
            read = 0
            async for piece in response:
                read += len(piece)
            assert read == size
        assert len(client._idle) == 1

    run(work, script=script)


# TLS and addresses


def build_server_tls():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE / "cert.pem", CERTIFICATE / "key.pem")
    return context


def test_certificates_are_verified():
    async def refused(client, server):
        with pytest.raises(UpstreamConnectError) as raised:
            await fetch(client, server.url)
        assert "TLS" in raised.value.message and "self" in raised.value.message

    async def accepted(client, server):
        for _ in range(2):
            assert await fetch(client, server.url) == (200, b"hello")
        return server.connections

    run(refused, script=answering(HELLO), tls=build_server_tls())
    trusting = ssl.create_default_context(cafile=CERTIFICATE / "cert.pem")
    assert run(accepted, script=answering(HELLO, HELLO), tls=build_server_tls(), client_tls=trusting) == 1


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "target"),
    [
        ("http://a", "a", 80, "a", "/"),
        ("https://A.Example:8/x/y?z=1", "a.example", 8, "a.example:8", "/x/y?z=1"),
        ("https://[::1]", "::1", 443, "[::1]", "/"),
        ("http://[fe80::1%eth0]:8/x", "fe80::1%eth0", 8, "[fe80::1]:8", "/x"),
        ("http://[fe80::1%25wlP1s0]:8/x", "fe80::1%wlP1s0", 8, "[fe80::1]:8", "/x"),
        ("http://[fe80::1%25]:8/x", "fe80::1%25", 8, "[fe80::1]:8", "/x"),
    ],
)
def test_urls(url, host, port, authority, target):
    parsed = parse_http_url(url)
    assert (parsed.host, parsed.port, parsed.authority, parsed.target) == (host, port, authority, target)
    assert parsed.is_tls == url.startswith("https")


@pytest.mark.parametrize(
    "url",
    [
        "", "a", "/x", "ftp://a/", "http://", "http:///x", "http://u@a/", "http://u:p@a/", "http://a:99999/",
        "http://a:x/", "http://a/#f", "http://a/b c", "http://a/\r\nX: 1", "http://a/é", "http://a b/", "file:///etc/x",
    ],
)  # fmt: skip
def test_urls_that_are_refused(url):
    with pytest.raises(ValueError):
        parse_http_url(url)


def test_headers_cannot_break_out():
    async def work():
        client = HttpClient()
        for headers in ([("X", "a\r\nY: b")], [("X:", "a")], [("", "a")]):
            with pytest.raises(ValueError):
                client.request("GET", "http://a/", headers=headers)
        with pytest.raises(ValueError):
            client.request("GET /x HTTP/1.1\r\nX:", "http://a/")

    asyncio.run(work())


def test_why_there_is_no_connection_is_said_in_the_systems_words():
    refused = OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)")
    assert explain_connect_error(refused) == os.strerror(errno.ECONNREFUSED)
    assert explain_connect_error(socket.gaierror(socket.EAI_NONAME, "no such name")) == "no such name"
    several = OSError("Multiple exceptions: [Errno 111] Connect call failed ('::1', 1, 0, 0), [Errno 111] and so on")
    assert explain_connect_error(several) == "none of its addresses takes a connection"
