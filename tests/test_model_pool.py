"""Section Model pool: whom the decision displaces, and real engine processes that come and go."""

import asyncio
import contextlib
import functools
import math
import os
import signal
from pathlib import Path

import pytest

from dvai_bridge import (
    FAILED_LOAD_KEPT_S,
    EngineProcess,
    EngineUnavailableError,
    Finished,
    GenerationRequest,
    LoadRequest,
    MemoryInfo,
    ModelFileError,
    ModelLoadError,
    ModelNotFoundError,
    ModelPool,
    ModelState,
    Occupant,
    RoomStep,
    UseTerms,
    choose_room,
)
from tests.support_worker import build_byte_model, build_command

OWNER = UseTerms()
STRANGER = UseTerms(may_load=False)
PLENTY = 1 << 50


# The decision


def occupant(model_id, *, state=ModelState.LOADED, users=0, used=0.0, needs=10):
    return Occupant(model_id=model_id, state=state, users=users, last_used_s=used, needed_bytes=needs)


LOADING, ENDING = ModelState.LOADING, ModelState.ENDING


@pytest.mark.parametrize(
    ("occupants", "limit", "needs", "free", "step", "whom"),
    [
        ([], 1, 10, 5, RoomStep.LOAD, None),  # its own process says why it does not fit
        ([occupant("a")], 2, 10, 10, RoomStep.LOAD, None),
        ([occupant("a")], 0, 10, 10, RoomStep.LOAD, None),
        ([occupant("a")], 2, 10, None, RoomStep.LOAD, None),
        ([occupant("a")], 1, 10, PLENTY, RoomStep.END, "a"),
        ([occupant("a", users=3)], 1, 10, PLENTY, RoomStep.END, "a"),  # once they have left
        ([occupant("a", used=2), occupant("b", used=1)], 2, 10, PLENTY, RoomStep.END, "b"),
        ([occupant("a", used=2), occupant("b", used=1, users=1)], 2, 10, PLENTY, RoomStep.END, "a"),
        ([occupant("a", used=2, users=1), occupant("b", used=1, users=1)], 2, 10, PLENTY, RoomStep.END, "b"),
        ([occupant("a", used=1, state=LOADING), occupant("b", used=2)], 2, 10, PLENTY, RoomStep.END, "a"),
        ([occupant("a", state=ENDING), occupant("b")], 2, 10, PLENTY, RoomStep.WAIT, None),
        ([occupant("a", state=ENDING), occupant("b")], 3, 10, PLENTY, RoomStep.LOAD, None),
        # Memory
        ([occupant("a")], 0, 10, 9, RoomStep.END, "a"),
        ([occupant("a", users=1)], 0, 10, 9, RoomStep.END, "a"),
        ([occupant("a", state=ENDING)], 0, 10, 9, RoomStep.WAIT, None),
        ([occupant("a")], 0, 21, 10, RoomStep.REFUSE, None),
        ([occupant("a")], 0, 20, 10, RoomStep.END, "a"),
        ([occupant("a")], 1, 21, 10, RoomStep.REFUSE, None),  # in vain: nobody is ended for it
        ([occupant("a", state=LOADING, users=1, needs=30)], 0, 10, 39, RoomStep.END, "a"),  # of it, 30 are promised
        ([occupant("a", state=LOADING, users=1, needs=30)], 0, 10, 40, RoomStep.LOAD, None),
    ],
)
def test_room(occupants, limit, needs, free, step, whom):
    decision = choose_room(occupants, limit, needs, MemoryInfo(free_bytes=free, limit_source="free memory"))
    assert (decision.step, decision.model_id) == (step, whom)
    assert bool(decision.reason) == (step in (RoomStep.END, RoomStep.REFUSE))


def test_the_refusal_says_how_much_is_missing():
    memory = MemoryInfo(free_bytes=10_000_000, limit_source="free memory")
    decision = choose_room([occupant("a", needs=5_000_000)], 0, 90_000_000, memory)
    assert "90 MB" in decision.reason and "15 MB" in decision.reason


# Real engines


class Clock:
    """Stands still until it is turned."""

    now_s = 1000.0

    def __call__(self):
        self.now_s += 1e-6  # never the same twice: what is older stays told apart
        return self.now_s


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models and a damaged one."""
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "c"), 1):
        (directory / f"{name}.gguf").write_bytes(build_byte_model(seed=seed))
    whole = (directory / "a.gguf").read_bytes()
    (directory / "damaged.gguf").write_bytes(whole[: len(whole) // 2])
    return directory


@contextlib.asynccontextmanager
async def start_pool(directory, *names, free_bytes=None, **options):
    """(pool, its engines); all ended on leaving."""
    options.setdefault("estimate", lambda load: 10)
    pool = ModelPool(
        build_process=functools.partial(EngineProcess, command=build_command(), restart_delay_s=0.01),
        probe_memory=lambda: MemoryInfo(free_bytes=free_bytes, limit_source="free memory"),
        **options,
    )
    engines = [pool.add(name, LoadRequest(model=str(directory / f"{name}.gguf"))) for name in names]
    pool.start()
    try:
        yield pool, *engines
    finally:
        await pool.close()
        assert all(engine.pid is None for engine in pool.engines)


async def until(condition, what):
    """Poll until `condition()` is true."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.005)
    assert condition(), what


async def write(engine, terms=OWNER):
    """The number of tokens of a short answer."""
    async with engine.use(terms) as (process, _):
        request = GenerationRequest(prompt="hi", max_tokens=2)
        return [event async for event in process.generate(request) if isinstance(event, Finished)]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(test):
    asyncio.run(asyncio.wait_for(test(), 120))


def test_a_model_is_loaded_by_its_first_user_once_for_all(models):
    async def test():
        async with start_pool(models, "a", limit=1) as (_, a):
            assert (a.state, a.pid, a.info) == (ModelState.UNLOADED, None, None)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(write(a)) for _ in range(5)]
            assert all(len(task.result()) == 1 for task in tasks)
            assert a.state is ModelState.LOADED and a.users == 0 and a.info.engine == "builtin" and a.progress == 1.0
            pid = a.pid
            assert await write(a) and a.pid == pid

    run(test)


def test_the_one_that_was_used_longest_ago_makes_room(models):
    async def test():
        async with start_pool(models, "a", "b", "c", limit=2) as (_, a, b, c):
            await write(a)
            await write(b)
            await write(a)
            pid = b.pid
            await write(c)
            assert [each.state.value for each in (a, b, c)] == ["loaded", "unloaded", "loaded"]
            assert not is_running(pid) and b.info is not None
            await write(b)
            assert [each.state.value for each in (a, b, c)] == ["unloaded", "loaded", "loaded"]

    run(test)


def test_a_model_in_use_finishes_and_those_who_come_later_wait_for_their_turn(models):
    async def test():
        order = []

        async def use(engine):
            async with engine.use(OWNER):
                order.append(engine.model_id)

        async with start_pool(models, "a", "b", limit=1) as (_, a, b):
            async with a.use(OWNER) as (process, _):
                other = asyncio.create_task(use(b))
                await until(lambda: a.is_leaving, "a is to give way")
                again = asyncio.create_task(use(a))
                await asyncio.sleep(0)
                assert a.users == 1 and b.state is ModelState.UNLOADED
                assert [event async for event in process.generate(GenerationRequest(prompt="x", max_tokens=1))]
            await asyncio.gather(other, again)
            assert order == ["b", "a"] and a.state is ModelState.LOADED and b.state is ModelState.UNLOADED

    run(test)


def test_who_gives_up_waiting_for_room_displaces_nobody(models):
    async def test():
        async with start_pool(models, "a", "b", limit=1) as (_, a, b):
            async with a.use(OWNER):
                waiting = asyncio.create_task(write(b))
                await until(lambda: a.is_leaving, "a is to give way")
                waiting.cancel()
                await asyncio.wait([waiting])
                assert not a.is_leaving and await write(a)
            assert a.state is ModelState.LOADED and b.state is ModelState.UNLOADED
            assert await write(b)

    run(test)


def test_a_load_goes_on_when_its_user_leaves(models):
    async def test():
        async with start_pool(models, "a", limit=1) as (_, a):
            waiting = asyncio.create_task(write(a))
            await until(lambda: a.state is ModelState.LOADING, "a loads")
            waiting.cancel()
            await asyncio.wait([waiting])
            assert a.users == 0
            await until(lambda: a.state is ModelState.LOADED, "a is loaded")

    run(test)


def test_a_model_that_cannot_be_loaded_harms_no_other(models, tmp_path):
    async def test():
        clock = Clock()
        async with start_pool(models, "a", "damaged", limit=1, clock=clock) as (pool, a, damaged):
            with pytest.raises(ModelLoadError, match=r"'damaged' cannot be loaded: .*damaged or incomplete"):
                await write(damaged)
            assert damaged.state is ModelState.FAILED
            await until(lambda: damaged.pid is None, "its process ends")
            with pytest.raises(ModelFileError):
                await damaged.ready()
            assert await write(a) and damaged.state is ModelState.FAILED
            late = tmp_path / "late.gguf"
            late.write_bytes(b"GGUF")
            mended = pool.add("late", LoadRequest(model=str(late)))
            with pytest.raises(ModelLoadError):
                await write(mended)
            await until(lambda: mended.pid is None, "its process ends")
            late.write_bytes((models / "b.gguf").read_bytes())
            with pytest.raises(ModelLoadError):
                await write(mended)
            clock.now_s += FAILED_LOAD_KEPT_S
            assert await write(mended)

    run(test)


def test_a_file_that_is_no_good_is_refused_before_anybody_is_ended_for_it(models):
    def estimate(load):
        if "damaged" in load.model:
            raise ModelFileError("no good")
        return 10

    async def test():
        async with start_pool(models, "a", "damaged", limit=1, estimate=estimate) as (_, a, damaged):
            await write(a)
            with pytest.raises(ModelLoadError, match="no good"):
                await write(damaged)
            assert a.state is ModelState.LOADED and damaged.state is ModelState.UNLOADED

    run(test)


def test_memory_decides_where_the_number_does_not(models):
    needs = {"a.gguf": 10, "b.gguf": 20, "c.gguf": 40}

    async def test():
        estimate = lambda load: needs[Path(load.model).name]  # noqa: E731
        async with start_pool(models, "a", "b", "c", free_bytes=15, estimate=estimate) as (_, a, b, c):
            await write(a)
            await write(b)
            assert [each.state.value for each in (a, b)] == ["unloaded", "loaded"]
            with pytest.raises(ModelLoadError, match="even with all others unloaded"):
                await write(c)
            assert b.state is ModelState.LOADED

    run(test)


def test_an_idle_model_sleeps_and_wakes(models):
    async def test():
        async with start_pool(models, "a", limit=1) as (_, a):
            await write(a)
            pid = a.pid
            await write(a, UseTerms(keep_alive_s=0.0))
            await until(lambda: a.state is ModelState.SLEEPING, "a sleeps")
            assert not is_running(pid)
            await write(a)
            assert a.state is ModelState.LOADED, "what a request said is over when the model is loaded again"
            await write(a, UseTerms(keep_alive_s=math.inf))
            assert a.keep_alive_s == math.inf and a.state is ModelState.LOADED

    run(test)


def test_a_model_sleeps_when_its_time_has_passed_and_not_before(models):
    async def test():
        clock = Clock()
        async with start_pool(models, "a", "b", keep_alive_s=300.0, clock=clock) as (_, a, b):
            await write(a)
            clock.now_s += 200
            await write(b)
            clock.now_s += 150
            async with b.use(OWNER):  # the pool looks anew when somebody comes or goes
                pass
            await until(lambda: a.state is ModelState.SLEEPING, "a sleeps")
            assert b.state is ModelState.LOADED

    run(test)


def test_another_device_has_nothing_loaded_and_displaces_nobody(models):
    async def test():
        async with start_pool(models, "a", "b", limit=1) as (_, a, b):
            with pytest.raises(ModelNotFoundError, match="not loaded"):
                await write(a, STRANGER)
            await write(a)
            assert await write(a, UseTerms(may_load=False, keep_alive_s=0.0)) and a.keep_alive_s == math.inf
            await write(a, UseTerms(keep_alive_s=0.0))
            await until(lambda: a.state is ModelState.SLEEPING, "a sleeps")
            assert await write(a, STRANGER), "what its owner had loaded it may wake"
            await write(a, UseTerms(keep_alive_s=0.0))
            await until(lambda: a.state is ModelState.SLEEPING, "a sleeps")
            await write(b)
            with pytest.raises(EngineUnavailableError) as refused:
                await write(a, STRANGER)
            assert refused.value.retry_after_s and b.state is ModelState.LOADED

    run(test)


def test_a_stopped_model_is_back_when_its_owner_says_so(models):
    async def test():
        async with start_pool(models, "a") as (pool, a):
            await write(a)
            await pool.stop(a)
            assert a.state is ModelState.STOPPED and a.pid is None
            for terms in (OWNER, STRANGER):
                with pytest.raises(EngineUnavailableError):
                    await write(a, terms)
            pool.resume(a)
            assert await write(a)

    run(test)


def test_closing_ends_everybody_who_waits(models):
    async def test():
        before = asyncio.all_tasks()
        async with start_pool(models, "a", "b", limit=1) as (pool, a, b):
            await write(a)
            held = asyncio.Event()

            async def hold():
                async with a.use(OWNER):
                    held.set()
                    await asyncio.Event().wait()

            holder = asyncio.create_task(hold())
            await held.wait()
            waiting = asyncio.create_task(write(b))
            await until(lambda: a.is_leaving, "a is to give way")
            await pool.close()
            with pytest.raises(EngineUnavailableError):
                await waiting
            holder.cancel()
            await asyncio.wait([holder])
            assert asyncio.all_tasks() <= before

    run(test)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX file modes, links and signals")
def test_a_process_that_dies_is_started_again(models):
    async def test():
        async with start_pool(models, "a") as (_, a):
            await write(a)
            pid = a.pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: a.pid not in (None, pid), "another process")
            assert await write(a) and a.state is ModelState.LOADED

    run(test)


def test_each_state_can_be_told_from_the_engine_process(models):
    async def test():
        async with start_pool(models, "a") as (_, a):
            seen = {a.state}
            task = asyncio.create_task(write(a, UseTerms(keep_alive_s=0.0)))
            while a.state is not ModelState.SLEEPING:
                seen.add(a.state)
                await asyncio.sleep(0)
            await task
            assert seen >= {ModelState.UNLOADED, ModelState.LOADING, ModelState.LOADED, ModelState.ENDING}

    run(test)
