"""The built-in engine against a plain transformer in Python floats, and its refusals."""

from __future__ import annotations

import math
import operator
import os
import random
import signal
import struct
from dataclasses import replace

import pytest

import dvai_bridge as bridge
from dvai_bridge import GgmlType, ModelFileError, Transformer, open_gguf
from tests.gguf_writer import build_gguf
from tests.support_gguf import (
    ModelPlan,
    decode_plain,
    encode_floats,
    encode_q8_0,
    plan_metadata,
    plan_tensors,
    random_model,
    random_weights,
)

FLOATS = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
BLOCKS = (GgmlType.Q4_0, GgmlType.Q4_1, GgmlType.Q5_0, GgmlType.Q5_1, GgmlType.Q8_0)
SUPER_BLOCKS = (GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K)


def load(data, n_ctx=None):
    return Transformer.load(open_gguf(data), n_ctx=n_ctx, on_progress=lambda done, total: None)


def relative_error(got, want):
    return math.dist(got, want) / math.hypot(*want)


class PlainTransformer:
    """The same model in the plainest arithmetic, keys and values kept as lists; nothing is shared with the engine."""

    def __init__(self, plan, data):
        gguf = open_gguf(data)
        self.plan = plan
        self.vectors, self.matrices = {}, {}
        for name, tensor in gguf.tensors.items():
            values = decode_plain(tensor.type, bytes(gguf.tensor_data(name)))
            if len(tensor.shape) == 1:
                self.vectors[name] = values
            else:
                width = tensor.shape[0]
                self.matrices[name] = [values[i : i + width] for i in range(0, len(values), width)]
        self.keys = [[] for _ in range(plan.n_layer)]
        self.values = [[] for _ in range(plan.n_layer)]

    def multiply(self, name, x):
        y = [math.fsum(map(operator.mul, row, x)) for row in self.matrices[name + ".weight"]]
        bias = self.vectors.get(name + ".bias")
        return [a + b for a, b in zip(y, bias, strict=True)] if bias else y

    def normalize(self, name, x):
        scale = 1.0 / math.sqrt(sum(v * v for v in x) / len(x) + 1e-5)
        return [v * scale * w for v, w in zip(x, self.vectors[name], strict=True)]

    def rotate(self, vector, position):
        plan, dim = self.plan, self.plan.head_dim
        n_rot = plan.extra.get(f"{plan.architecture}.rope.dimension_count", dim)
        factors = self.vectors.get("rope_freqs.weight", [1.0] * (n_rot // 2))
        scale = plan.extra.get(f"{plan.architecture}.rope.scaling.factor", 1.0)
        out = list(vector)
        for head in range(0, len(vector), dim):
            for i in range(n_rot // 2):
                angle = position / scale * 10000.0 ** (-2.0 * i / n_rot) / factors[i]
                interleaved = plan.architecture == "llama"
                a, b = (head + 2 * i, head + 2 * i + 1) if interleaved else (head + i, head + i + n_rot // 2)
                out[a] = vector[a] * math.cos(angle) - vector[b] * math.sin(angle)
                out[b] = vector[a] * math.sin(angle) + vector[b] * math.cos(angle)
        return out

    def attend(self, layer, query):
        plan, dim = self.plan, self.plan.head_dim
        out = []
        for head in range(plan.n_head):
            start = head * plan.n_head_kv // plan.n_head * dim
            part = query[head * dim : (head + 1) * dim]
            scores = [
                sum(map(operator.mul, part, key[start : start + dim])) / math.sqrt(dim) for key in self.keys[layer]
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            total = sum(weights)
            for d in range(dim):
                column = [value[start + d] for value in self.values[layer]]
                out.append(sum(map(operator.mul, weights, column)) / total)
        return out

    def decode(self, token):
        position = len(self.keys[0])
        x = self.matrices["token_embd.weight"][token]
        for layer in range(self.plan.n_layer):
            blk = f"blk.{layer}."
            h = self.normalize(blk + "attn_norm.weight", x)
            self.keys[layer].append(self.rotate(self.multiply(blk + "attn_k", h), position))
            self.values[layer].append(self.multiply(blk + "attn_v", h))
            attended = self.attend(layer, self.rotate(self.multiply(blk + "attn_q", h), position))
            x = [a + b for a, b in zip(x, self.multiply(blk + "attn_output", attended), strict=True)]
            h = self.normalize(blk + "ffn_norm.weight", x)
            gate, up = self.multiply(blk + "ffn_gate", h), self.multiply(blk + "ffn_up", h)
            h = [g / (1.0 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            x = [a + b for a, b in zip(x, self.multiply(blk + "ffn_down", h), strict=True)]
        h = self.normalize("output_norm.weight", x)
        return h, self.multiply("token_embd" if "output.weight" not in self.matrices else "output", h)


def assert_same_logits(plan, data, limit, n_tokens=10):
    plain, model = PlainTransformer(plan, data), load(data)
    cache, rng = model.new_cache(), random.Random(7)
    for _ in range(n_tokens):
        token = rng.randrange(plan.n_vocab)
        assert relative_error(model.decode(cache, token), plain.decode(token)[1]) < limit


# Stored types


@pytest.mark.parametrize("kind", [*FLOATS, *BLOCKS, *SUPER_BLOCKS], ids=lambda kind: kind.name)
def test_stored_weights_are_read_as_the_format_says(kind):
    data = random_weights(kind, 1024, 1.0, random.Random(3))
    want = decode_plain(kind, data)
    assert list(bridge.decode_floats(kind, data)) == pytest.approx(want, rel=1e-6, abs=1e-6)
    assert 0.5 < math.hypot(*want) / 32 < 2.0


@pytest.mark.parametrize("kind", [GgmlType.F32, *BLOCKS, *SUPER_BLOCKS], ids=lambda kind: kind.name)
def test_no_lane_overflows_when_x_is_a_row(kind):
    n, n_rows = 512, 40
    data = random_weights(kind, n * n_rows, 1.0, random.Random(9))
    source = bridge._RowSource(kind, memoryview(data), n)
    matrix = bridge.PackedMatrix([source], on_progress=lambda count: None)
    rows = [decode_plain(kind, source.read(i, i + 1)) for i in range(n_rows)]
    vectors = [[sign * v for v in row] for row in rows[:8] for sign in (1.0, -1.0)]
    for x, y in zip(vectors, matrix.multiply_all(vectors), strict=True):
        assert relative_error(y, [math.fsum(map(operator.mul, row, x)) for row in rows]) < 2e-3
        assert matrix.multiply(x) == y


# The whole model


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_float_models_are_exact_to_a_thousandth(kind):
    plan = ModelPlan(kind=kind)
    assert_same_logits(plan, random_model(plan), 1e-3)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_quantised_models(kind):
    plan = ModelPlan(kind=kind)
    assert_same_logits(plan, random_model(plan), 0.01)


@pytest.mark.parametrize("kind", SUPER_BLOCKS, ids=lambda kind: kind.name)
def test_k_quantised_models(kind):
    plan = ModelPlan(kind=kind, n_embd=256, n_ff=256, n_layer=1)
    assert_same_logits(plan, random_model(plan), 0.01, n_tokens=4)


VARIANTS = {
    "tied": ModelPlan(tied=True),
    "one KV head": ModelPlan(n_head_kv=1),
    "no grouping": ModelPlan(n_head_kv=4),
    "mixed types": ModelPlan(kind=GgmlType.Q4_0, kinds={"attn_v": GgmlType.Q8_0, "ffn_down": GgmlType.F16}),
    "qwen2": ModelPlan("qwen2", kind=GgmlType.Q8_0, biases=("attn_q", "attn_k", "attn_v"), tied=True),
    "llama with biases": ModelPlan(biases=("attn_q", "attn_k", "attn_v", "attn_output")),
    "Llama 3 frequencies": ModelPlan(rope_factors=True),
    "linear RoPE scaling": ModelPlan(extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    "partial RoPE": ModelPlan(extra={"llama.rope.dimension_count": 8}),
    "partial RoPE of qwen2": ModelPlan("qwen2", extra={"qwen2.rope.dimension_count": 8}),
    "wide heads": ModelPlan(extra={"llama.attention.key_length": 32, "llama.attention.value_length": 32}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    plan = VARIANTS[name]
    assert_same_logits(plan, random_model(plan), 0.01 if plan.kind >= GgmlType.Q4_0 else 1e-3)


def test_hidden_is_the_normed_state():
    plan = ModelPlan()
    data = random_model(plan)
    model, plain = load(data), PlainTransformer(plan, data)
    cache = model.new_cache()
    for token in (3, 1, 4):
        got, want = model.hidden(cache, token), plain.decode(token)[0]
    assert len(got) == model.n_embd
    assert relative_error(got, want) < 1e-3


def test_an_all_zero_matrix_is_no_error():
    plan = ModelPlan(n_layer=1)
    tensors = model_tensors(plan)
    tensors["blk.0.ffn_down.weight"] = [0.0] * len(tensors["blk.0.ffn_down.weight"])
    assert_same_logits(plan, encode_model(plan, tensors), 1e-3)


# Outlier channels


def model_tensors(plan):
    rng = random.Random(plan.seed)
    return {
        name: [rng.gauss(mean, std) for _ in range(math.prod(shape))] for name, shape, std, mean in plan_tensors(plan)
    }


def encode_model(plan, tensors, kind=GgmlType.F32):
    stored = []
    for name, shape, _, _ in plan_tensors(plan):
        form = kind if len(shape) > 1 else GgmlType.F32
        data = encode_q8_0(tensors[name]) if form is GgmlType.Q8_0 else encode_floats(form, tensors[name])
        stored.append((name, shape, form, data))
    return build_gguf(plan_metadata(plan), stored)


def scale_norms(plan, tensors, channels, factor):
    """What enters attention and feed-forward grows in some channels; the weights that read them shrink as much."""
    for layer in range(plan.n_layer):
        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            for channel in channels:
                tensors[f"blk.{layer}.{norm}.weight"][channel] *= factor
                for reader in readers:
                    values = tensors[f"blk.{layer}.{reader}.weight"]
                    values[channel :: plan.n_embd] = [value / factor for value in values[channel :: plan.n_embd]]


def scale_residual(plan, tensors, channels, factor):
    """Some channels of the residual stream grow; what reads the stream is left as it is."""
    for channel in channels:
        for layer in range(plan.n_layer):
            for writer, width in (("attn_output", plan.n_head * plan.head_dim), ("ffn_down", plan.n_ff)):
                values = tensors[f"blk.{layer}.{writer}.weight"]
                row = slice(channel * width, (channel + 1) * width)
                values[row] = [value * factor for value in values[row]]


@pytest.mark.parametrize("factor", [1000.0, 0.001])
@pytest.mark.parametrize("kind", [GgmlType.F32, GgmlType.F16, GgmlType.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("scale", [scale_norms, scale_residual])
def test_outlier_channels(kind, scale, factor):
    plan = ModelPlan(kind=kind)
    tensors = model_tensors(plan)
    scale(plan, tensors, (3, 17, 40), factor)
    # Three channels that are all of the stream make attention all or nothing: rounding shows more.
    limit = 4e-3 if scale is scale_residual and factor > 1 else 1e-3
    assert_same_logits(plan, encode_model(plan, tensors, kind), 0.01 if kind is GgmlType.Q8_0 else limit)


# Cache


def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been():
    plan = ModelPlan(n_layer=1, n_embd=32, n_ff=32, n_head=2, n_head_kv=1, n_ctx=700)
    model, tokens = load(random_model(plan)), [random.Random(5).randrange(96) for _ in range(600)]
    straight, bent = model.new_cache(), model.new_cache()
    model.prefill(straight, tokens[:300])
    model.prefill(bent, tokens[:300] + tokens[:290])
    for length in (590, 513, 300):
        bent.truncate(length)
        assert bent.length == length
    assert model.decode(bent, 9) == model.decode(straight, 9)
    bent.truncate(0)
    fresh = model.new_cache()
    assert [model.decode(bent, token) for token in (1, 2)] == [model.decode(fresh, token) for token in (1, 2)]


def test_prefill_leaves_what_decode_would():
    plan = ModelPlan()
    model = load(random_model(plan))
    prefilled, decoded = model.new_cache(), model.new_cache()
    model.prefill(prefilled, [5, 6, 7])
    for token in (5, 6, 7):
        model.decode(decoded, token)
    assert model.decode(prefilled, 8) == model.decode(decoded, 8)


def test_long_contexts_stay_exact():
    plan = ModelPlan(n_layer=1, n_embd=32, n_ff=32, n_head=2, n_head_kv=1, n_ctx=700)
    assert_same_logits(plan, random_model(plan), 1e-3, n_tokens=600)


def test_a_full_context_is_an_error():
    model = load(random_model(ModelPlan(n_layer=1)), n_ctx=2)
    cache = model.new_cache()
    model.prefill(cache, [1, 2])
    with pytest.raises(bridge.ContextLengthError):
        model.decode(cache, 3)
    assert cache.length == 2


# Refusals


def changed_model(plan=None, metadata=None, drop=(), rename=None):
    plan = plan or ModelPlan(n_layer=1)
    tensors = model_tensors(plan)
    stored = [
        ((rename or {}).get(name, name), shape, GgmlType.F32, encode_floats(GgmlType.F32, tensors[name]))
        for name, shape, _, _ in plan_tensors(plan)
        if name not in drop
    ]
    values = {**plan_metadata(plan), **(metadata or {})}
    return build_gguf({key: value for key, value in values.items() if value is not None}, stored)


REFUSALS = {
    "architecture": ({"metadata": {"general.architecture": "mamba"}}, "llama-cpp-python"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
    "missing length": ({"metadata": {"llama.block_count": None}}, "block_count"),
    "heads": ({"metadata": {"llama.attention.head_count_kv": 3}}, "do not divide"),
    "width": ({"metadata": {"llama.feed_forward_length": 128}}, "should be"),
    "rope": ({"metadata": {"llama.rope.dimension_count": 20}}, "RoPE over 20"),
    "rope scaling": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
    "layers": ({"metadata": {"llama.block_count": 500}}, "500 layers"),
    "missing tensor": ({"drop": ("blk.0.attn_k.weight",)}, "attn_k.weight"),
    "no embedding": ({"drop": ("token_embd.weight",)}, "token_embd.weight"),
    "unknown tensor": ({"rename": {"output.weight": "blk.0.odd.weight"}}, "odd"),
    "epsilon": ({"metadata": {"llama.attention.layer_norm_rms_epsilon": math.nan}}, "layer_norm_rms_epsilon"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_run_is_refused_with_a_reason(name):
    changes, reason = REFUSALS[name]
    data = changed_model(**changes)
    with pytest.raises(ModelFileError, match=reason):
        load(data)
    with pytest.raises(ModelFileError, match=reason):
        bridge.estimate_memory_bytes(open_gguf(data), None)


def test_unsupported_types_are_named():
    plan = ModelPlan(n_layer=1, n_embd=256, n_ff=256)
    stored = []
    for name, shape, _, _ in plan_tensors(plan):
        count = math.prod(shape)
        if name == "blk.0.ffn_up.weight":
            stored.append((name, shape, GgmlType.Q2_K, bytes(count // 256 * 84)))
        else:
            stored.append((name, shape, GgmlType.F32, bytes(4 * count)))
    with pytest.raises(ModelFileError, match=r"Q2_K.*llama-cpp-python"):
        load(build_gguf(plan_metadata(plan), stored))


@pytest.mark.parametrize("n_ctx", [0, -1, 513, 1 << 40])
def test_absurd_contexts_are_refused(n_ctx):
    with pytest.raises(ModelFileError, match="512"):
        load(random_model(ModelPlan(n_layer=1)), n_ctx=n_ctx)


def test_a_model_too_large_is_refused_from_its_header():
    rows = 100_000
    plan = ModelPlan(n_layer=1)
    tensors = plan_tensors(replace(plan, n_embd=4096, n_head=32, n_head_kv=32, n_ff=4096, n_vocab=rows))
    infos = {
        name: bridge.TensorInfo(name, shape, GgmlType.F32, 0, 4 * math.prod(shape)) for name, shape, _, _ in tensors
    }
    big = replace(plan, n_embd=4096, n_head=32, n_head_kv=32, n_ff=4096)
    header = bridge.GgufHeader(3, plan_metadata(big), infos, 1 << 40)
    with pytest.raises(ModelFileError, match=r"billion parameters.*llama-cpp-python"):
        bridge.estimate_memory_bytes(header, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["blk.0.ffn_up.weight", "output.weight", "output_norm.weight"])
def test_weights_that_are_no_numbers_are_refused(name, bad):
    plan = ModelPlan(n_layer=1)
    tensors = model_tensors(plan)
    tensors[name][5] = bad
    with pytest.raises(ModelFileError, match="not finite"):
        load(encode_model(plan, tensors))


def test_scales_that_are_no_numbers_are_refused():
    plan = ModelPlan(n_layer=1, kind=GgmlType.Q8_0)
    gguf = open_gguf(random_model(plan))
    raw = bytearray(random_model(plan))
    struct.pack_into("<e", raw, gguf.tensors["blk.0.attn_q.weight"].offset, math.nan)
    with pytest.raises(ModelFileError, match="not finite"):
        load(bytes(raw))


def test_an_embedding_that_is_no_number_is_an_error_when_it_is_used():
    plan = ModelPlan(n_layer=1)
    tensors = model_tensors(plan)
    tensors["token_embd.weight"][5 * plan.n_embd] = math.nan
    model = load(encode_model(plan, tensors))
    cache = model.new_cache()
    model.decode(cache, 4)
    with pytest.raises(bridge.EngineError, match="not finite"):
        model.decode(cache, 5)


def test_huge_weights_stay_finite():
    plan = ModelPlan(n_layer=2)
    tensors = model_tensors(plan)
    for name, values in tensors.items():
        tensors[name] = [max(-3e38, min(3e38, value * 1e38)) for value in values]
    model = load(encode_model(plan, tensors))
    cache = model.new_cache()
    model.prefill(cache, [1, 2])
    assert all(map(math.isfinite, model.decode(cache, 3)))


# Memory and progress


def test_progress_counts_all_weights_once():
    plan = ModelPlan(kind=GgmlType.Q8_0)
    seen = []
    Transformer.load(
        open_gguf(random_model(plan)), n_ctx=None, on_progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > 0


def test_the_context_is_what_was_asked_for():
    data = random_model(ModelPlan(n_layer=1, n_ctx=9000))
    assert (load(data).n_ctx, load(data, n_ctx=7000).n_ctx) == (4096, 7000)


# Several processes


@pytest.mark.parametrize("plan", [ModelPlan(kind=GgmlType.Q8_0), VARIANTS["qwen2"], VARIANTS["mixed types"]])
def test_helpers_change_no_number(plan, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(random_model(plan))
    helpers = bridge.start_row_helpers(str(path), 2)
    try:
        with open_gguf(path) as gguf:
            shared = Transformer.load(gguf, n_ctx=None, on_progress=lambda done, total: None, helpers=helpers)
        alone, caches = load(path.read_bytes()), (shared.new_cache(), shared.new_cache())
        for token in (1, 2, 3):
            assert shared.decode(caches[0], token) == alone.decode(caches[1], token)
    finally:
        shared.close()


def test_a_helper_that_dies_is_an_error(tmp_path):
    plan = ModelPlan(n_layer=1)
    path = tmp_path / "model.gguf"
    path.write_bytes(random_model(plan))
    helpers = bridge.start_row_helpers(str(path), 1)
    with open_gguf(path) as gguf:
        shared = Transformer.load(gguf, n_ctx=None, on_progress=lambda done, total: None, helpers=helpers)
    shared.decode(shared.new_cache(), 1)
    os.kill(helpers[0].pid, signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
    with pytest.raises(bridge.RowHelperEndedError):
        shared.decode(shared.new_cache(), 1)
    shared.close()


def test_numbers_that_are_not_finite_leave_helpers_in_step(tmp_path):
    plan = ModelPlan(n_layer=1)
    tensors = model_tensors(plan)
    tensors["token_embd.weight"][5 * plan.n_embd] = math.nan
    path = tmp_path / "model.gguf"
    path.write_bytes(encode_model(plan, tensors))
    helpers = bridge.start_row_helpers(str(path), 1)
    with open_gguf(path) as gguf:
        shared = Transformer.load(gguf, n_ctx=None, on_progress=lambda done, total: None, helpers=helpers)
    try:
        with pytest.raises(bridge.EngineError, match="not finite"):
            shared.decode(shared.new_cache(), 5)
        alone = load(path.read_bytes())
        assert shared.decode(shared.new_cache(), 4) == alone.decode(alone.new_cache(), 4)
    finally:
        shared.close()
