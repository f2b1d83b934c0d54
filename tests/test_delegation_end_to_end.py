"""Real processes that know each other by public key: asked, refused, killed, cut off; directly and through a relay."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import threading

import pytest
from support import CLEAN_ENVIRON, PROGRAM, find_free_port, require, start_bridge, wait_for
from support_bridges import CHAT, HELLO, Stream, Wire, ask, count_running, list_peers
from support_peer import find_secrets, pair_with, recovering, send
from support_relay import start_relay
from support_tunnel import make_identity
from support_worker import build_byte_model

import dvai_bridge as d

pytest.importorskip("resource", reason="stops processes with signals")

CANARY = "canary-93b7"
LARGE = CANARY * 20_000  # in a request, that is not to be overlooked in the number of bytes
REFUSAL_LIMIT_BYTES = 20_000  # what is said by a device that says nothing of a request
AT_ONCE_S = d.PROVIDER_PATIENCE_S  # for an answer that waits for nothing: any wait for a provider takes longer


def build_key(name):
    """The public key of the device that has the seed of this name."""
    return d.encode_base64url(d.build_static_key(make_identity(name), d.OwnBackend()).public)


class Bridges:
    """Bridges of a test, each with a home and a seed of its own, which stay when one ends."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        self.model = folder / "strong.gguf"
        self.model.write_bytes(build_byte_model())

    def start_provider(self, name="strong", *arguments, **options):
        flags = ("--model", self.model, "--engine", "builtin", "--host", "127.0.0.1", "--device-name", name)
        flags += ("--port", find_free_port())  # where it may come back
        bridge = self.start(name, *flags, *arguments, command="provider", **options)
        wait_for(lambda: any(line.startswith("    this key ") for line in bridge.lines), 30, "it says who it is")
        return bridge

    def start_consumer(self, *arguments, name="weak", at=(), **options):
        """`at`: ports where its providers may be."""
        peers = [flag for port in at for flag in ("--peer", f"http://127.0.0.1:{port}")]
        return self.start(name, "--no-discover-lan", *peers, *arguments, **options)

    def start(self, name, *arguments, **options):
        environ = {"DVAI_SEED": make_identity(name).seed}
        return self.stack.enter_context(start_bridge(self.home(name), *arguments, environ=environ, **options))

    def home(self, name):
        return self.folder / name

    def run(self, name, *words):
        return run_command(*words, "--home", self.home(name))


def run_command(*words, **environ):
    command = [*PROGRAM, *map(str, words)]
    return subprocess.run(command, env=CLEAN_ENVIRON | environ, capture_output=True, text=True, timeout=60)


@pytest.fixture
def bridges(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Bridges(tmp_path, stack)


def kill(bridge):
    os.kill(bridge.process.pid, signal.SIGKILL)
    bridge.process.wait()


def ask_long(bridge):
    return ask(bridge, user=LARGE)


def is_served(bridge):
    return ask(bridge)[0] == 200


def is_ready(bridge, key):
    return [each["state"] for each in list_peers(bridge) if each["publicKey"] == key] == ["ready"]


def read_provider(bridges, name):
    """What `provider` says of the one that runs."""
    shown = bridges.run(name, "provider")
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


# One consumer, one provider, and everything between them


class Couple:
    """A provider that admits a consumer, on a wire that keeps every byte."""

    def __init__(self, bridges):
        self.bridges = bridges
        self.key, self.consumer_key = build_key("strong"), build_key("weak")
        self.strong = bridges.start_provider("strong", "--allow", self.consumer_key)
        self.wire = bridges.stack.enter_context(Wire(self.strong.port))
        self.weak = bridges.start_consumer("--delegate", self.key, at=[self.wire.port])


@pytest.fixture(scope="module")
def couple(tmp_path_factory):
    with contextlib.ExitStack() as stack:
        yield Couple(Bridges(tmp_path_factory.mktemp("couple"), stack))


def test_chats_completions_and_embeddings_come_from_the_provider(couple):
    direct = ask(couple.strong)[2]["choices"][0]["message"]["content"]
    status, fields, answer = ask(couple.weak)
    assert (status, answer["choices"][0]["message"]["content"]) == (200, direct)
    assert fields["X-DVAI-Served-By"] == couple.key and fields["X-DVAI-Reason"] == "delegated"
    assert (fields["X-DVAI-Route"], fields["X-DVAI-Transport"]) == ("lan", "tunnel")
    status, fields, data = couple.weak.request("POST", CHAT, HELLO | {"stream": True}, timeout_s=60)
    events = [line[6:] for line in data.decode().split("\n\n") if line.startswith("data: ")]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert status == 200 and events[-1] == "[DONE]" and fields["X-DVAI-Transport"] == "tunnel"
    assert "".join(delta.get("content") or "" for delta in deltas) == direct
    for path, body in (
        ("completions", {"model": "strong", "prompt": "Hi", "max_tokens": 4, "temperature": 0}),
        ("embeddings", {"model": "strong", "input": ["a", "b"]}),
    ):
        status, fields, data = couple.weak.request("POST", f"/v1/{path}", body, timeout_s=60)
        assert status == 200 and fields["X-DVAI-Served-By"] == couple.key, data
        expected = json.loads(couple.strong.request("POST", f"/v1/{path}", body)[2])
        found = json.loads(data)
        assert [each.get("embedding", each.get("text")) for each in found.get("data", found.get("choices"))] == [
            each.get("embedding", each.get("text")) for each in expected.get("data", expected.get("choices"))
        ]
    (listed,) = json.loads(couple.weak.request("GET", "/v1/models")[2])["data"]
    assert (listed["id"], listed["owned_by"]) == ("strong", "strong")


def test_neither_prompt_nor_answer_is_readable_on_the_wire(couple):
    status, _, answer = ask(couple.weak, messages=[{"role": "user", "content": CANARY}], max_tokens=60)
    text = answer["choices"][0]["message"]["content"]
    assert status == 200 and len(text) > 20
    before = couple.wire.count_sent()
    assert before > 0 and not any(map(couple.wire.has, (CANARY, text, json.dumps(text)[1:-1], "chat.completion")))
    homes = [couple.bridges.home(name) for name in ("strong", "weak")]
    seeds = [make_identity(name).seed for name in ("strong", "weak")]
    assert not find_secrets([CANARY, *seeds], bridges=(couple.strong, couple.weak), homes=homes)
    # that it would be seen: the same, said readably
    send(couple.wire.port, "GET", f"/{CANARY}")
    assert couple.wire.has(CANARY)


def test_the_audits_of_both_name_the_key_of_the_other(couple):
    status, fields, _ = ask(couple.weak)
    request_id = fields["X-Request-Id"]
    assert status == 200

    def find_entry(name):
        entries = json.loads(couple.bridges.run(name, "audit", "--json").stdout)
        return next((each for each in entries if each["requestId"] == request_id), None)

    entry = wait_for(lambda: find_entry("strong"), 30, "the provider's audit")
    assert (entry["caller"], entry["deviceId"], entry["outcome"]) == ("peer", couple.consumer_key, "ok")
    assert entry["route"] == "local" and entry["completionTokens"] > 0
    entry = wait_for(lambda: find_entry("weak"), 30, "the consumer's audit")
    assert (entry["caller"], entry["route"], entry["servedBy"]) == ("local", "lan", couple.key)
    assert entry["completionTokens"] > 0


def test_what_both_say_of_each_other(couple):
    wait_for(lambda: is_ready(couple.weak, couple.key), 30, "the provider is known")
    (peer,) = list_peers(couple.weak)
    assert (peer["deviceName"], peer["transport"], peer["models"]) == ("strong", "tunnel", ["strong"])
    shown = couple.bridges.run("weak", "peers").stdout
    assert couple.key in shown and "ready" in shown and "tunnel" in shown
    assert f"provider {couple.key[:8]}… answers at http://127.0.0.1:{couple.wire.port}/v1: strong, serving strong" in (
        couple.weak.lines
    )
    lines = "\n".join(couple.strong.lines)
    assert f"provider key: {couple.key}" in lines and f"serve --delegate {couple.key}\n" in lines
    assert "admitted: 1 public key" in lines and "this key comes from DVAI_SEED" in lines
    said = read_provider(couple.bridges, "strong")
    assert f"provider key: {couple.key}" in said and f"{couple.consumer_key} is connected" in said


def test_a_request_may_be_kept_from_the_provider(couple):
    for changes, headers in (({"delegate": False}, None), ({}, {"X-DVAI-Offload": "never"})):
        status, _, answer = ask(couple.weak, headers, **changes)
        assert status == 503 and answer["error"]["type"] == "no_local_backend", answer


def test_a_model_that_the_provider_lacks(couple):
    status, _, answer = ask(couple.weak, model="another")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_what_is_wrong_with_a_request_is_said_as_by_a_bridge_alone(couple):
    status, _, answer = ask(couple.weak, messages="Hi")
    assert status == 400 and "messages" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("delegate", "word"),
    [
        ("short", "32 bytes"),
        ("A" * 43, "public key"),
        ("0" * 64, "public key"),
        (True, "providerPublicKey"),
        ([], "providerPublicKey"),
        ({}, "providerPublicKey"),
        ({"providerPublicKey": build_key("strong"), "timeout": "60"}, "timeout"),
        ({"providerPublicKey": build_key("strong"), "timeout": -1}, "timeout"),
        ({"providerPublicKey": build_key("strong"), "fallbackToLocal": 1}, "fallbackToLocal"),
        ({"providerPublicKey": build_key("strong"), "colour": "red"}, "colour"),
        (build_key("weak"), "this device itself"),
    ],
)
def test_a_delegate_that_is_none(couple, delegate, word):
    status, _, answer = ask(couple.weak, delegate=delegate)
    assert (status, answer["error"]["param"]) == (400, "delegate") and word in answer["error"]["message"], answer


def ask_in_tunnel(port, key, identity, body):
    """(status, body) of what a device asks in a tunnel of its own, word for word."""

    async def run():
        async def dial(public_key, limit_s):
            raise AssertionError("nobody is at a relay")

        static = d.build_static_key(identity, d.choose_crypto_backend())
        client = d.ProviderClient(lambda: static, dial_relay=dial, on_refused=lambda public_key: None)
        url = d.parse_http_url(f"http://127.0.0.1:{port}{CHAT}")
        fields = [("Content-Type", "application/json")]
        bond = d.ProviderBond(d.parse_public_key(key))
        try:
            async with client.request(bond, "POST", url, headers=fields, body=d.encode_json(body)) as answer:
                return answer.status, json.loads(await answer.read(1 << 20))
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_guest_does_not_choose_who_answers(couple):
    strong = couple.strong
    for delegate in (build_key("another"), False):
        asked = (strong.port, couple.key, make_identity("weak"), HELLO | {"delegate": delegate})
        status, answer = ask_in_tunnel(*asked)
        assert (status, answer["error"]["param"]) == (400, "delegate"), answer
    assert ask_in_tunnel(strong.port, couple.key, make_identity("weak"), HELLO)[0] == 200


def test_a_paired_guest_does_not_choose_who_answers(bridges):
    flags = ("--pairing", "allow", "--legacy-pairing", "allow", "--lan")
    strong = bridges.start_provider("strong", *flags)
    caller = pair_with(strong.port, "a-phone", "an.app")
    for delegate, expected in ((build_key("another"), 400), (None, 200)):
        answer = caller.ask(strong.port, "POST", CHAT, json.dumps(HELLO | {"delegate": delegate}).encode())
        assert answer.status == expected, answer.body


# The key of an installation


def test_identity_gives_the_key_by_which_a_provider_runs(bridges, tmp_path):
    def read_identity(*words, **environ):
        shown = run_command("identity", "--json", *words, **environ)
        assert shown.returncode == 0, shown.stderr
        return json.loads(shown.stdout)

    home = tmp_path / "stored"
    stored = read_identity("--home", home)
    assert stored == read_identity("--home", home) and stored["source"].endswith("identity.json")
    said = run_command("identity", "--home", home).stdout
    assert stored["publicKey"] in said and "identity.json" in said and f"--allow {stored['publicKey']}" in said
    with start_bridge(home, "--host", "127.0.0.1", command="provider", ready=False) as provider:
        wait_for(lambda: f"provider key: {stored['publicKey']}" in provider.lines, 60, "its key")
        assert "nobody" in "\n".join(provider.lines) and "provider --allow KEY" in "\n".join(provider.lines)
    seed = make_identity("strong").seed
    path = tmp_path / "seed"
    path.write_text(d.parse_base64url(seed).hex() + "\n")
    path.chmod(0o600)
    for given in (read_identity("--home", home, DVAI_SEED=seed), read_identity("--home", home, "--seed-file", path)):
        assert (given["publicKey"], given["source"]) == (build_key("strong"), "seed")
    assert given["address"] == d.encode_base64url(d.build_provider_address(d.parse_public_key(build_key("strong"))))
    assert seed not in run_command("identity", "--home", home, "--seed-file", path).stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("provider", "--allow", "A" * 43), "--allow"),
        (("provider", "--open", "--deny", "short"), "--deny"),
        (("provider", "--deny", build_key("weak")), "--open"),
        (("serve", "--allow", build_key("weak")), "--provide"),
        (("serve", "--delegate", "short"), "--delegate"),
        (("serve", "--delegate", build_key("weak")), "this device itself"),
        (("provider", "--seed-file", "/nowhere/seed"), "/nowhere/seed"),
    ],
)
def test_what_cannot_be_meant_is_said_in_one_line(tmp_path, words, said):
    environ = {} if "--seed-file" in words else {"DVAI_SEED": make_identity("weak").seed}
    done = run_command(*words, "--home", tmp_path / "home", "--port", "0", "--host", "127.0.0.1", **environ)
    lines = [line for line in done.stderr.splitlines() if "not constant-time" not in line]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert not (tmp_path / "home" / "data" / "firewall.json").exists()


def test_a_key_may_begin_with_a_dash(bridges):
    key = next(each for each in map(build_key, map(str, range(1000))) if each.startswith("-"))
    strong = bridges.start_provider("strong", "--open", "--deny", key)
    assert json.loads((bridges.home("strong") / "data" / "firewall.json").read_bytes())["publicKeys"] == [key]
    weak = bridges.start_consumer("--delegate", key, "--delegate-timeout", "0.1", at=[strong.port])
    assert ask(weak)[0] == 503


# The firewall


def test_a_consumer_that_is_not_admitted_knows_at_once_and_says_nothing(bridges):
    strong = bridges.start_provider("strong", "--allow", build_key("weak"))
    with Wire(strong.port) as wire:
        other = bridges.start_consumer("--delegate", build_key("strong"), at=[wire.port], name="other")
        status, fields, data = other.request("POST", CHAT, HELLO | {"user": LARGE}, timeout_s=AT_ONCE_S)
        error = json.loads(data)["error"]
        assert (status, error["code"], fields["X-Should-Retry"]) == (503, "provider_refused", "false")
        assert f"provider --allow {build_key('other')}" in error["message"] and "Retry-After" not in fields
        assert sum(f"provider --allow {build_key('other')}" in line for line in other.log) == 1, "said once"
        assert "does not admit" in next(line for line in other.lines if line.startswith("provider "))
        assert 0 < wire.count_sent() < REFUSAL_LIMIT_BYTES
        said = read_provider(bridges, "strong")
        assert "admits 1 public key" in said and "is connected" not in said
        # somebody lets it in, while both run
        changed = bridges.run("strong", "provider", "--allow", build_key("weak"), "--allow", build_key("other"))
        assert changed.returncode == 0 and "now admits 2 public keys" in changed.stdout, changed.stderr
        status, _, data = ask_long(other)
        assert status == 200 and wire.count_sent() > len(LARGE), data  # that a prompt is seen by its size
        assert f"{build_key('other')} is connected" in read_provider(bridges, "strong")


def test_an_edited_firewall_ends_the_streams_of_whom_it_does_not_admit(bridges):
    strong = bridges.start_provider("strong", "--allow", build_key("weak"), "--allow", build_key("other"))
    flags = ("--delegate", build_key("strong"))
    weak, other = (bridges.start_consumer(*flags, at=[strong.port], name=name) for name in ("weak", "other"))
    path = bridges.home("strong") / "data" / "firewall.json"
    kept = json.loads(path.read_bytes())
    assert (kept["mode"], set(kept["publicKeys"])) == ("allow", {build_key("weak"), build_key("other")})
    with recovering(strong), Stream(weak) as denied, Stream(other) as admitted:
        path.write_text('{"mode": "allow", "publicKeys": [')  # as an editor leaves it for a moment, or for good
        wait_for(lambda: any("firewall.json is no firewall" in line for line in strong.log), 30, "it says so")
        assert admitted.answer.readline() and denied.answer.readline()
        path.write_text(json.dumps(kept | {"publicKeys": ["no key"]}))
        wait_for(lambda: sum("is no firewall" in line for line in strong.log) == 2, 30, "it says so")
        assert denied.answer.readline() and "2 public keys" in read_provider(bridges, "strong")
        path.write_text(json.dumps(kept | {"publicKeys": [build_key("other")]}))
        denied.check_torn()
        assert admitted.answer.readline() and count_running(strong) == 1
        status, _, answer = ask(weak)
        assert (status, answer["error"]["code"]) == (503, "provider_refused")
    assert is_served(other)
    path.write_text(json.dumps({"mode": "deny", "publicKeys": [build_key("other")]}))
    wait_for(lambda: "but 1 public key" in read_provider(bridges, "strong"), 30, "the other way round")
    assert is_served(weak) and ask(other)[2]["error"]["code"] == "provider_refused"


def test_open_to_all_but_some_and_so_again_after_a_restart(bridges):
    key = build_key("strong")
    strong = bridges.start_provider("strong", "--open", "--deny", build_key("other"))
    assert any("everybody who knows the provider's key, but 1 public key" in line for line in strong.lines)
    weak = bridges.start_consumer("--delegate", key, at=[strong.port])
    other = bridges.start_consumer("--delegate", key, at=[strong.port], name="other")
    for _ in range(2):
        assert is_served(weak)
        assert ask(other)[2]["error"]["code"] == "provider_refused"
        strong.process.terminate()
        assert strong.process.wait(30) == 0
        strong = bridges.start_provider("strong", "--port", strong.port)  # what was said once is kept


# Somebody else answers there


def test_a_wrong_key_never_sees_a_byte_of_the_prompt(bridges):
    """At the address stands a provider, open to everybody, with another key; and a bridge that is no provider."""
    wrong = bridges.start_provider("wrong", "--open")
    none = bridges.start("none", "--model", bridges.model, "--engine", "builtin")
    seen = []
    for name, target in (("weak", wrong), ("other", none)):
        with Wire(target.port) as wire:
            weak = bridges.start_consumer(
                "--delegate", build_key("strong"), "--delegate-timeout", "2", at=[wire.port], name=name
            )
            status, fields, answer = ask_long(weak)
            assert (status, answer["error"]["code"]) == (503, "provider_unreachable"), answer
            assert int(fields["Retry-After"]) > 0 and fields.get("X-Should-Retry") != "false"
            (checked,) = answer["error"]["checked"]
            assert (
                checked["publicKey"] == build_key("strong") and "no provider with this public key" in checked["reason"]
            )
            assert 0 < wire.count_sent() < REFUSAL_LIMIT_BYTES * 2 and not wire.has(CANARY)
            seen.append(max(map(len, wire.received)))
            # the right one at that place is used by the very next request
            if target is wrong:
                wire.target_port = bridges.start_provider("strong", "--open").port
                wait_for(lambda weak=weak: ask_long(weak)[0] == 200, 30, "the right one is found")
                assert wire.count_sent() > len(LARGE) and not wire.has(CANARY)
    assert seen[0] == seen[1], "whether a bridge is a provider is nobody's business who does not know its key"


# Those that die and come again


def test_a_provider_that_was_killed_is_used_again_by_the_next_request(bridges):
    strong = bridges.start_provider("strong", "--allow", build_key("weak"))
    weak = bridges.start_consumer("--delegate", build_key("strong"), at=[strong.port])
    with Stream(weak) as stream:
        kill(strong)
        stream.check_torn()
    status, fields, answer = ask(weak)
    assert (status, answer["error"]["code"], fields["Retry-After"]) == (503, "provider_unreachable", "5")
    again = bridges.start_provider("strong", "--port", strong.port)
    status, fields, answer = ask(weak)
    assert status == 200 and fields["X-DVAI-Served-By"] == build_key("strong"), answer
    kill(again)
    bridges.start_provider("strong", "--port", strong.port)  # nobody has asked in between
    assert is_served(weak)


def test_a_stop_lets_the_streams_of_consumers_finish(bridges):
    strong = bridges.start_provider("strong", "--allow", build_key("weak"))
    weak = bridges.start_consumer("--delegate", build_key("strong"), at=[strong.port])
    ends = []

    def ask_short():
        body = HELLO | {"stream": True, "max_tokens": 60, "logit_bias": {"2": -100}}
        status, _, data = weak.request("POST", CHAT, body, timeout_s=60)
        ends.append((status, data.rstrip().endswith(b"data: [DONE]")))

    asking = threading.Thread(target=ask_short)
    asking.start()
    wait_for(lambda: count_running(strong) == 1 or ends, 30, "the stream runs")
    strong.process.terminate()
    asking.join(60)
    assert strong.process.wait(30) == 0 and ends == [(200, True)]


def test_the_next_provider_answers_where_the_first_cannot(bridges):
    first, second = (bridges.start_provider(name, "--allow", build_key("weak")) for name in ("first", "second"))
    flags = [flag for name in ("first", "second") for flag in ("--delegate", build_key(name))]
    weak = bridges.start_consumer(*flags, at=[first.port, second.port])

    def get_server():
        status, fields, answer = ask(weak)
        assert status == 200, answer
        return fields["X-DVAI-Served-By"]

    assert get_server() == build_key("first")
    kill(first)
    assert get_server() == build_key("second")
    bridges.start_provider("first", "--port", first.port)
    wait_for(lambda: get_server() == build_key("first"), 60, "the first is asked first again")
    changed = bridges.run("first", "provider", "--allow", build_key("other"))
    assert changed.returncode == 0
    assert get_server() == build_key("second"), "refused by one, served by the other"


def test_what_no_provider_answers_is_answered_here(bridges):
    strong = bridges.start_provider("strong", "--allow", build_key("weak"))
    local = ("--fallback-to-local", "--model", bridges.model, "--engine", "builtin")
    weak = bridges.start_consumer("--delegate", build_key("strong"), *local, at=[strong.port])
    # a model of this device's own is its own business, unless the request names the provider
    assert ask(weak)[1]["X-DVAI-Served-By"] != build_key("strong")
    delegate = {"providerPublicKey": build_key("strong"), "timeout": 30_000, "fallbackToLocal": True}
    assert ask(weak, delegate=delegate)[1]["X-DVAI-Served-By"] == build_key("strong")
    kill(strong)
    for fresh in (False, True):
        status, fields, answer = ask(weak, delegate=delegate | {"forceNewConnection": fresh})
        assert status == 200 and answer["usage"]["completion_tokens"] > 0
        assert (fields["X-DVAI-Route"], fields["X-DVAI-Reason"]) == ("local", "no provider answered")
    status, _, answer = ask(weak, delegate=delegate | {"fallbackToLocal": False})
    assert (status, answer["error"]["code"]) == (503, "provider_unreachable")
    bridges.start_provider("strong", "--port", strong.port)
    assert ask(weak, delegate=delegate)[1]["X-DVAI-Served-By"] == build_key("strong")


def test_a_provider_that_hangs_costs_no_more_than_the_timeout(bridges):
    strong = bridges.start_provider("strong", "--allow", build_key("weak"))
    local = ("--fallback-to-local", "--delegate-timeout", "2", "--model", "builtin")
    weak = bridges.start_consumer("--delegate", build_key("strong"), *local, at=[strong.port])
    assert is_served(weak)
    os.kill(strong.process.pid, signal.SIGSTOP)
    try:
        body = HELLO | {"model": None}
        status, fields, data = weak.request(
            "POST", CHAT, {name: value for name, value in body.items() if value is not None}, timeout_s=20
        )
        assert status == 200 and fields["X-DVAI-Route"] == "local", data
    finally:
        os.kill(strong.process.pid, signal.SIGCONT)
    wait_for(lambda: ask(weak)[1].get("X-DVAI-Served-By") == build_key("strong"), 60, "it is used again")


def test_the_official_client_chooses_a_provider_for_one_request(bridges):
    openai = require("openai")
    strong = bridges.start_provider("strong", "--allow", build_key("weak"))
    weak = bridges.start_consumer("--model", bridges.model, "--engine", "builtin", at=[strong.port])
    key = build_key("strong")
    forms = [key, d.parse_public_key(key).hex(), [key], {"providerPublicKey": key, "timeout": 30_000}]
    forms.append({"providerPublicKey": key, "forceNewConnection": True})
    asked = {"model": "strong", "messages": HELLO["messages"], "max_tokens": 8, "temperature": 0}
    with openai.OpenAI(base_url=weak.base_url, api_key="ignored", max_retries=0, timeout=60) as client:
        create = client.chat.completions.with_raw_response.create
        plain = create(**asked)
        assert plain.headers["X-DVAI-Route"] == "local"
        for form in forms:
            answer = create(**asked, extra_body={"delegate": form})
            assert answer.headers["X-DVAI-Served-By"] == key
            assert answer.parse().choices[0].message.content == plain.parse().choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True, extra_body={"delegate": key})
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert text == plain.parse().choices[0].message.content
        with pytest.raises(openai.InternalServerError) as refused:
            create(**asked, extra_body={"delegate": {"providerPublicKey": build_key("nobody"), "timeout": 300}})
        assert refused.value.code == "provider_unreachable"


# Through a relay


UNLIMITED = {"SESSIONS_PER_ADDRESS_PER_MINUTE": "0", "SESSIONS_PER_ADDRESS": "0"}


def run_relay(port, url=None):
    return start_relay(port=port, **UNLIMITED, RENDEZVOUS_URL=f"ws://127.0.0.1:{port}" if url is None else url)


def build_relay_flags(port):
    return ("--rendezvous-url", f"ws://127.0.0.1:{port}")


def check_relayed(bridge, route="relay"):
    """One request, which is answered at once."""
    status, fields, answer = ask(bridge)
    assert status == 200 and fields["X-DVAI-Served-By"] == build_key("strong"), answer
    assert (fields["X-DVAI-Route"], fields["X-DVAI-Transport"]) == (route, "tunnel")


def test_found_at_a_relay_and_again_after_each_of_the_three_was_killed(bridges):
    port = find_free_port()
    flags = build_relay_flags(port)
    with contextlib.ExitStack() as relays:
        wire = relays.enter_context(Wire(port))  # between the relay and the consumer
        relay = relays.enter_context(run_relay(port, f"ws://127.0.0.1:{port}"))
        strong = bridges.start_provider("strong", "--allow", build_key("weak"), *flags)
        assert any(f"--rendezvous-url ws://127.0.0.1:{port}" in line for line in strong.lines)
        weak = bridges.start_consumer("--delegate", build_key("strong"), *build_relay_flags(wire.port))
        check_relayed(weak)
        (peer,) = list_peers(weak)
        assert (peer["via"], peer["route"], peer["publicKey"]) == ("rendezvous", "relay", build_key("strong"))
        assert any(line.endswith("answers through the relay: strong, serving strong") for line in weak.lines)

        kill(strong)
        assert ask(weak)[2]["error"]["code"] == "provider_unreachable"
        bridges.start_provider("strong", *flags)
        check_relayed(weak)

        relay.process.kill()
        relay.process.wait()
        assert ask(weak)[2]["error"]["code"] == "provider_unreachable"
        relays.enter_context(run_relay(port, f"ws://127.0.0.1:{port}"))
        wait_for(lambda: is_served(weak), 60, "all three are in touch again")
        check_relayed(weak)

        kill(weak)
        weak = bridges.start_consumer("--delegate", build_key("strong"), *build_relay_flags(wire.port), ready=False)
        check_relayed(weak)

        other = bridges.start_consumer("--delegate", build_key("strong"), *flags, name="other")
        data = other.request("POST", CHAT, HELLO, timeout_s=AT_ONCE_S)[2]
        assert json.loads(data)["error"]["code"] == "provider_refused"
        assert ask(weak, messages=[{"role": "user", "content": CANARY}])[0] == 200 and not wire.has(CANARY)
        assert wire.has("dvai-relay.2")


@pytest.mark.parametrize(
    ("url", "said"), [("", "its operator has to set RENDEZVOUS_URL"), ("wss://other.example", "is its RENDEZVOUS_URL")]
)
def test_a_relay_at_which_nobody_is_found_by_key(bridges, url, said):
    port = find_free_port()
    with run_relay(port, url):
        strong = bridges.start_provider("strong", "--open", *build_relay_flags(port), ready=False)
        wait_for(lambda: any(said in line for line in strong.log), 30, "the provider says what is wrong")
        weak = bridges.start_consumer(
            "--delegate", build_key("strong"), "--delegate-timeout", "1", *build_relay_flags(port), ready=False
        )
        status, _, answer = ask(weak)
        assert (status, answer["error"]["code"]) == (503, "provider_unreachable"), answer


def test_two_copies_of_one_provider(bridges, tmp_path):
    """The younger is the provider; the older says so, and does not take it back."""
    port = find_free_port()
    with run_relay(port):
        first = bridges.start_provider("strong", "--open", *build_relay_flags(port))
        weak = bridges.start_consumer("--delegate", build_key("strong"), *build_relay_flags(port))
        check_relayed(weak)
        environ = {"DVAI_SEED": make_identity("strong").seed}
        flags = ("--model", bridges.model, "--engine", "builtin", "--host", "127.0.0.1", "--open")
        with start_bridge(
            tmp_path / "copy", *flags, *build_relay_flags(port), command="provider", environ=environ
        ) as second:
            said = "another copy of this device listens"
            wait_for(lambda: any(said in line for line in first.log), 30, "the older one says so")
            kill(first)
            wait_for(lambda: is_served(weak), 30, "the younger one answers")
            check_relayed(weak)
            assert not any(said in line for line in second.log)


def test_the_relay_takes_over_within_the_request_when_the_direct_way_is_gone(bridges):
    port = find_free_port()
    with run_relay(port):
        strong = bridges.start_provider("strong", "--allow", build_key("weak"), *build_relay_flags(port))
        with Wire(strong.port) as wire:
            weak = bridges.start_consumer("--delegate", build_key("strong"), *build_relay_flags(port), at=[wire.port])
            check_relayed(weak, "lan")
            with Stream(weak) as stream:
                wire.cut()
                stream.check_torn()
            check_relayed(weak)
            check_relayed(weak)
            wire.mend()
            wait_for(lambda: ask(weak)[1]["X-DVAI-Route"] == "lan", 120, "the direct way is taken again")
