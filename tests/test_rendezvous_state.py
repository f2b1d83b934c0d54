"""The relay's pure core: what each message does, as tables of (what was said, who is told what)."""

import base64
import hmac
import itertools
import json
import random

import pytest

import rendezvous_server as relay
from rendezvous_server import Close, ErrorCode, Join, Part, Send, Settings

ROOM, OTHER_ROOM = "A" * 22, "B" * 21 + "A"
PROVIDER_SECRET = bytes.fromhex("01" * 32)
PROVIDER_KEY = "pOCSkrZRwni5dyxWn1-puxPZBrRqtoyd-dwrRAn4ogk"
PROVIDER_ADDRESS = "-FskAbWymDfHmbmW_au78A"
PEER = {"deviceId": "dev", "deviceName": "Device", "capability": {"m": 10.5}, "ephemeralPubKey": "key"}


class Table:
    """A relay state with a hand-turned clock and predictable random bytes."""

    def __init__(self, **settings):
        counter = itertools.count(1)
        self.now = 1000.0
        self.settings = Settings(**{"relay_url": "wss://relay.example.org"} | settings)
        self.state = relay.RelayState(self.settings, lambda n: next(counter).to_bytes(n, "big"), 1_790_000_000 - 1000)

    def connect(self, address="192.0.2.1", **options):
        return self.state.connect(address, self.now, **options)

    def say(self, client, kind, **fields):
        return self.state.handle(client, {"type": kind, **fields}, self.now)

    def expire(self, used_at=None):
        return self.state.expire(self.now, lambda session_id: (used_at or {}).get(session_id, float("-inf")))

    def pair(self):
        """Source and target of a joined session, as existing apps open it, and its id."""
        source, target = self.connect(), self.connect("192.0.2.2")
        session_id = self.say(source, "pair-source", **PEER)[0].message["sessionId"]
        self.say(target, "pair-target", sessionId=session_id, **PEER)
        return source, target, session_id

    def dial(self, room=ROOM, **options):
        """Dialer and listener of a joined session in a room, and its id."""
        dialer, listener = self.connect(**options), self.connect("192.0.2.2", **options)
        self.say(listener, "listen", v=1, room=room)
        return dialer, listener, self.say(dialer, "dial", v=1, room=room)[0].message["sessionId"]


@pytest.fixture
def table():
    return Table()


def find_error(actions):
    """The code of the one error told, and whether it closes the socket."""
    errors = [a.message["code"] for a in actions if isinstance(a, Send) and a.message["type"] == "error"]
    assert len(errors) == 1, actions
    closes = [a for a in actions if isinstance(a, Close)]
    assert not closes or closes[0].reason == errors[0]
    return errors[0], bool(closes)


def find_messages(actions, client):
    return [a.message for a in actions if isinstance(a, Send) and a.client == client]


# Pairing, as existing apps do it


def test_a_source_gets_a_code_to_show(table):
    source = table.connect()
    (created,) = find_messages(table.say(source, "pair-source", **PEER), source)
    assert created["type"] == "session-created" and created["expiresAt"] == 1_790_000_120_000
    payload = json.loads(base64.urlsafe_b64decode(created["qrPayload"] + "=="))
    assert payload == {
        "v": 1,
        "rendezvousUrl": "wss://relay.example.org",
        "sessionId": created["sessionId"],
        "sourceEphemeralPubKey": "key",
        "sourceDeviceId": "dev",
        "sourceDeviceName": "Device",
        "expiresAt": 1_790_000_120_000,
    }


def test_a_target_joins_and_both_learn_of_each_other(table):
    source, target = table.connect(), table.connect()
    session_id = table.say(source, "pair-source", **PEER)[0].message["sessionId"]
    theirs = {"deviceId": "t", "deviceName": "Target", "capability": {}, "ephemeralPubKey": "key2"}
    actions = table.say(target, "pair-target", sessionId=session_id, **theirs)
    assert find_messages(actions, source) == [
        {
            "type": "peer-connected",
            "peerEphemeralPubKey": "key2",
            "peerDeviceId": "t",
            "peerDeviceName": "Target",
            "peerCapability": {},
        }
    ]
    assert find_messages(actions, target)[0]["peerCapability"] == {"m": 10.5}
    join = actions[-1]
    assert isinstance(join, Join) and join.session_id == session_id
    assert [(e.client, e.role.value, e.tag, e.has_session_id) for e in join.ends] == [
        (source, "source", None, False),
        (target, "target", None, False),
    ]


def test_fields_that_existing_apps_may_leave_out(table):
    source = table.connect()
    actions = table.say(source, "pair-source", deviceId="d", ephemeralPubKey="k", unknown=[1])
    assert actions[0].message["type"] == "session-created"


@pytest.mark.parametrize("how", ["unknown", "expired", "taken", "own", "left"])
def test_sessions_that_cannot_be_joined(table, how):
    source, target = table.connect(), table.connect()
    session_id = table.say(source, "pair-source", **PEER)[0].message["sessionId"]
    if how == "unknown":
        session_id = "x" * 22
    elif how == "expired":
        table.now += 121
        assert Close(source, 1000, "session expired") in table.expire()
    elif how == "taken":
        table.say(table.connect(), "pair-target", sessionId=session_id, **PEER)
    elif how == "own":
        target = source
    elif how == "left":
        table.state.disconnect(source, table.now)
    assert find_error(table.say(target, "pair-target", sessionId=session_id, **PEER)) == ("session_join_failed", True)


def test_a_peer_that_goes_leaves_the_other_until_it_expires(table):
    source, target, session_id = table.pair()
    gone = {"type": "peer-disconnected", "reason": "peer closed connection"}
    assert table.state.disconnect(source, table.now) == [Send(target, gone, session_id), Part(session_id)]
    assert find_error(table.say(target, "relay", sessionId=session_id, payload="")) == ("peer_not_connected", False)
    table.now += 61
    assert Close(target, 1000, "session expired") in table.expire()
    assert len(table.state.sessions) == 0


def test_a_new_session_on_a_socket_ends_the_old_one(table):
    source, target, session_id = table.pair()
    actions = table.say(source, "pair-source", **PEER)
    assert find_messages(actions, target)[0]["type"] == "peer-disconnected" and Part(session_id) in actions
    assert find_messages(actions, source)[0]["type"] == "session-created"


def test_relay_without_a_way(table):
    source = table.connect()
    session_id = table.say(source, "pair-source", **PEER)[0].message["sessionId"]
    say = {"sessionId": session_id, "payload": "AA"}
    assert find_error(table.say(source, "relay", **say)) == ("peer_not_connected", False)
    assert find_error(table.say(table.connect(), "relay", **say)) == ("session_mismatch", False)
    assert find_error(table.say(source, "relay", sessionId="?", payload="")) == ("session_mismatch", False)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("[]", "malformed_message"),
        ("null", "malformed_message"),
        ("{}", "malformed_message"),
        ('{"type":7}', "malformed_message"),
        ("{", "malformed_json"),
        ("", "malformed_json"),
        ("[" * 90_000, "malformed_json"),
        ('{"type":"ping","n":' + "9" * 5000 + "}", "malformed_json"),
        ('{"type":"ping","n":1e999}', "malformed_json"),
        ('{"type":"ping","n":NaN}', "malformed_json"),
        ('{"type":"ping","type":"ping"}', "malformed_json"),
        ('{"type":"ping","n":"\\ud800"}', "malformed_json"),
    ],
)
def test_texts_that_are_no_message(message, code):
    with pytest.raises(relay.Refusal) as raised:
        relay.parse_control(message)
    assert (raised.value.code.value, raised.value.is_closing) == (code, True)


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        ("nonsense", {}, "unknown_message_type"),
        ("challenge", {}, "unknown_message_type"),
        ("pair-source", {}, "malformed_message"),
        ("pair-source", PEER | {"deviceId": 7}, "malformed_message"),
        ("pair-source", PEER | {"capability": []}, "malformed_message"),
        ("pair-source", PEER | {"deviceName": "x" * 257}, "malformed_message"),
        ("pair-target", PEER, "malformed_message"),
        ("relay", {"sessionId": "x", "payload": 7}, "malformed_message"),
        ("relay", {"payload": ""}, "malformed_message"),
        ("listen", {"room": ROOM}, "malformed_message"),
        ("listen", {"v": 2, "room": ROOM}, "malformed_message"),
        ("listen", {"v": True, "room": ROOM}, "malformed_message"),
        ("listen", {"v": 1}, "malformed_message"),
        ("listen", {"v": 1, "room": ROOM, "publicKey": PROVIDER_KEY}, "malformed_message"),
        ("listen", {"v": 1, "room": ROOM + "=="}, "malformed_message"),
        ("listen", {"v": 1, "room": "A" * 21 + "B"}, "malformed_message"),
        ("listen", {"v": 1, "room": "A" * 43}, "malformed_message"),
        ("dial", {"v": 1, "provider": "short"}, "malformed_message"),
        ("proof", {"mac": "x"}, "malformed_message"),
        ("hangup", {"reason": "x"}, "malformed_message"),
        ("hangup", {"sessionId": "x", "reason": "x" * 129}, "malformed_message"),
    ],
)
def test_messages_that_close_the_socket(table, kind, fields, code):
    assert find_error(table.say(table.connect(), kind, **fields)) == (code, True)


def test_a_capability_too_large_to_keep(table):
    crowd = PEER | {"capability": {f"model-{n}": n for n in range(400)}}
    assert find_error(table.say(table.connect(), "pair-source", **crowd)) == ("message_too_large", False)


# Rooms and addresses


def test_a_room_leads_to_its_listener(table):
    dialer, listener, session_id = table.dial()
    again = table.say(dialer, "dial", v=1, room=ROOM)
    second = again[0].message["sessionId"]
    assert second != session_id
    assert find_messages(again, dialer) == [{"type": "dialed", "sessionId": second, "room": ROOM}]
    assert find_messages(again, listener) == [{"type": "incoming", "sessionId": second, "room": ROOM}]
    assert [(e.client, e.role.value, e.has_session_id) for e in again[-1].ends] == [
        (dialer, "source", True),
        (listener, "target", True),
    ]


def test_tags_count_up_on_each_binary_socket(table):
    dialer, listener, _ = table.dial(is_binary=True)
    other = table.connect(is_binary=True)
    actions = table.say(other, "dial", v=1, room=ROOM)
    assert find_messages(actions, other)[0]["tag"] == 1
    assert find_messages(actions, listener)[0]["tag"] == 2
    assert [end.tag for end in actions[-1].ends] == [1, 2]
    assert table.state.explain_tag(listener, 2) == []  # of a session that has ended
    assert find_error(table.state.explain_tag(listener, 3)) == ("session_mismatch", False)
    assert find_error(table.state.explain_tag(listener, 0)) == ("session_mismatch", False)
    assert find_error(table.state.explain_tag(dialer, None)) == ("malformed_message", True)


def test_nobody_listens(table):
    client = table.connect()
    actions = table.say(client, "dial", v=1, room=ROOM)
    assert find_error(actions) == ("not_listening", False) and actions[0].message["room"] == ROOM
    table.say(client, "listen", v=1, room=ROOM)
    assert find_error(table.say(client, "dial", v=1, room=ROOM)) == ("not_listening", False)  # itself
    assert find_error(table.say(client, "dial", v=1, provider=ROOM)) == ("not_listening", False)  # another table


def test_a_second_listener_takes_over_and_sessions_stay(table):
    dialer, first, session_id = table.dial()
    second = table.connect()
    actions = table.say(second, "listen", v=1, room=ROOM)
    assert actions == [
        Send(first, {"type": "unlistened", "room": ROOM}),
        Send(second, {"type": "listening", "room": ROOM}),
    ]
    assert table.state.sessions.get(session_id)
    assert find_messages(table.say(dialer, "dial", v=1, room=ROOM), second)
    table.state.disconnect(first, table.now)
    assert find_messages(table.say(dialer, "dial", v=1, room=ROOM), second)
    table.state.disconnect(second, table.now)
    assert find_error(table.say(dialer, "dial", v=1, room=ROOM)) == ("not_listening", False)


def test_listening_again_changes_nothing(table):
    client = table.connect()
    for _ in range(2):
        assert table.say(client, "listen", v=1, room=ROOM) == [Send(client, {"type": "listening", "room": ROOM})]
    assert table.state.listeners_count == 1


@pytest.mark.parametrize("who", ["dialer", "listener"])
def test_either_end_hangs_up(table, who):
    dialer, listener, session_id = table.dial()
    leaving, other = (dialer, listener) if who == "dialer" else (listener, dialer)
    hangup = {"type": "hangup", "sessionId": session_id, "reason": "done"}
    actions = table.say(leaving, "hangup", sessionId=session_id, reason="done")
    assert actions == [Send(other, hangup, session_id), Part(session_id)]
    late = {"sessionId": session_id, "payload": "AA"}
    assert find_error(table.say(other, "relay", **late)) == ("session_not_found", False)
    assert table.say(other, "relay", **late) == []  # told once
    assert find_error(table.say(table.connect(), "hangup", sessionId=session_id)) == ("session_mismatch", False)


def test_a_session_of_others_cannot_be_hung_up(table):
    _, _, session_id = table.dial()
    assert find_error(table.say(table.connect(), "hangup", sessionId=session_id)) == ("session_mismatch", False)
    assert table.state.sessions.get(session_id)


def test_a_hangup_towards_an_existing_app(table):
    source, target, session_id = table.pair()
    actions = table.say(source, "hangup", sessionId=session_id, reason="done")
    assert find_messages(actions, target) == [{"type": "peer-disconnected", "reason": "done"}]


def test_a_socket_that_goes_ends_its_sessions(table):
    dialer, listener, first = table.dial()
    second = table.say(dialer, "dial", v=1, room=ROOM)[0].message["sessionId"]
    actions = table.state.disconnect(dialer, table.now)
    assert [m["sessionId"] for m in find_messages(actions, listener)] == [first, second]
    assert all(m["type"] == "hangup" for m in find_messages(actions, listener))
    assert len(table.state.sessions) == 0 and table.state.clients_count == 1


def test_a_stalled_session_ends_and_others_stay(table):
    dialer, listener, first = table.dial()
    second = table.say(dialer, "dial", v=1, room=ROOM)[0].message["sessionId"]
    actions = table.state.stall(first, dialer, ErrorCode.SESSION_STALLED, table.now)
    assert find_error(actions) == ("session_stalled", False)
    assert find_messages(actions, listener) == [{"type": "hangup", "sessionId": first, "reason": "session_stalled"}]
    assert Part(first, is_discarded=True) in actions
    assert not table.state.sessions.get(first) and table.state.sessions.get(second)
    assert table.state.stall(first, dialer, ErrorCode.SESSION_STALLED, table.now) == []


# The proof


def compute_proof(challenge, host_port="relay.example.org:443", secret=PROVIDER_SECRET):
    ephemeral, nonce = (base64.urlsafe_b64decode(challenge[name] + "=") for name in ("ephemeralPubKey", "nonce"))
    public_key = relay.compute_x25519_public(secret)
    info = ephemeral + public_key + host_port.encode()
    key = relay.compute_hkdf(b"dvai-relay-proof/1", relay.compute_x25519(secret, ephemeral), info, 32)
    mac = hmac.digest(key, nonce + relay.build_provider_address(public_key), "sha256")
    return base64.urlsafe_b64encode(mac).decode().rstrip("=")


def test_the_proof_is_the_published_one():
    challenge = relay.build_challenge(
        relay.parse_base64url(PROVIDER_KEY), "relay.example.org:443", bytes.fromhex("09" * 32), bytes.fromhex("11" * 32)
    )
    assert relay.encode_base64url(challenge.ephemeral_public) == "V9tLNZ8jrl4Ubk4lEgVnBHIlBjSMFQwUdT0Mkz0E1CE"
    assert relay.encode_base64url(challenge.expected_mac) == "PbHp5A_JB40n00EmlPD8OlGD-CLR9RzaN4zZEDBPEkI"
    assert relay.encode_base64url(challenge.address) == PROVIDER_ADDRESS
    assert "expected_mac" not in repr(challenge)


def test_who_proves_a_key_listens_on_its_address(table):
    provider, dialer = table.connect(), table.connect()
    (challenge,) = find_messages(table.say(provider, "listen", v=1, publicKey=PROVIDER_KEY), provider)
    assert find_error(table.say(dialer, "dial", v=1, provider=PROVIDER_ADDRESS)) == ("not_listening", False)
    (listening,) = find_messages(table.say(provider, "proof", mac=compute_proof(challenge)), provider)
    assert listening == {"type": "listening", "provider": PROVIDER_ADDRESS}
    actions = table.say(dialer, "dial", v=1, provider=PROVIDER_ADDRESS)
    assert find_messages(actions, provider)[0]["provider"] == PROVIDER_ADDRESS
    assert find_error(table.say(dialer, "dial", v=1, room=PROVIDER_ADDRESS)) == ("not_listening", False)


@pytest.mark.parametrize("fault", ["mac", "other relay", "other key", "nothing asked", "twice", "after another listen"])
def test_proofs_that_fail(table, fault):
    provider = table.connect()
    challenge = table.say(provider, "listen", v=1, publicKey=PROVIDER_KEY)[0].message
    mac = compute_proof(challenge)
    if fault == "mac":
        mac = mac[:-2] + ("A" if mac[-2] != "A" else "B") + mac[-1]
    elif fault == "other relay":
        mac = compute_proof(challenge, "relay.example.org:8443")
    elif fault == "other key":
        mac = compute_proof(challenge, secret=bytes.fromhex("05" * 32))
    elif fault == "nothing asked":
        provider = table.connect()
    elif fault == "twice":
        table.say(provider, "proof", mac="A" * 43)
    else:
        table.say(provider, "listen", v=1, publicKey=PROVIDER_KEY)
    assert find_error(table.say(provider, "proof", mac=mac)) == ("proof_failed", False)
    assert table.state.listeners_count == 0


@pytest.mark.parametrize("key", [b"\0" * 32, b"\1" + b"\0" * 31, b"\xff" * 32])
def test_keys_that_prove_nothing(table, key):
    actions = table.say(table.connect(), "listen", v=1, publicKey=relay.encode_base64url(key))
    assert find_error(actions) == ("proof_failed", False)


def test_a_relay_that_does_not_know_its_name():
    table = Table(relay_url="")
    actions = table.say(table.connect(), "listen", v=1, publicKey=PROVIDER_KEY)
    assert find_error(actions) == ("relay_name_unset", False)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("wss://Relay.Example.org", "relay.example.org:443"),
        ("wss://relay.example.org:8443/x", "relay.example.org:8443"),
        ("ws://relay", "relay:80"),
        ("ws://[2001:DB8::1]", "[2001:db8::1]:80"),
    ],
)
def test_the_name_of_a_relay(url, name):
    assert relay.parse_relay_name(url) == name


# Limits


def test_ten_thousand_sessions_and_one_more():
    table = Table(sessions_per_address=0, sessions_per_address_per_minute=0)
    clients = [table.connect() for _ in range(10_001)]
    for client in clients[:-1]:
        assert table.say(client, "pair-source", **PEER)[0].message["type"] == "session-created"
    assert find_error(table.say(clients[-1], "pair-source", **PEER)) == ("server_at_capacity", True)
    listener = table.connect()
    table.say(listener, "listen", v=1, room=ROOM)
    assert find_error(table.say(table.connect(), "dial", v=1, room=ROOM)) == ("server_at_capacity", False)
    table.state.disconnect(clients[0], table.now)
    assert find_messages(table.say(table.connect(), "dial", v=1, room=ROOM), listener)
    table.now += 121
    assert sum(isinstance(action, Close) for action in table.expire()) == 9_999


def test_sessions_per_address():
    table = Table(sessions_per_address=3, sessions_per_address_per_minute=0)
    clients = [table.connect() for _ in range(4)]
    answers = [table.say(client, "pair-source", **PEER) for client in clients]
    assert [a[0].message["type"] for a in answers[:3]] == ["session-created"] * 3
    assert find_error(answers[3]) == ("rate_limited", False)
    assert table.say(table.connect("192.0.2.9"), "pair-source", **PEER)[0].message["type"] == "session-created"
    table.state.disconnect(clients[0], table.now)
    assert table.say(clients[3], "pair-source", **PEER)[0].message["type"] == "session-created"


def test_new_sessions_per_address_and_minute():
    table = Table(sessions_per_address=0)
    client = table.connect()
    for _ in range(10):
        assert table.say(client, "pair-source", **PEER)[-1].message["type"] == "session-created"
    assert find_error(table.say(client, "pair-source", **PEER)) == ("rate_limited", False)
    table.state.disconnect(client, table.now)
    table.state.forget_addresses(table.now)
    client = table.connect()  # coming anew does not help
    assert find_error(table.say(client, "pair-source", **PEER)) == ("rate_limited", False)
    assert table.say(client, "listen", v=1, room=ROOM)[0].message["type"] == "listening"  # which is no session
    table.now += 6
    assert table.say(client, "pair-source", **PEER)[-1].message["type"] == "session-created"
    table.state.disconnect(client, table.now)
    table.now += 61
    table.state.forget_addresses(table.now)
    assert table.state._addresses == {}


def test_connections_per_address():
    table = Table(sessions_per_address=20)
    for _ in range(79):
        table.connect()
    assert not table.state.is_address_full("192.0.2.1")
    table.connect()
    assert table.state.is_address_full("192.0.2.1") and not table.state.is_address_full("192.0.2.2")


def test_floods_of_messages(table):
    client = table.connect()
    answers = [table.say(client, "ping")[0] for _ in range(61)]
    assert [a.message["type"] for a in answers] == ["pong"] * 60 + ["error"]
    assert answers[-1].message["code"] == "rate_limited" and all(a.is_optional for a in answers)
    table.now += 1
    assert table.say(client, "ping")[0].message["type"] == "pong"


def test_rooms_per_socket(table):
    client = table.connect()
    for n in range(257):
        table.now += 1
        actions = table.say(client, "listen", v=1, room=relay.encode_base64url(n.to_bytes(16, "big")))
    assert find_error(actions) == ("rate_limited", False) and table.state.listeners_count == 256


def test_sessions_per_socket():
    table = Table(sessions_per_address=0, sessions_per_address_per_minute=0)
    dialer, _, _ = table.dial()
    for _ in range(256):
        table.now += 1
        actions = table.say(dialer, "dial", v=1, room=ROOM)
    assert find_error(actions) == ("rate_limited", False) and len(table.state.sessions) == 256


def test_challenges_of_one_address_and_of_all(table):
    def ask(address):
        return table.say(table.connect(address), "listen", v=1, publicKey=PROVIDER_KEY)

    answers = [ask("192.0.2.1") for _ in range(21)] + [ask(f"198.51.100.{n}") for n in range(31)]
    kinds = [answer[0].message["type"] for answer in answers]
    assert kinds == ["challenge"] * 20 + ["error"] + ["challenge"] * 30 + ["error"]
    assert find_error(answers[-1]) == ("rate_limited", False)


# Time


def test_a_session_lives_by_frames_and_pings(table):
    source, target, session_id = table.pair()
    table.now += 50
    assert table.expire() == []
    table.now += 11
    assert table.expire({session_id: table.now - 5}) == []  # a frame
    table.now += 61
    table.say(target, "ping")
    assert table.expire() == []
    table.now += 61
    table.state.touch(source, table.now - 1)  # a ping of WebSocket
    assert table.expire() == []
    table.now += 61
    actions = table.expire()
    assert {a for a in actions if isinstance(a, Close)} == {
        Close(source, 1000, "session expired"),
        Close(target, 1000, "session expired"),
    }
    assert Part(session_id) in actions and len(table.state.sessions) == 0


def test_an_idle_session_on_a_socket_with_many_leaves_the_socket(table):
    dialer, listener, session_id = table.dial()
    table.now += 61
    hangup = {"type": "hangup", "sessionId": session_id, "reason": "session expired"}
    assert table.expire() == [Send(dialer, hangup, session_id), Send(listener, hangup, session_id), Part(session_id)]


def test_pings_do_not_keep_a_session_that_nobody_joins(table):
    source = table.connect()
    table.say(source, "pair-source", **PEER)
    for _ in range(11):
        table.now += 10
        table.say(source, "ping")
        assert table.expire() == []
    table.now += 10
    assert table.expire()[0] == Close(source, 1000, "session expired")


def test_only_what_is_due_is_looked_at(table):
    first = table.connect()
    table.say(first, "pair-source", **PEER)
    table.now += 60
    table.pair()
    table.now += 60
    due = table.state.sessions.find_due(table.now)
    assert [session.state.name for session in due] == ["WAITING", "JOINED"]


def test_a_stop_sends_idle_clients_away_and_others_when_they_are_done(table):
    source, target, _ = table.pair()
    dialer, listener, session_id = table.dial(OTHER_ROOM)
    idle = table.connect()
    actions = table.state.stop()
    assert [(a.client, a.code) for a in actions] == [(idle, 1012)]
    assert find_error(table.say(source, "pair-source", **PEER)) == ("server_at_capacity", True)
    assert find_error(table.say(idle, "dial", v=1, room=OTHER_ROOM)) == ("not_listening", False)
    actions = table.say(dialer, "hangup", sessionId=session_id)
    assert {a.client for a in actions if isinstance(a, Close)} == {dialer, listener}
    assert [a for a in table.state.disconnect(target, table.now) if isinstance(a, Close)] == []


# Whatever happens


class Walk(Table):
    """Clients that say anything at any time; the invariants of the core hold after every step."""

    def __init__(self, seed):
        super().__init__(max_sessions=12, sessions_per_address=6, sessions_per_address_per_minute=0)
        self.random = random.Random(seed)
        self.clients: set[int] = set()
        self.joined: dict[str, set[int]] = {}
        self.known = ["nonsense"]

    def step(self):
        choose = self.random.choice
        self.now += choose((0, 0, 0.1, 1, 30))
        if not self.clients or self.random.random() < 0.1:
            self.clients.add(self.connect(f"192.0.2.{self.random.randrange(4)}", is_binary=choose((False, True))))
            return
        client = choose(sorted(self.clients))
        room, session_id = relay.encode_base64url(bytes([self.random.randrange(4)] * 16)), choose(self.known[-6:])
        name, act = choose(
            [
                ("leave", lambda: self.state.disconnect(client, self.now)),
                ("expire", self.expire),
                ("stall", lambda: self.stall(session_id)),
                *[("say", lambda: self.say(client, "pair-source", **PEER))] * 2,
                *[("say", lambda: self.say(client, "pair-target", sessionId=session_id, **PEER))] * 3,
                *[("say", lambda: self.say(client, "listen", v=1, room=room))] * 2,
                *[("say", lambda: self.say(client, "dial", v=1, room=room))] * 3,
                ("say", lambda: self.say(client, "hangup", sessionId=session_id)),
                ("say", lambda: self.say(client, "relay", sessionId=session_id, payload="")),
                ("say", lambda: self.say(client, "ping")),
            ]
        )
        if name == "leave":
            self.clients.remove(client)
        self.obey(act())
        self.verify()

    def stall(self, session_id):
        session = self.state.sessions.get(session_id)
        if session is None or session.state is not relay.SessionState.JOINED:
            return []
        return self.state.stall(session_id, session.source, ErrorCode.SESSION_STALLED, self.now)

    def obey(self, actions):
        for action in actions:
            if isinstance(action, Join):
                assert action.session_id not in self.joined
                self.joined[action.session_id] = {end.client for end in action.ends}
                assert len(self.joined[action.session_id]) == 2
            elif isinstance(action, Part):
                self.joined.pop(action.session_id, None)
            elif isinstance(action, Close):
                if action.client in self.clients:
                    self.clients.remove(action.client)
                    self.obey(self.state.disconnect(action.client, self.now))
            else:
                self.known.append(action.message.get("sessionId", "nonsense"))

    def verify(self):
        state, sessions = self.state, {}
        assert set(state._clients) == self.clients
        for client in state._clients.values():
            for session in client.sessions:
                assert client.id in (session.source, session.target)
                assert state.sessions.get(session.id) is session
                sessions[session.id] = session
            for kind, key in client.listens:
                assert state._listeners[kind][key] == client.id
        assert len(sessions) == len(state.sessions) <= 12
        assert state.listeners_count == sum(len(client.listens) for client in state._clients.values())
        joined = {s.id: {s.source, s.target} for s in sessions.values() if s.state is relay.SessionState.JOINED}
        assert joined == self.joined
        for session in sessions.values():
            assert (session.offer is not None) == (session.state is relay.SessionState.WAITING)
            assert (session.source is None) + (session.target is None) == (session.state.name != "JOINED")
        for address, use in state._addresses.items():
            assert use.sessions == sum(session.address == address for session in sessions.values()) <= 6
            assert use.connections == sum(client.address == address for client in state._clients.values())


@pytest.mark.parametrize("seed", range(20))
def test_invariants_hold_on_every_walk(seed):
    walk = Walk(seed)
    for _ in range(500):
        walk.step()
    for client in sorted(walk.clients):
        walk.clients.discard(client)
        if client in walk.state._clients:
            walk.obey(walk.state.disconnect(client, walk.now))
    assert len(walk.state.sessions) == walk.state.listeners_count == 0 and walk.joined == {}


# What the edge asks


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("192.0.2.7", "", "192.0.2.7"),
        ("192.0.2.7", "203.0.113.1", "192.0.2.7"),  # not a proxy of ours
        ("10.0.0.1", "203.0.113.1", "203.0.113.1"),
        ("10.0.0.1", "1.1.1.1, 203.0.113.1", "203.0.113.1"),  # what the client wrote itself stands first
        ("10.0.0.1", "203.0.113.1, 10.0.0.2", "203.0.113.1"),
        ("10.0.0.1", "203.0.113.1:4711", "203.0.113.1"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.1, nonsense", "10.0.0.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("::ffff:10.0.0.1", "203.0.113.1", "203.0.113.1"),
        ("2001:db8:1:2:3:4:5:6", "", "2001:db8:1:2::/64"),
        ("10.0.0.1", "[2001:db8:1:2::9]:80", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "", "fe80::/64"),
        ("10.0.0.1", "::ffff:203.0.113.1", "203.0.113.1"),
    ],
)
def test_whom_a_connection_counts_against(peer, forwarded, expected):
    assert relay.find_client_address(peer, forwarded, relay.parse_networks("10.0.0.0/8")) == expected


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\x00\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /" + b"x" * 8192 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 8192 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 100 + b"\r\n", 431),
    ],
)
def test_heads_that_are_refused(head, status):
    with pytest.raises(relay.HttpError) as raised:
        relay.parse_request_head(head)
    assert raised.value.status == status


def test_heads_that_never_end():
    assert relay.find_head_end(b"GET / HTTP/1.1\r\n") == 0
    for data, status in ((b"x" * 8193, 414), (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 6000, 431)):
        with pytest.raises(relay.HttpError) as raised:
            relay.find_head_end(data)
        assert raised.value.status == status


def build_settings(flags=(), **environ):
    parsed = vars(relay.build_parser().parse_args(flags))
    return relay.build_settings({name: text for name, text in parsed.items() if text is not None}, environ)


def test_settings_of_environment_and_flags():
    settings = build_settings(
        PORT="9000", HOST="::1", METRICS_ENABLED="1", LOG_LEVEL="warn", TRUSTED_PROXIES="10.1.2.3"
    )
    assert (settings.port, settings.host, settings.has_metrics, settings.log_level) == (9000, "::1", True, 30)
    assert build_settings(["--port", "9001"], PORT="9000").port == 9001
    assert build_settings(RENDEZVOUS_URL="https://x.org").relay_url == "wss://x.org"
    assert build_settings(PORT="").port == 8080
    assert "secret" not in repr(build_settings(RELAY_TOKENS="secret"))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"PORT": "65536"}, "PORT"),
        ({"PORT": "５"}, "PORT"),
        ({"SESSION_TTL_SECONDS": "0"}, "SESSION_TTL_SECONDS"),
        ({"MAX_SESSIONS": "1e4"}, "MAX_SESSIONS"),
        ({"RENDEZVOUS_URL": "relay.example.org"}, "RENDEZVOUS_URL"),
        ({"RENDEZVOUS_URL": "wss://u:p@relay.example.org"}, "RENDEZVOUS_URL"),
        ({"RENDEZVOUS_URL": "wss://relay.example.org:99999"}, "RENDEZVOUS_URL"),
        ({"ALLOWED_ORIGINS": "example.org"}, "ALLOWED_ORIGINS"),
        ({"TRUSTED_PROXIES": "10.0.0.1/8"}, "TRUSTED_PROXIES"),
        ({"LOG_LEVEL": "loud"}, "LOG_LEVEL"),
        ({"RELAY_TOKENS": "a,,b"}, "RELAY_TOKENS"),
        ({"TLS_CERT_FILE": "x"}, "TLS_KEY_FILE"),
        ({"REDIS_URL": "http://x"}, "REDIS_URL"),
        ({"REDIS_URL": "redis://"}, "REDIS_URL"),
        ({"REDIS_URL": "redis://x:99999"}, "REDIS_URL"),
        ({"REDIS_URL": "unix://"}, "REDIS_URL"),
    ],
)
def test_settings_that_are_wrong_are_named(environ, named):
    with pytest.raises(relay.SettingsError) as raised:
        build_settings(**environ)
    assert named in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("environ", [{"RELAY_TOKENS": "hunter2,"}, {"REDIS_URL": "rediss://:hunter2@redis:port"}])
def test_secrets_that_are_wrong_are_not_shown(environ):
    with pytest.raises(relay.SettingsError) as raised:
        build_settings(**environ)
    assert "hunter2" not in str(raised.value)


def test_a_password_of_redis_is_not_shown():
    assert "hunter2" not in repr(build_settings(REDIS_URL="redis://:hunter2@redis/1"))


def test_metrics_are_prometheus(table):
    table.pair()
    text = relay.build_metrics(table.state, relay.Counters(errors={"rate_limited": 2}), uptime_s=5, queued_bytes=7)
    assert "\nrendezvous_active_sessions 1\n" in text and "\nrendezvous_uptime_seconds 5\n" in text
    assert '\nrendezvous_errors_total{code="rate_limited"} 2\n' in text
    assert "\nrendezvous_queued_bytes 7\n" in text
    assert "redis" not in text


@pytest.mark.parametrize(("processes", "up", "count", "sessions"), [({"a": 2, "b": 1}, 1, 2, 3), ({}, 0, 1, 0)])
def test_metrics_of_several_processes(table, processes, up, count, sessions):
    text = relay.build_metrics(table.state, relay.Counters(), uptime_s=5, queued_bytes=7, processes=processes)
    assert f"\nrendezvous_redis_up {up}\n" in text and f"\nrendezvous_relay_processes {count}\n" in text
    assert f"\nrendezvous_all_sessions {sessions}\n" in text
