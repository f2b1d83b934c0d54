"""Real worker processes around a tiny model: what they answer, how they are cancelled, and how they die."""

import asyncio
import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
import time

import pytest

import dvai_bridge
from dvai_bridge import (
    ChatMessage,
    ContextLengthError,
    EmbeddingRequest,
    EngineError,
    EngineState,
    EngineUnavailableError,
    Finished,
    FrameDecoder,
    GenerationRequest,
    InvalidRequestError,
    LoadRequest,
    MemoryInfo,
    ModelFileError,
    PrefillProgress,
    SamplingParams,
    TextDelta,
    Transformer,
    encode_frame,
    encode_job,
    encode_load_request,
    load_builtin_backend,
)
from tests.support_worker import END_ID, N_CTX, PIECES, ROOT, WORKER, build_byte_model, build_command, start_engine

SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
GREEDY = SamplingParams(temperature=0.0, logit_bias={END_ID: -100.0})
ENDLESS = SamplingParams(temperature=1.0, seed=1, logit_bias={END_ID: -100.0})
LONG = tuple(3 + n * 7 % 256 for n in range(1000))


def asynchronous(test):
    """Run a coroutine function as a test, with a deadline against hanging."""

    @functools.wraps(test)
    def run(**fixtures):
        asyncio.run(asyncio.wait_for(test(**fixtures), 60))

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-bytes.gguf"
    path.write_bytes(build_byte_model())
    return path


def request(prompt="a prompt of thirty bytes, about", *, sampling=GREEDY, max_tokens=12, **fields):
    return GenerationRequest(prompt=prompt, sampling=sampling, max_tokens=max_tokens, **fields)


def encode(text):
    """The tokens of a text, as build_byte_model numbers them."""
    return [1, *(259 if char == " " else 3 + ord(char) for char in text)]


async def collect(engine, job):
    """(text, Finished, all events) of a generation."""
    events = [event async for event in engine.generate(job)]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert isinstance(events[-1], Finished) and sum(isinstance(event, Finished) for event in events) == 1
    return text, events[-1], events


async def token_ids(engine, job):
    """The ids that a job draws."""
    _, _, events = await collect(engine, dvai_bridge.replace(job, top_logprobs=0))
    return [entry.token_id for event in events if isinstance(event, TextDelta) for entry in event.logprobs]


def run_backend(backend, job):
    """A job on a backend in this process, without frames or pipes."""
    backend.submit(1, job)
    events = []
    while not events or not isinstance(events[-1], Finished):
        events += [event for _, event in backend.step()]
    return "".join(event.text for event in events if isinstance(event, TextDelta)), events[-1]


async def wait_until(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
        await asyncio.sleep(0.005)


# Answers


@asynchronous
async def test_it_loads_reports_progress_and_says_what_it_has(model):
    seen = []
    async with start_engine(model, on_progress=seen.append, slots=3, n_ctx=128) as engine:
        assert engine.state is EngineState.READY and engine.progress == 1.0 and engine.error is None
        assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 3
        info = engine.info
        assert (info.model_id, info.architecture, info.engine) == ("tiny-bytes", "llama", "builtin")
        assert (info.n_ctx, info.slots, info.n_vocab, info.n_embd) == (128, 3, 261, 64)
        assert info.size_bytes == len(model.read_bytes())
    assert engine.state is EngineState.STOPPED and engine.pid is None


@asynchronous
async def test_a_generation_is_that_of_the_model(model):
    backend = load_builtin_backend(LoadRequest(), str(model), lambda fraction: None)
    async with start_engine(model) as engine:
        for sampling in (GREEDY, ENDLESS, SamplingParams(seed=7, repeat_penalty=1.3, top_k=5)):
            for job in (request(sampling=sampling), request(tuple(range(3, 40)), sampling=sampling)):
                expected, expected_end = run_backend(backend, job)
                text, end, _ = await collect(engine, job)
                assert text == expected and end.finish_reason == expected_end.finish_reason
                assert end.usage.completion_tokens == expected_end.usage.completion_tokens


@asynchronous
async def test_it_streams_and_counts_truly(model):
    async with start_engine(model) as engine:
        _, end, events = await collect(engine, request(max_tokens=60))
        deltas = sum(isinstance(event, TextDelta) for event in events)
        assert deltas > 2, "a busy machine may join a few tokens, not all of them"
        assert all(event.text for event in events if isinstance(event, TextDelta))
        assert end.finish_reason == "length"
        assert end.usage.prompt_tokens == 31 + 1 and end.usage.completion_tokens == 60
        assert end.usage.cached_tokens == 0 and end.usage.prompt_ms > 0 and end.usage.predicted_ms > 0
        progress = [event for event in events if isinstance(event, PrefillProgress)]
        assert [event.done for event in progress] == sorted({event.done for event in progress})
        assert progress[-1].done < progress[-1].total == 32


@asynchronous
async def test_the_model_ends_by_itself(model):
    async with start_engine(model) as engine:
        text, end, _ = await collect(engine, request(sampling=SamplingParams(logit_bias={END_ID: 100.0})))
        assert (text, end.finish_reason, end.usage.completion_tokens) == ("", "stop", 1)


@asynchronous
async def test_a_full_context_ends_a_generation(model):
    async with start_engine(model, n_ctx=48) as engine:
        _, end, _ = await collect(engine, request(max_tokens=None))
        assert end.finish_reason == "length"
        # the last token needs no place: nothing is computed from it
        assert end.usage.prompt_tokens + end.usage.completion_tokens == 48 + 1


@asynchronous
async def test_no_tokens_at_all(model):
    async with start_engine(model) as engine:
        text, end, _ = await collect(engine, request(max_tokens=0))
        assert (text, end.finish_reason, end.usage.completion_tokens) == ("", "length", 0)
        assert end.usage.prompt_tokens == 32


@asynchronous
async def test_stop_sequences_across_tokens(model):
    async with start_engine(model) as engine:
        whole, _, _ = await collect(engine, request(max_tokens=80))
        start = next(i for i in range(10, len(whole)) if "\ufffd" not in whole[i : i + 3])
        stop = whole[start : start + 3]
        text, end, _ = await collect(engine, request(max_tokens=80, stop=("never, never", stop)))
        assert text == whole[: whole.index(stop)] and end.finish_reason == "stop"
        assert end.usage.completion_tokens < 80


@asynchronous
async def test_log_probabilities(model):
    async with start_engine(model) as engine:
        _, _, events = await collect(engine, request(top_logprobs=5, sampling=SamplingParams(temperature=0.0)))
        entries = [entry for event in events if isinstance(event, TextDelta) for entry in event.logprobs]
        assert len(entries) == events[-1].usage.completion_tokens
        for entry in entries:
            assert len(entry.top) == 5 and (entry.top[0].token_id, entry.top[0].logprob) == (
                entry.token_id,
                entry.logprob,
            )
            values = [other.logprob for other in entry.top]
            assert values == sorted(values, reverse=True) and sum(map(math.exp, values)) < 1
            assert entry.data == (
                bytes([entry.token_id - 3])
                if entry.token_id < 259
                else PIECES[entry.token_id].replace("\u2581", " ").encode()
            )
        assert b"".join(entry.data for entry in entries).decode("utf-8", "replace") == "".join(
            event.text for event in events if isinstance(event, TextDelta)
        )


@asynchronous
async def test_seeds(model):
    async with start_engine(model) as engine:

        async def draw(seed):
            return (await collect(engine, request(sampling=SamplingParams(temperature=2.0, seed=seed))))[0]

        assert await draw(1) == await draw(1) != await draw(2)
        assert await draw(None) != await draw(None)


@asynchronous
async def test_chats_go_through_a_template(model):
    messages = (ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello!"))
    async with start_engine(model, chat_template="chatml") as engine:
        job = GenerationRequest(messages=messages, sampling=GREEDY, max_tokens=5)
        _, end, _ = await collect(engine, job)
        assert end.usage.prompt_tokens > len("Be brief.Hello!") and end.usage.completion_tokens == 5


@asynchronous
async def test_embeddings(model):
    async with start_engine(model) as engine:
        inputs = ("one", (3, 4, 5), "three", "one")
        embedded = await engine.embed(EmbeddingRequest(inputs=inputs))
        assert len(embedded.vectors) == 4 and {len(vector) for vector in embedded.vectors} == {64}
        assert embedded.prompt_tokens == 4 + 3 + 6 + 4
        assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5) for vector in embedded.vectors)
        assert embedded.vectors[0] == embedded.vectors[3] != embedded.vectors[2]
        again = await engine.embed(EmbeddingRequest(inputs=("three",)))
        assert again.vectors[0] == embedded.vectors[2]


# Refusals: an error of the right class to one request, and nothing more


@pytest.mark.parametrize(
    ("job", "error_class", "param", "extra"),
    [
        (request("x" * 127), ContextLengthError, "prompt", {"n_prompt_tokens": 128, "n_ctx": 128}),
        (request((5,) * 500), ContextLengthError, "prompt", {"n_prompt_tokens": 500, "n_ctx": 128}),
        (request(()), InvalidRequestError, "prompt", {}),
        (request((3, 261)), InvalidRequestError, "prompt", {}),
        (request(sampling=SamplingParams(logit_bias={261: 1.0})), InvalidRequestError, "logit_bias", {}),
        (
            EmbeddingRequest(inputs=("ok", "x" * 127)),
            ContextLengthError,
            "input",
            {"n_prompt_tokens": 128, "n_ctx": 128},
        ),
        (EmbeddingRequest(inputs=((1, 999),)), InvalidRequestError, "input", {}),
    ],
)
def test_refusals(model, job, error_class, param, extra):
    async def check():
        async with start_engine(model, n_ctx=128) as engine:
            with pytest.raises(error_class) as caught:
                await (engine.embed(job) if isinstance(job, EmbeddingRequest) else collect(engine, job))
            assert type(caught.value) is error_class
            assert (caught.value.param, caught.value.extra) == (param, extra)
            assert (await collect(engine, request()))[1].usage.completion_tokens == 12

    asyncio.run(check())


@pytest.mark.parametrize("size", [30_000, 40_000, 20_000_000])
def test_a_huge_prompt_is_refused_without_tokenizing_all_of_it(model, size):
    async def check():
        async with start_engine(model) as engine:
            chat = GenerationRequest(messages=(ChatMessage(role="user", content="x" * size),))
            for job in (request("x" * size), chat):
                with pytest.raises(ContextLengthError) as caught:
                    await collect(engine, job)
                assert caught.value.extra["n_ctx"] == N_CTX < caught.value.extra["n_prompt_tokens"] <= size + 50

    asyncio.run(check())


@asynchronous
async def test_a_long_text_of_few_tokens_is_not_refused(model):
    async with start_engine(model, n_ctx=256) as engine:
        _, end, _ = await collect(engine, request("</s>" * 200 + "z", max_tokens=1))
        assert end.usage.prompt_tokens == 202  # "</s>" is a control token, where a prompt may spell them
        text = "</s>" * 1100  # longer than what is looked at first
        with pytest.raises(ContextLengthError) as caught:
            await collect(engine, request(text))
        assert caught.value.extra["n_prompt_tokens"] == 1024 - 16


# Several jobs


@asynchronous
async def test_two_streams_run_at_the_same_time(model):
    async with start_engine(model, slots=2) as engine:
        alone = [(await collect(engine, request(prompt, max_tokens=40)))[0] for prompt in ("first", "second")]
        order = []

        async def follow(name, prompt):
            text = ""
            async for event in engine.generate(request(prompt, max_tokens=40)):
                order.append(name)
                text += event.text if isinstance(event, TextDelta) else ""
            return text

        together = await asyncio.gather(follow("a", "first"), follow("b", "second"))
        assert together == alone
        assert order.index("b") < len(order) - order[::-1].index("a"), "the second began before the first ended"
        assert order.index("a") < len(order) - order[::-1].index("b")


@asynchronous
async def test_more_jobs_than_slots_wait_for_their_turn(model):
    async with start_engine(model, slots=2) as engine:
        jobs = [request(f"prompt {n}", max_tokens=4) for n in range(7)]
        results = await asyncio.gather(
            *(collect(engine, job) for job in jobs), engine.embed(EmbeddingRequest(inputs=("x",)))
        )
        assert [end.usage.completion_tokens for _, end, _ in results[:-1]] == [4] * 7


@asynchronous
async def test_a_common_prefix_is_not_computed_again(model):
    async with start_engine(model, slots=2) as engine:
        first, end, _ = await collect(engine, request())
        assert end.usage.cached_tokens == 0
        again, end, _ = await collect(engine, request())
        assert again == first and end.usage.cached_tokens == end.usage.prompt_tokens - 1
        drawn = await token_ids(engine, request())
        turn = (*encode("a prompt of thirty bytes, about"), *drawn, *encode(" next")[1:])
        answer, end, _ = await collect(engine, request(turn))
        assert end.usage.cached_tokens == 32 + len(drawn) - 1  # the last one drawn was never computed
        assert answer == (await collect(engine, request(turn, tenant="without a cache")))[0]


@asynchronous
async def test_conversations_keep_their_slots(model):
    async with start_engine(model, slots=2) as engine:

        async def count_cached(prompt):
            return (await collect(engine, request(prompt, max_tokens=1)))[1].usage.cached_tokens

        assert await count_cached("System! conversation one") == 0
        assert await count_cached("System! another: two") == len("System! ") + 1  # taken over from the first one
        assert await count_cached("System! conversation one, and more") == len("System! conversation one") + 1
        assert await count_cached("System! another: two and three") == len("System! another: two") + 1
        assert await count_cached("System! something else") == len("System! ") + 1  # instead of the first
        assert await count_cached("System! another: two and three") == len("System! another: two and three")
        assert await count_cached("System! conversation one, and more") == len("System! ") + 1


@asynchronous
async def test_a_copied_prefix_is_as_good_as_a_computed_one(model):
    async with start_engine(model, slots=2) as engine:
        prefix = "x" * 300  # more than one block of the cache
        await collect(engine, request(prefix + "first", max_tokens=1))
        branch = request(prefix + "second", max_tokens=30)
        async with contextlib.aclosing(engine.generate(request(prefix + "first", sampling=ENDLESS))) as running:
            await anext(running)  # the slot whose prefix is copied goes on
            text, end, _ = await collect(engine, branch)
        assert end.usage.cached_tokens == 301
        assert text == (await collect(engine, dvai_bridge.replace(branch, tenant="other")))[0]


@asynchronous
async def test_tenants_never_share_a_cache(model):
    async with start_engine(model, slots=1) as engine:
        text, _, _ = await collect(engine, request(tenant="a"))
        for tenant in ("b", "a", ""):
            other, end, _ = await collect(engine, request(tenant=tenant))
            assert other == text and end.usage.cached_tokens == 0
        _, end, _ = await collect(engine, request(tenant=""))
        assert end.usage.cached_tokens == 31


# Cancellation


@asynchronous
async def test_cancelled_in_prefill(model):
    async with start_engine(model, slots=1) as engine:
        job = request(LONG, max_tokens=1)
        async with contextlib.aclosing(engine.generate(job)) as events:
            async for event in events:
                assert isinstance(event, PrefillProgress)
                break
        _, end, _ = await collect(engine, job)
        assert 0 < end.usage.cached_tokens < len(LONG) - 1  # it had stopped on the way


@asynchronous
async def test_cancelled_before_anything_came(model):
    async with start_engine(model, slots=1) as engine:
        task = asyncio.create_task(collect(engine, request(LONG)))
        await wait_until(lambda: engine._inboxes)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not engine._inboxes
        _, end, _ = await collect(engine, request(LONG, max_tokens=1))
        assert end.usage.cached_tokens < len(LONG) - 1


@asynchronous
async def test_cancelled_in_decode(model):
    async with start_engine(model, slots=1) as engine:
        drawn = await token_ids(engine, request("start", sampling=ENDLESS, max_tokens=600))
        await collect(engine, request("start", tenant="makes the cache forget"))
        texts = 0
        async with contextlib.aclosing(engine.generate(request("start", sampling=ENDLESS, max_tokens=600))) as events:
            async for event in events:
                texts += isinstance(event, TextDelta)
                if texts == 5:
                    break
        prompt = (*encode("start"), *drawn)
        _, end, _ = await collect(engine, request(prompt, max_tokens=1))
        assert 6 < end.usage.cached_tokens < 500


@asynchronous
async def test_a_waiting_job_can_be_cancelled(model):
    async with start_engine(model, slots=1) as engine:
        async with contextlib.aclosing(engine.generate(request(sampling=ENDLESS, max_tokens=None))) as running:
            await anext(running)
            waiting = asyncio.create_task(collect(engine, request("waits")))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert (await collect(engine, request()))[1].usage.completion_tokens == 12


# Death


@asynchronous
async def test_killed_in_a_generation(model):
    async with start_engine(model, slots=1) as engine:
        first_pid = engine.pid
        waiting = None
        with pytest.raises(EngineError, match="died .signal 9, SIGKILL" if os.name == "posix" else "died"):
            async for event in engine.generate(request(sampling=ENDLESS, max_tokens=None)):
                if isinstance(event, TextDelta) and waiting is None:
                    waiting = asyncio.create_task(collect(engine, request("waits")))
                    await asyncio.sleep(0)
                    os.kill(engine.pid, SIGKILL)
        with pytest.raises(EngineUnavailableError):
            await waiting
        await engine.ready()
        assert engine.pid != first_pid and engine.state is EngineState.READY
        assert (await collect(engine, request()))[1].usage.completion_tokens == 12


@asynchronous
async def test_killed_while_idle(model):
    async with start_engine(model) as engine:
        os.kill(engine.pid, SIGKILL)
        await wait_until(lambda: engine.state is not EngineState.READY)
        with pytest.raises(EngineUnavailableError):
            await collect(engine, request())
        await engine.ready()
        assert (await collect(engine, request()))[1].usage.completion_tokens == 12


@asynchronous
async def test_a_model_that_cannot_be_loaded_is_not_tried_again(tmp_path, model):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:5000])
    for path in (tmp_path / "missing.gguf", damaged):
        async with start_engine(path, ready=False) as engine:
            with pytest.raises(ModelFileError) as caught:
                await engine.ready()
            assert engine.state is EngineState.FAILED and engine.error is caught.value
            with pytest.raises(EngineUnavailableError, match="could not be loaded"):
                await collect(engine, request())
            await wait_until(lambda: engine.pid is None)
            assert engine.state is EngineState.FAILED


@pytest.mark.parametrize(
    ("fault", "error_class", "message"),
    [
        ("raise MemoryError", ModelFileError, "memory"),
        ("raise d.UsageError('no such engine')", dvai_bridge.UsageError, "no such engine"),
        ("1 / 0", EngineError, "ZeroDivisionError"),
    ],
)
def test_what_goes_wrong_while_loading_is_told_once(model, fault, error_class, message):
    async def check():
        source = f"import dvai_bridge as d\ndef fail(*args, **kwargs): {fault}\nd.Transformer.load = fail\n{WORKER}"
        async with start_engine(model, source=source, ready=False) as engine:
            with pytest.raises(error_class, match=message) as caught:
                await engine.ready()
            assert type(caught.value) is error_class and engine.state is EngineState.FAILED
            await wait_until(lambda: engine.pid is None)
            assert any("ZeroDivisionError" in line for line in engine.stderr_lines) == (fault == "1 / 0")

    asyncio.run(asyncio.wait_for(check(), 60))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; os._exit(7)", "exit status 7"),
        ("import os; os.write(2, b'my last words\\n'); os.abort()", "SIGABRT" if os.name == "posix" else "exit"),
        ("print('Traceback, or whatever', flush=True); sys.stdin.read()", "protocol"),
        ("import os; os.write(1, bytes([255] * 100000)); sys.stdin.read()", "protocol"),
        ("import os; os.write(1, b'\\0\\0\\0\\x02{}'); sys.stdin.read()", "protocol"),
        ('import os; os.write(1, b\'\\0\\0\\0\\x10{"type":"ready"}\'); sys.stdin.read()', "protocol"),
        ("import os; os.close(1); os.close(2); sys.stdin.read()", "died"),
    ],
)
def test_a_worker_that_never_gets_ready(model, source, message):
    async def check():
        async with start_engine(model, source=source, ready=False) as engine:
            with pytest.raises(EngineError, match=message):
                await engine.ready()
            assert engine.state is EngineState.FAILED and engine.pid is None
            if "last words" in source:
                assert "my last words" in engine.stderr_lines

    asyncio.run(asyncio.wait_for(check(), 60))


def test_a_program_that_is_not_there():
    async def check():
        engine = dvai_bridge.EngineProcess(LoadRequest(), command=["/nowhere/python"], restart_delay_s=0.01)
        engine.start()
        with pytest.raises(EngineError, match="cannot be started"):
            await engine.ready()
        await engine.close()

    asyncio.run(check())


PATCHED = "import os, dvai_bridge as d; pipe = os.dup(1); {}; sys.exit(d.run_worker_process(lambda: b''))"


@pytest.mark.parametrize(
    "answer",
    [
        b"not a frame at all",
        b"\0\0\0\x03[1]",
        encode_frame({"type": "event", "job": 1}),
        encode_frame({"type": "event", "job": 1, "event": {"kind": "surprise"}}),
        encode_frame({"type": "event", "job": 1, "event": {"kind": "finished", "usage": 5, "finish_reason": 1}}),
        encode_frame({"type": "ready", "info": {}}),
        encode_frame({"no": "type"}),
    ],
)
def test_garbage_instead_of_an_answer(model, answer):
    async def check():
        source = PATCHED.format(f"d.Worker._obey = lambda *args: os.write(pipe, {answer!r})")
        async with start_engine(model, source=source) as engine:
            with pytest.raises(EngineError, match="protocol"):
                await collect(engine, request())
            await engine.ready()  # another process, which would do it again

    asyncio.run(asyncio.wait_for(check(), 60))


@asynchronous
async def test_an_exception_in_one_job_is_not_the_end_of_the_others(model):
    source = PATCHED.format("d.decode_job = lambda job, old=d.decode_job: old(job) if job['job'] != 2 else 1 / 0")
    async with start_engine(model, source=source) as engine:
        pid = engine.pid
        running = asyncio.create_task(collect(engine, request(max_tokens=200)))
        await wait_until(lambda: engine._inboxes)
        with pytest.raises(EngineError, match="internal error"):
            await collect(engine, request())
        assert (await running)[1].usage.completion_tokens == 200
        assert engine.pid == pid and any("ZeroDivisionError" in line for line in engine.stderr_lines)


@asynchronous
async def test_stray_prints_do_not_disturb_the_protocol(model):
    source = PATCHED.format(
        "d.decode_job = lambda command, old=d.decode_job: [old(command), print('stray', flush=True), "
        "os.system('echo a child prints')][0]"
    )
    async with start_engine(model, source=source) as engine:
        assert (await collect(engine, request()))[1].usage.completion_tokens == 12
        await wait_until(lambda: {"stray", "a child prints"} <= set(engine.stderr_lines))


@asynchronous
async def test_what_a_worker_prints_is_kept_short_and_plain(model):
    source = "import os; os.write(2, b'x' * 300000 + b'\\n\\x1b[31mred\\xff\\n' + b'line\\n' * 100); " + WORKER
    async with start_engine(model, source=source) as engine:
        await wait_until(lambda: len(engine.stderr_lines) == 20)
        assert all(len(line) <= 500 and line.isprintable() for line in engine.stderr_lines)


# The end


@asynchronous
async def test_close_ends_jobs_and_process(model):
    async with start_engine(model) as engine:
        pid = engine.pid
        events = engine.generate(request(sampling=ENDLESS, max_tokens=None))
        await anext(events)
        await engine.close()
        with pytest.raises(EngineUnavailableError, match="stopping"):
            async for _ in events:
                pass
        assert engine.state is EngineState.STOPPED and engine.pid is None and not is_alive(pid)
        for attempt in (engine.ready(), collect(engine, request())):
            with pytest.raises(EngineUnavailableError):
                await attempt
        await engine.close()


@asynchronous
async def test_close_while_loading_and_while_waiting_to_restart(model):
    async with start_engine(model, ready=False) as engine:
        await wait_until(lambda: engine.pid)
    assert engine.state is EngineState.STOPPED and engine.pid is None
    async with start_engine(model, source="import os; os._exit(1)", ready=False) as engine:
        engine._policy = dvai_bridge.RestartPolicy(1000.0)
        await wait_until(lambda: engine.state is EngineState.RESTARTING)
    assert engine.state is EngineState.STOPPED


@pytest.mark.parametrize("stubborn", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_a_worker_that_does_not_end_is_made_to(model, monkeypatch, stubborn):
    monkeypatch.setattr(dvai_bridge, "ENGINE_STOP_GRACE_S", 0.2)

    async def check():
        source = f"import os, time; {stubborn}os.write(2, b'up\\n'); time.sleep(1000)"
        async with start_engine(model, source=source, ready=False) as engine:
            await wait_until(lambda: engine.stderr_lines)
            pid = engine.pid
        assert engine.pid is None and not is_alive(pid)

    asyncio.run(asyncio.wait_for(check(), 60))


def is_alive(pid):
    """Whether a process runs; a zombie that its new parent has not buried does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(os.name != "posix", reason="looks at process ids the POSIX way")
def test_a_worker_does_not_outlive_its_bridge(model):
    parent = f"""
import asyncio, sys
sys.path.insert(0, {ROOT!r})
from tests.support_worker import *
from tests.test_worker import *
async def main():
    async with start_engine({str(model)!r}) as engine:
        async for _ in engine.generate(request(sampling=ENDLESS, max_tokens=None)):
            print(engine.pid, flush=True)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    pid = int(process.stdout.readline())
    assert is_alive(pid)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["before load", "loading", "idle", "working", "garbage"])
def test_the_end_of_the_pipe_is_the_end_of_the_worker(model, moment):
    process = subprocess.Popen(build_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if moment != "before load":
        process.stdin.write(encode_frame(encode_load_request(LoadRequest(model=str(model)))))
        process.stdin.flush()
    if moment in ("idle", "working", "garbage"):
        decoder, messages = FrameDecoder(), []
        while not messages or messages[-1]["type"] != "ready":
            messages += decoder.feed(os.read(process.stdout.fileno(), 65536))
    if moment == "working":
        process.stdin.write(encode_frame(encode_job(1, request(sampling=ENDLESS, max_tokens=None))))
        process.stdin.flush()
        process.stdout.read(1)
    if moment == "garbage":
        process.stdin.write(b"\xff" * 8)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and b"Traceback" not in errors
    assert (b"pipe is broken" in errors) == (moment == "garbage")


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(model, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "probe_free_memory", lambda: MemoryInfo(free_bytes=100_000, limit_source="a test"))
    monkeypatch.setattr(Transformer, "load", lambda *arguments, **options: pytest.fail("the weights are read"))
    with pytest.raises(ModelFileError, match=r"needs about .* left \(a test\).*--ctx-size"):
        load_builtin_backend(LoadRequest(), str(model), lambda fraction: None)
