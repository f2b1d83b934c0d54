"""Delegation by public key: how soon the first answer comes, and what each costs afterwards (Linux).

    python3 tests/bench/bench_delegation.py [--rounds 5] [--requests 100]

All in processes of their own: one provider, with a tiny model, so that what is measured is the way; a relay; consumers.
Cold: from the start of a consumer's process, or from the first request of a running one that names a key it has never
heard of, until the answer is there. On a network means two network namespaces, the provider found by multicast DNS
(needs root and iproute2); else it is named by --peer. Afterwards: each round asks in turn by every way, on connections
that are kept. Processor time is that of the bridge which the client asks, the kernel's work for it included
(schedstat). The median of all rounds, then the least and the most.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from support import CLEAN_ENVIRON, MODULE, start_bridge, wait_for  # noqa: E402
from support_lan import Lan, Machine  # noqa: E402
from support_relay import find_free_port, start_relay  # noqa: E402
from support_worker import build_byte_model  # noqa: E402

import dvai_bridge as d  # noqa: E402

QVAC_COLD_S = (15, 45)  # which its documentation names for the first connection
CHAT = "/v1/chat/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
SEED = d.encode_base64url(bytes(range(32)))


def build_key():
    identity = d.Identity(device_id="provider", device_name="provider", seed=SEED)
    return d.encode_base64url(d.build_static_key(identity, d.choose_crypto_backend()).public)


class Asker:
    """A client of a bridge, on a connection that is kept."""

    def __init__(self, bridge):
        self.bridge = bridge
        self._connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=120)

    def ask(self, **changes):
        """Seconds until the whole answer was there."""
        began_s = time.perf_counter()
        self._connection.request("POST", CHAT, json.dumps(ASKED | changes), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        data = answer.read()
        assert answer.status == 200, data
        return time.perf_counter() - began_s

    def read_cpu_s(self):
        tasks = Path(f"/proc/{self.bridge.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def measure_cold(flags):
    """Seconds from nothing to the first answer; those of it until it listens; and those of a first `delegate`."""
    with tempfile.TemporaryDirectory() as folder:
        began_s = time.perf_counter()
        with start_bridge(f"{folder}/a", "--delegate", build_key(), *flags, ready=False) as bridge:
            listening_s = time.perf_counter() - began_s
            Asker(bridge).ask()
            first_s = time.perf_counter() - began_s
        with start_bridge(f"{folder}/b", "--model", "builtin", *flags) as bridge:
            named_s = Asker(bridge).ask(delegate=build_key())
    return first_s, listening_s, named_s


def format_spread(values, scale=1.0, digits=2):
    middle, least, most = (scale * each for each in (statistics.median(values), min(values), max(values)))
    return f"{middle:8.{digits}f} ({least:.{digits}f}–{most:.{digits}f})"


def show_cold(name, rounds):
    first, listening, named = zip(*rounds, strict=True)
    ratio = QVAC_COLD_S[0] / max(first)
    print(f"  {name}")
    print(f"    from the start of its process  {format_spread(first)} s", end=", ")
    print(f"of which {statistics.median(listening):.2f} until it listens")
    print(f"    from the request naming a key  {format_spread(named)} s", flush=True)
    print(
        f"    the least of {QVAC_COLD_S[0]}–{QVAC_COLD_S[1]} s (QVAC's documentation) is {ratio:.0f} times the most",
        flush=True,
    )


def measure_cold_on_network(rounds, model):
    """In namespaces; each round is this program once more, in the consumer's."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        lan = Lan()
        stack.callback(lan.delete)
        lan.create()
        for short in ("one", "two"):
            lan.connect(short)
        seed = Path(folder, "seed")
        seed.write_text(SEED)
        provider = Machine(lan, "one", Path(folder, "provider"))
        stack.callback(provider.close)
        provider.start("--model", model, "--engine", "builtin", "--provide", "--open", "--seed-file", seed)
        wait_for(lambda: "tiny" in provider.run("status").stdout, 60, "the provider has its model")
        command = lan.exec("two", sys.executable, __file__, "--cold-once")
        return [json.loads(subprocess.check_output(command, env=CLEAN_ENVIRON)) for _ in range(rounds)]


def measure_warm(askers, rounds, requests):
    """For each way and round: the seconds of each request, and the consumer's processor time per request."""
    times = {way: [] for way in askers}
    cpu = {way: [] for way in askers}
    for number in range(rounds + 1):
        for way, (asker, changes) in askers.items():
            before_s = asker.read_cpu_s()
            seconds = [asker.ask(**changes) for _ in range(requests)]
            if number:  # the first round only warms up
                times[way].append(seconds)
                cpu[way].append((asker.read_cpu_s() - before_s) / requests)
    return times, cpu


def show_warm(times, cpu, requests):
    print(f"\nper request afterwards ({requests} a round)")
    base = statistics.median([each for seconds in times["plain HTTP to the provider"] for each in seconds])
    for way, rounds in times.items():
        middle = [statistics.median(seconds) for seconds in rounds]
        high = [sorted(seconds)[len(seconds) * 99 // 100] for seconds in rounds]
        print(f"  {way}")
        print(f"    p50 {format_spread(middle, 1e3)} ms   p99 {format_spread(high, 1e3)} ms", end="   ")
        print(f"processor {format_spread(cpu[way], 1e6, 0)} µs   {statistics.median(middle) / base:.2f} × plain")
    keyed, paired = (
        statistics.median([statistics.median(seconds) for seconds in times[way]]) for way in ("by key", "paired tunnel")
    )
    print(f"  by key takes {keyed / paired:.2f} times what a paired tunnel takes", flush=True)


def run(options, folder):
    model = Path(folder, "tiny.gguf")
    model.write_bytes(build_byte_model())
    port = find_free_port()
    relay_url = f"ws://127.0.0.1:{port}"
    unlimited = {"SESSIONS_PER_ADDRESS": "0", "SESSIONS_PER_ADDRESS_PER_MINUTE": "0", "RENDEZVOUS_URL": relay_url}
    with contextlib.ExitStack() as stack:
        stack.enter_context(start_relay(port=port, **unlimited))
        flags = (
            "--model",
            model,
            "--engine",
            "builtin",
            "--lan",
            "--host",
            "127.0.0.1",
            "--pairing",
            "allow",
            "--open",
        )
        provider = stack.enter_context(
            start_bridge(
                f"{folder}/provider",
                *flags,
                "--rendezvous-url",
                relay_url,
                environ={"DVAI_SEED": SEED},
                command="provider",
            )
        )
        url = f"http://127.0.0.1:{provider.port}"
        at_peer, at_relay = (
            ("--no-discover-lan", *rest) for rest in (("--peer", url), ("--rendezvous-url", relay_url))
        )
        print("from nothing to the first answer by key")
        if os.geteuid() == 0 and shutil.which("ip"):
            show_cold("on a network", measure_cold_on_network(options.rounds, model))
        show_cold("at an address that is named", [measure_cold(at_peer) for _ in range(options.rounds)])
        show_cold("through a relay", [measure_cold(at_relay) for _ in range(options.rounds)])
        paired = stack.enter_context(start_bridge(f"{folder}/paired", "--offload-only", *at_peer))
        command = [sys.executable, str(MODULE), "pair", "request", url, "--yes", "--home", f"{folder}/paired"]
        subprocess.run(command, env=CLEAN_ENVIRON, check=True, capture_output=True)
        wait_for(lambda: b'"ready"' in paired.request("GET", "/v1/dvai/peers")[2], 30, "the paired way")
        keyed = stack.enter_context(start_bridge(f"{folder}/keyed", "--delegate", build_key(), *at_peer))
        relayed = stack.enter_context(start_bridge(f"{folder}/relayed", "--delegate", build_key(), *at_relay))
        fresh = {"delegate": {"providerPublicKey": build_key(), "forceNewConnection": True}}
        ways = {
            "plain HTTP to the provider": (Asker(provider), {}),
            "paired tunnel": (Asker(paired), {}),
            "by key": (Asker(keyed), {}),
            "by key, through the relay": (Asker(relayed), {}),
            "by key, each on a new connection": (Asker(keyed), fresh),
        }
        show_warm(*measure_warm(ways, options.rounds, options.requests), options.requests)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--cold-once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cold_once:
        print(json.dumps(measure_cold(())))
        return
    backend = type(d.choose_crypto_backend()).__name__
    print(f"Python {platform.python_version()}, {backend}, {options.rounds} rounds: median (least–most)")
    with tempfile.TemporaryDirectory() as folder:
        run(options, folder)


if __name__ == "__main__":
    main()
