"""The relay's pure core where several processes are one: two states that say to each other what they decide to say."""

import itertools

import pytest

import rendezvous_server as relay
from rendezvous_server import Answer, Ask, Close, Join, Part, Send, Settings, Verdict

ROOM = "A" * 22
KEY = "pOCSkrZRwni5dyxWn1-puxPZBrRqtoyd-dwrRAn4ogk"
PEER = {"deviceId": "dev", "deviceName": "Device", "capability": {"m": 10.5}, "ephemeralPubKey": "key"}
ADDRESSES = {"one": "192.0.2.1", "two": "192.0.2.2"}


class Pair:
    """Two processes, `one` and `two`, with a hand-turned clock. What each says to the other waits in `post`."""

    def __init__(self, **settings):
        self.now = 1000.0
        settings = Settings(**{"relay_url": "wss://relay.example.org"} | settings)
        self.states = {}
        for index, name in enumerate(ADDRESSES):
            counter = itertools.count(1 + index * 2**32)
            random = lambda n, counter=counter: next(counter).to_bytes(n, "big")  # noqa: E731
            self.states[name] = relay.SharedState(settings, random, 1_790_000_000 - 1000)
            assert self.states[name].attach(name) == []
        self.post = []

    def connect(self, name, **options):
        return self.states[name].connect(ADDRESSES[name], self.now, **options)

    def take(self, name, actions):
        """What is left of actions when the other process's part is posted."""
        for action in actions:
            if isinstance(action, Send) and action.process:
                self.post.append((name, action.process, action.message))
        return [action for action in actions if not (isinstance(action, Send) and action.process)]

    def say(self, name, client, kind, **fields):
        return self.take(name, self.states[name].handle(client, {"type": kind, **fields}, self.now))

    def answer(self, name, actions, answer):
        (ask,) = actions
        assert isinstance(ask, Ask)
        return self.take(name, self.states[name].answer(ask, answer, self.now))

    def deliver(self):
        """Has everything that is posted heard; all that follows, by process."""
        told = {"one": [], "two": []}
        while self.post:
            sender, receiver, message = self.post.pop(0)
            told[receiver] += self.take(receiver, self.states[receiver].hear(sender, message, self.now))
        return told

    def dial(self, **options):
        """A dialer at one, a listener at two, their session, and the Join of each."""
        dialer, listener = self.connect("one", **options), self.connect("two", **options)
        self.answer("two", self.say("two", listener, "listen", v=1, room=ROOM), Answer(Verdict.OK))
        asked = self.say("one", dialer, "dial", v=1, room=ROOM)
        assert self.answer("one", asked, Answer(Verdict.OK, "two")) == []
        told = self.deliver()
        (dialed, one), (incoming, two) = told["one"], told["two"]
        assert dialed.client == dialer and dialed.message["type"] == "dialed"
        assert incoming.client == listener and incoming.message["type"] == "incoming"
        return dialer, listener, dialed.message["sessionId"], one, two

    def pair(self):
        source, target = self.connect("one"), self.connect("two")
        asked = self.say("one", source, "pair-source", **PEER)
        (created,) = self.answer("one", asked, Answer(Verdict.OK))
        session_id = created.message["sessionId"]
        asked = self.say("two", target, "pair-target", sessionId=session_id, **PEER)
        assert self.answer("two", asked, Answer(Verdict.OK, "one")) == []
        return source, target, session_id, self.deliver()


@pytest.fixture
def pair():
    return Pair()


def find_error(actions):
    (error,) = [a.message for a in actions if isinstance(a, Send) and a.message["type"] == "error"]
    return error["code"], [a.code for a in actions if isinstance(a, Close)]


def test_the_halves_of_a_pairing(pair):
    source, target, session_id, told = pair.pair()
    for name, client in (("one", source), ("two", target)):
        connected, join = told[name]
        assert connected.client == client and connected.message["peerCapability"] == {"m": 10.5}
        assert connected.message.keys() == {"type", *relay._INTRODUCTION}
        assert isinstance(join, Join) and join.session_id == session_id
        assert [end.role.value for end in join.ends] == ["source", "target"]
        assert [end.far.process if end.far else "" for end in join.ends] == (
            ["", "two"] if name == "one" else ["one", ""]
        )
    one, two = told["one"][1].ends[1].far, told["two"][1].ends[0].far
    assert (one.tag_here, one.tag_there) == (two.tag_there, two.tag_here)
    assert pair.states["one"].clients_count == pair.states["two"].clients_count == 1


def test_the_halves_of_a_dialed_session(pair):
    *_, one, two = pair.dial(is_binary=True)
    assert [end.tag for end in one.ends] == [1, None] and [end.tag for end in two.ends] == [None, 1]
    assert one.ends[1].far.is_binary and two.ends[0].far.is_binary


@pytest.mark.parametrize("who", ["one", "two"])
@pytest.mark.parametrize("how", ["hangup", "disconnect", "lost"])
def test_one_end_ends_a_session_and_nothing_is_left(pair, who, how):
    dialer, listener, session_id, *_ = pair.dial()
    leaving, staying = (dialer, listener) if who == "one" else (listener, dialer)
    other = "two" if who == "one" else "one"
    if how == "hangup":
        assert pair.say(who, leaving, "hangup", sessionId=session_id, reason="done") == [Part(session_id)]
        told, reason = pair.deliver()[other], "done"
    elif how == "disconnect":
        pair.take(who, pair.states[who].disconnect(leaving, pair.now))
        told, reason = pair.deliver()[other], "peer closed connection"
    else:
        told = pair.states[other].lose(who, pair.now)
        reason = "the other device's relay process is gone"
        assert pair.states[who].lose(other, pair.now)
    hangup = {"type": "hangup", "sessionId": session_id, "reason": reason}
    assert told == [Send(staying, hangup, session_id), Part(session_id)]
    for state in pair.states.values():
        assert len(state.sessions) == 0 and not state._fars and not state._pending and state._counted == 0


def test_an_existing_app_is_left_as_within_a_process(pair):
    _, target, session_id, _ = pair.pair()
    told = pair.states["two"].lose("one", pair.now)
    assert told[0].message["type"] == "peer-disconnected"
    assert find_error(pair.say("two", target, "relay", sessionId=session_id, payload=""))[0] == "peer_not_connected"
    pair.now += 61
    assert Close(target, 1000, "session expired") in pair.states["two"].expire(pair.now, lambda _: 0)
    assert len(pair.states["two"].sessions) == 0


def test_a_stalled_receiver_is_told_to_the_sender(pair):
    dialer, listener, session_id, _, two = pair.dial()
    far = two.ends[0].client
    told = pair.take("two", pair.states["two"].stall(session_id, far, relay.ErrorCode.SESSION_STALLED, pair.now))
    assert told[0] == Part(session_id, is_discarded=True) and told[1].client == listener
    told = pair.deliver()["one"]
    assert [a.message["type"] for a in told if isinstance(a, Send)] == ["error", "hangup"]
    assert all(a.client == dialer and a.message["sessionId"] == session_id for a in told if isinstance(a, Send))
    assert Part(session_id, is_discarded=True) in told


def test_a_sign_of_life_is_passed_on(pair):
    dialer, _, session_id, *_ = pair.dial()
    for _ in range(5):
        pair.now += 50
        assert pair.say("one", dialer, "ping") == [Send(dialer, {"type": "pong"}, is_optional=True)]
        assert pair.deliver()["two"] == []
        for state in pair.states.values():
            assert state.expire(pair.now, lambda _: 0) == [] and state.sessions.get(session_id)
    pair.now += 121
    told = pair.take("two", pair.states["two"].expire(pair.now, lambda _: 0))
    assert told[0].message["reason"] == "session expired"
    assert pair.deliver()["one"][0].message["reason"] == "session expired"


# Verdicts of the directory


@pytest.mark.parametrize(
    ("verdict", "code", "closes"),
    [
        (Verdict.CAPACITY, "server_at_capacity", [1011]),
        (Verdict.ADDRESS, "rate_limited", []),
        (Verdict.MINUTE, "rate_limited", []),
    ],
)
def test_limits_of_all_processes(pair, verdict, code, closes):
    client = pair.connect("one")
    asked = pair.say("one", client, "pair-source", **PEER)
    assert find_error(pair.answer("one", asked, Answer(verdict))) == (code, closes)
    asked = pair.say("one", client, "dial", v=1, room=ROOM)
    assert find_error(pair.answer("one", asked, Answer(verdict))) == (code, [])
    assert len(pair.states["one"].sessions) == 0


@pytest.mark.parametrize("kind", ["pair-target", "dial"])
def test_what_nobody_has(pair, kind):
    client = pair.connect("one")
    fields = {"sessionId": "x" * 22, **PEER} if kind == "pair-target" else {"v": 1, "room": ROOM}
    code = {"pair-target": ("session_join_failed", [1008]), "dial": ("not_listening", [])}[kind]
    asked = pair.say("one", client, kind, **fields)
    assert find_error(pair.answer("one", asked, Answer(Verdict.NOT_FOUND))) == code
    # the directory is behind: the other process says that it is so
    asked = pair.say("one", client, kind, **fields)
    assert pair.answer("one", asked, Answer(Verdict.OK, "two")) == []
    assert find_error(pair.deliver()["one"]) == code
    # the other process dies before it says anything
    asked = pair.say("one", client, kind, **fields)
    assert pair.answer("one", asked, Answer(Verdict.OK, "two")) == []
    assert find_error(pair.states["one"].lose("two", pair.now)) == code
    assert not pair.states["one"]._pending and pair.states["one"]._counted == 0


@pytest.mark.parametrize("kind", ["pair-target", "dial"])
@pytest.mark.parametrize("how", ["asked", "requested", "silent", "before"])
def test_without_the_directory_what_may_be_elsewhere_is_refused(pair, kind, how):
    state, client = pair.states["one"], pair.connect("one")
    fields = {"sessionId": "x" * 22, **PEER} if kind == "pair-target" else {"v": 1, "room": ROOM}
    if how == "before":
        state.detach(pair.now)
        told = pair.say("one", client, kind, **fields)
    else:
        asked = pair.say("one", client, kind, **fields)
        if how == "asked":
            assert state.detach(pair.now) == []
            told = pair.answer("one", asked, None)
        else:
            assert pair.answer("one", asked, Answer(Verdict.OK, "two")) == []
            if how == "silent":
                pair.now += relay.ANSWER_DEADLINE_S
                told = state.expire(pair.now, lambda _: 0)
            else:
                told = state.detach(pair.now)
    assert find_error(told) == ("processes_apart", [1013] if kind == "pair-target" else [])
    assert not state._pending and state._counted == 0


def test_without_the_directory_a_process_goes_on_alone(pair):
    state = pair.states["one"]
    state.detach(pair.now)
    source, target, listener = (pair.connect("one") for _ in range(3))
    (created,) = pair.say("one", source, "pair-source", **PEER)
    assert pair.say("one", listener, "listen", v=1, room=ROOM) == [Send(listener, {"type": "listening", "room": ROOM})]
    assert pair.say("one", target, "dial", v=1, room=ROOM)[0].message["type"] == "dialed"
    assert pair.say("one", listener, "listen", v=1, publicKey=KEY)[0].message["type"] == "challenge"
    assert state.take_changes() == {}
    (ask,) = state.attach("three")
    assert (ask.name, ask.since, ask.client) == (f"room:{ROOM}", 1_790_000_000_000, 0)
    address = relay.build_address_entry(ADDRESSES["one"])
    waiting = relay.build_session_entry(created.message["sessionId"])
    assert state.take_changes() == {"sessions": "2", address: "2", waiting: "1"}


def test_a_client_that_goes_while_it_waits_costs_nothing(pair):
    state = pair.states["one"]
    for kind in ("pair-source", "dial", "pair-target"):
        client = pair.connect("one")
        fields = {"pair-source": PEER, "dial": {"v": 1, "room": ROOM}, "pair-target": {"sessionId": "x" * 22, **PEER}}
        asked = pair.say("one", client, kind, **fields[kind])
        pair.take("one", state.disconnect(client, pair.now))
        assert pair.answer("one", asked, Answer(Verdict.OK, "two" if kind != "pair-source" else "")) == []
    assert state.take_changes()[relay.build_address_entry(ADDRESSES["one"])] == ""
    # and when the other process has begun its half already
    dialer, listener = pair.connect("one"), pair.connect("two")
    pair.answer("two", pair.say("two", listener, "listen", v=1, room=ROOM), Answer(Verdict.OK))
    pair.answer("one", pair.say("one", dialer, "dial", v=1, room=ROOM), Answer(Verdict.OK, "two"))
    pair.take("one", state.disconnect(dialer, pair.now))
    told = pair.deliver()["two"]
    assert [a.message["type"] for a in told if isinstance(a, Send)] == ["incoming", "hangup"]
    assert state._counted == 0 and all(len(each.sessions) == 0 for each in pair.states.values())


def test_too_many_that_wait_are_refused(pair, monkeypatch):
    monkeypatch.setattr(relay, "ASKS_LIMIT", 1)
    client = pair.connect("one")
    asked = pair.say("one", client, "dial", v=1, room=ROOM)
    assert find_error(pair.say("one", client, "dial", v=1, room=ROOM)) == ("rate_limited", [])
    pair.answer("one", asked, Answer(Verdict.NOT_FOUND))
    assert isinstance(pair.say("one", client, "dial", v=1, room=ROOM)[0], Ask)


def test_who_listened_last_wins(pair):
    state, client = pair.states["one"], pair.connect("one")
    asked = pair.say("one", client, "listen", v=1, room=ROOM)
    since = asked[0].since
    unlistened = [Send(client, {"type": "unlistened", "room": ROOM})]
    assert state.take_over(f"room:{ROOM}", since - 1) == []
    assert pair.answer("one", asked, Answer(Verdict.OK)) == [Send(client, {"type": "listening", "room": ROOM})]
    assert state.take_over(f"room:{ROOM}", since) == unlistened
    assert state.take_over(f"room:{ROOM}", since + 1) == [] and state.listeners_count == 0
    asked = pair.say("one", client, "listen", v=1, room=ROOM)
    assert pair.answer("one", asked, Answer(Verdict.SUPERSEDED)) == unlistened
    asked = pair.say("one", client, "listen", v=1, room=ROOM)
    pair.take("one", state.disconnect(client, pair.now))
    assert pair.answer("one", asked, Answer(Verdict.OK)) == []
    assert state.take_changes()[f"room:{ROOM}"] == ""


@pytest.mark.parametrize(
    "message",
    [
        None,
        [],
        {},
        {"type": []},
        {"type": "nonsense"},
        {"type": "dial", "sessionId": "x" * 22, "tag": 1, "isBinary": True},
        {"type": "dial", "sessionId": "x" * 22, "tag": 1, "isBinary": True, "room": ROOM, "provider": ROOM},
        {"type": "dial", "sessionId": "x" * 22, "tag": -1, "isBinary": True, "room": ROOM},
        {"type": "dial", "sessionId": "x" * 22, "tag": True, "isBinary": True, "room": ROOM},
        {"type": "dial", "sessionId": "x" * 23, "tag": 1, "isBinary": True, "room": ROOM},
        {"type": "join", "sessionId": "x" * 22, "tag": 1, "isBinary": True},
        {"type": "accept", "sessionId": "x" * 22, "tag": 1, "isBinary": 1},
        {"type": "accept", "sessionId": "x" * 22, "tag": 1, "isBinary": True, "peerDeviceId": "x"},
        {"type": "refuse", "sessionId": "x" * 22, "code": "nonsense", "message": ""},
        {"type": "hangup", "sessionId": "x" * 22},
        {"type": "error", "sessionId": "x" * 22, "code": "rate_limited", "message": 7},
    ],
)
def test_what_no_process_says(pair, message):
    with pytest.raises(ValueError):
        pair.states["one"].hear("two", message, pair.now)


@pytest.mark.parametrize("kind", ["accept", "refuse", "alive", "error", "hangup"])
def test_a_third_process_has_no_say_in_a_session(pair, kind):
    session_id = pair.dial()[2]
    message = {"type": kind, "sessionId": session_id, "tag": 9, "isBinary": False}
    message |= {"code": "rate_limited", "message": "", "reason": ""}
    told = pair.take("one", pair.states["one"].hear("three", message, pair.now))
    assert told == [] and pair.states["one"].sessions.get(session_id)
    assert [(sender, receiver) for sender, receiver, _ in pair.post] == ([("one", "three")] if kind == "accept" else [])
