"""The request grammar: tables both ways, whole, byte by byte and with trailing data; and never laxer than h11."""

import random

import h11
import pytest

import dvai_bridge as dvai
from dvai_bridge import BodyFraming, BridgeError, RequestBody, RequestHead, RequestParser, ResponseParser

HOST = b"Host: localhost\r\n"
GET = b"GET / HTTP/1.1\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"


def read(data, cuts=(), body_limit_bytes=1000):
    """Every event of the bytes, answered at once, then the error's status if there is one."""
    parser, events, start = RequestParser(body_limit_bytes=body_limit_bytes), [], 0
    for cut in [*cuts, len(data)]:
        parser.receive(data[start:cut])
        start = cut
        try:
            while (event := parser.next_event()) is not None:
                events.append(event)
                if isinstance(event, RequestBody):
                    parser.start_next_request()
        except BridgeError as error:
            with pytest.raises(type(error)):
                parser.next_event()
            return [*events, (type(error).__name__, error.status)]
    return events


def show(events):
    """Events as plain values."""
    shown = []
    for event in events:
        if isinstance(event, RequestHead):
            target = event.target
            shown.append((event.method, target.path, target.query, target.authority, event.http_minor))
        else:
            shown.append(event.data if isinstance(event, RequestBody) else event)
    return shown


def get(path, query="", authority=None, minor=1, method="GET"):
    return (method, path, query, authority, minor)


ACCEPTED = [
    (GET + HOST + b"\r\n", [get("/"), b""]),
    (b"GET /health HTTP/1.0\r\n" + HOST + b"\r\n", [get("/health", minor=0), b""]),
    (b"GET /a/b?x=1&y=/../%2e?{} HTTP/1.1\r\n" + HOST + b"\r\n", [get("/a/b", "x=1&y=/../%2e?{}"), b""]),
    (b"GET /a? HTTP/1.1\r\n" + HOST + b"\r\n", [get("/a"), b""]),
    (b"OPTIONS /v1/models HTTP/1.1\r\n" + HOST + b"\r\n", [get("/v1/models", method="OPTIONS"), b""]),
    (b"BREW /pot HTTP/1.1\r\n" + HOST + b"\r\n", [get("/pot", method="BREW"), b""]),
    (b"GET http://localhost:1/a?b HTTP/1.1\r\n" + HOST + b"\r\n", [get("/a", "b", "localhost:1"), b""]),
    (b"GET HTTPS://[::1]/ HTTP/1.1\r\n" + HOST + b"\r\n", [get("/", "", "[::1]"), b""]),
    (b"GET /v1/models/org%2Fname:q4 HTTP/1.1\r\n" + HOST + b"\r\n", [get("/v1/models/org/name:q4"), b""]),
    (b"GET /models/org/a.b-c HTTP/1.1\r\n" + HOST + b"\r\n", [get("/models/org/a.b-c"), b""]),
    (b"GET /models/%E6%97%A5%20x HTTP/1.1\r\n" + HOST + b"\r\n", [get("/models/日 x"), b""]),
    (b"GET /.well-known/...x HTTP/1.1\r\n" + HOST + b"\r\n", [get("/.well-known/...x"), b""]),
    (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nhello", [get("/", method="POST"), b"hello"]),
    (
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0000000000000000005\r\n\r\nhello",
        [get("/", method="POST"), b"hello"],
    ),
    (b"POST / HTTP/1.1\r\nhOST:\tLocalhost:99 \r\ncontent-length:0\r\n\r\n", [get("/", method="POST"), b""]),
    (CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", [get("/", method="POST"), b"hello"]),
    (CHUNKED + b"0\r\n\r\n", [get("/", method="POST"), b""]),
    (
        CHUNKED + b'00A;x=1;y="a b"\r\n0123456789\r\n1;\r\n\n\r\n0;last\r\nX-Sum: 1\r\nY:\r\n\r\n',
        [get("/", method="POST"), b"0123456789\n"],
    ),
    (CHUNKED.replace(b"chunked", b"CHUNKED") + b"3\r\n\r\n\n\r\n0\r\n\r\n", [get("/", method="POST"), b"\r\n\n"]),
    (GET + HOST + b"X: " + bytes(range(128, 256)) + b"\tz\r\nEmpty:\r\nX: 2\r\n\r\n", [get("/"), b""]),
    (GET + b"Host: [::1]:38883\r\n\r\n", [get("/"), b""]),
    (GET + HOST + b"\r\n" + GET + HOST + b"\r\n", [get("/"), b"", get("/"), b""]),
    (
        CHUNKED
        + b"1\r\na\r\n0\r\n\r\n"
        + b"POST /2 HTTP/1.1\r\n"
        + HOST
        + b"Content-Length: 1\r\n\r\nb"
        + GET
        + HOST
        + b"\r\n",
        [get("/", method="POST"), b"a", get("/2", method="POST"), b"b", get("/"), b""],
    ),
]

BAD = ("ProtocolError", 400)
HEAD_REFUSED = [
    # request lines
    (b"\r\n" + GET + HOST + b"\r\n", BAD),
    (b"GET /\r\n\r\n", BAD),
    (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n", BAD),
    (b" GET / HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"G(T / HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"G\xc3\x89T / HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET / http/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET / HTTP/1\r\n" + HOST + b"\r\n", BAD),
    (b"GET / HTTP/11.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET / HTTP/1.\xb2\r\n" + HOST + b"\r\n", BAD),
    (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", ("HttpVersionError", 505)),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ("HttpVersionError", 505)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n", BAD),
    # targets
    (b"GET //x HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a//x HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /../x HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a/.. HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a/./b HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /%2e%2e/x HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /v1/models/%2E HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /v1/models/..%2F..%2Fetc%2Fpasswd HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /v1%2Fmodels HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /v1/modelsx%2Fy HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%5cb HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%00 HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%0d%0ab HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%e2%80%ae HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%ff HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%2 HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a% HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%zz HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a%+1 HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a\\b HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /a?b#c HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET /\x7f HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET a HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET ftp://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET http:///x HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET http://localhost HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET http://u@localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"GET http://localhost//x HTTP/1.1\r\n" + HOST + b"\r\n", BAD),
    (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", ("MethodNotAllowedError", 405)),
    (b"CONNECT / HTTP/1.1\r\n" + HOST + b"\r\n", ("MethodNotAllowedError", 405)),
    # header lines
    (GET + HOST + b"A : b\r\n\r\n", BAD),
    (GET + HOST + b" A: b\r\n\r\n", BAD),
    (GET + HOST + b"A: b\r\n c\r\n\r\n", BAD),
    (GET + HOST + b"A: b\r\n\tc\r\n\r\n", BAD),
    (GET + HOST + b"A\r\n\r\n", BAD),
    (GET + HOST + b": b\r\n\r\n", BAD),
    (GET + HOST + b"A\xc3\xa9: b\r\n\r\n", BAD),
    (GET + HOST + b"A(: b\r\n\r\n", BAD),
    (GET + HOST + b"A: b\x00\r\n\r\n", BAD),
    (GET + HOST + b"A: b\x0bc\r\n\r\n", BAD),
    (GET + HOST + b"A: b\x7f\r\n\r\n", BAD),
    (GET + HOST + b"A: b\rC: d\r\n\r\n", BAD),
    (GET + HOST + b"A: b\r\r\n\r\n", BAD),
    (GET + HOST + b"A: b\n\r\n", BAD),
    (GET + HOST + b"\n", BAD),
    (b"GET / HTTP/1.1\n" + HOST + b"\r\n", BAD),
    (b"\n", BAD),
    # Host
    (GET + b"\r\n", BAD),
    (b"GET / HTTP/1.0\r\n\r\n", BAD),
    (GET + HOST + HOST + b"\r\n", BAD),
    (GET + b"Host:\r\n\r\n", BAD),
    (GET + b"Host: a b\r\n\r\n", BAD),
    (GET + b"Host: a,b\r\n\r\n", BAD),
    (GET + b"Host: u@a\r\n\r\n", BAD),
    (GET + b"Host: a:b\r\n\r\n", BAD),
    (GET + b"Host: a:1_0\r\n\r\n", BAD),
    (GET + b"Host: ::1\r\n\r\n", BAD),
    (GET + b"Host: a/..\r\n\r\n", BAD),
    # framing
    *(
        (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: " + length + b"\r\n\r\n" + b"x" * 50, BAD)
        for length in (b"", b"+5", b"-5", b"5 5", b"5,5", b"0x5", b"5_0", b"5.0", b"\xb2", b"5;", b"0" * 20, b"9" * 20)
    ),
    (b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", BAD),
    (CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n", BAD),
    (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n", BAD),
    *(
        (CHUNKED.replace(b": chunked", b": " + coding) + b"0\r\n\r\n", ("TransferCodingError", 501))
        for coding in (
            b"",
            b"identity",
            b"gzip",
            b"gzip, chunked",
            b"chunked, chunked",
            b"chunked;q=1",
            b"xchunked",
            b"chunked\x85",
        )
    ),
    (CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ("TransferCodingError", 501)),
    # fields that decide
    *(
        (GET + HOST + name + b": a\r\n" + name + b": a\r\n\r\n", BAD)
        for name in (b"Origin", b"Authorization", b"Content-Type", b"Sec-Fetch-Site", b"Expect")
    ),
    (GET + HOST + b"Content-Encoding: gzip\r\n\r\n", ("UnsupportedMediaTypeError", 415)),
    (GET + HOST + b"Content-Encoding: identity\r\n\r\n", ("UnsupportedMediaTypeError", 415)),
    (GET + HOST + b"Expect: 200-maybe\r\n\r\n", ("ExpectationFailedError", 417)),
    # limits
    (b"GET /" + b"a" * 8192, ("TargetTooLongError", 414)),
    (GET + HOST + b"A: " + b"b" * 8190, ("HeadersTooLargeError", 431)),
    (GET + HOST + (b"A: " + b"b" * 4000 + b"\r\n") * 9 + b"\r\n", ("HeadersTooLargeError", 431)),
    (GET + HOST + b"A:\r\n" * 100 + b"\r\n", ("HeadersTooLargeError", 431)),
]

BODY_REFUSED = [
    *(
        (CHUNKED + size + b"\r\n" + b"x" * 40, BAD)
        for size in (
            b"",
            b"+5",
            b"-5",
            b" 5",
            b"5 ",
            b"5 ;x",
            b"0x5",
            b"5_0",
            b"g",
            b"0" * 17,
            b"5;\x00",
            b"5;a\rb",
            b"\xb2",
            b";x",
        )
    ),
    (CHUNKED + b"5\nhello\r\n0\r\n\r\n", BAD),
    (CHUNKED + b"5\r\nhelloX\r\n0\r\n\r\n", BAD),
    (CHUNKED + b"5\r\nhello\n0\r\n\r\n", BAD),
    (CHUNKED + b"5\r\nhello\rX", BAD),
    (CHUNKED + b"5\r\nhello0\r\n\r\n", BAD),
    (CHUNKED + b"0\r\nA : b\r\n\r\n", BAD),
    (CHUNKED + b"0\r\nA: b\n\r\n", BAD),
    (CHUNKED + b"0\r\n X\r\n\r\n", BAD),
    (CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", BAD),
    (CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", BAD),
    (CHUNKED + b"0\r\n" + b"A:\r\n" * 101 + b"\r\n", ("HeadersTooLargeError", 431)),
    (CHUNKED + b"0\r\n" + (b"A: " + b"b" * 4000 + b"\r\n") * 3 + b"\r\n", ("HeadersTooLargeError", 431)),
    (CHUNKED + b"1;" + b"x" * 5000, ("ContentTooLargeError", 413)),
    (CHUNKED + (b"1;" + b"x" * 1000 + b"\r\na\r\n") * 5, ("ContentTooLargeError", 413)),
    (CHUNKED + b"3e9\r\n", ("ContentTooLargeError", 413)),
    (CHUNKED + b"1f4\r\n" + b"x" * 500 + b"\r\n1f5\r\n", ("ContentTooLargeError", 413)),
    (CHUNKED + b"ffffffffffffffff\r\n", ("ContentTooLargeError", 413)),
]


@pytest.mark.parametrize(("data", "events"), ACCEPTED, ids=lambda x: repr(x)[:40])
def test_accepted(data, events):
    assert show(read(data)) == events
    assert show(read(data, range(len(data)))) == events
    for cut in range(0, len(data), 7):
        assert show(read(data, [cut])) == events
        assert show(read(data[:cut])) == events[: len(show(read(data[:cut])))]
    assert show(read(data + b"\x00\n"))[:-1] == events, "trailing data is another request's"


@pytest.mark.parametrize(("data", "error"), HEAD_REFUSED, ids=lambda x: repr(x)[:60])
def test_head_refused(data, error):
    assert show(read(data)) == [error]
    assert show(read(data, range(len(data)))) == [error]
    assert show(read(data + GET + HOST + b"\r\n")) == [error]
    assert show(read(GET + HOST + b"\r\n" + data)) == [get("/"), b"", error], "also when it comes second"


@pytest.mark.parametrize(("data", "error"), BODY_REFUSED, ids=lambda x: repr(x)[-60:])
def test_body_refused(data, error):
    assert show(read(data)) == [get("/", method="POST"), error]
    assert show(read(data, range(len(data)))) == [get("/", method="POST"), error]
    assert show(read(data + GET + HOST + b"\r\n")) == [get("/", method="POST"), error]


def test_content_length_beyond_the_limit_is_refused_before_the_body():
    head = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n"
    assert show(read(head % 1001)) == [("ContentTooLargeError", 413)]
    assert show(read(head % 9999999999999999999)) == [("ContentTooLargeError", 413)]
    assert show(read(head % 1000 + b"x" * 1000)) == [get("/", method="POST"), b"x" * 1000]


FIRST_EXCESS = [
    (b"GET /" + b"a" * (8192 - len(b"GET / HTTP/1.1")) + b" HTTP/1.1", b"\r\n", b"x", 414),
    (GET + HOST + b"A: " + b"b" * (8192 - 3), b"\r\n", b"b", 431),
    (GET + HOST + (b"A: " + b"b" * 7995 + b"\r\n") * 4 + b"C: " + b"d" * (32768 - 17 - 32000 - 5), b"\r\n", b"d", 431),
    (GET + HOST + b"A:\r\n" * 99, b"\r\n", b"A:\r\n", 431),
    (CHUNKED + b"0000000000000001;" + b"x" * 4095, b"\r\n", b"x", 413),
    (CHUNKED + b"3e8", b"\r\n", b"0\r\n", 413),
    (CHUNKED + b"0\r\n" + b"A: " + b"b" * 8000 + b"\r\nC: " + b"d" * (8192 - 8005 - 5), b"\r\n", b"d", 431),
]


@pytest.mark.parametrize(("data", "goes_on", "excess", "status"), FIRST_EXCESS, ids=lambda x: repr(x)[-20:])
def test_limits_hold_at_the_first_excess_byte(data, goes_on, excess, status):
    for cuts in ((), range(len(data))):
        assert not isinstance((read(data + goes_on, cuts) or [None])[-1], tuple), "at the limit it goes on"
        assert read(data + excess, cuts)[-1][1] == status
    assert len(excess) > 1 or not isinstance((read(data) or [None])[-1], tuple)


def test_outcome_does_not_depend_on_segments():
    rng = random.Random(11)
    for data in [*(d for d, _ in ACCEPTED), *mutate_requests(rng, 2000)]:
        whole = show(read(data))
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 6)))
        assert show(read(data, cuts)) == whole, data
        if len(data) < 300:
            assert show(read(data, range(len(data)))) == whole, data


def lay_open(events):
    """Events with all that they say."""
    return [
        (each.method, each.target, each.http_minor, list(each.headers), each.body_length, each.keep_alive,
         each.expects_continue, each.headers.get("content-length"))
        if isinstance(each, RequestHead) else each
        for each in events
    ]  # fmt: skip


def test_a_head_that_comes_again_is_read_as_if_it_were_the_first():
    rng, seen = random.Random(12), set()
    lines = b"POST /v1/a HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %b\r\nExpect: 100-continue\r\nX: y\r\n\r\n"
    lengths = [b"5", b"15", b"1", b"0", b"05", b"999", b"1001", b"-1", b"5 ", b" 5", b"5, 5", b"", b"9" * 15, b"9" * 19]
    for _ in range(3000):
        extra = rng.choice([b"", b"", b"", b"A: b\r\n", b"content-length: 5\r\n", b"Connection: close\r\n"])
        length, name = rng.choice(lengths), rng.choice([b"Content-Length", b"Content-Length", b"content-length"])
        again = (lines % (extra, length)).replace(b"Content-Length", name)
        if rng.random() < 0.3:
            at = rng.randrange(len(again))
            again = again[:at] + rng.choice([b"", b"\n", b"7", b"\x00"]) + again[at + rng.randrange(2) :]
        body = b"x" * (int(length) if length.isdigit() and int(length) < 1000 else 5)
        first = lines % (b"", b"5") + b"hello"
        cuts = sorted(rng.randrange(len(first + again)) for _ in range(rng.randrange(3)))
        alone = read(again + body)
        assert lay_open(read(first + again + body, cuts)) == lay_open(read(first) + alone), again
        seen |= {each[1] if isinstance(each, tuple) else type(each) for each in alone[-1:]}
    assert seen >= {400, 413, RequestBody, RequestHead}, seen


def test_only_the_length_may_differ_from_the_head_before():
    parser, found = RequestParser(body_limit_bytes=100), []
    for length, extra in ((5, b""), (5, b""), (12, b""), (12, b"A: b\r\n"), (12, b""), (0, b"")):
        lines = b"Content-Length: %d\r\n%b\r\n" % (length, HOST + extra)
        parser.receive(b"POST / HTTP/1.1\r\n" + lines + b"x" * length)
        assert parser.next_event().body_length == length and len(parser.next_event().data) == length
        parser.start_next_request()
        found.append(parser.is_repeated)
    assert found == [False, True, True, False, False, False]


def test_head_says_what_matters():
    def head(lines, minor=1):
        return read(b"POST / HTTP/1.%d\r\n" % minor + HOST + lines + b"\r\n")[0]

    assert head(b"").keep_alive and not head(b"", minor=0).keep_alive
    assert head(b"Connection: Keep-Alive\r\n", minor=0).keep_alive
    assert not head(b"Connection: keep-alive, x\r\nConnection: CLOSE\r\n").keep_alive
    expecting = b"Expect: 100-Continue\r\n"
    assert head(expecting + b"Content-Length: 5\r\n").expects_continue
    assert head(expecting + b"Transfer-Encoding: chunked\r\n").expects_continue
    assert not head(expecting).expects_continue, "there is no body to wait for"
    assert not head(expecting + b"Content-Length: 5\r\n", minor=0).expects_continue, "HTTP/1.0 does not know it"
    headers = head(b"X-A: 1\r\nx-a: 2\r\nB: c , D\r\n").headers
    assert headers.get("x-a") == "1, 2" and headers.get_all("x-a") == ("1", "2") and list(headers.doubled()) == ["x-a"]
    assert headers.get_tokens("b") == ["c", "d"] and "x-a" in headers and "y" not in headers
    assert list(headers) == [("host", "localhost"), ("x-a", "1"), ("x-a", "2"), ("b", "c , D")] and len(headers) == 4


def test_parser_waits_for_the_answer():
    parser = RequestParser(body_limit_bytes=10)
    parser.receive((GET + HOST + b"\r\n") * 2)
    assert isinstance(parser.next_event(), RequestHead) and parser.next_event() == RequestBody(b"")
    assert parser.next_event() is None and parser.buffered_bytes == len(GET + HOST + b"\r\n")
    parser.start_next_request()
    assert isinstance(parser.next_event(), RequestHead)
    with pytest.raises(RuntimeError):
        parser.start_next_request()


def test_consumed_chunks_are_not_kept_twice():
    parser = RequestParser(body_limit_bytes=dvai.MIB)
    parser.receive(CHUNKED)
    assert isinstance(parser.next_event(), RequestHead)
    for _ in range(100):
        parser.receive(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        assert parser.next_event() is None
    assert parser.body_received_bytes == 100 * 4096
    assert len(parser._buffer) <= dvai.PIPELINE_LIMIT_BYTES + 8192


# -- the same requests, read by h11 --

SEEDS = [data for data, _ in ACCEPTED] + [data for data, _ in HEAD_REFUSED + BODY_REFUSED if len(data) < 500]
PIECES = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\x00", b"\x0b", b"\x7f", b"\x85", b"\xa0", b"\xff", b":", b";",
    b"0", b"5", b"+", b"-", b"_", b"a", b"Host: localhost\r\n", b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n", b"chunked", b"X: y\r\n", b"HTTP/1.0", b"http://localhost", b"%2e", b"hello",
    b"0\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b",",
]  # fmt: skip


def mutate_requests(rng, count):
    """Requests with up to three small changes each."""
    return mutate(rng, SEEDS, PIECES, count)


def mutate(rng, seeds, pieces, count):
    """Messages of `seeds` with up to three small changes each: a piece more, bytes less, another byte, a repetition."""
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(4)
            if kind == 0:
                data[at:at] = rng.choice(pieces)
            elif kind == 1:
                del data[at : at + rng.randrange(1, 4)]
            elif kind == 2 and at < len(data):
                data[at] = rng.randrange(256)
            else:
                end = at + rng.randrange(20)
                data[at:at] = data[at:end]
        yield bytes(data)


def read_first_with_h11(data):
    """(head, body or None, rest) of the first request; None for what h11 refuses or has not got whole."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    head, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                head = (event.method, event.target, event.http_version, [(n, v) for n, v in event.headers])
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return head, body, connection.trailing_data[0]
            else:
                return head, None, b""
    except h11.RemoteProtocolError:
        return "refused"


def read_first(data):
    parser = RequestParser(body_limit_bytes=1 << 20)
    parser.receive(data)
    head, body = None, None
    try:
        while (event := parser.next_event()) is not None:
            if isinstance(event, RequestBody):
                body = event.data
            else:
                head = event
    except BridgeError:
        return "refused"
    if head is None:
        return None, None, b""
    target, authority = head.target.raw_path, head.target.authority
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
    return (
        (head.method.encode(), target.encode(), authority, b"1.%d" % head.http_minor, headers),
        body,
        bytes(parser._buffer),
    )


def test_never_laxer_than_h11():
    """What we accept, h11 accepts and reads alike: head, body and where the next request begins. No exceptions."""
    rng = random.Random(23)
    accepted = stricter = 0
    for data in mutate_requests(rng, 30_000):
        ours, theirs = read_first(data), read_first_with_h11(data)
        if ours == "refused":
            stricter += theirs != "refused"
            continue
        head, body, rest = ours
        if head is None:
            continue
        assert theirs != "refused", data
        method, target, version, headers = theirs[0]
        assert (method, version) == (head[0], head[3]), data
        assert target.split(b"?")[0] == (b"" if head[2] is None else target[: target.index(b"/", 8)]) + head[1], data
        # h11 turns "Chunked" into "chunked", which is the one value it rewrites
        assert [(n, v.lower()) for n, v in headers] == [(n, v.lower()) for n, v in head[4]], data
        if body is not None:
            accepted += 1
            assert (theirs[1], theirs[2]) == (body, rest), data
    assert accepted > 2000 and stricter > 1000, "the corpus reaches both sides of the border"


# -- answers --


def read_response(data, method="GET"):
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    client.receive_data(b"")
    response, body = client.next_event(), b""
    while isinstance(event := client.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    return response, body


def test_response_head_is_read_by_h11():
    data = dvai.encode_response_head(429, [("Retry-After", "5"), ("X-Name", "a b"), ("Content-Length", "2")]) + b"{}"
    response, body = read_response(data)
    assert (response.status_code, response.reason, body) == (429, b"Too Many Requests", b"{}")
    assert (b"retry-after", b"5") in response.headers


def test_chunks_are_read_by_h11():
    head = dvai.encode_response_head(200, [("Transfer-Encoding", "chunked")])
    data = head + dvai.encode_chunk(b"a" * 300) + dvai.encode_chunk(b"\r\n") + dvai.LAST_CHUNK
    assert read_response(data)[1] == b"a" * 300 + b"\r\n"


@pytest.mark.parametrize(
    "field", [("A", "b\r\nC: d"), ("A\r\nB", "c"), ("A", "\x00"), ("A b", "c"), ("", "c"), ("A", "日"), ("A:", "b")]
)
def test_response_fields_cannot_break_out(field):
    with pytest.raises(ValueError):
        dvai.encode_response_head(200, [field])


@pytest.mark.parametrize(
    ("method", "minor", "status", "is_stream", "framing"),
    [
        ("GET", 1, 200, False, BodyFraming.LENGTH),
        ("GET", 1, 200, True, BodyFraming.CHUNKED),
        ("GET", 0, 200, True, BodyFraming.CLOSE),
        ("GET", 0, 200, False, BodyFraming.LENGTH),
        ("HEAD", 1, 200, True, BodyFraming.NONE),
        ("HEAD", 1, 404, False, BodyFraming.NONE),
        ("GET", 1, 204, False, BodyFraming.NONE),
        ("GET", 1, 304, True, BodyFraming.NONE),
        ("GET", 1, 101, True, BodyFraming.NONE),
    ],
)
def test_framing(method, minor, status, is_stream, framing):
    assert dvai.choose_framing(method=method, http_minor=minor, status=status, is_stream=is_stream) is framing


def test_date_is_the_one_of_the_rfc():
    assert dvai.encode_http_date(784111777) == "Sun, 06 Nov 1994 08:49:37 GMT"
    assert dvai.encode_http_date(0) == "Thu, 01 Jan 1970 00:00:00 GMT"


# -- answers --

OK = b"HTTP/1.1 200 OK\r\n"
OK_CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def read_answer(data, cuts=(), method="GET", closes=False):
    """(status, minor, body, end, reusable) of an answer; end: "whole", "more" or the error's code."""
    parser, body, start = ResponseParser(method), b"", 0
    for cut in [*cuts, len(data)]:
        body += parser.receive(data[start:cut])
        start = cut
    if closes:
        parser.receive_eof()
    end = parser.error.code if parser.error else "whole" if parser.is_complete else "more"
    head = parser.head
    return (head and head.status, head and head.http_minor, body, end, parser.can_reuse)


ANSWERS = [
    (OK + b"Content-Length: 5\r\n\r\nhello", (200, 1, b"hello", "whole", True)),
    (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", (200, 1, b"", "whole", True)),
    (b"HTTP/1.1 404\r\nContent-Length: 2\r\n\r\n{}", (404, 1, b"{}", "whole", True)),
    (b"HTTP/1.1 200 Tr\xc3\xa8s bien\r\nContent-Length: 0\r\n\r\n", (200, 1, b"", "whole", True)),
    (OK + b"Connection: Close\r\nContent-Length: 1\r\n\r\nx", (200, 1, b"x", "whole", False)),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", (200, 0, b"x", "whole", False)),
    (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 1\r\n\r\nx",
        (200, 0, b"x", "whole", True),
    ),
    (OK_CHUNKED + b"5\r\nhello\r\n1;a=b\r\n\n\r\n0\r\nX-Sum: 1\r\n\r\n", (200, 1, b"hello\n", "whole", True)),
    (OK_CHUNKED + b"005\r\nhello\r\n", (200, 1, b"hello", "more", False)),
    (OK_CHUNKED + b"5\r\nhel", (200, 1, b"hel", "more", False)),
    (OK + b"Content-Length: 5\r\n\r\nhel", (200, 1, b"hel", "more", False)),
    (OK + b"Content-Length: 5\r\n\r\nhelloHTTP/1.1", (200, 1, b"hello", "whole", False)),
    (OK + b"\r\nuntil the end", (200, 1, b"until the end", "more", False)),
    (b"HTTP/1.1 204 No Content\r\n\r\n", (204, 1, b"", "whole", True)),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", (304, 1, b"", "whole", True)),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\nx", (200, 1, b"x", "whole", True)),
    (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" * 8 + OK + b"Content-Length: 0\r\n\r\n", (200, 1, b"", "whole", True)),
    (OK + b"A: b\r\n", (None, None, b"", "more", False)),
]

BROKEN = (None, None, b"", "upstream_failed", False)
BROKEN_ANSWERS = [
    *(
        (line + b"\r\nContent-Length: 0\r\n\r\n", BROKEN)
        for line in (
            b"", b"HTTP/1.1", b"HTTP/1.1 20", b"HTTP/1.1 2000 OK", b"HTTP/1.1 600 OK", b"HTTP/1.1 099 OK",
            b"HTTP/1.1  200 OK", b"HTTP/1.1 200\tOK", b"HTTP/1.1 +20 OK", b"HTTP/1.2 200 OK", b"HTTP/2.0 200 OK",
            b"http/1.1 200 OK", b"HTTP/1.1 200 O\x00K", b" HTTP/1.1 200 OK", b"ICY 200 OK", b"\x15\x03\x01",
            b"HTTP/1.1 101 Switching Protocols", b"HTTP/1.1 2\xb20 OK", b"220 smtp.example.org ESMTP",
        )
    ),
    (b"HTTP/1.1 200 OK\nContent-Length: 0\n\n", BROKEN),
    (OK + b"A : b\r\n\r\n", BROKEN),
    (OK + b"A: b\r\n c\r\n\r\n", BROKEN),
    (OK + b"A: b\n\r\n", BROKEN),
    (OK + b"A: \x00\r\n\r\n", BROKEN),
    (OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", BROKEN),
    (OK + b"Content-Length: 5, 5\r\n\r\nhello", BROKEN),
    (OK + b"Content-Length: +5\r\n\r\nhello", BROKEN),
    (OK + b"Content-Length: " + b"9" * 20 + b"\r\n\r\n", BROKEN),
    (OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", BROKEN),
    (OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", BROKEN),
    (OK + b"Transfer-Encoding: gzip\r\n\r\n", BROKEN),
    (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", BROKEN),
    (b"HTTP/1.1 103 Early\r\n\r\n" * 9, BROKEN),
    (OK + b"A: " + b"b" * 8190, BROKEN),
    (OK + (b"A: " + b"b" * 4000 + b"\r\n") * 9, BROKEN),
    (OK + b"A:\r\n" * 101, BROKEN),
    (b"HTTP/1.1 200 " + b"a" * 8190, BROKEN),
    *(
        (OK_CHUNKED + b"2\r\nhi\r\n" + rest, (200, 1, b"hi" + more, "upstream_failed", False))
        for rest, more in (
            (b"+5\r\nhello\r\n", b""), (b" 5\r\n", b""), (b"5_0\r\n", b""), (b"0x5\r\n", b""), (b"g\r\n", b""),
            (b"\r\n", b""), (b"5\nhello", b""), (b"0" * 17 + b"\r\n", b""), (b"5\r\nhelloX\r\n", b"hello"),
            (b"5\r\nhello\n0\r\n\r\n", b"hello"), (b"0\r\nContent-Length: 1\r\n\r\n", b""), (b"0\r\nA : b\r\n", b""),
            (b"1;" + b"x" * 5000, b""), (b"0\r\n" + b"A:\r\n" * 101, b""),
        )
    ),
]  # fmt: skip


def test_a_change_of_protocol_that_was_asked_for_leaves_the_rest():
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\nHTTP/1.1 and more"
    for cut in range(len(data) + 1):
        parser = ResponseParser("GET", may_upgrade=True)
        assert parser.receive(data[:cut]) + parser.receive(data[cut:]) == b""
        assert parser.error is None and parser.is_complete and parser.head.status == 101
        assert parser.head.headers.get("upgrade") == "x"
        assert parser.take_rest() == b"HTTP/1.1 and more" and parser.take_rest() == b""


@pytest.mark.parametrize(("data", "answer"), ANSWERS + BROKEN_ANSWERS, ids=lambda x: repr(x)[-60:])
def test_answers(data, answer):
    assert read_answer(data) == answer
    assert read_answer(data, range(len(data))) == answer
    for cut in range(0, len(data), max(1, len(data) // 40)):
        assert read_answer(data, [cut]) == answer


def test_answers_that_end_with_the_connection():
    assert read_answer(OK + b"\r\nall", closes=True) == (200, 1, b"all", "whole", False)
    for data in (
        b"",
        b"HTTP/1.1 2",
        OK,
        OK + b"Content-Length: 5\r\n\r\nhell",
        OK_CHUNKED,
        OK_CHUNKED + b"1\r\nx\r\n0\r\n",
    ):
        assert read_answer(data, closes=True)[3] == "upstream_lost", data
    whole = OK + b"Content-Length: 1\r\n\r\nx"
    assert read_answer(whole, closes=True)[3] == "whole"
    assert read_answer(OK + b"Content-Length: 5\r\n\r\n", method="HEAD") == (200, 1, b"", "whole", True)
    assert read_answer(OK + b"Transfer-Encoding: chunked\r\n\r\n", method="HEAD")[3] == "whole"


def test_a_header_block_in_many_segments_keeps_its_limit():
    parser = ResponseParser("GET")
    parser.receive(OK)
    for _ in range(20):
        parser.receive(b"A: " + b"b" * 4000 + b"\r\n")
    assert parser.error is not None and parser.head is None


def test_a_long_stream_is_not_kept():
    parser = ResponseParser("GET")
    parser.receive(OK_CHUNKED)
    for _ in range(100):
        assert parser.receive(b"1000\r\n" + b"x" * 4096) == b"x" * 4096
        assert parser.receive(b"\r\n") == b""
        assert parser.buffered_bytes == 0


# -- the same answers, read by h11 --

ANSWER_SEEDS = [data for data, _ in ANSWERS + BROKEN_ANSWERS if len(data) < 400]
ANSWER_PIECES = [*PIECES, b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n\r\n", b"Connection: close\r\n", b"204", b"304"]


def read_answer_with_h11(data):
    """(status, body, whole), or None for what h11 refuses; the server closes behind the data."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "localhost")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    connection.receive_data(b"")
    status, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return status, body
            elif not isinstance(event, h11.InformationalResponse):
                return None
    except h11.RemoteProtocolError:
        return None


def test_answers_are_never_read_otherwise_than_by_h11():
    rng, agreed = random.Random(7), 0
    for data in mutate(rng, ANSWER_SEEDS, ANSWER_PIECES, 20_000):
        status, _, body, end, _ = read_answer(data, closes=True)
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 6)))
        assert read_answer(data, cuts, closes=True) == read_answer(data, closes=True), data
        if end == "whole":
            agreed += 1
            assert read_answer_with_h11(data) == (status, body), data
    assert agreed > 2_000
