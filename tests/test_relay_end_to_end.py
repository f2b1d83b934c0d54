"""Real processes: a relay, and two bridges that have no other way to each other. Pairing, streams, and returning."""

import contextlib
import json
import subprocess
import threading

import pytest
from support import CLEAN_ENVIRON, PROGRAM, find_free_port, start_bridge, wait_for
from support_relay import start_relay
from support_worker import build_byte_model

pytest.importorskip("resource", reason="stops processes with signals")

UNLIMITED = {"SESSIONS_PER_ADDRESS_PER_MINUTE": "0", "SESSIONS_PER_ADDRESS": "0"}
DEADLINE_S = 120
HELLO = {"model": "strong", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "strong.gguf"
    path.write_bytes(build_byte_model())
    return path


def run_command(home, *arguments, stdin=None):
    command = [*PROGRAM, *map(str, arguments), "--home", str(home)]
    return subprocess.run(
        command, env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=DEADLINE_S, input=stdin, check=False
    )


def start_weak(home, relay_url, **options):
    return start_bridge(home, "--offload-only", "--no-discover-lan", "--rendezvous-url", relay_url, **options)


def start_strong(home, model, **options):
    """Which nobody reaches but through the relay: it neither listens for other devices nor knows a relay's URL."""
    return start_bridge(home, "--model", model, "--engine", "builtin", **options)


@contextlib.contextmanager
def show_code(home, *arguments):
    """A `pair qr` that waits: (its process, what it showed). It must have ended by itself at the end."""
    command = [*PROGRAM, "pair", "qr", "--json", *arguments, "--home", str(home)]
    with subprocess.Popen(
        command, env=CLEAN_ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        guard = threading.Timer(DEADLINE_S, process.kill)
        guard.start()
        try:
            yield process, json.loads(process.stdout.readline())
            process.wait(DEADLINE_S)
        finally:
            guard.cancel()
            process.kill()


def pair(weak_home, strong_home):
    with show_code(weak_home, "--yes") as (showing, shown):
        scanned = run_command(strong_home, "pair", "scan", shown["pairUrl"], "--json", "--yes")
        assert scanned.returncode == 0, scanned.stderr
        ours, errors = showing.communicate(timeout=DEADLINE_S)
        assert showing.returncode == 0, errors
    ours, theirs = json.loads(ours), json.loads(scanned.stdout)
    assert ours["paired"] is theirs["paired"] is True and ours["code"] == theirs["code"]
    assert ours["peerDeviceId"] == read_id(strong_home) and theirs["peerDeviceId"] == read_id(weak_home)


def read_id(home):
    return json.loads((home / "data" / "identity.json").read_text())["deviceId"]


def read_pairings(home):
    return json.loads((home / "data" / "pairings.json").read_text())["pairings"]


def ask(bridge, **body):
    """(status, headers, events or body)."""
    status, headers, data = bridge.request("POST", "/v1/chat/completions", HELLO | body, timeout_s=DEADLINE_S)
    return status, headers, data


def wait_answered(bridge):
    """An answer through the relay, however long finding the way again takes."""

    def answer():
        status, headers, data = ask(bridge, stream=True)
        return (headers, data) if status == 200 and b"[DONE]" in data else None

    headers, data = wait_for(answer, DEADLINE_S, "an answer through the relay")
    assert (headers["X-DVAI-Route"], headers["X-DVAI-Transport"]) == ("relay", "tunnel")
    return data


def read_text(data):
    events = [line[6:] for line in data.decode().split("\n\n") if line.startswith("data: {")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events if json.loads(event)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_pair_ask_and_come_back_after_each_of_the_three_was_killed(tmp_path, model):
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    with contextlib.ExitStack() as stack:
        relays = stack.enter_context(contextlib.ExitStack())
        port = find_free_port()
        relay = relays.enter_context(start_relay(port=port, **UNLIMITED))
        url = f"ws://127.0.0.1:{port}"
        weaks = stack.enter_context(contextlib.ExitStack())
        weak = weaks.enter_context(start_weak(weak_home, url))
        strongs = stack.enter_context(contextlib.ExitStack())
        strong = strongs.enter_context(start_strong(strong_home, model))
        pair(weak_home, strong_home)
        text = read_text(wait_answered(weak))
        assert text == json.loads(ask(strong)[2])["choices"][0]["message"]["content"]
        (peer,) = json.loads(weak.request("GET", "/v1/dvai/peers")[2])["peers"]
        assert (peer["via"], peer["route"], peer["deviceId"]) == ("rendezvous", "relay", read_id(strong_home))
        assert "through the relay" in run_command(weak_home, "peers").stdout

        strong.process.kill()  # without a goodbye
        strongs.close()
        assert ask(weak)[0] in (502, 503)
        strong = strongs.enter_context(start_strong(strong_home, model))
        assert read_text(wait_answered(weak)) == text

        relay.process.kill()
        with contextlib.suppress(AssertionError):
            relays.close()
        assert ask(weak)[0] in (502, 503)
        relays.enter_context(start_relay(port=port, **UNLIMITED))
        assert read_text(wait_answered(weak)) == text

        weak.process.kill()
        weaks.close()
        weak = weaks.enter_context(start_weak(weak_home, url, ready=False))
        assert read_text(wait_answered(weak)) == text

    (ours,), (theirs,) = read_pairings(weak_home), read_pairings(strong_home)
    assert ours["outboundLink"]["pendingUntil"] is theirs["inboundLink"]["pendingUntil"] is None  # active on both sides
    assert ours["outboundLink"] == theirs["inboundLink"] and ours["outboundLink"]["relayUrl"] == url
    assert ours["inboundLink"] is theirs["outboundLink"] is None


def test_the_user_is_asked_and_may_say_no(tmp_path, model):
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    with start_relay(**UNLIMITED) as relay:
        url = f"ws://127.0.0.1:{relay.port}"
        with start_weak(weak_home, url), start_strong(strong_home, model):
            with show_code(weak_home) as (showing, shown):
                link = shown["pairUrl"]
                scanning = subprocess.Popen(
                    [*PROGRAM, "pair", "scan", "--yes", "--home", str(strong_home)],
                    env=CLEAN_ENVIRON,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                threading.Thread(target=lambda: scanning.stdin.write(link + "\n") and scanning.stdin.close()).start()

                def find_question():
                    return json.loads(run_command(weak_home, "pair", "list", "--json").stdout)["pending"]

                (question,) = wait_for(find_question, DEADLINE_S, "the question")
                assert question["isOutgoing"] and question["deviceId"] == read_id(strong_home)
                assert run_command(weak_home, "pair", "deny", question["id"]).returncode == 0
                assert showing.wait(DEADLINE_S) == 1 and "not confirmed" in showing.stderr.read()
                scanning.wait(DEADLINE_S)
                with scanning:
                    errors = scanning.stderr.read()
                assert scanning.returncode == 1 and "did not confirm" in errors
            for home in (weak_home, strong_home):
                assert not (home / "data" / "pairings.json").exists() or not read_pairings(home)


def test_what_cannot_be_paired_is_said_in_one_line(tmp_path, model):
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    with start_weak(weak_home, "ws://127.0.0.1:1"), start_strong(strong_home, model):
        for home, arguments, words in (
            (weak_home, ["qr"], "relay cannot be reached"),
            (strong_home, ["qr", "--rendezvous-url", "ws://127.0.0.1:1"], "--offload"),
            (strong_home, ["scan", "--yes", "hello"], "no pairing code"),
            (strong_home, ["scan", "hello"], "no pairing code"),
        ):
            done = run_command(home, "pair", *arguments)
            assert done.returncode in (1, 2) and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run_command(tmp_path / "nobody", "pair", "qr")
    assert done.returncode == 1 and "serve --offload" in done.stderr


def test_a_revoked_device_has_no_way_in(tmp_path, model):
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    with start_relay(**UNLIMITED) as relay:
        url = f"ws://127.0.0.1:{relay.port}"
        with start_weak(weak_home, url) as weak, start_strong(strong_home, model):
            pair(weak_home, strong_home)
            wait_answered(weak)
            assert run_command(strong_home, "pair", "revoke", read_id(weak_home)).returncode == 0
            wait_for(lambda: ask(weak)[0] == 503, DEADLINE_S, "no way in")
            assert run_command(weak_home, "pair", "revoke", read_id(strong_home)).returncode == 0
            wait_for(lambda: not json.loads(weak.request("GET", "/v1/dvai/peers")[2])["peers"], 30, "nobody is known")
            wait_for(lambda: relay.read_health()["activeSessions"] == 0, DEADLINE_S, "nothing is left at the relay")


def test_the_network_of_ones_own_goes_first(tmp_path, model):
    """Both ways lead to the strong one; when the direct one is gone, the relay's is taken."""
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    with start_relay(**UNLIMITED) as relay:
        url = f"ws://127.0.0.1:{relay.port}"
        with contextlib.ExitStack() as strongs:
            strong = strongs.enter_context(start_strong(strong_home, model))
            peer = f"http://127.0.0.1:{strong.port}"
            flags = ["--offload-only", "--no-discover-lan", "--rendezvous-url", url, "--peer", peer]
            with start_bridge(weak_home, *flags) as weak:
                pair(weak_home, strong_home)

                def routes():
                    listed = json.loads(weak.request("GET", "/v1/dvai/peers")[2])["peers"]
                    return [each["route"] for each in listed if each["state"] == "ready"]

                wait_for(lambda: routes() == ["lan"], DEADLINE_S, "the direct way")
                status, headers, data = ask(weak)
                assert (status, headers["X-DVAI-Route"]) == (200, "lan"), data
                strongs.close()
                strongs.enter_context(start_strong(strong_home, model))  # at another port
                wait_answered(weak)
