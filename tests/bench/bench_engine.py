"""Speed of the built-in engine on models of random Q8_0 weights, beside the same arithmetic row by row in one run.

    python tests/bench/bench_engine.py [--threads N] [15M] [135M]

Every round times a few decoded tokens, a slice of prefill and the plain arithmetic, one after the other; what is
printed is the median of the rounds and their spread. One core, in seconds of its time (so that a busy machine
counts less); with --threads also N processes against one, in seconds of the clock.
"""

from __future__ import annotations

import argparse
import operator
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dvai_bridge import GgmlType, Transformer, estimate_memory_bytes, open_gguf, start_row_helpers
from tests.support_gguf import ModelPlan, random_model

PLANS = {
    "15M": ModelPlan(
        n_vocab=32_000, n_embd=288, n_layer=6, n_head=6, n_head_kv=6, n_ff=768, n_ctx=2048, kind=GgmlType.Q8_0
    ),
    "135M": ModelPlan(
        n_vocab=49_152,
        n_embd=576,
        n_layer=30,
        n_head=9,
        n_head_kv=3,
        n_ff=1536,
        n_ctx=2048,
        kind=GgmlType.Q8_0,
        tied=True,
    ),
}
ROUNDS, TOKENS, LONG = 7, 6, 1000
HEAD_ROWS = 4000  # of the plain output matrix; its time is scaled up


def resident_mib():
    """Memory of this process now (Linux) or at most so far."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 * 1024)


def random_rows(n_rows, n_columns):
    return [[random.gauss(0.0, 1.0) for _ in range(n_columns)] for _ in range(n_rows)]


class PlainRows:
    """The matrices of one layer and a part of the output, as rows of floats."""

    def __init__(self, plan):
        q, kv = plan.n_head * plan.head_dim, plan.n_head_kv * plan.head_dim
        self.plan = plan
        self.wide = random_rows(q + 2 * kv + plan.n_embd + 2 * plan.n_ff, plan.n_embd)
        self.down = random_rows(plan.n_embd, plan.n_ff)
        self.head = random_rows(HEAD_ROWS, plan.n_embd)

    def seconds_per_token(self):
        """All matrices of the model times a vector, row by row; attention and norms are left out."""
        x, hidden = random_rows(1, self.plan.n_embd)[0], random_rows(1, self.plan.n_ff)[0]
        start = time.process_time()
        for matrix, vector in ((self.wide, x), (self.down, hidden)):
            for row in matrix:
                sum(map(operator.mul, row, vector))
        layer = time.process_time() - start
        start = time.process_time()
        for row in self.head:
            sum(map(operator.mul, row, x))
        head = time.process_time() - start
        return layer * self.plan.n_layer + head * self.plan.n_vocab / HEAD_ROWS


def seconds_per_token(work, n_tokens, clock=time.process_time):
    start = clock()
    work()
    return (clock() - start) / n_tokens


def decode_some(model, cache):
    for token in range(TOKENS):
        model.decode(cache, token)


def fill_cache(model, cache, n_positions):
    """As if so many tokens had been prefilled, in less time."""
    dim = model.shape.head_dim
    vectors = random_rows(64, dim)
    for layer in cache.layers:
        for head in layer:
            for _ in range(n_positions - cache.length):
                head.append(random.choice(vectors), random.choice(vectors))
    cache.length = n_positions


def load(path, helpers=()):
    with open_gguf(path) as gguf:
        return Transformer.load(gguf, n_ctx=2048, on_progress=lambda done, total: None, helpers=helpers)


def show(label, values, unit):
    print(f"  {label:22}{statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f}) {unit}", flush=True)


def measure(name, path, threads):
    before, start = resident_mib(), time.process_time()
    model = load(path)
    seconds, memory = time.process_time() - start, resident_mib() - before
    estimate = estimate_memory_bytes(open_gguf(path), 2048) / 2**20
    print(f"{name}, Q8_0, {path.stat().st_size / 1e6:.0f} MB, Python {platform.python_version()}, one core")
    print(f"  load                  {seconds:7.2f} s")
    print(f"  memory                {memory:7.0f} MiB  (with a context of 2048 at most {estimate:.0f})")
    plain, cache = PlainRows(PLANS[name]), model.new_cache()
    decode, prefill, ratios = [], [], []
    model.prefill(cache, range(16))
    for _ in range(ROUNDS):
        slow = plain.seconds_per_token()
        decode.append(seconds_per_token(lambda: decode_some(model, cache), TOKENS))
        prefill.append(seconds_per_token(lambda: model.prefill(cache, range(TOKENS)), TOKENS))
        ratios.append(slow / decode[-1])
        cache.truncate(16)
    show("decode", [1 / s for s in decode], "tok/s")
    show("prefill", [1 / s for s in prefill], "tok/s")
    show("decode / row by row", ratios, "times")
    fill_cache(model, cache, LONG)
    late = [seconds_per_token(lambda: model.decode(cache, 1), 1) for _ in range(ROUNDS)]
    show(f"decode at {LONG}", [1 / s for s in late], "tok/s")
    if threads > 1:
        compare_threads(model, path, threads)


def compare_threads(model, path, threads):
    shared, ratios = load(path, start_row_helpers(str(path), threads - 1)), []
    for _ in range(ROUNDS):
        times = [
            seconds_per_token(lambda m=m: decode_some(m, m.new_cache()), TOKENS, time.perf_counter)
            for m in (model, shared)
        ]
        ratios.append(times[0] / times[1])
    shared.close()
    show(f"decode, {threads} processes", ratios, "times one")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="|".join(PLANS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file:  # a process of its own, so that its memory is the model's
        measure(arguments.models[0], arguments.file, arguments.threads)
        return
    for name in arguments.models or PLANS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            path.write_bytes(random_model(PLANS[name]))
            words = [sys.executable, __file__, name, "--file", str(path), "--threads", str(arguments.threads)]
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
