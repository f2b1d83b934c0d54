"""Several relay processes as one: a real Redis, three real processes, and what happens when any of them dies."""

import base64
import contextlib
import hmac
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import MODULE, wait_for
from support_redis import FREE, Balancer, start_redis, start_relays, wait_until_alone, wait_until_together
from support_relay import (
    CLEAN_ENVIRON,
    DEADLINE_S,
    PEER,
    RELAY,
    RawClient,
    build_room,
    encode_frame,
    encode_text,
    start_relay,
)
from support_worker import build_byte_model
from test_relay_end_to_end import HELLO, pair, read_text, start_strong, start_weak, wait_answered

import rendezvous_server

pytest.importorskip("resource", reason="stops processes with signals")

TLS = MODULE.parent / "tests" / "tls"
KINDS = [False, True]
NOTICE_S = 10.0  # the longest that anybody may be left in the dark: the deadlines of rendezvous_server.py, and slack


@pytest.fixture(scope="module")
def redis():
    with start_redis() as server:
        yield server


@pytest.fixture(scope="module")
def relays(redis):
    """Three processes for tests that leave them as they were."""
    with start_relays(redis) as running:
        yield running
        for relay in running:
            wait_for(lambda relay=relay: relay.read_health()["activeSessions"] == 0, DEADLINE_S, "nothing is left")


@pytest.fixture
def own():
    """A Redis, and three processes to do anything to."""
    with start_redis() as server, start_relays(server) as running:
        yield server, running


ROOMS = itertools.count(1)


def open_pair_across(one, other):
    """Source and target of a pairing, and its id; the relays of each."""
    source, target = RawClient(one), RawClient(other)
    created = source.ask("pair-source", **PEER)
    joined = target.ask("pair-target", sessionId=created["sessionId"], **PEER)
    assert joined["type"] == source.receive()["type"] == "peer-connected", joined
    return source, target, created["sessionId"]


def open_room_across(one, other, *, dialer=False, listener=False, room=None):
    """Dialer and listener at two relays, and what each was told."""
    room = room or build_room(next(ROOMS))
    left, right = RawClient(one, is_binary=dialer), RawClient(other, is_binary=listener)
    assert right.ask("listen", v=1, room=room) == {"type": "listening", "room": room}
    dialed = left.ask("dial", v=1, room=room)
    assert dialed["type"] == "dialed", dialed
    return left, right, dialed, right.receive()


def encode_base64url(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# What works within a process works across


def test_existing_apps_pair_and_talk_across_processes(relays):
    for one, other in itertools.permutations(relays, 2):
        source, target, session_id = open_pair_across(one, other)
        with source, target:
            for sender, receiver, role in ((source, target, "source"), (target, source, "target")):
                for payload in ("aGVsbG8+/w==", "not base64: €", ""):
                    sender.send("relay", sessionId=session_id, payload=payload)
                    assert receiver.receive() == {"type": "relay", "from": role, "payload": payload}
            target.socket.close()
            assert source.receive() == {"type": "peer-disconnected", "reason": "peer closed connection"}
            assert source.ask("relay", sessionId=session_id, payload="")["code"] == "peer_not_connected"


def test_a_code_is_good_once_and_only_while_its_source_is_there(relays):
    with RawClient(relays[0]) as source, RawClient(relays[1]) as target:
        session_id = source.ask("pair-source", **PEER)["sessionId"]
        assert target.ask("pair-target", sessionId=session_id, **PEER)["type"] == "peer-connected"
        for relay in relays:
            with RawClient(relay) as late:
                assert late.ask("pair-target", sessionId=session_id, **PEER)["code"] == "session_join_failed"
                assert late.receive() is None and late.close_code == 1008
    for session_id in ("x" * 22, "x", "*" * 22, "processes", "é" * 22):
        with RawClient(relays[2]) as stranger:
            assert stranger.ask("pair-target", sessionId=session_id, **PEER)["code"] == "session_join_failed"


@pytest.mark.parametrize("dialer", KINDS)
@pytest.mark.parametrize("listener", KINDS)
def test_a_room_between_either_kind_of_socket_across_processes(relays, dialer, listener):
    left, right, dialed, incoming = open_room_across(*relays[:2], dialer=dialer, listener=listener)
    with left, right:
        assert dialed["sessionId"] == incoming["sessionId"] and dialed["room"] == incoming["room"]
        ends = ((left, right, dialed, incoming, "source"), (right, left, incoming, dialed, "target"))
        for sender, receiver, ours, theirs, role in ends:
            for size in (0, 1, 120, 126, 2000, 60_000):
                data = os.urandom(size)
                if (sender is left and dialer) or (sender is right and listener):
                    sender.send_binary(ours["tag"].to_bytes(4, "big") + data)
                else:
                    sender.send("relay", sessionId=ours["sessionId"], payload=encode_base64url(data))
                got = receiver.receive()
                if "tag" in theirs:
                    assert got == theirs["tag"].to_bytes(4, "big") + data
                else:
                    said = {"type": "relay", "sessionId": theirs["sessionId"], "from": role}
                    assert got == said | {"payload": encode_base64url(data)}
        left.send("hangup", sessionId=dialed["sessionId"], reason="done")
        assert right.receive() == {"type": "hangup", "sessionId": incoming["sessionId"], "reason": "done"}


def test_a_payload_that_the_other_end_cannot_be_told_is_refused_at_once(relays):
    left, right, dialed, _ = open_room_across(*relays[:2], listener=True)
    with left, right:
        answer = left.ask("relay", sessionId=dialed["sessionId"], payload="not base64")
        assert answer["code"] == "malformed_message"


SECRET = bytes.fromhex("01" * 32)
PUBLIC = rendezvous_server.compute_x25519_public(SECRET)
ADDRESS = encode_base64url(rendezvous_server.build_provider_address(PUBLIC))


def prove(client):
    """Has a client listen on the address of PUBLIC; what it is told."""
    challenge = client.ask("listen", v=1, publicKey=encode_base64url(PUBLIC))
    assert challenge["type"] == "challenge", challenge
    ephemeral = rendezvous_server.parse_base64url(challenge["ephemeralPubKey"])
    secret = rendezvous_server.compute_x25519(SECRET, ephemeral)
    info = ephemeral + PUBLIC + b"relay.example.org:443"
    key = rendezvous_server.compute_hkdf(b"dvai-relay-proof/1", secret, info, 32)
    said = rendezvous_server.parse_base64url(challenge["nonce"]) + rendezvous_server.parse_base64url(ADDRESS)
    return client.ask("proof", mac=encode_base64url(hmac.digest(key, said, "sha256")))


def test_a_provider_is_dialed_by_its_key_from_every_process(relays):
    with RawClient(relays[0], is_binary=True) as provider:
        assert prove(provider) == {"type": "listening", "provider": ADDRESS}
        for relay in relays:
            with RawClient(relay) as dialer:
                dialed = dialer.ask("dial", v=1, provider=ADDRESS)
                assert dialed["type"] == "dialed" and dialed["provider"] == ADDRESS
                incoming = provider.receive()
                provider.send_binary(incoming["tag"].to_bytes(4, "big") + b"hello")
                assert dialer.receive()["payload"] == encode_base64url(b"hello")
            assert provider.receive()["type"] == "hangup"


def test_who_listens_last_is_listened_to_wherever_it_is(relays):
    room = build_room(next(ROOMS))
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(RawClient(relay)) for relay in relays]
        former = None
        for listener in (*listeners, listeners[0]):
            assert listener.ask("listen", v=1, room=room)["type"] == "listening"
            if former is not None:
                assert former.receive() == {"type": "unlistened", "room": room}
            former = listener
            for relay in relays:
                with RawClient(relay) as dialer:
                    assert dialer.ask("dial", v=1, room=room)["type"] == "dialed"
                    assert listener.receive()["type"] == "incoming"
                assert listener.receive()["type"] == "hangup"
        listeners[0].socket.close()
        wait_for(lambda: dial(relays[1], room)["code"] == "not_listening", DEADLINE_S, "nobody listens")
        assert dial(relays[0], room)["code"] == "not_listening"


def dial(relay, room):
    with RawClient(relay) as dialer:
        return dialer.ask("dial", v=1, room=room)


def test_many_sessions_across_all_processes_keep_their_order(relays):
    """From two processes to a listener on the third, all at once; each counts its frames, none is missing."""
    room, count = build_room(next(ROOMS)), 2000
    with RawClient(relays[0], is_binary=True) as listener, contextlib.ExitStack() as stack:
        listener.ask("listen", v=1, room=room)
        dialers = [stack.enter_context(RawClient(relays[1 + n % 2], is_binary=True)) for n in range(6)]
        seen, senders = {}, []
        for dialer in dialers:
            tag = dialer.ask("dial", v=1, room=room)["tag"].to_bytes(4, "big")
            seen[listener.receive()["tag"].to_bytes(4, "big")] = 0
            frames = b"".join(encode_frame(0x82, tag + n.to_bytes(4, "big") + bytes(60)) for n in range(count))
            senders.append(threading.Thread(target=dialer.socket.sendall, args=(frames,)))
        for sender in senders:
            sender.start()
        for _ in range(count * len(dialers)):
            frame = listener.receive()
            assert frame[4:8] == seen[frame[:4]].to_bytes(4, "big")
            seen[frame[:4]] += 1


def test_a_receiver_that_stops_loses_its_session_and_nobody_else(relays):
    room = build_room(next(ROOMS))
    with RawClient(relays[0], is_binary=True, receive_buffer=4096) as stopped, RawClient(relays[1]) as sender:
        stopped.ask("listen", v=1, room=room)
        dialed, other = sender.ask("dial", v=1, room=room), open_room_across(relays[1], relays[0])
        frame = encode_text({"type": "relay", "sessionId": dialed["sessionId"], "payload": "A" * 40_000})

        def send():
            with contextlib.suppress(OSError):
                for _ in range(200):
                    sender.socket.sendall(frame)

        assert stopped.receive()["type"] == "incoming"
        thread = threading.Thread(target=send)
        thread.start()
        error = sender.receive()
        assert (error["code"], error["sessionId"]) == ("session_stalled", dialed["sessionId"])
        assert sender.receive() == {"type": "hangup", "sessionId": dialed["sessionId"], "reason": "session_stalled"}
        other[0].send("relay", sessionId=other[2]["sessionId"], payload="AA")
        assert other[1].receive()["payload"] == "AA"
        thread.join()
        while isinstance(message := stopped.receive(), bytes):
            assert len(message) == 30_004
        assert message == {"type": "hangup", "sessionId": dialed["sessionId"], "reason": "session_stalled"}
        for client in other[:2]:
            client.socket.close()


def test_a_session_that_is_too_fast_is_slowed_and_loses_nothing(redis):
    with start_relays(redis, 2, RELAY_BYTES_PER_SECOND="100000") as relays:
        left, right, dialed, _incoming = open_room_across(*relays, dialer=True, listener=True)
        with left, right:
            start = time.monotonic()
            frame = dialed["tag"].to_bytes(4, "big") + bytes(10_000)
            for _ in range(60):  # 200 kB more than the burst
                left.send_binary(frame)
            for _ in range(60):
                assert len(right.receive()) == 10_004
            assert time.monotonic() - start > 1.5


@pytest.mark.parametrize("alive", ["frames", "pings"])
def test_a_session_lives_while_either_end_shows_life(redis, alive):
    with start_relays(redis, 2, SESSION_TTL_SECONDS="4") as relays:
        left, right, dialed, _incoming = open_room_across(*relays)
        idle = open_room_across(*relays)
        with left, right, idle[0], idle[1]:
            deadline = time.monotonic() + 9
            while time.monotonic() < deadline:
                if alive == "pings":
                    assert right.ask("ping") == {"type": "pong"}
                else:
                    left.send("relay", sessionId=dialed["sessionId"], payload="AA")
                    assert right.receive()["payload"] == "AA"
                threading.Event().wait(0.3)
            for client in idle[:2]:
                assert client.receive()["reason"] == "session expired"
            left.send("relay", sessionId=dialed["sessionId"], payload="BB")
            assert right.receive()["payload"] == "BB"


# Limits count across processes


def test_limits_count_across_processes_and_a_dead_one_gives_back(redis):
    limits = {"SESSIONS_PER_ADDRESS": "3", "MAX_SESSIONS": "100"}
    with start_relays(redis, **limits) as relays, contextlib.ExitStack() as stack:
        sources = [stack.enter_context(RawClient(relay)) for relay in relays]
        assert [source.ask("pair-source", **PEER)["type"] for source in sources] == ["session-created"] * 3
        with RawClient(relays[0]) as client:
            assert client.ask("pair-source", **PEER)["code"] == "rate_limited"
        sources[0].socket.close()

        def may_open(relay):
            with RawClient(relay) as client:
                return client.ask("pair-source", **PEER)["type"] == "session-created"

        wait_for(lambda: may_open(relays[1]), DEADLINE_S, "what was closed is given back")
        wait_for(lambda: may_open(relays[2]), DEADLINE_S, "what was closed is given back")
        again = stack.enter_context(RawClient(relays[0]))
        wait_for(lambda: again.ask("pair-source", **PEER)["type"] == "session-created", DEADLINE_S, "room for one")
        assert not may_open(relays[1])
        relays[2].process.kill()
        wait_for(lambda: may_open(relays[1]), NOTICE_S, "what the dead one had is given back")


def test_all_sessions_and_new_ones_a_minute_count_across_processes(redis):
    with start_relays(redis, 2, MAX_SESSIONS="2") as relays, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(relays[n % 2])) for n in range(3)]
        said = [client.ask("pair-source", **PEER) for client in clients]
        assert [each.get("code") for each in said] == [None, None, "server_at_capacity"]
        assert clients[2].receive() is None and clients[2].close_code == 1011
        assert wait_for(lambda: relays[1].read_health()["allSessions"] == 2, DEADLINE_S, "it is counted")
    with start_relays(redis, 2, SESSIONS_PER_ADDRESS_PER_MINUTE="3") as relays, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(relays[n % 2])) for n in range(4)]
        said = [client.ask("pair-source", **PEER).get("code") for client in clients]
        assert said == [None, None, None, "rate_limited"]


def test_proofs_count_across_processes(redis):
    with start_relays(redis, 2) as relays, RawClient(relays[0]) as one, RawClient(relays[1]) as other:
        said = [
            (one, other)[n % 2].ask("listen", v=1, publicKey=encode_base64url(PUBLIC))["type"]
            for n in range(rendezvous_server.CHALLENGES_PER_ADDRESS_PER_MINUTE + 1)
        ]
        assert said == ["challenge"] * (len(said) - 1) + ["error"]


# What is promised when something dies


class Talk:
    """A session under load: one end sends, the other answers, as fast as it goes, until somebody is told the end.

    `ends`: what each end was told last, None for a socket that was closed. `turns` counts; `over` is set at the end.
    """

    def __init__(self, one, other, *, is_pair):
        if is_pair:
            self.left, self.right, session_id = open_pair_across(one, other)
        else:
            self.left, self.right, dialed, _ = open_room_across(one, other)
            session_id = dialed["sessionId"]
        self.relays = (one, other)
        self.turns = 0
        self.ends = {}
        frame = encode_text({"type": "relay", "sessionId": session_id, "payload": "A" * 2000})
        self._threads = [
            threading.Thread(target=self._run, args=(client, frame, begins))
            for client, begins in ((self.left, True), (self.right, False))
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, client, frame, begins):
        client.socket.settimeout(DEADLINE_S)
        message = {}
        with contextlib.suppress(OSError):
            for _ in range(4 if begins else 0):  # on their way at a time
                client.socket.sendall(frame)
            while (message := client.receive()) is not None and message["type"] == "relay":
                self.turns += 1
                client.socket.sendall(frame)
        self.ends[client] = message if message and message["type"] != "relay" else None

    def is_over(self):
        return len(self.ends) == 2

    def close(self):
        for client in (self.left, self.right):
            with contextlib.suppress(OSError):
                client.socket.shutdown(2)
        for thread in self._threads:
            thread.join()
        for client in (self.left, self.right):
            client.socket.close()


@contextlib.contextmanager
def load(relays):
    """A pairing and a dialed session between every two processes, and within each."""
    talks = [Talk(one, other, is_pair=is_pair) for one in relays for other in relays for is_pair in KINDS]
    try:
        wait_for(lambda: all(talk.turns > 50 for talk in talks), DEADLINE_S, "everybody talks")
        yield talks
    finally:
        for talk in talks:
            talk.close()


def check_goes_on(talks):
    before = [talk.turns for talk in talks]
    wait_for(lambda: all(t.turns > n + 50 for t, n in zip(talks, before, strict=True)), DEADLINE_S, "it goes on")
    assert not any(talk.ends for talk in talks)


def check_told(end):
    """Whoever is left has been told that the session is over, in the words that it knows."""
    assert end is not None and end["type"] in ("hangup", "peer-disconnected") and end["reason"], end


def read_rss(relays):
    return [relay.read_rss_bytes() or 0 for relay in relays]


@pytest.mark.parametrize("how", ["kill", "stop", "freeze"])
def test_a_process_takes_only_its_own_with_it(own, how):
    """Each of the three in turn (one, if it takes its time), under load; another one takes its place, or it comes
    back by itself."""
    redis, relays = own
    with load(relays):
        pass  # so that what is kept for ever is there already
    before = max(read_rss(relays))
    with contextlib.ExitStack() as replacements:
        for number in range(3 if how == "kill" else 1):
            end_a_process_under_load(relays, relays[number], how)
            if how != "freeze":
                relays[number].process.wait(DEADLINE_S)
                relays[number] = replacements.enter_context(start_relay(REDIS_URL=redis.url, **FREE))
            wait_until_together(relays)
        for relay in relays:
            wait_for(lambda relay=relay: relay.read_health()["activeSessions"] == 0, DEADLINE_S, "nothing is left")
        assert max(read_rss(relays)) < before + 16 * 2**20


def end_a_process_under_load(relays, victim, how):
    room, others = build_room(next(ROOMS)), [relay for relay in relays if relay is not victim]
    with RawClient(victim) as listener, load(relays) as talks:
        assert listener.ask("listen", v=1, room=room)["type"] == "listening"
        hit = [talk for talk in talks if victim in talk.relays and talk.relays != (victim, victim)]
        victim.process.send_signal({"kill": signal.SIGKILL, "stop": signal.SIGTERM, "freeze": signal.SIGSTOP}[how])
        start = time.monotonic()
        left_alone = [(talk, talk.right if talk.relays[0] is victim else talk.left) for talk in hit]
        wait_for(lambda: all(client in talk.ends for talk, client in left_alone), 20, "who is left is told")
        if how != "stop":  # which lets sessions end by themselves for ten seconds
            assert time.monotonic() - start < NOTICE_S
        for talk, client in left_alone:
            check_told(talk.ends[client])
        check_goes_on([talk for talk in talks if victim not in talk.relays])
        wait_for(lambda: dial(others[0], room)["code"] == "not_listening", NOTICE_S, "its listener is gone")
        if how == "freeze":
            victim.process.send_signal(signal.SIGCONT)
            wait_for(lambda: dial(others[0], room)["type"] == "dialed", NOTICE_S, "it comes back by itself")


def test_redis_holds_little_for_a_process_that_does_not_read(own):
    redis, relays = own
    one, other, _ = relays
    with contextlib.ExitStack() as stack:
        room = build_room(next(ROOMS))
        listener = stack.enter_context(RawClient(other))
        assert listener.ask("listen", v=1, room=room)["type"] == "listening"
        dialers = [stack.enter_context(RawClient(one)) for _ in range(8)]
        sessions = [dialer.ask("dial", v=1, room=room)["sessionId"] for dialer in dialers]
        other.process.send_signal(signal.SIGSTOP)
        for dialer, session_id in zip(dialers, sessions, strict=True):
            frame = encode_text({"type": "relay", "sessionId": session_id, "payload": "A" * 10_000})
            dialer.socket.sendall(frame * 100)
        for dialer, session_id in zip(dialers, sessions, strict=True):
            error = dialer.receive()
            assert (error["code"], error["sessionId"]) == ("session_stalled", session_id)
            assert dialer.receive()["type"] == "hangup"
        waiting = [int(part[5:]) for part in redis.ask("CLIENT", "LIST").split() if part.startswith("omem=")]
        assert max(waiting) < 2 * rendezvous_server.TRUNK_WINDOW_BYTES
        other.process.send_signal(signal.SIGCONT)
        wait_until_together(relays)
        assert dial(one, room)["type"] == "dialed"


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_redis_away_and_back(own, how):
    redis, relays = own
    one, other, _ = relays
    room, away_room = build_room(next(ROOMS)), build_room(next(ROOMS))
    before = read_rss(relays)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(RawClient(one))
        assert listener.ask("listen", v=1, room=room)["type"] == "listening"
        talks = stack.enter_context(load(relays))
        redis.kill() if how == "kill" else redis.freeze()
        wait_until_alone(relays)
        across = [talk for talk in talks if talk.relays[0] is not talk.relays[1]]
        wait_for(lambda: all(talk.is_over() for talk in across), NOTICE_S, "both ends of what crossed are told")
        for talk in across:
            for end in talk.ends.values():
                check_told(end)
        within = [talk for talk in talks if talk.relays[0] is talk.relays[1]]
        check_goes_on(within)
        assert all(relay.read_health()["relayProcesses"] == 1 for relay in relays)
        assert "rendezvous_redis_up 0" in one.get("/metrics")[2].decode()

        error = dial(other, room)  # which is at the other process: nobody can know
        assert (error["code"], error["room"]) == ("processes_apart", room)
        with RawClient(one) as dialer:
            assert dialer.ask("dial", v=1, room=room)["type"] == "dialed"
        source, late = (stack.enter_context(RawClient(one)) for _ in range(2))
        session_id = source.ask("pair-source", **PEER)["sessionId"]
        with RawClient(other) as target:
            assert target.ask("pair-target", sessionId=session_id, **PEER)["code"] == "processes_apart"
            assert target.receive() is None and target.close_code == 1013
        pair = open_pair_across(one, one)
        assert late.ask("listen", v=1, room=away_room)["type"] == "listening"

        redis.start() if how == "kill" else redis.thaw()
        wait_until_together(relays)
        check_goes_on(within)
        for name in (room, away_room):
            wait_for(lambda name=name: dial(other, name)["type"] == "dialed", NOTICE_S, "listeners are known again")
        with RawClient(other) as target:
            assert target.ask("pair-target", sessionId=session_id, **PEER)["type"] == "peer-connected"
        for client in pair[:2]:
            client.socket.close()
    with load(relays):
        pass
    for relay, rss in zip(relays, before, strict=True):
        wait_for(lambda relay=relay: relay.read_health()["activeSessions"] == 0, DEADLINE_S, "nothing is left")
        assert (relay.read_rss_bytes() or 0) < rss + 32 * 2**20


def test_who_listened_last_stays_the_listener_when_redis_is_back(own):
    redis, relays = own
    room = build_room(next(ROOMS))
    with RawClient(relays[0]) as first, RawClient(relays[1]) as last:
        assert first.ask("listen", v=1, room=room)["type"] == "listening"
        redis.kill()
        wait_until_alone(relays)
        assert last.ask("listen", v=1, room=room)["type"] == "listening"  # knowing of no other
        redis.start()
        wait_until_together(relays)
        assert first.receive() == {"type": "unlistened", "room": room}
        assert dial(relays[2], room)["type"] == "dialed" and last.receive()["type"] == "incoming"


def test_a_process_that_starts_without_redis_finds_it_later():
    with start_redis() as redis:
        redis.kill()
        environ = FREE | {"REDIS_URL": redis.build_url()}
        with start_relay(**environ) as one, start_relay(**environ) as other:
            wait_until_alone([one, other])
            left, right, _ = open_pair_across(one, one)
            redis.start()
            wait_until_together([one, other])
            assert sum("Redis is away" in line for line in one.log) == 1 and "Redis is there" in one.log[-1]
            for client in (left, right, *open_pair_across(one, other)[:2]):
                client.socket.close()


def test_nothing_in_redis_outlives_the_processes():
    with start_redis() as redis:
        environ = {"REDIS_URL": redis.build_url()}
        with contextlib.ExitStack() as stack:
            relays = [stack.enter_context(start_relay(**environ)) for _ in range(2)]
            wait_until_together(relays)
            left, right, *_ = open_room_across(*relays)
            stack.enter_context(RawClient(relays[0])).ask("pair-source", **PEER)
            keys = redis.list_keys()
            assert len(keys) == 4  # the processes, an entry of each, and one address's allowance
            assert all(0 < redis.ask("PTTL", key) <= 60_000 for key in keys)
            assert not any("127.0.0.1" in str(redis.ask("HGETALL", key)) for key in keys if "processes" not in key)
            for relay in relays:
                relay.process.kill()
            left.socket.close(), right.socket.close()
        wait_for(lambda: not [k for k in redis.list_keys() if "rate" not in k], NOTICE_S, "leases run out")
        assert redis.ask("PUBSUB", "CHANNELS") == []
    with start_redis() as redis:
        with start_relays(redis, 2):
            assert len(redis.list_keys()) == 3
        assert redis.list_keys() == []  # an orderly stop leaves nothing


def test_nonsense_in_redis_harms_nobody(own):
    """Whoever may write there is trusted not to lie, but a mistake ends in a new start, not in a hang."""
    redis, relays = own
    draw = random.Random(7)
    names = [relay.read_health()["process"] for relay in relays]
    stranger = b"T" + b"s" * 22 + bytes(16)
    texts = (b"null", b'{"type":"dial"}', b'{"type":"hangup","sessionId":7}', b'{"type":"nonsense"}', b"[" * 99)
    for data in (
        *(b"", b"X", b"U", b"U1 room:x", b"U-1 process:AAAAAAAAAAAAAAAAAAAAAA", b"T", b"T" + b"s" * 22 + b"\xff" * 16),
        *(b"T" + b"%-22d" % n + bytes(16) + b"\x81" + bytes((len(text),)) + text for n, text in enumerate(texts)),
        *(b"U" + draw.randbytes(40) for _ in range(20)),
    ):
        redis.ask("PUBLISH", f"dvai-relay:1:channel:{names[0]}", data)
    wait_until_together(relays)
    broken = [stranger + b"\x82\x7f" + b"\xff" * 8, stranger + b"\x82", stranger + b"\x81\x02\xff\xff"]
    for data in broken:
        name = wait_for(lambda: relays[0].read_health()["process"], NOTICE_S, "a name")
        redis.ask("PUBLISH", f"dvai-relay:1:channel:{name}", data)
        wait_for(lambda name=name: relays[0].read_health()["process"] not in (name, ""), NOTICE_S, "a new start")
    wait_until_together(relays)
    for client in open_pair_across(*relays[:2])[:2]:
        client.socket.close()


def test_a_missing_batch_ends_what_crosses(own):
    """A frame that is lost is never skipped: ends that count their frames would go on with the wrong ones."""
    redis, relays = own
    left, right, dialed, _ = open_room_across(*relays[:2])
    with left, right:
        left.send("relay", sessionId=dialed["sessionId"], payload="AA")
        assert right.receive()["payload"] == "AA"
        one, other = (relay.read_health()["process"] for relay in relays[:2])
        redis.ask("PUBLISH", f"dvai-relay:1:channel:{other}", b"T" + one.encode() + b"\x00" * 7 + b"\x63" + bytes(8))
        for client in (left, right):
            assert client.receive()["type"] == "hangup"
    wait_until_together(relays)


# Reaching Redis


def test_a_password_is_used_and_never_shown():
    with start_redis("--requirepass", "hunter2") as redis:
        url = redis.build_url()
        right, wrong = (url.replace("//", f"//:{word}@") for word in ("hunter2", "hunter3"))
        with start_relay(REDIS_URL=right, LOG_LEVEL="debug") as relay:
            wait_until_together([relay])
        assert not any("hunter2" in line for line in relay.log)
        for each in (url, wrong, right[:-1] + "99"):
            done = run_relay(REDIS_URL=each)
            assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
            assert "REDIS_URL" in done.stderr and "hunter" not in done.stderr


def run_relay(**environ):
    command = [sys.executable, str(RELAY), "--port", "0"]
    environ = CLEAN_ENVIRON | environ
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def test_redis_behind_tls():
    files = ["--tls-cert-file", str(TLS / "cert.pem"), "--tls-key-file", str(TLS / "key.pem")]
    with start_redis(*files, "--tls-auth-clients", "no", is_tls=True) as redis:
        url = f"rediss://localhost:{redis.port}/0?ssl_ca_certs={TLS / 'cert.pem'}"
        with start_relay(REDIS_URL=url) as one, start_relay(REDIS_URL=url) as other:
            wait_until_together([one, other])
            for client in open_pair_across(one, other)[:2]:
                client.socket.close()


# Real bridges


def test_bridges_pair_and_ask_across_processes(tmp_path):
    """A consumer and a provider behind a balancer, each at another process; and what happens when those end."""
    model = tmp_path / "strong.gguf"
    model.write_bytes(build_byte_model())
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    with start_redis() as redis, contextlib.ExitStack() as stack:
        relays = stack.enter_context(start_relays(redis, 2))
        balancer = stack.enter_context(Balancer(relay.port for relay in relays))
        weak = stack.enter_context(start_weak(weak_home, f"ws://127.0.0.1:{balancer.port}"))
        stack.enter_context(start_strong(strong_home, model))
        pair(weak_home, strong_home)
        text = read_text(wait_answered(weak))

        def is_across():
            counts = [relay.read_health()["activeSessions"] for relay in relays]
            clients = ["rendezvous_clients 1\n" in relay.get("/metrics")[2].decode() for relay in relays]
            return counts == [1, 1] and all(clients)

        wait_for(is_across, DEADLINE_S, "one session, a half at each process, and a bridge at each")
        assert read_text(wait_answered(weak)) == text

        redis.kill()
        wait_until_alone(relays)
        status = weak.request("POST", "/v1/chat/completions", HELLO, timeout_s=DEADLINE_S)[0]
        assert status in (200, 502, 503)  # 200: they have met at one process already
        redis.start()
        wait_until_together(relays)
        assert read_text(wait_answered(weak)) == text
        for relay in relays:
            relay.process.kill()
            assert weak.request("POST", "/v1/chat/completions", HELLO, timeout_s=DEADLINE_S)[0] in (200, 502, 503)
            again = stack.enter_context(start_relay(port=relay.port, REDIS_URL=redis.url, **FREE))
            assert read_text(wait_answered(weak)) == text
            assert again.read_health()["redis"] == "ok"
