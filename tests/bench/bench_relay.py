"""What the relay costs:  python3 tests/bench/bench_relay.py [--pairs 8000] [--seconds 4] [--redis]

From raw sockets, beside a relay process of its own with every limit on (the rate of a session set high enough not to be
what is measured): messages per second and processor time per message at 200 and 2,000 bytes, as JSON and in the binary
subprotocol; memory per idle pair; latency of a ping-pong beside four sessions that send as much as they can.
Processor time and memory are read from /proc (Linux).

With --redis, instead: the same messages between the clients of one process, and between those of two processes that a
Redis of its own joins (needs redis-server and the package redis), in turn, and a ping-pong on otherwise idle relays.
"""

import argparse
import base64
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
WINDOW_BYTES = 192 * 1024  # on the way in one session: less than would end it as stalled
OPENING = (
    "GET /pair HTTP/1.1\r\nHost: relay\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Process:
    """What the benchmark reads of a process that it started as `process`."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def read_cpu_s(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def read_rss_bytes(self):
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


class RedisProcess(Process):
    """A Redis on a free port of loopback that keeps nothing on disk."""

    def __init__(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--loglevel", "warning"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.url = f"redis://127.0.0.1:{port}/0"
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return
            time.sleep(0.1)
        raise ConnectionError("Redis does not start")


class RelayProcess(Process):
    """A relay on a free port of loopback."""

    def __init__(self, *flags, **more):
        command = [sys.executable, str(ROOT / "rendezvous_server.py"), "--host", "127.0.0.1", "--port", "0"]
        limits = {"SESSIONS_PER_ADDRESS": "0", "SESSIONS_PER_ADDRESS_PER_MINUTE": "0", "LOG_LEVEL": "silent"}
        environ = os.environ | limits | {"RELAY_BYTES_PER_SECOND": "1000000000"} | more
        self.process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=environ)
        self.port = int(self.process.stdout.readline().rpartition(":")[2])


class Client:
    """A WebSocket on a raw socket; control messages are JSON."""

    def __init__(self, port, *, is_binary=False):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        offer = "Sec-WebSocket-Protocol: dvai-relay.2\r\n" if is_binary else ""
        self.socket.sendall((OPENING + offer + "\r\n").encode())
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self.socket.recv(4096)
        self.buffer = self.buffer.partition(b"\r\n\r\n")[2]

    def send(self, message):
        self.socket.sendall(encode_frame(0x81, json.dumps(message, separators=(",", ":")).encode()))

    def read_exactly(self, size):
        while len(self.buffer) < size:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError("the relay has closed the connection")
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def receive(self):
        """The payload of the next frame."""
        while True:
            first, size = self.read_exactly(2)
            if size == 126:
                size = int.from_bytes(self.read_exactly(2), "big")
            payload = self.read_exactly(size)
            if first & 15 in (1, 2):
                return payload
            if first & 15 == 8:
                raise ConnectionError(payload)


def encode_frame(first, payload):
    mask = os.urandom(4)
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2, "big")
    key = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def open_pair(port, other_port=None):
    """Two clients in one session, as existing apps open it, and the session's id."""
    source, target = Client(port), Client(other_port or port)
    peer = {"deviceId": "bench", "deviceName": "bench", "capability": {}, "ephemeralPubKey": "A" * 43}
    source.send({"type": "pair-source", **peer})
    session_id = json.loads(source.receive())["sessionId"]
    target.send({"type": "pair-target", "sessionId": session_id, **peer})
    source.receive(), target.receive()
    return source, target, session_id


def open_dialed(port, other_port=None):
    """Two clients in one session of the binary subprotocol, and the dialer's tag."""
    dialer, listener = Client(port, is_binary=True), Client(other_port or port, is_binary=True)
    room = base64.urlsafe_b64encode(os.urandom(16)).decode().rstrip("=")
    listener.send({"type": "listen", "v": 1, "room": room})
    listener.receive()
    dialer.send({"type": "dial", "v": 1, "room": room})
    tag = json.loads(dialer.receive())["tag"]
    listener.receive()
    return dialer, listener, tag.to_bytes(4, "big")


class Flow:
    """One session in one direction, with as many messages of one size on the way as the window lets."""

    def __init__(self, port, size, *, is_binary, other_port=None):
        if is_binary:
            self.sender, self.receiver, tag = open_dialed(port, other_port)
            self.frame = encode_frame(0x82, tag + os.urandom(size))
        else:
            self.sender, self.receiver, session_id = open_pair(port, other_port)
            message = {"type": "relay", "sessionId": session_id, "payload": "A" * size}
            self.frame = encode_frame(0x81, json.dumps(message, separators=(",", ":")).encode())
        self.sender.socket.sendall(self.frame)
        self.size = len(self.receiver.receive()) + 4  # with the head of a frame of 126 bytes and more
        self.count_at_once = WINDOW_BYTES // 3 // self.size
        self.window = threading.Semaphore(2)
        self.is_over = threading.Event()
        self.count = 0

    def send(self):
        data = self.frame * self.count_at_once
        with contextlib.suppress(OSError):
            while not self.is_over.is_set():
                if self.window.acquire(timeout=1):
                    self.sender.socket.sendall(data)

    def receive(self):
        expected = self.size * self.count_at_once
        received = 0
        with contextlib.suppress(OSError):
            while data := self.receiver.socket.recv(1 << 18):
                received += len(data)
                while received >= expected:
                    received -= expected
                    self.count += self.count_at_once
                    self.window.release()

    @contextlib.contextmanager
    def run(self):
        threads = [threading.Thread(target=self.send), threading.Thread(target=self.receive)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.is_over.set()
            for end in (self.sender, self.receiver):
                end.socket.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()


def measure_throughput(seconds, size, *, is_binary):
    """Messages per second and microseconds of the relay's processor time per message."""
    with RelayProcess() as relay, Flow(relay.port, size, is_binary=is_binary).run() as flow:
        time.sleep(0.3)
        count, cpu_s, start = flow.count, relay.read_cpu_s(), time.perf_counter()
        time.sleep(seconds)
        count, cpu_s, wall_s = flow.count - count, relay.read_cpu_s() - cpu_s, time.perf_counter() - start
    return count / wall_s, cpu_s / count * 1e6


def measure_memory(pairs):
    """Bytes at rest, and per idle pair."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pairs = min(pairs, (hard - 100) // 2)
    with RelayProcess("--session-ttl-seconds", "3600") as relay:
        open_pair(relay.port)
        at_rest = relay.read_rss_bytes()
        held = [open_pair(relay.port) for _ in range(pairs)]
        time.sleep(2)
        taken = relay.read_rss_bytes() - at_rest
        for source, target, _ in held:
            source.socket.close()
            target.socket.close()
    return at_rest, taken / pairs, pairs


def measure_latency(seconds, *, is_binary):
    """Milliseconds of a round trip through the relay beside four saturating sessions: median, p99."""
    with RelayProcess() as relay, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(Flow(relay.port, 200, is_binary=is_binary).run())
        asker = [sys.executable, __file__, "--ping-pong", str(relay.port), "--seconds", str(seconds)]
        done = subprocess.run(asker, stdout=subprocess.PIPE, text=True, check=True)  # not within our interpreter lock
    return json.loads(done.stdout)


def measure_across(redis, seconds, size, *, is_binary, is_across):
    """Messages per second; microseconds a message of the sender's process, the receiver's (0: the same), and Redis."""
    with RelayProcess(REDIS_URL=redis.url) as one, RelayProcess(REDIS_URL=redis.url) as other:
        far = other if is_across else one
        with Flow(one.port, size, is_binary=is_binary, other_port=far.port).run() as flow:
            time.sleep(0.3)
            processes = (one, other, redis)
            count, cpu_s, start = flow.count, [each.read_cpu_s() for each in processes], time.perf_counter()
            time.sleep(seconds)
            count, wall_s = flow.count - count, time.perf_counter() - start
            used = [each.read_cpu_s() - before for each, before in zip(processes, cpu_s, strict=True)]
    return count / wall_s, *(each / count * 1e6 for each in used)


def compare_across(seconds, repeat):
    """Prints what a message costs within a process and across two, in turn, and how long a round trip takes."""
    with RedisProcess() as redis:
        for is_binary, size in ((b, s) for b in (False, True) for s in (200, 2000)):
            runs = {False: [], True: []}
            for is_across in (False, True) * repeat:
                runs[is_across].append(measure_across(redis, seconds, size, is_binary=is_binary, is_across=is_across))
            for is_across, rows in runs.items():
                rates = sorted(row[0] for row in rows)
                cpu = [sorted(row[n] for row in rows) for n in (1, 2, 3)]
                shown = ", ".join(
                    f"{name} {times[0]:.2f}–{times[-1]:.2f}"
                    for name, times in zip(("sender's", "receiver's", "Redis"), cpu, strict=True)
                )
                print(
                    f"{'binary' if is_binary else 'JSON':6} {size:5} bytes, {'across' if is_across else 'within'}: "
                    f"{rates[0]:8,.0f}–{rates[-1]:,.0f} msg/s; µs CPU a message: {shown}",
                    flush=True,
                )
        with RelayProcess(REDIS_URL=redis.url) as one, RelayProcess(REDIS_URL=redis.url) as other:
            for far, name in ((one, "within"), (other, "across")) * 2:
                median_ms, p99_ms = run_ping_pong(one.port, seconds, far.port)
                print(f"ping-pong on idle relays, {name}: p50 {median_ms:.2f} ms, p99 {p99_ms:.2f} ms", flush=True)


def run_ping_pong(port, seconds, other_port=None):
    """Milliseconds of a round trip, there and back: median, p99."""
    source, target, session_id = open_pair(port, other_port)
    message = {"type": "relay", "sessionId": session_id, "payload": "A" * 200}
    frame = encode_frame(0x81, json.dumps(message, separators=(",", ":")).encode())
    times, deadline = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < deadline:
        source.socket.sendall(frame)
        target.receive()
        target.socket.sendall(frame)
        source.receive()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), statistics.quantiles(times, n=100)[98]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--repeat", type=int, default=3, help="the least processor time of so many runs counts")
    parser.add_argument("--redis", action="store_true", help="what a message costs that crosses processes")
    parser.add_argument("--ping-pong", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ping_pong:
        print(json.dumps(run_ping_pong(options.ping_pong, options.seconds)))
        return
    if options.redis:
        compare_across(options.seconds, options.repeat)
        return
    for is_binary in (False, True):
        for size in (200, 2000):
            runs = [measure_throughput(options.seconds, size, is_binary=is_binary) for _ in range(options.repeat)]
            rate, cpu_us = max(rate for rate, _ in runs), min(cpu_us for _, cpu_us in runs)
            name = "binary" if is_binary else "JSON"
            print(f"{name:6} {size:5} bytes: {rate:9,.0f} msg/s, {cpu_us:5.2f} µs CPU a message", flush=True)
    for is_binary in (False, True):
        median_ms, p99_ms = measure_latency(options.seconds, is_binary=is_binary)
        name = "binary" if is_binary else "JSON"
        print(f"ping-pong beside 4 saturating {name} sessions: p50 {median_ms:.2f} ms, p99 {p99_ms:.2f} ms", flush=True)
    at_rest, per_pair, pairs = measure_memory(options.pairs)
    total = at_rest + 50_000 * per_pair
    print(f"at rest {at_rest / 2**20:.0f} MiB; {per_pair / 1024:.1f} KiB per idle pair ({pairs} pairs held);", end=" ")
    print(f"50,000 pairs would take {total / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
