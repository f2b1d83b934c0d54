"""What peers send put in order, and requests forwarded to real loopback peers that fail in every way."""

import asyncio
import base64
import itertools
import json
import random
import struct
from collections import Counter

import pytest

import dvai_bridge
from dvai_bridge import (
    PING,
    AnswerAssembler,
    AnswerHead,
    AttemptOutcome,
    ChunkNormalizer,
    ForwardBudgets,
    Forwarder,
    ForwardForm,
    ForwardOutcome,
    ForwardRequest,
    ForwardTarget,
    HttpClient,
    PeerError,
    PeerHabit,
    PeerHabits,
    PeerStream,
    UpstreamError,
    build_first_content_budget,
    build_forward_body,
    encode_json_event,
)
from tests.test_http1 import mutate
from tests.test_http_client import Server

HEAD = AnswerHead(id="chatcmpl-ours", created=1_700_000_000, model="m")
CHAT = {"model": "asked", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
PATIENCE_S = 30


# -- putting a stream in order --


def chunk(delta, finish=None, index=0, **more):
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return {"id": "x", "object": "o", "created": 1, "model": "served", "choices": [choice]} | more


def encode(*values, done=True):
    events = b"".join(encode_json_event(value) for value in values)
    return events + (b"data: [DONE]\n\n" if done else b"")


def decode(data):
    """The values of a stream; [DONE] and comments as they stand."""
    blocks = [block for block in data.decode().split("\n\n") if block]
    return [json.loads(block[6:]) if block.startswith("data: {") else block for block in blocks]


def put_in_order(data, form=ForwardForm.CHAT, include_usage=False, size=None):
    normalizer = ChunkNormalizer(form, HEAD, include_usage=include_usage)
    stream = PeerStream(normalizer, None)
    size = size or max(1, len(data))
    out = b"".join(stream.feed(data[at : at + size]) for at in range(0, len(data), size))
    assert stream.is_done, "the stream is complete"
    return decode(out)


def assemble(data, form=ForwardForm.CHAT):
    normalizer, assembler = ChunkNormalizer(form, HEAD, include_usage=False), AnswerAssembler(form)
    stream = PeerStream(normalizer, assembler)
    assert stream.feed(data) == b"" or stream.is_done
    return assembler.build(normalizer.head, normalizer.usage, normalizer.timings)


def deltas(events):
    return [(c["index"], c["delta"], c["finish_reason"]) for e in events[:-1] for c in e["choices"]]


ROLE = (0, {"role": "assistant", "content": ""}, None)
STOP = (0, {}, "stop")
HELLO = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hel"}),
    chunk({"content": "lo"}),
    chunk({}, "stop"),
]


def test_a_stream_in_order_is_kept():
    events = put_in_order(encode(*HELLO))
    assert deltas(events) == [ROLE, (0, {"content": "Hel"}, None), (0, {"content": "lo"}, None), STOP]
    assert events[-1] == "data: [DONE]"
    for event in events[:-1]:
        assert list(event) == ["id", "object", "created", "model", "choices"]
        assert (event["id"], event["object"], event["created"], event["model"]) == (
            "chatcmpl-ours",
            "chat.completion.chunk",
            1_700_000_000,
            "served",
        )


CONTENT = (0, {"content": "x"}, None)
ODD_STREAMS = [
    ("no role", [chunk({"content": "x"}), chunk({}, "stop")], [ROLE, CONTENT, STOP]),
    (
        "a role on every chunk",
        [chunk({"role": "assistant", "content": "x"})] * 2 + [chunk({"role": "assistant"}, "stop")],
        [ROLE, CONTENT, CONTENT, STOP],
    ),
    ("content with the end", [chunk({"content": "x"}, "stop")], [ROLE, CONTENT, STOP]),
    ("an end twice", [chunk({"content": "x"}, "stop"), chunk({"content": "y"}, "stop")], [ROLE, CONTENT, STOP]),
    ("null content", [chunk({"content": None}), chunk({"content": "x"}), chunk({}, "stop")], [ROLE, CONTENT, STOP]),
    ("an empty answer", [chunk({"content": ""}), chunk({}, "stop")], [ROLE, STOP]),
    ("no index", [{"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}], [ROLE, CONTENT, STOP]),
    ("parts", [chunk({"content": [{"type": "text", "text": "x"}]}, "stop")], [ROLE, CONTENT, STOP]),
    (
        "a message",
        [{"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}],
        [ROLE, CONTENT, STOP],
    ),
    ("a text", [{"choices": [{"index": 0, "text": "x", "finish_reason": "stop"}]}], [ROLE, CONTENT, STOP]),
    ("another word", [chunk({"content": "x"}, "eos")], [ROLE, CONTENT, STOP]),
    ("empty words", [chunk({"content": "x"}, ""), chunk({}, "max_tokens")], [ROLE, CONTENT, (0, {}, "length")]),
    (
        "reasoning",
        [chunk({"reasoning_content": "a", "content": None}), chunk({"content": "x"}, "stop")],
        [ROLE, (0, {"reasoning_content": "a"}, None), CONTENT, STOP],
    ),
    (
        "two choices",
        [chunk({"content": "x"}), chunk({"content": "y"}, index=1), chunk({}, "stop", index=1), chunk({}, "stop")],
        [ROLE, CONTENT, (1, ROLE[1], None), (1, {"content": "y"}, None), (1, {}, "stop"), STOP],
    ),
]


@pytest.mark.parametrize(("name", "sent", "expected"), ODD_STREAMS, ids=[name for name, _, _ in ODD_STREAMS])
def test_odd_streams(name, sent, expected):
    assert deltas(put_in_order(encode(*sent))) == expected
    assert deltas(put_in_order(encode(*sent), size=1)) == expected


def call(**fields):
    return chunk({"tool_calls": [fields]})


def fragment(index, arguments):
    return {"index": index, "function": {"arguments": arguments}}


def whole_call(index, call_id, name, arguments):
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOL_CALLS = [
    (
        "in order",
        [
            call(index=0, id="a", type="function", function={"name": "f", "arguments": ""}),
            call(index=0, function={"arguments": "{"}),
            call(index=0, function={"arguments": "}"}),
            call(index=1, id="b", type="function", function={"name": "g", "arguments": ""}),
        ],
        [whole_call(0, "a", "f", ""), fragment(0, "{"), fragment(0, "}"), whole_call(1, "b", "g", "")],
    ),
    (
        "not numbered",
        [
            call(id="a", function={"name": "f", "arguments": "{}"}),
            call(id="b", function={"name": "g", "arguments": "{}"}),
        ],
        [whole_call(0, "a", "f", "{}"), whole_call(1, "b", "g", "{}")],
    ),
    (
        "all numbered 0",
        [call(index=0, id="a", function={"name": "f"}), call(index=0, id="b", function={"name": "g"})],
        [whole_call(0, "a", "f", ""), whole_call(1, "b", "g", "")],
    ),
    (
        "no ids, arguments as an object",
        [call(index=0, function={"name": "f", "arguments": {"x": 1}}), call(index=1, function={"name": "f"})],
        [whole_call(0, "call_ours00", "f", '{"x":1}'), whole_call(1, "call_ours01", "f", "")],
    ),
    (
        "fragments without anything",
        [call(id="a", function={"name": "f"}), call(function={"arguments": "{}"})],
        [whole_call(0, "a", "f", ""), fragment(0, "{}")],
    ),
    (
        "the id on every fragment",
        [call(index=0, id="a", function={"name": "f"}), call(index=0, id="a", function={"arguments": "{}"})],
        [whole_call(0, "a", "f", ""), fragment(0, "{}")],
    ),
]


@pytest.mark.parametrize(("name", "sent", "expected"), TOOL_CALLS, ids=[name for name, _, _ in TOOL_CALLS])
def test_tool_calls(name, sent, expected):
    data = encode(*sent, chunk({}, "stop"))
    *calls, end = deltas(put_in_order(data))[1:]
    assert [piece for _, delta, _ in calls for piece in delta["tool_calls"]] == expected
    assert end == (0, {}, "tool_calls"), "whatever word the peer had for it"
    message = assemble(data)["choices"][0]["message"]
    assert message["content"] is None
    assert [c["function"]["name"] for c in message["tool_calls"]] == [
        p["function"]["name"] for p in expected if "id" in p
    ]
    for position, assembled in enumerate(message["tool_calls"]):
        pieces = [p["function"]["arguments"] for p in expected if p["index"] == position]
        assert assembled["function"]["arguments"] == "".join(pieces) and "index" not in assembled


@pytest.mark.parametrize("where", ["with the end", "on every chunk", "apart"])
def test_usage_only_when_asked(where):
    sent = [chunk({"content": "x"}), chunk({}, "stop")]
    if where == "apart":
        sent.append({"id": "x", "choices": [], "usage": USAGE})
    else:
        sent = [value | {"usage": USAGE} for value in sent[where == "with the end" :]]
        sent = sent if where == "on every chunk" else [chunk({"content": "x"}), *sent]
    plain = put_in_order(encode(*sent))
    assert all("usage" not in event for event in plain[:-1]) and all(event["choices"] for event in plain[:-1])
    *chunks, usage, done = put_in_order(encode(*sent), include_usage=True)
    assert all(event["usage"] is None for event in chunks) and done == "data: [DONE]"
    assert usage["choices"] == [] and usage["usage"] == USAGE and usage["id"] == HEAD.id
    assert assemble(encode(*sent))["usage"] == USAGE


@pytest.mark.parametrize(
    "usage", [None, {}, 5, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": "3"}, {"prompt_tokens": -1}]
)
def test_usage_that_is_none(usage):
    sent = encode(chunk({"content": "x"}, "stop"), {"choices": [], "usage": usage})
    assert deltas(put_in_order(sent, include_usage=True)) == [ROLE, CONTENT, STOP]
    assert "usage" not in assemble(sent)


def test_id_created_and_model_stay_the_same():
    sent = [chunk({"content": "x"}) | {"id": str(n), "created": n, "model": f"m{n}"} for n in range(20)]
    events = put_in_order(encode(*sent, chunk({}, "stop")))
    assert {(e["id"], e["created"], e["model"]) for e in events[:-1]} == {("chatcmpl-ours", 1_700_000_000, "m0")}


def test_legacy_completions():
    sent = [
        {"choices": [{"index": 0, "text": text, "finish_reason": None, "logprobs": None}]}
        for text in ("Hel", "lo", " you")
    ]
    sent.append({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    events = put_in_order(encode(*sent), form=ForwardForm.TEXT)
    assert [c["text"] for e in events[:-1] for c in e["choices"]] == ["Hel", "lo", " you", ""]
    assert events[0]["object"] == "text_completion" and events[-2]["choices"][0]["finish_reason"] == "length"
    answer = assemble(encode(*sent), form=ForwardForm.TEXT)
    assert answer["choices"] == [{"index": 0, "text": "Hello you", "finish_reason": "length", "logprobs": None}]


def test_an_assembled_chat():
    token = {"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}
    sent = [
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "a"}),
        *[chunk({"content": f'é"\\{n}\n'}) for n in range(5)],
        {"choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": [token]}, "finish_reason": None}]},
        chunk({}, "stop"),
        {"choices": [], "usage": USAGE, "timings": {"predicted_per_second": 9.0}},
    ]
    answer = assemble(encode(*sent))
    content = "a" + "".join(f'é"\\{n}\n' for n in range(5)) + "x"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": content, "refusal": None, "reasoning_content": "hm"},
            "finish_reason": "stop",
            "logprobs": {"refusal": None, "content": [token]},
        }
    ]
    assert (answer["object"], answer["usage"], answer["timings"]) == (
        "chat.completion",
        USAGE,
        {"predicted_per_second": 9.0},
    )


TORN = [
    encode(*HELLO[:-1]),
    encode(),
    encode({"choices": []}),
    encode(chunk({"content": "x"}, "stop"), chunk({"content": "y"}, index=1)),
]
BROKEN = [
    b"data: {\n\n",
    b"data: 5\n\n",
    b'data: {"choices":[5]}\n\n',
    b'data: {"choices":[{"index":-1,"delta":{}}]}\n\n',
    b'data: {"choices":[{"index":128,"delta":{}}]}\n\n',
    b'data: {"choices":[{"index":"a","delta":{}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":5}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":5}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[5]}}]}\n\n',
    b'data: {"choices":[{"index":0,"delta":{"content":"x","content":"y"}}]}\n\n',
    b"data: " + b"[" * 100_000 + b"\n\n",
    b'data: {"error":{"message":"out of memory"}}\n\n',
    b'data: {"error":"out of memory"}\n\n',
]


@pytest.mark.parametrize("data", TORN + BROKEN, ids=lambda data: repr(data)[:60])
def test_what_no_client_should_take_for_an_answer(data):
    for size in (None, 1 if len(data) < 1000 else 1000):
        for prefix in (b"", encode(*HELLO[:-1], done=False)):
            with pytest.raises(UpstreamError):
                put_in_order(prefix + data, size=size)
    with pytest.raises(UpstreamError):
        assemble(data)


def test_an_endless_event_is_refused(monkeypatch):
    stream = PeerStream(ChunkNormalizer(ForwardForm.CHAT, HEAD, include_usage=False), None)
    with pytest.raises(UpstreamError):
        for _ in range(5):
            stream.feed(b"data: " + b"x" * (1 << 20))
    monkeypatch.setattr(dvai_bridge, "FORWARD_ANSWER_LIMIT_BYTES", 10_000)
    with pytest.raises(UpstreamError):
        assemble(encode(*[chunk({"content": "x" * 100})] * 200))


# Copying texts without parsing their chunks: nobody may see a difference

WRITERS = {
    "ours": lambda value: dvai_bridge.encode_json(value),
    "with spaces": lambda value: json.dumps(value).encode(),
    "escaped": lambda value: json.dumps(value, separators=(",", ":")).encode(),
}
TEXTS = [
    "a", " b", "é", "日本", "😀", '"', "\\", "\n", "\t", "\x7f", "\x00", "\u2028", '"content":"q"', "}", "data: x",
    "a" * 5000, "", "[DONE]", "\\u0041", "\\n", '\\"', "</s>",
]  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("form", [ForwardForm.CHAT, ForwardForm.TEXT])
@pytest.mark.parametrize("extra", [{}, {"usage": None}, {"x": '"content":"', "y": {"content": "z", "text": "z"}}])
def test_the_quick_way_gives_what_the_slow_one_gives(writer, form, extra, monkeypatch):
    def build(text):
        content = {"delta": {"content": text}} if form is ForwardForm.CHAT else {"text": text}
        return {"id": "x", "model": "m", "choices": [{"index": 0, **content, "finish_reason": None}], **extra}

    texts = [text for text in TEXTS for _ in range(2)] * 3
    lines = [WRITERS[writer](build(text)) for text in texts]
    lines.append(WRITERS[writer]({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]}))
    data = b"".join(b"data: " + line + b"\n\n" for line in [*lines, b"[DONE]"])
    quick, whole = put_in_order(data, form), assemble(data, form)
    assert quick == put_in_order(data, form, size=7)
    learned = []
    with monkeypatch.context() as patch:
        patch.setattr(dvai_bridge, "learn_template", lambda *arguments: learned.append(arguments))
        assert quick == put_in_order(data, form) and whole == assemble(data, form)
    choice = whole["choices"][0]
    assert (choice["message"]["content"] if form is ForwardForm.CHAT else choice["text"]) == "".join(texts)
    assert learned


def test_the_quick_way_is_taken(monkeypatch):
    parsed = []
    parse_json = dvai_bridge.parse_json
    monkeypatch.setattr(dvai_bridge, "parse_json", lambda data: parsed.append(data) or parse_json(data))
    data = encode(*[chunk({"content": f"t{n}"}) for n in range(1000)], chunk({}, "stop"))
    assert len(put_in_order(data)) == 1003
    assert len(parsed) < 20


def test_the_quick_way_ends_with_its_choice():
    sent = [chunk({"content": "x"})] * 4 + [chunk({}, "stop")] + [chunk({"content": "x"})] * 4
    assert deltas(put_in_order(encode(*sent))) == [ROLE, *[CONTENT] * 4, STOP]


def test_the_quick_way_takes_nothing_else_for_the_end_of_a_choice():
    sent = [{"finish_reason": None, "choices": [{"index": 0, "delta": {"content": "x"}}]}] * 3
    with pytest.raises(UpstreamError):
        put_in_order(encode(*sent, {"finish_reason": "stop", "choices": [{"index": 0, "delta": {}}]}))
    for word, shown in (("stop", "stop"), ("length", "length"), ("max_tokens", "length")):
        events = put_in_order(encode(*[chunk({"content": "x"})] * 3, chunk({}, word)))
        assert events[-2]["choices"][0]["finish_reason"] == shown


@pytest.mark.parametrize("text", [b"\xff", b"\xc3", b'a"b', b"\\x", b"\\ud800", b"\x01", b"a\\"])
def test_the_quick_way_copies_nothing_that_is_no_json(text):
    ok = encode(*[chunk({"content": "x"})] * 3, done=False)
    bad = encode(chunk({"content": "@"}), done=False).replace(b"@", text)
    with pytest.raises(UpstreamError):
        put_in_order(ok + bad + encode(chunk({}, "stop")))


def read_outcome(data, sizes, habit=None):
    """What a client gets of a stream that comes in these segments, and whether it ends well."""
    stream, out, start = PeerStream(ChunkNormalizer(ForwardForm.CHAT, HEAD, include_usage=True), None, habit), b"", 0
    try:
        for size in [*sizes, len(data)]:
            out += stream.feed(data[start : start + size])
            start += size
    except UpstreamError:
        return None, "broken"
    return decode(out), stream.is_done


def test_damaged_streams_come_out_the_same_whichever_way_they_are_read(monkeypatch):
    rng, ends = random.Random(5), Counter()
    values = [*HELLO[:3], *[chunk({"content": text}) for text in TEXTS[:12]], HELLO[3], {"choices": [], "usage": USAGE}]
    seeds = [encode(*values), encode(*values).replace(b"\n", b"\r\n"), encode(*HELLO, chunk({"role": "assistant"}))]
    pieces = [
        b'"',
        b"\\",
        b"{}",
        b"\n",
        b"\n\n",
        b"data: ",
        b": ping\n",
        b'"role"',
        b'"content":"x"',
        b"[DONE]",
        b"\xff",
        b"null",
    ]
    habit = PeerHabit()
    read_outcome(seeds[0], [], habit)
    assert habit.shape is not None
    for data in mutate(rng, seeds, pieces, 4000):
        sizes = [rng.randrange(1, 400) for _ in range(rng.randrange(40))]
        quick = read_outcome(data, sizes, habit)
        with monkeypatch.context() as patch:
            patch.setattr(dvai_bridge, "learn_template", lambda *arguments: None)
            assert read_outcome(data, sizes) == quick, data
        whole = read_outcome(data, [])
        assert whole == quick, data
        ends[quick[1]] += 1
    assert min(ends[True], ends["broken"]) > 500, ends


# A peer's next answer begins as its last one did


def build_answer_of(answer_id, at, **more):
    """An answer as our own bridges stream it."""
    around = {"id": answer_id, "created": at} | more
    deltas = [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    values = [*(chunk(delta, **around) for delta in deltas), chunk({}, "stop", **around)]
    return encode(*values, around | {"choices": [], "usage": USAGE})


@pytest.mark.parametrize("with_assembler", [False, True])
def test_the_next_answer_is_known_by_its_first_event(monkeypatch, with_assembler):
    habit, parsed = PeerHabit(), []
    parse_json = dvai_bridge.parse_json
    monkeypatch.setattr(dvai_bridge, "parse_json", lambda data: parsed.append(data) or parse_json(data))
    whole = []
    for number, answer_id in enumerate(("chatcmpl-a", "chatcmpl-0123456789")):
        parsed.clear()
        normalizer = ChunkNormalizer(ForwardForm.CHAT, HEAD, include_usage=True)
        assembler = AnswerAssembler(ForwardForm.CHAT) if with_assembler else None
        stream = PeerStream(normalizer, assembler, habit)
        out = stream.feed(build_answer_of(answer_id, 1_700_000_000 + number))
        assert stream.is_done and normalizer.head.model == "served"
        whole.append(assembler.build(normalizer.head, normalizer.usage, None) if assembler else out)
        assert len(parsed) == (1 if number else 2), "the usage is parsed, and what begins the first answer"
    assert whole[0] == whole[1]


@pytest.mark.parametrize(
    "more",
    [
        {"model": "another"},
        {"system_fingerprint": "fp"},
        {"usage": {"prompt_tokens": 3, "completion_tokens": 1}},
        {"timings": {"prompt_per_second": 3.0}},
        {"id": 'a"b'},
        {"id": None},
        {"id": "created"},
        {"created": -1},
        {"created": "1"},
        {"created": 1.5},
        {"x": {"id": "chatcmpl-a"}},
        {"error": {"message": "no"}},
    ],
    ids=json.dumps,
)
def test_an_answer_that_begins_otherwise_is_read_as_it_stands(more):
    usual, other = build_answer_of("chatcmpl-a", 1), build_answer_of("chatcmpl-b", 2, **more)
    for before, after in itertools.product((usual, other), repeat=2):
        habit = PeerHabit()
        assert read_outcome(before, [], habit) == read_outcome(before, [])
        assert read_outcome(after, [], habit) == read_outcome(after, [])
        assert read_outcome(usual, [100], habit) == read_outcome(usual, [])


def test_habits_are_kept_of_few_peers():
    habits = PeerHabits()
    first = habits.find("peer 0")
    assert habits.find("peer 0") is first
    for number in range(dvai_bridge.PEER_HABITS_LIMIT + 1):
        habits.find(f"peer {number}")
    assert habits.find("peer 0") is not first
    assert len(habits._habits) == dvai_bridge.PEER_HABITS_LIMIT


# -- asking real peers --


class Peers:
    """Loopback peers that play scripts, a Forwarder, and what it reported."""

    def __init__(self, *scripts, budgets=None):
        self.servers = [Server(script) for script in scripts]
        self.budgets = budgets or ForwardBudgets()
        self.attempts, self.reports = [], []

    async def __aenter__(self):
        self.client = HttpClient()
        for server in self.servers:
            await server.__aenter__()
            server.committed = asyncio.Event()
        self.forwarder = Forwarder(on_attempt=self.note, on_end=self.reports.append, budgets=self.budgets)
        self.targets = [
            ForwardTarget(
                device_id=f"peer-{n}",
                device_name=f"Peer {n}",
                base_url=server.url + "/v1",
                model_id=f"m{n}",
                send=self.client.request,
            )
            for n, server in enumerate(self.servers)
        ]
        return self

    async def __aexit__(self, *exc_info):
        await self.client.close()
        for server in self.servers:
            await server.__aexit__()

    def note(self, attempt):
        self.attempts.append(attempt)
        if attempt.outcome is AttemptOutcome.COMMITTED:
            self.servers[self.targets.index(attempt.target) if attempt.target in self.targets else 0].committed.set()

    async def ask(self, body=CHAT, form=ForwardForm.CHAT, targets=None):
        request = ForwardRequest(form=form, body=body, request_id="req_1")
        return await self.forwarder.forward(request, self.targets if targets is None else targets)

    @property
    def outcomes(self):
        return [attempt.outcome for attempt in self.attempts]


def run(work, *scripts, budgets=None):
    async def main():
        async with asyncio.timeout(PATIENCE_S), Peers(*scripts, budgets=budgets) as peers:
            result = await work(peers)
            assert len(peers.reports) <= 1
            return result

    return asyncio.run(main())


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def as_chunks(*pieces, end=True):
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + (b"0\r\n\r\n" if end else b"")


def reply(data, status=b"200 OK", content_type=b"application/json", more=b""):
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n%b" % (
        status, content_type, len(data), more, data
    )  # fmt: skip


GOOD = STREAM_HEAD + as_chunks(encode(*HELLO, {"choices": [], "usage": USAGE}))
NO_FIN = STREAM_HEAD + as_chunks(encode(*HELLO), end=False)


def answer(data, hang=False):
    """A peer that answers every request with these bytes, then closes or says nothing more."""

    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(data)
        await writer.drain()
        if hang:
            await server.wait_left(reader)

    return script


good = answer(GOOD)


async def leave(server, reader, writer):
    """Accepts, and is gone."""


async def read_all(forwarded):
    """(events, error) of a streamed answer."""
    body, pieces, error = forwarded.answer.body, [], None
    try:
        async for piece in body:
            assert piece
            pieces.append(piece)
    except PeerError as exc:
        error = exc
    finally:
        await body.aclose()
    return decode(b"".join(pieces)), error


STREAMED = CHAT | {"stream": True}
SHORT = ForwardBudgets(connect_s=5, first_content_s=0.1, first_content_limit_s=0.1, silence_s=0.1)
ROLE_ONLY = STREAM_HEAD + as_chunks(encode(HELLO[0], done=False), end=False)
SERVER_ERROR, BROKEN_ANSWER, TIMEOUT = AttemptOutcome.SERVER_ERROR, AttemptOutcome.BROKEN, AttemptOutcome.TIMEOUT


async def ping_forever(server, reader, writer):
    await server.read_request(reader)
    writer.write(STREAM_HEAD)
    while not reader.at_eof():
        writer.write(as_chunks(PING, end=False))
        await writer.drain()
        await asyncio.sleep(0.01)
    server.left.set()


FAILURES = [
    ("leaves", leave, BROKEN_ANSWER, None),
    ("garbage", answer(b"\x00\x01\x02 220 mail\r\n\r\n"), BROKEN_ANSWER, None),
    ("no events", answer(reply(b"<html>", content_type=b"text/html")), BROKEN_ANSWER, None),
    (
        "a redirection",
        answer(b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n"),
        BROKEN_ANSWER,
        None,
    ),
    ("torn before content", answer(ROLE_ONLY), BROKEN_ANSWER, None),
    ("ended before content", answer(ROLE_ONLY + b"0\r\n\r\n"), BROKEN_ANSWER, None),
    ("done without content", answer(STREAM_HEAD + as_chunks(encode())), BROKEN_ANSWER, None),
    ("no JSON", answer(STREAM_HEAD + as_chunks(b"data: {\n\n")), BROKEN_ANSWER, None),
    ("broken chunks", answer(STREAM_HEAD + b"xyz\r\n"), BROKEN_ANSWER, None),
    ("a false length", answer(reply(encode(HELLO[0]), content_type=b"text/event-stream")[:-9]), BROKEN_ANSWER, None),
    ("an error event", answer(STREAM_HEAD + as_chunks(encode({"error": {"message": "x"}}))), SERVER_ERROR, None),
    ("404", answer(reply(b"{}", b"404 Not Found")), AttemptOutcome.NO_MODEL, None),
    ("401", answer(reply(b"{}", b"401 Unauthorized")), AttemptOutcome.UNAUTHORIZED, None),
    ("408", answer(reply(b"{}", b"408 Request Timeout")), TIMEOUT, None),
    ("429", answer(reply(b"{}", b"429 Too Many Requests", more=b"Retry-After: 7\r\n")), AttemptOutcome.BUSY, None),
    ("500", answer(reply(b"{}", b"500 Internal Server Error")), SERVER_ERROR, None),
    ("503", answer(reply(b"{}", b"503 Unavailable", more=b"Retry-After: soon\r\n")), SERVER_ERROR, None),
    ("hangs without a byte", answer(b"", hang=True), TIMEOUT, SHORT),
    ("hangs after its head", answer(STREAM_HEAD, hang=True), TIMEOUT, SHORT),
    ("hangs after its role", answer(ROLE_ONLY, hang=True), TIMEOUT, SHORT),
    ("pings forever", ping_forever, TIMEOUT, SHORT),
]


@pytest.mark.parametrize(("name", "script", "outcome", "budgets"), FAILURES, ids=[name for name, *_ in FAILURES])
@pytest.mark.parametrize("stream", [False, True])
def test_a_peer_that_fails_before_content_is_followed_by_the_next(name, script, outcome, budgets, stream):
    async def work(peers):
        budgets_of_the_second = ForwardBudgets()
        forwarded = await peers.ask(CHAT | {"stream": stream}, targets=peers.targets[:1])
        assert forwarded.answer is None and not peers.reports
        assert [attempt.outcome for attempt in forwarded.attempts] == peers.outcomes == [outcome]
        reason = forwarded.attempts[0].reason
        assert reason and reason.isascii()
        assert forwarded.attempts[0].retry_after_s == (7 if name == "429" else 0)
        peers.forwarder._budgets = budgets_of_the_second
        forwarded = await peers.ask(CHAT | {"stream": stream}, targets=peers.targets[1:])
        assert dict(forwarded.answer.headers)["X-DVAI-Served-By"] == "peer-1"

    run(work, script, good, budgets=budgets)


def test_every_peer_is_asked_in_turn():
    async def work(peers):
        forwarded = await peers.ask()
        assert peers.outcomes == [SERVER_ERROR, BROKEN_ANSWER, AttemptOutcome.COMMITTED]
        assert tuple(peers.attempts) == forwarded.attempts
        answer = json.loads(forwarded.answer.body)
        assert answer["choices"][0]["message"]["content"] == "Hello" and answer["usage"] == USAGE
        assert [json.loads(server.requests[0][1])["model"] for server in peers.servers[::2]] == ["m0", "m2"]
        assert not peers.servers[3].requests
        report = peers.reports[0]
        assert (report.outcome, report.target.device_id) == (ForwardOutcome.COMPLETED, "peer-2")
        assert (report.prompt_tokens, report.completion_tokens) == (3, 2)
        assert 0 < report.first_content_s <= report.duration_s and report.prefill_tok_per_s > 0

    run(work, answer(reply(b"{}", b"500 Oops")), leave, good, good)


def test_nobody_listens():
    async def work(peers):
        peers.servers[0].server.close()
        await peers.servers[0].server.wait_closed()
        forwarded = await peers.ask()
        assert forwarded.answer is None and peers.outcomes == [AttemptOutcome.UNREACHABLE]

    run(work, leave)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [b"400 Bad Request", b"413 Too Large", b"422 Unprocessable", b"403 Forbidden"])
def test_other_refusals_are_the_clients_answer(status, stream):
    error = {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded", "n_ctx": 8}

    async def work(peers):
        forwarded = await peers.ask(CHAT | {"stream": stream})
        assert forwarded.answer.status == int(status[:3])
        assert json.loads(forwarded.answer.body) == {"error": {"param": None, **error}}
        headers = dict(forwarded.answer.headers)
        assert headers["x-should-retry"] == "false" and "Set-Cookie" not in headers and "X-Evil" not in headers
        assert peers.outcomes == [AttemptOutcome.REFUSED] and not peers.servers[1].requests
        assert peers.reports[0].outcome is ForwardOutcome.REFUSED

    body = json.dumps({"error": error}).encode()
    run(work, answer(reply(body, status, more=b"Set-Cookie: a=b\r\nX-Evil: 1\r\n")), good)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"null", b'{"error":"x"}', b'{"error":{"message":5}}', b'{"message":"x"}']
)
def test_a_refusal_in_any_form_is_an_error_object(data):
    async def work(peers):
        forwarded = await peers.ask()
        error = json.loads(forwarded.answer.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)

    run(work, answer(reply(data, b"400 Bad Request")))


BEGUN = STREAM_HEAD + as_chunks(encode(*HELLO[:2], done=False), end=False)
TORN_STREAMS = [
    ("torn", BEGUN, b"", None),
    ("ended", BEGUN, b"0\r\n\r\n", None),
    ("done without an end", BEGUN, as_chunks(b"data: [DONE]\n\n"), None),
    ("an end without done", BEGUN, as_chunks(encode(HELLO[-1], done=False)), None),
    (
        "no chunks",
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + encode(*HELLO[:2], done=False),
        b"",
        None,
    ),
    ("garbage", BEGUN, as_chunks(b"data: nonsense\n\n"), None),
    ("broken chunks", BEGUN, b"what?\r\n", None),
    ("an error event", BEGUN, as_chunks(encode({"error": {"message": "x"}})), None),
    ("silence", BEGUN, None, ForwardBudgets(silence_s=0.1)),
]


def in_two(first, rest, budgets=None):
    """A peer that sends `first`, and `rest` when the bridge has taken its content; None: it hangs."""

    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(first)
        await server.committed.wait()
        if rest is None:
            await server.wait_left(reader)
        else:
            writer.write(rest)
            await writer.drain()

    return script


@pytest.mark.parametrize(("name", "first", "rest", "budgets"), TORN_STREAMS, ids=[name for name, *_ in TORN_STREAMS])
def test_a_peer_that_fails_after_content_is_an_error_not_a_short_answer(name, first, rest, budgets):
    def verify(peers):
        assert peers.outcomes == [AttemptOutcome.COMMITTED] and not peers.servers[1].requests
        assert [report.outcome for report in peers.reports] == [ForwardOutcome.PEER_FAILED]

    async def streamed(peers):
        events, error = await read_all(await peers.ask(STREAMED))
        assert error.code == "peer_failed" and error.status == 502
        assert events[-1]["error"]["code"] == "peer_failed" and "data: [DONE]" not in events
        assert deltas(events)[:2] == [ROLE, (0, {"content": "Hel"}, None)]
        verify(peers)

    async def whole(peers):
        with pytest.raises(PeerError):
            await peers.ask()
        verify(peers)

    run(streamed, in_two(first, rest), good, budgets=budgets)
    run(whole, in_two(first, rest), good, budgets=budgets)


def test_what_travels_and_what_does_not():
    key = dvai_bridge.generate_pairing_key()

    async def work(peers):
        def send(method, url, *, headers, body, **options):
            signed = dvai_bridge.build_signed_headers(
                pairing_key=key, device_id="us", app_id=None, nonce="n", method=method, path=url.target, body=body
            )
            return peers.client.request(method, url, headers=[*headers, *signed], body=body, **options)

        target = dvai_bridge.replace(
            peers.targets[0], send=send, reason="the best one", substituted_for="名", device_id="id é"
        )
        body = CHAT | {"temperature": 1.0, "logit_bias": {"9": 1, "10": 2}, "stream": False}
        forwarded = await peers.ask(body, targets=[target])
        head, sent = peers.servers[0].requests[0]
        lines = head.decode().split("\r\n")
        assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
        fields = dict(line.split(": ", 1) for line in lines[1:-2])
        signature = fields.pop("X-DVAI-Signature")
        dvai_bridge.verify_hmac(
            key, dvai_bridge.compose_signed_message("n", "POST", "/v1/chat/completions", sent), signature
        )
        assert sorted(fields) == [
            "Accept", "Accept-Encoding", "Content-Length", "Content-Type", "Host", "X-DVAI-App-Id", "X-DVAI-Forwarded",
            "X-DVAI-Nonce", "X-DVAI-Peer-Device-Id", "X-Request-Id",
        ]  # fmt: skip
        assert (fields["X-DVAI-Forwarded"], fields["X-Request-Id"]) == ("1", "req_1")
        assert sent == (
            b'{"model":"m0","messages":[{"role":"user","content":"hi"}],"temperature":1,"logit_bias":{"9":1,"10":2},'
            b'"stream":true,"stream_options":{"include_usage":true}}'
        )
        assert forwarded.answer.headers == (
            ("Content-Type", "application/json"),
            ("X-DVAI-Served-By", "id \\xe9"),
            ("X-DVAI-Route", "lan"),
            ("X-DVAI-Reason", "the best one"),
            ("X-DVAI-Substituted-For", "\\u540d"),
        )

    run(work, answer(GOOD.replace(b"Transfer", b"Set-Cookie: a=b\r\nX-DVAI-Evil: 1\r\nTransfer")))


def test_bodies_and_budgets():
    body = {"model": "a", "stream": True, "stream_options": {"include_usage": False, "x": 1}, "input": "t"}
    request = ForwardRequest(form=ForwardForm.TEXT, body=body, request_id="r")
    assert build_forward_body(request, "b") == body | {"model": "b", "stream_options": {"include_usage": True, "x": 1}}
    assert request.is_stream and not request.include_usage
    request = ForwardRequest(
        form=ForwardForm.EMBEDDINGS, body={"model": "a", "input": "t", "stream": True}, request_id="r"
    )
    assert build_forward_body(request, "b") == {"model": "b", "input": "t", "stream": True} and not request.is_stream
    budgets = ForwardBudgets()
    assert build_first_content_budget(budgets, 300, 100.0) == 31
    assert build_first_content_budget(budgets, 300, None) == 34
    assert build_first_content_budget(budgets, 10**9, 100.0) == 600


def test_streams_are_not_held_back_and_connections_used_again():
    async def script(server, reader, writer):
        for _ in range(2):
            await server.read_request(reader)
            writer.write(STREAM_HEAD)
            for value in HELLO:
                writer.write(as_chunks(encode(value, done=False), end=False))
                await asyncio.wait_for(server.step.acquire(), PATIENCE_S)
            writer.write(as_chunks(b"data: [DONE]\n\n"))

    async def work(peers):
        server = peers.servers[0]
        for _ in range(2):
            server.step = asyncio.Semaphore(1)  # past the role, which is no content
            body = (await peers.ask(STREAMED)).answer.body
            assert deltas([*decode(await anext(body)), ""]) == [ROLE, (0, {"content": "Hel"}, None)]
            for expected in ([(0, {"content": "lo"}, None)], [STOP]):
                server.step.release()
                assert deltas([*decode(await anext(body)), ""]) == expected
            server.step.release()
            assert [piece async for piece in body] == [b"data: [DONE]\n\n"]
            await body.aclose()
            while not peers.client._idle:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert peers.reports.pop().outcome is ForwardOutcome.COMPLETED
        return server.connections

    assert run(work, script) == 1


@pytest.mark.parametrize("when", ["before content", "while streaming", "never read", "while assembling"])
def test_a_client_that_leaves_ends_the_peers_work(when):
    first = ROLE_ONLY if when == "before content" else BEGUN

    async def work(peers):
        server = peers.servers[0]
        if when in ("while streaming", "never read"):
            body = (await peers.ask(STREAMED)).answer.body
            if when == "while streaming":
                await anext(body)
            await body.aclose()
        else:
            task = asyncio.create_task(peers.ask(STREAMED if when == "before content" else CHAT))
            while not (server.requests if when == "before content" else peers.attempts):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await server.left.wait()
        assert [report.outcome for report in peers.reports] == [ForwardOutcome.CLIENT_LEFT]
        assert not peers.client._idle

    run(work, answer(first, hang=True))


def test_a_long_prefill_shows_signs_of_life(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "PING_INTERVAL_S", 0.0)

    async def script(server, reader, writer):
        await server.read_request(reader)
        writer.write(STREAM_HEAD + as_chunks(PING, end=False))
        await asyncio.wait_for(server.committed.wait(), PATIENCE_S)
        writer.write(as_chunks(PING + encode(*HELLO)))

    async def streamed(peers):
        events, error = await read_all(await peers.ask(STREAMED))
        assert error is None and events[0].startswith(": ping") and events[-1] == "data: [DONE]"

    async def torn(peers):
        events, error = await read_all(await peers.ask(STREAMED))
        assert events[0].startswith(": ping") and '"peer_failed"' in str(events[-1]).replace("'", '"')
        assert error.code == "peer_failed" and not peers.servers[1].requests

    async def whole(peers):
        assert json.loads((await peers.ask()).answer.body)["choices"][0]["message"]["content"] == "Hello"

    run(streamed, script)
    run(torn, in_two(STREAM_HEAD + as_chunks(PING, end=False), b""), good)
    run(whole, answer(STREAM_HEAD + as_chunks(PING, end=False) + as_chunks(PING + encode(*HELLO))))


@pytest.mark.parametrize("stream", [False, True])
def test_a_peer_that_does_not_stream(stream):
    message = {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    value = {
        "id": "x",
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }

    async def work(peers):
        forwarded = await peers.ask(CHAT | {"stream": stream})
        if stream:
            events, error = await read_all(forwarded)
            assert error is None and events[-1] == "data: [DONE]"
            assert deltas(events)[-1] == (0, {}, "tool_calls") and deltas(events)[1][1]["content"] == "Hello"
        else:
            answer = json.loads(forwarded.answer.body)
            assert answer["choices"][0]["message"]["tool_calls"] == message["tool_calls"] and answer["usage"] == USAGE
        assert peers.reports[0].completion_tokens == 2

    run(work, answer(reply(json.dumps(value).encode())))


# Embeddings

VECTORS = [[1.0, -0.5], [0.25, 2.0]]
PACKED = [base64.b64encode(struct.pack("<2f", *vector)).decode() for vector in VECTORS]


@pytest.mark.parametrize("asked", ["float", "base64"])
@pytest.mark.parametrize("given", [VECTORS, PACKED])
def test_embeddings(asked, given):
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(given)]
    value = {"object": "list", "data": data, "model": "served", "usage": {"prompt_tokens": 4, "total_tokens": 4}}

    async def work(peers):
        body = {"model": "x", "input": ["a", "b"], "encoding_format": asked}
        forwarded = await peers.ask(body, form=ForwardForm.EMBEDDINGS)
        expected = VECTORS if asked == "float" else PACKED
        assert json.loads(forwarded.answer.body) == {
            "object": "list",
            "data": [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(expected)],
            "model": "served",
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        }
        head, sent = peers.servers[0].requests[0]
        assert head.startswith(b"POST /v1/embeddings ") and json.loads(sent) == body | {"model": "m0"}
        assert peers.reports[0].outcome is ForwardOutcome.COMPLETED

    run(work, answer(reply(json.dumps(value).encode())))


@pytest.mark.parametrize(
    "data", [[], [{"embedding": [1]}], [{"embedding": []}] * 2, [{"embedding": ["x"]}] * 2, [{"embedding": "x"}] * 2,
             [{"embedding": "AACAfw=="}] * 2, [{}] * 2, None, [5, 5], [{"embedding": [True]}] * 2],
)  # fmt: skip
def test_embeddings_that_are_none_are_asked_for_elsewhere(data):
    good = {"data": [{"embedding": vector} for vector in VECTORS]}

    async def work(peers):
        forwarded = await peers.ask({"input": ["a", "b"]}, form=ForwardForm.EMBEDDINGS)
        answer = json.loads(forwarded.answer.body)
        assert [item["embedding"] for item in answer["data"]] == VECTORS and answer["model"] == "m1"
        assert "usage" not in answer
        assert peers.outcomes == [BROKEN_ANSWER, AttemptOutcome.COMMITTED]

    run(work, answer(reply(json.dumps({"data": data}).encode())), answer(reply(json.dumps(good).encode())))


def test_nothing_secret_is_shown():
    target = ForwardTarget(device_id="a", device_name="b", base_url="http://x/v1", model_id="m", send=lambda *_: None)
    assert "send" not in repr(target)
