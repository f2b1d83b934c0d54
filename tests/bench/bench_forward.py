"""What forwarding to a peer costs: direct, through nginx, through asyncio alone and through the bridge, in one run.

    python3 tests/bench/bench_forward.py [--requests 3000] [--seconds 5] [--bridge]

A fast fake peer is asked for a short streamed answer again and again on one connection, then for streams of 100 events
a second. `asyncio` copies bytes and knows no HTTP: the least that a Python proxy can cost. The forwarder runs in a bare
HTTP server and signs; with --bridge, in `serve --offload-only --peer`. Linux: processor times are the kernel's own
(schedstat), its work for the process included; compare them with nginx's in the same run.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

DISTORTING = ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")  # without bytecode 70 MB of syntax tree remain
PACE_PER_S = 100
CHUNK = {
    "id": "chatcmpl-0123456789abcdef01234567",
    "object": "chat.completion.chunk",
    "created": 1_750_000_000,
    "model": "model",
}


def encode_event(choices, **more):
    return b"data: " + json.dumps(CHUNK | {"choices": choices} | more, separators=(",", ":")).encode() + b"\n\n"


def encode_content(delta, finish_reason=None):
    return encode_event([{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}])


ROLE, TOKEN = encode_content({"role": "assistant", "content": ""}), encode_content({"content": " token"})
USAGE = {"prompt_tokens": 8, "completion_tokens": 8, "total_tokens": 16}
END = encode_content({}, "stop") + encode_event([], usage=USAGE) + b"data: [DONE]\n\n"


def encode_chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SHORT_ANSWER = HEAD + encode_chunk(ROLE + 8 * TOKEN + END) + b"0\r\n\r\n"


# -- the peer --


class FakePeer(asyncio.Protocol):
    """Answers as fast as Python can: health, models, a short stream, or a paced one of `max_tokens` events."""

    def connection_made(self, transport):
        self.transport, self.buffer, self.loop = transport, b"", asyncio.get_running_loop()

    def data_received(self, data):
        self.buffer += data
        head, mark, body = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        at = head.lower().find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
        if len(body) < length:
            return
        self.buffer = body[length:]
        if head.startswith(b"GET"):
            self.answer_get(head)
        elif b"/handshake " in head:
            self.pair(json.loads(body))
        elif b'"max_tokens"' in body:
            self.pace(json.loads(body)["max_tokens"])
        else:
            self.transport.write(SHORT_ANSWER)

    def pair(self, request):
        key = base64.urlsafe_b64encode(bytes(32)).decode().rstrip("=")
        answer = {"paired": True, "pairedAt": 1, "via": "lan-handshake", "pairingKey": key, "deviceId": "fake-peer"}
        self.answer_json(answer | {"peerDeviceId": request["peerDeviceId"], "deviceName": "Peer"})

    def answer_get(self, head):
        if b"/capability" in head:
            value = {"scores": []}
        elif b"/models" in head:
            value = {"object": "list", "data": [{"id": "model", "object": "model", "created": 1, "owned_by": "x"}]}
        else:
            value = {"status": "ok", "version": "0", "uptimeSec": 1, "currentModelId": "model", "deviceId": "fake-peer"}
        self.answer_json(value)

    def answer_json(self, value):
        body = json.dumps(value).encode()
        self.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(body))
        self.transport.write(b"Content-Type: application/json\r\n\r\n" + body)

    def pace(self, count):
        self.transport.write(HEAD + encode_chunk(ROLE))
        start = self.loop.time()
        for n in range(count):
            self.loop.call_at(start + (n + 1) / PACE_PER_S, self.transport.write, encode_chunk(TOKEN))
        end = encode_chunk(END) + b"0\r\n\r\n"
        self.loop.call_at(start + (count + 1) / PACE_PER_S, self.transport.write, end)


async def run_peer():
    server = await asyncio.get_running_loop().create_server(FakePeer, "127.0.0.1", 0)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


# -- bytes and nothing else --


class Pipe(asyncio.Protocol):
    """One end of a connection that is copied to another: what asyncio itself costs, knowing nothing of HTTP."""

    def __init__(self, peer_port, other=None):
        self.peer_port, self.other, self.early = peer_port, other, b""

    def connection_made(self, transport):
        self.transport = transport
        if self.other is None:
            connecting = asyncio.get_running_loop().create_connection(
                lambda: Pipe(self.peer_port, self), "127.0.0.1", self.peer_port
            )
            self.connecting = asyncio.ensure_future(connecting)
        else:
            self.other.other = self
            transport.write(self.other.early)

    def data_received(self, data):
        if self.other is None:
            self.early += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc):
        if self.other is not None:
            self.other.transport.close()


async def run_pipe(peer_port):
    server = await asyncio.get_running_loop().create_server(lambda: Pipe(peer_port), "127.0.0.1", 0)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


# -- the forwarder alone --


async def run_forwarder(base_url):
    """The forwarder in a bare HTTP server: parses and checks the body, signs, forwards to one peer."""
    import dvai_bridge as dvai

    key, me = dvai.generate_pairing_key(), "consumer-device-000000"

    client = dvai.HttpClient()

    def send(method, url, *, headers, body, **options):
        nonce = dvai.generate_nonce(me, "peer", time.time_ns() // 1_000_000)
        signed = dvai.build_signed_headers(
            pairing_key=key, device_id=me, app_id="bench", nonce=nonce, method=method, path=url.target, body=body
        )
        return client.request(method, url, headers=[*headers, *signed], body=body, **options)

    target = dvai.ForwardTarget(device_id="peer", device_name="Peer", base_url=base_url, model_id="model", send=send)
    forwarder = dvai.Forwarder(on_attempt=lambda attempt: None, on_end=lambda report: None)

    async def handle(request):
        body = request.parse_body()
        forward = dvai.ForwardRequest(form=dvai.ForwardForm.CHAT, body=body, request_id=request.request_id)
        answer = (await forwarder.forward(forward, [target])).answer
        return dvai.HttpResponse(status=answer.status, headers=answer.headers, body=answer.body)

    server = dvai.HttpServer(dvai.HttpServerOptions(port=0), handle)
    await server.start()
    print(f"listening on {server.base_url}", flush=True)
    await asyncio.Event().wait()


# -- measuring --


def read_cpu_s(pid):
    """Processor seconds of a process, all threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def read_rss_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


class Client:
    """A blocking client on one connection that is kept."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, **options):
        """Bytes of a whole answer, and how often the socket gave some."""
        body = {"model": "model", "messages": [{"role": "user", "content": "Say something short."}], "stream": True}
        data = json.dumps(body | {"stream_options": {"include_usage": True}} | options).encode()
        self.sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(data) + data
        )
        received, reads = b"", 0
        while not received.endswith(b"0\r\n\r\n"):
            piece = self.sock.recv(1 << 16)
            assert piece, received
            received, reads = (received + piece)[-4096:] if reads > 50 else received + piece, reads + 1
        assert received.startswith(b"HTTP/1.1 200") or reads > 50, received
        assert b"[DONE]" in received, received
        return received, reads


def measure_requests(port, pid, count):
    """(p50 in µs, CPU in µs per request)."""
    client, times = Client(port), []
    for _ in range(200):
        client.ask()
    cpu_s = read_cpu_s(pid)
    for _ in range(count):
        start = time.perf_counter()
        client.ask()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6, (read_cpu_s(pid) - cpu_s) / count * 1e6


def measure_events(port, pid, streams, seconds):
    """CPU in µs per paced event, `streams` at a time."""
    count = int(seconds * PACE_PER_S)
    clients = [Client(port) for _ in range(streams)]
    threads = [threading.Thread(target=client.ask, kwargs={"max_tokens": count}) for client in clients]
    cpu_s = read_cpu_s(pid)
    for n, thread in enumerate(threads):
        thread.start()
        time.sleep(1 / PACE_PER_S / streams if n < streams - 1 else 0)
    for thread in threads:
        thread.join()
    return (read_cpu_s(pid) - cpu_s) / (count * streams) * 1e6


@contextlib.contextmanager
def start(*command):
    """A process that prints where it listens: (port, pid)."""
    environ = {name: value for name, value in os.environ.items() if name not in DISTORTING}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environ
    )
    try:
        for line in process.stdout:
            if line.startswith("listening on "):
                yield int(line.rpartition(":")[2].partition("/")[0]), process.pid
                return
        raise SystemExit(f"{command} did not start")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def start_nginx(folder, peer_port):
    """nginx in front of the peer: (port, pid of its worker)."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    Path(folder, "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
        events {{ worker_connections 256; }}
        http {{ access_log off; keepalive_requests 1000000;
          upstream peer {{ server 127.0.0.1:{peer_port}; keepalive 16; }}
          server {{ listen 127.0.0.1:{port};
            location / {{ proxy_pass http://peer; proxy_http_version 1.1; proxy_set_header Connection "";
                          proxy_buffering off; }} }} }}"""
    )
    process = subprocess.Popen(["nginx", "-p", folder, "-c", f"{folder}/nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield port, int(children[0])
    finally:
        process.terminate()
        process.wait()


def wait_ready(port):
    """Until the bridge is paired with the peer and knows its model."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", method="POST")
        request.add_header("Content-Type", "application/json")
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(request, json.dumps({"model": "model", "messages": []}).encode()).read()
        time.sleep(0.2)
    raise SystemExit("the bridge does not forward")


def show(name, port, pid, arguments, base=None):
    p50, cpu = measure_requests(port, pid, arguments.requests)
    one, many = (measure_events(port, pid, streams, arguments.seconds) for streams in (1, 50))
    ratio = f"{p50 / base:5.2f} x" if base else "       "
    print(
        f"{name:8} p50 {p50:7.0f} µs {ratio}   CPU per request {cpu:6.1f} µs   "
        f"per event {one:5.1f} µs (1 stream) {many:5.1f} µs (50 streams)   {read_rss_mib(pid):5.1f} MB",
        flush=True,
    )
    return p50


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--bridge", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--forwarder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        return asyncio.run(run_peer())
    if arguments.pipe:
        return asyncio.run(run_pipe(arguments.pipe))
    if arguments.forwarder:
        return asyncio.run(run_forwarder(arguments.forwarder))
    with (
        tempfile.TemporaryDirectory() as folder,
        start(sys.executable, str(Path(__file__).resolve()), "--peer") as (peer_port, peer_pid),
    ):
        peer_url = f"http://127.0.0.1:{peer_port}/v1"
        direct = show("direct", peer_port, peer_pid, arguments)
        if shutil.which("nginx"):
            with start_nginx(folder, peer_port) as (port, pid):
                show("nginx", port, pid, arguments, direct)
        with start(sys.executable, str(Path(__file__).resolve()), "--pipe", str(peer_port)) as (port, pid):
            show("asyncio", port, pid, arguments, direct)
        command = [str(Path(__file__).resolve()), "--forwarder", peer_url]
        if arguments.bridge:
            serve = (
                "serve",
                "--offload-only",
                "--no-discover-lan",
                "--legacy-pairing",
                "allow",  # as existing hubs pair
                "--peer",
                peer_url,
                "--port",
                "0",
                "--home",
                folder,
            )
            command = ["-m", "dvai_bridge", *serve]  # as when installed: the compiled file is kept
        with start(sys.executable, *command) as (port, pid):
            print(f"{'':8} at rest {read_rss_mib(pid):.1f} MB")
            if arguments.bridge:
                wait_ready(port)
            show("bridge", port, pid, arguments, direct)
    return None


if __name__ == "__main__":
    main()
