"""The built-in engine against llama.cpp, logit by logit, over the same 256 tokens; models by llama.cpp's quantiser."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import pytest

from dvai_bridge import GgmlType, Transformer, open_gguf
from tests.gguf_writer import build_gguf
from tests.support import require
from tests.support_gguf import ModelPlan, plan_metadata, plan_tensors

pytestmark = pytest.mark.llama
np = require("numpy")
llama_cpp = require("llama_cpp")

N_TOKENS = 256
FILE_TYPES = {GgmlType.F16: 1, GgmlType.Q8_0: 7, GgmlType.Q4_K: 15, GgmlType.Q6_K: 18}
OUTLIERS = (7, 100, 201)

LLAMA = ModelPlan(n_vocab=512, n_embd=256, n_layer=3, n_head=8, n_head_kv=8, n_ff=512)
QWEN2 = replace(LLAMA, architecture="qwen2", biases=("attn_q", "attn_k", "attn_v"), tied=True)
PLANS = {
    "F16": replace(LLAMA, kind=GgmlType.F16),
    "Q8_0": replace(LLAMA, kind=GgmlType.Q8_0),
    "Q4_K": replace(LLAMA, kind=GgmlType.Q4_K),
    "Q6_K": replace(LLAMA, kind=GgmlType.Q6_K),
    "grouped-query": replace(LLAMA, kind=GgmlType.Q8_0, n_head_kv=2),
    "tied": replace(LLAMA, kind=GgmlType.Q8_0, tied=True),
    "Llama 3 frequencies": replace(LLAMA, kind=GgmlType.F16, rope_factors=True),
    "qwen2": replace(QWEN2, kind=GgmlType.Q8_0),
    "qwen2 F16": replace(QWEN2, kind=GgmlType.F16),
}


def random_arrays(plan):
    rng = np.random.default_rng(plan.seed)
    return {name: rng.normal(mean, std, shape[::-1]).astype("f4") for name, shape, std, mean in plan_tensors(plan)}


def scale_outliers(plan, arrays):
    """A few channels of what enters every layer's matrices become 1,000 times the others.

    The weights that read them shrink together, so that their products stay of realistic size. (Were only the few
    columns to shrink, llama.cpp itself would be off by half: it rounds activations in blocks of 32 to 8 bits of the
    largest. The engine is held to the plain arithmetic in that case, by test_builtin_engine.py.)
    """
    shrink = np.float32(1000.0 * math.sqrt(len(OUTLIERS) / plan.n_embd))
    for layer in range(plan.n_layer):
        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            arrays[f"blk.{layer}.{norm}.weight"][list(OUTLIERS)] *= np.float32(1000.0)
            for reader in readers:
                arrays[f"blk.{layer}.{reader}.weight"] /= shrink


def write_model(plan, arrays, path):
    """A file with matrices of `plan.kind`; quantised ones come from llama.cpp's own quantiser."""
    stored = []
    for name, shape, _, _ in plan_tensors(plan):
        kind = GgmlType.F32 if len(shape) == 1 else GgmlType.F16
        stored.append((name, shape, kind, arrays[name].astype("f4" if kind is GgmlType.F32 else "f2").tobytes()))
    source = path if plan.kind is GgmlType.F16 else path.with_suffix(".f16")
    source.write_bytes(build_gguf(plan_metadata(plan), stored))
    if plan.kind is not GgmlType.F16:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.pure, params.nthread = FILE_TYPES[plan.kind], True, 1
        assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0


def llama_logits(path, tokens, n_vocab):
    """llama.cpp's logits after every token, shape (len(tokens), n_vocab)."""
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 512, 512, 1, 1
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(context, batch) == 0
    flat = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens), n_vocab)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return flat


def engine_logits(path, tokens):
    with open_gguf(path) as gguf:
        model = Transformer.load(gguf, n_ctx=None, on_progress=lambda done, total: None)
        cache = model.new_cache()
        return np.array([model.decode(cache, token) for token in tokens])


@pytest.mark.parametrize("outliers", [False, True], ids=["plain", "outliers"])
@pytest.mark.parametrize("name", PLANS)
def test_logits_are_those_of_llama_cpp(name, outliers, tmp_path):
    plan = PLANS[name]
    arrays = random_arrays(plan)
    if outliers:
        scale_outliers(plan, arrays)
    path = tmp_path / "model.gguf"
    write_model(plan, arrays, path)
    tokens = np.random.default_rng(11).integers(0, plan.n_vocab, N_TOKENS).tolist()
    want, got = llama_logits(path, tokens, plan.n_vocab), engine_logits(path, tokens)
    error = np.sqrt(np.mean((got - want) ** 2)) / np.sqrt(np.mean(want**2))
    print(f"{name} outliers={outliers}: relative RMS error {error:.2e}")
    assert error <= (2e-3 if plan.kind is GgmlType.F16 else 2e-2)
    spread = error * math.sqrt(np.mean(want**2))
    for ours, theirs in zip(got, want, strict=True):
        if ours.argmax() != theirs.argmax():
            second, first = np.sort(theirs)[-2:]
            assert first - second < 4 * spread
