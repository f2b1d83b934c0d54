"""Other devices, written anew from the protocol and without the module: callers that sign, peers that are asked."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import http.server
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from support import find_free_port, read_health, wait_for


def encode_base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_base64url(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def compute_hmac(key: str, nonce: str, method: str, path: str, body: bytes) -> bytes:
    """Section 5 of the protocol: key in base64url, the body's hash in hex or 64 zeros."""
    body_hash = hashlib.sha256(body).hexdigest() if body else "0" * 64
    message = "\n".join((nonce, method, path, body_hash)).encode()
    return hmac.new(decode_base64url(key), message, hashlib.sha256).digest()


def read_token(home) -> str:
    """The control token of the bridge of this home."""
    return (Path(home) / "data" / "control-token").read_text()


def read_device_id(home) -> str:
    return json.loads((Path(home) / "data" / "identity.json").read_text())["deviceId"]


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


def send(port, method, path, body=b"", fields=(), *, source="127.0.0.1", timeout_s=60) -> Answer:
    """One request with exactly these header fields, besides Host and those of the body; `fields` may repeat."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s, source_address=(source, 0))
    try:
        connection.putrequest(method, path)
        if body:
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(body)))
        for name, value in fields:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


@dataclass
class Caller:
    """A device that is paired with the bridge `receiver` and signs what it asks."""

    device_id: str
    app_id: str
    receiver: str
    key: str = field(repr=False)

    def nonce(self, *, skew_ms: int = 0) -> str:
        """A t1 nonce, as of `skew_ms` from now."""
        binding = hashlib.sha256(f"{self.device_id}\0{self.receiver}".encode()).digest()[:9]
        now_ms = time.time_ns() // 1_000_000 + skew_ms
        return f"t1.{now_ms}.{encode_base64url(os.urandom(16))}.{encode_base64url(binding)}"

    def sign(self, method, path, body=b"", *, nonce=None, spell=encode_base64url) -> dict[str, str]:
        """The four header fields."""
        nonce = nonce or self.nonce()
        return {
            "X-DVAI-Peer-Device-Id": self.device_id,
            "X-DVAI-App-Id": self.app_id,
            "X-DVAI-Nonce": nonce,
            "X-DVAI-Signature": spell(compute_hmac(self.key, nonce, method, path, body)),
        }

    def ask(self, port, method, path, body=b"", *, extra=(), timeout_s=60, **signing) -> Answer:
        """A signed request."""
        fields = [*self.sign(method, path, body, **signing).items(), *extra]
        return send(port, method, path, body, fields, timeout_s=timeout_s)


def pair_with(port, device_id, app_id=None, *, name="a phone", source="127.0.0.1", **more) -> Caller:
    """Ask a bridge that allows it for a key, as other software does. A bridge lets an address ask three times."""
    asked = {"peerDeviceId": device_id, "peerDeviceName": name, "via": "lan-handshake"} | more
    if app_id is not None:
        asked["appId"] = app_id
    answer = send(port, "POST", "/v1/dvai/handshake", json.dumps(asked).encode(), source=source)
    assert answer.status == 200, answer.body
    given = answer.json
    assert given["paired"] is True and given["via"] == "lan-handshake" and given["peerDeviceId"] == device_id
    assert len(decode_base64url(given["pairingKey"])) == 32
    return Caller(device_id, app_id or device_id, given["deviceId"], given["pairingKey"])


def ask_owner(bridge, home, method, path, body=None):
    """A request of the owner of a running bridge, as its commands send them."""
    headers = {"X-DVAI-Control": read_token(home)}
    status, _, data = bridge.request(method, path, body, headers, timeout_s=60)
    return status, json.loads(data)


# What must be true after every hostile case


def count_descriptors(bridge) -> int:
    """Of the process, where the system shows them."""
    path = f"/proc/{bridge.process.pid}/fd"
    return len(os.listdir(path)) if os.path.isdir(path) else 0


@contextlib.contextmanager
def recovering(bridge):
    """What happens inside leaves a bridge that answers, holds no more descriptors than before and logs no traceback."""
    health = read_health(bridge)
    wait_for(lambda: read_health(bridge).get("queue", {}).get("running", 0) == 0, 20, "nothing runs")
    before = count_descriptors(bridge)
    yield
    wait_for(lambda: read_health(bridge)["status"] == health["status"], 10, "health is back")
    queue = health.get("queue")
    wait_for(lambda: read_health(bridge).get("queue") == (queue and queue | {"running": 0, "waiting": 0}), 20, "queue")
    wait_for(lambda: count_descriptors(bridge) <= before, 60, "descriptors are back")
    assert bridge.process.poll() is None
    assert not any("Traceback" in line for line in bridge.log), "\n".join(bridge.log)


def find_secrets(secrets, *, bridges=(), homes=()):
    """Where these texts stand: lines that a bridge wrote, and files, those that only their owner can read aside."""
    found = [line for bridge in bridges for line in bridge.lines + bridge.log if any(each in line for each in secrets)]
    for path in (each for home in homes for each in Path(home).rglob("*") if each.is_file()):
        is_private = path.stat().st_mode & 0o077 == 0 and path.parent.stat().st_mode & 0o077 == 0
        if not is_private and any(each.encode() in path.read_bytes() for each in secrets):
            found.append(str(path))
    return found


# Peers that are asked


@dataclass(eq=False)
class FakePeer:
    """A device on loopback that pairs with everybody and serves `models`; `script(handler, body)` answers chats.

    `scores`: tok/s by model, or whatever it claims. `asked`: the bodies of the chats. `released`: ends those who hang.
    """

    device_id: str
    script: object
    models: tuple[str, ...] = ()
    scores: object = None
    port: int = field(default_factory=find_free_port)  # where it may come back
    key: str = field(default_factory=lambda: encode_base64url(os.urandom(32)), repr=False)
    asked: list = field(default_factory=list)
    headers: list = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    seen: threading.Event = field(default_factory=threading.Event)  # the client has got what came first

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def verify(self, handler, body) -> bool:
        """Whether a request has our caller's signature."""
        nonce, signature = handler.headers["X-DVAI-Nonce"], handler.headers["X-DVAI-Signature"]
        if nonce is None or signature is None:
            return False
        computed = compute_hmac(self.key, nonce, handler.command, handler.path, body)
        return signature in (encode_base64url(computed), computed.hex())

    def answer_get(self, handler):
        path, model = handler.path, self.models[0] if self.models else None
        if path == "/v1/dvai/health":
            health = {"status": "ok", "version": "1", "uptimeSec": 1, "currentModelId": model}
            handler.answer(200, health | {"deviceId": self.device_id, "deviceName": self.device_id})
        elif not self.verify(handler, b""):
            handler.answer(401, {"error": {"message": "no"}})
        elif path == "/v1/models":
            handler.answer(200, {"object": "list", "data": [{"id": model} for model in self.models]})
        elif path == "/v1/dvai/capability" and self.scores is not None:
            handler.answer(200, self.scores if isinstance(self.scores, bytes) else build_scores(self.scores))
        else:
            handler.answer(404, {"error": {"message": "no"}})

    def answer_handshake(self, handler, asked):
        given = {"paired": True, "pairedAt": 1, "via": "lan-handshake", "pairingKey": self.key}
        named = {"peerDeviceId": asked["peerDeviceId"], "deviceId": self.device_id, "deviceName": self.device_id}
        handler.answer(200, given | named)


class PeerHandler(http.server.BaseHTTPRequestHandler):
    peer: FakePeer
    protocol_version = "HTTP/1.1"  # but for one request each: no pooled connection blurs the count of descriptors

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.peer.answer_get(self)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/v1/dvai/handshake":
            self.peer.answer_handshake(self, json.loads(body))
        elif not self.peer.verify(self, body):
            self.answer(401, {"error": {"message": "no"}})
        else:
            self.peer.asked.append(json.loads(body))
            self.peer.headers.append(self.headers)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.peer.script(self, self.peer.asked[-1])

    def answer(self, status, value, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
        for name, text in {**fixed, **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def begin(self, *chunks):
        """The head of an event stream, and these chunks of it."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.write(*chunks)

    def write(self, *chunks):
        for each in chunks:
            data = each if isinstance(each, bytes) else b"data: " + json.dumps(each).encode() + b"\n\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self):
        self.write(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")


def build_scores(scores):
    rows = [
        {"modelId": model, "deviceId": "x", "libraryVersion": "1", "tokPerSec": score, "source": "probe"}
        for model, score in scores.items()
    ]
    return {"scores": [row | {"measuredAt": 1} for row in rows]}


@contextlib.contextmanager
def start_peer(peer):
    """A running fake peer; ended, with its connections, on leaving."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", peer.port), type("Bound", (PeerHandler,), {"peer": peer}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield peer
    finally:
        peer.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


# Scripts: how a peer answers a chat


def build_delta(model, delta, finish_reason=None):
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def serve_text(*texts):
    """A good answer."""

    def act(handler, body):
        model = body["model"]
        handler.begin(build_delta(model, {"role": "assistant", "content": ""}))
        handler.write(*(build_delta(model, {"content": text}) for text in texts))
        handler.write(build_delta(model, {}, "stop"))
        handler.end_stream()

    return act


def break_off(*deltas, tail=b"", finish_reason=None, reset=False, when_seen=False):
    """The beginning of an answer, then the end of the connection; `when_seen`: once the client has that beginning."""

    def act(handler, body):
        model = body["model"]
        handler.begin(*(build_delta(model, delta) for delta in deltas))
        if when_seen:
            handler.peer.seen.wait(60)
        if finish_reason is not None:
            handler.write(build_delta(model, {}, finish_reason))
        if tail:
            handler.write(tail)
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return act


def answer_status(status, value=None, **headers):
    def act(handler, body):
        handler.answer(status, value or {"error": {"message": "no"}}, **headers)

    return act


def answer_raw(data):
    """Bytes in the place of an HTTP answer."""

    def act(handler, body):
        handler.wfile.write(data)

    return act


def hang(*deltas):
    """Takes the request, begins the answer with these deltas if there are any, and is silent until released."""

    def act(handler, body):
        if deltas:
            handler.begin(*(build_delta(body["model"], delta) for delta in deltas))
        handler.peer.released.wait(120)

    return act
