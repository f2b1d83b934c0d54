"""A tiny BERT of random weights, as a GGUF file: it encodes and does not write."""

from __future__ import annotations

import math
import random

from dvai_bridge import GgmlType
from tests.gguf_writer import F32, I32, Array, build_gguf
from tests.support_gguf import encode_floats

N_EMBD, N_HEAD, N_LAYER, N_FF, N_CTX = 32, 4, 2, 64, 64
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "hello", "world", "warm", "rain", "in", "paris", "."]


def build_bert(pooling: int | None = 1, architecture: str = "bert") -> bytes:
    """`pooling`: 1 mean, 2 the first token's, 4 a rank; None: the header does not say."""
    pieces = [*SPECIALS, *("\u2581" + word for word in WORDS), *WORDS[:26]]
    kinds = [3] * len(SPECIALS) + [1] * (len(pieces) - len(SPECIALS))
    metadata = {
        "general.architecture": architecture,
        "general.name": "tiny bert",
        f"{architecture}.context_length": N_CTX,
        f"{architecture}.embedding_length": N_EMBD,
        f"{architecture}.feed_forward_length": N_FF,
        f"{architecture}.block_count": N_LAYER,
        f"{architecture}.attention.head_count": N_HEAD,
        f"{architecture}.attention.layer_norm_epsilon": 1e-12,
        f"{architecture}.attention.causal": False,
        **({} if pooling is None else {f"{architecture}.pooling_type": pooling}),
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "jina-v2-en",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": Array(F32, [0.0] * len(pieces)),
        "tokenizer.ggml.token_type": Array(I32, kinds),
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.mask_token_id": 4,
    }
    rng, tensors = random.Random(7), []

    def add(name: str, *shape: int, mean: float = 0.0, std: float | None = None) -> None:
        count = math.prod(shape)
        std = 1 / math.sqrt(shape[0]) if std is None else std
        values = encode_floats(GgmlType.F32, [rng.gauss(mean, std) for _ in range(count)])
        tensors.append((name, shape, GgmlType.F32, values))

    def add_norm(name: str) -> None:
        add(f"{name}.weight", N_EMBD, mean=1.0, std=0.2)
        add(f"{name}.bias", N_EMBD, std=0.2)

    add("token_embd.weight", N_EMBD, len(pieces), std=1.0)
    add("token_types.weight", N_EMBD, 2, std=0.3)
    add("position_embd.weight", N_EMBD, N_CTX, std=0.3)
    add_norm("token_embd_norm")
    for layer in range(N_LAYER):
        for name, n_in, n_out in (
            *((f"attn_{part}", N_EMBD, N_EMBD) for part in ("q", "k", "v", "output")),
            ("ffn_up", N_EMBD, N_FF),
            ("ffn_down", N_FF, N_EMBD),
        ):
            add(f"blk.{layer}.{name}.weight", n_in, n_out)
            add(f"blk.{layer}.{name}.bias", n_out, std=0.2)
        add_norm(f"blk.{layer}.attn_output_norm")
        add_norm(f"blk.{layer}.layer_output_norm")
    return build_gguf(metadata, tensors)
