"""Peers that refuse, hang, lie and die, before real bridges: another one's answer, ours, or an error with a type."""

import concurrent.futures
import contextlib
import functools
import http.client
import json
import re
import time

import pytest
from support import RunningBridge, start_bridge, wait_for
from support_peer import (
    FakePeer,
    answer_raw,
    answer_status,
    ask_owner,
    break_off,
    find_secrets,
    hang,
    read_token,
    recovering,
    serve_text,
    start_peer,
)
from support_worker import build_byte_model

import dvai_bridge
from dvai_bridge import COOL_DOWN_S, DVAI, OffloadConfig

CHAT = "/v1/chat/completions"
CANARY = "canary-5c20"
ROLE, HELLO = {"role": "assistant", "content": ""}, {"content": "Hel"}
GOOD = "the good one"
serve_good = serve_text("the ", "good ", "one")
SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def write_events(data):
    """An event stream that ends well on the outside."""
    return answer_raw(SSE_HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(data), data))


# What a peer may do before its first content: the next one is asked, and nobody is any the wiser.
EARLY = {
    "closes without a byte": answer_raw(b""),
    "resets": break_off(reset=True),
    "a head torn": answer_raw(b"HTTP/1.1 200 OK\r\nContent-Ty"),
    "dies before the first token": break_off(ROLE),
    "dies in its first event": break_off(ROLE, tail=b'data: {"choices":[{"index":0,"delta":{"conte'),
    "comments, then the end": break_off(tail=b": ping\n\n: ping\n\n"),
    "no HTTP": answer_raw(b"\x00\xffSSH-2.0-nothing\r\n\r\n"),
    "garbage in chunks": answer_raw(SSE_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nnonsense\r\n"),
    "two lengths": answer_raw(SSE_HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"),
    "no events but a page": answer_raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<p/>"),
    "events that are no JSON": write_events(b"data: {nonsense}\n\ndata: [DONE]\n\n"),
    "an end without a beginning": write_events(b"data: [DONE]\n\n"),
    "an empty stream": write_events(b""),
    "an error in its stream": write_events(b'data: {"error":{"message":"out of memory"}}\n\n'),
    "choices that are none": write_events(b'data: {"choices":[{"index":-1,"delta":{"content":"x"}}]}\n\n'),
    "deep nesting": write_events(b"data: " + b"[" * 10_000 + b"\n\n"),
    "a redirect": answer_status(302, Location="http://127.0.0.1:1/v1/chat/completions"),
    "429": answer_status(429, Retry_After="7"),
    "429 without a word": answer_status(429, b""),
    "500": answer_status(500, {"error": {"message": "boom"}}),
    "503": answer_status(503, b"<html>"),
    "404": answer_status(404),
    "408": answer_status(408),
}
# And behind it: an error, never the short answer.
break_off_late = functools.partial(break_off, when_seen=True)
LATE = {
    "dies mid-token": break_off_late(ROLE, HELLO, tail=b'data: {"choices":[{"index":0,"delta":{"content":"lo'),
    "dies between two tokens": break_off_late(ROLE, HELLO),
    "resets between two tokens": break_off_late(ROLE, HELLO, reset=True),
    "dies before its [DONE]": break_off_late(ROLE, HELLO, finish_reason="stop"),
    "a [DONE] without a finish reason": break_off_late(ROLE, HELLO, tail=b"data: [DONE]\n\n"),
    "garbage behind a token": break_off_late(ROLE, HELLO, tail=b"data: \xff\xfe{\n\n"),
    "an error behind a token": break_off_late(ROLE, HELLO, tail=b'data: {"error":"engine died"}\n\n'),
}


def name_model(case, stream):
    return re.sub(r"[^a-z0-9]+", "-", f"{case} {'streamed' if stream else 'whole'}".lower()).strip("-")


CASES = [(case, stream) for case in (*EARLY, *LATE) for stream in (False, True)]
CASE_IDS = [name_model(*case) for case in CASES]


def build_bad_peers():
    """One for each case, the only one besides the good one that has this model, and by its own account the fastest."""
    scripts = EARLY | LATE
    return [
        FakePeer(f"bad-{model}", scripts[case], models=(model, f"{model}-alone"), scores={model: 1e5})
        for (case, _), model in zip(CASES, CASE_IDS, strict=True)
    ]


def pair_all(bridge, home, peers):
    for peer in peers:
        status, answer = ask_owner(bridge, home, "POST", "/v1/dvai/pairings", {"peer": peer.url})
        assert status == 200, answer

    def find_states():
        listed = json.loads(bridge.request("GET", "/v1/dvai/peers")[2])["peers"]
        return [each["deviceId"] for each in listed if each["state"] == "ready"]

    wait_for(lambda: {peer.device_id for peer in peers} <= set(find_states()), 60, "the peers are ready")


def name_peers(peers):
    """They pair in the legacy way."""
    return ["--legacy-pairing", "allow", *(flag for peer in peers for flag in ("--peer", peer.url))]


def ask(bridge, model, *, stream, headers=None, on_content=lambda: None):
    """Status, header fields and body, as much as came; `on_content`: called when a stream has begun."""
    body = {"model": model, "messages": [{"role": "user", "content": CANARY}], "stream": stream, "max_tokens": 8}
    connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=90)
    try:
        headers = {"Content-Type": "application/json"} | (headers or {})
        connection.request("POST", CHAT, json.dumps(body), headers)
        answer, data = connection.getresponse(), b""
        with contextlib.suppress(http.client.IncompleteRead):
            while piece := answer.read1():
                data += piece
                if b'"content":"Hel"' in data:
                    on_content()
        return answer.status, answer.headers, data
    finally:
        connection.close()


def read_events(data):
    blocks = [block for block in data.split(b"\n\n") if block.startswith(b"data: ")]
    return [block[6:] if block == b"data: [DONE]" else json.loads(block[6:]) for block in blocks]


def read_answer(data, *, stream):
    """The text of a whole answer. Fails for anything less."""
    if not stream:
        (choice,) = json.loads(data)["choices"]
        assert choice["finish_reason"] in ("stop", "length")
        return choice["message"]["content"]
    *events, last, done = read_events(data)
    assert done == b"[DONE]" and last["choices"][0]["finish_reason"] in ("stop", "length")
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def read_failure(status, data, *, stream):
    """The error that ends an answer, whether it had begun to stream or not. Fails if it could pass for whole."""
    if not stream:
        assert status == 502
        return json.loads(data)["error"]
    assert status == 200
    *events, last = read_events(data)
    assert b"[DONE]" not in data and all("error" not in event for event in events)
    return last["error"]


@pytest.fixture(scope="module")
def offload_only(tmp_path_factory):
    """A bridge that serves nothing itself, a good peer that has every model, and one bad peer for each case."""
    home = tmp_path_factory.mktemp("homes") / "weak"
    good = FakePeer("good", serve_good, models=tuple(CASE_IDS), scores=dict.fromkeys(CASE_IDS, 50))
    peers = [*build_bad_peers(), good]
    with contextlib.ExitStack() as stack:
        for peer in peers:
            stack.enter_context(start_peer(peer))
        flags = ("--offload-only", "--no-discover-lan", *name_peers(peers))
        with start_bridge(home, *flags) as bridge:
            pair_all(bridge, home, peers)
            bridge.good, bridge.bad = good, {peer.models[0]: peer for peer in peers[:-1]}
            yield bridge
        secrets = [CANARY, read_token(home), *(peer.key for peer in peers)]
        assert not find_secrets(secrets, bridges=[bridge], homes=[home])


@pytest.mark.parametrize(("case", "stream"), CASES, ids=CASE_IDS)
def test_a_bad_peer_and_a_good_one(offload_only, case, stream):
    bridge, model = offload_only, name_model(case, stream)
    asked, seen, started_at = len(bridge.good.asked), bridge.bad[model].seen, time.monotonic()
    if not stream:
        seen.set()  # nobody sees a whole answer begin
    with recovering(bridge):
        status, headers, data = ask(bridge, model, stream=stream, on_content=seen.set)
        assert len(bridge.bad[model].asked) == 1, "the bad one was asked first"
        if case in EARLY or len(bridge.good.asked) > asked:
            assert status == 200 and headers["X-DVAI-Served-By"] == "good", data
            assert read_answer(data, stream=stream) == GOOD
        else:
            error = read_failure(status, data, stream=stream)
            assert error["type"] == "server_error" and "incomplete" in error["message"]
        assert case in EARLY or not stream or len(bridge.good.asked) == asked, "what has begun is not asked again"
        _, _, data = ask(bridge, model, stream=stream)
        assert read_answer(data, stream=stream) == GOOD
        is_left_alone = len(bridge.bad[model].asked) == 1 or time.monotonic() - started_at >= COOL_DOWN_S
        assert is_left_alone or case == "404", "who failed is not asked again at once"


# Nobody else, or only this device


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "shared.gguf"
    path.write_bytes(build_byte_model())
    return path


def test_this_device_answers_when_every_peer_fails(tmp_path, model):
    """One request goes the round of all of them; the next one finds nobody to ask."""
    peers = [
        FakePeer(f"bad {case}", script, models=("shared",), scores={"shared": 1e5}) for case, script in EARLY.items()
    ]
    weak = ("--model", model, "--offload", "--min-local-capability", "90000", "--no-discover-lan")
    with contextlib.ExitStack() as stack:
        for peer in peers:
            stack.enter_context(start_peer(peer))
        bridge = stack.enter_context(start_bridge(tmp_path / "home", *weak, *name_peers(peers)))
        pair_all(bridge, tmp_path / "home", peers)
        with recovering(bridge):
            status, headers, data = ask(bridge, "shared", stream=False)
            assert status == 200 and headers["X-DVAI-Served-By"] == "local", data
            assert headers["X-DVAI-Reason"] == f"{len(peers)} peers failed"
            assert read_answer(data, stream=False) is not None
            assert [len(peer.asked) for peer in peers] == [1] * len(peers)
            status, headers, data = ask(bridge, "shared", stream=True, headers={"X-DVAI-Offload": "require"})
            error = json.loads(data)["error"]
            assert (status, error["type"], headers["Retry-After"]) == (503, "no_capable_device", "30")
            assert headers["x-should-retry"] is None, "asking again may help"
            reasons = {each["deviceId"]: each["reason"] for each in error["checked"]}
            assert len(reasons) == 1 + len(peers) and reasons["bad 404"] == "it answered 404"
            assert not {"can serve", ""} & set(reasons.values())


def test_a_peer_that_refuses_connections_and_returns(tmp_path):
    peer = FakePeer("studio", serve_text("back"), models=("m",), scores={"m": 50})
    home = tmp_path / "home"
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(contextlib.ExitStack())
        running.enter_context(start_peer(peer))
        bridge = stack.enter_context(start_bridge(home, "--offload-only", "--no-discover-lan", *name_peers([peer])))
        pair_all(bridge, home, [peer])
        assert ask(bridge, "m", stream=False)[0] == 200
        with recovering(bridge):
            running.close()
            for stream in (False, True):
                status, _, data = ask(bridge, "m", stream=stream)
                error = json.loads(data)["error"]
                assert (status, error["type"]) == (503, "no_capable_device"), data
                (itself, lost) = error["checked"]
                assert (itself["deviceId"], lost["deviceId"]) == ("self", "studio")
                assert "Connection refused" in lost["reason"] or "cooling down" in lost["reason"]
            with start_peer(peer):
                wait_for(lambda: ask(bridge, "m", stream=True)[0] == 200, 90, "it is used again by itself")


def test_a_peer_that_forgot_the_pairing(tmp_path):
    """It is not asked again, its owner is told, and another one answers."""
    bad = FakePeer("forgetful", serve_text("never"), models=("m", "only-here"), scores={"m": 1e5, "only-here": 50})
    good = FakePeer("good", serve_good, models=("m",), scores={"m": 50})
    home = tmp_path / "home"
    with start_peer(bad), start_peer(good):
        flags = ("--offload-only", "--no-discover-lan", *name_peers([bad, good]))
        with start_bridge(home, *flags) as bridge:
            pair_all(bridge, home, [bad, good])
            with recovering(bridge):
                bad.key = good.key
                status, _, data = ask(bridge, "only-here", stream=True)
                error = json.loads(data)["error"]
                assert (status, error["type"]) == (503, "no_capable_device")
                assert "forgetful does not let this device use it: `pair request` asks again" in error["message"]
                status, _, data = ask(bridge, "m", stream=False)
                assert status == 200 and read_answer(data, stream=False) == GOOD
                assert not bad.asked
                wait_for(
                    lambda: any("forgetful" in line and "pair request" in line for line in bridge.log), 10, "a word"
                )
                listed = json.loads(bridge.request("GET", "/v1/dvai/peers")[2])["peers"]
                (forgetful,) = [each for each in listed if each["deviceId"] == "forgetful"]
                assert forgetful["state"] == "reachable" and not forgetful["paired"]


def test_a_clock_that_jumped_ends_no_pairing(tmp_path):
    """Between two questions for its health a peer finds our clock wrong: that is a failure, not a revocation."""
    skew = {"error": {"message": "the clock", "type": "authentication_error", "code": "clock_skew"}}
    scores = {"m": 1e5, "only-here": 1e5}
    jumped = FakePeer("jumped", answer_status(401, skew), models=tuple(scores), scores=scores)
    good = FakePeer("good", serve_good, models=("m",), scores={"m": 50})
    home = tmp_path / "home"
    with start_peer(jumped), start_peer(good):
        flags = ("--offload-only", "--no-discover-lan", *name_peers([jumped, good]))
        with start_bridge(home, *flags) as bridge:
            pair_all(bridge, home, [jumped, good])
            with recovering(bridge):
                status, _, data = ask(bridge, "only-here", stream=True)
                reasons = {each["deviceId"]: each["reason"] for each in json.loads(data)["error"]["checked"]}
                assert status == 503 and reasons["jumped"] == "the clocks of the two devices differ too much"
                status, _, data = ask(bridge, "m", stream=True)
                assert status == 200 and read_answer(data, stream=True) == GOOD
                listed = json.loads(bridge.request("GET", "/v1/dvai/peers")[2])["peers"]
                assert all(each["paired"] for each in listed)


LIES = {
    "absurd numbers": b'{"scores":[{"modelId":"m","tokPerSec":1e300},{"modelId":"m","tokPerSec":-5}]}',
    "no numbers": b'{"scores":[{"modelId":"m","tokPerSec":"fast"},{"modelId":7,"tokPerSec":true},[],null]}',
    "infinity": b'{"scores":[{"modelId":"m","tokPerSec":1e999}]}',
    "no list": b'{"scores":{"m":5}}',
    "no JSON": b"\xff\xfe",
    "models without end": json.dumps({"scores": [{"modelId": f"m{n}", "tokPerSec": 5} for n in range(3000)]}).encode(),
    "a name that is a terminal's command": b'{"scores":[{"modelId":"\\u001b[2J","tokPerSec":50}]}',
}


def test_peers_that_lie_about_what_they_can(tmp_path):
    """What they claim is bounded and shown safely; one that then fails is left alone."""
    liars = [FakePeer(f"liar {lie}", answer_status(500), models=("m",), scores=claim) for lie, claim in LIES.items()]
    good = FakePeer("good", serve_good, models=("m",), scores={"m": 12})
    home = tmp_path / "home"
    with contextlib.ExitStack() as stack:
        for peer in (*liars, good):
            stack.enter_context(start_peer(peer))
        flags = ("--offload-only", "--no-discover-lan", *name_peers([*liars, good]))
        bridge = stack.enter_context(start_bridge(home, *flags))
        pair_all(bridge, home, [*liars, good])
        with recovering(bridge):
            for stream in (False, True, True):
                status, headers, data = ask(bridge, "m", stream=stream)
                assert status == 200 and headers["X-DVAI-Served-By"] == "good"
                assert read_answer(data, stream=stream) == GOOD
            listed = json.loads(bridge.request("GET", "/v1/dvai/peers")[2])["peers"]
            scores = [score for each in listed for score in each["capability"].values()]
            assert scores and all(0 <= score <= 1e6 for score in scores)
            assert all(len(each["capability"]) <= 128 for each in listed)


# Peers that hang


def test_a_peer_whose_health_hangs_is_no_candidate(tmp_path):
    class Silent(FakePeer):
        def answer_get(self, handler):
            self.released.wait(120)
            handler.close_connection = True

    peer = Silent("silent", hang(), models=("m",))
    with (
        start_peer(peer),
        start_bridge(tmp_path / "home", "--offload-only", "--no-discover-lan", *name_peers([peer])) as bridge,
    ):

        def find_reason():
            status, _, data = ask(bridge, "m", stream=True)
            assert status == 503
            return json.loads(data)["error"]["checked"][1]["reason"]

        wait_for(lambda: "unreachable" in find_reason(), 30, "it is given up")
        assert not peer.asked


@pytest.fixture
def short_budgets(monkeypatch):
    """Half a minute is long for a test: every wait for a peer is one of seconds."""
    shorter = functools.partial(dvai_bridge.ForwardBudgets, first_content_s=3.0, silence_s=3.0)
    monkeypatch.setattr(dvai_bridge, "ForwardBudgets", shorter)
    monkeypatch.setattr(dvai_bridge, "PREFILL_ASSUMED_TOK_PER_S", 1e6)


@contextlib.contextmanager
def embed_bridge(home, *peers):
    """A bridge in this program, paired with these peers."""
    known = {"known_peers": [peer.url for peer in peers], "legacy_pairing": "allow"}
    offload = OffloadConfig(enabled=True, only=True, discover_lan=False, **known)
    with DVAI(home=str(home), port=0, offload=offload, environ={}) as bridge:
        for peer in peers:
            bridge.initiate_pairing(peer.url)
        yield RunningBridge(None, bridge.port)


def build_hanging_peers(form):
    """Two that hang before any content and a good one for `m`; one that hangs behind a token; one that is alone."""
    return (
        FakePeer(f"mute-{form}", hang(), models=(f"m-{form}",), scores={f"m-{form}": 1e5}),
        FakePeer(f"begun-{form}", hang(ROLE), models=(f"m-{form}",), scores={f"m-{form}": 9e4}),
        FakePeer(f"good-{form}", serve_good, models=(f"m-{form}",), scores={f"m-{form}": 50}),
        FakePeer(f"stuck-{form}", hang(ROLE, HELLO), models=(f"stuck-{form}",)),
        FakePeer(f"alone-{form}", hang(), models=(f"alone-{form}",)),
    )


@pytest.mark.usefixtures("short_budgets")
def test_peers_that_hang(tmp_path):
    """Without a byte, or behind the role: the next one is asked. Behind a token: an error. All within the budgets."""
    peers = {stream: build_hanging_peers("streamed" if stream else "whole") for stream in (False, True)}
    with contextlib.ExitStack() as stack:
        for peer in (*peers[False], *peers[True]):
            stack.enter_context(start_peer(peer))
        bridge = stack.enter_context(embed_bridge(tmp_path / "home", *peers[False], *peers[True]))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(6))
        asked = {
            (stream, peer): pool.submit(ask, bridge, peer.models[0], stream=stream)
            for stream in peers
            for peer in peers[stream][2:]
        }
        for stream, (mute, begun, *others) in peers.items():
            good, stuck, alone = (asked[stream, peer].result(90) for peer in others)
            assert good[0] == 200 and good[1]["X-DVAI-Served-By"] == others[0].device_id
            assert read_answer(good[2], stream=stream) == GOOD and len(mute.asked) == len(begun.asked) == 1
            assert "incomplete" in read_failure(stuck[0], stuck[2], stream=stream)["message"]
            error = json.loads(alone[2])["error"]
            assert (alone[0], error["type"], alone[1]["x-should-retry"]) == (503, "no_capable_device", None)
            reasons = {each["deviceId"]: each["reason"] for each in error["checked"]}
            assert reasons[others[2].device_id].startswith("nothing came from")
