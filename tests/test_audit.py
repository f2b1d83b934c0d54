"""Section Audit: lines, days, a disk that refuses, and reading while it is written."""

import errno
import json
import os
import threading
import time

import pytest

import dvai_bridge
from dvai_bridge import (
    AuditCaller,
    AuditEntry,
    AuditLog,
    StorageError,
    build_audit_json,
    choose_expired_days,
    encode_audit_line,
    format_utc,
    load_audit,
)
from tests.support import wait_for

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX file modes, links and signals")
NOON_MS = 1_795_262_400_123  # 2026-11-21T12:00:00.123Z
DAY_MS = 86_400_000
ENTRY = AuditEntry(
    time_ms=NOON_MS,
    request_id="req-1",
    caller=AuditCaller.PEER,
    path="/v1/chat/completions",
    status=200,
    outcome="ok",
    duration_ms=1234.5678,
    route="local",
    device_id="device-of-a-peer",
    app_id="com.example.app",
    engine="builtin",
    model_asked="M",
    model_served="m",
    prompt_tokens=12,
    completion_tokens=48,
)


def entry(**changes):
    return dvai_bridge.replace(ENTRY, **changes)


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# ---- one line -------------------------------------------------------------------------


def test_a_line_has_all_that_is_asked_of_it():
    assert build_audit_json(ENTRY) == {
        "time": "2026-11-21T12:00:00.123Z",
        "requestId": "req-1",
        "caller": "peer",
        "deviceId": "device-of-a-peer",
        "appId": "com.example.app",
        "route": "local",
        "path": "/v1/chat/completions",
        "engine": "builtin",
        "modelAsked": "M",
        "modelServed": "m",
        "outcome": "ok",
        "status": 200,
        "promptTokens": 12,
        "completionTokens": 48,
        "durationMs": 1234.6,
        "servedBy": None,
    }


@pytest.mark.parametrize(
    ("caller", "device_id", "app_id", "expected"),
    [
        (AuditCaller.LOCAL, None, None, ("local", "local", None)),
        (AuditCaller.KEY, None, None, ("key", "key", None)),
        (AuditCaller.ANONYMOUS, None, None, ("anonymous", "anonymous", None)),
        (AuditCaller.ANONYMOUS, "claimed", "claimed", ("anonymous", "anonymous", None)),
        (AuditCaller.PEER, "d", None, ("peer", "d", "d")),
        (AuditCaller.PEER, "local", "a", ("peer", "local", "a")),  # a peer that calls itself so is still a peer
    ],
)
def test_who_it_was(caller, device_id, app_id, expected):
    line = build_audit_json(entry(caller=caller, device_id=device_id, app_id=app_id))
    assert (line["caller"], line["deviceId"], line["appId"]) == expected


def test_foreign_names_stay_on_their_line():
    nasty = 'x\n{"caller":"local"}\u202e\x1b[2J\ud800' + "é" * 10_000
    line = encode_audit_line(
        entry(
            request_id=nasty,
            path="/" + nasty,
            device_id=nasty,
            app_id=nasty,
            engine=nasty,
            model_asked=nasty,
            model_served=nasty,
            served_by=nasty,
            outcome=nasty,
        )
    )
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and b"\x1b" not in line
    assert len(line) <= dvai_bridge.AUDIT_LINE_LIMIT_BYTES
    assert all(len(value) <= 64 for value in json.loads(line).values() if isinstance(value, str))


def test_times_are_utc_with_milliseconds():
    assert format_utc(0) == "1970-01-01T00:00:00.000Z"
    assert format_utc(NOON_MS + DAY_MS) == "2026-11-22T12:00:00.123Z"


# ---- days -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "today", "expired"),
    [
        ([], "2026-11-21", []),
        (["2026-11-21"], "2026-11-21", []),
        (["2026-10-21", "2026-10-20", "2026-11-20"], "2026-11-21", ["2026-10-20"]),
        (["2026-10-01", "2026-11-20"], "2026-11-21", ["2026-10-01"]),
        (["2026-10-25", "2026-11-20"], "2027-01-01", []),  # the clock is 40 days ahead: nothing goes
        (["2026-10-25", "2026-11-20"], "1970-01-01", []),  # or has not been set yet
        (["2026-99-99", "2026-01-01"], "2027-01-01", []),  # not a name of ours
    ],
)
def test_days_expire(days, today, expired):
    assert choose_expired_days(days, today) == expired


def test_old_days_are_deleted_and_nothing_else(tmp_path):
    directory = tmp_path / "audit"
    directory.mkdir()
    for name in ("2026-10-01.jsonl", "2026-11-20.jsonl", "notes.txt", "2026-01-01.jsonl.gz", "x2026-01-01.jsonl"):
        (directory / name).write_text("{}\n")
    audit = AuditLog(directory)
    audit.record(ENTRY)
    audit.flush()
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "2026-11-20.jsonl",
        "2026-11-21.jsonl",
        "notes.txt",
        "2026-01-01.jsonl.gz",
        "x2026-01-01.jsonl",
    }


def test_each_day_has_its_file(tmp_path):
    audit = AuditLog(tmp_path / "audit")
    for n in range(4):
        audit.record(entry(time_ms=NOON_MS + n * DAY_MS // 2, request_id=f"r{n}"))
    audit.flush()
    files = sorted((tmp_path / "audit").iterdir())
    assert [path.name for path in files] == ["2026-11-21.jsonl", "2026-11-22.jsonl", "2026-11-23.jsonl"]
    assert [[line["requestId"] for line in read_lines(path)] for path in files] == [["r0"], ["r1", "r2"], ["r3"]]


@posix_only
def test_only_the_owner_reads_it(tmp_path):
    audit = AuditLog(tmp_path / "audit")
    audit.record(ENTRY)
    audit.flush()
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "audit" / "2026-11-21.jsonl").stat().st_mode & 0o777 == 0o600


# ---- the thread -----------------------------------------------------------------------


def test_lines_are_written_together_and_soon(tmp_path, monkeypatch):
    batches = []
    real = dvai_bridge._append_to_day
    monkeypatch.setattr(
        dvai_bridge, "_append_to_day", lambda path, lines: batches.append(len(lines)) or real(path, lines)
    )
    before = set(threading.enumerate())
    audit = AuditLog(tmp_path / "audit", batch_s=0.05)
    for n in range(100):  # before the thread runs, so that the first batch has them all
        audit.record(entry(request_id=f"r{n}"))
    audit.start()
    try:
        wait_for(lambda: len(load_audit(tmp_path / "audit")) == 100, 30, "the lines are written")
        assert batches == [100]
        audit.record(entry(request_id="later"))
        wait_for(lambda: len(load_audit(tmp_path / "audit")) == 101, 30, "the next line is written")
    finally:
        audit.close()
    assert set(threading.enumerate()) <= before


def test_closing_writes_the_rest(tmp_path):
    audit = AuditLog(tmp_path / "audit", batch_s=3600)
    audit.start()
    audit.record(ENTRY)
    audit.close()
    audit.close()
    assert len(read_lines(tmp_path / "audit" / "2026-11-21.jsonl")) == 1


def test_many_threads_lose_no_line(tmp_path):
    audit = AuditLog(tmp_path / "audit", batch_s=0.001)
    audit.start()

    def work(name):
        for n in range(200):
            audit.record(entry(request_id=f"{name}-{n}"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    audit.close()
    ids = [line["requestId"] for line in read_lines(tmp_path / "audit" / "2026-11-21.jsonl")]
    assert len(ids) == len(set(ids)) == 800
    assert [name for name in ids if name.startswith("a")] == [f"a-{n}" for n in range(200)]


def test_two_bridges_append_to_one_file(tmp_path):
    one, two = AuditLog(tmp_path / "audit"), AuditLog(tmp_path / "audit")
    for n in range(10):
        for name, audit in (("one", one), ("two", two)):
            audit.record(entry(request_id=f"{name}-{n}"))
            audit.flush()
    assert len(read_lines(tmp_path / "audit" / "2026-11-21.jsonl")) == 20


# ---- a disk that refuses --------------------------------------------------------------


class FullDisk:
    """os.write that takes `room` more bytes."""

    def __init__(self, monkeypatch, room):
        self.room = room
        self._write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, fd, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = bytes(data)[: self.room]
        self.room -= len(part)
        return self._write(fd, part)


def test_a_full_disk_warns_once_and_loses_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "audit" / "2026-11-21.jsonl"
    audit = AuditLog(path.parent)
    audit.record(entry(request_id="before"))
    audit.flush()
    disk = FullDisk(monkeypatch, 100)  # not even one line: nothing of it may stay
    for n in range(3):
        audit.record(entry(request_id=f"r{n}"))
        audit.flush()
    assert [line["requestId"] for line in read_lines(path)] == ["before"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert os.strerror(errno.ENOSPC) in caplog.text
    disk.room = 1 << 20
    audit.record(entry(request_id="after"))
    audit.flush()
    assert [line["requestId"] for line in read_lines(path)] == ["before", "r0", "r1", "r2", "after"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_what_waits_for_the_disk_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "AUDIT_LINES_LIMIT", 5)
    audit = AuditLog(tmp_path / "audit")
    disk = FullDisk(monkeypatch, 0)
    for n in range(12):
        audit.record(entry(request_id=f"r{n}"))
        if n % 3 == 0:
            audit.flush()
    disk.room = 1 << 20
    audit.flush()
    ids = [line["requestId"] for line in read_lines(tmp_path / "audit" / "2026-11-21.jsonl")]
    assert ids == [f"r{n}" for n in range(7, 12)]


def test_a_directory_that_cannot_be_made_harms_no_request(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    audit = AuditLog(tmp_path / "file" / "audit", batch_s=0.001)
    audit.start()
    audit.record(ENTRY)
    wait_for(lambda: "cannot be written" in caplog.text, 30, "the warning")
    audit.record(ENTRY)
    audit.close()
    assert caplog.text.count("cannot be written") == 1


def test_a_day_is_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dvai_bridge, "AUDIT_DAY_LIMIT_BYTES", 3 * len(encode_audit_line(ENTRY)))
    audit = AuditLog(tmp_path / "audit")
    for n in range(6):
        audit.record(entry(request_id=f"req-{n}"))
        audit.flush()
    audit.record(entry(time_ms=NOON_MS + DAY_MS))
    audit.flush()
    assert len(read_lines(tmp_path / "audit" / "2026-11-21.jsonl")) == 3
    assert len(read_lines(tmp_path / "audit" / "2026-11-22.jsonl")) == 1
    assert caplog.text.count("its rest is left out") == 1


def test_a_line_that_a_power_cut_left_is_ended(tmp_path):
    path = tmp_path / "audit" / "2026-11-21.jsonl"
    path.parent.mkdir()
    path.write_bytes(encode_audit_line(ENTRY) + encode_audit_line(ENTRY)[:50])
    audit = AuditLog(path.parent)
    audit.record(entry(request_id="after"))
    audit.flush()
    assert [found["requestId"] for found in load_audit(path.parent)] == ["req-1", "after"]


@posix_only
def test_a_link_in_place_of_a_day_is_not_followed(tmp_path, caplog):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "2026-11-21.jsonl").symlink_to(tmp_path / "elsewhere")
    audit = AuditLog(tmp_path / "audit")
    audit.record(ENTRY)
    audit.flush()
    assert not (tmp_path / "elsewhere").exists() and "cannot be written" in caplog.text


# ---- reading --------------------------------------------------------------------------


def write_days(directory):
    audit = AuditLog(directory)
    for n in range(9):
        audit.record(entry(time_ms=NOON_MS + n * DAY_MS // 3, request_id=f"r{n}"))
    audit.flush()


@pytest.mark.parametrize(
    ("since_ms", "limit", "expected"),
    [
        (0, None, range(9)),
        (0, 4, range(5, 9)),
        (0, 1, [8]),
        (0, 100, range(9)),
        (0, 0, []),
        (NOON_MS + DAY_MS, None, range(3, 9)),
        (NOON_MS + DAY_MS + 1, None, range(4, 9)),
        (NOON_MS + DAY_MS, 2, [7, 8]),
        (NOON_MS + 100 * DAY_MS, None, []),
    ],
)
def test_what_is_shown(tmp_path, since_ms, limit, expected):
    write_days(tmp_path / "audit")
    found = load_audit(tmp_path / "audit", since_ms=since_ms, limit=limit)
    assert [line["requestId"] for line in found] == [f"r{n}" for n in expected]


def test_no_audit_yet(tmp_path):
    assert load_audit(tmp_path / "audit") == []


def test_damaged_lines_are_left_out(tmp_path):
    directory = tmp_path / "audit"
    write_days(directory)
    path = directory / "2026-11-22.jsonl"
    good = path.read_bytes()
    noise = [b"{", b"[]", b'{"time": 5}', b"\xff\xfe", b"", b"[" * 5000, b'{"time":"' + b"x" * 9000 + b'"}', b"null"]
    path.write_bytes(b"\n".join(noise) + b"\n" + good + b'{"time":"2026-11-22T')
    assert len(load_audit(directory)) == 9


@posix_only
def test_a_directory_that_is_none_is_an_error(tmp_path):
    (tmp_path / "audit").write_bytes(b"")
    with pytest.raises(StorageError, match="audit"):
        load_audit(tmp_path / "audit")


def test_reading_while_it_is_written(tmp_path):
    audit = AuditLog(tmp_path / "audit", batch_s=0.001)
    audit.start()
    try:
        for n in range(300):
            audit.record(entry(request_id=f"r{n}"))
            if n % 30 == 0:
                ids = [line["requestId"] for line in load_audit(tmp_path / "audit")]
                assert ids == [f"r{k}" for k in range(len(ids))]
        wait_for(lambda: len(load_audit(tmp_path / "audit")) == 300, 30, "all lines can be read")
    finally:
        audit.close()


def test_now_is_today(tmp_path):
    audit = AuditLog(tmp_path / "audit")
    audit.record(entry(time_ms=int(time.time() * 1000)))
    audit.flush()
    (path,) = (tmp_path / "audit").iterdir()
    assert path.name.removesuffix(".jsonl") == read_lines(path)[0]["time"][:10]
