"""Train the built-in demonstration model and write it into the last section of dvai_bridge.py.

    python tests/train_builtin_model.py                       train, quantise, write a GGUF, rewrite the section
    python tests/train_builtin_model.py --evaluate FILE.gguf  print the accuracy on the held-out questions

Needs torch and gguf. The result is a plain GGUF of architecture `llama`, so that any engine loads it: grouped-query
attention, SwiGLU, RoPE on neighbouring pairs, tied embeddings, byte-level BPE with Llama 3's pre-tokenizer, ChatML.

How it fits into 100 kB: the matrices are Q4_0, but their weights are trained to be -1, 0 or 1 times one scale per
matrix (as in BitNet b1.58, arXiv 2402.17764: round on the way forwards, let the gradient pass straight through), and
the embeddings to be -2 to 2 times one scale. So a nibble has three or five values instead of sixteen, and Huffman's
code, with which zlib ends, stores a weight in 1.6 bits instead of 4.5. Training rounds as the file does, so that
quantising costs nothing.
"""

import argparse
import base64
import hashlib
import math
import random
import re
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import torch
from builtin_corpus import (
    DEVELOPMENT_FILE,
    HELD_OUT_FILE,
    IM_END,
    IM_START,
    ConversationSource,
    Judged,
    Span,
    format_prompt,
    load_corpus,
    load_questions,
)
from torch import Tensor, nn
from torch.nn import functional

MODULE = Path(__file__).resolve().parents[1] / "dvai_bridge.py"
SEED = 38883
SECTION_LIMIT_BYTES = 131_072
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Dimensions of the transformer."""

    n_vocab: int = 1216
    n_ctx: int = 1024
    n_embd: int = 128
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 192
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def n_head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Recipe:
    """How to train; small batches learn most for the time they take."""

    steps: int = 8_000
    batch_tokens: int = 2_048
    learning_rate: float = 3e-3


# ---- Tokenizer: byte-level BPE ----

SPECIAL_TOKENS = ["<|endoftext|>", IM_START, IM_END]
# Llama 3's pre-tokenizer, for ASCII; other characters count as punctuation, which is enough for text that we wrote.
PRE_TOKENIZER = re.compile(
    r"'(?:[sdmtSDMT]|ll|LL|re|RE|ve|VE)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}"
    r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in GPT-2's vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_CHARACTERS = build_byte_characters()


class Tokenizer:
    """Byte-level BPE: special tokens first, then the 256 bytes, then the merged pairs in order of rank."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.merges = merges
        self.tokens = SPECIAL_TOKENS + BYTE_CHARACTERS + [left + right for left, right in merges]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.cache: dict[str, list[int]] = {}
        self.bytes = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}

    def encode_word(self, word: str) -> list[int]:
        """Return the word's own token, else merge the pair of the lowest rank until none is left."""
        if word not in self.cache:
            parts = [BYTE_CHARACTERS[byte] for byte in word.encode()]
            if "".join(parts) in self.ids:
                parts = ["".join(parts)]
            while len(parts) > 1:
                rank, i = min((self.ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(parts)))
                if rank == math.inf:
                    break
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            self.cache[word] = [self.ids[part] for part in parts]
        return self.cache[word]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, in which special tokens are recognised."""
        ids = []
        for piece in re.split(r"(<\|im_start\|>|<\|im_end\|>)", text):
            if piece in SPECIAL_TOKENS:
                ids.append(self.ids[piece])
            else:
                for word in PRE_TOKENIZER.findall(piece):
                    ids += self.encode_word(word)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, without the special ones."""
        text = "".join(self.tokens[i] for i in ids if i >= len(SPECIAL_TOKENS))
        return bytes(self.bytes[character] for character in text).decode("utf-8", "replace")


def train_tokenizer(texts: Iterator[str], n_vocab: int) -> Tokenizer:
    """Learn the merges that shorten the texts most: again and again the commonest pair of neighbours."""
    counts = Counter(word for text in texts for word in PRE_TOKENIZER.findall(text))
    words = [([BYTE_CHARACTERS[byte] for byte in word.encode()], count) for word, count in counts.items()]
    merges: list[tuple[str, str]] = []
    while len(merges) < n_vocab - 256 - len(SPECIAL_TOKENS):
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words:
            for pair in pairwise(parts):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts, _ in words:
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [parts[i] + parts[i + 1]]
                i += 1
    return Tokenizer(merges)


# ---- Model ----


class Matrix(nn.Module):
    """A matrix of weights `codes * scale`: integer codes within ±`limit`, one scale that is `step` mean magnitudes."""

    def __init__(self, n_out: int, n_in: int, std: float, limit: int, step: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * std)
        self.limit, self.step = limit, step
        self.fixed_scale: Tensor | None = None
        self.rounding = 1.0

    def quantise(self) -> tuple[Tensor, Tensor]:
        """Return the integer codes and the scale, an exact float16."""
        scale = self.fixed_scale
        if scale is None:
            scale = (self.weight.detach().abs().mean() * self.step).half().float()
        codes = (self.weight.detach() / scale).round().clamp(-self.limit, self.limit)
        return codes, scale

    def codes(self) -> tuple[Tensor, Tensor]:
        """Return the same, with the gradient of the latent weights."""
        codes, scale = self.quantise()
        latent = self.weight / scale
        return latent + self.rounding * (codes - latent).detach(), scale

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = self.codes()
        return functional.linear(x, (codes * scale).to(x.dtype))


class Norm(nn.Module):
    """RMSNorm; its weights are multiples of 1/32, which leaves zlib little to store."""

    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps
        self.output_type = torch.float32

    def rounded(self) -> Tensor:
        return self.weight + ((self.weight * 32).round() / 32 - self.weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.rounded(), self.eps).to(self.output_type)


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, head, f = shape.n_embd, shape.n_head_dim, shape.n_ff
        out_std = 0.5 / math.sqrt(2 * shape.n_layer)
        self.shape = shape
        self.attn_norm, self.ffn_norm = Norm(d, shape.norm_eps), Norm(d, shape.norm_eps)
        self.attn_q = Matrix(d, d, d**-0.5, limit=1, step=1.0)
        self.attn_k = Matrix(head * shape.n_head_kv, d, d**-0.5, limit=1, step=1.0)
        self.attn_v = Matrix(head * shape.n_head_kv, d, d**-0.5, limit=1, step=1.0)
        self.attn_output = Matrix(d, d, d**-0.5 * out_std, limit=1, step=1.0)
        self.ffn_gate = Matrix(f, d, d**-0.5, limit=1, step=1.0)
        self.ffn_up = Matrix(f, d, d**-0.5, limit=1, step=1.0)
        self.ffn_down = Matrix(d, f, f**-0.5 * out_std, limit=1, step=1.0)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, time_, _ = x.shape
        y = self.attn_norm(x)
        q, k, v = (
            m(y).view(batch, time_, -1, self.shape.n_head_dim).transpose(1, 2)
            for m in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = attend(q.unflatten(1, (self.shape.n_head_kv, -1)), k[:, :, None], v[:, :, None]).flatten(1, 2)
        x = x + self.attn_output(y.transpose(1, 2).reshape(batch, time_, -1))
        y = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(y)) * self.ffn_up(y))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of heads [..., time, head_dim]; written out, since PyTorch's is slow for short texts."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    future = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    return (scores + future).softmax(-1) @ v


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbours by its position's angle; `rotation` is cosine and sine [time, head_dim / 2]."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=-1).flatten(-2)


class Transformer(nn.Module):
    """tokens [batch, time] → logits [batch, time, vocabulary]."""

    def __init__(self, shape: Shape, used: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = Matrix(shape.n_vocab, shape.n_embd, 0.1, limit=2, step=1.25)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = Norm(shape.n_embd, shape.norm_eps)
        frequencies = shape.rope_base ** (-torch.arange(0, shape.n_head_dim, 2) / shape.n_head_dim)
        angles = torch.outer(torch.arange(shape.n_ctx), frequencies)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        # Rows of tokens that the corpus never uses stay zero: unknown bytes look like nothing, and cost nothing.
        self.register_buffer("used", used.float()[:, None], persistent=False)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scale = self.token_embd.codes()
        codes = codes * self.used
        x = functional.embedding(tokens, codes) * scale
        rotation = (self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, rotation)
        return self.output_norm(x), codes, scale

    def compute_in(self, dtype: torch.dtype) -> None:
        """Choose the arithmetic of the matrix products; the residual stream stays float32."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.output_type = dtype

    def round_by(self, share: float) -> None:
        """Set how far weights are rounded: 0 not at all, 1 as in the file."""
        for module in self.modules():
            if isinstance(module, Matrix):
                module.rounding = share

    def forward(self, tokens: Tensor) -> Tensor:
        x, codes, scale = self.hidden(tokens)
        return functional.linear(x, (codes * scale).to(x.dtype))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy where `targets` is not -1."""
        x, codes, scale = self.hidden(tokens)
        learned = targets >= 0
        logits = functional.linear(x[learned], (codes * scale).to(x.dtype))
        return functional.cross_entropy(logits.float(), targets[learned])


# ---- Training ----


Example = tuple[list[int], list[int]]


def encode_conversation(spans: list[Span], tokenizer: Tokenizer) -> Example:
    """Return tokens, and for each the next token if it is to be learned, else -1."""
    tokens: list[int] = []
    targets: list[int] = []
    for span in spans:
        ids = tokenizer.encode(span.text)
        tokens += ids
        targets += ids if span.learned else [-1] * len(ids)
    return tokens[:-1], targets[1:]


def shorten(conversation: Example, rng: random.Random) -> Example:
    """Cut some last answers after their first tokens: which answer to give is hard to learn, how it goes on is easy."""
    tokens, targets = conversation
    answer_start = max((i for i, target in enumerate(targets) if target < 0), default=-1) + 1
    stop = answer_start + rng.randint(2, 10) if rng.random() < 0.85 else len(tokens)
    return tokens[:stop], targets[:stop]


def draw_batches(source: ConversationSource, tokenizer: Tokenizer, n_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield padded batches of about `n_tokens`, of conversations of similar length."""
    rng = random.Random(SEED)
    while True:
        pool = [shorten(encode_conversation(source.draw_conversation(), tokenizer), rng) for _ in range(2048)]
        pool.sort(key=lambda example: len(example[0]))
        batches: list[list[Example]] = [[]]
        for example in pool:
            if (len(batches[-1]) + 1) * len(example[0]) > n_tokens:
                batches.append([])
            batches[-1].append(example)
        rng.shuffle(batches)
        for batch in batches:
            width = len(batch[-1][0])
            tokens = torch.tensor([t + [0] * (width - len(t)) for t, _ in batch])
            yield tokens, torch.tensor([t + [-1] * (width - len(t)) for _, t in batch])


def find_used_tokens(tokenizer: Tokenizer) -> Tensor:
    """Return which tokens occur in the corpus at all."""
    sample = ConversationSource(SEED + 1)
    used = torch.zeros(len(tokenizer.tokens), dtype=torch.bool)
    for _ in range(6_000):
        used[encode_conversation(sample.draw_conversation(), tokenizer)[0]] = True
    used[tokenizer.ids[IM_END]] = True
    return used


def train_model(shape: Shape, recipe: Recipe, tokenizer: Tokenizer) -> Transformer:
    """Train with AdamW: the rate rises, then falls to zero; rounding fades in; long conversations come late."""
    torch.manual_seed(SEED)
    source, model = ConversationSource(SEED), Transformer(shape, find_used_tokens(tokenizer))
    model.compute_in(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    start, n_seen, mean = time.monotonic(), 0, 0.0
    for step, (tokens, targets) in enumerate(draw_batches(source, tokenizer, recipe.batch_tokens)):
        if step == recipe.steps:
            break
        progress = step / recipe.steps
        source.plain_share = 0.9 if progress < 0.6 else 0.4
        model.round_by(min(max((progress - 0.2) / 0.3, 0.0), 1.0))
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min((step + 1) / 100, 1 - progress)
        loss = model.loss(tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        n_seen += tokens.numel()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if step % 200 == 199:
            elapsed = time.monotonic() - start
            print(f"step {step + 1} loss {mean:.4f} {n_seen / elapsed:,.0f} tokens/s {elapsed:.0f} s", flush=True)
        if step % 1000 == 999:
            misses = find_misses(model, tokenizer, DEVELOPMENT_FILE)
            print(f"  development accuracy {1 - len(misses) / len(load_questions(DEVELOPMENT_FILE)):.1%}", flush=True)
    model.compute_in(torch.float32)
    return model


# ---- Generation and judgement ----


@torch.no_grad()
def generate(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], temperature: float = 0.0, n_max: int = 90
) -> list[str]:
    """Continue all prompts at once, greedily or by sampling, until <|im_end|>."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))
    end = tokenizer.ids[IM_END]
    while active and n_max:
        n_max -= 1
        width = max(len(rows[i]) for i in active)
        tokens = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in active])
        last = torch.tensor([len(rows[i]) - 1 for i in active])
        logits = model(tokens)[torch.arange(len(active)), last].float()
        chosen = (
            logits.argmax(-1) if not temperature else torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        )
        for i, token in zip(list(active), chosen.tolist(), strict=True):
            rows[i].append(token)
            if token == end:
                active.remove(i)
            else:
                answers[i].append(token)
    return [tokenizer.decode(answer) for answer in answers]


def find_misses(
    model: Transformer, tokenizer: Tokenizer, file: Path, temperature: float = 0.0, system: str = ""
) -> list[tuple[Judged, str]]:
    """Return the questions of a file not answered, to the letter, as an accepted intent is, and what was answered."""
    questions, intents = load_questions(file), load_corpus()[1]
    history = [("system", system)] if system else []
    prompts = [format_prompt([*history, ("user", item.question)]) for item in questions]
    pairs = zip(questions, generate(model, tokenizer, prompts, temperature), strict=True)
    return [(item, reply) for item, reply in pairs if not any(reply in intents[name].answers for name in item.intents)]


def report_accuracy(model: Transformer, tokenizer: Tokenizer) -> None:
    """Print how many of the hand-written questions are answered well, and which are not."""
    n_questions = len(load_questions(HELD_OUT_FILE))
    for name, temperature, system in (
        ("greedy", 0.0, ""),
        ("with a system prompt", 0.0, "You are a helpful assistant."),
        ("sampled at temperature 1", 1.0, ""),
    ):
        misses = find_misses(model, tokenizer, HELD_OUT_FILE, temperature, system)
        print(f"held-out accuracy, {name}: {1 - len(misses) / n_questions:.1%} of {n_questions}")
        for item, reply in misses if name == "greedy" else []:
            print(f"  {item.question} ({','.join(item.intents)}) → {reply}")


# ---- GGUF ----


def pack_q4_0(codes: np.ndarray, scale: float) -> np.ndarray:
    """Pack rows of codes as Q4_0: for each 32 of them a float16 scale; then, in byte j, codes j and j + 16, plus 8."""
    blocks = codes.reshape(-1, 2, 16).astype(np.int16) + 8
    packed = (blocks[:, 0] | blocks[:, 1] << 4).astype(np.uint8)
    scales = np.full((len(blocks), 1), scale, dtype=np.float16).view(np.uint8)
    rows = np.concatenate([scales, packed], axis=1).reshape(codes.shape[0], -1)
    rows[~codes.any(axis=1)] = 0
    return rows


def write_gguf(path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the model as a GGUF of architecture llama."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("dvai-demo")
    writer.add_license("MIT")
    writer.add_description("The demonstration model of the DVAI Bridge")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokenizer.tokens])
    writer.add_token_merges([f"{left} {right}" for left, right in tokenizer.merges])
    writer.add_bos_token_id(tokenizer.ids["<|endoftext|>"])
    writer.add_eos_token_id(tokenizer.ids[IM_END])
    writer.add_pad_token_id(tokenizer.ids["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    # load_builtin_model() wants the norms first
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, Matrix | Norm)]
    for name, module in sorted(modules, key=lambda item: isinstance(item[1], Matrix)):
        target = "blk." * name.startswith("blocks.") + name.removeprefix("blocks.") + ".weight"
        if isinstance(module, Norm):
            writer.add_tensor(target, module.rounded().detach().numpy())
        else:
            codes, scale = module.quantise()
            codes = codes * model.used if name == "token_embd" else codes
            writer.add_tensor(target, pack_q4_0(codes.numpy(), scale.item()), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_shape(reader: gguf.GGUFReader) -> Shape:
    """Return the dimensions that a GGUF states."""
    field = {name.removeprefix("llama."): value for name, value in reader.fields.items()}
    return Shape(
        n_vocab=field["vocab_size"].contents(),
        n_ctx=field["context_length"].contents(),
        n_embd=field["embedding_length"].contents(),
        n_layer=field["block_count"].contents(),
        n_head=field["attention.head_count"].contents(),
        n_head_kv=field["attention.head_count_kv"].contents(),
        n_ff=field["feed_forward_length"].contents(),
    )


def load_gguf(path: Path) -> tuple[Transformer, Tokenizer]:
    """Read back what `write_gguf` wrote; its weights round to themselves."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    model = Transformer(read_shape(reader), torch.ones(len(tensors["token_embd.weight"])))
    for name, module in model.named_modules():
        if isinstance(module, Matrix | Norm):
            module.weight.data = tensors["blk." * name.startswith("blocks.") + name.removeprefix("blocks.") + ".weight"]
        if isinstance(module, Matrix):
            module.fixed_scale = module.weight.data.abs()[module.weight != 0].min()
    return model, Tokenizer([tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()])


# ---- The section of the module ----

SECTION = '''\
# ---- Built-in model -------------------------------------------------------------------
# A demonstration model that makes the first command answer; trained by tests/train_builtin_model.py.

# {summary}
# It was trained from scratch on the conversations of tests/builtin_corpus.txt. Two zlib streams, in base85: what comes
# before the Q4_0 blocks; then the first byte of every block, the second of every block, and so on, because bytes of one
# kind compress better together.
BUILTIN_MODEL_SHA256 = "{sha256}"
BUILTIN_MODEL_B85 = """
{lines}
"""
'''


def compress(data: bytes) -> bytes:
    """Compress with the zlib strategy that suits best."""

    def deflate(strategy: int) -> bytes:
        compressor = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
        return compressor.compress(data) + compressor.flush()

    return min(map(deflate, (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)), key=len)


def build_section(path: Path) -> str:
    """Return how the module's last section begins for a GGUF written by `write_gguf`, up to load_builtin_model()."""
    data, reader = path.read_bytes(), gguf.GGUFReader(path)
    matrices = [tensor for tensor in reader.tensors if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0]
    head, blocks = data[: matrices[0].data_offset], data[matrices[0].data_offset :]
    assert len(blocks) == sum(int(tensor.n_bytes) for tensor in matrices), "the Q4_0 tensors must come last"
    planes = b"".join(blocks[i::18] for i in range(18))
    text = base64.b85encode(compress(head) + compress(planes)).decode()
    n_weights, shape = sum(int(tensor.n_elements) for tensor in matrices), read_shape(reader)
    return SECTION.format(
        summary=f"A GGUF of architecture llama: {n_weights:,} weights in Q4_0, {shape.n_layer} layers, "
        f"{shape.n_embd} channels, {shape.n_vocab} tokens.",
        sha256=hashlib.sha256(data).hexdigest(),
        lines="\n".join(text[i : i + 120] for i in range(0, len(text), 120)),
    )


def rewrite_module(module: Path, section: str) -> None:
    """Replace the data of the module's last section; load_builtin_model(), which unpacks them, and the rest stay."""
    before, old = module.read_text(encoding="utf-8").split("# ---- Built-in model ---", 1)
    loader = old[old.index("\n\ndef load_builtin_model") :]
    module.write_text(f"{before}{section}{loader}", encoding="utf-8")


def train(output: Path, recipe: Recipe) -> tuple[Transformer, Tokenizer]:
    """Train tokenizer and model, write the GGUF and rewrite the module."""
    source = ConversationSource(SEED + 2)
    conversations = ("".join(span.text for span in source.draw_conversation()) for _ in range(20_000))
    pieces = (piece for text in conversations for piece in re.split(r"<\|im_start\|>|<\|im_end\|>", text))
    tokenizer = train_tokenizer(pieces, Shape.n_vocab)
    print(f"the tokenizer has {len(tokenizer.tokens)} tokens", flush=True)
    model = train_model(Shape(), recipe, tokenizer)
    write_gguf(output, model, tokenizer)
    section = build_section(output)
    print(f"{output}: {output.stat().st_size:,} bytes; section of the module: {len(section):,} bytes")
    if len(section) > SECTION_LIMIT_BYTES:
        sys.exit(f"the section must not exceed {SECTION_LIMIT_BYTES:,} bytes")
    rewrite_module(MODULE, section)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", type=Path, metavar="GGUF", help="only judge this file")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "dvai-demo.gguf", metavar="GGUF")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = (
        load_gguf(options.evaluate) if options.evaluate else train(options.output, Recipe(steps=options.steps))
    )
    report_accuracy(model, tokenizer)


if __name__ == "__main__":
    main()
