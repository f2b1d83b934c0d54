"""Section LAN pairing: the exchange by its known answers, back to back, out of turn, changed on its way, relayed."""

import contextlib
import itertools
import json
import random
from pathlib import Path

import pytest

from dvai_bridge import (
    EXCHANGE_LIFETIME_MS,
    EXCHANGE_MESSAGE_LIMIT_BYTES,
    EXCHANGE_REVEAL_MS,
    PENDING_LIFETIME_MS,
    ConsumerExchange,
    DeviceInfo,
    ExchangeStep,
    Identity,
    OwnBackend,
    PairingDirection,
    PairingExchangeError,
    ProviderExchange,
    build_key_pair,
    build_secure_pairing,
    compute_lan_commitment,
    encode_base64url,
    encode_device_info,
    parse_device_info,
)

NOW = 1_790_000_000_000
VECTORS = json.loads((Path(__file__).parent / "vectors" / "dvai-known-answers.json").read_text("utf-8"))
KNOWN = next(each for each in VECTORS["handshakes"] if each["use"] == "lan-pair")
APP = "app.test"
A = Identity(device_id="dev-a", device_name="A")
B = Identity(device_id="dev-b", device_name="B")


def draw_from(*drawn):
    """Random bytes that are given: of the ephemeral key, then rA or rB."""
    rest = iter(drawn)
    return lambda size: next(rest)


class Pair:
    """The two sides of one exchange, with keys and randomness of a seed."""

    def __init__(self, seed=1, *, consumer_id=None, app_id=APP, backend=None, source=A, target=B, static=None):
        numbers = random.Random(seed)
        self.backend = backend = backend or OwnBackend()
        key_a, key_b = (static or build_key_pair(numbers.randbytes(32), backend) for _ in range(2))
        common = {"backend": backend, "random": numbers.randbytes, "now_ms": NOW}
        self.consumer = ConsumerExchange(identity=source, app_id=APP, static=key_a, **common)
        self.provider = ProviderExchange(
            identity=target, consumer_id=consumer_id or source.device_id, app_id=app_id, static=key_b, **common
        )

    def run(self, steps=5):
        """The messages of the first `steps` steps."""
        consumer, provider = self.consumer, self.provider
        messages = [consumer.begin(NOW)]
        if steps > 1:
            messages.append(provider.answer(messages[0], NOW))
        if steps > 2:
            messages.append(consumer.reveal(messages[1], NOW))
            provider.read_reveal(messages[2], NOW)
        if steps > 3:
            messages.append(provider.confirm(NOW))
        if steps > 4:
            messages.append(consumer.confirm(messages[3], NOW))
            provider.complete(messages[4], NOW)
        return messages


def unhex(name):
    return bytes.fromhex(KNOWN[name])


def test_the_known_answer(crypto_backend):
    def build(side, static, ephemeral, own_random, **more):
        return side(
            static=build_key_pair(unhex(static), crypto_backend),
            backend=crypto_backend,
            random=draw_from(unhex(ephemeral), unhex(own_random)),
            app_id=KNOWN["appId"],
            now_ms=NOW,
            **more,
        )

    consumer = build(ConsumerExchange, "initiatorStatic", "initiatorEphemeral", "rA", identity=A)
    provider = build(ProviderExchange, "responderStatic", "responderEphemeral", "rB", identity=B, consumer_id="dev-a")
    messages = [consumer.begin(NOW)]
    messages.append(provider.answer(messages[0], NOW))
    messages.append(consumer.reveal(messages[1], NOW))
    assert [each.hex() for each in messages] == KNOWN["messages"]
    provider.read_reveal(messages[2], NOW)
    assert consumer.code == provider.code == KNOWN["code"]
    provider.complete(consumer.confirm(provider.confirm(NOW), NOW), NOW)
    keys = consumer.build_keys()
    assert keys == provider.build_keys() and keys.pair_secret.hex() == KNOWN["pairSecret"]
    info = KNOWN["infoA"].encode()
    static = build_key_pair(unhex("initiatorStatic"), crypto_backend).public
    assert compute_lan_commitment(unhex("rA"), static, info).hex() == KNOWN["commitment"]


def test_back_to_back(crypto_backend):
    pair = Pair(backend=crypto_backend)
    pair.run()
    consumer, provider = pair.consumer, pair.provider
    assert consumer.step is provider.step is ExchangeStep.COMPLETE
    assert consumer.peer == DeviceInfo(device_id="dev-b", name="B") and provider.peer.name == "A"
    assert consumer.code == provider.code and len(consumer.code) == 6 and consumer.code.isdecimal()
    kept = {"provider_id": "dev-b", "now_ms": NOW}
    here = build_secure_pairing(consumer, direction=PairingDirection.OUTBOUND, app_id="dev-b", **kept)
    there = build_secure_pairing(provider, direction=PairingDirection.INBOUND, app_id=APP, **kept)
    assert (here.key, there.key) == (("dev-b", "dev-b"), (APP, "dev-a"))
    assert (
        here.outbound_key == there.inbound_key and here.inbound_key is here.inbound_link is there.outbound_key is None
    )
    assert here.outbound_link == there.inbound_link and there.inbound_link.pending_until_ms == NOW + PENDING_LIFETIME_MS
    assert here.identity_key == encode_base64url(consumer.peer_key) != there.identity_key
    assert here.speaks_noise and there.speaks_noise
    shown = repr((here, there, consumer.build_keys(), consumer, provider))
    assert here.outbound_key not in shown and str(here.outbound_link.resume_psk) not in shown


def test_every_attempt_has_a_code_of_its_own():
    codes = set()
    for seed in range(8):
        pair = Pair(seed)
        pair.run(3)
        assert pair.consumer.code == pair.provider.code
        codes.add(pair.consumer.code)
    assert len(codes) == 8


@pytest.mark.parametrize("steps", range(5))
def test_there_are_no_keys_before_both_have_confirmed(steps):
    pair = Pair()
    if steps:
        pair.run(steps)
    for side in (pair.consumer, pair.provider):
        assert side.step is not ExchangeStep.COMPLETE
        with pytest.raises(ValueError, match="not complete"):
            side.build_keys()


# ---- out of turn ----------------------------------------------------------------------

CALLS = {
    "begin": (0, lambda side, message: side.begin(NOW)),
    "reveal": (0, lambda side, message: side.reveal(message, NOW)),
    "consumer confirms": (0, lambda side, message: side.confirm(message, NOW)),
    "answer": (1, lambda side, message: side.answer(message, NOW)),
    "read_reveal": (1, lambda side, message: side.read_reveal(message, NOW)),
    "provider confirms": (1, lambda side, message: side.confirm(NOW)),
    "complete": (1, lambda side, message: side.complete(message, NOW)),
}
# After so many messages, what each side may do next.
DUE = {
    0: {"begin", "answer"},
    1: {"reveal", "answer"},
    2: {"reveal", "read_reveal"},
    3: {"consumer confirms", "provider confirms"},
    4: {"consumer confirms", "complete"},
    5: set(),
}


@pytest.mark.parametrize(
    ("steps", "call"), [(steps, call) for steps, call in itertools.product(DUE, CALLS) if call not in DUE[steps]]
)
def test_a_step_out_of_turn_ends_the_exchange(steps, call):
    pair = Pair()
    messages = pair.run(steps) if steps else []
    number, act = CALLS[call]
    side = (pair.consumer, pair.provider)[number]
    for message in (*messages, b""):
        with pytest.raises(PairingExchangeError):
            act(side, message)
    assert side.step is ExchangeStep.FAILED
    with pytest.raises(ValueError, match="not complete"):
        side.build_keys()
    for _, again in (each for each in CALLS.values() if each[0] == number):
        with pytest.raises(PairingExchangeError, match="out of turn"):
            again(side, messages[0] if messages else b"")


@pytest.mark.parametrize("steps", range(5))
def test_what_takes_too_long_is_over(steps):
    """At the last moment each step is good; a millisecond later it ends the exchange, whichever way the clock jumps."""
    limit_ms = EXCHANGE_REVEAL_MS if steps < 3 else EXCHANGE_LIFETIME_MS

    def act(pair, messages, now_ms):
        if steps == 0:
            pair.consumer.begin(now_ms)
        elif steps == 1:
            pair.provider.answer(messages[0], now_ms)
        elif steps == 2:
            pair.consumer.reveal(messages[1], now_ms)
        elif steps == 3:
            pair.provider.confirm(now_ms)
        else:
            pair.provider.complete(pair.consumer.confirm(messages[3], NOW), now_ms)

    for late_ms in (limit_ms + 1, -limit_ms - 1):
        pair = Pair()
        messages = pair.run(steps) if steps else []
        with pytest.raises(PairingExchangeError, match="took too long"):
            act(pair, messages, NOW + late_ms)
    pair = Pair()
    act(pair, pair.run(steps) if steps else [], NOW + limit_ms)


# ---- changed on the way ---------------------------------------------------------------


def flip(message, position):
    changed = bytearray(message)
    changed[position] ^= 1 << position % 8
    return bytes(changed)


def test_one_flipped_bit_in_any_byte_leaves_no_pairing():
    """Of m1 it shows at m3; of the others at once."""
    messages = Pair().run()
    for number, message in enumerate(messages):
        for position in range(0, len(message), 1 if number in (0, 3, 4) else 7):
            pair, changed = Pair(), flip(message, position)
            with pytest.raises(PairingExchangeError):
                deliver(pair, number, changed)
            assert ExchangeStep.FAILED in (pair.consumer.step, pair.provider.step)
            assert pair.provider.step is not ExchangeStep.COMPLETE


def deliver(pair, number, changed):
    """The whole exchange, with message `number` replaced."""
    consumer, provider = pair.consumer, pair.provider

    def carry(index, message):
        return changed if index == number else message

    answer = provider.answer(carry(0, consumer.begin(NOW)), NOW)
    provider.read_reveal(carry(2, consumer.reveal(carry(1, answer), NOW)), NOW)
    provider.complete(carry(4, consumer.confirm(carry(3, provider.confirm(NOW)), NOW)), NOW)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    "size", [0, 1, 31, 32, 63, 64, EXCHANGE_MESSAGE_LIMIT_BYTES, EXCHANGE_MESSAGE_LIMIT_BYTES + 1, 1 << 20]
)
def test_hostile_sizes(number, size):
    with pytest.raises(PairingExchangeError):
        deliver(Pair(), number, bytes(size))


@pytest.mark.parametrize("number", range(5))
def test_a_message_of_another_exchange(number):
    other = Pair(2).run()
    with pytest.raises(PairingExchangeError):
        deliver(Pair(1), number, other[number])


@pytest.mark.parametrize("number", range(1, 5))
def test_messages_sent_back_to_their_sender(number):
    messages = Pair().run()
    with pytest.raises(PairingExchangeError):
        deliver(Pair(), number, messages[number - 1])


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32])
def test_unsound_keys(point, crypto_backend):
    messages = Pair().run(2)
    with pytest.raises(PairingExchangeError):
        deliver(Pair(backend=crypto_backend), 0, point + messages[0][32:])
    with pytest.raises(PairingExchangeError):
        deliver(Pair(backend=crypto_backend), 1, point + messages[1][32:])


def test_another_app_or_device_than_the_request_named():
    for options in ({"app_id": "app.other"}, {"app_id": None}, {"consumer_id": "dev-c"}):
        with pytest.raises(PairingExchangeError):
            Pair(**options).run(3)


def test_the_device_inside_must_be_the_one_outside():
    """Even if the request names the same device to both sides' handshakes."""
    pair = Pair()
    pair.provider._consumer_id = "dev-c"
    with pytest.raises(PairingExchangeError, match="two names"):
        pair.run(3)


def test_a_commitment_to_something_else():
    for change in (
        {"_random": bytes(32)},
        {"_info": encode_device_info(DeviceInfo(device_id="dev-a", name="Another name"))},
    ):
        pair = Pair()
        answer = pair.provider.answer(pair.consumer.begin(NOW), NOW)
        for name, value in change.items():
            setattr(pair.consumer, name, value)  # a consumer that changes its mind when it has seen rB
        with pytest.raises(PairingExchangeError, match="changed its mind"):
            pair.provider.read_reveal(pair.consumer.reveal(answer, NOW), NOW)


def test_with_itself():
    same_id = Pair(target=Identity(device_id="dev-a", device_name="B"))
    with pytest.raises(PairingExchangeError, match="itself"):
        same_id.run(3)
    backend = OwnBackend()
    with pytest.raises(PairingExchangeError, match="itself"):
        Pair(static=build_key_pair(b"\x05" * 32, backend), backend=backend).run(3)


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"{}",
        b"null",
        b'"x"',
        b"\xff",
        b'{"deviceId":"dev-a"}',
        b'{"name":"A","deviceId":"dev-a"}',
        b'{"deviceId":"dev-a","name":"A","x":1}',
        b'{"deviceId":"dev-a", "name":"A"}',
        b'{"deviceId":"dev-a","name":"\\u0041"}',
        b'{"deviceId":"dev-a","name":""}',
        b'{"deviceId":"","name":"A"}',
        b'{"deviceId":5,"name":"A"}',
        b'{"deviceId":"dev-a","name":null}',
        b'{"deviceId":"a\\n","name":"A"}',
        b'{"deviceId":"dev-a","name":"' + b"x" * 513 + b'"}',
        b'{"deviceId":"' + b"x" * 129 + b'","name":"A"}',
        b'{"deviceId":"dev-a","name":"A"}\n',
        b"[" * 100_000,
    ],
)
def test_info_that_is_none(info):
    with pytest.raises(ValueError):
        parse_device_info(info)
    pair = Pair()
    pair.consumer._info = info[: EXCHANGE_MESSAGE_LIMIT_BYTES * 2]
    with pytest.raises(PairingExchangeError):
        pair.run(3)


@pytest.mark.parametrize("name", ["A", "Büro", "\u202e\x1b[2J", '"\\"', "x" * 512, "\U0001f5a5" * 512])
def test_info_of_any_name(name):
    info = DeviceInfo(device_id="d" * 128, name=name)
    assert parse_device_info(encode_device_info(info)) == info
    pair = Pair(source=Identity(device_id="d" * 128, device_name=name))
    pair.run()
    assert pair.provider.peer == info


def test_random_play_never_ends_in_two_different_pairings():
    """Steps in any order with any message seen so far, at times changed: complete is who has the other's very keys."""
    chance = random.Random(20260101)
    completed = 0
    for seed in range(200):
        pair, seen = Pair(seed), [b"", bytes(96)]
        for due in ("begin", "answer", "reveal", "read_reveal", "provider confirms", "consumer confirms", "complete"):
            name = due if chance.random() < 0.95 else chance.choice(list(CALLS))
            number, act = CALLS[name]
            message = seen[-1] if chance.random() < 0.9 else chance.choice(seen)
            if message and chance.random() < 0.03:
                message = flip(message, chance.randrange(len(message)))
            with contextlib.suppress(PairingExchangeError):
                written = act((pair.consumer, pair.provider)[number], message)
                seen += [written] if isinstance(written, bytes) else []
        if pair.provider.step is ExchangeStep.COMPLETE:
            completed += 1
            assert pair.provider.build_keys() == pair.consumer.build_keys()
            assert pair.provider.code == pair.consumer.code
    assert 20 < completed < 180, "some plays go well and some do not"


# ---- somebody between -----------------------------------------------------------------


def test_whoever_relays_with_keys_of_their_own_shows_two_codes():
    """The man in the middle is a provider to the one and a consumer to the other, under their very names."""
    for seed in range(5):
        left, right = Pair(seed), Pair(seed + 100)  # the victims are left's consumer and right's provider
        left.run(3)
        right.run(3)
        assert left.consumer.peer == DeviceInfo(device_id="dev-b", name="B")
        assert right.provider.peer == DeviceInfo(device_id="dev-a", name="A")
        assert left.consumer.code != right.provider.code


def test_a_relay_that_passes_the_random_bytes_on_cannot_make_the_codes_equal():
    """It knows rA only after it has shown rB, so it cannot commit to rA towards the provider beforehand."""
    left, right = Pair(1), Pair(2)
    left.provider.answer(left.consumer.begin(NOW), NOW)
    right_answer = right.provider.answer(right.consumer.begin(NOW), NOW)
    right.consumer._random = left.consumer._random  # what it has learnt in the meantime
    with pytest.raises(PairingExchangeError, match="changed its mind"):
        right.provider.read_reveal(right.consumer.reveal(right_answer, NOW), NOW)
