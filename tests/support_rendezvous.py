"""What stands between devices and a real relay, and the two sides of a pairing by code."""

import asyncio
import base64
import contextlib
import json

from support_tunnel import make_identity

import dvai_bridge as d

UNLIMITED = {"SESSIONS_PER_ADDRESS_PER_MINUTE": "0", "SESSIONS_PER_ADDRESS": "0"}
DEADLINE_S = 60.0


def keep(message, middle, number):
    """Changes nothing."""
    return [message]


class Middle:
    """Takes WebSockets in place of a relay and passes their messages on to the real one, and back.

    `to_relay` and `to_device`: each called with (message, this, number of the connection), and gives the messages to
    send instead. `seen` has what came, from either side, in order.
    """

    def __init__(self, relay_port, *, to_relay=keep, to_device=keep, subprotocols=(d.RELAY_SUBPROTOCOL,)):
        self.relay_port = relay_port
        self.to_relay, self.to_device = to_relay, to_device
        self.subprotocols = subprotocols
        self.seen = []
        self.sockets = {}  # number of the connection: (device, relay)

    @contextlib.asynccontextmanager
    async def run(self):
        server = d.HttpServer(d.HttpServerOptions(port=0), self.accept)
        await server.start()
        self.url = f"ws://127.0.0.1:{server.port}"
        try:
            yield self
        finally:
            await server.stop()

    async def accept(self, request):
        return d.accept_websocket(
            request, self.serve, subprotocols=self.subprotocols, limit_bytes=d.RELAY_MESSAGE_LIMIT_BYTES
        )

    async def serve(self, device):
        number = len(self.sockets)
        relay = await d.connect_websocket(f"ws://127.0.0.1:{self.relay_port}/pair", subprotocols=self.subprotocols)
        self.sockets[number] = device, relay
        pumps = [
            asyncio.create_task(self.pump(device, relay, number, "to_relay")),
            asyncio.create_task(self.pump(relay, device, number, "to_device")),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        await d.finish_tasks(*pumps)
        await relay.close()
        code = relay.close_code if relay.close_code in (1000, 1008, 1011, 1012) else 1000
        await device.close(code, relay.close_reason)

    async def pump(self, source, sink, number, way):
        while (message := await source.receive()) is not None:
            self.seen.append(message)
            for changed in getattr(self, way)(message, self, number):
                await send(sink, changed)

    @property
    def content(self):
        """All that a relay sees, as bytes; frames in JSON in their own form, too."""
        pieces = []
        for message in self.seen:
            pieces.append(message.encode() if isinstance(message, str) else message)
            payload = json.loads(message).get("payload") if isinstance(message, str) else None
            if payload:
                pieces.append(base64.urlsafe_b64decode(payload + "=="))
        return b"\n".join(pieces)


async def send(socket, message):
    with contextlib.suppress(ConnectionError):
        await (socket.send_text(message) if isinstance(message, str) else socket.send_binary(message))


def read_frame(message):
    """The outer frame that a message of a session carries, None for any other message."""
    if isinstance(message, bytes):
        return message[4:]
    document = json.loads(message)
    payload = document.get("payload")
    return base64.urlsafe_b64decode(payload + "==") if payload else None


def replace_frame(message, frame):
    """The message with another outer frame in it."""
    if isinstance(message, bytes):
        return message[:4] + frame
    return json.dumps(json.loads(message) | {"payload": d.encode_base64url(frame)})


class Party:
    """One side of a pairing by code: an identity, a store, and a user who answers as the test says."""

    def __init__(self, folder, name, *, answer=True):
        self.identity = make_identity(name)
        self.store = d.PairingStore(folder / name, device_id=self.identity.device_id)
        self.store.load()
        self.questions = []
        self.answer = answer
        self.prompts = d.PairingPrompts(policy=d.PairingPolicy.ASK, on_pairing_request=self.ask)

    async def ask(self, request):
        self.questions.append(request)
        if self.answer is None:  # nobody is there
            await asyncio.Event().wait()
        return self.answer

    @property
    def parts(self):
        return {"identity": self.identity, "store": self.store, "backend": d.choose_crypto_backend()}

    def show(self, relay_url):
        return d.QrSource(relay_url=relay_url, prompts=self.prompts, **self.parts)

    def scan(self, text):
        return d.QrTarget(text=text, **self.parts)


async def pair(source, target, relay_url):
    """(what the source's side came to, what the target's came to): a pairing or an error each."""
    shown = source.show(relay_url)
    showing = asyncio.create_task(shown.pair())
    await shown.is_shown.wait()
    scanning = asyncio.create_task(target.scan(shown.progress.text).pair()) if shown.progress.text else showing
    return await asyncio.wait_for(asyncio.gather(showing, scanning, return_exceptions=True), DEADLINE_S)


async def stop(*parties):
    for party in parties:
        party.prompts.close()
