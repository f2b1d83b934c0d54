"""The bridge as a library: in programs with and without an event loop, their callbacks, their interceptor."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

import dvai_bridge
from dvai_bridge import (
    BUILTIN_MODEL_ID,
    DVAI,
    PEER_SLOTS,
    PEER_WAITING,
    BlockingDVAI,
    BridgeError,
    HttpResponse,
    InvalidRequestError,
    OffloadConfig,
    PairingDeniedError,
    Peer,
    PeerVia,
    UsageError,
    build_peer_json,
    build_signed_headers,
    generate_nonce,
    load_audit,
)
from tests.support import CLEAN_ENVIRON, MODULE, wait_for
from tests.support_worker import build_byte_model

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
NO_LAN = {"discover_lan": False}


def build(home, offload=None, **options):
    """A bridge that serves the demonstration model, unless it is to load none."""
    offload = OffloadConfig(**NO_LAN, **(offload or {}))
    model = {} if offload.only else {"model": "builtin"}
    return DVAI(environ=CLEAN_ENVIRON, home=home, offload=offload, **{"port": 0} | model | options)


def ask(bridge, path="/chat/completions", body=HELLO, headers=None, method="POST"):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request(method, "/v1" + path, data, {"Content-Type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def say(bridge, **body):
    status, _, data = ask(bridge, body=HELLO | body)
    assert status == 200, data
    return json.loads(data)["choices"][0]["message"]["content"]


# Without an event loop


def test_ordinary_use_from_start_to_end(tmp_path):
    before = threading.enumerate(), signal.getsignal(signal.SIGINT), logging.getLogger().handlers[:]
    seen = []
    bridge = build(tmp_path / "home", {"enabled": True}, on_progress=seen.append)  # a Path is welcome
    with bridge as dvai:
        assert dvai.model_id == BUILTIN_MODEL_ID and dvai.base_url == f"http://127.0.0.1:{dvai.port}/v1"
        assert say(dvai) and seen[-1] == 1.0 and dvai.get_peers() == ()
        assert dvai.assess_hardware().hints.ram_gb > 0
        measured = dvai.probe_capability()
        assert measured.tok_per_s > 0 and dvai.get_capability() == measured
        assert dvai.get_capability(BUILTIN_MODEL_ID.upper()) == measured and dvai.get_capability("other") is None
        requests = dvai.pairing_requests()
        readers = threading.Thread(target=list, args=(requests,))
        readers.start()  # ends with the bridge
    readers.join(20)
    assert (threading.enumerate(), signal.getsignal(signal.SIGINT), logging.getLogger().handlers[:]) == before
    assert bridge.engine.pid is None
    dvai.close()
    for call in (dvai.get_peers, dvai.unload, dvai.probe_capability, dvai.assess_hardware, dvai.pairing_requests):
        with pytest.raises(RuntimeError, match="closed: make another"):
            call()
    for work in (bridge.load_model("builtin"), bridge.unload_model("x"), bridge.unload(), bridge.initiate_pairing("x")):
        with pytest.raises(RuntimeError, match="closed: make another"):
            asyncio.run(work)
    with pytest.raises(RuntimeError, match="closed: make another"):
        bridge.completion(history=[])


def test_with_offload_off_there_are_no_scores(tmp_path):
    with build(tmp_path) as dvai:
        assert dvai.probe_capability() is None and dvai.get_capability() is None
        with pytest.raises(BridgeError, match="OffloadConfig"):
            dvai.initiate_pairing("http://127.0.0.1:9")


def test_after_unload_nothing_is_served_here(tmp_path):
    bridge = build(tmp_path, {"enabled": True})
    with bridge as dvai:
        dvai.unload()
        dvai.unload()
        assert bridge.engine is None and dvai.model_id is None and dvai.get_capability() is None
        status, _, data = ask(dvai, headers={"X-DVAI-Offload": "never"})
        assert status == 503 and json.loads(data)["error"]["type"] == "no_local_backend"
        status, _, data = ask(dvai)
        assert status == 503 and json.loads(data)["error"]["type"] == "no_capable_device"
        health = json.loads(ask(dvai, "/dvai/health", b"", method="GET")[2])
        assert health["status"] == "ok" and health["currentModelId"] is None


def test_calls_before_the_start_say_so(tmp_path):
    bridge = build(tmp_path)
    blocking = BlockingDVAI(bridge)
    blocking.close()  # nothing yet
    for call in (bridge.get_peers, bridge.pairing_requests, blocking.get_peers, blocking.unload):
        with pytest.raises(RuntimeError, match="has not started: initialize it"):
            call()
    for name in ("base_url", "port"):
        with pytest.raises(RuntimeError, match="has not started"):
            getattr(bridge, name)

    async def run():
        for work in (bridge.probe_capability(), bridge.get_capability(), bridge.initiate_pairing("x"), bridge.unload()):
            with pytest.raises(RuntimeError, match="has not started"):
                await work
        assert (await bridge.assess_hardware()).tok_per_s > 0
        async with bridge:  # and none of that is in the way
            assert await bridge.get_capability() is None
            with pytest.raises(RuntimeError, match="starts once"):
                await bridge.initialize()
            assert await asyncio.to_thread(say, bridge)

    asyncio.run(run())


def test_an_error_of_the_program_closes_everything(tmp_path):
    bridge = build(tmp_path)
    with pytest.raises(KeyError, match="mine"), bridge as dvai:
        port = dvai.port
        raise KeyError("mine")
    assert bridge.engine.pid is None and not any(each.name == "dvai-bridge" for each in threading.enumerate())
    with pytest.raises(OSError):
        http.client.HTTPConnection("127.0.0.1", port, timeout=5).connect()


def test_what_makes_starting_impossible_is_raised(tmp_path):
    with build(tmp_path / "one") as one, pytest.raises(UsageError, match="another program has it"):
        build(tmp_path / "two", port=one.port).__enter__()
    assert not any(each.name == "dvai-bridge" for each in threading.enumerate())


def test_closing_from_another_thread_while_it_starts(tmp_path):
    loading, ended = threading.Event(), threading.Event()
    dvai = BlockingDVAI(build(tmp_path))

    def run():
        with contextlib.suppress(RuntimeError, BridgeError):  # or it was faster
            dvai.initialize(lambda fraction: loading.set())
        ended.set()

    threading.Thread(target=run).start()
    assert loading.wait(60)
    dvai.close()
    assert ended.wait(60)
    with pytest.raises(RuntimeError, match="closed"):
        dvai.get_peers()


def test_a_callback_may_not_wait_for_its_own_bridge(tmp_path):
    errors = []
    dvai = BlockingDVAI(build(tmp_path))

    def ask_back(fraction):
        for call in (dvai.get_peers, dvai.close):
            with pytest.raises(RuntimeError) as caught:
                call()
            errors.append(str(caught.value))

    dvai.initialize(ask_back)
    dvai.close()
    assert errors and all("hand that over to another thread" in error for error in errors)


INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from dvai_bridge import DVAI

def interrupt(fraction):
    if sys.argv[3] == "starting":
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background does not inherit
bridge = DVAI(home=sys.argv[2], port=0, model="builtin")
try:
    with bridge as dvai:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)
except KeyboardInterrupt:
    print("interrupted", bridge.engine.pid, [thread.name for thread in threading.enumerate()])
"""


@pytest.mark.parametrize("moment", ["starting", "running"])
def test_an_interrupted_program_leaves_nothing(tmp_path, moment):
    pytest.importorskip("resource", reason="stops processes with signals")
    command = [sys.executable, "-X", "dev", "-c", INTERRUPTED, str(MODULE.parent), str(tmp_path), moment]
    done = subprocess.run(command, env=CLEAN_ENVIRON, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted None ['MainThread']\n"), done.stderr
    assert "Traceback" not in done.stderr and "never awaited" not in done.stderr, done.stderr


# In an event loop


@pytest.mark.parametrize("passes", [0, 1, 3, 10, 30, 100])
def test_closing_while_it_starts(tmp_path, passes):
    async def run():
        bridge = build(tmp_path, {"enabled": True}, lan=True, host="127.0.0.1")
        starting = asyncio.create_task(bridge.initialize())
        for _ in range(passes):
            await asyncio.sleep(0)
        await bridge.close()
        with pytest.raises((RuntimeError, BridgeError)):
            await starting
        assert bridge.engine.pid is None and asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.gather(bridge.close(), bridge.close())

    asyncio.run(run())


@pytest.mark.parametrize("passes", [1, 10, 100])
def test_cancelling_while_it_starts(tmp_path, passes):
    async def run():
        bridge = build(tmp_path, {"enabled": True}, lan=True, host="127.0.0.1")
        starting = asyncio.create_task(bridge.initialize())
        for _ in range(passes):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert bridge.engine.pid is None and asyncio.all_tasks() == {asyncio.current_task()}
        with pytest.raises(RuntimeError, match="starts once"):
            await bridge.start()

    asyncio.run(run())


def test_cancelling_the_program_closes_the_bridge(tmp_path):
    async def run():
        bridge, running = build(tmp_path, {"enabled": True}), asyncio.Event()

        async def use():
            async with bridge:
                running.set()
                await asyncio.Event().wait()

        using = asyncio.create_task(use())
        await asyncio.wait_for(running.wait(), 60)
        using.cancel()
        with pytest.raises(asyncio.CancelledError):
            await using
        assert bridge.engine.pid is None and asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_bridge_that_never_started_closes(tmp_path):
    async def run():
        bridge = build(tmp_path)
        await asyncio.gather(bridge.close(), bridge.close())
        with pytest.raises(RuntimeError, match="starts once"):
            await bridge.initialize()

    asyncio.run(run())


def test_options_are_checked(tmp_path):
    with pytest.raises(UsageError, match=r"OffloadConfig\.rendezvous_url '.*': it must be the URL of a relay"):
        build(tmp_path, {"rendezvous_url": "relay.example"})
    with pytest.raises(UsageError, match="port"):
        DVAI(environ={}, home=tmp_path, port=70000)
    with pytest.raises(TypeError, match="colour"):
        DVAI(environ={}, home=tmp_path, colour="red")


# Callbacks, between two bridges of one program


def make_async(function):
    async def call(*arguments):
        await asyncio.sleep(0)
        return function(*arguments)

    return call


KINDS = {"sync": lambda function: function, "async": make_async}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "strong.gguf"
    path.write_bytes(build_byte_model())
    return path


def start_strong(home, model, **offload):
    return build(home, offload, model=model, lan=True, host="127.0.0.1")


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_of_both_kinds(tmp_path, model, kind, caplog):
    make = KINDS[kind]
    asked, compared, progress, told = [], [], [], []

    def approve(request):
        asked.append((request.peer_device_name, request.peer_device_id, request.code))
        return True

    def compare(request):
        compared.append((request.peer_device_name, request.is_outgoing, request.code))
        return True

    def fail(*arguments):
        told.append(arguments)
        raise ValueError("of the program")

    strong = start_strong(tmp_path / "strong", model, on_pairing_request=make(approve), device_name="strong one")
    with strong as server:
        offload = {"only": True, "device_name": "weak one", "on_offload": make(fail)}
        offload |= {"custom_discovery": make(fail), "on_pairing_request": make(compare)}
        with build(tmp_path / "weak", offload, on_progress=make(progress.append)) as client:
            pairing = client.initiate_pairing(server.base_url)
            assert pairing.device_name == "strong one" and pairing.outbound_key is not None
            ((name, _, code),) = asked
            assert name == "weak one" and compared == [("strong one", True, code)] and len(code) == 6
            (peer,) = client.get_peers()
            assert peer.device_id == pairing.device_id and client.model_id is None
            status, headers, data = ask(client, body=HELLO | {"model": "strong"})
            assert status == 200 and headers["X-DVAI-Served-By"] == peer.device_id, data
            wait_for(lambda: [each for each in told if each], 20, "on_offload is told")
            assert [each[0].device_id for each in told if each] == [peer.device_id] and () in told
            assert client.get_capability() is client.probe_capability() is None
    assert progress == [], "nothing was loaded"
    assert "a callback failed" in caplog.text and "custom discovery failed" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_that_denies_or_fails_is_a_denial(tmp_path, model, kind):
    answers = iter([False, ValueError("of the program"), None])

    def answer(request):
        value = next(answers)
        if isinstance(value, Exception):
            raise value
        return value

    with (
        start_strong(tmp_path / "strong", model, on_pairing_request=KINDS[kind](answer)) as server,
        build(tmp_path / "weak", {"only": True, "pairing": "allow"}) as client,
    ):
        for _ in range(3):
            with pytest.raises(PairingDeniedError, match="denied"):
                client.initiate_pairing(server.base_url)
        assert next(answers, "asked three times") == "asked three times"


def test_pairing_requests_are_read_and_answered(tmp_path, model):
    with (
        start_strong(tmp_path / "strong", model) as server,
        build(tmp_path / "weak", {"only": True, "pairing": "allow", "device_name": "weak one"}) as client,
    ):
        with pytest.raises(PairingDeniedError):  # nobody could be asked
            client.initiate_pairing(server.base_url)
        paired = []
        requests = server.pairing_requests()
        pairing = threading.Thread(target=lambda: paired.append(client.initiate_pairing(server.base_url)))
        reading = threading.Event()

        def approve():
            reading.set()
            request = next(requests)
            assert request.peer_device_name == "weak one"
            request.respond(True)

        reader = threading.Thread(target=approve)
        reader.start()
        assert reading.wait(20)
        wait_for(lambda: client_is_heard(server), 20, "somebody can be asked")
        pairing.start()
        pairing.join(60)
        reader.join(60)
        assert len(paired) == 1 and paired[0].outbound_key is not None


def client_is_heard(server):
    """Whether the reader of pairing requests has registered itself."""
    return bool(server._bridge.devices.prompts._readers)


PEER = Peer(
    device_id="a-device",
    device_name="known",
    dvai_version="0.1.0",
    base_url="http://127.0.0.1:9/v1",
    via=PeerVia.STATIC,
    last_seen_ms=0,
)


@pytest.mark.parametrize(
    "offload",
    [
        {"known_peers": [PEER]},
        {"custom_discovery": lambda: [PEER]},
        {"custom_discovery": make_async(lambda: [PEER])},
        {"custom_discovery": lambda: [build_peer_json(PEER)]},
    ],
)
def test_peers_that_the_program_knows(tmp_path, offload):
    with build(tmp_path, {"enabled": True} | offload) as dvai:
        (peer,) = wait_for(dvai.get_peers, 20, "the peer is known")
        assert (peer.device_id, peer.device_name, peer.base_url) == ("a-device", "known", PEER.base_url)
        assert peer.via is (PeerVia.CUSTOM if "custom_discovery" in offload else PeerVia.STATIC)


# The interceptor


class Interceptor:
    """Answers with what the test has set, and remembers what it was given. `fail` makes it raise."""

    def __init__(self):
        self.answer = None
        self.calls = []

    async def __call__(self, body, context, headers):
        self.calls.append((dict(body), context, headers))
        answer = self.answer(body) if callable(self.answer) else self.answer
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture(scope="module")
def intercepted(tmp_path_factory):
    interceptor = Interceptor()
    home = tmp_path_factory.mktemp("home")
    options = {"chat_completion_interceptor": interceptor, "api_key": "sk-1", "lan": True, "host": "127.0.0.1"}
    with build(home, {"pairing": "allow", "legacy_pairing": "allow"}, **options) as dvai:
        yield dvai, interceptor, home


KEY = {"Authorization": "Bearer sk-1"}


def test_the_interceptor_comes_after_authentication_and_before_routing(intercepted):
    dvai, interceptor, _ = intercepted
    interceptor.calls.clear()
    interceptor.answer = {"object": "chat.completion", "mine": True}
    assert ask(dvai)[0] == 401 and ask(dvai, headers=KEY | {"Origin": "http://evil.example"})[0] == 403
    assert interceptor.calls == []
    status, headers, data = ask(dvai, body=HELLO | {"model": "unknown"}, headers=KEY | {"X-Some-Field": "Value"})
    assert (status, json.loads(data)) == (200, interceptor.answer) and headers["Content-Type"] == "application/json"
    ((body, context, fields),) = interceptor.calls
    assert body == HELLO | {"model": "unknown"} and fields["x-some-field"] == "Value"
    assert all(name == name.lower() for name in fields)
    assert context.caller.name == "LOOPBACK" and context.client_address == "127.0.0.1"
    assert (context.device_id, context.app_id, context.model_id) == (None, None, BUILTIN_MODEL_ID)
    assert context.request_id == headers["X-Request-Id"]
    for path, other in (("/completions", {"prompt": "Hi", "max_tokens": 1}), ("/embeddings", {"input": "Hi"})):
        assert ask(dvai, path, other, KEY)[0] == 200
    assert len(interceptor.calls) == 1, "chat completions only"


def test_none_leaves_the_request_to_the_bridge(intercepted):
    dvai, interceptor, _ = intercepted
    interceptor.answer = None
    status, _, data = ask(dvai, headers=KEY)
    assert status == 200 and json.loads(data)["model"] == BUILTIN_MODEL_ID
    interceptor.answer = lambda body: body.update(max_tokens=1)
    status, _, data = ask(dvai, headers=KEY)
    assert status == 200 and json.loads(data)["usage"]["completion_tokens"] == 1
    interceptor.answer = lambda body: body.update(model="other")
    assert ask(dvai, headers=KEY)[0] == 404


def test_an_answer_has_status_headers_and_body(intercepted):
    dvai, interceptor, _ = intercepted
    copied = {"X-Mine": "1", "Content-Length": "999", "Transfer-Encoding": "chunked", "Connection": "close"}
    for body in (b"short", "short"):
        interceptor.answer = HttpResponse(status=418, headers=copied, body=body)
        status, headers, data = ask(dvai, headers=KEY)
        assert (status, data, headers["X-Mine"], headers.get_all("Content-Length")) == (418, b"short", "1", ["5"])
        assert headers["Transfer-Encoding"] is None


@pytest.mark.parametrize(
    "answer",
    [
        ValueError("secret-canary"),
        TimeoutError("secret-canary"),
        "a text",
        ["secret-canary"],
        HttpResponse(status=99),
        HttpResponse(status="200"),
        HttpResponse(headers=[("X-Bad", "a\r\nX-Injected: 1")], body=b"secret-canary"),
        HttpResponse(headers=[("X-Bad",)], body=b"secret-canary"),
        HttpResponse(body=["secret-canary"]),
        {"not JSON": ...},
    ],
    ids=repr,
)
def test_its_error_is_a_500_that_tells_nothing(intercepted, answer):
    dvai, interceptor, _ = intercepted
    interceptor.answer = answer
    status, headers, data = ask(dvai, headers=KEY)
    assert status == 500 and json.loads(data)["error"]["message"] == "internal error"
    assert "X-Injected" not in headers
    interceptor.answer = None
    assert ask(dvai, headers=KEY)[0] == 200


def test_an_error_of_the_bridges_kind_is_answered_as_it_is(intercepted):
    dvai, interceptor, _ = intercepted
    interceptor.answer = InvalidRequestError("not on Sundays", param="model")
    status, _, data = ask(dvai, headers=KEY)
    assert (status, json.loads(data)["error"]["message"]) == (400, "not on Sundays")


def read_entries(home, condition):
    """The audit's entries, once it has some that fulfil the condition."""
    return wait_for(lambda: [e for e in load_audit(home / "data" / "audit") if condition(e)], 30, "an entry")


def test_a_stream_is_sent_as_it_comes_and_stands_in_the_audit(intercepted):
    dvai, interceptor, home = intercepted
    go_on, closed = threading.Event(), threading.Event()

    async def stream():
        try:
            yield b"data: first\n\n"
            await asyncio.to_thread(go_on.wait, 60)
            yield b"data: second\n\n"
        finally:
            closed.set()

    interceptor.answer = HttpResponse(headers=[("Content-Type", "text/event-stream")], body=stream())
    connection = http.client.HTTPConnection("127.0.0.1", dvai.port, timeout=60)
    fields = {"Content-Type": "application/json", "X-Request-Id": "stream-1"} | KEY
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(HELLO | {"model": "asked"}), fields)
        answer = connection.getresponse()
        assert answer.headers["Content-Type"] == "text/event-stream"
        assert answer.read1(100) == b"data: first\n\n"  # the second does not exist yet
        go_on.set()
        assert answer.read() == b"data: second\n\n"
    assert closed.wait(20)
    (entry,) = read_entries(home, lambda e: e["requestId"] == "stream-1")
    assert (entry["engine"], entry["outcome"], entry["modelAsked"]) == ("interceptor", "ok", "asked")
    interceptor.answer = ValueError("mine")
    assert ask(dvai, headers=KEY | {"X-Request-Id": "failed-1"})[0] == 500
    (entry,) = read_entries(home, lambda e: e["requestId"] == "failed-1")
    assert (entry["status"], entry["outcome"]) == (500, "internal_error")


def test_a_client_that_leaves_closes_the_stream(intercepted):
    dvai, interceptor, home = intercepted
    closed = threading.Event()

    async def stream():
        try:
            while True:
                yield b"data: more\n\n"
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    interceptor.answer = HttpResponse(body=stream())
    connection = http.client.HTTPConnection("127.0.0.1", dvai.port, timeout=60)
    fields = {"Content-Type": "application/json", "X-Request-Id": "left-1"} | KEY
    connection.request("POST", "/v1/chat/completions", json.dumps(HELLO), fields)
    assert connection.getresponse().read1(10)
    connection.close()
    assert closed.wait(20)
    (entry,) = read_entries(home, lambda e: e["requestId"] == "left-1")
    assert entry["outcome"] == "cancelled"


def pair_device(dvai, device_id):
    """Pair as the device `device_id`; returns what signs a chat completion of it."""
    hello = {"peerDeviceId": device_id, "peerDeviceName": device_id, "appId": "app", "via": "lan-handshake"}
    status, _, data = ask(dvai, "/dvai/handshake", hello, KEY)
    assert status == 200, data
    paired = json.loads(data)

    def sign(body):
        nonce = generate_nonce(device_id, paired["deviceId"], dvai_bridge.read_clock_ms())
        named = {"device_id": device_id, "app_id": "app", "nonce": nonce}
        key, path = paired["pairingKey"], "/v1/chat/completions"
        return dict(build_signed_headers(pairing_key=key, method="POST", path=path, body=body, **named))

    return sign


def test_the_interceptor_is_told_which_device_asks(intercepted):
    dvai, interceptor, home = intercepted
    body = json.dumps(HELLO).encode()
    fields = pair_device(dvai, "a-phone")(body) | {"X-Request-Id": "phone-1"}
    interceptor.calls.clear()
    interceptor.answer = {}
    assert ask(dvai, body=body, headers=fields)[0] == 200
    ((_, context, headers),) = interceptor.calls
    assert (context.device_id, context.app_id, context.caller.name) == ("a-phone", "app", "PAIRED")
    assert headers["x-dvai-signature"] == fields["X-DVAI-Signature"]
    (entry,) = read_entries(home, lambda e: e["requestId"] == "phone-1")
    assert (entry["deviceId"], entry["appId"], entry["caller"]) == ("a-phone", "app", "peer")
    assert ask(dvai, body=body, headers=fields)[0] == 401 and len(interceptor.calls) == 1, "sent again"


def test_a_device_that_takes_too_much_is_refused_and_nobody_else(intercepted):
    dvai, interceptor, _ = intercepted
    body, sign, go_on, answers = json.dumps(HELLO).encode(), pair_device(dvai, "greedy"), threading.Event(), []

    async def stream():
        yield b"data: begun\n\n"
        await asyncio.to_thread(go_on.wait, 60)

    interceptor.answer = lambda body: HttpResponse(body=stream())
    interceptor.calls.clear()
    tasks = [
        threading.Thread(target=lambda: answers.append(ask(dvai, body=body, headers=sign(body))))
        for _ in range(PEER_SLOTS + PEER_WAITING + 1)
    ]
    for task in tasks:
        task.start()
    wait_for(lambda: answers, 30, "one is too many")
    wait_for(lambda: len(interceptor.calls) == PEER_SLOTS, 30, "others are answered")
    ((status, headers, data),) = answers
    assert status == 429 and int(headers["Retry-After"]) >= 1 and b"data: begun" not in data
    interceptor.answer = None
    assert ask(dvai, headers=KEY)[0] == 200, "the owner has no quota"
    interceptor.answer = lambda body: HttpResponse(body=stream())
    go_on.set()
    for task in tasks:
        task.join(60)
    assert sorted(status for status, _, _ in answers) == [200] * (PEER_SLOTS + PEER_WAITING) + [429]
    assert len(interceptor.calls) == PEER_SLOTS + PEER_WAITING + 1, "they waited for a place"


def test_an_interceptor_that_never_answers_has_a_deadline(tmp_path):
    def wait(body, context, headers):
        return asyncio.get_running_loop().create_future()

    with build(tmp_path, chat_completion_interceptor=wait, timeout=1) as dvai:
        status, _, data = ask(dvai)
        assert status == 504 and "--timeout" in json.loads(data)["error"]["message"]


def test_the_environment_has_no_say_in_what_the_program_sets(tmp_path):
    environ = CLEAN_ENVIRON | {"DVAI_PORT": "1", "DVAI_ALIAS": "from-outside", "DVAI_HOME": str(tmp_path / "other")}
    with DVAI(environ=environ, home=str(tmp_path / "mine"), port=0, model="builtin") as dvai:
        assert dvai.port > 1 and dvai.model_id == "from-outside"
    assert os.listdir(tmp_path) == ["mine"]
