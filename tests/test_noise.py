"""Section Noise: the published vectors and our known answers, and what a changed message does, with both backends."""

import hmac
import json
from itertools import cycle
from pathlib import Path

import pytest

from dvai_bridge import (
    NOISE_FRAMES_LIMIT,
    NOISE_MESSAGE_LIMIT_BYTES,
    NOISE_NONCE_LIMIT,
    NOISE_REKEY_INTERVAL_FRAMES,
    CipherState,
    CryptoError,
    DecryptionError,
    KeyPair,
    KeyRefusedError,
    NoiseError,
    NoiseHandshake,
    NoisePattern,
    NoiseStep,
    OwnBackend,
    build_key_pair,
    compute_hkdf_expand,
    derive_confirmation_code,
    derive_pair_keys,
    encode_prologue,
    expand_pair_secret,
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


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case["use"])
def test_known_prologues(case):
    fields = {
        "qr-pair": lambda: [unhex(case["qrPayloadSha256"])],
        "resume": lambda: [
            unhex(case["pairId"]),
            case["initiatorDeviceId"].encode(),
            case["responderDeviceId"].encode(),
        ],
        "lan-pair": lambda: [b"dev-a", case["appId"].encode()],
        "delegate": lambda: [unhex(case["address"])],
    }[case["use"]]()
    assert encode_prologue(case["use"], *fields).hex() == case["prologue"]


def test_known_keys_of_a_pairing():
    case = KNOWN[0]
    keys = derive_pair_keys(unhex(case["handshakeHash"]), unhex(case["rConsumer"]), unhex(case["rProvider"]))
    assert keys.pair_secret.hex() == case["pairSecret"]
    assert keys.pairing_key == case["pairingKey"]
    assert keys.resume_psk.hex() == case["resumePsk"]
    assert keys.pair_id.hex() == case["pairId"]
    assert expand_pair_secret(keys.pair_secret) == keys
    for secret in (keys.pair_secret, keys.resume_psk):
        assert repr(secret) not in repr(keys) and secret.hex() not in repr(keys)
    assert keys.pairing_key not in repr(keys)


def test_rooms_of_a_pairing():
    """One for each direction. The known answer is that of the label without the provider's id and the space before."""
    case = KNOWN[0]
    keys = expand_pair_secret(unhex(case["pairSecret"]))
    assert compute_hkdf_expand(keys.pair_secret, b"dvai room v1", 16).hex() == case["room"]
    for provider in (case["providerDeviceId"], "dev-src"):
        block = hmac.digest(keys.pair_secret, b"dvai room v1 " + provider.encode() + b"\x01", "sha256")
        assert keys.build_room(provider) == block[:16]


def test_known_confirmation_codes():
    by_qr, _, on_lan, _ = KNOWN
    assert derive_confirmation_code(unhex(by_qr["handshakeHash"])) == by_qr["code"]
    randoms = unhex(on_lan["rA"]), unhex(on_lan["rB"])
    assert derive_confirmation_code(unhex(on_lan["handshakeHash"]), *randoms) == on_lan["code"]
    assert derive_pair_keys(unhex(on_lan["handshakeHash"]), *randoms).pair_secret.hex() == on_lan["pairSecret"]


def test_random_parts_cannot_be_shifted_into_each_other():
    for parts in ((bytes(31), bytes(33)), (bytes(64), b""), (b"", bytes(64))):
        with pytest.raises(ValueError):
            derive_pair_keys(bytes(32), *parts)
        with pytest.raises(ValueError):
            derive_confirmation_code(bytes(32), *parts)


# ---- changed messages -----------------------------------------------------------------


class Remembering:
    """A backend that computes each key agreement once: the same handshake is run for every byte of its messages."""

    name = "remembering"

    def __init__(self, backend):
        self.aead, self.x25519_public = backend.aead, backend.x25519_public
        self._backend, self._secrets = backend, {}

    def x25519(self, private, public):
        if (private, public) not in self._secrets:
            self._secrets[private, public] = self._backend.x25519(private, public)
        return self._secrets[private, public]


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case["use"])
def test_one_flipped_bit_in_any_byte_ends_it(case, crypto_backend):
    """Whoever receives the changed message, or at the latest the answer to it, finds out and stops for good."""
    backend = Remembering(crypto_backend)
    for number, message in enumerate(map(unhex, case["messages"])):
        for index in range(len(message)):
            changed = bytearray(message)
            changed[index] ^= 1 << (index + number) % 8
            initiator, responder = build_known_pair(case, backend)
            writer, reader = initiator, responder
            for each in range(number):
                reader.read_message(writer.write_message(unhex(case["payloads"][each])))
                writer, reader = reader, writer
            writer.write_message(unhex(case["payloads"][number]))
            found = try_to_read(reader, bytes(changed))
            if not found:  # XX's first message has no key yet: its answer does not fit
                assert case["use"] == "lan-pair" and number == 0
                found = try_to_read(writer, reader.write_message(unhex(case["payloads"][1])))
                reader = writer
            assert found, (number, index)
            assert_failed(reader)


def try_to_read(side, message):
    """Whether it was refused."""
    try:
        side.read_message(message)
    except CryptoError:
        return True
    return False


def assert_failed(side):
    """Nothing is possible any more."""
    assert side.state is NoiseStep.FAILED and not side.is_complete and not side.is_my_turn
    for call in (side.split, side.write_message, lambda: side.read_message(bytes(200)), lambda: side.handshake_hash):
        with pytest.raises(NoiseError):
            call()
    assert side.state is NoiseStep.FAILED
    assert side._local == {} and side._psk is None


@pytest.mark.parametrize("case", KNOWN, ids=lambda case: case["use"])
def test_truncated_and_longer_messages(case, crypto_backend):
    backend = Remembering(crypto_backend)
    for number, message in enumerate(map(unhex, case["messages"])):
        for changed in (b"", *(message[:size] for size in range(1, len(message), 7)), message[:-1], message + b"\0"):
            initiator, responder = build_known_pair(case, backend)
            writer, reader = initiator, responder
            for each in range(number):
                reader.read_message(writer.write_message(unhex(case["payloads"][each])))
                writer, reader = reader, writer
            writer.write_message(unhex(case["payloads"][number]))
            if try_to_read(reader, changed):
                assert_failed(reader)
            else:  # the payload of XX's first message may have any length
                assert case["use"] == "lan-pair" and number == 0
                assert try_to_read(writer, reader.write_message())


def test_replayed_reflected_and_swapped_messages(crypto_backend):
    for case in KNOWN:
        first, second = (unhex(message) for message in case["messages"][:2])
        initiator, responder = build_known_pair(case, crypto_backend)
        assert initiator.write_message(unhex(case["payloads"][0])) == first
        assert try_to_read(initiator, first)  # reflected
        assert_failed(initiator)
        if case["use"] != "lan-pair":
            assert try_to_read(responder, second)  # the answer before the question
            assert_failed(responder)
        initiator, responder = build_known_pair(case, crypto_backend)
        responder.read_message(initiator.write_message(unhex(case["payloads"][0])))
        assert try_to_read(responder, first)  # twice, out of turn
        assert_failed(responder)


@pytest.mark.parametrize("changed", ["prologue", "psk", "static"])
def test_sides_that_differ_beforehand(changed, crypto_backend):
    case = next(case for case in KNOWN if case["use"] == "resume")
    names = {"prologue": "prologue", "psk": "psk", "static": "initiatorStatic"}
    text = case[names[changed]]
    other = {**case, names[changed]: ("ff" if text[:2] != "ff" else "00") + text[2:]}
    initiator, _ = build_known_pair(other, crypto_backend)
    _, responder = build_known_pair(case, crypto_backend)
    assert try_to_read(responder, initiator.write_message())
    assert_failed(responder)


# ---- keys that are refused ------------------------------------------------------------

PRIME = 2**255 - 19
UNSOUND = [0, 1, PRIME - 1, PRIME, PRIME + 1, PRIME + 9, 2**255 + 9, 2**256 - 1, 2**255 - 1]


def encode_u(u):
    return u.to_bytes(32, "little")


@pytest.mark.parametrize("u", UNSOUND, ids=hex)
def test_unsound_ephemeral_keys(u, crypto_backend):
    for case in KNOWN:
        _, responder = build_known_pair(case, crypto_backend)
        with pytest.raises(KeyRefusedError):
            responder.read_message(encode_u(u) + unhex(case["messages"][0])[32:])
        assert_failed(responder)
        initiator, _ = build_known_pair(case, crypto_backend)
        initiator.write_message(unhex(case["payloads"][0]))
        with pytest.raises(KeyRefusedError):
            initiator.read_message(encode_u(u) + unhex(case["messages"][1])[32:])
        assert_failed(initiator)


@pytest.mark.parametrize("u", UNSOUND, ids=hex)
def test_unsound_static_keys_that_were_given(u, crypto_backend):
    pair = build_key_pair(bytes(range(32)), crypto_backend)
    for pattern, psk in ((NoisePattern.IK, None), (NoisePattern.KKPSK0, bytes(32)), (NoisePattern.IKPSK1, bytes(32))):
        with pytest.raises(KeyRefusedError):
            NoiseHandshake(
                pattern,
                initiator=True,
                ephemeral=pair,
                static=pair,
                remote_static=encode_u(u),
                psk=psk,
                prologue=b"",
                backend=crypto_backend,
            )


@pytest.mark.parametrize("u", UNSOUND, ids=hex)
@pytest.mark.parametrize("use", ["qr-pair", "delegate", "lan-pair"])
def test_unsound_static_keys_inside_a_handshake(u, use, crypto_backend):
    """Sealed correctly by a side that holds all the other keys: only the key itself is wrong."""
    case = next(case for case in KNOWN if case["use"] == use)
    initiator, responder = build_known_pair(case, crypto_backend)
    writer, reader = (responder, initiator) if use == "lan-pair" else (initiator, responder)
    if use == "lan-pair":
        responder.read_message(initiator.write_message())
    sound = writer._local["s"]
    writer._local["s"] = KeyPair(private=sound.private, public=encode_u(u))
    message = writer.write_message()
    with pytest.raises(KeyRefusedError):
        reader.read_message(message)
    assert_failed(reader)
    assert reader.remote_static is None or reader.remote_static == build_key_pair(sound.private, crypto_backend).public


# ---- whose turn it is -----------------------------------------------------------------


def test_steps_of_a_handshake(crypto_backend):
    case = KNOWN[2]
    initiator, responder = build_known_pair(case, crypto_backend)
    steps = []
    for writer, reader in ((initiator, responder), (responder, initiator), (initiator, responder)):
        steps.append((initiator.state, responder.state))
        for side in (writer, reader):
            with pytest.raises(NoiseError):
                side.split()
            with pytest.raises(NoiseError):
                _ = side.handshake_hash
        reader.read_message(writer.write_message())
    write, read = NoiseStep.WRITE, NoiseStep.READ
    assert steps == [(write, read), (read, write), (write, read)]
    assert (initiator.state, responder.state) == (NoiseStep.COMPLETE, NoiseStep.COMPLETE)
    initiator.split()
    assert initiator.state is NoiseStep.SPLIT and initiator.is_complete
    with pytest.raises(NoiseError):
        initiator.split()
    assert initiator.handshake_hash == responder.handshake_hash


@pytest.mark.parametrize("moves", ["read", "write write", "write read write", "write read read"])
def test_out_of_turn(moves, crypto_backend):
    initiator, responder = build_known_pair(KNOWN[3], crypto_backend)
    *allowed, forbidden = moves.split()
    for move in allowed:
        if move == "write":
            responder.read_message(initiator.write_message())
        else:
            initiator.read_message(responder.write_message())
    with pytest.raises(NoiseError):
        initiator.write_message() if forbidden == "write" else initiator.read_message(bytes(100))
    assert_failed(initiator)


def test_what_a_pattern_needs():
    backend = OwnBackend()
    pair = build_key_pair(bytes(range(32)), backend)
    right = {"ephemeral": pair, "static": pair, "remote_static": pair.public, "psk": bytes(32), "prologue": b""}
    NoiseHandshake(NoisePattern.IKPSK1, initiator=True, backend=backend, **right)
    for change in ({"static": None}, {"remote_static": None}, {"psk": None}, {"psk": bytes(31)}):
        with pytest.raises(ValueError):
            NoiseHandshake(NoisePattern.IKPSK1, initiator=True, backend=backend, **{**right, **change})
    with pytest.raises(ValueError, match="works without a psk"):
        NoiseHandshake(NoisePattern.IK, initiator=True, backend=backend, **right)
    with pytest.raises(ValueError, match="works without the other side's static key"):
        NoiseHandshake(NoisePattern.IKPSK1, initiator=False, backend=backend, **right)


def test_long_payloads(crypto_backend):
    room = NOISE_MESSAGE_LIMIT_BYTES - 32  # XX's first message: a key, then the payload in the clear
    initiator, responder = build_known_pair(KNOWN[2], crypto_backend)
    assert responder.read_message(initiator.write_message(bytes(room))) == bytes(room)
    initiator, responder = build_known_pair(KNOWN[2], crypto_backend)
    with pytest.raises(ValueError):
        initiator.write_message(bytes(room + 1))
    assert_failed(initiator)
    assert try_to_read(responder, unhex(KNOWN[2]["messages"][0])[:32] + bytes(room + 1))
    assert_failed(responder)


# ---- ciphers --------------------------------------------------------------------------


def build_transports(backend):
    initiator, responder = build_known_pair(KNOWN[1], backend)
    run_known(KNOWN[1], (initiator, responder))
    return initiator.split(), responder.split()


def test_a_connection_both_ways(crypto_backend):
    initiator, responder = build_transports(crypto_backend)
    for number in range(3):
        text = b"x" * number
        assert responder.receive.decrypt(initiator.send.encrypt(text, b"ad"), b"ad") == text
        assert initiator.receive.decrypt(responder.send.encrypt(text)) == text
    assert (initiator.send.n, responder.receive.n, responder.send.n) == (3, 3, 3)


@pytest.mark.parametrize(
    "fault", ["replayed", "reflected", "dropped", "swapped", "truncated", "flipped", "empty", "huge"]
)
def test_faulty_frames_end_a_direction(fault, crypto_backend):
    initiator, responder = build_transports(crypto_backend)
    first, second, third = (initiator.send.encrypt(text) for text in (b"one", b"two", b"three"))
    assert responder.receive.decrypt(first) == b"one"
    frame = {
        "replayed": first,
        "reflected": responder.send.encrypt(b"two"),
        "dropped": third,
        "swapped": third,
        "truncated": second[:-1],
        "flipped": bytes([second[0] ^ 1]) + second[1:],
        "empty": b"",
        "huge": bytes(NOISE_MESSAGE_LIMIT_BYTES + 1),
    }[fault]
    with pytest.raises(DecryptionError):
        responder.receive.decrypt(frame)
    for call in (
        lambda: responder.receive.decrypt(second),
        lambda: responder.receive.encrypt(b""),
        responder.receive.rekey,
    ):
        with pytest.raises(NoiseError):
            call()
    assert responder.receive.n == 1


def test_every_bit_of_a_frame(crypto_backend):
    key = unhex(KNOWN[1]["keyInitiatorToResponder"])
    sealed = build_transports(crypto_backend)[0].send.encrypt(b"PING 123")
    assert CipherState(key, crypto_backend).decrypt(sealed) == b"PING 123"
    for index in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[index // 8] ^= 1 << index % 8
        with pytest.raises(DecryptionError):
            CipherState(key, crypto_backend).decrypt(bytes(changed))


def test_rekeying_by_itself(crypto_backend):
    """After the frame whose n + 1 is a multiple of the interval, and n runs on."""
    initiator, responder = build_transports(crypto_backend)
    key = crypto_backend.aead(unhex(KNOWN[1]["keyInitiatorToResponder"]))
    after = crypto_backend.aead(unhex(KNOWN[1]["keyInitiatorToResponderAfterRekey"]))
    last = NOISE_REKEY_INTERVAL_FRAMES - 1
    initiator.send.n = responder.receive.n = last - 1
    for n, aead in ((last - 1, key), (last, key), (last + 1, after), (last + 2, after)):
        sealed = initiator.send.encrypt(b"text")
        assert sealed == aead.encrypt(bytes(4) + n.to_bytes(8, "little"), b"text", b"")
        assert responder.receive.decrypt(sealed) == b"text"
    assert initiator.send.n == responder.receive.n == last + 3
    assert responder.send.n == initiator.receive.n == 0


def test_the_last_frame_of_a_connection(crypto_backend):
    initiator, responder = build_transports(crypto_backend)
    initiator.send.n = responder.receive.n = NOISE_FRAMES_LIMIT - 1
    assert responder.receive.decrypt(initiator.send.encrypt(b"the last")) == b"the last"
    for call in (lambda: initiator.send.encrypt(b""), lambda: responder.receive.decrypt(bytes(16))):
        with pytest.raises(NoiseError):
            call()


def test_the_nonce_of_a_rekey_is_never_used(crypto_backend):
    """Section 5.1 of the specification: 2^64 - 1 is not for messages."""
    cipher = CipherState(bytes(32), crypto_backend)
    cipher.n = NOISE_NONCE_LIMIT - 1
    sealed = cipher.encrypt(b"")
    other = CipherState(bytes(32), crypto_backend)
    other.n = NOISE_NONCE_LIMIT - 1
    assert other.decrypt(sealed) == b""
    assert cipher.n == other.n == NOISE_NONCE_LIMIT
    for call in (lambda: cipher.encrypt(b""), lambda: other.decrypt(bytes(16))):
        with pytest.raises(NoiseError):
            call()


def test_a_frame_that_is_too_long_uses_no_nonce(crypto_backend):
    initiator, responder = build_transports(crypto_backend)
    with pytest.raises(ValueError):
        initiator.send.encrypt(bytes(NOISE_MESSAGE_LIMIT_BYTES - 15))
    longest = bytes(NOISE_MESSAGE_LIMIT_BYTES - 16)
    assert responder.receive.decrypt(initiator.send.encrypt(longest)) == longest


def test_secrets_are_not_shown(crypto_backend):
    initiator, _ = build_known_pair(KNOWN[1], crypto_backend)
    transports = build_transports(crypto_backend)
    for thing in (initiator, *transports, transports[0].send):
        for name in ("psk", "initiatorStatic", "initiatorEphemeral", "keyInitiatorToResponder"):
            assert KNOWN[1][name] not in repr(thing) and repr(unhex(KNOWN[1][name])) not in repr(thing)
