"""Discovery between machines: two network namespaces joined by a bridge, real packets, our own code and zeroconf's.

Needs root and iproute2. Everything stands in namespaces of its own; the machine's network is not touched.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import require, wait_for
from support_lan import TIMEOUT_S, Lan, run

PROGRAM = Path(__file__).with_name("support_discovery.py")
DEVICE = {"one": "device-one-0123456789a", "two": "device-two-0123456789a"}

if os.environ.get("DVAI_TEST_ALL") != "1":
    pytest.skip("needs network namespaces (make test-all)", allow_module_level=True)


@pytest.fixture
def bare_lan():
    lan = Lan()
    try:
        lan.create()
        yield lan
    finally:
        lan.delete()


@pytest.fixture
def lan(bare_lan):
    bare_lan.connect("one")
    bare_lan.connect("two")
    return bare_lan


class Node:
    """A running support_discovery.py and what it has printed."""

    def __init__(self, process):
        self.process = process
        self.events = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def peers(self):
        """Device id → the peer as last reported, without those lost since."""
        present = {}
        for event in list(self.events):
            if "found" in event:
                present[event["found"]["deviceId"]] = event["found"]
            elif "lost" in event:
                present.pop(event["lost"], None)
        return present

    def wait_for_peer(self, device_id, **members):
        def find():
            peer = self.peers().get(device_id)
            return peer if peer and all(peer[name] == value for name, value in members.items()) else None

        return wait_for(find, TIMEOUT_S, f"{device_id} with {members}: {self.events}")

    def wait_for_loss(self, device_id):
        wait_for(lambda: device_id not in self.peers(), TIMEOUT_S, f"{device_id} is lost: {self.events}")

    def update(self, **changes):
        self.process.stdin.write(json.dumps({"update": changes}) + "\n")
        self.process.stdin.flush()

    def stop(self):
        """Ends as a bridge does: with its goodbyes."""
        if not self.process.stdin.closed:
            self.process.stdin.close()
        assert self.process.wait(TIMEOUT_S) == 0
        self._reader.join()
        assert {"stopped": None} in self.events

    def kill(self):
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._reader.join()
        self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def start_node(lan, short, *, device_id=None, port=38883, environ=None, **options):
    options = {"device_id": device_id or DEVICE[short], "port": port, **options}
    command = lan.exec(short, sys.executable, str(PROGRAM), json.dumps(options))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    node = Node(subprocess.Popen(command, env={**os.environ, **(environ or {})}, **pipes))
    try:
        wait_for(lambda: any("started" in event for event in node.events), TIMEOUT_S, "it started")
        yield node
    finally:
        node.kill()


BACKENDS = [pair for pair in itertools.product(("own", "zeroconf"), repeat=2) if pair != ("zeroconf", "zeroconf")]


@pytest.mark.parametrize(("first", "second"), BACKENDS, ids=lambda name: name)
def test_two_machines_find_each_other_change_and_say_goodbye(lan, first, second):
    require("zeroconf")
    with (
        start_node(lan, "one", backend=first, models=["a", "b"]) as one,
        start_node(lan, "two", backend=second, port=38900) as two,
    ):
        peer = two.wait_for_peer(DEVICE["one"])
        assert peer["baseUrl"] == "http://10.77.0.1:38883/v1" and peer["via"] == "mdns"
        assert peer["loadedModels"] == ["a", "b"] and peer["deviceName"] == "a device"
        assert one.wait_for_peer(DEVICE["two"])["baseUrl"] == "http://10.77.0.2:38900/v1"
        two.update(models=["another"])
        one.wait_for_peer(DEVICE["two"], loadedModels=["another"])
        two.stop()
        one.wait_for_loss(DEVICE["two"])
        one.stop()
    assert set(one.peers()) | set(two.peers()) <= {DEVICE["one"]}


def test_announcing_and_browsing_are_independent(lan):
    with (
        start_node(lan, "one", browse=False) as announcer,
        start_node(lan, "two", announce=False) as browser,
    ):
        browser.wait_for_peer(DEVICE["one"])
        announcer.update()  # nothing any more
        browser.wait_for_loss(DEVICE["one"])
        browser.stop()
        announcer.stop()
    assert announcer.peers() == {}


def test_an_interface_that_appears_and_one_that_goes(bare_lan):
    bare_lan.connect("one")
    with start_node(bare_lan, "one") as one, start_node(bare_lan, "two") as two:
        bare_lan.connect("two", interface="late")
        two.wait_for_peer(DEVICE["one"])
        one.wait_for_peer(DEVICE["two"])
        bare_lan.ip("two", "link", "set", "late", "down")
        two.wait_for_loss(DEVICE["one"])
        bare_lan.ip("two", "link", "set", "late", "up")
        two.wait_for_peer(DEVICE["one"])
        one.stop()
        two.stop()


def test_another_address_is_noticed(lan):
    with start_node(lan, "one") as one, start_node(lan, "two") as two:
        two.wait_for_peer(DEVICE["one"], baseUrl="http://10.77.0.1:38883/v1")
        lan.ip("one", "addr", "del", "10.77.0.1/24", "dev", "lan")
        lan.ip("one", "addr", "add", "10.77.0.77/24", "dev", "lan")
        two.wait_for_peer(DEVICE["one"], baseUrl="http://10.77.0.77:38883/v1")
        one.stop()
        two.stop()


def test_ipv6_alone(lan):
    for short in ("one", "two"):
        lan.ip(short, "addr", "flush", "dev", "lan", "scope", "global")
    with start_node(lan, "one") as one, start_node(lan, "two") as two:
        url = two.wait_for_peer(DEVICE["one"])["baseUrl"]
        assert url.startswith("http://[fe80::") and url.endswith("%lan]:38883/v1")
        one.wait_for_peer(DEVICE["two"])
        one.stop()
        two.stop()


def test_two_bridges_on_one_machine_and_one_elsewhere(lan):
    other = "device-other-012345678"
    with (
        start_node(lan, "one") as one,
        start_node(lan, "one", device_id=other, port=38884) as neighbour,
        start_node(lan, "two") as two,
    ):
        for node, ids in ((one, (other, DEVICE["two"])), (neighbour, DEVICE.values()), (two, (DEVICE["one"], other))):
            for device_id in ids:
                node.wait_for_peer(device_id)
        assert one.peers()[other]["baseUrl"] == "http://10.77.0.1:38884/v1"
        for node in (one, neighbour, two):
            node.stop()


HOLD_PORT = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sock.bind(("", 5353))
six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); six.bind(("", 5353))
print("held", flush=True); sys.stdin.read()
"""


@contextlib.contextmanager
def hold_port(lan, short):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(lan.exec(short, sys.executable, "-c", HOLD_PORT), **pipes) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield
        finally:
            process.kill()


BUS = """\
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/>
  </policy>
</busconfig>
"""
AVAHI = """\
mount -t tmpfs tmpfs /run && mkdir /run/avahi-daemon
exec avahi-daemon --no-drop-root --no-chroot --no-rlimits -f "$1"
"""


@contextlib.contextmanager
def start_avahi(lan, short, folder):
    """Debian's responder on a bus of its own; gives the environment that its clients need."""
    bus, configuration, address = folder / "bus.conf", folder / "avahi.conf", folder / "bus"
    bus.write_text(BUS.format(path=address))
    configuration.write_text("[server]\nallow-interfaces=lan\nuse-ipv6=no\n[publish]\npublish-workstation=no\n")
    environ = {"DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={address}"}
    with contextlib.ExitStack() as stack:

        def start(*command):
            process = subprocess.Popen(lan.exec(short, *command), env={**os.environ, **environ})
            stack.callback(process.wait, TIMEOUT_S)
            stack.callback(process.terminate)

        start("dbus-daemon", f"--config-file={bus}", "--nofork", "--nopidfile")
        wait_for(address.exists, TIMEOUT_S, "the bus is there")
        start("unshare", "--mount", "sh", "-c", AVAHI, "sh", str(configuration))
        yield environ


def test_avahi_shares_the_port_and_reads_us(lan, tmp_path):
    browse = lan.exec("two", "avahi-browse", "--resolve", "--parsable", "--terminate", "_dvai-bridge._tcp")
    with (
        start_avahi(lan, "two", tmp_path) as environ,
        start_node(lan, "one", models=["a", "b"]) as one,
        start_node(lan, "two") as two,
    ):

        def find():
            done = subprocess.run(
                browse, env={**os.environ, **environ}, capture_output=True, text=True, timeout=TIMEOUT_S
            )
            return {line.split(";")[3]: line for line in done.stdout.splitlines() if line.startswith("=")}

        wait_for(lambda: set(DEVICE.values()) <= set(find()), TIMEOUT_S, "avahi sees both bridges")
        line = find()[DEVICE["one"]]
        assert ";10.77.0.1;38883;" in line and '"models=a,b"' in line and f'"device_id={DEVICE["one"]}"' in line
        two.wait_for_peer(DEVICE["one"])
        one.wait_for_peer(DEVICE["two"])
        one.stop()
        wait_for(lambda: DEVICE["one"] not in find(), TIMEOUT_S, "avahi hears the goodbye")
        two.stop()


AVAHI_SERVICE = ("avahi-publish", "-s", "Avahi's bridge", "_dvai-bridge._tcp", "38883")


def test_we_read_avahi(lan, tmp_path):
    with start_avahi(lan, "two", tmp_path) as environ, start_node(lan, "one") as one:
        text = ("deviceId=by-avahi", "deviceName=Avahi", "dvaiVersion=1", 'capability={"m":3}', "secure=0")
        command = lan.exec("two", *AVAHI_SERVICE, *text)
        with subprocess.Popen(command, env={**os.environ, **environ}) as publisher:
            try:
                peer = one.wait_for_peer("by-avahi")
            finally:
                publisher.terminate()
        assert peer["baseUrl"] == "http://10.77.0.2:38883/v1" and peer["capability"] == {"m": 3.0}
        one.wait_for_loss("by-avahi")
        one.stop()


def test_with_the_port_taken_peers_are_found_all_the_same(lan):
    with hold_port(lan, "two"), start_node(lan, "one") as one, start_node(lan, "two") as two:
        assert "finds peers, but cannot announce" in next(iter(two.events))["started"][0]
        two.wait_for_peer(DEVICE["one"])
        two.stop()
        one.stop()
    assert one.peers() == {}


def diagnose(lan, short):
    program = (
        f"import sys; sys.path.insert(0, {str(PROGRAM.parent.parent)!r}); import asyncio, json, dvai_bridge as b\n"
        "found = asyncio.run(b.diagnose_discovery(2)); print(json.dumps(b.build_diagnosis_json(found)))\n"
        "print(b.format_diagnosis(found), file=sys.stderr)"
    )
    return json.loads(run(*lan.exec(short, sys.executable, "-c", program)))


def test_diagnosis_of_a_network_that_works(lan):
    with start_node(lan, "one") as one:
        wait_for(lambda: diagnose(lan, "two")["interfaces"][0]["peers"], TIMEOUT_S, "the peer is seen")
        one.stop()


def test_diagnosis_names_what_blocks(bare_lan):
    assert diagnose(bare_lan, "two")["causes"] == ["no network interface but loopback is up"]
    bare_lan.connect("two")
    (alone,) = diagnose(bare_lan, "two")["interfaces"]
    assert alone["name"] == "lan" and alone["addresses"][0] == "10.77.0.2" and alone["ownCopies"] > 0
    assert "nobody else speaks multicast DNS here" in alone["causes"][-1]
    with hold_port(bare_lan, "two"):
        (held,) = diagnose(bare_lan, "two")["interfaces"]
    assert held["portShared"] is False and "keeps UDP port 5353 to itself" in held["causes"][-1]


def test_diagnosis_sees_a_firewall(lan):
    for command in (
        "add table inet t",
        "add chain inet t in { type filter hook input priority 0; }",
        "add rule inet t in udp dport 5353 drop",
    ):
        run(*lan.exec("two", "nft", *command.split()))
    (blocked,) = diagnose(lan, "two")["interfaces"]
    assert blocked["ownCopies"] == blocked["received"] == 0
    assert "a firewall on this machine drops UDP port 5353" in blocked["causes"][-1]
