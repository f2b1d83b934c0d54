"""Section Pairing: records that survive everything, and every way in which a signed request can be wrong."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    DAY_MS,
    LAST_USE_GRAIN_MS,
    PAIRINGS_LIMIT,
    PENDING_LIFETIME_MS,
    BridgeError,
    ClockSkewError,
    Identity,
    OverloadedError,
    Pairing,
    PairingDirection,
    PairingFile,
    PairingLink,
    PairingState,
    PairingStore,
    SignatureError,
    SignatureVerifier,
    StorageError,
    build_error_body,
    build_pairing_json,
    build_signed_headers,
    choose_foreign_pairings_path,
    encode_pairings,
    generate_nonce,
    generate_pairing_key,
    has_lost_access,
    merge_pairing,
    parse_pairings,
    parse_signature_headers,
    sign_request,
)
from tests.test_storage import FOLDER, Saboteur, needs_fork

NOW = 1_790_000_000_000
OWN = "own-device"
KEY, OTHER_KEY = (generate_pairing_key(random.Random(seed).randbytes) for seed in (1, 2))
BODY = b'{"model":"m","messages":[]}'
PATH = "/v1/chat/completions"


def pair(device="phone", app=None, **changes):
    members = {"device_name": f"{device}'s name", "inbound_key": KEY, "paired_at_ms": NOW, "last_used_at_ms": NOW}
    return Pairing(device_id=device, app_id=app or device, **members | changes)


def open_store(directory, *pairings, device_id=OWN):
    store = PairingStore(directory, device_id=device_id, clock_ms=lambda: NOW)
    store.load()
    for pairing in pairings:
        asyncio.run(store.add(pairing))
    return store


def read_file(directory):
    return {each.key: each for each in parse_pairings((directory / "pairings.json").read_bytes()).records.values()}


# ---- the file -------------------------------------------------------------------------

INBOUND, OUTBOUND = PairingDirection.INBOUND, PairingDirection.OUTBOUND


def link(fill=1, pending_until_ms=None):
    return PairingLink(
        pair_id=bytes([fill] * 16),
        resume_psk=bytes([fill + 1] * 32),
        room=bytes([fill + 2] * 16),
        pending_until_ms=pending_until_ms,
    )


FULL = pair(
    "hub",
    "app.x",
    outbound_key=OTHER_KEY,
    base_url="http://10.0.0.2:38883/v1",
    via="rendezvous-qr",
    uses_t1=True,
    is_marked_unauthorized=True,
    speaks_noise=True,
    identity_key=KEY,
    inbound_link=link(1),
    outbound_link=link(4, pending_until_ms=NOW + 5),
)


def test_every_field_comes_back(tmp_path):
    open_store(tmp_path, FULL, pair())
    assert read_file(tmp_path) == {FULL.key: FULL, pair().key: pair()}
    assert set(open_store(tmp_path).pairings) == {FULL, pair()}
    assert all(getattr(FULL, field.name) != field.default for field in fields(Pairing)), "a field that was not tested"


def test_keys_are_never_shown():
    shown = repr(FULL) + repr(PairingFile(device_id=OWN, records={FULL.key: FULL}))
    shown += json.dumps(build_pairing_json(FULL, PairingState.ACTIVE))
    assert KEY not in shown and OTHER_KEY not in shown
    assert str(link(1).resume_psk) not in shown and str(link(1).room) not in shown


def test_several_apps_of_one_device_are_kept_apart(tmp_path):
    first, second = pair("phone", "app.one"), pair("phone", "app.two", inbound_key=OTHER_KEY)
    store = open_store(tmp_path, first, second)
    assert store.find_inbound("app.one", "phone", NOW) == first
    assert store.find_inbound("app.two", "phone", NOW) == second
    assert store.find_inbound("phone", "phone", NOW) is None
    assert len({each.pairing_id for each in store.pairings}) == 2
    asyncio.run(store.revoke(first.pairing_id))
    assert open_store(tmp_path).pairings == (second,)


def test_the_two_directions_have_keys_of_their_own(tmp_path):
    inbound = pair("peer")
    outbound = pair("peer", inbound_key=None, outbound_key=OTHER_KEY, base_url="http://10.0.0.9:38883/v1")
    store = open_store(tmp_path, inbound)
    assert store.find_outbound("peer", None, NOW) is None
    asyncio.run(store.add(outbound))
    (both,) = store.pairings
    assert (both.inbound_key, both.outbound_key) == (KEY, OTHER_KEY)
    assert store.find_inbound("peer", "peer", NOW) == both
    for found in ("peer", None), (None, "http://10.0.0.9:38883/v1"), ("unknown", "http://10.0.0.9:38883/v1"):
        assert store.find_outbound(*found, NOW) == both
    assert store.find_outbound("unknown", "http://10.0.0.8:38883/v1", NOW) is None
    assert store.find_outbound(None, None, NOW) is None


def test_a_new_key_ends_what_was_known_of_the_old_one():
    known = pair(
        uses_t1=True, is_marked_unauthorized=True, outbound_key=KEY, base_url="http://a:1/v1", speaks_noise=True
    )
    merged = merge_pairing(known, pair(inbound_key=OTHER_KEY))
    assert merged == pair(inbound_key=OTHER_KEY, outbound_key=KEY, base_url="http://a:1/v1", speaks_noise=True)
    assert merge_pairing(known, pair(inbound_key=None, outbound_key=OTHER_KEY)).uses_t1


LINK = ("pairId", "resumePsk", "room", "pendingUntil")
GOOD_FILE = json.loads(encode_pairings(PairingFile(device_id=OWN, records={FULL.key: FULL})))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.update(version=2),
        lambda file: file.update(deviceId=None),
        lambda file: file.update(pairings={}),
        lambda file: file.pop("pairings"),
        lambda file: file["pairings"].append(None),
        lambda file: file.update(noisePeers=[]),
        lambda file: file.update(noisePeers={"http://a:1/v1": 5}),
        *(
            lambda file, name=name: file["pairings"][0].pop(name)
            for name in GOOD_FILE["pairings"][0]
            if not name.endswith("Link")  # which an earlier version did not have
        ),
        *(lambda file, name=name: file["pairings"][0].update({name: []}) for name in GOOD_FILE["pairings"][0]),
        *(lambda file, name=name: file["pairings"][0]["inboundLink"].pop(name) for name in LINK),
        *(lambda file, name=name: file["pairings"][0]["inboundLink"].update({name: "AA"}) for name in LINK),
        *(lambda file, name=name: file["pairings"][0]["inboundLink"].update({name: 5.0}) for name in LINK),
        lambda file: file["pairings"][0].update(identityKey="short"),
        lambda file: file["pairings"][0].update(inboundKey="short"),
        lambda file: file["pairings"][0].update(deviceId=""),
        lambda file: file["pairings"][0].update(pairedAt=True),
    ],
)
def test_wrong_types_and_values_are_damage(tmp_path, damage, caplog):
    """The damaged file is set aside, its copy used; with no good copy pairing is off and nothing is touched."""
    open_store(tmp_path, FULL)
    path = tmp_path / "pairings.json"
    file = json.loads(path.read_bytes())
    damage(file)
    path.write_text(json.dumps(file))
    if file.get("pairings") == {}:
        file["pairings"] = 5
        path.write_text(json.dumps(file))
    assert open_store(tmp_path).pairings == (FULL,)
    assert "damaged" in caplog.text and (tmp_path / "pairings.json.damaged-1").exists()
    for each in (path, tmp_path / "pairings.json.bak"):
        each.write_text(json.dumps(file))
    with pytest.raises(StorageError, match="move it away"):
        open_store(tmp_path)
    assert json.loads(path.read_text()) == file


def test_a_file_of_the_version_before_the_secure_channel(tmp_path):
    file = json.loads(json.dumps(GOOD_FILE))
    del file["noisePeers"], file["pairings"][0]["inboundLink"], file["pairings"][0]["outboundLink"]
    (tmp_path / "pairings.json").write_text(json.dumps(file))
    (pairing,) = open_store(tmp_path).pairings
    assert pairing == replace(FULL, inbound_link=None, outbound_link=None)


# ---- links of the secure channel ------------------------------------------------------


def secure(pending_until_ms=None, **changes):
    return pair(inbound_link=link(1, pending_until_ms), identity_key=OTHER_KEY, speaks_noise=True, **changes)


def test_a_pending_pairing_is_found_until_its_time_and_active_for_good(tmp_path):
    until_ms = NOW + PENDING_LIFETIME_MS
    store = open_store(tmp_path, secure(until_ms))
    (pending,) = store.pairings
    for now_ms, state in (
        (NOW - 40 * DAY_MS, PairingState.PENDING),  # a clock that was set right since
        (NOW, PairingState.PENDING),
        (until_ms, PairingState.PENDING),
        (until_ms + 1, PairingState.EXPIRED),
    ):
        expected = pending if state is PairingState.PENDING else None
        assert store.get_state(pending, now_ms) is state
        assert store.find_inbound("phone", "phone", now_ms) == store.find_link(link(1).pair_id, now_ms) == expected
    assert store.pairings == (pending,), "nothing is deleted because of a clock"
    store.activate(pending, OUTBOUND)  # which it does not have
    assert store.pairings == (pending,)
    store.activate(pending, INBOUND)
    store.activate(pending, INBOUND)
    (active,) = store.pairings
    assert active.inbound_link == link(1) and store.get_state(active, until_ms + 1) is PairingState.ACTIVE
    asyncio.run(store.flush())
    assert open_store(tmp_path).pairings == (active,)
    assert store.find_link(link(2).pair_id, NOW) is None
    assert store.get_state(active, NOW + 31 * DAY_MS) is PairingState.EXPIRED
    assert store.find_link(link(1).pair_id, NOW + 31 * DAY_MS) is None


def test_what_is_active_is_on_the_disk_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "PAIRINGS_REFRESH_INTERVAL_S", 0.01)

    async def run():
        store = PairingStore(tmp_path, device_id=OWN, clock_ms=lambda: NOW)
        store.load()
        pending = await store.add(secure(NOW + 1))
        maintaining = asyncio.create_task(store.maintain())
        store.activate(pending, INBOUND)
        async with asyncio.timeout(30):
            while read_file(tmp_path)[pending.key].inbound_link != link(1):  # noqa: ASYNC110 - another thread writes
                await asyncio.sleep(0.01)
        maintaining.cancel()

    asyncio.run(run())


def test_an_activation_is_not_that_of_a_newer_pairing(tmp_path):
    store = open_store(tmp_path, secure(NOW + 1))
    (older,) = store.pairings
    newer = replace(secure(NOW + 1, paired_at_ms=NOW + 1), inbound_link=link(7, NOW + 1))
    asyncio.run(store.add(newer))
    store.activate(older, INBOUND)
    assert store.pairings == (newer,)


def test_the_directions_of_a_pairing_have_links_of_their_own(tmp_path):
    outbound = pair(
        inbound_key=None,
        outbound_key=OTHER_KEY,
        outbound_link=link(4, NOW + 1),
        identity_key=OTHER_KEY,
        speaks_noise=True,
    )
    store = open_store(tmp_path, secure(), outbound)
    (both,) = store.pairings
    assert (both.get_link(INBOUND), both.get_link(OUTBOUND)) == (link(1), link(4, NOW + 1))
    assert (both.get_key(INBOUND), both.get_key(OUTBOUND)) == (KEY, OTHER_KEY)
    assert store.find_outbound("phone", None, NOW + 2) is None
    assert store.find_link(link(1).pair_id, NOW + 2) == both
    assert store.find_link(link(4).pair_id, NOW) is None, "by this one we are the consumer"
    assert store.get_state(both, NOW + 2) is PairingState.ACTIVE


def test_another_identity_under_a_known_id_inherits_nothing():
    known = secure(outbound_key=OTHER_KEY, outbound_link=link(4), base_url="http://a:1/v1", uses_t1=True)
    impostor = replace(secure(NOW), identity_key=KEY, inbound_key=OTHER_KEY)
    assert merge_pairing(known, impostor) == impostor
    same = replace(impostor, identity_key=OTHER_KEY)
    assert merge_pairing(known, same).outbound_key == OTHER_KEY


def test_a_legacy_approval_takes_the_link_of_its_direction():
    merged = merge_pairing(secure(), pair(inbound_key=OTHER_KEY))
    assert merged.inbound_link is None and merged.identity_key == OTHER_KEY and merged.speaks_noise


@pytest.mark.parametrize("direction", PairingDirection)
def test_access_is_lost_by_a_new_key_and_by_none(direction):
    name = f"{direction.value}_key"
    before = pair(inbound_key=KEY, outbound_key=KEY)
    assert has_lost_access(before, None, direction)
    assert has_lost_access(before, replace(before, **{name: OTHER_KEY}), direction)
    assert has_lost_access(before, replace(before, **{name: None}), direction)
    assert not has_lost_access(before, replace(before, inbound_link=link(), last_used_at_ms=5), direction)
    assert not has_lost_access(None, before, direction)


def test_who_spoke_noise_is_remembered_through_restarts_and_revocations(tmp_path):
    store = open_store(tmp_path, secure())
    url = "http://10.0.0.5:38883/v1"
    asyncio.run(store.note_noise_peer(url, "desk"))
    asyncio.run(store.revoke(secure().pairing_id))
    assert store.pairings == ()
    for each in (store, open_store(tmp_path)):
        assert each.has_spoken_noise("phone") and each.has_spoken_noise("desk")
        assert each.has_spoken_noise(None, url) and each.has_spoken_noise("desk", url)
        assert not each.has_spoken_noise("hub", url), "another device has got the address"
        assert not each.has_spoken_noise(None, None) and not each.has_spoken_noise("hub", "http://10.0.0.6:38883/v1")


def test_who_spoke_noise_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "NOISE_PEERS_LIMIT", 3)
    store = open_store(tmp_path)
    for number in range(5):
        asyncio.run(store.note_noise_peer(f"http://10.0.0.{number}:1/v1", f"d{number}"))
    for each in (store, open_store(tmp_path)):
        assert [number for number in range(5) if each.has_spoken_noise(f"d{number}")] == [2, 3, 4]


def test_damage_that_hits_the_nonces_keeps_the_pairings(tmp_path, caplog):
    store = open_store(tmp_path, pair())
    asyncio.run(store.close())
    for name in ("nonces.json", "nonces.json.bak"):
        (tmp_path / name).write_bytes(b"{")
    assert open_store(tmp_path).pairings == (pair(),)
    assert "could be sent again" in caplog.text


def record_calls(tmp_path, monkeypatch):
    """The system calls of one more pairing, in order."""
    store = open_store(tmp_path / "recorded", pair("old"))
    with monkeypatch.context() as patch:
        saboteur = Saboteur(patch, -1, lambda: None)
        asyncio.run(store.add(pair("new")))
    return saboteur.calls


@needs_fork
def test_killed_at_every_step_of_a_save(tmp_path, monkeypatch):
    """SIGKILL before each system call: the old pairings are there, with or without the new one, whole."""
    seen = []
    for step in range(1, len(record_calls(tmp_path, monkeypatch)) + 1):
        home = tmp_path / f"kill-{step}"
        open_store(home, pair("old"))
        pid = os.fork()
        if pid == 0:  # the child only saves, and dies of it
            try:
                store = open_store(home)
                Saboteur(pytest.MonkeyPatch(), step, lambda: os.kill(os.getpid(), signal.SIGKILL))
                asyncio.run(store.add(pair("new")))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, step
        store = open_store(home)
        assert pair("old") in store.pairings
        seen.append(len(store.pairings))
        asyncio.run(store.add(pair("next")))
        assert set(open_store(home).pairings) == {*store.pairings}
    assert set(seen) == {1, 2} and seen == sorted(seen)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_disk_that_fails_keeps_the_old_pairings(tmp_path, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    store = open_store(tmp_path, pair("old"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match="disk is full"):
            asyncio.run(store.add(pair("new")))
        assert store.pairings == (pair("old"),)
        with pytest.raises(StorageError, match="disk is full"):
            asyncio.run(store.revoke(pair("old").pairing_id))
        assert store.pairings == (), "a revocation holds whatever the disk says"
    assert open_store(tmp_path).pairings == (pair("old"),)
    asyncio.run(store.flush())
    assert open_store(tmp_path).pairings == ()


def test_a_revocation_not_yet_on_the_disk_is_not_undone_by_a_new_approval(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    store = open_store(tmp_path, pair("peer", outbound_key=OTHER_KEY))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError):
            asyncio.run(store.revoke(pair("peer").pairing_id))
    asyncio.run(store.refresh())
    assert store.pairings == ()
    asyncio.run(store.add(pair("peer")))
    assert store.pairings == open_store(tmp_path).pairings == (pair("peer"),)


WRITER = """
import sys; sys.path.insert(0, sys.argv[1])
import dvai_bridge as b, pathlib, asyncio
store = b.PairingStore(pathlib.Path(sys.argv[2]), device_id="own-device")
store.load()
for n in range(10):
    asyncio.run(store.add(b.Pairing(device_id=f"{sys.argv[3]}-{n}", app_id="app", device_name="n",
        inbound_key="A" * 43, paired_at_ms=1, last_used_at_ms=1)))
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    commands = [[sys.executable, "-c", WRITER, FOLDER, str(tmp_path), name] for name in "abc"]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert set(read_file(tmp_path)) == {("app", f"{name}-{n}") for name in "abc" for n in range(10)}


def test_what_another_process_writes_is_taken_over(tmp_path):
    """A running bridge and the command line: a revocation there ends the pairing here, and is not written back."""
    bridge, told = open_store(tmp_path, pair("one"), pair("two")), []
    bridge.subscribe(lambda before, after: told.append((before and before.device_id, after and after.device_id)))
    command_line = open_store(tmp_path)
    asyncio.run(command_line.revoke(pair("one").pairing_id))
    asyncio.run(command_line.add(pair("three")))
    bridge.note(pair("one"), base_url="http://10.0.0.1:1/v1")
    bridge.note(pair("two"), base_url="http://10.0.0.2:1/v1")
    told.clear()
    asyncio.run(bridge.refresh())
    assert sorted(told, key=str) == [("one", None), (None, "three")]
    asyncio.run(bridge.flush())
    found = read_file(tmp_path)
    assert {device for _, device in found} == {"two", "three"}
    assert found["two", "two"].base_url == "http://10.0.0.2:1/v1"


def test_a_refresh_without_a_change_reads_nothing(tmp_path, monkeypatch):
    store = open_store(tmp_path, pair())
    asyncio.run(store.refresh())
    monkeypatch.setattr(dvai_bridge, "load_file", None)
    asyncio.run(store.refresh())
    assert store.pairings == (pair(),)


def test_the_count_is_bounded_and_nothing_is_dropped_for_a_new_one(tmp_path, monkeypatch):
    assert PAIRINGS_LIMIT == 256
    monkeypatch.setattr(dvai_bridge, "PAIRINGS_LIMIT", 2)
    store = open_store(tmp_path, pair("one"), pair("two"))
    with pytest.raises(StorageError, match="pair revoke"):
        asyncio.run(store.add(pair("three")))
    asyncio.run(store.add(pair("two", inbound_key=OTHER_KEY)))
    assert [each.inbound_key for each in open_store(tmp_path).pairings] == [KEY, OTHER_KEY]


def test_a_copied_home_uses_none_of_the_pairings_and_keeps_them(tmp_path, caplog):
    open_store(tmp_path, pair())
    assert open_store(tmp_path, device_id="clone").pairings == ()
    assert "another device's" in caplog.text
    (kept,) = (path for path in tmp_path.glob("pairings.json.of-*") if path.suffix != ".bak")
    assert parse_pairings(kept.read_bytes()).records == {pair().key: pair()}
    store = open_store(tmp_path, pair("new"), device_id="clone")
    assert open_store(tmp_path, device_id="clone").pairings == store.pairings == (pair("new"),)


def test_a_bridge_whose_home_was_taken_over_does_not_write_into_it(tmp_path):
    store = open_store(tmp_path, pair())
    open_store(tmp_path, device_id="clone")
    with pytest.raises(StorageError, match="another device"):
        asyncio.run(store.add(pair("new")))


# ---- expiry and clocks ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("days", "state"),
    [(0, "active"), (29.9, "active"), (30, "active"), (30.1, "expired"), (400, "expired"), (-40, "active")],
)
def test_expiry_is_by_the_last_use(tmp_path, days, state):
    store = open_store(tmp_path, pair(outbound_key=OTHER_KEY))
    now_ms = NOW + round(days * DAY_MS)
    assert store.get_state(store.pairings[0], now_ms).value == state
    found = {store.find_inbound("phone", "phone", now_ms), store.find_outbound("phone", None, now_ms)}
    assert found == ({store.pairings[0]} if state == "active" else {None})


@pytest.mark.parametrize("days", [-40, 40])
def test_a_wrong_clock_deletes_nothing_and_is_healed_by_the_next_use(tmp_path, days):
    store, wrong = open_store(tmp_path, pair(), pair("other")), NOW + days * DAY_MS
    before = read_file(tmp_path)
    store.find_inbound("phone", "phone", wrong)
    asyncio.run(store.flush())
    assert read_file(tmp_path) == before
    store.note_use(pair(), wrong)
    store.note_use(pair(), NOW)
    asyncio.run(store.close())
    assert read_file(tmp_path) == before
    assert open_store(tmp_path).find_inbound("phone", "phone", NOW) == pair()


def test_uses_are_written_seldom(tmp_path):
    store = open_store(tmp_path, pair())
    stamp = (tmp_path / "pairings.json").stat().st_mtime_ns
    for ms in range(0, LAST_USE_GRAIN_MS, LAST_USE_GRAIN_MS // 10):
        store.note_use(pair(), NOW + ms)
        asyncio.run(store.flush())
    assert (tmp_path / "pairings.json").stat().st_mtime_ns == stamp
    store.note_use(pair(), NOW + LAST_USE_GRAIN_MS)
    assert store.pairings[0].last_used_at_ms == NOW + LAST_USE_GRAIN_MS
    assert (tmp_path / "pairings.json").stat().st_mtime_ns == stamp
    asyncio.run(store.flush())
    assert read_file(tmp_path)["phone", "phone"].last_used_at_ms == NOW + LAST_USE_GRAIN_MS


def test_a_note_does_not_outlive_its_pairing(tmp_path):
    store, other = open_store(tmp_path, pair()), open_store(tmp_path)
    store.note(pair(), is_marked_unauthorized=True)
    asyncio.run(other.add(pair(paired_at_ms=NOW + 1, inbound_key=OTHER_KEY)))
    asyncio.run(store.flush())
    assert read_file(tmp_path)["phone", "phone"] == pair(paired_at_ms=NOW + 1, inbound_key=OTHER_KEY)
    store.note(pair("unknown"), is_marked_unauthorized=True)


def test_what_is_noted_during_a_save_is_in_the_next_one(tmp_path, monkeypatch):
    store, real = open_store(tmp_path, pair(), pair("revoked")), dvai_bridge.update_file

    def note_meanwhile(*args):
        real(*args)
        store.note(pair(), base_url="http://10.0.0.2:1/v1")
        monkeypatch.setattr(dvai_bridge, "update_file", real)

    store.note(pair(), base_url="http://10.0.0.1:1/v1")
    monkeypatch.setattr(dvai_bridge, "update_file", note_meanwhile)
    asyncio.run(store.flush())
    assert read_file(tmp_path)["phone", "phone"].base_url == "http://10.0.0.1:1/v1"
    assert store.find_record("phone", "phone").base_url == "http://10.0.0.2:1/v1"
    asyncio.run(store.flush())
    assert read_file(tmp_path)["phone", "phone"].base_url == "http://10.0.0.2:1/v1"


# ---- listeners ------------------------------------------------------------------------


def test_listeners_hear_of_everything_but_mere_uses(tmp_path, caplog):
    store, told = open_store(tmp_path), []
    store.subscribe(lambda before, after: 1 / 0)
    unsubscribe = store.subscribe(lambda before, after: told.append((before, after)))
    asyncio.run(store.add(pair()))
    store.note_use(pair(), NOW + 2 * LAST_USE_GRAIN_MS)
    asyncio.run(store.flush())
    asyncio.run(store.refresh())
    assert told == [(None, pair())] and "a listener failed" in caplog.text
    used = store.pairings[0]
    asyncio.run(store.add(pair(inbound_key=OTHER_KEY)))
    asyncio.run(store.revoke(used.pairing_id))
    assert told[1:] == [(used, pair(inbound_key=OTHER_KEY)), (pair(inbound_key=OTHER_KEY), None)]
    unsubscribe()
    asyncio.run(store.add(pair()))
    assert len(told) == 3
    assert asyncio.run(store.revoke("unknown")) is None


def test_who_has_lost_access():
    both = pair(outbound_key=OTHER_KEY)
    assert has_lost_access(both, None) and has_lost_access(both, pair(inbound_key=OTHER_KEY))
    assert not has_lost_access(None, both) and not has_lost_access(both, pair(base_url="http://10.0.0.1:1/v1"))
    assert not has_lost_access(pair(inbound_key=None, outbound_key=KEY), None)


def test_maintenance_reads_and_writes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dvai_bridge, "PAIRINGS_REFRESH_INTERVAL_S", 0.001)
    monkeypatch.setattr(dvai_bridge, "PAIRINGS_FLUSH_INTERVAL_S", 0.002)
    store, other = open_store(tmp_path, pair()), open_store(tmp_path)

    async def until(condition):
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.001)

    async def run():
        task = asyncio.create_task(store.maintain())
        store.note(pair(), base_url="http://10.0.0.1:1/v1")
        await until(lambda: read_file(tmp_path)["phone", "phone"].base_url)
        await other.add(pair("new"))
        await until(lambda: len(store.pairings) == 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: os.close(-1))
            store.note(pair(), base_url="http://10.0.0.2:1/v1")
            await until(lambda: "cannot save" in caplog.text)
        await until(lambda: read_file(tmp_path)["phone", "phone"].base_url == "http://10.0.0.2:1/v1")
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(run())


# ---- pairings of other software -------------------------------------------------------

FOREIGN = {
    "peerDeviceId": "iphone",
    "peerDeviceName": "Ann's iPhone",
    "pairingKey": KEY,
    "pairedAt": NOW - 5,
    "lastUsedAt": NOW,
    "via": "lan-handshake",
}
IMPORTED = pair("iphone", device_name="Ann's iPhone", paired_at_ms=NOW - 5)


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: list(rows.values()), lambda rows: {"pairings": rows}])
def test_pairings_of_other_software_are_taken_over_once(tmp_path, wrap):
    rows = {
        "iphone": FOREIGN,
        "iphone/app": FOREIGN | {"appId": "app.chat", "pairingKey": OTHER_KEY},
        "no key": {name: value for name, value in FOREIGN.items() if name != "pairingKey"},
        "bad key": FOREIGN | {"peerDeviceId": "x", "pairingKey": "AAAA"},
        "bad id": FOREIGN | {"peerDeviceId": 5},
        "bad time": FOREIGN | {"peerDeviceId": "y", "pairedAt": "yesterday"},
        "not a record": 7,
    }
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps(wrap(rows), indent=2))
    with_app = pair("iphone", "app.chat", device_name="Ann's iPhone", paired_at_ms=NOW - 5, inbound_key=OTHER_KEY)
    store = PairingStore(tmp_path / "data", device_id=OWN)
    store.load(foreign)
    assert set(store.pairings) == {IMPORTED, with_app}
    asyncio.run(store.revoke(IMPORTED.pairing_id))
    asyncio.run(store.revoke(with_app.pairing_id))
    again = PairingStore(tmp_path / "data", device_id=OWN)
    again.load(foreign)
    assert again.pairings == ()
    assert json.loads(foreign.read_text()) == wrap(rows)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"5", b"\xff", b"[" * 100_000])
def test_a_foreign_file_that_is_none_is_left_alone(tmp_path, content, caplog):
    (tmp_path / "foreign.json").write_bytes(content)
    store = PairingStore(tmp_path / "data", device_id=OWN)
    store.load(tmp_path / "foreign.json")
    assert store.pairings == () and "cannot be taken over" in caplog.text
    assert (tmp_path / "foreign.json").read_bytes() == content
    store.load(tmp_path / "absent.json")


def test_a_foreign_file_in_our_place_is_read_as_one(tmp_path):
    (tmp_path / "pairings.json").write_text(json.dumps({"iphone": FOREIGN}))
    store = open_store(tmp_path)
    assert store.pairings == (IMPORTED,)
    asyncio.run(store.add(pair()))
    assert set(open_store(tmp_path).pairings) == {IMPORTED, pair()}


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"HOME": "/h"}, "/h/.cache/dvai-bridge/pairings.json"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/dvai-bridge/pairings.json"),
        ({"LOCALAPPDATA": "/l", "HOME": "/h"}, "/l/dvai-bridge/pairings.json"),
        ({}, None),
    ],
)
def test_where_other_software_keeps_its_pairings(environ, path):
    assert choose_foreign_pairings_path(environ) == (path and Path(path))


# ---- signed requests ------------------------------------------------------------------


class Caller:
    """A peer that signs requests to a bridge, each part of them ours to change."""

    def __init__(self, directory, *pairings):
        self.store = open_store(directory)
        if not self.store.pairings:
            self.store = open_store(directory, *(pairings or (pair(),)))
        self.verifier = SignatureVerifier(self.store)

    def send(self, *, now_ms=NOW, query="", received=None, **changes):
        """The pairing that the bridge finds for a request signed with `changes`, sent as `received` says."""
        signed = {
            "pairing_key": KEY,
            "device_id": "phone",
            "app_id": None,
            "method": "POST",
            "path": PATH,
            "body": BODY,
        }
        signed["nonce"] = generate_nonce("phone", OWN, NOW)
        signed |= changes
        headers = {name.lower(): value for name, value in build_signed_headers(**signed)}
        sent = {name: signed[name] for name in ("method", "path", "body")} | (received or {})
        headers |= sent.pop("headers", {})
        signature = parse_signature_headers(dvai_bridge.Headers(list(headers.items())))
        return self.verifier.verify(signature, query=query, now_ms=now_ms, **sent)


@pytest.fixture
def caller(tmp_path):
    return Caller(tmp_path)


def test_a_good_request_names_its_pairing_and_counts_as_a_use(caller):
    assert (
        caller.send(now_ms=NOW + LAST_USE_GRAIN_MS, nonce=generate_nonce("phone", OWN, NOW + LAST_USE_GRAIN_MS))
        == pair()
    )
    assert caller.store.pairings[0].last_used_at_ms == NOW + LAST_USE_GRAIN_MS


@pytest.mark.parametrize(
    "changes",
    [
        {"received": {"method": "GET"}},
        {"received": {"path": "/v1/completions"}},
        {"received": {"path": "/v1/chat/completion%73"}},
        {"received": {"body": BODY + b" "}},
        {"received": {"body": b""}},
        {"received": {"headers": {"x-dvai-peer-device-id": "tablet"}}},
        {"received": {"headers": {"x-dvai-app-id": "app.other"}}},
        {"received": {"headers": {"x-dvai-nonce": generate_nonce("phone", OWN, NOW)}}},
        {"received": {"headers": {"x-dvai-signature": "A" * 43}}},
        {"received": {"headers": {"x-dvai-signature": "0" * 64}}},
        {"received": {"headers": {"x-dvai-signature": "not a signature"}}},
        {"query": "debug=1"},
        {"pairing_key": OTHER_KEY},
        {"device_id": "stranger"},
        {"app_id": "app.unknown"},
        {"nonce": generate_nonce("phone", "another-device", NOW)},
        {"nonce": generate_nonce("another-device", OWN, NOW)},
        {"nonce": generate_nonce(OWN, "phone", NOW)},
        {"nonce": "t1.malformed"},
    ],
)
def test_every_wrong_request_gets_the_same_answer(caller, changes):
    with pytest.raises(SignatureError) as caught:
        caller.send(**changes)
    assert type(caught.value) is SignatureError
    assert build_error_body(caught.value) == build_error_body(SignatureError())
    assert caller.send() == pair(), "the wrong one has spoilt nothing"


def test_a_stranger_costs_as_much_as_a_wrong_key(caller, monkeypatch):
    done, real = [], dvai_bridge.hmac.digest
    monkeypatch.setattr(dvai_bridge.hmac, "digest", lambda *args: done.append(len(args[0])) or real(*args))
    costs = []
    for changes in (
        {"pairing_key": OTHER_KEY},
        {"device_id": "stranger"},
        {"received": {"headers": {"x-dvai-signature": "x"}}},
    ):
        done.clear()
        with pytest.raises(SignatureError):
            caller.send(**changes)
        costs.append(list(done))
    assert costs[0] == costs[1] == costs[2] and costs[0]


def test_the_same_nonce_twice(caller):
    nonce = generate_nonce("phone", OWN, NOW)
    caller.send(nonce=nonce)
    for changes in ({}, {"body": b"{}"}, {"now_ms": NOW + 119_000}, {"now_ms": NOW - 119_000}):
        with pytest.raises(SignatureError):
            caller.send(nonce=nonce, **changes)
    assert caller.send().key == pair().key


def test_of_requests_that_race_with_one_nonce_exactly_one_wins(caller):
    nonce = generate_nonce("phone", OWN, NOW)

    async def race():
        async def send():
            await asyncio.sleep(0)
            return caller.send(nonce=nonce)

        return await asyncio.gather(*(send() for _ in range(50)), return_exceptions=True)

    outcomes = asyncio.run(race())
    assert [each.key for each in outcomes if isinstance(each, Pairing)] == [pair().key]
    assert sum(isinstance(each, SignatureError) for each in outcomes) == 49


@pytest.mark.parametrize(("skew_s", "is_taken"), [(-121, False), (-119, True), (0, True), (119, True), (121, False)])
def test_clocks_may_differ_by_two_minutes(caller, skew_s, is_taken):
    nonce = generate_nonce("phone", OWN, NOW + skew_s * 1000)
    if is_taken:
        assert caller.send(nonce=nonce) == pair()
        return
    with pytest.raises(ClockSkewError, match="121 s") as caught:
        caller.send(nonce=nonce)
    body = build_error_body(caught.value)["error"]
    assert (caught.value.status, body["code"], body["skewSeconds"]) == (401, "clock_skew", skew_s)


def test_only_a_good_signature_learns_of_its_clock(caller):
    nonce = generate_nonce("phone", OWN, NOW - 40 * DAY_MS)
    for changes in (
        {"pairing_key": OTHER_KEY},
        {"received": {"body": b"x"}},
        {"device_id": "stranger"},
        {"query": "a"},
    ):
        with pytest.raises(SignatureError) as caught:
            caller.send(nonce=nonce, **changes)
        assert type(caught.value) is SignatureError


def test_a_request_is_not_taken_back_by_its_sender(tmp_path):
    """Both directions under one key, as a pairing by QR makes them: the binding tells them apart."""
    one = open_store(tmp_path / "one", pair("two", outbound_key=KEY), device_id="one")
    identity = Identity(device_id="one", device_name="One")
    request = {"method": "POST", "path": PATH, "body": BODY}
    sent = sign_request(one.pairings[0], identity, app_id=None, now_ms=NOW, **request)
    reflected = dict(sent) | {"X-DVAI-Peer-Device-Id": "two", "X-DVAI-App-Id": "two"}

    def receive(store, headers):
        signature = parse_signature_headers(
            dvai_bridge.Headers([(name.lower(), text) for name, text in headers.items()])
        )
        return SignatureVerifier(store).verify(signature, query="", now_ms=NOW, **request)

    for headers in (dict(sent), reflected):
        with pytest.raises(SignatureError):
            receive(one, headers)
    two = open_store(tmp_path / "two", pair("one"), device_id="two")
    assert receive(two, dict(sent)) == pair("one")


@pytest.mark.parametrize(
    "pairing",
    [
        pair(last_used_at_ms=NOW - 31 * DAY_MS),
        pair(inbound_key=None, outbound_key=KEY),
        pair("phone", "app.other"),
    ],
    ids=["expired", "only we may use it", "another app"],
)
def test_pairings_that_do_not_count(tmp_path, pairing):
    with pytest.raises(SignatureError):
        Caller(tmp_path, pairing).send()


def test_a_revoked_pairing_counts_no_more(caller):
    caller.send()
    asyncio.run(caller.store.revoke(pair().pairing_id))
    with pytest.raises(SignatureError):
        caller.send()


def test_a_request_of_ours_needs_the_right_to_use_the_peer():
    with pytest.raises(ValueError, match="does not let us"):
        sign_request(
            pair(), Identity(device_id=OWN, device_name="x"), app_id=None, method="GET", path="/", body=b"", now_ms=NOW
        )


def test_other_nonces_only_until_the_first_t1(caller):
    assert caller.send(nonce="AAECAwQFBgcICQoLDA0ODw", now_ms=NOW + 20 * DAY_MS) == pair()
    for now_ms in (NOW, NOW + 25 * DAY_MS):
        with pytest.raises(SignatureError):
            caller.send(nonce="AAECAwQFBgcICQoLDA0ODw", now_ms=now_ms)
    assert caller.send(nonce="another").key == pair().key
    assert caller.send().key == pair().key
    with pytest.raises(SignatureError):
        caller.send(nonce="third")
    asyncio.run(caller.store.flush())
    assert open_store(caller.store._path.parent).pairings[0].uses_t1


@pytest.mark.parametrize("is_timed", [True, False])
def test_no_replay_after_a_restart(tmp_path, is_timed):
    """A stop keeps all nonces; so does `flush` those that have no time."""
    caller = Caller(tmp_path)
    nonce = generate_nonce("phone", OWN, NOW) if is_timed else "AAECAwQFBgcICQoLDA0ODw"
    caller.send(nonce=nonce)
    asyncio.run(caller.store.close() if is_timed else caller.store.flush())
    again = Caller(tmp_path)
    with pytest.raises(SignatureError):
        again.send(nonce=nonce)
    assert again.send().key == pair().key


def test_a_flood_of_good_requests_is_bounded(caller, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "TIMED_NONCES_PER_PAIRING_LIMIT", 3)
    for _ in range(3):
        caller.send()
    with pytest.raises(OverloadedError):
        caller.send()
    later = NOW + 200_000
    assert caller.send(now_ms=later, nonce=generate_nonce("phone", OWN, later)).key == pair().key


def test_no_error_shows_a_key(caller):
    for changes in ({"pairing_key": OTHER_KEY}, {"nonce": generate_nonce("phone", OWN, 1)}):
        with pytest.raises(BridgeError) as caught:
            caller.send(**changes)
        assert KEY not in repr(caught.value) and OTHER_KEY not in repr(caught.value)
