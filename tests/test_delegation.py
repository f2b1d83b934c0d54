"""Delegation by public key: keys, firewalls and their file, and what a consumer may ask for."""

import asyncio
import json

import pytest

import dvai_bridge as d
from dvai_bridge import (
    Delegation,
    DelegationConfig,
    Firewall,
    FirewallMode,
    FirewallStore,
    StorageError,
    UsageError,
    build_firewall_json,
    choose_delegation,
    choose_firewall,
    encode_base64url,
    parse_delegation,
    parse_firewall_json,
    parse_public_key,
)

BACKEND = d.OwnBackend()
KEYS = [d.build_key_pair(bytes([number]) * 32, BACKEND).public for number in (1, 2, 3)]
ONE, TWO, THREE = map(encode_base64url, KEYS)
NO_KEYS = {
    "empty": "",
    "short": ONE[:-1],
    "long": ONE + "A",
    "padded": ONE + "=",
    "hex of 31 bytes": "ab" * 31,
    "not canonical base64url": ONE[:-1] + ("B" if ONE[-1] != "B" else "C"),
    "other alphabet": "+" + ONE[1:],
    "zero": encode_base64url(bytes(32)),
    "one": encode_base64url(b"\1" + bytes(31)),
    "above the prime": encode_base64url(b"\xff" * 32),
    "of the twist": encode_base64url(bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")),
}


@pytest.mark.parametrize("text", [ONE, KEYS[0].hex(), KEYS[0].hex().upper()])
def test_a_public_key_has_two_spellings(text):
    assert parse_public_key(text) == KEYS[0]


@pytest.mark.parametrize("text", NO_KEYS.values(), ids=NO_KEYS)
def test_what_is_no_public_key(text):
    with pytest.raises(ValueError):
        parse_public_key(text)


@pytest.mark.parametrize(
    ("mode", "keys", "admitted"),
    [
        ("allow", [], []),
        ("allow", [0], [0]),
        ("allow", [0, 1], [0, 1]),
        ("deny", [], [0, 1, 2]),
        ("deny", [0], [1, 2]),
    ],
)
def test_whom_a_firewall_admits(mode, keys, admitted):
    firewall = Firewall(mode=FirewallMode(mode), public_keys=frozenset(KEYS[number] for number in keys))
    assert [number for number, key in enumerate(KEYS) if firewall.admits(key)] == admitted
    assert parse_firewall_json(json.loads(json.dumps(build_firewall_json(firewall)))) == firewall
    assert firewall.describe()


def test_who_says_nothing_admits_nobody():
    assert not any(map(Firewall().admits, KEYS)) and Firewall().describe() == "nobody"
    assert parse_firewall_json({}) == Firewall()
    assert parse_firewall_json({"mode": "allow", "public_keys": [ONE]}).admits(KEYS[0])  # as Python spells it


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "allow",
        {"mode": "open"},
        {"mode": None},
        {"mode": ["allow"]},
        {"publicKeys": ONE},
        {"publicKeys": [1]},
        {"publicKeys": {ONE: 1}},
        {"publicKeys": [ONE, NO_KEYS["zero"]]},
        {"mode": "deny", "keys": [ONE]},
    ],
    ids=repr,
)
def test_what_is_no_firewall(value):
    with pytest.raises(ValueError):
        parse_firewall_json(value)


def test_a_firewall_is_bounded():
    many = [encode_base64url(number.to_bytes(32, "little")) for number in range(2, d.FIREWALL_KEYS_LIMIT + 3)]
    assert len(parse_firewall_json({"publicKeys": many[:-1]}).public_keys) == d.FIREWALL_KEYS_LIMIT
    with pytest.raises(ValueError, match="at most"):
        parse_firewall_json({"publicKeys": many})


@pytest.mark.parametrize(
    ("options", "firewall"),
    [
        ({}, None),
        ({"allow": (ONE, TWO)}, Firewall(public_keys=frozenset(KEYS[:2]))),
        ({"is_open": True}, Firewall(mode=FirewallMode.DENY)),
        ({"is_open": True, "deny": (ONE,)}, Firewall(mode=FirewallMode.DENY, public_keys=frozenset(KEYS[:1]))),
    ],
)
def test_the_firewall_of_the_options(options, firewall):
    assert choose_firewall(DelegationConfig(**options)) == firewall


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deny": (ONE,)}, "--open"),
        ({"allow": (ONE,), "is_open": True}, "--allow"),
        ({"allow": (ONE,), "deny": (TWO,)}, "--allow"),
        ({"allow": (NO_KEYS["zero"],)}, "--allow: this public key is of low order"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(UsageError) as caught:
        choose_firewall(DelegationConfig(**options))
    assert message in caught.value.message and caught.value.exit_code == 2


# The file


def load(directory, chosen=None):
    store = FirewallStore(directory)
    store.load(chosen)
    return store


def test_a_firewall_outlives_its_process(tmp_path):
    assert load(tmp_path).firewall == Firewall()
    chosen = Firewall(public_keys=frozenset(KEYS[:1]))
    load(tmp_path, chosen)
    assert load(tmp_path).firewall == chosen
    assert (tmp_path / "firewall.json").stat().st_mode & 0o777 == 0o600


def test_another_process_changes_the_firewall(tmp_path):
    async def test():
        store, heard = load(tmp_path, Firewall(public_keys=frozenset(KEYS[:1]))), []
        store.subscribe(heard.append)
        await store.refresh()
        assert heard == []
        load(tmp_path, Firewall(public_keys=frozenset(KEYS[1:2])))
        await store.refresh()
        assert [each.public_keys for each in heard] == [frozenset(KEYS[1:2])] and store.firewall is heard[0]
        await store.save(Firewall(mode=FirewallMode.DENY))
        await store.refresh()
        assert len(heard) == 2 and load(tmp_path).firewall == store.firewall

    asyncio.run(test())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"mode":"allow","publicKeys":["x"]}', b'{"mode":"open"}'])
def test_a_spoilt_file_changes_nothing(tmp_path, data, caplog):
    async def test():
        chosen = Firewall(public_keys=frozenset(KEYS[:1]))
        store, heard = load(tmp_path, chosen), []
        store.subscribe(heard.append)
        (tmp_path / "firewall.json").write_bytes(data)
        await store.refresh()
        assert store.firewall == chosen and heard == [] and "stays in force" in caplog.text
        (tmp_path / "firewall.json").unlink()
        await store.refresh()
        assert store.firewall == chosen

    asyncio.run(test())


def test_a_provider_does_not_start_with_a_spoilt_firewall(tmp_path):
    (tmp_path / "firewall.json").write_text("{")
    with pytest.raises(StorageError):
        load(tmp_path)


def test_a_firewall_that_cannot_be_kept_is_no_firewall(tmp_path):
    (tmp_path / "data").write_text("no directory")
    with pytest.raises(StorageError):
        load(tmp_path / "data", Firewall())


# What a consumer asks for


@pytest.mark.parametrize(
    ("value", "delegation"),
    [
        (ONE, Delegation(providers=(KEYS[0],))),
        (KEYS[0].hex(), Delegation(providers=(KEYS[0],))),
        ([ONE, TWO, ONE], Delegation(providers=tuple(KEYS[:2]))),
        ({"providerPublicKey": ONE}, Delegation(providers=(KEYS[0],), timeout_s=60.0)),
        (
            {"providerPublicKey": ONE, "timeout": 1500, "fallbackToLocal": True, "forceNewConnection": True},
            Delegation(providers=(KEYS[0],), timeout_s=1.5, falls_back=True, is_fresh=True),
        ),
        (
            {"provider_public_key": ONE, "timeout": 2e3, "fallback_to_local": False, "force_new_connection": True},
            Delegation(providers=(KEYS[0],), timeout_s=2.0, is_fresh=True),
        ),
    ],
)
def test_delegations(value, delegation):
    assert parse_delegation(value) == delegation


@pytest.mark.parametrize(
    "value",
    [
        True,
        7,
        "",
        [],
        {},
        [ONE, 7],
        [ONE] * (d.PROVIDERS_LIMIT + 1),
        {"providerPublicKey": NO_KEYS["zero"]},
        {"providerPublicKey": None},
        {"providerPublicKey": ONE, "timeout": 0},
        {"providerPublicKey": ONE, "timeout": "60000"},
        {"providerPublicKey": ONE, "timeout": True},
        {"providerPublicKey": ONE, "timeout": float("nan")},
        {"providerPublicKey": ONE, "timeout": 1e12},
        {"providerPublicKey": ONE, "fallbackToLocal": "yes"},
        {"providerPublicKey": ONE, "forceNewConnection": 1},
        {"providerPublicKey": ONE, "fallBackToLocal": True},
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_no_delegation(value):
    with pytest.raises(ValueError):
        parse_delegation(value)


def test_the_delegation_of_the_options():
    assert choose_delegation(DelegationConfig()) is None
    options = DelegationConfig(provider_public_keys=(ONE, TWO), fallback_to_local=True, timeout=5.0)
    assert choose_delegation(options) == Delegation(providers=tuple(KEYS[:2]), timeout_s=5.0, falls_back=True)
    for keys in ((NO_KEYS["one"],), (ONE,) * (d.PROVIDERS_LIMIT + 1)):
        with pytest.raises(UsageError, match="--delegate"):
            choose_delegation(DelegationConfig(provider_public_keys=keys))


def test_options_of_all_sources():
    config = d.build_config(flags={"delegation.provider_public_keys": [ONE, KEYS[1].hex()]}, environ={"DVAI_OPEN": "1"})
    assert config.delegation.provider_public_keys == (ONE, TWO) and config.delegation.is_open
    assert d.build_config(environ={"DVAI_DELEGATE": f"{ONE},{TWO}"}).delegation.provider_public_keys == (ONE, TWO)
    program = d.normalize_config(d.Config(delegation=DelegationConfig(allow=[KEYS[2].hex()])))
    assert program.delegation.allow == (THREE,)
    for wrong in ("x", ONE + ",", ONE + "A"):
        with pytest.raises(UsageError):
            d.build_config(flags={"delegation.allow": wrong})
