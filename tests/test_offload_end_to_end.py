"""Real bridges on loopback: one is strong, one has no model; pairing, forwarding, failures, the audit."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import threading

import pytest
from support import CLEAN_ENVIRON, PROGRAM, find_free_port, read_health, start_bridge, wait_for
from support_worker import build_byte_model

pytest.importorskip("resource", reason="stops processes with signals")

HELLO = {"model": "strong", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "strong.gguf"
    path.write_bytes(build_byte_model())
    return path


def run_command(home, *arguments, timeout_s=60):
    command = [*PROGRAM, *map(str, arguments), "--home", str(home)]
    return subprocess.run(command, env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=timeout_s)


def start_strong(home, model, *arguments):
    return start_bridge(home, "--model", model, "--engine", "builtin", "--lan", "--host", "127.0.0.1", *arguments)


def start_weak(home, *peers, only=True, arguments=()):
    flags = [flag for peer in peers for flag in ("--peer", f"http://127.0.0.1:{peer.port}")]
    mode = ["--offload-only"] if only else ["--offload"]
    return start_bridge(home, *mode, "--no-discover-lan", *flags, *arguments)


def list_peers(bridge):
    status, _, body = bridge.request("GET", "/v1/dvai/peers")
    assert status == 200, body
    return json.loads(body)["peers"]


def wait_ready(bridge, count=1):
    wait_for(lambda: [peer["state"] for peer in list_peers(bridge)].count("ready") >= count, 30, "peers are ready")


def ask(bridge, headers=None, **body):
    status, answer_headers, data = bridge.request("POST", "/v1/chat/completions", HELLO | body, headers, timeout_s=60)
    return status, answer_headers, data


def read_stream(data):
    lines = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line.startswith(b"data: ")]
    return [line if line == b"[DONE]" else json.loads(line) for line in lines]


@pytest.fixture
def pair(tmp_path, model):
    """A strong bridge that lets everybody pair, and a weak one that is paired with it."""
    with (
        start_strong(tmp_path / "strong", model, "--pairing", "allow") as strong,
        start_weak(tmp_path / "weak", strong) as weak,
    ):
        assert (
            run_command(tmp_path / "weak", "pair", "request", f"http://127.0.0.1:{strong.port}", "--yes").returncode
            == 0
        )
        wait_ready(weak)
        yield strong, weak


def test_the_weak_one_streams_from_the_strong_one(pair, tmp_path):
    strong, weak = pair
    direct = json.loads(ask(strong)[2])["choices"][0]["message"]["content"]
    status, headers, data = ask(weak)
    assert status == 200, data
    answer = json.loads(data)
    identity = json.loads((tmp_path / "strong" / "data" / "identity.json").read_text())
    assert headers["X-DVAI-Served-By"] == identity["deviceId"] and headers["X-DVAI-Route"] == "lan"
    assert answer["choices"][0]["message"]["content"] == direct and answer["usage"]["completion_tokens"] > 0
    status, headers, data = ask(weak, stream=True)
    events = read_stream(data)
    assert status == 200 and events[-1] == b"[DONE]" and headers["Content-Type"].startswith("text/event-stream")
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1]) == direct
    text = {"model": "strong", "prompt": "Hi", "max_tokens": 4}
    status, _, data = weak.request("POST", "/v1/completions", text, timeout_s=60)
    assert status == 200 and json.loads(data)["object"] == "text_completion"
    status, _, data = weak.request("POST", "/v1/embeddings", {"model": "strong", "input": ["a", "b"]}, timeout_s=60)
    assert status == 200 and [item["index"] for item in json.loads(data)["data"]] == [0, 1]
    assert "strong" in {item["id"] for item in json.loads(weak.request("GET", "/v1/models")[2])["data"]}


def test_the_audit_of_the_strong_one_names_the_weak_one(pair, tmp_path):
    weak = pair[1]
    secret = "canary-6f3b"
    assert ask(weak, messages=[{"role": "user", "content": secret}])[0] == 200
    weak_id = json.loads((tmp_path / "weak" / "data" / "identity.json").read_text())["deviceId"]

    def read_audit(home):
        shown = run_command(home, "audit", "--json")
        assert shown.returncode == 0, shown.stderr
        return json.loads(shown.stdout)

    (entry,) = wait_for(lambda: [e for e in read_audit(tmp_path / "strong") if e["deviceId"] == weak_id], 20, "audit")
    assert (entry["route"], entry["outcome"], entry["modelServed"]) == ("local", "ok", "strong")
    assert entry["completionTokens"] > 0
    (entry,) = wait_for(lambda: read_audit(tmp_path / "weak"), 20, "audit")
    assert (entry["caller"], entry["route"], entry["outcome"]) == ("local", "lan", "ok")
    assert entry["completionTokens"] > 0
    files = [path for home in ("strong", "weak") for path in (tmp_path / home).rglob("*") if path.is_file()]
    assert files and not any(secret.encode() in path.read_bytes() for path in files)
    assert not any(secret in line for bridge in pair for line in bridge.log + bridge.lines)


def test_the_user_of_the_strong_one_approves(tmp_path, model):
    with start_strong(tmp_path / "strong", model) as strong, start_weak(tmp_path / "weak", strong) as weak:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(weak)))
        asking.start()  # the first need begins the handshake, and waits for it

        def find_pending(home):
            shown = json.loads(run_command(tmp_path / home, "pair", "list", "--json").stdout)
            return [each for each in shown["pending"] if each["code"] is not None]

        (pending,) = wait_for(lambda: find_pending("strong"), 20, "the request to pair")
        (own,) = wait_for(lambda: find_pending("weak"), 20, "the code here")
        assert (own["isOutgoing"], pending["isOutgoing"]) == (True, False) and pending["deviceId"] != ""
        assert own["code"] == pending["code"] and len(own["code"]) == 6
        without = run_command(tmp_path / "strong", "pair", "approve", pending["id"])
        assert without.returncode == 2 and "--code" in without.stderr
        for home, entry, other in (("strong", pending, own), ("weak", own, pending)):
            approved = run_command(tmp_path / home, "pair", "approve", entry["id"], "--code", other["code"])
            assert approved.returncode == 0, approved.stderr
        asking.join(60)
        assert answers[0][0] == 200, answers[0][2]
        listed = json.loads(run_command(tmp_path / "strong", "pair", "list", "--json").stdout)
        assert [entry["deviceId"] for entry in listed["pairings"]] == [pending["deviceId"]] and not listed["pending"]


def test_denied_is_said_to_both(tmp_path, model):
    with (
        start_strong(tmp_path / "strong", model, "--pairing", "deny") as strong,
        start_weak(tmp_path / "weak", strong) as weak,
    ):
        asked = run_command(tmp_path / "weak", "pair", "request", f"http://127.0.0.1:{strong.port}", "--yes")
        assert asked.returncode == 1 and "denied" in asked.stderr
        status, headers, data = ask(weak)
        error = json.loads(data)["error"]
        assert (status, error["type"], error["code"]) == (503, "no_capable_device", 503)
        assert headers["Retry-After"] == "30" and headers["x-should-retry"] == "false"
        assert error["checked"][0]["deviceId"] == "self"


def test_revoking_ends_what_runs_and_what_comes(pair, tmp_path):
    strong, weak = pair
    weak_id = json.loads((tmp_path / "weak" / "data" / "identity.json").read_text())["deviceId"]
    endless = HELLO | {"stream": True, "max_tokens": 100_000, "temperature": 1, "logit_bias": {"2": -100}}
    ended = threading.Event()

    def stream():
        with contextlib.suppress(OSError, http.client.HTTPException):
            ask(weak, **endless)
        ended.set()

    threading.Thread(target=stream, daemon=True).start()
    wait_for(lambda: read_health(strong)["queue"]["running"] == 1, 20, "the stream runs")
    revoked = run_command(tmp_path / "strong", "pair", "revoke", weak_id)
    assert revoked.returncode == 0, revoked.stderr
    assert ended.wait(20)
    wait_for(lambda: read_health(strong)["queue"]["running"] == 0, 20, "the work ends")
    status, _, data = ask(weak)
    assert status == 503 and json.loads(data)["error"]["type"] == "no_capable_device"


def test_a_peer_that_dies_and_returns_is_used_again(tmp_path, model):
    port = find_free_port()
    with (
        start_strong(tmp_path / "strong", model, "--pairing", "allow", "--port", port) as strong,
        start_weak(tmp_path / "weak", strong, arguments=("--pairing", "allow")) as weak,
    ):
        assert ask(weak)[0] in (200, 503)
        wait_ready(weak)
        assert ask(weak)[0] == 200
        os.kill(strong.process.pid, signal.SIGKILL)
        strong.process.wait()
        status, _, data = ask(weak)
        assert status == 503 and json.loads(data)["error"]["type"] == "no_capable_device"
        with start_strong(tmp_path / "strong", model, "--port", port):
            wait_for(lambda: ask(weak)[0] == 200, 60, "the peer is used again")


def test_two_peers_and_one_dies(tmp_path, model):
    with (
        start_strong(tmp_path / "one", model, "--pairing", "allow") as one,
        start_strong(tmp_path / "two", model, "--pairing", "allow") as two,
        start_weak(tmp_path / "weak", one, two) as weak,
    ):
        for bridge in (one, two):
            asked = run_command(tmp_path / "weak", "pair", "request", f"http://127.0.0.1:{bridge.port}", "--yes")
            assert asked.returncode == 0, asked.stderr
        wait_ready(weak, 2)
        os.kill(one.process.pid, signal.SIGKILL)
        one.process.wait()
        for _ in range(3):
            assert ask(weak)[0] == 200


def test_prefer_serves_here_when_nobody_else_can(tmp_path, model):
    arguments = ("--model", model, "--engine", "builtin", "--min-local-capability", "100000")
    with start_weak(tmp_path / "home", only=False, arguments=arguments) as alone:
        status, headers, _ = ask(alone)
        assert status == 200 and headers["X-DVAI-Served-By"] == "local" and headers["X-DVAI-Reason"]
        status, headers, data = ask(alone, {"X-DVAI-Offload": "require"})
        assert status == 503 and json.loads(data)["error"]["type"] == "no_capable_device"
        assert ask(alone, {"X-DVAI-Offload": "NEVER"})[0] == 200


def test_never_in_offload_only_mode(tmp_path):
    with start_weak(tmp_path / "home") as weak:
        status, _, data = ask(weak, {"X-DVAI-Offload": "never"})
        assert status == 503 and json.loads(data)["error"]["type"] == "no_local_backend"
        status, _, data = ask(weak)
        error = json.loads(data)["error"]
        assert status == 503 and error["type"] == "no_capable_device" and "--peer" in error["message"]
        assert ask(weak, messages=[])[0] == ask(weak, temperature="hot")[0] == 400
        assert read_health(weak)["currentModelId"] is None
        assert not any("worker" in line for line in os.popen(f"ps --ppid {weak.process.pid} -o args=").read().split())
