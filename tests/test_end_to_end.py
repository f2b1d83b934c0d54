"""Real `serve` processes on loopback, from the first command to the last signal."""

import concurrent.futures
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

import pytest

from dvai_bridge import load_builtin_model, open_gguf
from tests.support import CLEAN_ENVIRON, MODULE, PROGRAM, read_health, start_bridge, wait_for

MODEL = "dvai-demo"
HELLO = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
END_ID = open_gguf(load_builtin_model()).metadata["tokenizer.ggml.eos_token_id"]
LONG = {"prompt": "Hello", "max_tokens": 400, "temperature": 1, "logit_bias": {str(END_ID): -100}}


def run_command(*arguments, home, timeout_s=60, **environ):
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        env=CLEAN_ENVIRON | {"DVAI_HOME": str(home)} | environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with start_bridge(tmp_path_factory.mktemp("home")) as running:
        yield running


def open_stream(bridge, body, path="/v1/completions"):
    connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=30)
    data = json.dumps({"stream": True} | body)
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def accepts(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def find_workers(bridge):
    """Process ids of the bridge's children (Linux)."""
    children = f"/proc/{bridge.process.pid}/task/{bridge.process.pid}/children"
    with open(children) as file:
        return [int(pid) for pid in file.read().split()]


# The first command


def test_plain_serve_answers_with_the_demonstration_model(bridge):
    status, headers, body = bridge.request("POST", "/v1/chat/completions", HELLO)
    answer = json.loads(body)
    assert status == 200 and answer["model"] == MODEL and answer["choices"][0]["finish_reason"] == "stop"
    assert "demo" in answer["choices"][0]["message"]["content"].lower()
    assert headers["X-DVAI-Served-By"] == "local" and headers["X-DVAI-Route"] == "local" and headers["X-Request-Id"]


def test_it_says_where_it_listens_and_what_it_serves(bridge):
    assert bridge.lines[0] == f"listening on {bridge.base_url}"
    said = "\n".join(bridge.lines)
    assert "demonstration model" in said and f"127.0.0.1:{bridge.port}/v1/chat/completions" in said


def test_the_one_file_is_enough(tmp_path):
    """Copied elsewhere, started from elsewhere, without site-packages."""
    copied = shutil.copy(MODULE, tmp_path / "renamed_bridge.py")
    home = tmp_path / "home"
    home.mkdir()
    with start_bridge(home, module=copied, environ={"PYTHONNOUSERSITE": "1"}, cwd="/") as running:
        status, _, body = running.request("POST", "/v1/chat/completions", HELLO)
        assert status == 200 and json.loads(body)["model"] == MODEL


def test_the_second_bridge_takes_the_next_port(tmp_path):
    with start_bridge(tmp_path) as first:
        taken = run_command("serve", "--port", first.port, home=tmp_path / "two")
        assert taken.returncode == 2 and str(first.port) in taken.stderr and taken.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/v1/dvai/health"])
def test_health(bridge, path):
    status, _, body = bridge.request("GET", path)
    health = json.loads(body)
    assert status == 200 and health["status"] == "ok" and health["currentModelId"] == MODEL
    assert health["uptimeSec"] >= 0 and health["version"] and health["queue"]["slots"] == 2


def test_routes_exist_without_v1_and_others_are_a_json_404(bridge):
    assert bridge.request("POST", "/chat/completions", HELLO)[0] == 200
    assert bridge.request("GET", "/models")[0] == 200
    status, _, body = bridge.request("GET", "/v1/nothing")
    assert status == 404 and "message" in json.loads(body)["error"]
    status, headers, body = bridge.request("GET", "/v1/chat/completions")
    assert status == 405 and headers["Allow"] == "POST" and json.loads(body)["error"]["type"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"temperature": 1e999, "messages": []}',
        b'{"messages": "\xff\xfe"}',
        b"null",
        b'"text"',
        b"{}",
        b'{"a": 1, "a": 2}',
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_hostile_json_is_a_400(bridge, body):
    status, _, answer = bridge.request("POST", "/v1/chat/completions", body)
    assert status == 400 and json.loads(answer)["error"]["type"] == "invalid_request_error"
    assert read_health(bridge)["status"] == "ok"


def test_a_path_as_model_is_an_unknown_model(bridge):
    status, _, body = bridge.request("POST", "/v1/chat/completions", HELLO | {"model": "../../etc/passwd"})
    assert status == 404 and json.loads(body)["error"]["code"] == "model_not_found"


# Clients that leave, engines that die, queues that fill


def test_a_client_that_leaves_frees_its_slot_also_before_the_first_token(bridge):
    body = json.dumps(LONG | {"prompt": "word " * 150}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{bridge.port}\r\nContent-Type: application/json\r\n"
    sock = socket.create_connection(("127.0.0.1", bridge.port))
    sock.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_for(lambda: read_health(bridge)["queue"]["running"], 5, "the request runs")
    sock.close()
    wait_for(lambda: not read_health(bridge)["queue"]["running"], 1, "its slot is free again")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_killed_worker_fails_its_requests_and_nothing_more(tmp_path):
    with start_bridge(tmp_path) as running:
        connection, answer = open_stream(running, LONG)
        assert answer.status == 200 and answer.readline().startswith(b"data: ")
        os.kill(find_workers(running)[0], signal.SIGKILL)
        with pytest.raises(http.client.IncompleteRead) as torn:  # nobody takes it for a whole answer
            answer.read()
        connection.close()
        assert b'"error"' in torn.value.partial and b"[DONE]" not in torn.value.partial
        assert running.request("GET", "/health")[0] == 200
        started = time.monotonic()
        status, _, body = running.request("POST", "/v1/chat/completions", HELLO)
        assert status == 200, body
        assert time.monotonic() - started < 15


def test_a_full_queue_answers_429_at_once_and_the_others_finish(tmp_path):
    with start_bridge(tmp_path, "--parallel", 1, "--queue-size", 2) as running:
        blocker, answer = open_stream(running, LONG)
        answer.readline()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(running.request, "POST", "/v1/chat/completions", HELLO) for _ in range(6)]
            refused = []
            for job in concurrent.futures.as_completed(jobs):
                if job.result()[0] == 429:
                    refused.append(job.result())
                if len(refused) == 4:
                    break
            blocker.close()
            statuses = sorted(job.result()[0] for job in jobs)
        assert statuses == [200, 200, 429, 429, 429, 429]
        for _, headers, body in refused:
            assert 1 <= int(headers["Retry-After"]) <= 60
            assert json.loads(body)["error"]["type"] == "rate_limit_error"


def test_health_answers_while_tokens_are_computed(bridge):
    connection, answer = open_stream(bridge, LONG)
    answer.readline()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        assert bridge.request("GET", "/health")[0] == 200
        times.append(time.perf_counter() - start)
    connection.close()
    assert statistics.median(times) < 1


# Stopping


def test_sigterm_lets_a_stream_finish(tmp_path):
    with start_bridge(tmp_path) as running:
        connection, answer = open_stream(running, HELLO, "/v1/chat/completions")
        first = answer.readline()
        running.process.send_signal(signal.SIGTERM)
        rest = answer.read()
        connection.close()
        assert first.startswith(b"data: ") and rest.rstrip().endswith(b"data: [DONE]")
        assert running.process.wait(10) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_second_signal_ends_at_once_and_leaves_no_worker(tmp_path):
    with start_bridge(tmp_path) as running:
        workers = find_workers(running)
        connection, answer = open_stream(running, LONG | {"n": 100})
        answer.readline()
        running.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not accepts(running.port), 3, "it stops listening")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(4) == 0
        connection.close()
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 3, "the worker is gone")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_killed_bridge_leaves_no_worker(tmp_path):
    with start_bridge(tmp_path) as running:
        workers = find_workers(running)
        running.process.kill()
        running.process.wait(5)
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 5, "the worker is gone")


# Keys and TLS


def test_an_api_key_opens_what_a_wrong_one_does_not(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-one\n\n# a comment\nsk-two\n")
    with start_bridge(tmp_path / "home", "--api-key-file", keys) as running:
        for key, expected in (("sk-one", 200), ("sk-two", 200), ("sk-three", 401), ("sk-öne", 401), ("", 401)):
            headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
            assert running.request("POST", "/v1/chat/completions", HELLO, headers)[0] == expected, key
        status, _, body = running.request("POST", "/v1/chat/completions", HELLO)
        assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
        assert running.request("GET", "/health")[0] == 200
        assert not any("sk-" in line for line in running.lines + running.log)


# The other commands


def test_version_and_help(tmp_path):
    assert re.fullmatch(r"dvai-bridge \d+\.\d+\.\d+\n", run_command("--version", home=tmp_path).stdout)
    text = run_command("--help", home=tmp_path).stdout
    assert all(command in text for command in ("serve", "models", "status", "doctor", "bench"))
    assert "worker" not in text.replace("workers", "")
    assert "--model" in run_command("serve", "--help", home=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--modle", "x"], "--modle"),
        (["serve", "--model", "/no/such/file.gguf"], "/no/such/file.gguf"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--rendezvous-url", "ftp://x"], "--rendezvous-url"),
        (["serve", "--peer", "ftp://x"], "--peer"),
        (["pair", "dance"], "dance"),
        (["pair", "qr", "--rendezvous-url", "x"], "--rendezvous-url"),
        (["serve", "--host", "999.1.1.1"], "999.1.1.1"),
        (["serve", "--ssl-cert-file", "/nope"], "--ssl"),
        (["serve", "--api-key", "sk-1"], "DVAI_API_KEY"),
        (["serve", "--api-key-file", "/nope"], "/nope"),
        (["serve", "--config", "/nope.toml"], "/nope.toml"),
        (["fly"], "fly"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    done = run_command(*arguments, home=tmp_path)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == "", done.stderr


def test_a_damaged_model_ends_serve_with_one_line(tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\xff" * 64)
    done = run_command("serve", "--port", 0, "--model", damaged, home=tmp_path)
    assert done.returncode == 2 and "damaged.gguf" in done.stderr and "Traceback" not in done.stderr


def test_status_finds_the_bridge_of_its_home(tmp_path):
    assert run_command("status", home=tmp_path).returncode == 1
    with start_bridge(tmp_path) as running:
        done = run_command("status", home=tmp_path)
        assert done.returncode == 0 and running.base_url in done.stdout and MODEL in done.stdout
        shown = json.loads(run_command("status", "--json", home=tmp_path).stdout)
        assert shown["status"] == "ok" and shown["baseUrl"] == running.base_url


def test_models_lists_what_is_there(tmp_path):
    done = run_command("models", "--json", home=tmp_path)
    shown = json.loads(done.stdout)
    assert shown["models"][0]["id"] == MODEL and done.returncode == 0


def test_doctor_says_what_works(tmp_path):
    done = run_command("doctor", home=tmp_path, timeout_s=120)
    assert done.returncode == 0, done.stdout
    assert "Python" in done.stdout and "llama-cpp-python" in done.stdout and "built-in engine" in done.stdout


def test_bench_measures_the_demonstration_model(tmp_path):
    done = run_command("bench", "--json", home=tmp_path, timeout_s=120)
    shown = json.loads(done.stdout)
    assert shown["model"] == MODEL and shown["prefillTokPerSec"] > 0 and shown["decodeTokPerSec"] > 0
