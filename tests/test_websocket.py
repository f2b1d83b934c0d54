"""RFC 6455: the cases of the Autobahn test suite (1 to 7, 9, 10) as tables, by its numbers.

Every case comes whole, byte by byte and in random pieces, so that those of the suite that differ only in how the
octets are sent are one here.
"""

import base64
import random
import struct

import pytest

import dvai_bridge as dvai
from dvai_bridge import (
    CLOSE_INVALID_DATA,
    CLOSE_POLICY_VIOLATION,
    CLOSE_PROTOCOL_ERROR,
    CLOSE_TOO_BIG,
    CLOSE_WITHOUT_CODE,
    OPCODE_BINARY,
    OPCODE_CLOSE,
    OPCODE_CONTINUATION,
    OPCODE_PING,
    OPCODE_PONG,
    OPCODE_TEXT,
    UpgradeError,
    WebSocketParser,
    apply_mask,
    compute_accept,
    encode_websocket_close,
    encode_websocket_frame,
)

LIMIT_BYTES = 96 * 1024
TEXT, BINARY, PING, PONG, CONTINUATION = OPCODE_TEXT, OPCODE_BINARY, OPCODE_PING, OPCODE_PONG, OPCODE_CONTINUATION
GREEK = "Hello-µ@ßöäüàá-UTF-8!!"
KAPPA = "κόσμε"


class Frame:
    """One frame of a case, valid or not. `rsv`: the three reserved bits."""

    def __init__(self, opcode, payload=b"", *, fin=True, rsv=0):
        self.opcode, self.fin, self.rsv = opcode, fin, rsv
        self.payload = payload.encode() if isinstance(payload, str) else payload

    def encode(self, mask):
        data = bytearray(encode_websocket_frame(self.opcode, self.payload, mask=mask, is_final=self.fin))
        data[0] |= self.rsv << 4
        return bytes(data)


def text(payload="", **options):
    return Frame(TEXT, payload, **options)


def binary(payload=b"", **options):
    return Frame(BINARY, payload, **options)


def ping(payload=b"", **options):
    return Frame(PING, payload, **options)


def pong(payload=b"", **options):
    return Frame(PONG, payload, **options)


def more(payload=b"", **options):
    return Frame(CONTINUATION, payload, **options)


def close(payload=b"", code=None, reason="", **options):
    if code is not None:
        payload = struct.pack("!H", code) + (reason.encode() if isinstance(reason, str) else reason)
    return Frame(OPCODE_CLOSE, payload, **options)


def split(payload, size, make=text):
    """A message in fragments of `size` bytes."""
    payload = payload.encode() if isinstance(payload, str) else payload
    pieces = [payload[i : i + size] for i in range(0, len(payload), size)] or [b""]
    frames = [make(pieces[0], fin=len(pieces) == 1)]
    return frames + [more(piece, fin=i == len(pieces) - 1) for i, piece in enumerate(pieces[1:], 1)]


def said(*events):
    """What a case without a fault gives."""
    return list(events), None


def fails(code, *events):
    """What a case that ends in a fault gives: the events before it, and the code."""
    return list(events), code


CASES = {}


def add(name, frames, outcome):
    assert name not in CASES
    CASES[name] = (frames, outcome)


# 1: framing, one message of every size whose length is written in another way; 1.x.8 in small chops, as all are here
for index, size in enumerate((0, 125, 126, 127, 128, 65535, 65536), 1):
    add(f"1.1.{index}", [text("*" * size)], said((TEXT, "*" * size)))
    add(f"1.2.{index}", [binary(b"\xfe" * size)], said((BINARY, b"\xfe" * size)))

# 2: pings and pongs
add("2.1", [ping()], said((PING, b"")))
add("2.2", [ping("Hello, world!")], said((PING, b"Hello, world!")))
add("2.3", [ping(b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")], said((PING, b"\x00\xff\xfe\xfd\xfc\xfb\x00\xff")))
add("2.4", [ping(b"\xfe" * 125)], said((PING, b"\xfe" * 125)))
add("2.5", [ping(b"\xfe" * 126)], fails(CLOSE_PROTOCOL_ERROR))
add("2.6", [ping(b"\xfe" * 125)] * 2, said((PING, b"\xfe" * 125), (PING, b"\xfe" * 125)))
add("2.7", [pong()], said((PONG, b"")))
add("2.8", [pong("unsolicited pong payload")], said((PONG, b"unsolicited pong payload")))
add("2.9", [pong("unsolicited"), ping("ping")], said((PONG, b"unsolicited"), (PING, b"ping")))
PINGS = [f"payload-{i}" for i in range(10)]
add("2.10", [ping(p) for p in PINGS], said(*[(PING, p.encode()) for p in PINGS]))

# 3: reserved bits
add("3.1", [text("Hello", rsv=1)], fails(CLOSE_PROTOCOL_ERROR))
for name, rsv in (("3.2", 2), ("3.3", 3), ("3.4", 4)):
    add(name, [text("Hello"), text("Hello", rsv=rsv), ping()], fails(CLOSE_PROTOCOL_ERROR, (TEXT, "Hello")))
add("3.5", [binary(b"\x00\xff", rsv=5)], fails(CLOSE_PROTOCOL_ERROR))
add("3.6", [ping("Hello", rsv=6)], fails(CLOSE_PROTOCOL_ERROR))
add("3.7", [close(rsv=7)], fails(CLOSE_PROTOCOL_ERROR))

# 4: reserved opcodes
for kind, opcodes in ((1, (3, 4, 5, 6, 7)), (2, (11, 12, 13, 14, 15))):
    for index, opcode in enumerate(opcodes, 1):
        bad = Frame(opcode, b"" if index % 2 else "reserved")
        if index < 3:
            add(f"4.{kind}.{index}", [bad], fails(CLOSE_PROTOCOL_ERROR))
        else:
            add(f"4.{kind}.{index}", [text("Hello"), bad, ping()], fails(CLOSE_PROTOCOL_ERROR, (TEXT, "Hello")))

# 5: fragmentation
HALVES = [text("fragment1", fin=False), more("fragment2")]
WHOLE = (TEXT, "fragment1fragment2")
ASIDE = (PING, b"ping payload")
OUT_OF_TURN = fails(CLOSE_PROTOCOL_ERROR)
add("5.1", [ping("fragment1", fin=False), more("fragment2")], OUT_OF_TURN)
add("5.2", [pong("fragment1", fin=False), more("fragment2")], OUT_OF_TURN)
add("5.3", HALVES, said(WHOLE))
add("5.6", [HALVES[0], ping("ping payload"), HALVES[1]], said(ASIDE, WHOLE))
add("5.9", [more("non-continuation payload"), text("Hello, world!")], OUT_OF_TURN)
add("5.12", [more("non-continuation payload", fin=False), text("Hello, world!")], OUT_OF_TURN)
add("5.15", [*HALVES, more("fragment3", fin=False), text("fragment4")], fails(CLOSE_PROTOCOL_ERROR, WHOLE))
add("5.16", [more("fragment1", fin=False), text("fragment2", fin=False), more("fragment3")], OUT_OF_TURN)
add("5.18", [text("fragment1", fin=False), text("fragment2")], OUT_OF_TURN)
FIVE = [text("f1", fin=False), more("f2", fin=False), ping("p1")]
REST = [more("f3", fin=False), more("f4", fin=False), ping("p2"), more("f5")]
add("5.19", FIVE + REST, said((PING, b"p1"), (PING, b"p2"), (TEXT, "f1f2f3f4f5")))
add("5.x binary", split(b"\x00\xff" * 9, 5, binary), said((BINARY, b"\x00\xff" * 9)))
add("5.x empty pieces", [text(fin=False), more(fin=False), more()], said((TEXT, "")))

# 6: UTF-8
add("6.1.1", [text()], said((TEXT, "")))
add("6.1.2", [text(fin=False), more(fin=False), more()], said((TEXT, "")))
add("6.1.3", [text(fin=False), more("middle frame payload", fin=False), more()], said((TEXT, "middle frame payload")))
add("6.2.1", [text(GREEK)], said((TEXT, GREEK)))
add("6.2.2", split(GREEK, 12), said((TEXT, GREEK)))
add("6.2.3", split(GREEK, 1), said((TEXT, GREEK)))
add("6.2.4", split(KAPPA, 1), said((TEXT, KAPPA)))
BAD_UTF8 = KAPPA.encode() + b"\xed\xa0\x80edited"
add("6.3.1", [text(BAD_UTF8)], fails(CLOSE_INVALID_DATA))
add("6.3.2", split(BAD_UTF8, 1), fails(CLOSE_INVALID_DATA))
# 6.4: the fault is seen with the fragment that has it, before the message is complete
add("6.4.1", [text(KAPPA, fin=False), more(b"\xf4\x90\x80\x80", fin=False), ping()], fails(CLOSE_INVALID_DATA))
add("6.4.2", [text(KAPPA + "\U0010ffff", fin=False), more(b"\xf4\x90", fin=False), ping()], fails(CLOSE_INVALID_DATA))
VALID_TEXTS = {
    "6.5": ["κόσμε", "\u03ba\u1f79"],
    "6.7": ["\x00", "\u0080", "\u0800", "\U00010000"],
    "6.9": ["\x7f", "\u07ff", "\uffff", "\U0010ffff"],
    "6.11": ["\ud7ff", "\ue000", "\ufffd", "\U0010ffff"],
    "6.22": ["\ufffe", "\uffff"] + [chr(plane << 16 | low) for plane in range(1, 17) for low in (0xFFFE, 0xFFFF)],
    "6.23": ["\ufff9", "\ufffd"],
}
for group, texts in VALID_TEXTS.items():
    for index, each in enumerate(texts, 1):
        add(f"{group}.{index}", [text(each)], said((TEXT, each)))
        add(f"{group}.{index} by bytes", split(each, 1), said((TEXT, each)))
INVALID_TEXTS = {
    "6.6": [b"\xce", b"\xce\xba\xe1", b"\xce\xba\xe1\xbd", "κόσμ".encode() + b"\xce"],
    "6.8": [b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"],
    "6.10": [b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf"],
    "6.12": [b"\xf4\x90\x80\x80"],
    "6.13": [b"\x80", b"\xbf", b"\x80\xbf", b"\x80\xbf\x80", bytes(range(0x80, 0xC0))],
    "6.14": [
        b"".join(bytes((lead, 0x20)) for lead in range(*span)) for span in ((0xC0, 0xE0), (0xE0, 0xF0), (0xF0, 0xF8))
    ]
    + [b"\xf8 \xf9 \xfa \xfb ", b"\xfc \xfd "],
    "6.15": [b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf"],
    "6.16": [b"\xc0\xe0\x80\xf0\x80\x80"],
    "6.17": [b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"],
    "6.18": [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf"],
    "6.19": [b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf"],
    "6.20": [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80"],
    "6.21": [b"\xed\xa0\x80", b"\xed\xaf\xbf", b"\xed\xbf\xbf", b"\xed\xa0\x80\xed\xb0\x80"],
}
for group, raws in INVALID_TEXTS.items():
    for index, raw in enumerate(raws, 1):
        add(f"{group}.{index}", [text(raw)], fails(CLOSE_INVALID_DATA))
        add(f"{group}.{index} by bytes", split(raw, 1), fails(CLOSE_INVALID_DATA))

# 7: closing; nothing is read after the close frame
END = (OPCODE_CLOSE, CLOSE_WITHOUT_CODE, "")
add("7.1.1", [text("Hello World!"), close()], said((TEXT, "Hello World!"), END))
add("7.1.2", [close(), close()], said(END))
add("7.1.3", [close(), ping()], said(END))
add("7.1.4", [close(), text("Hello World!")], said(END))
add("7.1.5", [text("fragment1", fin=False), close(), more("fragment2")], said(END))
add("7.1.6", [text("x" * 65536), close(code=1000)], said((TEXT, "x" * 65536), (OPCODE_CLOSE, 1000, "")))
add("7.3.1", [close()], said(END))
add("7.3.2", [close(b"a")], fails(CLOSE_PROTOCOL_ERROR))
add("7.3.3", [close(code=1000)], said((OPCODE_CLOSE, 1000, "")))
add("7.3.4", [close(code=1000, reason="Hello World!")], said((OPCODE_CLOSE, 1000, "Hello World!")))
add("7.3.5", [close(code=1000, reason="*" * 123)], said((OPCODE_CLOSE, 1000, "*" * 123)))
add("7.3.6", [close(code=1000, reason="*" * 124)], fails(CLOSE_PROTOCOL_ERROR))
add("7.5.1", [close(code=1000, reason=BAD_UTF8)], fails(CLOSE_INVALID_DATA))
VALID_CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999)
for index, number in enumerate(VALID_CODES, 1):
    add(f"7.7.{index}", [close(code=number)], said((OPCODE_CLOSE, number, "")))
for index, number in enumerate((0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535), 1):
    add(f"7.9.{index}", [close(code=number)], fails(CLOSE_PROTOCOL_ERROR))

# 9: large messages, as far as our limit; 9.3 and 9.4 in fragments
for kind, make in ((1, text), (2, binary)):
    payload = b"*" * LIMIT_BYTES
    value = (TEXT, payload.decode()) if make is text else (BINARY, payload)
    add(f"9.{kind}.1", [make(payload)], said(value))
    add(f"9.{kind}.2", [make(payload + b"*")], fails(CLOSE_TOO_BIG))
    add(f"9.{kind + 2}.1", split(payload, 4096, make), said(value))
    add(f"9.{kind + 2}.2", split(payload, LIMIT_BYTES // 64, make), said(value))
    add(f"9.{kind + 2}.3", split(payload + b"*", 4096, make), fails(CLOSE_TOO_BIG))
    add(f"9.{kind + 2}.4", split(payload, LIMIT_BYTES // 65, make), fails(CLOSE_POLICY_VIOLATION))
for index, chop in enumerate((64, 128, 1024), 1):
    add(f"9.7.{index}", [text("*" * chop)] * 100, said(*[(TEXT, "*" * chop)] * 100))
    add(f"9.8.{index}", [binary(b"\xfe" * chop)] * 100, said(*[(BINARY, b"\xfe" * chop)] * 100))

# 10: a large message in fragments of 1,300 bytes
add("10.1.1", split("*" * 65536, 1300), said((TEXT, "*" * 65536)))


def run_parser(pieces, **options):
    """Events and the code of the fault, if any, of bytes that come in `pieces`."""
    parser = WebSocketParser(limit_bytes=LIMIT_BYTES, **options)
    events = []
    for piece in pieces:
        for opcode, data in parser.feed(piece):
            assert isinstance(data, str) == (opcode in (TEXT, OPCODE_CLOSE))
            events.append((opcode, parser.close_code, data) if opcode == OPCODE_CLOSE else (opcode, data))
    assert parser.is_over == (parser.error is not None or any(event[0] == OPCODE_CLOSE for event in events))
    return events, parser.error.code if parser.error is not None else None


def chop(data, draw):
    """`data` in pieces of random sizes, small and large ones, some of them empty."""
    start = 0
    while start < len(data):
        size = draw.choice((0, 1, 2, 3, 7, 60, 500, 5000, 50000))
        yield data[start : start + size]
        start += size


@pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])
@pytest.mark.parametrize("name", CASES)
def test_case_of_the_suite_however_it_is_cut(name, is_server):
    frames, outcome = CASES[name]
    draw = random.Random(name)
    stream = b"".join(frame.encode(draw.randbytes(4) if is_server else None) for frame in frames)
    assert run_parser([stream], expects_mask=is_server) == outcome
    assert run_parser([stream[i : i + 1] for i in range(len(stream))], expects_mask=is_server) == outcome
    for _ in range(4):
        assert run_parser(chop(stream, draw), expects_mask=is_server) == outcome


@pytest.mark.parametrize("is_server", [True, False], ids=["server", "client"])
def test_who_must_mask_and_who_must_not(is_server):
    for frame in (text("Hello"), ping(), close(), text("a", fin=False), binary(b"*" * 70_000)):
        stream = frame.encode(None if is_server else b"abcd")
        assert run_parser([stream], expects_mask=is_server) == ([], CLOSE_PROTOCOL_ERROR)
        assert run_parser([stream[:2]], expects_mask=is_server) == ([], CLOSE_PROTOCOL_ERROR), "known from the head"


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"\x82\xfe\x00\x7d", CLOSE_PROTOCOL_ERROR),  # 125 in two bytes
        (b"\x82\xff" + (65535).to_bytes(8, "big"), CLOSE_PROTOCOL_ERROR),  # 65,535 in eight
        (b"\x82\xff" + b"\x80" + bytes(7), CLOSE_PROTOCOL_ERROR),  # the highest bit set
        (b"\x82\xff" + b"\x7f" + b"\xff" * 7, CLOSE_TOO_BIG),
        (b"\x82\xff" + (LIMIT_BYTES + 1).to_bytes(8, "big"), CLOSE_TOO_BIG),
        (text("", fin=False).encode(bytes(4)) + b"\x80\xff" + LIMIT_BYTES.to_bytes(8, "big"), None),
        (text("*", fin=False).encode(bytes(4)) + b"\x80\xff" + LIMIT_BYTES.to_bytes(8, "big"), CLOSE_TOO_BIG),
    ],
)
def test_a_length_is_judged_before_its_bytes_come(head, code):
    assert run_parser([head], expects_mask=True) == ([], code)
    assert run_parser([head[i : i + 1] for i in range(len(head))], expects_mask=True) == ([], code)


def test_a_parser_holds_no_more_than_one_frame_within_the_limits():
    parser = WebSocketParser(expects_mask=True, limit_bytes=1000)
    parser.feed(text("*" * 1000).encode(b"abcd")[:-1])
    assert parser.is_inside_message and len(parser._held) == 1007
    assert parser.feed(b"*" * 5000)[0][0] == TEXT
    assert parser.error.code == CLOSE_PROTOCOL_ERROR and not parser._held
    assert parser.feed(b"*" * 5000) == [] and not parser._held


def test_masking_is_its_own_inverse_and_the_definition():
    draw = random.Random(1)
    for size in (*range(12), 125, 126, 1000, 65537):
        data, mask = draw.randbytes(size), draw.randbytes(4)
        assert apply_mask(data, mask) == bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
        assert apply_mask(apply_mask(data, mask), mask) == data


def test_frames_of_the_rfc():
    """RFC 6455 section 5.7."""
    assert encode_websocket_frame(TEXT, b"Hello") == bytes.fromhex("810548656c6c6f")
    masked = encode_websocket_frame(TEXT, b"Hello", mask=bytes.fromhex("37fa213d"))
    assert masked == bytes.fromhex("818537fa213d7f9f4d5158")
    assert encode_websocket_frame(TEXT, b"Hel", is_final=False) == bytes.fromhex("010348656c")
    assert encode_websocket_frame(CONTINUATION, b"lo") == bytes.fromhex("80026c6f")
    assert encode_websocket_frame(PING, b"Hello") == bytes.fromhex("890548656c6c6f")
    assert encode_websocket_frame(BINARY, bytes(256))[:4] == bytes.fromhex("827e0100")
    assert encode_websocket_frame(BINARY, bytes(65536))[:10] == bytes.fromhex("827f0000000000010000")


def test_close_frames():
    assert encode_websocket_close(CLOSE_WITHOUT_CODE, "dropped") == b"\x88\x00"
    assert encode_websocket_close(1000, "bye") == b"\x88\x05\x03\xe8bye"
    cut = encode_websocket_close(1000, "é" * 100)
    assert run_parser([cut], expects_mask=False) == said((OPCODE_CLOSE, 1000, "é" * 61))
    for code in (0, 1004, 1006, 1015, 2999, 5000):
        with pytest.raises(ValueError, match=str(code)):
            encode_websocket_close(code)


# -- the opening handshake --

RFC_KEY = "dGhlIHNhbXBsZSBub25jZQ=="
RFC_ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
NONCE = base64.b64decode(RFC_KEY)
REQUEST = {
    "upgrade": "websocket",
    "connection": "keep-alive, Upgrade",
    "sec-websocket-key": RFC_KEY,
    "sec-websocket-version": "13",
}
RESPONSE = {"upgrade": "WebSocket", "connection": "upgrade", "sec-websocket-accept": RFC_ACCEPT}


def test_the_handshake_of_the_rfc():
    assert compute_accept(RFC_KEY) == RFC_ACCEPT
    assert dvai.parse_upgrade_request("GET", 1, REQUEST.get) == (RFC_KEY, [])
    offered = REQUEST | {"sec-websocket-protocol": "chat, superchat"}
    assert dvai.parse_upgrade_request("GET", 1, offered.get) == (RFC_KEY, ["chat", "superchat"])


@pytest.mark.parametrize(
    ("method", "minor", "change", "status"),
    [
        ("GET", 1, {"upgrade": ""}, 426),
        ("GET", 1, {"upgrade": "h2c"}, 426),
        ("GET", 1, {"sec-websocket-version": "8"}, 426),
        ("GET", 1, {"sec-websocket-version": "13, 13"}, 426),
        ("GET", 1, {"sec-websocket-version": ""}, 426),
        ("POST", 1, {}, 400),
        ("GET", 0, {}, 400),
        ("GET", 1, {"connection": "keep-alive"}, 400),
        ("GET", 1, {"sec-websocket-key": ""}, 400),
        ("GET", 1, {"sec-websocket-key": f"{RFC_KEY}, {RFC_KEY}"}, 400),
        ("GET", 1, {"sec-websocket-key": base64.b64encode(bytes(15)).decode()}, 400),
        ("GET", 1, {"sec-websocket-key": base64.b64encode(bytes(17)).decode()}, 400),
        ("GET", 1, {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZR=="}, 400),  # bits that no encoder sets
        ("GET", 1, {"sec-websocket-protocol": "chat,"}, 400),
        ("GET", 1, {"sec-websocket-protocol": "a b"}, 400),
        ("GET", 1, {"sec-websocket-protocol": "chat, chat"}, 400),
    ],
)
def test_a_handshake_that_is_none(method, minor, change, status):
    with pytest.raises(UpgradeError) as failed:
        dvai.parse_upgrade_request(method, minor, (REQUEST | change).get)
    assert failed.value.status == status


def test_both_sides_agree_on_a_handshake():
    nonce = bytes(range(16))
    request = {k.lower(): v for k, v in dvai.build_upgrade_request_fields(nonce, ("dvai-noise.1", "other"))}
    key, offered = dvai.parse_upgrade_request("GET", 1, request.get)
    for chosen in ("", *offered):
        answer = {k.lower(): v for k, v in dvai.build_upgrade_response_fields(key, chosen)}
        assert dvai.verify_upgrade_response(101, answer.get, nonce, offered) == chosen


@pytest.mark.parametrize(
    ("status", "change", "says"),
    [
        (200, {}, "captive portal or a proxy"),
        (302, {}, "captive portal or a proxy"),
        (511, {}, "captive portal or a proxy"),
        (407, {}, "proxy in between wants a login"),
        (426, {}, "another version"),
        (403, {}, "refused.*403"),
        (503, {}, "refused.*503"),
        (101, {"upgrade": "h2c"}, "something else"),
        (101, {"connection": "close"}, "something else"),
        (101, {"sec-websocket-accept": RFC_ACCEPT[::-1]}, "Accept"),
        (101, {"sec-websocket-accept": ""}, "Accept"),
        (101, {"sec-websocket-protocol": "chat"}, "subprotocol"),
        (101, {"sec-websocket-extensions": "permessage-deflate"}, "extension"),
    ],
)
def test_an_answer_that_opens_nothing_says_why(status, change, says):
    with pytest.raises(UpgradeError, match=says) as failed:
        dvai.verify_upgrade_response(status, (RESPONSE | change).get, NONCE, ("other",))
    assert failed.value.status == status
