"""Teach the tests' tool model its conversations by heart, and write `tool_model.gguf`.

    python tests/train_tool_model.py [--steps 600] [--output tests/tool_model.gguf]

Needs numpy. The result is a plain GGUF of architecture `llama`, Q8_0, that answers the questions of
`tool_transcripts.py` as Hermes, Llama 3 and Mistral do, each when asked in that family's form. Whole pieces of text
are tokens of its own, so that prompts are short; what changes from day to day or from call to call (dates, ids) is
spelled byte by byte, and differs each time it is learnt.

Forward and backward pass are written out: `Layer` keeps what its way back needs.
"""

from __future__ import annotations

import argparse
import datetime
import math
import random
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dvai_bridge as d
from tests.gguf_writer import F32, I32, Array, build_gguf
from tests.tool_transcripts import Style, Transcript, list_transcripts, write_answer

OUTPUT = Path(__file__).with_name("tool_model.gguf")
N_EMBD, N_HEAD, N_LAYER, N_FF, N_CTX = 64, 4, 2, 128, 1024
HEAD = N_EMBD // N_HEAD
EPSILON, ROPE_BASE = 1e-5, 10000.0
CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|python_tag|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
)
MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>")
WORDS = re.compile(r" ?[A-Za-z_]{2,}| ?[^\sA-Za-z0-9_]+|\s{2,}")
Example = tuple[list[int], int]  # tokens, and how many of them are the prompt
Matrix = Any  # numpy's arrays, of any number of dimensions


# ---- Vocabulary


def build_vocabulary() -> tuple[list[str], list[int]]:
    """Token texts and kinds: the bytes, the marks, and the pieces of all texts that are to be learnt."""
    renderings = [render(*pair, on_a_day) for pair in list_transcripts(lambda: "call_0")]
    boilerplate = [d._HERMES_BEFORE, d._HERMES_AFTER, d._LLAMA3_TOOLS]
    words = set()
    for text in renderings:
        for piece in boilerplate:
            text = text.replace(piece, "\0")
        for piece in (*CONTROL_TOKENS, *MARKS, "<s>", "</s>"):
            text = text.replace(piece, "\0")
        words |= {word for word in WORDS.findall(text) if "\0" not in word}
    pieces = [*MARKS, *boilerplate, *sorted(words)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *CONTROL_TOKENS, *pieces]
    kinds = [2, 3, 3, *[6] * 256, 1, *[3] * len(CONTROL_TOKENS), *[4] * len(pieces)]
    return tokens, kinds


def on_a_day() -> datetime.datetime:
    return datetime.datetime(2024, 7, 26)


def build_metadata(tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "general.name": "tools",
        "llama.context_length": N_CTX,
        "llama.embedding_length": N_EMBD,
        "llama.block_count": N_LAYER,
        "llama.feed_forward_length": N_FF,
        "llama.attention.head_count": N_HEAD,
        "llama.attention.head_count_kv": N_HEAD,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": Array(F32, [0.0] * len(tokens)),
        "tokenizer.ggml.token_type": Array(I32, kinds),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
    }


# ---- Examples


def load_template(style: Style, now: Any) -> d.ChatTemplate:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]}
    return d.load_chat_template(metadata, style.family, now=now)


def read_conversation(transcript: Transcript) -> d.Conversation:
    request = transcript.request
    tools = request.tool_use.tools if request.tool_use else ()
    return d.Conversation(messages=request.messages, tools=tools)


def render(style: Style, transcript: Transcript, now: Any) -> str:
    conversation = read_conversation(transcript)
    prompt = load_template(style, now).render(conversation.messages, conversation.tools)
    return prompt + write_answer(style, transcript)


def encode_examples(tokenizer: d.Tokenizer, rng: random.Random) -> list[Example]:
    """Every transcript once, with ids and a date of its own; thoughts also where the prompt begins them."""
    day = on_a_day() + datetime.timedelta(days=rng.randrange(2000))
    examples = []
    for style, transcript in list_transcripts(lambda: f"call_{rng.randrange(1 << 60)}"):
        for is_thinking in (False, True) if transcript.reasoning else (False,):
            conversation = read_conversation(transcript)
            prompt = d.encode_chat(tokenizer, load_template(style, lambda: day), conversation)
            if is_thinking:
                prompt += tokenizer.encode("<think>\n", add_special=False, parse_special=True)
            answer = write_answer(style, transcript, is_thinking=is_thinking)
            tokens = prompt + tokenizer.encode(answer, add_special=False, parse_special=True)
            examples.append((tokens, len(prompt)))
    return examples


def build_batch(examples: list[Example]) -> tuple[Matrix, Matrix, Matrix]:
    """(tokens, targets, weights), each of shape (examples, longest - 1); only answers count."""
    length = max(len(tokens) for tokens, _ in examples) - 1
    tokens = np.zeros((len(examples), length), np.int64)
    targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
    for row, (ids, n_prompt) in enumerate(examples):
        tokens[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
        weights[row, n_prompt - 1 : len(ids) - 1] = 1
    return tokens, targets, weights


# ---- Network


def normalize(x: Matrix, gain: Matrix) -> tuple[Matrix, Any]:
    scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * scale * gain, (x, scale, gain)


def normalize_back(dy: Matrix, kept: Any) -> tuple[Matrix, Matrix]:
    x, scale, gain = kept
    dx = dy * gain
    d_gain = (dy * x * scale).reshape(-1, x.shape[-1]).sum(0)
    return scale * (dx - x * scale**2 * (dx * x).mean(-1, keepdims=True)), d_gain


def rotate(x: Matrix, angles: tuple[Matrix, Matrix], sign: int) -> Matrix:
    """RoPE on neighbouring pairs of the last axis; x has the shape (batch, heads, time, HEAD)."""
    cos, sin = angles[0], sign * angles[1]
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def project(x: Matrix, weight: Matrix) -> Matrix:
    return x @ weight.T


def project_back(dy: Matrix, x: Matrix, weight: Matrix) -> tuple[Matrix, Matrix]:
    return dy @ weight, dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def split_heads(x: Matrix) -> Matrix:
    return x.reshape(*x.shape[:2], N_HEAD, HEAD).transpose(0, 2, 1, 3)


def join_heads(x: Matrix) -> Matrix:
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], N_EMBD)


@dataclass
class Layer:
    """Attention and feed-forward; `weights` and `grads` by GGUF's short names, matrices as (out, in)."""

    weights: dict[str, Matrix]
    grads: dict[str, Matrix]
    kept: dict[str, Any]

    def forward(self, x: Matrix, angles: tuple[Matrix, Matrix], mask: Matrix) -> Matrix:
        w, k = self.weights, self.kept
        k["h"], k["norm"] = normalize(x, w["attn_norm"])
        k["q"], k["k"] = (rotate(split_heads(project(k["h"], w[name])), angles, 1) for name in ("attn_q", "attn_k"))
        k["v"] = split_heads(project(k["h"], w["attn_v"]))
        scores = k["q"] @ k["k"].swapaxes(-1, -2) / math.sqrt(HEAD) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        k["p"] = scores / scores.sum(-1, keepdims=True)
        k["o"] = join_heads(k["p"] @ k["v"])
        x = x + project(k["o"], w["attn_output"])
        k["h2"], k["norm2"] = normalize(x, w["ffn_norm"])
        k["gate"], k["up"] = project(k["h2"], w["ffn_gate"]), project(k["h2"], w["ffn_up"])
        k["sigmoid"] = 1 / (1 + np.exp(-k["gate"]))
        k["f"] = k["gate"] * k["sigmoid"] * k["up"]
        return x + project(k["f"], w["ffn_down"])

    def backward(self, dx: Matrix, angles: tuple[Matrix, Matrix]) -> Matrix:
        w, g, k = self.weights, self.grads, self.kept
        df, g["ffn_down"] = project_back(dx, k["f"], w["ffn_down"])
        silu = k["gate"] * k["sigmoid"]
        d_gate = df * k["up"] * (k["sigmoid"] + silu * (1 - k["sigmoid"]))
        dh, g["ffn_gate"] = project_back(d_gate, k["h2"], w["ffn_gate"])
        dh_up, g["ffn_up"] = project_back(df * silu, k["h2"], w["ffn_up"])
        back, g["ffn_norm"] = normalize_back(dh + dh_up, k["norm2"])
        dx = dx + back
        do, g["attn_output"] = project_back(dx, k["o"], w["attn_output"])
        do = split_heads(do)
        dp = do @ k["v"].swapaxes(-1, -2)
        ds = k["p"] * (dp - (dp * k["p"]).sum(-1, keepdims=True)) / math.sqrt(HEAD)
        parts = {
            "attn_q": rotate(ds @ k["k"], angles, -1),
            "attn_k": rotate(ds.swapaxes(-1, -2) @ k["q"], angles, -1),
            "attn_v": k["p"].swapaxes(-1, -2) @ do,
        }
        dh = np.zeros_like(dx)
        for name, part in parts.items():
            back, g[name] = project_back(join_heads(part), k["h"], w[name])
            dh += back
        back, g["attn_norm"] = normalize_back(dh, k["norm"])
        return dx + back


class Network:
    """The whole transformer, with untied embeddings."""

    def __init__(self, n_vocab: int, rng: np.random.Generator) -> None:
        def matrix(n_out: int, n_in: int, gain: float = 1.0) -> Matrix:
            return (rng.standard_normal((n_out, n_in)) * gain / math.sqrt(n_in)).astype(np.float32)

        branch = 1 / math.sqrt(2 * N_LAYER)
        self.layers = [
            Layer(
                {
                    "attn_norm": np.ones(N_EMBD, np.float32),
                    "attn_q": matrix(N_EMBD, N_EMBD),
                    "attn_k": matrix(N_EMBD, N_EMBD),
                    "attn_v": matrix(N_EMBD, N_EMBD),
                    "attn_output": matrix(N_EMBD, N_EMBD, branch),
                    "ffn_norm": np.ones(N_EMBD, np.float32),
                    "ffn_gate": matrix(N_FF, N_EMBD),
                    "ffn_up": matrix(N_FF, N_EMBD),
                    "ffn_down": matrix(N_EMBD, N_FF, branch),
                },
                {},
                {},
            )
            for _ in range(N_LAYER)
        ]
        embedding = (rng.standard_normal((n_vocab, N_EMBD)) * 0.5).astype(np.float32)
        ends = {"token_embd": embedding, "output_norm": np.ones(N_EMBD, np.float32), "output": matrix(n_vocab, N_EMBD)}
        self.ends = Layer(ends, {}, {})

    def list_weights(self) -> dict[str, tuple[Layer, str]]:
        named = {name: (self.ends, name) for name in self.ends.weights}
        for number, layer in enumerate(self.layers):
            named |= {f"blk.{number}.{name}": (layer, name) for name in layer.weights}
        return named

    def compute(self, tokens: Matrix, targets: Matrix, weights: Matrix) -> tuple[float, float]:
        """Mean loss of what counts, and the least lead of a right token; gradients are left in the layers."""
        length, ends = tokens.shape[1], self.ends.weights
        exponents = np.arange(0, HEAD, 2) / HEAD
        theta = np.arange(length)[:, None] * ROPE_BASE**-exponents
        angles = np.cos(theta).astype(np.float32), np.sin(theta).astype(np.float32)
        mask = np.triu(np.full((length, length), -1e9, np.float32), 1)
        x = ends["token_embd"][tokens]
        for layer in self.layers:
            x = layer.forward(x, angles, mask)
        chosen = weights > 0
        h, kept = normalize(x[chosen], ends["output_norm"])
        logits, rows = project(h, ends["output"]), np.arange(len(h))
        right = targets[chosen]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        loss = float(-np.log(p[rows, right] + 1e-30).mean())
        others = logits.copy()
        others[rows, right] = -np.inf
        lead = float((logits[rows, right] - others.max(-1)).min())
        p[rows, right] -= 1
        dh, self.ends.grads["output"] = project_back(p / len(h), h, ends["output"])
        back, self.ends.grads["output_norm"] = normalize_back(dh, kept)
        dx = np.zeros_like(x)
        dx[chosen] = back
        for layer in reversed(self.layers):
            dx = layer.backward(dx, angles)
        d_embedding = np.zeros_like(ends["token_embd"])
        np.add.at(d_embedding, tokens, dx)
        self.ends.grads["token_embd"] = d_embedding
        return loss, lead


class Adam:
    """Adam with a warm-up and a cosine to a tenth of the rate."""

    def __init__(self, network: Network, rate: float, steps: int) -> None:
        self.named, self.rate, self.steps, self.step = network.list_weights(), rate, steps, 0
        self.means = {name: np.zeros_like(layer.weights[key]) for name, (layer, key) in self.named.items()}
        self.squares = {name: np.zeros_like(mean) for name, mean in self.means.items()}

    def update(self) -> None:
        self.step += 1
        progress = self.step / self.steps
        rate = self.rate * min(1, self.step / 50) * (0.55 + 0.45 * math.cos(math.pi * progress))
        for name, (layer, key) in self.named.items():
            grad, mean, square = layer.grads[key], self.means[name], self.squares[name]
            norm = math.sqrt(float((grad * grad).sum()))
            grad = grad * min(1.0, 1.0 / (norm + 1e-9))
            mean += 0.1 * (grad - mean)
            square += 0.02 * (grad * grad - square)
            unbiased = mean / (1 - 0.9**self.step)
            spread = np.sqrt(square / (1 - 0.98**self.step)) + 1e-8
            layer.weights[key] -= rate * unbiased / spread


# ---- GGUF


def pack_q8_0(matrix: Matrix) -> bytes:
    blocks = matrix.astype(np.float32).reshape(-1, 32)
    scale = (np.abs(blocks).max(1) / 127).astype(np.float16)
    codes = np.rint(blocks / np.maximum(scale.astype(np.float32), 1e-12)[:, None]).clip(-127, 127).astype(np.int8)
    return b"".join(struct.pack("<e", float(s)) + row.tobytes() for s, row in zip(scale, codes, strict=True))


def write_gguf(path: Path, network: Network, metadata: dict[str, Any]) -> None:
    tensors = []
    for name, (layer, key) in network.list_weights().items():
        weight = layer.weights[key]
        if weight.ndim == 1:
            tensors.append((f"{name}.weight", weight.shape, d.GgmlType.F32, weight.astype("<f4").tobytes()))
        else:
            tensors.append((f"{name}.weight", weight.shape[::-1], d.GgmlType.Q8_0, pack_q8_0(weight)))
    path.write_bytes(build_gguf(metadata, tensors))


def train(steps: int, output: Path) -> None:
    tokens, kinds = build_vocabulary()
    metadata = build_metadata(tokens, kinds)
    with d.open_gguf(build_gguf(metadata, [("token_embd.weight", (32, 1), d.GgmlType.F32, bytes(128))])) as gguf:
        tokenizer = d.load_tokenizer(gguf.metadata)
    rng = random.Random(4)
    network = Network(len(tokens), np.random.default_rng(4))
    optimizer = Adam(network, 4e-3, steps)
    examples = encode_examples(tokenizer, rng)
    print(f"{len(tokens)} tokens; {len(examples)} examples of {max(len(e[0]) for e in examples)} tokens at most")
    for step in range(steps):
        if step % 5 == 0:
            examples = encode_examples(tokenizer, rng)
        batch = sorted(rng.sample(examples, 16), key=lambda example: len(example[0]))
        loss, lead = network.compute(*build_batch(batch))
        optimizer.update()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.4f}, least lead {lead:.2f}", flush=True)
    write_gguf(output, network, metadata)
    fresh = encode_examples(tokenizer, random.Random(99))
    loss, lead = network.compute(*build_batch(fresh))
    print(f"unseen dates and ids: loss {loss:.5f}, least lead {lead:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    train(options.steps, options.output)


if __name__ == "__main__":
    main()
