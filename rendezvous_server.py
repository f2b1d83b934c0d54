#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The relay of the DVAI Bridge: devices that share no network meet here, and talk through it without its reading along.

    python3 rendezvous_server.py                                             listens on port 8080
    RENDEZVOUS_URL=wss://relay.example.org python3 rendezvous_server.py      as devices will know it
    python3 rendezvous_server.py --help                                      every option, as flag and as variable

Anyone can run one: it is this one file, needs nothing but Python, keeps nothing on disk, and has no accounts. Several
processes are one relay when each has the same REDIS_URL. What devices send each other is encrypted between them. The
relay sees who is connected, when, and how much goes through; it can refuse, delay or cut, and both ends notice; it
cannot read or forge.

The file reads from top to bottom, each section using only what stands above it (`grep -n '^# ---- '` lists them):

    ground        constants, encodings, settings, addresses
    formats       WebSocket, X25519, HTTP, messages: bytes in, values out, no I/O
    decisions     provider proof, sessions, relay state, shared state, metrics: what each message does, as data
    processes     directory: what stands in Redis, and what processes tell each other there
    transport     links, ports, connection, trunk, Redis, relay: asyncio begins here
    program       command line

A message that opens, closes or looks for a session goes through `RelayState.handle`, which touches no socket and reads
no clock: it returns actions, and `Relay` does them. A message within a session takes one look-up in its connection's
table of routes and no decision: that is the path that is fast.

With REDIS_URL a session whose clients are at different processes has a half at each. To a process the other half is one
more client, which another process speaks for; frames cross on a `Trunk`, in which a half is named by four bytes as a
session is in the binary subprotocol. Redis keeps who is where and how much of each limit is used, in entries that run
out by themselves, and passes on what processes publish to each other.

Who is trusted: the operator, with the Redis that the operator names and whoever may write there. Not trusted: every
client and every byte of theirs; `X-Forwarded-For` of anyone but the proxies that the operator names; the Host field.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - one sentence, instead of an error somewhere below
    _SENTENCE = "rendezvous_server needs Python 3.11 or newer; this is Python " + sys.version.split()[0]
    if __name__ == "__main__":
        sys.exit(_SENTENCE)
    raise ImportError(_SENTENCE)

import argparse
import asyncio
import base64
import binascii
import codecs
import contextlib
import dataclasses
import enum
import hashlib
import hmac
import importlib
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import ssl
import struct
import time
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

__version__ = "0.1.0"

logger = logging.getLogger("rendezvous")

# ---- Constants and limits -------------------------------------------------------------
# Every bound of the program, each with its unit and the abuse it stops.

KIB = 1024
MIB = 1024 * 1024

BINARY_SUBPROTOCOL = "dvai-relay.2"

# HTTP: what a connection may cost before it is a WebSocket.
HTTP_LINE_LIMIT_BYTES = 8 * KIB  # endless request or header lines (414, 431)
HTTP_HEAD_LIMIT_BYTES = 32 * KIB  # many long headers (431)
HTTP_HEADER_COUNT_LIMIT = 100  # many short headers (431)
HEAD_DEADLINE_S = 10.0  # slow headers: absolute, from the connect to the empty line
FIRST_MESSAGE_DEADLINE_S = 10.0  # sockets that are opened and never used
CLOSE_DEADLINE_S = 5.0  # clients that do not answer a close frame
CLOSE_LINGER_S = 1.0  # likewise under TLS, where a half-closed connection is not to be had
TLS_HANDSHAKE_DEADLINE_S = 10.0  # slow TLS handshakes

# Messages: what one client may send.
MESSAGE_LIMIT_BYTES = 96 * KIB  # one WebSocket message: memory of a frame not yet complete
SKIPPED_MESSAGE_LIMIT_BYTES = 16 * MIB  # a longer one is read, dropped and told; beyond this it closes the socket
MESSAGE_BRACKETS_LIMIT = 64  # nesting that exhausts the stack
NUMBER_LIMIT_DIGITS = 64  # numbers whose conversion takes quadratic time
CAPABILITY_LIMIT_BYTES = 4 * KIB  # what a session that nobody joins keeps of its source
NAME_LIMIT_CHARS = 256  # a device's name, id or public key, likewise
REASON_LIMIT_CHARS = 128  # the reason of a hangup, which the other end shows
CONTROL_BURST = 60  # messages that are not within a session: this many at once,
CONTROL_PER_SECOND = 10.0  # and this many a second; floods of pings, dials and guesses
CHALLENGES_PER_ADDRESS_PER_MINUTE = 20  # one address that keeps the others from proving theirs
CHALLENGES_PER_SECOND = 50.0  # all clients together: two X25519 each, which take milliseconds without a C library

# Sessions and sockets: what they may hold.
UNJOINED_SESSION_S = 120.0  # sessions that nobody joins; a code on a screen is good for as long
SESSIONS_PER_SOCKET_LIMIT = 256  # dialers that crowd one listener
LISTENS_PER_SOCKET_LIMIT = 256  # rooms and addresses that one socket listens on
ENDED_SESSIONS_REMEMBERED = 16  # per socket: late frames of these are dropped, not complained about
CONNECTIONS_PER_SESSION = 4  # sockets, per session that is allowed (of an address, and in all)
CONNECTIONS_LEAST = 64  # sockets that are allowed however few sessions are
ADDRESSES_LIMIT = 100_000  # addresses whose use is counted, connected or not
DESCRIPTORS_RESERVE = 32  # descriptors that are not clients

# Data under way: memory that receivers who do not read could take.
READ_BYTES = 12 * KIB  # read from one socket before the others have their turn
SESSION_QUEUE_LIMIT_BYTES = 256 * KIB  # waiting in one direction of a session: then that session ends
TOTAL_QUEUE_LIMIT_BYTES = 256 * MIB  # waiting in all sessions together, likewise
WRITE_BUFFER_LIMIT_BYTES = 64 * KIB  # given to a socket that takes no more, before sessions begin to wait
CONTROL_QUEUE_LIMIT_BYTES = 64 * KIB  # answers that a client asks for and does not read: then it is cut off
SOCKET_BUFFER_BYTES = 256 * KIB  # kernel memory of a socket, each direction
BURST_S = 4.0  # seconds' worth of RELAY_BYTES_PER_SECOND that a session may send at once
REFILL_INTERVAL_S = 0.05  # how often sessions that were too fast go on

# Time.
TICK_S = 1.0  # how often expiry and pings are looked at
PING_INTERVAL_S = 30.0  # half-open sockets, and proxies that close what is silent for a minute
PINGS_MISSED_LIMIT = 2  # then the client is gone
STOP_GRACE_S = 10.0  # a stop waits this long for sessions to end

# Several processes as one, through Redis.
LEASE_S = 5.0  # what a process that froze or fell off the network keeps of the limits, and its listeners, in Redis
HEARTBEAT_INTERVAL_S = 1.0  # how often a process renews that; a killed one is missed within this
REDIS_DEADLINE_S = 3.0  # Redis that is frozen or half-open: what it has not answered by then, it does not answer
REDIS_RETRY_LEAST_S = 0.25  # between attempts to reach Redis again, doubled each time
REDIS_RETRY_MOST_S = 4.0
ANSWER_DEADLINE_S = 5.0  # a process that does not say whether a session with it may begin
ASKS_LIMIT = 1000  # clients that wait for Redis or another process before their session begins
ROUND_LIMIT = 256  # commands that go to Redis at once
TRUNK_WINDOW_BYTES = 512 * KIB  # on the way to one process, most of it in Redis, until that process has it

CLOSE_SERVICE_RESTART = 1012  # IANA's registry of close codes: "come back"
CLOSE_TRY_AGAIN_LATER = 1013


# ---- Encodings ------------------------------------------------------------------------
# Bounded JSON, canonical base64url, foreign text made safe to show.

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")
_JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_json(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return _JSON_ENCODER.encode(value).encode()


def _parse_json_int(text: str) -> int:
    if len(text) > NUMBER_LIMIT_DIGITS:
        raise ValueError("a number of too many digits")
    return int(text)


def _parse_json_float(text: str) -> float:
    if len(text) > NUMBER_LIMIT_DIGITS or float(text) in (float("inf"), float("-inf")):
        raise ValueError("a number of too many digits, or out of range")
    return float(text)


def _refuse_json_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _build_json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key that occurs twice in one object")
    return members


_JSON_DECODER = json.JSONDecoder(
    parse_int=_parse_json_int,
    parse_float=_parse_json_float,
    parse_constant=_refuse_json_constant,
    object_pairs_hook=_build_json_object,
)


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for what is none, is nested too deeply or cannot be written again.

    NaN, Infinity, numbers beyond a float, duplicate keys and lone surrogates are refused.
    """
    if text.count("[") + text.count("{") > MESSAGE_BRACKETS_LIMIT:
        raise ValueError("too many brackets")
    value = _JSON_DECODER.decode(text)
    if "\\u" in text:
        try:
            encode_json(value)
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate in a string") from None
    return value


def encode_base64url(data: bytes) -> str:
    """Unpadded base64url (RFC 4648 section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def parse_base64url(text: str) -> bytes:
    """The bytes of unpadded, canonical base64url; ValueError for any other spelling."""
    if not _BASE64URL.fullmatch(text):
        raise ValueError("not base64url: foreign characters or padding")
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        raise ValueError("not base64url: impossible length") from None
    if encode_base64url(data) != text:
        raise ValueError("not canonical base64url: non-zero tail bits")
    return data


def display_name(text: str) -> str:
    """Foreign text made safe to show: one line of at most 64 printable characters, the rest escaped."""
    shown = "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text[:65])
    return shown if len(shown) <= 64 else shown[:63] + "…"


# ---- WebSocket ------------------------------------------------------------------------
# The frames and the opening handshake of RFC 6455. Pure: bytes in, values out.

# -- begin: shared with dvai_bridge.py: WebSocket --
WEBSOCKET_FRAGMENTS_LIMIT = 64  # messages in ever more pieces
WEBSOCKET_VERSION = "13"

OPCODE_CONTINUATION, OPCODE_TEXT, OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG = 0, 1, 2, 8, 9, 10

CLOSE_NORMAL = 1000
CLOSE_GOING_AWAY = 1001
CLOSE_PROTOCOL_ERROR = 1002
CLOSE_WITHOUT_CODE = 1005  # never sent: the frame had no code
CLOSE_ABNORMAL = 1006  # never sent: the connection ended without a close frame
CLOSE_INVALID_DATA = 1007
CLOSE_POLICY_VIOLATION = 1008
CLOSE_TOO_BIG = 1009
CLOSE_INTERNAL_ERROR = 1011

_CONTROL_LIMIT_BYTES = 125  # RFC 6455 section 5.5
_WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_WEBSOCKET_KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")  # exactly 16 bytes in base64
_WEBSOCKET_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class WebSocketError(Exception):
    """The other side broke RFC 6455 or a bound: `code` and `reason` are what the close frame tells it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{reason} ({code})")
        self.code = code
        self.reason = reason


class UpgradeError(Exception):
    """No WebSocket comes of this handshake. `status`: what a server answers (400, 426), or what one answered."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def apply_mask(data: bytes, mask: bytes) -> bytes:
    """`data` XOR the repeated 4 bytes of `mask`: masks and unmasks (RFC 6455 section 5.3)."""
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def encode_websocket_frame(opcode: int, payload: bytes, *, mask: bytes | None = None, is_final: bool = True) -> bytes:
    """One frame. `mask`: 4 unpredictable bytes, which a client must give and a server must not."""
    size = len(payload)
    first = opcode | 0x80 if is_final else opcode
    masked = 0 if mask is None else 0x80
    if size < 126:
        head = bytes((first, masked | size))
    elif size < 0x10000:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BBQ", first, masked | 127, size)
    return head + payload if mask is None else head + mask + apply_mask(payload, mask)


def is_close_code(code: int) -> bool:
    """Whether a close frame may carry this code (RFC 6455 section 7.4 and IANA's registry)."""
    if code in (1004, CLOSE_WITHOUT_CODE, CLOSE_ABNORMAL):
        return False
    return 1000 <= code < 1015 or 3000 <= code < 5000


def encode_websocket_close(code: int, reason: str = "", *, mask: bytes | None = None) -> bytes:
    """A close frame; a reason that is too long is cut. CLOSE_WITHOUT_CODE: an empty one; ValueError for no code."""
    if code == CLOSE_WITHOUT_CODE:
        return encode_websocket_frame(OPCODE_CLOSE, b"", mask=mask)
    if not is_close_code(code):
        raise ValueError(f"{code} must not be sent in a close frame")
    text = reason.encode()[: _CONTROL_LIMIT_BYTES - 2].decode(errors="ignore").encode()
    return encode_websocket_frame(OPCODE_CLOSE, struct.pack("!H", code) + text, mask=mask)


class WebSocketParser:
    """Reads the frames of one connection in segments of any size and gives whole messages and control frames.

    `feed` returns events `(opcode, data)`: OPCODE_TEXT with str; OPCODE_BINARY, OPCODE_PING and OPCODE_PONG with
    bytes; OPCODE_CLOSE with the reason, `close_code` then saying the rest (CLOSE_WITHOUT_CODE if there was none).
    `error` is set once the bytes have proved a fault. The outcome depends on the bytes only, never on how they
    were cut. Nothing is read any more after a close frame or an error:

        OPEN (both None) → CLOSED (`close_code`)        OPEN → FAILED (`error`)

    Invariants: `_held` is the start of one frame, shorter than `_needed_bytes` and than the limits allow;
    `_fragments` belong to one message whose opcode is `_opcode` (0: none has begun), `_size_bytes` of payload
    in all, `_count` of them.
    """

    def __init__(
        self, *, expects_mask: bool, limit_bytes: int, limit_fragments: int = WEBSOCKET_FRAGMENTS_LIMIT
    ) -> None:
        """`expects_mask`: whether the other side is the client. `limit_bytes`: of a message's payload."""
        self._mask_bit = 0x80 if expects_mask else 0
        self._limit_bytes = limit_bytes
        self._limit_fragments = limit_fragments
        self._held = bytearray()
        self._needed_bytes = 2
        self._opcode = 0
        self._fragments: list[Any] = []  # bytes of a binary message, str of a text
        self._decode_text = codecs.getincrementaldecoder("utf-8")().decode
        self._count = 0
        self._size_bytes = 0
        self.close_code: int | None = None
        self.error: WebSocketError | None = None

    @property
    def is_over(self) -> bool:
        """Whether a close frame or an error has come: bytes that follow mean nothing."""
        return self.close_code is not None or self.error is not None

    @property
    def is_inside_message(self) -> bool:
        """Whether what was fed ended within a frame or a message."""
        return bool(self._held or self._opcode)

    def feed(self, data: bytes) -> list[tuple[int, Any]]:
        """The events that end within `data`, those before a fault included; look at `error` then."""
        if self._held:
            self._held += data
            if len(self._held) < self._needed_bytes:
                return []
            data = bytes(self._held)
            self._held.clear()
        events: list[tuple[int, Any]] = []
        position, end = 0, len(data)
        try:
            while position < end and self.close_code is None and self.error is None:
                next_position = self._read_frame(data, position, end, events)
                if not next_position:
                    self._held += data[position:] if position else data
                    break
                position = next_position
        except WebSocketError as error:
            self.error = error
        except UnicodeDecodeError:
            self.error = WebSocketError(CLOSE_INVALID_DATA, "text that is not UTF-8")
        return events

    def _read_frame(self, data: bytes, position: int, end: int, events: list[tuple[int, Any]]) -> int:
        """Reads the frame at `position`; where the next begins, or 0: the frame needs `_needed_bytes`."""
        available = end - position
        if available < 2:
            self._needed_bytes = 2
            return 0
        first, size = data[position], data[position + 1] ^ self._mask_bit
        if self._opcode or first not in (0x81, 0x82) or size > 127:
            self._verify_head(first, size)
        start = position + 2
        if size > 125:
            start += 2 if size == 126 else 8
            if start > end:
                self._needed_bytes = start - position
                return 0
            size = self._parse_long_size(data[position + 2 : start])
        if size + self._size_bytes > self._limit_bytes and not first & 8:
            raise WebSocketError(CLOSE_TOO_BIG, f"a message of more than {self._limit_bytes} bytes")
        mask_start = start
        if self._mask_bit:
            start += 4
        stop = start + size
        if stop > end:
            self._needed_bytes = stop - position
            return 0
        payload = data[start:stop]
        if self._mask_bit:
            payload = apply_mask(payload, data[mask_start:start])
        if first == 0x82 and not self._opcode:
            events.append((OPCODE_BINARY, payload))
        elif first == 0x81 and not self._opcode:
            events.append((OPCODE_TEXT, payload.decode()))
        elif first & 8:
            events.append((first & 15, self._take_close(payload) if first & 15 == OPCODE_CLOSE else payload))
        else:
            self._take_fragment(first, payload, events)
        return stop

    def _verify_head(self, first: int, size: int) -> None:
        """What the first two bytes of a frame may be here (RFC 6455 sections 5.2, 5.4 and 5.5)."""
        opcode = first & 15
        if first & 0x70:
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a reserved bit without an extension")
        if size > 127:
            wanted = "an unmasked frame from a client" if self._mask_bit else "a masked frame from a server"
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, wanted)
        if opcode & 8:
            if opcode > OPCODE_PONG:
                raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a reserved opcode")
            if not first & 0x80 or size > _CONTROL_LIMIT_BYTES:
                raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a control frame that is fragmented or too long")
            return
        if opcode > OPCODE_BINARY:
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a reserved opcode")
        if (opcode == OPCODE_CONTINUATION) != bool(self._opcode):
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a fragment out of turn")
        if self._count >= self._limit_fragments:
            raise WebSocketError(CLOSE_POLICY_VIOLATION, f"a message of more than {self._limit_fragments} fragments")

    def _parse_long_size(self, data: bytes) -> int:
        size = int.from_bytes(data, "big")
        if size >> 63 or size < (126 if len(data) == 2 else 0x10000):
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a length that is not written in the shortest way")
        return size

    def _take_close(self, payload: bytes) -> str:
        if not payload:
            self.close_code = CLOSE_WITHOUT_CODE
            return ""
        code = int.from_bytes(payload[:2], "big")
        if len(payload) == 1 or not is_close_code(code):
            raise WebSocketError(CLOSE_PROTOCOL_ERROR, "a close frame without a valid code")
        reason = payload[2:].decode()
        self.close_code = code
        return reason

    def _take_fragment(self, first: int, payload: bytes, events: list[tuple[int, Any]]) -> None:
        """One piece of a message that comes in several, text checked as far as it has come."""
        is_final = first & 0x80
        opcode = self._opcode = self._opcode or first
        self._count += 1
        self._size_bytes += len(payload)
        is_text = opcode == OPCODE_TEXT
        self._fragments.append(self._decode_text(payload, bool(is_final)) if is_text else payload)
        if is_final:
            events.append((opcode, ("" if is_text else b"").join(self._fragments)))
            self._opcode = self._count = self._size_bytes = 0
            self._fragments.clear()


def compute_accept(key: str) -> str:
    """Sec-WebSocket-Accept for a Sec-WebSocket-Key (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1((key + _WEBSOCKET_GUID).encode(), usedforsecurity=False).digest()).decode()


def _has_token(value: str, token: str) -> bool:
    return token in [member.strip(" \t").lower() for member in value.split(",")]


def parse_subprotocols(value: str) -> list[str]:
    """The members of a Sec-WebSocket-Protocol field, none for an empty one; UpgradeError (400) if malformed."""
    members = [member.strip(" \t") for member in value.split(",")] if value else []
    if not all(map(_WEBSOCKET_TOKEN.fullmatch, members)) or len(set(members)) < len(members):
        raise UpgradeError(400, "malformed Sec-WebSocket-Protocol")
    return members


def is_upgrade_request(get_field: Callable[[str, str], str]) -> bool:
    """Whether a request asks for a WebSocket. `get_field(name, default)`: a header field by its lower-case name."""
    return _has_token(get_field("upgrade", ""), "websocket")


def parse_upgrade_request(method: str, http_minor: int, get_field: Callable[[str, str], str]) -> tuple[str, list[str]]:
    """Key and offered subprotocols of a client's opening handshake; UpgradeError says with which status it fails.

    `get_field(name, default)`: a header field by its lower-case name, duplicates joined by commas. The answer to
    426 carries `Upgrade: websocket` and `Sec-WebSocket-Version: 13`.
    """
    if not is_upgrade_request(get_field):
        raise UpgradeError(426, "only WebSocket is spoken here")
    if method != "GET" or http_minor < 1 or not _has_token(get_field("connection", ""), "upgrade"):
        raise UpgradeError(400, "a WebSocket begins with GET, HTTP/1.1 and Connection: Upgrade")
    if get_field("sec-websocket-version", "") != WEBSOCKET_VERSION:
        raise UpgradeError(426, "the only WebSocket version spoken here is 13")
    key = get_field("sec-websocket-key", "")
    if not _WEBSOCKET_KEY.fullmatch(key):
        raise UpgradeError(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    return key, parse_subprotocols(get_field("sec-websocket-protocol", ""))


def build_upgrade_response_fields(key: str, subprotocol: str = "") -> list[tuple[str, str]]:
    """The header fields of the 101 that answers a client's key; `subprotocol`: one that it offered, or none."""
    fields = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", compute_accept(key))]
    return [*fields, ("Sec-WebSocket-Protocol", subprotocol)] if subprotocol else fields


def build_upgrade_request_fields(nonce: bytes, subprotocols: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The header fields, Host apart, of a client's opening handshake. `nonce`: 16 random bytes."""
    fields = [
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Key", base64.b64encode(nonce).decode()),
        ("Sec-WebSocket-Version", WEBSOCKET_VERSION),
    ]
    return [*fields, ("Sec-WebSocket-Protocol", ", ".join(subprotocols))] if subprotocols else fields


def verify_upgrade_response(
    status: int, get_field: Callable[[str, str], str], nonce: bytes, subprotocols: Sequence[str] = ()
) -> str:
    """The subprotocol that the server chose ("" if none); UpgradeError says what is wrong with its answer.

    Whoever answers 200, a redirect or 407 is named as what usually stands in the way: a captive portal or a proxy.
    """
    if status != 101:
        raise UpgradeError(status, explain_upgrade_refusal(status))
    accept = compute_accept(base64.b64encode(nonce).decode())
    if not _has_token(get_field("upgrade", ""), "websocket") or not _has_token(get_field("connection", ""), "upgrade"):
        raise UpgradeError(status, "the answer changes to something else than WebSocket")
    if get_field("sec-websocket-accept", "") != accept:
        raise UpgradeError(status, "the answer is not one to this request (Sec-WebSocket-Accept)")
    if get_field("sec-websocket-extensions", ""):
        raise UpgradeError(status, "the server chose an extension that was not offered")
    chosen = get_field("sec-websocket-protocol", "")
    if chosen and chosen not in subprotocols:
        raise UpgradeError(status, "the server chose a subprotocol that was not offered")
    return chosen


def explain_upgrade_refusal(status: int) -> str:
    """Who probably answered with this status where a 101 was expected."""
    if status == 407:
        return "a proxy in between wants a login (407)"
    if status == 511 or 200 <= status < 400:
        return f"a web page came instead of a WebSocket ({status}): a captive portal or a proxy is in between"
    if status == 426:
        return "the server speaks another version of WebSocket, or another protocol (426)"
    return f"the server refused the WebSocket ({status})"


# -- end: shared with dvai_bridge.py: WebSocket --


# ---- X25519 and HKDF ------------------------------------------------------------------
# What the proof of a provider's address needs: RFC 7748 and RFC 5869, computed here.

# -- begin: shared with dvai_bridge.py: X25519 and HKDF --
_PRIME_25519 = 2**255 - 19
_LOW_ORDER_25519 = frozenset(  # u of the points whose order divides 8, on the curve and on its twist
    (
        0,
        1,
        0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
        0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
        _PRIME_25519 - 1,
    )
)


def compute_x25519(private: bytes, public: bytes) -> bytes:
    """The shared secret of a private and a public key, 32 bytes each (RFC 7748 sections 5 and 6.1).

    As the RFC asks, other spellings of a public key (u at or above the prime, top bit set) are taken for what they
    mean; whoever minds uses `find_x25519_fault`. ValueError for a wrong length, or a secret that is all zeros.
    """
    if len(private) != 32 or len(public) != 32:
        raise ValueError("an X25519 key has 32 bytes")
    u = int.from_bytes(public, "little") % 2**255
    secret = _multiply_25519(private, u).to_bytes(32, "little")
    if not any(secret):
        raise ValueError("an X25519 key of low order")
    return secret


def compute_x25519_public(private: bytes) -> bytes:
    """The public key that belongs to 32 private bytes."""
    if len(private) != 32:
        raise ValueError("an X25519 key has 32 bytes")
    return _multiply_25519(private, 9).to_bytes(32, "little")


def find_x25519_fault(public: bytes) -> str | None:
    """What is wrong with a public key: its length, its spelling, or a low order; None if nothing is."""
    if len(public) != 32:
        return "not 32 bytes"
    u = int.from_bytes(public, "little")
    if u >= _PRIME_25519:
        return "not in canonical form"
    return "of low order" if u in _LOW_ORDER_25519 else None


def _multiply_25519(private: bytes, u: int) -> int:
    """The Montgomery ladder of RFC 7748 section 5: the u of (clamped private · point).

    Invariant: x2/z2 and x3/z3 are the u of k·P and (k + 1)·P, k the bits done so far. Sums stay unreduced, since a
    product is reduced at once.
    """
    p = _PRIME_25519
    scalar = int.from_bytes(private, "little") & (2**254 - 8) | 2**254
    x2, z2, x3, z3 = 1, 0, u, 1
    for bit in f"{scalar:b}":
        if bit == "1":
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b = x2 + z2, x2 - z2
        da, cb = (x3 - z3) * a, (x3 + z3) * b
        aa, bb = a * a % p, b * b % p
        total, difference = (da + cb) % p, (da - cb) % p
        e = aa - bb
        x3, z3 = total * total % p, difference * difference % p * u % p
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
        if bit == "1":
            x2, z2, x3, z3 = x3, z3, x2, z2
    return x2 * pow(z2, p - 2, p) % p


def compute_hkdf(salt: bytes, key_material: bytes, info: bytes, length: int) -> bytes:
    """`length` bytes of HKDF-SHA256: extract, then expand (RFC 5869 section 2)."""
    return compute_hkdf_expand(hmac.digest(salt, key_material, "sha256"), info, length)


def compute_hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    """The second half of HKDF-SHA256, for a `key` that is uniformly random already (RFC 5869 section 2.3)."""
    if not 0 <= length <= 255 * 32:
        raise ValueError("HKDF-SHA256 gives at most 8160 bytes")
    output, block = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


# -- end: shared with dvai_bridge.py: X25519 and HKDF --


# ---- Settings -------------------------------------------------------------------------
# Every option, written once: environment, flags, --help and the README's table come from here.


@dataclass(frozen=True, slots=True)
class Setting:
    """What one field of Settings says of itself. The flag of PORT is --port, of MAX_SESSIONS --max-sessions.

    `parse` turns text into the value and raises ValueError with what it wants. A secret has no flag, since everyone on
    a machine can read command lines.
    """

    environment: str
    help: str
    parse: Callable[[str], Any]
    metavar: str = ""
    is_secret: bool = False

    @property
    def flag(self) -> str:
        """As typed on the command line."""
        return "--" + self.environment.lower().replace("_", "-")


def parse_text(text: str) -> str:
    """Any text."""
    return text


def parse_whole_number(low: int, high: int) -> Callable[[str], int]:
    """Build a parser of an ASCII integer in [low, high]."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 16 and low <= int(text) <= high):
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return int(text)

    return parse


def parse_switch(text: str) -> bool:
    """1/0, true/false, yes/no, on/off in any case."""
    value = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in value:
        raise ValueError("it must be 1 or 0")
    return value[text.lower()]


def parse_list(text: str) -> tuple[str, ...]:
    """Comma-separated texts, blanks around each dropped."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise ValueError("it must be texts separated by commas")
    return parts


def parse_origins(text: str) -> tuple[str, ...]:
    """`*`, or web origins such as https://app.example.org."""
    origins = parse_list(text)
    for origin in origins:
        parts = urllib.parse.urlsplit(origin)
        if origin not in ("*", "null") and (not parts.scheme or not parts.netloc or parts.path):
            raise ValueError(f"{origin!r} is not an origin such as https://app.example.org")
    return origins


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_networks(text: str) -> tuple[Network, ...]:
    """Comma-separated addresses and networks."""
    try:
        return tuple(ipaddress.ip_network(part) for part in parse_list(text))
    except ValueError as exc:
        raise ValueError(f"it must be addresses or networks such as 127.0.0.1,10.0.0.0/8 ({exc})") from None


_LOG_LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "silent": logging.CRITICAL + 1,
}


def parse_log_level(text: str) -> int:
    """A level of `logging` by its name."""
    if text.lower() not in _LOG_LEVELS:
        raise ValueError(f"it must be one of {', '.join(_LOG_LEVELS)}")
    return _LOG_LEVELS[text.lower()]


def parse_relay_url(text: str) -> str:
    """The URL under which clients reach the relay: ws:// or wss:// (http and https are taken for them)."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("ws", "wss", "http", "https") or not parts.hostname or parts.username or parts.query:
        raise ValueError("it must be a URL such as wss://relay.example.org")
    if parts.port == 0:
        raise ValueError("it has no such port")
    return text.replace("http", "ws", 1) if parts.scheme.startswith("http") else text


def parse_redis_url(text: str) -> str:
    """The URL of a Redis. What is wrong is said without showing it, since it may contain a password."""
    try:
        parts = urllib.parse.urlsplit(text)
        has_place = bool(parts.path if parts.scheme == "unix" else parts.hostname) and parts.port != 0
    except ValueError:
        has_place = False
    if not has_place or parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("it must be a URL such as redis://127.0.0.1:6379/0, rediss://HOST or unix:///run/redis.sock")
    return text


def setting(environment: str, default: Any, help: str, **details: Any) -> Any:
    """A dataclass field that is also a setting."""
    details.setdefault("parse", parse_text)
    described = Setting(environment, help, **details)
    return field(default=default, metadata={"setting": described}, repr=not described.is_secret)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the relay runs. `relay_url` empty: not known."""

    host: str = setting("HOST", "0.0.0.0", "address to listen on", metavar="ADDRESS")
    port: int = setting(
        "PORT", 8080, "port to listen on; 0: any that is free", parse=parse_whole_number(0, 65535), metavar="PORT"
    )
    relay_url: str = setting(
        "RENDEZVOUS_URL",
        "",
        "URL under which clients reach this relay, as in wss://relay.example.org; it stands in pairing codes, and "
        "providers that are dialed by public key prove themselves to this name",
        parse=parse_relay_url,
        metavar="URL",
    )
    session_ttl_s: int = setting(
        "SESSION_TTL_SECONDS",
        60,
        "seconds without a message or ping after which a session ends, at the latest after twice as many; one that "
        "nobody has joined ends after 120, or this if longer",
        parse=parse_whole_number(1, 86_400),
        metavar="SECONDS",
    )
    max_sessions: int = setting(
        "MAX_SESSIONS",
        10_000,
        "sessions open at the same time",
        parse=parse_whole_number(1, 10_000_000),
        metavar="N",
    )
    allowed_origins: tuple[str, ...] = setting(
        "ALLOWED_ORIGINS",
        ("*",),
        "web origins whose pages may connect; apps send none and are not affected",
        parse=parse_origins,
        metavar="ORIGIN,…",
    )
    has_metrics: bool = setting(
        "METRICS_ENABLED", False, "answer GET /metrics for Prometheus", parse=parse_switch, metavar="0|1"
    )
    log_level: int = setting(
        "LOG_LEVEL",
        logging.INFO,
        "trace, debug, info, warn, error, fatal or silent; clients' addresses are logged from debug on only",
        parse=parse_log_level,
        metavar="LEVEL",
    )
    trusted_proxies: tuple[Network, ...] = setting(
        "TRUSTED_PROXIES",
        (),
        "addresses or networks of reverse proxies whose X-Forwarded-For is believed; without it everyone behind a "
        "proxy counts as one address",
        parse=parse_networks,
        metavar="ADDRESS,…",
    )
    tokens: tuple[str, ...] = setting(
        "RELAY_TOKENS",
        (),
        "access tokens, one of which a client must send: `Authorization: Bearer …`, or `?token=…` in the URL; "
        "environment only",
        parse=parse_list,
        metavar="TOKEN,…",
        is_secret=True,
    )
    sessions_per_address: int = setting(
        "SESSIONS_PER_ADDRESS",
        20,
        "sessions that one address (IPv6: one /64) may have open; 0: no limit",
        parse=parse_whole_number(0, 1_000_000),
        metavar="N",
    )
    sessions_per_address_per_minute: int = setting(
        "SESSIONS_PER_ADDRESS_PER_MINUTE",
        10,
        "sessions that one address may open in a minute; listening is none; 0: no limit",
        parse=parse_whole_number(0, 1_000_000),
        metavar="N",
    )
    bytes_per_second: int = setting(
        "RELAY_BYTES_PER_SECOND",
        1_048_576,
        "bytes a second of one session, both directions together, after a burst of four times as much; what is "
        "faster is delayed; 0: no limit",
        parse=parse_whole_number(0, 10**12),
        metavar="BYTES",
    )
    redis_url: str = setting(
        "REDIS_URL",
        "",
        "Redis through which several relay processes are one, as in redis://127.0.0.1:6379/0; rediss:// for TLS, a "
        "password as in redis://:PASSWORD@HOST; needs the package redis; environment only",
        parse=parse_redis_url,
        metavar="URL",
        is_secret=True,
    )
    tls_cert_file: str = setting(
        "TLS_CERT_FILE", "", "certificate chain (PEM): serve wss without a proxy; read again at SIGHUP", metavar="FILE"
    )
    tls_key_file: str = setting("TLS_KEY_FILE", "", "private key of that certificate (PEM)", metavar="FILE")


class SettingsError(Exception):
    """A flag, a variable, or a pair of them is wrong; the message is one line that says which."""


def get_settings_fields() -> dict[str, Setting]:
    """Every setting by the name of its field."""
    return {each.name: each.metadata["setting"] for each in dataclasses.fields(Settings)}


def build_settings(flags: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
    """Settings of flags (by field name) before environment before defaults; SettingsError names the place."""
    values: dict[str, Any] = {}
    for name, described in get_settings_fields().items():
        place, text = described.environment, environ.get(described.environment, "")
        if name in flags:
            place, text = described.flag, flags[name]
        if not text:
            continue
        try:
            values[name] = described.parse(text)
        except ValueError as exc:
            shown = "" if described.is_secret else f" {display_name(text)!r}"
            raise SettingsError(f"{place}{shown}: {exc}") from None
    settings = Settings(**values)
    if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
        raise SettingsError("TLS_CERT_FILE and TLS_KEY_FILE go together")
    return settings


def format_default(value: Any) -> str:
    """A default as the table and --help show it; empty where there is none."""
    if isinstance(value, tuple):
        return ",".join(value)
    return "0" if value is False else str(value)


def build_settings_table() -> str:
    """The Markdown table of all settings, as the README prints it."""
    rows = ["| variable | flag | meaning |", "|---|---|---|"]
    defaults = {each.name: each.default for each in dataclasses.fields(Settings)}
    for name, described in get_settings_fields().items():
        default = "info" if name == "log_level" else format_default(defaults[name])
        flag = "" if described.is_secret else f"`{described.flag}` `{described.metavar}`".replace("|", "\\|")
        shown = f" (default: {default})" if default else ""
        rows.append(f"| `{described.environment}` | {flag} | {described.help}{shown} |")
    return "\n".join(rows) + "\n"


# ---- Addresses ------------------------------------------------------------------------
# Whom a connection counts against. Pure.

_ADDRESS_WITH_PORT = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}")


def parse_client_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address as sockets and proxies write it, port and zone left out; IPv4 within IPv6 is IPv4; else ValueError."""
    match = _ADDRESS_WITH_PORT.fullmatch(text)
    if match:
        text = match[1] or match[2]
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def find_client_address(peer: str, forwarded_for: str, trusted_proxies: Sequence[Network]) -> str:
    """The address that a client is counted by: an IPv4 address, or the /64 of an IPv6 one.

    `forwarded_for` is read from its end, as far as those who wrote it are trusted: whatever a client itself put
    there stands further left.
    """
    address = parse_client_address(peer)
    hops = [hop.strip() for hop in forwarded_for.split(",")] if forwarded_for else []
    while hops and any(address in network for network in trusted_proxies):
        try:
            address = parse_client_address(hops.pop())
        except ValueError:
            break
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


# ---- HTTP -----------------------------------------------------------------------------
# The head of a request, and answers: enough for the opening handshake, /health, /metrics and /.

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_REQUEST_LINE = re.compile(rf"({_TOKEN}) ([!-~]+) HTTP/1\.([01])")
_FIELD_LINE = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_SINGLE_FIELDS = frozenset(
    ("authorization", "content-length", "host", "origin", "sec-websocket-key", "sec-websocket-version")
)
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    414: "URI Too Long",
    426: "Upgrade Required",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class HttpError(Exception):
    """A request that is refused: `status`, and in a sentence why."""

    def __init__(self, status: int, message: str, fields: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.fields = fields


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A request without a body. `headers`: names in lower case, duplicates joined by commas."""

    method: str
    path: str
    query: str
    http_minor: int
    headers: Mapping[str, str]

    def get(self, name: str, default: str = "") -> str:
        """The header field `name` (lower case)."""
        return self.headers.get(name, default)


def find_head_end(data: bytes) -> int:
    """Where the head ends that `data` begins with, 0 if it is not all there; HttpError at the first excess byte."""
    end = data.find(b"\r\n\r\n", 0, HTTP_HEAD_LIMIT_BYTES)
    if end >= 0:
        return end + 4
    if len(data) >= HTTP_HEAD_LIMIT_BYTES:
        raise HttpError(431, "the header fields are too large")
    if b"\r\n" not in data and len(data) > HTTP_LINE_LIMIT_BYTES:
        raise HttpError(414, "the request line is too long")
    return 0


def parse_request_head(head: bytes) -> HttpRequest:
    """The request of a head that ends in its empty line (RFC 9112, without its leniencies); HttpError otherwise."""
    lines = head[:-4].decode("latin-1").split("\r\n")
    if len(lines[0]) > HTTP_LINE_LIMIT_BYTES:
        raise HttpError(414, "the request line is too long")
    if len(lines) - 1 > HTTP_HEADER_COUNT_LIMIT or max(map(len, lines)) > HTTP_LINE_LIMIT_BYTES:
        raise HttpError(431, "the header fields are too many or too long")
    match = _REQUEST_LINE.fullmatch(lines[0])
    if match is None or not match[2].startswith("/"):
        raise HttpError(400, "malformed request line")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        found = _FIELD_LINE.fullmatch(line)
        if found is None:
            raise HttpError(400, "malformed header field")
        name, value = found[1].lower(), found[2].strip(" \t")
        if name in headers and name in _SINGLE_FIELDS:
            raise HttpError(400, f"{name} occurs twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if "host" not in headers and match[3] == "1":
        raise HttpError(400, "no Host")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise HttpError(400, "a request here has no body")
    path, _, query = match[2].partition("?")
    return HttpRequest(match[1], path, query, int(match[3]), headers)


def encode_response(
    status: int, body: bytes, content_type: str, fields: Sequence[tuple[str, str]] = (), *, is_head: bool = False
) -> bytes:
    """A whole answer, the last on its connection."""
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        *(f"{name}: {value}" for name, value in fields),
        "Connection: close, Upgrade" if status == 426 else "Connection: close",
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (b"" if is_head else body)


def encode_http_error(error: HttpError) -> bytes:
    """The answer that tells a client of it."""
    body = encode_json({"error": {"code": error.status, "message": error.message}})
    return encode_response(error.status, body, "application/json", error.fields)


def encode_upgrade_response(fields: Iterable[tuple[str, str]]) -> bytes:
    """The 101 after which the connection is a WebSocket."""
    return "".join(("HTTP/1.1 101 Switching Protocols\r\n", *(f"{n}: {v}\r\n" for n, v in fields), "\r\n")).encode()


def is_token_valid(request: HttpRequest, tokens: Sequence[str]) -> bool:
    """Whether a request has one of the tokens, in `Authorization: Bearer …` or `?token=…`; in constant time."""
    scheme, _, credentials = request.get("authorization").partition(" ")
    candidates = [credentials.strip().encode("latin-1")] if scheme.lower() == "bearer" else []
    try:
        fields = urllib.parse.parse_qs(request.query, max_num_fields=8)
    except ValueError:
        return False
    candidates += (text.encode() for text in fields.get("token", []))
    matches = [hmac.compare_digest(given, token.encode()) for given in candidates for token in tokens]
    return any(matches)


# ---- Messages -------------------------------------------------------------------------
# What clients may say, and how they are refused. Pure.


class ErrorCode(enum.Enum):
    """The codes of `error {code, message}`; those in CLOSE_CODES close the socket, too."""

    MALFORMED_JSON = "malformed_json"
    MALFORMED_MESSAGE = "malformed_message"
    UNKNOWN_MESSAGE_TYPE = "unknown_message_type"
    SESSION_JOIN_FAILED = "session_join_failed"
    SERVER_AT_CAPACITY = "server_at_capacity"
    SESSION_MISMATCH = "session_mismatch"
    SESSION_NOT_FOUND = "session_not_found"
    PEER_NOT_CONNECTED = "peer_not_connected"
    NOT_LISTENING = "not_listening"
    PROOF_FAILED = "proof_failed"
    RATE_LIMITED = "rate_limited"
    MESSAGE_TOO_LARGE = "message_too_large"
    SESSION_STALLED = "session_stalled"
    RELAY_NAME_UNSET = "relay_name_unset"
    PROCESSES_APART = "processes_apart"


CLOSE_CODES: Mapping[ErrorCode, int] = {
    ErrorCode.MALFORMED_JSON: CLOSE_POLICY_VIOLATION,
    ErrorCode.MALFORMED_MESSAGE: CLOSE_POLICY_VIOLATION,
    ErrorCode.UNKNOWN_MESSAGE_TYPE: CLOSE_POLICY_VIOLATION,
    ErrorCode.SESSION_JOIN_FAILED: CLOSE_POLICY_VIOLATION,
    ErrorCode.SERVER_AT_CAPACITY: CLOSE_INTERNAL_ERROR,
    ErrorCode.PROCESSES_APART: CLOSE_TRY_AGAIN_LATER,
}


class Refusal(Exception):
    """A message that is not obeyed."""

    def __init__(
        self, code: ErrorCode, message: str, details: Mapping[str, Any] | None = None, *, is_closing: bool = True
    ) -> None:
        """`details`: further members of the error, such as `sessionId`. `is_closing`: if the code is one that does."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.is_closing = is_closing and code in CLOSE_CODES
        self.details = details or {}


def parse_control(text: str) -> dict[str, Any]:
    """The object of a JSON message that has a type; Refusal for anything else."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError):
        raise Refusal(ErrorCode.MALFORMED_JSON, "could not parse JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise Refusal(ErrorCode.MALFORMED_MESSAGE, "missing 'type' field")
    return value


def _check_text(limit_chars: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit_chars:
            raise ValueError(f"a text of at most {limit_chars} characters")
        return value

    return check


def _check_bytes(size: int) -> Callable[[Any], bytes]:
    def check(value: Any) -> bytes:
        if not isinstance(value, str) or len(data := parse_base64url(value)) != size:
            raise ValueError(f"{size} bytes in base64url")
        return data

    return check


def _check_version(value: Any) -> int:
    if value is True or value != 1:
        raise ValueError("1, the only version there is")
    return 1


def _check_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object")
    return value


_NAME = _check_text(NAME_LIMIT_CHARS)
_OPTIONAL = {"deviceName": "", "capability": {}, "reason": "hangup"}  # what stands in for a field that is not there
_PEER = {"deviceId": _NAME, "deviceName": _NAME, "capability": _check_object, "ephemeralPubKey": _NAME}

MESSAGE_FIELDS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "ping": {},
    "pair-source": _PEER,
    "pair-target": {"sessionId": _NAME, **_PEER},
    "relay": {"sessionId": _NAME, "payload": _check_text(MESSAGE_LIMIT_BYTES)},
    "listen": {"v": _check_version, "room": _check_bytes(16), "publicKey": _check_bytes(32)},
    "dial": {"v": _check_version, "room": _check_bytes(16), "provider": _check_bytes(16)},
    "proof": {"mac": _check_bytes(32)},
    "hangup": {"sessionId": _NAME, "reason": _check_text(REASON_LIMIT_CHARS)},
}
_ONE_OF = {"listen": ("room", "publicKey"), "dial": ("room", "provider")}  # exactly one of these fields


def parse_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a message as MESSAGE_FIELDS has them, others dropped; Refusal if one is missing or wrong."""
    kind = message["type"]
    if kind not in MESSAGE_FIELDS:
        raise Refusal(ErrorCode.UNKNOWN_MESSAGE_TYPE, f"unknown type: {display_name(kind)}")
    choice = _ONE_OF.get(kind, ())
    if choice and sum(name in message for name in choice) != 1:
        raise Refusal(ErrorCode.MALFORMED_MESSAGE, f"{kind}: exactly one of {' and '.join(choice)} is wanted")
    values: dict[str, Any] = {}
    for name, check in MESSAGE_FIELDS[kind].items():
        if name not in message and (name in choice or name in _OPTIONAL):
            if name in _OPTIONAL:
                values[name] = _OPTIONAL[name]
            continue
        try:
            values[name] = check(message.get(name))
        except ValueError as exc:
            raise Refusal(ErrorCode.MALFORMED_MESSAGE, f"{kind}: '{name}' must be {exc}") from None
    return values


# ---- Provider proof -------------------------------------------------------------------
# Only who holds a private key may listen on the address of its public key. Pure.


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a client that claims a public key was asked; `expected_mac` is the only right answer."""

    address: bytes
    ephemeral_public: bytes
    nonce: bytes
    expected_mac: bytes = field(repr=False)


def parse_relay_name(url: str) -> str:
    """`host:port` of the relay's URL, the port always written, in lower case."""
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").lower()
    return f"{f'[{host}]' if ':' in host else host}:{parts.port or (80 if parts.scheme == 'ws' else 443)}"


def build_provider_address(public_key: bytes) -> bytes:
    """The 16 bytes by which a provider is dialed: they do not tell its public key."""
    return hashlib.sha256(b"dvai-provider-addr/1" + public_key).digest()[:16]


def build_challenge(public_key: bytes, relay_name: str, ephemeral_private: bytes, nonce: bytes) -> Challenge:
    """The challenge for the owner of `public_key`; ValueError if that is no sound key.

    Only the two ends of the key agreement know the mac's key; the name in it keeps another relay from passing the
    challenge on.
    """
    fault = find_x25519_fault(public_key)
    if fault:
        raise ValueError(fault)
    ephemeral_public = compute_x25519_public(ephemeral_private)
    shared_secret = compute_x25519(ephemeral_private, public_key)
    info = ephemeral_public + public_key + relay_name.encode()
    key = compute_hkdf(b"dvai-relay-proof/1", shared_secret, info, 32)
    address = build_provider_address(public_key)
    return Challenge(address, ephemeral_public, nonce, hmac.digest(key, nonce + address, "sha256"))


# ---- Sessions -------------------------------------------------------------------------
# Two clients that may talk to each other, and the table of all such pairs.


class SessionState(enum.Enum):
    """Where a session is. Every other move than these is impossible.

        pair-source → WAITING ── pair-target ─→ JOINED ── one end leaves ─→ HALF → gone
                         │              dial ──────↑  │                        ↑
                         └── 120 s, or source gone    └── hangup, stalled,     └── idle, or the other leaves
                             → gone                       idle → gone

    Invariants: WAITING has a source, an offer and no target; JOINED has both ends and no offer; HALF is only for a
    pairing whose remaining client speaks as existing apps do, and has that end only. A session of the table has at
    least one end, stands in that client's `sessions`, and counts against `address`.
    """

    WAITING = enum.auto()
    JOINED = enum.auto()
    HALF = enum.auto()


class SessionRole(enum.Enum):
    """Which end a client is: who asked to be served, or who serves."""

    SOURCE = "source"
    TARGET = "target"


@dataclass(slots=True, eq=False)
class Session:
    """`source`, `target`: client ids. `deadline`: when it is looked at again. `address`: whom it counts against.

    `offer`: what the source of a session that waits has to say to its target.
    """

    id: str
    state: SessionState
    address: str
    deadline: float
    source: int | None = None
    target: int | None = None
    offer: dict[str, Any] | None = None


class SessionTable:
    """All sessions of this process, by id; one whose clients are at two processes stands in the table of both.

    Sessions of one state all live equally long after their deadline was set last, so that each of `_queues` is in
    the order of the deadlines, and what is due stands in front.
    """

    __slots__ = ("_queues",)

    def __init__(self) -> None:
        self._queues: dict[bool, dict[str, Session]] = {True: {}, False: {}}

    def __len__(self) -> int:
        return len(self._queues[True]) + len(self._queues[False])

    def __iter__(self) -> Iterator[Session]:
        for queue in self._queues.values():
            yield from queue.values()

    def get(self, session_id: str) -> Session | None:
        """The session of that id."""
        return self._queues[False].get(session_id) or self._queues[True].get(session_id)

    def put(self, session: Session) -> None:
        """Adds a session, or notes that its state or deadline has changed."""
        self.remove(session)
        self._queues[session.state is SessionState.WAITING][session.id] = session

    def remove(self, session: Session) -> None:
        """Forgets a session."""
        for queue in self._queues.values():
            queue.pop(session.id, None)

    def find_due(self, now: float) -> list[Session]:
        """Sessions whose deadline has passed."""
        due: list[Session] = []
        for queue in self._queues.values():
            for session in queue.values():
                if session.deadline > now:
                    break
                due.append(session)
        return due


# ---- Relay state ----------------------------------------------------------------------
# What each message does, as a list of actions. Pure: no I/O, no clock; random bytes come from a callable.


@dataclass(frozen=True, slots=True)
class Send:
    """Tell a client. `session_id`: after what is still on its way to it in that session. `is_optional`: an answer
    that may be left out for a client that does not read. `process`: who speaks for the client, if it is not here."""

    client: int
    message: dict[str, Any]
    session_id: str = ""
    is_optional: bool = False
    process: str = ""


@dataclass(frozen=True, slots=True)
class Close:
    """End a client's WebSocket."""

    client: int
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Far:
    """Where a client is that another process speaks for, in its one session. `is_binary`: it speaks dvai-relay.2.

    `tag_here`, `tag_there`: what frames from it, and to it, begin with between the processes.
    """

    process: str
    tag_here: int
    tag_there: int
    is_binary: bool


@dataclass(frozen=True, slots=True)
class End:
    """One end of a session. `tag`: how it calls the session in binary frames, else None. `has_session_id`: whether
    frames to it carry the session's id. `far`: None for a client of this process."""

    client: int
    role: SessionRole
    tag: int | None
    has_session_id: bool
    far: Far | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """From now on frames of this session go from each end to the other."""

    session_id: str
    ends: tuple[End, End]


@dataclass(frozen=True, slots=True)
class Part:
    """The session is over. What is on its way still arrives, unless `is_discarded`."""

    session_id: str
    is_discarded: bool = False


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the directory before a message is obeyed. The answer, or None if none comes, goes to `SharedState.answer`.

    `kind`, `values`: the message. `name`: of the entry that is looked for or made, or of whom is counted. `since`: when
    a listener came. `session_id`: of the session that is to wait for its target.
    """

    kind: str
    client: int
    values: dict[str, Any]
    address: str = ""
    name: str = ""
    since: int = 0
    session_id: str = ""


Action = Send | Close | Join | Part | Ask


@dataclass(slots=True)
class Allowance:
    """A bucket of things that may be done at once, and that fills again with time."""

    left: float
    counted_at: float

    def take(self, now: float, *, burst: float, per_second: float) -> bool:
        """Takes one, if there is one."""
        self.left = min(burst, self.left + (now - self.counted_at) * per_second)
        self.counted_at = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


@dataclass(slots=True, eq=False)
class Client:
    """What the relay knows of a connected client.

    `is_many`: it keeps several sessions apart, so that messages about a session carry its id: ours, from its first
    `listen` or `dial` on, or by its subprotocol. `ended`: the last sessions that it had, and whether it has been told.
    """

    id: int
    address: str
    is_binary: bool
    is_many: bool
    alive_at: float
    control: Allowance
    sessions: tuple[Session, ...] = ()
    listens: tuple[tuple[str, bytes], ...] = ()
    challenge: Challenge | None = None
    ended: dict[str, bool] | None = None
    last_tag: int = 0
    far: Far | None = None


@dataclass(slots=True, eq=False)
class AddressUse:
    """What one address has taken, and its allowances of new sessions and of challenges."""

    opening: Allowance
    proving: Allowance
    connections: int = 0
    sessions: int = 0


class RelayState:
    """All clients, sessions and listeners of the relay, and what may happen to them.

    `connect` a client, `handle` its messages, `disconnect` it; `expire` now and then. Each returns the actions that
    follow. `now` is in seconds of any steady clock; `unix_offset_s` is what to add for Unix time.
    """

    def __init__(self, settings: Settings, random_bytes: Callable[[int], bytes], unix_offset_s: float = 0.0) -> None:
        """`random_bytes(n)` gives n unpredictable bytes."""
        self._settings = settings
        self._random_bytes = random_bytes
        self.unix_offset_s = unix_offset_s
        self.sessions = SessionTable()
        self.sessions_opened = 0
        self.is_stopping = False
        self._clients: dict[int, Client] = {}
        self._last_client = 0
        self._addresses: dict[str, AddressUse] = {}
        self._listeners: dict[str, dict[bytes, int]] = {"room": {}, "provider": {}}
        self._challenges = Allowance(CHALLENGES_PER_SECOND, 0.0)
        self._relay_name = parse_relay_name(settings.relay_url) if settings.relay_url else ""

    # Clients

    @property
    def clients_count(self) -> int:
        """Connected clients."""
        return len(self._clients)

    @property
    def listeners_count(self) -> int:
        """Rooms and addresses that somebody listens on."""
        return sum(map(len, self._listeners.values()))

    def is_address_full(self, address: str) -> bool:
        """Whether an address has as many connections as it may have."""
        use = self._addresses.get(address)
        allowed = self._settings.sessions_per_address * CONNECTIONS_PER_SESSION
        return bool(use and allowed and use.connections >= max(allowed, CONNECTIONS_LEAST))

    def connect(self, address: str, now: float, *, is_binary: bool = False) -> int:
        """A new client's id. `is_binary`: it has chosen `dvai-relay.2`."""
        self._last_client += 1
        control = Allowance(CONTROL_BURST, now)
        self._clients[self._last_client] = Client(self._last_client, address, is_binary, is_binary, now, control)
        self._get_use(address, now).connections += 1
        return self._last_client

    def disconnect(self, client_id: int, now: float) -> list[Action]:
        """The client is gone."""
        client = self._clients[client_id]
        for listen in client.listens:
            self._drop_listen(client, listen)
        actions: list[Action] = []
        for session in client.sessions:
            actions += self._end(session, now, "peer closed connection", leaving=client)
        del self._clients[client_id]
        self._addresses[client.address].connections -= 1
        return [action for action in actions if not isinstance(action, Close) or action.client != client_id]

    def touch(self, client_id: int, now: float) -> list[Action]:
        """The client has shown that it is alive, by a ping of its own."""
        self._clients[client_id].alive_at = now
        return []

    def handle(self, client_id: int, message: Mapping[str, Any], now: float) -> list[Action]:
        """What a message from `parse_control` does; a `relay` comes here only when it has no route."""
        client = self._clients[client_id]
        try:
            values = parse_fields(message)
            if message["type"] == "relay":
                return self._explain_relay(client, values["sessionId"])
            if not client.control.take(now, burst=CONTROL_BURST, per_second=CONTROL_PER_SECOND):
                raise Refusal(ErrorCode.RATE_LIMITED, "too many messages; wait a second")
            return self._HANDLERS[message["type"]](self, client, values, now)
        except Refusal as refusal:
            return self.refuse(client_id, refusal)

    def refuse(self, client_id: int, refusal: Refusal) -> list[Action]:
        """How a client learns that something it sent is not obeyed."""
        code = refusal.code
        message = {"type": "error", "code": code.value, "message": refusal.message, **refusal.details}
        if not refusal.is_closing:
            return [Send(client_id, message, is_optional=True)]
        return [Send(client_id, message), Close(client_id, CLOSE_CODES[code], code.value)]

    # Messages

    def _ping(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        return [*self.touch(client.id, now), Send(client.id, {"type": "pong"}, is_optional=True)]

    def _pair_source(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        offer = self._build_introduction(values)
        self._verify_may_open(client, now)
        return self._show_code(client, values, offer, self._draw_session_id(), now)

    def _draw_session_id(self) -> str:
        return encode_base64url(self._random_bytes(16))

    def _show_code(
        self, client: Client, values: dict[str, Any], offer: dict[str, Any], session_id: str, now: float
    ) -> list[Action]:
        actions = self._leave_pairing(client, now)
        lifetime_s = max(UNJOINED_SESSION_S, self._settings.session_ttl_s)
        session = self._open(client, session_id, SessionState.WAITING, now + lifetime_s)
        session.source, session.offer = client.id, offer
        expires_at = int((session.deadline + self.unix_offset_s) * 1000)
        payload = {
            "v": 1,
            "rendezvousUrl": self._settings.relay_url or f"ws://{self._settings.host}:{self._settings.port}",
            "sessionId": session.id,
            "sourceEphemeralPubKey": values["ephemeralPubKey"],
            "sourceDeviceId": values["deviceId"],
            "sourceDeviceName": values["deviceName"],
            "expiresAt": expires_at,
        }
        created = {
            "type": "session-created",
            "sessionId": session.id,
            "qrPayload": encode_base64url(encode_json(payload)),
            "expiresAt": expires_at,
        }
        return [*actions, Send(client.id, created)]

    def _pair_target(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        introduction = self._build_introduction(values)
        session = self.sessions.get(values["sessionId"])
        if session is None:
            raise Refusal(ErrorCode.SESSION_JOIN_FAILED, "there is no such session, or it has expired")
        if session.state is not SessionState.WAITING or session.source is None or session.source == client.id:
            raise Refusal(ErrorCode.SESSION_JOIN_FAILED, "the session already has a target")
        actions = self._leave_pairing(client, now)
        offer, session.offer = session.offer or {}, None
        session.target = client.id
        client.sessions += (session,)
        ends = self._join(session, now)
        for end, message in zip(ends, (introduction, offer), strict=True):
            actions.append(Send(end.client, message | self._describe_session(session, end)))
        return [*actions, Join(session.id, ends)]

    def _listen(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        if "room" in values:
            return self._start_listening(client, ("room", values["room"]), now)
        self._verify_may_prove(client, now)
        return self._challenge(client, values)

    def _verify_may_prove(self, client: Client, now: float) -> None:
        """Refusal if this client has to wait with proving an address."""
        if not self._relay_name:
            raise Refusal(ErrorCode.RELAY_NAME_UNSET, "this relay's operator has not set RENDEZVOUS_URL")
        per_minute, per_second = CHALLENGES_PER_ADDRESS_PER_MINUTE, CHALLENGES_PER_SECOND
        proving = self._get_use(client.address, now).proving
        if not (
            proving.take(now, burst=per_minute, per_second=per_minute / 60)
            and self._challenges.take(now, burst=per_second, per_second=per_second)
        ):
            raise Refusal(ErrorCode.RATE_LIMITED, "too many want to prove an address; wait a minute")

    def _challenge(self, client: Client, values: dict[str, Any]) -> list[Action]:
        try:
            challenge = build_challenge(
                values["publicKey"], self._relay_name, self._random_bytes(32), self._random_bytes(32)
            )
        except ValueError as exc:
            raise Refusal(ErrorCode.PROOF_FAILED, f"no proof is possible for this public key: {exc}") from None
        client.is_many = True
        client.challenge = challenge
        message = {
            "type": "challenge",
            "ephemeralPubKey": encode_base64url(challenge.ephemeral_public),
            "nonce": encode_base64url(challenge.nonce),
        }
        return [Send(client.id, message)]

    def _prove(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        challenge, client.challenge = client.challenge, None
        if challenge is None or not hmac.compare_digest(challenge.expected_mac, values["mac"]):
            raise Refusal(ErrorCode.PROOF_FAILED, "the proof is wrong, or nothing was to be proved")
        return self._start_listening(client, ("provider", challenge.address), now)

    def _dial(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        client.is_many = True
        kind, key, named = self._parse_dial(values)
        listener = self._find_listener(kind, key, client)
        self._verify_may_open(client, now, named, is_closing=False)
        return self._connect_dialer(client, listener, named, now)

    def _parse_dial(self, values: Mapping[str, Any]) -> tuple[str, bytes, dict[str, str]]:
        """Kind and key of what a message dials, and how messages about it name it."""
        kind = "room" if "room" in values else "provider"
        return kind, values[kind], {kind: encode_base64url(values[kind])}

    def _find_listener(self, kind: str, key: bytes, dialer: Client | None) -> Client:
        """Who listens there and has room for one more session; Refusal if nobody does. `dialer` None: not here."""
        named = {kind: encode_base64url(key)}
        listener = self._clients.get(self._listeners[kind].get(key, 0))
        if listener is None or listener is dialer:
            raise Refusal(ErrorCode.NOT_LISTENING, "nobody listens there now", named)
        if max(len(listener.sessions), len(dialer.sessions) if dialer else 0) >= SESSIONS_PER_SOCKET_LIMIT:
            raise Refusal(ErrorCode.RATE_LIMITED, "too many sessions at one end", named)
        return listener

    def _connect_dialer(self, client: Client, listener: Client, named: Mapping[str, str], now: float) -> list[Action]:
        deadline = now + self._settings.session_ttl_s
        session = self._open(client, self._draw_session_id(), SessionState.JOINED, deadline)
        session.source, session.target = client.id, listener.id
        listener.sessions += (session,)
        ends = self._join(session, now)
        told = [
            Send(end.client, {"type": kind_of_message, **self._describe_session(session, end), **named})
            for end, kind_of_message in zip(ends, ("dialed", "incoming"), strict=True)
        ]
        return [*told, Join(session.id, ends)]

    def _hang_up(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        session = self.sessions.get(values["sessionId"])
        if session is None or session not in client.sessions:
            return self._explain_relay(client, values["sessionId"])
        return self._end(session, now, values["reason"], leaving=client)

    _HANDLERS: Mapping[str, Callable[[Any, Client, dict[str, Any], float], list[Action]]] = {
        "ping": _ping,
        "pair-source": _pair_source,
        "pair-target": _pair_target,
        "listen": _listen,
        "proof": _prove,
        "dial": _dial,
        "hangup": _hang_up,
    }

    def _explain_relay(self, client: Client, session_id: str) -> list[Action]:
        """Why a frame cannot be passed on; in silence if the client has been told, and may not have read it yet."""
        details = {"sessionId": session_id} if client.is_many else None
        session = self.sessions.get(session_id)
        if session is not None and session in client.sessions:
            if session.state is SessionState.JOINED:
                raise Refusal(ErrorCode.SESSION_MISMATCH, "in this subprotocol frames are binary", details)
            raise Refusal(ErrorCode.PEER_NOT_CONNECTED, "the other peer is not connected", details)
        if client.ended is None or session_id not in client.ended:
            raise Refusal(ErrorCode.SESSION_MISMATCH, "this socket is not part of that session", details)
        if client.ended[session_id]:
            return []
        client.ended[session_id] = True
        raise Refusal(ErrorCode.SESSION_NOT_FOUND, "the session has ended", details)

    def explain_tag(self, client_id: int, tag: int | None) -> list[Action]:
        """Why a binary frame cannot be passed on; `tag` None: it has none. One of a session that has ended may have
        been under way."""
        if tag is None:
            return self.refuse(client_id, Refusal(ErrorCode.MALFORMED_MESSAGE, "a frame begins with 4 bytes of tag"))
        if 0 < tag <= self._clients[client_id].last_tag:
            return []
        message = "this socket has no session of that tag"
        return self.refuse(client_id, Refusal(ErrorCode.SESSION_MISMATCH, message, {"tag": tag}))

    # Sessions

    def stall(self, session_id: str, sender: int, code: ErrorCode, now: float) -> list[Action]:
        """More waits in a session than may: it ends. `sender`: whose frame was one too many."""
        session = self.sessions.get(session_id)
        if session is None:
            return []
        client = self._clients[sender]
        details = {"sessionId": session_id} if client.is_many else {}
        error = {"type": "error", "code": code.value, "message": "too much waits for the other end", **details}
        told = Send(sender, error, process=client.far.process if client.far else "")
        return [told, *self._end(session, now, code.value, is_discarded=True)]

    def expire(self, now: float, used_at: Callable[[str], float]) -> list[Action]:
        """Ends the sessions that were idle for too long. `used_at(session_id)`: when its last frame came."""
        actions: list[Action] = []
        for session in self.sessions.find_due(now):
            ends = [self._clients[end] for end in (session.source, session.target) if end is not None]
            life = [used_at(session.id), *(client.alive_at for client in ends)]
            if session.state is not SessionState.WAITING and max(life) + self._settings.session_ttl_s > now:
                session.deadline = now + self._settings.session_ttl_s
                self.sessions.put(session)
                continue
            for client in ends:
                if client.is_many:
                    actions.append(self._tell_end(client, session, "session expired"))
                else:
                    actions.append(Close(client.id, CLOSE_NORMAL, "session expired"))
            actions.append(Part(session.id))
            actions += self._forget(session)
        return actions

    def forget_addresses(self, now: float) -> None:
        """Gives back the memory of addresses that nobody uses and whose allowance is full again."""
        if len(self._addresses) > ADDRESSES_LIMIT:
            now += 60
        for address, use in list(self._addresses.items()):
            used_at = max(use.opening.counted_at, use.proving.counted_at)
            if not use.connections and not use.sessions and used_at + 60 <= now:
                del self._addresses[address]

    def stop(self) -> list[Action]:
        """Nothing new begins; who has no session is to come back elsewhere at once, others when it ends."""
        self.is_stopping = True
        for listeners in self._listeners.values():
            listeners.clear()
        return self._close_idle(self._clients.values())

    def _verify_may_open(
        self, client: Client, now: float, details: Mapping[str, str] | None = None, *, is_closing: bool = True
    ) -> None:
        """Refusal if there is no room for one more session of this client."""
        settings, use = self._settings, self._get_use(client.address, now)
        if self.is_stopping or len(self.sessions) >= settings.max_sessions:
            message = "the relay has as many sessions as it can"
            raise Refusal(ErrorCode.SERVER_AT_CAPACITY, message, details, is_closing=is_closing)
        if settings.sessions_per_address and use.sessions >= settings.sessions_per_address:
            raise Refusal(ErrorCode.RATE_LIMITED, "too many sessions from your address", details)
        burst = settings.sessions_per_address_per_minute
        if burst and not use.opening.take(now, burst=burst, per_second=burst / 60):
            raise Refusal(ErrorCode.RATE_LIMITED, "too many new sessions from your address; wait a minute", details)

    def _get_use(self, address: str, now: float) -> AddressUse:
        use = self._addresses.get(address)
        if use is None:
            opening = Allowance(self._settings.sessions_per_address_per_minute, now)
            use = AddressUse(opening, Allowance(CHALLENGES_PER_ADDRESS_PER_MINUTE, now))
            self._addresses[address] = use
        return use

    def _open(self, client: Client, session_id: str, state: SessionState, deadline: float) -> Session:
        session = Session(session_id, state, client.address, deadline)
        self.sessions.put(session)
        self.sessions_opened += 1
        self._count(client.address, 1)
        client.sessions += (session,)
        return session

    def _count(self, address: str, change: int) -> None:
        """Notes that an address has so many sessions more, or fewer."""
        self._addresses[address].sessions += change

    def _join(self, session: Session, now: float) -> tuple[End, End]:
        """The session's ends, source first, now that it has both."""
        session.state = SessionState.JOINED
        session.deadline = now + self._settings.session_ttl_s
        self.sessions.put(session)
        ends = []
        for client_id, role in ((session.source, SessionRole.SOURCE), (session.target, SessionRole.TARGET)):
            client = self._clients[client_id or 0]
            client.last_tag += client.is_binary
            tag = client.last_tag if client.is_binary else None
            ends.append(End(client.id, role, tag, client.is_many, client.far))
        return ends[0], ends[1]

    def _end(
        self, session: Session, now: float, reason: str, *, leaving: Client | None = None, is_discarded: bool = False
    ) -> list[Action]:
        """Ends a session and tells who stays. `leaving`: the end that ends it, which knows."""
        actions: list[Action] = []
        ends = [self._clients[end] for end in (session.source, session.target) if end is not None]
        staying = [client for client in ends if client is not leaving]
        actions += (self._tell_end(client, session, reason) for client in staying)
        if session.state is SessionState.JOINED:
            actions.insert(0 if is_discarded else len(actions), Part(session.id, is_discarded))
        if leaving and session.state is SessionState.JOINED and not staying[0].is_many:
            self._leave(session, leaving)
            session.state, session.deadline = SessionState.HALF, now + self._settings.session_ttl_s
            self.sessions.put(session)
            return actions + (self._close_idle([leaving]) if self.is_stopping else [])
        return actions + self._forget(session)

    def _tell_end(self, client: Client, session: Session, reason: str) -> Send:
        message = {"type": "peer-disconnected", "reason": reason}
        if client.is_many:
            message = {"type": "hangup", "sessionId": session.id, "reason": reason}
        return Send(client.id, message, session.id, process=client.far.process if client.far else "")

    def _leave(self, session: Session, client: Client) -> None:
        client.sessions = tuple(other for other in client.sessions if other is not session)
        client.ended = client.ended or {}
        client.ended[session.id] = False
        if len(client.ended) > ENDED_SESSIONS_REMEMBERED:
            del client.ended[next(iter(client.ended))]
        if session.source == client.id:
            session.source = None
        else:
            session.target = None

    def _forget(self, session: Session) -> list[Action]:
        """Takes a session out of the table and from its ends."""
        ends = [self._clients[end] for end in (session.source, session.target) if end is not None]
        for client in ends:
            self._leave(session, client)
        self.sessions.remove(session)
        self._count(session.address, -1)
        return self._close_idle(ends) if self.is_stopping else []

    def _close_idle(self, clients: Iterable[Client]) -> list[Action]:
        reason = "the relay is stopping: connect again"
        return [Close(client.id, CLOSE_SERVICE_RESTART, reason) for client in clients if not client.sessions]

    def _leave_pairing(self, client: Client, now: float) -> list[Action]:
        """Existing apps have one session a socket: with a new one the old one is over."""
        if client.is_many:
            return []
        actions: list[Action] = []
        for session in client.sessions:
            actions += self._end(session, now, "peer began another session", leaving=client)
        return actions

    def _build_introduction(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What one end is told of the other, which said `values`."""
        if len(encode_json(values["capability"])) > CAPABILITY_LIMIT_BYTES:
            raise Refusal(ErrorCode.MESSAGE_TOO_LARGE, f"'capability' may have {CAPABILITY_LIMIT_BYTES} bytes")
        return {
            "type": "peer-connected",
            "peerEphemeralPubKey": values["ephemeralPubKey"],
            "peerDeviceId": values["deviceId"],
            "peerDeviceName": values["deviceName"],
            "peerCapability": values["capability"],
        }

    def _describe_session(self, session: Session, end: End) -> dict[str, Any]:
        """How messages to one end call a session."""
        named: dict[str, Any] = {"sessionId": session.id} if end.has_session_id else {}
        return named if end.tag is None else named | {"tag": end.tag}

    # Listeners

    def _start_listening(self, client: Client, listen: tuple[str, bytes], now: float) -> list[Action]:
        kind, key = listen
        named = {kind: encode_base64url(key)}
        if self.is_stopping or len(client.listens) >= LISTENS_PER_SOCKET_LIMIT:
            raise Refusal(ErrorCode.RATE_LIMITED, "too many rooms on one socket, or the relay is stopping", named)
        client.is_many = True
        actions: list[Action] = []
        former = self._clients.get(self._listeners[kind].get(key, 0))
        if former is not None and former is not client:
            self._drop_listen(former, listen)
            actions.append(Send(former.id, {"type": "unlistened", **named}))
        self._listeners[kind][key] = client.id
        if listen not in client.listens:
            client.listens += (listen,)
        return [*actions, Send(client.id, {"type": "listening", **named})]

    def _drop_listen(self, client: Client, listen: tuple[str, bytes]) -> None:
        kind, key = listen
        client.listens = tuple(other for other in client.listens if other != listen)
        if self._listeners[kind].get(key) == client.id:
            del self._listeners[kind][key]


# ---- Shared state ---------------------------------------------------------------------
# What changes where several processes are one relay: sessions with a half elsewhere, and a directory to ask. Pure.

_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{22}")


class Verdict(enum.Enum):
    """What the directory answers."""

    OK = "ok"
    NOT_FOUND = "not_found"
    CAPACITY = "capacity"
    ADDRESS = "address"
    MINUTE = "minute"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Answer:
    """`process`: where that is what was looked for; empty if nothing was, or it is not to be had."""

    verdict: Verdict
    process: str = ""


@dataclass(slots=True)
class Pending:
    """A client that waits for another process to begin its half. `address`: whom the session counts against already."""

    kind: str
    client: int
    values: dict[str, Any]
    process: str
    tag: int
    address: str
    deadline: float


def build_listen_entry(kind: str, key: bytes) -> str:
    """The name under which the directory knows a listener."""
    return f"{kind}:{encode_base64url(key)}"


def build_address_entry(address: str) -> str:
    """The name under which the directory counts an address: of fixed size, whatever an address looks like."""
    return "address:" + encode_base64url(hashlib.sha256(address.encode()).digest()[:16])


def build_session_entry(session_id: str) -> str:
    """The name under which the directory knows a session that waits for its target."""
    return f"session:{session_id}"


SESSIONS_ENTRY = "sessions"  # how many a process counts


def _check_session_id(value: Any) -> str:
    if not isinstance(value, str) or not _SESSION_ID.fullmatch(value):
        raise ValueError("a session's id")
    return value


def _check_tag(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**32:
        raise ValueError("4 bytes")
    return value


def _check_is_binary(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


_HALF = {"sessionId": _check_session_id, "tag": _check_tag, "isBinary": _check_is_binary}
_INTRODUCTION = {  # of `peer-connected`
    "peerEphemeralPubKey": _NAME,
    "peerDeviceId": _NAME,
    "peerDeviceName": _NAME,
    "peerCapability": _check_object,
}

# What processes say to each other about a session, each sent by the half that it names to the half that it is for:
#
#     join, dial  → accept | refuse        a session begins: with a target for a code that the other one shows, or
#                                          between a dialer and a listener of the other one
#     alive                                a client has pinged
#     error                                for the client: its frames do not get through
#     hangup                               the session is over
_DIAL = {"room": _check_bytes(16), "provider": _check_bytes(16)}  # one of them
PROCESS_FIELDS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "join": _HALF | _INTRODUCTION,
    "dial": _HALF | _DIAL,
    "accept": _HALF | _INTRODUCTION,
    "refuse": {"sessionId": _check_session_id, "code": ErrorCode, "message": _check_text(REASON_LIMIT_CHARS)},
    "alive": {"sessionId": _check_session_id},
    "error": {"sessionId": _check_session_id, "code": ErrorCode, "message": _check_text(REASON_LIMIT_CHARS)},
    "hangup": {"sessionId": _check_session_id, "reason": _check_text(REASON_LIMIT_CHARS)},
}

_MAY_LACK: Mapping[str, tuple[set[str], ...]] = {
    "dial": ({"room"}, {"provider"}),
    "accept": (set(), set(_INTRODUCTION)),
}


def parse_process_message(message: Any) -> dict[str, Any]:
    """The fields of what another process says; ValueError if there is no sense in it.

    An `accept` has an introduction if it answers a `join`, and none if it answers a `dial`.
    """
    kind = message.get("type") if isinstance(message, dict) else None
    if not isinstance(kind, str) or kind not in PROCESS_FIELDS:
        raise ValueError("a process says what is not known here")
    values = {name: check(message[name]) for name, check in PROCESS_FIELDS[kind].items() if name in message}
    if PROCESS_FIELDS[kind].keys() - values.keys() not in _MAY_LACK.get(kind, (set(),)):
        raise ValueError(f"a process says {kind} with too little, or too much")
    return values


class SharedState(RelayState):
    """The clients of this process, and the halves that it has of all sessions of the relay.

    The client at the other end of such a half is a `Client` whose `far` says which process speaks for it: it lives as
    long as the half. What the half here has to tell it goes to that process and is told there, and the other way, so
    that each process decides about its own clients, by the rules of `RelayState`.

    `process` is the name under which others know this one: it is given by `attach` and ends with `detach`, and all
    far clients end with it. Without a name the state decides alone, as `RelayState` does, and refuses what may be
    elsewhere (`processes_apart`). With one, a new session or proof is first asked for in the directory: messages
    become an `Ask`, and `answer` goes on. Listeners and limits: who listened last is listened to; limits that this
    process knows to be reached are refused without asking.

    Invariants: a far client has one session. `_changes`: the entries of the directory that have to follow the state.
    `_since` has when each listener of this process came, in Unix milliseconds. A session counts against an address at
    the process of its source; its half elsewhere has no `address`.
    """

    def __init__(self, settings: Settings, random_bytes: Callable[[int], bytes], unix_offset_s: float = 0.0) -> None:
        super().__init__(settings, random_bytes, unix_offset_s)
        self.process = ""
        self._counted = 0
        self._changes: dict[str, str] = {}
        self._since: dict[tuple[str, bytes], int] = {}
        self._pending: dict[str, Pending] = {}
        self._asked = 0
        self._fars: dict[str, dict[int, None]] = {}
        self._last_tag = 0

    @property
    def clients_count(self) -> int:
        """Connected clients of this process."""
        return len(self._clients) - sum(map(len, self._fars.values()))

    # The directory

    def attach(self, process: str) -> list[Action]:
        """The directory is there, and knows nothing of this process: asks it to list what there is."""
        self.process = process
        self._changes = {SESSIONS_ENTRY: str(self._counted)}
        for address, use in self._addresses.items():
            if use.sessions:
                self._changes[build_address_entry(address)] = str(use.sessions)
        for session in self.sessions:
            if session.state is SessionState.WAITING:
                self._changes[build_session_entry(session.id)] = "1"
        self._asked += len(self._since)
        return [Ask("listening", 0, {}, "", build_listen_entry(*each), since) for each, since in self._since.items()]

    def detach(self, now: float) -> list[Action]:
        """The directory is away, and with it every other process."""
        self.process = ""
        self._changes.clear()
        reason = "the relay's processes have lost each other: try again"
        actions = [action for process in list(self._fars) for action in self.lose(process, now, reason)]
        for session_id in list(self._pending):
            actions += self._give_up(session_id, self._build_apart())
        return actions

    @property
    def has_changes(self) -> bool:
        """Whether the directory does not say any more how things are here."""
        return bool(self._changes)

    def take_changes(self) -> dict[str, str]:
        """The entries that have changed since the last time, by name; an empty value: it is to go."""
        changes, self._changes = self._changes, {}
        return changes

    def answer(self, ask: Ask, answer: Answer | None, now: float) -> list[Action]:
        """What follows from the directory's answer. None: it is away, and this process is alone."""
        self._asked -= 1
        if ask.kind == "listening":
            return self._settle_listen(ask, answer)
        if ask.address:
            self._note_use(ask.address)
        client = self._clients.get(ask.client)
        if client is None:
            if ask.session_id:
                self._note(build_session_entry(ask.session_id), "")
            return []
        try:
            if answer is None:
                return self._HANDLERS[ask.kind](self, client, ask.values, now)
            return self._ANSWERS[ask.kind](self, client, ask, answer, now)
        except Refusal as refusal:
            return self.refuse(client.id, refusal)

    def _ask(self, kind: str, client: Client, values: dict[str, Any], **details: Any) -> list[Action]:
        if self._asked + len(self._pending) >= ASKS_LIMIT:
            raise Refusal(ErrorCode.RATE_LIMITED, "too much begins at once; wait a second", is_closing=False)
        self._asked += 1
        return [Ask(kind, client.id, values, **details)]

    def _note(self, name: str, value: str) -> None:
        if self.process:
            self._changes[name] = value

    def _note_use(self, address: str) -> None:
        """What stands in the directory of an address follows, also if it has counted what came to nothing."""
        use = self._addresses.get(address)
        self._note(build_address_entry(address), str(use.sessions or "") if use else "")
        self._note(SESSIONS_ENTRY, str(self._counted))

    def _build_apart(self, details: Mapping[str, str] | None = None, *, is_closing: bool = True) -> Refusal:
        message = "the relay's processes do not reach each other now: try again in a few seconds"
        return Refusal(ErrorCode.PROCESSES_APART, message, details, is_closing=is_closing)

    def _verify_admitted(self, answer: Answer, details: Mapping[str, str] | None = None, **closing: bool) -> None:
        """Refusal if all processes together have reached a limit, or this one has begun to stop."""
        if self.is_stopping or answer.verdict is Verdict.CAPACITY:
            raise Refusal(ErrorCode.SERVER_AT_CAPACITY, "the relay has as many sessions as it can", details, **closing)
        if answer.verdict is Verdict.ADDRESS:
            raise Refusal(ErrorCode.RATE_LIMITED, "too many sessions from your address", details)
        if answer.verdict is Verdict.MINUTE:
            raise Refusal(ErrorCode.RATE_LIMITED, "too many from your address; wait a minute", details)

    # Messages of clients, and how they go on

    def touch(self, client_id: int, now: float) -> list[Action]:
        """The client is alive, which other processes that have halves of its sessions learn, too."""
        actions = super().touch(client_id, now)
        for session in self._clients[client_id].sessions:
            far = self._find_far(session)
            if far is not None:
                actions.append(self._tell_far(far, session, {"type": "alive"}, is_optional=True))
        return actions

    def _pair_source(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        if not self.process:
            return super()._pair_source(client, values, now)
        self._build_introduction(values)
        self._verify_may_open(client, now)
        return self._ask("pair-source", client, values, address=client.address, session_id=self._draw_session_id())

    def _go_on_source(self, client: Client, ask: Ask, answer: Answer, now: float) -> list[Action]:
        self._verify_admitted(answer)
        return self._show_code(client, ask.values, self._build_introduction(ask.values), ask.session_id, now)

    def _pair_target(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        session_id = values["sessionId"]
        if self.sessions.get(session_id) or not _SESSION_ID.fullmatch(session_id):
            return super()._pair_target(client, values, now)
        self._build_introduction(values)
        if not self.process:
            raise self._build_apart()
        return self._ask("pair-target", client, values, name=build_session_entry(session_id))

    def _go_on_target(self, client: Client, ask: Ask, answer: Answer, now: float) -> list[Action]:
        session_id = ask.values["sessionId"]
        if not answer.process or session_id in self._pending or self.sessions.get(session_id):
            raise Refusal(ErrorCode.SESSION_JOIN_FAILED, "there is no such session, or it has expired")
        introduction = self._build_introduction(ask.values)
        return self._request(client, ask, answer.process, session_id, introduction | {"type": "join"}, now)

    def _listen(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        if "room" in values or not self.process:
            return super()._listen(client, values, now)
        self._verify_may_prove(client, now)
        client.is_many = True
        return self._ask("listen", client, values, name=build_address_entry(client.address))

    def _go_on_listen(self, client: Client, ask: Ask, answer: Answer, now: float) -> list[Action]:
        self._verify_admitted(answer, is_closing=False)
        return self._challenge(client, ask.values)

    def _dial(self, client: Client, values: dict[str, Any], now: float) -> list[Action]:
        kind, key, named = self._parse_dial(values)
        is_here = self._listeners[kind].get(key) is not None
        if not self.process and is_here:
            return super()._dial(client, values, now)
        client.is_many = True
        if not self.process:
            raise self._build_apart(named, is_closing=False)
        if is_here:
            self._find_listener(kind, key, client)
        elif len(client.sessions) >= SESSIONS_PER_SOCKET_LIMIT:
            raise Refusal(ErrorCode.RATE_LIMITED, "too many sessions at one end", named)
        self._verify_may_open(client, now, named, is_closing=False)
        name = "" if is_here else build_listen_entry(kind, key)
        return self._ask("dial", client, values, address=client.address, name=name)

    def _go_on_dial(self, client: Client, ask: Ask, answer: Answer, now: float) -> list[Action]:
        kind, key, named = self._parse_dial(ask.values)
        self._verify_admitted(answer, named, is_closing=False)
        if not answer.process:
            return self._connect_dialer(client, self._find_listener(kind, key, client), named, now)
        session_id = self._draw_session_id()
        self._count(client.address, 1)
        return self._request(client, ask, answer.process, session_id, named | {"type": "dial"}, now)

    _HANDLERS: Mapping[str, Callable[[Any, Client, dict[str, Any], float], list[Action]]] = {
        **RelayState._HANDLERS,
        "pair-source": _pair_source,
        "pair-target": _pair_target,
        "listen": _listen,
        "dial": _dial,
    }
    _ANSWERS: Mapping[str, Callable[[SharedState, Client, Ask, Answer, float], list[Action]]] = {
        "pair-source": _go_on_source,
        "pair-target": _go_on_target,
        "listen": _go_on_listen,
        "dial": _go_on_dial,
    }

    def expire(self, now: float, used_at: Callable[[str], float]) -> list[Action]:
        """Ends idle sessions, and waiting for processes that do not answer."""
        actions = super().expire(now, used_at)
        for session_id in [key for key, pending in self._pending.items() if pending.deadline <= now]:
            actions += self._give_up(session_id, self._build_apart())
        return actions

    # Other processes

    def hear(self, process: str, message: Any, now: float) -> list[Action]:
        """What another process says, in the order in which it says it; ValueError if there is no sense in it."""
        values = parse_process_message(message)
        try:
            return self._HEARERS[message["type"]](self, process, values, now)
        except Refusal as refusal:
            refuse = {"type": "refuse", "code": refusal.code.value, "message": refusal.message}
            return [Send(0, refuse | {"sessionId": values["sessionId"]}, process=process)]

    def lose(self, process: str, now: float, reason: str = "the other device's relay process is gone") -> list[Action]:
        """Another process is gone: with it the other halves, and what was asked of it."""
        actions: list[Action] = []
        for client_id in list(self._fars.get(process, ())):
            far = self._clients[client_id]
            actions += self._end(far.sessions[0], now, reason, leaving=far)
        for session_id in [key for key, pending in self._pending.items() if pending.process == process]:
            is_dial = self._pending[session_id].kind == "dial"
            code = ErrorCode.NOT_LISTENING if is_dial else ErrorCode.SESSION_JOIN_FAILED
            actions += self._give_up(session_id, Refusal(code, "the other device has just lost the relay"))
        return actions

    def take_over(self, name: str, since: int) -> list[Action]:
        """A client of another process listens there since then: the one that has done so here does no more."""
        kind, _, key_text = name.partition(":")
        listen = kind, parse_base64url(key_text)
        client = self._clients.get(self._listeners[kind].get(listen[1], 0))
        if client is None or self._since[listen] > since:
            return []
        self._drop_listen(client, listen)
        return [Send(client.id, {"type": "unlistened", kind: key_text})]

    def _request(
        self, client: Client, ask: Ask, process: str, session_id: str, message: dict[str, Any], now: float
    ) -> list[Action]:
        """Asks another process to begin its half."""
        tag = self._take_tag()
        self._pending[session_id] = Pending(
            ask.kind, client.id, ask.values, process, tag, ask.address, now + ANSWER_DEADLINE_S
        )
        half = {"sessionId": session_id, "tag": tag, "isBinary": client.is_binary}
        return [Send(0, message | half, process=process)]

    def _hear_dial(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        kind, key, named = self._parse_dial(values)
        listener = self._find_listener(kind, key, None)
        if self.sessions.get(values["sessionId"]):
            raise Refusal(ErrorCode.SESSION_JOIN_FAILED, "the session is here already")
        far = self._connect_far(process, values, self._take_tag(), now)
        session = self._add_half(values["sessionId"], far, listener, now)
        ends = self._join(session, now)
        incoming = {"type": "incoming", **self._describe_session(session, ends[1]), **named}
        return [self._accept(far, session, {}), Send(listener.id, incoming), Join(session.id, ends)]

    def _hear_join(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        session = self.sessions.get(values["sessionId"])
        if session is None or session.state is not SessionState.WAITING or session.source is None:
            raise Refusal(ErrorCode.SESSION_JOIN_FAILED, "the session has expired, or has a target already")
        introduction = {"type": "peer-connected"} | {name: values[name] for name in _INTRODUCTION}
        far = self._connect_far(process, values, self._take_tag(), now)
        session.target, far.sessions = far.id, (session,)
        offer, session.offer = session.offer or {}, None
        ends = self._join(session, now)
        told = Send(ends[0].client, introduction | self._describe_session(session, ends[0]))
        return [self._accept(far, session, offer), told, Join(session.id, ends)]

    def _hear_accept(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        session_id = values["sessionId"]
        pending = self._find_pending(process, session_id)
        client = self._clients.get(pending.client) if pending else None
        is_dial = pending is not None and pending.kind == "dial"
        is_odd = is_dial is (_INTRODUCTION.keys() <= values.keys())
        if pending is None or client is None or is_odd or len(client.sessions) >= SESSIONS_PER_SOCKET_LIMIT:
            hangup = {"type": "hangup", "sessionId": session_id, "reason": "peer closed connection"}
            return [Send(0, hangup, process=process), *self._hear_hangup(process, hangup, now)]
        actions = self._leave_pairing(client, now)
        del self._pending[session_id]
        far = self._connect_far(process, values, pending.tag, now)
        if is_dial:
            session = self._add_half(session_id, client, far, now, address=client.address)
            near_end, *_ = ends = self._join(session, now)
            told = {"type": "dialed"} | self._parse_dial(pending.values)[2]
        else:
            session = self._add_half(session_id, far, client, now)
            _, near_end = ends = self._join(session, now)
            told = {"type": "peer-connected"} | {name: values[name] for name in _INTRODUCTION}
        return [*actions, Send(client.id, told | self._describe_session(session, near_end)), Join(session.id, ends)]

    def _hear_refuse(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        if self._find_pending(process, values["sessionId"]) is None:
            return []
        return self._give_up(values["sessionId"], Refusal(values["code"], values["message"]))

    def _hear_alive(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        far = self._find_half(process, values)[1]
        if far is not None:
            far.alive_at = now
        return []

    def _hear_error(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        session, far = self._find_half(process, values)
        if session is None or far is None:
            return []
        near = self._find_near(session, far)
        named = {"sessionId": session.id} if near.is_many else {}
        message = {"type": "error", "code": values["code"].value, "message": values["message"], **named}
        return [Send(near.id, message)]

    def _hear_hangup(self, process: str, values: dict[str, Any], now: float) -> list[Action]:
        session, far = self._find_half(process, values)
        if session is None or far is None:
            is_pending = self._find_pending(process, values["sessionId"]) is not None
            return self._give_up(values["sessionId"], self._build_apart()) if is_pending else []
        reason = values["reason"]
        if reason in (ErrorCode.SESSION_STALLED.value, ErrorCode.RATE_LIMITED.value):
            return self._end(session, now, reason, is_discarded=True)
        return self._end(session, now, reason, leaving=far)

    _HEARERS: Mapping[str, Callable[[SharedState, str, dict[str, Any], float], list[Action]]] = {
        "join": _hear_join,
        "dial": _hear_dial,
        "accept": _hear_accept,
        "refuse": _hear_refuse,
        "alive": _hear_alive,
        "error": _hear_error,
        "hangup": _hear_hangup,
    }

    # Halves

    def _take_tag(self) -> int:
        self._last_tag = self._last_tag % (2**32 - 1) + 1
        return self._last_tag

    def _connect_far(self, process: str, values: Mapping[str, Any], tag: int, now: float) -> Client:
        """The client at the other end of a half; `tag`: what its frames begin with on their way here."""
        far = Far(process, tag, values["tag"], values["isBinary"])
        self._last_client += 1
        client = Client(self._last_client, "", False, True, now, Allowance(0, now), far=far)
        self._clients[client.id] = client
        self._fars.setdefault(process, {})[client.id] = None
        return client

    def _add_half(self, session_id: str, source: Client, target: Client, now: float, address: str = "") -> Session:
        deadline = now + self._settings.session_ttl_s
        session = Session(session_id, SessionState.JOINED, address, deadline, source.id, target.id)
        self.sessions_opened += 1
        source.sessions += (session,)
        target.sessions += (session,)
        return session

    def _find_far(self, session: Session) -> Client | None:
        for client_id in (session.source, session.target):
            client = self._clients.get(client_id or 0)
            if client is not None and client.far is not None:
                return client
        return None

    def _find_near(self, session: Session, far: Client) -> Client:
        """The client of this process that has a far one at the other end."""
        return self._clients[(session.target if session.source == far.id else session.source) or 0]

    def _find_half(self, process: str, values: Mapping[str, Any]) -> tuple[Session | None, Client | None]:
        """The session that a process names, and the client that it speaks for in it; None if it has none there."""
        session = self.sessions.get(values["sessionId"])
        far = self._find_far(session) if session else None
        return session, far if far and far.far and far.far.process == process else None

    def _find_pending(self, process: str, session_id: str) -> Pending | None:
        pending = self._pending.get(session_id)
        return pending if pending and pending.process == process else None

    def _accept(self, far: Client, session: Session, offer: Mapping[str, Any]) -> Send:
        """Tells the other process that the half here has begun, before anything else of it."""
        assert far.far is not None
        half = {"type": "accept", "tag": far.far.tag_here, "isBinary": self._find_near(session, far).is_binary}
        return self._tell_far(far, session, {**offer, **half})

    def _tell_far(self, far: Client, session: Session, message: dict[str, Any], *, is_optional: bool = False) -> Send:
        assert far.far is not None
        return Send(far.id, message | {"sessionId": session.id}, session.id, is_optional, far.far.process)

    def _give_up(self, session_id: str, refusal: Refusal) -> list[Action]:
        """A session does not begin: the client that waits for it is told why."""
        pending = self._pending.pop(session_id, None)
        if pending is None:
            return []
        if pending.address:
            self._count(pending.address, -1)
        if pending.client not in self._clients:
            return []
        if pending.kind == "dial":
            named = self._parse_dial(pending.values)[2]
            refusal = Refusal(refusal.code, refusal.message, named, is_closing=False)
        return self.refuse(pending.client, refusal)

    # What the directory has to follow

    def stop(self) -> list[Action]:
        """Nothing new begins, and nobody is sent here any more."""
        for listen in self._since:
            self._note(build_listen_entry(*listen), "")
        self._since.clear()
        for session in self.sessions:
            self._note(build_session_entry(session.id), "")
        return super().stop()

    def _open(self, client: Client, session_id: str, state: SessionState, deadline: float) -> Session:
        session = super()._open(client, session_id, state, deadline)
        if state is SessionState.WAITING:
            self._note(build_session_entry(session.id), "1")
        return session

    def _join(self, session: Session, now: float) -> tuple[End, End]:
        if session.state is SessionState.WAITING:
            self._note(build_session_entry(session.id), "")
        return super()._join(session, now)

    def _forget(self, session: Session) -> list[Action]:
        if session.state is SessionState.WAITING:
            self._note(build_session_entry(session.id), "")
        return super()._forget(session)

    def _leave(self, session: Session, client: Client) -> None:
        super()._leave(session, client)
        if client.far is not None:
            del self._clients[client.id]
            fars = self._fars[client.far.process]
            del fars[client.id]
            if not fars:
                del self._fars[client.far.process]

    def _count(self, address: str, change: int) -> None:
        if address:
            super()._count(address, change)
            self._counted += change
            self._note_use(address)

    def _start_listening(self, client: Client, listen: tuple[str, bytes], now: float) -> list[Action]:
        actions = super()._start_listening(client, listen, now)
        self._since[listen] = since = int((now + self.unix_offset_s) * 1000)
        if not self.process:
            return actions
        self._asked += 1
        return [*actions[:-1], Ask("listening", client.id, {}, "", build_listen_entry(*listen), since)]

    def _settle_listen(self, ask: Ask, answer: Answer | None) -> list[Action]:
        """`listening` is said when others can find the listener, or nobody can be asked."""
        kind, _, key_text = ask.name.partition(":")
        listen = kind, parse_base64url(key_text)
        if listen not in self._since:
            self._note(ask.name, "")
            return []
        if answer is not None and answer.verdict is Verdict.SUPERSEDED:
            return self.take_over(ask.name, ask.since)
        is_current = self._listeners[kind].get(listen[1]) == ask.client
        return [Send(ask.client, {"type": "listening", kind: key_text})] if is_current else []

    def _drop_listen(self, client: Client, listen: tuple[str, bytes]) -> None:
        super()._drop_listen(client, listen)
        if listen[1] not in self._listeners[listen[0]] and self._since.pop(listen, None) is not None:
            self._note(build_listen_entry(*listen), "")


# ---- Directory ------------------------------------------------------------------------
# What stands in Redis, who asks what there, and what processes publish to each other. Pure: arguments and bytes.
#
#     dvai-relay:1:processes      sorted set: every process, scored by the Unix milliseconds when its lease ends
#     dvai-relay:1:process:ID     hash: what a process has; runs out with its lease
#         sessions                    how many sessions it counts
#         address:HASH                how many of them are of this address
#         session:ID                  a session of it waits for its target
#         room:ID, provider:ID        a client of it listens there, since these Unix milliseconds
#     dvai-relay:1:rate:KIND:HASH hash: an address's allowance, of all processes; runs out when it is full again
#     dvai-relay:1:channel:ID     channel: what is told to a process
#
# A process is there while its lease lasts and it is subscribed to its channel: then who was killed is gone at once,
# and who is frozen or cut off is gone when the lease ends. Since each process's entries are a hash of its own, a limit
# is the sum over those that are there, and nothing has to be tidied up after one that is not.

DIRECTORY_PREFIX = "dvai-relay:1:"
_LUA_NAMES = (
    f"local PREFIX, LEASE = '{DIRECTORY_PREFIX}', {int(LEASE_S * 1000)}"
    + """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local me, PROCESSES = ARGV[1], PREFIX .. 'processes'
local function entries(process) return PREFIX .. 'process:' .. process end
local function channel(process) return PREFIX .. 'channel:' .. process end
local function get(process, name) return tonumber(redis.call('HGET', entries(process), name) or 0) end
"""
)
_LUA_HEAD = (
    _LUA_NAMES
    + """
local function find_live()
  local live = {}
  for _, process in ipairs(redis.call('ZRANGEBYSCORE', PROCESSES, now, '+inf')) do
    if redis.call('PUBSUB', 'NUMSUB', channel(process))[2] > 0 then live[#live + 1] = process end
  end
  return live
end
local function find(live, name)
  local found, since = '', 0
  for _, process in ipairs(live) do
    local value = process ~= me and get(process, name) or 0
    if value > since then found, since = process, value end
  end
  return found
end
local function take(name, burst)
  local key = PREFIX .. 'rate:' .. name
  local had = redis.call('HMGET', key, 'left', 'at')
  local grown = (tonumber(had[1]) or burst) + (now - (tonumber(had[2]) or now)) * burst / 60000
  local left = math.min(burst, grown)
  if left < 1 then return false end
  redis.call('HSET', key, 'left', tostring(left - 1), 'at', now)
  redis.call('PEXPIRE', key, 60000)
  return true
end
if (tonumber(redis.call('ZSCORE', PROCESSES, me)) or 0) < now then
  return redis.error_reply('LAPSED the lease of this process has run out')
end
"""
)

SCRIPTS: Mapping[str, str] = {
    # me → 1: the process is there
    "register": _LUA_NAMES
    + """
redis.call('ZADD', PROCESSES, now + LEASE, me)
redis.call('HSET', entries(me), 'sessions', 0)
redis.call('PEXPIRE', entries(me), LEASE)
return 1
""",
    # me → process, its sessions, … of all that are there; publishes to itself, which proves the way back
    "heartbeat": _LUA_HEAD
    + """
redis.call('ZADD', PROCESSES, now + LEASE, me)
redis.call('ZREMRANGEBYSCORE', PROCESSES, '-inf', now)
redis.call('PEXPIRE', PROCESSES, LEASE)
redis.call('PEXPIRE', entries(me), LEASE)
redis.call('PUBLISH', channel(me), 'H')
local found = {}
for _, process in ipairs(find_live()) do
  found[#found + 1] = process
  found[#found + 1] = get(process, 'sessions')
end
return found
""",
    # me, name, value, … → 1: the entries are so
    "note": _LUA_HEAD
    + """
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then redis.call('HDEL', entries(me), ARGV[i])
  else redis.call('HSET', entries(me), ARGV[i], ARGV[i + 1]) end
end
redis.call('PEXPIRE', entries(me), LEASE)
return 1
""",
    # me, name or '', address entry, sessions in all, per address, per address and minute, entry to make or ''
    #   → verdict, process
    "open": _LUA_HEAD
    + """
local live, found, total, used = find_live(), '', 0, 0
if ARGV[2] ~= '' then
  found = find(live, ARGV[2])
  if found == '' then return {'not_found', ''} end
end
for _, process in ipairs(live) do
  total = total + get(process, 'sessions')
  used = used + get(process, ARGV[3])
end
local per_address, per_minute = tonumber(ARGV[5]), tonumber(ARGV[6])
if total >= tonumber(ARGV[4]) then return {'capacity', ''} end
if per_address > 0 and used >= per_address then return {'address', ''} end
if per_minute > 0 and not take('open:' .. ARGV[3], per_minute) then return {'minute', ''} end
redis.call('HINCRBY', entries(me), 'sessions', 1)
redis.call('HINCRBY', entries(me), ARGV[3], 1)
if ARGV[7] ~= '' then redis.call('HSET', entries(me), ARGV[7], 1) end
redis.call('PEXPIRE', entries(me), LEASE)
return {'ok', found}
""",
    # me, name → verdict, process
    "find": _LUA_HEAD
    + """
local found = find(find_live(), ARGV[2])
return {found == '' and 'not_found' or 'ok', found}
""",
    # me, address entry, challenges per minute → verdict, ''
    "prove": _LUA_HEAD
    + """
return {take('prove:' .. ARGV[2], tonumber(ARGV[3])) and 'ok' or 'minute', ''}
""",
    # me, name, since → verdict, ''; who has listened there for longer is told to stop
    "listen": _LUA_HEAD
    + """
local name, since, live = ARGV[2], tonumber(ARGV[3]), find_live()
for _, process in ipairs(live) do
  if process ~= me and get(process, name) > since then return {'superseded', ''} end
end
for _, process in ipairs(live) do
  if process ~= me and get(process, name) > 0 then
    redis.call('HDEL', entries(process), name)
    redis.call('PUBLISH', channel(process), 'U' .. ARGV[3] .. ' ' .. name)
  end
end
redis.call('HSET', entries(me), name, ARGV[3])
redis.call('PEXPIRE', entries(me), LEASE)
return {'ok', ''}
""",
    # me → 1: the process is gone, in an orderly way
    "leave": _LUA_HEAD
    + """
redis.call('ZREM', PROCESSES, me)
redis.call('DEL', entries(me))
return 1
""",
}


def build_script_arguments(ask: Ask, settings: Settings) -> tuple[str, list[str]]:
    """The script that answers, and what it is told after the name of this process."""
    if ask.kind == "listening":
        return "listen", [ask.name, str(ask.since)]
    if ask.kind == "listen":
        return "prove", [ask.name, str(CHALLENGES_PER_ADDRESS_PER_MINUTE)]
    if ask.kind == "pair-target":
        return "find", [ask.name]
    per_minute = settings.sessions_per_address_per_minute
    limits = (settings.max_sessions, settings.sessions_per_address, per_minute)
    made = build_session_entry(ask.session_id) if ask.session_id else ""
    return "open", [ask.name, build_address_entry(ask.address), *map(str, limits), made]


def parse_answer(reply: Any) -> Answer:
    """What a script has answered to an Ask; ValueError if it is none of its answers."""
    if not isinstance(reply, list) or len(reply) != 2:
        raise ValueError("not an answer")
    return Answer(Verdict(reply[0].decode()), reply[1].decode())


def parse_heartbeat(reply: Any) -> dict[str, int]:
    """Every process that is there, and how many sessions it counts."""
    return {process.decode(): int(count) for process, count in zip(reply[::2], reply[1::2], strict=True)}


def build_channel(process: str) -> str:
    """Where a process hears what others tell it."""
    return f"{DIRECTORY_PREFIX}channel:{process}"


class TrunkError(Exception):
    """What came from another process is not what it sent: something is missing, or is no frame."""


# A batch: what one process has for another since the last one.
#
#     'T'  id of its sender, 22 bytes  u64 number of the batch, from 0  u64 bytes of frames received so far
#     frames as a WebSocket server sends them: binary ones are of sessions, a tag of 4 bytes and what the session's
#     client gets after its own head; text is JSON, see PROCESS_FIELDS
_BATCH_HEAD = struct.Struct("!c22sQQ")


def encode_batch_head(sender: str, number: int, received_bytes: int) -> bytes:
    """How a batch begins."""
    return _BATCH_HEAD.pack(b"T", sender.encode(), number, received_bytes)


def parse_batch_head(data: bytes) -> tuple[str, int, int]:
    """Sender, number, and bytes that it has received, of a batch whose frames begin at BATCH_HEAD_BYTES."""
    try:
        kind, sender, number, received_bytes = _BATCH_HEAD.unpack_from(data)
        if kind == b"T":
            return sender.decode("ascii"), number, received_bytes
    except (struct.error, UnicodeDecodeError):
        pass
    raise TrunkError("a message that is no batch")


BATCH_HEAD_BYTES = _BATCH_HEAD.size


def parse_superseded(data: bytes) -> tuple[str, int]:
    """Name and time of who listens in a process's place; ValueError if that is not said."""
    since, _, name = data[1:].decode("ascii").partition(" ")
    kind, _, key = name.partition(":")
    if kind not in ("room", "provider") or len(parse_base64url(key)) != 16:
        raise ValueError("not a listener")
    return name, int(since)


# ---- Metrics --------------------------------------------------------------------------
# What /metrics says, in Prometheus' text format 0.0.4. Pure.


@dataclass(slots=True)
class Counters:
    """What has happened since the start."""

    connections: int = 0
    refused: int = 0
    frames: int = 0
    bytes: int = 0
    errors: dict[str, int] = field(default_factory=dict)


def build_metrics(
    state: RelayState,
    counters: Counters,
    *,
    uptime_s: int,
    queued_bytes: int,
    processes: Mapping[str, int] | None = None,
) -> str:
    """The body of /metrics. `processes`: the sessions that each process of the relay counts, empty while Redis is away;
    None if there is to be this one only."""
    rows: list[tuple[str, str, str, Mapping[str, float] | float]] = [
        ("active_sessions", "gauge", "Sessions, joined or waiting", len(state.sessions)),
        ("uptime_seconds", "counter", "Seconds since the start", uptime_s),
        ("clients", "gauge", "Connected WebSocket clients", state.clients_count),
        ("listeners", "gauge", "Rooms and provider addresses that are listened on", state.listeners_count),
        ("queued_bytes", "gauge", "Bytes that wait for receivers", queued_bytes),
        ("sessions_total", "counter", "Sessions opened", state.sessions_opened),
        ("connections_total", "counter", "TCP connections accepted", counters.connections),
        ("refused_connections_total", "counter", "Connections refused: limits, tokens, malformed", counters.refused),
        ("frames_total", "counter", "Messages passed on within sessions", counters.frames),
        ("bytes_total", "counter", "Bytes passed on within sessions", counters.bytes),
        ("errors_total", "counter", "Errors told to clients", counters.errors),
    ]
    if processes is not None:
        rows += [
            ("redis_up", "gauge", "Whether this process is among the others through Redis", int(bool(processes))),
            ("relay_processes", "gauge", "Relay processes that are one, by this one's account", len(processes) or 1),
            ("all_sessions", "gauge", "Sessions of all these processes", sum(processes.values())),
        ]
    lines = []
    for name, kind, help_text, value in rows:
        lines += [f"# HELP rendezvous_{name} {help_text}", f"# TYPE rendezvous_{name} {kind}"]
        if isinstance(value, Mapping):
            lines += [f'rendezvous_{name}{{code="{code}"}} {count}' for code, count in sorted(value.items())]
        else:
            lines.append(f"rendezvous_{name} {value}")
    return "\n".join(lines) + "\n"


# ---- Links ----------------------------------------------------------------------------
# The ways that frames take: whose frame goes where, how much may wait, and what it looks like there. No I/O.

_BASE64_AND_BASE64URL = bytes(b for b in range(128) if chr(b).isalnum()) + b"+/=-_"
_TEXT_END = b'"}'  # of a relay message, after its payload
_TAG_BYTES = 4


def build_text_key(session_id: str) -> bytes:
    """How a relay message of this session begins, to the byte, when JSON.stringify has written it."""
    return b'{"type":"relay","sessionId":"%s","payload":"' % session_id.encode()


TEXT_KEY_BYTES = len(build_text_key(encode_base64url(bytes(16))))


def build_text_head(session_id: str, role: SessionRole) -> bytes:
    """How the message begins that the other end gets; `session_id` empty: it has one session only."""
    named = f'"sessionId":"{session_id}",' if session_id else ""
    return f'{{"type":"relay",{named}"from":"{role.value}","payload":"'.encode()


_SHARED_HEADS = {role: build_text_head("", role) for role in SessionRole}


def build_route_key(end: End, session_id: str) -> bytes:
    """How frames that this end sends begin."""
    if end.far is not None:
        return end.far.tag_here.to_bytes(_TAG_BYTES, "big")
    return build_text_key(session_id) if end.tag is None else end.tag.to_bytes(_TAG_BYTES, "big")


def build_route_head(end: End, session_id: str, sender: SessionRole) -> bytes:
    """How frames that this end gets begin."""
    if end.far is not None:
        return end.far.tag_there.to_bytes(_TAG_BYTES, "big")
    if end.tag is not None:
        return end.tag.to_bytes(_TAG_BYTES, "big")
    return build_text_head(session_id, sender) if end.has_session_id else _SHARED_HEADS[sender]


class Link:
    """Both directions of a joined session.

    `allowance_bytes`: what may still pass; it is taken when a frame arrives, and given back with time when somebody
    needs it. Invariant: `queued_bytes` is what waits in both routes, all of it taken already.
    """

    __slots__ = ("allowance_bytes", "queued_bytes", "refilled_at", "routes", "session_id", "used_at")

    def __init__(self, session_id: str, bytes_per_second: int, now: float) -> None:
        self.session_id = session_id
        self.allowance_bytes = bytes_per_second * BURST_S if bytes_per_second else float("inf")
        self.refilled_at = self.used_at = now
        self.queued_bytes = 0
        self.routes: tuple[Route, ...] = ()

    def refill(self, bytes_per_second: int, now: float) -> None:
        """Gives what has become free since the last time."""
        grown = self.allowance_bytes + bytes_per_second * (now - self.refilled_at)
        self.allowance_bytes = min(bytes_per_second * BURST_S, grown)
        self.refilled_at = now

    @property
    def may_release(self) -> bool:
        """Whether the next frame that waits has its share."""
        return self.allowance_bytes + self.queued_bytes > 0


class Route:
    """One direction: from whom, recognised by which first bytes, to whom, and with which first bytes there.

    `sender_id`: the client whose frames these are. `is_converting`: they are put into what the receiving client
    speaks (`is_to_binary`), which the process of the sending client does.
    """

    __slots__ = (
        "head",
        "is_converting",
        "is_to_binary",
        "key",
        "link",
        "queue",
        "queued_bytes",
        "receiver",
        "sender",
        "sender_id",
    )

    def __init__(self, link: Link, sender: Port, receiver: Port, ends: tuple[End, End]) -> None:
        """`ends`: of who sends and who receives, which may be behind other processes."""
        sending, receiving = ends
        self.link = link
        self.sender = sender
        self.sender_id = sending.client
        self.key = build_route_key(sending, link.session_id)
        self.receiver = receiver
        self.head = build_route_head(receiving, link.session_id, sending.role)
        self.is_to_binary = receiving.far.is_binary if receiving.far else receiver.is_binary
        self.is_converting = sending.far is None and sender.is_binary != self.is_to_binary
        self.queue: deque[bytes] | None = None
        self.queued_bytes = 0

    def push(self, frame: bytes) -> None:
        """Has a frame wait."""
        if self.queue is None:
            self.queue = deque()
        self.queue.append(frame)
        self.queued_bytes += len(frame)
        self.link.queued_bytes += len(frame)

    def pop(self) -> bytes:
        """The frame that has waited longest."""
        assert self.queue
        frame = self.queue.popleft()
        self.queued_bytes -= len(frame)
        self.link.queued_bytes -= len(frame)
        if not self.queue:
            self.queue = None
        return frame

    def convert(self, payload: bytes) -> bytes:
        """What follows the receiver's head, if the ends differ: base64url for the outer frame, or the other way.

        `payload`: what followed the sender's key. ValueError if it is not base64url.
        """
        if self.is_to_binary:
            return parse_base64url(payload[: -len(_TEXT_END)].decode())
        return encode_base64url(payload).encode() + _TEXT_END


# ---- Ports ----------------------------------------------------------------------------
# Where frames come in and go out: what a client's connection and the way to another process have in common.

_pack_long_head = struct.Struct("!BBH").pack


class Port:
    """Whoever sends and receives frames of sessions.

    `_out` is what this pass of the loop sends. While the receiver takes no more (`is_paused`), sessions wait in
    `_waiting`, each route with a queue of its own; `is_held`: either of these. `routes`: where frames from here go.
    """

    __slots__ = ("_out", "_relay", "_waiting", "is_binary", "is_held", "is_paused", "routes")

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._out: list[bytes] = []
        self._waiting: dict[Route, None] | None = None
        self.routes: dict[bytes, Route] = {}
        self.is_binary = self.is_paused = self.is_held = False

    def _forward(self, route: Route, payload: bytes, now: float) -> bool:
        """Passes a frame on, without its sender's key; False if its receiver could not be told it."""
        head = route.head
        if route.is_converting:
            try:
                payload = route.convert(payload)
            except ValueError:
                return False
        receiver, link = route.receiver, route.link
        size = len(head) + len(payload)
        first = 0x82 if receiver.is_binary else 0x81
        if size < 126:
            frame = bytes((first, size)) + head + payload
        elif size < 0x10000:
            frame = _pack_long_head(first, 126, size) + head + payload
        else:
            frame = encode_websocket_frame(first & 15, head + payload)
        link.used_at = now
        link.allowance_bytes -= size
        counters = self._relay.counters
        counters.frames += 1
        counters.bytes += size
        if receiver.is_held or link.allowance_bytes < 0:
            self._relay.hold(route, frame, now)
        else:
            receiver.send(frame)
        return True

    def send(self, data: bytes) -> None:
        """Sends with this pass of the loop."""
        if not self._out:
            self._relay.schedule_flush(self)
        self._out.append(data)

    def flush(self) -> None:
        """Passes on what this pass has gathered."""
        raise NotImplementedError

    def send_control(self, frame: bytes, *, is_optional: bool = False) -> None:
        """Sends what is not a frame of a session."""
        raise NotImplementedError

    def hold(self, route: Route, frame: bytes) -> None:
        """Has a frame wait until the receiver, or its session, may go on."""
        if self._waiting is None:
            self._waiting = {}
        self._waiting[route] = None
        self.is_held = True
        route.push(frame)
        self._relay.queued_bytes += len(frame)

    def discard(self, route: Route) -> None:
        """Forgets what waits in a route."""
        if self._waiting and route in self._waiting:
            self._relay.queued_bytes -= route.queued_bytes
            del self._waiting[route]
            self.is_held = self.is_paused or bool(self._waiting)

    def _drop_waiting(self) -> None:
        for route in self._waiting or ():
            self._relay.queued_bytes -= route.queued_bytes
        self._waiting = None

    def drain(self) -> None:
        """Sends what waits, a frame of each session in turn, as far as the receiver and the sessions' allowances go."""
        room_bytes, has_progress = WRITE_BUFFER_LIMIT_BYTES, True
        while self._waiting and not self.is_paused and room_bytes > 0 and has_progress:
            has_progress = False
            for route in list(self._waiting):
                if self.is_paused:
                    break
                if not self._relay.may_release(route.link):
                    self._relay.schedule_refill(self)
                    continue
                frame = route.pop()
                self._relay.queued_bytes -= len(frame)
                self.send(frame)
                room_bytes -= len(frame)
                has_progress = True
                del self._waiting[route]
                if route.queue is not None:
                    self._waiting[route] = None  # behind those that have not had their turn
        if not self._waiting:
            self._waiting = None
        elif has_progress and not self.is_paused:
            self._relay.call_soon(self.drain)
        self.is_held = self.is_paused or self._waiting is not None


# ---- Connection -----------------------------------------------------------------------
# One client's socket: HTTP, then WebSocket. Frames within a session pass here, everything else goes to the relay.


class Phase(enum.Enum):
    """HEAD → OPEN → CLOSING → CLOSED; a request that is no WebSocket goes from HEAD to CLOSING."""

    HEAD = enum.auto()
    OPEN = enum.auto()
    CLOSING = enum.auto()  # nothing is read or sent any more, but what is on its way still arrives
    CLOSED = enum.auto()


class Connection(Port, asyncio.BufferedProtocol):
    """A client's socket.

    Reading: `_held` is the start of a frame (or of the HTTP head) that is not all there. Whole unfragmented data
    frames are read here; for anything else there is a `_parser`, for as long as it takes. `_skip_bytes` of a message
    that is too large are still to come.

    Writing: what the socket does not take waits, see `Port`.
    """

    __slots__ = (
        "_control_bytes",
        "_has_spoken",
        "_held",
        "_key_bytes",
        "_parser",
        "_skip_bytes",
        "_timer",
        "_transport",
        "client_id",
        "missed_pings",
        "phase",
        "pinged_at",
    )

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._timer: asyncio.TimerHandle | None = None
        self._held = b""
        self._parser: WebSocketParser | None = None
        self._skip_bytes = 0
        self._key_bytes = TEXT_KEY_BYTES
        self._control_bytes = 0
        self._has_spoken = False
        self.client_id = 0
        self.missed_pings = 0
        self.pinged_at = 0.0
        self.phase = Phase.HEAD

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is accepted."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_BUFFER_LIMIT_BYTES)
        if self._relay.admit(self):
            self._set_timer(HEAD_DEADLINE_S, self._transport.abort)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone, whoever closed it."""
        self.phase = Phase.CLOSED
        self._set_timer(0, None)
        self._relay.leave(self)
        self._relay.release(self)
        self._drop_waiting()
        self._out.clear()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: one buffer for all connections, since they are taken at once."""
        return self._relay.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        self.missed_pings = 0
        data = bytes(self._relay.read_buffer[:nbytes])
        if self.phase is Phase.OPEN:
            self._receive(data)
        elif self.phase is Phase.HEAD:
            self._receive_head(data)

    def eof_received(self) -> bool:
        """The client sends no more: then there is nothing to say to it either."""
        return False

    def pause_writing(self) -> None:
        """The socket takes no more."""
        self.is_paused = self.is_held = True

    def resume_writing(self) -> None:
        """The socket takes more again."""
        self.is_paused = False
        self._control_bytes = 0
        self.drain()

    # Reading: HTTP

    def _receive_head(self, data: bytes) -> None:
        data = self._held + data
        try:
            end = find_head_end(data)
            if not end:
                self._held = data
                return
            self._held = b""
            request = parse_request_head(data[:end])
            if is_upgrade_request(request.get):
                self._upgrade(request, data[end:])
            else:
                self._finish(self._relay.answer(request))
        except HttpError as error:
            self._relay.counters.refused += 1
            self._finish(encode_http_error(error))

    def _upgrade(self, request: HttpRequest, rest: bytes) -> None:
        """Makes the connection a WebSocket; HttpError if it may not be one."""
        address = self._relay.verify_request(request, self._transport.get_extra_info("peername"))
        try:
            key, offered = parse_upgrade_request(request.method, request.http_minor, request.get)
        except UpgradeError as error:
            fields = [("Upgrade", "websocket"), ("Sec-WebSocket-Version", WEBSOCKET_VERSION)]
            raise HttpError(error.status, error.message, fields) from None
        self.is_binary = BINARY_SUBPROTOCOL in offered
        chosen = BINARY_SUBPROTOCOL if self.is_binary else ""
        self.send(encode_upgrade_response(build_upgrade_response_fields(key, chosen)))
        self.phase = Phase.OPEN
        self._set_timer(FIRST_MESSAGE_DEADLINE_S, self._close_unused)
        if self.is_binary:
            self._key_bytes = _TAG_BYTES
        self._relay.enter(self, address)
        if not self._relay.is_origin_allowed(request.get("origin")):
            self.close(CLOSE_POLICY_VIOLATION, "origin_not_allowed")
        elif rest:
            self._receive(rest)

    # Reading: WebSocket

    def _receive(self, data: bytes) -> None:
        """Passes on what belongs to a session, straight from its frame; the first frame that is unusual ends that."""
        if self._parser is not None or self._skip_bytes:
            self._receive_slowly(data)
            return
        if self._held:
            data = self._held + data
            self._held = b""
        first = 0x82 if self.is_binary else 0x81
        routes, key_bytes, now = self.routes, self._key_bytes, self._relay.now()
        position, end = 0, len(data)
        while end - position >= 2:
            size = data[position + 1] - 128
            if data[position] != first or size < 0 or size == 127:
                self._receive_slowly(data[position:])
                return
            start = position + 6
            if size == 126:
                start = position + 8
                if start > end:
                    break
                size = data[position + 2] << 8 | data[position + 3]
                if size < 126:
                    self._receive_slowly(data[position:])
                    return
            stop = start + size
            if stop > end:
                break
            payload = apply_mask(data[start:stop], data[start - 4 : start])
            position = stop
            route = routes.get(payload[:key_bytes])
            rest = payload[key_bytes:]
            is_usual = self.is_binary or (rest.translate(None, _BASE64_AND_BASE64URL) == _TEXT_END and rest[-1] == 125)
            if route is None or not is_usual or not self._forward(route, rest, now):
                self._take_message(payload)
            if self.phase is not Phase.OPEN:
                return
        self._held = data[position:]

    def _receive_slowly(self, data: bytes) -> None:
        """Frames of every other kind, and messages that are too large."""
        if self._skip_bytes:
            skipped = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped
            data = data[skipped:]
            if not data:
                return
            self._receive(data)
            return
        if self._parser is None:
            if len(data) >= 2 and data[1] == 0xFF and data[0] in (0x81, 0x82) and self._skip_large(data):
                return
            self._parser = WebSocketParser(expects_mask=True, limit_bytes=MESSAGE_LIMIT_BYTES)
        parser = self._parser
        for opcode, content in parser.feed(data):
            self._take_event(opcode, content, parser)
            if self.phase is not Phase.OPEN:
                return
        if parser.error is not None:
            self.close(parser.error.code, parser.error.reason)
        elif not parser.is_inside_message:
            self._parser = None

    def _skip_large(self, data: bytes) -> bool:
        """Has a message that is too large, but not absurdly so, pass by; False if this is none."""
        if len(data) < 14:
            self._held = data
            return True
        size = int.from_bytes(data[2:10], "big")
        if not MESSAGE_LIMIT_BYTES < size <= SKIPPED_MESSAGE_LIMIT_BYTES:
            return False
        self._note_spoken()
        refusal = Refusal(ErrorCode.MESSAGE_TOO_LARGE, f"a message may have {MESSAGE_LIMIT_BYTES} bytes")
        self._relay.refuse(self, refusal)
        self._skip_bytes = size
        self._receive_slowly(data[14:])
        return True

    def _take_event(self, opcode: int, content: Any, parser: WebSocketParser) -> None:
        if opcode == OPCODE_TEXT:
            self._take_text(content)
        elif opcode == OPCODE_BINARY:
            self._take_message(content)
        elif opcode == OPCODE_PING:
            self._relay.touch(self)
            self.send_control(encode_websocket_frame(OPCODE_PONG, content), is_optional=True)
        elif opcode == OPCODE_CLOSE:
            code = parser.close_code or CLOSE_WITHOUT_CODE
            self._finish(encode_websocket_close(code))

    def _take_message(self, payload: bytes) -> None:
        """A message of the kind that this client's frames are; existing relays take JSON in binary messages, too."""
        if self.is_binary:
            self._take_binary(payload)
            return
        try:
            self._take_text(payload.decode())
        except UnicodeDecodeError:
            self.close(CLOSE_INVALID_DATA, "text that is not UTF-8")

    def _take_text(self, text: str) -> None:
        """A JSON message; a frame of a session, spelled in an unusual way, finds its route by the same look-up."""
        self._note_spoken()
        try:
            message = parse_control(text)
        except Refusal as refusal:
            self._relay.refuse(self, refusal)
            return
        session_id, content = message.get("sessionId"), message.get("payload")
        if message["type"] == "relay" and isinstance(session_id, str) and isinstance(content, str):
            route = self.routes.get(build_text_key(session_id))
            if route is not None:
                if not self._forward(route, encode_json(content)[1:] + b"}", self._relay.now()):
                    reason = "the other end wants base64url as 'payload'"
                    self._relay.refuse(self, Refusal(ErrorCode.MALFORMED_MESSAGE, reason))
                return
        self._relay.handle(self, message)

    def _take_binary(self, payload: bytes) -> None:
        """A binary frame that came in pieces, or has no route."""
        self._note_spoken()
        tag = payload[:_TAG_BYTES]
        route = self.routes.get(tag)
        if route is None or not self._forward(route, payload[_TAG_BYTES:], self._relay.now()):
            self._relay.explain_tag(self, int.from_bytes(tag, "big") if len(tag) == _TAG_BYTES else None)

    def _note_spoken(self) -> None:
        if not self._has_spoken:
            self._has_spoken = True
            self._set_timer(0, None)

    # Writing

    def flush(self) -> None:
        """Gives the socket what this pass has gathered."""
        if self._out and self.phase in (Phase.OPEN, Phase.HEAD):
            self._transport.write(self._out[0] if len(self._out) == 1 else b"".join(self._out))
        self._out.clear()

    def send_control(self, frame: bytes, *, is_optional: bool = False) -> None:
        """Sends what is not part of a session; who asks and does not read is cut off, or not answered."""
        if self.phase is not Phase.OPEN or (is_optional and self.is_paused):
            return
        if self.is_paused:
            self._control_bytes += len(frame)
            if self._control_bytes > CONTROL_QUEUE_LIMIT_BYTES:
                self._transport.abort()
                return
        self.send(frame)

    # Closing

    def close(self, code: int, reason: str) -> None:
        """Ends the WebSocket, saying why; its sessions end at once."""
        if self.phase is Phase.OPEN:
            self._finish(encode_websocket_close(code, reason))

    def abort(self) -> None:
        """Ends the connection at once."""
        if self.phase is not Phase.CLOSED:  # a transport that ended by writing its rest cannot be aborted
            self._transport.abort()

    def _close_unused(self) -> None:
        self.close(CLOSE_POLICY_VIOLATION, "no message came")

    def _finish(self, last_words: bytes) -> None:
        """Sends the last bytes, and reads on without looking until the client has closed, so that they arrive."""
        self.send(last_words)
        self.flush()
        self.phase = Phase.CLOSING
        self._held, self._parser = b"", None
        self._drop_waiting()
        self._relay.leave(self)
        if not self._transport.can_write_eof():
            self._set_timer(CLOSE_LINGER_S, self._transport.close)
            return
        self._set_timer(CLOSE_DEADLINE_S, self._transport.abort)
        with contextlib.suppress(OSError):  # reset by the client: asyncio will say so next
            self._transport.write_eof()

    def _set_timer(self, delay_s: float, callback: Callable[[], None] | None) -> None:
        """The one deadline that runs, or none."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._relay.call_later(delay_s, callback) if callback else None


# ---- Trunk ----------------------------------------------------------------------------
# The way between two processes: frames of all their common sessions, in batches, in order, and none missing.


class Trunk(Port):
    """The way to another process and back.

    It is a port like a client's of the binary subprotocol, but batches go through Redis instead of a socket: it takes
    no more (`is_paused`) while TRUNK_WINDOW_BYTES are on their way, which are `_sent_bytes` less what the other process
    says to have (`_arrived_bytes`). Nothing is sent twice: a batch that is missing is an error, which ends everything
    that this process has with others.
    """

    __slots__ = (
        "_arrived_bytes",
        "_batch",
        "_number_in",
        "_number_out",
        "_received_bytes",
        "_sent_bytes",
        "_told_bytes",
        "process",
    )

    def __init__(self, relay: Relay, process: str) -> None:
        super().__init__(relay)
        self.is_binary = True
        self.process = process
        self._batch: list[bytes] = []
        self._number_out = self._number_in = 0
        self._sent_bytes = self._arrived_bytes = 0
        self._received_bytes = self._told_bytes = 0

    # Sending

    def send(self, data: bytes) -> None:
        """Sends with this pass of the loop."""
        super().send(data)
        self._sent_bytes += len(data)
        if self._sent_bytes - self._arrived_bytes >= TRUNK_WINDOW_BYTES:
            self.is_paused = self.is_held = True

    def send_control(self, frame: bytes, *, is_optional: bool = False) -> None:
        """Sends what processes say to each other: there is little of it, so that it does not wait for the window."""
        if not (is_optional and self.is_paused):
            self.send(frame)

    def flush(self) -> None:
        """Has the next batch include what this pass has gathered."""
        self._batch += self._out
        self._out.clear()
        self._relay.wake_redis()

    def take_batch(self, sender: str) -> bytes | None:
        """The next batch to publish, if there is reason for one."""
        if not self._batch and not self._is_receipt_due:
            return None
        batch = b"".join((encode_batch_head(sender, self._number_out, self._received_bytes), *self._batch))
        self._batch.clear()
        self._number_out += 1
        self._told_bytes = self._received_bytes
        return batch

    def close(self) -> None:
        """Forgets what waits: the other process is gone."""
        self._drop_waiting()
        self._out.clear()
        self._batch.clear()

    @property
    def _is_receipt_due(self) -> bool:
        return self._received_bytes - self._told_bytes >= TRUNK_WINDOW_BYTES // 4

    # Receiving

    def receive(self, number: int, arrived_bytes: int, data: bytes) -> None:
        """Passes on the frames of a batch; TrunkError if another one should have come first, or in a broken one."""
        if number != self._number_in or not self._arrived_bytes <= arrived_bytes <= self._sent_bytes:
            raise TrunkError("a batch is missing")
        self._number_in += 1
        self._arrived_bytes = arrived_bytes
        if self.is_paused and self._sent_bytes - arrived_bytes < TRUNK_WINDOW_BYTES:
            self.is_paused = False
            self.drain()
        try:
            self._receive_frames(data)
        except (IndexError, UnicodeDecodeError):
            raise TrunkError("a batch that ends too early") from None
        self._received_bytes += len(data) - BATCH_HEAD_BYTES
        if self._is_receipt_due:
            self._relay.wake_redis()

    def _receive_frames(self, data: bytes) -> None:
        position, end, now, routes = BATCH_HEAD_BYTES, len(data), self._relay.now(), self.routes
        while position < end:
            first, size, start = data[position], data[position + 1], position + 2
            if size == 126:
                size, start = data[position + 2] << 8 | data[position + 3], position + 4
            elif size == 127:
                size, start = int.from_bytes(data[position + 2 : position + 10], "big"), position + 10
            position = start + size
            if position > end:
                raise TrunkError("a batch that ends too early")
            if first == 0x81:
                self._relay.hear(self.process, data[start:position].decode())
                continue
            route = routes.get(data[start : start + _TAG_BYTES])
            if route is not None:  # else its session has ended here, which the other process is being told
                self._forward(route, data[start + _TAG_BYTES : position], now)


# ---- Redis ----------------------------------------------------------------------------
# The edge towards Redis: two connections, what goes over them, and what is to be done without them.


class RedisError(Exception):
    """Redis does not answer, or does not let us. `is_refusal`: it is there, and will say the same next time."""

    def __init__(self, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.is_refusal = is_refusal


def load_redis(url: str) -> Callable[[], Any]:
    """A maker of connections to this Redis, of the package redis; SettingsError without it, or if it finds fault."""
    try:
        module = importlib.import_module("redis.asyncio")
        retry = importlib.import_module("redis.asyncio.retry").Retry
        no_backoff = importlib.import_module("redis.backoff").NoBackoff
    except ImportError:
        message = "REDIS_URL needs the package redis, which is not installed: python3 -m pip install 'redis>=5'"
        raise SettingsError(message) from None
    options = {
        "socket_timeout": REDIS_DEADLINE_S,
        "socket_connect_timeout": REDIS_DEADLINE_S,
        "health_check_interval": 0,
        "retry": retry(no_backoff(), 0),  # what has been lost must not be made up for in silence
        "protocol": 2,
        "decode_responses": False,
    }
    try:
        pool = module.ConnectionPool.from_url(url, **options)
        pool.connection_kwargs |= options  # over those of the URL
        make_connection: Callable[[], Any] = pool.make_connection
        make_connection()
    except Exception:
        raise SettingsError("REDIS_URL: the package redis finds fault with it") from None
    return make_connection


class RedisLink:
    """One stay at Redis: a connection for commands, and one that is subscribed to a channel.

    A fault of either is the end of both: nothing is repeated and no connection is made anew within a stay.
    """

    def __init__(self, make_connection: Callable[[], Any], channel: str) -> None:
        self._commands = make_connection()
        self._messages = make_connection()
        self._channel = channel
        self._scripts: dict[str, bytes] = {}

    async def open(self) -> None:
        """Connects, subscribes, and gives Redis the scripts. RedisError."""
        async with self._translate():
            await self._commands.connect()
            await self._messages.connect()
            await self._messages.send_command("SUBSCRIBE", self._channel)
            await self._messages.read_response()
        replies = await self.run([("SCRIPT", "LOAD", source) for source in SCRIPTS.values()])
        self._scripts = dict(zip(SCRIPTS, replies, strict=True))

    async def close(self) -> None:
        """Ends both connections."""
        for connection in (self._commands, self._messages):
            with contextlib.suppress(Exception):  # of whatever kind: it is given up
                await asyncio.wait_for(connection.disconnect(nowait=True), 1)

    def build_call(self, script: str, *arguments: str) -> tuple[Any, ...]:
        """The command that runs one of SCRIPTS."""
        return "EVALSHA", self._scripts[script], 0, *arguments

    async def run(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies to commands, which are sent at once. RedisError, also if Redis refuses one of them."""
        async with self._translate():
            await self._commands.send_packed_command(self._commands.pack_commands(commands))
            return [await self._commands.read_response() for _ in commands]

    async def receive(self) -> bytes:
        """The next message of the channel. RedisError, also if none comes for as long as heartbeats never take."""
        while True:
            async with self._translate():
                reply = await self._messages.read_response()
            if isinstance(reply, list) and len(reply) == 3 and reply[0] == b"message":
                return bytes(reply[2])

    @contextlib.asynccontextmanager
    async def _translate(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(REDIS_DEADLINE_S):
                yield
        except (TimeoutError, OSError, EOFError) as exc:
            raise RedisError(str(exc) or f"no answer within {REDIS_DEADLINE_S:.0f} s") from exc
        except Exception as exc:
            exceptions = importlib.import_module("redis.exceptions")
            if not isinstance(exc, exceptions.RedisError):
                raise
            is_refusal = isinstance(exc, exceptions.AuthenticationError | exceptions.ResponseError)
            raise RedisError(str(exc), is_refusal=is_refusal) from exc


class Directory:
    """This process among the others of the relay. `start` it; it reaches Redis again by itself until `close`.

    Everything that goes to Redis goes in rounds, one at a time: a heartbeat if one is due, entries that have changed,
    questions, and for each other process what has been gathered for it since the round before. So there is one order,
    and the busier it is, the more a round takes along.

    ALONE ── connected, subscribed, registered ─→ AMONG OTHERS (`link`, `process`)
        ↑                                              │
        └── a fault of either connection, silence, a missing batch, or a lease that has run out

    Each time it has another name, and the state forgets all that it had with other processes: what may have been lost
    in between needs no thought.
    """

    def __init__(self, relay: Relay, state: SharedState, settings: Settings) -> None:
        """SettingsError without the package redis."""
        self._relay = relay
        self._state = state
        self._settings = settings
        self._make_connection = load_redis(settings.redis_url)
        self._link: RedisLink | None = None
        self._trunks: dict[str, Trunk] = {}
        self._asks: deque[Ask] = deque()
        self._asked: deque[Ask] = deque()
        self._wake = asyncio.Event()
        self._is_heartbeat_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._is_leaving = False
        self._task: asyncio.Task[None] | None = None
        self.processes: dict[str, int] = {}

    @property
    def process(self) -> str:
        """The name of this process among the others; empty while it is alone."""
        return self._state.process

    # Running

    async def start(self) -> None:
        """Tries to reach Redis, and goes on trying. SettingsError if it is there and will not have us."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(first), name="redis")
        try:
            await first
        except RedisError as error:
            if error.is_refusal:
                await self.close()
                raise SettingsError(f"REDIS_URL: Redis says: {display_name(str(error))}") from None

    async def close(self) -> None:
        """Tells the others what is to be told, and leaves."""
        self._is_leaving = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=CLOSE_LINGER_S if self.process else 0)
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, first: asyncio.Future[None]) -> None:
        delay_s, has_warned = REDIS_RETRY_LEAST_S, False
        while not self._is_leaving:
            error: Exception | None = None
            try:
                await self._stay(first)
            except (RedisError, TrunkError) as exc:
                error = exc
            except Exception as exc:  # our bug: said in full, but the process goes on
                logger.exception("an error among the relay processes")
                error = exc
            was_there = bool(self.process)
            self._detach()
            if error is None:
                return
            is_told = not first.done() and isinstance(error, RedisError) and error.is_refusal
            if was_there or not (has_warned or is_told):
                logger.warning(
                    "Redis is away (%s): this process goes on alone; its sessions with other processes have ended",
                    display_name(str(error)),
                )
            has_warned = True
            if not first.done():
                first.set_exception(error)
            delay_s = REDIS_RETRY_LEAST_S if was_there else min(2 * delay_s, REDIS_RETRY_MOST_S)
            await asyncio.sleep(delay_s * (0.5 + int.from_bytes(os.urandom(2), "big") / 65536))

    async def _stay(self, first: asyncio.Future[None]) -> None:
        """From a connection to its end: RedisError or TrunkError says which, unless this process leaves."""
        process = encode_base64url(os.urandom(16))
        link = RedisLink(self._make_connection, build_channel(process))
        tasks: list[asyncio.Task[None]] = []
        try:
            await link.open()
            await link.run([link.build_call("register", process)])
            self._attach(link, process)
            if not first.done():
                first.set_result(None)
            rounds, messages = self._run_rounds(link, process), self._receive(link)
            tasks = [asyncio.create_task(each, name="redis") for each in (rounds, messages)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await link.close()

    def _attach(self, link: RedisLink, process: str) -> None:
        logger.info("Redis is there: this relay process is %s", process)
        self._link = link
        self._mark_heartbeat_due()
        self._relay.apply(self._state.attach(process))

    def _detach(self) -> None:
        self._link = None
        if self._timer is not None:
            self._timer.cancel()
        self.processes = {}
        self._relay.apply(self._state.detach(self._relay.now()))
        for trunk in self._trunks.values():
            trunk.close()
        self._trunks.clear()
        asks = [*self._asked, *self._asks]
        self._asked.clear()
        self._asks.clear()
        for ask in asks:
            self._settle(ask, None)

    # Rounds

    def wake(self) -> None:
        """There is something for the next round."""
        self._wake.set()

    def follow(self) -> None:
        """Has the directory follow the state, if that has changed."""
        if self._state.has_changes:
            self._wake.set()

    def ask(self, ask: Ask) -> None:
        """Has a question answered, at once if there is nobody to ask."""
        if self._link is None:
            self._settle(ask, None)
            return
        self._asks.append(ask)
        self._wake.set()

    def _settle(self, ask: Ask, answer: Answer | None) -> None:
        self._relay.apply(self._state.answer(ask, answer, self._relay.now()))

    async def _run_rounds(self, link: RedisLink, process: str) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            commands = self._gather(link, process)
            if commands:
                replies = await link.run([command for command, _ in commands])
                for reply, (_, take) in zip(replies, commands, strict=True):
                    take(reply)
            elif self._is_leaving:
                await link.run([link.build_call("leave", process)])
                return
            if self._asks or self._is_leaving:
                self._wake.set()

    def _gather(self, link: RedisLink, process: str) -> list[tuple[tuple[Any, ...], Callable[[Any], None]]]:
        """The commands of a round, and what takes the reply to each."""
        commands: list[tuple[tuple[Any, ...], Callable[[Any], None]]] = []
        if self._is_heartbeat_due:
            self._is_heartbeat_due = False
            known = set(self._trunks)
            beat = link.build_call("heartbeat", process)
            commands.append((beat, lambda reply: self._take_heartbeat(parse_heartbeat(reply), known)))
        changes = [text for change in self._state.take_changes().items() for text in change]
        for at in range(0, len(changes), 2 * ROUND_LIMIT):
            part = changes[at : at + 2 * ROUND_LIMIT]
            commands.append((link.build_call("note", process, *part), lambda reply: None))
        for _ in range(min(len(self._asks), ROUND_LIMIT)):
            ask = self._asks.popleft()
            self._asked.append(ask)
            script, arguments = build_script_arguments(ask, self._settings)
            commands.append((link.build_call(script, process, *arguments), self._take_answer))
        for name, trunk in self._trunks.items():
            batch = trunk.take_batch(process)
            if batch is not None:
                commands.append((("PUBLISH", build_channel(name), batch), self._build_take_count(name)))
        return commands

    def _build_take_count(self, process: str) -> Callable[[Any], None]:
        def take(subscribers: Any) -> None:
            if not subscribers:
                self.lose(process)

        return take

    def _take_answer(self, reply: Any) -> None:
        self._settle(self._asked.popleft(), parse_answer(reply))

    def _take_heartbeat(self, processes: dict[str, int], known: set[str]) -> None:
        self.processes = processes
        for process in known - processes.keys():
            self.lose(process)
        self._timer = self._relay.call_later(HEARTBEAT_INTERVAL_S, self._mark_heartbeat_due)

    def _mark_heartbeat_due(self) -> None:
        self._is_heartbeat_due = True
        self._wake.set()

    # Other processes

    def get_trunk(self, process: str) -> Trunk:
        """The way to another process."""
        if process not in self._trunks:
            self._trunks[process] = Trunk(self._relay, process)
        return self._trunks[process]

    def lose(self, process: str) -> None:
        """Another process is gone: nobody hears what is told to it, or its lease has run out."""
        trunk = self._trunks.pop(process, None)
        if trunk is not None:
            logger.warning("relay process %s is gone, and what it had with this one", process)
            self._relay.apply(self._state.lose(process, self._relay.now()))
            trunk.close()

    async def _receive(self, link: RedisLink) -> None:
        while True:
            self._take_message(await link.receive())

    def _take_message(self, data: bytes) -> None:
        if data.startswith(b"T"):
            process, number, arrived_bytes = parse_batch_head(data)
            if process in self._trunks or number == 0:
                self.get_trunk(process).receive(number, arrived_bytes, data)
        elif data.startswith(b"U"):
            try:
                self._relay.apply(self._state.take_over(*parse_superseded(data)))
            except ValueError:
                logger.warning("a message in Redis that no relay of this version has written")


# ---- Relay ----------------------------------------------------------------------------
# The server: it does what the state decides, keeps time, listens and stops.


class Relay:
    """A running relay. `start` it, wait for `run_until_stopped`; `stop` may be called from the loop at any time."""

    def __init__(self, settings: Settings) -> None:
        """SettingsError if there is to be a Redis, and no package for it."""
        self.settings = settings
        self.counters = Counters()
        self.read_buffer = memoryview(bytearray(READ_BYTES))
        self.queued_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._started_at = self.now()
        self._state, self._directory = self._build_state(time.time() - self._started_at)
        self._connections: dict[int, Connection] = {}  # those that are open, in the order of their last ping
        self._others: set[Connection] = set()  # those that are no WebSocket yet, or no more
        self._limit = settings.max_sessions * CONNECTIONS_PER_SESSION + CONNECTIONS_LEAST
        self._links: dict[str, Link] = {}
        self._to_flush: list[Port] = []
        self._to_refill: set[Port] = set()
        self._server: asyncio.Server | None = None
        self._tls: ssl.SSLContext | None = None
        self._ticks = 0
        self._is_stopping = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._has_warned_of_proxy = False

    def _build_state(self, unix_offset_s: float) -> tuple[RelayState, Directory | None]:
        if not self.settings.redis_url:
            return RelayState(self.settings, os.urandom, unix_offset_s), None
        state = SharedState(self.settings, os.urandom, unix_offset_s)
        return state, Directory(self, state, self.settings)

    # Running

    async def start(self) -> str:
        """Listens; the URL. OSError if it cannot, ssl.SSLError or OSError for files that are no certificate;
        SettingsError if Redis will not have us."""
        if self.settings.tls_cert_file:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.load_certificate()
        self._limit = min(self._limit, raise_descriptor_limit() - DESCRIPTORS_RESERVE)
        if self._directory is not None:
            await self._directory.start()
        self._server = await self._loop.create_server(
            lambda: Connection(self),
            self.settings.host,
            self.settings.port,
            backlog=1024,
            ssl=self._tls,
            ssl_handshake_timeout=TLS_HANDSHAKE_DEADLINE_S if self._tls else None,
        )
        for listening in self._server.sockets:
            with contextlib.suppress(OSError):
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        self.call_later(TICK_S, self._tick)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def load_certificate(self) -> None:
        """Reads the TLS files; ssl.SSLError or OSError if they are none."""
        if self._tls is not None:
            self._tls.load_cert_chain(self.settings.tls_cert_file, self.settings.tls_key_file)

    def reload_certificate(self) -> None:
        """Reads the TLS files again: new connections get the new certificate, or still the old one."""
        try:
            self.load_certificate()
        except OSError as error:
            logger.error("TLS_CERT_FILE or TLS_KEY_FILE: %s; the former certificate stays", error)

    def stop(self) -> None:
        """Begins to stop: sessions may end by themselves for STOP_GRACE_S. A second time: at once."""
        if self._is_stopping.is_set():
            self._is_empty.set()
        self._is_stopping.set()

    async def run_until_stopped(self) -> None:
        """Returns when `stop` was called and everybody has gone, or was made to."""
        await self._is_stopping.wait()
        logger.info("stopping: %d sessions", len(self._state.sessions))
        assert self._server is not None
        self._server.close()
        for connection in [c for c in self._others if c.phase is Phase.HEAD]:
            connection.abort()
        self.apply(self._state.stop())
        await self._wait_until_empty(STOP_GRACE_S)
        for connection in list(self._connections.values()):
            connection.close(CLOSE_SERVICE_RESTART, "the relay is stopping: connect again")
        await self._wait_until_empty(CLOSE_LINGER_S)
        for connection in list(self._others):
            connection.abort()
        await asyncio.sleep(0)
        if self._directory is not None:
            await self._directory.close()

    async def _wait_until_empty(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            if self._connections or self._others:
                await asyncio.wait_for(self._is_empty.wait(), timeout_s)

    def now(self) -> float:
        """Seconds of a steady clock."""
        return self._loop.time()

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Has something done later."""
        return self._loop.call_later(delay_s, callback)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Has something done in the next pass of the loop."""
        self._loop.call_soon(callback)

    def _tick(self) -> None:
        """Once a second: idle sessions, silent clients."""
        self.call_later(TICK_S, self._tick)
        now = self.now()
        self._state.unix_offset_s = time.time() - now
        self.apply(self._state.expire(now, self._get_used_at))
        self._ticks += 1
        if self._ticks % 60 == 0:
            self._state.forget_addresses(now)
        while self._connections:
            client_id, connection = next(iter(self._connections.items()))
            if connection.pinged_at + PING_INTERVAL_S > now:
                break
            del self._connections[client_id]
            self._connections[client_id] = connection
            self._ping(connection, now)

    def _ping(self, connection: Connection, now: float) -> None:
        connection.pinged_at = now
        if connection.missed_pings >= PINGS_MISSED_LIMIT:
            connection.abort()
            return
        connection.missed_pings += 1
        connection.send_control(encode_websocket_frame(OPCODE_PING, b""), is_optional=True)

    def _get_used_at(self, session_id: str) -> float:
        link = self._links.get(session_id)
        return link.used_at if link else float("-inf")

    # Connections

    def admit(self, connection: Connection) -> bool:
        """Whether there is room for one more connection."""
        self.counters.connections += 1
        self._others.add(connection)
        if len(self._others) + len(self._connections) <= self._limit and not self._is_stopping.is_set():
            return True
        self.counters.refused += 1
        return False

    def release(self, connection: Connection) -> None:
        """A connection is gone."""
        self._others.discard(connection)
        if self._is_stopping.is_set() and not self._others and not self._connections:
            self._is_empty.set()

    def verify_request(self, request: HttpRequest, peer: Any) -> str:
        """The address that a WebSocket of this request counts against; HttpError if there may be none."""
        if request.path != "/pair":
            raise HttpError(404, "the WebSocket is at /pair")
        if self.settings.tokens and not is_token_valid(request, self.settings.tokens):
            raise HttpError(401, "this relay wants an access token", [("WWW-Authenticate", "Bearer")])
        if self._state.is_stopping:
            raise HttpError(503, "the relay is stopping: connect again", [("Retry-After", "1")])
        forwarded = request.get("x-forwarded-for")
        peer_address = peer[0] if isinstance(peer, tuple) else "127.0.0.1"
        if forwarded and not self.settings.trusted_proxies and not self._has_warned_of_proxy:
            self._has_warned_of_proxy = True
            logger.warning(
                "X-Forwarded-For came, but TRUSTED_PROXIES is not set: all behind a proxy count as one address"
            )
        address = find_client_address(peer_address, forwarded, self.settings.trusted_proxies)
        if self._state.is_address_full(address):
            raise HttpError(429, "too many connections from your address", [("Retry-After", "60")])
        return address

    def is_origin_allowed(self, origin: str) -> bool:
        """Whether pages of this origin may connect; apps have none."""
        allowed = self.settings.allowed_origins
        return not origin or "*" in allowed or origin in allowed

    def enter(self, connection: Connection, address: str) -> None:
        """A connection has become a WebSocket."""
        connection.pinged_at = self.now()
        connection.client_id = self._state.connect(address, connection.pinged_at, is_binary=connection.is_binary)
        self._connections[connection.client_id] = connection
        self._others.discard(connection)
        logger.debug("client %d connected from %s", connection.client_id, address)

    def leave(self, connection: Connection) -> None:
        """A WebSocket is over; again has no effect."""
        if self._connections.pop(connection.client_id, None) is not None:
            self._others.add(connection)
            logger.debug("client %d disconnected", connection.client_id)
            self.apply(self._state.disconnect(connection.client_id, self.now()))

    def answer(self, request: HttpRequest) -> bytes:
        """The answer to a request that is not for a WebSocket."""
        is_head = request.method == "HEAD"
        if request.method not in ("GET", "HEAD"):
            raise HttpError(405, "only GET here", [("Allow", "GET, HEAD")])
        if request.path == "/metrics" and self.settings.has_metrics:
            text = build_metrics(
                self._state,
                self.counters,
                uptime_s=self._get_uptime_s(),
                queued_bytes=self.queued_bytes,
                processes=self._directory.processes if self._directory else None,
            )
            return encode_response(200, text.encode(), "text/plain; version=0.0.4", is_head=is_head)
        if request.path == "/pair":
            fields = [("Upgrade", "websocket"), ("Sec-WebSocket-Version", WEBSOCKET_VERSION)]
            raise HttpError(426, "only WebSocket is spoken here", fields)
        if request.path == "/health":
            body = {
                "status": "stopping" if self._state.is_stopping else "ok",
                "activeSessions": len(self._state.sessions),
                "uptimeSec": self._get_uptime_s(),
                "version": __version__,
                **self._describe_processes(),
            }
        elif request.path == "/":
            body = {
                "service": "dvai-bridge-rendezvous",
                "version": __version__,
                "pair": "/pair (WebSocket)",
                "health": "/health",
                "metrics": "/metrics" if self.settings.has_metrics else "(disabled)",
            }
        else:
            raise HttpError(404, "there is no such page here")
        return encode_response(200, encode_json(body), "application/json", is_head=is_head)

    def _describe_processes(self) -> dict[str, Any]:
        """What /health says of this process among others; while Redis is away, it counts itself only."""
        if self._directory is None:
            return {}
        processes = self._directory.processes
        return {
            "redis": "ok" if self._directory.process else "away",
            "process": self._directory.process,
            "relayProcesses": len(processes) or 1,
            "allSessions": sum(processes.values()) if processes else len(self._state.sessions),
        }

    def _get_uptime_s(self) -> int:
        return int(self.now() - self._started_at)

    # Messages

    def handle(self, connection: Connection, message: dict[str, Any]) -> None:
        """A JSON message without a route."""
        self.apply(self._state.handle(connection.client_id, message, self.now()))

    def refuse(self, connection: Connection, refusal: Refusal) -> None:
        """A message that is none."""
        self.apply(self._state.refuse(connection.client_id, refusal))

    def explain_tag(self, connection: Connection, tag: int | None) -> None:
        """A binary message without a route; `tag` None: too short for one."""
        self.apply(self._state.explain_tag(connection.client_id, tag))

    def touch(self, connection: Connection) -> None:
        """A client has sent a ping."""
        self.apply(self._state.touch(connection.client_id, self.now()))

    def hear(self, process: str, text: str) -> None:
        """What another process says."""
        assert isinstance(self._state, SharedState)
        try:
            actions = self._state.hear(process, parse_json(text), self.now())
        except ValueError as error:
            logger.warning("relay process %s is of another version: %s", process, error)
            return
        self.apply(actions)

    def wake_redis(self) -> None:
        """There is something for other processes."""
        if self._directory is not None:
            self._directory.wake()

    def apply(self, actions: Iterable[Action]) -> None:
        """Does what the state has decided."""
        for action in actions:
            if isinstance(action, Send):
                self._tell(action)
            elif isinstance(action, Close):
                if action.client in self._connections:
                    self._connections[action.client].close(action.code, action.reason)
            elif isinstance(action, Join):
                self._join(action)
            elif isinstance(action, Part):
                self._part(action)
            elif self._directory is not None:
                self._directory.ask(action)
        if self._directory is not None:
            self._directory.follow()

    def _tell(self, action: Send) -> None:
        port = self._get_port(action.client, action.process)
        if port is None:
            return
        if action.message["type"] == "error" and not action.process:
            code = action.message["code"]
            self.counters.errors[code] = self.counters.errors.get(code, 0) + 1
        frame = encode_websocket_frame(OPCODE_TEXT, encode_json(action.message))
        link = self._links.get(action.session_id)
        for route in link.routes if link else ():
            if route.receiver is port and route.queue:
                port.hold(route, frame)
                return
        port.send_control(frame, is_optional=action.is_optional)

    def _get_port(self, client_id: int, process: str) -> Port | None:
        """Through which a client is told something: its connection, or the way to the process that speaks for it."""
        if process and self._directory is not None:
            return self._directory.get_trunk(process)
        return self._connections.get(client_id)

    def _join(self, action: Join) -> None:
        link = Link(action.session_id, self.settings.bytes_per_second, self.now())
        source, target = action.ends
        ports = [self._get_port(end.client, end.far.process if end.far else "") for end in action.ends]
        assert ports[0] is not None and ports[1] is not None
        link.routes = (
            Route(link, ports[0], ports[1], (source, target)),
            Route(link, ports[1], ports[0], (target, source)),
        )
        for route in link.routes:
            route.sender.routes[route.key] = route
        self._links[action.session_id] = link
        logger.info("session joined; %d are open", len(self._state.sessions))
        logger.debug("clients %d and %d joined", source.client, target.client)

    def _part(self, action: Part) -> None:
        link = self._links.pop(action.session_id, None)
        if link is None:
            return
        for route in link.routes:
            route.sender.routes.pop(route.key, None)
            if action.is_discarded:
                route.receiver.discard(route)
        logger.info("session ended; %d are open", len(self._state.sessions))

    # Frames under way

    def schedule_flush(self, port: Port) -> None:
        """A port has something to send at the end of this pass of the loop."""
        if not self._to_flush:
            self._loop.call_soon(self._flush)
        self._to_flush.append(port)

    def _flush(self) -> None:
        ports, self._to_flush = self._to_flush, []
        for port in ports:
            port.flush()

    def may_release(self, link: Link) -> bool:
        """Whether the session may go on, after all."""
        if not link.may_release:
            link.refill(self.settings.bytes_per_second, self.now())
        return link.may_release

    def hold(self, route: Route, frame: bytes, now: float) -> None:
        """A frame that may have to wait: for its receiver, for its session's allowance, or behind others."""
        link, receiver = route.link, route.receiver
        if link.allowance_bytes < 0:
            link.refill(self.settings.bytes_per_second, now)
        is_late = link.allowance_bytes < 0
        if not is_late and not receiver.is_paused and not route.queue:
            receiver.send(frame)
            return
        is_full = route.queued_bytes + len(frame) > SESSION_QUEUE_LIMIT_BYTES
        if is_full or self.queued_bytes + len(frame) > TOTAL_QUEUE_LIMIT_BYTES:
            code = ErrorCode.SESSION_STALLED if receiver.is_paused else ErrorCode.RATE_LIMITED
            self.apply(self._state.stall(link.session_id, route.sender_id, code, now))
            return
        receiver.hold(route, frame)
        if is_late:
            self.schedule_refill(receiver)

    def schedule_refill(self, port: Port) -> None:
        """A port has sessions that wait for their allowance."""
        if not self._to_refill:
            self.call_later(REFILL_INTERVAL_S, self._refill)
        self._to_refill.add(port)

    def _refill(self) -> None:
        ports, self._to_refill = self._to_refill, set()
        for port in ports:
            port.drain()


def raise_descriptor_limit() -> int:
    """How many descriptors this process may have, after asking for all that it may ask for."""
    try:
        import resource
    except ImportError:  # Windows has no such limit for sockets
        return sys.maxsize
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


# ---- Command line ---------------------------------------------------------------------
# Flags and environment in, exit code out.


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of every flag; values stay text, for `build_settings` to parse like the environment's."""
    parser = _Parser(
        prog="rendezvous_server.py",
        description="The relay of the DVAI Bridge: lets devices on different networks find and reach each other.",
        epilog="Every flag can be set in the environment, too. GET /health says whether it is well.",
    )
    defaults = {each.name: each.default for each in dataclasses.fields(Settings)}
    for name, described in get_settings_fields().items():
        if described.is_secret:
            continue
        default = "info" if name == "log_level" else format_default(defaults[name])
        shown = f" [{described.environment}" + (f", default {default}]" if default else "]")
        help_text = (described.help + shown).replace("%", "%%")
        parser.add_argument(described.flag, dest=name, metavar=described.metavar, help=help_text)
    parser.add_argument("--version", action="version", version=f"rendezvous_server {__version__}")
    return parser


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio could not tell anybody: a line for what the network or the system did, all of it for our bugs."""
    if isinstance(context.get("exception"), OSError):
        logger.warning("%s: %s", context["message"], context["exception"])
    else:
        loop.default_exception_handler(context)


async def _serve(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_report)
    relay = Relay(settings)
    url = await relay.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, relay.stop)
        except NotImplementedError:  # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(relay.stop))
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, relay.reload_certificate)
    if not settings.relay_url:
        logger.warning(
            "RENDEZVOUS_URL is not set: pairing codes name %s, and addresses cannot be proved", settings.host
        )
    print(f"listening on {url}", flush=True)
    await relay.run_until_stopped()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the relay; its exit code: 0 stopped, 1 it cannot listen, 2 a setting is wrong."""
    try:
        flags = {name: value for name, value in vars(build_parser().parse_args(argv)).items() if value is not None}
        settings = build_settings(flags, os.environ)
    except SettingsError as error:
        print(f"rendezvous_server: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("asyncio").setLevel(max(settings.log_level, logging.INFO))
    try:
        asyncio.run(_serve(settings))
    except KeyboardInterrupt:
        return 0
    except SettingsError as error:
        print(f"rendezvous_server: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = (
            "TLS_CERT_FILE or TLS_KEY_FILE" if isinstance(error, ssl.SSLError | FileNotFoundError) else "cannot listen"
        )
        print(f"rendezvous_server: {where}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ssl.SSLError | FileNotFoundError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
