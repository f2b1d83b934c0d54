"""Section Storage: whatever kills, fills or damages a save, the file is the old one or the new one, whole."""

import errno
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    Directories,
    PathLock,
    RunningBridge,
    RunningRecord,
    StorageError,
    UsageError,
    choose_directories,
    load_file,
    save_file,
    update_file,
)

FOLDER = str(Path(dvai_bridge.__file__).parent)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX file modes, links and signals")


def parse_document(data: bytes) -> dict:
    document = json.loads(data)
    if document["n"] != len(document["filler"]):
        raise ValueError("not what was saved")
    return document


def encode_document(n: int) -> bytes:
    return json.dumps({"n": n, "filler": "x" * n}).encode()


# ---- directories ----------------------------------------------------------------------

IN_HOME = ("/h/.cache/dvai-bridge", "/h/.local/share/dvai-bridge")
IN_LIBRARY = ("/h/Library/Caches/dvai-bridge", "/h/Library/Application Support/dvai-bridge")
IN_PROFILE = ("/u/AppData/Local/dvai-bridge/Cache", "/u/AppData/Local/dvai-bridge")


@pytest.mark.parametrize(
    ("environ", "platform", "home", "expected"),
    [
        ({"HOME": "/h"}, "linux", None, IN_HOME),
        ({"HOME": "/h"}, "freebsd14", None, IN_HOME),
        ({"HOME": "/h", "XDG_CACHE_HOME": "relative", "XDG_DATA_HOME": ""}, "linux", None, IN_HOME),
        (
            {"XDG_CACHE_HOME": "/c", "XDG_DATA_HOME": "/d"},
            "linux",
            None,
            ("/c/dvai-bridge", "/d/dvai-bridge"),
        ),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/not-on-a-mac"}, "darwin", None, IN_LIBRARY),
        ({"LOCALAPPDATA": "/L"}, "win32", None, ("/L/dvai-bridge/Cache", "/L/dvai-bridge")),
        ({"USERPROFILE": "/u"}, "win32", None, IN_PROFILE),
        ({"HOME": "/h", "DVAI_HOME": "/env"}, "linux", None, ("/env/cache", "/env/data")),
        ({"HOME": "/h", "DVAI_HOME": "/env"}, "linux", "/flag", ("/flag/cache", "/flag/data")),
        ({"HOME": "/h", "DVAI_HOME": ""}, "linux", None, IN_HOME),
    ],
)
def test_directories(environ, platform, home, expected):
    cache, data = expected
    assert choose_directories(environ, platform, home) == Directories(cache=Path(cache), data=Path(data))


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_directories_without_a_home_say_what_to_do(platform):
    with pytest.raises(UsageError, match="--home DIR or DVAI_HOME"):
        choose_directories({}, platform)
    assert choose_directories({"DVAI_HOME": "/x"}, platform).data == Path("/x/data")


# ---- what a save leaves ---------------------------------------------------------------


def test_saved_bytes_come_back_and_have_a_copy(tmp_path):
    path = tmp_path / "state" / "pairings.json"
    assert load_file(path, bytes) is None
    save_file(path, b"one")
    save_file(path, b"two" * 100_000)
    assert load_file(path, bytes) == b"two" * 100_000
    assert (tmp_path / "state" / "pairings.json.bak").read_bytes() == b"two" * 100_000
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == [".pairings.json.lock", "pairings.json", "pairings.json.bak"]


@posix_only
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes(tmp_path, umask):
    directory = tmp_path / "state"
    before = os.umask(umask)
    try:
        save_file(directory / "key", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()} == {0o600}


@posix_only
def test_a_directory_others_could_enter_is_narrowed(tmp_path):
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(0o755)
    save_file(directory / "key", b"secret")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


# ---- failures at every step -----------------------------------------------------------

SYSTEM_CALLS = ("open", "write", "fsync", "replace", "rename", "unlink", "close")


class Saboteur:
    """Stands before the system calls of a save and strikes at the n-th one (counted from 1)."""

    def __init__(self, patch, strike_at, strike):
        self.calls = []
        self.strike_at, self.strike = strike_at, strike
        for name in SYSTEM_CALLS:
            patch.setattr(os, name, self.stand_before(name, getattr(os, name)))

    def stand_before(self, name, real):
        def call(*args, **kwargs):
            self.calls.append(name)
            if len(self.calls) == self.strike_at:
                self.strike()
            return real(*args, **kwargs)

        return call


def record_calls(tmp_path, monkeypatch):
    """The system calls of one save over an existing file, in order."""
    path = tmp_path / "recorded" / "doc"
    save_file(path, encode_document(1))
    with monkeypatch.context() as patch:
        saboteur = Saboteur(patch, -1, lambda: None)
        save_file(path, encode_document(2))
    assert {"open", "write", "fsync", "replace"} <= set(saboteur.calls)
    return saboteur.calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_open_write_fsync_and_rename_failing_in_turn(tmp_path, monkeypatch, number):
    """Before the first rename: an error that says why, and the old file; after it: the new one."""

    def fail():
        raise OSError(number, os.strerror(number))

    calls = record_calls(tmp_path, monkeypatch)
    for step, name in enumerate(calls, 1):
        if name in ("unlink", "close"):
            continue
        path = tmp_path / str(step) / "doc"
        save_file(path, encode_document(1))
        error = None
        with monkeypatch.context() as patch:
            Saboteur(patch, step, fail)
            try:
                save_file(path, encode_document(2))
            except StorageError as exc:
                error = str(exc)
        was_replaced = "replace" in calls[: step - 1]
        assert load_file(path, parse_document)["n"] == (2 if was_replaced else 1), (step, name)
        if not was_replaced:
            why = os.strerror(number) if number == errno.EIO else "the disk is full"
            assert error == f"cannot save {path}: {why}"
            assert sorted(p.name for p in path.parent.iterdir()) == [".doc.lock", "doc", "doc.bak"]
        save_file(path, encode_document(3))
        assert load_file(path, parse_document)["n"] == 3


def test_a_copy_that_cannot_be_renamed_is_a_warning_not_a_failed_save(tmp_path, monkeypatch, caplog):
    def fail():
        raise OSError(errno.EIO, "Input/output error")

    calls = record_calls(tmp_path, monkeypatch)
    second_rename = [step for step, name in enumerate(calls, 1) if name == "replace"][1]
    with monkeypatch.context() as patch:
        Saboteur(patch, second_rename, fail)
        save_file(tmp_path / "doc", encode_document(7))
    assert load_file(tmp_path / "doc", parse_document)["n"] == 7
    assert "its copy is not" in caplog.text


@needs_fork
def test_killed_at_every_step_of_a_save(tmp_path, monkeypatch):
    """SIGKILL before each system call of a save: old or new, whole, and the next save works and tidies."""
    calls = record_calls(tmp_path, monkeypatch)
    seen = []
    for step in range(1, len(calls) + 1):
        path = tmp_path / f"kill-{step}" / "doc"
        save_file(path, encode_document(1))
        pid = os.fork()
        if pid == 0:  # the child only saves, and dies of it
            try:
                Saboteur(pytest.MonkeyPatch(), step, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save_file(path, encode_document(2))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, (step, calls[step - 1])
        assert parse_document(path.with_name("doc.bak").read_bytes())["n"] in (1, 2)
        seen.append(load_file(path, parse_document)["n"])
        save_file(path, encode_document(3))
        assert load_file(path, parse_document)["n"] == 3
        assert sorted(p.name for p in path.parent.iterdir()) == [".doc.lock", "doc", "doc.bak"]
    assert set(seen) == {1, 2} and seen == sorted(seen)


@posix_only
def test_a_file_size_limit_met_for_real(tmp_path):
    """The kernel itself refuses the write half way (RLIMIT_FSIZE): the old file stays, nothing is left behind."""
    path = tmp_path / "state" / "doc"
    save_file(path, encode_document(10))
    program = (
        f"import resource, sys; sys.path.insert(0, {FOLDER!r}); import dvai_bridge as b, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: b.save_file(pathlib.Path({str(path)!r}), b'y' * 5000)\n"
        "except b.StorageError as exc: print(exc)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"cannot save {path}: {os.strerror(errno.EFBIG)}\n"
    assert load_file(path, parse_document)["n"] == 10
    assert sorted(p.name for p in path.parent.iterdir()) == [".doc.lock", "doc", "doc.bak"]


SAVER = """
import sys; sys.path.insert(0, sys.argv[1])
import dvai_bridge as b, json, pathlib
path, n = pathlib.Path(sys.argv[2]), 1
while True:
    b.save_file(path, json.dumps({"n": n, "filler": "x" * n}).encode())
    print(n, flush=True)
    n += 1
"""


@posix_only
def test_killed_at_random_moments(tmp_path):
    """A process that does nothing but save is killed: what it reported saved is there, or the one after it."""
    path, draw = tmp_path / "state" / "doc", random.Random(7)
    for _ in range(10):
        arguments = [sys.executable, "-c", SAVER, FOLDER, str(path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "1\n"
            time.sleep(draw.random() * 0.05)  # the random moment is the point
            process.kill()
            reported = [1] + [int(line) for line in process.stdout.read().splitlines(True) if line.endswith("\n")]
        assert load_file(path, parse_document)["n"] - reported[-1] in (0, 1)


# ---- damage ---------------------------------------------------------------------------

DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: data[:6] + bytes([data[6] ^ 1]) + data[7:],
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "a list": lambda data: b"[1, 2]",
    "null": lambda data: b"null",
    "a string": lambda data: b'"n"',
    "members of the wrong type": lambda data: b'{"n": {}, "filler": 3}',
    "a member missing": lambda data: b"{}",
    "100,000 brackets": lambda data: b"[" * 100_000,
    "larger than any state": lambda data: b" " * (dvai_bridge.STATE_FILE_LIMIT_BYTES + 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_set_aside_and_its_copy_used(tmp_path, caplog, damage):
    path = tmp_path / "doc"
    save_file(path, encode_document(20))
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert load_file(path, parse_document)["n"] == 20
    assert path.with_name("doc.damaged-1").read_bytes() == damaged
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "doc.damaged-1" in caplog.text
    assert parse_document(path.read_bytes())["n"] == 20
    path.write_bytes(damaged)
    assert load_file(path, parse_document)["n"] == 20
    assert path.with_name("doc.damaged-2").read_bytes() == damaged


def test_nothing_is_overwritten_when_both_are_damaged(tmp_path):
    path, copy = tmp_path / "doc", tmp_path / "doc.bak"
    save_file(path, encode_document(20))
    path.write_bytes(b"{")
    copy.write_bytes(b"}")
    for _ in range(2):  # it must not look like a fresh start the second time
        with pytest.raises(StorageError, match="move it away to start anew"):
            load_file(path, parse_document)
    with pytest.raises(StorageError, match="move it away to start anew"):
        update_file(path, parse_document, lambda document: encode_document(1))
    assert (path.read_bytes(), copy.read_bytes()) == (b"{", b"}")


def test_a_missing_file_comes_back_from_its_copy(tmp_path, caplog):
    path = tmp_path / "doc"
    save_file(path, encode_document(5))
    path.unlink()
    assert load_file(path, parse_document)["n"] == 5
    assert "is missing" in caplog.text
    assert path.exists()


def test_the_log_of_damage_quotes_no_content(tmp_path, caplog):
    path = tmp_path / "doc"
    save_file(path, b"7")
    path.write_bytes(b"hunter2-is-my-key")
    assert load_file(path, int) == 7
    assert "hunter2" not in caplog.text and "17 bytes, ValueError" in caplog.text


def test_an_older_copy_does_not_stand_in_for_a_good_file(tmp_path):
    path = tmp_path / "doc"
    save_file(path, encode_document(1))
    older = path.with_name("doc.bak").read_bytes()
    save_file(path, encode_document(2))
    path.with_name("doc.bak").write_bytes(older)
    assert load_file(path, parse_document)["n"] == 2


# ---- links and odd files --------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("has_nofollow", [True, False])
def test_symbolic_links_are_refused(tmp_path, monkeypatch, has_nofollow):
    if not has_nofollow:
        monkeypatch.setattr(dvai_bridge, "NOFOLLOW", 0)
    victim, path = tmp_path / "victim", tmp_path / "state" / "doc"
    victim.write_bytes(b"precious")
    path.parent.mkdir()
    path.symlink_to(victim)
    with pytest.raises(StorageError, match="symbolic link"):
        load_file(path, bytes)
    for name in (".doc.new", ".doc.copy", "doc.bak"):
        (path.parent / name).symlink_to(victim)
    save_file(path, b"state")
    assert victim.read_bytes() == b"precious"
    assert not any(p.is_symlink() for p in path.parent.iterdir())
    assert load_file(path, bytes) == b"state"


@posix_only
def test_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".doc.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="symbolic link"):
        save_file(tmp_path / "doc", b"state")


@posix_only
@pytest.mark.parametrize("kind", ["mkfifo", "mkdir"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    getattr(os, kind)(tmp_path / "doc")
    with pytest.raises(StorageError, match="not a regular file"):
        load_file(tmp_path / "doc", bytes)


# ---- several writers ------------------------------------------------------------------

COUNTER = """
import sys; sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "masked":
    sys.modules["fcntl"] = sys.modules["msvcrt"] = None
import dvai_bridge as b, pathlib
for _ in range(int(sys.argv[4])):
    b.update_file(pathlib.Path(sys.argv[2]), int, lambda n: b"%d" % ((n or 0) + 1))
"""


@pytest.mark.parametrize("locks", ["native", "masked"])
def test_two_processes_writing_lose_nothing(tmp_path, locks):
    path = tmp_path / "state" / "count"
    arguments = [sys.executable, "-c", COUNTER, FOLDER, str(path), locks, "40"]
    processes = [subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(p.communicate(timeout=60)[1], p.returncode) for p in processes] == [("", 0)] * 2
    assert load_file(path, int) == 80


def test_threads_exclude_each_other_too(tmp_path):
    path = tmp_path / "count"

    def count():
        for _ in range(10):
            update_file(path, int, lambda n: b"%d" % ((n or 0) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert load_file(path, int) == 40


def test_a_lock_that_is_kept_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "LOCK_TIMEOUT_S", 0.05)
    other = PathLock(tmp_path / ".doc.lock")
    assert other.try_acquire()
    with pytest.raises(StorageError, match="stayed locked"):
        save_file(tmp_path / "doc", b"x")
    other.release()
    save_file(tmp_path / "doc", b"x")


@pytest.fixture
def without_locks(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)


def test_without_system_locks_a_marker_excludes(tmp_path, without_locks):
    first, second = PathLock(tmp_path / "lock"), PathLock(tmp_path / "lock")
    assert first.try_acquire() and first.is_held
    assert not second.try_acquire() and not second.is_held
    assert (tmp_path / "lock.held").read_bytes() == b"%d" % os.getpid()
    first.release()
    assert second.try_acquire()
    second.release()
    assert not (tmp_path / "lock.held").exists()


@posix_only
def test_the_marker_of_a_dead_process_is_broken(tmp_path, without_locks):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    (tmp_path / "lock.held").write_bytes(b"%d" % dead.pid)
    lock = PathLock(tmp_path / "lock")
    assert lock.acquire(1.0)
    assert (tmp_path / "lock.held").read_bytes() == b"%d" % os.getpid()


def test_a_marker_without_a_name_is_broken_when_it_is_old(tmp_path, without_locks):
    marker, lock = tmp_path / "lock.held", PathLock(tmp_path / "lock")
    marker.write_bytes(b"")
    assert not lock.acquire(0.01) and marker.exists()
    os.utime(marker, (time.time() - 60, time.time() - 60))
    assert lock.acquire(1.0)


@posix_only
def test_file_systems_without_flock_get_the_marker(tmp_path, monkeypatch):
    import fcntl

    def refuse(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = PathLock(tmp_path / "lock")
    assert lock.try_acquire() and (tmp_path / "lock.held").exists()
    lock.release()


@posix_only
def test_the_windows_lock_is_called_as_windows_wants_it(tmp_path, monkeypatch):
    """msvcrt's contract (one byte, without waiting, EACCES when held), played over flock: no Windows needed."""
    import fcntl

    def locking(fd, mode, count):
        assert count == 1
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if mode == "lock" else fcntl.LOCK_UN)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt = types.SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    first, second = PathLock(tmp_path / "lock"), PathLock(tmp_path / "lock")
    assert first.try_acquire() and not second.try_acquire()
    first.release()
    assert second.try_acquire()
    second.release()
    assert not (tmp_path / "lock.held").exists()


def test_saving_without_nofollow_and_directory_fsync(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "NOFOLLOW", 0)
    monkeypatch.delattr(os, "O_DIRECTORY", raising=False)
    save_file(tmp_path / "doc", b"x")
    assert load_file(tmp_path / "doc", bytes) == b"x"


# ---- the running bridge ---------------------------------------------------------------

RUNNING = RunningBridge(pid=os.getpid(), port=38883, url="http://127.0.0.1:38883/v1", started_at_ms=1_700_000_000_000)

HOLDER = """
import sys; sys.path.insert(0, sys.argv[1])
import dvai_bridge as b, os, pathlib
record = b.RunningRecord(pathlib.Path(sys.argv[2]))
running = b.RunningBridge(pid=os.getpid(), port=38884, url="http://[::1]:38884/v1", started_at_ms=1)
print(record.claim(running), flush=True)
sys.stdin.read()
"""


def test_a_running_bridge_is_found_until_it_stops(tmp_path):
    data = tmp_path / "data"
    assert RunningRecord(data).find() is None
    assert not data.exists()
    record = RunningRecord(data)
    assert record.claim(RUNNING)
    assert RunningRecord(data).find() == RUNNING
    record.release()
    record.release()
    assert RunningRecord(data).find() is None
    assert not (data / "running.json").exists()


def test_a_second_bridge_does_not_take_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "RUNNING_CLAIM_TIMEOUT_S", 0.05)
    first, second = RunningRecord(tmp_path), RunningRecord(tmp_path)
    assert first.claim(RUNNING)
    assert not second.claim(RUNNING)
    second.release()
    assert RunningRecord(tmp_path).find() == RUNNING
    first.release()


@posix_only
@pytest.mark.parametrize("masked", [False, True])
def test_a_killed_bridge_is_not_found(tmp_path, monkeypatch, masked):
    mask = ""
    if masked:
        mask = "import sys; sys.modules['fcntl'] = sys.modules['msvcrt'] = None\n"
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", None)
    arguments = [sys.executable, "-c", mask + HOLDER, FOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        found = RunningRecord(tmp_path).find()
        assert found and (found.pid, found.port) == (process.pid, 38884)
        process.kill()
    assert (tmp_path / "running.json").exists()
    assert RunningRecord(tmp_path).find() is None
    record = RunningRecord(tmp_path)
    assert record.claim(RUNNING)
    assert RunningRecord(tmp_path).find() == RUNNING
    record.release()


@pytest.mark.parametrize(
    "change",
    [
        {"port": 0},
        {"port": 65536},
        {"port": "38883"},
        {"pid": True},
        {"pid": -1},
        {"url": "file:///etc/passwd"},
        {"url": "http://x/\n"},
        {"url": 5},
        {"started_at_ms": 1.5},
    ],
)
def test_a_record_of_the_wrong_shape_is_refused(change):
    good = {"pid": 1, "port": 1, "url": "http://127.0.0.1:1/v1", "started_at_ms": 1, "a later version's": None}
    assert dvai_bridge.parse_running_bridge(json.dumps(good).encode()).port == 1
    with pytest.raises((ValueError, TypeError)):
        dvai_bridge.parse_running_bridge(json.dumps(good | change).encode())
