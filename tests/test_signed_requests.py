"""Signed requests over HTTP to a real bridge, by callers that know nothing of the module but the protocol."""

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from support import read_health, start_bridge, wait_for
from support_peer import (
    Caller,
    FakePeer,
    ask_owner,
    encode_base64url,
    find_secrets,
    pair_with,
    read_device_id,
    read_token,
    recovering,
    send,
    serve_text,
    start_peer,
)
from support_worker import build_byte_model

pytest.importorskip("resource", reason="stops processes with signals")

CHAT = "/v1/chat/completions"
CANARY = "canary-91bd"
HELLO = {"model": "target", "messages": [{"role": "user", "content": f"Hi {CANARY}"}], "max_tokens": 4}
BODY = json.dumps(HELLO, separators=(",", ":")).encode()
DAY_MS = 86_400_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "target.gguf"
    path.write_bytes(build_byte_model())
    return path


def start_target(home, model, *arguments):
    """It pairs with everybody, in the legacy way too."""
    allow = ("--pairing", "allow", "--legacy-pairing", "allow")
    return start_bridge(home, "--model", model, "--lan", "--host", "127.0.0.1", *allow, *arguments)


class Target:
    """A bridge that lets everybody pair, and three that did: two applications of one device, and a phone."""

    def __init__(self, bridge, home):
        self.bridge, self.home, self.port = bridge, home, bridge.port
        self.one = pair_with(bridge.port, "device-A", "app-one", name="A")
        self.two = pair_with(bridge.port, "device-A", "app-two", name="A", nonce="any text")
        self.phone = pair_with(bridge.port, "phone-B", name="B")

    @property
    def callers(self):
        return self.one, self.two, self.phone


@pytest.fixture(scope="module")
def target(tmp_path_factory, model):
    home = tmp_path_factory.mktemp("homes") / "target"
    with start_target(home, model) as bridge:
        target = Target(bridge, home)
        yield target
    secrets = [CANARY, read_token(home), *(caller.key for caller in target.callers)]
    assert not find_secrets(secrets, bridges=[bridge], homes=[home])


@pytest.fixture(autouse=True)
def recovered(request):
    """Whatever a test does to the shared bridge, it is well afterwards."""
    if "target" not in request.fixturenames:
        yield
        return
    with recovering(request.getfixturevalue("target").bridge):
        yield


# What is taken


def test_signatures_in_every_spelling(target):
    caller = target.one
    for spell in (encode_base64url, bytes.hex, lambda digest: digest.hex().upper()):
        answer = caller.ask(target.port, "POST", CHAT, BODY, spell=spell)
        assert answer.status == 200 and answer.json["choices"], answer.body
        assert answer.headers["X-DVAI-Served-By"] == "local"


def test_nonces_of_other_software_each_once(target):
    for nonce in ("550e8400-e29b-41d4-a716-446655440000", "x", "T1.!~", "9" * 256):
        assert target.phone.ask(target.port, "GET", "/v1/models", nonce=nonce).status == 200
        assert target.phone.ask(target.port, "GET", "/v1/models", nonce=nonce).status == 401
    assert target.phone.ask(target.port, "GET", "/v1/models", nonce="9" * 257).status == 401


def test_whoever_used_times_may_not_leave_them_out(target):
    assert target.one.ask(target.port, "GET", "/v1/models").status == 200
    assert target.one.ask(target.port, "GET", "/v1/models", nonce="any-text-1").status == 401


def test_bodies_are_signed_as_bytes(target):
    """Spaces, escapes and the order of keys count: nothing is written anew before it is hashed."""
    text = json.dumps(HELLO | {"user": "\u00e9\U0001f600"}, indent=3).encode()
    assert target.one.ask(target.port, "POST", CHAT, text).status == 200
    fields = target.one.sign("POST", CHAT, json.dumps(json.loads(text)).encode()).items()
    assert send(target.port, "POST", CHAT, text, fields).status == 401


# What is refused, always alike


def without(name):
    return lambda fields: [each for each in fields if each[0] != name]


def twice(name):
    return lambda fields: [*fields, *(each for each in fields if each[0] == name)]


def with_value(name, change):
    return lambda fields: [(each, change(value) if each == name else value) for each, value in fields]


NAMES = ("X-DVAI-Peer-Device-Id", "X-DVAI-App-Id", "X-DVAI-Nonce", "X-DVAI-Signature")
CHANGES = {
    **{f"no {name}": without(name) for name in NAMES},
    **{f"two {name}": twice(name) for name in NAMES},
    **{f"{name} empty": with_value(name, lambda _: "") for name in NAMES},
    **{f"{name} not ASCII": with_value(name, lambda value: value[:-1] + "\xe9") for name in NAMES},
    **{f"{name} of other digits": with_value(name, lambda value: "\xb9" + value[1:]) for name in NAMES},
    "another device": with_value(NAMES[0], lambda _: "phone-B"),
    "an unknown device": with_value(NAMES[0], lambda _: "nobody"),
    "another application of the device": with_value(NAMES[1], lambda _: "app-two"),
    "no application of the device": with_value(NAMES[1], lambda _: "device-A"),
    "another nonce": with_value(NAMES[2], lambda value: value.replace("t1.1", "t1.2")),
    "a malformed t1 nonce": with_value(NAMES[2], lambda value: value + "A"),
    "a flipped bit": with_value(NAMES[3], lambda value: ("B" if value[0] == "A" else "A") + value[1:]),
    "padding": with_value(NAMES[3], lambda value: value + "="),
    "a longer signature": with_value(NAMES[3], lambda value: value + "A"),
    "only the signature": lambda fields: fields[3:],
}


@pytest.fixture(scope="module")
def refusal(target):
    """The one answer to everything that is not signed validly."""
    fields = target.one.sign("POST", CHAT, BODY, spell=lambda digest: "A" * 43).items()
    answer = send(target.port, "POST", CHAT, BODY, fields)
    error = answer.error
    assert (answer.status, error["type"], error["code"]) == (401, "authentication_error", "invalid_signature")
    return answer.body


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_field(target, refusal, change):
    fields = list(target.one.sign("POST", CHAT, BODY).items())
    answer = send(target.port, "POST", CHAT, BODY, change(fields))
    assert (answer.status, answer.body) == (401, refusal)


def test_a_changed_request(target, refusal):
    for method, path, body in (
        ("POST", CHAT, BODY.replace(b"Hi", b"Ho")),
        ("POST", CHAT, BODY + b" "),
        ("POST", "/v1/completions", BODY),
        ("POST", "/chat/completions", BODY),
        ("POST", CHAT + "?a=1", BODY),
        ("POST", CHAT, b""),
    ):
        fields = [*target.one.sign("POST", CHAT, BODY).items()]
        if not body:
            fields += [("Content-Type", "application/json"), ("Content-Length", "0")]
        answer = send(target.port, method, path, body, fields)
        assert (answer.status, answer.body) == (401, refusal), (method, path)
    fields = target.one.sign("GET", "/v1/models").items()
    assert send(target.port, "HEAD", "/v1/models", fields=fields).status == 401


def test_a_query_is_refused_even_if_it_is_signed(target, refusal):
    answer = target.one.ask(target.port, "GET", "/v1/models?a=1")
    assert (answer.status, answer.body) == (401, refusal)


def test_the_same_nonce_twice(target, refusal):
    fields = target.one.sign("POST", CHAT, BODY).items()
    assert send(target.port, "POST", CHAT, BODY, fields).status == 200
    again = send(target.port, "POST", CHAT, BODY, fields)
    assert (again.status, again.body) == (401, refusal)
    nonce = target.one.nonce()
    assert target.one.ask(target.port, "GET", "/v1/models", nonce=nonce).status == 200
    assert target.one.ask(target.port, "GET", "/v1/dvai/capability", nonce=nonce).status == 401


def test_of_racing_requests_with_one_nonce_exactly_one_is_served(target):
    """Each connection stands ready with all but the last byte of the same request."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    fields = target.one.sign("POST", CHAT, BODY) | {"Content-Length": str(len(BODY))}
    request = head.encode() + "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
    request += b"\r\n" + BODY
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", target.port), timeout=60)) for _ in range(24)
        ]
        for each in sockets:
            each.sendall(request[:-1])
        for each in sockets:
            each.sendall(request[-1:])
        statuses = [int(each.makefile("rb").readline().split()[1]) for each in sockets]
    assert sorted(statuses) == [200] + [401] * 23


def test_clocks_may_differ_by_two_minutes(target):
    """The side of each bound from which a slow test moves away; test_pairing has both sides of both."""
    caller = target.one
    assert caller.ask(target.port, "GET", "/v1/models", nonce=caller.nonce(skew_ms=119_000)).status == 200
    answer = caller.ask(target.port, "GET", "/v1/models", nonce=caller.nonce(skew_ms=-121_000))
    assert (answer.status, answer.error["code"]) == (401, "clock_skew") and answer.error["skewSeconds"] <= -121
    for days in (-40, 40):
        answer = caller.ask(target.port, "GET", "/v1/models", nonce=caller.nonce(skew_ms=days * DAY_MS))
        assert answer.error["code"] == "clock_skew" and "clock" in answer.error["message"]
    assert caller.ask(target.port, "GET", "/v1/models").status == 200


def test_what_was_meant_for_another_device(target, refusal):
    for nonce in (
        target.phone.nonce(),  # from another one
        Caller("device-A", "app-one", "another-bridge", "").nonce(),
        Caller(target.one.receiver, "app-one", "device-A", "").nonce(),  # in the other direction
    ):
        answer = target.one.ask(target.port, "GET", "/v1/models", nonce=nonce)
        assert (answer.status, answer.body) == (401, refusal)


# What a paired device may do


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", CHAT, HELLO, 200),
        ("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 2}, 200),
        ("POST", "/v1/embeddings", {"input": "Hi"}, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/models/target", None, 200),
        ("GET", "/v1/dvai/capability", None, 200),
        ("GET", "/v1/dvai/health", None, 200),
        ("GET", "/v1/health", None, 200),
        ("GET", "/v1/dvai/peers", None, 403),
        ("POST", "/v1/dvai/probe", {}, 403),
        ("GET", "/v1/metrics", None, 403),
        ("GET", "/v1/dvai/pairings", None, 403),
        ("POST", "/v1/dvai/pairings", {"peer": "x"}, 403),
        ("POST", "/v1/dvai/pairings/x/approve", {}, 403),
        ("DELETE", "/v1/dvai/pairings/x", None, 403),
        ("POST", "/v1/dvai/pair-qr", {}, 403),
        ("POST", "/v1/dvai/pair-scan", {"payload": "x"}, 403),
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/models", {}, 405),
    ],
)
def test_the_routes_of_a_paired_device(target, method, path, body, status):
    """And with every one of them a wrong signature is worse than none: nothing is answered but 401 or 403."""
    data = b"" if body is None else json.dumps(body).encode()
    control = [("X-DVAI-Control", read_token(target.home))]  # does not help who is not the owner
    answer = target.one.ask(target.port, method, path, data, extra=control)
    assert answer.status == status, answer.body
    wrong = target.one.ask(target.port, method, path, data, spell=lambda digest: "A" * 43)
    assert wrong.status == (403 if status == 403 else 401), wrong.body


def test_a_repeated_handshake_that_is_signed_gets_no_key(target):
    asked = {"peerDeviceId": "phone-B", "peerDeviceName": "B", "via": "lan-handshake"}
    body = json.dumps(asked).encode()
    answer = target.phone.ask(target.port, "POST", "/v1/dvai/handshake", body, nonce="handshake-1")
    assert answer.status == 200 and answer.json["paired"] is True and "pairingKey" not in answer.json
    answer = target.phone.ask(target.port, "POST", "/v1/dvai/handshake", body, spell=lambda digest: "A" * 43)
    assert answer.status == 401
    asked["peerDeviceId"] = "device-A"  # signed by one, named another
    body = json.dumps(asked).encode()
    assert target.phone.ask(target.port, "POST", "/v1/dvai/handshake", body, nonce="handshake-2").status == 400


def test_full_health_is_for_who_has_proved_it(target):
    full = target.one.ask(target.port, "GET", "/v1/dvai/health").json
    assert full["deviceId"] == target.one.receiver and set(full["queue"]) == {"running", "waiting", "slots"}


def test_what_iphones_copy_along_is_ignored(target):
    """Their proxy hands on the header fields of its own client: a page's, an SDK's, whatever there was."""
    copied = [
        ("Authorization", "Bearer sk-of-another-service"),
        ("Origin", "https://evil.example"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Cookie", "session=1"),
        ("X-Stainless-Lang", "js"),
        ("X-DVAI-Offload", "prefer"),
        ("Accept", "text/event-stream"),
    ]
    body = json.dumps(HELLO | {"stream": True}).encode()
    answer = target.phone.ask(target.port, "POST", CHAT, body, extra=copied, nonce="ios-1", spell=bytes.hex)
    assert answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.headers["Access-Control-Allow-Origin"] is None
    unsigned = send(target.port, "POST", CHAT, body, copied)
    assert unsigned.status == 403
    bad = target.phone.ask(target.port, "POST", CHAT, body, extra=copied, nonce="ios-2", spell=lambda digest: "00" * 32)
    assert bad.status == 401


def find_children(bridge):
    with open(f"/proc/{bridge.process.pid}/task/{bridge.process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


@contextlib.contextmanager
def frozen_engine(bridge):
    """The engine process stands still."""
    workers = find_children(bridge)
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_device_has_two_requests_running_and_eight_waiting(target):
    """Whatever it asks at once beyond that is refused at once; others are served as before."""
    bodies = [json.dumps(HELLO | {"stream": each % 2 == 0}).encode() for each in range(14)]
    with concurrent.futures.ThreadPoolExecutor(15) as pool:
        with frozen_engine(target.bridge):
            asked = [pool.submit(target.one.ask, target.port, "POST", CHAT, body) for body in bodies]
            wait_for(lambda: sum(each.done() for each in asked) == 4, 30, "four are refused")
            refused = [each.result() for each in asked if each.done()]
            other = pool.submit(target.phone.ask, target.port, "POST", CHAT, BODY, nonce="quota-1")
            wait_for(lambda: read_health(target.bridge)["queue"]["waiting"] >= 1, 30, "another device waits")
            assert sum(each.done() for each in asked) == 4 and not other.done()
        answers = [each.result(60) for each in asked] + [other.result(60)]
    assert sorted(answer.status for answer in answers) == [200] * 11 + [429] * 4
    for answer in refused:
        assert answer.error["type"] == "rate_limit_error" and 1 <= int(answer.headers["Retry-After"]) <= 60


# Two applications of one device, revocation, expiry


def test_applications_of_one_device_are_kept_apart(tmp_path, model):
    home = tmp_path / "home"
    with start_target(home, model) as bridge:
        one, two = (pair_with(bridge.port, "device", app) for app in ("one", "two"))
        assert one.key != two.key
        nonce = one.nonce()  # the same one may be used by each
        assert one.ask(bridge.port, "POST", CHAT, BODY, nonce=nonce).status == 200
        assert two.ask(bridge.port, "POST", CHAT, BODY, nonce=nonce).status == 200
        two.app_id = "one"
        assert two.ask(bridge.port, "POST", CHAT, BODY).status == 401
        two.app_id = "two"
        status, listed = ask_owner(bridge, home, "GET", "/v1/dvai/pairings")
        ids = {each["appId"]: each["id"] for each in listed["pairings"]}
        assert status == 200 and set(ids) == {"one", "two"}
        with recovering(bridge):
            assert ask_owner(bridge, home, "DELETE", f"/v1/dvai/pairings/{ids['one']}")[0] == 200
            revoked, kept = one.ask(bridge.port, "POST", CHAT, BODY), two.ask(bridge.port, "POST", CHAT, BODY)
            assert (revoked.status, kept.status) == (401, 200)
            assert one.ask(bridge.port, "GET", "/v1/dvai/health").status == 401
    files = list((home / "data" / "audit").iterdir())
    entries = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    served = [(each["appId"], each["deviceId"]) for each in entries if each["outcome"] == "ok"]
    assert sorted(served) == [("one", "device"), ("two", "device"), ("two", "device")]


def test_an_expired_pairing_needs_a_new_approval(tmp_path, model):
    """A clock 40 days ahead deletes nothing: the record is still there, and what the clock says back then counts."""
    home, pairings = tmp_path / "home", tmp_path / "home" / "data" / "pairings.json"

    def age(days):
        document = json.loads(pairings.read_text())
        for each in document["pairings"]:
            each["lastUsedAt"] -= days * DAY_MS
        pairings.write_text(json.dumps(document))

    with start_target(home, model) as bridge:
        caller = pair_with(bridge.port, "device")
        assert caller.ask(bridge.port, "GET", "/v1/models").status == 200
    for days, status in ((40, 401), (-40, 200), (29, 200), (31, 401)):
        age(days)
        with start_target(home, model) as bridge:
            assert caller.ask(bridge.port, "GET", "/v1/models").status == status, days
            listed = ask_owner(bridge, home, "GET", "/v1/dvai/pairings")[1]["pairings"]
            assert [each["state"] for each in listed] == ["active" if status == 200 else "expired"]
            if days == 31:
                renewed = pair_with(bridge.port, "device")
                assert renewed.key != caller.key
                assert caller.ask(bridge.port, "GET", "/v1/models").status == 401
                assert renewed.ask(bridge.port, "GET", "/v1/models").status == 200


def test_what_was_used_before_a_restart_is_not_used_again(tmp_path, model):
    home = tmp_path / "home"
    with start_target(home, model) as bridge:
        caller, phone = pair_with(bridge.port, "device"), pair_with(bridge.port, "phone")
        fields = caller.sign("GET", "/v1/models").items()
        assert send(bridge.port, "GET", "/v1/models", fields=fields).status == 200
        assert phone.ask(bridge.port, "GET", "/v1/models", nonce="once").status == 200
    with start_target(home, model) as bridge:
        assert send(bridge.port, "GET", "/v1/models", fields=fields).status == 401
        assert phone.ask(bridge.port, "GET", "/v1/models", nonce="once").status == 401
        assert phone.ask(bridge.port, "GET", "/v1/models", nonce="twice").status == 200


# A request that comes back to who sent it


class Tap:
    """A TCP relay to a port, that keeps what it carried towards it."""

    def __init__(self, port):
        self.target, self.carried, self._stop = port, [], threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._pumps = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stop.set()
        for each in (self._thread, *self._pumps):
            each.join()
        self._listener.close()

    def _accept(self):
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                source, _ = self._listener.accept()
                try:
                    onward = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # the target is not there
                    source.close()
                    continue
                kept = bytearray()
                self.carried.append(kept)
                for pair in ((source, onward, kept), (onward, source, None)):
                    pump = threading.Thread(target=self._pump, args=pair)
                    self._pumps.append(pump)
                    pump.start()

    def _pump(self, source, sink, kept):
        source.settimeout(0.05)
        with contextlib.suppress(OSError):
            while not self._stop.is_set():
                try:
                    data = source.recv(1 << 16)
                except TimeoutError:
                    continue
                if not data:
                    break
                if kept is not None:
                    kept += data
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def find_chat(self):
        """The last chat that it carried, as (header fields, body)."""
        for kept in reversed(self.carried):
            found = re.findall(rb"POST /v1/chat/completions HTTP/1.1\r\n(.*?)\r\n\r\n(\{.*?\})(?=[A-Z]|$)", kept, re.S)
            if found:
                head, body = found[-1]
                return [tuple(line.decode().split(": ", 1)) for line in head.split(b"\r\n")], body
        return None


def test_a_request_reflected_to_its_sender_or_sent_again(tmp_path, model):
    """Two bridges that may use each other; what one sends is caught on the way."""
    source_home, target_home = tmp_path / "source", tmp_path / "target"
    ports = {"source": 0, "target": 0}
    with contextlib.ExitStack() as stack:
        tap = stack.enter_context(Tap(0))

        def start_both(stack):
            alone = ("--offload", "--no-discover-lan", "--port")
            target = stack.enter_context(start_target(target_home, model, *alone, ports["target"]))
            peers = ("--alias", "mine", "--peer", f"http://127.0.0.1:{tap.port}")
            source = stack.enter_context(start_target(source_home, model, *alone, ports["source"], *peers))
            ports["source"], ports["target"] = source.port, target.port
            tap.target = target.port
            return source, target

        with contextlib.ExitStack() as pairing:
            source, target = start_both(pairing)
            for asker, home, asked in ((source, source_home, tap), (target, target_home, source)):
                peer = {"peer": f"http://127.0.0.1:{asked.port}"}
                assert ask_owner(asker, home, "POST", "/v1/dvai/pairings", peer)[0] == 200
        for home, other in ((source_home, target_home), (target_home, source_home)):
            path = home / "data" / "pairings.json"
            document = json.loads(path.read_text())
            (stored,) = document["pairings"]
            assert stored["deviceId"] == read_device_id(other) and stored["inboundKey"] != stored["outboundKey"]
            stored |= {"inboundLink": None, "outboundLink": None}  # as if paired in the legacy way: with signed HTTP
            path.write_text(json.dumps(document))
        source, target = start_both(stack)
        headers = {"X-DVAI-Offload": "require"}

        def ask():
            return source.request("POST", CHAT, HELLO, headers, timeout_s=60)[0] == 200

        wait_for(ask, 60, "the target serves the source")
        fields, body = tap.find_chat()
        assert CANARY.encode() in body and {"x-dvai-signature", "x-dvai-nonce"} <= {each[0].lower() for each in fields}
        kept = [each for each in fields if each[0].lower() not in ("host", "content-type", "content-length")]
        with recovering(source), recovering(target):
            assert send(source.port, "POST", CHAT, body, kept).status == 401
            assert send(target.port, "POST", CHAT, body, kept).status == 401
        assert ask()


# A desktop hub that we use


NODE = shutil.which("node")
STRINGIFY = (
    'let text="";process.stdin.setEncoding("utf8").on("data",t=>text+=t)'
    '.on("end",()=>process.stdout.write(JSON.stringify(JSON.parse(text))))'
)
PLAIN = {"messages": [{"role": "user", "content": 'gr\u00fc\u00df \U0001f600 "q" \\ \n </script>'}], "max_tokens": 5}
ODD = {
    "temperature": 1.0,
    "top_p": 1e-07,
    "presence_penalty": -0.0,
    "seed": 9007199254740993,
    "metadata": {"10": "a", "9": "b", "b": "c", "1.0": "d", "\u2028": "\x7f"},
    "logit_bias": {"100": -100, "7": 1e21, "20": 123456789.5},
}


def stringify_by_node(body):
    return subprocess.run([NODE, "-e", STRINGIFY], input=body, capture_output=True, check=True, timeout=60).stdout


def stringify_plain(body):
    """JSON.stringify(JSON.parse(text)) where there are no odd numbers, keys or surrogates."""
    return json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":")).encode()


class Hub(FakePeer):
    """As existing hubs are: one key by (appId, deviceId), the body written anew before it is hashed, no id of its own.

    It advertises no scores, and its answer to a handshake echoes the requester's id and says nothing of itself.
    """

    def __init__(self, stringify, **options):
        super().__init__(device_id="", **options)
        self.stringify, self.keys, self.verdicts = stringify, {}, []

    def verify(self, handler, body):
        key = self.keys.get((handler.headers["X-DVAI-App-Id"], handler.headers["X-DVAI-Peer-Device-Id"]))
        if key is None:
            return False
        self.key = key
        is_good = super().verify(handler, self.stringify(body) if body else body)
        self.verdicts.append((handler.path, is_good))
        return is_good

    def answer_get(self, handler):
        if handler.path == "/v1/dvai/health":
            handler.answer(200, {"status": "ok", "version": "3.2.1", "uptimeSec": 5, "currentModelId": self.models[0]})
        elif handler.path == "/v1/models":
            handler.answer(200, {"object": "list", "data": [{"id": self.models[0], "object": "model"}]})
        else:
            handler.answer(404, b"Not Found", Content_Type="text/plain")

    def answer_handshake(self, handler, asked):
        device_id = asked["peerDeviceId"]
        self.keys[asked.get("appId", device_id), device_id] = key = encode_base64url(os.urandom(32))
        named = {"via": "lan-handshake", "pairingKey": key, "peerDeviceId": device_id}
        handler.answer(200, {"paired": True, "pairedAt": 1} | named)


@pytest.mark.parametrize(
    ("body", "stringify"),
    [
        pytest.param(PLAIN, stringify_plain, id="plain"),
        pytest.param(
            PLAIN | ODD, stringify_by_node, id="node", marks=pytest.mark.skipif(NODE is None, reason="needs node")
        ),
    ],
)
def test_a_hub_that_writes_bodies_anew(tmp_path, body, stringify):
    home, model = tmp_path / "home", "Llama-3.2-3B-Instruct-Q4_K_M"
    hub = Hub(stringify, script=serve_text("from ", "the hub"), models=(model,))
    flags = ("--offload-only", "--no-discover-lan", "--peer", hub.url, "--legacy-pairing", "allow")
    with start_peer(hub), start_bridge(home, *flags) as bridge:
        status, answer = ask_owner(bridge, home, "POST", "/v1/dvai/pairings", {"peer": hub.url})
        assert status == 200 and answer["pairing"]["deviceId"] == f"{hub.url}/v1", answer
        with recovering(bridge):
            for stream in (False, True):
                asked = body | {"model": model, "stream": stream}
                copied = {"Authorization": "Bearer of-the-client", "Cookie": "a=b", "X-Custom": "c"}
                status, headers, data = bridge.request("POST", CHAT, asked, copied, timeout_s=60)
                assert status == 200, data
                assert headers["X-DVAI-Route"] == "lan"
                text = b"".join(re.findall(rb'"content":"([^"]*)"', data)) if stream else data
                assert b"from the hub" in text, data
                assert data.endswith(b"data: [DONE]\n\n") is stream
        assert [each for each in hub.verdicts if each[0] == CHAT] == [(CHAT, True)] * 2
        for fields in hub.headers:
            assert not {"authorization", "cookie", "x-custom"} & {name.lower() for name in fields}
        (stored,) = json.loads((home / "data" / "pairings.json").read_text())["pairings"]
        assert stored["outboundKey"] == hub.key and stored["inboundKey"] is None
    assert not find_secrets([hub.key, read_token(home)], bridges=[bridge], homes=[home])
