"""Section Routing: peers and their JSON, candidates, the decision."""

from dataclasses import replace

import pytest

from dvai_bridge import (
    DECISIONS_LIMIT,
    PEER_TRANSITIONS,
    Candidate,
    CoolDown,
    Handshake,
    LocalModel,
    OffloadPolicy,
    OffloadPreference,
    Peer,
    PeerEvent,
    PeerHealth,
    PeerRoute,
    PeerState,
    PeerVia,
    RouteChooser,
    RouteRequest,
    advance_peer,
    build_delegation_refusal,
    build_error_body,
    build_error_response,
    build_peer_json,
    build_refusal,
    choose_providers,
    choose_route,
    encode_json,
    parse_base_url,
    parse_forwarded,
    parse_json,
    parse_peer_json,
    parse_preference,
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
        ({"deviceName": "n" * 1000}, "device_name", "n" * 512),
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


# What a request asks for


@pytest.mark.parametrize(
    ("value", "preference"),
    [
        (None, OffloadPreference.PREFER),
        ("", OffloadPreference.PREFER),
        ("prefer", OffloadPreference.PREFER),
        ("NEVER", OffloadPreference.NEVER),
        (" never ", OffloadPreference.NEVER),
        ("Require", OffloadPreference.REQUIRE),
        ("sometimes", OffloadPreference.PREFER),
        ("never, require", OffloadPreference.PREFER),
    ],
)
def test_the_preference_of_a_request(value, preference):
    assert parse_preference(value) is preference


@pytest.mark.parametrize(
    ("value", "forwarded"), [(None, False), ("", False), (" ", False), ("0", False), ("1", True), ("true", True)]
)
def test_a_forwarded_request_is_known_by_its_field(value, forwarded):
    assert parse_forwarded(value) is forwarded


# The states of a peer


def test_every_state_and_event():
    seen, reachable, paired, ready = PeerState
    assert {
        (seen, PeerEvent.ANSWERED): reachable,
        (reachable, PeerEvent.PAIRED): paired,
        (reachable, PeerEvent.LOST): seen,
        (paired, PeerEvent.LEARNED): ready,
        (paired, PeerEvent.UNPAIRED): reachable,
        (paired, PeerEvent.LOST): seen,
        (ready, PeerEvent.UNPAIRED): reachable,
        (ready, PeerEvent.LOST): seen,
    } == PEER_TRANSITIONS
    for state in PeerState:
        for event in PeerEvent:
            assert advance_peer(state, event) is PEER_TRANSITIONS.get((state, event), state)


def test_cool_downs_double_up_to_five_minutes():
    cool, waits = CoolDown(), []
    for now_s in range(1000, 1012):
        cool = cool.fail(now_s)
        waits.append(cool.until_s - now_s)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300, 300, 300]
    assert cool.failures == 12


def test_a_peer_that_says_when_to_come_back_is_left_alone_so_long():
    assert CoolDown().fail(100, retry_after_s=30).until_s == 130
    assert CoolDown().fail(100, retry_after_s=2).until_s == 105
    assert CoolDown().fail(100, retry_after_s=1e9).until_s == 400


# The decision

M = "Llama-3.2-3B-Instruct-Q4_K_M"
OTHER = "Qwen2.5-0.5B-Instruct-Q8_0"
NOW_S = 1000.0
ON = OffloadPolicy(enabled=True, min_local_capability=10)


def make_candidate(name, score=None, *, loaded=False, via=PeerVia.MDNS, **changes):
    """A paired and ready peer that has M; `score` None: it advertises none."""
    peer = Peer(
        device_id=f"id-{name}",
        device_name=name,
        dvai_version="4.0.0",
        base_url=f"http://{name}:38883/v1",
        via=via,
        last_seen_ms=0,
        loaded_models=(M,) if loaded else (),
        capability={} if score is None else {M: score},
    )
    candidate = Candidate(peer=peer, state=PeerState.READY, has_pairing=True, models=(M,))
    return replace(candidate, **changes)


def make_unpaired(name, score=None, **changes):
    """A peer that answers, and knows nothing of us."""
    changes = {"state": PeerState.REACHABLE, "has_pairing": False, "models": None} | changes
    return make_candidate(name, score, **changes)


def rename(candidate, name):
    return replace(candidate, peer=replace(candidate.peer, device_name=name))


def decide(local, candidates, policy=ON, model=M, now_s=NOW_S, **request):
    if isinstance(local, int | float):
        local = [LocalModel(model_id=M, score=local)]
    return choose_route(policy, RouteRequest(model=model, **request), local, candidates, now_s)


def name_targets(decision):
    return [target.peer.device_name if target.peer else "here" for target in decision.targets]


NEVER = {"preference": OffloadPreference.NEVER}
REQUIRE = {"preference": OffloadPreference.REQUIRE}
FORWARDED = {"is_forwarded": True}
MAC, PI = make_candidate("mac", 60), make_candidate("pi", 3)
HUB = make_candidate("hub", None, models=None)
LOADED_HUB = make_candidate("hub", None, models=None, loaded=True)
NOTHING = []

DECISIONS = [
    # 1. offload off, never, or forwarded: here
    ("off", 4, [MAC], {"policy": OffloadPolicy()}, ["here"]),
    ("off, without an engine", NOTHING, [MAC], {"policy": OffloadPolicy()}, []),
    ("never", 4, [MAC], NEVER, ["here"]),
    ("never, a model that is not here", 4, [MAC], NEVER | {"model": OTHER}, ["here"]),
    ("never, without an engine", NOTHING, [MAC], NEVER, []),
    ("forwarded", 4, [MAC], FORWARDED, ["here"]),
    ("forwarded beats require", 4, [MAC], FORWARDED | REQUIRE, ["here"]),
    ("forwarded, without an engine", NOTHING, [MAC], FORWARDED, []),
    # 2. who is a candidate
    ("not paired", 4, [make_unpaired("mac", 60)], {}, ["here"]),
    ("paired, nothing learned yet", 4, [replace(MAC, state=PeerState.PAIRED)], {}, ["mac", "here"]),
    ("seen only", 4, [replace(MAC, state=PeerState.SEEN, error="timeout after 3 s")], {}, ["here"]),
    ("loading", 4, [replace(MAC, health=PeerHealth.LOADING)], {}, ["here"]),
    ("broken", 4, [replace(MAC, health=PeerHealth.DEGRADED)], {}, ["here"]),
    ("scores 0", 4, [make_candidate("mac", 0)], {}, ["here"]),
    ("has other models", 4, [replace(MAC, models=(OTHER,))], {}, ["here"]),
    ("says that it has none", 4, [replace(HUB, models=())], {}, ["here"]),
    ("cooling down", 4, [replace(MAC, cool_down=CoolDown(failures=1, until_s=NOW_S + 1))], {}, ["here"]),
    ("cooled down", 4, [replace(MAC, cool_down=CoolDown(failures=1, until_s=NOW_S))], {}, ["mac", "here"]),
    ("model names differ in case", 4, [MAC], {"model": M.upper()}, ["mac", "here"]),
    # 2. an unknown score counts as the minimum, behind every known one that is as good
    ("a hub that advertises none", 4, [HUB], {}, ["hub", "here"]),
    ("a hub meets the minimum", 4, [HUB], REQUIRE, ["hub"]),
    ("a hub behind an equal known score", 4, [HUB, make_candidate("b", 10)], {}, ["b", "hub", "here"]),
    ("a hub before a known score below it", 4, [make_candidate("b", 9.9), HUB], {}, ["hub", "b", "here"]),
    (
        "a hub with the model loaded, behind a known score",
        4,
        [make_candidate("hub", None, loaded=True), make_candidate("b", 10)],
        {},
        ["b", "hub", "here"],
    ),
    (
        "of two unknown ones, the loaded",
        4,
        [make_candidate("a"), make_candidate("b", None, loaded=True)],
        {},
        ["b", "a", "here"],
    ),
    # 2. effective score
    ("a queue", 4, [replace(MAC, waiting=5, slots=1), make_candidate("b", 20)], {}, ["b", "mac", "here"]),
    (
        "a queue over many slots",
        4,
        [replace(MAC, waiting=5, slots=8), make_candidate("b", 20)],
        {},
        ["mac", "b", "here"],
    ),
    ("running requests are no queue", 4, [replace(MAC, running=8), make_candidate("b", 20)], {}, ["mac", "b", "here"]),
    ("a queue that makes it slower than here", 4, [replace(MAC, waiting=19, slots=1)], {}, ["here"]),
    ("a queue that leaves it below the minimum", 4, [replace(MAC, waiting=9, slots=1)], REQUIRE, []),
    # 2. order: loaded, score, via
    ("loaded first", 4, [make_candidate("a", 90), make_candidate("b", 20, loaded=True)], {}, ["b", "a", "here"]),
    ("then the score", 4, [make_candidate("a", 20), make_candidate("b", 90)], {}, ["b", "a", "here"]),
    (
        "then the way it was found",
        4,
        [make_candidate(via.value, 50, via=via) for via in reversed(PeerVia)],
        {},
        ["mdns", "static", "custom", "rendezvous", "here"],
    ),
    # 3. require
    ("require, fast enough", 4, [MAC], REQUIRE, ["mac"]),
    ("require, exactly the minimum", 4, [make_candidate("a", 10)], REQUIRE, ["a"]),
    ("require, below the minimum", 4, [make_candidate("a", 9.9)], REQUIRE, []),
    ("require, with a fast engine here", 80, [MAC], REQUIRE, ["mac"]),
    ("require, nobody", 80, [], REQUIRE, []),
    ("require passes over a slow loaded one", 4, [make_candidate("a", 5, loaded=True), MAC], REQUIRE, ["mac"]),
    # 4. prefer
    ("fast enough here", 24, [MAC], {}, ["here"]),
    ("exactly fast enough here", 10, [MAC], {}, ["here"]),
    ("slow here, a faster peer", 4, [MAC], {}, ["mac", "here"]),
    ("slow here, a slower peer", 4, [PI], {}, ["here"]),
    ("slow here, a peer as slow", 3, [PI], {}, ["here"]),
    ("slow here, a peer below the minimum that is faster", 2, [PI], {}, ["pi", "here"]),
    ("slow here, nobody", 4, [], {}, ["here"]),
    ("unknown here, any peer", [LocalModel(model_id=M)], [PI], {}, ["pi", "here"]),
    ("another model here", [LocalModel(model_id=OTHER, score=50)], [PI], {}, ["pi"]),
    ("another model here, nobody", [LocalModel(model_id=OTHER, score=50)], [], {}, []),
    ("no engine", NOTHING, [MAC, PI], {}, ["mac", "pi"]),
    ("no engine, a hub", NOTHING, [HUB], {}, ["hub"]),
    ("no engine, nobody", NOTHING, [], {}, []),
    # the model that a request does not name
    ("no model named", 4, [MAC], {"model": None}, ["mac", "here"]),
    ("no model named, a hub whose models nobody knows", 4, [HUB], {"model": None}, ["here"]),
    ("no model named, a hub that has one loaded", 4, [LOADED_HUB], {"model": None}, ["hub", "here"]),
    (
        "the demonstration model stands in for no other",
        [LocalModel(model_id="dvai-demo", score=500, is_demonstration=True)],
        [PI],
        {"model": None},
        ["pi", "here"],
    ),
    (
        "the demonstration model for who names it",
        [LocalModel(model_id="dvai-demo", score=500, is_demonstration=True)],
        [PI],
        {"model": "dvai-demo"},
        ["here"],
    ),
    ("a peer's demonstration model", NOTHING, [replace(HUB, models=("dvai-demo",))], {"model": None}, []),
    ("a peer's, named", NOTHING, [replace(HUB, models=("dvai-demo",))], {"model": "dvai-demo"}, ["hub"]),
    # a peer that the model's name begins with
    ("by name", 50, [MAC, PI], {"model": f"PI/{M}"}, ["pi"]),
    ("by id", 50, [MAC, PI], {"model": f"id-pi/{M}"}, ["pi"]),
    (
        "by name, two so named",
        4,
        [MAC, replace(PI, peer=replace(PI.peer, device_name="mac"))],
        {"model": f"mac/{M}"},
        ["mac", "mac"],
    ),
    ("by the name of an unpaired one", 50, [make_unpaired("x")], {"model": f"x/{M}"}, []),
    ("by name, never", 50, [PI], NEVER | {"model": f"pi/{M}"}, ["here"]),
    ("by name, a model that it lacks", 50, [PI], {"model": f"pi/{OTHER}"}, []),
    (
        "a model whose own name begins so",
        50,
        [MAC, replace(PI, models=(f"mac/{M}",))],
        {"model": f"mac/{M}"},
        ["pi"],
    ),
]


@pytest.mark.parametrize(
    ("local", "candidates", "request_", "expected"), [row[1:] for row in DECISIONS], ids=[row[0] for row in DECISIONS]
)
def test_decisions(local, candidates, request_, expected):
    decision = decide(local, candidates, **request_)
    assert name_targets(decision) == expected
    assert name_targets(decide(local, candidates[::-1], **request_)) == expected, "the order of arrival decides nothing"
    assert decision.reason and decision.reason.isascii()


def test_what_to_ask_a_peer_for():
    hub = make_candidate("hub", None, models=(M.lower(),), route=PeerRoute.RELAY)
    (target,) = decide(NOTHING, [hub]).targets
    assert (target.model_id, target.substituted_for, target.route, target.score) == (
        M.lower(),
        None,
        PeerRoute.RELAY,
        10,
    )
    (named,) = decide(NOTHING, [hub], model=f"hub/{M}").targets
    assert (named.model_id, named.substituted_for) == (M.lower(), None)


def test_the_best_model_of_a_peer_when_none_was_named():
    peer = replace(MAC.peer, capability={M: 20.0, OTHER: 90.0}, loaded_models=(M,))
    mac = replace(MAC, peer=peer, models=(OTHER, M, "dvai-demo"))
    assert decide(NOTHING, [mac], model=None).targets[0].model_id == M
    mac = replace(mac, peer=replace(peer, loaded_models=()))
    assert decide(NOTHING, [mac], model=None).targets[0].model_id == OTHER
    assert decide(NOTHING, [LOADED_HUB], model=None).targets[0].model_id == M


def test_another_quantisation_serves_only_by_option():
    rough = "llama-3.2-3b-instruct-q8_0"
    mac = make_candidate("mac", models=(rough,))
    mac = replace(mac, peer=replace(mac.peer, capability={rough: 40.0}))
    assert name_targets(decide(4, [mac])) == ["here"]
    substituting = replace(ON, substitute_quant=True)
    decision = decide(4, [mac], policy=substituting)
    assert name_targets(decision) == ["mac", "here"]
    assert (decision.targets[0].model_id, decision.targets[0].substituted_for) == (rough, M)
    assert name_targets(decide(4, [mac], policy=substituting, model="Llama-3.2-1B-Instruct-Q4_K_M")) == []
    both = replace(mac, models=(rough, M), peer=replace(mac.peer, capability={rough: 40.0, M: 12.0}))
    assert decide(4, [both], policy=substituting).targets[0].model_id == M


def test_nobody_is_chosen_for_nothing():
    assert name_targets(decide(0, [make_candidate("a", 0)])) == ["here"]


# Pairing by itself


def test_the_handshake_begins_with_the_one_that_would_be_chosen():
    stranger = make_unpaired("stranger", 90)
    decision = decide(4, [MAC, stranger])
    assert name_targets(decision) == ["mac", "here"]
    assert decision.pair_with is stranger.peer and decision.awaited is stranger.peer


@pytest.mark.parametrize(
    ("local", "candidates", "request_"),
    [
        (4, [MAC, make_unpaired("x", 20)], {}),  # somebody better is paired
        (24, [make_unpaired("x", 90)], {}),  # this device is fast enough
        (4, [make_unpaired("x", 3)], {}),  # it would not be chosen
        (4, [make_unpaired("x", 9)], REQUIRE),
        (4, [make_unpaired("x", 90)], NEVER),
        (4, [make_unpaired("x", 90)], {"policy": OffloadPolicy()}),
        (4, [make_unpaired("x", 90, handshake=Handshake.REFUSED)], {}),
        (4, [make_unpaired("x", 90, handshake=Handshake.ASKING)], {}),
        (4, [make_unpaired("x", 90, handshake=Handshake.ASKING), make_unpaired("y", 80)], {}),
        (4, [make_unpaired("x", 90, models=(OTHER,))], {}),
        (4, [make_unpaired("x", 90, state=PeerState.SEEN, error="refused")], {}),
    ],
)
def test_no_handshake_begins_that_would_not_help(local, candidates, request_):
    assert decide(local, candidates, **request_).pair_with is None


def test_a_refused_handshake_leaves_the_next():
    refused, other = make_unpaired("x", 90, handshake=Handshake.REFUSED), make_unpaired("y", 80)
    assert decide(4, [refused, other]).pair_with is other.peer


def test_a_request_that_nobody_serves_awaits_the_approval():
    asking = make_unpaired("x", handshake=Handshake.ASKING)
    decision = decide(NOTHING, [asking])
    assert decision.targets == () and decision.pair_with is None and decision.awaited is asking.peer


# Refusals


def test_the_refusal_word_for_word():
    unreachable = make_candidate("Mac Studio M4 Max", 60, state=PeerState.SEEN, error="timeout after 3 s")
    policy = replace(ON, has_rendezvous=True)
    error = build_refusal(decide(4.24, [unreachable], policy=policy, **REQUIRE), "req-1")
    assert build_error_body(error) == {
        "error": {
            "message": f"No device with capability ≥ 10 tok/s for model {M} was reachable. "
            "`peers` says what each of them lacks.",
            "type": "no_capable_device",
            "param": None,
            "code": 503,
            "checked": [
                {"deviceId": "self", "capabilityScore": 4.2, "reason": "a peer is required"},
                {
                    "deviceId": "id-Mac Studio M4 Max",
                    "deviceName": "Mac Studio M4 Max",
                    "capabilityScore": 0.0,
                    "reason": "discovered via mDNS but unreachable (timeout after 3 s)",
                },
            ],
            "localCapability": 4.24,
            "requiredAtLeast": 10,
            "rendezvousConfigured": True,
            "pairedRemotePeers": 0,
            "requestId": "req-1",
        }
    }
    response = build_error_response(error)
    assert response.status == 503
    assert {("Retry-After", "30"), ("x-should-retry", "false")} <= set(response.headers)


def test_a_refusal_without_an_engine():
    error = build_refusal(decide(NOTHING, []), "r")
    assert error.extra["checked"] == [{"deviceId": "self", "capabilityScore": 0, "reason": "serves nothing itself"}]
    assert error.extra["localCapability"] is None and "--lan" in error.message
    error = build_refusal(decide([LocalModel(model_id=OTHER, score=50)], []), "r")
    assert error.extra["checked"][0]["reason"] == "does not have the model"


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (make_unpaired("x"), "not paired"),
        (make_unpaired("x", handshake=Handshake.ASKING), "waits for approval"),
        (make_unpaired("x", handshake=Handshake.REFUSED), "not paired: refused or revoked"),
        (make_unpaired("x", handshake=Handshake.FAILED), "not paired: the handshake failed"),
        (make_candidate("x", 9), "below threshold"),
        (make_candidate("x", 0), "scores 0"),
        (replace(MAC, models=()), "does not have the model"),
        (replace(MAC, health=PeerHealth.DEGRADED), "its engine does not work"),
        (replace(MAC, health=PeerHealth.LOADING), "still loading its model"),
        (replace(MAC, state=PeerState.SEEN), "still connecting"),
        (
            make_candidate("x", via=PeerVia.STATIC, state=PeerState.SEEN, error="refused"),
            "discovered via static but unreachable (refused)",
        ),
        (replace(MAC, cool_down=CoolDown(failures=1, until_s=NOW_S + 4.2)), "cooling down for 5 s after a failure"),
    ],
)
def test_a_refusal_says_what_each_lacks(candidate, says):
    (_, line) = build_refusal(decide(4, [candidate], **REQUIRE), "r").extra["checked"]
    assert line["reason"] == says


@pytest.mark.parametrize(
    ("candidate", "may_retry"),
    [
        (replace(MAC, cool_down=CoolDown(failures=1, until_s=NOW_S + 1)), True),
        (replace(MAC, state=PeerState.SEEN), True),
        (replace(MAC, health=PeerHealth.LOADING), True),
        (replace(MAC, state=PeerState.SEEN, error="refused"), False),
        (make_unpaired("x"), False),
        (make_candidate("x", 1), False),
    ],
)
def test_a_client_is_told_to_retry_only_if_somebody_is_coming(candidate, may_retry):
    headers = build_error_response(build_refusal(decide(4, [candidate], **REQUIRE), "r")).headers
    assert (("x-should-retry", "false") in headers) is not may_retry
    assert ("Retry-After", "30") in headers


@pytest.mark.parametrize(
    ("candidates", "says"),
    [
        ([make_unpaired("desk\u202e")], r"Approve the pairing on desk\u202e,"),
        ([make_unpaired("desk", handshake=Handshake.REFUSED)], "desk does not let this device use it"),
        ([replace(MAC, state=PeerState.SEEN)], "ask again soon"),
        ([], "--peer URL"),
    ],
)
def test_a_refusal_says_what_to_do(candidates, says):
    assert says in build_refusal(decide(NOTHING, candidates), "r").message


def test_attempts_that_failed_stand_in_the_refusal():
    error = build_refusal(decide(4, [MAC], **REQUIRE), "r", {"id-mac": "no answer within 30 s"})
    assert error.extra["checked"][1] == {
        "deviceId": "id-mac",
        "deviceName": "mac",
        "capabilityScore": 60,
        "reason": "no answer within 30 s",
    }
    assert error.should_retry is None


def test_a_refusal_stays_small():
    crowd = [make_unpaired(f"p{n}") for n in range(100)]
    assert len(build_refusal(decide(NOTHING, crowd), "r").extra["checked"]) == 33


def test_the_model_in_a_refusal_cannot_forge_lines():
    message = build_refusal(decide(NOTHING, [], model="x\n" + "y" * 500), "r").message
    assert "\n" not in message and len(message) < 300


def test_remote_pairings_are_counted():
    relayed = make_candidate("far", via=PeerVia.RENDEZVOUS, state=PeerState.SEEN, error="gone")
    error = build_refusal(decide(NOTHING, [relayed, replace(MAC, models=())]), "r")
    assert error.extra["pairedRemotePeers"] == 1


@pytest.mark.parametrize("request_", [NEVER, FORWARDED])
def test_never_without_an_engine(request_):
    error = build_refusal(decide(NOTHING, [MAC], **request_), "r")
    assert (error.status, error.type, error.code, error.should_retry) == (503, "no_local_backend", 503, False)


# Decisions that are kept


def test_a_decision_is_kept_while_the_devices_are_as_they_were():
    chooser, request, studio = RouteChooser(ON), RouteRequest(model=M), make_candidate("studio", 50)
    local = [LocalModel(model_id=M, score=5)]
    kept = chooser.choose(request, local, [studio], NOW_S)
    assert kept == decide(5, [studio])
    assert chooser.choose(RouteRequest(model=M), [replace(local[0])], [replace(studio)], NOW_S + 1) is kept
    changes = (
        ([LocalModel(model_id=M, score=60)], [studio]),
        (local, [studio, make_candidate("other", 70)]),
        (local, [replace(studio, waiting=9)]),
        (local, []),
    )
    for here, candidates in changes:
        assert chooser.choose(request, here, candidates, NOW_S) == choose_route(ON, request, here, candidates, NOW_S)
    other = RouteRequest(model=M, preference=OffloadPreference.NEVER)
    assert chooser.choose(other, local, [studio], NOW_S) == choose_route(ON, other, local, [studio], NOW_S)


def test_what_cools_down_is_looked_at_each_time():
    chooser, request = RouteChooser(ON), RouteRequest(model=M)
    cooling = [make_candidate("studio", 50, cool_down=CoolDown(failures=1, until_s=NOW_S + 5))]
    for now_s in (NOW_S, NOW_S + 1, NOW_S + 5, NOW_S + 6):
        assert chooser.choose(request, [], cooling, now_s) == choose_route(ON, request, [], cooling, now_s)


def test_names_without_end_fill_no_memory():
    chooser = RouteChooser(ON)
    for number in range(2 * DECISIONS_LIMIT + 3):
        chooser.choose(RouteRequest(model=f"m{number}"), [], [make_candidate("studio", 50)], NOW_S)
        assert len(chooser._decisions) <= DECISIONS_LIMIT


# Delegation


def provider(name, **changes):
    return make_candidate(name, **({"models": (M, "other")} | changes))


PROVIDERS = {
    "the first that was named": ([provider("a"), provider("b")], ["a", "b"], {}),
    "however fast": ([provider("a"), provider("b", score=99.0)], ["a", "b"], {}),
    "before its models are known": ([provider("a", models=None, state=PeerState.PAIRED)], ["a"], {}),
    "one that loads": ([provider("a", health=PeerHealth.LOADING)], ["a"], {}),
    "after the others where it has just failed": (
        [provider("a", cool_down=CoolDown(failures=1, until_s=NOW_S + 5)), provider("b")],
        ["b", "a"],
        {},
    ),
    "all the same where it is alone": (
        [provider("a", cool_down=CoolDown(failures=9, until_s=NOW_S + 300))],
        ["a"],
        {},
    ),
    "not one without the model": (
        [provider("a", models=("x",)), provider("b")],
        ["b"],
        {"a": "does not have the model"},
    ),
    "not one that is away": (
        [provider("a", state=PeerState.SEEN, error="no answer"), provider("b")],
        ["b"],
        {"a": "no answer"},
    ),
    "not one that is not reached yet": ([provider("a", state=PeerState.SEEN)], [], {"a": "still connecting"}),
    "not one whose engine is down": (
        [provider("a", health=PeerHealth.DEGRADED)],
        [],
        {"a": "its engine does not work"},
    ),
    "nobody that was not named": ([provider("c")], [], {}),
}


@pytest.mark.parametrize(("candidates", "chosen", "obstacles"), PROVIDERS.values(), ids=PROVIDERS)
def test_which_providers_are_asked(candidates, chosen, obstacles):
    named = ["id-a", "id-b"][: 1 + any(each.peer.device_name == "b" for each in candidates)]
    decision = choose_providers(M, named, candidates, NOW_S)
    assert [target.peer.device_name for target in decision.targets] == chosen
    assert all(target.model_id == M and target.substituted_for is None for target in decision.targets)
    checked = dict(decision.checked)
    assert set(checked) == set(named)
    assert {name: checked[f"id-{name}"] for name in obstacles} == obstacles
    assert all(not checked[f"id-{name}"] for name in chosen)


def test_a_provider_is_asked_by_its_own_name_of_the_model_or_for_its_default():
    candidates = [provider("a", models=("OTHER", M))]
    assert choose_providers("other", ["id-a"], candidates, NOW_S).targets[0].model_id == "OTHER"
    assert choose_providers(None, ["id-a"], candidates, NOW_S).targets[0].model_id is None


def test_what_the_client_of_absent_providers_learns():
    decision = choose_providers(M, ["id-a", "id-b"], [provider("a", state=PeerState.SEEN, error="gone")], NOW_S)
    error = build_delegation_refusal(decision, M, "req-1", refused_key=None, failures={})
    body = build_error_body(error)["error"]
    assert (error.status, body["type"], body["code"]) == (503, "unavailable_error", "provider_unreachable")
    assert body["checked"] == [
        {"publicKey": "id-a", "reason": "gone"},
        {"publicKey": "id-b", "reason": "not found yet"},
    ]
    assert error.retry_after_s and error.should_retry is None and body["requestId"] == "req-1"
    failed = build_delegation_refusal(decision, M, "req-1", refused_key=None, failures={"id-a": "torn\x00off"})
    assert "torn\x00off" not in failed.message and "torn" in failed.message


def test_what_the_client_of_a_provider_that_refuses_learns():
    decision = choose_providers(M, ["id-a"], [provider("a", state=PeerState.SEEN, error="refused")], NOW_S)
    error = build_delegation_refusal(decision, M, "", refused_key="MYKEY", failures={})
    assert (error.status, error.code, error.should_retry) == (503, "provider_refused", False)
    assert "provider --allow MYKEY" in error.message and error.retry_after_s is None


def test_a_model_that_no_provider_has_is_a_404():
    decision = choose_providers("nix", ["id-a"], [provider("a")], NOW_S)
    error = build_delegation_refusal(decision, "nix", "", refused_key=None, failures={})
    assert (error.status, error.code) == (404, "model_not_found") and "'nix'" in error.message
