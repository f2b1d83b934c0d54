"""Section Handshake: who is asked before a key is given, every way to be refused, and both sides against each other."""

import asyncio
import contextlib
import itertools
import json
import os
import threading

import pytest

import dvai_bridge
from dvai_bridge import (
    EXCHANGE_REVEAL_MS,
    HANDSHAKE_PAUSE_MS,
    HANDSHAKES_PER_ADDRESS_LIMIT,
    HANDSHAKES_WINDOW_MS,
    BridgeError,
    CodeRequiredError,
    ConsumerExchange,
    GatewayTimeoutError,
    HandshakeLimiter,
    Headers,
    Identity,
    MalformedHandshakeError,
    Pairing,
    PairingBusyError,
    PairingDeniedError,
    PairingDesk,
    PairingDisabledError,
    PairingFailedError,
    PairingInitiator,
    PairingNotFoundError,
    PairingPolicy,
    PairingPrompts,
    PairingState,
    PairingStore,
    PairingTarget,
    SignatureError,
    SignatureVerifier,
    StorageError,
    build_handshake_request,
    build_pairing_question,
    build_pairing_request_json,
    build_static_key,
    choose_crypto_backend,
    encode_base64url,
    generate_pairing_key,
    parse_base64url,
    parse_handshake_answer,
    parse_handshake_request,
    parse_signature_headers,
    sign_request,
)

NOW = 1_790_000_000_000
TARGET = Identity(device_id="T" * 22, device_name="Strong", seed="A" * 43)
SOURCE = Identity(device_id="S" * 22, device_name="Weak", seed="E" * 43)
URL = "http://10.0.0.5:38883/v1"
REQUEST = {"peerDeviceId": "phone", "peerDeviceName": "Ann's phone", "appId": "app.chat", "via": "lan-handshake"}
PATIENCE_S = 30


def open_store(directory, identity=TARGET):
    store = PairingStore(directory, device_id=identity.device_id)
    store.load()
    return store


class Clock:
    def __init__(self):
        self.ms = NOW

    def __call__(self):
        return self.ms


class Desk:
    """A desk with a store on disk and a clock turned by hand."""

    def __init__(self, directory, policy=PairingPolicy.ASK, legacy_policy=PairingPolicy.ALLOW, **options):
        self.store = open_store(directory)
        self.clock = Clock()
        both = {"policy": policy, "legacy_policy": legacy_policy, "clock_ms": self.clock}
        self.prompts = PairingPrompts(**both, **options)
        self.desk = PairingDesk(identity=TARGET, store=self.store, prompts=self.prompts, **both)

    async def ask(self, address="10.0.0.7", signer=None, **members):
        """The body of the answer to a request of existing software."""
        body = json.dumps({name: value for name, value in (REQUEST | members).items() if value is not None}).encode()
        reply = await self.desk.answer(body, address=address, signer=signer)
        assert reply.status == 200
        return reply.document

    def close(self):
        self.prompts.close()
        self.desk.close()


async def until(condition):
    """Let the loop run until `condition()` is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not (value := condition()):  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)
    return value


# ---- the request ----------------------------------------------------------------------


def test_what_existing_software_sends_is_understood():
    parsed = parse_handshake_request(json.dumps(REQUEST | {"nonce": "abc", "unknown": [1]}).encode())
    assert (parsed.device_id, parsed.device_name, parsed.app_id) == ("phone", "Ann's phone", "app.chat")
    short = parse_handshake_request(b'{"peerDeviceId":"phone","peerDeviceName":"x","appId":null}')
    assert short.app_id == "phone"


def test_what_we_send_is_understood():
    for app_id in (None, "app.x"):
        body = json.dumps(build_handshake_request(SOURCE, app_id, "nonce")).encode()
        parsed = parse_handshake_request(body)
        assert (parsed.device_id, parsed.device_name) == (SOURCE.device_id, "Weak")
        assert parsed.app_id == (app_id or SOURCE.device_id)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        *(
            json.dumps(REQUEST | {name: value}).encode()
            for name in ("peerDeviceId", "appId")
            for value in (5, "", "a\n", "x" * 129)
        ),
        *(json.dumps(REQUEST | {"peerDeviceName": value}).encode() for value in (None, 5, "", "x" * 513)),
        *(json.dumps(REQUEST | {"via": value}).encode() for value in ("rendezvous-qr", "", 5, None)),
        *(json.dumps(REQUEST | {"nonce": value}).encode() for value in (5, "x" * 257)),
        json.dumps({name: value for name, value in REQUEST.items() if name != "peerDeviceId"}).encode(),
        json.dumps({name: value for name, value in REQUEST.items() if name != "peerDeviceName"}).encode(),
    ],
)
def test_malformed_requests(body):
    with pytest.raises(MalformedHandshakeError) as caught:
        parse_handshake_request(body)
    assert (caught.value.status, caught.value.type) == (400, "malformed_handshake")


# ---- who is asked ---------------------------------------------------------------------


def decide_by_callback(approved):
    return {"on_pairing_request": lambda request: approved}


def decide_by_coroutine(approved):
    async def decide(request):
        await asyncio.sleep(0)
        return approved

    return {"on_pairing_request": decide}


def decide_in_a_thread(approved):
    async def decide(request):
        thread = threading.Thread(target=request.respond, args=(approved,))
        thread.start()
        await asyncio.to_thread(thread.join)
        return await asyncio.Future()

    return {"on_pairing_request": decide}


@pytest.mark.parametrize("decide", [decide_by_callback, decide_by_coroutine, decide_in_a_thread])
@pytest.mark.parametrize("approved", [True, False])
def test_the_callback_decides(tmp_path, decide, approved):
    async def run():
        desk = Desk(tmp_path, **decide(approved))
        if not approved:
            with pytest.raises(PairingDeniedError) as caught:
                await desk.ask()
            assert (caught.value.status, caught.value.type) == (403, "pairing_denied")
            assert desk.store.pairings == ()
            return
        answer = await desk.ask()
        (pairing,) = open_store(tmp_path).pairings
        assert (pairing.key, pairing.device_name) == (("app.chat", "phone"), "Ann's phone")
        assert answer == {
            "paired": True,
            "pairedAt": NOW,
            "via": "lan-handshake",
            "pairingKey": pairing.inbound_key,
            "peerDeviceId": "phone",
            "deviceId": TARGET.device_id,
            "deviceName": "Strong",
        }
        assert pairing.outbound_key is None

    asyncio.run(run())


@pytest.mark.parametrize("approved", [True, False])
@pytest.mark.parametrize("by", ["command", "reader"])
def test_others_who_may_decide(tmp_path, by, approved, caplog):
    async def read(desk):
        async for request in desk.prompts.requests():
            assert (request.peer_device_name, request.peer_device_id) == ("Ann's phone", "phone")
            request.respond(approved)

    async def run():
        desk = Desk(tmp_path, is_operated=by == "command")
        reader = asyncio.create_task(read(desk)) if by == "reader" else None
        await asyncio.sleep(0)
        asking = asyncio.create_task(desk.ask())
        if by == "command":
            (request,) = await until(lambda: desk.prompts.pending)
            assert f"pair approve {request.request_id}" in await until(lambda: caplog.text)
            desk.prompts.respond(request.request_id, approved)
        async with asyncio.timeout(PATIENCE_S):
            if approved:
                assert (await asking)["paired"]
            else:
                with pytest.raises(PairingDeniedError):
                    await asking
        assert desk.prompts.pending == ()
        with pytest.raises(PairingNotFoundError):
            desk.prompts.respond("unknown", True)
        desk.close()
        if reader is not None:
            await asyncio.wait_for(reader, PATIENCE_S)

    asyncio.run(run())


def fail(request):
    raise RuntimeError("a mistake of the application")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_pairing_request": fail},
        {"on_pairing_request": lambda request: None},
        {"on_pairing_request": lambda request: "yes"},
        {"is_operated": True, "prompt_deadline_s": 0.01},
        {"policy": PairingPolicy.DENY, "on_pairing_request": lambda request: True},
        {"legacy_policy": PairingPolicy.DENY, "on_pairing_request": lambda request: True},
        {"policy": PairingPolicy.ALLOW, "legacy_policy": PairingPolicy.DENY},
        {"policy": PairingPolicy.ALLOW, "legacy_policy": PairingPolicy.ASK},
    ],
    ids=[
        "nobody to ask",
        "callback fails",
        "None",
        "not a bool",
        "no answer",
        "deny",
        "legacy deny",
        "allow but not readably",
        "allow but ask first",
    ],
)
def test_denial_is_the_default(tmp_path, options):
    async def run():
        desk = Desk(tmp_path, **options)
        with pytest.raises(PairingDeniedError):
            await asyncio.wait_for(desk.ask(), PATIENCE_S)
        assert desk.store.pairings == () and desk.prompts.pending == ()

    asyncio.run(run())


def test_allow_asks_nobody(tmp_path):
    async def run():
        desk = Desk(tmp_path, PairingPolicy.ALLOW, on_pairing_request=fail)
        assert (await desk.ask())["paired"]

    asyncio.run(run())


def test_no_store_or_a_closed_desk_is_503(tmp_path):
    async def run():
        closed = Desk(tmp_path, PairingPolicy.ALLOW)
        closed.close()
        off = PairingDesk(identity=TARGET, store=None, policy=PairingPolicy.ALLOW, prompts=closed.prompts)
        for desk in (closed.desk, off):
            with pytest.raises(PairingDisabledError) as caught:
                await desk.answer(json.dumps(REQUEST).encode(), address="10.0.0.7", signer=None)
            assert (caught.value.status, caught.value.type) == (503, "pairing_disabled")
        assert [request async for request in closed.prompts.requests()] == []

    asyncio.run(run())


def test_a_key_that_cannot_be_kept_is_not_given(tmp_path, monkeypatch):
    async def run():
        desk = Desk(tmp_path, PairingPolicy.ALLOW)

        def refuse(*args):
            raise StorageError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(dvai_bridge, "update_file", refuse)
            with pytest.raises(StorageError):
                await desk.ask()
        assert desk.store.pairings == ()

    asyncio.run(run())


# ---- one prompt at a time -------------------------------------------------------------


def test_one_prompt_at_a_time_in_order(tmp_path):
    async def run():
        shown = []

        async def decide(request):
            shown.append(request)
            return await asyncio.Future()

        desk = Desk(tmp_path, on_pairing_request=decide)
        asking = [asyncio.create_task(desk.ask(f"10.0.0.{n}", peerDeviceId=f"phone-{n}")) for n in range(3)]
        await until(lambda: len(desk.prompts.pending) == 3 and shown)
        assert [request.peer_device_id for request in shown] == ["phone-0"]
        assert [request.peer_device_id for request in desk.prompts.pending] == ["phone-0", "phone-1", "phone-2"]
        desk.prompts.pending[2].respond(True)  # before its turn, by `pair approve`
        assert (await asyncio.wait_for(asking[2], PATIENCE_S))["peerDeviceId"] == "phone-2"
        assert len(shown) == 1
        shown[0].respond(False)
        with pytest.raises(PairingDeniedError):
            await asking[0]
        await until(lambda: len(shown) == 2)
        assert shown[0].is_over and not shown[1].is_over
        shown[1].respond(True)
        assert (await asyncio.wait_for(asking[1], PATIENCE_S))["peerDeviceId"] == "phone-1"
        assert len(shown) == 2

    asyncio.run(run())


def test_the_first_answer_counts(tmp_path):
    async def run():
        desk = Desk(tmp_path, is_operated=True)
        asking = asyncio.create_task(desk.ask())
        (request,) = await until(lambda: desk.prompts.pending)
        for approved in (False, True, True):
            request.respond(approved)
        with pytest.raises(PairingDeniedError):
            await asking

    asyncio.run(run())


def test_a_requester_that_hangs_up_ends_the_prompt(tmp_path):
    async def run():
        ended = []

        async def decide(request):
            try:
                return await asyncio.Future()
            finally:
                ended.append(request.is_over)

        desk = Desk(tmp_path, on_pairing_request=decide)
        reader = desk.prompts.requests()
        first = asyncio.create_task(desk.ask())
        request = await asyncio.wait_for(anext(reader), PATIENCE_S)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert ended == [True] and request.is_over and desk.prompts.pending == ()
        request.respond(True)
        unread = asyncio.create_task(desk.ask(peerDeviceId="watch"))
        await until(lambda: desk.prompts._shown)
        unread.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unread
        reading = asyncio.create_task(anext(reader))
        await asyncio.sleep(0)
        second = asyncio.create_task(desk.ask(peerDeviceId="tablet"))
        assert (await asyncio.wait_for(reading, PATIENCE_S)).peer_device_id == "tablet"
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await reader.aclose()
        assert desk.store.pairings == ()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_close_denies_what_waits(tmp_path):
    async def run():
        desk = Desk(tmp_path, is_operated=True)
        asking = [asyncio.create_task(desk.ask(f"10.0.0.{n}")) for n in range(2)]
        await until(lambda: len(desk.prompts.pending) == 2)
        desk.close()
        outcomes = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), PATIENCE_S)
        assert [type(each) for each in outcomes] == [PairingDeniedError] * 2

    asyncio.run(run())


def test_waiting_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "PROMPTS_WAITING_LIMIT", 2)

    async def run():
        desk = Desk(tmp_path, is_operated=True)
        asking = [asyncio.create_task(desk.ask(f"10.0.0.{n}")) for n in range(2)]
        await until(lambda: len(desk.prompts.pending) == 2)
        with pytest.raises(PairingBusyError) as caught:
            await desk.ask("10.0.0.9")
        assert caught.value.status == 429 and caught.value.retry_after_s
        desk.close()
        await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(run())


def test_three_requests_per_address_in_ten_minutes(tmp_path):
    async def run():
        desk = Desk(tmp_path)
        for address in ("10.0.0.7", "10.0.0.8"):
            for _ in range(HANDSHAKES_PER_ADDRESS_LIMIT):
                with pytest.raises(PairingDeniedError):
                    await desk.ask(address)
        with pytest.raises(PairingBusyError) as caught:
            await desk.ask("10.0.0.7")
        assert caught.value.retry_after_s == HANDSHAKES_WINDOW_MS // 1000 + 1
        desk.clock.ms += HANDSHAKES_WINDOW_MS
        with pytest.raises(PairingDeniedError):
            await desk.ask("10.0.0.7")

    asyncio.run(run())


def test_the_limiter_takes_a_network_of_ipv6_for_one_and_is_bounded(monkeypatch):
    monkeypatch.setattr(dvai_bridge, "HANDSHAKE_ADDRESSES_LIMIT", 2)
    limiter = HandshakeLimiter()
    for n in range(HANDSHAKES_PER_ADDRESS_LIMIT):
        limiter.verify_admission(f"2001:db8::{n}", NOW)
    with pytest.raises(PairingBusyError):
        limiter.verify_admission("2001:db8::ffff", NOW)
    limiter.verify_admission("10.0.0.1", NOW + 1)
    with pytest.raises(PairingBusyError):
        limiter.verify_admission("10.0.0.2", NOW + 1)
    limiter.verify_admission("10.0.0.2", NOW + HANDSHAKES_WINDOW_MS)


# ---- peers that are known -------------------------------------------------------------


def test_a_repeat_never_gets_the_stored_key(tmp_path):
    async def run():
        answers, questions = [True, False, True], []
        desk = Desk(tmp_path, on_pairing_request=lambda request: questions.append(request) or answers.pop(0))
        first = await desk.ask()
        with pytest.raises(PairingDeniedError):
            await desk.ask()
        (kept,) = desk.store.pairings
        assert kept.inbound_key == first["pairingKey"], "a denied repeat takes nothing away"
        second = await desk.ask()
        assert second["pairingKey"] != first["pairingKey"]
        assert [each.inbound_key for each in desk.store.pairings] == [second["pairingKey"]]
        assert [request.is_known for request in questions] == [False, True, True]
        assert "would get a new key" in build_pairing_question(questions[1])

    asyncio.run(run())


def test_a_repeat_that_is_signed_needs_nobody_and_gets_no_key(tmp_path):
    async def run():
        desk = Desk(tmp_path, PairingPolicy.ALLOW)
        await desk.ask()
        (pairing,) = desk.store.pairings
        desk.desk._policy = PairingPolicy.DENY
        answer = await desk.ask(signer=pairing)
        assert answer["paired"] and "pairingKey" not in answer
        assert (answer["peerDeviceId"], answer["deviceId"]) == ("phone", TARGET.device_id)
        for members in ({"peerDeviceId": "tablet"}, {"appId": "app.other"}):
            with pytest.raises(MalformedHandshakeError, match="another device"):
                await desk.ask(signer=pairing, **members)
        assert desk.store.pairings == (pairing,)

    asyncio.run(run())


def test_a_peer_that_speaks_noise_never_falls_back(tmp_path):
    async def run():
        desk = Desk(tmp_path, PairingPolicy.ALLOW)
        await desk.ask()
        desk.store.note(desk.store.pairings[0], speaks_noise=True)
        with pytest.raises(PairingDeniedError, match="readably"):
            await desk.ask()

    asyncio.run(run())


def test_questions_show_foreign_names_safely(tmp_path):
    async def run():
        desk = Desk(tmp_path, is_operated=True)
        asking = asyncio.create_task(desk.ask(peerDeviceName="evil\x1b[2J\u202e" + "x" * 200))
        (request,) = await until(lambda: desk.prompts.pending)
        question = build_pairing_question(request)
        assert question.isprintable() and "\\x1b[2J\\u202e" in question and len(question) < 400
        assert "10.0.0.7" in question and "app.chat" in question and "network readably" in question
        shown = build_pairing_request_json(request)
        assert shown["deviceName"].isprintable() and shown["id"] == request.request_id and shown["askedAt"] == NOW
        desk.close()
        await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(run())


# ---- the one who asks -----------------------------------------------------------------

ANSWER = {
    "paired": True,
    "pairedAt": NOW,
    "via": "lan-handshake",
    "pairingKey": generate_pairing_key(),
    "peerDeviceId": SOURCE.device_id,
    "deviceId": TARGET.device_id,
    "deviceName": "Strong",
}


def parse_answer(answer, **target):
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return parse_handshake_answer(body, identity=SOURCE, target=PairingTarget(base_url=URL, **target))


def test_answers_of_ours_and_of_existing_software():
    ours = parse_answer(ANSWER, device_id=TARGET.device_id)
    assert (ours.pairing_key, ours.device_id, ours.device_name) == (ANSWER["pairingKey"], TARGET.device_id, "Strong")
    hub = {name: value for name, value in ANSWER.items() if name not in ("deviceId", "deviceName")}
    theirs = parse_answer(hub, device_id="hub-38883")
    assert (theirs.device_id, theirs.device_name) == (None, None)
    assert ANSWER["pairingKey"] not in repr(ours)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        ANSWER | {"paired": False},
        ANSWER | {"paired": "true"},
        ANSWER | {"peerDeviceId": "another device"},
        ANSWER | {"peerDeviceId": TARGET.device_id},
        ANSWER | {"peerDeviceId": None},
        ANSWER | {"pairingKey": "short"},
        ANSWER | {"pairingKey": 5},
        ANSWER | {"pairingKey": ANSWER["pairingKey"] + "="},
        ANSWER | {"deviceId": ""},
        ANSWER | {"deviceId": 5},
        ANSWER | {"deviceId": "not the one that was discovered"},
        ANSWER | {"deviceId": SOURCE.device_id},
    ],
)
def test_answers_that_are_none(answer):
    with pytest.raises(PairingFailedError) as caught:
        parse_answer(answer, device_id=TARGET.device_id)
    assert ANSWER["pairingKey"] not in str(caught.value)


LEGACY = {"legacy_policy": PairingPolicy.ALLOW}


class Network:
    """Joins an initiator to a desk as HTTP will: the body, the signature's fields, a status for each error.

    `is_legacy`: the target is existing software, which ignores `noise`. `bodies`: what was sent, both ways.
    """

    def __init__(
        self,
        directory,
        *,
        app_id=None,
        is_legacy=True,
        desk_policy=PairingPolicy.ALLOW,
        answer=None,
        policy=PairingPolicy.ASK,
        legacy_policy=PairingPolicy.ALLOW,
        confirm=None,
        is_operated=False,
    ):
        self.desk = Desk(directory / "target", desk_policy, on_pairing_request=answer)
        self.verifier = SignatureVerifier(self.desk.store)
        self.store = open_store(directory / "source", SOURCE)
        self.clock = self.desk.clock
        self.is_legacy = is_legacy
        self.statuses, self.bodies = [], []
        self.target = PairingTarget(base_url=URL, device_id=TARGET.device_id, device_name="Strong")
        self.prompts = PairingPrompts(
            policy=policy, legacy_policy=legacy_policy, on_pairing_request=confirm, is_operated=is_operated
        )
        self.initiator = PairingInitiator(
            identity=SOURCE,
            app_id=app_id,
            store=self.store,
            post=self.post,
            prompts=self.prompts,
            clock_ms=self.clock,
            legacy_policy=legacy_policy,
        )

    async def post(self, url, body, fields, deadline_s):
        assert url.startswith(URL) and url.endswith("/dvai/handshake") and deadline_s in (300, 30)
        self.bodies.append(body)
        headers = parse_signature_headers(Headers([(name.lower(), value) for name, value in fields]))
        try:
            signer = headers and self.verifier.verify(
                headers, method="POST", path="/v1/dvai/handshake", query="", body=body, now_ms=self.clock()
            )
            if self.is_legacy:
                body = json.dumps({name: value for name, value in json.loads(body).items() if name != "noise"}).encode()
            reply = await self.desk.desk.answer(body, address="10.0.0.7", signer=signer)
        except BridgeError as exc:
            self.statuses.append(exc.status)
            return exc.status, b"{}"
        self.statuses.append(reply.status)
        self.bodies.append(json.dumps(reply.document).encode())
        return reply.status, self.bodies[-1]

    def call(self):
        """Who the target takes a signed request of the source for."""
        pairing = self.store.find_outbound(TARGET.device_id, None, self.clock())
        request = {"method": "POST", "path": "/v1/chat/completions", "body": b"{}"}
        fields = sign_request(pairing, SOURCE, app_id=self.initiator._app_id, now_ms=self.clock(), **request)
        headers = parse_signature_headers(Headers([(name.lower(), value) for name, value in fields]))
        return self.verifier.verify(headers, query="", now_ms=self.clock(), **request)


@pytest.mark.parametrize("app_id", [None, "app.one"])
def test_both_sides_against_each_other(tmp_path, app_id):
    async def run():
        network = Network(tmp_path, app_id=app_id)
        pairing = await network.initiator.pair(network.target)
        assert (pairing.device_id, pairing.base_url, pairing.device_name) == (TARGET.device_id, URL, "Strong")
        assert pairing.inbound_key is None
        assert network.call().key == (app_id or SOURCE.device_id, SOURCE.device_id)
        assert await network.initiator.pair(network.target) == pairing and network.statuses == [200]
        assert open_store(tmp_path / "source", SOURCE).pairings == (pairing,)

    asyncio.run(run())


def test_an_explicit_repeat_is_signed_and_changes_no_key(tmp_path):
    async def run():
        network = Network(tmp_path)
        pairing = await network.initiator.pair(network.target)
        again = await network.initiator.pair(network.target, is_explicit=True)
        assert again.outbound_key == pairing.outbound_key and network.statuses == [200, 200]
        await network.desk.store.revoke(network.desk.store.pairings[0].pairing_id)
        with pytest.raises(SignatureError):
            network.call()
        network.clock.ms += 1
        anew = await network.initiator.pair(network.target, is_explicit=True)
        assert network.statuses == [200, 200, 401, 200] and anew.outbound_key != pairing.outbound_key
        assert network.call().device_id == SOURCE.device_id

    asyncio.run(run())


def test_a_peer_that_answered_401_is_asked_anew(tmp_path):
    async def run():
        network = Network(tmp_path)
        pairing = await network.initiator.pair(network.target)
        network.store.note(pairing, is_marked_unauthorized=True)
        anew = await network.initiator.pair(network.target)
        assert anew.outbound_key != pairing.outbound_key and not anew.is_marked_unauthorized

    asyncio.run(run())


def test_a_hub_without_an_id_is_kept_by_its_address(tmp_path):
    async def post(url, body, fields, deadline_s):
        members = {name: value for name, value in ANSWER.items() if name not in ("deviceId", "deviceName")}
        return 200, json.dumps(members).encode()

    async def run():
        store = open_store(tmp_path, SOURCE)
        initiator = PairingInitiator(identity=SOURCE, app_id=None, store=store, post=post, clock_ms=Clock(), **LEGACY)
        pairing = await initiator.pair(PairingTarget(base_url=URL))
        assert pairing.device_id == URL and store.find_outbound(None, URL, NOW) == pairing
        named = await initiator.pair(PairingTarget(base_url=URL + "2", device_id="mac", device_name="Hub"))
        assert (named.device_id, named.device_name) == ("mac", "Hub")
        shared = await initiator.pair(PairingTarget(base_url=URL + "3", device_id="hub-38883"))
        assert shared.device_id == URL + "3", "every hub on this port calls itself so"
        assert store.find_outbound("hub-38883", URL + "3", NOW) == shared

    asyncio.run(run())


def test_requests_to_one_peer_are_joined_and_outlive_who_waits(tmp_path):
    async def run():
        questions = []
        network = Network(
            tmp_path, desk_policy=PairingPolicy.ASK, answer=lambda request: questions.append(request) or pending
        )
        pending = asyncio.get_running_loop().create_future()
        waiting = [asyncio.create_task(network.initiator.pair(network.target)) for _ in range(3)]
        await until(lambda: questions)
        assert network.initiator.is_asking(URL)
        waiting[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting[0]
        pending.set_result(True)
        first, second = await asyncio.wait_for(asyncio.gather(*waiting[1:]), PATIENCE_S)
        assert first == second and len(questions) == 1 and not network.initiator.is_asking(URL)

    asyncio.run(run())


def test_a_refusal_is_not_asked_again_by_itself(tmp_path):
    async def run():
        answers = [False, False, True]
        network = Network(tmp_path, desk_policy=PairingPolicy.ASK, answer=lambda request: answers.pop(0))
        for _ in range(2):
            with pytest.raises(PairingDeniedError, match="Strong denied"):
                await network.initiator.pair(network.target)
        assert network.statuses == [403]
        with pytest.raises(PairingDeniedError):
            await network.initiator.pair(network.target, is_explicit=True)
        assert network.statuses == [403, 403]
        network.clock.ms += HANDSHAKE_PAUSE_MS
        assert (await network.initiator.pair(network.target)).device_id == TARGET.device_id

    asyncio.run(run())


@pytest.mark.parametrize(
    ("policy", "answer", "is_paired"),
    [("allow", None, True), ("ask", None, False), ("ask", False, False), ("ask", True, True), ("deny", True, False)],
)
def test_readable_keys_only_as_the_user_wants(tmp_path, policy, answer, is_paired):
    """`answer`: of the user here, None where nobody can be asked."""

    async def run():
        asked = []
        confirm = None if answer is None else lambda request: asked.append(request) or answer
        network = Network(tmp_path, legacy_policy=PairingPolicy(policy), confirm=confirm)
        if is_paired:
            assert (await network.initiator.pair(network.target)).outbound_key
        else:
            with pytest.raises(PairingDeniedError):
                await network.initiator.pair(network.target)
            assert network.store.pairings == ()
        if policy == "ask" and answer is not None:
            (request,) = asked
            assert request.is_outgoing and request.code is None
            assert "readably" in build_pairing_question(request) and URL in build_pairing_question(request)

    asyncio.run(run())


def test_a_target_that_speaks_noise_is_not_asked_readably(tmp_path):
    async def run():
        network = Network(tmp_path)
        known = Pairing(
            device_id=TARGET.device_id,
            app_id="x",
            device_name="Strong",
            speaks_noise=True,
            paired_at_ms=NOW,
            last_used_at_ms=NOW,
        )
        await network.store.add(known)
        with pytest.raises(PairingDeniedError, match="somebody may stand between"):
            await network.initiator.pair(network.target, is_explicit=True)
        assert network.store.pairings == (known,)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("outcome", "error", "says"),
    [
        (403, PairingDeniedError, "denied"),
        (429, PairingBusyError, "too often"),
        (503, PairingDisabledError, "--lan"),
        (404, PairingFailedError, "no DVAI bridge"),
        (500, PairingFailedError, "status 500"),
        (202, PairingFailedError, "not JSON"),
        (400, PairingFailedError, "took too long"),
        (200, PairingFailedError, "not JSON"),
        (
            ConnectionRefusedError(111, "Connection refused"),
            PairingFailedError,
            "cannot be reached: Connection refused",
        ),
        (TimeoutError(), PairingFailedError, "nobody answered"),
        (GatewayTimeoutError("no answer in time"), PairingFailedError, "cannot be reached: no answer in time"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path, outcome, error, says):
    async def post(url, body, fields, deadline_s):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, b"<html>"

    async def run():
        store = open_store(tmp_path, SOURCE)
        initiator = PairingInitiator(identity=SOURCE, app_id=None, store=store, post=post, clock_ms=Clock(), **LEGACY)
        with pytest.raises(error, match=says):
            await initiator.pair(PairingTarget(base_url=URL, device_name="Strong\x1b"))
        assert store.pairings == ()

    asyncio.run(run())


def test_paired_without_a_key_that_we_have_is_of_no_use(tmp_path):
    async def post(url, body, fields, deadline_s):
        return 200, json.dumps({name: value for name, value in ANSWER.items() if name != "pairingKey"}).encode()

    async def run():
        initiator = PairingInitiator(
            identity=SOURCE, app_id=None, store=open_store(tmp_path, SOURCE), post=post, **LEGACY
        )
        with pytest.raises(PairingFailedError, match="revoke the pairing there"):
            await initiator.pair(PairingTarget(base_url=URL))

    asyncio.run(run())


def test_a_close_ends_every_request(tmp_path):
    async def run():
        async def post(url, body, fields, deadline_s):
            return await asyncio.Future()

        store = open_store(tmp_path, SOURCE)
        initiator = PairingInitiator(identity=SOURCE, app_id=None, store=store, post=post, clock_ms=Clock(), **LEGACY)
        tasks = [initiator.start(PairingTarget(base_url=f"{URL}{n}")) for n in range(3)]
        await asyncio.sleep(0)
        await initiator.close()
        assert all(task.cancelled() for task in tasks) and not initiator.is_asking(f"{URL}0")

    asyncio.run(run())


def test_a_background_error_is_kept_and_a_mistake_of_ours_is_logged(tmp_path, caplog):
    async def run():
        async def post(url, body, fields, deadline_s):
            raise ZeroDivisionError

        store = open_store(tmp_path, SOURCE)
        initiator = PairingInitiator(identity=SOURCE, app_id=None, store=store, post=post, clock_ms=Clock(), **LEGACY)
        task = initiator.start(PairingTarget(base_url=URL))
        await asyncio.wait([task], timeout=PATIENCE_S)
        await asyncio.sleep(0)
        assert isinstance(task.exception(), ZeroDivisionError) and "pairing with" in caplog.text

    asyncio.run(run())


# ---- pairing by code ------------------------------------------------------------------

ALLOW, ASK = PairingPolicy.ALLOW, PairingPolicy.ASK


def approve_as(seen, approved=True):
    """A user who answers every question at once, and what was asked."""
    return lambda request: seen.append(request) or approved


def test_both_users_see_one_code_and_then_both_sides_keep_it(tmp_path):
    async def run():
        there, here = [], []
        network = Network(
            tmp_path,
            is_legacy=False,
            app_id="app.one",
            desk_policy=ASK,
            answer=approve_as(there),
            confirm=approve_as(here),
        )
        pairing = await network.initiator.pair(network.target)
        assert network.statuses == [202, 200, 200]
        (asked_there,), (asked_here,) = there, here
        assert asked_there.code == asked_here.code and len(asked_here.code) == 6
        assert (asked_there.is_outgoing, asked_here.is_outgoing) == (False, True)
        for request in (asked_there, asked_here):
            assert f"same code {request.code}" in build_pairing_question(request)
            assert request.code not in build_pairing_question(request, has_code=False)
        (kept,) = network.desk.store.pairings
        assert kept.key == ("app.one", SOURCE.device_id) and kept.inbound_key == pairing.outbound_key
        assert kept.inbound_link == pairing.outbound_link
        assert (pairing.base_url, pairing.device_id, pairing.device_name) == (URL, TARGET.device_id, "Strong")
        assert kept.speaks_noise and pairing.speaks_noise and None not in (kept.identity_key, pairing.identity_key)
        said = b"".join(network.bodies)
        link = pairing.outbound_link
        for secret in (pairing.outbound_key, encode_base64url(link.resume_psk), asked_here.code, "pairingKey"):
            assert secret.encode() not in said
        state = network.desk.store.get_state
        assert state(kept, NOW) is PairingState.PENDING
        assert network.desk.store.find_link(link.pair_id, NOW) == kept
        with pytest.raises(SignatureError):  # the key alone is good for nothing but pairing again
            network.call()
        assert state(network.desk.store.pairings[0], NOW) is PairingState.PENDING

    asyncio.run(run())


def test_a_repeat_of_a_pairing_by_code_is_signed_and_shows_no_code(tmp_path):
    async def run():
        seen = []
        network = Network(tmp_path, is_legacy=False, policy=ALLOW, desk_policy=ASK, answer=approve_as(seen))
        first = await network.initiator.pair(network.target)
        again = await network.initiator.pair(network.target, is_explicit=True)
        assert again.outbound_key == first.outbound_key and len(seen) == 1
        await network.desk.store.revoke(network.desk.store.pairings[0].pairing_id)
        anew = await network.initiator.pair(network.target, is_explicit=True)
        assert anew.outbound_key != first.outbound_key and len(seen) == 2
        assert network.statuses == [202, 200, 200, 200, 401, 202, 200, 200]

    asyncio.run(run())


def test_a_legacy_pairing_becomes_one_by_code_when_the_user_asks_again(tmp_path):
    async def run():
        network = Network(tmp_path, policy=ALLOW)
        legacy = await network.initiator.pair(network.target)
        assert legacy.identity_key is None
        network.is_legacy = False
        by_code = await network.initiator.pair(network.target, is_explicit=True)
        assert by_code.identity_key is not None and by_code.outbound_key != legacy.outbound_key
        found = network.desk.store.find_link(by_code.outbound_link.pair_id, network.clock())
        assert found.inbound_key == by_code.outbound_key
        with pytest.raises(SignatureError):
            network.call()

    asyncio.run(run())


@pytest.mark.parametrize("who", ["here", "there", "both"])
def test_one_user_who_denies_is_enough(tmp_path, who):
    async def run():
        there, here = [], []
        network = Network(
            tmp_path,
            is_legacy=False,
            desk_policy=ASK,
            answer=approve_as(there, who == "here"),
            confirm=approve_as(here, who == "there"),
        )
        with pytest.raises(PairingDeniedError):
            await network.initiator.pair(network.target)
        assert network.store.pairings == network.desk.store.pairings == ()
        await until(lambda: network.desk.prompts.pending == network.prompts.pending == ())
        with pytest.raises(PairingDeniedError):
            await network.initiator.pair(network.target)
        assert len(here) <= 1, "nothing asks by itself so soon"

    asyncio.run(run())


def test_a_denial_here_takes_the_prompt_there_away(tmp_path):
    async def run():
        network = Network(tmp_path, is_legacy=False, desk_policy=ASK, is_operated=True, answer=lambda request: pending)
        pending = asyncio.get_running_loop().create_future()
        asking = asyncio.create_task(network.initiator.pair(network.target))
        await until(lambda: network.desk.prompts.pending and network.prompts.pending)
        (here,) = network.prompts.pending
        network.prompts.respond(here.request_id, False)
        with pytest.raises(PairingDeniedError, match="not confirmed on this device"):
            await asyncio.wait_for(asking, PATIENCE_S)
        await until(lambda: not network.desk.prompts.pending)
        assert network.desk.store.pairings == network.store.pairings == ()

    asyncio.run(run())


def test_nobody_here_to_compare_the_code(tmp_path):
    async def run():
        there = []
        network = Network(tmp_path, is_legacy=False, desk_policy=ASK, answer=approve_as(there))
        with pytest.raises(PairingDeniedError, match="nobody here can compare"):
            await network.initiator.pair(network.target)
        assert there == [] and network.statuses == [202], "the other user is not bothered"

    asyncio.run(run())


def test_commands_approve_by_the_code_of_the_other_screen(tmp_path):
    async def run():
        network = Network(tmp_path, is_legacy=False, desk_policy=ASK, is_operated=True)
        network.desk.prompts._is_operated = True
        asking = asyncio.create_task(network.initiator.pair(network.target))
        await until(lambda: network.desk.prompts.pending and network.prompts.pending)
        (here,), (there,) = network.prompts.pending, network.desk.prompts.pending
        await until(lambda: here.is_shown and there.is_shown)
        shown = build_pairing_request_json(there)
        assert shown["code"] == here.code and shown["isSecure"] and not shown["isOutgoing"]
        with pytest.raises(CodeRequiredError):
            network.desk.prompts.respond(there.request_id, True)
        network.desk.prompts.respond(there.request_id, True, here.code)
        network.prompts.respond(here.request_id, True, there.code)
        assert (await asyncio.wait_for(asking, PATIENCE_S)).outbound_key

    asyncio.run(run())


@pytest.mark.parametrize("code", ["000000x", "", "１２３４５６", "other"])
def test_a_wrong_code_is_a_denial(tmp_path, code):
    async def run():
        network = Network(tmp_path, is_legacy=False, policy=ALLOW, desk_policy=ASK)
        network.desk.prompts._is_operated = True
        asking = asyncio.create_task(network.initiator.pair(network.target))
        (there,) = await until(lambda: network.desk.prompts.pending)
        wrong = f"{(int(there.code) + 1) % 1_000_000:06}" if code == "other" else code
        with pytest.raises(PairingDeniedError, match="codes differ"):
            network.desk.prompts.respond(there.request_id, True, wrong)
        with pytest.raises(PairingDeniedError):
            await asyncio.wait_for(asking, PATIENCE_S)
        assert network.desk.store.pairings == network.store.pairings == ()

    asyncio.run(run())


def test_one_code_on_screen_at_a_time(tmp_path):
    """A second device that asks meanwhile waits for its turn, its code not shown."""

    async def run():
        first = Network(tmp_path, is_legacy=False, policy=ALLOW, desk_policy=ASK)
        first.desk.prompts._is_operated = True
        other = Identity(device_id="O" * 22, device_name="Other", seed="I" * 43)
        second = PairingInitiator(
            identity=other,
            app_id=None,
            store=open_store(tmp_path / "other", other),
            post=first.post,
            prompts=PairingPrompts(policy=ALLOW),
            clock_ms=first.clock,
        )
        asking = [asyncio.create_task(each.pair(first.target)) for each in (first.initiator, second)]
        requests = await until(lambda: len(first.desk.prompts.pending) == 2 and first.desk.prompts.pending)
        shown = await until(lambda: [each for each in requests if each.is_shown])
        assert len(shown) == 1
        (waiting,) = [each for each in requests if not each.is_shown]
        listed = build_pairing_request_json(waiting)
        assert listed["code"] is None and waiting.code not in listed["question"]
        first.desk.prompts.respond(shown[0].request_id, False)
        await until(lambda: waiting.is_shown)
        first.desk.prompts.respond(waiting.request_id, True, waiting.code)
        results = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), PATIENCE_S)
        assert sorted(type(each).__name__ for each in results) == ["Pairing", "PairingDeniedError"]
        assert len(first.desk.store.pairings) == 1

    asyncio.run(run())


def test_another_device_under_a_known_id_is_always_the_users_to_judge(tmp_path, caplog):
    async def run():
        seen = []
        network = Network(tmp_path, is_legacy=False, policy=ALLOW, answer=approve_as(seen, False))
        await network.initiator.pair(network.target)
        assert seen == [], "allow asks nobody"
        network.initiator._identity = Identity(device_id=SOURCE.device_id, device_name="Weak", seed="Q" * 43)
        await network.store.revoke(network.store.pairings[0].pairing_id)
        with pytest.raises(PairingDeniedError):
            await network.initiator.pair(network.target, is_explicit=True)
        (request,) = seen
        assert request.has_other_identity and "WARNING" in build_pairing_question(request)
        assert len(network.desk.store.pairings) == 1, "the pairing with the device itself stays"

    asyncio.run(run())


def test_never_readably_again_even_after_a_restart(tmp_path):
    """Once it spoke the secure channel at this address, a legacy answer is somebody else's, or somebody's between."""

    async def run():
        network = Network(tmp_path, is_legacy=False, desk_policy=ASK, answer=lambda request: False, policy=ALLOW)
        with pytest.raises(PairingDeniedError):
            await network.initiator.pair(network.target)
        again = Network(tmp_path, legacy_policy=ALLOW, policy=ALLOW)
        for target in (
            again.target,
            PairingTarget(base_url=URL),
            PairingTarget(base_url=URL + "2", device_id="T" * 22),
        ):
            with pytest.raises(PairingDeniedError, match="somebody may stand between"):
                await again.initiator.pair(target, is_explicit=True)
        assert again.store.pairings == ()

    asyncio.run(run())


def test_the_target_never_gives_a_readable_key_to_who_paired_by_code(tmp_path):
    async def run():
        network = Network(tmp_path, is_legacy=False, policy=ALLOW)
        await network.initiator.pair(network.target)
        await network.desk.store.revoke(network.desk.store.pairings[0].pairing_id)
        desk = Desk(tmp_path / "target", ALLOW)  # started anew
        for app_id in (None, "app.other"):
            with pytest.raises(PairingDeniedError, match="readably"):
                await desk.ask(peerDeviceId=SOURCE.device_id, appId=app_id)

    asyncio.run(run())


# ---- the exchange at the desk ---------------------------------------------------------


class Stranger:
    """Speaks the exchange to a desk by hand."""

    def __init__(self, desk, identity=SOURCE, app_id="app.chat"):
        backend = choose_crypto_backend()
        static = build_static_key(identity, backend)
        own = {"identity": identity, "static": static, "backend": backend, "random": os.urandom, "now_ms": NOW}
        self.exchange = ConsumerExchange(app_id=app_id, **own)
        self.desk, self.session_id = desk, None
        self.members = {"peerDeviceId": identity.device_id, "peerDeviceName": "x", "appId": app_id}

    async def send(self, message, *, session_id=None, address="10.0.0.7", **members):
        part = {"v": 1, "m": encode_base64url(message)}
        part |= {"sid": session_id or self.session_id} if session_id or self.session_id else {}
        body = json.dumps(self.members | {"noise": part} | members).encode()
        reply = await self.desk.desk.answer(body, address=address, signer=None)
        noise = reply.document.get("noise", {})
        self.session_id = noise.get("sid", self.session_id)
        return reply.status, parse_base64url(noise.get("m", ""))

    async def reveal(self):
        """Up to m3, which is not sent yet."""
        status, message = await self.send(self.exchange.begin(NOW))
        assert status == 202
        return self.exchange.reveal(message, NOW)


def test_the_exchange_by_hand(tmp_path):
    async def run():
        desk = Desk(tmp_path, ALLOW)
        stranger = Stranger(desk)
        status, confirmed = await stranger.send(await stranger.reveal())
        assert status == 200 and desk.store.pairings == (), "only the consumer's confirmation makes it one"
        final = stranger.exchange.confirm(confirmed, NOW)
        assert (await stranger.send(final))[0] == 200
        (kept,) = desk.store.pairings
        assert kept.inbound_key == stranger.exchange.build_keys().pairing_key
        for message in (final, b""):
            with pytest.raises(MalformedHandshakeError, match="no such exchange"):
                await stranger.send(message)
        assert desk.store.pairings == (kept,)

    asyncio.run(run())


@pytest.mark.parametrize(
    "change",
    [
        {"session_id": "another"},
        {"peerDeviceId": "another"},
        {"appId": "app.other"},
        {"appId": None},
        {"message": b""},
        {"message": bytes(96)},
    ],
)
@pytest.mark.parametrize("step", [3, 5])
def test_whatever_does_not_fit_ends_an_exchange(tmp_path, change, step):
    async def run():
        desk = Desk(tmp_path, ALLOW)
        stranger = Stranger(desk)
        message = await stranger.reveal()
        if step == 5:
            message = stranger.exchange.confirm((await stranger.send(message))[1], NOW)
        with pytest.raises(MalformedHandshakeError):
            await stranger.send(**{"message": message} | change)
        if "session_id" not in change:  # which names no exchange of anybody
            with pytest.raises(MalformedHandshakeError):
                await stranger.send(message)
        assert desk.store.pairings == ()

    asyncio.run(run())


@pytest.mark.parametrize(
    "noise",
    [
        None,
        5,
        [],
        {},
        {"v": 1},
        {"v": 2, "m": "AA"},
        {"v": True, "m": "AA"},
        {"v": "1", "m": "AA"},
        {"v": 1, "m": 5},
        {"v": 1, "m": "A"},
        {"v": 1, "m": "AA="},
        {"v": 1, "m": "A" * 9000},
        {"v": 1, "m": "AA", "sid": 5},
        {"v": 1, "m": "AA", "sid": "x" * 129},
        {"v": 1, "m": ""},
        {"v": 1, "m": "AA"},
        {"v": 1, "m": "A" * 43},
    ],
)
def test_malformed_noise(tmp_path, noise):
    async def run():
        desk = Desk(tmp_path, ALLOW)
        with pytest.raises(MalformedHandshakeError):
            await desk.ask(**{"noise": noise} if noise is not None else {"noise": {"v": None}})
        assert desk.store.pairings == () and not desk.desk._exchanges

    asyncio.run(run())


def test_an_exchange_left_alone_is_over_and_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "EXCHANGES_LIMIT", 2)

    async def run():
        desk = Desk(tmp_path, ALLOW)
        strangers = [Stranger(desk) for _ in range(3)]
        late = await strangers[0].reveal()
        await strangers[1].reveal()
        with pytest.raises(PairingBusyError):
            await strangers[2].send(strangers[2].exchange.begin(NOW), address="10.0.0.9")
        desk.clock.ms += EXCHANGE_REVEAL_MS + 1
        another = Stranger(desk)
        assert (await another.send(another.exchange.begin(NOW), address="10.0.0.9"))[0] == 202
        with pytest.raises(MalformedHandshakeError, match="took too long"):
            await strangers[0].send(late)

    asyncio.run(run())


def test_a_replay_while_the_code_is_on_screen_changes_nothing(tmp_path):
    async def run():
        desk = Desk(tmp_path, ASK, is_operated=True)
        stranger = Stranger(desk)
        reveal = await stranger.reveal()
        asking = asyncio.create_task(stranger.send(reveal))
        (request,) = await until(lambda: desk.prompts.pending)
        for _ in range(2):
            with pytest.raises(MalformedHandshakeError):
                await stranger.send(reveal)
        desk.prompts.respond(request.request_id, True, stranger.exchange.code)
        assert (await asyncio.wait_for(asking, PATIENCE_S))[0] == 200

    asyncio.run(run())


def test_by_code_too_three_requests_per_address(tmp_path):
    async def run():
        desk = Desk(tmp_path, ALLOW)
        for _ in range(HANDSHAKES_PER_ADDRESS_LIMIT):
            await Stranger(desk).reveal()
        with pytest.raises(PairingBusyError):
            await Stranger(desk).reveal()

    asyncio.run(run())


def test_a_pairing_by_code_that_cannot_be_kept_is_not_confirmed(tmp_path, monkeypatch):
    async def run():
        network = Network(tmp_path, is_legacy=False, policy=ALLOW)

        async def refuse(pairing):
            raise StorageError("the disk is full")

        monkeypatch.setattr(network.desk.store, "add", refuse)
        with pytest.raises(PairingFailedError):
            await network.initiator.pair(network.target)
        assert network.statuses == [202, 200, 500] and network.store.pairings == ()

    asyncio.run(run())


SPOILT = {
    "without noise": lambda answer: answer.pop("noise", None),
    "another message": lambda answer: answer.update(noise={"v": 1, "m": "A" * 200, "sid": "x"}),
    "another version": lambda answer: answer.update(noise={"v": 2, "m": "AA", "sid": "x"}),
    "for another": lambda answer: answer.update(peerDeviceId="another"),
    "of another": lambda answer: answer.update(deviceId="another"),
    "neither yes nor no": lambda answer: answer.update(paired="yes"),
    "empty": lambda answer: answer.clear(),
}
LAST_HAS_NO_NOISE = ("without noise", "another message")


@pytest.mark.parametrize(
    ("number", "how"),
    [(n, how) for n, how in itertools.product((1, 2, 3), SPOILT) if n < 3 or how not in LAST_HAS_NO_NOISE],
)
def test_answers_of_the_exchange_that_are_none(tmp_path, number, how):
    async def run():
        network = Network(tmp_path, is_legacy=False, policy=ALLOW)
        post, count = network.post, itertools.count(1)

        async def spoil(*arguments):
            status, body = await post(*arguments)
            answer = json.loads(body)
            if next(count) == number:
                SPOILT[how](answer)
            return status, json.dumps(answer).encode()

        network.initiator._post = spoil
        with pytest.raises(PairingFailedError):
            await network.initiator.pair(network.target)
        assert network.store.pairings == ()

    asyncio.run(run())
