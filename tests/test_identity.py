"""Section Identity: one id per installation, kept through every start, and not shared by a copied card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    Identity,
    StorageError,
    build_machine_hash,
    build_static_key,
    choose_identity,
    encode_base64url,
    encode_identity,
    is_peer_id,
    load_identity,
    parse_base64url,
    parse_identity,
    probe_machine_id,
    save_file,
)

FOLDER = str(Path(dvai_bridge.__file__).parent)


def load(directory, machine_id="machine-1", hostname="pi"):
    return load_identity(directory, machine_id=machine_id, hostname=hostname)


def test_made_once_and_kept(tmp_path):
    first = load(tmp_path)
    assert len(first.device_id) == 22 and len(parse_base64url(first.device_id)) == 16
    assert first.device_name == "pi"
    assert load(tmp_path, hostname="another") == first
    assert load(tmp_path / "second home").device_id != first.device_id


def test_the_file(tmp_path):
    identity = load_identity(tmp_path, machine_id="m", hostname="pi", random=bytes)
    assert json.loads((tmp_path / "identity.json").read_text()) == {
        "version": 1,
        "deviceId": "A" * 22,
        "deviceName": "pi",
        "machine": build_machine_hash("m"),
        "seed": "A" * 43,
    }
    assert parse_identity(encode_identity(identity)) == identity


def test_a_cloned_card_gets_a_new_identity_and_a_line(tmp_path, caplog):
    first = load(tmp_path)
    clone = load(tmp_path, "machine-2", "pi-2")
    assert clone.device_id != first.device_id and clone.device_name == "pi-2"
    assert "made on another machine" in caplog.text and clone.device_id in caplog.text
    kept = tmp_path / f"identity.json.other-machine-{first.device_id}"
    assert parse_identity(kept.read_bytes()) == first
    assert load(tmp_path, "machine-2") == clone


def test_a_machine_that_cannot_be_told_changes_nothing(tmp_path):
    first = load(tmp_path, None)
    assert first.machine is None
    bound = load(tmp_path, "machine-1")
    assert (bound.device_id, bound.machine) == (first.device_id, build_machine_hash("machine-1"))
    assert load(tmp_path, None) == bound
    assert load(tmp_path, "machine-2").device_id != first.device_id


def test_a_clone_does_not_take_the_seed_along():
    known = Identity(device_id="A" * 22, device_name="pi", machine=build_machine_hash("1"), seed="A" * 43)
    assert choose_identity(known, machine=build_machine_hash("1"), device_name="x", random=bytes) == known
    new = choose_identity(known, machine=build_machine_hash("2"), device_name="x", random=os.urandom)
    assert new.seed not in (None, known.seed) and new.device_id != known.device_id


def test_an_identity_of_an_earlier_version_gets_a_seed_and_keeps_it(tmp_path):
    first = load(tmp_path)
    path = tmp_path / "identity.json"
    for each in (path, tmp_path / "identity.json.bak"):
        each.write_text(json.dumps(json.loads(path.read_text()) | {"seed": None}))
    upgraded = load(tmp_path)
    assert upgraded.device_id == first.device_id and upgraded.seed not in (None, first.seed)
    assert load(tmp_path) == upgraded


def test_the_static_key_is_the_known_answer(crypto_backend):
    """Protocol section 1, the seed 21…21."""
    identity = Identity(device_id="A" * 22, device_name="pi", seed=encode_base64url(b"\x21" * 32))
    pair = build_static_key(identity, crypto_backend)
    assert pair.private.hex() == "eefc36bbcd63bbd5f94f0e1c3609308b8d437b239ce8a07d5fbdc6771af05636"
    assert encode_base64url(pair.public) == "raNS_HZR5eMcRklH55m6i05JQC1Cf5sfBCFJ_CHuN3s"
    with pytest.raises(ValueError, match="seed"):
        build_static_key(Identity(device_id="A" * 22, device_name="pi"), crypto_backend)


def test_the_machine_and_the_seed_are_not_shown():
    identity = Identity(device_id="A" * 22, device_name="pi", machine=build_machine_hash("serial"), seed="S" * 43)
    assert identity.machine not in repr(identity) and "SSS" not in repr(identity)
    assert "serial" not in identity.machine


@pytest.mark.parametrize("hostname", ["", "  ", "a\nb", "\u202egnp.exe"])
def test_a_hostname_that_is_no_name(tmp_path, hostname):
    assert load(tmp_path, hostname=hostname).device_name == "unnamed device"


GOOD = {"version": 1, "deviceId": "A" * 22, "deviceName": "pi", "machine": None, "seed": None}


@pytest.mark.parametrize(
    "change",
    [
        {"deviceId": "A" * 21},
        {"deviceId": "../../etc/passwd"},
        {"deviceId": 7},
        {"deviceName": ""},
        {"deviceName": None},
        {"machine": 5},
        {"machine": "short"},
        {"seed": "AA"},
    ],
)
def test_a_damaged_identity_is_never_replaced_by_a_new_one(tmp_path, change):
    path = tmp_path / "identity.json"
    save_file(path, encode_identity(parse_identity(json.dumps(GOOD).encode())))
    path.write_text(json.dumps(GOOD | change))
    assert load(tmp_path).device_id == GOOD["deviceId"]
    for each in (path, tmp_path / "identity.json.bak"):
        each.write_text(json.dumps(GOOD | change))
    with pytest.raises(StorageError, match="move it away"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("value", "is_id"),
    [
        ("a", True),
        ("Jörg's iPhone", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("a\nb", False),
        ("\u202ea", False),
        (None, False),
        (5, False),
    ],
)
def test_ids_of_peers(value, is_id):
    assert is_peer_id(value) is is_id


PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
import dvai_bridge as b, pathlib
print(b.load_identity(pathlib.Path(sys.argv[2]), machine_id="m", hostname="h").device_id)
"""


def test_processes_that_start_together_agree(tmp_path):
    command = [sys.executable, "-c", PROGRAM, FOLDER, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    ids = {process.communicate(timeout=60)[0] for process in processes}
    assert ids == {load(tmp_path, "m").device_id + "\n"}


def test_what_tells_a_linux_machine_from_its_clone(tmp_path):
    assert probe_machine_id("linux", tmp_path) is None
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("uninitialized\n")
    assert probe_machine_id("linux", tmp_path) is None
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    assert probe_machine_id("linux", tmp_path) == "0123456789abcdef0123456789abcdef"
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/serial-number").write_bytes(b"10000000abcdef01\0")
    assert probe_machine_id("linux", tmp_path) == "0123456789abcdef0123456789abcdef:10000000abcdef01"


def test_this_machine_is_the_same_every_time():
    assert probe_machine_id(sys.platform) == probe_machine_id(sys.platform)


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="looks for tools of systems that this is not")
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_a_machine_without_the_tool_cannot_be_told(platform):
    assert probe_machine_id(platform) is None
