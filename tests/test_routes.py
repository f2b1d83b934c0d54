"""Queue, answers, accounts and limits of the routes without sockets or engines; then a real bridge's own routes."""

import asyncio
import contextlib
import dataclasses
import json
import os
import threading

import pytest

import dvai_bridge
from dvai_bridge import (
    BUILTIN_MODEL_ID,
    DVAI,
    PEER_SLOTS,
    PEER_TOKENS_LIMIT,
    PEER_WAITING,
    PING,
    AccountedBody,
    AdmissionQueue,
    AnswerCollector,
    AnswerEncoder,
    AnswerHead,
    AuditCaller,
    Caller,
    ChatForm,
    ConsumerExchange,
    EngineError,
    EngineState,
    EventStreamBody,
    Finished,
    GenerationRequest,
    Headers,
    HttpRequest,
    Identity,
    InferenceAccount,
    InvalidRequestError,
    LocalEngine,
    LocalModels,
    MethodNotAllowedError,
    ModelNotFoundError,
    ModelState,
    NoCapableDeviceError,
    NoLocalBackendError,
    OffloadConfig,
    OverloadedError,
    OwnBackend,
    Pairing,
    PeerQuotas,
    PrefillProgress,
    RequestWatch,
    RouteNotFoundError,
    ServedModel,
    SignatureError,
    TextDelta,
    TextForm,
    Usage,
    build_signed_headers,
    build_static_key,
    build_tenant,
    choose_peer,
    encode_base64url,
    find_route,
    generate_nonce,
    limit_generations,
    may_offload,
    name_guest,
    name_outcome,
    parse_base64url,
    parse_chat_request,
    parse_completion_request,
    read_clock_ms,
    read_model,
)
from tests.support import CLEAN_ENVIRON, RunningBridge, wait_for

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
    assert [each.max_tokens for each in limit_generations(generations, "a guest")] == [granted] * 2
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


# Whose request it is

PAIRING = Pairing(device_id="dev", app_id="app", device_name="phone", paired_at_ms=1, last_used_at_ms=1)


def build_request(caller=Caller.LOOPBACK, pairing=None, path="/v1/chat/completions", method="POST", **fields):
    headers = Headers([(name.replace("_", "-"), value) for name, value in fields.items()])
    return HttpRequest(
        method=method,
        path=path,
        raw_path=path,
        query="",
        headers=headers,
        body=b"{}",
        client_address="192.0.2.1" if caller is not Caller.LOOPBACK else "127.0.0.1",
        is_loopback=caller is Caller.LOOPBACK,
        is_tls=False,
        caller=caller,
        request_id="r-1",
        pairing=pairing,
    )


PAIRED = build_request(Caller.PAIRED, PAIRING)
STRANGER = build_request(Caller.STRANGER)


def test_only_our_own_requests_may_go_on_to_another_device():
    assert may_offload(build_request()) and may_offload(build_request(Caller.KEY_HOLDER))
    assert not may_offload(PAIRED) and not may_offload(STRANGER)
    assert not may_offload(build_request(x_dvai_forwarded="1"))


def test_prompt_caches_are_not_shared():
    same = {"authorization": "Bearer ignored"}
    requests = [
        build_request(),
        build_request(**same),
        build_request(authorization="Bearer other"),
        STRANGER,
        build_request(Caller.STRANGER, **same),
        PAIRED,
        build_request(Caller.PAIRED, dataclasses.replace(PAIRING, app_id="another")),
    ]
    tenants = [build_tenant(request) for request in requests]
    assert len(set(tenants)) == len(tenants) and not any("ignored" in tenant for tenant in tenants)
    assert build_tenant(build_request(Caller.PAIRED, PAIRING, **same)) == build_tenant(PAIRED)


def test_guests_are_paired_devices_and_strangers():
    assert name_guest(build_request()) is None and name_guest(build_request(Caller.KEY_HOLDER)) is None
    assert PAIRING.pairing_id in name_guest(PAIRED) and name_guest(STRANGER) == "strangers"


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, PEER_TOKENS_LIMIT), (0, 0), (5, 5), (PEER_TOKENS_LIMIT, PEER_TOKENS_LIMIT), (10**6, PEER_TOKENS_LIMIT)],
)
def test_answers_to_guests_end(asked, given):
    generations = [GenerationRequest(prompt="a", max_tokens=asked), GenerationRequest(prompt="b", max_tokens=7)]
    limited = limit_generations(generations, "guest")
    assert [each.max_tokens for each in limited] == [given, 7] and [each.prompt for each in limited] == ["a", "b"]
    assert limit_generations(generations, None) == generations


def test_a_guest_has_so_many_places_and_the_others_theirs():
    async def run():
        quotas, leave, running = PeerQuotas(), asyncio.Event(), []

        async def use(guest):
            async with quotas.place(guest):
                running.append(guest)
                await leave.wait()

        tasks = [asyncio.create_task(use("one")) for _ in range(PEER_SLOTS + PEER_WAITING)]
        await asyncio.sleep(0)
        assert running == ["one"] * PEER_SLOTS
        with pytest.raises(OverloadedError) as refused:
            await use("one")
        assert refused.value.status == 429 and refused.value.retry_after_s >= 1
        tasks += [asyncio.create_task(use(guest)) for guest in ("two", *[None] * 20)]
        await asyncio.sleep(0)
        assert running.count("two") == 1 and running.count(None) == 20
        tasks[PEER_SLOTS].cancel()  # one that waits gives way
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(use("one")))
        await asyncio.sleep(0)
        leave.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert running.count("one") == PEER_SLOTS + PEER_WAITING and not quotas._queues, "and nothing is kept"

    asyncio.run(run())


def test_the_model_of_a_request_is_a_text():
    assert read_model({}) is None and read_model({"model": "m"}) == "m"
    with pytest.raises(InvalidRequestError) as caught:
        read_model({"model": 1})
    assert caught.value.param == "model"


# Accounts


def test_an_account_is_closed_once_with_what_was_counted():
    entries = []
    account = InferenceAccount(PAIRED, entries.append)
    account.model_asked, account.model_served, account.route, account.engine = "m", "M", "local", "builtin"
    account.count(3, 5)
    account.count(None, None)
    account.count(1, 2)
    account.close(200, "ok")
    account.close(500, "late")
    (entry,) = entries
    assert (entry.status, entry.outcome, entry.prompt_tokens, entry.completion_tokens) == (200, "ok", 4, 7)
    assert (entry.caller, entry.device_id, entry.app_id) == (AuditCaller.PEER, "dev", "app")
    assert (entry.model_asked, entry.model_served, entry.route, entry.engine) == ("m", "M", "local", "builtin")
    assert (entry.request_id, entry.path) == ("r-1", "/v1/chat/completions") and entry.time_ms > 10**12
    for caller, name in ((Caller.LOOPBACK, "local"), (Caller.KEY_HOLDER, "key"), (Caller.STRANGER, "anonymous")):
        InferenceAccount(build_request(caller), entries.append).close(200, "ok")
        assert entries[-1].caller.value == name
        assert entries[-1].prompt_tokens is entries[-1].completion_tokens is entries[-1].device_id is None


def test_an_outcome_has_a_name():
    assert name_outcome(EngineError("x")) == "engine_failed" and name_outcome(KeyError("x")) == "internal_error"
    assert name_outcome(asyncio.CancelledError()) == "cancelled"
    assert name_outcome(InvalidRequestError("x")) == "invalid_request_error"


@pytest.mark.parametrize(
    ("events", "read", "outcome"),
    [
        ([b"a", b"b"], 99, "ok"),
        ([b"a", b"b"], 1, "cancelled"),
        ([b"a", b"b"], 0, "cancelled"),
        ([b"a", EngineError("x")], 99, "engine_failed"),
        ([b"a", KeyError("x")], 99, "internal_error"),
    ],
)
def test_the_end_of_a_stream_closes_account_body_and_place(events, read, outcome):
    async def run():
        ended, entries, place = [], [], contextlib.AsyncExitStack()
        place.callback(ended.append, "place")

        class Body:
            def __init__(self):
                self.events = iter(events)

            async def __anext__(self):
                event = next(self.events, None)
                if event is None:
                    raise StopAsyncIteration
                if isinstance(event, Exception):
                    raise event
                return event

            async def aclose(self):
                ended.append("body")

        body = AccountedBody(Body(), InferenceAccount(build_request(), entries.append), 200, place)
        with contextlib.suppress(EngineError, KeyError):
            for _ in range(read):
                if await anext(body, None) is None:
                    break
        await body.aclose()
        await body.aclose()
        assert [entry.outcome for entry in entries] == [outcome] and ended == ["body", "place", "body"]

    asyncio.run(run())


# Finding a route


async def handle(request):
    raise AssertionError("only looked for")


ROUTES = ({"/models": {"GET": "list"}, "/models/*": {"GET": "show"}}, {"/a/*": {"POST": "ask", "DELETE": "end"}})


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "/v1/models", "list"),
        ("GET", "/models", "list"),
        ("HEAD", "/v1/models", "list"),
        ("GET", "/v1/models/some/model", "show"),
        ("DELETE", "/v1/a/1", "end"),
        ("POST", "/v1/models", ("GET",)),
        ("GET", "/v1/a/1", ("POST", "DELETE")),
        ("OPTIONS", "/v1/models", ("GET",)),
        ("GET", "/v1", None),
        ("GET", "/", None),
        ("GET", "/v1models", None),
        ("GET", "/v1/v1/models", None),
        ("GET", "/v1/MODELS", None),
        ("GET", "/v2/models", None),
    ],
)
def test_routes_are_found_by_path_then_method(method, path, found):
    request = build_request(method=method, path=path)
    if isinstance(found, str):
        assert find_route(ROUTES, request) == found
        return
    with pytest.raises(RouteNotFoundError if found is None else MethodNotAllowedError) as caught:
        find_route(ROUTES, request)
    assert caught.value.status == (404 if found is None else 405)
    assert found is None or caught.value.allow == found


def test_a_peer_is_meant_by_url_id_or_name():
    one = dvai_bridge.build_static_peer("http://10.0.0.2:1")
    named = dataclasses.replace(one, device_id="id-1", device_name="Desk")
    twin = dataclasses.replace(named, device_id="id-2")
    assert choose_peer([named, twin], "id-2") is twin and choose_peer([named], "desk") is named
    assert choose_peer([], "http://10.0.0.9:1").base_url == "http://10.0.0.9:1/v1"
    for peers, name, words in (([named, twin], "Desk", "several"), ([], "x", "no device"), ([], "x://", "no base URL")):
        with pytest.raises(InvalidRequestError, match=words):
            choose_peer(peers, name)


# The routes of devices and of the owner, on a real bridge


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    offload = OffloadConfig(enabled=True, discover_lan=False, on_pairing_request=lambda request: wait_for_owner())
    config = {"home": home, "port": 0, "model": "builtin", "lan": True, "host": "127.0.0.1", "offload": offload}
    with DVAI(environ=CLEAN_ENVIRON, **config) as dvai:
        running = RunningBridge(process=None, port=dvai.port)
        running.token = {"X-DVAI-Control": (home / "data" / "control-token").read_text()}
        yield running


async def wait_for_owner():
    """Nobody answers here: the owner does by HTTP."""
    await asyncio.Event().wait()


def ask(bridge, method, path, body=None, headers=None):
    """(status, decoded body)."""
    status, _, data = bridge.request(method, "/v1/dvai" + path, body, headers, timeout_s=60)
    return status, json.loads(data)


def get_error(answer):
    status, body = answer
    return status, body["error"]["code"] or body["error"]["type"]


def test_the_owners_routes_need_the_control_token(bridge):
    for method, path, body in (
        ("GET", "/pairings", None),
        ("POST", "/pairings", {"peer": "x"}),
        ("POST", "/pairings/x/approve", {}),
        ("DELETE", "/pairings/x", None),
    ):
        for headers in ({}, {"X-DVAI-Control": ""}, {"X-DVAI-Control": "w" * 43}, {"X-DVAI-Control": "\xff"}):
            assert ask(bridge, method, path, body, headers)[0] == 403
        assert ask(bridge, method, path, body, bridge.token)[0] in (200, 400, 404)
        page = bridge.token | {"Origin": "http://127.0.0.1"}
        assert ask(bridge, method, path, body, page)[0] == 403


def test_what_the_owner_may_ask_wrongly(bridge):
    assert get_error(ask(bridge, "POST", "/pairings/x/approve", {}, bridge.token))[0] == 404
    assert get_error(ask(bridge, "POST", "/pairings/x/shout", {}, bridge.token))[0] == 404
    assert get_error(ask(bridge, "DELETE", "/pairings/x", None, bridge.token))[0] == 404
    assert ask(bridge, "PUT", "/pairings", {}, bridge.token)[0] == 405
    for body in ({}, {"peer": 1}, {"peer": ""}, {"peer": "nobody"}, {"peer": "ftp://a"}):
        assert ask(bridge, "POST", "/pairings", body, bridge.token)[0] == 400
    own = f"http://127.0.0.1:{bridge.port}"
    status, answer = ask(bridge, "POST", "/pairings", {"peer": own}, bridge.token)
    assert status >= 400 and "itself" in answer["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        {},
        {"peerDeviceId": "x"},
        {"peerDeviceId": "", "peerDeviceName": "n"},
        {"peerDeviceId": "x" * 129, "peerDeviceName": "n"},
        {"peerDeviceId": "x", "peerDeviceName": 1},
        {"peerDeviceId": "x", "peerDeviceName": "n", "via": "pigeon"},
    ],
)
def test_a_malformed_handshake(bridge, body):
    assert get_error(ask(bridge, "POST", "/handshake", body)) == (400, "malformed_handshake")


def shake_hands(bridge, answers, name):
    hello = {"peerDeviceId": name, "peerDeviceName": name, "via": "lan-handshake"}
    answers.append(ask(bridge, "POST", "/handshake", hello))


def test_known_callers_are_told_that_it_speaks_noise(bridge):
    assert ask(bridge, "GET", "/health")[1]["noise"] == 1


def test_the_owner_needs_the_code_of_the_other_screen(bridge):
    phone = Identity(device_id="phone-by-code", device_name="phone", seed="A" * 43)
    backend = OwnBackend()
    exchange = ConsumerExchange(
        identity=phone,
        app_id=None,
        static=build_static_key(phone, backend),
        backend=backend,
        random=os.urandom,
        now_ms=read_clock_ms(),
    )
    hello = {"peerDeviceId": phone.device_id, "peerDeviceName": "x", "noise": {"v": 1}}
    hello["noise"]["m"] = encode_base64url(exchange.begin(read_clock_ms()))
    status, answer = ask(bridge, "POST", "/handshake", hello)
    assert (status, answer["paired"]) == (202, False) and "pairingKey" not in answer
    reveal = exchange.reveal(parse_base64url(answer["noise"]["m"]), read_clock_ms())
    hello["noise"] |= {"sid": answer["noise"]["sid"], "m": encode_base64url(reveal)}
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(bridge, "POST", "/handshake", hello)))
    asking.start()

    def find_shown():
        listed = ask(bridge, "GET", "/pairings", None, bridge.token)[1]["pending"]
        return [each for each in listed if each["code"] == exchange.code]

    (shown,) = wait_for(find_shown, 30, "the code is shown")
    assert shown["deviceName"] == "phone", "the name inside the exchange"
    wrong = f"{(int(exchange.code) + 1) % 1_000_000:06}"
    for body, error in (
        ({}, (400, "code_required")),
        ({"code": 5}, (400, "invalid_request_error")),
        ({"code": wrong}, (403, "pairing_denied")),
    ):
        given = ask(bridge, "POST", f"/pairings/{shown['id']}/approve", body, bridge.token)
        assert get_error(given) == error
    asking.join(60)
    assert get_error(answers[0]) == (403, "pairing_denied")
    assert ask(bridge, "GET", "/pairings", None, bridge.token)[1]["pairings"] == []


def test_the_owner_approves_denies_and_revokes(bridge):
    def list_pending():
        return ask(bridge, "GET", "/pairings", None, bridge.token)[1]["pending"]

    for word in ("deny", "approve"):
        answers = []
        asking = threading.Thread(target=shake_hands, args=(bridge, answers, f"phone-{word}"))
        asking.start()
        (pending,) = wait_for(list_pending, 30, "the request waits")
        assert (pending["deviceName"], pending["isKnown"]) == (f"phone-{word}", False)
        status, answer = ask(bridge, "POST", f"/pairings/{pending['id']}/{word}", {}, bridge.token)
        assert (status, answer["approved"]) == (200, word == "approve")
        asking.join(60)
        status, answer = answers[0]
        if word == "deny":
            assert get_error(answers[0]) == (403, "pairing_denied")
    assert status == 200 and answer["paired"] is True and answer["peerDeviceId"] == "phone-approve"

    listed = ask(bridge, "GET", "/pairings", None, bridge.token)[1]
    (pairing,) = listed["pairings"]
    assert (
        listed["pending"] == [] and pairing["deviceId"] == "phone-approve" and answer["pairingKey"] not in str(listed)
    )

    def ask_signed(path):
        fields = build_signed_headers(
            pairing_key=answer["pairingKey"],
            device_id="phone-approve",
            app_id=None,
            nonce=generate_nonce("phone-approve", answer["deviceId"], read_clock_ms()),
            method="GET",
            path="/v1/dvai" + path,
            body=b"",
        )
        return ask(bridge, "GET", path, None, dict(fields))

    assert "queue" in ask_signed("/health")[1], "it may see the full health"
    assert ask_signed("/capability")[0] == 200
    assert ask_signed("/peers")[0] == 403 and ask_signed("/pairings")[0] == 403
    status, gone = ask(bridge, "DELETE", f"/pairings/{pairing['id']}", None, bridge.token)
    assert (status, gone) == (200, {"id": pairing["id"], "revoked": True})
    assert ask_signed("/capability")[0] == 401
    assert ask(bridge, "DELETE", f"/pairings/{pairing['id']}", None, bridge.token)[0] == 404


def test_capability_peers_and_probe(bridge):
    status, answer = ask(bridge, "POST", "/probe", {"modelId": BUILTIN_MODEL_ID})
    assert status == 200 and answer["score"]["source"] == "probe" and answer["score"]["tokPerSec"] > 0
    status, listed = ask(bridge, "GET", "/capability")
    assert status == 200 and [score["modelId"] for score in listed["scores"]] == [BUILTIN_MODEL_ID]
    assert ask(bridge, "POST", "/probe", {})[0] == 200
    assert ask(bridge, "POST", "/probe", {"modelId": "other"})[0] == 404
    assert get_error(ask(bridge, "POST", "/probe", {"modelId": 1})) == (400, "missing_model_id")
    assert ask(bridge, "GET", "/peers") == (200, {"peers": []})
    assert ask(bridge, "GET", "/probe")[0] == 405


def test_a_bridge_without_a_model_and_without_pairing(tmp_path):
    config = {"home": tmp_path, "port": 0, "offload": OffloadConfig(only=True, discover_lan=False)}
    with DVAI(environ=CLEAN_ENVIRON, **config) as dvai:
        alone = RunningBridge(process=None, port=dvai.port)
        assert get_error(ask(alone, "POST", "/probe", {})) == (503, "no_backend")
        assert ask(alone, "GET", "/capability") == (200, {"scores": []})
        hello = {"peerDeviceId": "x", "peerDeviceName": "x"}
        assert get_error(ask(alone, "POST", "/handshake", hello)) == (503, "pairing_disabled")
        status, health = ask(alone, "GET", "/health")
        assert (status, health["status"], health["currentModelId"]) == (200, "ok", None) and "queue" not in health
