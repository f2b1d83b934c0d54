"""Section Probe: what it measures and to whom it gives way, on scripted engines and on a real process."""

import asyncio
import contextlib

import pytest

import dvai_bridge
from dvai_bridge import (
    AdmissionQueue,
    CapabilityMeter,
    EngineError,
    Finished,
    GatewayTimeoutError,
    GenerationRequest,
    ModelCost,
    OverloadedError,
    PrefillProgress,
    RequestWatch,
    ScoreCache,
    ScoreKey,
    ScoreSource,
    TextDelta,
    Usage,
    build_measured_score,
    choose_probe_tokens,
    measure_generation,
    probe_engine_speed,
    summarize_probe,
)
from tests.support_worker import build_byte_model, start_engine


def usage_of(completion, predicted_ms, prompt=30, cached=0, prompt_ms=300.0):
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        prompt_ms=prompt_ms,
        predicted_ms=predicted_ms,
    )


class ScriptedEngine:
    """Writes what it is asked for at `ms_per_token` of its own clock; each token waits for `gate`."""

    def __init__(self, ms_per_token=10.0, ends_after=10**9):
        self.ms_per_token = ms_per_token
        self.ends_after = ends_after
        self.requests = []
        self.running = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()

    async def ready(self):
        pass

    async def generate(self, request):
        self.requests.append(request)
        self.running += 1
        try:
            cached = sum(1 for other in self.requests[:-1] if other.prompt == request.prompt)
            yield PrefillProgress(done=1, total=30, cached=29 * bool(cached))
            count = min(request.max_tokens, self.ends_after)
            for _ in range(count):
                self.began.set()
                await self.gate.wait()
                await asyncio.sleep(0)
                yield TextDelta(text="x")
            usage = usage_of(count, count * self.ms_per_token, cached=29 * bool(cached))
            yield Finished(finish_reason="length", usage=usage)
        finally:
            self.running -= 1


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


# ---- who is alone ---------------------------------------------------------------------


def test_alone_is_who_met_nobody():
    async def check():
        watch = RequestWatch()
        first = watch.enter()
        assert watch.is_alone(first) and watch.leave(first)
        first, second = watch.enter(), watch.enter()
        assert not watch.is_alone(first) and not watch.is_alone(second)
        assert not watch.leave(first)
        third = watch.enter()
        assert not watch.leave(second) and not watch.leave(third)
        fourth = watch.enter()
        assert watch.leave(fourth)

    run(check())


def test_idle_is_when_none_runs():
    async def check():
        watch = RequestWatch()
        await watch.wait_idle()
        first, second = watch.enter(), watch.enter()
        waiting = asyncio.create_task(watch.wait_idle())
        watch.leave(first)
        await asyncio.sleep(0)
        assert not waiting.done()
        watch.leave(second)
        await waiting

    run(check())


# ---- how much is asked for, and what comes of it ---------------------------------------


@pytest.mark.parametrize(
    ("usages", "elapsed_s", "count"),
    [
        ([], 0.0, 16),
        ([usage_of(16, 160.0)], 0.5, 34),
        ([usage_of(16, 160.0), usage_of(34, 340.0)], 0.9, 0),  # 50 are written
        ([usage_of(16, 8000.0)], 8.5, 0),  # 2 tokens/s: 13 more are all that fit, which say too little
        ([usage_of(16, 6000.0)], 6.2, 23),  # as many as fit
        ([usage_of(16, 30000.0)], 31.0, 0),  # too slow for more than the warm-up
        ([usage_of(5, 50.0)], 0.1, 45),  # the model stopped early: it is asked again
        ([usage_of(0, 0.0)], 0.1, 50),
        ([usage_of(5, 50.0)] * 6, 0.1, 0),  # but not for ever
        ([usage_of(16, 160.0), usage_of(30, 300.0)], 0.5, 0),  # 4 more would say nothing
    ],
)
def test_how_much_is_asked_for(usages, elapsed_s, count):
    assert choose_probe_tokens(usages, elapsed_s) == count


def test_the_warm_up_does_not_count_if_more_was_written():
    result = summarize_probe([usage_of(16, 3000.0), usage_of(34, 330.0, cached=29)])
    assert result.decode_tok_per_s == pytest.approx(100.0) and result.prefill_tok_per_s == pytest.approx(100.0)
    assert result.completion_tokens == 50
    assert summarize_probe([usage_of(16, 3000.0)]).decode_tok_per_s == pytest.approx(5.0)
    assert summarize_probe([usage_of(16, 3000.0), usage_of(1, 9.0)]).decode_tok_per_s == pytest.approx(5.0)
    assert summarize_probe([usage_of(16, 3000.0, prompt_ms=0.0)]).prefill_tok_per_s is None


def test_a_model_that_says_nothing_has_no_speed():
    with pytest.raises(EngineError, match="at once"):
        summarize_probe([usage_of(0, 0.0), usage_of(1, 10.0)])


def test_a_probe_writes_fifty_tokens_after_one_prompt():
    async def check():
        engine = ScriptedEngine()
        result = await probe_engine_speed(engine, RequestWatch(), AdmissionQueue(1, 0))
        assert [request.max_tokens for request in engine.requests] == [16, 34]
        assert len({request.prompt for request in engine.requests}) == 1
        assert (result.completion_tokens, engine.running) == (50, 0)
        assert result.decode_tok_per_s == pytest.approx(33 / 0.34) and result.prefill_tok_per_s == pytest.approx(100)
        await probe_engine_speed(engine, RequestWatch(), AdmissionQueue(1, 0))
        assert len({request.prompt for request in engine.requests}) == 2  # the next probe finds nothing in the cache

    run(check())


def test_a_model_that_stops_early_is_asked_again_but_not_for_ever():
    async def check():
        engine = ScriptedEngine(ends_after=5)
        result = await probe_engine_speed(engine, RequestWatch(), AdmissionQueue(1, 0))
        assert len(engine.requests) == dvai_bridge.PROBE_RUNS_LIMIT
        assert result.decode_tok_per_s == pytest.approx(4 / 0.05)
        with pytest.raises(EngineError):
            await probe_engine_speed(ScriptedEngine(ends_after=0), RequestWatch(), AdmissionQueue(1, 0))

    run(check())


def test_an_engine_without_times_is_timed_by_its_events():
    async def check():
        engine = ScriptedEngine(ms_per_token=0.0)
        usage = await measure_generation(engine, 20, "p")
        assert usage.completion_tokens == 20 and usage.predicted_ms > 0 and usage.prompt_ms > 0

    run(check())


def test_a_measured_score():
    key = ScoreKey(model_id="m", engine="builtin", quantization="Q8_0")
    score = build_measured_score(key, "d", summarize_probe([usage_of(16, 3000.0)]), 7)
    assert (score.model_id, score.device_id, score.source, score.measured_at_ms) == ("m", "d", ScoreSource.MEASURED, 7)
    assert score.tok_per_s == pytest.approx(5.0) and score.library_version == dvai_bridge.__version__


# ---- giving way -----------------------------------------------------------------------


async def serve(engine, watch, queue, began):
    """A request as the routes run it."""
    async with queue.place():
        ticket = watch.enter()
        try:
            began.set()
            async with contextlib.aclosing(engine.generate(GenerationRequest(prompt="r", max_tokens=5))) as events:
                async for _ in events:
                    pass
        finally:
            watch.leave(ticket)


@pytest.mark.parametrize("slots", [1, 2])
def test_a_request_in_the_middle_is_served_first(slots):
    """With one slot it waits in the queue, with two it runs beside the probe; either way the probe starts again."""

    async def check():
        engine, watch, queue = ScriptedEngine(), RequestWatch(), AdmissionQueue(slots, 8)
        engine.gate.clear()
        probe = asyncio.create_task(probe_engine_speed(engine, watch, queue))
        await engine.began.wait()
        began = asyncio.Event()
        request = asyncio.create_task(serve(engine, watch, queue, began))
        if slots == 1:
            for _ in range(5):
                await asyncio.sleep(0)
            assert queue.waiting == 1
        else:
            await began.wait()
        engine.gate.set()
        await request
        result = await probe
        order = ["probe" if r.max_tokens != 5 else "request" for r in engine.requests]
        assert order == ["probe", "request", "probe", "probe"] and result.completion_tokens == 50
        assert (queue.running, queue.waiting, engine.running) == (0, 0, 0)

    run(check())


def test_a_probe_waits_until_the_engine_is_idle():
    async def check():
        engine, watch, queue = ScriptedEngine(), RequestWatch(), AdmissionQueue(2, 8)
        ticket = watch.enter()
        probe = asyncio.create_task(probe_engine_speed(engine, watch, queue))
        for _ in range(20):
            await asyncio.sleep(0)
        assert engine.requests == []
        watch.leave(ticket)
        assert (await probe).completion_tokens == 50

    run(check())


def test_a_probe_that_finds_no_moment_says_so():
    async def check():
        watch = RequestWatch()
        watch.enter()
        with pytest.raises(GatewayTimeoutError, match="busy"):
            await probe_engine_speed(ScriptedEngine(), watch, AdmissionQueue(1, 1), timeout_s=0.01)

    run(check())


def test_a_full_queue_is_not_joined():
    async def check():
        queue, leave = AdmissionQueue(1, 0), asyncio.Event()

        async def hold():
            async with queue.place():
                await leave.wait()

        holding = asyncio.create_task(hold())
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await probe_engine_speed(ScriptedEngine(), RequestWatch(), queue)
        leave.set()
        await holding

    run(check())


def test_cancelling_a_probe_ends_its_generation():
    async def check():
        engine, watch, queue = ScriptedEngine(), RequestWatch(), AdmissionQueue(1, 8)
        engine.gate.clear()
        probe = asyncio.create_task(probe_engine_speed(engine, watch, queue))
        await engine.began.wait()
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        assert (engine.running, queue.running) == (0, 0)
        await watch.wait_idle()

    run(check())


def test_an_engine_that_fails_fails_the_probe():
    class FailingEngine(ScriptedEngine):
        async def generate(self, request):
            raise EngineError("it died")
            yield

    async def check():
        watch, queue = RequestWatch(), AdmissionQueue(1, 0)
        with pytest.raises(EngineError, match="died"):
            await probe_engine_speed(FailingEngine(), watch, queue)
        await watch.wait_idle()
        assert queue.running == 0

    run(check())


# ---- what a bridge knows of its own speed ----------------------------------------------

KEY = ScoreKey(model_id="m", engine="builtin", quantization="Q8_0")
COST = ModelCost(n_params=1_000_000, bytes_per_token=1_000_000)


@contextlib.asynccontextmanager
async def start_meter(tmp_path):
    meter = CapabilityMeter(ScoreCache(tmp_path / "capability.json"), "me", clock=lambda: 5.0)
    await meter.start()
    try:
        yield meter
    finally:
        await meter.close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "BANDWIDTH_BUFFER_BYTES", 1 << 20)


def test_a_meter_goes_from_the_heuristic_to_the_estimate_to_the_measurement(tmp_path, quick):
    async def check():
        async with start_meter(tmp_path) as meter:
            assert meter.get_score(KEY).source is ScoreSource.HEURISTIC and meter.list_scores() == ()
            assert meter.get_score(KEY, COST).source is ScoreSource.ESTIMATE
            score = await meter.probe(ScriptedEngine(), KEY, RequestWatch(), AdmissionQueue(1, 0))
            assert meter.get_score(KEY, COST) == score and meter.list_scores() == (score,)
            assert (score.source, score.device_id, score.measured_at_ms) == (ScoreSource.MEASURED, "me", 5000)
        async with start_meter(tmp_path) as meter:
            assert meter.get_score(KEY, COST).source is ScoreSource.MEASURED

    run(check())


def test_a_model_is_measured_once(tmp_path, quick):
    async def check():
        engine, watch, queue = ScriptedEngine(), RequestWatch(), AdmissionQueue(2, 8)
        async with start_meter(tmp_path) as meter:
            meter.probe_on_first_use(engine, KEY, watch, queue)
            meter.probe_on_first_use(engine, KEY, watch, queue)
            scores = await asyncio.gather(*(meter.probe(engine, KEY, watch, queue) for _ in range(3)))
            assert len(set(map(id, scores))) == 1 and len(engine.requests) == 2
            meter.probe_on_first_use(engine, KEY, watch, queue)
            assert len(engine.requests) == 2
            await meter.probe(engine, KEY, watch, queue)  # who asks for it gets a new one
            assert len(engine.requests) == 4

    run(check())


def test_a_meter_learns_from_traffic(tmp_path, quick):
    async def check():
        async with start_meter(tmp_path) as meter:
            meter.observe(KEY, usage_of(21, 1000.0))
            meter.observe(KEY, usage_of(3, 1.0))
            assert meter.get_score(KEY).tok_per_s == pytest.approx(20.0)
        async with start_meter(tmp_path) as meter:
            assert meter.get_score(KEY).tok_per_s == pytest.approx(20.0)

    run(check())


def test_a_probe_goes_on_without_who_asked_and_ends_with_the_meter(tmp_path, quick):
    async def check():
        engine, watch, queue = ScriptedEngine(), RequestWatch(), AdmissionQueue(1, 8)
        engine.gate.clear()
        async with start_meter(tmp_path) as meter:
            asking = asyncio.create_task(meter.probe(engine, KEY, watch, queue))
            await engine.began.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            assert engine.running == 1
        assert (engine.running, queue.running) == (0, 0)

    run(check())


def test_a_failed_background_probe_is_one_line(tmp_path, quick, caplog):
    async def check():
        async with start_meter(tmp_path) as meter:
            queue = AdmissionQueue(1, 0)
            meter.probe_on_first_use(ScriptedEngine(ends_after=0), KEY, RequestWatch(), queue)
            with pytest.raises(EngineError):
                await meter.probe(ScriptedEngine(), KEY, RequestWatch(), queue)
            await meter.probe(ScriptedEngine(), KEY, RequestWatch(), queue)  # the failure is not kept

    run(check())
    assert [record.message for record in caplog.records].count(
        "m was not measured: the model ends its answers at once: its speed cannot be measured"
    ) == 1


# ---- a real engine process ------------------------------------------------------------


def test_a_real_engine_is_measured(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build_byte_model())

    async def check():
        async with start_engine(path, slots=1) as engine:
            queue = AdmissionQueue(1, 8)
            result = await probe_engine_speed(engine, RequestWatch(), queue)
            assert result.decode_tok_per_s > 0 and result.prefill_tok_per_s > 0
            assert 2 <= result.completion_tokens <= dvai_bridge.PROBE_TOKENS
            assert (await measure_generation(engine, 4, "afterwards")).completion_tokens <= 4

    run(check())
