"""Two machines on one network: the strong one is found by multicast DNS alone, approved once, and then answers.

Needs root and iproute2. Everything stands in network namespaces of its own.
"""

import json
import os
import subprocess
import threading

import pytest
from support import require, wait_for
from support_lan import ADDRESS, Lan, Machine
from support_worker import build_byte_model

if os.environ.get("DVAI_TEST_ALL") != "1":
    pytest.skip("needs network namespaces (make test-all)", allow_module_level=True)

CHAT = {"model": "strong", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture
def machines(tmp_path):
    lan = Lan()
    found = {short: Machine(lan, short, tmp_path / short) for short in ("one", "two")}
    try:
        lan.create()
        for short in found:
            lan.connect(short)
        yield found["one"], found["two"]
        for machine in found.values():
            machine.close()
    finally:
        for machine in found.values():
            if machine.process is not None:
                machine.process.kill()
        lan.delete()


@pytest.mark.parametrize(("strong_mdns", "weak_mdns"), [("own", "own"), ("zeroconf", "own"), ("own", "zeroconf")])
def test_found_by_multicast_dns_approved_once_and_used(machines, tmp_path, strong_mdns, weak_mdns):
    if "zeroconf" in (strong_mdns, weak_mdns):
        require("zeroconf")
    strong, weak = machines
    model = tmp_path / "strong.gguf"
    model.write_bytes(build_byte_model())
    strong.start("--lan", "--model", model, "--engine", "builtin", "--mdns", strong_mdns)
    weak.start("--offload-only", "--mdns", weak_mdns)

    def list_peers():
        shown = weak.run("peers", "--json")
        assert shown.returncode == 0, shown.stderr
        return json.loads(shown.stdout)

    (peer,) = wait_for(
        lambda: [each for each in list_peers() if each["state"] != "seen"], 60, "the strong one is found"
    )
    assert peer["via"] == "mdns" and ADDRESS["one"] in peer["baseUrl"]

    answers = []

    def ask_until_answered():  # while its model loads, the strong one is not asked to pair
        while not answers or answers[-1][0] == 503:
            answers.append(weak.ask(CHAT | {"stream": True}))

    asking = threading.Thread(target=ask_until_answered, daemon=True)
    asking.start()

    def find_shown(machine):
        listed = json.loads(machine.run("pair", "list", "--json").stdout)["pending"]
        return [each for each in listed if each["code"] is not None]

    (there,) = wait_for(lambda: find_shown(strong), 60, "the request")
    (here,) = wait_for(lambda: find_shown(weak), 60, "its code at the weak one")
    assert there["address"].endswith(ADDRESS["two"]) and here["code"] == there["code"]
    for machine, code in ((strong, here["code"]), (weak, there["code"])):
        assert machine.run("pair", "approve", "--code", code).returncode == 0
    asking.join(100)
    status, text = answers[-1]
    assert status == 200 and text.rstrip().endswith("data: [DONE]"), (status, text)

    assert weak.ask(CHAT)[0] == 200, "no second approval"
    strong.stop()
    status, text = weak.ask(CHAT)
    assert status == 503 and json.loads(text)["error"]["type"] == "no_capable_device"
    strong.start("--lan", "--model", model, "--engine", "builtin", "--mdns", strong_mdns, "--port", "0")
    wait_for(lambda: weak.ask(CHAT)[0] == 200, 90, "it is used again, on another port, without an approval")


def test_strangers_on_the_network_get_nothing(machines, tmp_path):
    strong, other = machines
    model = tmp_path / "strong.gguf"
    model.write_bytes(build_byte_model())
    strong.start("--lan", "--model", model, "--engine", "builtin")
    port = strong.url.rpartition(":")[2].partition("/")[0]
    base = f"http://{ADDRESS['one']}:{port}"

    def curl(path, *arguments):
        command = ["curl", "-sS", "-m", "30", "-o", "/dev/null", "-w", "%{http_code}", base + path, *arguments]
        return int(subprocess.run(other.lan.exec("two", *command), capture_output=True, text=True).stdout)

    post = ("-H", "Content-Type: application/json", "-d", json.dumps(CHAT))
    assert curl("/v1/dvai/health") == 200
    assert curl("/v1/chat/completions", *post) == curl("/v1/models") == curl("/v1/dvai/capability") == 401
    assert curl("/v1/dvai/peers") == curl("/v1/dvai/probe", *post) == curl("/metrics") == 401
    assert curl("/v1/dvai/pairings") == curl("/v1/dvai/pairings", "-X", "DELETE") == 403
    assert curl("/v1/dvai/health", "-H", "Host: evil.example") == 403
