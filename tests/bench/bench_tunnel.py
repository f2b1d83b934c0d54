"""What the tunnel costs beside signed and plain HTTP, between two processes, in one run (Linux).

    python3 tests/bench/bench_tunnel.py [--seconds 4] [--rounds 3]

A provider answers with events of one token; a consumer asks for streams of 100 events a second, then for one as fast
as it comes, with a second stream beside it that nobody reads. The consumer is our client, the provider our server, so
the difference between two lines is the way between them. Processor times are the kernel's own (schedstat), its work
for the process included. The median of all rounds, then the least and the most.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from support_tunnel import make_identity, make_pairing  # noqa: E402

import dvai_bridge as d  # noqa: E402

WAYS = ("direct", "signed", "tunnel", "tunnel, own crypto")
PACE_PER_S = 100
STREAMS = 4
FLOOD_EVENTS = 2000
EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef01234567","object":"chat.completion.chunk","created":1750000000,'
    b'"model":"model","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)


def use_own_crypto():
    """As where `cryptography` is not installed."""
    d.choose_crypto_backend = d.OwnBackend


async def build_store(folder, device, peer, *, is_inbound, has_link):
    store = d.PairingStore(Path(folder), device_id=device.device_id)
    store.load()
    now_ms = d.read_clock_ms()
    direction = "inbound" if is_inbound else "outbound"
    changes = {"paired_at_ms": now_ms, "last_used_at_ms": now_ms} | ({} if has_link else {f"{direction}_link": None})
    pairing = make_pairing(peer, is_inbound=is_inbound, **changes)
    if has_link:
        link = d.PairingLink(pair_id=b"p" * 16, resume_psk=b"k" * 32, room=b"r" * 16)
        pairing = d.replace(pairing, **{f"{direction}_link": link})
    await store.add(pairing)
    return store


# -- the provider --


async def produce(count, pace_per_s):
    start = asyncio.get_running_loop().time()
    for number in range(count):
        if pace_per_s:
            await asyncio.sleep(start + number / pace_per_s - asyncio.get_running_loop().time())
        yield EVENT


async def run_provider(folder, way):
    me, consumer = make_identity("provider"), make_identity("consumer")
    store = await build_store(folder, me, consumer, is_inbound=True, has_link="tunnel" in way)
    verifier = d.SignatureVerifier(store)

    async def answer(request):
        body = request.parse_body()
        return d.HttpResponse(
            headers=(("Content-Type", "text/event-stream"),), body=produce(body["count"], body["pace"])
        )

    tunnels = d.TunnelServer(identity=me, store=store, handler=answer)

    async def handle(request):
        if request.path == "/v1/dvai/tunnel":
            return await tunnels.accept(request)
        return await answer(request)

    def identify(request):
        signature = d.parse_signature_headers(request.headers)
        return verifier.verify(
            signature,
            method=request.method,
            path=request.raw_path,
            query=request.query,
            body=request.body,
            now_ms=d.read_clock_ms(),
        )

    server = d.HttpServer(d.HttpServerOptions(port=0), handle, identify=identify)
    await server.start()
    print(server.port, flush=True)
    await asyncio.Event().wait()


# -- the consumer --


class Consumer:
    def __init__(self, client, pairing, port):
        self.client, self.pairing = client, pairing
        self.url = d.parse_http_url(f"http://127.0.0.1:{port}/v1/chat/completions")

    def ask(self, count, pace):
        body = d.encode_json({"count": count, "pace": pace})
        fields = [("Content-Type", "application/json")]
        return self.client.request(self.pairing, "POST", self.url, headers=fields, body=body)

    async def stream(self, count, pace):
        """Seconds until the first event, and bytes of all."""
        began, first_s, size = time.perf_counter(), 0.0, 0

        def receive(data):
            nonlocal first_s, size
            first_s = first_s or time.perf_counter() - began
            size += len(data)
            return True

        async with self.ask(count, pace) as response:
            await response.relay(receive)
        assert size == count * len(EVENT), (size, count)
        return first_s

    async def flood(self):
        """Events a second of one stream that comes as fast as it can."""
        began = time.perf_counter()
        await self.stream(FLOOD_EVENTS, 0)
        return FLOOD_EVENTS / (time.perf_counter() - began)


def read_cpu_s(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def run_consumer(folder, way, port, provider_pid, seconds):
    me, provider = make_identity("consumer"), make_identity("provider")
    store = await build_store(folder, me, provider, is_inbound=False, has_link="tunnel" in way)
    http = d.HttpClient()
    client = d.PeerClient(http, identity=me, store=store, app_id=None)
    consumer = Consumer(client, None if way == "direct" else store.pairings[0], port)
    began = time.perf_counter()
    await consumer.stream(1, 0)
    found = {"dial_ms": (time.perf_counter() - began) * 1e3}
    firsts = [await consumer.stream(1, 0) for _ in range(100)]
    count = int(seconds * PACE_PER_S)
    cpu = [read_cpu_s(pid) for pid in (provider_pid, "self")]
    firsts += await asyncio.gather(*(consumer.stream(count, PACE_PER_S) for _ in range(STREAMS)))
    after = [read_cpu_s(pid) for pid in (provider_pid, "self")]
    found["provider_us"], found["consumer_us"] = (
        (end - start) / (count * STREAMS) * 1e6 for start, end in zip(cpu, after, strict=True)
    )
    found["first_ms"] = statistics.median(firsts) * 1e3
    found["per_s"] = await consumer.flood()
    async with consumer.ask(1_000_000, 0) as stalled:
        await stalled.read_piece()
        found["beside_stalled_per_s"] = await consumer.flood()
    print(json.dumps(found), flush=True)
    await client.close()
    await http.close()


# -- both --


@contextlib.contextmanager
def start(*arguments):
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def measure(way, seconds):
    with (
        tempfile.TemporaryDirectory() as folder,
        start("--provider", way, "--folder", f"{folder}/provider") as provider,
    ):
        port = int(provider.stdout.readline())
        options = ("--folder", f"{folder}/consumer", "--port", port, "--pid", provider.pid, "--seconds", seconds)
        with start("--consumer", way, *options) as consumer:
            return json.loads(consumer.stdout.readline())


def format_spread(values, digits=0):
    return f"{statistics.median(values):9.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    for name in ("--provider", "--consumer", "--folder", "--port", "--pid"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    role = arguments.provider or arguments.consumer
    if role is None:
        rounds = [{way: measure(way, arguments.seconds) for way in WAYS} for _ in range(arguments.rounds)]
        for name, digits in (
            ("provider_us", 1),
            ("consumer_us", 1),
            ("first_ms", 2),
            ("dial_ms", 1),
            ("per_s", 0),
            ("beside_stalled_per_s", 0),
        ):
            print(f"\n{name}")
            for way in WAYS:
                print(f"  {way:18} {format_spread([found[way][name] for found in rounds], digits)}")
        return
    if "own" in role:
        use_own_crypto()
    if arguments.provider:
        asyncio.run(run_provider(arguments.folder, role))
    else:
        options = (arguments.folder, role, int(arguments.port), int(arguments.pid), arguments.seconds)
        asyncio.run(run_consumer(*options))


if __name__ == "__main__":
    main()
