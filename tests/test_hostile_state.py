"""Real bridges whose state is killed in the middle of a save, damaged, taken away or shared: they serve, and say it."""

import concurrent.futures
import contextlib
import json
import signal
import socket
import subprocess
import threading

import pytest
from support import CLEAN_ENVIRON, PROGRAM, read_health, start_bridge, wait_for
from support_peer import ask_owner, find_secrets, pair_with, read_device_id, read_token, recovering, send

resource = pytest.importorskip("resource", reason="stops processes with signals")

CHAT = "/v1/chat/completions"
CANARY = "canary-c7e4"
HELLO = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}
HANDSHAKE = {"peerDeviceId": "late", "peerDeviceName": "late", "via": "lan-handshake"}


def start_target(home, *arguments):
    allow = ("--pairing", "allow", "--legacy-pairing", "allow")
    return start_bridge(home, "--lan", "--host", "127.0.0.1", *allow, *arguments)


def run_command(home, *arguments, timeout_s=60):
    command = [*PROGRAM, *map(str, arguments), "--home", str(home)]
    return subprocess.run(command, env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=timeout_s)


def chat(bridge):
    status, headers, data = bridge.request("POST", CHAT, HELLO, timeout_s=60)
    return status == 200 and headers["X-DVAI-Served-By"] == "local" and bool(json.loads(data)["choices"])


def ask_to_pair(bridge):
    return send(bridge.port, "POST", "/v1/dvai/handshake", json.dumps(HANDSHAKE).encode())


def is_taken(bridge, caller):
    status = caller.ask(bridge.port, "GET", "/v1/models").status
    assert status in (200, 401)
    return status == 200


# Killed


def has_many_loopback_addresses():
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.77", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not has_many_loopback_addresses(), reason="needs a second loopback address")
def test_killed_while_devices_pair(tmp_path):
    """Whoever was given a key keeps it, whenever the bridge dies; what is on the disk is never half a file."""
    home, callers = tmp_path / "home", []
    for round_number, wanted in enumerate((1, 4, 9)):
        asked = [(f"device-{round_number}-{each}", f"127.0.1.{10 * round_number + each + 1}") for each in range(10)]
        with start_target(home) as bridge, concurrent.futures.ThreadPoolExecutor(10) as pool:
            assert all(is_taken(bridge, caller) for caller in callers)
            device_id, given, enough = read_device_id(home), [], threading.Event()

            def pair(device_id, source, port=bridge.port, given=given, wanted=wanted, enough=enough):
                with contextlib.suppress(OSError, ConnectionError):
                    given.append(pair_with(port, device_id, source=source))
                if len(given) >= wanted:
                    enough.set()

            for device, source in asked:
                pool.submit(pair, device, source)
            assert enough.wait(60)
            bridge.process.kill()
            bridge.process.wait()
        callers += given
    with start_target(home) as bridge:
        assert read_device_id(home) == device_id
        assert len(callers) >= 14 and all(is_taken(bridge, caller) for caller in callers)
        assert not any("damaged" in line for line in bridge.log)
    assert not find_secrets([caller.key for caller in callers], bridges=[bridge], homes=[home])


def test_the_one_who_asks_is_killed_and_asks_again(tmp_path):
    """Its request is withdrawn at the other one; the next is a new one, and gives a new key."""
    strong_home, weak_home = tmp_path / "strong", tmp_path / "weak"
    with start_bridge(strong_home, "--lan", "--host", "127.0.0.1") as strong:

        def list_pending():
            listed = ask_owner(strong, strong_home, "GET", "/v1/dvai/pairings")[1]["pending"]
            return [each for each in listed if each["code"] is not None]

        def start_asking(stack):
            weak = stack.enter_context(
                start_bridge(weak_home, "--offload-only", "--no-discover-lan", "--pairing", "allow")
            )
            peer = {"peer": f"http://127.0.0.1:{strong.port}"}
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
            return weak, pool.submit(ask_owner, weak, weak_home, "POST", "/v1/dvai/pairings", peer)

        with recovering(strong), contextlib.ExitStack() as stack:
            weak, asking = start_asking(stack)
            (pending,) = wait_for(list_pending, 30, "it asks")
            weak.process.kill()
            assert isinstance(asking.exception(30), Exception)
            wait_for(lambda: not list_pending(), 30, "the request is withdrawn")
            answer = ask_owner(strong, strong_home, "POST", f"/v1/dvai/pairings/{pending['id']}/approve", {})
            assert answer[0] == 404
        with contextlib.ExitStack() as stack:
            weak, asking = start_asking(stack)
            (pending,) = wait_for(list_pending, 30, "it asks again")
            way, code = f"/v1/dvai/pairings/{pending['id']}/approve", {"code": pending["code"]}
            assert ask_owner(strong, strong_home, "POST", way, code)[0] == 200
            assert asking.result(30)[0] == 200
    (given,) = json.loads((strong_home / "data" / "pairings.json").read_text())["pairings"]
    (kept,) = json.loads((weak_home / "data" / "pairings.json").read_text())["pairings"]
    assert given["inboundKey"] == kept["outboundKey"]


def test_a_stop_does_not_wait_for_a_user_who_is_not_there(tmp_path):
    with start_bridge(tmp_path / "home", "--lan", "--host", "127.0.0.1") as bridge:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask_to_pair, bridge)
            wait_for(
                lambda: ask_owner(bridge, tmp_path / "home", "GET", "/v1/dvai/pairings")[1]["pending"], 30, "it asks"
            )
            bridge.process.send_signal(signal.SIGTERM)
            assert asking.result(30).status == 403
        assert bridge.process.wait(30) == 0


# Taken away


def test_a_home_that_cannot_be_written_costs_pairing_and_nothing_else(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").write_text("in the way")
    with start_target(home) as bridge, recovering(bridge):
        assert chat(bridge)
        answer = ask_to_pair(bridge)
        assert (answer.status, answer.error["code"]) == (503, "pairing_disabled")
        wait_for(lambda: any("pairing is off" in line and "--home" in line for line in bridge.log), 10, "it is said")
    assert (home / "data").read_text() == "in the way"
    listed = run_command(home, "pair", "list")
    assert listed.returncode == 1 and listed.stderr.count("\n") == 1 and "data" in listed.stderr


@contextlib.contextmanager
def full_disk(process):
    """No file of the process can grow any more."""
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="looks for tools of systems that this is not")
def test_a_disk_that_fills_up_and_has_room_again(tmp_path):
    home = tmp_path / "home"
    pairings = home / "data" / "pairings.json"
    with start_target(home) as bridge, recovering(bridge):
        one, two = pair_with(bridge.port, "one"), pair_with(bridge.port, "two")
        before = pairings.read_bytes()
        with full_disk(bridge.process):
            answer = ask_to_pair(bridge)
            assert answer.status >= 500 and "pairingKey" not in answer.json and "cannot save" in answer.error["message"]
            assert pairings.read_bytes() == before
            assert chat(bridge) and is_taken(bridge, one) and is_taken(bridge, two)
            listed = ask_owner(bridge, home, "GET", "/v1/dvai/pairings")[1]["pairings"]
            (revoked,) = [each["id"] for each in listed if each["deviceId"] == "two"]
            status, answer = ask_owner(bridge, home, "DELETE", f"/v1/dvai/pairings/{revoked}")
            assert status >= 500 and "cannot save" in answer["error"]["message"]
            assert is_taken(bridge, one) and not is_taken(bridge, two)
        assert ask_owner(bridge, home, "DELETE", f"/v1/dvai/pairings/{revoked}")[0] == 404
    (kept,) = json.loads(pairings.read_text())["pairings"]
    assert kept["deviceId"] == "one", "what could not be written is written at the end"
    with start_target(home) as bridge:
        assert is_taken(bridge, one) and not is_taken(bridge, two)
        assert ask_to_pair(bridge).status == 200


# Damaged

DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": lambda data: bytes(byte ^ 0x80 for byte in data),
    "another type": lambda data: b'[{"version": "1"}]',
    "zeros": lambda data: bytes(len(data)),
}


@pytest.fixture(scope="module")
def used_home(tmp_path_factory):
    """The files of a bridge that one device is paired with, and that device."""
    home = tmp_path_factory.mktemp("homes") / "used"
    with start_target(home) as bridge:
        caller = pair_with(bridge.port, "device", "app")
        assert is_taken(bridge, caller)
    files = [path for path in (home / "data").iterdir() if path.is_file() and not path.name.startswith(".")]
    return {path.name: path.read_bytes() for path in files}, caller


def restore(home, files):
    (home / "data").mkdir(parents=True, mode=0o700)
    for name, data in files.items():
        (home / "data" / name).write_bytes(data)
        (home / "data" / name).chmod(0o600)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_with_a_good_copy(tmp_path, used_home, damage):
    files, caller = used_home
    restore(tmp_path / "home", files)
    for name in ("identity.json", "pairings.json", "control-token", "nonces.json"):
        (tmp_path / "home" / "data" / name).write_bytes(DAMAGE[damage](files[name]))
    with start_target(tmp_path / "home") as bridge:
        assert is_taken(bridge, caller) and chat(bridge)
        assert ask_owner(bridge, tmp_path / "home", "GET", "/v1/dvai/pairings")[0] == 200
        assert any("damaged" in line for line in bridge.log)
    secrets = [caller.key, files["control-token"].decode()]
    assert not find_secrets(secrets, bridges=[bridge], homes=[tmp_path / "home"])


@pytest.mark.parametrize("name", ["identity.json", "pairings.json", "control-token"])
def test_a_damaged_file_without_a_good_copy(tmp_path, used_home, name):
    """Nothing is overwritten on doubt: it serves, says that pairing is off and what to do. A token is made anew."""
    files, caller = used_home
    home = tmp_path / "home"
    broken = {each: data[: len(data) // 2] for each, data in files.items() if each in (name, f"{name}.bak")}
    assert len(broken) == 2
    restore(home, files | broken)
    with start_target(home, "--offload", "--no-discover-lan", "--model", "builtin") as bridge:
        assert chat(bridge) and read_health(bridge)["status"] == "ok"
        if name == "control-token":
            assert is_taken(bridge, caller) and ask_owner(bridge, home, "GET", "/v1/dvai/pairings")[0] == 200
            return
        assert not is_taken(bridge, caller)
        answer = ask_to_pair(bridge)
        assert (answer.status, answer.error["code"]) == (503, "pairing_disabled")
        assert any("pairing is off" in line and name in line for line in bridge.log), bridge.log
        if name == "pairings.json":
            for arguments in (("list",), ("revoke", "x"), ("request", "http://127.0.0.1:1")):
                said = run_command(home, "pair", *arguments)
                assert said.returncode == 1 and "pairing is off" in said.stderr, (arguments, said)
    assert {each: (home / "data" / each).read_bytes() for each in broken} == broken


# Shared


def test_two_bridges_with_one_home(tmp_path):
    """The second says so. Whom the one lets in or out, the other one does too, without a restart."""
    home = tmp_path / "home"
    with start_target(home) as one, start_target(home) as two:
        wait_for(lambda: any("--home" in line for line in two.log), 20, "the second one says so")
        assert not any("--home" in line for line in one.log)
        callers = [pair_with(bridge.port, f"device-{each}") for each, bridge in enumerate((one, two, one, two))]
        assert {caller.receiver for caller in callers} == {read_device_id(home)}
        for caller in callers:
            for bridge in (one, two):
                wait_for(lambda bridge=bridge, caller=caller: is_taken(bridge, caller), 60, "both take it")
        listed = ask_owner(one, home, "GET", "/v1/dvai/pairings")[1]["pairings"]
        (revoked,) = [each["id"] for each in listed if each["deviceId"] == "device-0"]
        assert ask_owner(two, home, "DELETE", f"/v1/dvai/pairings/{revoked}")[0] == 200
        wait_for(lambda: not is_taken(one, callers[0]), 60, "the other one hears of it")
        assert is_taken(one, callers[1])
        assert chat(one) and chat(two)
        token = read_token(home)
    assert not find_secrets([token, CANARY, *(each.key for each in callers)], bridges=[one, two], homes=[home])
