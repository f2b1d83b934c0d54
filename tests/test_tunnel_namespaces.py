"""The secure channel on a network of a test's own: what is seen on the wire, who stands on it, and a device that moves.

Needs root and iproute2. Everything stands in network namespaces of its own.
"""

import base64
import contextlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support import wait_for
from support_lan import ADDRESS, Lan, Machine
from support_worker import build_byte_model

import dvai_bridge as d

if os.environ.get("DVAI_TEST_ALL") != "1":
    pytest.skip("needs network namespaces (make test-all)", allow_module_level=True)

CANARY = "canary-5d2f the quick brown fox"
CHAT = {
    "model": "strong",
    "messages": [{"role": "user", "content": CANARY}],
    "max_tokens": 40,
    "temperature": 0,
    "logit_bias": {"2": -100},
}
TAP = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
tap.bind((sys.argv[1], 0))
print("ready", flush=True)
with open(sys.argv[2], "wb", buffering=0) as file:
    while True:
        frame = tap.recv(1 << 17)
        file.write(len(frame).to_bytes(4, "big") + frame)
"""
SUBSTITUTER = """
import sys, threading
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import dvai_bridge as d
from test_pairing_end_to_end import Substituter, standing_between
target_host, target_port, own_host, weak_id, strong_id = sys.argv[3:8]
weak, strong = (d.Identity(device_id=each, device_name="somebody's device") for each in (weak_id, strong_id))
between = Substituter(int(target_port), weak, strong)
between.target_host = target_host
with standing_between(between, own_host):
    print(between.port, flush=True)
    sys.stdin.read()
"""
TESTS = Path(__file__).resolve().parent


@pytest.fixture
def network(tmp_path):
    """A LAN of three machines, of which two are ours."""
    lan = Lan("one", "two", "three")
    machines = [Machine(lan, short, tmp_path / short) for short in ("one", "two")]
    try:
        lan.create()
        for short in ADDRESS:
            lan.connect(short)
        yield lan, *machines
        for machine in machines:
            machine.close()
    finally:
        for machine in machines:
            if machine.process is not None:
                machine.process.kill()
        lan.delete()


@contextlib.contextmanager
def run_program(command):
    """A program that prints one line when it is ready, which is given; ended on leaving."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline().strip()
        assert line, "it did not start"
        yield line
    finally:
        process.kill()
        process.communicate()


def read_flows(path):
    """What a capture holds: all frames, and the payloads of each TCP direction one after the other."""
    data, at, frames, flows = path.read_bytes(), 0, [], {}
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        frame = data[at + 4 : at + 4 + size]
        at += 4 + size
        frames.append(frame)
        if frame[12:14] == b"\x08\x00" and frame[23] == 6:
            ip = frame[14 : 14 + struct.unpack_from(">H", frame, 16)[0]]
            tcp = ip[(ip[0] & 15) * 4 :]
            flow = flows.setdefault((ip[12:20], tcp[:4]), bytearray())
            flow += tcp[(tcp[12] >> 4) * 4 :]
    return b"".join(frames), b"\0".join(flows.values())


def list_spellings(secret):
    """Bytes as they are, and as text may carry them."""
    encoded = (secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret).rstrip(b"="))
    return [secret, *encoded, base64.urlsafe_b64encode(secret).rstrip(b"=")]


def list_secrets(*homes):
    """Every key that these devices keep."""
    for home in homes:
        kept = json.loads((home / "data" / "identity.json").read_text())
        identity = d.Identity(device_id=kept["deviceId"], device_name=kept["deviceName"], seed=kept["seed"])
        yield from (d.parse_base64url(kept["seed"]), d.build_static_key(identity, d.OwnBackend()).private)
        for pairing in d.parse_pairings((home / "data" / "pairings.json").read_bytes()).records.values():
            for key in (pairing.inbound_key, pairing.outbound_key):
                if key is not None:
                    yield d.parse_base64url(key)
            for link in (pairing.inbound_link, pairing.outbound_link):
                if link is not None:
                    yield from (link.resume_psk, link.room)


def write_model(folder):
    path = folder / "strong.gguf"
    path.write_bytes(build_byte_model())
    return path


def read_port(machine):
    return int(machine.url.rpartition(":")[2].partition("/")[0])


def ask_until_served(machine):
    def ask():
        status, text = machine.ask(CHAT)
        return json.loads(text) if status == 200 else None

    return wait_for(ask, 120, "it is served")


def test_a_capture_of_everything_holds_nothing(network, tmp_path):
    lan, strong, weak = network
    strong.start("--lan", "--model", write_model(tmp_path), "--engine", "builtin", "--pairing", "allow")
    weak.start("--offload-only")
    url = f"http://{ADDRESS['one']}:{read_port(strong)}"
    capture = tmp_path / "capture"
    with run_program(lan.exec("switch", sys.executable, "-c", TAP, "one-lan", str(capture))):
        asked = weak.run("pair", "request", url, "--yes")
        assert asked.returncode == 0, asked.stderr
        answer = ask_until_served(weak)["choices"][0]["message"]["content"]
        status, text = weak.ask(CHAT | {"stream": True})
        assert status == 200 and text.rstrip().endswith("data: [DONE]")
        frames, said = wait_for(lambda: find_all(capture, b"dvai-noise.1"), 30, "the capture has the tunnel")
        assert b'"noise"' in said, "the pairing, too"
        words = [CANARY.encode(), answer.encode()[:24], json.dumps(answer).encode()[1:25], b"chat.completion"]
        secrets = [
            spelling for secret in set(list_secrets(strong.home, weak.home)) for spelling in list_spellings(secret)
        ]
        assert len(secrets) >= 5 * 5 and len(answer) >= 24
        for where in (frames, said):
            assert not [each for each in (*words, *secrets) if each in where]
        # that it would be seen: the same prompt, said readably by a stranger
        command = ["curl", "-sS", "-m", "30", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
        subprocess.run(lan.exec("two", *command, "-d", json.dumps(CHAT)), capture_output=True, timeout=60, check=True)
        wait_for(lambda: find_all(capture, CANARY.encode()), 30, "the capture sees what is readable")


def find_all(capture, mark):
    """The capture once it holds `mark`."""
    frames, said = read_flows(capture)
    return (frames, said) if mark in said else None


def test_a_man_in_the_middle_gets_no_pairing_past_users_who_compare(network):
    lan, strong, weak = network
    strong.start("--lan")
    weak.start("--offload-only", "--no-discover-lan")
    ids = [json.loads((each.home / "data" / "identity.json").read_text())["deviceId"] for each in (weak, strong)]
    where = (ADDRESS["one"], str(read_port(strong)), ADDRESS["three"])
    program = [sys.executable, "-c", SUBSTITUTER, str(TESTS), str(TESTS.parent), *where, *ids]

    def list_shown(machine):
        listed = json.loads(machine.run("pair", "list", "--json").stdout)["pending"]
        return [each for each in listed if each["code"]]

    with run_program(lan.exec("three", *program)) as port:
        url = f"http://{ADDRESS['three']}:{port}"
        requesting = subprocess.Popen(
            weak.build_command("pair", "request", url), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        (there,) = wait_for(lambda: list_shown(strong), 60, "it is on the provider's screen")
        (here,) = wait_for(lambda: list_shown(weak), 60, "it is on the consumer's screen")
        assert (here["deviceId"], there["deviceId"]) == (ids[1], ids[0]), "all but the code is as it should be"
        assert here["code"] != there["code"]
        denied = strong.run("pair", "approve", "--code", here["code"])
        assert denied.returncode == 1 and "codes differ" in denied.stderr
        weak.run("pair", "approve", "--code", there["code"])
        assert requesting.wait(90) == 1, requesting.stderr.read()
        requesting.stderr.close()
    for machine in (strong, weak):
        assert json.loads(machine.run("pair", "list", "--json").stdout)["pairings"] == []


def test_a_provider_that_gets_another_address_is_reached_there_without_pairing(network, tmp_path):
    lan, strong, weak = network
    strong.start("--lan", "--model", write_model(tmp_path), "--engine", "builtin", "--pairing", "allow")
    weak.start("--offload-only")
    asked = weak.run("pair", "request", f"http://{ADDRESS['one']}:{read_port(strong)}", "--yes")
    assert asked.returncode == 0, asked.stderr
    ask_until_served(weak)
    lan.ip("one", "addr", "del", f"{ADDRESS['one']}/24", "dev", "lan")
    lan.ip("one", "addr", "add", "10.77.0.9/24", "dev", "lan")
    ask_until_served(weak)
    (peer,) = json.loads(weak.run("peers", "--json").stdout)
    assert "10.77.0.9" in peer["baseUrl"] and peer["transport"] == "tunnel"
