"""A real Redis of the test's own, which can be stopped, frozen and started again, empty, at the same place."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading

import pytest
from support import find_free_port, require, wait_for
from support_relay import start_relay

FREE = {"SESSIONS_PER_ADDRESS": "0", "SESSIONS_PER_ADDRESS_PER_MINUTE": "0", "METRICS_ENABLED": "1"}


class RedisServer:
    """A redis-server on loopback that keeps nothing on disk."""

    def __init__(self, *options, is_tls=False):
        self.port = find_free_port()
        self._options = [*options, "--tls-port" if is_tls else "--port", str(self.port)]
        self._options += ["--port", "0"] if is_tls else []
        self.url = ""
        self._databases = itertools.count()
        self.process = None
        self.start()

    def start(self):
        """Starts it, or starts it again, empty; returns when it answers."""
        command = ["redis-server", "--bind", "127.0.0.1", "--save", "", *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for(self._is_listening, 20, "Redis listens")

    def _is_listening(self):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def build_url(self):
        """The URL of a database that nobody has used, `url` from now on; the first is 0."""
        self.url = f"redis://127.0.0.1:{self.port}/{next(self._databases)}"
        return self.url

    def kill(self):
        self.process.kill()
        self.process.wait()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def ask(self, *words):
        """The reply to one command, as a value; on a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
            text = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)
            connection.sendall(text)
            with connection.makefile("rb") as stream:
                return self._read_reply(stream)

    def _read_reply(self, stream):
        kind, rest = (line := stream.readline())[:1], line[1:-2]
        if kind in b"+-":
            return rest.decode()
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return stream.read(int(rest) + 2)[:-2].decode(errors="replace") if int(rest) >= 0 else None
        return [self._read_reply(stream) for _ in range(int(rest))]

    def list_keys(self):
        return sorted(self.ask("KEYS", "*"))


@contextlib.contextmanager
def start_redis(*options, is_tls=False):
    """A Redis; skips the test where there is none."""
    require("redis")
    if not shutil.which("redis-server"):
        if os.environ.get("DVAI_TEST_ALL") == "1":
            pytest.fail("DVAI_TEST_ALL=1 and there is no redis-server")
        pytest.skip("needs redis-server (make test-all)")
    server = RedisServer(*options, is_tls=is_tls)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@contextlib.contextmanager
def start_relays(redis, count=3, **environ):
    """So many relay processes that are one, and know of each other."""
    environ = FREE | {"REDIS_URL": redis.build_url()} | environ
    with contextlib.ExitStack() as stack:
        relays = [stack.enter_context(start_relay(port=find_free_port(), **environ)) for _ in range(count)]
        wait_until_together(relays)
        yield relays


def wait_until_together(relays):
    """Waits until each of these processes counts all of them, and no other."""
    for relay in relays:
        wait_for(lambda relay=relay: relay.read_health()["relayProcesses"] == len(relays), 20, "one relay")
        assert relay.read_health()["redis"] == "ok"


def wait_until_alone(relays):
    """Waits until these processes have noticed that Redis is away."""
    for relay in relays:
        wait_for(lambda relay=relay: relay.read_health()["redis"] == "away", 20, "Redis is away")


class Balancer:
    """What stands before several relays: each new connection goes to the next of them that takes it."""

    def __init__(self, ports):
        self._ports = list(ports)
        self._next = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._sockets = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in (self._server, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                self._connect(client)

    def _connect(self, client):
        for _ in self._ports:
            self._next += 1
            try:
                relay = socket.create_connection(("127.0.0.1", self._ports[self._next % len(self._ports)]))
            except OSError:
                continue
            self._sockets += [client, relay]
            for pair in ((client, relay), (relay, client)):
                self._threads.append(threading.Thread(target=self._pass_on, args=pair))
                self._threads[-1].start()
            return
        client.close()

    @staticmethod
    def _pass_on(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
