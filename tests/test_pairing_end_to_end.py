"""Pairing of real bridges over real HTTP, with somebody on the way who listens, puts own keys in, or downgrades."""

import concurrent.futures
import contextlib
import http.client
import http.server
import json
import os
import re
import select
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from support import CLEAN_ENVIRON, PROGRAM, start_bridge, wait_for
from support_peer import FakePeer, ask_owner, find_secrets, read_device_id, serve_text, start_peer

from dvai_bridge import (
    ConsumerExchange,
    Identity,
    OwnBackend,
    ProviderExchange,
    build_key_pair,
    encode_base64url,
    parse_base64url,
    parse_pairings,
)

PAIRINGS = "/v1/dvai/pairings"


class Between:
    """A program on the way to `target_port`. `carried`: all bytes of bodies that went through it, both ways."""

    target_host = "127.0.0.1"

    def __init__(self, target_port):
        self.target_port = target_port
        self.carried = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def ask_target(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection(self.target_host, self.target_port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ask_to_pair(self, document):
        status, body = self.ask_target(
            "POST", "/v1/dvai/handshake", json.dumps(document), {"Content-Type": "application/json"}
        )
        return status, json.loads(body)

    def pair(self, document):
        """(status, document) for a request to pair; here it is only carried."""
        return self.ask_to_pair(document)


class Stripper(Between):
    """Takes the offer of the secure channel out, so that both pair readably."""

    def pair(self, document):
        return self.ask_to_pair({name: value for name, value in document.items() if name != "noise"})


class Substituter(Between):
    """Pairs with each of the two under the name of the other, with keys of its own."""

    def __init__(self, target_port, source_identity, target_identity):
        super().__init__(target_port)
        backend = OwnBackend()
        key = {"static": build_key_pair(os.urandom(32), backend), "backend": backend, "random": os.urandom}
        self._now_ms = now_ms = time.time_ns() // 1_000_000
        self.as_source = ConsumerExchange(identity=source_identity, app_id=None, now_ms=now_ms, **key)
        self.as_target = ProviderExchange(
            identity=target_identity, consumer_id=source_identity.device_id, app_id=None, now_ms=now_ms, **key
        )
        self._target_identity = target_identity
        self._session_id = None

    def pair(self, document):
        message = parse_base64url(document["noise"]["m"])
        if "sid" not in document["noise"]:
            status, answer = self._ask_onward(document, self.as_source.begin(self._now_ms))
            assert status == 202
            self._reveal = self.as_source.reveal(parse_base64url(answer["noise"]["m"]), self._now_ms)
            self._session_id = answer["noise"]["sid"]
            return 202, self._build_answer(document, self.as_target.answer(message, self._now_ms), paired=False)
        self.as_target.read_reveal(message, self._now_ms)
        status, answer = self._ask_onward(document, self._reveal)
        if status != 200:
            return status, answer
        return 200, self._build_answer(document, self.as_target.confirm(self._now_ms), paired=True)

    def _ask_onward(self, document, message):
        noise = {"v": 1, "m": encode_base64url(message)} | ({"sid": self._session_id} if self._session_id else {})
        return self.ask_to_pair(document | {"noise": noise})

    def _build_answer(self, document, message, *, paired):
        own = {"deviceId": self._target_identity.device_id, "deviceName": self._target_identity.device_name}
        noise = {"v": 1, "sid": "x", "m": encode_base64url(message)}
        return {"paired": paired, "pairedAt": 1, "peerDeviceId": document["peerDeviceId"], "noise": noise} | own


class BetweenHandler(http.server.BaseHTTPRequestHandler):
    between: Between

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(*self.between.ask_target("GET", self.path))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, document = self.between.pair(json.loads(body))
        data = json.dumps(document).encode()
        self.between.carried += [body, data]
        self.answer(status, data)

    def answer(self, status, data):
        with contextlib.suppress(OSError):  # who asked may have hung up
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


@contextlib.contextmanager
def standing_between(between, host="127.0.0.1"):
    server = http.server.ThreadingHTTPServer((host, 0), type("Bound", (BetweenHandler,), {"between": between}))
    between.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield between
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Side:
    """A bridge, and what its user does."""

    def __init__(self, bridge, home):
        self.bridge, self.home = bridge, home

    @property
    def identity(self):
        return Identity(device_id=read_device_id(self.home), device_name="somebody's device")

    def ask(self, method, path, body=None):
        return ask_owner(self.bridge, self.home, method, path, body)

    def list_pending(self):
        """What is on the screen."""
        listed = self.ask("GET", PAIRINGS)[1]["pending"]
        return [each for each in listed if each["code"] or not each["isSecure"]]

    def list_paired(self):
        return self.ask("GET", PAIRINGS)[1]["pairings"]

    def read_pairing(self):
        (pairing,) = parse_pairings((self.home / "data" / "pairings.json").read_bytes()).records.values()
        return pairing

    def approve(self, entry, code=None):
        return self.ask("POST", f"{PAIRINGS}/{entry['id']}/approve", {"code": code} if code else {})


@pytest.fixture
def two(tmp_path):
    """The one who asks (weak), and the one who is asked (strong)."""
    weak_home, strong_home = tmp_path / "weak", tmp_path / "strong"
    lan = ("--lan", "--host", "127.0.0.1", "--legacy-pairing", "allow", "--device-name", "strong")
    flags = ("--offload-only", "--no-discover-lan", "--legacy-pairing", "allow", "--device-name", "weak")
    with start_bridge(strong_home, *lan) as strong, start_bridge(weak_home, *flags) as weak:
        yield Side(weak, weak_home), Side(strong, strong_home)


@contextlib.contextmanager
def asking(side, url):
    """It asks; what becomes of it."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool.submit(side.ask, "POST", PAIRINGS, {"peer": url})


def wait_shown(side):
    (entry,) = wait_for(side.list_pending, 30, "it is on the screen")
    return entry


def test_who_listens_learns_no_key(two):
    weak, strong = two
    with standing_between(Between(strong.bridge.port)) as between, asking(weak, between.url) as asked:
        here, there = wait_shown(weak), wait_shown(strong)
        assert here["code"] == there["code"] and (here["isOutgoing"], there["isOutgoing"]) == (True, False)
        assert (here["deviceName"], there["deviceName"]) == ("strong", "weak")
        assert strong.approve(there, here["code"])[0] == weak.approve(here, there["code"])[0] == 200
        status, answer = asked.result(60)
        assert status == 200 and answer["pairing"]["isSecure"], answer
    kept, given = weak.read_pairing(), strong.read_pairing()
    assert kept.outbound_key == given.inbound_key
    link = kept.outbound_link
    assert replace(link, pending_until_ms=None) == replace(given.inbound_link, pending_until_ms=None)
    secrets = [kept.outbound_key, *(encode_base64url(each) for each in (link.resume_psk, link.room))]
    said = b"".join(between.carried)
    assert len(between.carried) == 6 and b"noise" in said and b"pairingKey" not in said
    assert not any(each.encode() in said for each in secrets)
    bridges = (weak.bridge, strong.bridge)
    assert not find_secrets([*secrets, f"code {here['code']}"], bridges=bridges, homes=(weak.home, strong.home))


def test_whoever_puts_own_keys_in_gets_no_pairing_past_two_users_who_compare(two):
    weak, strong = two
    between = Substituter(strong.bridge.port, weak.identity, strong.identity)
    with standing_between(between), asking(weak, between.url) as asked:
        here, there = wait_shown(weak), wait_shown(strong)
        assert (here["deviceId"], there["deviceId"]) == (strong.identity.device_id, weak.identity.device_id)
        assert here["code"] != there["code"], "all else looks as it should"
        status, answer = strong.approve(there, here["code"])
        assert status == 403 and "codes differ" in answer["error"]["message"]
        weak.approve(here, there["code"])  # this user compares, too, unless it is over by now
        status, answer = asked.result(60)
        assert status == 403 and answer["error"]["type"] == "pairing_denied", answer
    for side in two:
        assert side.list_paired() == [] and side.list_pending() == []


def test_whoever_downgrades_what_spoke_the_secure_channel_is_refused(two):
    weak, strong = two
    between = Substituter(strong.bridge.port, weak.identity, strong.identity)
    with standing_between(between), asking(weak, between.url) as asked:
        here = wait_shown(weak)
        assert weak.ask("POST", f"{PAIRINGS}/{here['id']}/deny", {})[0] == 200
        assert asked.result(60)[0] == 403
    between = Stripper(strong.bridge.port)
    with standing_between(between), asking(weak, between.url) as asked:
        there = wait_for(lambda: [each for each in strong.list_pending() if not each["isSecure"]], 30, "it is asked")[0]
        assert "readably" in there["question"]
        assert strong.approve(there)[0] == 200
        status, answer = asked.result(60)
        assert status == 403 and "somebody may stand between" in answer["error"]["message"], answer
    assert weak.list_paired() == []


@pytest.mark.parametrize("word", ["approve", "deny"])
def test_a_readable_key_is_used_only_if_the_user_says_so(tmp_path, word):
    """With software that knows no secure channel; by default the user is asked."""
    hub = FakePeer("hub", serve_text("hello"), models=("m",))
    flags = ("--offload-only", "--no-discover-lan")
    with start_peer(hub), start_bridge(tmp_path / "home", *flags) as bridge:
        side = Side(bridge, tmp_path / "home")
        with asking(side, hub.url) as asked:
            entry = wait_shown(side)
            assert entry["isOutgoing"] and not entry["isSecure"] and "readably" in entry["question"]
            assert side.ask("POST", f"{PAIRINGS}/{entry['id']}/{word}", {})[0] == 200
            status, answer = asked.result(60)
        paired = side.list_paired()
        if word == "approve":
            assert status == 200 and not paired[0]["isSecure"], answer
            assert side.read_pairing().outbound_key == hub.key
        else:
            assert status == 403 and paired == []
    assert not find_secrets([hub.key], bridges=[bridge], homes=[tmp_path / "home"])


# At the terminal, and by commands


def run_command(side, *words):
    command = [*PROGRAM, *words, "--home", str(side.home)]
    return subprocess.run(
        command, env=CLEAN_ENVIRON, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def test_a_script_pairs_by_commands(two):
    """Without a terminal `pair request` says what to compare, and waits; other commands bring the codes."""
    weak, strong = two
    url = f"http://127.0.0.1:{strong.bridge.port}"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        requesting = pool.submit(run_command, weak, "pair", "request", url)
        here, there = wait_shown(weak), wait_shown(strong)
        listed = run_command(strong, "pair", "list").stdout
        assert f"the same code {here['code']}!" in listed and f"pair approve {there['id']} --code" in listed
        nobody = run_command(strong, "pair", "approve")
        assert nobody.returncode == 2 and "--code" in nobody.stderr
        assert run_command(strong, "pair", "approve", "--code", here["code"]).returncode == 0
        named = run_command(weak, "pair", "request", url, "--code", there["code"])
        requested = requesting.result(60)
    for done in (named, requested):
        assert done.returncode == 0 and "may be used from here" in done.stdout, done
    assert here["code"] in requested.stderr and "pair approve" in requested.stderr
    late = run_command(weak, "pair", "request", url, "--code", there["code"])
    assert late.returncode == 1 and "begin without --code" in late.stderr


def test_a_wrong_code_by_command_is_a_denial(two):
    weak, strong = two
    with asking(weak, f"http://127.0.0.1:{strong.bridge.port}") as asked:
        here = wait_shown(weak)
        wrong = f"{(int(here['code']) + 1) % 1_000_000:06}"
        wait_shown(strong)
        denied = run_command(strong, "pair", "approve", "--code", wrong)
        assert denied.returncode == 1 and "codes differ" in denied.stderr
        assert asked.result(60)[0] == 403
    assert weak.list_paired() == strong.list_paired() == []


class Terminal:
    """A command on a terminal of its own. `shown`: all that it printed there."""

    def __init__(self, *words):
        self._end, inner = os.openpty()
        command = [*PROGRAM, *map(str, words)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), inner)
        self.process = subprocess.Popen(command, env=CLEAN_ENVIRON, start_new_session=True, **streams)
        os.close(inner)
        self.shown = ""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.terminate()
        try:
            wait_for(self._has_ended, 60, "it ends")
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._end)

    def _has_ended(self):
        self._read()  # what is not read may hold it up
        return self.process.poll() is not None

    def _read(self):
        if select.select([self._end], [], [], 0.01)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                self.shown += os.read(self._end, 1 << 16).decode(errors="replace")

    def wait(self, pattern):
        def find():
            self._read()
            return re.search(pattern, self.shown)

        return wait_for(find, 60, f"{pattern} in {self.shown}")

    def type(self, line):
        os.write(self._end, line.encode() + b"\n")


needs_terminals = pytest.mark.skipif(not hasattr(os, "openpty"), reason="POSIX file modes, links and signals")


@needs_terminals
@pytest.mark.parametrize("answers", ["yy", "yn", "ny"])
def test_both_users_at_their_terminals(tmp_path, answers):
    strong_home, weak_home = tmp_path / "strong", tmp_path / "weak"
    weak_flags = ("--offload-only", "--no-discover-lan", "--device-name", "weak one")
    lan = ("--lan", "--host", "127.0.0.1", "--port", 0, "--device-name", "strong one")
    with (
        Terminal("serve", "--home", strong_home, *lan) as strong,
        start_bridge(weak_home, *weak_flags) as weak,
    ):
        port = strong.wait(r"listening on http://127\.0\.0\.1:(\d+)/v1")[1]
        question = r"strong one [^\n]* same code (\d{6})! \[y/N\] "
        with Terminal("pair", "request", f"http://127.0.0.1:{port}", "--home", weak_home) as request:
            here = request.wait(question)[1]
            there = strong.wait(question.replace("strong", "weak"))[1]
            assert here == there
            for terminal, answer in ((strong, answers[0]), (request, answers[1])):
                terminal.type(answer)
            request.wait(r"may be used from here|pair request: [^\n]*\n")
            request.process.wait(60)
            is_paired = answers == "yy"
            assert request.process.returncode == (0 if is_paired else 1), request.shown
            assert ("may be used from here" in request.shown) is is_paired
        assert bool(Side(weak, weak_home).list_paired()) is is_paired


def test_a_seed_of_the_users_is_the_identity_that_others_see(tmp_path):
    """Protocol section 1's known answer, by the environment and by a file; a wrong file is said, and nothing starts."""
    public = "raNS_HZR5eMcRklH55m6i05JQC1Cf5sfBCFJ_CHuN3s"
    strong_home, seed_file = tmp_path / "strong", tmp_path / "seed"
    seed_file.write_text("21" * 32 + "\n")
    weak_flags = ("--offload-only", "--no-discover-lan")
    with start_bridge(strong_home, "--lan", "--host", "127.0.0.1", "--pairing", "allow") as strong:
        url = f"http://127.0.0.1:{strong.port}"
        for name, flags, environ in (
            ("by-environment", (), {"DVAI_SEED": "21" * 32}),
            ("by-file", ("--seed-file", seed_file), {}),
        ):
            with start_bridge(tmp_path / name, *weak_flags, *flags, environ=environ) as weak:
                assert run_command(Side(weak, tmp_path / name), "pair", "request", url, "--yes").returncode == 0
                assert "21" * 32 not in (tmp_path / name / "data" / "identity.json").read_text()
    given = parse_pairings((strong_home / "data" / "pairings.json").read_bytes()).records.values()
    assert [each.identity_key for each in given] == [public, public]
    seed_file.write_text("short")
    command = [*PROGRAM, "serve", "--seed-file", seed_file, "--home", tmp_path / "by-file"]
    failed = subprocess.run(command, env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2 and "--seed-file" in failed.stderr and "32 bytes" in failed.stderr
