"""Section Peers: who is there and what they can do, by real HTTP on loopback; nothing here waits for a fixed time."""

import asyncio
import contextlib
import json
import math
import time
from dataclasses import replace

import pytest

from dvai_bridge import (
    COOL_DOWN_S,
    PEER_ANSWER_LIMIT_BYTES,
    PEER_MODELS_LIMIT,
    PEER_WAYS_LIMIT,
    PEERS_LIMIT,
    Handshake,
    Headers,
    HttpClient,
    Identity,
    KnownPeer,
    OffloadPolicy,
    Pairing,
    PairingDeniedError,
    PairingDisabledError,
    PairingFailedError,
    PairingInitiator,
    PairingPolicy,
    PairingStore,
    Peer,
    PeerClient,
    PeerHealth,
    PeerIntervals,
    PeerMonitor,
    PeerRoute,
    PeerState,
    PeerTable,
    PeerVia,
    PeerWay,
    RouteRequest,
    UsageError,
    average_measurement,
    build_handshake_post,
    build_known_peer_json,
    build_peer_json,
    build_static_peer,
    choose_route,
    compose_signed_message,
    parse_health,
    parse_model_list,
    parse_scores_json,
    parse_signature_headers,
    verify_hmac,
)

OWN = Identity(device_id="AAAAAAAAAAAAAAAAAAAAAA", device_name="here", seed="A" * 43)
KEY = "A" * 42 + "E"  # 32 bytes
M = "Llama-3.2-3B-Instruct-Q4_K_M"
HEALTH = {"status": "ok", "version": "4.0.0", "uptimeSec": 7, "currentModelId": M}
FULL_HEALTH = HEALTH | {
    "deviceId": "id-studio",
    "deviceName": "studio",
    "queue": {"running": 1, "waiting": 3, "slots": 2},
}
SCORE = {"modelId": M, "deviceId": "id-studio", "libraryVersion": "4", "tokPerSec": 60.0, "source": "probe"}
INTERVALS = PeerIntervals(
    usable_s=0.02, loading_s=0.02, unpaired_s=0.02, learn_s=1000, custom_s=0.02, answer_s=20, back_off_s=0.02
)


def make_peer(device_id="id-studio", base_url="http://10.0.0.7:38883/v1", via=PeerVia.MDNS, **members):
    members = {"device_name": "studio", "dvai_version": "4.0.0", "last_seen_ms": 0} | members
    return Peer(device_id=device_id, base_url=base_url, via=via, **members)


# What peers say


def test_a_health_answer():
    word = parse_health(json.dumps(FULL_HEALTH).encode())
    assert (word.health, word.device_id, word.device_name) == (PeerHealth.OK, "id-studio", "studio")
    assert (word.version, word.current_model_id, word.queue) == ("4.0.0", M, (1, 3, 2))


@pytest.mark.parametrize(
    ("change", "member", "expected"),
    [
        ({"status": "loading"}, "health", PeerHealth.LOADING),
        ({"status": "degraded"}, "health", PeerHealth.DEGRADED),
        ({"status": "healthy"}, "health", PeerHealth.OK),
        ({"status": None}, "health", PeerHealth.OK),
        ({"deviceId": 7}, "device_id", None),
        ({"deviceId": "two\nlines"}, "device_id", None),
        ({"deviceId": "x" * 129}, "device_id", None),
        ({"deviceName": []}, "device_name", None),
        ({"deviceName": ""}, "device_name", None),
        ({"version": "v" * 10_000}, "version", "v" * 512),
        ({"currentModelId": "x" * 257}, "current_model_id", None),
        ({"currentModelId": None}, "current_model_id", None),
        ({"queue": None}, "queue", None),
        ({"noise": 1}, "speaks_noise", True),
        ({"noise": 2}, "speaks_noise", False),
        ({"noise": [1]}, "speaks_noise", False),
        ({"queue": {"running": 1, "waiting": -1, "slots": 1}}, "queue", None),
        ({"queue": {"running": 1, "waiting": 1.5, "slots": 1}}, "queue", None),
        ({"queue": {"running": True, "waiting": 1, "slots": 1}}, "queue", None),
        ({"queue": {"running": 10**15, "waiting": 10**15, "slots": 0}}, "queue", (4096, 4096, 1)),
    ],
)
def test_what_is_absurd_in_a_health_answer_is_not_taken(change, member, expected):
    assert getattr(parse_health(json.dumps(FULL_HEALTH | change).encode()), member) == expected


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"<html>", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}'])
def test_what_is_no_answer(body):
    with pytest.raises(ValueError):
        parse_health(body)
    with pytest.raises(ValueError):
        parse_model_list(body)


def test_a_list_of_models():
    assert parse_model_list(b'{"object":"list","data":[{"id":"a"},{"id":7},{},7,{"id":"b"}]}') == ("a", "b")
    many = json.dumps({"data": [{"id": f"m{n}"} for n in range(1000)]}).encode()
    assert len(parse_model_list(many)) == PEER_MODELS_LIMIT


def test_a_static_peer_is_an_address():
    peer = build_static_peer("http://Mac.local:38883")
    assert (peer.device_id, peer.base_url) == ("http://mac.local:38883/v1",) * 2
    assert (peer.device_name, peer.via) == ("mac.local:38883", PeerVia.STATIC)
    with pytest.raises(UsageError, match="--peer mac:38883"):
        build_static_peer("mac:38883")


# The table


def test_the_same_device_by_several_ways_is_one_peer():
    table = PeerTable(OWN.device_id)
    known = table.see(make_peer())
    assert table.see(make_peer(base_url="http://10.0.0.8:38883/v1")) is known
    assert table.see(make_peer(base_url="relay://x", via=PeerVia.RENDEZVOUS)) is known
    assert len(table) == 1 and table.find("id-studio") is known
    assert [way.base_url for way in known.list_ways()][-1] == "relay://x"


def test_ways_that_last_come_before_what_the_network_says_and_lan_before_relay():
    table = PeerTable(OWN.device_id)
    known = table.see(make_peer(base_url="http://relay/v1", via=PeerVia.RENDEZVOUS), is_lasting=True)
    for number, via in enumerate((PeerVia.CUSTOM, PeerVia.MDNS)):
        table.see(make_peer(base_url=f"http://{via.value}{number}/v1", via=via))
    known.answered_by = "http://custom0/v1"
    assert [way.base_url for way in known.list_ways()] == ["http://custom0/v1", "http://mdns1/v1", "http://relay/v1"]
    table.see(make_peer(base_url="http://static/v1", via=PeerVia.STATIC), is_lasting=True)
    assert known.list_ways()[0].base_url == "http://static/v1"


def test_a_device_cannot_be_given_ways_without_end():
    table = PeerTable(OWN.device_id)
    known = table.see(make_peer(base_url="http://static/v1", via=PeerVia.STATIC), is_lasting=True)
    table.see(make_peer(base_url="http://good/v1"))
    known.answered_by = "http://good/v1"
    for number in range(100):
        table.see(make_peer(base_url=f"http://bad{number}/v1"))
    assert len(known.ways) == PEER_WAYS_LIMIT
    assert {"http://static/v1", "http://good/v1", "http://bad99/v1"} <= known.ways.keys()


def test_we_are_no_peer_of_ours():
    table = PeerTable(OWN.device_id, lambda: ["http://192.168.1.5:38883/v1"])
    assert table.see(make_peer(device_id=OWN.device_id)) is None
    assert table.see(build_static_peer("http://192.168.1.5:38883")) is None
    known = table.see(build_static_peer("http://192.168.1.6:38883"))
    assert table.identify(known, OWN.device_id) is None
    assert len(table) == 0


def test_an_address_that_tells_its_id_joins_the_device():
    table = PeerTable(OWN.device_id)
    by_address = table.see(build_static_peer("http://10.0.0.7:38883"), is_lasting=True)
    by_mdns = table.see(make_peer(base_url="http://10.0.0.9:38883/v1"))
    assert by_address is not by_mdns and by_address.told_id is None
    assert table.identify(by_address, "id-studio") is by_mdns
    assert len(table) == 1 and not table.has(by_address)
    assert set(by_mdns.ways) == {"http://10.0.0.7:38883/v1", "http://10.0.0.9:38883/v1"}
    assert by_mdns.list_ways()[0].is_lasting


def test_an_address_that_tells_a_new_id_keeps_its_place():
    table = PeerTable(OWN.device_id)
    known = table.see(build_static_peer("http://10.0.0.7:38883"), is_lasting=True)
    assert table.identify(known, "id-new") is known
    assert table.find("id-new") is known and known.told_id == "id-new"
    assert table.find("http://10.0.0.7:38883/v1") is known


def test_the_network_gives_no_id_to_an_address_that_the_user_named():
    table = PeerTable(OWN.device_id)
    known = table.see(build_static_peer("http://10.0.0.7:38883"), is_lasting=True)
    assert table.see(make_peer(device_id="id-evil", base_url="http://10.0.0.7:38883/v1")) is known
    assert known.told_id is None and table.find("id-evil") is None


def test_the_network_gives_no_name_to_a_paired_device():
    table = PeerTable(OWN.device_id)
    known = table.see(make_peer())
    table.see(make_peer(device_name="renamed"))
    assert known.peer.device_name == "renamed"
    known.has_pairing = True
    table.see(make_peer(device_name="meta-llama", loaded_models=("x",)))
    assert (known.peer.device_name, known.peer.loaded_models) == ("renamed", ("x",))


def test_ids_that_two_devices_may_have_are_none():
    table = PeerTable(OWN.device_id)
    one = table.see(make_peer(device_id="hub-38883", base_url="http://10.0.0.1:38883/v1"))
    other = table.see(make_peer(device_id="hub-38883", base_url="http://10.0.0.2:38883/v1"))
    assert one is not other and one.told_id is None


def test_the_table_does_not_grow_without_end():
    table = PeerTable(OWN.device_id)
    named = table.see(build_static_peer("http://10.9.9.9:1"), is_lasting=True)
    paired = table.see(make_peer(device_id="paired"))
    paired.has_pairing = True
    for number in range(10_000):
        known = table.see(make_peer(device_id=f"id-{number}", base_url=f"http://h{number}/v1"))
        if known and number % 2:
            known.note_silence("refused")
    assert len(table) == PEERS_LIMIT
    assert table.has(named) and table.has(paired)
    table.see(build_static_peer("http://10.9.9.10:1"), is_lasting=True)
    assert table.find("http://10.9.9.10:1/v1") is not None


def test_what_nobody_finds_any_more_is_forgotten():
    table = PeerTable(OWN.device_id)
    known = table.see(make_peer())
    table.see(make_peer(base_url="http://10.0.0.8:38883/v1", via=PeerVia.CUSTOM))
    assert table.lose("id-studio", PeerVia.MDNS) is None and table.has(known)
    assert table.lose("id-studio", PeerVia.CUSTOM) is known and len(table) == 0
    assert table.lose("id-studio", PeerVia.CUSTOM) is None
    named = table.see(build_static_peer("http://10.0.0.7:38883"), is_lasting=True)
    assert table.lose(named.device_id, PeerVia.STATIC) is None and table.has(named)


# One peer


WAY = PeerWay(base_url="http://10.0.0.7:38883/v1", via=PeerVia.MDNS, is_lasting=False)


def make_known(**word):
    """A peer that answered once."""
    known = KnownPeer(make_peer())
    known.note_word(WAY, parse_health(json.dumps(FULL_HEALTH | word).encode()), 1_700_000_000_000)
    return known


def test_back_off_grows_to_a_minute_and_is_spread():
    known, waits = KnownPeer(make_peer()), []
    for _ in range(14):
        known.note_silence("refused")
        waits.append(known.compute_poll_delay_s(PeerIntervals(), 0.5))
    assert waits[:4] == [1, 1.5, 2.25, 3.375] and waits[-1] == 60
    assert [known.compute_poll_delay_s(PeerIntervals(), jitter) for jitter in (0.0, 1.0)] == [30, 90]
    for _ in range(10_000):
        known.note_silence("refused")
    assert known.compute_poll_delay_s(PeerIntervals(), 0.5) == 60


def test_peers_are_asked_as_often_as_they_matter():
    known, intervals = make_known(), PeerIntervals()
    assert known.compute_poll_delay_s(intervals, 0.5) == intervals.unpaired_s
    known.state = PeerState.READY
    assert known.compute_poll_delay_s(intervals, 0.5) == intervals.usable_s
    for known.state in (PeerState.REACHABLE, PeerState.READY):
        known.health = PeerHealth.LOADING
        assert known.compute_poll_delay_s(intervals, 0.5) == intervals.loading_s


def test_a_sign_of_life_ends_the_cool_down_of_a_peer_that_was_gone():
    known = make_known()
    known.note_failure("refused", 100.0, has_answered=False, retry_after_s=0)
    assert known.cool_down.until_s == 100 + COOL_DOWN_S and known.state is PeerState.SEEN
    known.note_word(WAY, parse_health(b"{}"), 0)
    assert known.cool_down.until_s == 0 and known.state is PeerState.REACHABLE


def test_health_proves_nothing_for_a_peer_that_answers_with_errors():
    known = make_known()
    for now_s, until_s in ((100, 105), (200, 210), (300, 320)):
        known.note_failure("500", now_s, has_answered=True, retry_after_s=0)
        known.note_word(WAY, parse_health(b"{}"), 0)
        assert known.cool_down.until_s == until_s
    known.note_success()
    assert known.cool_down.until_s == 0
    known.note_failure("429", 400, has_answered=True, retry_after_s=30)
    assert known.cool_down.until_s == 430


def test_scores_are_learned_where_none_are_advertised():
    known = make_known()
    assert known.candidate.peer.capability == {}
    known.record_measurement(M, 20.0, 300.0)
    known.record_measurement(M, 30.0, None)
    assert known.candidate.peer.capability == {M: 23.0} and known.candidate.prefill == {M: 300.0}
    known.peer = replace(known.peer, capability={M: 50.0})
    assert known.candidate.peer.capability == {M: 50.0}
    known.note_scores(parse_scores_json({"scores": [SCORE]}))
    assert known.candidate.peer.capability == {M: 60.0}
    for number in range(1000):
        known.record_measurement(f"m{number}", 1.0, 1.0)
    assert len(known.measured) == PEER_MODELS_LIMIT
    for absurd in (math.nan, math.inf, -1.0):
        known.record_measurement("absurd", absurd, absurd)
    assert "absurd" not in known.measured


def test_averages_move_slowly():
    assert average_measurement(None, 10) == 10
    assert average_measurement(10, 20) == pytest.approx(13)


def test_a_candidate_has_all_that_the_decision_wants():
    known = make_known()
    candidate = known.candidate
    assert (candidate.running, candidate.waiting, candidate.slots) == (1, 3, 2)
    assert candidate.peer.loaded_models == (M,) and candidate.route is PeerRoute.LAN
    assert candidate.state is PeerState.REACHABLE and candidate.models is None
    shown = build_known_peer_json(candidate)
    assert build_peer_json(candidate.peer).items() <= shown.items()
    assert shown["state"] == "reachable" and shown["pairing"] == "not paired" and "error" not in shown


# Peers on real sockets


class LoopbackPeer:
    """A bridge as others see it: HTTP on loopback, its answers set by the test, its signatures really checked.

    `dead`: every connection is dropped without an answer; the port stays, so nobody else can take it.
    """

    def __init__(self, *, key=KEY):
        self.key = key
        self.dead = False
        self.health = dict(FULL_HEALTH)
        self.short_health = dict(HEALTH)
        self.models = {"data": [{"id": M}]}
        self.scores = {"scores": [SCORE]}
        self.handshake = None  # an async function: body → (status, answer)
        self.error = None  # what every route answers instead: (status, JSON or bytes)
        self.requests = []  # (method, path, headers, whether it was signed)

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *exc_info):
        self.server.close()
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if not self.dead:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, path, _ = head[0].split(" ")
                fields = [line.split(": ", 1) for line in head[1:] if line]
                headers = Headers([(name.lower(), value) for name, value in fields])
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                status, answer = await self.answer(method, path, headers, body)
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                writer.write(
                    b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data
                )
                await writer.drain()
        writer.close()

    def is_signed(self, method, path, headers, body):
        signature = parse_signature_headers(headers)
        if signature is None:
            return False
        verify_hmac(self.key, compose_signed_message(signature.nonce, method, path, body), signature.signature)
        return True

    async def answer(self, method, path, headers, body):
        signed = self.is_signed(method, path, headers, body)
        self.requests.append((method, path, headers, signed))
        if self.error is not None:
            return self.error
        if path == "/v1/dvai/health":
            return 200, self.health if signed else self.short_health
        if path == "/v1/dvai/handshake":
            return await self.handshake(json.loads(body))
        if not signed:
            return 401, {}
        answers = {"/v1/models": self.models, "/v1/dvai/capability": self.scores}
        answer = answers.get(path)
        return (404, {}) if answer is None else (200, answer)

    def count(self, path):
        return sum(each[1] == path for each in self.requests)

    async def approve(self, request):
        """A handshake that the user of this peer approves."""
        answer = {"paired": True, "pairedAt": 1, "via": "lan-handshake", "pairingKey": self.key}
        return 200, answer | {
            "peerDeviceId": request["peerDeviceId"],
            "deviceId": self.health.get("deviceId"),
            "deviceName": "studio",
        }


def build_pairing(base_url=None, device_id="id-studio", key=KEY):
    now_ms = time.time_ns() // 1_000_000
    return Pairing(
        device_id=device_id,
        app_id=device_id,
        device_name="studio",
        outbound_key=key,
        base_url=base_url,
        paired_at_ms=now_ms,
        last_used_at_ms=now_ms,
    )


async def until(condition, what):
    """Poll until `condition()` is true; its value."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.005)
    return value


@contextlib.asynccontextmanager
async def monitoring(directory, *peers, pairings=(), **options):
    """A monitor with a store and an initiator of its own, started; at its end no task is left."""
    before = asyncio.all_tasks()
    store = PairingStore(directory, device_id=OWN.device_id)
    for pairing in pairings:
        await store.add(pairing)
    client = HttpClient()
    peer_client = PeerClient(client, identity=OWN, store=store, app_id=None)
    initiator = PairingInitiator(
        identity=OWN,
        app_id=None,
        store=store,
        post=build_handshake_post(client),
        clock_ms=lambda: time.time_ns() // 1_000_000,
        legacy_policy=PairingPolicy.ALLOW,
    )
    monitor = PeerMonitor(
        identity=OWN,
        client=peer_client,
        store=store,
        initiator=initiator,
        known_peers=peers,
        **({"intervals": INTERVALS} | options),
    )
    monitor.store = store
    monitor.start()
    try:
        yield monitor
    finally:
        await monitor.close()
        await initiator.close()
        await peer_client.close()
        await client.close()
    await until(lambda: asyncio.all_tasks() <= before, "every task has ended")


def find_candidate(monitor, state=None, device_id="id-studio"):
    for candidate in monitor.candidates():
        if candidate.peer.device_id == device_id and state in (None, candidate.state):
            return candidate
    return None


async def until_state(monitor, state, device_id="id-studio"):
    def find():
        return find_candidate(monitor, state, device_id)

    try:
        return await until(find, f"{device_id} is {state}")
    except AssertionError as exc:
        raise AssertionError(monitor.candidates()) from exc


def test_a_paired_peer_becomes_ready(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            candidate = await until_state(monitor, PeerState.READY)
            assert candidate.has_pairing and candidate.models == (M,)
            assert candidate.peer.capability == {M: 60.0} and candidate.peer.loaded_models == (M,)
            assert (candidate.running, candidate.waiting, candidate.slots) == (1, 3, 2)
            assert candidate.peer.dvai_version == "4.0.0" and candidate.peer.last_seen_ms > 0
            assert monitor.list_models() == [(M, candidate.peer)]
            assert all(signed and headers.get("x-dvai-forwarded") == "1" for _, _, headers, signed in peer.requests)
            await until(lambda: peer.count("/v1/dvai/health") > 5, "health is asked again and again")
            assert peer.count("/v1/models") == 1 and peer.count("/v1/dvai/capability") == 1

    asyncio.run(run())


def test_a_paired_peer_that_has_learnt_the_secure_channel_is_remembered_so(tmp_path):
    async def run():
        async with LoopbackPeer() as peer:
            peer.health["noise"] = 1
            async with monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
                await until_state(monitor, PeerState.READY)
                assert monitor.store.has_spoken_noise("id-studio")

    asyncio.run(run())


def test_a_stranger_is_asked_for_nothing_but_health(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:
            await until_state(monitor, PeerState.REACHABLE, peer.base_url)
            await until(lambda: peer.count("/v1/dvai/health") > 3, "it is asked again")
            assert {(path, signed) for _, path, _, signed in peer.requests} == {("/v1/dvai/health", False)}
            assert peer.count("/v1/dvai/handshake") == 0 and monitor.list_models() == []

    asyncio.run(run())


def test_a_hub_without_our_routes_is_of_use(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            peer.models = peer.scores = None
            peer.health = {"status": "ok"}
            candidate = await until_state(monitor, PeerState.PAIRED)
            assert candidate.models is None and candidate.peer.capability == {}
            monitor.record_measurement("id-studio", M, 33.0)
            assert find_candidate(monitor).peer.capability == {M: 33.0}
            policy = OffloadPolicy(enabled=True)
            decision = choose_route(policy, RouteRequest(model=M), [], monitor.candidates(), monitor.now_s())
            assert decision.targets[0].peer.device_id == "id-studio"

    asyncio.run(run())


def test_a_peer_that_returns_is_used_again_without_help(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            await until_state(monitor, PeerState.READY)
            peer.dead = True
            candidate = await until_state(monitor, PeerState.SEEN)
            assert candidate.error and candidate.has_pairing
            monitor.note_failure("id-studio", "connection refused", has_answered=False)
            assert find_candidate(monitor).cool_down.until_s > monitor.now_s()
            peer.dead = False
            candidate = await until_state(monitor, PeerState.READY)
            assert candidate.cool_down.until_s == 0 and candidate.error == ""
            assert peer.count("/v1/models") == 2, "what it has is asked anew"

    asyncio.run(run())


def test_a_failed_request_makes_the_monitor_look_at_once(tmp_path):
    async def run():
        slow = replace(INTERVALS, usable_s=1000, back_off_s=1000)
        async with LoopbackPeer() as peer, monitoring(tmp_path, intervals=slow) as monitor:
            await monitor.store.add(build_pairing(peer.base_url))
            await until_state(monitor, PeerState.READY)
            monitor.note_failure("id-studio", "connection reset", has_answered=False)
            assert find_candidate(monitor).state is PeerState.SEEN
            await until_state(monitor, PeerState.READY)
            monitor.note_failure("id-studio", "500", has_answered=True, retry_after_s=60)
            candidate = find_candidate(monitor)
            assert candidate.state is PeerState.READY and candidate.cool_down.until_s > monitor.now_s()
            monitor.note_success("id-studio")
            assert find_candidate(monitor).cool_down.until_s == 0

    asyncio.run(run())


def test_a_peer_that_forgot_us_is_not_asked_to_pair_again(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            await until_state(monitor, PeerState.READY)
            peer.error = 401, {"error": {"code": "invalid_signature"}}
            await until(lambda: monitor.store.pairings[0].is_marked_unauthorized, "the pairing is marked")
            candidate = await until(lambda: (c := find_candidate(monitor)) and not c.has_pairing and c, "unpaired")
            assert candidate.handshake is Handshake.REFUSED
            peer.error, peer.handshake = None, peer.approve
            await until_state(monitor, PeerState.REACHABLE)
            monitor.begin_pairing(candidate.peer)
            assert peer.count("/v1/dvai/handshake") == 0
            assert not await monitor.wait_for_approval(candidate.peer, 30)
            await monitor.pair(candidate.peer)
            assert peer.count("/v1/dvai/handshake") == 1
            assert (await until_state(monitor, PeerState.READY)).handshake is Handshake.NONE

    asyncio.run(run())


def test_a_request_that_was_not_authorised_marks_the_pairing(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            await until_state(monitor, PeerState.READY)
            monitor.note_unauthorized("id-studio")
            assert monitor.store.pairings[0].is_marked_unauthorized
            assert find_candidate(monitor).state is PeerState.REACHABLE

    asyncio.run(run())


def test_a_wrong_clock_ends_no_pairing(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            peer.error = 401, {"error": {"code": "clock_skew", "skewSeconds": 900}}
            candidate = await until(lambda: (c := find_candidate(monitor)) and "clock" in c.error and c, "it is said")
            assert candidate.has_pairing and not monitor.store.pairings[0].is_marked_unauthorized
            peer.error = None
            await until_state(monitor, PeerState.READY)

    asyncio.run(run())


def test_whoever_only_claims_to_be_a_paired_device_ends_no_pairing(tmp_path):
    async def run():
        async with LoopbackPeer() as claimant, monitoring(tmp_path, pairings=[build_pairing()]) as monitor:
            claimant.error = 401, {}
            monitor.see(make_peer(base_url=claimant.base_url))
            await until(lambda: claimant.count("/v1/dvai/health") > 3, "it is asked")
            assert not monitor.store.pairings[0].is_marked_unauthorized
            claimant.error = None
            claimant.health["deviceId"] = "id-other"
            await until(lambda: "another device" in find_candidate(monitor).error, "it is found out")

    asyncio.run(run())


# Pairing by itself


def test_the_first_need_pairs(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path) as monitor:
            peer.handshake = peer.approve
            monitor.see(make_peer(base_url=peer.base_url))
            await until_state(monitor, PeerState.REACHABLE)
            policy, request = OffloadPolicy(enabled=True), RouteRequest(model=M)
            decision = choose_route(policy, request, [], monitor.candidates(), monitor.now_s())
            assert decision.targets == () and decision.pair_with.device_id == "id-studio"
            assert await monitor.wait_for_approval(decision.awaited, 30)
            decision = choose_route(policy, request, [], monitor.candidates(), monitor.now_s())
            assert [target.peer.device_id for target in decision.targets] == ["id-studio"]
            assert decision.targets[0].score == 60 / (1 + 3 / 2)
            assert monitor.store.pairings[0].device_id == "id-studio"

    asyncio.run(run())


def test_a_static_peer_tells_who_it_is_when_it_is_paired(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:
            peer.handshake = peer.approve
            stranger = await until_state(monitor, PeerState.REACHABLE, peer.base_url)
            monitor.see(make_peer(base_url="http://127.0.0.1:9/v1"))
            assert await monitor.wait_for_approval(stranger.peer, 30)
            candidate = await until_state(monitor, PeerState.READY)
            assert candidate.peer.device_name == "studio" and candidate.peer.base_url == peer.base_url
            await until(lambda: len(monitor.candidates()) == 1, "both were one device")

    asyncio.run(run())


def test_a_denial_is_final_until_the_user_asks(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:

            async def deny(request):
                return 403, {"error": {"type": "pairing_denied"}}

            peer.handshake = deny
            stranger = (await until_state(monitor, PeerState.REACHABLE, peer.base_url)).peer
            assert not await monitor.wait_for_approval(stranger, 30)
            candidate = find_candidate(monitor, device_id=peer.base_url)
            assert candidate.handshake is Handshake.REFUSED
            monitor.begin_pairing(stranger)
            assert not await monitor.wait_for_approval(stranger, 30)
            peer.dead = True
            await until_state(monitor, PeerState.SEEN, peer.base_url)
            peer.dead = False
            await until_state(monitor, PeerState.REACHABLE, peer.base_url)
            monitor.begin_pairing(stranger)
            assert peer.count("/v1/dvai/handshake") == 1
            with pytest.raises(PairingDeniedError):
                await monitor.pair(stranger)
            peer.handshake = peer.approve
            assert (await monitor.pair(stranger)).device_id == "id-studio"
            await until_state(monitor, PeerState.READY)

    asyncio.run(run())


def test_one_handshake_at_a_time_and_waiting_for_it_ends(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:
            decided = asyncio.Event()

            async def ask(request):
                await decided.wait()
                return await peer.approve(request)

            peer.handshake = ask
            stranger = (await until_state(monitor, PeerState.REACHABLE, peer.base_url)).peer
            for _ in range(5):
                monitor.begin_pairing(stranger)
            await until(lambda: peer.count("/v1/dvai/handshake"), "it is asked")
            assert find_candidate(monitor, device_id=peer.base_url).handshake is Handshake.ASKING
            assert not await monitor.wait_for_approval(stranger, 0.01)
            explicit = asyncio.create_task(monitor.pair(stranger))
            decided.set()
            assert (await explicit).device_id == "id-studio"
            assert await monitor.wait_for_approval(stranger, 30)
            assert peer.count("/v1/dvai/handshake") == 1

    asyncio.run(run())


def test_closing_ends_a_handshake_that_nobody_answers(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:
            closed = asyncio.Event()

            async def ask(request):
                await closed.wait()
                return await peer.approve(request)

            peer.handshake = ask
            stranger = (await until_state(monitor, PeerState.REACHABLE, peer.base_url)).peer
            monitor.begin_pairing(stranger)
            await until(lambda: peer.count("/v1/dvai/handshake"), "it is asked")
            await monitor.close()
            assert not {"pairing", "peer"} & {task.get_name() for task in asyncio.all_tasks()}
            closed.set()

    asyncio.run(run())


def test_a_failed_handshake_is_tried_again_once_the_peer_was_gone(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:

            async def fail(request):
                return 200, b"not json"

            peer.handshake = fail
            stranger = (await until_state(monitor, PeerState.REACHABLE, peer.base_url)).peer
            assert not await monitor.wait_for_approval(stranger, 30)
            assert find_candidate(monitor, device_id=peer.base_url).handshake is Handshake.FAILED
            peer.dead = True
            await until_state(monitor, PeerState.SEEN, peer.base_url)
            peer.dead, peer.handshake = False, peer.approve
            await until_state(monitor, PeerState.REACHABLE, peer.base_url)
            assert await monitor.wait_for_approval(stranger, 30)

    asyncio.run(run())


def test_without_a_store_nobody_is_paired(tmp_path):
    async def run():
        async with LoopbackPeer() as peer:
            client = HttpClient()
            peer_client = PeerClient(client, identity=OWN, store=None, app_id=None)
            monitor = PeerMonitor(
                identity=OWN, client=peer_client, known_peers=[build_static_peer(peer.base_url)], intervals=INTERVALS
            )
            monitor.start()
            stranger = (await until_state(monitor, PeerState.REACHABLE, peer.base_url)).peer
            assert not await monitor.wait_for_approval(stranger, 30)
            with pytest.raises(PairingDisabledError):
                await monitor.pair(stranger)
            await monitor.close()
            await client.close()

    asyncio.run(run())


def test_a_revoked_pairing_is_used_no_more(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            await until_state(monitor, PeerState.READY)
            await monitor.store.revoke(monitor.store.pairings[0].pairing_id)
            candidate = find_candidate(monitor)
            assert candidate.state in (PeerState.REACHABLE, PeerState.SEEN) and not candidate.has_pairing
            seen = len(peer.requests)
            await until(lambda: len(peer.requests) > seen + 3, "it is asked again")
            assert not peer.requests[-1][3], "and not signed"
            monitor.begin_pairing(candidate.peer)
            assert find_candidate(monitor).handshake is Handshake.REFUSED, "nor asked, but by the user"

    asyncio.run(run())


def test_two_hubs_of_one_name_stay_two(tmp_path):
    async def run():
        async with LoopbackPeer() as one, LoopbackPeer() as other:
            pairings = [build_pairing(each.base_url, device_id=each.base_url) for each in (one, other)]
            one.health = other.health = HEALTH | {"deviceId": "hub-38883"}
            async with monitoring(tmp_path, pairings=pairings) as monitor:
                for peer in (one, other):
                    await until_state(monitor, PeerState.READY, peer.base_url)

    asyncio.run(run())


def test_a_sighting_does_not_disturb_a_peer_that_is_in_use(tmp_path):
    async def run():
        slow = replace(INTERVALS, usable_s=1000)
        async with LoopbackPeer() as peer, monitoring(tmp_path, intervals=slow) as monitor:
            await monitor.store.add(build_pairing(peer.base_url))
            await until_state(monitor, PeerState.READY)
            asked = len(peer.requests)
            for _ in range(20):
                monitor.see(make_peer(base_url="http://127.0.0.1:9/v1"))
            monitor.lose(make_peer(base_url="http://127.0.0.1:9/v1"))
            await until(lambda: len(peer.requests) > asked, "a way that is gone is a reason to look")
            assert len(peer.requests) == asked + 1

    asyncio.run(run())


def test_a_pairing_made_elsewhere_is_taken_over(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path) as monitor:
            await monitor.store.add(build_pairing(peer.base_url))
            await until_state(monitor, PeerState.READY)

    asyncio.run(run())


# Who is found, and who is not


def test_we_do_not_talk_to_ourselves(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:
            peer.short_health = HEALTH | {"deviceId": OWN.device_id}
            await until(lambda: not monitor.candidates(), "we are dropped")
            asked = len(peer.requests)
            monitor.see(make_peer(device_id=OWN.device_id, base_url=peer.base_url))
            assert monitor.candidates() == []
            await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "peer"], "nobody is asked")
            assert len(peer.requests) == asked
            with pytest.raises(PairingFailedError, match="itself"):
                await monitor.pair(make_peer(device_id=OWN.device_id, base_url=peer.base_url))

    asyncio.run(run())


def test_the_next_way_is_tried(tmp_path):
    async def run():
        async with LoopbackPeer() as moved, LoopbackPeer() as old:
            old.dead = True
            async with monitoring(tmp_path, pairings=[build_pairing(old.base_url)]) as monitor:
                await until(lambda: (c := find_candidate(monitor)) and c.error, "it is gone")
                monitor.see(make_peer(base_url=moved.base_url))
                candidate = await until_state(monitor, PeerState.READY)
                assert candidate.peer.base_url == moved.base_url and candidate.peer.via is PeerVia.MDNS
                old.dead = False
                await until(lambda: find_candidate(monitor).peer.base_url == old.base_url, "its own place is better")

    asyncio.run(run())


def test_a_peer_that_says_goodbye_is_forgotten(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path) as monitor:
            found = make_peer(base_url=peer.base_url)
            monitor.see(found)
            await until_state(monitor, PeerState.REACHABLE)
            monitor.lose(found)
            assert monitor.candidates() == [] and monitor.peers() == []
            await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "peer"], "nobody is asked")

    asyncio.run(run())


@pytest.mark.parametrize("is_async", [True, False])
def test_the_users_own_discovery(tmp_path, is_async):
    async def run():
        async with LoopbackPeer() as one, LoopbackPeer() as other:
            listed = [make_peer("id-one", one.base_url), build_peer_json(make_peer("id-other", other.base_url))]

            async def discover_later():
                return list(listed)

            source = discover_later if is_async else lambda: list(listed)
            async with monitoring(tmp_path, custom_discovery=source) as monitor:
                one.short_health = other.short_health = HEALTH
                candidate = await until_state(monitor, PeerState.REACHABLE, "id-one")
                await until_state(monitor, PeerState.REACHABLE, "id-other")
                assert candidate.peer.via is PeerVia.CUSTOM
                del listed[0]
                await until(lambda: len(monitor.candidates()) == 1, "one is no longer listed")
                listed[:] = ["nonsense"]
                seen = len(other.requests)
                await until(lambda: len(other.requests) > seen + 5, "an error changes nothing")
                assert len(monitor.candidates()) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [
        (500, {}),
        (404, b""),
        (301, b""),
        (200, b"<html>a captive portal</html>"),
        (200, b"[" * 10_000),
        (200, b"null"),
        (200, b" " * (PEER_ANSWER_LIMIT_BYTES + 1)),
        (401, b"\xff"),
        (401, b"[]"),
    ],
)
def test_hostile_answers_make_no_peer(tmp_path, error):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, build_static_peer(peer.base_url)) as monitor:
            peer.error = error
            await until(lambda: peer.count("/v1/dvai/health") > 2, "it is asked again")
            candidate = find_candidate(monitor, device_id=peer.base_url)
            assert candidate.state is PeerState.SEEN and candidate.error
            assert build_known_peer_json(candidate)["error"]

    asyncio.run(run())


def test_hostile_lists_are_bounded(tmp_path):
    async def run():
        async with LoopbackPeer() as peer, monitoring(tmp_path, pairings=[build_pairing(peer.base_url)]) as monitor:
            peer.models = {"data": [{"id": f"m{n}"} for n in range(1000)] + [{"id": None}]}
            peer.scores = {"scores": [SCORE | {"modelId": f"m{n}", "tokPerSec": 10 ** (n % 20)} for n in range(300)]}
            candidate = await until_state(monitor, PeerState.READY)
            assert len(candidate.models) == PEER_MODELS_LIMIT
            assert 0 < len(candidate.peer.capability) <= PEER_MODELS_LIMIT
            assert max(candidate.peer.capability.values()) <= 1_000_000

    asyncio.run(run())
