"""Delegation on networks of a test's own: found by the key alone, on the network or at a relay, and found again.

Needs root and iproute2. Everything stands in network namespaces of its own.
"""

import contextlib
import json
import os
import subprocess
import sys

import pytest
from support import require, wait_for
from support_lan import ADDRESS, Lan, Machine
from support_relay import CLEAN_ENVIRON, RELAY
from support_tunnel import make_identity
from support_worker import build_byte_model
from test_tunnel_namespaces import TAP, list_spellings, read_flows, read_port, run_program

import dvai_bridge as d

if os.environ.get("DVAI_TEST_ALL") != "1":
    pytest.skip("needs network namespaces (make test-all)", allow_module_level=True)

CANARY = "canary-e80a the quick brown fox"
CHAT = {
    "model": "strong",
    "messages": [{"role": "user", "content": CANARY}],
    "max_tokens": 40,
    "temperature": 0,
    "logit_bias": {"2": -100},
}
RELAY_PORT = 4100


def read_key(machine):
    """The public key by which others know this machine; made, if there was none."""
    shown = machine.run("identity", "--json")
    assert shown.returncode == 0, shown.stderr
    return json.loads(shown.stdout)["publicKey"]


class Network:
    """A provider in namespace `one`, a consumer in `two`, and perhaps a relay in `three`."""

    def __init__(self, folder):
        self.folder = folder
        self.lan = Lan("one", "two", "three")
        self.strong, self.weak = (Machine(self.lan, short, folder / short) for short in ("one", "two"))
        self.model = folder / "strong.gguf"
        self.model.write_bytes(build_byte_model())

    @contextlib.contextmanager
    def run(self):
        try:
            self.lan.create()
            yield self
            self.strong.close()
            self.weak.close()
        finally:
            for machine in (self.strong, self.weak):
                if machine.process is not None:
                    machine.process.kill()
            self.lan.delete()

    def connect_all(self):
        for short in ("one", "two"):
            self.lan.connect(short)

    def start_provider(self, *arguments):
        key = read_key(self.weak)
        flags = ("--model", self.model, "--engine", "builtin", "--provide", "--allow", key)
        self.strong.start(*flags, *arguments)
        return read_key(self.strong)

    @contextlib.contextmanager
    def run_relay(self, *reaching):
        """A relay in `three`, to which each of `reaching` has a cable of its own; gives the flag that names it."""
        for number, short in enumerate(reaching, start=1):
            host = f"10.78.{number}.1"
            self.lan.ip(
                short,
                "link",
                "add",
                "wan",
                "type",
                "veth",
                "peer",
                "name",
                f"to-{short}",
                "netns",
                self.lan.names["three"],
            )
            self.lan.ip(short, "addr", "add", f"10.78.{number}.2/24", "dev", "wan")
            self.lan.ip(short, "link", "set", "wan", "up")
            self.lan.ip("three", "addr", "add", f"{host}/24", "dev", f"to-{short}")
            self.lan.ip("three", "link", "set", f"to-{short}", "up")
            self.lan.ip("three", "addr", "replace", "10.79.0.1/32", "dev", f"to-{short}")
            self.lan.ip(short, "route", "add", "10.79.0.1/32", "via", host)
        url = f"ws://10.79.0.1:{RELAY_PORT}"
        command = [sys.executable, str(RELAY), "--host", "10.79.0.1", "--port", str(RELAY_PORT)]
        environ = CLEAN_ENVIRON | {"RENDEZVOUS_URL": url}
        with subprocess.Popen(
            self.lan.exec("three", *command), env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            try:
                assert process.stdout.readline().startswith("listening on ")
                yield ("--rendezvous-url", url)
            finally:
                process.terminate()


@pytest.fixture
def network(tmp_path):
    with Network(tmp_path).run() as found:
        yield found


def read_peer(machine):
    (peer,) = json.loads(machine.run("peers", "--json").stdout)
    return peer


@pytest.mark.parametrize(("strong_mdns", "weak_mdns"), [("own", "own"), ("zeroconf", "own"), ("own", "zeroconf")])
def test_found_by_the_key_alone(network, tmp_path, strong_mdns, weak_mdns):
    """And a capture of everything shows neither what is asked nor what is answered, nor a secret."""
    if "zeroconf" in (strong_mdns, weak_mdns):
        require("zeroconf")
    network.connect_all()
    strong, weak, lan = network.strong, network.weak, network.lan
    capture = tmp_path / "capture"
    with run_program(lan.exec("switch", sys.executable, "-c", TAP, "one-lan", str(capture))):
        key = network.start_provider("--mdns", strong_mdns)
        weak.start("--delegate", key, "--mdns", weak_mdns)
        status, text = weak.ask(CHAT)  # the first request finds it, if nothing has yet
        assert status == 200, text
        answer = json.loads(text)["choices"][0]["message"]["content"]
        status, text = weak.ask(CHAT | {"stream": True})
        assert status == 200 and text.rstrip().endswith("data: [DONE]")
        peer = read_peer(weak)
        assert (peer["via"], peer["route"], peer["publicKey"], peer["transport"]) == ("mdns", "lan", key, "tunnel")
        assert ADDRESS["one"] in peer["baseUrl"]

        def find_all(mark):
            frames, said = read_flows(capture)
            return (frames, said) if mark in said else None

        frames, said = wait_for(lambda: find_all(b"dvai-noise.1"), 30, "the capture has the tunnel")
        address = d.encode_base64url(d.build_provider_address(d.parse_public_key(key)))
        assert f"addr={address}".encode() in frames, "it is announced by its address"
        secrets = [each for machine in (strong, weak) for each in list_own_secrets(machine)]
        words = [CANARY.encode(), answer.encode()[:24], json.dumps(answer).encode()[1:25], b"chat.completion"]
        marks = [*words, *(each for secret in secrets for each in list_spellings(secret))]
        assert len(answer) >= 24 and len(marks) == len(words) + 4 * 5
        assert not [each for each in marks if each in frames or each in said]
        # nor the key of the provider, which is what lets others in where it is open
        assert not [each for each in list_spellings(d.parse_public_key(key)) if each in frames or each in said]
        # that it would be seen: the same prompt, said readably by a stranger
        url = f"http://{ADDRESS['one']}:{read_port(strong)}/v1/chat/completions"
        command = ["curl", "-sS", "-m", "30", url, "-H", "Content-Type: application/json", "-d", json.dumps(CHAT)]
        subprocess.run(lan.exec("two", *command), capture_output=True, timeout=60, check=True)
        wait_for(lambda: find_all(CANARY.encode()), 30, "the capture sees what is readable")


def list_own_secrets(machine):
    kept = json.loads((machine.home / "data" / "identity.json").read_text())
    identity = d.Identity(device_id=kept["deviceId"], device_name=kept["deviceName"], seed=kept["seed"])
    return [d.parse_base64url(kept["seed"]), d.build_static_key(identity, d.OwnBackend()).private]


def test_another_key_finds_nobody_where_a_provider_is(network):
    network.connect_all()
    key = network.start_provider()
    another = d.encode_base64url(d.build_static_key(make_identity("another"), d.OwnBackend()).public)
    network.weak.start("--delegate", another, "--delegate-timeout", "5")
    status, text = network.weak.ask(CHAT)
    assert (status, json.loads(text)["error"]["code"]) == (503, "provider_unreachable")
    status, text = network.weak.ask(CHAT | {"delegate": key})
    assert status == 200, text


def test_two_networks_that_share_a_relay_only(network):
    with network.run_relay("one", "two") as flags:
        key = network.start_provider(*flags)
        network.weak.start("--delegate", key, *flags)
        status, text = network.weak.ask(CHAT)
        assert status == 200, text
        peer = read_peer(network.weak)
        assert (peer["via"], peer["route"], peer["publicKey"]) == ("rendezvous", "relay", key)


def test_the_relay_takes_over_when_the_network_is_gone_and_gives_back(network):
    network.connect_all()
    with network.run_relay("one", "two") as flags:
        key = network.start_provider(*flags)
        network.weak.start("--delegate", key, *flags)
        wait_for(lambda: network.weak.ask(CHAT)[0] == 200 and read_peer(network.weak)["route"] == "lan", 60, "directly")
        network.lan.ip("two", "link", "set", "lan", "down")
        status, text = network.weak.ask(CHAT)  # the one that finds out
        assert status == 200, text
        assert read_peer(network.weak)["route"] == "relay"
        network.lan.ip("two", "link", "set", "lan", "up")
        wait_for(lambda: network.weak.ask(CHAT)[0] == 200 and read_peer(network.weak)["route"] == "lan", 120, "again")


def test_a_provider_that_gets_another_address(network):
    network.connect_all()
    key = network.start_provider()
    network.weak.start("--delegate", key)
    assert network.weak.ask(CHAT)[0] == 200
    network.lan.ip("one", "addr", "del", f"{ADDRESS['one']}/24", "dev", "lan")
    network.lan.ip("one", "addr", "add", "10.77.0.9/24", "dev", "lan")
    wait_for(lambda: network.weak.ask(CHAT)[0] == 200, 120, "it is used at its new address")
    wait_for(lambda: "10.77.0.9" in read_peer(network.weak)["baseUrl"], 90, "and known by it")
