"""Real bridges that use each other through the tunnel: killed, asleep, moved, revoked, left; with either crypto."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading

import pytest
from support import CLEAN_ENVIRON, PROGRAM, find_free_port, require, start_bridge, wait_for
from support_bridges import CHAT, HELLO, Stream, ask, count_running, list_peers
from support_peer import find_secrets, read_device_id, recovering, send
from support_worker import build_byte_model

pytest.importorskip("resource", reason="stops processes with signals")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "strong.gguf"
    path.write_bytes(build_byte_model())
    return path


class Bridges:
    """Bridges of a test, each with a home of its own under `folder`, which stays when one ends."""

    def __init__(self, folder, model, environ=None):
        self.folder, self.model, self.environ = folder, model, environ
        self.stack = contextlib.ExitStack()

    def start_provider(self, name="strong", *arguments):
        flags = ("--model", self.model, "--engine", "builtin", "--lan", "--host", "127.0.0.1", "--pairing", "allow")
        flags += ("--port", find_free_port())  # where it may come back
        return self.start(name, *flags, "--device-name", name, *arguments)

    def start_consumer(self, *providers, mode="--offload-only", arguments=()):
        peers = [flag for each in providers for flag in ("--peer", f"http://127.0.0.1:{each.port}")]
        return self.start("weak", mode, "--no-discover-lan", "--device-name", "weak", *peers, *arguments)

    def start(self, name, *arguments):
        return self.stack.enter_context(start_bridge(self.folder / name, *arguments, environ=self.environ))

    def home(self, name):
        return self.folder / name

    def run(self, name, *words):
        command = [*PROGRAM, *map(str, words), "--home", str(self.home(name))]
        return subprocess.run(command, env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=60)

    def pair(self, provider):
        asked = self.run("weak", "pair", "request", f"http://127.0.0.1:{provider.port}", "--yes")
        assert asked.returncode == 0, asked.stderr


def wait_ready(bridge, count=1):
    wait_for(lambda: [peer["state"] for peer in list_peers(bridge)].count("ready") == count, 60, "peers are ready")


def is_served(bridge, by=None):
    """Whether it answers now, through the tunnel and by the device of this id."""
    status, fields, _ = ask(bridge)
    return status == 200 and (by is None or fields["X-DVAI-Served-By"] == by)


@pytest.fixture
def bridges(tmp_path, model):
    found = Bridges(tmp_path, model)
    with found.stack:
        yield found


@pytest.fixture
def pair(bridges):
    """A provider and a consumer of it."""
    strong = bridges.start_provider()
    weak = bridges.start_consumer(strong)
    bridges.pair(strong)
    wait_ready(weak)
    return strong, weak


@pytest.mark.parametrize("crypto", ["own", "cryptography"])
def test_a_chat_goes_through_the_tunnel_and_says_so(tmp_path, model, crypto):
    if crypto == "own":
        masked = tmp_path / "masked"
        masked.mkdir()
        (masked / "cryptography.py").write_text("raise ImportError('masked')\n")
        bridges = Bridges(tmp_path, model, {"PYTHONPATH": f"{masked}{os.pathsep}" + CLEAN_ENVIRON["PYTHONPATH"]})
    else:
        require("cryptography")
        bridges = Bridges(tmp_path, model)
    with bridges.stack:
        strong = bridges.start_provider()
        weak = bridges.start_consumer(strong)
        bridges.pair(strong)
        wait_ready(weak)
        direct = ask(strong)[2]["choices"][0]["message"]["content"]
        status, fields, answer = ask(weak)
        assert status == 200 and answer["choices"][0]["message"]["content"] == direct
        assert fields["X-DVAI-Transport"] == "tunnel" and fields["X-DVAI-Route"] == "lan"
        assert fields["X-DVAI-Served-By"] == read_device_id(bridges.home("strong"))
        (peer,) = list_peers(weak)
        assert peer["transport"] == "tunnel" and peer["state"] == "ready"
        assert ", tunnel)" in bridges.run("weak", "peers").stdout
        with Stream(weak) as stream:
            assert stream.answer.headers["X-DVAI-Transport"] == "tunnel"
        says_own = any("our own X25519" in line for line in weak.log + strong.log)
        assert says_own is (crypto == "own")


def test_a_provider_killed_in_the_middle_and_started_again(bridges, pair):
    strong, weak = pair
    with Stream(weak) as stream:
        os.kill(strong.process.pid, signal.SIGKILL)
        strong.process.wait()
        stream.check_torn()
    assert ask(weak)[0] == 503
    bridges.start_provider("strong", "--port", strong.port)
    wait_for(lambda: is_served(weak), 60, "it is used again without pairing")


def test_a_provider_that_moved_is_found_by_its_new_address(bridges, pair):
    strong, weak = pair
    assert is_served(weak)
    strong.process.terminate()
    strong.process.wait(30)
    weak.process.terminate()
    weak.process.wait(30)
    moved = bridges.start_provider("strong")
    assert moved.port != strong.port
    weak = bridges.start_consumer(moved)
    wait_for(lambda: is_served(weak), 60, "it is used at its new address without pairing")


def test_revocation_ends_what_runs_and_what_comes(bridges, pair):
    strong, weak = pair
    with recovering(strong), recovering(weak):
        with Stream(weak) as stream:
            revoked = bridges.run("strong", "pair", "revoke", read_device_id(bridges.home("weak")))
            assert revoked.returncode == 0, revoked.stderr
            stream.check_torn()
        wait_for(lambda: count_running(strong) == 0, 30, "the work has ended")
        for _ in range(2):
            status, _, answer = ask(weak)
            assert status == 503 and answer["error"]["type"] == "no_capable_device"
    wait_for(lambda: not list_peers(weak)[0]["paired"], 30, "the consumer says that it is not paired")
    bridges.pair(strong)
    wait_for(lambda: is_served(weak), 60, "paired anew, it serves again")


def test_the_consumer_revokes_and_pairs_anew(bridges, pair):
    strong, weak = pair
    revoked = bridges.run("weak", "pair", "revoke", read_device_id(bridges.home("strong")))
    assert revoked.returncode == 0, revoked.stderr
    status, _, answer = ask(weak)
    assert status == 503 and answer["error"]["type"] == "no_capable_device"
    bridges.pair(strong)
    wait_for(lambda: is_served(weak), 60, "paired anew, it serves again")


def test_a_client_that_leaves_ends_the_work_at_the_provider(pair):
    strong, weak = pair
    with recovering(strong), recovering(weak):
        with Stream(weak):
            assert count_running(strong) == 1
        wait_for(lambda: count_running(strong) == 0, 30, "nobody waits for it")
        assert is_served(weak)


def test_a_provider_that_sleeps_is_replaced_and_used_again(bridges):
    first, second = bridges.start_provider("first"), bridges.start_provider("second")
    weak = bridges.start_consumer(first, second)
    for provider in (first, second):
        bridges.pair(provider)
    wait_ready(weak, 2)
    ids = {read_device_id(bridges.home(name)): bridge for name, bridge in (("first", first), ("second", second))}
    chosen = ask(weak)[1]["X-DVAI-Served-By"]
    other = next(each for each in ids if each != chosen)
    os.kill(ids[chosen].process.pid, signal.SIGSTOP)
    try:
        wait_for(lambda: is_served(weak, other), 120, "the other one answers")
        wait_for(lambda: _find_state(weak, chosen) == "seen", 120, "it is known not to answer")
    finally:
        os.kill(ids[chosen].process.pid, signal.SIGCONT)
    wait_for(lambda: _find_state(weak, chosen) == "ready", 120, "it is back without pairing")
    os.kill(ids[other].process.pid, signal.SIGKILL)
    ids[other].process.wait()
    wait_for(lambda: is_served(weak, chosen), 60, "it is used again")


def _find_state(bridge, device_id):
    return next(peer["state"] for peer in list_peers(bridge) if peer["deviceId"] == device_id)


def test_a_stop_lets_streams_in_tunnels_finish(bridges, pair):
    strong, weak = pair
    ends = []
    short = {"stream": True, "max_tokens": 60, "logit_bias": {"2": -100}}

    def ask_short():
        status, _, data = weak.request("POST", CHAT, HELLO | short, timeout_s=60)
        ends.append((status, data.rstrip().endswith(b"data: [DONE]")))

    asking = threading.Thread(target=ask_short)
    asking.start()
    wait_for(lambda: count_running(strong) == 1 or ends, 30, "the stream runs")
    strong.process.terminate()
    asking.join(60)
    assert strong.process.wait(30) == 0
    assert ends == [(200, True)]


def test_signed_requests_of_a_device_with_a_tunnel_are_refused(bridges, pair):
    """Its key is good for the tunnel only, so nobody talks it into saying prompts readably."""
    import dvai_bridge as d

    strong, _ = pair
    home = bridges.home("weak")
    (pairing,) = d.parse_pairings((home / "data" / "pairings.json").read_bytes()).records.values()
    identity = d.Identity(device_id=read_device_id(home), device_name="weak")
    body = json.dumps(HELLO).encode()
    now_ms = d.read_clock_ms()
    fields = d.sign_request(pairing, identity, app_id=None, method="POST", path=CHAT, body=body, now_ms=now_ms)
    assert send(strong.port, "POST", CHAT, body, fields).status == 401


def test_no_prompt_and_no_key_is_left_anywhere(bridges, pair):
    import dvai_bridge as d

    strong, weak = pair
    canary = "canary-7c1e"
    assert ask(weak, messages=[{"role": "user", "content": canary}])[0] == 200
    secrets = [canary]
    for name in ("strong", "weak"):
        (pairing,) = d.parse_pairings((bridges.home(name) / "data" / "pairings.json").read_bytes()).records.values()
        link = pairing.outbound_link or pairing.inbound_link
        secrets += [
            pairing.outbound_key or pairing.inbound_key,
            d.encode_base64url(link.resume_psk),
            link.resume_psk.hex(),
        ]
    assert not find_secrets(secrets, bridges=(strong, weak), homes=(bridges.home("strong"), bridges.home("weak")))


def test_what_a_device_may_do_at_a_time_holds_in_its_tunnel(bridges, pair):
    """Two requests run, eight wait, the rest is told to come again."""
    strong, weak = pair
    statuses = []

    def ask_once():
        status, fields, _ = weak.request(
            "POST", CHAT, HELLO | {"max_tokens": 200, "logit_bias": {"2": -100}}, timeout_s=120
        )
        statuses.append((status, fields.get("Retry-After")))

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Stream(weak))
        threads = [threading.Thread(target=ask_once) for _ in range(12)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(statuses) >= 4, 60, "those for whom there is no place know it")
        refused = list(statuses)
        assert count_running(strong) <= 2
        assert all(status in (429, 503) and wait is not None for status, wait in refused), refused
    for thread in threads:
        thread.join(120)
    assert [status for status, _ in statuses].count(200) == 8, statuses


def test_the_audits_of_both_name_the_other(bridges, pair):
    _, weak = pair
    assert ask(weak)[0] == 200

    def read_audit(name, **wanted):
        shown = bridges.run(name, "audit", "--json")
        assert shown.returncode == 0, shown.stderr
        return [each for each in json.loads(shown.stdout) if wanted.items() <= each.items()]

    by_weak = {"deviceId": read_device_id(bridges.home("weak")), "route": "local", "outcome": "ok"}
    (entry,) = wait_for(lambda: read_audit("strong", **by_weak), 30, "the provider's audit")
    assert entry["completionTokens"] > 0 and entry["modelServed"] == "strong"
    (entry,) = wait_for(lambda: read_audit("weak", route="lan", outcome="ok"), 30, "the consumer's audit")
    assert entry["completionTokens"] > 0


def has_second_address():
    with contextlib.suppress(OSError), socket.socket() as sock:
        sock.bind(("127.0.0.2", 0))
        return True
    return False


@pytest.mark.skipif(not has_second_address(), reason="needs a second loopback address")
def test_strangers_at_the_tunnel_are_bounded_by_address(pair):
    """Handshakes that prove nothing: from one address only so many a minute."""
    strong, weak = pair
    fields = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Protocol", "dvai-noise.1"),
    ]

    def knock():
        connection = http.client.HTTPConnection("127.0.0.1", strong.port, timeout=30, source_address=("127.0.0.2", 0))
        with contextlib.closing(connection):
            connection.putrequest("GET", "/v1/dvai/tunnel")
            for name, value in fields:
                connection.putheader(name, value)
            connection.endheaders()
            return connection.getresponse().status

    with recovering(strong):
        statuses = [knock() for _ in range(40)]
        assert statuses[0] == 101 and statuses[-1] == 429, statuses
        assert is_served(weak), "others are not hindered"
