"""What a secure channel costs: a handshake, one small event, a large body; with `cryptography` and with our own code.

    python3 tests/bench/bench_channel.py [--rounds 15]

Processor time of each end by itself, median and spread of several rounds, with everything between the application's
bytes and the transport's: streams, credit, frames, Noise. The transport (a WebSocket) is not in it. An event is one
chunk of a streamed chat completion, sent in a frame of its own; through a relay frames are padded. The two backends
take turns in each round.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import dvai_bridge as d  # noqa: E402
from tests.support_channel import build_ends, connect, pump  # noqa: E402

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdefghijklmn","object":"chat.completion.chunk","created":1790000000,'
    b'"model":"m","choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
EVENTS = 200
BODY_BYTES = 1024 * 1024
GOAL_US = {"cryptography": 80, "own": 1500}
clock = time.process_time_ns


def answer_begun(backend, path):
    """Consumer, provider and the id of a stream whose answer has begun."""
    consumer, provider = connect(backend, path=path)
    stream_id = consumer.streams.open("POST", "/v1/chat/completions", [], 0.0, is_last=True)
    pump(consumer, provider)
    provider.streams.send_head(stream_id, 200, [])
    pump(consumer, provider)
    return consumer.channel, provider.channel, stream_id


def send(channel, stream_id, data):
    channel.streams.send_data(stream_id, data)
    frames = channel.data_to_send(0.0)
    channel.take_events()
    return frames


def receive(channel, frames):
    """What a consumer does with frames: the frames that it answers with."""
    for frame in frames:
        channel.receive_frame(frame, 0.0)
        for event in channel.take_events():
            channel.streams.consume(event.stream_id, len(event.data))
    return channel.data_to_send(0.0)


def measure_events(backend, path, chunk, count):
    """Microseconds per chunk of processor time: of the sender, of the receiver."""
    consumer, provider, stream_id = answer_begun(backend, path)
    sending = receiving = 0
    for _ in range(count):
        start = clock()
        frames = send(provider, stream_id, chunk)
        middle = clock()
        back = receive(consumer, frames)
        end = clock()
        sending, receiving = sending + middle - start, receiving + end - middle
        for frame in back:
            provider.receive_frame(frame, 0.0)
    return sending / count / 1000, receiving / count / 1000


def measure_handshake(backend):
    """Microseconds of processor time of both ends together, key pairs apart, until both are open."""
    start = clock()
    pump(*build_ends(backend))
    return (clock() - start) / 1000


def measure_round(backend):
    """All figures of one round, by name."""
    figures = {"handshake, both ends, key pairs apart": measure_handshake(backend)}
    for path in d.ChannelPath:
        sending, receiving = measure_events(backend, path, EVENT, EVENTS)
        name = f"event of {len(EVENT)} bytes, {path.name.lower()}"
        figures |= {f"{name}, sender": sending, f"{name}, receiver": receiving}
    chunk = bytes(16_000)
    sending, receiving = measure_events(backend, d.ChannelPath.DIRECT, chunk, BODY_BYTES // len(chunk))
    return figures | {"chunk of 16,000 bytes, sender": sending, "chunk of 16,000 bytes, receiver": receiving}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    best, obstacle = d.probe_crypto_backend()
    backends = [d.OwnBackend()] if obstacle else [best, d.OwnBackend()]
    if obstacle:
        print(f"the package cryptography {obstacle}: only our own code is measured")
    taken = {backend.name: [] for backend in backends}
    for _ in range(rounds):
        for backend in backends:
            taken[backend.name].append(measure_round(backend))
    print(f"{'µs of processor time: median, spread':50}{''.join(f'{name:>28}' for name in taken)}")
    for figure in taken[backends[0].name][0]:
        cells = []
        for each in taken.values():
            values = [round_[figure] for round_ in each]
            middle = statistics.median(values)
            cells.append(f"{middle:12.1f} ({min(values) / middle - 1:+4.0%} {max(values) / middle - 1:+5.0%})")
        print(f"{figure:50}{''.join(f'{cell:>28}' for cell in cells)}")
    goals = ", ".join(f"{name} {GOAL_US[name]} µs" for name in taken)
    print(f"goal for an event and end, the transport included: {goals}")


if __name__ == "__main__":
    main()
