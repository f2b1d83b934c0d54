"""A script goes on from its bytecode: what is taken for valid, when it is written, and what the user sees of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import CLEAN_ENVIRON, MODULE, start_bridge

from dvai_bridge import build_own_program, find_compiled, is_outermost, names_serve, save_compiled

posix_only = pytest.mark.skipif(os.name != "posix", reason="no process replaces itself there")
MISTAKE = "dvai_bridge.py: there is no option '--nonsense' (see dvai_bridge.py serve --help)\n"


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A copy of the module whose bytecode was never written."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    return Path(shutil.copy(MODULE, tmp_path / "dvai_bridge.py"))


def run(script, *words, options=(), environ=None, cwd=None):
    environ = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""} | (environ or {})
    command = [sys.executable, *options, str(script), *words]
    return subprocess.run(command, env=CLEAN_ENVIRON | environ, cwd=cwd, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize(
    ("words", "does"),
    [
        ([], True),
        (["serve"], True),
        (["serve", "--lan"], True),
        (["--lan"], True),
        (["-hf", "a/b"], True),
        (["--help"], False),
        (["-h"], False),
        (["--version"], False),
        (["models"], False),
        (["worker"], False),
        ([""], False),
    ],
)
def test_which_command_lines_start_the_bridge(words, does):
    assert names_serve(words) is does


def test_bytecode_counts_while_it_is_that_of_this_source(script):
    assert find_compiled(str(script)) is None
    save_compiled(str(script))
    compiled = Path(find_compiled(str(script)))
    good = compiled.read_bytes()
    for at in (0, 4, 8, 12):  # of another interpreter, checked by hash, of another time, of another size
        compiled.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert find_compiled(str(script)) is None
    compiled.write_bytes(good[:9])
    assert find_compiled(str(script)) is None
    compiled.write_bytes(good)
    assert find_compiled(str(script)) == str(compiled)
    script.write_text(script.read_text("utf-8") + "#\n", "utf-8")
    assert find_compiled(str(script)) is None


def test_who_wants_no_bytecode_gets_none(script, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    save_compiled(str(script))
    assert find_compiled(str(script)) is None
    assert run(script, "serve", "--nonsense", environ={"PYTHONDONTWRITEBYTECODE": "1"}).stderr == MISTAKE
    assert not (script.parent / "__pycache__").exists()


@posix_only
def test_a_script_that_serves_keeps_its_bytecode_and_its_name(script):
    assert run(script, "models", "--nonsense").returncode == 2
    assert find_compiled(str(script)) is None, "a short command is not worth starting twice"
    for words in (["serve", "--nonsense"], ["--nonsense"]):
        for name, cwd in ((script, None), (script.name, script.parent)):
            result = run(name, *words, cwd=cwd)
            assert (result.returncode, result.stderr) == (2, MISTAKE)
    assert find_compiled(str(script)) is not None


@posix_only
@pytest.mark.parametrize("options", [("-I",), ("-S", "-E"), ("-X", "utf8", "-W", "ignore"), ("-O",), ("-B",)])
def test_the_interpreter_s_options_stay(script, options):
    result = run(script, "--nonsense", options=options)
    assert (result.returncode, result.stderr) == (2, MISTAKE)


def test_a_place_that_keeps_nothing_costs_nothing_but_time(script, tmp_path):
    (tmp_path / "file").touch()
    result = run(script, "--nonsense", environ={"PYTHONPYCACHEPREFIX": str(tmp_path / "file")})
    assert (result.returncode, result.stderr) == (2, MISTAKE)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_the_bridge_and_its_engine_run_compiled_and_answer(script, tmp_path):
    environ = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": ""}
    with start_bridge(tmp_path / "home", module=script, environ=environ) as bridge:
        pid = bridge.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *children):
            words = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
            assert words[1].endswith(b".pyc"), words
        assert len(children) == 1 and bridge.process.poll() is None


def test_a_profiler_and_a_module_run_by_name_are_left_alone(script):
    assert not is_outermost(sys._getframe())
    result = run(script, "serve", "--nonsense", options=("-m", "cProfile"))
    assert result.stderr == MISTAKE and "function calls" in result.stdout
    assert find_compiled(str(script)) is None
    result = run("dvai_bridge", "serve", "--nonsense", options=("-m",), cwd=script.parent)
    assert (result.returncode, result.stderr) == (2, MISTAKE)


def test_a_worker_starts_from_bytecode_where_there_is_some():
    interpreter, program = build_own_program()
    assert interpreter == sys.executable and program == (find_compiled(str(MODULE)) or str(MODULE))
