"""Sampling, the assembly of text, frames, and the rules of an engine's life, without a process."""

import asyncio
import itertools
import math
import random
from collections import Counter

import pytest

from dvai_bridge import (
    ENGINE_TRANSITIONS,
    MAX_FAILED_STARTS,
    MAX_FRAME_BYTES,
    RESTART_DELAY_LIMIT_S,
    BridgeError,
    ChatMessage,
    ContextLengthError,
    Embedded,
    EmbeddingRequest,
    EngineError,
    EngineState,
    Failed,
    Finished,
    FrameDecoder,
    GenerationRequest,
    JobInbox,
    LoadRequest,
    ModelInfo,
    OverloadedError,
    PrefillProgress,
    RestartPolicy,
    Sampler,
    SamplingParams,
    TextAssembler,
    TextDelta,
    TokenLogprob,
    Usage,
    build_death_text,
    choose_top,
    compute_log_total,
    compute_logprobs,
    decode_engine_event,
    decode_error,
    decode_job,
    decode_load_request,
    decode_model_info,
    encode_engine_event,
    encode_error,
    encode_frame,
    encode_job,
    encode_load_request,
    encode_model_info,
)

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def log(*probabilities):
    """Logits of a distribution, moved by a constant, which must not matter."""
    return [math.log(p) + 7.5 for p in probabilities]


def draw(logits, count=20_000, seed=1, **params):
    sampler = Sampler(SamplingParams(**NEUTRAL | params), seed)
    return Counter(sampler.sample(logits) for _ in range(count))


def verify_shares(counts, expected):
    """Each share within five standard deviations, and no token outside `expected`."""
    total = counts.total()
    assert set(counts) == set(expected)
    for token, share in expected.items():
        deviation = math.sqrt(share * (1 - share) / total)
        assert abs(counts[token] / total - share) <= 5 * deviation, (token, counts[token] / total, share)


FIVE = log(0.4, 0.3, 0.15, 0.1, 0.05)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {0: 0.4, 1: 0.3, 2: 0.15, 3: 0.1, 4: 0.05}),
        ({"top_k": 2}, {0: 4 / 7, 1: 3 / 7}),
        ({"top_k": 99}, {0: 0.4, 1: 0.3, 2: 0.15, 3: 0.1, 4: 0.05}),
        ({"top_p": 0.6}, {0: 4 / 7, 1: 3 / 7}),
        ({"top_p": 0.75}, {0: 8 / 17, 1: 6 / 17, 2: 3 / 17}),
        ({"top_p": 0.0}, {0: 1.0}),
        ({"min_p": 0.3}, {0: 8 / 17, 1: 6 / 17, 2: 3 / 17}),
        ({"min_p": 1.0}, {0: 1.0}),
        # top-p sees what top-k left: 0.4 and 0.3 are 0.57 and 0.43, so 0.56 needs one token and 0.6 two
        ({"top_k": 2, "top_p": 0.56}, {0: 1.0}),
        ({"top_k": 2, "top_p": 0.6}, {0: 4 / 7, 1: 3 / 7}),
        ({"top_p": 0.75, "min_p": 0.5}, {0: 4 / 7, 1: 3 / 7}),
        ({"top_p": 0.6, "min_p": 0.3}, {0: 4 / 7, 1: 3 / 7}),
        # the temperature comes last: it changes the shares, not what was cut off
        ({"temperature": 0.5, "top_p": 0.6}, {0: 16 / 25, 1: 9 / 25}),
        ({"temperature": 2.0, "min_p": 0.5}, {0: 2 / (2 + math.sqrt(3)), 1: math.sqrt(3) / (2 + math.sqrt(3))}),
        ({"logit_bias": {4: math.log(8), 0: -100}}, {1: 3 / 9.5, 2: 1.5 / 9.5, 3: 1 / 9.5, 4: 4 / 9.5}),
        ({"logit_bias": {3: 100}}, {3: 1.0}),
    ],
)
def test_the_stages_of_sampling(params, expected):
    verify_shares(draw(FIVE, **params), expected)


def test_greedy_takes_the_best_and_the_first_of_equals():
    assert draw(FIVE, temperature=0.0, count=5) == {0: 5}
    assert draw([1.0, 3.0, 3.0], temperature=0.0, count=5) == {1: 5}
    assert draw(FIVE, temperature=0.0, logit_bias={2: 1.0}, count=5) == {2: 5}
    assert draw(FIVE, temperature=1e-9, count=5) == {0: 5}


def sample_once(logits, prompt, **params):
    return Sampler(SamplingParams(temperature=0.0, **params), 0, prompt).sample(logits)


def test_penalties_as_llama_cpp_computes_them():
    logits = [2.0, 1.9, -1.0]
    assert sample_once(logits, [0], repeat_penalty=1.1) == 1  # 2.0 / 1.1 < 1.9
    assert sample_once(logits, [0], repeat_penalty=1.05) == 0
    assert sample_once([-1.0, -1.1], [0], repeat_penalty=1.2) == 1  # negative ones are multiplied
    assert sample_once(logits, [0, 0], presence_penalty=0.09) == 0  # once, however often
    assert sample_once(logits, [0, 0], presence_penalty=0.11) == 1
    assert sample_once(logits, [0, 0], frequency_penalty=0.06) == 1  # for every time
    assert sample_once(logits, [0], frequency_penalty=0.06) == 0
    assert sample_once(logits, [1], presence_penalty=-0.2) == 1


def test_penalties_look_back_64_tokens_of_prompt_and_answer():
    logits = [2.0, 1.9]
    assert sample_once(logits, [0] + [1] * 63, presence_penalty=0.2) == 0  # both in the window
    wide = [2.0, 1.9] + [-9.0] * 8
    assert sample_once(wide, [0] + [5] * 63, presence_penalty=0.2) == 1
    assert sample_once(wide, [0] + [5] * 64, presence_penalty=0.2) == 0
    sampler = Sampler(SamplingParams(temperature=0.0, presence_penalty=0.2), 0)
    assert [sampler.sample(wide) for _ in range(3)] == [0, 1, 0]


def test_the_given_logits_stay_as_they_are():
    logits = [2.0, 1.0, 0.0]
    Sampler(SamplingParams(logit_bias={0: -5.0}, repeat_penalty=2.0), 1, [0]).sample(logits)
    assert logits == [2.0, 1.0, 0.0]


def test_a_seed_repeats_a_sequence_and_another_does_not():
    def sequence(seed):
        sampler = Sampler(SamplingParams(**NEUTRAL), seed)
        return [sampler.sample([0.0] * 100) for _ in range(20)]

    assert sequence(5) == sequence(5) != sequence(6)
    assert sequence(2**64 - 1) == sequence(2**64 - 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_no_number_is_an_error(bad):
    with pytest.raises(EngineError):
        Sampler(SamplingParams(), 1).sample([bad, bad, bad])


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1000, 5003])
@pytest.mark.parametrize("count", [1, 2, 7, 40, 900, 9999])
def test_choose_top_is_a_stable_sort_cut_short(size, count):
    source = random.Random(size * 31 + count)
    for spread in (1, 3, 10**6):  # few different values: many are equal
        logits = [float(source.randrange(spread)) for _ in range(size)]
        assert choose_top(logits, count) == sorted(range(size), key=lambda i: (-logits[i], i))[:count]


def test_a_large_vocabulary_gives_what_the_plain_definition_gives():
    source = random.Random(3)
    logits = [source.gauss(0, 3) for _ in range(5000)]
    order = sorted(range(5000), key=lambda i: -logits[i])
    total = math.fsum(map(math.exp, logits))
    for top_p in (0.1, 0.5, 0.9, 0.999):
        masses = itertools.accumulate(math.exp(logits[i]) / total for i in order)
        kept = set(order[: 1 + next(n for n, mass in enumerate(masses) if mass >= top_p)])
        drawn = set(draw(logits, count=300, top_p=top_p))
        assert drawn <= kept
        candidates = Sampler(SamplingParams(**NEUTRAL | {"top_p": top_p}), 1)._choose_candidates(logits, max(logits))
        assert set(candidates) == kept


def test_log_probabilities_are_those_of_the_untouched_distribution():
    logprob, top = compute_logprobs(FIVE, 3, 2)
    assert logprob == pytest.approx(math.log(0.1))
    assert [token for token, _ in top] == [0, 1]
    assert [value for _, value in top] == pytest.approx([math.log(0.4), math.log(0.3)])
    assert compute_logprobs(FIVE, 0, 0)[1] == []
    assert compute_logprobs([0.0, -math.inf], 1, 0)[0] == -9999.0


@pytest.mark.parametrize("shift", [-2000.0, -500.0, 0.0, 500.0, 2000.0])
def test_log_total_far_from_zero(shift):
    assert compute_log_total([shift, shift + 1]) == pytest.approx(shift + math.log(1 + math.e))


def entry(number, data=b""):
    return TokenLogprob(token_id=number, text=str(number), data=data, logprob=-float(number))


def assemble(pieces, stop=(), logprobs=False):
    """(text, stopped, deltas) after the pieces; the pieces that come after a stop are left out, as an engine does."""
    assembler = TextAssembler(stop)
    deltas = []
    for number, piece in enumerate(pieces):
        deltas.append(assembler.push(piece, entry(number, piece) if logprobs else None))
        if assembler.stopped:
            break
    deltas.append(assembler.finish())
    return "".join(delta.text for delta in deltas), assembler.stopped, deltas


def all_splits(data):
    """Every way to cut `data` into pieces that are not empty."""
    for mask in range(1 << (len(data) - 1)):
        cuts = [0, *(i + 1 for i in range(len(data) - 1) if mask >> i & 1), len(data)]
        yield [data[a:b] for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("añ€😀b", (), "añ€😀b"),
        ("abSTOPcd", ("STOP",), "ab"),
        ("abSTOcd", ("STOP",), "abSTOcd"),
        ("abSTO", ("STOP",), "abSTO"),
        ("SSTOPx", ("STOP",), "S"),
        ("STOPx", ("STOP",), ""),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("abcd", ("abcd", "bc"), "a"),  # the one that is complete first
        ("abcd", ("bcd", "abcd"), ""),  # complete at once: the one that began first
        ("x😀y", ("😀",), "x"),
        ("x😁y", ("😀",), "x😁y"),  # they share three bytes
        ("é", ("\n",), "é"),
    ],
)
def test_every_split_gives_the_same_text(text, stop, expected):
    for pieces in all_splits(text.encode()):
        shown, stopped, deltas = assemble(pieces, stop)
        assert (shown, stopped) == (expected, expected != text), pieces
        assert "\ufffd" not in shown
        # Nothing of a stop sequence is ever shown, not even to be taken back: each delta continues what is right.
        for count in range(len(deltas)):
            assert expected.startswith("".join(delta.text for delta in deltas[:count])), pieces


def test_text_is_not_held_back_for_longer_than_needed():
    assembler = TextAssembler(["STOP"])
    texts = [assembler.push(piece).text for piece in (b"ab", b"cS", b"T", b"x", b"S")]
    assert texts == ["ab", "c", "", "STx", ""]
    assert assembler.finish().text == "S"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"a\xff", "a\ufffd"),
        (b"\x80\x80", "\ufffd\ufffd"),
        (b"\xe2\x82b", "\ufffdb"),
        (b"ab\xf0\x9f\x98", "ab"),  # cut by the end of the generation, not wrong
        (b"ab\xf0\x9f\x98STOP", "ab\ufffd"),  # not to be completed any more
    ],
)
def test_bytes_that_are_no_text(data, expected):
    for pieces in all_splits(data):
        assert assemble(pieces, ["STOP"])[0] == expected, pieces


def test_log_probabilities_come_with_their_text():
    pieces = [b"a", b"\xe2\x82", b"\xac", b"", b"xS", b"T", b"y", b"zST", b"OP", b"q"]
    _, stopped, deltas = assemble(pieces, ["STOP"], logprobs=True)
    assert stopped
    shown = [(delta.text, [logprob.token_id for logprob in delta.logprobs]) for delta in deltas]
    assert shown == [
        ("a", [0]),
        ("", []),
        ("€", [1, 2]),
        ("", [3]),
        ("x", []),
        ("", []),
        ("STy", [4, 5, 6]),
        ("z", []),
        ("", [7]),  # a part of it was shown; the token "OP" was not
        ("", []),
    ]
    offsets = [logprob.text_offset for delta in deltas for logprob in delta.logprobs]
    assert offsets == [0, 1, 1, 2, 2, 4, 5, 6]


def test_every_shown_token_has_its_log_probability_whatever_the_split():
    data = "a€STOb".encode()
    for pieces in all_splits(data):
        text, _, deltas = assemble(pieces, ["STOP"], logprobs=True)
        released = [logprob.data for delta in deltas for logprob in delta.logprobs]
        assert text == data.decode() and released == pieces
        shown_bytes = released_bytes = 0
        for delta in deltas:
            shown_bytes += len(delta.text.encode())
            released_bytes += sum(len(logprob.data) for logprob in delta.logprobs)
            assert released_bytes <= shown_bytes, pieces


LOAD = LoadRequest(model="/m/é.gguf", n_ctx=512, slots=3, chat_template="chatml")
GENERATIONS = [
    GenerationRequest(messages=(ChatMessage(role="user", content="hé\n😀\x00"),), tenant="t"),
    GenerationRequest(prompt=(1, 2, 3), max_tokens=0, stop=("a", "b"), top_logprobs=0),
    GenerationRequest(
        prompt="p",
        sampling=SamplingParams(temperature=0.1, seed=2**64 - 1, logit_bias={5: -100.0, 70000: 0.25}),
        top_logprobs=20,
    ),
]
EMBEDDINGS = [EmbeddingRequest(inputs=("a", (1, 2))), EmbeddingRequest(inputs=("é",), tenant="x")]
TOP = TokenLogprob(token_id=2, text="\\xe2", data=b"\xe2", logprob=-2.5)
EVENTS = [
    PrefillProgress(done=3, total=9, cached=1),
    TextDelta(text="é😀"),
    TextDelta(text="", logprobs=(TokenLogprob(token_id=1, text="é", data=b"\xc3\xa9", logprob=-0.1, top=(TOP, TOP)),)),
    Finished(finish_reason="stop", usage=Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=1, prompt_ms=1.5)),
    Embedded(vectors=((0.5, -0.25), (1.0, 0.0)), prompt_tokens=7),
    TextDelta(text="later", hold_s=0.25),
]
INFO = ModelInfo(
    model_id="m",
    architecture="llama",
    quantization="Q8_0",
    n_ctx=2048,
    n_vocab=32000,
    n_embd=288,
    size_bytes=10**10,
    slots=2,
    engine="builtin",
)


def travel(message, cut=None):
    """A message as it arrives on the other side of a pipe that cuts every `cut` bytes."""
    frame = encode_frame(message)
    decoder = FrameDecoder()
    pieces = [frame] if cut is None else [frame[i : i + cut] for i in range(0, len(frame), cut)]
    (arrived,) = [message for piece in pieces for message in decoder.feed(piece)]
    return arrived


@pytest.mark.parametrize("cut", [None, 1, 3])
def test_messages_travel_both_ways(cut):
    assert decode_load_request(travel(encode_load_request(LOAD), cut)) == LOAD
    for job in (*GENERATIONS, *EMBEDDINGS):
        message = travel(encode_job(7, job), cut)
        assert message["job"] == 7 and decode_job(message) == job
    for event in EVENTS:
        assert decode_engine_event(travel(encode_engine_event(event), cut)) == event
    assert decode_model_info(travel(encode_model_info(INFO), cut)) == INFO


def all_errors(base=BridgeError):
    return [base, *(error for sub in base.__subclasses__() for error in all_errors(sub))]


@pytest.mark.parametrize("error_class", all_errors())
def test_an_error_stays_of_its_class(error_class):
    sent = error_class("what", param="p", retry_after_s=3, extra={"n_ctx": 5})
    arrived = decode_error(travel(encode_error(sent)))
    assert type(arrived) is error_class
    assert (arrived.message, arrived.param, arrived.retry_after_s, arrived.extra) == ("what", "p", 3, {"n_ctx": 5})
    (failed,) = [decode_engine_event(travel(encode_engine_event(Failed(error=sent))))]
    assert type(failed.error) is error_class and failed.error.status == sent.status


def test_an_error_of_an_unknown_class_is_the_engines():
    assert type(decode_error(encode_error(ContextLengthError("x")) | {"class": "SystemExit"})) is EngineError
    assert type(decode_error(encode_error(OverloadedError("x")))) is OverloadedError


def test_frames_have_the_documented_bytes():
    assert encode_frame({"type": "cancel"}) == b'\x00\x00\x00\x11{"type":"cancel"}'
    assert encode_frame({"a": "\ud800"})  # a lone surrogate does not break the pipe
    assert travel({"a": "\ud800"}) == {"a": "\ud800"}


def test_several_frames_and_the_beginning_of_another():
    frames = b"".join(encode_frame({"n": n}) for n in range(3))
    decoder = FrameDecoder()
    assert decoder.feed(frames + frames[:5]) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert decoder.feed(frames[5:]) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert decoder.feed(b"") == []


@pytest.mark.parametrize(
    "data",
    [
        b"Traceback (most recent call last)",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x01x",
        b"\x00\x00\x00\x02[]",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x04\xff\xff\xff\xff",
        (200_000).to_bytes(4, "big") + b"[" * 200_000,
    ],
)
def test_what_is_no_frame_is_an_engine_error(data):
    with pytest.raises(EngineError):
        FrameDecoder().feed(data)


def test_a_slow_reader_gets_everything_in_few_events():
    async def check():
        inbox = JobInbox()
        for number in range(1000):
            inbox.put(PrefillProgress(done=number, total=1000, cached=0))
        for number in range(1000):
            inbox.put(TextDelta(text=f"{number} ", logprobs=(entry(number),)))
        inbox.put(EVENTS[3])
        inbox.put(TextDelta(text="after the end"))
        taken = [await inbox.take() for _ in range(3)]
        assert taken[0] == PrefillProgress(done=999, total=1000, cached=0)
        assert taken[1].text.split() == [str(number) for number in range(1000)]
        assert [logprob.token_id for logprob in taken[1].logprobs] == list(range(1000))
        assert taken[2] == EVENTS[3] and inbox.ended

    asyncio.run(check())


def test_what_is_held_back_is_taken_in_time_one_by_one_or_at_the_end():
    async def check():
        loop = asyncio.get_running_loop()
        inbox, began_s = JobInbox(), loop.time()
        inbox.put(TextDelta(text="a"))
        inbox.put(TextDelta(text="b", hold_s=0.02))
        inbox.put(TextDelta(text="c", hold_s=0.04))
        inbox.put(TextDelta(text="d", hold_s=3600))
        inbox.put(TextDelta(text="e"))  # not before what is before it
        assert [(await inbox.take()).text for _ in range(3)] == ["a", "b", "c"] and loop.time() - began_s > 0.03
        waiting = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        inbox.put(PrefillProgress(done=1, total=2, cached=0))
        assert isinstance(await waiting, PrefillProgress)
        waiting = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        inbox.put(EVENTS[3])
        assert (await inbox.take()).text == "de" and await inbox.take() == EVENTS[3]

    asyncio.run(check())


def test_an_inbox_wakes_its_reader():
    async def check():
        inbox = JobInbox()
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        assert not reader.done()
        inbox.put(TextDelta(text="a"))
        assert (await reader).text == "a"
        reader = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        assert not reader.done()
        inbox.put(EVENTS[3])
        assert await reader == EVENTS[3]

    asyncio.run(check())


def test_restart_delays_grow_and_are_forgiven():
    policy = RestartPolicy(1.0)
    assert [policy.choose_delay_s(5.0) for _ in range(4)] == [1.0, 1.5, 2.25, 3.375]
    assert policy.choose_delay_s(120.0) == 1.0
    assert [policy.choose_delay_s(0.0) for _ in range(200)][-1] == RESTART_DELAY_LIMIT_S


def test_a_process_that_never_gets_ready_is_given_up():
    policy = RestartPolicy(1.0)
    delays = [policy.choose_delay_s(None) for _ in range(MAX_FAILED_STARTS)]
    assert delays[-1] is None and None not in delays[:-1]
    policy = RestartPolicy(1.0)
    for ready_s in (None, None, 1.0, None, None):
        assert policy.choose_delay_s(ready_s) is not None


def test_the_table_of_states():
    assert set(ENGINE_TRANSITIONS) == set(EngineState)
    assert all(EngineState.STOPPED in ways for ways in ENGINE_TRANSITIONS.values())
    assert EngineState.READY in ENGINE_TRANSITIONS[EngineState.LOADING]
    reached = {state for ways in ENGINE_TRANSITIONS.values() for state in ways}
    assert reached == set(EngineState)
    assert ENGINE_TRANSITIONS[EngineState.FAILED] == {EngineState.STOPPED}


def test_how_a_process_ended_in_words():
    assert build_death_text(3) == "exit status 3"
    assert build_death_text(-250) == "signal 250"
    assert build_death_text(-15).startswith("signal 15")
