"""The command line's own logic; its commands run for real in test_end_to_end.py."""

import contextlib
import http.server
import json
import threading
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    AuditCaller,
    AuditEntry,
    AuditLog,
    MachineSpeed,
    ProgressLine,
    UsageError,
    build_code_screen,
    build_program_name,
    build_survey,
    build_survey_json,
    describe_audit_entry,
    describe_estimates,
    load_config,
    parse_command_line,
    parse_since,
    render_qr,
    summarize_usages,
)
from dvai_bridge import Usage as EngineUsage
from tests.support import require
from tests.support_worker import build_byte_model
from tests.test_bridge import found
from tests.test_engine import INFO


@pytest.mark.parametrize("words", [[], ["-c", "64"], ["--model", "x.gguf"], ["serve", "--port", "1"]])
def test_serve_is_the_default_command(words):
    assert parse_command_line(words).command == "serve"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve", "--por", "1"], "--por"),  # no abbreviations: they would change meaning with every new option
        (["serve", "x"], "'x'"),
        (["bench", "--port", "1"], "--port"),
        (["serve", "--port"], "--port"),
    ],
)
def test_what_is_not_there_is_named(words, message):
    with pytest.raises(UsageError) as caught:
        parse_command_line(words)
    assert message in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("identifier", ["-7c4IqMry3re", "-7c4IqMry3resiQ1jFf2lA", "8dDy_3RqzPoS"])
def test_ids_may_begin_with_a_dash(identifier):
    arguments = parse_command_line(["pair", "revoke", identifier, "--json", "--home", "x"])
    assert (arguments.action, arguments.target, arguments.json) == ("revoke", identifier, True)


@pytest.mark.parametrize("flag", ["--delegate", "--allow", "--deny"])
def test_keys_may_begin_with_a_dash(flag):
    key = "--" + "A" * 41
    arguments = parse_command_line(["serve", flag, key, flag, "B" * 43, "--port", "1"])
    assert [key, "B" * 43] in vars(arguments).values() and arguments.port == "1"


def test_the_configuration_file_of_the_data_directory_is_read(tmp_path):
    arguments = parse_command_line(["serve", "--home", str(tmp_path), "--port", "2"])
    directories = load_config(arguments, {})[1]
    directories.data.mkdir(parents=True, exist_ok=True)
    (directories.data / "config.toml").write_text("ctx-size = 77\nport = 1\n")
    config, _ = load_config(arguments, {})
    assert (config.ctx_size, config.port) == (77, 2) and tmp_path in directories.data.parents


def test_a_configuration_file_that_was_named_must_be_sound(tmp_path):
    path = tmp_path / "other.toml"
    for text, words in (("port = ", "other.toml"), ('prot = "1"', "'prot'")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            load_config(parse_command_line(["serve", "--config", str(path)]), {"DVAI_HOME": str(tmp_path)})


def test_progress_is_a_line_every_tenth_where_no_terminal_is(monkeypatch, capsys):
    monkeypatch.setattr(dvai_bridge, "PROGRESS_AFTER_S", 0)
    progress = ProgressLine("loading")
    for step in range(101):
        progress.show(step / 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"loading: {percent} %" for percent in range(0, 101, 10)]


def test_progress_rewrites_its_line_on_a_terminal_and_quick_work_shows_none(monkeypatch, capsys):
    monkeypatch.setattr(dvai_bridge.sys.stderr, "isatty", lambda: True, raising=False)
    quick = ProgressLine("loading")
    quick.show(0.5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(dvai_bridge, "PROGRESS_AFTER_S", 0)
    monkeypatch.setattr(dvai_bridge.sys.stderr, "isatty", lambda: True, raising=False)
    slow = ProgressLine("loading")
    slow.show(0.5)
    slow.show(1.0)
    assert capsys.readouterr().err == "\rloading: 50 %\rloading: 100 %\n"


def test_the_survey_gives_a_command_or_the_obstacle():
    models = [
        found(Path("/m/a.gguf"), "a"),
        found(Path("/m/b.gguf"), "b", obstacle="needs about 9 GB and 1 GB are left"),
    ]
    text = "\n".join(build_survey(models, [], "python3 dvai_bridge.py"))
    assert "python3 dvai_bridge.py serve --model /m/a.gguf" in text and "9 GB" in text and "/m/b.gguf" not in text
    shown = build_survey_json(models, [], "python3 dvai_bridge.py")
    assert [model["id"] for model in shown["models"]] == ["dvai-demo", "a", "b"]
    assert [model["obstacle"] for model in shown["models"]][:2] == [None, None] and shown["engines"] == []
    assert "./models" in build_survey([], [], "x")[0]


def test_commands_to_copy_start_as_the_user_started():
    assert build_program_name("/opt/my tools/dvai_bridge.py") == "python3 '/opt/my tools/dvai_bridge.py'"
    assert build_program_name("/usr/local/bin/dvai-bridge") == "dvai-bridge"


def test_rates_leave_out_what_the_cache_gave():
    usages = [
        EngineUsage(prompt_tokens=10, cached_tokens=4, completion_tokens=5, prompt_ms=100.0, predicted_ms=250.0),
        EngineUsage(prompt_tokens=14, cached_tokens=0, completion_tokens=5, prompt_ms=100.0, predicted_ms=250.0),
    ]
    measured = summarize_usages(INFO, 1.5, usages, None)
    assert (measured.prefill_tok_per_s, measured.decode_tok_per_s) == (100.0, 20.0)
    assert (measured.prompt_tokens, measured.completion_tokens) == (20, 10)


# ---- assess, probe, audit -------------------------------------------------------------


def run_here(home, *words):
    """Run a command in this process; its exit code."""
    return dvai_bridge.run_command_line(
        list(words), {"DVAI_HOME": str(home), "HOME": str(home)}, load_builtin_model=bytes
    )


def test_assess_prints_the_shape_of_every_platform(tmp_path, capsys):
    assert run_here(tmp_path, "assess", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {"mode", "tokPerSec", "reason", "hints"}
    assert shown["mode"] in ("ok", "offload-only", "too-weak") and f"{shown['tokPerSec']:g} tok/s" in shown["reason"]


def test_assess_estimates_each_model_that_is_here(tmp_path, capsys, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(build_byte_model())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dvai_bridge, "BANDWIDTH_BUFFER_BYTES", 1 << 20)
    assert run_here(tmp_path, "assess") == 0
    text = capsys.readouterr().out
    assert "tok/s" in text.splitlines()[0] and "tiny: about " in text and "with builtin" in text


def test_doctor_has_the_assessment():
    finding = dvai_bridge.probe_hardware()
    assert finding.verdict in ("ok", "note") and "tok/s" in finding.detail and finding.mend is None


def test_estimates_for_people():
    speed = MachineSpeed(memory_bytes_per_s=20e9, multiply_adds_per_s=500e6, cores=1)
    model = dvai_bridge.replace(found(Path("/m/a.gguf"), "a"), n_params=1_000_000_000, size_bytes=600_000_000)
    assert describe_estimates(model, speed) == "about 20 tokens/s with llama, 0.40 tokens/s with builtin"
    obstructed = dvai_bridge.replace(model, obstacle="needs about 9 GB")
    assert describe_estimates(obstructed, speed) == "about 20 tokens/s with llama"
    assert "not known" in describe_estimates(dvai_bridge.replace(model, n_params=None), speed)


SCORE = {
    "modelId": "m",
    "deviceId": "d",
    "libraryVersion": "1",
    "tokPerSec": 12.3,
    "source": "probe",
    "measuredAt": 5,
    "prefillTokPerSec": 80.0,
}


@contextlib.contextmanager
def answer_with(status, body):
    """The port of a server that answers everything so, and the (method, path, body, headers) that it was asked."""
    asked = []

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.command, self.path, json.loads(data), dict(self.headers)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def test_probe_asks_the_running_bridge(tmp_path, capsys):
    with answer_with(200, json.dumps({"score": SCORE}).encode()) as (port, asked):
        assert run_here(tmp_path, "probe", "--port", str(port)) == 0
        assert capsys.readouterr().out == "m: 12 tokens/s, prompts 80 tokens/s (measured)\n"
        assert run_here(tmp_path, "probe", "other", "--json", "--port", str(port)) == 0
        assert json.loads(capsys.readouterr().out) == SCORE
    assert [request[:3] for request in asked] == [
        ("POST", "/v1/dvai/probe", {}),
        ("POST", "/v1/dvai/probe", {"modelId": "other"}),
    ]
    assert "Authorization" not in asked[0][3] and asked[0][3]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (503, b'{"error": {"message": "no engine here", "code": "no_backend"}}', "(503): no engine here"),
        (404, b'{"error": "not found"}', "(404): it gave no reason"),
        (200, b'{"score": {"modelId": 5}}', "no bridge of this version"),
        (200, b"[]", "no bridge of this version"),
        (200, b"hello", "no bridge answers"),
    ],
)
def test_probe_says_what_went_wrong(tmp_path, capsys, status, body, words):
    with answer_with(status, body) as (port, _):
        assert run_here(tmp_path, "probe", "--port", str(port)) == 1
    shown = capsys.readouterr()
    assert words in shown.err and shown.out == "" and shown.err.count("\n") == 1


def test_probe_without_a_bridge_says_what_to_do(tmp_path, capsys):
    assert run_here(tmp_path, "probe") == 1
    error = capsys.readouterr().err
    assert "serve" in error and "bench --model" in error


NOW_MS = 1_795_262_400_000  # 2026-11-21T12:00:00Z


@pytest.mark.parametrize(
    ("text", "since_ms"),
    [
        ("90s", NOW_MS - 90_000),
        ("90m", NOW_MS - 5_400_000),
        ("24h", NOW_MS - 86_400_000),
        ("7d", NOW_MS - 604_800_000),
        ("2026-11-21", NOW_MS - 43_200_000),
        ("2026-11-21T12:00", NOW_MS),
        ("2026-11-21T13:00+01:00", NOW_MS),
        ("2026-11-21T12:00:00Z", NOW_MS),
    ],
)
def test_since_when(text, since_ms):
    assert parse_since(text, NOW_MS) == since_ms


@pytest.mark.parametrize("words", [["--since", "yesterday"], ["--since", "5w"], ["-n", "-1"], ["-n", "x"], ["-n", "٣"]])
def test_what_audit_does_not_take(tmp_path, capsys, words):
    assert run_here(tmp_path, "audit", *words) == 2
    assert capsys.readouterr().err.startswith(f"dvai_bridge.py: {words[0]} ")


def write_audit(home):
    audit = AuditLog(Path(home) / "data" / "audit")
    for n in range(60):
        audit.record(
            AuditEntry(
                time_ms=NOW_MS + n * 1000,
                request_id=f"r{n}",
                caller=AuditCaller.PEER,
                device_id="phone",
                app_id="com.example",
                path="/v1/chat/completions",
                status=200,
                outcome="ok",
                duration_ms=1234.0,
                route="local",
                model_asked="M",
                model_served="m",
                prompt_tokens=12,
                completion_tokens=48,
            )
        )
    audit.flush()


def test_audit_shows_the_last_requests(tmp_path, capsys):
    write_audit(tmp_path)
    assert run_here(tmp_path, "audit") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == dvai_bridge.AUDIT_SHOWN
    assert lines[-1] == (
        "2026-11-21T12:00:59.000Z  peer phone (com.example)  /v1/chat/completions  M -> m  local  "
        "ok 200  12+48 tokens  1234.0 ms"
    )
    assert run_here(tmp_path, "audit", "--json", "-n", "0") == 0
    assert [entry["requestId"] for entry in json.loads(capsys.readouterr().out)] == [f"r{n}" for n in range(60)]
    assert run_here(tmp_path, "audit", "--json", "-n", "2", "--since", "2026-11-21T12:00:30") == 0
    assert [entry["requestId"] for entry in json.loads(capsys.readouterr().out)] == ["r58", "r59"]


def test_an_empty_audit_is_no_failure(tmp_path, capsys):
    assert run_here(tmp_path, "audit") == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "no requests in" in shown.err
    assert run_here(tmp_path, "audit", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_audit_that_somebody_edited_cannot_harm_the_terminal():
    line = describe_audit_entry({"time": "\x1b[2J", "deviceId": {"a": 1}, "route": "x\ny", "promptTokens": [1]})
    assert line.isprintable()


# Pairing by code


def test_a_picture_of_a_code_has_its_modules():
    qrcode = require("qrcode")
    link = "dvai-bridge://pair?p=" + "Ab1_-" * 80
    lines = render_qr(link).splitlines()
    halves = {"\u2588": (False, False), "\u2580": (False, True), "\u2584": (True, False), " ": (True, True)}
    rows = [[halves[block][half] for block in line] for line in lines for half in (0, 1)]
    code = qrcode.QRCode(border=2, error_correction=qrcode.ERROR_CORRECT_L)
    code.add_data(link)
    code.make(fit=True)
    matrix = [[bool(cell) for cell in row] for row in code.get_matrix()]
    assert rows[: len(matrix)] == matrix and len(lines[0]) < 80


def test_without_the_package_the_link_is_shown(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "is_package_installed", lambda module: False)
    screen = build_code_screen("dvai-bridge://pair?p=x", "python3 dvai_bridge.py")
    assert "python3 dvai_bridge.py pair scan 'dvai-bridge://pair?p=x'" in screen and "pip install qrcode" in screen
