"""A relay in a process of its own, and a WebSocket client on a raw socket that says exactly the bytes it is told."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import wait_for

RELAY = Path(__file__).resolve().parent.parent / "rendezvous_server.py"
SETTINGS = (
    "HOST",
    "PORT",
    "RENDEZVOUS_",
    "SESSION",
    "MAX_",
    "ALLOWED_",
    "METRICS_",
    "LOG_",
    "TRUSTED_",
    "RELAY_",
    "TLS_",
)
CLEAN_ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith((*SETTINGS, "REDIS_"))}
PEER = {"deviceId": "dev", "deviceName": "Device", "capability": {"m": 10.5}, "ephemeralPubKey": "key"}
DEADLINE_S = 60.0


@dataclass
class RunningRelay:
    """A real relay. `log`: what it wrote to stderr. `inside`: the relay itself, where it runs in this process."""

    process: subprocess.Popen[str]
    port: int
    log: list[str] = field(default_factory=list)
    inside: object = None

    def get(self, path, method="GET", headers=None):
        """(status, headers, body) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, headers=headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def read_health(self):
        status, _, body = self.get("/health")
        assert status == 200
        return json.loads(body)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def count_descriptors(self):
        """Open descriptors, or None where the system does not tell."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.exists() else None

    def read_rss_bytes(self):
        """Resident memory, or None where the system does not tell."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        return int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@contextlib.contextmanager
def start_relay(*flags, port=0, **environ):
    """A relay on loopback that listens; stopped, and its log checked, at the end."""
    process = subprocess.Popen(
        [sys.executable, str(RELAY), "--host", "127.0.0.1", "--port", str(port), *flags],
        env=CLEAN_ENVIRON | {"RENDEZVOUS_URL": "wss://relay.example.org"} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log: list[str] = []
    follower = threading.Thread(target=lambda: log.extend(line.rstrip("\n") for line in process.stderr))
    follower.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on http"), (line, log)
        yield RunningRelay(process, int(line.rpartition(":")[2]), log)
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        follower.join()
        process.stdout.close()
        process.stderr.close()
    assert not any("Traceback" in line for line in log), "\n".join(log)


def encode_frame(first, payload, mask=b"\x01\x02\x03\x04"):
    """A frame with `first` as its first byte, masked as clients must; `mask` None: not masked."""
    size = len(payload)
    bit = 0x80 if mask else 0
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65536:
        head = struct.pack("!BBH", first, bit | 126, size)
    else:
        head = struct.pack("!BBQ", first, bit | 127, size)
    if mask is None:
        return head + payload
    key = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def encode_text(message, **spelling):
    """A JSON message as JSON.stringify writes it, in one frame."""
    spelling.setdefault("separators", (",", ":"))
    return encode_frame(0x81, json.dumps(message, ensure_ascii=False, **spelling).encode())


class RawClient:
    """A WebSocket to a relay; `receive` gives JSON as values, binary messages as bytes. `pings` are counted."""

    def __init__(self, relay, *, is_binary=False, path="/pair", headers=(), rest=b"", tls=None, receive_buffer=None):
        self.socket = socket.socket()
        self.socket.settimeout(DEADLINE_S)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", relay.port))
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname="localhost")
        self.buffer = b""
        self.pings = 0
        self.close_code, self.close_reason = None, ""
        lines = [
            f"GET {path} HTTP/1.1",
            "Host: relay",
            "Upgrade: websocket",
            "Connection: keep-alive, Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            *(["Sec-WebSocket-Protocol: dvai-relay.2"] if is_binary else []),
            *headers,
        ]
        self.socket.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + rest)
        head = self._read_head()
        self.status = int(head.split()[1])
        if self.status == 101:
            assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head  # RFC 6455 section 1.3
            assert (b"Sec-WebSocket-Protocol: dvai-relay.2" in head) == is_binary
        self.head = head

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def _read_head(self):
        while b"\r\n\r\n" not in self.buffer:
            data = self.socket.recv(4096)
            assert data, self.buffer
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head

    def _read(self, size):
        while len(self.buffer) < size:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionResetError("closed without a close frame")
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def send(self, kind, **fields):
        """A JSON message."""
        self.socket.sendall(encode_text({"type": kind, **fields}))

    def send_binary(self, data):
        self.socket.sendall(encode_frame(0x82, data))

    def receive_frame(self):
        """(opcode, payload) of the next frame, pings counted and answered in between."""
        while True:
            first, size = self._read(2)
            if size == 126:
                size = int.from_bytes(self._read(2), "big")
            elif size == 127:
                size = int.from_bytes(self._read(8), "big")
            payload = self._read(size)
            if first != 0x89:
                assert first & 0x80
                return first & 15, payload
            self.pings += 1
            self.socket.sendall(encode_frame(0x8A, payload))

    def receive(self):
        """The next message, or None when the relay has closed, `close_code` saying how."""
        opcode, payload = self.receive_frame()
        if opcode == 8:
            self.close_code = int.from_bytes(payload[:2], "big") if payload else 1005
            self.close_reason = payload[2:].decode()
            return None
        return json.loads(payload) if opcode == 1 else payload

    def ask(self, kind, **fields):
        """The next message after sending one."""
        self.send(kind, **fields)
        return self.receive()


def open_pair(relay, **options):
    """Source and target of a joined session, as existing apps open it, and its id."""
    source, target = RawClient(relay, **options), RawClient(relay, **options)
    created = source.ask("pair-source", **PEER)
    joined = target.ask("pair-target", sessionId=created["sessionId"], **PEER)
    assert joined["type"] == source.receive()["type"] == "peer-connected"
    return source, target, created["sessionId"]


def build_room(number=1):
    """A room's name on the wire."""
    return base64.urlsafe_b64encode(number.to_bytes(16, "big")).decode().rstrip("=")


def open_room(relay, number=1, *, dialer=False, listener=False):
    """Dialer and listener of a session in a room, and what each was told; the flags: who speaks dvai-relay.2."""
    left, right = RawClient(relay, is_binary=dialer), RawClient(relay, is_binary=listener)
    assert right.ask("listen", v=1, room=build_room(number))["type"] == "listening"
    dialed = left.ask("dial", v=1, room=build_room(number))
    incoming = right.receive()
    assert (dialed["type"], incoming["type"]) == ("dialed", "incoming")
    return left, right, dialed, incoming


def wait_until_idle(relay, descriptors):
    """Waits until the relay has given back what clients took."""
    wait_for(lambda: relay.read_health()["activeSessions"] == 0, DEADLINE_S, "no sessions")
    if descriptors is not None:
        wait_for(lambda: relay.count_descriptors() <= descriptors, DEADLINE_S, "descriptors are given back")


def build_client_tls(certificate):
    """A TLS context that trusts one certificate."""
    return ssl.create_default_context(cafile=str(certificate))
