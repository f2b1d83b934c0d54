"""The llama engine through HTTP beside llama-server, in the same run, on a 135M-class model of random Q8_0 weights.

    python tests/bench/bench_llama.py path/to/llama-server [--rounds N] [--threads N]

Needs llama-cpp-python; llama-server is to be built from the same sources with the same flags. Both servers run all
the time, and are measured by turns; what is printed is the median of the rounds and their spread.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
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
USUAL_TOKENS, GAP_TOKENS = 60, 1500


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


def measure_streams(port, prompts):
    """(tokens a second of all streams together, seconds to the first token of each)."""
    streams = run_streams(port, prompts, TOKENS)
    took_s = max(stream.times[-1] for stream in streams) - min(stream.times[0] for stream in streams)
    return len(prompts) * TOKENS / took_s, statistics.mean(stream.first_token_s for stream in streams)


def measure_turns(port, source):
    """Seconds to the first token of the second turn of a conversation, by those of the first."""
    prompt = source.draw(TURN_TOKENS)
    first = run_streams(port, [prompt], 8)[0].first_token_s
    return run_streams(port, [prompt + source.draw(NEW_TOKENS)], 8)[0].first_token_s / first


def measure_gaps(port, source):
    """(p99, greatest) of a stream's gaps while a long prompt is read, by its usual gap; seconds until it is read."""
    running = Stream(port, source.draw(PROMPT_TOKENS), GAP_TOKENS)
    running.start()
    running.wait_tokens(USUAL_TOKENS)
    long = Stream(port, source.draw(LONG_TOKENS), 1)
    began = len(running.times)
    long.start()
    long.join()
    times = list(running.times)
    running.join()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    usual, during = statistics.median(gaps[10 : began - 1]), sorted(gaps[began - 1 :])
    return during[int(0.99 * (len(during) - 1))] / usual, during[-1] / usual, long.first_token_s


def show(label, values, unit=""):
    print(f"  {label:38}{statistics.median(values):7.2f}  ({min(values):.2f} to {max(values):.2f}) {unit}", flush=True)


@contextlib.contextmanager
def run_server(command, port, environ):
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
        yield
    finally:
        process.terminate()
        process.wait(20)


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def compare(ports, rounds):
    source = PromptSource()
    for port in ports.values():
        measure_streams(port, [source.draw(PROMPT_TOKENS) for _ in range(SLOTS)])
    for count in STREAMS:
        rates, firsts = {name: [] for name in ports}, {name: [] for name in ports}
        for number in range(rounds):
            for name in sorted(ports, reverse=bool(number % 2)):
                prompts = [source.draw(PROMPT_TOKENS) for _ in range(count)]
                rate, first = measure_streams(ports[name], prompts)
                rates[name].append(rate)
                firsts[name].append(first * 1000)
        print(f"{count} streams of {TOKENS} tokens after prompts of {PROMPT_TOKENS}")
        for name in ports:
            show(f"{name}, all together", rates[name], "tok/s")
            show(f"{name}, first token", firsts[name], "ms")
        show("rate, ratio", [a / b for a, b in zip(*rates.values(), strict=True)])
        show("first token, ratio", [a / b for a, b in zip(*firsts.values(), strict=True)])
    turns = {name: [measure_turns(port, source) for _ in range(rounds)] for name, port in ports.items()}
    print(f"second turn of a conversation of {TURN_TOKENS} tokens: first token by the first turn's")
    for name, values in turns.items():
        show(name, values)
    print(f"gaps of a stream while a prompt of {LONG_TOKENS} tokens is read, by its usual gap")
    for name, port in ports.items():
        gaps = [measure_gaps(port, source) for _ in range(max(1, rounds // 3))]
        for label, values in zip(("p99", "greatest", "seconds of reading"), zip(*gaps, strict=True), strict=True):
            show(f"{name}, {label}", values)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("llama_server", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        path = Path(folder, "model.gguf")
        path.write_bytes(build_model())
        ports = {"bridge": find_free_port(), "llama-server": find_free_port()}
        common = ["-m", path, "-t", arguments.threads, "-np", SLOTS, "--port"]
        ours = [sys.executable, ROOT / "dvai_bridge.py", "serve", "--engine", "llama", "--home", folder, "-c", N_CTX]
        theirs = [arguments.llama_server, "-c", N_CTX * SLOTS]
        for name, command in (("bridge", ours), ("llama-server", theirs)):
            words = list(map(str, [*command, *common, ports[name]]))
            servers.enter_context(run_server(words, ports[name], dict(os.environ)))
        print(f"135M-class Q8_0, {arguments.threads} threads, load of the machine {os.getloadavg()[0]:.2f}")
        compare(ports, arguments.rounds)
        print(f"load of the machine at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
