"""The secure channel, both ends in memory: known bytes, strangers, hostile peers, credit, how it ends, fuzzing."""

import contextlib
import json
import math
import random
import struct
from dataclasses import replace

import pytest

import dvai_bridge
from dvai_bridge import (
    CHANNEL_DEAD_AFTER_S,
    CHANNEL_FRAME_LIMIT_BYTES,
    CHANNEL_HANDSHAKE_DEADLINE_S,
    CHANNEL_LIFETIME_S,
    CHANNEL_OPENS_LIMIT,
    CHANNEL_PING_INTERVAL_S,
    CHANNEL_RATE_PERIOD_S,
    CHANNEL_REKEY_GRACE_S,
    CHANNEL_RESETS_LIMIT,
    CHANNEL_SEND_QUEUE_LIMIT_BYTES,
    CHANNEL_STREAMS_LIMIT,
    Channel,
    ChannelBusyError,
    ChannelClosed,
    ChannelEstablished,
    ChannelPath,
    ChannelState,
    CloseReason,
    ErrorCode,
    FrameType,
    GoAwayReceived,
    HandshakeMode,
    OwnBackend,
    PairMessage,
    PairReceived,
    StreamData,
    StreamEnded,
    StreamGoneError,
    StreamHead,
    StreamOpened,
    StreamReset,
    StreamWritable,
    build_key_pair,
    encode_inner_frame,
    encode_pair_message,
    is_channel_route,
    parse_pair_message,
)
from tests.support_channel import KNOWN, USES, End, Keys, RawPeer, build_ends, connect, pump, unhex

BACKEND = OwnBackend()
CHAT = ("POST", "/v1/chat/completions", [("Content-Type", "application/json")])
MODELS = ("GET", "/v1/models", [])
MODES = pytest.mark.parametrize("mode", HandshakeMode, ids=lambda mode: mode.name)
PATHS = pytest.mark.parametrize("path", ChannelPath, ids=lambda path: path.name)


def frame(frame_type, body=b"", stream_id=0, flags=0):
    return struct.pack(">BBI", frame_type, flags, stream_id) + body


def head_json(value):
    return json.dumps(value).encode()


OPEN = head_json({"m": "POST", "p": "/v1/chat/completions", "h": []})


def closed(end):
    """The end's ChannelClosed, which is its last event; None while it lives."""
    found = end.seen(ChannelClosed)
    assert len(found) <= 1
    assert not found or end.events[-1] is found[0]
    return found[0] if found else None


# The handshake.


@MODES
def test_known_handshakes_byte_for_byte(mode, crypto_backend):
    consumer, provider = build_ends(crypto_backend, mode)
    known = KNOWN[USES[mode]]
    (first,) = consumer.take()
    provider.give([first])
    (second,) = provider.take()
    assert [first.hex(), second.hex()] == known["outerFrames"]
    assert provider.channel.state is ChannelState.CONFIRMING and provider.events == []
    consumer.give([second])
    (ping,) = consumer.take()
    key = crypto_backend.aead(unhex(known["keyInitiatorToResponder"]))
    assert ping == b"\x10" + key.encrypt(bytes(12), bytes.fromhex("0600000000000000000000000001"), b"")
    provider.give([ping])
    (pong,) = provider.take()
    key = crypto_backend.aead(unhex(known["keyResponderToInitiator"]))
    assert pong == b"\x10" + key.encrypt(bytes(12), bytes.fromhex("0700000000000000000000000001"), b"")
    keys, pair_id = Keys(mode, crypto_backend), unhex(known["pairId"]) if mode is HandshakeMode.RESUME else b""
    for end, remote in ((consumer, keys.responderStatic), (provider, keys.initiatorStatic)):
        assert end.events == [ChannelEstablished(mode, pair_id, remote.public, unhex(known["handshakeHash"]))]
        assert known["handshakeHash"] not in repr(end.events)
        assert end.channel.state is ChannelState.OPEN


def build_strangers():
    """What a responder may get first and must not answer: a name, and what makes the frame."""
    yield "empty", lambda keys: b""
    yield "one byte", lambda keys: b"\x01"
    yield "no mode", lambda keys: b"\x01\x01"
    yield "no message", lambda keys: b"\x01\x01\x02"
    yield "another version", lambda keys: b"\x01\x02" + keys.initiate().first_frame[2:]
    yield "an unknown mode", lambda keys: b"\x01\x01\x04" + keys.initiate().first_frame[3:]
    yield "a second message first", lambda keys: b"\x02" + keys.initiate().first_frame[1:]
    yield "transport first", lambda keys: b"\x10" + bytes(30)
    yield "a longer message", lambda keys: keys.initiate().first_frame + b"\0"
    yield "a shorter message", lambda keys: keys.initiate().first_frame[:-1]
    yield "a payload", lambda keys: b"\x01\x01\x02" + unhex(keys.known["pairId"]) + begin(keys).write_message(b"x")
    yield "a low-order key", lambda keys: keys.initiate().first_frame[:19] + bytes(32) + bytes(16)
    yield "another pairing", lambda keys: keys.initiate(change(keys, pair_id=bytes(16))).first_frame
    yield "another psk", lambda keys: keys.initiate(change(keys, psk=bytes(32))).first_frame
    yield "another name", lambda keys: keys.initiate(change(keys, initiator_device_id="dev-x")).first_frame
    yield "another provider", lambda keys: keys.initiate(change(keys, responder_device_id="dev-x")).first_frame
    yield "another key", lambda keys: keys.initiate(change(keys, static=keys.initiatorEphemeral)).first_frame
    yield "another mode", lambda keys: Keys(HandshakeMode.DELEGATE, keys.backend).initiate().first_frame


def begin(keys, *, is_initiator=True):
    """The Noise handshake of one side by itself."""
    ephemeral = keys.initiatorEphemeral if is_initiator else keys.responderEphemeral
    terms = keys.build_terms(is_initiator=is_initiator)
    return terms.begin(is_initiator=is_initiator, ephemeral=ephemeral, backend=keys.backend)


def change(keys, **changes):
    return keys.build_terms(is_initiator=True, **changes)


STRANGERS = dict(build_strangers())


@pytest.mark.parametrize("build", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_closed_silently_and_alike(build, crypto_backend):
    keys = Keys(HandshakeMode.RESUME, crypto_backend)
    end = End(Channel(keys.respond(), now=0.0))
    end.give([build(keys)])
    assert closed(end).reason is CloseReason.UNPROVEN
    assert end.take() == [] and len(end.events) == 1
    end.give([keys.initiate().first_frame])  # the right one, too late
    assert end.take() == [] and len(end.events) == 1


@MODES
def test_revoked_is_as_unknown_even_to_who_knows_the_decoy(mode, crypto_backend):
    keys = Keys(mode, crypto_backend)
    end = End(Channel(keys.respond(lambda mode, pair_id: None), now=0.0))
    end.give([keys.initiate().first_frame])
    assert closed(end).reason is CloseReason.UNPROVEN and end.take() == []
    if mode is HandshakeMode.DELEGATE:  # everything that decoy terms are made of, but our private key, is public
        end = End(Channel(keys.respond(lambda mode, pair_id: None), now=0.0))
        end.give([keys.initiate(change(keys, address=b"")).first_frame])
        assert closed(end).reason is CloseReason.UNPROVEN and end.take() == []


class CountingBackend(OwnBackend):
    """Counts the key agreements, which are what a first message costs."""

    count = 0

    def x25519(self, private, public):
        self.count += 1
        return super().x25519(private, public)


@MODES
def test_the_unknown_costs_what_the_wrong_costs(mode):
    counts = []
    for is_known in (True, False):
        keys = Keys(mode, CountingBackend())
        first = flip(keys.initiate().first_frame, -1)
        own, before = keys.build_terms(is_initiator=False) if is_known else None, keys.backend.count
        end = End(Channel(keys.respond(lambda mode, pair_id, own=own: own), now=0.0))
        end.give([first])
        assert closed(end).reason is CloseReason.UNPROVEN
        counts.append(keys.backend.count - before)
    known, unknown = counts
    assert unknown > 0
    assert known == unknown if mode is HandshakeMode.RESUME else known >= unknown


def test_a_relay_that_swaps_keys_fails(crypto_backend):
    keys = Keys(HandshakeMode.QR, crypto_backend)
    own = keys.build_terms(is_initiator=False, relayed_key=keys.responderEphemeral.public)
    end = End(Channel(keys.respond(lambda mode, pair_id: own), now=0.0))
    end.give([keys.initiate().first_frame])
    assert closed(end).reason is CloseReason.UNPROVEN and end.take() == []


@pytest.mark.parametrize("is_admitted", [True, False])
def test_the_firewall_is_asked_about_the_proved_key(is_admitted, crypto_backend):
    keys, asked = Keys(HandshakeMode.DELEGATE, crypto_backend), []

    def admits(public):
        asked.append(public)
        return is_admitted

    own = keys.build_terms(is_initiator=False, admits=admits)
    end = End(Channel(keys.respond(lambda mode, pair_id: own), now=0.0))
    forged = bytearray(keys.initiate().first_frame)
    forged[-1] ^= 1
    stranger = End(Channel(keys.respond(lambda mode, pair_id: own), now=0.0))
    stranger.give([bytes(forged)])
    assert asked == [] and closed(stranger).reason is CloseReason.UNPROVEN
    consumer = End(Channel(keys.initiate(), now=0.0))
    end.give(consumer.take())
    consumer.give(end.take())
    assert asked == [] and not consumer.channel.is_answered  # so far it may be a replay
    pump(consumer, end)
    assert asked == [keys.initiatorStatic.public] and consumer.channel.is_answered
    if is_admitted:
        assert closed(end) is None and closed(consumer) is None
        assert end.seen(ChannelEstablished)[0].remote_static == keys.initiatorStatic.public
        return
    assert end.seen(ChannelEstablished) == [] and closed(end).reason is CloseReason.DENIED
    assert consumer.seen(GoAwayReceived)[0].code is ErrorCode.REVOKED  # and only the provider could say it
    assert closed(consumer).reason is CloseReason.CLOSED_BY_PEER


@pytest.mark.parametrize(
    "second", [b"", b"\x02", b"\x02" + bytes(48), b"\x10" + bytes(48), b"\x01" + bytes(48)], ids=lambda x: x.hex()[:8]
)
def test_a_wrong_answer_ends_the_initiator(second, crypto_backend):
    end = End(Channel(Keys(HandshakeMode.RESUME, crypto_backend).initiate(), now=0.0))
    end.take()
    end.give([second])
    assert [type(event) for event in end.events] == [ChannelClosed]
    assert closed(end).reason is CloseReason.UNPROVEN and end.take() == []


def test_an_answer_with_a_payload_ends_the_initiator():
    keys = Keys(HandshakeMode.RESUME, BACKEND)
    end, noise = End(Channel(keys.initiate(), now=0.0)), begin(keys, is_initiator=False)
    noise.read_message(end.take()[0][19:])
    end.give([b"\x02" + noise.write_message(b"x")])
    assert [type(event) for event in end.events] == [ChannelClosed] and end.take() == []


@MODES
def test_one_flipped_bit_in_any_byte_of_the_first_three_frames_ends_it(mode, crypto_backend):
    keys = Keys(mode, crypto_backend)
    first, second, ping = (bytes(each) for each in record_first_frames(keys))
    for index in range(len(first)):
        end = End(Channel(keys.respond(), now=0.0))
        end.give([flip(first, index)])
        assert closed(end).reason is CloseReason.UNPROVEN and end.take() == [], f"byte {index} of frame 1"
    for index in range(len(second)):
        end = End(Channel(keys.initiate(), now=0.0))
        end.take()
        end.give([flip(second, index)])
        assert [type(event) for event in end.events] == [ChannelClosed], f"byte {index} of frame 2"
        assert end.take() == []
    for index in range(len(ping)):
        end = End(Channel(keys.respond(), now=0.0))
        end.give([first, flip(ping, index)])
        assert end.take() == [second] and [type(event) for event in end.events] == [ChannelClosed], f"byte {index}"


def flip(data, index):
    index %= len(data)
    return data[:index] + bytes([data[index] ^ 1 << index % 8]) + data[index + 1 :]


def record_first_frames(keys):
    consumer, provider = End(Channel(keys.initiate(), now=0.0)), End(Channel(keys.respond(), now=0.0))
    (first,) = consumer.take()
    provider.give([first])
    (second,) = provider.take()
    consumer.give([second])
    (ping,) = consumer.take()
    provider.give([ping])
    assert provider.seen(ChannelEstablished)
    return first, second, ping


def test_a_recorded_session_played_again_opens_nothing(crypto_backend):
    keys = Keys(HandshakeMode.RESUME, crypto_backend)
    first, _, ping = record_first_frames(keys)
    keys.responderEphemeral = build_key_pair(bytes([77]) * 32, crypto_backend)  # fresh, as for every connection
    end = End(Channel(keys.respond(), now=0.0))
    end.give([first, ping])
    assert [type(event) for event in end.events] == [ChannelClosed] and closed(end).reason is CloseReason.FORGED


@pytest.mark.parametrize("frame_type", [each for each in FrameType if each is not FrameType.PING])
def test_a_responder_does_nothing_before_the_first_ping(frame_type):
    peer = RawPeer(BACKEND, is_ready=False)
    body = {FrameType.OPEN: OPEN, FrameType.GOAWAY: bytes(6), FrameType.WINDOW: b"\0\0\0\1"}.get(frame_type, bytes(8))
    peer.send(frame(frame_type, body, stream_id=int(frame_type in (1, 2, 3, 4, 5, 10))))
    assert [type(event) for event in peer.end.events] == [ChannelClosed] and peer.end.take() == []


# Frames that are changed on their way.


def exchange_some(ends):
    """A request whose answer has begun; more is queued on both sides."""
    consumer, provider = ends
    stream_id = consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    provider.streams.send_head(stream_id, 200, [])
    pump(*ends)
    for end in ends:
        end.streams.send_data(stream_id, b"x" * 40_000)
    return stream_id


@pytest.mark.parametrize("is_to_provider", [True, False], ids=["to provider", "to consumer"])
@pytest.mark.parametrize("kind", ["replayed", "reflected", "dropped", "swapped", "truncated", "longer", "doubled"])
def test_tampered_frames_are_detected(kind, is_to_provider, crypto_backend):
    ends = connect(crypto_backend)
    stream_id = exchange_some(ends)
    sender, receiver = ends if is_to_provider else ends[::-1]
    frames, theirs = sender.take(), receiver.take()
    assert len(frames) == len(theirs) == 3
    changed = {
        "replayed": [frames[0], frames[0]],
        "reflected": [theirs[0]],
        "dropped": frames[1:],
        "swapped": [frames[1], frames[0]],
        "truncated": [frames[0][:-1]],
        "longer": [frames[0] + b"\0"],
        "doubled": [frames[0] + frames[1][1:]],
    }[kind]
    receiver.give(changed)
    is_too_long = kind in ("longer", "doubled")  # to be looked at
    assert closed(receiver).reason is (CloseReason.VIOLATION if is_too_long else CloseReason.FORGED)
    assert receiver.seen(StreamReset) == [StreamReset(stream_id, None)]
    taken = receiver.data_of(stream_id, StreamData)
    assert taken == b"x" * (len(frames[0]) - 23 if kind == "replayed" else 0)
    with pytest.raises(StreamGoneError):
        receiver.streams.send_data(stream_id, b"x")


def test_an_end_without_fin_is_an_error():
    ends = connect(BACKEND)
    stream_id = exchange_some(ends)
    ends[0].give(ends[1].take())
    ends[0].channel.connection_lost()
    assert ends[0].seen(StreamReset) == [StreamReset(stream_id, None)] and ends[0].seen(StreamEnded) == []
    assert closed(ends[0]).reason is CloseReason.LOST


# Streams.


@PATHS
def test_a_request_and_its_answer(path, crypto_backend):
    consumer, provider = ends = connect(crypto_backend, path=path)
    fields = [
        ("Accept", "text/event-stream"),
        ("X-DVAI-Offload", "never"),
        ("Authorization", "Bearer s"),
        ("Cookie", "c"),
    ]
    first = consumer.streams.open("POST", "/v1/chat/completions", fields, 0.0)
    second = consumer.streams.open("GET", "/v1/models/a%2Fb", [], 0.0, is_last=True)
    consumer.streams.send_data(first, b'{"mod')
    consumer.streams.send_data(first, b'el":1}', is_last=True)
    pump(*ends)
    sent = (("accept", "text/event-stream"), ("x-dvai-offload", "never"))
    assert provider.seen(StreamOpened, StreamData) == [
        StreamOpened(first, "POST", "/v1/chat/completions", sent, False),
        StreamOpened(second, "GET", "/v1/models/a%2Fb", (), True),
        StreamData(first, b'{"model":1}', True),
    ]
    answer = [("Content-Type", "text/event-stream"), ("X-DVAI-Served-By", "d"), ("Set-Cookie", "no"), ("Server", "no")]
    provider.streams.send_head(first, 200, answer)
    provider.streams.send_data(first, b"data: 1\n\n")
    provider.streams.send_head(second, 404, [], is_last=True)
    pump(*ends)
    provider.streams.send_data(first, b"", is_last=True)
    pump(*ends)
    came = (("content-type", "text/event-stream"), ("x-dvai-served-by", "d"))
    assert consumer.seen(StreamHead, StreamData, StreamEnded) == [
        StreamHead(first, 200, came, False),
        StreamHead(second, 404, (), True),
        StreamEnded(second),
        StreamData(first, b"data: 1\n\n", False),
        StreamData(first, b"", True),
        StreamEnded(first),
    ]
    assert [event.stream_id for event in provider.seen(StreamEnded)] == [second, first]
    assert len(consumer.streams) == len(provider.streams) == 0


def test_inner_frames_byte_for_byte():
    peer = RawPeer(BACKEND)
    streams = peer.end.streams
    one = streams.open(*CHAT, 0.0)
    streams.send_data(one, b"hi")
    two = streams.open(*MODELS, 0.0, is_last=True)
    peer.send(frame(1, OPEN, 1), frame(3, b"12345", 1, 1), frame(6, b"pingpong"))
    streams.send_head(1, 201, [("Content-Type", "a/b")])
    streams.reset(two, 0.0)
    assert peer.receive() == [
        b'\x01\0\0\0\0\2{"m":"POST","p":"/v1/chat/completions","h":[["content-type","application/json"]]}',
        b'\x01\1\0\0\0\4{"m":"GET","p":"/v1/models","h":[]}',
        b"\x07\0\0\0\0\0pingpong",
        b'\x02\0\0\0\0\1{"s":201,"h":[["content-type","a/b"]]}',
        b"\x04\0\0\0\0\4\0\3",
        b"\x03\0\0\0\0\2hi",
    ]
    streams.send_data(one, b"", is_last=True)
    streams.send_data(1, b"done", is_last=True)
    peer.end.channel.shut_down(0.0)
    assert peer.receive() == [b"\x08\0\0\0\0\0\0\0\0\1\0\x08", b"\x03\1\0\0\0\2", b"\x03\1\0\0\0\1done"]


def test_either_direction_may_end_first():
    consumer, provider = ends = connect(BACKEND)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    provider.streams.send_head(stream_id, 413, [], is_last=True)  # answered before the body is there
    pump(*ends)
    assert consumer.seen(StreamHead)[0].is_last and consumer.seen(StreamEnded) == []
    with pytest.raises(ValueError, match="after the end"):
        provider.streams.send_data(stream_id, b"x")
    consumer.streams.send_data(stream_id, b"rest", is_last=True)
    pump(*ends)
    assert consumer.seen(StreamEnded) == provider.seen(StreamEnded) == [StreamEnded(stream_id)]
    assert provider.data_of(stream_id, StreamData) == b"rest"


@pytest.mark.parametrize("by_consumer", [True, False])
def test_a_stream_is_cancelled_from_either_side(by_consumer):
    ends = connect(BACKEND)
    stream_id = exchange_some(ends)
    one, other = ends if by_consumer else ends[::-1]
    late = other.take()  # on its way when the stream is cancelled
    one.streams.reset(stream_id, 0.0)
    one.streams.reset(stream_id, 0.0)
    one.give(late)
    pump(*ends)
    assert one.seen(StreamReset, StreamEnded) == []
    assert other.seen(StreamReset, StreamEnded) == [StreamReset(stream_id, ErrorCode.CANCEL)]
    for end in ends:
        assert closed(end) is None and len(end.streams) == 0
        with pytest.raises(StreamGoneError):
            end.streams.compute_send_room(stream_id)
    window = one.streams._receive_window
    assert window.left + window.owed == ChannelPath.DIRECT.window_bytes
    again = ends[0].streams.open(*MODELS, 0.0, is_last=True)
    pump(*ends)
    assert ends[1].seen(StreamOpened)[-1].stream_id == again


def test_misuse_is_a_value_error():
    consumer, provider = ends = connect(BACKEND)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    with pytest.raises(ValueError, match="before the head"):
        provider.streams.send_data(stream_id, b"x")
    with pytest.raises(ValueError, match="sent before"):
        consumer.streams.send_head(stream_id, 200, [])
    with pytest.raises(ValueError, match="room"):
        consumer.streams.send_data(stream_id, bytes(CHANNEL_SEND_QUEUE_LIMIT_BYTES + 1))
    with pytest.raises(ValueError, match="does not travel"):
        consumer.streams.open("POST", "/v1/dvai/probe", [], 0.0)
    with pytest.raises(ValueError, match="a head of more"):
        consumer.streams.open("POST", "/v1/embeddings", [("accept", "x" * 9000)], 0.0)
    for fields in ([("accept", "a"), ("Accept", "b")], [("accept", "a\nb")], [("accept", "Ā")]):
        with pytest.raises(ValueError, match="HTTP cannot carry"):
            consumer.streams.open("GET", "/v1/models", fields, 0.0)
    for status in (100, 101, 199, 600, 0):
        with pytest.raises(ValueError, match="no final status"):
            provider.streams.send_head(stream_id, status, [])
    with pytest.raises(ValueError, match="PAIR"):
        consumer.channel.send_pair(PAIR)
    consumer.streams.send_data(stream_id, b"x", is_last=True)
    with pytest.raises(ValueError, match="after the end"):
        consumer.streams.send_data(stream_id, b"x")
    pump(*ends)
    assert provider.data_of(stream_id, StreamData) == b"x"


@pytest.mark.parametrize(
    ("method", "path", "travels"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/embeddings", True),
        ("GET", "/v1/dvai/health", True),
        ("GET", "/v1/models/org%2Fname:q4", True),
        ("GET", "/v1/models/", False),
        ("GET", "/v1/models/a?x=1", False),
        ("GET", "/v1/models/%2e%2e", False),
        ("GET", "/v1/models/../dvai/peers", False),
        ("GET", "/v1/models/a b", False),
        ("POST", "/v1/models", False),
        ("GET", "/v1/chat/completions", False),
        ("POST", "/v1/chat/completions?x", False),
        ("POST", "/v1/dvai/handshake", False),
        ("GET", "/metrics", False),
        ("GET", "/v1/dvai/peers", False),
    ],
)
def test_routes_that_travel(method, path, travels):
    assert is_channel_route(method, path) is travels
    peer = RawPeer(BACKEND)
    peer.send(frame(1, head_json({"m": method, "p": path}), 1, 1))
    assert len(peer.end.seen(StreamOpened)) == travels
    assert peer.receive() == ([] if travels else [frame(4, b"\0\4", 1)])


# Credit.


@PATHS
def test_credit_is_given_back_when_half_is_consumed(path):
    peer = RawPeer(BACKEND, path=path)
    assert path.window_bytes == 4 * path.stream_window_bytes == (2**20 if path is ChannelPath.DIRECT else 2**17)
    window, half = path.stream_window_bytes, path.stream_window_bytes // 2
    peer.send(frame(1, OPEN, 1), *(frame(3, bytes(8192), 1) for _ in range(window // 8192)))
    given = [frame(5, struct.pack(">I", half)), frame(5, struct.pack(">I", half), 1)]
    peer.end.streams.consume(1, half - 1)
    assert peer.receive() == []
    peer.end.streams.consume(1, 1)
    assert peer.receive() == given
    peer.end.streams.consume(1, half)
    assert peer.receive() == given
    peer.send(*(frame(3, bytes(8192), 1, int(left == 1)) for left in range(window // 8192, 0, -1)))
    peer.end.streams.consume(1, window)  # the stream's body is complete: only the connection has use for credit
    assert peer.receive() == [frame(5, struct.pack(">I", window))]
    peer.end.streams.consume(1, 5)
    peer.end.streams.consume(999, 5)
    assert closed(peer.end) is None and peer.end.streams._receive_window.owed == 0


@PATHS
def test_a_long_body_flows_as_fast_as_it_is_consumed(path):
    consumer, provider = ends = connect(BACKEND, path=path)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    body, sent, taken = random.Random(3).randbytes(5 * path.stream_window_bytes // 2), 0, 0
    while taken < len(body):
        if sent < len(body):
            part = body[sent : sent + consumer.streams.compute_send_room(stream_id)]
            sent += len(part)
            consumer.streams.send_data(stream_id, part, is_last=sent == len(body))
        pump(*ends)
        arrived = len(provider.data_of(stream_id, StreamData))
        assert taken < arrived <= taken + path.stream_window_bytes
        provider.streams.consume(stream_id, arrived - taken)
        taken = arrived
    assert provider.data_of(stream_id, StreamData) == body and provider.seen(StreamData)[-1].is_last


def test_padding_hides_lengths_and_is_counted():
    consumer, provider = ends = connect(BACKEND, path=ChannelPath.RELAY)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    sizes = {}
    for size in (0, 1, 55, 56, 57, 120, 121, 16_376):
        consumer.streams.send_data(stream_id, b"a" * size)
        frames = consumer.take()
        sizes[size] = [len(each) - 17 for each in frames]
        provider.give(frames)
    assert sizes == {0: [], 1: [64], 55: [64], 56: [64], 57: [128], 120: [128], 121: [192], 16_376: [16_384]}
    assert provider.data_of(stream_id, StreamData) == b"a" * (1 + 55 + 56 + 57 + 120 + 121 + 16_376)
    used = 3 * 58 + 2 * 122 + 186 + 16_378
    assert provider.streams._receive_window.left == consumer.streams._send_credit == 128 * 1024 - used
    consumer.streams.send_data(stream_id, b"", is_last=True)
    assert [len(each) - 17 for each in consumer.take()] == [64]


def test_a_padded_stream_ends_even_without_credit():
    consumer, provider = ends = connect(BACKEND, path=ChannelPath.RELAY)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    consumer.streams.send_data(stream_id, bytes(40_000))
    pump(*ends)
    taken = len(provider.data_of(stream_id, StreamData))
    assert taken < 40_000 and consumer.streams._streams[stream_id].send_credit < 58
    provider.streams.consume(stream_id, taken)
    consumer.streams.send_data(stream_id, b"", is_last=True)
    pump(*ends)
    assert len(provider.data_of(stream_id, StreamData)) == 40_000 and provider.seen(StreamData)[-1].is_last


@PATHS
def test_streams_whose_reader_stops_do_not_hold_another(path):
    consumer, provider = ends = connect(BACKEND, path=path)
    stalled = [consumer.streams.open(*CHAT, 0.0) for _ in range(3)]
    moving = consumer.streams.open(*CHAT, 0.0)
    for stream_id in stalled:
        consumer.streams.send_data(stream_id, bytes(path.stream_window_bytes))
    pump(*ends)
    for stream_id in stalled:
        room = consumer.streams.compute_send_room(stream_id)
        consumer.streams.send_data(stream_id, bytes(room))
    pump(*ends)
    assert all(len(provider.data_of(each, StreamData)) <= path.stream_window_bytes for each in stalled)
    for _ in range(20):
        consumer.streams.send_data(moving, b"m" * 10_000)
        pump(*ends)
        provider.streams.consume(moving, 10_000)
    assert provider.data_of(moving, StreamData) == b"m" * 200_000


def test_streams_take_turns_and_control_goes_first():
    consumer, provider = ends = connect(BACKEND)
    ids = [consumer.streams.open(*CHAT, 0.0) for _ in range(3)]
    pump(*ends)
    for stream_id in ids:
        consumer.streams.send_data(stream_id, bytes(50_000), is_last=True)
    frames = consumer.take(limit_bytes=1)
    late = consumer.streams.open(*MODELS, 0.0, is_last=True)
    while more := consumer.take(limit_bytes=1):
        assert len(more) == 1
        frames += more
    provider.give(frames)
    order = [event.stream_id for event in provider.seen(StreamOpened, StreamData)[3:]]
    assert order == [ids[0], late, ids[1], ids[2], *ids, *ids, *ids]


def test_a_full_queue_says_when_it_has_room():
    consumer, provider = ends = connect(BACKEND)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    half = CHANNEL_SEND_QUEUE_LIMIT_BYTES // 2
    consumer.streams.send_data(stream_id, bytes(2 * half - 1))
    consumer.streams.send_data(stream_id, b"x")
    assert consumer.streams.compute_send_room(stream_id) == 0
    while consumer.streams.compute_send_room(stream_id) <= half:
        assert consumer.seen(StreamWritable) == []
        provider.give(consumer.take(limit_bytes=1))
    assert consumer.seen(StreamWritable) == [StreamWritable(stream_id)]
    pump(*ends)
    assert consumer.seen(StreamWritable) == [StreamWritable(stream_id)]
    assert len(provider.data_of(stream_id, StreamData)) == 2 * half


# Numbers of streams and rates.


def test_a_thirty_third_stream_is_refused():
    peer = RawPeer(BACKEND)
    ids = range(1, 2 * CHANNEL_STREAMS_LIMIT + 3, 2)
    peer.send(*(frame(1, OPEN, stream_id) for stream_id in ids))
    assert len(peer.end.seen(StreamOpened)) == CHANNEL_STREAMS_LIMIT
    assert peer.receive() == [frame(4, b"\0\4", ids[-1])]
    peer.send(frame(3, b"x", ids[-1], 1))  # was on its way
    assert closed(peer.end) is None and peer.end.streams._held == {}


def test_our_own_limit_of_streams():
    consumer, provider = ends = connect(BACKEND)
    ids = [consumer.streams.open(*CHAT, 0.0) for _ in range(CHANNEL_STREAMS_LIMIT)]
    assert consumer.streams.open_delay_s(0.0) == math.inf
    with pytest.raises(ChannelBusyError):
        consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    theirs = provider.streams.open(*MODELS, 0.0, is_last=True)  # each side has its own
    pump(*ends)
    assert consumer.seen(StreamOpened)[0].stream_id == theirs
    consumer.streams.reset(ids[0], 0.0)
    assert consumer.streams.open(*CHAT, 0.0) == ids[-1] + 2
    pump(*ends)
    assert provider.seen(StreamReset) == [StreamReset(ids[0], ErrorCode.CANCEL)] and consumer.seen(StreamReset) == []


def test_we_keep_to_half_of_the_rates():
    consumer, provider = ends = connect(BACKEND)
    for _ in range(CHANNEL_OPENS_LIMIT // 2):
        stream_id = consumer.streams.open(*MODELS, 1.0, is_last=True)
        consumer.streams.reset(stream_id, 1.0)
        if consumer.streams.open_delay_s(1.0) == math.inf:  # RESETs that wait keep their streams' places
            break
    pump(*ends, now=1.0)
    assert len(provider.seen(StreamReset)) == CHANNEL_RESETS_LIMIT // 2
    assert len(provider.seen(StreamOpened)) == CHANNEL_RESETS_LIMIT // 2 + CHANNEL_STREAMS_LIMIT
    later = consumer.channel.next_deadline()
    assert later == 1.0 + CHANNEL_RATE_PERIOD_S
    pump(*ends, now=later)
    assert len(provider.seen(StreamReset)) == len(provider.seen(StreamOpened))
    assert consumer.streams.open_delay_s(later) == 0.0


def test_a_sign_of_life_can_be_asked_for_at_any_time():
    consumer, provider = ends = connect(BACKEND)
    assert consumer.channel.data_to_send(1.0) == []
    consumer.channel.ping(1.0)
    pump(*ends, now=1.0)
    assert consumer.channel.next_deadline() == 1.0 + CHANNEL_PING_INTERVAL_S, "the PONG came"
    provider.channel.close()
    pump(*ends, now=1.0)
    consumer.channel.ping(2.0)
    assert consumer.channel.data_to_send(2.0) == []


def test_opens_wait_for_the_rate():
    consumer, provider = ends = connect(BACKEND)
    for _ in range(CHANNEL_OPENS_LIMIT // 2):
        stream_id = consumer.streams.open(*MODELS, 1.0, is_last=True)
        pump(*ends)
        provider.streams.send_head(stream_id, 200, [], is_last=True)
        pump(*ends)
    assert consumer.streams.open_delay_s(3.0) == CHANNEL_RATE_PERIOD_S - 2.0
    with pytest.raises(ChannelBusyError):
        consumer.streams.open(*MODELS, 3.0)
    assert consumer.streams.open_delay_s(1.0 + CHANNEL_RATE_PERIOD_S) == 0.0


# A hostile peer: every violation and the code it is told.

HOSTILE = {
    "unknown type": ([frame(11)], ErrorCode.PROTOCOL),
    "type 255": ([frame(255)], ErrorCode.PROTOCOL),
    "no header": ([b"\3\0\0\0\0"], ErrorCode.PROTOCOL),
    "nothing": ([b""], ErrorCode.PROTOCOL),
    "an unknown flag": ([frame(1, OPEN, 1, 2)], ErrorCode.PROTOCOL),
    "an unknown flag beside FIN": ([frame(1, OPEN, 1, 3)], ErrorCode.PROTOCOL),
    "FIN on PAD": ([frame(0, b"", 0, 1)], ErrorCode.PROTOCOL),
    "FIN on RESET": ([frame(1, OPEN, 1), frame(4, b"\0\0", 1, 1)], ErrorCode.PROTOCOL),
    "FIN on WINDOW": ([frame(5, b"\0\0\0\1", 0, 1)], ErrorCode.PROTOCOL),
    "FIN on PING": ([frame(6, bytes(8), 0, 1)], ErrorCode.PROTOCOL),
    "FIN on GOAWAY": ([frame(8, bytes(6), 0, 1)], ErrorCode.PROTOCOL),
    "OPEN of stream 0": ([frame(1, OPEN)], ErrorCode.PROTOCOL),
    "DATA of stream 0": ([frame(3, b"x")], ErrorCode.PROTOCOL),
    "RESET of stream 0": ([frame(4, b"\0\0")], ErrorCode.PROTOCOL),
    "PAD of a stream": ([frame(0, b"", 1)], ErrorCode.PROTOCOL),
    "PING of a stream": ([frame(6, bytes(8), 1)], ErrorCode.PROTOCOL),
    "GOAWAY of a stream": ([frame(8, bytes(6), 1)], ErrorCode.PROTOCOL),
    "PING of 7 bytes": ([frame(6, bytes(7))], ErrorCode.PROTOCOL),
    "PING of 9 bytes": ([frame(6, bytes(9))], ErrorCode.PROTOCOL),
    "WINDOW of 3 bytes": ([frame(5, bytes(3))], ErrorCode.PROTOCOL),
    "RESET of 3 bytes": ([frame(1, OPEN, 1), frame(4, bytes(3), 1)], ErrorCode.PROTOCOL),
    "GOAWAY of 5 bytes": ([frame(8, bytes(5))], ErrorCode.PROTOCOL),
    "our kind of id": ([frame(1, OPEN, 2)], ErrorCode.PROTOCOL),
    "an id twice": ([frame(1, OPEN, 1), frame(1, OPEN, 1)], ErrorCode.PROTOCOL),
    "ids that go down": ([frame(1, OPEN, 5), frame(1, OPEN, 3)], ErrorCode.PROTOCOL),
    "an id again after a refusal": ([frame(1, b'{"m":"X","p":"/"}', 1), frame(1, OPEN, 1)], ErrorCode.PROTOCOL),
    "OPEN too long": ([frame(1, OPEN + bytes(8193 - len(OPEN)), 1)], ErrorCode.LIMIT),
    "OPEN no JSON": ([frame(1, b"{'m':1}", 1)], ErrorCode.PROTOCOL),
    "OPEN no UTF-8": ([frame(1, b'{"m":"\xff"}', 1)], ErrorCode.PROTOCOL),
    "OPEN deep": ([frame(1, b"[" * 4000, 1)], ErrorCode.PROTOCOL),
    "OPEN a list": ([frame(1, b"[]", 1)], ErrorCode.PROTOCOL),
    "OPEN a key twice": ([frame(1, b'{"m":"GET","m":"POST","p":"/"}', 1)], ErrorCode.PROTOCOL),
    "OPEN without a method": ([frame(1, b'{"p":"/v1/models"}', 1)], ErrorCode.PROTOCOL),
    "OPEN without a path": ([frame(1, b'{"m":"GET"}', 1)], ErrorCode.PROTOCOL),
    "OPEN with a number for a path": ([frame(1, b'{"m":"GET","p":1}', 1)], ErrorCode.PROTOCOL),
    "DATA before OPEN": ([frame(3, b"x", 1)], ErrorCode.PROTOCOL),
    "DATA of a stream of ours that is not": ([frame(3, b"x", 2)], ErrorCode.PROTOCOL),
    "DATA after FIN on OPEN": ([frame(1, OPEN, 1, 1), frame(3, b"x", 1)], ErrorCode.PROTOCOL),
    "DATA after FIN": ([frame(1, OPEN, 1), frame(3, b"x", 1, 1), frame(3, b"x", 1)], ErrorCode.PROTOCOL),
    "FIN twice": ([frame(1, OPEN, 1), frame(3, b"", 1, 1), frame(10, bytes(58), 1, 1)], ErrorCode.PROTOCOL),
    "DATA after RESET": ([frame(1, OPEN, 1), frame(4, b"\0\3", 1), frame(3, b"x", 1)], ErrorCode.PROTOCOL),
    "DATA with nothing": ([frame(1, OPEN, 1), frame(3, b"", 1)], ErrorCode.PROTOCOL),
    "HEAD from who asks": ([frame(1, OPEN, 1), frame(2, b'{"s":200,"h":[]}', 1)], ErrorCode.PROTOCOL),
    "HEAD of no stream": ([frame(2, b'{"s":200,"h":[]}', 2)], ErrorCode.PROTOCOL),
    "padding longer than the body": ([frame(1, OPEN, 1), frame(10, b"\0\3ab", 1)], ErrorCode.PROTOCOL),
    "padding that says something": ([frame(1, OPEN, 1), frame(10, b"\0\1a\0\1", 1)], ErrorCode.PROTOCOL),
    "padding without a length": ([frame(1, OPEN, 1), frame(10, b"\0", 1)], ErrorCode.PROTOCOL),
    "RESET of no stream": ([frame(4, b"\0\0", 1)], ErrorCode.PROTOCOL),
    "RESET of no stream of ours": ([frame(4, b"\0\0", 2)], ErrorCode.PROTOCOL),
    "WINDOW of no stream": ([frame(5, b"\0\0\0\1", 1)], ErrorCode.PROTOCOL),
    "WINDOW of nothing": ([frame(5, bytes(4))], ErrorCode.PROTOCOL),
    "WINDOW that was not used": ([frame(5, b"\0\0\0\1")], ErrorCode.FLOW),
    "WINDOW of a stream, not used": ([frame(1, OPEN, 1), frame(5, b"\0\0\0\1", 1)], ErrorCode.FLOW),
    "WINDOW of everything": ([frame(5, b"\xff\xff\xff\xff")], ErrorCode.FLOW),
    "more than a stream's credit": ([frame(1, OPEN, 1), *[frame(3, bytes(16_378), 1)] * 17], ErrorCode.FLOW),
    "GOAWAY for a stream that is not": ([frame(8, b"\0\0\0\2\0\0")], ErrorCode.PROTOCOL),
    "PAIR where none belongs": ([frame(9, b"{}")], ErrorCode.PROTOCOL),
    "a flood of PINGs": ([frame(6, bytes(8))] * 257, ErrorCode.CALM),
    "OPENs beyond what can be refused": ([frame(1, OPEN, 2 * n + 1) for n in range(32 + 50 + 101)], ErrorCode.CALM),
    "a flood of RESETs": (
        [each for n in range(101) for each in (frame(1, OPEN, 2 * n + 1), frame(4, b"\0\3", 2 * n + 1))],
        ErrorCode.CALM,
    ),
    "a flood of RESETs of one stream": ([frame(1, OPEN, 1), *[frame(4, b"\0\3", 1)] * 101], ErrorCode.CALM),
}
BAD_FIELDS = {
    "no list": {"a": "b"},
    "too many": [["accept", "x"]] * 101,
    "no pair": [["accept"]],
    "three": [["accept", "b", "c"]],
    "a number": [["accept", 1]],
    "a text": ["ab"],
    "twice": [["accept", "a"], ["Accept", "b"]],
    "a line break": [["accept", "a\r\nb: c"]],
    "a NUL": [["accept", "a\0"]],
    "no token": [["acc ept", "a"]],
    "no name": [["", "a"]],
    "beyond Latin-1": [["accept", "Ā"]],
}
HOSTILE |= {
    f"fields: {name}": ([frame(1, head_json({"m": "GET", "p": "/v1/models", "h": fields}), 1)], ErrorCode.PROTOCOL)
    for name, fields in BAD_FIELDS.items()
}


def check_told(peer, code):
    """The peer was told `code` by a GOAWAY, after which there is silence."""
    last = closed(peer.end)
    assert (last.reason, last.code) == (CloseReason.VIOLATION, code), last
    *_, goaway = peer.receive()
    assert goaway[0] == FrameType.GOAWAY and goaway[-2:] == struct.pack(">H", code)
    assert peer.end.channel._ciphers is None  # the keys are forgotten
    opened = len(peer.end.seen(StreamOpened))
    assert len(peer.end.seen(StreamReset, StreamEnded)) == opened
    events = len(peer.end.events)
    peer.send(frame(1, OPEN, 999), frame(6, bytes(8)))
    peer.end.channel.on_timeout(1e9)
    peer.end.channel.close()
    peer.end.channel.connection_lost()
    assert peer.receive() == [] and len(peer.end.events) == events and peer.end.channel.next_deadline() is None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_consumer(name):
    frames, code = HOSTILE[name]
    peer = RawPeer(BACKEND)
    peer.send(*frames[:-1])
    assert closed(peer.end) is None
    peer.send(frames[-1])
    check_told(peer, code)


HOSTILE_ANSWERS = {
    "DATA before HEAD": [frame(3, b"x", 2)],
    "FIN before HEAD": [frame(3, b"", 2, 1)],
    "HEAD twice": [frame(2, b'{"s":200}', 2), frame(2, b'{"s":200}', 2)],
    "HEAD after FIN": [frame(2, b'{"s":200}', 2, 1), frame(2, b'{"s":200}', 2)],
    "DATA after FIN": [frame(2, b'{"s":200}', 2, 1), frame(3, b"x", 2)],
    "OPEN of our stream": [frame(1, OPEN, 2)],
    "no status": [frame(2, b'{"h":[]}', 2)],
    "an interim status": [frame(2, b'{"s":100}', 2)],
    "status 600": [frame(2, b'{"s":600}', 2)],
    "status true": [frame(2, b'{"s":true}', 2)],
    "status 2e2": [frame(2, b'{"s":2e2}', 2)],
    "a status in words": [frame(2, b'{"s":"200"}', 2)],
    "a field with a line break": [frame(2, b'{"s":200,"h":[["x-dvai-route","a\\nb"]]}', 2)],
    "the next stream of ours": [frame(2, b'{"s":200}', 4)],
}


@pytest.mark.parametrize("name", HOSTILE_ANSWERS)
def test_a_hostile_provider(name):
    peer = RawPeer(BACKEND)
    peer.end.streams.open(*CHAT, 0.0)
    peer.receive()
    *before, last = HOSTILE_ANSWERS[name]
    peer.send(*before)
    assert closed(peer.end) is None
    peer.send(last)
    assert closed(peer.end).code is ErrorCode.PROTOCOL
    assert peer.end.seen(StreamReset) == [StreamReset(2, None)]
    assert peer.receive() == [frame(8, struct.pack(">IH", 0, 1))]


@pytest.mark.parametrize(
    "outer",
    [b"", b"\x10", b"\x11" + bytes(40), b"\x01\x01\x02" + bytes(64), b"\x02" + bytes(48), b"\x10" + bytes(16_401)],
    ids=["empty", "no ciphertext", "unknown type", "a first message", "a second message", "too long"],
)
def test_outer_frames_that_do_not_belong(outer, crypto_backend):
    peer = RawPeer(crypto_backend)
    peer.end.give([outer])
    assert closed(peer.end).reason in (CloseReason.VIOLATION, CloseReason.FORGED)


def test_the_largest_frame_and_one_byte_more():
    peer = RawPeer(BACKEND)
    peer.send(frame(0, bytes(CHANNEL_FRAME_LIMIT_BYTES - 6)))
    assert closed(peer.end) is None
    peer.send(frame(0, bytes(CHANNEL_FRAME_LIMIT_BYTES - 5)))
    check_told(peer, ErrorCode.PROTOCOL)


def test_the_connections_credit_is_checked_too():
    peer = RawPeer(BACKEND, path=ChannelPath.RELAY)
    for stream_id in (1, 3, 5, 7):
        peer.send(frame(1, OPEN, stream_id), *[frame(3, bytes(8192), stream_id)] * 4)
    assert closed(peer.end) is None
    peer.send(frame(1, OPEN, 9), frame(3, b"x", 9))
    check_told(peer, ErrorCode.FLOW)


def test_rates_that_are_just_kept_are_served():
    peer = RawPeer(BACKEND)
    for second in range(3):
        now = second * CHANNEL_RATE_PERIOD_S
        for n in range(100):
            stream_id = 2 * (100 * second + n) + 1
            peer.send(frame(1, OPEN, stream_id), frame(4, b"\0\3", stream_id), now=now)
            peer.receive(now)
    assert closed(peer.end) is None and len(peer.end.seen(StreamReset)) == 300


def test_a_flood_of_requests():
    peer = RawPeer(BACKEND)
    for stream_id in range(1, 2 * CHANNEL_OPENS_LIMIT, 2):
        peer.send(frame(1, OPEN, stream_id, 1), now=1.0)
        peer.end.streams.send_head(stream_id, 200, [], is_last=True)
        peer.receive(1.0)
    assert closed(peer.end) is None and len(peer.end.seen(StreamEnded)) == CHANNEL_OPENS_LIMIT
    peer.send(frame(1, OPEN, 2 * CHANNEL_OPENS_LIMIT + 1, 1), now=10.9)
    check_told(peer, ErrorCode.CALM)


def test_refusals_stay_within_the_rate_of_resets():
    peer = RawPeer(BACKEND, serves=False)
    peer.send(*(frame(1, OPEN, 2 * n + 1) for n in range(150)))
    assert peer.receive() == [frame(4, b"\0\4", 2 * n + 1) for n in range(50)]
    peer.send(frame(1, OPEN, 301))
    check_told(peer, ErrorCode.CALM)


def test_codes_of_later_versions_end_streams_too():
    peer = RawPeer(BACKEND)
    peer.send(frame(1, OPEN, 1), frame(4, b"\x12\x34", 1))
    assert peer.end.seen(StreamReset) == [StreamReset(1, ErrorCode.INTERNAL)]


def test_frames_that_cross_an_end_are_no_violation():
    peer = RawPeer(BACKEND)
    peer.send(frame(1, OPEN, 1, 1))
    peer.end.streams.send_head(1, 200, [], is_last=True)
    peer.receive()
    assert peer.end.seen(StreamEnded)
    peer.send(frame(5, b"\0\0\0\1", 1), frame(4, b"\0\3", 1), frame(0, b"anything"), frame(7, bytes(8)))
    assert closed(peer.end) is None and peer.end.seen(StreamReset) == []


# Life and end.


def test_a_handshake_has_a_deadline():
    consumer, provider = build_ends(BACKEND)
    provider.give(consumer.take())
    for end in (consumer, provider):
        assert end.channel.next_deadline() == CHANNEL_HANDSHAKE_DEADLINE_S
        end.channel.on_timeout(CHANNEL_HANDSHAKE_DEADLINE_S - 0.001)
        assert closed(end) is None
        end.channel.on_timeout(CHANNEL_HANDSHAKE_DEADLINE_S)
        assert closed(end).reason is CloseReason.TIMED_OUT
    assert consumer.take() == []


def test_silence_is_asked_about_and_then_is_the_end():
    consumer, _ = ends = connect(BACKEND)
    stream_id = exchange_some(ends)
    pump(*ends)
    assert consumer.channel.next_deadline() == CHANNEL_PING_INTERVAL_S
    consumer.channel.on_timeout(CHANNEL_PING_INTERVAL_S - 0.001)
    assert consumer.take(14.9) == []
    pings = []
    while (now := consumer.channel.next_deadline()) < CHANNEL_DEAD_AFTER_S:
        consumer.channel.on_timeout(now)
        pings.append((now, len(consumer.take(now))))
    assert pings == [(15.0, 1), (30.0, 1)]
    consumer.channel.on_timeout(CHANNEL_DEAD_AFTER_S)
    assert closed(consumer).reason is CloseReason.TIMED_OUT
    assert consumer.seen(StreamReset) == [StreamReset(stream_id, None)]


def test_a_pong_is_a_sign_of_life():
    consumer, provider = ends = connect(BACKEND)
    for now in (15.0, 30.0, 45.0, 60.0):
        consumer.channel.on_timeout(now)
        pump(*ends, now=now)
    assert consumer.channel.next_deadline() == 75.0 and closed(consumer) is closed(provider) is None
    consumer.channel.on_timeout(4000.0)  # awake again after an hour: what is there is no connection any more
    assert closed(consumer).reason is CloseReason.TIMED_OUT


def test_shutting_down_lets_streams_finish():
    consumer, provider = ends = connect(BACKEND)
    running = consumer.streams.open(*CHAT, 0.0, is_last=True)
    pump(*ends)
    provider.channel.shut_down(1.0, grace_s=10.0)
    late = consumer.streams.open(*CHAT, 1.0)  # crosses the GOAWAY
    consumer.streams.send_data(late, b"x")
    pump(*ends, now=1.0)
    assert consumer.seen(GoAwayReceived) == [GoAwayReceived(running, ErrorCode.SHUTDOWN)]
    assert consumer.seen(StreamReset) == [StreamReset(late, ErrorCode.REFUSED)]
    assert len(provider.seen(StreamOpened)) == 1
    assert consumer.streams.open_delay_s(1.0) == provider.streams.open_delay_s(1.0) == math.inf
    assert closed(consumer) is closed(provider) is None
    provider.streams.send_head(running, 200, [])
    provider.streams.send_data(running, b"whole", is_last=True)
    pump(*ends, now=2.0)
    assert consumer.data_of(running, StreamData) == b"whole"
    assert closed(consumer).reason is closed(provider).reason is CloseReason.FINISHED


def test_shutting_down_ends_with_its_grace():
    consumer, provider = ends = connect(BACKEND)
    running = consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    provider.channel.shut_down(1.0, grace_s=10.0)
    pump(*ends, now=1.0)
    provider.channel.shut_down(2.0, grace_s=99.0)  # a second time gives no longer
    assert provider.channel.next_deadline() == 11.0
    provider.channel.on_timeout(11.0)
    pump(*ends, now=11.0)
    assert closed(provider).reason is CloseReason.CLOSED_HERE
    consumer.channel.connection_lost()
    assert closed(consumer).reason is CloseReason.LOST
    assert provider.seen(StreamReset) == consumer.seen(StreamReset) == [StreamReset(running, None)]


def test_an_idle_channel_shuts_down_at_once():
    consumer, provider = ends = connect(BACKEND)
    provider.channel.shut_down(1.0)
    pump(*ends)
    assert closed(consumer).reason is closed(provider).reason is CloseReason.FINISHED
    consumer.channel.connection_lost()
    assert closed(consumer).reason is CloseReason.FINISHED


def test_a_channel_that_ends_in_order_sends_all_it_has():
    peer = RawPeer(BACKEND)
    peer.send(frame(1, OPEN, 1, 1))
    peer.end.streams.send_head(1, 204, [], is_last=True)
    peer.end.channel.shut_down(0.0)
    peer.send(frame(6, b"question"))  # no stream is left, but three frames have not gone out
    assert closed(peer.end) is None
    assert len(peer.end.take(limit_bytes=1)) == 1 and closed(peer.end) is None
    assert len(peer.end.take(limit_bytes=1)) == 1 and closed(peer.end) is None
    assert len(peer.end.take(limit_bytes=1)) == 1 and closed(peer.end).reason is CloseReason.FINISHED


@pytest.mark.parametrize("by_provider", [True, False])
def test_revocation_ends_everything_at_once(by_provider):
    ends = connect(BACKEND)
    stream_id = exchange_some(ends)
    one, other = ends[::-1] if by_provider else ends
    one.channel.close(ErrorCode.REVOKED)
    assert one.seen(StreamReset) == [StreamReset(stream_id, None)]
    goaway = one.take()
    assert len(goaway) == 1 and one.take() == []  # what waited is not sent any more
    other.take()
    other.give(goaway)
    assert (closed(other).reason, closed(other).code) == (CloseReason.CLOSED_BY_PEER, ErrorCode.REVOKED)
    assert other.seen(StreamReset) == [StreamReset(stream_id, None)]
    assert closed(one).reason is CloseReason.CLOSED_HERE and other.take() == []


@pytest.mark.parametrize("code", ErrorCode, ids=lambda code: code.name)
def test_what_a_goaway_means(code):
    peer = RawPeer(BACKEND)
    peer.send(frame(1, OPEN, 1), frame(8, struct.pack(">IH", 0, code)))
    drains = code in (ErrorCode.NO_ERROR, ErrorCode.REKEY, ErrorCode.SHUTDOWN)
    assert (peer.end.channel.state is ChannelState.DRAINING) is drains
    assert len(peer.end.seen(StreamReset)) == (not drains)


def check_renewed(ends, now):
    """A new handshake is due: what runs goes on, a new stream needs a new channel."""
    consumer, provider = ends
    assert consumer.seen(GoAwayReceived) + provider.seen(GoAwayReceived) != []
    assert {event.code for event in consumer.seen(GoAwayReceived) + provider.seen(GoAwayReceived)} == {ErrorCode.REKEY}
    provider.streams.send_head(1, 200, [], is_last=True)
    with pytest.raises(ChannelBusyError):
        consumer.streams.open(*CHAT, now)
    pump(*ends, now=now)
    assert closed(consumer).reason is closed(provider).reason is CloseReason.FINISHED


def test_a_day_is_a_channels_life(monkeypatch):
    assert CHANNEL_LIFETIME_S == 24 * 3600
    monkeypatch.setattr(dvai_bridge, "CHANNEL_LIFETIME_S", 100.0)
    consumer, provider = ends = connect(BACKEND)
    consumer.streams.open(*CHAT, 0.0, is_last=True)
    now = 0.0
    while now < 100.0:
        assert consumer.seen(GoAwayReceived) + provider.seen(GoAwayReceived) == []
        now = min(end.channel.next_deadline() for end in ends)
        for end in ends:
            end.channel.on_timeout(now)
        pump(*ends, now=now)
    assert now == 100.0
    check_renewed(ends, now)


def test_a_number_of_frames_is_a_channels_life(monkeypatch, crypto_backend):
    monkeypatch.setattr(dvai_bridge, "CHANNEL_FRAMES_LIMIT", 5)
    ends = connect(crypto_backend)
    ends[0].streams.open(*CHAT, 0.0, is_last=True)
    for now in (15.0, 30.0, 45.0):
        ends[0].channel.on_timeout(now)
        pump(*ends, now=now)
    assert ends[0].channel.next_deadline() == min(60.0, 45.0 + CHANNEL_REKEY_GRACE_S)
    check_renewed(ends, 45.0)


def test_frames_never_run_out_unseen(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "NOISE_FRAMES_LIMIT", 6)
    consumer, _ = ends = connect(BACKEND)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    for _ in range(8):
        with contextlib.suppress(StreamGoneError):
            consumer.streams.send_data(stream_id, b"x")
        pump(*ends)
    assert (closed(consumer).reason, closed(consumer).code) == (CloseReason.CLOSED_HERE, ErrorCode.REKEY)
    assert consumer.seen(StreamReset) == [StreamReset(stream_id, None)]


def test_both_directions_change_their_keys_on_the_way(monkeypatch, crypto_backend):
    monkeypatch.setattr(dvai_bridge, "NOISE_REKEY_INTERVAL_FRAMES", 4)
    consumer, provider = ends = connect(crypto_backend)
    stream_id = consumer.streams.open(*CHAT, 0.0)
    pump(*ends)
    provider.streams.send_head(stream_id, 200, [])
    for n in range(20):
        for end in ends:
            end.streams.send_data(stream_id, bytes([n]))
        pump(*ends)
    assert consumer.data_of(stream_id, StreamData) == provider.data_of(stream_id, StreamData) == bytes(range(20))


# Pairing.

PAIR = PairMessage(
    device_id="dev-tgt",
    name="Büro",
    platform="linux",
    random=bytes(range(32)),
    identity_public=bytes(range(32, 64)),
    may_serve=True,
    may_use=False,
)


PROVED = Keys(HandshakeMode.QR, BACKEND).initiatorStatic.public


def test_pairing_says_who_is_who_once(crypto_backend):
    consumer, provider = ends = connect(crypto_backend, HandshakeMode.QR)
    messages = replace(PAIR, identity_public=PROVED), PAIR  # the QR's key is only for this; the provider's one is kept
    for end, message in zip(ends, messages, strict=True):
        end.channel.send_pair(message)
        with pytest.raises(ValueError, match="once"):
            end.channel.send_pair(message)
        with pytest.raises(ChannelBusyError):
            end.streams.open(*CHAT, 0.0)
    pump(*ends)
    assert [*provider.seen(PairReceived), *consumer.seen(PairReceived)] == list(map(PairReceived, messages))
    assert str(PAIR.random) not in repr(consumer.events)


def test_pair_message_byte_for_byte():
    body = encode_pair_message(PAIR)
    assert body.decode() == (
        '{"v":1,"deviceId":"dev-tgt","name":"Büro","platform":"linux",'
        '"r":"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8","identityPub":"ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8",'
        '"rights":{"serve":true,"use":false}}'
    )
    assert parse_pair_message(body) == PAIR


def test_a_pair_message_that_nobody_would_take_is_not_sent():
    consumer, _ = connect(BACKEND, HandshakeMode.QR)
    for wrong in (replace(PAIR, name="a\nb"), replace(PAIR, device_id=""), replace(PAIR, random=b"short")):
        with pytest.raises(ValueError, match="PAIR"):
            consumer.channel.send_pair(wrong)
    consumer.channel.send_pair(PAIR)


WRONG_PAIRS = [
    {"v": 2},
    {"v": True},
    {"v": 1.0},
    {"deviceId": ""},
    {"deviceId": "x" * 129},
    {"deviceId": "a\nb"},
    {"name": None},
    {"name": "\u202e"},
    {"platform": 1},
    {"r": "AAAA"},
    {"r": "=" * 43},
    {"identityPub": None},
    {"rights": {"serve": 1, "use": True}},
    {"rights": None},
]


@pytest.mark.parametrize("change", WRONG_PAIRS, ids=str)
def test_wrong_pair_messages(change):
    body = head_json(json.loads(encode_pair_message(replace(PAIR, identity_public=PROVED))) | change)
    with pytest.raises(ValueError):
        parse_pair_message(body)
    peer = RawPeer(BACKEND, HandshakeMode.QR)
    peer.send(frame(9, body))
    check_told(peer, ErrorCode.PROTOCOL)


@pytest.mark.parametrize(
    "frames",
    [
        [frame(9, encode_pair_message(replace(PAIR, identity_public=PROVED)))] * 2,
        [frame(9, encode_pair_message(PAIR))],
        [frame(1, OPEN, 1)],
        [frame(5, b"\0\0\0\1")],
        [frame(9, b"[]")],
        [frame(9, b"null")],
    ],
    ids=["PAIR twice", "PAIR with another key", "OPEN", "WINDOW", "a list", "null"],
)
def test_a_channel_for_pairing_carries_nothing_else(frames):
    peer = RawPeer(BACKEND, HandshakeMode.QR)
    peer.send(*frames[:-1])
    assert closed(peer.end) is None
    peer.send(frames[-1])
    check_told(peer, ErrorCode.PROTOCOL)


# Two machines against each other: random operations, cuts and schedules.


class Player:
    """One end in the fuzzing, with what it should see: the bytes that the other was told to send, by stream."""

    def __init__(self, end, rng):
        self.end, self.rng = end, rng
        self.sent, self.received, self.held = {}, {}, {}
        self.finished, self.complete = set(), set()  # streams whose own direction, and the other's, has its FIN
        self.ended, self.cancelled = [], set()
        self.wire = []  # frames on their way to the other
        self.has_head = set()

    def act(self, now):
        self.rng.choice((self.open, self.answer, self.write, self.write, self.write, self.consume, self.consume))(now)
        if self.rng.random() < 0.01:
            self.cancel(now)

    def open(self, now):
        if self.end.streams.open_delay_s(now) == 0.0:
            is_last = self.rng.random() < 0.3
            stream_id = self.end.streams.open(*CHAT, now, is_last=is_last)
            self.sent[stream_id] = b""
            self.finished |= {stream_id} if is_last else set()

    def answer(self, now):
        waiting = sorted(self.received.keys() - self.sent.keys() - set(self.ended) - self.cancelled)
        if waiting:
            stream_id, is_last = self.rng.choice(waiting), self.rng.random() < 0.1
            self.end.streams.send_head(stream_id, 200, [], is_last=is_last)
            self.sent[stream_id] = b""
            self.finished |= {stream_id} if is_last else set()

    def write(self, now, size=None, is_last=None):
        writable = sorted(self.sent.keys() - self.finished - set(self.ended) - self.cancelled)
        if writable:
            stream_id = self.rng.choice(writable)
            size = self.rng.choice((0, 1, 60, 500, 9000, 30_000)) if size is None else size
            data = self.rng.randbytes(min(size, self.end.streams.compute_send_room(stream_id)))
            is_last = self.rng.random() < 0.1 if is_last is None else is_last
            self.end.streams.send_data(stream_id, data, is_last=is_last)
            self.sent[stream_id] += data
            self.finished |= {stream_id} if is_last else set()

    def consume(self, now):
        holding = sorted(stream_id for stream_id, held in self.held.items() if held)
        if holding:
            stream_id = self.rng.choice(holding)
            count = self.rng.randint(1, self.held[stream_id])
            self.end.streams.consume(stream_id, count)
            self.held[stream_id] -= count

    def cancel(self, now):
        alive = sorted((self.sent.keys() | self.received.keys()) - set(self.ended) - self.cancelled)
        if alive:
            stream_id = self.rng.choice(alive)
            self.end.streams.reset(stream_id, now)
            self.cancelled.add(stream_id)

    def note_events(self):
        events = self.end.seen()
        events, self.end.events = self.end.events, []
        for event in events:
            assert not isinstance(event, ChannelClosed | GoAwayReceived), event
            if isinstance(event, StreamOpened):
                assert event.stream_id not in self.received
                self.received[event.stream_id] = b""
            elif isinstance(event, StreamHead):
                assert event.stream_id not in self.has_head
                self.has_head.add(event.stream_id)
                self.received[event.stream_id] = b""
            elif isinstance(event, StreamData):
                assert event.stream_id not in self.complete | set(self.ended) | self.cancelled
                self.received[event.stream_id] += event.data
                self.held[event.stream_id] = self.held.get(event.stream_id, 0) + len(event.data)
            elif isinstance(event, StreamEnded | StreamReset):
                assert event.stream_id not in self.ended
                self.ended.append(event.stream_id)
                if isinstance(event, StreamReset):
                    self.cancelled.add(event.stream_id)
                    self.held.pop(event.stream_id, None)
            if getattr(event, "is_last", False):
                self.complete.add(event.stream_id)

    def check(self):
        streams = self.end.streams
        assert streams._send_credit >= 0 and streams._receive_window.left >= 0
        for stream in streams._streams.values():
            assert 0 <= stream.send_credit <= streams._path.stream_window_bytes
            assert stream.receive_window.left >= 0
            assert len(stream.queue) <= CHANNEL_SEND_QUEUE_LIMIT_BYTES
        held = sum(self.held.get(stream_id, 0) for stream_id in streams._held)
        assert held == sum(streams._held.values())
        window = streams._receive_window
        assert window.left + window.owed + held == streams._path.window_bytes


def carry(sender, receiver, rng, now, *, everything=False):
    """Moves some frames onto the wire, and some from it to the other end."""
    sender.wire += sender.end.take(now, limit_bytes=10**9 if everything else rng.choice((1, 500, 20_000, 100_000)))
    count = len(sender.wire) if everything else rng.randint(0, len(sender.wire))
    receiver.end.give(sender.wire[:count], now)
    del sender.wire[:count]
    sender.note_events()
    receiver.note_events()


@PATHS
@pytest.mark.parametrize("seed", range(4))
def test_two_machines_against_each_other(seed, path, crypto_backend):
    rng = random.Random(seed)
    ends = connect(crypto_backend, path=path)
    players = [Player(end, rng) for end in ends]
    for player in players:
        player.note_events()
    now = 0.0
    for _ in range(500):
        now += rng.choice((0.0, 0.01, 0.3))
        player, other = rng.sample(players, 2)
        player.act(now)
        player.end.channel.on_timeout(now)
        if rng.random() < 0.5:
            carry(player, other, rng, now)
        for each in players:
            each.note_events()
            each.check()
    finish(players, rng, now)
    check_complete(players)
    rng.choice(ends).channel.shut_down(now)
    pump(*ends, now=now)
    assert {closed(end).reason for end in ends} == {CloseReason.FINISHED}


def finish(players, rng, now):
    """Answers and ends every stream that was not cancelled, and carries what is left."""
    for _ in range(20_000):
        now += 0.1
        for player, other in (players, players[::-1]):
            player.answer(now)
            player.write(now, size=0, is_last=True)
            for stream_id, held in list(player.held.items()):
                player.end.streams.consume(stream_id, held)
                player.held[stream_id] = 0
            carry(player, other, rng, now, everything=True)
            player.check()
        if not any(len(player.end.streams) or player.wire for player in players):
            return
    raise AssertionError("streams that do not end")


def check_complete(players):
    one, other = players
    opened = one.sent.keys() | other.sent.keys()
    assert len(opened) > 20
    cancelled = one.cancelled | other.cancelled
    assert cancelled and opened - cancelled
    for player, peer in (players, players[::-1]):
        assert len(player.ended) == len(set(player.ended))
        for stream_id in player.sent.keys() | player.received.keys():
            assert stream_id in player.cancelled or stream_id in player.ended
            got, sent = player.received.get(stream_id, b""), peer.sent.get(stream_id, b"")
            assert got == sent if stream_id not in cancelled else sent.startswith(got), stream_id
        window = player.end.streams._receive_window
        assert window.left + window.owed == player.end.streams._path.window_bytes and player.end.streams._held == {}
    assert sum(map(len, one.sent.values())) > 200_000


def test_random_bytes_never_raise(crypto_backend):
    rng = random.Random(11)
    for _ in range(40):
        peer = RawPeer(crypto_backend)
        for _ in range(20):
            body = rng.choice((rng.randbytes(rng.randrange(12)), OPEN, bytes(58), b'{"s":200}'))
            peer.send(frame(rng.randrange(12), body, rng.choice((0, 1, 2, 3, 5, 7)), rng.choice((0, 0, 0, 1, 2))))
            peer.end.streams.open_delay_s(0.0) == 0.0 and peer.end.streams.open(*CHAT, 0.0)
        for outer in (rng.randbytes(rng.randrange(60)), b"\x10" + rng.randbytes(rng.randrange(60))):
            peer.end.give([outer])
        assert closed(peer.end) is not None
        opened = [event.stream_id for event in peer.end.seen(StreamOpened)]
        ended = [event.stream_id for event in peer.end.seen(StreamReset, StreamEnded)]
        assert len(set(ended)) == len(ended) and set(opened) <= set(ended)


def test_encode_inner_frame_is_the_layout():
    assert encode_inner_frame(FrameType.DATA, b"hi", stream_id=1, is_last=True).hex() == "0301000000016869"
