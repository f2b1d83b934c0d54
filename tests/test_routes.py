"""Queue, answers and streams of the routes, without sockets or engines."""

import asyncio
import json

import pytest

import dvai_bridge
from dvai_bridge import (
    PING,
    AdmissionQueue,
    AnswerCollector,
    AnswerEncoder,
    AnswerHead,
    ChatForm,
    EngineError,
    EngineState,
    EventStreamBody,
    Finished,
    LocalEngine,
    LocalModels,
    ModelNotFoundError,
    ModelState,
    NoCapableDeviceError,
    NoLocalBackendError,
    OverloadedError,
    Pairing,
    PrefillProgress,
    RequestWatch,
    ServedModel,
    SignatureError,
    TextDelta,
    TextForm,
    Usage,
    limit_generations,
    name_outcome,
    parse_chat_request,
    parse_completion_request,
)

HEAD = AnswerHead(id="chatcmpl-1", created=1_700_000_000, model="m")
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
USAGE = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3, prompt_ms=10.0, predicted_ms=30.0)
END = Finished(finish_reason="stop", usage=USAGE)
EVENTS = [
    (0, PrefillProgress(done=3, total=5, cached=2)),
    (0, TextDelta(text="Hel")),
    (0, TextDelta(text="lo")),
    (0, END),
]


def chat_form(**body):
    return ChatForm(head=HEAD, parsed=parse_chat_request(CHAT | body, features=frozenset()))


def text_form(**body):
    return TextForm(head=HEAD, parsed=parse_completion_request({"prompt": "P:"} | body, features=frozenset()))


def read_events(data):
    """The values of a stream's `data:` lines; [DONE] as it stands."""
    assert data.endswith(b"\n\n")
    lines = [block.removeprefix("data: ") for block in data.decode().split("\n\n")[:-1]]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def encode_all(form, events):
    encoder = AnswerEncoder(form)
    return read_events(b"".join(encoder.encode(*event) for event in events) + encoder.finish())


# What the audit calls an end


def test_ends_are_named_by_words():
    """The refusal's code is its status, as existing software has it."""
    assert name_outcome(NoCapableDeviceError("nobody")) == "no_capable_device"
    assert name_outcome(OverloadedError("full")) == "queue_full"
    assert name_outcome(SignatureError()) == "invalid_signature"
    assert (name_outcome(ValueError()), name_outcome(asyncio.CancelledError())) == ("internal_error", "cancelled")


# What a paired device may ask for


@pytest.mark.parametrize(("asked", "granted"), [(5, 5), (8192, 8192), (8193, 8192), (10**9, 8192), (None, 8192)])
def test_a_paired_device_gets_answers_of_bounded_length(asked, granted):
    more = {} if asked is None else {"max_tokens": asked}
    generations = chat_form(n=2, **more).parsed.generations
    pairing = Pairing(device_id="d", app_id="a", device_name="n", paired_at_ms=0, last_used_at_ms=0)
    assert [each.max_tokens for each in limit_generations(generations, pairing)] == [granted] * 2
    assert limit_generations(generations, None) is generations


# The queue


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_places_are_given_in_order_and_refused_at_once():
    async def run():
        queue, order, leave = AdmissionQueue(2, 2, Clock()), [], asyncio.Event()

        async def work(name):
            async with queue.place():
                order.append(name)
                await leave.wait()

        tasks = [asyncio.create_task(work(name)) for name in "abcd"]
        await asyncio.sleep(0)
        assert (order, queue.running, queue.waiting) == (["a", "b"], 2, 2)
        with pytest.raises(OverloadedError) as refused:
            async with queue.place():
                raise AssertionError("a fifth request was let in")
        assert refused.value.status == 429 and refused.value.retry_after_s == 1
        leave.set()
        await asyncio.gather(*tasks)
        assert (order, queue.running, queue.waiting) == (["a", "b", "c", "d"], 0, 0)

    asyncio.run(run())


def test_who_leaves_the_queue_gives_way():
    async def run():
        queue, leave = AdmissionQueue(1, 1, Clock()), asyncio.Event()

        async def work():
            async with queue.place():
                await leave.wait()

        first, second = asyncio.create_task(work()), asyncio.create_task(work())
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert (queue.running, queue.waiting) == (1, 0)
        third = asyncio.create_task(work())
        await asyncio.sleep(0)
        leave.set()
        await asyncio.gather(first, third)
        first = asyncio.create_task(work())
        await first
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("durations_s", "expected_s"), [([], 1), ([0.1], 1), ([9.0], 5), ([500.0] * 9, 60), ([4, 14], 4)]
)
def test_retry_after_is_the_time_until_a_place_is_free(durations_s, expected_s):
    async def run():
        clock = Clock()
        queue = AdmissionQueue(2, 0, clock)
        for duration_s in durations_s:
            async with queue.place():
                clock.now_s += duration_s
        return queue.estimate_wait_s()

    assert asyncio.run(run()) == expected_s


# Answers


def test_a_chat_stream_has_each_part_once_and_in_order():
    *chunks, done = encode_all(chat_form(stream=True), EVENTS)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all((c["id"], c["created"], c["model"]) == ("chatcmpl-1", 1_700_000_000, "m") for c in chunks)
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_when_it_is_asked_for():
    *chunks, last, done = encode_all(chat_form(stream=True, stream_options={"include_usage": True}), EVENTS)
    assert done == "[DONE]" and last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["total_tokens"] == 8 and last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert last["timings"]["prompt_n"] == 3 and last["timings"]["predicted_per_second"] == 100.0


def test_an_empty_answer_still_has_its_role_and_its_end():
    first, last, done = encode_all(chat_form(stream=True), [(0, END)])
    assert first["choices"][0]["delta"]["role"] == "assistant" and last["choices"][0]["delta"] == {}
    assert done == "[DONE]"


def test_choices_follow_each_other():
    events = [(index, event) for index in (0, 1) for _, event in EVENTS]
    chunks = encode_all(chat_form(stream=True, n=2), events)[:-1]
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0] * 4 + [1] * 4
    collector = AnswerCollector(chat_form(n=2))
    for event in events:
        collector.add(*event)
    answer = collector.build()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Hello", "Hello"]
    assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 6, (
        "one prompt, two answers"
    )


def test_a_legacy_completion_echoes_its_prompt():
    chunks = encode_all(text_form(stream=True, echo=True), EVENTS)[:-1]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["P:", "Hel", "lo", ""]
    collector = AnswerCollector(text_form(echo=True))
    for event in EVENTS:
        collector.add(*event)
    assert collector.build()["choices"][0]["text"] == "P:Hello"
    assert encode_all(text_form(stream=True), EVENTS)[0]["choices"][0]["text"] == "Hel", "nothing without echo"


# Streams


async def generate(events, state):
    try:
        for event in events:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        state.append("closed")


def test_a_stream_is_what_its_encoder_says():
    async def run():
        state, form = [], chat_form(stream=True)
        body = EventStreamBody(generate(EVENTS[1:], state), EVENTS[0], AnswerEncoder(form))
        data = b"".join([chunk async for chunk in body])
        await body.aclose()
        assert read_events(data) == encode_all(form, EVENTS) and state == ["closed"]

    asyncio.run(run())


def test_an_error_is_the_last_event_and_nothing_says_done():
    async def run():
        state, data = [], b""
        events = [EVENTS[2], EngineError("the engine process died")]
        body = EventStreamBody(generate(events, state), EVENTS[1], AnswerEncoder(chat_form(stream=True)))
        with pytest.raises(EngineError):
            async for chunk in body:
                data += chunk
        *_, last = read_events(data)
        assert last["error"]["message"] == "the engine process died" and last["error"]["code"] == "engine_failed"
        assert b"[DONE]" not in data and state == ["closed"]

    asyncio.run(run())


def test_a_bug_is_an_error_event_that_tells_nothing():
    async def run():
        data = b""
        body = EventStreamBody(generate([KeyError("secret")], []), EVENTS[1], AnswerEncoder(chat_form(stream=True)))
        with pytest.raises(KeyError):
            async for chunk in body:
                data += chunk
        assert read_events(data)[-1]["error"]["message"] == "internal error" and b"secret" not in data

    asyncio.run(run())


def test_closing_a_stream_that_was_never_read_ends_its_generation():
    async def run():
        state, generation = [], None
        generation = generate(EVENTS, state)
        first = await anext(generation)
        body = EventStreamBody(generation, first, AnswerEncoder(chat_form(stream=True)))
        await body.aclose()
        assert state == ["closed"]

    asyncio.run(run())


def test_a_long_prompt_shows_signs_of_life_glued_to_the_next_event(monkeypatch):
    async def run():
        clock = iter(range(0, 1000, 6))  # every look at the clock is six seconds later
        monkeypatch.setattr(dvai_bridge.time, "monotonic", lambda: next(clock))
        progress = [(0, PrefillProgress(done=done, total=9, cached=0)) for done in range(1, 8)]
        body = EventStreamBody(generate([*progress, *EVENTS[1:]], []), EVENTS[0], AnswerEncoder(chat_form(stream=True)))
        return [chunk async for chunk in body]

    chunks = asyncio.run(run())
    pings = chunks.count(PING)
    assert pings >= 2 and chunks[:pings] == [PING] * pings and PING == b": ping\n"
    assert chunks[pings].startswith(b"data: ")


# The models here


class StubProcess:
    def __init__(self, state):
        self.state = state


class StubEngine:
    """What health looks at."""

    def __init__(self, state, process_state=None, last_used_s=0.0):
        self.state = state
        self.process = StubProcess(process_state) if process_state else None
        self.is_occupying = state in (ModelState.LOADING, ModelState.LOADED, ModelState.ENDING)
        self.last_used_s = last_used_s


def local_models(**engines):
    models = LocalModels()
    for name, engine in engines.items():
        model = ServedModel(model_id=name, created=0, owned_by="test")
        models.add(LocalEngine(model=model, engine=engine, queue=AdmissionQueue(2, 9), watch=RequestWatch()))
    return models


UNLOADED, SLEEPING = StubEngine(ModelState.UNLOADED), StubEngine(ModelState.SLEEPING)
LOADING = StubEngine(ModelState.LOADING, EngineState.LOADING)
RESTARTING = StubEngine(ModelState.LOADING, EngineState.RESTARTING)
LOADED = StubEngine(ModelState.LOADED, EngineState.READY)
ENDING = StubEngine(ModelState.ENDING, EngineState.STOPPED)
FAILED = StubEngine(ModelState.FAILED, EngineState.FAILED)
STOPPED = StubEngine(ModelState.STOPPED)


@pytest.mark.parametrize(
    ("engines", "word"),
    [
        ([], "ok"),
        ([LOADED], "ok"),
        ([LOADING], "loading"),
        ([RESTARTING], "degraded"),
        ([FAILED], "degraded"),
        ([STOPPED], "loading"),
        ([SLEEPING], "ok"),
        ([UNLOADED], "ok"),
        ([LOADED, LOADING, FAILED], "ok"),
        ([UNLOADED, LOADING], "loading"),
        ([UNLOADED, FAILED], "ok"),
        ([ENDING, UNLOADED], "ok"),
        ([FAILED, STOPPED], "degraded"),
    ],
)
def test_health_in_one_word(engines, word):
    assert local_models(**{f"m{index}": engine for index, engine in enumerate(engines)}).build_status() == word


def test_a_model_is_found_by_its_name_or_is_the_first():
    models = local_models(One=LOADED, two=UNLOADED)
    assert models.find(None) is models.find("ONE") and models.find("two").model.model_id == "two"
    with pytest.raises(ModelNotFoundError, match=r"'x' here, only 'One', 'two'; "):
        models.find("x")
    with pytest.raises(ModelNotFoundError, match="'m4', …;"):
        local_models(**{f"m{index}": UNLOADED for index in range(6)}).find("x")
    with pytest.raises(NoLocalBackendError):
        local_models().find(None)


def test_the_current_model_is_the_first_or_the_one_in_memory():
    late, early = (StubEngine(ModelState.LOADED, EngineState.READY, last_used_s=time_s) for time_s in (2, 1))

    def current(**engines):
        return local_models(**engines).current.model.model_id

    assert current(a=LOADING, b=late) == "a" and current(a=SLEEPING, b=early, c=late) == "c"
    assert current(a=UNLOADED, b=SLEEPING) == "a" and local_models().current is None


def test_others_are_shown_what_they_may_use():
    models = local_models(a=UNLOADED, b=LOADED, c=SLEEPING, d=STOPPED, e=LOADING)

    def offered(may_load):
        return "".join(each.model.model_id for each in models.list_offered(may_load=may_load))

    assert offered(True) == "abce" and offered(False) == "bce"
    assert models.build_queue() == {"running": 0, "waiting": 0, "slots": 4}
