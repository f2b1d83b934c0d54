"""Section Routing: peers and their JSON, candidates, the decision."""

import pytest

from dvai_bridge import (
    Peer,
    PeerVia,
    build_peer_json,
    encode_json,
    parse_base_url,
    parse_json,
    parse_peer_json,
)

PEER_JSON = {
    "deviceId": "AAECAwQFBgcICQoLDA0ODw",
    "deviceName": "Mac Studio M4 Max",
    "dvaiVersion": "3.2.1",
    "baseUrl": "http://192.168.1.20:38883/v1",
    "appId": "com.example.notes",
    "loadedModels": ["Llama-3.2-3B-Instruct-Q4_K_M"],
    "capability": {"Llama-3.2-3B-Instruct-Q4_K_M": 62.5},
    "via": "mdns",
    "secure": False,
    "lastSeenAt": 1_700_000_000_000,
}


def test_a_peer_travels_as_json_and_back():
    peer = parse_peer_json(parse_json(encode_json(PEER_JSON)))
    assert peer.via is PeerVia.MDNS and peer.loaded_models == ("Llama-3.2-3B-Instruct-Q4_K_M",)
    assert build_peer_json(peer) == PEER_JSON
    assert list(build_peer_json(peer)) == list(PEER_JSON)


def test_a_peer_without_an_app_id_says_nothing_of_one():
    peer = Peer(
        device_id="d", device_name="D", dvai_version="", base_url="http://h/v1", via=PeerVia.CUSTOM, last_seen_ms=0
    )
    shown = build_peer_json(peer)
    assert "appId" not in shown and shown["loadedModels"] == [] and shown["capability"] == {}
    assert parse_peer_json(shown) == peer


def test_the_least_a_peer_must_say():
    peer = parse_peer_json({"deviceId": "d", "baseUrl": "http://10.0.0.7:38883"}, via=PeerVia.STATIC)
    assert (peer.device_name, peer.base_url, peer.via) == ("d", "http://10.0.0.7:38883/v1", PeerVia.STATIC)


def test_who_learnt_of_a_peer_knows_how():
    assert parse_peer_json(PEER_JSON, via=PeerVia.CUSTOM).via is PeerVia.CUSTOM


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"deviceId": None}, "deviceId"),
        ({"deviceId": ""}, "deviceId"),
        ({"deviceId": "x" * 129}, "deviceId"),
        ({"deviceId": "two\nlines"}, "deviceId"),
        ({"deviceId": 7}, "deviceId"),
        ({"appId": "\x00"}, "appId"),
        ({"baseUrl": None}, "baseUrl"),
        ({"baseUrl": "ftp://h"}, "http"),
        ({"via": "carrier pigeon"}, "via"),
        ({"via": []}, "via"),
        ({"via": None}, "via"),
    ],
)
def test_a_peer_that_cannot_be_addressed_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        parse_peer_json(PEER_JSON | change)


@pytest.mark.parametrize("value", [None, [], "x", 7])
def test_what_is_no_object_is_no_peer(value):
    with pytest.raises(ValueError, match="object"):
        parse_peer_json(value)


@pytest.mark.parametrize(
    ("change", "member", "expected"),
    [
        ({"loadedModels": "model"}, "loaded_models", ()),
        ({"loadedModels": ["a", 7, None, "", "two\nlines", "x" * 257, "b"]}, "loaded_models", ("a", "b")),
        ({"loadedModels": ["m"] * 1000}, "loaded_models", ("m",) * 128),
        ({"capability": ["a"]}, "capability", {}),
        ({"capability": {"a": -1, "b": "9", "c": True, "d": 1e300, "e": 5, "": 3}}, "capability", {"e": 5.0}),
        ({"capability": {"nan": float("nan")}}, "capability", {}),
        ({"capability": {str(n): n for n in range(1000)}}, "capability", {str(n): n for n in range(128)}),
        ({"secure": 1}, "secure", False),
        ({"lastSeenAt": "yesterday"}, "last_seen_ms", 0),
        ({"lastSeenAt": -1}, "last_seen_ms", 0),
        ({"lastSeenAt": True}, "last_seen_ms", 0),
        ({"lastSeenAt": 10**30}, "last_seen_ms", 0),
        ({"deviceName": 7}, "device_name", PEER_JSON["deviceId"]),
        ({"deviceName": "n" * 1000}, "device_name", "n" * 256),
        ({"dvaiVersion": None}, "dvai_version", ""),
        ({"unknown": {}}, "secure", False),
    ],
)
def test_what_a_peer_merely_claims_is_bounded(change, member, expected):
    assert getattr(parse_peer_json(PEER_JSON | change), member) == expected


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h:38883", "http://h:38883/v1"),
        ("http://h:38883/", "http://h:38883/v1"),
        ("http://h:38883/v1", "http://h:38883/v1"),
        ("http://h:38883/v1/", "http://h:38883/v1"),
        ("HTTP://Mac.LOCAL:38883/v1", "http://mac.local:38883/v1"),
        ("https://h", "https://h/v1"),
        ("https://h/bridge", "https://h/bridge/v1"),
        ("http://[FE80::1]:38883", "http://[fe80::1]:38883/v1"),
        ("http://[fe80::1%eth0]:38883", "http://[fe80::1%eth0]:38883/v1"),
    ],
)
def test_base_urls_have_one_form(text, url):
    assert parse_base_url(text) == url
    assert parse_base_url(url) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:38883",
        "//h",
        "ws://h",
        "http://",
        "http:///v1",
        "http://user:secret@h",
        "http://h?key=1",
        "http://h#f",
        "http://h:99999",
        "http://h:x",
        "http://a b",
        "http://h\\v1",
        "http://h\r\nX: y",
        "http://" + "h" * 1100,
        "http://[::1",
    ],
)
def test_what_is_no_base_url(text):
    with pytest.raises(ValueError):
        parse_base_url(text)
