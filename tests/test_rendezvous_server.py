"""The relay as a process, from raw sockets: what existing apps send, what ours send, and what attackers send."""

import asyncio
import base64
import contextlib
import hmac
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading

import pytest

import rendezvous_server
from tests.support import MODULE, find_free_port, require, wait_for
from tests.support_relay import (
    CLEAN_ENVIRON,
    DEADLINE_S,
    PEER,
    RELAY,
    RawClient,
    RunningRelay,
    build_client_tls,
    build_room,
    encode_frame,
    encode_text,
    open_pair,
    open_room,
    start_relay,
    wait_until_idle,
)

TLS = MODULE.parent / "tests" / "tls"
FREE = {"SESSIONS_PER_ADDRESS": "0", "SESSIONS_PER_ADDRESS_PER_MINUTE": "0"}


@pytest.fixture(scope="module")
def relay():
    """A relay for tests that leave it as it was."""
    with start_relay(METRICS_ENABLED="1", **FREE) as running:
        yield running
        wait_until_idle(running, None)


def encode_base64url(data):
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


# As existing apps


def test_two_existing_apps_pair_and_talk(relay):
    source, target, session_id = open_pair(relay)
    with source, target:
        for sender, receiver, role in ((source, target, "source"), (target, source, "target")):
            sender.send("relay", sessionId=session_id, payload="aGVsbG8+/w==")
            assert receiver.receive() == {"type": "relay", "from": role, "payload": "aGVsbG8+/w=="}
        assert source.ask("ping") == {"type": "pong"}


def test_what_the_wire_looks_like_to_the_byte(relay):
    source, target, session_id = open_pair(relay)
    with source, target:
        source.send("relay", sessionId=session_id, payload="QUJD")
        assert target.receive_frame() == (1, b'{"type":"relay","from":"source","payload":"QUJD"}')
        source.socket.sendall(encode_text({"type": "ping"}))
        assert source.receive_frame() == (1, b'{"type":"pong"}')


@pytest.mark.parametrize("size", [0, 1, 50, 60, 61, 62, 63, 64, 2000, 60_000, 65_440, 65_480, 65_500, 98_200])
def test_frames_of_every_size(relay, size):
    source, target, session_id = open_pair(relay)
    with source, target:
        for payload in ("A" * size, "B" * size):
            source.send("relay", sessionId=session_id, payload=payload)
            assert target.receive()["payload"] == payload


SPELLINGS = {
    "other order": lambda m: encode_frame(0x81, json.dumps(dict(reversed(m.items()))).encode()),
    "blanks": lambda m: encode_text(m, separators=(", ", ": ")),
    "binary opcode": lambda m: encode_frame(0x82, json.dumps(m).encode()),
    "escapes": lambda m: encode_frame(0x81, json.dumps(m).replace("QUJD", "\\u0051UJD").encode()),
    "more fields": lambda m: encode_text(m | {"seq": 7}),
    "fragments": lambda m: b"".join(
        encode_frame(first, part.encode())
        for first, part in ((0x01, json.dumps(m)[:9]), (0x00, json.dumps(m)[9:70]), (0x80, json.dumps(m)[70:]))
    ),
    "one mask": lambda m: encode_frame(0x81, json.dumps(m, separators=(",", ":")).encode(), b"\0\0\0\0"),
    "text beyond base64": lambda m: encode_text(m | {"payload": 'QUJD"é\\'}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("is_in_bytes", [False, True])
def test_every_spelling_of_a_message(relay, spelling, is_in_bytes):
    source, target, session_id = open_pair(relay)
    with source, target:
        data = SPELLINGS[spelling]({"type": "relay", "sessionId": session_id, "payload": "QUJD"}) * 2
        for piece in [data[i : i + 1] for i in range(len(data))] if is_in_bytes else [data]:
            source.socket.sendall(piece)
        for _ in range(2):
            message = target.receive()
            assert message["payload"].startswith("QUJD") and message["from"] == "source"


def test_a_message_may_come_with_the_handshake(relay):
    with RawClient(relay, rest=encode_text({"type": "ping"}) * 2) as client:
        assert client.receive() == client.receive() == {"type": "pong"}


def test_pings_of_websocket_between_fragments(relay):
    with RawClient(relay) as client:
        client.socket.sendall(
            encode_frame(0x01, b'{"type":') + encode_frame(0x89, b"hello") + encode_frame(0x80, b'"ping"}')
        )
        assert client.receive_frame() == (10, b"hello")
        assert client.receive() == {"type": "pong"}


def test_a_peer_that_leaves(relay):
    source, target, session_id = open_pair(relay)
    with target:
        source.socket.close()
        assert target.receive() == {"type": "peer-disconnected", "reason": "peer closed connection"}
        assert target.ask("relay", sessionId=session_id, payload="")["code"] == "peer_not_connected"


def test_sessions_expire():
    with start_relay("--session-ttl-seconds", "1") as relay:
        source, target, _ = open_pair(relay)
        with source, target:
            for client in (source, target):
                assert client.receive() is None
                assert (client.close_code, client.close_reason) == (1000, "session expired")
        assert relay.read_health()["activeSessions"] == 0


def test_with_the_package_websockets(relay):
    websockets = require("websockets")

    async def run():
        url = f"ws://127.0.0.1:{relay.port}/pair"
        async with websockets.connect(url) as source, websockets.connect(url) as target:
            await source.send(json.dumps({"type": "pair-source", **PEER}))
            session_id = json.loads(await source.recv())["sessionId"]
            await target.send(json.dumps({"type": "pair-target", "sessionId": session_id, **PEER}))
            assert json.loads(await source.recv())["type"] == json.loads(await target.recv())["type"]
            for text in ("QUJD", "A" * 70_000):
                await source.send(json.dumps({"type": "relay", "sessionId": session_id, "payload": text}))
                assert json.loads(await target.recv())["payload"] == text
            await source.send(iter(('{"type":', '"ping"}')))  # in fragments
            assert json.loads(await source.recv()) == {"type": "pong"}
            await (await source.ping())
            await target.send("not JSON")
            assert json.loads(await target.recv())["code"] == "malformed_json"
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await target.recv()
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "malformed_json")

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def test_the_binary_subprotocol_with_the_package_websockets(relay):
    websockets = require("websockets")

    async def run():
        url = f"ws://127.0.0.1:{relay.port}/pair"
        options = {"subprotocols": ["dvai-relay.2"]}
        async with websockets.connect(url, **options) as dialer, websockets.connect(url, **options) as listener:
            assert dialer.subprotocol == "dvai-relay.2"
            await listener.send(json.dumps({"type": "listen", "v": 1, "room": build_room(77)}))
            await listener.recv()
            await dialer.send(json.dumps({"type": "dial", "v": 1, "room": build_room(77)}))
            tag = json.loads(await dialer.recv())["tag"].to_bytes(4, "big")
            answer_tag = json.loads(await listener.recv())["tag"].to_bytes(4, "big")
            for size in (0, 1, 125, 126, 65_536, 90_000):
                frame = os.urandom(size)
                await dialer.send(tag + frame)
                assert await listener.recv() == answer_tag + frame
                await listener.send(answer_tag + frame)
                assert await dialer.recv() == tag + frame

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


# Ours: rooms, addresses, many sessions on a socket


@pytest.mark.parametrize("dialer", [False, True])
@pytest.mark.parametrize("listener", [False, True])
def test_a_room_between_either_kind_of_socket(relay, dialer, listener):
    left, right, dialed, incoming = open_room(relay, dialer=dialer, listener=listener)
    with left, right:
        session_id = dialed["sessionId"]
        assert ("tag" in dialed, "tag" in incoming) == (dialer, listener)
        ends = ((left, dialed, right, incoming, "source"), (right, incoming, left, dialed, "target"))
        for sender, told, receiver, told_receiver, role in ends:
            for frame in (b"\x10frame", b"", os.urandom(5000)):
                if "tag" in told:
                    sender.send_binary(told["tag"].to_bytes(4, "big") + frame)
                else:
                    sender.send("relay", sessionId=session_id, payload=encode_base64url(frame))
                if "tag" in told_receiver:
                    assert receiver.receive() == told_receiver["tag"].to_bytes(4, "big") + frame
                else:
                    payload = encode_base64url(frame)
                    expected = {"type": "relay", "sessionId": session_id, "from": role, "payload": payload}
                    assert receiver.receive() == expected
        left.send("hangup", sessionId=session_id, reason="done")
        assert right.receive() == {"type": "hangup", "sessionId": session_id, "reason": "done"}


def test_a_payload_that_a_binary_socket_cannot_be_told(relay):
    left, right, dialed, _ = open_room(relay, listener=True)
    with left, right:
        assert left.ask("relay", sessionId=dialed["sessionId"], payload="a+b=")["code"] == "malformed_message"
        assert left.receive() is None and left.close_code == 1008
        assert right.receive()["type"] == "hangup"


def test_many_sessions_on_one_socket(relay):
    first, listener, _, _ = open_room(relay, dialer=True, listener=True)
    with first, listener, RawClient(relay, is_binary=True) as second:
        for _ in range(2):
            second.ask("dial", v=1, room=build_room())
            assert listener.receive()["type"] == "incoming"
        for tag, sender, own in ((1, first, 1), (2, second, 1), (3, second, 2)):
            listener.send_binary(tag.to_bytes(4, "big") + b"to %d" % tag)
            assert sender.receive() == own.to_bytes(4, "big") + b"to %d" % tag
        second.socket.close()
        assert {listener.receive()["type"] for _ in range(2)} == {"hangup"}
        first.send_binary(b"\0\0\0\1still here")
        assert listener.receive() == b"\0\0\0\1still here"


def test_an_address_is_proved_with_its_key(relay):
    secret = bytes.fromhex("01" * 32)
    with RawClient(relay) as provider, RawClient(relay) as dialer:
        challenge = provider.ask("listen", v=1, publicKey="pOCSkrZRwni5dyxWn1-puxPZBrRqtoyd-dwrRAn4ogk")
        ephemeral, nonce = (base64.urlsafe_b64decode(challenge[name] + "=") for name in ("ephemeralPubKey", "nonce"))
        public_key = rendezvous_server.compute_x25519_public(secret)
        info = ephemeral + public_key + b"relay.example.org:443"
        shared = rendezvous_server.compute_x25519(secret, ephemeral)
        key = rendezvous_server.compute_hkdf(b"dvai-relay-proof/1", shared, info, 32)
        address = bytes.fromhex("f85b2401b5b29837c799b996fdabbbf0")
        mac = encode_base64url(hmac.digest(key, nonce + address, "sha256"))
        assert provider.ask("proof", mac=mac) == {"type": "listening", "provider": encode_base64url(address)}
        dialer.send("dial", v=1, provider=encode_base64url(address))
        assert (provider.receive()["type"], dialer.receive()["type"]) == ("incoming", "dialed")


def test_a_session_of_others_is_out_of_reach(relay):
    source, target, session_id = open_pair(relay)
    with source, target, RawClient(relay) as stranger, RawClient(relay, is_binary=True) as binary:
        stranger.send("relay", sessionId=session_id, payload="evil")
        assert stranger.receive()["code"] == "session_mismatch"
        stranger.send("hangup", sessionId=session_id)
        assert stranger.receive()["code"] == "session_mismatch"
        binary.send_binary(b"\0\0\0\1evil")
        assert binary.receive()["code"] == "session_mismatch"
        stranger.send("pair-target", sessionId=session_id, **PEER)
        assert stranger.receive()["code"] == "session_join_failed"
        source.send("relay", sessionId=session_id, payload="good")
        assert target.receive()["payload"] == "good"


@pytest.mark.parametrize(
    ("data", "code", "close_code"),
    [
        (encode_frame(0x81, b"{"), "malformed_json", 1008),
        (encode_frame(0x81, b"null"), "malformed_message", 1008),
        (encode_frame(0x81, b"[" * 90_000), "malformed_json", 1008),
        (encode_text({"type": "launch"}), "unknown_message_type", 1008),
        (encode_text({"type": "pair-target", "sessionId": "x", **PEER}), "session_join_failed", 1008),
        (encode_text({"type": "relay", "sessionId": "x", "payload": ""}), "session_mismatch", None),
        (encode_text({"type": "dial", "v": 1, "room": build_room(999)}), "not_listening", None),
        (encode_text({"type": "proof", "mac": "A" * 43}), "proof_failed", None),
        (encode_frame(0x81, b" " * (96 * 1024 + 1)), "message_too_large", None),
        (encode_frame(0x82, bytes(5_000_000)), "message_too_large", None),
    ],
)
def test_errors_on_the_wire(relay, data, code, close_code):
    with RawClient(relay) as client:
        client.socket.sendall(data)
        error = client.receive()
        assert (error["type"], error["code"]) == ("error", code) and error["message"]
        if close_code is None:
            assert client.ask("ping") == {"type": "pong"}
        else:
            assert client.receive() is None
            assert (client.close_code, client.close_reason) == (close_code, code)


def test_a_binary_frame_without_a_tag(relay):
    with RawClient(relay, is_binary=True) as client:
        client.send_binary(b"abc")
        assert client.receive()["code"] == "malformed_message"
        assert client.receive() is None and client.close_code == 1008


def test_at_capacity():
    with start_relay(MAX_SESSIONS="1", **FREE) as relay, RawClient(relay) as first, RawClient(relay) as second:
        assert first.ask("pair-source", **PEER)["type"] == "session-created"
        assert second.ask("pair-source", **PEER)["code"] == "server_at_capacity"
        assert second.receive() is None and (second.close_code, second.close_reason) == (1011, "server_at_capacity")


# Hostile frames

TEXT = encode_text({"type": "ping"})
HOSTILE = {
    "unmasked": (encode_frame(0x81, b"{}", None), 1002),
    "unmasked ping": (encode_frame(0x89, b"", None), 1002),
    "reserved bit 1": (encode_frame(0xC1, b"{}"), 1002),
    "reserved bit 2": (encode_frame(0xA1, b"{}"), 1002),
    "reserved bit 3": (encode_frame(0x91, b"{}"), 1002),
    "reserved data opcode": (encode_frame(0x83, b"{}"), 1002),
    "reserved control opcode": (encode_frame(0x8B, b""), 1002),
    "fragmented ping": (encode_frame(0x09, b""), 1002),
    "ping of 126 bytes": (encode_frame(0x89, bytes(126)), 1002),
    "continuation of nothing": (encode_frame(0x80, b"{}"), 1002),
    "message within a message": (encode_frame(0x01, b"{") + TEXT, 1002),
    "bad UTF-8": (encode_frame(0x81, b'{"type":"\xff"}'), 1007),
    "half a character": (encode_frame(0x01, b"\xc3") + encode_frame(0x80, b""), 1007),
    "length written too long": (bytes((0x81, 0xFE, 0, 2)) + bytes(6), 1002),
    "length written far too long": (bytes((0x81, 0xFF)) + (2).to_bytes(8, "big") + bytes(6), 1002),
    "length of 2^63": (bytes((0x81, 0xFF)) + (1 << 63).to_bytes(8, "big") + bytes(4), 1002),
    "length of 2^62": (bytes((0x81, 0xFF)) + (1 << 62).to_bytes(8, "big") + bytes(4), 1009),
    "fragments without end": (encode_frame(0x01, b"a") + encode_frame(0x00, b"a") * 70, 1008),
    "fragments of too much": (encode_frame(0x01, b"a" * 60_000) + encode_frame(0x00, b"a" * 60_000), 1009),
    "close with one byte": (encode_frame(0x88, b"\x03"), 1002),
    "close 1005": (encode_frame(0x88, (1005).to_bytes(2, "big")), 1002),
    "close 999": (encode_frame(0x88, (999).to_bytes(2, "big")), 1002),
    "close with bad UTF-8": (encode_frame(0x88, (1000).to_bytes(2, "big") + b"\xff"), 1007),
    "close": (encode_frame(0x88, (1000).to_bytes(2, "big") + b"bye"), 1000),
    "close without a code": (encode_frame(0x88, b""), 1005),
    "close 4000": (encode_frame(0x88, (4000).to_bytes(2, "big")), 4000),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("is_in_bytes", [False, True])
@pytest.mark.parametrize("is_binary", [False, True])
def test_hostile_frames_end_their_own_socket_only(relay, case, is_in_bytes, is_binary):
    data, close_code = HOSTILE[case]
    with RawClient(relay, is_binary=is_binary) as client:
        pieces = [data[i : i + 1] for i in range(len(data))] if is_in_bytes and len(data) < 1000 else [data]
        with contextlib.suppress(ConnectionError):  # the relay may have seen enough before the last of them
            for piece in [TEXT, *pieces]:
                client.socket.sendall(piece)
        assert client.receive() == {"type": "pong"}
        if is_binary and case == "bad UTF-8":
            case = "text"
        assert client.receive() is None and client.close_code == close_code
        with contextlib.suppress(ConnectionError):
            assert client.socket.recv(1) == b""
    assert relay.read_health()["status"] == "ok"


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_after_a_good_opening(relay, seed):
    rng = random.Random(seed)
    for _ in range(25):
        with RawClient(relay, is_binary=rng.random() < 0.5) as client, contextlib.suppress(ConnectionError):
            data = bytearray(TEXT * 3 + encode_frame(0x82, b"\0\0\0\1frame") + rng.randbytes(rng.randrange(200)))
            for _ in range(rng.randrange(4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            for start in range(0, len(data), 50):
                client.socket.sendall(data[start : start + 50])
            client.socket.shutdown(socket.SHUT_WR)
            while client.socket.recv(4096):
                pass
    assert relay.read_health()["status"] == "ok"


def test_a_flood_of_pings_is_answered_as_far_as_it_is_read(relay):
    with RawClient(relay) as client:
        client.socket.sendall(encode_frame(0x89, b"x" * 125) * 2000)
        client.send("ping")
        answers = 0
        while (frame := client.receive_frame())[0] == 10:
            answers += 1
        assert answers and frame == (1, b'{"type":"pong"}')


def test_a_client_that_asks_and_never_reads_costs_no_memory():
    with start_relay(**FREE) as relay:
        descriptors, memory = relay.count_descriptors(), relay.read_rss_bytes()
        with RawClient(relay, receive_buffer=4096) as flooder:
            asked = encode_text({"type": "listen", "v": 1, "room": build_room()}) * 100
            for _ in range(200):
                flooder.socket.sendall(asked + encode_frame(0x89, b"x" * 125) * 300)
            assert relay.read_health()["status"] == "ok"
            assert memory is None or relay.read_rss_bytes() - memory < 16 << 20
        wait_until_idle(relay, descriptors)


@pytest.mark.parametrize("is_binary", [False, True])
def test_a_receiver_that_stops_loses_its_session_and_nobody_else(is_binary):
    with start_relay(RELAY_BYTES_PER_SECOND="0", **FREE) as relay, contextlib.ExitStack() as stack:
        listener = stack.enter_context(RawClient(relay, is_binary=is_binary, receive_buffer=65536))
        other = stack.enter_context(RawClient(relay, is_binary=is_binary))
        sender = stack.enter_context(RawClient(relay, is_binary=is_binary))
        friend = stack.enter_context(RawClient(relay, is_binary=is_binary))
        assert listener.ask("listen", v=1, room=build_room(1))["type"] == "listening"
        assert other.ask("listen", v=1, room=build_room(2))["type"] == "listening"
        stalled = sender.ask("dial", v=1, room=build_room(1))
        healthy = sender.ask("dial", v=1, room=build_room(2))
        friendly = friend.ask("dial", v=1, room=build_room(1))
        assert other.receive()["type"] == "incoming"
        memory = relay.read_rss_bytes()

        def encode(told, frame):
            if is_binary:
                return encode_frame(0x82, told["tag"].to_bytes(4, "big") + frame)
            payload = encode_base64url(frame)
            return encode_text({"type": "relay", "sessionId": told["sessionId"], "payload": payload})

        def flood():
            data = encode(stalled, bytes(45_000)) * 10
            for _ in range(2300 if is_binary else 500):  # a gigabyte; less of what is slow to write
                sender.socket.sendall(data)
            sender.socket.sendall(encode(healthy, b"healthy"))

        thread = threading.Thread(target=flood)
        thread.start()
        errors = [sender.receive(), sender.receive()]
        assert {errors[0]["code"], errors[1].get("reason")} == {"session_stalled"}
        assert {error["sessionId"] for error in errors} == {stalled["sessionId"]}
        friend.socket.sendall(encode(friendly, b"friendly"))
        assert other.receive()[-7:] == b"healthy" if is_binary else other.receive()["payload"] == "aGVhbHRoeQ"
        thread.join()
        if memory is not None:
            assert relay.read_rss_bytes() - memory < 64 << 20
        seen = []
        while len(seen) < 2 or not {"hangup", "friendly"} <= set(seen):
            message = listener.receive()
            if isinstance(message, bytes):
                seen.append("friendly" if message.endswith(b"friendly") else "data")
            elif message["type"] == "relay":
                seen.append("friendly" if message["payload"] == "ZnJpZW5kbHk" else "data")
            else:
                seen.append(message["type"])
                assert message["type"] == "incoming" or message["reason"] == "session_stalled"
        assert "data" in seen


def test_a_session_that_is_too_fast_is_slowed_and_loses_nothing():
    with start_relay(RELAY_BYTES_PER_SECOND="100000", **FREE) as relay:
        left, right, dialed, _ = open_room(relay, dialer=True, listener=True)
        with left, right:
            frames = [bytes([n]) * 10_000 for n in range(60)]  # half as much again as the burst
            for frame in frames:
                left.send_binary(dialed["tag"].to_bytes(4, "big") + frame)
            left.send("hangup", sessionId=dialed["sessionId"], reason="done")
            assert [right.receive()[4:] for _ in frames] == frames
            assert right.receive()["reason"] == "done"  # behind everything that was said before it


def test_a_session_far_too_fast_ends():
    with start_relay(RELAY_BYTES_PER_SECOND="1000", **FREE) as relay:
        left, right, dialed, _ = open_room(relay)
        with left, right:
            data = encode_text({"type": "relay", "sessionId": dialed["sessionId"], "payload": "A" * 60_000})
            left.socket.sendall(data * 8)
            assert left.receive()["code"] == "rate_limited"
            assert left.receive()["reason"] == "rate_limited"
            message = right.receive()
            while message["type"] == "relay":
                message = right.receive()
            assert (message["type"], message["reason"]) == ("hangup", "rate_limited")


def test_what_clients_took_is_given_back(relay):
    descriptors = relay.count_descriptors()
    clients = [RawClient(relay) for _ in range(20)]
    for client in clients:
        assert client.ask("pair-source", **PEER)["type"] == "session-created"
    half_open = [socket.create_connection(("127.0.0.1", relay.port)) for _ in range(20)]
    for each in (*(client.socket for client in clients), *half_open):
        each.close()
    wait_until_idle(relay, descriptors)


# HTTP


def test_pages(relay):
    status, headers, body = relay.get("/health")
    health = json.loads(body)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert health["status"] == "ok" and set(health) == {"status", "activeSessions", "uptimeSec", "version"}
    assert json.loads(relay.get("/")[2])["pair"] == "/pair (WebSocket)"
    status, headers, body = relay.get("/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4")
    assert b"\nrendezvous_active_sessions 0\n" in body and b"\nrendezvous_frames_total " in body
    status, headers, body = relay.get("/health", "HEAD")
    assert (status, body) == (200, b"") and int(headers["Content-Length"]) > 20


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/health", 405),
        ("CONNECT", "/pair", 405),
        ("GET", "/pair", 426),
    ],
)
def test_requests_that_are_refused(relay, method, path, status):
    assert relay.get(path, method)[0] == status


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /pair HTTP/1.1\r\n\r\n", 400),
        (b"x" * 9000, 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 6000, 431),
        (b"GET /pair HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 426),
        (
            b"GET /pair HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: short\r\n\r\n",
            400,
        ),
        (b"GET /elsewhere HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 404),
    ],
)
def test_openings_that_are_refused(relay, data, status):
    with socket.create_connection(("127.0.0.1", relay.port), timeout=DEADLINE_S) as client:
        client.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := client.recv(4096):
                answer += piece
    assert answer.split()[1] == str(status).encode()


def test_metrics_are_off_by_default():
    with start_relay() as relay:
        assert relay.get("/metrics")[0] == 404
        assert json.loads(relay.get("/")[2])["metrics"] == "(disabled)"


def test_access_tokens():
    with start_relay(RELAY_TOKENS="first,sécond") as relay:
        assert RawClient(relay).status == 401
        assert RawClient(relay, headers=["Authorization: Bearer wrong"]).status == 401
        assert RawClient(relay, headers=["Authorization: Basic first"]).status == 401
        assert RawClient(relay, path="/pair?token=").status == 401
        assert RawClient(relay, headers=["Authorization: Bearer first"]).status == 101
        assert RawClient(relay, headers=["Authorization: bearer sécond"]).status == 101
        assert RawClient(relay, path="/pair?token=s%C3%A9cond").status == 101
        assert relay.read_health()["status"] == "ok"


def test_origins():
    with start_relay(ALLOWED_ORIGINS="https://app.example.org, http://localhost:5173") as relay:
        with RawClient(relay, headers=["Origin: https://evil.example.org"]) as client:
            assert client.status == 101  # so that the page learns why
            assert client.receive() is None
            assert (client.close_code, client.close_reason) == (1008, "origin_not_allowed")
        for headers in (["Origin: http://localhost:5173"], []):
            with RawClient(relay, headers=headers) as client:
                assert client.ask("ping") == {"type": "pong"}


def test_clients_behind_a_trusted_proxy_count_by_themselves():
    with start_relay(TRUSTED_PROXIES="127.0.0.0/8", SESSIONS_PER_ADDRESS="1") as relay:
        answers = []
        with contextlib.ExitStack() as stack:
            for address in (
                "203.0.113.1",
                "203.0.113.2",
                "203.0.113.1",
                "9.9.9.9, 203.0.113.2",
                "2001:db8::1",
                "2001:db8::2",
            ):
                client = stack.enter_context(RawClient(relay, headers=[f"X-Forwarded-For: {address}"]))
                answers.append(client.ask("pair-source", **PEER).get("code", "ok"))
        assert answers == ["ok", "ok", "rate_limited", "rate_limited", "ok", "rate_limited"]


def test_a_proxy_that_nobody_trusts_is_mentioned_once():
    with start_relay() as relay:
        for _ in range(2):
            with RawClient(relay, headers=["X-Forwarded-For: 203.0.113.1"]) as client:
                client.ask("ping")
        relay.stop()
    assert sum("TRUSTED_PROXIES" in line for line in relay.log) == 1


# Running


def test_tls_of_its_own():
    files = {"TLS_CERT_FILE": str(TLS / "cert.pem"), "TLS_KEY_FILE": str(TLS / "key.pem")}
    trusting = build_client_tls(TLS / "cert.pem")
    with start_relay(**files) as relay:
        source, target, session_id = open_pair(relay, tls=trusting)
        with source, target:
            for payload in ("QUJD", "A" * 90_000):
                source.send("relay", sessionId=session_id, payload=payload)
                assert target.receive()["payload"] == payload
            source.socket.sendall(encode_frame(0x81, b"{"))
            assert source.receive()["code"] == "malformed_json"
            assert source.receive() is None and source.close_code == 1008
            assert target.receive()["type"] == "peer-disconnected"
        if hasattr(signal, "SIGHUP"):
            relay.process.send_signal(signal.SIGHUP)
            with RawClient(relay, tls=trusting) as client:
                assert client.ask("ping") == {"type": "pong"}
        with socket.create_connection(("127.0.0.1", relay.port), timeout=DEADLINE_S) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert b"HTTP" not in plain.recv(4096)
        assert relay.stop() == 0


def test_a_certificate_that_was_renewed_badly_is_not_taken(tmp_path):
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_bytes((TLS / name).read_bytes())
    files = {"TLS_CERT_FILE": str(tmp_path / "cert.pem"), "TLS_KEY_FILE": str(tmp_path / "key.pem")}
    if not hasattr(signal, "SIGHUP"):
        pytest.skip("POSIX file modes, links and signals")
    with start_relay(**files) as relay:
        (tmp_path / "cert.pem").write_text("nonsense")
        relay.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("TLS_CERT_FILE" in line for line in relay.log), DEADLINE_S, relay.log)
        with RawClient(relay, tls=build_client_tls(TLS / "cert.pem")) as client:
            assert client.ask("ping") == {"type": "pong"}


@pytest.mark.parametrize("level", ["info", "debug"])
def test_addresses_are_logged_only_when_asked(level):
    with start_relay(LOG_LEVEL=level) as relay:
        source, target, session_id = open_pair(relay)
        with source, target:
            source.send("relay", sessionId=session_id, payload="QUJDREVG")
            target.receive()
        wait_for(lambda: any("session ended" in line for line in relay.log), DEADLINE_S, relay.log)
    text = "\n".join(line for line in relay.log if "RENDEZVOUS_URL" not in line)
    assert ("127.0.0.1" in text) == (level == "debug")
    assert session_id not in text and "QUJDREVG" not in text and "Device" not in text


def test_after_a_restart_everybody_finds_each_other_again():
    port = find_free_port()
    with start_relay(port=port) as relay:
        left, right, _, _ = open_room(relay)
        relay.process.kill()
        for client in (left, right):
            with client, pytest.raises(ConnectionError):
                client.receive()
        relay.process.wait(DEADLINE_S)
    with start_relay(port=port) as relay:
        left, right, dialed, _ = open_room(relay)
        with left, right:
            left.send("relay", sessionId=dialed["sessionId"], payload="QUJD")
            assert right.receive()["payload"] == "QUJD"


def test_a_stop_lets_sessions_finish_and_sends_everybody_elsewhere():
    with start_relay() as relay:
        left, right, dialed, _ = open_room(relay)
        with left, right, RawClient(relay) as idle:
            idle.ask("listen", v=1, room=build_room(5))
            relay.process.send_signal(signal.SIGTERM)
            assert idle.receive() is None and idle.close_code == 1012 and "again" in idle.close_reason
            left.send("relay", sessionId=dialed["sessionId"], payload="QUJD")
            assert right.receive()["payload"] == "QUJD"
            left.send("hangup", sessionId=dialed["sessionId"], reason="done")
            assert right.receive()["reason"] == "done"
            assert left.receive() is None and right.receive() is None
            assert left.close_code == right.close_code == 1012
        assert relay.process.wait(DEADLINE_S) == 0


def test_a_second_signal_ends_at_once():
    with start_relay() as relay:
        left, right, _, _ = open_room(relay)
        with left, right, RawClient(relay) as idle:
            idle.ask("ping")
            relay.process.send_signal(signal.SIGTERM)
            assert idle.receive() is None
            relay.process.send_signal(signal.SIGTERM)
            assert left.receive() is None and left.close_code == 1012
            assert relay.process.wait(DEADLINE_S) == 0


def run_command(*arguments, **environ):
    command = [sys.executable, str(RELAY), *arguments]
    return subprocess.run(
        command, env=CLEAN_ENVIRON | environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "said"),
    [
        (["--port", "nine"], {}, 2, "--port 'nine'"),
        (["--nonsense"], {}, 2, "--nonsense"),
        ([], {"SESSION_TTL_SECONDS": "-1"}, 2, "SESSION_TTL_SECONDS"),
        ([], {"REDIS_URL": "localhost:6379"}, 2, "REDIS_URL"),
        (["--tls-cert-file", "/nowhere", "--tls-key-file", "/nowhere", "--port", "0"], {}, 2, "TLS_CERT_FILE"),
        (["--host", "192.0.2.1"], {}, 1, "cannot listen"),
    ],
)
def test_wrong_use_is_said_in_one_line(arguments, environ, code, said):
    done = run_command(*arguments, **environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_redis_without_its_package_is_said_in_one_line():
    command = [sys.executable, "-S", str(RELAY), "--port", "0"]  # -S: without the packages that are installed
    environ = CLEAN_ENVIRON | {"REDIS_URL": "redis://:hunter2@127.0.0.1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "pip install 'redis>=5'" in done.stderr and "hunter2" not in done.stderr


def test_a_port_that_is_taken():
    with start_relay() as relay:
        done = run_command("--host", "127.0.0.1", "--port", str(relay.port))
    assert done.returncode == 1 and "cannot listen" in done.stderr.splitlines()[-1]


def test_help_names_every_setting():
    done = run_command("--help")
    assert done.returncode == 0
    for setting in rendezvous_server.get_settings_fields().values():
        assert setting.is_secret or (setting.environment in done.stdout and setting.flag in done.stdout)


def test_systems_without_limits_of_descriptors(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert rendezvous_server.raise_descriptor_limit() == sys.maxsize


# Time, in this process, with clocks that run fast


@contextlib.asynccontextmanager
async def run_relay(**settings):
    """A relay on this loop, as the object that clients of this file take."""
    relay = rendezvous_server.Relay(rendezvous_server.Settings(host="127.0.0.1", port=0, **settings))
    url = await relay.start()
    task = asyncio.create_task(relay.run_until_stopped())
    try:
        yield RunningRelay(None, int(url.rpartition(":")[2]), inside=relay)
    finally:
        relay.stop()
        relay.stop()
        await task


def run_with_client(body, **settings):
    """Runs `body(relay)` in a thread beside a relay on a loop."""

    async def run():
        async with run_relay(**settings) as relay:
            await asyncio.wait_for(asyncio.to_thread(body, relay), DEADLINE_S)

    asyncio.run(run())


def test_clients_that_never_finish_their_head(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "HEAD_DEADLINE_S", 0.05)

    def body(relay):
        with socket.create_connection(("127.0.0.1", relay.port), timeout=DEADLINE_S) as client:
            client.sendall(b"GET /pair HTTP/1.1\r\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""

    run_with_client(body)


def test_sockets_that_are_opened_and_never_used(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "FIRST_MESSAGE_DEADLINE_S", 0.05)

    def body(relay):
        with RawClient(relay) as client:
            client.socket.sendall(encode_frame(0x89, b""))  # a ping says nothing
            while (frame := client.receive_frame())[0] != 8:
                pass
            assert frame[1][:2] == (1008).to_bytes(2, "big")

    run_with_client(body)


def test_clients_are_pinged_and_given_up(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "TICK_S", 0.02)
    monkeypatch.setattr(rendezvous_server, "PING_INTERVAL_S", 0.1)

    def body(relay):
        with RawClient(relay) as client:
            received = b""
            with contextlib.suppress(ConnectionError):
                while data := client.socket.recv(4096):  # reads, and answers nothing
                    received += data
            assert received == b"\x89\0\x89\0"

    run_with_client(body)


def test_whatever_a_client_sends_shows_that_it_is_there():
    def body(relay):
        with RawClient(relay) as client:
            assert client.ask("ping") == {"type": "pong"}
            (connection,) = relay.inside._connections.values()
            connection.missed_pings = 2
            client.socket.sendall(encode_frame(0x8A, b""))
            wait_for(lambda: connection.missed_pings == 0, DEADLINE_S, "the pong counts")

    run_with_client(body)


def test_a_close_that_is_not_answered(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "CLOSE_DEADLINE_S", 0.05)

    def body(relay):
        with RawClient(relay) as client:
            client.socket.sendall(encode_frame(0x81, b"{"))
            assert client.receive()["code"] == "malformed_json" and client.receive() is None
            with contextlib.suppress(ConnectionError):
                while True:
                    client.socket.sendall(TEXT)

    run_with_client(body)


def test_too_many_connections(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "CONNECTIONS_LEAST", 1)

    def body(relay):
        clients = [RawClient(relay) for _ in range(5)]  # four for a session, and one
        with pytest.raises((AssertionError, ConnectionError)), RawClient(relay):
            pass
        for client in clients:
            client.socket.close()

    run_with_client(body, max_sessions=1)


def test_too_many_connections_of_one_address(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "CONNECTIONS_LEAST", 1)

    def body(relay):
        clients = [RawClient(relay) for _ in range(5)]
        assert [client.status for client in clients] == [101, 101, 101, 101, 429]
        for client in clients:
            client.socket.close()

    run_with_client(body, sessions_per_address=1)


def test_all_queues_together_are_bounded(monkeypatch):
    monkeypatch.setattr(rendezvous_server, "TOTAL_QUEUE_LIMIT_BYTES", 100_000)
    monkeypatch.setattr(rendezvous_server, "SOCKET_BUFFER_BYTES", 4096)

    def body(relay):
        listener = RawClient(relay, receive_buffer=4096)
        listener.ask("listen", v=1, room=build_room())
        with listener, RawClient(relay) as first, RawClient(relay) as second:
            for sender in (first, second):
                told = sender.ask("dial", v=1, room=build_room())
                frame = {"type": "relay", "sessionId": told["sessionId"], "payload": "A" * 20_000}
                sender.socket.sendall(encode_text(frame) * 50)  # far less than 256 KiB would be too much
                assert sender.receive()["code"] == "session_stalled"
            assert relay.inside.queued_bytes <= 100_000
            listener.socket.close()
            wait_for(lambda: relay.inside.queued_bytes == 0, DEADLINE_S, "nothing waits any more")

    run_with_client(body, sessions_per_address=0, bytes_per_second=0)


def test_a_client_that_asks_too_much_and_never_reads_is_cut_off(monkeypatch):
    for name, value in (("CONTROL_QUEUE_LIMIT_BYTES", 500), ("CONTROL_BURST", 1e9), ("CONTROL_PER_SECOND", 1e9)):
        monkeypatch.setattr(rendezvous_server, name, value)

    def body(relay):
        asked = encode_text({"type": "listen", "v": 1, "room": build_room()}) * 100
        with RawClient(relay, receive_buffer=4096) as flooder, pytest.raises(ConnectionError):
            while True:
                flooder.socket.sendall(asked)

    run_with_client(body)
