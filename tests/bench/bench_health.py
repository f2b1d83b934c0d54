"""How fast health answers while the engine computes: every request while a long answer is streamed.

    python3 tests/bench/bench_health.py [--requests 1000]

The model has 15M-class matrices (dim 288, 6 layers, hidden 768) of random weights.
"""

import argparse
import http.client
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import start_bridge
from tests.support_worker import build_byte_model


def follow_stream(bridge, ended):
    body = {"prompt": "hello", "max_tokens": 1500, "temperature": 1, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", bridge.port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    while answer.readline() and not ended.is_set():
        pass
    connection.close()


def time_requests(bridge, count):
    """Milliseconds of each of `count` requests on one connection that is kept alive."""
    connection, times = http.client.HTTPConnection("127.0.0.1", bridge.port), []
    for _ in range(count):
        start = time.perf_counter()
        connection.request("GET", "/health")
        connection.getresponse().read()
        times.append(1000 * (time.perf_counter() - start))
        time.sleep(0.002)
    connection.close()
    return sorted(times)


def show(name, times):
    middle, high, worst = statistics.median(times), times[len(times) * 99 // 100], times[-1]
    print(f"  {name:12} p50 {middle:6.2f} ms   p99 {high:6.2f}   max {worst:6.2f}   ({len(times)} requests)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    count = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        model.write_bytes(build_byte_model(n_embd=288, n_layer=6, n_head=6, n_head_kv=6, n_ff=768))
        with start_bridge(folder, "--model", model) as bridge:
            print(f"health while the engine computes, Python {platform.python_version()}")
            show("idle", time_requests(bridge, count))
            ended = threading.Event()
            streams = [threading.Thread(target=follow_stream, args=(bridge, ended)) for _ in range(2)]
            for stream in streams:
                stream.start()
            time.sleep(0.5)
            show("computing", time_requests(bridge, count))
            ended.set()
            for stream in streams:
                stream.join()


if __name__ == "__main__":
    main()
