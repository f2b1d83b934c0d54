"""Time from the command to the first healthy answer, beside `python -c "import asyncio"`, in one run.

    python3 tests/bench/bench_start.py [--runs 15]

Once as a script, whose 10,000 lines Python compiles at every start, and once with `-m` (as the installed command
runs), where it finds them compiled. Prints median and spread in milliseconds, and the ratios run by run.
"""

import argparse
import http.client
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODULE = Path(__file__).resolve().parents[2] / "dvai_bridge.py"


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def time_import():
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import asyncio"], check=True)
    return time.perf_counter() - start


def is_healthy(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except ConnectionError:
        return False
    finally:
        connection.close()


def time_start(home, *program):
    port = find_free_port()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ["PYTHONPYCACHEPREFIX"] = home
    start = time.perf_counter()
    command = [sys.executable, *program, "serve", "--port", str(port), "--home", home]
    with subprocess.Popen(
        command, cwd=MODULE.parent, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            while not is_healthy(port):
                if server.poll() is not None or time.perf_counter() - start > 20:
                    raise SystemExit("the server did not start")
                time.sleep(0.001)
            return time.perf_counter() - start
        finally:
            server.terminate()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as home:

        def time_all():
            return time_import(), time_start(home, str(MODULE)), time_start(home, "-m", MODULE.stem)

        time_all()
        rounds = [time_all() for _ in range(runs)]
    print(f"start to the first healthy answer, {runs} runs, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    base = [times[0] for times in rounds]
    for name, times in zip(("import asyncio", "as a script", "with -m"), zip(*rounds, strict=True), strict=True):
        low, middle, high = (1000 * f(times) for f in (min, statistics.median, max))
        ratio = statistics.median(time / one for time, one in zip(times, base, strict=True))
        print(f"  {name:15} median {middle:4.0f} ms   min {low:4.0f}   max {high:4.0f}   {ratio:4.2f} x import asyncio")


if __name__ == "__main__":
    main()
