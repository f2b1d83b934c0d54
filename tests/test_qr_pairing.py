"""Pairing by a code: what it says, what the two sides keep, and a relay that does all it can against it."""

import asyncio
import base64
import contextlib
import json
from dataclasses import replace

import pytest
from support_relay import start_relay
from support_rendezvous import DEADLINE_S, UNLIMITED, Middle, Party, pair, read_frame, replace_frame
from support_tunnel import until

import dvai_bridge as d

KEY = d.build_key_pair(b"\1" * 32, d.OwnBackend()).public
PAYLOAD = d.QrPayload(
    relay_url="wss://relay.example.org",
    session_id="A" * 22,
    source_key=KEY,
    device_id="D" * 22,
    device_name="Anna's laptop",
    expires_at_ms=1_790_000_000_000,
    k=b"\2" * 32,
)


def encode(members):
    return d.encode_base64url(json.dumps(members).encode())


def read_members(payload=PAYLOAD):
    return json.loads(d.parse_base64url(d.encode_qr_payload(payload)))


# -- the code --


def test_a_code_says_what_was_put_into_it():
    text = d.encode_qr_payload(PAYLOAD)
    assert d.parse_qr_payload(text) == PAYLOAD and len(text) <= 425
    assert d.parse_qr_payload(d.read_qr_text(f"  {d.build_qr_link(text)}\n")) == PAYLOAD
    assert list(read_members()) == [
        "v", "rendezvousUrl", "sessionId", "sourceEphemeralPubKey", "sourceDeviceId", "sourceDeviceName", "expiresAt",
        "k",
    ]  # fmt: skip
    assert repr(PAYLOAD.k) not in repr(PAYLOAD)


def test_a_code_without_a_secret_is_refused_with_the_reason():
    members = read_members()
    del members["k"]
    with pytest.raises(d.InvalidRequestError, match="lets the relay take part unseen"):
        d.parse_qr_payload(encode(members))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"v": 2}, "later version"),
        ({"rendezvousUrl": "ftp://x"}, "no pairing code"),
        ({"rendezvousUrl": "wss://user@x"}, "no pairing code"),
        ({"rendezvousUrl": 5}, "no pairing code"),
        ({"sessionId": ""}, "damaged"),
        ({"sessionId": 7}, "damaged"),
        ({"sourceEphemeralPubKey": d.encode_base64url(bytes(32))}, "damaged"),
        ({"sourceEphemeralPubKey": "AAAA"}, "damaged"),
        ({"sourceDeviceId": "x\n"}, "damaged"),
        ({"sourceDeviceName": None}, "damaged"),
        ({"expiresAt": "soon"}, "damaged"),
        ({"k": "AAAA"}, "damaged"),
        ({"k": None}, "no pairing code"),
    ],
)
def test_a_code_that_is_damaged_says_so(changes, complaint):
    with pytest.raises(d.InvalidRequestError, match=complaint):
        d.parse_qr_payload(encode(read_members() | changes))


@pytest.mark.parametrize("text", ["", "hello", "ä", encode([]), encode(None), encode({}), "A" * 5000])
def test_what_is_no_code_is_told_from_one(text):
    with pytest.raises(d.InvalidRequestError, match="no pairing code"):
        d.parse_qr_payload(text)


def test_a_relay_with_another_idea_of_the_session_is_found_out():
    members = read_members()
    del members["k"]
    d.verify_relay_payload(PAYLOAD, encode(members | {"rendezvousUrl": "ws://0.0.0.0:8080", "expiresAt": 1}))
    for name in ("sessionId", "sourceEphemeralPubKey", "sourceDeviceId", "sourceDeviceName"):
        with pytest.raises(d.PairingFailedError, match="tampers"):
            d.verify_relay_payload(PAYLOAD, encode(members | {name: "another"}))
    for told in ("", "?", encode([]), encode({})):
        with pytest.raises(d.PairingFailedError, match="tampers"):
            d.verify_relay_payload(PAYLOAD, told)


# -- what is kept --


def build_message(name, number, **rights):
    return d.PairMessage(
        device_id=f"{name}-device",
        name=f"{name}'s name",
        platform="linux",
        random=bytes([number]) * 32,
        identity_public=d.build_key_pair(bytes([number]) * 32, d.OwnBackend()).public,
        **({"may_serve": False, "may_use": False} | rights),
    )


def build_both(source, target):
    details = {"handshake_hash": b"h" * 32, "relay_url": "wss://relay.example.org", "now_ms": 1000}
    return d.build_met_pairing(source, target, **details), d.build_met_pairing(target, source, **details)


def test_both_sides_keep_the_two_halves_of_one_pairing():
    source, target = build_message("source", 1, may_use=True), build_message("target", 2, may_serve=True)
    ours, theirs = build_both(source, target)
    assert ours.outbound_link == theirs.inbound_link and ours.outbound_key == theirs.inbound_key is not None
    assert ours.inbound_link is ours.inbound_key is theirs.outbound_link is theirs.outbound_key is None
    keys = d.derive_pair_keys(b"h" * 32, source.random, target.random)
    link = ours.outbound_link
    assert link.pair_id == keys.pair_id and link.room == keys.build_room("target-device")
    assert (link.relay_url, link.pending_until_ms) == ("wss://relay.example.org", 1000 + d.PENDING_LIFETIME_MS)
    assert (ours.device_id, theirs.device_id) == ("target-device", "source-device")
    assert d.parse_base64url(ours.identity_key) == target.identity_public


def test_each_direction_that_both_want_has_keys_of_its_own():
    source, target = (build_message(name, n, may_use=True, may_serve=True) for n, name in enumerate("st", 1))
    ours, theirs = build_both(source, target)
    assert ours.outbound_link == theirs.inbound_link and ours.inbound_link == theirs.outbound_link
    assert ours.outbound_link.pair_id != ours.inbound_link.pair_id and ours.outbound_key != ours.inbound_key
    assert ours.outbound_link.room != ours.inbound_link.room


def test_a_pairing_by_which_nobody_may_use_anybody_is_none():
    with pytest.raises(d.PairingFailedError, match="neither"):
        build_both(build_message("source", 1, may_use=True), build_message("target", 2, may_use=True))


def test_who_says_that_it_is_this_device_or_another_is_refused():
    own, peer = build_message("own", 1), build_message("peer", 2)
    d.verify_pair_message(peer, own, "peer-device")
    for said, expected in (
        (replace(peer, device_id="own-device"), None),
        (replace(peer, identity_public=own.identity_public), None),
        (peer, "another"),
        (replace(peer, identity_public=bytes(32)), None),
    ):
        with pytest.raises(d.PairingFailedError):
            d.verify_pair_message(said, own, expected)


def test_the_relay_of_a_pairing_is_kept_with_it(tmp_path):
    party = Party(tmp_path, "keeper")
    ours, _ = build_both(build_message("source", 1, may_use=True), build_message("target", 2, may_serve=True))
    asyncio.run(party.store.add(ours))
    again = d.PairingStore(tmp_path / "keeper", device_id=party.identity.device_id)
    again.load()
    assert again.pairings == (ours,)


# -- at a real relay --


@pytest.fixture(scope="module")
def relay():
    with start_relay(**UNLIMITED) as running:
        yield running


@pytest.fixture
def parties(tmp_path):
    return Party(tmp_path, "source"), Party(tmp_path, "target")


def run_pair(relay, parties, **hostility):
    """What the two sides came to, and the relay in the middle."""

    async def run():
        async with Middle(relay.port, **hostility).run() as middle:
            return *await pair(*parties, middle.url), middle

    return asyncio.run(run())


@pytest.mark.parametrize("subprotocols", [(d.RELAY_SUBPROTOCOL,), ()], ids=["binary", "json"])
def test_two_devices_pair_and_the_relay_learns_nothing(relay, parties, subprotocols):
    source, target = parties
    ours, theirs, middle = run_pair(relay, parties, subprotocols=subprotocols)
    assert isinstance(ours, d.Pairing) and isinstance(theirs, d.Pairing), (ours, theirs)
    assert replace(ours.outbound_link, pending_until_ms=theirs.inbound_link.pending_until_ms) == theirs.inbound_link
    assert ours.outbound_link.relay_url == middle.url
    assert (source.store.pairings, target.store.pairings) == ((ours,), (theirs,))
    (question,) = source.questions
    assert question.peer_device_name == "target's name" and question.is_outgoing and len(question.code) == 6
    assert not target.questions
    link, content = ours.outbound_link, middle.content
    secrets = [link.resume_psk, link.room, d.parse_base64url(ours.outbound_key), question.code.encode()]
    secrets += [d.build_static_key(party.identity, d.OwnBackend()).public for party in parties]
    for secret in secrets:
        assert secret not in content and base64.urlsafe_b64encode(secret).rstrip(b"=") not in content
    assert b'"PAIR"' not in content and b"identityPub" not in content


def test_what_the_user_denies_is_kept_nowhere(relay, tmp_path):
    parties = Party(tmp_path, "source", answer=False), Party(tmp_path, "target")
    ours, theirs, _ = run_pair(relay, parties)
    assert isinstance(ours, d.PairingDeniedError) and "this device" in ours.message
    assert isinstance(theirs, d.PairingDeniedError) and "user of the other device" in theirs.message
    assert parties[0].store.pairings == parties[1].store.pairings == ()


def test_a_code_is_good_for_one_pairing(relay, tmp_path, parties):
    async def run():
        source, target = parties
        async with Middle(relay.port).run() as middle:
            shown = source.show(middle.url)
            showing = asyncio.create_task(shown.pair())
            await shown.is_shown.wait()
            await target.scan(shown.progress.text).pair()
            await showing
            with pytest.raises(d.PairingFailedError, match="run out or was used"):
                await Party(tmp_path, "third").scan(shown.progress.text).pair()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_a_device_does_not_scan_its_own_code(relay, parties):
    async def run():
        source, _ = parties
        async with Middle(relay.port).run() as middle:
            shown = source.show(middle.url)
            showing = asyncio.create_task(shown.pair())
            await shown.is_shown.wait()
            with pytest.raises(d.InvalidRequestError, match="own"):
                await source.scan(shown.progress.text).pair()
            await d.finish_tasks(showing)
            assert shown.progress.step is d.QrStep.FAILED

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_who_left_while_the_user_looks_is_not_paired_with(relay, tmp_path):
    async def run():
        source, target = Party(tmp_path, "source", answer=None), Party(tmp_path, "target")
        async with Middle(relay.port).run() as middle:
            shown = source.show(middle.url)
            showing = asyncio.create_task(shown.pair())
            await shown.is_shown.wait()
            scanning = asyncio.create_task(target.scan(shown.progress.text).pair())
            await until(lambda: source.questions, DEADLINE_S)
            await d.finish_tasks(scanning)
            with pytest.raises(d.BridgeError):
                await showing
            assert source.store.pairings == target.store.pairings == ()

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_other_software_without_a_data_plane_is_named(relay, parties, monkeypatch):
    monkeypatch.setattr(d, "QR_FIRST_MESSAGE_S", 0.2)
    ours, theirs, _ = run_pair(relay, parties, to_relay=drop_frames)
    assert isinstance(ours, d.PairingFailedError) and "other DVAI software" in ours.message
    assert isinstance(theirs, d.PairingFailedError)


def test_a_relay_that_is_not_there_is_named(parties):
    ours, _ = asyncio.run(pair(*parties, "ws://127.0.0.1:1"))
    assert isinstance(ours, d.PairingFailedError) and "relay cannot be reached" in ours.message


# -- a hostile relay --


def drop_frames(message, middle, number):
    return [] if read_frame(message) is not None else [message]


def change_json(**changes):
    """Changes members of the messages that have them."""

    def change(message, middle, number):
        if isinstance(message, bytes):
            return [message]
        document = json.loads(message)
        return [json.dumps(document | {name: value for name, value in changes.items() if name in document})]

    return change


def rewrite_code(message, middle, number):
    """Puts a key of its own into the payload that it hands the source."""
    if isinstance(message, bytes) or '"session-created"' not in message:
        return [message]
    document = json.loads(message)
    payload = json.loads(d.parse_base64url(document["qrPayload"]))
    payload["sourceEphemeralPubKey"] = d.encode_base64url(KEY)
    return [json.dumps(document | {"qrPayload": encode(payload)})]


def change_frames(change, first=0):
    """Does something to the outer frames from the `first` on that go through."""
    frames = {}

    def tamper(message, middle, number):
        frame = read_frame(message)
        if frame is None:
            return [message]
        count = frames[number] = frames.get(number, -1) + 1
        if count < first:
            return [message]
        return [replace_frame(message, each) for each in change(frame, count)]

    return tamper


def flip(frame, count):
    return [frame[:-1] + bytes([frame[-1] ^ 1])]


def truncate(frame, count):
    return [frame[:-1]]


def repeat(frame, count):
    return [frame, frame]


def swap_pairs():
    held = []

    def swap(frame, count):
        if held:
            return [frame, held.pop()]
        held.append(frame)
        return []

    return swap


def skip_first(first):
    return lambda frame, count: [] if count == first else [frame]


def invent(message):
    frame = read_frame(message)
    return [] if frame is None else [replace_frame(message, b"\x10" + bytes(40))]


HOSTILE = {
    "another key to the target": {"to_device": change_json(peerEphemeralPubKey=d.encode_base64url(KEY))},
    "no key": {"to_device": change_json(peerEphemeralPubKey="")},
    "another code": {"to_device": rewrite_code},
    "another name of the source": {"to_relay": change_json(deviceName="Somebody else", deviceId="somebody-else")},
    "m1 changed": {"to_relay": change_frames(flip)},
    "m1 truncated": {"to_relay": change_frames(truncate)},
    "m1 empty": {"to_relay": change_frames(lambda frame, count: [b""])},
    "PAIR changed": {"to_relay": change_frames(flip, first=2)},
    "frames truncated": {"to_relay": change_frames(truncate, first=1)},
    "frames repeated": {"to_relay": change_frames(repeat, first=1)},
    "m1 repeated": {"to_relay": change_frames(lambda frame, count: [frame, frame] if not count else [frame])},
    "frames swapped": {"to_relay": change_frames(swap_pairs(), first=1)},
    "a frame left out": {"to_relay": change_frames(skip_first(1))},
    "the answer changed": {"to_device": change_frames(flip)},
    "the answer repeated": {"to_device": change_frames(repeat)},
    "messages that are none": {"to_device": lambda message, middle, number: ["nonsense"]},
    "frames of its own": {"to_device": lambda message, middle, number: [*invent(message), message]},
}


@pytest.fixture
def impatient(monkeypatch):
    """What only waits for a relay that is not honest takes seconds."""
    monkeypatch.setattr(d, "QR_FIRST_MESSAGE_S", 3.0)
    monkeypatch.setattr(d, "CHANNEL_HANDSHAKE_DEADLINE_S", 3.0)
    monkeypatch.setattr(d, "CHANNEL_PING_INTERVAL_S", 0.5)
    monkeypatch.setattr(d, "CHANNEL_DEAD_AFTER_S", 3.0)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_relay_is_found_out_and_nothing_is_kept(relay, parties, impatient, case):
    ours, theirs, _ = run_pair(relay, parties, **HOSTILE[case])
    assert all(isinstance(outcome, d.BridgeError) for outcome in (ours, theirs)), (ours, theirs)
    told = "a message that is none" if case == "messages that are none" else "the relay, tampers: nothing was kept"
    assert told in ours.message + theirs.message, (ours, theirs)
    assert parties[0].store.pairings == parties[1].store.pairings == ()


# -- in a program --


@contextlib.asynccontextmanager
async def run_bridge(home, **offload):
    config = d.OffloadConfig(discover_lan=False, **offload)
    async with d.DVAI(environ={}, home=home, port=0, offload=config) as bridge:
        yield bridge


def test_two_programs_pair_and_one_is_answered_by_the_other(relay, tmp_path):
    async def run():
        url = f"ws://127.0.0.1:{relay.port}"
        asked = []

        def confirm(request):
            asked.append(request.code)
            return True

        source = run_bridge(tmp_path / "a", only=True, rendezvous_url=url, on_pairing_request=confirm)
        async with source as ours, run_bridge(tmp_path / "b") as theirs:
            shown = await ours.start_qr_pairing()
            assert shown.step is d.QrStep.WAITING and shown.link.endswith(shown.text)
            inbound = await theirs.complete_pair_from_qr_payload(shown.link)
            outbound = await ours.wait_qr_paired()
            assert outbound.outbound_link.pair_id == inbound.inbound_link.pair_id and len(asked) == 1
            await until(lambda: any(peer.loaded_models for peer in ours.get_peers()), DEADLINE_S)
            assert [peer.via for peer in ours.get_peers()] == [d.PeerVia.RENDEZVOUS]
            completion = ours.completion(history=[{"role": "user", "content": "Hello"}], model_id="dvai-demo")
            stats = await completion.stats
            assert (stats.route, stats.served_by) == ("relay", theirs.devices.identity.device_id)

    asyncio.run(asyncio.wait_for(run(), 2 * DEADLINE_S))


def test_a_new_code_takes_the_place_of_the_old_one(relay, tmp_path):
    async def run():
        party = Party(tmp_path, "source")
        url = f"ws://127.0.0.1:{relay.port}"
        desk = d.QrDesk(
            identity=party.identity, store=party.store, prompts=party.prompts, does_dial=True, relay_url=url
        )
        with pytest.raises(d.PairingNotFoundError):
            desk.get_shown()
        first = await desk.show()
        waiting = asyncio.create_task(desk.wait_paired())
        await asyncio.sleep(0)
        second = await desk.show()
        assert first.session_id != second.session_id and desk.get_shown() == second
        with pytest.raises(d.PairingFailedError, match="took its place"):
            await waiting
        with pytest.raises(d.PairingFailedError, match="run out or was used"):
            await Party(tmp_path, "target").scan(first.text).pair()
        await desk.close()
        assert desk.get_shown().step is d.QrStep.FAILED and "qrPayload" not in str(
            d.build_qr_progress_json(desk.get_shown())
        )

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_without_offload_or_a_relay_no_code_is_shown(tmp_path):
    async def run():
        party = Party(tmp_path, "source")
        parts = {"identity": party.identity, "store": party.store, "prompts": party.prompts}
        with pytest.raises(d.PairingDisabledError, match="--offload"):
            await d.QrDesk(**parts, does_dial=False, relay_url="ws://127.0.0.1:1").show()
        with pytest.raises(d.InvalidRequestError, match="--rendezvous-url"):
            await d.QrDesk(**parts, does_dial=True, relay_url=None).show()
        with pytest.raises(d.PairingDisabledError):
            await d.QrDesk(**parts | {"store": None}, does_dial=True, relay_url="ws://127.0.0.1:1").show()

    asyncio.run(run())
