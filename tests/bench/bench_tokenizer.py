"""How long a model's header, its tokenizer and a hostile header take.

    python3 tests/bench/bench_tokenizer.py [--vocabulary MODEL.gguf ...]      (needs pytest)

Without arguments the vocabulary is made up: 150,000 tokens and as many merges, as large as those of real models.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gguf_writer as w  # noqa: E402
from test_gguf import HOSTILE  # noqa: E402

import dvai_bridge as d  # noqa: E402

TOKENS = 150_000
TEXT = (ROOT / "dvai_bridge.py").read_text(encoding="utf-8")[:10_000]


def build_vocabulary():
    """A byte-level vocabulary whose merges really happen: letters join to pairs, pairs to words."""
    letters = "etaoinshrdlucmfwypvbgkjqxzETAOINSHRDLU"
    pairs = [a + b for a, b in product(letters, letters)]
    merges = [f"{pair[0]} {pair[1]}" for pair in pairs]
    words = [f"{a} {b}" for a, b in product(pairs, pairs)][: TOKENS - len(pairs) - 256]
    tokens = [*d._BYTE_ALPHABET.values(), *pairs, *(word.replace(" ", "") for word in words)]
    return w.build_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges + words,
        }
    )


def timed(call, *arguments, **options):
    start = time.perf_counter()
    result = call(*arguments, **options)
    return (time.perf_counter() - start) * 1000, result


def measure_vocabulary(path):
    header_ms, gguf = timed(d.open_gguf, path)
    load_ms, tokenizer = timed(d.load_tokenizer, gguf.metadata)
    flags = {"add_special": False, "parse_special": True}
    tokenizer.encode("warm", **flags)
    first_ms, ids = timed(tokenizer.encode, TEXT, **flags)
    again_ms, _ = timed(tokenizer.encode, TEXT, **flags)
    word_ms, _ = timed(tokenizer.encode, "a" * 100_000, **flags)
    print(f"{path.name}: {tokenizer.n_vocab} tokens, header {header_ms:.0f} ms, tokenizer {load_ms:.0f} ms")
    print(f"  10 kB of text, {len(ids)} tokens: {first_ms:.1f} ms, again {again_ms:.1f} ms")
    print(f"  100 kB of one letter: {word_ms:.0f} ms")


def measure_refusal(data):
    """(milliseconds, bytes at most) of refusing a header."""

    def refuse():
        try:
            d.parse_gguf_header(data, len(data))
        except d.ModelFileError:
            return
        raise AssertionError("not refused")

    elapsed_ms, _ = timed(refuse)
    tracemalloc.start()
    refuse()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return elapsed_ms, peak_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=Path, nargs="*", default=[])
    paths = parser.parse_args().vocabulary
    with tempfile.TemporaryDirectory() as folder:
        if not paths:
            paths = [Path(folder, "made-up.gguf")]
            paths[0].write_bytes(build_vocabulary())
        for path in paths:
            measure_vocabulary(path)
    costs = [measure_refusal(data) for data, _ in HOSTILE.values()]
    worst_ms, worst_bytes = (max(column) for column in zip(*costs, strict=True))
    print(f"{len(costs)} hostile headers refused, each within {worst_ms:.1f} ms and {worst_bytes / d.MIB:.2f} MiB")


if __name__ == "__main__":
    main()
