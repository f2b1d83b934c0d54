"""What is asked of real bridges that ask each other, and what their answers say."""

import contextlib
import http.client
import json
import socket
import threading

import pytest
from support import read_health

CHAT = "/v1/chat/completions"
HELLO = {"model": "strong", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
LONG = HELLO | {
    "stream": True,
    "max_tokens": 100_000,
    "temperature": 1,
    "logit_bias": {"2": -100},
}  # as the model lets it


def list_peers(bridge):
    return json.loads(bridge.request("GET", "/v1/dvai/peers")[2])["peers"]


def ask(bridge, headers=None, **changes):
    status, fields, data = bridge.request("POST", CHAT, HELLO | changes, headers, timeout_s=120)
    return status, fields, json.loads(data)


class Stream:
    """A long answer, of which the first content has come."""

    def __init__(self, bridge, headers=None):
        self._connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=120)
        fields = {"Content-Type": "application/json"} | (headers or {})
        self._connection.request("POST", CHAT, json.dumps(LONG), fields)
        self.answer = self._connection.getresponse()
        assert self.answer.status == 200, self.answer.read()
        self.first = b""
        while b'"content":' not in self.first:
            line = self.answer.readline()
            assert line, "it ended before its first content"
            self.first = line

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.answer.close()
        self._connection.close()

    def check_torn(self):
        """It ends by an error event and a broken body, and not as if it were whole."""
        with pytest.raises(http.client.IncompleteRead) as torn:
            self.answer.read()
        last = [line for line in torn.value.partial.splitlines() if line.startswith(b"data: ")][-1]
        assert json.loads(last[6:])["error"]["message"]


def count_running(bridge):
    return read_health(bridge)["queue"]["running"]


class Wire:
    """A TCP proxy on loopback that keeps every byte; `cut` is the cable pulled out, `mend` plugged in again.

    `sent`: what came from clients, in the order of their connections; `received`: what they were answered.
    """

    def __init__(self, target_port):
        self.target_port = target_port
        self.sent, self.received = [], []
        self._connections, self._lock = set(), threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._is_cut = self._is_over = False
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.cut()
        self._is_over = True
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join(30)
        for each in (self._listener, *self._connections):
            each.close()

    def cut(self):
        """Connections end, and new ones are closed at once."""
        with self._lock:
            self._is_cut = True
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def mend(self):
        with self._lock:
            self._is_cut = False

    def count_sent(self):
        return sum(map(len, self.sent))

    def has(self, text):
        """Whether it was sent or answered readably."""
        return any(text.encode() in said for said in self.sent + self.received)

    def _accept(self):
        while not self._is_over:
            self._connect(self._listener.accept()[0])

    def _connect(self, client):
        with self._lock:
            if self._is_cut:
                client.close()
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), 10)
            except OSError:
                client.close()
                return
            server.settimeout(None)
            self._connections |= {client, server}
            for source, target, kept in ((client, server, self.sent), (server, client, self.received)):
                kept.append(bytearray())
                self._threads.append(threading.Thread(target=self._pump, args=(source, target, kept[-1])))
                self._threads[-1].start()

    def _pump(self, source, target, kept):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
