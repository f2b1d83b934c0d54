"""Bounded JSON, base64url, numbers and foreign names."""

import json
import sys

import pytest

from dvai_bridge import (
    JSON_CONTAINERS_LIMIT,
    JSON_DEPTH_LIMIT,
    JSON_DIGITS_LIMIT,
    JsonError,
    display_name,
    encode_base64url,
    encode_json,
    parse_base64url,
    parse_decimal,
    parse_json,
)

VALUES = [
    (b"null", None),
    (b" [ ] \n", []),
    (b'{"a":1,"b":[true,false,null],"c":{"d":-0.5e-3}}', {"a": 1, "b": [True, False, None], "c": {"d": -0.5e-3}}),
    ('{"text":"grüße 👋","日":"本"}'.encode(), {"text": "grüße 👋", "日": "本"}),
    (rb'"\ud83d\ude00 \\ud800 \" \\"', '😀 \\ud800 " \\'),
    (b'"[[[{{{"', "[[[{{{"),
    (b"1" * JSON_DIGITS_LIMIT, int("1" * JSON_DIGITS_LIMIT)),
    (b"-" + b"1" * JSON_DIGITS_LIMIT, -int("1" * JSON_DIGITS_LIMIT)),
    (b"1e-9999", 0.0),
    (b"[" * JSON_DEPTH_LIMIT + b"]" * JSON_DEPTH_LIMIT, json.loads("[" * JSON_DEPTH_LIMIT + "]" * JSON_DEPTH_LIMIT)),
    (b'[{"":' * 32 + b"1" + b"}]" * 32, json.loads('[{"":' * 32 + "1" + "}]" * 32)),
    (b'["' + b"[" * 1000 + b'"]', ["[" * 1000]),
    (rb'["' + rb"\"[" * 1000 + b'"]', ['"[' * 1000]),
    (rb'["\\",' + b"[]," * 1000 + b"[]]", ["\\", *[[]] * 1001]),
]

REFUSED = [
    b"",
    b"\xef\xbb\xbf{}",
    b"{}x",
    b"{'a':1}",
    b'{"a":1,}',
    b"[1 2]",
    b"01",
    b"+1",
    b".5",
    b"1_000",
    "５".encode(),
    b"NaN",
    b"[Infinity]",
    b"-Infinity",
    b"1e999",
    b"-1e999",
    b"1" * (JSON_DIGITS_LIMIT + 1),
    b"1" * 5000,
    b"0." + b"1" * JSON_DIGITS_LIMIT,
    b"1" * 40 + b"e" + b"0" * 40,
    b'{"a":1,"a":1}',
    rb'{"a":1,"\u0061":2}',
    rb'"\ud800"',
    rb'"\udc00"',
    rb'"\ud800\u0041"',
    rb'"\udc00\ud800"',
    rb'"\ud83d\ud83d\ude00"',
    rb'"\\\ud800"',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"\xc0\x80"',
    b'"a\nb"',
    b'"\x00"',
    b"[" * (JSON_DEPTH_LIMIT + 1) + b"]" * (JSON_DEPTH_LIMIT + 1),
    b'[{"":' * 33 + b"1" + b"}]" * 33,
    b"[" * 100_000,
    b'{"":' * 100_000,
    b'"x"' + b"[" * 100_000,
    b'["' + b"[" * 1000 + b'",' + b"[" * 100_000,
    b"[" + b"[]," * JSON_CONTAINERS_LIMIT + b"0]",
]


@pytest.mark.parametrize(("data", "value"), VALUES, ids=lambda x: repr(x)[:30])
def test_json_values(data, value):
    assert parse_json(data) == value
    assert parse_json(encode_json(value)) == value


@pytest.mark.parametrize("data", REFUSED, ids=lambda x: repr(x)[:30])
def test_json_refused(data):
    with pytest.raises(JsonError):
        parse_json(data)


def test_json_errors_do_not_quote_the_text():
    for data in (b'{"password":"hunter2" "x"}', b'{"hunter2":1,"hunter2":2}', b'["hunter2 \xff"]'):
        with pytest.raises(JsonError) as caught:
            parse_json(data)
        assert "hunter2" not in str(caught.value)


def test_deep_json_costs_neither_stack_nor_memory():
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(120 + len(_stack()))
    try:
        assert parse_json(b"[" * JSON_DEPTH_LIMIT + b"]" * JSON_DEPTH_LIMIT)
        with pytest.raises(JsonError, match="deeper"):
            parse_json(b"[" * 90_000)
    finally:
        sys.setrecursionlimit(limit)


def _stack():
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def test_encode_json_is_compact_raw_and_strict():
    assert encode_json({"a": [1, 2.5, "é👋\n"], "b": None}) == '{"a":[1,2.5,"é👋\\n"],"b":null}'.encode()
    for value in (float("nan"), float("inf"), "\ud800"):
        with pytest.raises(ValueError):
            encode_json(value)


BASE64URL = [
    (b"", ""),
    (b"\x00", "AA"),
    (b"\xff\xff", "__8"),
    (b"\xfb\xef\xbe", "----"),
    (bytes(range(16)), "AAECAwQFBgcICQoLDA0ODw"),
]


@pytest.mark.parametrize(("data", "text"), BASE64URL)
def test_base64url_both_ways(data, text):
    assert encode_base64url(data) == text
    assert parse_base64url(text) == data


@pytest.mark.parametrize(
    "text", ["A", "AB", "AA=", "AA==", "AAA=", "AA\n", " AA", "A+A/", "ÄA", "AAAAA", "__9", "AAAA\x00"]
)
def test_base64url_has_one_spelling(text):
    with pytest.raises(ValueError):
        parse_base64url(text)


def test_decimal():
    assert parse_decimal("0", maximum=9) == 0
    assert parse_decimal("0065535", maximum=65535) == 65535
    for text in ("", "+5", "-5", " 5", "5 ", "5\n", "5_0", "５", "1e3", "0x1", "65536", "1" * 20):
        with pytest.raises(ValueError):
            parse_decimal(text, maximum=65535)
    with pytest.raises(ValueError):
        parse_decimal("0", minimum=1, maximum=9)


NAMES = [
    ("Anna’s Laptop 💻", "Anna’s Laptop 💻"),
    ("", ""),
    ("two\nlines\r", "two\\nlines\\r"),
    ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
    ("evil\u202egpj.exe", "evil\\u202egpj.exe"),
    ("a\u2066b\u200bc\u2028d\ufeff", "a\\u2066b\\u200bc\\u2028d\\ufeff"),
    ("\U000e0041\ud800", "\\U000e0041\\ud800"),
    ("back\\n", "back\\\\n"),
    ("x" * 64, "x" * 64),
    ("x" * 65, "x" * 63 + "…"),
    ("x" * 60 + "\u202e" * 9, "x" * 60 + "…"),
]


@pytest.mark.parametrize(("text", "shown"), NAMES, ids=lambda x: ascii(x)[:20])
def test_display_name(text, shown):
    assert display_name(text) == shown
    assert len(shown) <= 64 and (not shown or shown.isprintable())


def test_display_name_of_a_giant_is_quick_to_cut():
    assert display_name("\n" * 10**7) == "\\n" * 31 + "…"
