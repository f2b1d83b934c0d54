"""What the secure channel costs in cryptography: with the package `cryptography` and with our own code, in one run.

    python3 tests/bench/bench_crypto.py [--rounds 15]

Processor time of one call, the median of several rounds and how far they lie apart. The two backends take turns in
each round, so that a machine that slows down slows both. A frame is one message of a connection, its nonce and number
included; naive is ChaCha20 word by word in Python, the usual way to write it.
"""

import argparse
import statistics
import struct
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import dvai_bridge as d  # noqa: E402

SIZES = (64, 1024, 16_384)
ROUND_S = 0.05
KEY = bytes(range(32))


def generate_naive_chacha20(key, nonce, n):
    """RFC 8439 section 2.3, as it is written there."""
    stream = b""
    for counter in range(n):
        start = [*struct.unpack("<4L8L", b"expand 32-byte k" + key), counter, *struct.unpack("<3L", nonce)]
        state = start[:]

        def turn(a, b, c, d, state=state):
            for x, y, z, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
                state[x] = (state[x] + state[y]) & 0xFFFFFFFF
                mixed = state[z] ^ state[x]
                state[z] = (mixed << bits | mixed >> 32 - bits) & 0xFFFFFFFF

        for _ in range(10):
            for column in range(4):
                turn(column, column + 4, column + 8, column + 12)
            for column in range(4):
                turn(column, 4 + (column + 1) % 4, 8 + (column + 2) % 4, 12 + (column + 3) % 4)
        stream += struct.pack("<16L", *((a + b) & 0xFFFFFFFF for a, b in zip(start, state, strict=True)))
    return stream


def measure(call):
    """Microseconds of processor time that one call takes, as many calls as fit into a round."""
    calls, spent = 0, 0.0
    start = time.process_time()
    while spent < ROUND_S:
        call()
        calls += 1
        spent = time.process_time() - start
    return spent / calls * 1e6


def build_calls(backend):
    """What is measured, by name."""
    pair = d.build_key_pair(KEY, backend)
    calls = {}
    for size in SIZES:
        send = d.CipherState(KEY, backend, rekey_interval=d.NOISE_REKEY_INTERVAL_FRAMES)
        frame = d.CipherState(KEY, backend).encrypt(bytes(size))

        def receive(frame=frame):
            d.CipherState(KEY, backend).decrypt(frame)

        calls[f"frame of {size:,} bytes, sent"] = lambda send=send, size=size: send.encrypt(bytes(size))
        calls[f"frame of {size:,} bytes, received (and a cipher made)"] = receive
    calls["X25519"] = lambda: backend.x25519(pair.private, pair.public)
    calls["X25519, public key"] = lambda: backend.x25519_public(pair.private)
    calls["handshake KKpsk0, both sides"] = lambda: shake_hands(pair, backend)
    return calls


def shake_hands(pair, backend):
    common = {"static": pair, "remote_static": pair.public, "psk": KEY, "prologue": b"", "backend": backend}
    sides = [
        d.NoiseHandshake(
            d.NoisePattern.KKPSK0, initiator=initiator, ephemeral=d.build_key_pair(KEY[::-1], backend), **common
        )
        for initiator in (True, False)
    ]
    sides[1].read_message(sides[0].write_message())
    sides[0].read_message(sides[1].write_message())
    for side in sides:
        side.split()


def show(name, columns):
    """One row: for each column its median, and the spread of the rounds."""
    cells = []
    for rounds in columns:
        middle = statistics.median(rounds)
        cells.append(f"{middle:10.1f} ({min(rounds) / middle - 1:+4.0%} {max(rounds) / middle - 1:+4.0%})")
    ratio = statistics.median(columns[-1]) / statistics.median(columns[0]) if len(columns) > 1 else 1
    print(f"{name:54}{''.join(f'{cell:>26}' for cell in cells)}{f'{ratio:8.1f}' if len(columns) > 1 else ''}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    best, obstacle = d.probe_crypto_backend()
    backends = [d.OwnBackend()] if obstacle else [best, d.OwnBackend()]
    if obstacle:
        print(f"the package cryptography {obstacle}: only our own code is measured")
    print(f"{'µs of processor time: median, spread':54}{''.join(f'{each.name:>26}' for each in backends)}   ratio")
    calls = [build_calls(backend) for backend in backends]
    for name in calls[0]:
        columns = [[] for _ in backends]
        for _ in range(rounds):
            for column, each in zip(columns, calls, strict=True):
                column.append(measure(each[name]))
        show(name, columns)
    assert generate_naive_chacha20(KEY, bytes(12), 16) == d._generate_chacha20(KEY, 0, bytes(12), 16)
    ours, naive = [], []
    for _ in range(rounds):
        ours.append(measure(lambda: d._generate_chacha20(KEY, 0, bytes(12), 256)))
        naive.append(16 * measure(lambda: generate_naive_chacha20(KEY, bytes(12), 16)))
    show("16 KiB of ChaCha20 alone: ours, and naive", [ours, naive])


if __name__ == "__main__":
    main()
