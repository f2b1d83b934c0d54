"""The llama engine through HTTP beside llama-server, in the same run, on a 135M-class model of random Q8_0 weights.

    python tests/bench/bench_llama.py path/to/llama-server [--quick] [--rounds N] [--threads N] [--nice N]

Needs llama-cpp-python; llama-server is to be built from the same sources with the same flags. Both servers run all
the time, each in a session of its own, and are measured by turns. What is printed is the median of the rounds, the
quartiles, and the best round. Of pairs of neighbouring rounds the ratios are formed, which a machine that others use
distorts less than the figures themselves. A full run takes three minutes, `--quick` half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.bench_engine import PLANS
from tests.gguf_writer import F32, I32, Array
from tests.support_gguf import random_model

ROOT = Path(__file__).resolve().parents[2]
SLOTS, N_CTX, END_ID = 8, 4096, 2
STREAMS, TOKENS, PROMPT_TOKENS = (1, 4, 8), 64, 16
TURN_TOKENS, NEW_TOKENS, LONG_TOKENS = 1000, 40, 2000
USUAL_TOKENS, GAP_TOKENS = 60, 3600


def build_model():
    """The 135M-class plan with a vocabulary of words, so that each token is text."""
    plan = replace(PLANS["135M"], n_ctx=N_CTX)
    words = [f"\u2581w{index}" for index in range(plan.n_vocab - 260)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *words]
    tokenizer = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": Array(F32, [0.0] * len(pieces)),
        "tokenizer.ggml.token_type": Array(I32, [2, 3, 3, *[6] * 256, *[1] * (len(words) + 1)]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": END_ID,
        "tokenizer.ggml.add_space_prefix": False,
    }
    return random_model(plan.with_extra(**tokenizer))


class PromptSource:
    """Prompts as token ids, no two of which begin alike."""

    def __init__(self):
        self._next = 0

    def draw(self, count):
        self._next += 1
        return [260 + (self._next * 7919 + index * 104729) % 48_000 for index in range(count)]


class Stream(threading.Thread):
    """One streamed completion; `times`: when it was asked for, then when each token came."""

    def __init__(self, port, prompt, max_tokens):
        super().__init__(daemon=True)
        self.port, self.times = port, []
        self.arrived = threading.Condition()
        self.is_enough = threading.Event()
        biases = {str(END_ID): -100}
        body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0.8, "logit_bias": biases}
        self.body = json.dumps(body | {"seed": 1})

    def run(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.times.append(time.perf_counter())
        connection.request("POST", "/v1/completions", self.body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if line.startswith(b"data: {") and b'"text":""' not in line:
                with self.arrived:
                    self.times.append(time.perf_counter())
                    self.arrived.notify_all()
            if self.is_enough.is_set():
                break
        connection.close()

    @property
    def first_token_s(self):
        return self.times[1] - self.times[0]

    def wait_tokens(self, count):
        with self.arrived:
            self.arrived.wait_for(lambda: len(self.times) > count, 300)


def run_streams(port, prompts, max_tokens):
    streams = [Stream(port, prompt, max_tokens) for prompt in prompts]
    for stream in streams:
        stream.start()
    for stream in streams:
        stream.join()
    return streams


def measure_streams(port, source, count, tokens=TOKENS):
    """(tokens a second of all streams together, milliseconds to the first token in the mean)."""
    streams = run_streams(port, [source.draw(PROMPT_TOKENS) for _ in range(count)], tokens)
    took_s = max(stream.times[-1] for stream in streams) - min(stream.times[0] for stream in streams)
    return count * tokens / took_s, statistics.mean(stream.first_token_s for stream in streams) * 1000


def measure_turns(port, source):
    """Seconds to the first token of the second turn of a conversation, by those of the first."""
    prompt = source.draw(TURN_TOKENS)
    first = run_streams(port, [prompt], 8)[0].first_token_s
    return (run_streams(port, [prompt + source.draw(NEW_TOKENS)], 8)[0].first_token_s / first,)


def measure_gaps(port, source):
    """A stream's gaps while a long prompt is read: (p99, greatest, p99 by the gap before, seconds until it is read).

    The first two by what is usual at that length of the stream itself, which grows slower as it grows longer: between
    the median gaps before and after the reading. The third by the median before alone.
    """
    running = Stream(port, source.draw(PROMPT_TOKENS), GAP_TOKENS)
    running.start()
    running.wait_tokens(USUAL_TOKENS)
    long = Stream(port, source.draw(LONG_TOKENS), 1)
    began = len(running.times)
    long.start()
    long.join()
    ended = len(running.times)
    running.wait_tokens(ended + USUAL_TOKENS)
    running.is_enough.set()
    running.join()
    gaps = [after - before for before, after in itertools.pairwise(running.times)]
    during = gaps[began - 1 : ended]
    before, after = statistics.median(gaps[10 : began - 1]), statistics.median(gaps[ended + 1 :])
    usual = [before + (after - before) * index / len(during) for index in range(len(during))]
    ratios = sorted(gap / each for gap, each in zip(during, usual, strict=True))
    p99 = int(0.99 * (len(ratios) - 1))
    return ratios[p99], ratios[-1], sorted(during)[p99] / before, long.first_token_s


def read_cpu_s(pid):
    """Seconds of processor time that a process took so far; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(label, values, unit="", best=min):
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    spread = f"quartiles {low:.2f} to {high:.2f}, best {best(values):.2f}"
    print(f"  {label:38}{statistics.median(values):8.2f}  ({spread}) {unit}", flush=True)


def alternate(ports, rounds, measure):
    """What `measure` gives of each port in every round, first one first, then the other: {name: columns}."""
    rows = {name: [] for name in ports}
    for number in range(rounds):
        for name in sorted(ports, reverse=bool(number % 2)):
            rows[name].append(measure(ports[name]))
    return {name: list(zip(*values, strict=True)) for name, values in rows.items()}


def show_ratio(label, ours, theirs, best):
    show(f"{label}, ratio", [a / b for a, b in zip(ours, theirs, strict=True)], best=best)
    print(f"  {f'{label}, ratio of the best rounds':38}{best(ours) / best(theirs):8.2f}")


@contextlib.contextmanager
def run_server(command, port, environ):
    process = subprocess.Popen(
        command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                answer = connection.getresponse()
                if answer.status == 200 and json.loads(answer.read()).get("status") == "ok":
                    break
            assert process.poll() is None, f"{command[0]} ended"
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def compare_streams(ports, rounds, bridge_pid, source):
    for port in ports.values():
        measure_streams(port, source, SLOTS, 8)
    for count in STREAMS:
        cpu_s = read_cpu_s(bridge_pid)
        measured = alternate(ports, rounds, functools.partial(measure_streams, source=source, count=count))
        print(f"{count} streams of {TOKENS} tokens after prompts of {PROMPT_TOKENS}")
        for name, (rates, firsts) in measured.items():
            show(f"{name}, all together", rates, "tok/s", max)
            show(f"{name}, first token", firsts, "ms")
        (our_rates, our_firsts), (their_rates, their_firsts) = measured.values()
        show_ratio("rate", our_rates, their_rates, max)
        show_ratio("first token", our_firsts, their_firsts, min)
        if cpu_s is not None:
            cpu_us = (read_cpu_s(bridge_pid) - cpu_s) / (rounds * count * TOKENS) * 1e6
            print(f"  {'bridge without its worker, CPU':38}{cpu_us:8.0f} µs a token")


def compare_pace(ports, rounds, source):
    print(f"second turn of a conversation of {TURN_TOKENS} tokens: first token by the first turn's")
    for name, (ratios,) in alternate(ports, rounds, functools.partial(measure_turns, source=source)).items():
        show(name, ratios)
    print(f"gaps of a stream while a prompt of {LONG_TOKENS} tokens is read, by its usual gap")
    for name, columns in alternate(ports, max(1, rounds // 4), functools.partial(measure_gaps, source=source)).items():
        for label, values in zip(
            ("p99", "greatest", "p99 by the gap before", "seconds of reading"), columns, strict=True
        ):
            show(f"{name}, {label}", values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_server", type=Path)
    parser.add_argument("--rounds", type=int, help="of each measurement; 9, or 4 with --quick")
    parser.add_argument("--quick", action="store_true", help="streams only, few rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0, help="of llama-server; 5, as our worker has, on a busy machine")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by an exception, which ends the servers too
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        path = Path(folder, "model.gguf")
        path.write_bytes(build_model())
        rounds = arguments.rounds or (4 if arguments.quick else 9)
        ports = {"bridge": find_free_port(), "llama-server": find_free_port()}
        common = ["-m", path, "-t", arguments.threads, "-np", SLOTS, "--port"]
        ours = [sys.executable, ROOT / "dvai_bridge.py", "serve", "--engine", "llama", "--home", folder, "-c", N_CTX]
        theirs = ["nice", "-n", arguments.nice, arguments.llama_server, "-c", N_CTX * SLOTS]
        bridge_pid, _ = (
            servers.enter_context(
                run_server(list(map(str, [*command, *common, ports[name]])), ports[name], dict(os.environ))
            )
            for name, command in (("bridge", ours), ("llama-server", theirs))
        )
        print(f"135M-class Q8_0, {arguments.threads} threads, load of the machine {os.getloadavg()[0]:.2f}")
        source = PromptSource()
        compare_streams(ports, rounds, bridge_pid, source)
        if not arguments.quick:
            compare_pace(ports, rounds, source)
        print(f"load of the machine at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
