"""Messages per second of the WebSocket codec, beside the parser of the package `websockets`.

    python3 tests/bench/bench_websocket.py      (needs websockets)

Both sides get the same masked frames, as they come from a client, 64 KiB at a time, and answer nothing; `websockets`
has its C extension if that is installed. Best of five rounds, the two taking turns.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

import dvai_bridge as d

MESSAGES = 20_000
ROUNDS = 5
SEGMENT_BYTES = 64 * 1024


def time_of(call, *arguments):
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def parse_ours(segments):
    parser = d.WebSocketParser(expects_mask=True, limit_bytes=96 * 1024)
    assert sum(len(parser.feed(segment)) for segment in segments) == MESSAGES


def parse_theirs(segments):
    protocol = Protocol(Side.SERVER, max_size=96 * 1024)
    count = 0
    for segment in segments:
        protocol.receive_data(segment)
        count += len(protocol.events_received())
    assert count == MESSAGES


def encode_ours(payload):
    for _ in range(MESSAGES):
        d.encode_websocket_frame(d.OPCODE_BINARY, payload, mask=os.urandom(4))


def encode_theirs(payload):
    for _ in range(MESSAGES):
        Frame(Opcode.BINARY, payload).serialize(mask=True)


def report(what, ours, theirs, *arguments):
    times = [(time_of(ours, *arguments), time_of(theirs, *arguments)) for _ in range(ROUNDS)]
    ours_s, theirs_s = (min(side) for side in zip(*times, strict=True))
    rates = f"{MESSAGES / ours_s:>10,.0f}/s   websockets {MESSAGES / theirs_s:>10,.0f}/s"
    print(f"{what:<22} {rates}   ratio {theirs_s / ours_s:.2f}")


def main():
    for size in (200, 2000):
        payload = os.urandom(size)
        frame = d.encode_websocket_frame(d.OPCODE_BINARY, payload, mask=b"\x37\xfa\x21\x3d")
        stream = frame * MESSAGES
        segments = [stream[i : i + SEGMENT_BYTES] for i in range(0, len(stream), SEGMENT_BYTES)]
        report(f"parse {size} bytes", parse_ours, parse_theirs, segments)
        report(f"encode {size} bytes", encode_ours, encode_theirs, payload)


if __name__ == "__main__":
    main()
