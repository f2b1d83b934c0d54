"""A process that discovers and announces and does nothing else: one for each network namespace of a test.

    python support_discovery.py '{"device_id": …, "port": …, "backend": "own", "announce": true, "browse": true}'

It prints a line of JSON for each event, takes {"update": {…}} on stdin, and stops when stdin ends.
"""

import asyncio
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dvai_bridge import Announcement, build_discovery, build_peer_json


def report(event, value):
    print(json.dumps({event: value}), flush=True)


async def run(options):
    announcement = Announcement(
        device_id=options["device_id"],
        device_name=options.get("device_name", "a device"),
        dvai_version="0.1.0",
        port=options["port"],
        models=tuple(options.get("models", ())),
    )
    discovery = build_discovery(
        device_id=options["device_id"],
        own_port=options["port"],
        announcement=announcement if options.get("announce", True) else None,
        on_found=(lambda peer: report("found", build_peer_json(peer))) if options.get("browse", True) else None,
        on_lost=lambda peer: report("lost", peer.device_id),
        interfaces=options.get("interfaces"),
        backend=options.get("backend", "own"),
    )
    await discovery.start()
    report("started", discovery.describe())
    while line := await asyncio.to_thread(sys.stdin.readline):
        changes = json.loads(line)["update"]
        announcement = dataclasses.replace(announcement, **changes) if changes else None
        discovery.update(announcement)
    await discovery.stop()
    report("stopped", None)


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
