"""Random GGUF models for tests and benchmarks, and a plain reading of every stored weight type.

Pure Python. Weights are random stored blocks, so that every bit of a format is exercised; `decode_plain` reads them
element by element, as the format is described, and shares nothing with the engine.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dvai_bridge import GGML_BLOCKS, GgmlType
from tests.gguf_writer import build_gguf


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def read_half(data: bytes, position: int) -> float:
    return struct.unpack_from("<e", data, position)[0]


# Random blocks whose weights have about the standard deviation `std`


def _random_block(kind: GgmlType, std: float, rng: random.Random) -> bytes:
    size = GGML_BLOCKS[kind][1]
    gain = std * rng.uniform(0.7, 1.3)
    if kind in (GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q8_0):
        spread = {GgmlType.Q4_0: 4.6, GgmlType.Q5_0: 9.2, GgmlType.Q8_0: 74.0}[kind]
        return half(rng.choice((1, 1, 1, -1)) * gain / spread) + rng.randbytes(size - 2)
    if kind in (GgmlType.Q4_1, GgmlType.Q5_1):
        top = 15 if kind is GgmlType.Q4_1 else 31
        return half(gain * 3.4 / top) + half(-gain * 1.7) + rng.randbytes(size - 4)
    if kind in (GgmlType.Q4_K, GgmlType.Q5_K):
        top = 15 if kind is GgmlType.Q4_K else 31
        return half(gain * 3.4 / top / 37) + half(gain * 1.7 / 37) + rng.randbytes(size - 4)
    assert kind is GgmlType.Q6_K
    return rng.randbytes(size - 2) + half(gain / 18.5 / 74)


def random_weights(kind: GgmlType, count: int, std: float, rng: random.Random) -> bytes:
    """`count` stored weights of the given type; past 8,192 blocks the first ones come again."""
    block, size = GGML_BLOCKS[kind]
    assert count % block == 0
    if kind not in (GgmlType.F32, GgmlType.F16, GgmlType.BF16):
        n_blocks = count // block
        some = b"".join(_random_block(kind, std, rng) for _ in range(min(n_blocks, 8192)))
        return (some * -(-n_blocks // 8192))[: n_blocks * size]
    return encode_floats(kind, [rng.gauss(0.0, std) for _ in range(count)])


def encode_floats(kind: GgmlType, values: list[float]) -> bytes:
    if kind is GgmlType.F16:
        return struct.pack(f"<{len(values)}e", *values)
    data = struct.pack(f"<{len(values)}f", *values)
    return data if kind is GgmlType.F32 else b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))


def encode_q8_0(values: list[float]) -> bytes:
    """As ggml does it: the largest of 32 becomes 127."""
    out = b""
    for start in range(0, len(values), 32):
        block = values[start : start + 32]
        gain = max(map(abs, block)) / 127.0
        out += half(gain) + struct.pack("<32b", *[round(v / gain) if gain else 0 for v in block])
    return out


# Plain decoding, element by element


def decode_plain(kind: GgmlType, data: bytes) -> list[float]:
    if kind is GgmlType.F32:
        return [value for (value,) in struct.iter_unpack("<f", data)]
    if kind is GgmlType.F16:
        return [value for (value,) in struct.iter_unpack("<e", data)]
    if kind is GgmlType.BF16:
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    block, size = GGML_BLOCKS[kind]
    decode = _DECODERS[kind]
    return [decode(data[i : i + size], e) for i in range(0, len(data), size) for e in range(block)]


def _nibble(block: bytes, start: int, e: int) -> int:
    return block[start + e] & 15 if e < 16 else block[start + e - 16] >> 4


def _q4_0(block: bytes, e: int) -> float:
    return read_half(block, 0) * (_nibble(block, 2, e) - 8)


def _q4_1(block: bytes, e: int) -> float:
    return read_half(block, 0) * _nibble(block, 4, e) + read_half(block, 2)


def _q5_0(block: bytes, e: int) -> float:
    bits = int.from_bytes(block[2:6], "little")
    return read_half(block, 0) * ((_nibble(block, 6, e) | (bits >> e & 1) << 4) - 16)


def _q5_1(block: bytes, e: int) -> float:
    bits = int.from_bytes(block[4:8], "little")
    return read_half(block, 0) * (_nibble(block, 8, e) | (bits >> e & 1) << 4) + read_half(block, 2)


def _q8_0(block: bytes, e: int) -> float:
    return read_half(block, 0) * struct.unpack_from("b", block, 2 + e)[0]


def _scale_and_minimum(block: bytes, j: int) -> tuple[float, float]:
    scales = block[4:16]
    if j < 4:
        scale, least = scales[j] & 63, scales[j + 4] & 63
    else:
        scale = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
        least = (scales[j + 4] >> 4) | (scales[j] >> 6) << 4
    return read_half(block, 0) * scale, read_half(block, 2) * least


def _q4_k(block: bytes, e: int) -> float:
    scale, least = _scale_and_minimum(block, e // 32)
    byte = block[16 + e // 64 * 32 + e % 32]
    return scale * (byte >> 4 if e & 32 else byte & 15) - least


def _q5_k(block: bytes, e: int) -> float:
    scale, least = _scale_and_minimum(block, e // 32)
    byte = block[48 + e // 64 * 32 + e % 32]
    return scale * ((byte >> 4 if e & 32 else byte & 15) + 16 * (block[16 + e % 32] >> e // 32 & 1)) - least


def _q6_k(block: bytes, e: int) -> float:
    part, quarter, lane = e // 128, e % 128 // 32, e % 32
    low = block[64 * part + 32 * (quarter & 1) + lane]
    low = low >> 4 if quarter >= 2 else low & 15
    high = block[128 + 32 * part + lane] >> 2 * quarter & 3
    scale = struct.unpack_from("b", block, 192 + e // 16)[0]
    return read_half(block, 208) * scale * ((low | high << 4) - 32)


_DECODERS: Mapping[GgmlType, Callable[[bytes, int], float]] = {
    GgmlType.Q4_0: _q4_0,
    GgmlType.Q4_1: _q4_1,
    GgmlType.Q5_0: _q5_0,
    GgmlType.Q5_1: _q5_1,
    GgmlType.Q8_0: _q8_0,
    GgmlType.Q4_K: _q4_k,
    GgmlType.Q5_K: _q5_k,
    GgmlType.Q6_K: _q6_k,
}


# Models


@dataclass(frozen=True)
class ModelPlan:
    """What a random model looks like. `kinds`: types by short tensor name (`attn_q`); `kind` for the rest."""

    architecture: str = "llama"
    n_vocab: int = 96
    n_embd: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 96
    n_ctx: int = 512
    kind: GgmlType = GgmlType.F32
    kinds: Mapping[str, GgmlType] = field(default_factory=dict)
    tied: bool = False
    biases: tuple[str, ...] = ()
    rope_factors: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1

    def with_extra(self, **extra: Any) -> ModelPlan:
        return replace(self, extra={**self.extra, **extra})

    @property
    def head_dim(self) -> int:
        return self.extra.get(f"{self.architecture}.attention.key_length", self.n_embd // self.n_head)


def plan_metadata(plan: ModelPlan) -> dict[str, Any]:
    prefix = plan.architecture
    return {
        "general.architecture": prefix,
        "general.name": "random",
        f"{prefix}.context_length": plan.n_ctx,
        f"{prefix}.embedding_length": plan.n_embd,
        f"{prefix}.block_count": plan.n_layer,
        f"{prefix}.feed_forward_length": plan.n_ff,
        f"{prefix}.attention.head_count": plan.n_head,
        f"{prefix}.attention.head_count_kv": plan.n_head_kv,
        f"{prefix}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{prefix}.rope.freq_base": 10000.0,
        f"{prefix}.vocab_size": plan.n_vocab,
        "tokenizer.ggml.model": "none",
        **plan.extra,
    }


def plan_tensors(plan: ModelPlan) -> list[tuple[str, tuple[int, ...], float, float]]:
    """(name, shape, standard deviation, mean) of every tensor; states and logits stay of realistic size."""
    n, kv, q = plan.n_embd, plan.n_head_kv * plan.head_dim, plan.n_head * plan.head_dim
    branch = 1.0 / math.sqrt(2 * plan.n_layer)
    tensors = [("token_embd.weight", (n, plan.n_vocab), 1.0, 0.0)]
    for layer in range(plan.n_layer):
        tensors += [
            (f"blk.{layer}.attn_norm.weight", (n,), 0.2, 1.0),
            (f"blk.{layer}.attn_q.weight", (n, q), 1.0 / math.sqrt(n), 0.0),
            (f"blk.{layer}.attn_k.weight", (n, kv), 1.0 / math.sqrt(n), 0.0),
            (f"blk.{layer}.attn_v.weight", (n, kv), 1.0 / math.sqrt(n), 0.0),
            (f"blk.{layer}.attn_output.weight", (q, n), branch / math.sqrt(q), 0.0),
            (f"blk.{layer}.ffn_norm.weight", (n,), 0.2, 1.0),
            (f"blk.{layer}.ffn_gate.weight", (n, plan.n_ff), 1.0 / math.sqrt(n), 0.0),
            (f"blk.{layer}.ffn_up.weight", (n, plan.n_ff), 1.0 / math.sqrt(n), 0.0),
            (f"blk.{layer}.ffn_down.weight", (plan.n_ff, n), 2 * branch / math.sqrt(plan.n_ff), 0.0),
        ]
        widths = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": n}
        tensors += [(f"blk.{layer}.{name}.bias", (widths[name],), 0.5, 0.0) for name in plan.biases]
    if plan.rope_factors:
        tensors.append(("rope_freqs.weight", (plan.head_dim // 2,), 0.5, 4.0))
    size = 3.0 / math.sqrt(n)  # of logits: about 3
    if plan.tied:
        return [*tensors, ("output_norm.weight", (n,), 0.2 * size, size)]
    return [*tensors, ("output_norm.weight", (n,), 0.2, 1.0), ("output.weight", (n, plan.n_vocab), size, 0.0)]


def tensor_kind(plan: ModelPlan, name: str) -> GgmlType:
    short = name.removesuffix(".weight").split(".")[-1]
    return plan.kinds.get(short, plan.kind)


def random_model(plan: ModelPlan) -> bytes:
    """A whole GGUF file of random weights; the same plan gives the same bytes."""
    rng, tensors = random.Random(plan.seed), []
    for name, shape, std, mean in plan_tensors(plan):
        count = math.prod(shape)
        if len(shape) == 1:
            values = [rng.gauss(mean, std) for _ in range(count)]
            tensors.append((name, shape, GgmlType.F32, encode_floats(GgmlType.F32, values)))
        else:
            kind = tensor_kind(plan, name)
            tensors.append((name, shape, kind, random_weights(kind, count, std, rng)))
    return build_gguf(plan_metadata(plan), tensors)
