"""What several test files share."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

MODULE = Path(__file__).resolve().parent.parent / "dvai_bridge.py"
CLEAN_ENVIRON = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("DVAI_", "LLAMA_", "HF_", "OLLAMA_", "OPENAI_", "XDG_", "PYTHON"))
} | {"PYTHONPATH": str(MODULE.parent)}
PROGRAM = [sys.executable, "-m", "dvai_bridge"]  # as the installed command: a script is compiled at every start


def require(name: str) -> ModuleType:
    """The package `name`, or skip the test; with DVAI_TEST_ALL=1 its absence is a failure."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("DVAI_TEST_ALL") == "1":
            pytest.fail(f"DVAI_TEST_ALL=1 and the package {name} is not installed")
        pytest.skip(f"needs the package {name}", allow_module_level=True)


@dataclass
class RunningBridge:
    """A real `serve` process. `lines`: what it printed so far on stdout; `log`: on stderr."""

    process: subprocess.Popen[str]
    port: int = 0
    scheme: str = "http"
    lines: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"

    def request(self, method, path, body=None, headers=None, timeout_s=30):
        """(status, headers, body) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
            headers = ({"Content-Type": "application/json"} if data is not None else {}) | (headers or {})
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()


def _follow(stream, lines):
    for line in stream:
        lines.append(line.rstrip("\n"))


def wait_for(condition, timeout_s, what):
    """Poll until `condition()` is true; what takes long is looked at less often, and has the processor for itself."""
    started_at = time.monotonic()
    while not (value := condition()):
        waited_s = time.monotonic() - started_at
        assert waited_s < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(min(0.01 + waited_s / 20, 0.2))
    return value


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # which of the processes that test
PORTS = range(10_000 + WORKER % 10 * 2_000, 12_000 + WORKER % 10 * 2_000)
_ports = itertools.cycle(random.sample(PORTS, len(PORTS)))


def find_free_port():
    """A port for a server whose URL has to be known before it starts, or that comes back where it was.

    Nobody else takes it meanwhile: systems give away what is above 32768, and each process that tests has its own.
    """
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def read_health(bridge):
    status, _, body = bridge.request("GET", "/health", timeout_s=20)
    assert status == 200, body
    return json.loads(body)


@contextlib.contextmanager
def start_bridge(home, *arguments, module=MODULE, environ=None, ready=True, cwd=None, command="serve"):
    """A `serve`, or `provider`, of its own home and a free port, ready to answer; stopped, and its log checked, at the
    end."""
    Path(home).mkdir(exist_ok=True)
    words = [command, "--port", "0", "--home", str(home), *map(str, arguments)]
    process = subprocess.Popen(
        [*(PROGRAM if module is MODULE else (sys.executable, str(module))), *words],
        env=CLEAN_ENVIRON | (environ or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd or home,
    )
    bridge = RunningBridge(process)
    followers = [
        threading.Thread(target=_follow, args=pair)
        for pair in ((process.stdout, bridge.lines), (process.stderr, bridge.log))
    ]
    for follower in followers:
        follower.start()
    try:
        line = wait_for(lambda: next((x for x in bridge.lines if x.startswith("listening on ")), None), 60, bridge.log)
        url = line.removeprefix("listening on ")
        bridge.scheme, bridge.port = url.partition("://")[0], int(url.rpartition(":")[2].partition("/")[0])
        if ready:
            wait_for(lambda: read_health(bridge)["status"] == "ok", 60, "the model is loaded")
        yield bridge
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
        for follower in followers:
            follower.join()
        process.stdout.close()
        process.stderr.close()
    assert not any("Traceback" in line for line in bridge.log), "\n".join(bridge.log)
