"""Section Noise: the published vectors and our known answers, and what a changed message does, with both backends."""

import json
from itertools import cycle
from pathlib import Path

import pytest

from dvai_bridge import (
    AEAD_TAG_BYTES,
    NOISE_FRAMES_LIMIT,
    NOISE_MESSAGE_LIMIT_BYTES,
    NOISE_NONCE_LIMIT,
    NOISE_REKEY_INTERVAL_FRAMES,
    CipherState,
    CryptoError,
    DecryptionError,
    KeyRefusedError,
    NoiseError,
    NoiseHandshake,
    NoisePattern,
    NoiseStep,
    OwnBackend,
    build_key_pair,
    derive_confirmation_code,
    derive_pair_keys,
    encode_prologue,
    expand_pair_secret,
    parse_base64url,
)

FOLDER = Path(__file__).parent / "vectors"
PUBLISHED = json.loads((FOLDER / "noise-cacophony.json").read_text("utf-8"))["vectors"]
KNOWN = json.loads((FOLDER / "dvai-known-answers.json").read_text("utf-8"))["handshakes"]
unhex = bytes.fromhex


def parse_pattern(protocol_name):
    return NoisePattern(protocol_name.split("_")[1])


def build_published_side(vector, side, backend):
    """One side of a published vector; `side`: init or resp."""

    def key_pair(kind):
        text = vector.get(f"{side}_{kind}")
        return None if text is None else build_key_pair(unhex(text), backend)

    remote, psks = vector.get(f"{side}_remote_static"), vector.get(f"{side}_psks")
    return NoiseHandshake(
        parse_pattern(vector["protocol_name"]),
        initiator=side == "init",
        ephemeral=key_pair("ephemeral"),
        static=key_pair("static"),
        remote_static=None if remote is None else unhex(remote),
        psk=None if psks is None else unhex(psks[0]),
        prologue=unhex(vector[f"{side}_prologue"]),
        backend=backend,
    )


@pytest.mark.parametrize("vector", PUBLISHED, ids=lambda vector: vector["protocol_name"])
def test_published_vectors(vector, crypto_backend):
    sides = [build_published_side(vector, side, crypto_backend) for side in ("init", "resp")]
    messages = iter(vector["messages"])
    writer, reader = sides
    while not writer.is_complete:
        message = next(messages)
        assert (writer.is_my_turn, reader.is_my_turn) == (True, False)
        assert writer.write_message(unhex(message["payload"])).hex() == message["ciphertext"]
        assert reader.read_message(unhex(message["ciphertext"])).hex() == message["payload"]
        writer, reader = reader, writer
    assert {side.handshake_hash.hex() for side in sides} == {vector["handshake_hash"]}
    transports = {side: side.split() for side in sides}
    for message in messages:
        sealed = transports[writer].send.encrypt(unhex(message["payload"]))
        assert sealed.hex() == message["ciphertext"]
        assert transports[reader].receive.decrypt(sealed).hex() == message["payload"]
        writer, reader = reader, writer


def build_known_pair(case, backend):
    """Both sides of one of our handshakes."""
    pattern = parse_pattern(case["protocol"])
    keys = {
        name: build_key_pair(unhex(case[name]), backend)
        for name in ("initiatorStatic", "initiatorEphemeral", "responderStatic", "responderEphemeral")
    }
    knows_initiator, knows_responder = pattern is NoisePattern.KKPSK0, pattern is not NoisePattern.XX
    common = {"prologue": unhex(case["prologue"]), "backend": backend, "psk": unhex(case.get("psk", "")) or None}
    initiator = NoiseHandshake(
        pattern,
        initiator=True,
        static=keys["initiatorStatic"],
        ephemeral=keys["initiatorEphemeral"],
        remote_static=keys["responderStatic"].public if knows_responder else None,
        **common,
    )
    responder = NoiseHandshake(
        pattern,
        initiator=False,
        static=keys["responderStatic"],
        ephemeral=keys["responderEphemeral"],
        remote_static=keys["initiatorStatic"].public if knows_initiator else None,
        **common,
    )
    return initiator, responder


def run_known(case, sides):
    """The whole handshake: what was written, checked against the known answers."""
    for (writer, reader), payload, message in zip(
        cycle([sides, sides[::-1]]), case["payloads"], case["messages"], strict=False
    ):
        assert writer.write_message(unhex(payload)).hex() == message
        assert reader.read_message(unhex(message)).hex() == payload


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case["use"])
def test_known_answers(case, crypto_backend):
    sides = build_known_pair(case, crypto_backend)
    run_known(case, sides)
    initiator, responder = sides
    assert initiator.handshake_hash == responder.handshake_hash == unhex(case["handshakeHash"])
    assert initiator.remote_static == build_key_pair(unhex(case["responderStatic"]), crypto_backend).public
    assert responder.remote_static == build_key_pair(unhex(case["initiatorStatic"]), crypto_backend).public
    forth, back = initiator.split(), responder.split()
    for cipher, name in ((forth.send, "keyInitiatorToResponder"), (back.send, "keyResponderToInitiator")):
        assert cipher.encrypt(b"x") == crypto_backend.aead(unhex(case[name])).encrypt(bytes(12), b"x", b"")
    forth.send.rekey()
    nonce = bytes(4) + (1).to_bytes(8, "little")
    after = crypto_backend.aead(unhex(case["keyInitiatorToResponderAfterRekey"]))
    assert forth.send.encrypt(b"x") == after.encrypt(nonce, b"x", b"")
