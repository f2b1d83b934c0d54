"""Sections Tunnel and Tunnel server: requests inside the secure channel, between two ends on real sockets."""

import asyncio
import contextlib
import json

import pytest
from support_tunnel import NOW_MS, KeyConsumer, make_link, make_pairing, run_pair, run_provider, until

import dvai_bridge as d


def run(test):
    """Runs a coroutine function to its end, in a loop of its own."""
    return asyncio.run(asyncio.wait_for(test(), 180))


async def echo(request):
    return d.HttpResponse(headers=(("Content-Type", "application/json"), ("X-Secret", "no")), body=request.body)


class Source:
    """A streamed answer whose pieces the test gives; knows whether it was closed."""

    def __init__(self, *pieces):
        self.queue = asyncio.Queue()
        for piece in pieces:
            self.queue.put_nowait(piece)
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await self.queue.get()
        if piece is None:
            raise StopAsyncIteration
        if isinstance(piece, Exception):
            raise piece
        return piece

    async def aclose(self):
        self.is_closed = True


def test_a_request_and_its_answer(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            fields = [("Content-Type", "application/json"), ("Authorization", "Bearer x"), ("X-Request-Id", "r1")]
            async with consumer.ask(provider, headers=fields, body=b'{"a":1}') as response:
                assert response.status == 200 and response.headers.get("content-type") == "application/json"
                assert response.headers.get("x-secret", "") == "" and response.headers.get("x-request-id") == "r1"
                assert await response.read(1000) == b'{"a":1}'
            (request,) = provider.requests
            assert request.caller is d.Caller.PAIRED and request.pairing == provider.pairing
            assert request.headers.get("authorization", "") == "" and request.headers.get("x-dvai-forwarded") == "1"
            assert consumer.client.find_tunnel(consumer.pairing)
            assert provider.pairing.inbound_link == make_link(is_pending=False), "its first use makes it active"
            assert consumer.pairing.outbound_link == make_link(is_pending=False)

    run(test)


@pytest.mark.parametrize("size", [0, 1, 16_378, 300_000, 3_000_000])
def test_bodies_of_every_size_both_ways(tmp_path, size):
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)

    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider), consumer.ask(provider, body=body) as response:
            assert await response.read(size + 1) == body

    run(test)


def test_many_at_once_share_one_connection(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):

            async def ask(number):
                async with consumer.ask(provider, body=b"%d" % number) as response:
                    return int(await response.read(100))

            assert await asyncio.gather(*map(ask, range(80))) == list(range(80)), "more than may be open: some wait"
            assert provider.server.connection_count == 1

    run(test)


def test_a_stalled_stream_does_not_hold_up_others(tmp_path):
    async def answer(request):
        return d.HttpResponse(body=bytes(2_000_000)) if request.body == b"big" else await echo(request)

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider), consumer.ask(provider, body=b"big") as stalled:
            for number in range(20):
                async with consumer.ask(provider, body=b"%d" % number) as response:
                    assert await response.read(100) == b"%d" % number
            assert len(await stalled.read(3_000_000)) == 2_000_000

    run(test)


def test_a_stream_comes_as_it_is_made(tmp_path):
    source = None

    async def answer(request):
        nonlocal source
        source = Source()
        return d.HttpResponse(headers=(("Content-Type", "text/event-stream"),), body=source)

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider), consumer.ask(provider) as response:
            for piece in (b"data: 1\n\n", b"data: 2\n\n"):
                source.queue.put_nowait(piece)
                assert await response.read_piece() == piece
            source.queue.put_nowait(None)
            assert await response.read_piece() == b""
        assert source.is_closed

    run(test)


def test_who_leaves_ends_the_work(tmp_path):
    source = Source(b"first")

    async def answer(request):
        return d.HttpResponse(body=source)

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider):
            async with consumer.ask(provider) as response:
                assert await response.read_piece() == b"first"
            await until(lambda: source.is_closed)
            assert consumer.client.find_tunnel(consumer.pairing), "the tunnel goes on"

    run(test)


def test_who_leaves_before_the_answer_ends_the_work(tmp_path):
    ended = asyncio.Event()

    async def answer(request):
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider):
            task = asyncio.create_task(consumer.ask(provider).open())
            await until(lambda: provider.requests)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await ended.wait()

    run(test)


def test_what_was_said_before_a_failure_arrives_and_the_failure_too(tmp_path):
    async def answer(request):
        return d.HttpResponse(body=Source(b"data: 1\n\n", b"data: error\n\n", d.PeerError("it failed")))

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider), consumer.ask(provider) as response:
            said = b""
            with pytest.raises(d.UpstreamError):
                while True:
                    said += await response.read_piece()
            assert said == b"data: 1\n\ndata: error\n\n"

    run(test)


@pytest.mark.parametrize("error", [d.OverloadedError("full", retry_after_s=7), ValueError("a bug")])
def test_errors_are_answers(tmp_path, error):
    async def answer(request):
        raise error

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider), consumer.ask(provider) as response:
            status = getattr(error, "status", 500)
            assert response.status == status
            assert response.headers.get("retry-after", "") == ("7" if status == 429 else "")
            assert json.loads(await response.read(1000))["error"]["message"]

    run(test)


def test_only_its_routes(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, "GET", "/v1/models/a%2Fb") as response:
                assert response.status == 200
            for method, path in [
                ("POST", "/v1/dvai/handshake"),
                ("GET", "/v1/dvai/pairings"),
                ("DELETE", "/v1/models"),
            ]:
                with pytest.raises(ValueError, match="does not travel"):
                    await consumer.ask(provider, method, path).open()

    run(test)


def test_a_restarted_provider_is_found_again(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            await provider.server.stop(0)
            with pytest.raises(d.UpstreamConnectError):
                await consumer.ask(provider, body=b"2").open()
            async with provider.run(), consumer.ask(provider, body=b"3") as response:
                assert await response.read(10) == b"3"

    run(test)


def test_a_connection_that_died_unnoticed_is_dialled_again(tmp_path):
    """As after sleep: the request on the dead connection is sent again on a new one."""

    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            for connection in list(provider.server._connections):
                connection.abort()
            async with consumer.ask(provider, body=b"2") as response:
                assert await response.read(10) == b"2"

    run(test)


def test_a_provider_that_has_vanished_is_given_up(tmp_path):
    """Nothing comes, not even a PONG: after the time that the caller allows, the connection is not used again."""

    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            (connection,) = provider.server._connections
            connection._websocket._transport.pause_reading()
            budgets = d.HttpBudgets(total_s=0.2)
            with pytest.raises(d.UpstreamTimeoutError):
                await consumer.ask(provider, body=b"2", budgets=budgets).open()
            async with consumer.ask(provider, body=b"3") as response:
                assert await response.read(10) == b"3"

    run(test)


def test_a_request_to_a_provider_that_has_vanished_finds_it_again(tmp_path, monkeypatch):
    """Long before it has waited as long as it may."""
    monkeypatch.setattr(d, "TUNNEL_DOUBT_S", 0.1)
    monkeypatch.setattr(d, "TUNNEL_PROOF_S", 0.1)

    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            (connection,) = provider.server._connections
            connection._websocket._transport.pause_reading()
            async with consumer.ask(provider, body=b"2", budgets=d.HttpBudgets(first_byte_s=600)) as response:
                assert await response.read(10) == b"2"
            assert [request.body for request in provider.requests] == [b"1", b"2"]

    run(test)


def test_a_provider_that_is_only_slow_keeps_what_it_works_on(tmp_path):
    """One who waits in vain doubts the connection; the provider's sign of life saves what others wait for."""
    go_on = asyncio.Event()

    async def answer(request):
        await go_on.wait()
        return await echo(request)

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider):
            waiting = asyncio.create_task(consumer.ask(provider, body=b"1").open())
            await until(lambda: provider.requests)
            with pytest.raises(d.UpstreamTimeoutError):
                await consumer.ask(provider, body=b"2", budgets=d.HttpBudgets(total_s=0.1)).open()
            another = asyncio.create_task(consumer.ask(provider, body=b"3").open())
            await until(lambda: len(provider.requests) == 3)
            go_on.set()
            for task, body in ((waiting, b"1"), (another, b"3")):
                assert await (await task).read(10) == body
            assert [request.body for request in provider.requests] == [b"1", b"2", b"3"], "none was asked again"

    run(test)


def test_a_provider_at_another_address_is_dialled_there(tmp_path):
    """What is left of the old connection does not hold up the new one."""

    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            (connection,) = provider.server._connections
            connection._websocket._transport.pause_reading()
            old, provider.port = provider.server, 0
            async with provider.run():
                async with consumer.ask(provider, body=b"2") as response:
                    assert await response.read(10) == b"2"
                assert consumer.client.find_tunnel(consumer.pairing).port == provider.port
                assert old.connection_count == 1, "it is asked for a sign of life yet"
            await old.stop(0)

    run(test)


def test_a_wrong_address_leaves_a_good_connection_alone(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            right, provider.port = provider.port, 1
            async with consumer.ask(provider, body=b"2") as response:
                assert await response.read(10) == b"2"
            provider.port = right
            assert consumer.client.find_tunnel(consumer.pairing).port == right

    run(test)


def test_a_dial_that_nobody_waits_for_any_more_fails_unheard(tmp_path, caplog):
    async def test():
        silence = await asyncio.start_server(lambda *streams: None, "127.0.0.1", 0)
        async with run_pair(tmp_path, echo) as (consumer, provider), silence:
            provider.port = silence.sockets[0].getsockname()[1]
            asking = asyncio.create_task(consumer.ask(provider).open())
            await until(lambda: consumer.client._tunnels)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        assert not caplog.records

    run(test)


def test_revocation_ends_what_runs(tmp_path):
    source = Source(b"first")

    async def answer(request):
        return d.HttpResponse(body=source)

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider):
            async with consumer.ask(provider) as response:
                assert await response.read_piece() == b"first"
                await provider.store.revoke(provider.pairing.pairing_id)
                with pytest.raises(d.PairingEndedError):
                    await response.read_piece()
            await until(lambda: source.is_closed)
            assert consumer.pairing.is_marked_unauthorized, "it was told so by the provider itself"
            with pytest.raises(d.UpstreamConnectError, match="pair request"):
                await consumer.ask(provider).open()

    run(test)


def test_the_consumer_ends_it_by_revoking_too(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            pairing = consumer.pairing
            await consumer.store.revoke(pairing.pairing_id)
            await until(lambda: not provider.server.connection_count)
            with pytest.raises(d.PairingEndedError):
                await consumer.client.request(pairing, "POST", provider.url).open()
            await consumer.store.add(pairing)
            async with consumer.ask(provider, body=b"2") as response:
                assert await response.read(10) == b"2", "it is paired anew"

    run(test)


def test_a_pairing_made_anew_ends_the_old_tunnel_and_is_not_marked_for_it(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            async with consumer.ask(provider, body=b"1") as response:
                await response.read(10)
            link = d.replace(make_link(), pair_id=b"q" * 16)
            anew = {"key": "L" * 42 + "A", "paired_at_ms": NOW_MS + 1}
            await consumer.store.add(make_pairing(provider.identity, is_inbound=False, outbound_link=link, **anew))
            await provider.store.add(make_pairing(consumer.identity, is_inbound=True, inbound_link=link, **anew))
            async with consumer.ask(provider, body=b"2") as response:
                assert await response.read(10) == b"2"
            await until(lambda: provider.server.connection_count == 1)
            assert not consumer.pairing.is_marked_unauthorized

    run(test)


@pytest.mark.parametrize(
    "change",
    [
        {"inbound_link": None},
        {"identity_key": d.encode_base64url(d.compute_x25519_public(b"x" * 32))},
        {"device_id": "somebody else", "app_id": "consumer-device"},
        {"last_used_at_ms": NOW_MS - 40 * 86_400_000},
    ],
    ids=["unknown", "another key", "another device", "expired"],
)
def test_unknown_wrong_and_expired_are_alike(tmp_path, change):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            known = provider.pairing
            await provider.store.revoke(known.pairing_id)
            await provider.store.add(make_pairing(consumer.identity, is_inbound=True, **change))
            with pytest.raises(d.UpstreamConnectError, match="did not open the tunnel"):
                await consumer.ask(provider).open()
            assert not provider.requests

    run(test)


def test_a_lapsed_pending_pairing_is_unknown(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            provider.now_ms += 601_000
            with pytest.raises(d.UpstreamConnectError):
                await consumer.ask(provider).open()

    run(test)


def test_stopping_lets_answers_finish(tmp_path):
    source = Source(b"first")

    async def answer(request):
        return d.HttpResponse(body=source)

    async def test():
        async with run_pair(tmp_path, answer) as (consumer, provider):
            async with consumer.ask(provider) as response:
                assert await response.read_piece() == b"first"
                stopping = asyncio.create_task(provider.server.stop(20))
                await until(lambda: not consumer.client.find_tunnel(consumer.pairing))
                with pytest.raises(d.UpstreamConnectError):
                    await consumer.ask(provider).open()
                source.queue.put_nowait(b"last")
                source.queue.put_nowait(None)
                assert await response.read(100) == b"last"
            await stopping

    run(test)


def test_old_connections_of_one_device_make_room(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider), contextlib.AsyncExitStack() as stack:
            for number in range(d.TUNNELS_PER_DEVICE_LIMIT + 3):
                client = d.PeerClient(
                    consumer.http,
                    identity=consumer.identity,
                    store=consumer.store,
                    app_id=None,
                    clock_ms=consumer.read_clock,
                )
                stack.push_async_callback(client.close)
                async with client.request(consumer.pairing, "POST", provider.url, body=b"%d" % number) as response:
                    assert await response.read(10) == b"%d" % number
            await until(lambda: provider.server.connection_count <= d.TUNNELS_PER_DEVICE_LIMIT)

    run(test)


def test_a_body_that_is_too_large_is_an_answer(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            body = bytes(d.FOREIGN_BODY_LIMIT_BYTES + 1)
            async with consumer.ask(provider, body=body) as response:
                assert response.status == 413
            assert not provider.requests

    run(test)


def test_a_request_is_to_the_service_what_a_signed_one_is(tmp_path):
    """Quotas, tenants, interceptors and the audit know a caller by these; how it came is no difference."""

    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            fields = [("Content-Type", "application/json"), ("X-DVAI-Forwarded", "1"), ("X-Request-Id", "r1")]
            accept, provider.server.identify = provider.server.handler, lambda request: provider.pairing

            async def choose(request):
                return await (accept if request.path == "/v1/dvai/tunnel" else provider.handle)(request)

            provider.server.handler = choose
            for link in ({}, {"outbound_link": None}):
                pairing = d.replace(consumer.pairing, **link)
                asked = consumer.client.request(pairing, "POST", provider.url, headers=fields, body=b'{"a":1}')
                async with asked as response:
                    assert response.status == 200
            inside, signed = provider.requests
            for name in ("method", "path", "raw_path", "query", "body", "caller", "client_address", "request_id"):
                assert getattr(inside, name) == getattr(signed, name), name
            assert inside.pairing.key == signed.pairing.key and d.name_guest(inside) == d.name_guest(signed) != ""
            assert d.build_tenant(inside) == d.build_tenant(signed)
            contexts = [d.build_interceptor_context(each, "m") for each in (inside, signed)]
            assert contexts[0] == contexts[1]
            assert inside.parse_body() == signed.parse_body()
            for name in ("x-dvai-forwarded", "content-type"):
                assert inside.headers.get(name, "") == signed.headers.get(name, "") != ""

    run(test)


def test_a_peer_without_a_link_is_asked_by_signed_http(tmp_path):
    async def test():
        async with run_pair(tmp_path, echo) as (consumer, provider):
            seen = []

            async def note(request):
                seen.append(request)
                return d.HttpResponse()

            provider.server.handler = note
            provider.server.identify = lambda request: provider.pairing
            pairing = make_pairing(provider.identity, is_inbound=False, outbound_link=None)
            fields = [("Content-Type", "application/json")]
            async with consumer.client.request(pairing, "POST", provider.url, headers=fields, body=b"{}") as response:
                assert response.status == 200
            async with consumer.client.request(None, "GET", provider.url) as response:
                assert response.status == 200
            assert [d.parse_signature_headers(each.headers) is not None for each in seen] == [True, False]
            assert consumer.client.find_tunnel(pairing) is None

    run(test)


# Known by a public key


def test_an_admitted_consumer_is_known_by_its_key(tmp_path):
    async def test():
        consumer = KeyConsumer()
        async with run_provider(tmp_path, echo, consumer) as provider:
            for _ in range(2):
                async with consumer.ask(provider, body=b"hello") as response:
                    assert response.status == 200 and await response.read(10) == b"hello"
            for request in provider.requests:
                key = d.encode_base64url(consumer.public_key)
                assert (request.caller, request.pairing, request.consumer_key) == (d.Caller.PAIRED, None, key)
                assert (request.device_id, request.app_id, request.other_device) == (key, None, f"key {key}")
            assert provider.tunnels.list_consumers() == [consumer.public_key]
            assert provider.server.connection_count == 1  # the second one found the tunnel there

    run(test)


def test_who_is_not_admitted_learns_it_from_the_provider_and_asks_nothing(tmp_path):
    async def test():
        stranger = KeyConsumer("stranger")
        async with run_provider(tmp_path, echo, KeyConsumer()) as provider:
            with pytest.raises(d.NotAdmittedError):
                await stranger.ask(provider).open()
            assert stranger.refused == [provider.public_key] and provider.requests == []
            await provider.firewall.save(d.Firewall(public_keys=frozenset([stranger.public_key])))
            async with stranger.ask(provider) as response:
                assert response.status == 200
            await stranger.client.close()

    run(test)


@pytest.mark.parametrize("case", ["another key", "no provider", "a provider no more"])
def test_who_is_no_such_provider_closes_without_a_word(tmp_path, case):
    async def test():
        consumer = KeyConsumer()
        async with run_provider(tmp_path, echo, consumer) as provider:
            other = KeyConsumer("other").public_key if case == "another key" else None
            if case != "another key":
                provider.tunnels.withdraw()
            with pytest.raises(d.UpstreamConnectError, match="no provider with this public key") as caught:
                await consumer.ask(provider, other).open()
            assert not isinstance(caught.value, d.NotAdmittedError)
            assert provider.requests == [] and consumer.refused == []

    run(test)


def test_a_firewall_that_changes_ends_what_runs(tmp_path):
    async def test():
        source, consumer, other = Source(b"first"), KeyConsumer(), KeyConsumer("other")
        streaming = d.HttpResponse(headers=d.SSE_HEADERS, body=source)

        async def answer(request):
            return streaming if request.body == b"stream" else await echo(request)

        async with run_provider(tmp_path, answer, consumer, other) as provider:
            async with consumer.ask(provider, body=b"stream") as response, other.ask(provider) as bystander:
                assert await response.read_piece() == b"first"
                await provider.firewall.save(d.Firewall(public_keys=frozenset([other.public_key])))
                with pytest.raises(d.NotAdmittedError):
                    while await response.read_piece():
                        pass
                assert await bystander.read(10) == b"{}"
            await until(lambda: source.is_closed)
            assert provider.tunnels.list_consumers() == [other.public_key]

    run(test)


def test_a_provider_that_stops_finishes_what_runs(tmp_path):
    async def test():
        source, consumer = Source(b"first"), KeyConsumer()

        async def stream(request):
            return d.HttpResponse(headers=d.SSE_HEADERS, body=source)

        async with run_provider(tmp_path, stream, consumer) as provider, consumer.ask(provider) as response:
            assert await response.read_piece() == b"first"
            provider.tunnels.withdraw()
            source.queue.put_nowait(b"last")
            source.queue.put_nowait(None)
            assert await response.read_piece() == b"last" and await response.read_piece() == b""

    run(test)


def test_a_new_connection_when_it_is_wanted(tmp_path):
    async def test():
        consumer = KeyConsumer()
        async with run_provider(tmp_path, echo, consumer) as provider:
            proofs, note = [], provider.tunnels.note_established
            provider.tunnels.note_established = lambda served, proof: proofs.append(proof) or note(served, proof)
            for is_fresh in (False, False, True):
                if is_fresh:
                    consumer.client.renew(provider.public_key)
                async with consumer.ask(provider) as response:
                    assert await response.read(10) == b"{}"
            assert len(proofs) == 2 and len({proof.handshake_hash for proof in proofs}) == 2

    run(test)
