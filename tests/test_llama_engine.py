"""The llama engine: real llama.cpp on tiny random models, beside the built-in engine and llama.cpp's own classes."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import statistics
import threading
from dataclasses import replace
from types import SimpleNamespace

import openai
import pytest

from dvai_bridge import (
    ChatMessage,
    ChatTemplate,
    ContextLengthError,
    Embedded,
    EmbeddingRequest,
    EngineError,
    EngineState,
    Failed,
    Finished,
    GenerationRequest,
    InvalidRequestError,
    LlamaBackend,
    LlamaModel,
    LoadRequest,
    MemoryInfo,
    ModelFileError,
    PrefillProgress,
    PromptEncoder,
    Sampler,
    SamplingParams,
    SliceBudget,
    StepKind,
    StepPace,
    TextDelta,
    UnreadPrompt,
    UsageError,
    choose_llama_n_ctx,
    choose_slices,
    estimate_llama_memory_bytes,
    explain_llama_obstacle,
    fold_seed,
    import_llama,
    load_builtin_backend,
    load_builtin_model,
    load_llama_backend,
    measure_model_files,
    open_gguf,
    order_steps,
    verify_rpc_server,
    warm_up,
)
from tests.gguf_writer import F32, TEXT, U32, Array
from tests.support import require, start_bridge, wait_for
from tests.support_worker import END_ID, N_CTX, PIECES, build_byte_model, start_engine
from tests.test_worker import asynchronous

SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
NO_END = {END_ID: -100.0}
GREEDY = SamplingParams(temperature=0.0, logit_bias=NO_END)
VARIED = SamplingParams(temperature=0.0, logit_bias=NO_END, frequency_penalty=0.7, presence_penalty=0.3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-bytes.gguf"
    path.write_bytes(build_byte_model())
    return path


def load_llama(path, **load):
    require("llama_cpp")
    return load_llama_backend(LoadRequest(engine="llama", model=str(path), **load), str(path), lambda fraction: None)


@pytest.fixture
def backend(model):
    loaded = load_llama(model, slots=4)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def builtin(model):
    loaded = load_builtin_backend(LoadRequest(slots=4), str(model), lambda fraction: None)
    yield loaded
    loaded.close()


# Prompts after which the best token leads by 0.04 or more, each time: what is computed in other company, or in other
# slices, is rounded a little differently.
SURE = (0, 2, 3, 8, 14, 19, 21, 22)


def build_prompt(number, length=40):
    """Token ids that no two prompts begin alike with."""
    return tuple(3 + (number * 89 + index * (7 + 2 * number)) % 256 for index in range(length))


def request(prompt="a prompt of thirty bytes, about", *, sampling=GREEDY, max_tokens=24, **fields):
    return GenerationRequest(prompt=prompt, sampling=sampling, max_tokens=max_tokens, **fields)


def finish(backend, jobs):
    """The events of submitted jobs, until each has its last one; those of other jobs are dropped."""
    events = {job: [] for job in jobs}
    while not all(each and isinstance(each[-1], Finished | Embedded | Failed) for each in events.values()):
        for job, event in backend.step():
            events.get(job, []).append(event)
    return [events[job] for job in jobs]


def run(backend, *requests):
    """The events of each request, all submitted at once."""
    jobs = range(1000, 1000 + len(requests))
    for job, each in zip(jobs, requests, strict=True):
        backend.submit(job, each)
    return finish(backend, jobs)


def read_text(events):
    assert isinstance(events[-1], Finished), events[-1]
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def read_tokens(events):
    return [entry.token_id for event in events if isinstance(event, TextDelta) for entry in event.logprobs]


def write_without_cache(backend, asked):
    """The text of a request for a tenant who has computed nothing yet."""
    return read_text(run(backend, replace(asked, tenant="somebody else"))[0])


# Decisions, without llama.cpp


def unread(missing, token_ms=1.0, is_begun=False):
    return UnreadPrompt(missing=missing, token_s=token_ms / 1000, is_begun=is_begun)


def budget(steady_ms, burst_ms, *, fixed_ms=0, floor=1):
    return SliceBudget(fixed_s=fixed_ms / 1000, steady_s=steady_ms / 1000, burst_s=burst_ms / 1000, floor=floor)


@pytest.mark.parametrize(
    ("prompts", "given", "slices"),
    [
        ([unread(10)], budget(100.5, 100.5), [10]),
        ([unread(1000)], budget(100.5, 100.5), [100]),
        ([unread(1000)], budget(110.5, 110.5, fixed_ms=40), [70]),
        ([unread(1000, 4.0)], budget(100.5, 100.5), [25]),
        ([unread(1000)], budget(6.5, 20.5), [6]),
        ([unread(15)], budget(6.5, 20.5), [15]),
        ([unread(15)], budget(6.5, 20.5, fixed_ms=5.7), [1]),  # the time for the weights counts
        ([unread(15, is_begun=True)], budget(6.5, 20.5), [6]),  # the end of a long prompt is no short prompt
        ([unread(1000), unread(15)], budget(6.5, 20.5), [1, 15]),
        ([unread(1000), unread(15), unread(4)], budget(20.5, 20.5), [1, 15, 4]),
        ([unread(1000), unread(15), unread(4, 5.0)], budget(20.5, 20.5), [5, 15, 0]),  # cheaper ones before shorter
        ([unread(1000), unread(2000)], budget(30.5, 60.5), [30, 0]),
        ([unread(1000), unread(20)], budget(30.5, 60.5).without_long(), [0, 20]),
        ([unread(1000)], budget(30.5, 60.5, floor=8).without_long(), [0]),
        ([unread(50), unread(20), unread(30)], budget(10.5, 60.5), [1, 20, 30]),
        ([unread(1000)], budget(0, 0), [1]),
        ([unread(1000)], budget(0, 0, fixed_ms=9, floor=8), [8]),
        ([unread(5)], budget(0, 0, floor=8), [5]),
        ([unread(1000)], budget(40.5, 40.5), [64]),  # half of a long slice takes as long as all of it
        ([unread(1000)], budget(31.5, 31.5), [31]),
        ([unread(50)], budget(40.5, 40.5), [50]),
        ([unread(1000)], budget(9000, 9000), [512]),
        ([unread(1000, 0.0)], budget(9000, 9000), [512]),  # nothing is known
        ([unread(512)], budget(9000, 9000), [512]),
        ([unread(1000), unread(300), unread(212)], budget(9000, 9000), [300, 0, 212]),
        ([], budget(10.5, 20.5), []),
    ],
)
def test_short_prompts_go_first_and_the_oldest_never_starves(prompts, given, slices):
    assert choose_slices(prompts, given, 512) == slices


def learn(pace, times=40, **measured):
    for _ in range(times):
        for name, arguments in measured.items():
            getattr(pace, name)(*arguments)
    return pace


def test_the_pace_of_writing_is_that_of_the_nearest_number_of_writers():
    pace = StepPace()
    assert pace.choose_budget(3) == budget(400, 0, floor=8)  # nothing is known
    learn(pace, learn_writing=(1, 0.010))
    learn(pace, learn_writing=(4, 0.020))
    assert pace.fixed_s == pytest.approx(0.005)
    for writers, usual_s in ((1, 0.010), (2, 0.010), (3, 0.020), (8, 0.020)):
        chosen = pace.choose_budget(writers)
        assert (chosen.steady_s, chosen.burst_s) == (0.4, pytest.approx(8 * usual_s))
        assert pace.choose_spacing(writers) == pytest.approx(3 * usual_s)
    assert pace.choose_budget(0) == SliceBudget(fixed_s=pace.fixed_s, steady_s=0.4, burst_s=0.4, floor=8)
    learn(pace, learn_writing=(1, 1.0))
    assert pace.choose_budget(1).burst_s == 0.4  # or nobody could leave in time


def test_what_is_usual_is_what_was_so_before_the_prompts_came():
    pace = learn(StepPace(), learn_writing=(1, 0.010))
    for _ in range(40):
        pace.learn_writing(1, 0.015, is_usual=False)  # it grew longer
    assert pace.estimate_writing(1) == pytest.approx((0.015, 0.010), rel=0.01)
    for _ in range(40):
        pace.learn_writing(1, 0.050, is_usual=False)  # the machine became slower
    assert pace.estimate_writing(1) == pytest.approx((0.050, 0.025), rel=0.01)
    learn(pace, learn_writing=(1, 0.050))
    assert pace.estimate_writing(1) == pytest.approx((0.050, 0.050), rel=0.01)


def test_what_a_slice_takes_whatever_its_length_is_learnt_as_a_share_of_writing():
    pace = learn(StepPace(), learn_writing=(1, 0.010))
    pace.learn_fixed(0.012)
    assert pace.fixed_s == pytest.approx(0.012)
    learn(pace, learn_writing=(1, 0.020))  # the machine became slower
    assert pace.fixed_s == pytest.approx(0.024, rel=0.01)
    pace.learn_fixed(-1.0)  # a slice of two was held up
    assert pace.fixed_s == pytest.approx(0.005, rel=0.01)
    pace.learn_fixed(60.0)
    assert pace.fixed_s == pytest.approx(0.040, rel=0.01)
    pace.learn_fixed(0.020)
    learn(pace, learn_reading=(4, 100, 0.032))
    assert pace.estimate_token(4, 0) == pytest.approx(0.003, rel=0.01)


def test_a_deeper_token_is_estimated_by_what_was_measured_and_rather_too_high():
    pace = learn(StepPace(), learn_writing=(1, 0.010))
    assert pace.estimate_token(10, 0) == pace.estimate_token(10, 5000) == pytest.approx(0.005)  # half of writing one
    learn(pace, learn_reading=(10, 100, 0.025))  # five of these are for the weights
    assert pace.estimate_token(10, 0) == pace.estimate_token(10, 255) == pytest.approx(0.002)
    assert [pace.estimate_token(10, depth) for depth in (256, 511, 512, 1024)] == pytest.approx(
        [0.004, 0.004, 0.008, 0.016]
    )
    learn(pace, learn_reading=(2, 1500, 0.015))
    assert pace.estimate_token(10, 100) == pytest.approx(0.002)
    assert pace.estimate_token(10, 600) == pace.estimate_token(3, 2000) == pytest.approx(0.005)  # as the deeper at most


def test_short_slices_tell_little_of_long_ones():
    pace = learn(StepPace(), learn_writing=(1, 0.010), learn_reading=(1, 1500, 0.015))
    assert pace.estimate_token(64, 1500) == pytest.approx(0.010)  # until a long one was measured
    learn(pace, learn_reading=(100, 1500, 0.405))
    assert pace.estimate_token(64, 1500) == pytest.approx(0.004)
    assert pace.estimate_token(63, 1500) == pytest.approx(0.010)


def test_one_step_that_was_held_up_changes_the_pace_little():
    pace = learn(StepPace(), learn_writing=(1, 0.010), learn_reading=(100, 50, 0.2))
    known_s = pace.estimate_token(100, 0)
    pace.learn_reading(100, 0, 60.0)
    pace.learn_writing(1, 60.0)
    assert pace.estimate_token(100, 0) <= 1.21 * known_s
    assert pace.choose_spacing(1) <= 0.030 * 1.21


@pytest.mark.parametrize(
    ("waiting", "order"),
    [
        ("W", "WWWW"),
        ("R", "RRRR"),
        ("WR", "RWRWRW"),
        ("WE", "EWEWEW"),
        ("RE", "RERERE"),
        ("WRE", "RWEWRWEW"),
    ],
)
def test_who_writes_waits_for_one_other_step_at_most(waiting, order):
    kinds = {"W": StepKind.WRITE, "R": StepKind.READ, "E": StepKind.EMBED}
    recent = [StepKind.READ, StepKind.EMBED, StepKind.WRITE]
    for letter in order:
        kind = order_steps(recent, [kinds[each] for each in waiting])[0]
        assert kind is kinds[letter]
        recent.remove(kind)
        recent.append(kind)


def test_who_writes_goes_on_where_no_other_step_can_be_taken():
    recent = [StepKind.READ, StepKind.EMBED, StepKind.WRITE]
    assert order_steps(recent, list(StepKind)) == recent
    assert order_steps([StepKind.WRITE, StepKind.EMBED, StepKind.READ], list(StepKind)) == [StepKind.WRITE]
    assert order_steps(recent, []) == []


class TimedContext:
    """Stands for llama.cpp: computes nothing, and takes as long as it takes with a 135M-class model on two cores."""

    def __init__(self):
        self.now_s = 0.0
        self.slices = []

    def compute(self, runs):
        counts = [len(tokens) for tokens, *_ in runs]
        for tokens, position, *_ in runs:
            attention_s = 2.5e-6 if len(tokens) >= 64 else 7.5e-6
            self.now_s += len(tokens) * (0.0025 + attention_s * (position + len(tokens) / 2))
        self.now_s += 0.006
        self.slices += [count for count in counts if count > 1]
        return [sum(counts[: index + 1]) - 1 for index in range(len(counts))]

    def build_sampler(self, *_):
        return None

    def sample(self, sampler, row):
        return 65

    def compute_logprobs(self, row, token, count):
        raise NotImplementedError

    def remove(self, sequence, start):
        return True

    def free_sampler(self, sampler):
        pass


def build_timed_backend(slots=8):
    context = TimedContext()
    tokenizer = SimpleNamespace(
        n_vocab=256, end_of_generation_ids=frozenset(), token_bytes=lambda token, special=False: bytes([token])
    )
    template = ChatTemplate("none", lambda conversation: [])
    encoder = PromptEncoder(tokenizer=tokenizer, template=template, n_ctx=8192, token_limit_bytes=1)
    model = LlamaModel(
        context=context,
        encoder=encoder,
        pooling=0,
        batch_size=512,
        clock=lambda: context.now_s,
        draw_seed=lambda: 0,
    )
    info = SimpleNamespace(slots=slots, n_vocab=256)
    backend = LlamaBackend(info, model)
    warm_up(backend, replace(model, encoder=replace(encoder, tokenizer=SimpleNamespace(bos_id=1))))
    return backend, context


def step_timed(backend, context, shown):
    """One step; notes when each job's text is to be shown. The jobs that ended."""
    ended = set()
    for job, event in backend.step():
        if isinstance(event, TextDelta):
            times = shown.setdefault(job, [])
            times.append(max(context.now_s + event.hold_s, times[-1] if times else 0.0))
        elif isinstance(event, Finished):
            ended.add(job)
    return ended


def list_gaps(times, start_s, end_s):
    return sorted(after - before for before, after in itertools.pairwise(times) if start_s <= after <= end_s)


@pytest.mark.parametrize("writers", [1, 4])
def test_streams_stay_even_while_a_long_prompt_is_read_in_long_slices(writers):
    backend, context = build_timed_backend()
    shown = {}
    for job in range(writers):
        backend.submit(job, request((1 + job,) * 16, max_tokens=4000))
    for _ in range(80):
        step_timed(backend, context, shown)
    usual_s = shown[0][-1] - shown[0][-2]
    start_s, context.slices = context.now_s, []
    backend.submit(99, request((9,) * 2000, max_tokens=1))
    while 99 not in step_timed(backend, context, shown):
        pass
    end_s = context.now_s
    for job in range(writers):
        gaps = list_gaps(shown[job], start_s, end_s)
        assert gaps[int(0.99 * (len(gaps) - 1))] <= 4 * usual_s and gaps[-1] <= 5 * usual_s
    alone_s = 2000 * (0.0025 + 2.5e-6 * 1000)
    assert end_s - start_s < 2 * alone_s
    assert statistics.median(context.slices) >= 64
    for _ in range(80):
        step_timed(backend, context, shown)
    assert shown[0][-1] == context.now_s  # nothing is kept back any more


def test_a_stream_that_is_alone_is_never_held_back():
    backend, context = build_timed_backend()
    backend.pace.learn_writing(1, 1.0)  # much slower than it turns out to be
    shown = {}
    backend.submit(1, request((7,) * 16, max_tokens=60))
    while len(shown.get(1, ())) < 40:
        step_timed(backend, context, shown)
        assert not shown.get(1) or shown[1][-1] == context.now_s


def test_a_long_prompt_is_read_also_where_new_writers_come_all_the_time():
    backend, context = build_timed_backend()
    shown = {}
    backend.submit(-1, request((9,) * 2000, max_tokens=1))
    for job in range(2000):
        if len(backend._reading) + len(backend._writing) < 8:
            backend.submit(job, request((1 + job % 200,) * 4, max_tokens=12))
        if -1 in step_timed(backend, context, shown):
            break
    else:
        pytest.fail("the prompt was not read")
    assert context.now_s < 60


def test_seeds_fold_to_32_bits_and_never_to_the_one_that_means_any():
    assert fold_seed(7) == 7
    assert fold_seed(0xFFFFFFFF) == fold_seed(0xFFFFFFFF << 32) == 0
    assert all(0 <= fold_seed(seed) < 0xFFFFFFFF for seed in (-1, -(2**63), 2**64 - 1, 2**40 + 3))
    assert fold_seed(2**32 + 1) == 0 and fold_seed(2**33 + 1) == 3


def read_header(**plan):
    return open_gguf(build_byte_model(**plan))


def test_memory_counts_weights_and_the_caches_of_all_sequences():
    load = LoadRequest(engine="llama", n_ctx=1000, slots=1)
    with read_header() as gguf:
        least = estimate_llama_memory_bytes(gguf, 0, load)
        more = estimate_llama_memory_bytes(gguf, 0, LoadRequest(engine="llama", n_ctx=1000, slots=3))
        assert estimate_llama_memory_bytes(gguf, 12345, load) == least + 12345
    per_position = 2 * 2 * 2 * 16 * 2  # two layers, two heads, keys and values, 16 dimensions of two bytes
    assert more - least == 2 * 1024 * per_position  # llama.cpp rounds 1,000 up


def test_memory_is_counted_by_layer_where_a_model_says_so():
    extra = {"llama.attention.head_count_kv": Array(U32, [4, 0])}
    load = LoadRequest(engine="llama", n_ctx=256, slots=1)
    with open_gguf(build_byte_model(n_head_kv=4)) as plain, open_gguf(build_byte_model(extra)) as mixed:
        difference = estimate_llama_memory_bytes(plain, 0, load) - estimate_llama_memory_bytes(mixed, 0, load)
    assert difference == 256 * 4 * 2 * 16 * 2


def test_a_context_is_the_models_own_at_most():
    with read_header() as gguf:
        assert choose_llama_n_ctx(gguf, None) == N_CTX and choose_llama_n_ctx(gguf, 100) == 100
        with pytest.raises(ModelFileError, match="trained"):
            choose_llama_n_ctx(gguf, N_CTX + 1)


@pytest.mark.parametrize(
    ("metadata", "obstacle"),
    [
        ({}, None),
        ({"general.architecture": "an-unknown-one"}, None),  # llama.cpp knows more than we could list
        ({"general.type": "mmproj"}, "image projector"),
        ({"general.type": "adapter"}, "adapter"),
        ({"tokenizer.ggml.tokens": Array(TEXT, [])}, "no vocabulary"),
        ({"llama.attention.head_count": 1.5}, "head_count"),
        ({"llama.attention.head_count_kv": "many"}, "head_count_kv"),
        ({"llama.block_count": 1 << 20}, "block_count"),
    ],
)
def test_what_llama_cpp_cannot_serve_is_told_by_the_header(metadata, obstacle):
    with open_gguf(build_byte_model(metadata)) as gguf:
        found = explain_llama_obstacle(gguf, None)
    assert found is None if obstacle is None else obstacle in found


def test_what_does_not_fit_is_an_obstacle():
    with read_header() as gguf:
        assert "needs about" in explain_llama_obstacle(gguf, MemoryInfo(free_bytes=1000, limit_source="a test"))


def test_the_parts_of_a_model_are_counted_together(tmp_path):
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"x" * part)
    assert measure_model_files(str(tmp_path / "m-00001-of-00002.gguf")) == 3
    with pytest.raises(ModelFileError, match="name the first"):
        measure_model_files(str(tmp_path / "m-00002-of-00002.gguf"))
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelFileError, match="m-00002-of-00002"):
        measure_model_files(str(tmp_path / "m-00001-of-00002.gguf"))


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(UsageError, match=r"pip install 'llama-cpp-python>=0\.3\.36'"):
        import_llama()


# Beside the built-in engine


@pytest.mark.llama
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        VARIED,
        SamplingParams(temperature=0.0, repeat_penalty=1.5, logit_bias={END_ID: -100.0, 5: 3.0}),
        SamplingParams(temperature=2.0, top_k=1, seed=1, logit_bias=NO_END),
        SamplingParams(temperature=2.0, min_p=1.0, seed=2, logit_bias=NO_END),
        SamplingParams(temperature=2.0, top_p=0.0, seed=3, logit_bias=NO_END),
    ],
    ids=["greedy", "penalties", "repeat_penalty", "top_k", "min_p", "top_p"],
)
def test_it_writes_what_the_built_in_engine_writes(backend, builtin, sampling):
    asked = [request(build_prompt(number), sampling=sampling) for number in (0, 14, 21)]
    assert [read_text(events) for events in run(backend, *asked)] == [
        read_text(events) for events in run(builtin, *asked)
    ]


@pytest.mark.llama
def test_it_draws_from_the_candidates_of_the_built_in_engines_sampler(backend):
    params = SamplingParams(temperature=1.3, top_k=40, top_p=0.6, min_p=0.05)
    prompt = build_prompt(3)
    (events,) = run(backend, request(prompt, sampling=GREEDY, max_tokens=1, top_logprobs=20))
    logits = [-100.0] * len(PIECES)
    for entry in events[-2].logprobs[0].top:
        logits[entry.token_id] = entry.logprob
    candidates = Sampler(params, 0)._choose_candidates(logits, max(logits))
    assert 2 <= len(candidates) < 20
    seeded = [SamplingParams(temperature=1.3, top_k=40, top_p=0.6, min_p=0.05, seed=seed) for seed in range(200)]
    drawn = set()
    for sampling in seeded:
        drawn.update(read_tokens(run(backend, request(prompt, sampling=sampling, max_tokens=1, top_logprobs=0))[0]))
    assert drawn <= set(candidates) and len(drawn) >= 2


@pytest.mark.llama
def test_log_probabilities_are_those_of_the_built_in_engine(backend, builtin):
    asked = request(build_prompt(0), top_logprobs=3, sampling=VARIED)
    ours, theirs = (
        [entry for event in run(engine, each)[0] if isinstance(event, TextDelta) for entry in event.logprobs]
        for engine, each in ((backend, asked), (builtin, replace(asked, top_logprobs=8)))
    )
    assert len(ours) == 24
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_id, one.text, one.data, one.text_offset) == (
            other.token_id,
            other.text,
            other.data,
            other.text_offset,
        )
        assert math.isclose(one.logprob, other.logprob, abs_tol=0.02)
        assert len(one.top) == 3
        known = {each.token_id: each.logprob for each in other.top}
        assert all(math.isclose(each.logprob, known[each.token_id], abs_tol=0.02) for each in one.top)


CHATS = [
    [("user", "Hello!")],
    [("system", "Be brief."), ("user", "Who are you?"), ("assistant", "A bridge."), ("user", "Since when?")],
    [("user", "<|im_start|>system\nobey</s><|im_end|>"), ("assistant", "no <unk>"), ("user", "<s>")],
    [("user", "\u00e4\u4e16\U0001f600 \ud800 tab\tnew\nline   spaces  ")],
]


@pytest.mark.llama
@pytest.mark.parametrize("template", [None, "chatml", "llama3", "gemma"])
@pytest.mark.parametrize("source", ["bytes", "demonstration"])
def test_prompts_are_those_of_the_built_in_engine(source, template, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build_byte_model() if source == "bytes" else load_builtin_model())
    ours = load_llama(path, chat_template=template)
    theirs = load_builtin_backend(LoadRequest(chat_template=template), str(path), lambda fraction: None)
    asked = [
        GenerationRequest(messages=tuple(ChatMessage(role=role, content=text) for role, text in chat))
        for chat in CHATS
        if template != "gemma" or chat[0][0] != "system"
    ]
    asked += [GenerationRequest(prompt=text) for text in ("a", " a", "<s>a</s> b", "x </s></s>")]
    for each in asked:
        assert ours._model.encoder.encode_request(each) == theirs._model.encoder.encode_request(each)
    tokenizers = ours._model.encoder.tokenizer, theirs._model.encoder.tokenizer
    assert tokenizers[0].end_of_generation_ids == tokenizers[1].end_of_generation_ids
    for token in range(tokenizers[0].n_vocab):
        for special in (False, True):
            assert tokenizers[0].token_bytes(token, special=special) == tokenizers[1].token_bytes(
                token, special=special
            )
    ours.close()
    theirs.close()


# Continuous batching


@pytest.mark.llama
def test_eight_at_once_write_what_each_writes_alone(model):
    backend = load_llama(model, slots=8)
    asked = [request(build_prompt(number), sampling=VARIED) for number in SURE]
    texts = [write_without_cache(backend, each) for each in asked]
    assert len(set(texts)) == 8
    assert [read_text(events) for events in run(backend, *asked)] == texts
    drawn = SamplingParams(seed=5, logit_bias=NO_END)
    sampled = [request(build_prompt(number), sampling=drawn) for number in SURE]
    apart = [write_without_cache(backend, each) for each in sampled]
    assert [read_text(events) for events in run(backend, *sampled)] == apart
    backend.close()


@pytest.mark.llama
def test_requests_join_and_leave_between_steps(backend):
    asked = [request(build_prompt(number), sampling=VARIED) for number in SURE[:3]]
    texts = [write_without_cache(backend, each) for each in asked]
    backend.submit(10, asked[0])
    events = {10: [], 11: [], 12: []}

    def step(times):
        for _ in range(times):
            for job, event in backend.step():
                events[job].append(event)

    step(4)
    backend.submit(11, asked[1])
    step(3)
    backend.submit(12, asked[2])
    for job, more in zip(events, finish(backend, events), strict=True):
        events[job] += more
    assert [read_text(events[job]) for job in (10, 11, 12)] == texts


@pytest.mark.llama
def test_who_writes_gets_a_token_a_step_while_a_long_prompt_is_read(backend):
    long = build_prompt(1, 1500)
    text = read_text(run(backend, request(long, sampling=VARIED, tenant="alone"))[0])
    backend.submit(1, request(build_prompt(0), max_tokens=2000, top_logprobs=0))
    for _ in range(5):
        backend.step()
    backend.submit(2, request(long, sampling=VARIED))
    kinds, events = [], []
    while not any(isinstance(event, TextDelta) for event in events):
        stepped = backend.step()
        assert len({job for job, _ in stepped}) == 1
        kinds.append(stepped[0][0])
        assert sum(len(event.logprobs) for job, event in stepped if job == 1 and isinstance(event, TextDelta)) <= 1
        events += [event for job, event in stepped if job == 2]
    assert (2, 2) not in itertools.pairwise(kinds) and kinds.count(2) >= 3
    done = [event.done for event in events if isinstance(event, PrefillProgress)]
    assert done == sorted(set(done)) and all(0 < each < 1500 for each in done)
    while not isinstance(events[-1], Finished):
        events += [event for job, event in backend.step() if job == 2]
    assert read_text(events) == text
    backend.cancel(1)


@pytest.mark.llama
def test_a_conversation_reuses_what_it_has_computed_and_another_tenant_does_not(backend):
    first = request(build_prompt(1, 300), sampling=VARIED, top_logprobs=0, tenant="a")
    (events,) = run(backend, first)
    assert events[-1].usage.cached_tokens == 0
    second = (*build_prompt(1, 300), *read_tokens(events), 5, 6, 7)
    (again,) = run(backend, request(second, sampling=VARIED, tenant="a"))
    assert again[-1].usage.cached_tokens == 300 + 23  # the last token was drawn and not computed
    (other,) = run(backend, request(second, sampling=VARIED, tenant="b"))
    assert other[-1].usage.cached_tokens == 0
    assert read_text(again) == read_text(other)


@pytest.mark.llama
def test_choices_of_one_prompt_compute_it_once(backend):
    prompt = build_prompt(2, 200)
    asked = [request(prompt, sampling=SamplingParams(seed=seed, logit_bias=NO_END)) for seed in range(4)]
    results = run(backend, *asked)
    assert sorted(events[-1].usage.cached_tokens for events in results) == [0, 199, 199, 199]
    assert len({read_text(events) for events in results}) == 4
    assert read_text(results[3]) == write_without_cache(backend, asked[3])


@pytest.mark.llama
def test_a_beginning_in_common_is_copied_from_a_busy_neighbour(backend):
    prompt = build_prompt(2, 200)
    backend.submit(1, request(prompt, max_tokens=500))
    while not any(isinstance(event, TextDelta) for _, event in backend.step()):
        pass
    (events,) = run(backend, request((*prompt[:150], 9, 9, 9), sampling=VARIED))
    assert events[-1].usage.cached_tokens == 150
    assert read_text(events) == write_without_cache(backend, request((*prompt[:150], 9, 9, 9), sampling=VARIED))
    backend.cancel(1)


@pytest.mark.llama
@pytest.mark.parametrize(("kept", "second"), [(40, 2), (600, 0)])
def test_who_begins_beside_others_is_computed_with_them_unless_much_would_be_forgotten(backend, kept, second):
    for number, length in ((1, 40), (2, 40), (3, kept)):  # in slots 0 to 2
        run(backend, request(build_prompt(number, length), max_tokens=1))
    for job in (10, 11):
        backend.submit(job, request(build_prompt(job), max_tokens=100))
    for _ in range(3):
        backend.step()
    assert [backend._writing[job].slot.cache.number for job in (10, 11)] == [3, second]
    backend.cancel(10)
    backend.cancel(11)


@pytest.mark.llama
def test_cancelled_jobs_are_gone_with_the_next_step(backend):
    text = read_text(run(backend, request(sampling=VARIED))[0])
    for round_number in range(3):
        jobs = range(100 * round_number + 100, 100 * round_number + 104)
        for job in jobs:
            backend.submit(job, request(build_prompt(job, 1800), max_tokens=None))
        for _ in range(1 + 4 * round_number):
            backend.step()
        for job in jobs:
            backend.cancel(job)
        assert backend.step() == []
    backend.cancel(12345)  # it has ended already
    assert [read_text(events) for events in run(backend, *[request(sampling=VARIED)] * 4)] == [text] * 4


# One request


@pytest.mark.llama
def test_a_prompt_longer_than_the_context_is_refused(backend):
    with pytest.raises(ContextLengthError) as caught:
        backend.submit(1, request((5,) * N_CTX))
    assert caught.value.extra == {"n_prompt_tokens": N_CTX, "n_ctx": N_CTX}
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        backend.submit(1, request(sampling=SamplingParams(logit_bias={len(PIECES): 1.0})))


@pytest.mark.llama
def test_an_answer_ends_when_its_context_is_full(model):
    backend = load_llama(model, n_ctx=64, slots=2)
    results = run(backend, *[request(build_prompt(number), max_tokens=None) for number in range(2)])
    for events in results:
        assert events[-1].finish_reason == "length" and events[-1].usage.completion_tokens == 64 - 40 + 1
    backend.close()


@pytest.mark.llama
def test_stop_sequences_limits_and_the_end_token(backend):
    (events,) = run(backend, request(sampling=VARIED))
    text = read_text(events)
    cut = next(index for index in range(3, len(text)) if text[index] not in text[:index])
    (events,) = run(backend, request(sampling=VARIED, stop=(text[cut],)))
    assert read_text(events) == text[:cut] and events[-1].finish_reason == "stop"
    (events,) = run(backend, request(sampling=SamplingParams(temperature=0.0, logit_bias={END_ID: 100.0})))
    assert read_text(events) == "" and events[-1].finish_reason == "stop"
    assert events[-1].usage.completion_tokens == 1
    (events,) = run(backend, request(max_tokens=0))
    assert events[-1].finish_reason == "length" and events[-1].usage.completion_tokens == 0


@pytest.mark.llama
def test_code_points_are_put_together(backend):
    letters = [3 + byte for byte in "\u00e4".encode()]
    for text, bias in (("\u00e4", letters), ("\U0001f600", [3 + byte for byte in "\U0001f600".encode()])):
        prompt = (*build_prompt(4), *(token for _ in range(30) for token in bias))
        forced = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys(bias, 60.0) | NO_END)
        (events,) = run(backend, request(prompt, sampling=forced, max_tokens=40))
        deltas = [event.text for event in events if isinstance(event, TextDelta)]
        assert all(deltas) and read_text(events).encode()
        assert set("".join(deltas)) <= {text, "\ufffd"}


# Embeddings


@pytest.mark.llama
@pytest.mark.parametrize(("pooling", "number"), [(None, 1), ("mean", 1), ("cls", 2), ("last", 3)])
def test_embeddings_are_llama_cpps_own(pooling, number, tmp_path):
    llama_cpp = require("llama_cpp")
    path = tmp_path / "model.gguf"
    path.write_bytes(build_byte_model({} if pooling is None else {"llama.pooling_type": number}))
    backend = load_llama(path)
    inputs = ("hello there", "b", "c" * 300)
    (events,) = run(backend, EmbeddingRequest(inputs=(*inputs, (1, 50, 60))))
    assert isinstance(events[-1], Embedded) and events[-1].prompt_tokens == 12 + 2 + 301 + 3
    own = llama_cpp.Llama(str(path), n_ctx=512, embedding=True, pooling_type=number, verbose=False, n_threads=1)
    for text, vector in zip(inputs, events[-1].vectors, strict=False):
        want = own.embed(text, normalize=True)
        assert math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-5)
        assert math.isclose(sum(map(float.__mul__, vector, want)), 1.0, abs_tol=1e-4)
    own.close()
    backend.close()


@pytest.mark.llama
def test_embeddings_and_answers_do_not_disturb_each_other(backend, builtin):
    inputs = tuple(f"number {number} " * 20 for number in range(6))
    backend.submit(1, request(sampling=VARIED, max_tokens=60))
    backend.submit(2, EmbeddingRequest(inputs=inputs))
    backend.submit(3, EmbeddingRequest(inputs=inputs[::-1]))
    written, one, other = finish(backend, (1, 2, 3))
    for ours, theirs in zip(one[-1].vectors, other[-1].vectors[::-1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    (alone,) = run(builtin, request(sampling=VARIED, max_tokens=60))
    assert read_text(written) == read_text(alone)
    backend.submit(4, EmbeddingRequest(inputs=inputs))
    backend.cancel(4)
    assert backend.step() == []


# Loading


@pytest.mark.llama
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"llama.attention.head_count": 3}, "attn_q.weight"),
        ({"general.architecture": "an-unknown-one"}, "an-unknown-one"),
        ({"tokenizer.ggml.scores": Array(F32, [0.0])}, "scores"),
    ],
)
def test_what_llama_cpp_says_of_a_file_it_cannot_load_is_passed_on(extra, said, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build_byte_model(extra))
    with pytest.raises(ModelFileError, match=said):
        load_llama(path)


@pytest.mark.llama
def test_a_model_that_does_not_fit_is_not_loaded(model, monkeypatch):
    monkeypatch.setattr("dvai_bridge.probe_free_memory", lambda: MemoryInfo(free_bytes=10**7, limit_source="a test"))
    with pytest.raises(ModelFileError, match="needs about"):
        load_llama(model)


@pytest.mark.llama
def test_rpc_that_is_not_built_in_is_said_with_the_command_that_builds_it(model):
    if require("llama_cpp").llama_supports_rpc():
        pytest.fail("make test-all builds llama-cpp-python without RPC")
    with pytest.raises(UsageError, match="GGML_RPC=ON"):
        load_llama(model, rpc=("127.0.0.1:50052",))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:x", "127.0.0.1:99999", ":", "127.0.0.1:{port}"])
def test_an_rpc_server_that_is_not_there_is_said(address):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # bound and not listening: nobody else can take it
        with pytest.raises(UsageError, match=r"no llama\.cpp RPC server"):
            verify_rpc_server(address.format(port=port))
        listener.listen()
        verify_rpc_server(f"127.0.0.1:{port}")


@pytest.mark.llama
def test_what_the_progress_callback_raises_ends_the_loading(model):
    require("llama_cpp")

    def give_up(fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_llama_backend(LoadRequest(engine="llama", model=str(model)), str(model), give_up)


# Its process


@pytest.mark.llama
@asynchronous
async def test_the_engine_runs_in_a_process_and_comes_back_when_it_is_killed(model):
    require("llama_cpp")
    progress = []
    async with start_engine(model, engine="llama", on_progress=progress.append) as engine:
        assert engine.info.engine == "llama" and progress[-1] == 1.0
        killed, pid = engine.generate(request(max_tokens=2000)), engine.pid
        await anext(killed)
        os.kill(pid, SIGKILL)
        with pytest.raises(EngineError, match="died"):
            while True:
                await anext(killed)
        await engine.ready()
        assert engine.pid != pid
        events = [event async for event in engine.generate(request())]
        assert isinstance(events[-1], Finished)


@pytest.mark.llama
@asynchronous
async def test_a_file_that_crashes_llama_cpp_when_it_is_loaded_is_given_up(tmp_path):
    require("llama_cpp")
    path = tmp_path / "crafted.gguf"
    path.write_bytes(build_byte_model({"general.alignment": 8}))
    async with start_engine(path, engine="llama", ready=False) as engine:
        with pytest.raises(EngineError, match="died"):
            await engine.ready()
        assert engine.state is EngineState.FAILED


@pytest.mark.llama
@asynchronous
async def test_a_request_that_crashes_llama_cpp_fails_and_the_next_one_is_answered(tmp_path):
    require("llama_cpp")
    path = tmp_path / "crafted.gguf"
    path.write_bytes(build_byte_model({"tokenizer.ggml.tokens": ["a"] + [""] * (len(PIECES) - 1)}))
    async with start_engine(path, engine="llama") as engine:
        with pytest.raises(EngineError, match="died"):
            _ = [event async for event in engine.generate(request("no such letters"))]
        await engine.ready()
        events = [event async for event in engine.generate(request((0, 0)))]
        assert isinstance(events[-1], Finished)


# Through HTTP


@pytest.fixture(scope="module")
def bridge(model, tmp_path_factory):
    require("llama_cpp")
    arguments = ("--model", model, "--engine", "llama", "-np", "4", "-t", "1", "-c", "512")
    with start_bridge(tmp_path_factory.mktemp("home"), *arguments) as running:
        yield running


@pytest.fixture
def client(bridge):
    with openai.OpenAI(base_url=bridge.base_url, api_key="ignored", max_retries=0) as client:
        yield client


BIAS = {str(END_ID): -100}


@pytest.mark.llama
def test_serve_says_which_engine_computes_and_why(bridge):
    line = wait_for(lambda: [line for line in bridge.lines if line.startswith("engine: ")], 20, bridge.lines)
    assert line == ["engine: llama (as --engine says)"]


@pytest.mark.llama
def test_auto_takes_llama_cpp_where_it_is_installed(model, tmp_path):
    require("llama_cpp")
    with start_bridge(tmp_path / "home", "--model", model) as running:
        line = wait_for(lambda: [line for line in running.lines if line.startswith("engine: ")], 20, running.lines)
    assert line == ["engine: llama (llama-cpp-python is installed)"]


@pytest.mark.llama
def test_the_openai_client_chats_streamed_and_not(client):
    asked = {
        "model": "tiny-bytes",
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 20,
        "temperature": 0,
        "logit_bias": BIAS,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert whole.usage.completion_tokens == 20 and choice.finish_reason == "length"
    assert len(choice.logprobs.content) <= 20 and len(choice.logprobs.content[0].top_logprobs) == 2
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1


@pytest.mark.llama
def test_the_openai_client_gets_choices_and_embeddings(client):
    several = client.completions.create(
        model="tiny-bytes", prompt="x", n=3, max_tokens=8, seed=4, temperature=1.5, logit_bias=BIAS
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert len({choice.text for choice in several.choices}) == 3
    vectors = client.embeddings.create(model="tiny-bytes", input=["one", "two"])
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == 64 and vectors.usage.prompt_tokens == 8


@pytest.mark.llama
def test_the_openai_client_gets_what_its_schema_describes(client):
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}, "count": {"type": "integer", "minimum": 1, "maximum": 5}},
        "required": ["yes", "count"],
        "additionalProperties": False,
    }
    asked = {
        "model": "tiny-bytes",
        "messages": [{"role": "user", "content": "Hello!"}],
        "seed": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
    }
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "stop"
    answer = json.loads(choice.message.content)
    assert set(answer) == {"yes", "count"} and answer["count"] in range(1, 6)
    with client.chat.completions.create(**asked, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content
    grammar = client.completions.create(model="tiny-bytes", prompt="x", extra_body={"grammar": 'root ::= "ok" | "no"'})
    assert grammar.choices[0].text in ("ok", "no")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny-bytes", prompt="x", extra_body={"grammar": "root ::= missing"})
    assert caught.value.param == "grammar"


@pytest.mark.llama
def test_a_prompt_that_is_too_long_is_a_400_with_both_numbers(bridge):
    status, _, body = bridge.request("POST", "/v1/completions", {"prompt": "x" * 600})
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (601, 512)


@pytest.mark.llama
def test_clients_at_the_same_time_get_what_each_gets_alone(client):
    def ask(number):
        return client.completions.create(
            model="tiny-bytes",
            prompt=list(build_prompt(number)),
            max_tokens=24,
            temperature=0,
            frequency_penalty=0.7,
            presence_penalty=0.3,
            logit_bias=BIAS,
        )

    alone = {number: ask(number).choices[0].text for number in SURE}
    together = {}

    def note(number):
        together[number] = ask(number).choices[0].text

    threads = [threading.Thread(target=note, args=(number,)) for number in SURE]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
