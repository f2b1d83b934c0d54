"""Section Signing: the signatures of existing software, JavaScript's JSON byte for byte, and what counts as fresh."""

import base64
import hashlib
import hmac
import json
import math
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    NONCE_SWEEP_INTERVAL_MS,
    SIGNATURE_FIELDS,
    SIGNATURE_SKEW_MS,
    UNTIMED_NONCES_LIMIT,
    AuthenticationError,
    Headers,
    OverloadedError,
    ReplayMemory,
    SignatureError,
    SignatureHeaders,
    TimedNonce,
    build_error_body,
    build_signed_headers,
    compose_signed_message,
    encode_canonical_json,
    generate_nonce,
    generate_pairing_key,
    parse_replay_memory,
    parse_signature_headers,
    parse_timed_nonce,
    sign_hmac,
    verify_hmac,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "signing.json").read_text("utf-8"))
BODY_FORM = VECTORS["bodyForm"]
KEY = VECTORS["signatures"][0]["pairingKey"]
NOW = 1_790_000_000_000


def has_signature(key, message, signature):
    try:
        verify_hmac(key, message, signature)
    except SignatureError:
        return False
    return True


# ---- signatures -----------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["signatures"], ids=lambda case: case["nonce"][:8])
def test_signatures_of_existing_software(case):
    message = compose_signed_message(case["nonce"], case["method"], case["path"], case["body"].encode())
    assert message == case["signedMessage"].encode()
    assert sign_hmac(case["pairingKey"], message) == case["signature"]
    for signature in (case["signature"], case["signatureHex"], case["signatureHex"].upper()):
        verify_hmac(case["pairingKey"], message, signature)


@pytest.mark.parametrize("index", range(32))
@pytest.mark.parametrize("spell", [bytes.hex, lambda data: base64.urlsafe_b64encode(data).decode().rstrip("=")])
def test_a_flipped_bit_anywhere_in_a_signature(index, spell):
    message = compose_signed_message("nonce", "POST", "/v1/chat/completions", b"{}")
    digest = hmac.digest(base64.urlsafe_b64decode(KEY + "="), message, hashlib.sha256)
    assert has_signature(KEY, message, spell(digest))
    flipped = bytes(byte ^ (1 << index % 8 if n == index else 0) for n, byte in enumerate(digest))
    assert not has_signature(KEY, message, spell(flipped))


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_every_part_of_the_message_is_covered(part):
    parts = ["nonce", "POST", "/v1/chat/completions", b"{}"]
    signature = sign_hmac(KEY, compose_signed_message(*parts))
    parts[part] = b"{ }" if part == 3 else parts[part] + "x"
    assert not has_signature(KEY, compose_signed_message(*parts), signature)


GOOD = sign_hmac(KEY, b"message")


@pytest.mark.parametrize(
    "signature",
    [
        "",
        "é" * 43,
        GOOD + "=",
        GOOD[:-1],
        GOOD + "A",
        GOOD[:-1] + "é",
        " " + GOOD,
        "0" * 63,
        "g" * 64,
        "٠" * 64,
        "A" * 43,
    ],
)
def test_what_is_no_signature_is_refused_like_a_wrong_one(signature):
    with pytest.raises(SignatureError):
        verify_hmac(KEY, b"message", signature)


def test_a_second_spelling_of_the_same_bytes_is_refused():
    """43 digits carry 258 bits: two of them must be zero."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = GOOD[:-1] + digits[digits.index(GOOD[-1]) + 1]
    assert base64.urlsafe_b64decode(other + "=") == base64.urlsafe_b64decode(GOOD + "=")
    assert has_signature(KEY, b"message", GOOD) and not has_signature(KEY, b"message", other)


def test_every_failure_has_the_same_body():
    with pytest.raises(AuthenticationError) as wrong:
        verify_hmac(KEY, b"message", "A" * 43)
    with pytest.raises(AuthenticationError) as partial:
        parse_signature_headers(Headers([("x-dvai-nonce", "n")]))
    assert wrong.value.status == partial.value.status == 401
    assert build_error_body(wrong.value) == build_error_body(partial.value)


def test_keys_are_32_random_bytes():
    assert generate_pairing_key(lambda size: bytes(range(size))) == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert generate_pairing_key() != generate_pairing_key()


# ---- nonces ---------------------------------------------------------------------------


def test_a_nonce_as_in_the_vectors():
    nonce = generate_nonce("dev-src", "dev-tgt", NOW, bytes)
    assert nonce == VECTORS["signatures"][0]["nonce"]
    assert parse_timed_nonce(nonce) == TimedNonce(NOW, "ssl31giHcRcB")
    assert generate_nonce("dev-src", "dev-tgt", NOW) != generate_nonce("dev-src", "dev-tgt", NOW)


def test_the_binding_tells_the_directions_apart():
    def binding(*ids):
        return generate_nonce(*ids, NOW, bytes).rpartition(".")[2]

    assert len({binding("a", "b"), binding("b", "a"), binding("a", "a"), binding("ab", ""), binding("", "ab")}) == 5


@pytest.mark.parametrize("nonce", ["AAECAwQFBgcICQoLDA0ODw", "anything", "T1.1.x.y", "t2.1"])
def test_other_formats_of_nonces(nonce):
    assert parse_timed_nonce(nonce) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: ["t1", "", *parts[2:]],
        lambda parts: ["t1", "0" + parts[1], *parts[2:]],
        lambda parts: ["t1", "+1", *parts[2:]],
        lambda parts: ["t1", "١٢٣", *parts[2:]],
        lambda parts: ["t1", "1" * 17, *parts[2:]],
        lambda parts: [*parts[:2], "A" * 21, parts[3]],
        lambda parts: [*parts[:2], "A" * 21 + "+", parts[3]],
        lambda parts: [*parts[:3], parts[3] + "A"],
        lambda parts: [*parts, ""],
        lambda parts: parts[:3],
    ],
)
def test_a_malformed_t1_nonce_is_not_taken_for_another_format(change):
    parts = generate_nonce("a", "b", NOW, bytes).split(".")
    with pytest.raises(ValueError, match="malformed"):
        parse_timed_nonce(".".join(change(parts)))


# ---- header fields --------------------------------------------------------------------

FIELDS = dict(zip(SIGNATURE_FIELDS, ("dev-a", "app.a", "nonce", GOOD), strict=True))


def test_the_fields_of_a_signed_request():
    built = build_signed_headers(
        pairing_key=KEY, device_id="dev-a", app_id=None, nonce="n", method="post", path="/v1/models", body=b""
    )
    assert [name for name, _ in built][:3] == ["X-DVAI-Peer-Device-Id", "X-DVAI-App-Id", "X-DVAI-Nonce"]
    parsed = parse_signature_headers(Headers([(name.lower(), value) for name, value in built]))
    message = compose_signed_message("n", "POST", "/v1/models", b"")
    expected = SignatureHeaders(device_id="dev-a", app_id="dev-a", nonce="n", signature=sign_hmac(KEY, message))
    assert parsed == expected


def test_no_field_is_no_signature():
    assert parse_signature_headers(Headers([("host", "x"), ("x-dvai-offload", "never")])) is None


@pytest.mark.parametrize("present", range(1, 15))
def test_some_fields_are_refused(present):
    fields = [field for n, field in enumerate(FIELDS.items()) if present >> n & 1]
    with pytest.raises(SignatureError):
        parse_signature_headers(Headers(fields))


@pytest.mark.parametrize("name", SIGNATURE_FIELDS)
def test_a_doubled_field_is_refused_even_if_equal(name):
    with pytest.raises(SignatureError):
        parse_signature_headers(Headers([*FIELDS.items(), (name, FIELDS[name])]))


@pytest.mark.parametrize("name", SIGNATURE_FIELDS)
@pytest.mark.parametrize("value", ["", "caf\xe9", "a\tb", "x" * 257, "\x7f"])
def test_empty_long_and_foreign_values_are_refused(name, value):
    with pytest.raises(SignatureError):
        parse_signature_headers(Headers(list((FIELDS | {name: value}).items())))


# ---- JavaScript's JSON ----------------------------------------------------------------


@pytest.mark.parametrize("case", BODY_FORM["cases"], ids=lambda case: case["input"][:30])
def test_body_form_vectors(case):
    body = encode_canonical_json(json.loads(case["input"]))
    assert body == case["canonical"].encode()
    message = compose_signed_message("AAECAwQFBgcICQoLDA0ODw", "POST", "/v1/chat/completions", body)
    assert sign_hmac(BODY_FORM["pairingKey"], message) == case["signature"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (True, "true"),
        (1.0, "1"),
        (-1.5, "-1.5"),
        (0.0001, "0.0001"),
        (0.00001, "0.00001"),
        (0.000001, "0.000001"),
        (0.0000012345, "0.0000012345"),
        (1e-7, "1e-7"),
        (-1.5e-9, "-1.5e-9"),
        (123456789.125, "123456789.125"),
        (1e16, "10000000000000000"),
        (123456789012345680000, "123456789012345680000"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (-1.25e21, "-1.25e+21"),
        (2**53, "9007199254740992"),
        (2**53 + 1, "9007199254740992"),
        (-(2**63), "-9223372036854776000"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (5e-324, "5e-324"),
    ],
)
def test_numbers(value, text):
    assert encode_canonical_json([value]) == f"[{text}]".encode()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
def test_numbers_that_json_does_not_have(value):
    with pytest.raises(ValueError, match="a number"):
        encode_canonical_json({"a": value})


def test_a_surrogate_pair_in_two_halves_is_one_character():
    assert encode_canonical_json("\ud83d\ude00 \udfff\ud800") == '"😀 \\udfff\\ud800"'.encode()


NODE_PROGRAM = """
const lines = require('fs').readFileSync(0, 'utf8').split('\\n').filter(line => line)
process.stdout.write(lines.map(line => JSON.stringify(JSON.parse(line))).join('\\n'))
"""


class Drawer:
    """Seeded JSON texts, with what JavaScript treats in its own way made frequent."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def number(self):
        draw = self.draw
        kind = draw.randrange(6)
        if kind == 0:
            while not math.isfinite(value := struct.unpack("<d", draw.randbytes(8))[0]):
                pass
            return repr(value)
        if kind == 1:
            return str(draw.randrange(-(2 ** draw.randrange(1, 80)), 2 ** draw.randrange(1, 80)))
        if kind == 2:
            return f"{draw.randrange(1, 10**6)}{draw.choice(['e', 'E'])}{draw.randrange(-30, 30)}"
        if kind == 3:
            return f"-{draw.randrange(100)}.{draw.randrange(10**5):05}"
        if kind == 4:
            return draw.choice(["-0", "-0.0", "0e5", "1.0", "9007199254740993", "1e21", "1e-7", "123e-20"])
        return f"{draw.random() * 10 ** draw.randrange(-12, 25)!r}"

    def string(self):
        alphabet = [
            "a",
            "é",
            "你",
            "😀",
            "\\n",
            '\\"',
            "\\\\",
            "\\u0000",
            "\\u001f",
            "\\u2028",
            "\\/",
            "\\ud800",
            "\\udc00",
            "\x7f",
        ]
        return '"' + "".join(self.draw.choices(alphabet, k=self.draw.randrange(6))) + '"'

    def key(self):
        indices = [
            "0",
            "00",
            "01",
            "1",
            "10",
            "9",
            "-1",
            "1.5",
            "4294967294",
            "4294967295",
            "99999999999",
            "__proto_",
            "b",
            "",
        ]
        return json.dumps(self.draw.choice(indices)) if self.draw.random() < 0.7 else self.string()

    def value(self, depth=0):
        kind = self.draw.randrange(6 if depth < 4 else 4)
        if kind < 2:
            return self.number()
        if kind == 2:
            return self.string()
        if kind == 3:
            return self.draw.choice(["true", "false", "null"])
        items = [self.value(depth + 1) for _ in range(self.draw.randrange(5))]
        if kind == 4:
            return "[" + ",".join(items) + "]"
        return "{" + ",".join(f"{self.key()}: {item}" for item in items) + "}"


def test_the_same_bytes_as_node():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    drawer = Drawer(20260101)
    texts = [drawer.value() for _ in range(20_000)] + [drawer.number() for _ in range(20_000)]
    done = subprocess.run([node, "-e", NODE_PROGRAM], input="\n".join(texts).encode(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    for text, expected in zip(texts, done.stdout.split(b"\n"), strict=True):
        assert encode_canonical_json(json.loads(text)) == expected, text


# ---- replay memory --------------------------------------------------------------------


def test_a_nonce_counts_once_per_pairing():
    memory = ReplayMemory()
    assert memory.remember_timed("p", "n", NOW, NOW) and not memory.remember_timed("p", "n", NOW, NOW)
    assert memory.remember_timed("q", "n", NOW, NOW)
    assert memory.remember_untimed("p", "n") and not memory.remember_untimed("p", "n")
    assert memory.remember_untimed("q", "n")


@pytest.mark.parametrize("later_ms", [0, SIGNATURE_SKEW_MS - 1, SIGNATURE_SKEW_MS])
def test_a_timed_nonce_is_remembered_as_long_as_it_would_be_taken(later_ms):
    memory = ReplayMemory()
    memory.remember_timed("p", "first", NOW, NOW)
    for step in range(0, later_ms, 10_000):
        memory.remember_timed("p", f"n{step}", NOW + step, NOW + step)
    assert not memory.remember_timed("p", "first", NOW, NOW + later_ms)


def test_full_of_fresh_nonces_it_refuses_and_recovers(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "TIMED_NONCES_PER_PAIRING_LIMIT", 10)
    monkeypatch.setattr(dvai_bridge, "TIMED_NONCES_LIMIT", 15)
    memory = ReplayMemory()
    for n in range(10):
        assert memory.remember_timed("p", f"n{n}", NOW, NOW)
    with pytest.raises(OverloadedError):
        memory.remember_timed("p", "one more", NOW, NOW)
    assert not memory.remember_timed("p", "n0", NOW, NOW)
    for n in range(5):
        assert memory.remember_timed("q", f"n{n}", NOW, NOW)
    with pytest.raises(OverloadedError):
        memory.remember_timed("r", "all together", NOW, NOW)
    later = NOW + SIGNATURE_SKEW_MS + NONCE_SWEEP_INTERVAL_MS
    assert memory.remember_timed("p", "one more", later, later)
    assert memory.remember_timed("r", "all together", later, later)


@pytest.mark.parametrize("days", [-40, 40])
def test_a_clock_that_jumps_leaves_no_full_memory_behind(monkeypatch, days):
    monkeypatch.setattr(dvai_bridge, "TIMED_NONCES_PER_PAIRING_LIMIT", 10)
    memory = ReplayMemory()
    for n in range(10):
        memory.remember_timed("p", f"n{n}", NOW, NOW)
    jumped = NOW + days * 86_400_000
    assert memory.remember_timed("p", "after", jumped, jumped)


def test_nonces_without_a_time_are_bounded_oldest_out():
    memory = ReplayMemory()
    for n in range(UNTIMED_NONCES_LIMIT + 1):
        assert memory.remember_untimed("p", f"n{n}")
    assert not memory.remember_untimed("p", "n1")
    assert memory.remember_untimed("p", "n0")


def test_the_memory_comes_back_from_its_file_without_a_nonce_in_it():
    memory = ReplayMemory()
    memory.remember_timed("p", "old", NOW - SIGNATURE_SKEW_MS - 1, NOW - SIGNATURE_SKEW_MS - 1)
    memory.remember_timed("p", "timed-nonce", NOW, NOW)
    memory.remember_untimed("q", "other-nonce")
    data = memory.encode(NOW)
    assert b"nonce" not in data
    again = parse_replay_memory(data)
    assert again.encode(NOW) == data
    assert not again.remember_timed("p", "timed-nonce", NOW, NOW) and not again.remember_untimed("q", "other-nonce")
    again.retain({"q"})
    assert again.remember_timed("p", "timed-nonce", NOW, NOW) and not again.remember_untimed("q", "other-nonce")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b'{"version":2}', b'{"version":1,"timed":{"p":"AA"},"untimed":{}}']
)
def test_a_damaged_memory_is_noticed(data):
    with pytest.raises((ValueError, TypeError, LookupError, AttributeError)):
        parse_replay_memory(data)
