"""Two devices that are paired by the secure channel: a provider that listens, and what asks it."""

import asyncio
import contextlib
import hashlib

import dvai_bridge as d

NOW_MS = 1_790_000_000_000
PAIR_ID, PSK, ROOM = b"p" * 16, b"k" * 32, b"r" * 16


def make_identity(name):
    seed = hashlib.sha256(name.encode()).digest()
    return d.Identity(device_id=f"{name}-device", device_name=f"{name}'s name", seed=d.encode_base64url(seed))


def make_link(*, is_pending=True):
    return d.PairingLink(
        pair_id=PAIR_ID, resume_psk=PSK, room=ROOM, pending_until_ms=NOW_MS + 600_000 if is_pending else None
    )


def make_pairing(peer, *, is_inbound, key="K" * 42 + "A", **changes):
    """How a device knows `peer` after pairing; `is_inbound`: it lets the peer use it."""
    public = d.build_static_key(peer, d.OwnBackend()).public
    direction = "inbound" if is_inbound else "outbound"
    members = {
        "device_id": peer.device_id,
        "app_id": peer.device_id,
        "device_name": peer.device_name,
        "identity_key": d.encode_base64url(public),
        "paired_at_ms": NOW_MS,
        "last_used_at_ms": NOW_MS,
        "speaks_noise": True,
        f"{direction}_key": key,
        f"{direction}_link": make_link(),
    }
    return d.Pairing(**members | changes)


class Device:
    """A device's identity, its store with one pairing, and the clock of both."""

    def __init__(self, folder, name):
        self.identity = make_identity(name)
        self.now_ms = NOW_MS
        self.store = d.PairingStore(folder / name, device_id=self.identity.device_id, clock_ms=self.read_clock)
        self.store.load()

    def read_clock(self):
        return self.now_ms

    @property
    def pairing(self):
        (pairing,) = self.store.pairings
        return pairing


class Provider(Device):
    """Answers inside its tunnels with `handler`, on a real server."""

    def __init__(self, folder, handler):
        super().__init__(folder, "provider")
        self.handler = handler
        self.requests = []
        self.port = 0
        self.firewall = d.FirewallStore(folder / "provider")

    @contextlib.asynccontextmanager
    async def run(self):
        self.tunnels = tunnels = d.TunnelServer(
            identity=self.identity,
            store=self.store,
            firewall=self.firewall,
            handler=self.handle,
            clock_ms=self.read_clock,
        )
        self.server = server = d.HttpServer(d.HttpServerOptions(port=self.port), tunnels.accept)
        await server.start()
        self.port = server.port
        try:
            yield self
        finally:
            await server.stop()

    async def handle(self, request):
        self.requests.append(request)
        return await self.handler(request)

    @property
    def url(self):
        return d.parse_http_url(f"http://127.0.0.1:{self.port}/v1/chat/completions")

    @property
    def public_key(self):
        return d.build_static_key(self.identity, d.OwnBackend()).public


class Consumer(Device):
    """Asks a provider through its PeerClient."""

    def __init__(self, folder):
        super().__init__(folder, "consumer")

    @contextlib.asynccontextmanager
    async def run(self):
        self.http = d.HttpClient()
        self.client = d.PeerClient(
            self.http, identity=self.identity, store=self.store, app_id=None, clock_ms=self.read_clock
        )
        try:
            yield self
        finally:
            await self.client.close()
            await self.http.close()

    def ask(self, provider, method="POST", path=None, **options):
        url = provider.url if path is None else d.parse_http_url(f"http://127.0.0.1:{provider.port}{path}")
        return self.client.request(self.pairing, method, url, **options)


@contextlib.asynccontextmanager
async def run_pair(folder, handler):
    """A consumer and a provider that are paired, both running."""
    provider, consumer = Provider(folder, handler), Consumer(folder)
    await provider.store.add(make_pairing(consumer.identity, is_inbound=True))
    await consumer.store.add(make_pairing(provider.identity, is_inbound=False))
    async with provider.run(), consumer.run():
        yield consumer, provider


class KeyConsumer:
    """Asks a provider by its public key. `refused`: the keys of providers that did not admit it."""

    def __init__(self, name="consumer"):
        self.static = d.build_static_key(make_identity(name), d.OwnBackend())
        self.public_key = self.static.public
        self.refused = []
        self.client = d.ProviderClient(lambda: self.static, dial_relay=self.dial_relay, on_refused=self.refused.append)

    async def dial_relay(self, public_key, limit_s):
        raise d.UpstreamConnectError("no relay here")

    def ask(self, provider, public_key=None, body=b"{}"):
        bond = d.ProviderBond(public_key or provider.public_key)
        return self.client.request(bond, "POST", provider.url, body=body)


@contextlib.asynccontextmanager
async def run_provider(folder, handler, *admitted):
    """A provider that admits these consumers by their keys, and nobody else."""
    provider = Provider(folder, handler)
    keys = frozenset(consumer.public_key for consumer in admitted)
    provider.firewall.load(d.Firewall(public_keys=keys))
    async with provider.run():
        provider.tunnels.provide()
        try:
            yield provider
        finally:
            for consumer in admitted:
                await consumer.client.close()


async def until(condition, timeout_s=20.0):
    """Polls until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - it waits for whatever the condition looks at
            await asyncio.sleep(0.005)
