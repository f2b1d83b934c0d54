"""Section Peers: who is there, by real HTTP on loopback; nothing here waits for a fixed time."""

import asyncio
import contextlib
import functools
import http.client
import itertools
import json
import math
import time
import urllib.parse

import pytest

from dvai_bridge import (
    COOL_DOWN_S,
    PEER_ANSWER_LIMIT_BYTES,
    PEER_WAYS_LIMIT,
    PEERS_LIMIT,
    Handshake,
    Identity,
    KnownPeer,
    Pairing,
    PairingDeniedError,
    PairingFailedError,
    PairingInitiator,
    PairingStore,
    Peer,
    PeerHealth,
    PeerIntervals,
    PeerMonitor,
    PeerRoute,
    PeerState,
    PeerTable,
    PeerVia,
    PeerWay,
    UpstreamError,
    UsageError,
    average_measurement,
    build_known_peer_json,
    build_peer_json,
    build_static_peer,
    compose_signed_message,
    parse_health,
    parse_model_list,
    verify_hmac,
)
