"""Server-sent events: what we write, what we read, however it is cut."""

import random

import pytest

from dvai_bridge import SseError, SseEvent, SseParser, encode_sse_comment, encode_sse_event

STREAMS = [
    (b"", []),
    (b"data: a\n\n", [SseEvent("a")]),
    (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", [SseEvent("a"), SseEvent("b"), SseEvent("c")]),
    (b"data:a\n\n", [SseEvent("a")]),
    (b"data:  a \n\n", [SseEvent(" a ")]),
    (b"data: a\ndata\ndata: b\n\n", [SseEvent("a\n\nb")]),
    (b"data\n\n", [SseEvent("")]),
    (b": ping\n\n: ping\ndata: x\n\n", [SseEvent("x")]),
    (b"\xef\xbb\xbfdata: bom\n\n", [SseEvent("bom")]),
    (b"event: delta\nid: 7\ndata: x\n\ndata: y\n\n", [SseEvent("x", "delta", "7"), SseEvent("y", "message", "7")]),
    (b"id: 1\ndata: x\n\nid\ndata: y\n\n", [SseEvent("x", "message", "1"), SseEvent("y", "message", "")]),
    (b"id: a\x00b\nretry: 5\nunknown: z\nDATA: no\ndata: x\n\n", [SseEvent("x")]),
    (b"event: lost\n\ndata: x\n\n", [SseEvent("x")]),
    ("data: grüße 👋\n\n".encode(), [SseEvent("grüße 👋")]),
    (b"data: \xff\n\n", [SseEvent("\ufffd")]),
    (b"data: never ended\n", []),
    (b"data: [DONE]\r\n\r\n", [SseEvent("[DONE]")]),
]


def read(stream, cuts):
    parser, events, start = SseParser(), [], 0
    for cut in [*cuts, len(stream)]:
        events += parser.feed(stream[start:cut])
        start = cut
    return events


@pytest.mark.parametrize(("stream", "events"), STREAMS, ids=lambda x: repr(x)[:30])
def test_streams_whole_and_cut(stream, events):
    assert read(stream, []) == events
    assert read(stream, range(len(stream))) == events
    for cut in range(len(stream)):
        assert read(stream, [cut]) == events
        assert read(stream, [cut, cut]) == events  # an empty segment is no end


def test_random_streams_do_not_depend_on_segments():
    rng = random.Random(7)
    for _ in range(500):
        stream = b"".join(
            rng.choice([b"data: ", b"id:", b"x", b"\r", b"\n", b"\r\n", b":", b"\n\n"]) for _ in range(40)
        )
        cuts = sorted(rng.randrange(len(stream)) for _ in range(6))
        assert read(stream, cuts) == read(stream, []) == read(stream, range(len(stream)))


@pytest.mark.parametrize("data", ['{"a":1}', "two\nlines", "cr\rlf\r\nend", "", "\n", " leading", "👋"])
def test_what_we_write_we_read(data):
    expected = data.replace("\r\n", "\n").replace("\r", "\n")
    assert read(encode_sse_comment("ping") + encode_sse_event(data), []) == [SseEvent(expected)]


def test_exact_bytes():
    assert encode_sse_event('{"a":1}') == b'data: {"a":1}\n\n'
    assert encode_sse_comment("ping") == b": ping\n"
    for text in ("a\nb", "a\rb"):
        with pytest.raises(ValueError):
            encode_sse_comment(text)


@pytest.mark.parametrize("endless", [b"x", b"data: x\n", b"data:\n", b"data: " + b"x" * 600 + b"\n"])
def test_endless_lines_and_events_are_bounded(endless):
    parser = SseParser(limit_bytes=1000)
    with pytest.raises(SseError):
        for _ in range(1100):
            parser.feed(endless)


def test_a_stream_of_events_is_not_bounded():
    parser = SseParser(limit_bytes=1000)
    assert sum(len(parser.feed(b": ping\n\ndata: " + b"x" * 900 + b"\n\n")) for _ in range(1000)) == 1000


@pytest.mark.parametrize("line", [b"data: \xff", b"event: \xc3", b"id: \xed\xa0\x80"])
def test_what_is_not_utf8_is_replaced_or_refused(line):
    assert "\ufffd" in repr(SseParser().feed(line + b"\ndata: x\n\n"))
    with pytest.raises(SseError):
        SseParser(is_strict=True).feed(line + b"\ndata: x\n\n")


def test_a_parser_knows_whether_an_event_is_under_way():
    parser = SseParser()
    for data, inside in (
        (b"d", True),
        (b"ata: x\n", True),
        (b"\n", False),
        (b"event: y\n", True),
        (b"\n", False),
        (b": c\n", False),
    ):
        parser.feed(data)
        assert parser.is_inside_event == inside, data
    parser.feed(b"data: x\r")
    assert parser.is_inside_event
