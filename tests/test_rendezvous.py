"""What a client and a relay say, who stays in touch, and tunnels through relays that are honest or not."""

import asyncio
import contextlib
import json
from dataclasses import replace

import pytest
from support import find_free_port
from support_relay import start_relay
from support_rendezvous import DEADLINE_S, UNLIMITED, Middle, keep, read_frame, replace_frame
from support_tunnel import Consumer, Provider, make_pairing, until

import dvai_bridge as d

ROOM = b"r" * 16
PLACE = d.RelayPlace(d.RelayPlaceKind.ROOM, ROOM)
NAMED = d.encode_base64url(ROOM)
PROVIDER = d.build_key_pair(b"p" * 32, d.OwnBackend())
ADDRESS = d.build_provider_place(PROVIDER.public)


def say(kind, **members):
    return json.dumps({"type": kind, **members})


# -- messages --


def test_what_is_said():
    protocol = d.RelayProtocol(is_binary=False)
    introduction = {"deviceId": "a", "deviceName": "A", "capability": {}, "ephemeralPubKey": "k"}
    built = [
        protocol.build_pair_source(introduction),
        protocol.build_pair_target("s", introduction),
        protocol.build_listen(PLACE),
        protocol.build_dial(PLACE),
        protocol.build_claim(PROVIDER.public),
        protocol.build_proof(b"m" * 32),
        protocol.build_dial(ADDRESS),
        protocol.build_ping(),
        protocol.build_hangup("s", "closed"),
        protocol.build_frame("s", b"\x10frame"),
    ]
    assert [json.loads(message) for message in built] == [
        {"type": "pair-source", **introduction},
        {"type": "pair-target", "sessionId": "s", **introduction},
        {"type": "listen", "v": 1, "room": NAMED},
        {"type": "dial", "v": 1, "room": NAMED},
        {"type": "listen", "v": 1, "publicKey": d.encode_base64url(PROVIDER.public)},
        {"type": "proof", "mac": d.encode_base64url(b"m" * 32)},
        {"type": "dial", "v": 1, "provider": d.encode_base64url(ADDRESS.key)},
        {"type": "ping"},
        {"type": "hangup", "sessionId": "s", "reason": "closed"},
        {"type": "relay", "sessionId": "s", "payload": d.encode_base64url(b"\x10frame")},
    ]


def test_what_is_heard():
    protocol = d.RelayProtocol(is_binary=False)
    heard = [
        (say("pong"), None),
        (say("listening", room=NAMED), d.RelayListening(PLACE)),
        (say("unlistened", room=NAMED), d.RelayUnlistened(PLACE)),
        (
            say("challenge", ephemeralPubKey=d.encode_base64url(PROVIDER.public), nonce=d.encode_base64url(b"n" * 32)),
            d.RelayChallenge(PROVIDER.public, b"n" * 32),
        ),
        (say("listening", provider=d.encode_base64url(ADDRESS.key)), d.RelayListening(ADDRESS)),
        (say("dialed", sessionId="v", provider=d.encode_base64url(ADDRESS.key)), d.RelayDialed("v", ADDRESS)),
        (say("dialed", sessionId="s", room=NAMED), d.RelayDialed("s", PLACE)),
        (say("incoming", sessionId="t", room=NAMED), d.RelayIncoming("t", PLACE)),
        (say("relay", sessionId="s", **{"from": "target"}, payload="EGY"), d.RelayFrame("s", b"\x10f")),
        (say("relay", sessionId="u", payload="EGY"), None),
        (say("hangup", sessionId="s", reason="gone"), d.RelayEnded("s", "gone")),
        (say("relay", sessionId="s", payload="EGY"), None),
        (say("hangup", sessionId="s", reason="gone"), None),
        (say("error", code="not_listening", message="no", room=NAMED), d.RelayRefused("not_listening", "no", PLACE)),
        (say("error", code="x", sessionId="t"), d.RelayRefused("x", "", None, "t")),
    ]
    assert [protocol.receive(message) for message, _ in heard] == [event for _, event in heard]


def test_a_pairing_session_as_existing_relays_have_it():
    protocol = d.RelayProtocol(is_binary=False)
    created = protocol.receive(say("session-created", sessionId="s", qrPayload="p", expiresAt=5))
    assert created == d.RelayCreated("s", "p", 5)
    connected = protocol.receive(say("peer-connected", peerEphemeralPubKey="AAAA", peerDeviceId="x"))
    assert connected == d.RelayPeerConnected("s", bytes(3))
    assert protocol.receive(say("relay", payload="EGY", **{"from": "target"})) == d.RelayFrame("s", b"\x10f")
    assert protocol.receive(say("peer-disconnected", reason="peer closed")) == d.RelayEnded("s", "peer closed")


def test_binary_frames_go_by_tag():
    protocol = d.RelayProtocol(is_binary=True)
    assert protocol.receive(say("dialed", sessionId="s", room=NAMED, tag=7)) == d.RelayDialed("s", PLACE)
    assert protocol.build_frame("s", b"\x10f") == b"\0\0\0\7\x10f"
    assert protocol.receive(b"\0\0\0\7\x10g") == d.RelayFrame("s", b"\x10g")
    assert protocol.receive(b"\0\0\0\x08\x10g") is None
    protocol.forget("s")
    assert protocol.receive(b"\0\0\0\7\x10g") is None


@pytest.mark.parametrize(
    "message",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '"x"',
        say(5),
        say("something new"),
        say("listening"),
        say("listening", room="AAAA"),
        say("listening"),
        say("listening", room=NAMED, provider=NAMED),
        say("challenge", ephemeralPubKey=d.encode_base64url(bytes(32)), nonce=d.encode_base64url(b"n" * 32)),
        say("challenge", ephemeralPubKey=d.encode_base64url(PROVIDER.public), nonce="bm9uY2U"),
        say("challenge", nonce=d.encode_base64url(b"n" * 32)),
        say("dialed", room=NAMED),
        say("dialed", sessionId="", room=NAMED),
        say("dialed", sessionId="known", room=NAMED),
        say("incoming", sessionId=5, room=NAMED),
        say("relay", sessionId="known", payload="!"),
        say("relay", sessionId="known"),
        say("hangup", sessionId="known", reason=5),
        say("error"),
        say("session-created", sessionId="s", qrPayload="p", expiresAt="soon"),
        say("peer-connected", peerEphemeralPubKey="AAAA"),
        b"",
        b"\0\0\0\1x",
    ],
)
def test_what_no_relay_says_ends_the_connection(message):
    protocol = d.RelayProtocol(is_binary=False)
    protocol.receive(say("dialed", sessionId="known", room=NAMED))
    with pytest.raises(d.RelayError):
        protocol.receive(message)


@pytest.mark.parametrize("tag", [None, -1, 2**32, "1", True, 3])
def test_a_tag_is_one_of_its_own(tag):
    protocol = d.RelayProtocol(is_binary=True)
    protocol.receive(say("dialed", sessionId="known", room=NAMED, tag=3))
    with pytest.raises(d.RelayError):
        protocol.receive(say("incoming", sessionId="new", room=NAMED, tag=tag))


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("wss://relay.example.org", "wss://relay.example.org"),
        ("https://Relay.example.org:8443/", "wss://relay.example.org:8443"),
        ("ws://127.0.0.1:8080/pair", "ws://127.0.0.1:8080"),
        ("wss://example.org/relay/pair/?token=x", "wss://example.org/relay?token=x"),
        ("http://[::1]:80", "ws://[::1]:80"),
    ],
)
def test_a_relays_url_has_one_form(text, url):
    assert d.parse_relay_url(text) == d.parse_relay_url(url) == url


@pytest.mark.parametrize(
    "text", ["", "x", "ftp://x", "wss://", "wss://u@x", "wss://x#f", "wss://x y", "wss://x:99999", "wss://ä"]
)
def test_what_is_no_relays_url(text):
    with pytest.raises(ValueError):
        d.parse_relay_url(text)


# -- at a real relay --


@pytest.fixture(scope="module")
def relay():
    with start_relay(**UNLIMITED) as running:
        yield running


def make_client(url, served, reached):
    async def serve(session):
        served.append(session)
        while (frame := await session.receive()) is not None:
            await session.send_binary(frame[::-1])

    return d.RelayClient(url, serve=serve, on_connected=lambda: reached.append(1), jitter=lambda: 0.0)


@contextlib.asynccontextmanager
async def run_clients(url):
    """A provider that listens in ROOM and turns every frame round, and a consumer."""
    served, reached = [], []
    provider, consumer = make_client(url, served, reached), make_client(url, [], reached)
    try:
        await provider.listen(frozenset([PLACE]))
        await until(lambda: len(reached) == 2, DEADLINE_S)
        yield provider, consumer, served, reached
    finally:
        await provider.close()
        await consumer.close()


async def dial(consumer):
    """A session, as soon as the provider listens (again)."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await consumer.dial(PLACE, 5.0)
            except d.UpstreamConnectError:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("ws://Relay.Example.org", "relay.example.org:80"),
        ("wss://relay.example.org", "relay.example.org:443"),
        ("wss://relay.example.org:8443/path?token=x", "relay.example.org:8443"),
        ("ws://[2001:DB8::1]:80", "[2001:db8::1]:80"),
    ],
)
def test_a_relay_has_one_name(url, name):
    assert d.build_relay_name(url) == name


@contextlib.contextmanager
def start_named_relay():
    """A real relay that knows by which URL clients reach it."""
    port = find_free_port()
    with start_relay(port=port, RENDEZVOUS_URL=f"ws://127.0.0.1:{port}", **UNLIMITED) as relay:
        yield relay


def test_a_provider_proves_its_key_and_is_dialled_by_it():
    async def run(url):
        served, reached = [], []
        provider, consumer = make_client(url, served, reached), make_client(url, [], reached)
        try:
            await provider.listen(frozenset([PLACE]), PROVIDER)
            async with asyncio.timeout(DEADLINE_S):
                while not served:
                    with contextlib.suppress(d.UpstreamConnectError):
                        session = await consumer.dial(ADDRESS, 5.0)
            await session.send_binary(b"\x10ab")
            assert await session.receive() == b"ba\x10"
            await provider.listen(frozenset([PLACE]))  # a provider no more, though the relay does not know
            refused = await consumer.dial(ADDRESS, 5.0)
            assert await refused.receive() is None
        finally:
            await provider.close()
            await consumer.close()

    with start_named_relay() as relay:
        asyncio.run(asyncio.wait_for(run(f"ws://127.0.0.1:{relay.port}"), DEADLINE_S))


@pytest.mark.parametrize(("relay_name", "code"), [("ws://other.example.org", "proof_failed"), ("", "relay_name_unset")])
def test_a_proof_is_for_one_relay(relay_name, code, caplog):
    async def run(url):
        client = make_client(url, [], [])
        try:
            await client.listen(frozenset(), PROVIDER)
            await until(lambda: "RENDEZVOUS_URL" in caplog.text, DEADLINE_S)
            assert d.describe_refusal(code, "") in caplog.text
        finally:
            await client.close()

    with start_relay(RENDEZVOUS_URL=relay_name, **UNLIMITED) as relay:
        asyncio.run(asyncio.wait_for(run(f"ws://127.0.0.1:{relay.port}"), DEADLINE_S))


def test_no_challenge_is_answered_that_was_not_asked_for(relay):
    def repeat_challenge(message, middle, number):
        return [message] * (3 if "challenge" in str(message) else 1)

    async def run():
        async with Middle(relay.port, to_device=repeat_challenge).run() as middle:
            client = make_client(middle.url, [], [])
            try:
                await client.listen(frozenset(), PROVIDER)
                await until(lambda: b'"proof"' in middle.content, DEADLINE_S)
                await client.listen(frozenset([PLACE]), PROVIDER)
                await until(lambda: b'"listening"' in middle.content, DEADLINE_S)  # and all that came before it
                assert middle.content.count(b'"proof"') == 1
            finally:
                await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


@pytest.mark.parametrize("subprotocols", [(d.RELAY_SUBPROTOCOL,), ()], ids=["binary", "json"])
def test_sessions_carry_frames_both_ways_until_one_hangs_up(relay, subprotocols):
    async def run():
        async with (
            Middle(relay.port, subprotocols=subprotocols).run() as middle,
            run_clients(middle.url) as (_, consumer, served, _),
        ):
            first, second = await dial(consumer), await dial(consumer)
            for session, frame in ((first, b"\x10ab"), (second, b"\x10cd"), (first, bytes(20_000) + b"e")):
                await session.send_binary(frame)
                assert await session.receive() == frame[::-1]
            await first.close()
            await until(lambda: served[0].end_reason is not None, DEADLINE_S)
            assert await first.receive() is None
            with pytest.raises(ConnectionError):
                await first.send_binary(b"x")
            await second.send_binary(b"\x10f")
            assert await second.receive() == b"f\x10"

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_who_is_not_there_is_named(relay):
    async def run():
        client = make_client(f"ws://127.0.0.1:{relay.port}", [], [])
        try:
            with pytest.raises(d.UpstreamConnectError, match="other device is not connected to the relay"):
                await client.dial(PLACE, DEADLINE_S)
        finally:
            await client.close()
        client = make_client("ws://127.0.0.1:1", [], [])
        try:
            with pytest.raises(d.UpstreamConnectError, match=r"127\.0\.0\.1:1 cannot be reached: cannot connect"):
                await client.dial(PLACE, DEADLINE_S)
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_relay_that_comes_back_finds_everybody_again():
    async def run(first, later):
        port = find_free_port()
        relay = first.enter_context(start_relay(port=port, **UNLIMITED))
        async with run_clients(f"ws://127.0.0.1:{port}") as (_, consumer, _, reached):
            session = await dial(consumer)
            relay.process.kill()
            await asyncio.to_thread(first.close)
            assert await session.receive() is None and session.end_reason
            await asyncio.to_thread(later.enter_context, start_relay(port=port, **UNLIMITED))
            await until(lambda: len(reached) >= 4, DEADLINE_S)
            session = await dial(consumer)
            await session.send_binary(b"\x10a")
            assert await session.receive() == b"a\x10"

    with contextlib.ExitStack() as first, contextlib.ExitStack() as later:
        asyncio.run(asyncio.wait_for(run(first, later), DEADLINE_S))


def test_what_a_captive_portal_answers_is_named():
    async def portal(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(portal, "127.0.0.1", 0)
        client = make_client(f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}", [], [])
        try:
            with pytest.raises(d.UpstreamConnectError, match="captive portal"):
                await client.dial(PLACE, DEADLINE_S)
        finally:
            await client.close()
            server.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_relay_of_another_kind_is_named(relay):
    def refuse(message, middle, number):
        refusal = say("error", code="unknown_message_type", message="unknown type: dial")
        return [refusal] if '"not_listening"' in str(message) else [message]

    async def run():
        async with Middle(relay.port, to_device=refuse).run() as middle:
            client = make_client(middle.url, [], [])
            try:
                with pytest.raises(d.UpstreamConnectError, match="did not answer in time"):
                    await client.dial(PLACE, 1.0)
                assert "of another kind" in d.describe_refusal("unknown_message_type", "")
            finally:
                await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_session_whose_frames_nobody_takes_ends_and_no_other(relay):
    async def run():
        async with Middle(relay.port).run() as middle, run_clients(middle.url) as (_, consumer, _, _):
            idle, busy = await dial(consumer), await dial(consumer)
            with contextlib.suppress(ConnectionError):
                for _ in range(40):
                    await idle.send_binary(bytes(16_000))
            await until(lambda: idle.end_reason is not None, DEADLINE_S)
            await busy.send_binary(b"\x10a")
            assert await busy.receive() == b"a\x10"

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_connection_that_only_seems_to_be_one_is_made_anew(relay):
    """As after a sleep: what is sent goes nowhere, and nobody says so."""

    def swallow(message, middle, number):
        return [] if number == 0 else [message]

    async def run():
        async with Middle(relay.port, to_relay=swallow).run() as middle:
            client = make_client(middle.url, [], [])
            try:
                with pytest.raises(d.UpstreamConnectError, match="did not answer in time"):
                    await client.dial(PLACE, 1.0)
                async with asyncio.timeout(DEADLINE_S):
                    while True:
                        try:
                            await client.dial(PLACE, 5.0)
                        except d.UpstreamConnectError as error:
                            if "not connected to the relay now" in error.message:  # which only the relay knows
                                break
                            await asyncio.sleep(0.05)
            finally:
                await client.close()
            assert len(middle.sockets) >= 2

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_relay_that_begins_sessions_without_end_is_left(relay):
    def flood(message, middle, number):
        if '"listening"' not in str(message):
            return [message]
        return [message, *(say("incoming", sessionId=f"s{n}", room=NAMED, tag=n) for n in range(300))]

    async def run():
        async with Middle(relay.port, to_device=flood).run() as middle:
            reached, served = [], []
            client = make_client(middle.url, served, reached)
            try:
                await client.listen(frozenset([PLACE]))
                await until(lambda: len(reached) >= 2, DEADLINE_S)  # it was left, and tried again
                assert len(served) <= d.RELAY_SESSIONS_LIMIT * len(reached)
            finally:
                await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


# -- tunnels through it --


class Meeting:
    """A provider and a consumer that are paired, and meet at `url` only: where they paired, or as both were told."""

    def __init__(self, folder, url, *, is_told=False):
        self.paired_at, self.told = (None, url) if is_told else (url, None)
        self.provider, self.consumer = Provider(folder, self.answer), Consumer(folder)

    async def answer(self, request):
        return d.HttpResponse(body=b"answer of " + request.body)

    @contextlib.asynccontextmanager
    async def run(self):
        provider, consumer = self.provider, self.consumer
        for device, peer, is_inbound in ((provider, consumer, True), (consumer, provider, False)):
            pairing = make_pairing(peer.identity, is_inbound=is_inbound)
            name = "inbound_link" if is_inbound else "outbound_link"
            await device.store.add(
                replace(pairing, **{name: replace(getattr(pairing, name), relay_url=self.paired_at)})
            )
        self.tunnels = d.TunnelServer(
            identity=provider.identity, store=provider.store, handler=provider.handle, clock_ms=provider.read_clock
        )
        self.reachable = []
        here = d.Rendezvous(
            provider.store,
            relay_url=self.told,
            does_dial=False,
            serve=self.tunnels.serve,
            on_reachable=lambda pairing: None,
        )
        there = d.Rendezvous(
            consumer.store, relay_url=self.told, does_dial=True, serve=self.refuse, on_reachable=self.reachable.append
        )
        here.start()
        there.start()
        http = d.HttpClient()
        self.client = d.PeerClient(
            http,
            identity=consumer.identity,
            store=consumer.store,
            app_id=None,
            dial_relay=there.dial,
            clock_ms=consumer.read_clock,
        )
        try:
            yield self
        finally:
            await self.client.close()
            await http.close()
            await there.close()
            await here.close()

    async def refuse(self, session):
        raise AssertionError("nobody uses the consumer")

    async def ask(self, body=b"prompt", **options):
        """The answer's bytes."""
        pairing = self.consumer.pairing
        url = d.parse_http_url(d.build_relayed_base_url(pairing.outbound_link.pair_id) + "/chat/completions")
        async with self.client.request(pairing, "POST", url, body=body, **options) as response:
            return await response.read(d.MIB)

    async def ask_when_there(self, body=b"prompt"):
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    return await self.ask(body)
                except d.UpstreamConnectError:
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize("subprotocols", [(d.RELAY_SUBPROTOCOL,), ()], ids=["binary", "json"])
def test_a_request_goes_through_and_the_relay_reads_nothing(relay, tmp_path, subprotocols):
    async def run():
        async with (
            Middle(relay.port, subprotocols=subprotocols).run() as middle,
            Meeting(tmp_path, middle.url).run() as meeting,
        ):
            prompt = b"canary of the prompt " + bytes(60_000)
            assert await meeting.ask_when_there(prompt) == b"answer of " + prompt
            assert meeting.reachable and meeting.provider.requests[0].client_address == "relay"
            states = (meeting.consumer.pairing.outbound_link, meeting.provider.pairing.inbound_link)
            assert [link.pending_until_ms for link in states] == [None, None]
            link = states[0]
            for secret in (b"canary", b"answer of", b"chat/completions", link.resume_psk):
                assert secret not in middle.content
            sizes = {len(frame) for frame in map(read_frame, middle.seen) if frame and frame[0] == 16}
            assert len(sizes) < 30  # of some data and few control frames: not one for each length

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


class Recorder:
    """What a GatheredSink writes into."""

    is_full = False

    def __init__(self):
        self.written, self.is_gone = [], False

    def write(self, data):
        if self.is_gone:
            raise d.StreamGoneError("it is gone")
        self.written.append(data)

    async def drain(self):
        pass

    wait_sent = drain

    async def end(self):
        self.written.append(None)


def test_devices_that_paired_on_a_network_of_their_own_meet_where_both_are_told(relay, tmp_path):
    async def run():
        url = f"ws://127.0.0.1:{relay.port}"
        async with Meeting(tmp_path, url, is_told=True).run() as meeting:
            assert await meeting.ask_when_there(b"1") == b"answer of 1"

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_where_the_devices_of_a_pairing_meet():
    link = d.PairingLink(pair_id=b"p" * 16, resume_psk=b"k" * 32, room=ROOM)
    here, there = "wss://a.example", "wss://b.example"
    assert d.list_relay_urls(link, None) == ()
    assert d.list_relay_urls(link, here) == (here,)
    assert d.list_relay_urls(replace(link, relay_url=there), here) == (there, here)
    assert d.list_relay_urls(replace(link, relay_url=here), here) == (here,)


def test_pieces_that_come_together_travel_together():
    async def run():
        recorder = Recorder()
        sink = d.GatheredSink(recorder)
        pieces = [b"%d " % number for number in range(d.GATHER_PIECES)]
        for piece in pieces[:-1]:
            sink.send(piece)
            sink.flush()
            await sink.drain()
        assert recorder.written == []
        sink.write(pieces[-1])
        assert recorder.written == [b"".join(pieces)]
        sink.write(b"late")
        await until(lambda: recorder.written[1:] == [b"late"], DEADLINE_S)
        sink.write(bytes(d.GATHER_BYTES))
        assert recorder.written[2:] == [bytes(d.GATHER_BYTES)]
        sink.write(b"last")
        await sink.end()
        assert recorder.written[3:] == [b"last", None]

    asyncio.run(run())


def test_who_writes_after_the_reader_has_left_learns_it():
    async def run():
        recorder = Recorder()
        sink = d.GatheredSink(recorder)
        sink.write(b"a")
        recorder.is_gone = True

        def fails():
            try:
                sink.write(b"b")
            except d.StreamGoneError:
                return True
            return False

        await until(fails, DEADLINE_S)

    asyncio.run(run())


def change_later(change):
    """Does something to every transport frame but the first four of a direction of a connection."""
    counts = {}

    def tamper(message, middle, number):
        frame = read_frame(message)
        if frame is None or frame[0] != 16:
            return [message]
        counts[number] = counts.get(number, 0) + 1
        return change(message, frame) if counts[number] > 4 else [message]

    return tamper


def swap_with_next():
    held = []

    def swap(message, frame):
        held.append(message)
        if len(held) < 2:
            return []
        swapped = held[::-1]
        held.clear()
        return swapped

    return swap


HOSTILE = {
    "changed": lambda message, frame: [replace_frame(message, frame[:-1] + bytes([frame[-1] ^ 1]))],
    "truncated": lambda message, frame: [replace_frame(message, frame[:-1])],
    "empty": lambda message, frame: [replace_frame(message, b"")],
    "repeated": lambda message, frame: [message, message],
    "swapped": swap_with_next(),
    "invented": lambda message, frame: [replace_frame(message, b"\x10" + bytes(64)), message],
    "a handshake again": lambda message, frame: [replace_frame(message, b"\x01\x01\x02" + bytes(64)), message],
}


@pytest.mark.parametrize("way", ["to_relay", "to_device"])
@pytest.mark.parametrize("case", HOSTILE)
def test_frames_that_were_tampered_with_end_the_tunnel(relay, tmp_path, monkeypatch, case, way):
    monkeypatch.setattr(d, "CHANNEL_PING_INTERVAL_S", 1.0)  # after which a frame that is missed is noticed

    async def run():
        async with Middle(relay.port).run() as middle, Meeting(tmp_path, middle.url).run() as meeting:
            assert await meeting.ask_when_there(b"1") == b"answer of 1"
            setattr(middle, way, change_later(HOSTILE[case]))
            with pytest.raises(d.UpstreamError):  # never a short or a wrong answer
                for _ in range(20):
                    body = bytes(40_000)
                    assert await meeting.ask(body) == b"answer of " + body
            setattr(middle, way, keep)
            assert await meeting.ask_when_there(b"2") == b"answer of 2"

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_relay_that_connects_crosswise_connects_nobody(relay, tmp_path):
    """Whoever it takes the dialler to, that one does not hold the keys."""

    async def run():
        stranger_room = b"s" * 16

        def turn(message, middle, number):
            if isinstance(message, str) and '"dial"' in message:
                return [json.dumps(json.loads(message) | {"room": d.encode_base64url(stranger_room)})]
            return [message]

        def hide(message, middle, number):
            if isinstance(message, str) and '"dialed"' in message:
                return [json.dumps(json.loads(message) | {"room": NAMED})]
            return [message]

        async with (
            Middle(relay.port, to_relay=turn, to_device=hide).run() as middle,
            Meeting(tmp_path / "a", middle.url).run() as meeting,
        ):
            stranger = Provider(tmp_path / "b", meeting.answer)
            tunnels = d.TunnelServer(
                identity=stranger.identity,
                store=stranger.store,
                handler=stranger.handle,
                clock_ms=stranger.read_clock,
            )
            client = d.RelayClient(
                f"ws://127.0.0.1:{relay.port}", serve=tunnels.serve, on_connected=lambda: None, jitter=lambda: 0.0
            )
            try:
                await client.listen(frozenset([d.RelayPlace(d.RelayPlaceKind.ROOM, stranger_room)]))
                with pytest.raises(d.UpstreamConnectError):
                    await meeting.ask()
                with pytest.raises(d.UpstreamConnectError):
                    await meeting.ask()
                assert not meeting.provider.requests and not stranger.requests
            finally:
                await client.close()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_relay_that_holds_everything_back_is_given_up(relay, tmp_path):
    async def run():
        async with Middle(relay.port).run() as middle, Meeting(tmp_path, middle.url).run() as meeting:
            assert await meeting.ask_when_there(b"1") == b"answer of 1"
            middle.to_relay = change_later(lambda message, frame: [])
            with pytest.raises(d.UpstreamError):
                for _ in range(20):
                    await meeting.ask(b"2", budgets=d.HttpBudgets(first_byte_s=1.0, total_s=2.0))
            middle.to_relay = keep
            assert await meeting.ask_when_there(b"3") == b"answer of 3"

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_who_is_revoked_is_turned_away(relay, tmp_path):
    async def run():
        async with Middle(relay.port).run() as middle, Meeting(tmp_path, middle.url).run() as meeting:
            assert await meeting.ask_when_there(b"1") == b"answer of 1"
            await meeting.provider.store.revoke(meeting.provider.pairing.pairing_id)
            with pytest.raises(d.UpstreamError):
                await meeting.ask(b"2")
            assert len(meeting.provider.requests) == 1

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_relayed_address_is_nobodys():
    link = make_pairing(
        d.Identity(device_id="x", device_name="X", seed=d.encode_base64url(bytes(32))), is_inbound=False
    )
    url = d.parse_http_url(d.build_relayed_base_url(link.outbound_link.pair_id))
    assert d.is_relayed_url(url) and d.parse_base_url(d.build_relayed_base_url(link.outbound_link.pair_id))
    assert not d.is_relayed_url(d.parse_http_url("http://relay.invalid.example.org/v1"))

    async def run():
        http = d.HttpClient()
        client = d.PeerClient(http, identity=d.Identity(device_id="y", device_name="Y"), store=None, app_id=None)
        try:
            with pytest.raises(d.PairingEndedError):  # not even its name is looked up
                client.request(None, "GET", url)
        finally:
            await client.close()
            await http.close()

    asyncio.run(run())
