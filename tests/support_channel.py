"""Both ends of a secure channel without a transport, and an end that says whatever a test wants."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from dvai_bridge import (
    Channel,
    ChannelPath,
    FrameType,
    HandshakeMode,
    InitiatorHandshake,
    ResponderHandshake,
    build_delegate_terms,
    build_key_pair,
    build_qr_terms,
    build_resume_terms,
    encode_inner_frame,
)

VECTORS = Path(__file__).parent / "vectors" / "dvai-known-answers.json"
KNOWN = {each["use"]: each for each in json.loads(VECTORS.read_text("utf-8"))["handshakes"]}
USES = {HandshakeMode.QR: "qr-pair", HandshakeMode.RESUME: "resume", HandshakeMode.DELEGATE: "delegate"}
unhex = bytes.fromhex


@functools.cache
def load_key_pair(use, name, backend):
    return build_key_pair(unhex(KNOWN[use][name]), backend)


class Keys:
    """The key pairs and the terms of one known handshake."""

    def __init__(self, mode, backend):
        self.mode, self.backend, self.known = mode, backend, KNOWN[USES[mode]]
        for name in ("initiatorStatic", "initiatorEphemeral", "responderStatic", "responderEphemeral"):
            setattr(self, name, load_key_pair(USES[mode], name, backend))

    def build_terms(self, *, is_initiator, **changes):
        static = self.initiatorStatic if is_initiator else self.responderStatic
        remote = self.responderStatic.public if is_initiator else self.initiatorStatic.public
        if self.mode is HandshakeMode.RESUME:
            names = {"initiator_device_id": "dev-src", "responder_device_id": "dev-tgt", "remote_static": remote}
            fields = {"pair_id": unhex(self.known["pairId"]), "psk": unhex(self.known["psk"]), **names}
            return build_resume_terms(**{"static": static, **fields, **changes})
        known_remote = {"remote_static": remote} if is_initiator else {}
        if self.mode is HandshakeMode.DELEGATE:
            return build_delegate_terms(
                **{"address": unhex(self.known["address"]), "static": static, **known_remote, **changes}
            )
        relayed = {} if is_initiator else {"relayed_key": self.initiatorEphemeral.public}
        fields = {"qr_payload": self.known["qrPayload"], "psk": unhex(self.known["psk"]), **relayed, **known_remote}
        return build_qr_terms(**{"static": static, **fields, **changes})

    def initiate(self, terms=None):
        terms = terms or self.build_terms(is_initiator=True)
        return InitiatorHandshake(terms, ephemeral=self.initiatorEphemeral, backend=self.backend)

    def respond(self, find_terms=None):
        own = self.build_terms(is_initiator=False)
        find = find_terms or (lambda mode, pair_id: own if (mode, pair_id) == (own.mode, own.pair_id) else None)
        return ResponderHandshake(
            find, decoy=self.responderStatic, ephemeral=self.responderEphemeral, backend=self.backend
        )


class End:
    """A channel, and all that happened on it."""

    def __init__(self, channel):
        self.channel, self.streams, self.events = channel, channel.streams, []

    def give(self, frames, now=0.0):
        for frame in frames:
            self.channel.receive_frame(frame, now)
        self.events += self.channel.take_events()

    def take(self, now=0.0, **limit):
        frames = self.channel.data_to_send(now, **limit)
        self.events += self.channel.take_events()
        return frames

    def seen(self, *kinds):
        """The events of these kinds so far."""
        self.events += self.channel.take_events()
        return [event for event in self.events if isinstance(event, kinds)]

    def data_of(self, stream_id, kind):
        return b"".join(event.data for event in self.seen(kind) if event.stream_id == stream_id)


def pump(left, right, now=0.0):
    """Carries frames both ways until neither end has any."""
    while (there := left.take(now)) + (back := right.take(now)):
        right.give(there, now)
        left.give(back, now)


def build_ends(backend, mode=HandshakeMode.RESUME, path=ChannelPath.DIRECT, **options):
    """Consumer and provider, before their first frame."""
    keys = Keys(mode, backend)
    return (
        End(Channel(keys.initiate(), now=0.0, path=path, **options)),
        End(Channel(keys.respond(), now=0.0, path=path, **options)),
    )


def connect(backend, mode=HandshakeMode.RESUME, path=ChannelPath.DIRECT, **options):
    """Consumer and provider with an open channel."""
    ends = build_ends(backend, mode, path, **options)
    pump(*ends)
    return ends


class RawPeer:
    """A consumer with the right keys and no manners: it sends any inner frame, against the channel `end`."""

    def __init__(self, backend, mode=HandshakeMode.RESUME, path=ChannelPath.DIRECT, *, is_ready=True, **options):
        keys = Keys(mode, backend)
        handshake = keys.initiate()
        self.end = End(Channel(keys.respond(), now=0.0, path=path, **options))
        self.end.give([handshake.first_frame])
        handshake.read(self.end.take()[0])
        self.ciphers = handshake.noise.split()
        if is_ready:
            self.send(encode_inner_frame(FrameType.PING, bytes(8)))
            self.receive()

    def seal(self, inner):
        return b"\x10" + self.ciphers.send.encrypt(inner)

    def send(self, *inner_frames, now=0.0):
        self.end.give([self.seal(inner) for inner in inner_frames], now)

    def receive(self, now=0.0):
        """The inner frames that the channel has to send."""
        inner = []
        while frames := self.end.take(now):
            inner += [self.ciphers.receive.decrypt(frame[1:]) for frame in frames]
        return inner
