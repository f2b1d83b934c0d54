"""Every Python program of the README runs, as it stands, against real bridges."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support import CLEAN_ENVIRON, MODULE, require, start_bridge
from tests.support_worker import build_byte_model

README = MODULE.parent / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = BLOCK.findall(README.read_text("utf-8"))
OWN, OTHER = "http://127.0.0.1:38883", "http://192.168.1.20:38883"  # this machine's bridge, and another device
OTHER_MODEL = "llama-3.2-3b-instruct-q4_k_m"  # what the other device has, by name
CALLER_MODEL = "qwen2.5-3b-instruct-q4_k_m"  # what this machine has in the example with tools
PRINTED = {
    "AsyncOpenAI": r"Does \S+ show \d{6}\? \[y/N\] paired with \S+\n(.*\n)*\[\S+ answers\]",
    "def approve": r"dvai-demo on http://127\.0\.0\.1:\d+/v1\nthis machine: .+\n(.*\n)+closed: 1 thread is left\n",
    "def intercept": r"(data: .*\n\n){3}data: \[DONE\]\n\n\n\{.*\"completion_tokens\":[1-8],",
    "stats.tokens_per_s": r"Start the bridge .+\nserved by local at [0-9.]+ tokens/s\n",
    "start_provider": r"the provider answers in [0-9.]+ s\n.+\nanswered by the provider\n",
    "compose_signed_message": rf"\d+ tokens of {OTHER_MODEL}\n",
}


@pytest.fixture(scope="module")
def bridges(tmp_path_factory):
    """The bridges that the README speaks of: the model that this machine's has ("": any) → address → where it is."""
    homes = tmp_path_factory.mktemp("homes")
    model = homes / "other.gguf"
    model.write_bytes(build_byte_model())
    caller = homes / f"{CALLER_MODEL}.gguf"
    shutil.copy(MODULE.parent / "tests" / "tool_model.gguf", caller)
    other = ("--model", model, "--alias", OTHER_MODEL, "--lan", "--host", "127.0.0.1")
    allow = ("--pairing", "allow", "--legacy-pairing", "allow")
    with (
        start_bridge(homes / "own") as here,
        start_bridge(homes / "caller", "--model", caller, "--chat-template", "chatml") as calling,
        start_bridge(homes / "other", *other, *allow) as there,
    ):
        ports = {"": here.port, CALLER_MODEL: calling.port}
        yield {
            model: {OWN: f"http://127.0.0.1:{port}", OTHER: f"http://127.0.0.1:{there.port}"}
            for model, port in ports.items()
        }


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_of_the_readme_runs(bridges, tmp_path, number):
    program = PROGRAMS[number]
    if "openai" in program:
        require("openai")
    for shown, real in bridges[CALLER_MODEL if CALLER_MODEL in program else ""].items():
        program = program.replace(shown, real)
    assert ":38883" not in program, "an address that the test does not know"
    path = tmp_path / "program.py"
    path.write_text(program, "utf-8")
    environ = CLEAN_ENVIRON | {"DVAI_HOME": str(tmp_path / "home"), "DVAI_PORT": "0", "PYTHONPATH": str(MODULE.parent)}
    command = [sys.executable, "-X", "dev", str(path)]
    user = {"input": "y\n", "capture_output": True, "text": True, "timeout": 180}
    done = subprocess.run(command, env=environ, cwd=tmp_path, **user)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for mark, printed in PRINTED.items():
        if mark in program:
            assert re.match(printed, done.stdout), done.stdout
    assert done.stdout.strip()


def test_there_is_a_program_for_each_use():
    for mark in PRINTED:
        assert any(mark in program for program in PROGRAMS), mark
