"""DNS messages: what we write, what we read, and what nobody should send. Parity with zeroconf's own codec."""

import random
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from support import require

from dvai_bridge import (
    DNS_AUTHORITATIVE,
    DNS_RECORDS_LIMIT,
    DNS_RESPONSE,
    MDNS_PACKET_LIMIT_BYTES,
    DnsError,
    DnsMessage,
    DnsQuestion,
    DnsRecord,
    DnsType,
    NsecData,
    OtherData,
    PtrData,
    SrvData,
    TxtData,
    encode_dns_message,
    encode_txt,
    fold_dns_name,
    parse_dns_message,
    parse_txt,
)

SERVICE = ("_dvai-bridge", "_tcp", "local")
INSTANCE = ("DVAI Hub. Büro", *SERVICE)
HOST = ("mac", "local")
RESPONSE = DNS_RESPONSE | DNS_AUTHORITATIVE
HTTP = "05 5f68747470 04 5f746370 05 6c6f63616c 00"

# (bytes in hexadecimal, the message that they are)
KNOWN = [
    ("0000 0000 0000 0000 0000 0000", DnsMessage()),
    (
        f"0000 0000 0001 0000 0000 0000 {HTTP} 000c 8001",
        DnsMessage(questions=(DnsQuestion(("_http", "_tcp", "local"), DnsType.PTR, wants_unicast=True),)),
    ),
    (
        f"0007 8400 0000 0001 0000 0000 {HTTP} 000c 0001 00000078 0004 01 61 c00c",
        DnsMessage(
            id=7,
            flags=RESPONSE,
            answers=(DnsRecord(("_http", "_tcp", "local"), PtrData(("a", "_http", "_tcp", "local")), 120),),
        ),
    ),
    (
        "0000 8400 0000 0001 0000 0001 01 61 00 0021 8001 00000000 000b 0001 0002 1f90 01 62 01 63 00"
        "c00c 0010 0001 00001194 0005 01 78 02 3d3d",
        DnsMessage(
            flags=RESPONSE,
            answers=(DnsRecord(("a",), SrvData(("b", "c"), 8080, 1, 2), 0, True),),
            additionals=(DnsRecord(("a",), TxtData((b"x", b"==")), 4500),),
        ),
    ),
    (
        "0000 8400 0000 0002 0000 0000 01 61 00 0001 8001 00000078 0004 c0000201"
        "c00c 001c 8001 00000078 0010 fe80 0000 0000 0000 0000 0000 0000 0001",
        DnsMessage(
            flags=RESPONSE,
            answers=(
                DnsRecord(("a",), IPv4Address("192.0.2.1"), 120, True),
                DnsRecord(("a",), IPv6Address("fe80::1"), 120, True),
            ),
        ),
    ),
    (
        "0000 8400 0000 0001 0000 0000 01 61 00 002f 8001 00000078 0008 c00c 00 04 40000008",
        DnsMessage(flags=RESPONSE, answers=(DnsRecord(("a",), NsecData(("a",), (1, 28)), 120, True),)),
    ),
    (
        "0000 8400 0000 0000 0000 0001 00 0029 05a0 00001194 0002 0102",
        DnsMessage(
            flags=RESPONSE,
            additionals=(DnsRecord((), OtherData(41, b"\1\2"), 4500, dns_class=0x05A0),),
        ),
    ),
]
KNOWN = [(bytes.fromhex(text), message) for text, message in KNOWN]

EVERYTHING = DnsMessage(
    id=0xBEEF,
    flags=RESPONSE,
    questions=(DnsQuestion(SERVICE, DnsType.PTR), DnsQuestion(INSTANCE, DnsType.ANY, True)),
    answers=(DnsRecord(SERVICE, PtrData(INSTANCE), 120),),
    authorities=(DnsRecord(INSTANCE, SrvData(HOST, 38883, 1, 2), 120, True),),
    additionals=(
        DnsRecord(INSTANCE, TxtData((b"deviceId=x", b"", b"\xff" * 255)), 4500, True),
        DnsRecord(HOST, IPv4Address("192.0.2.1"), 120, True),
        DnsRecord(HOST, IPv6Address("2001:db8::1"), 120, True),
        DnsRecord(HOST, NsecData(HOST, (DnsType.A, DnsType.AAAA, 255)), 120, True),
        DnsRecord(("\udcff\udc80", "local"), OtherData(13, b"hinfo"), 0xFFFFFFFF),
        DnsRecord((), OtherData(41, b""), 0, dns_class=1440),
    ),
)


@pytest.mark.parametrize(("data", "message"), KNOWN, ids=range(len(KNOWN)))
def test_known_bytes_both_ways(data, message):
    assert parse_dns_message(data) == message
    assert encode_dns_message(message) == data


@pytest.mark.parametrize("message", [*(message for _, message in KNOWN), EVERYTHING], ids=lambda m: f"{m.id:x}")
def test_whole_truncated_and_trailing(message):
    data = encode_dns_message(message)
    assert parse_dns_message(data) == message
    assert parse_dns_message(data + b"\xc0") == message
    for size in range(len(data)):
        with pytest.raises(DnsError):
            parse_dns_message(data[:size])


def test_names_are_compressed_except_where_unicast_dns_forbids():
    record = DnsRecord(("a", "local"), SrvData(("a", "local"), 1), 120)
    message = DnsMessage(flags=RESPONSE, answers=(record,))
    short, long = encode_dns_message(message), encode_dns_message(message, compress_srv=False)
    assert short.endswith(b"\0\0\0\0\0\1\xc0\x0c") and long.endswith(b"\0\0\0\0\0\1\1a\5local\0")
    assert parse_dns_message(short) == parse_dns_message(long) == message
    assert len(encode_dns_message(EVERYTHING)) < 512


def header(questions=0, answers=0, authorities=0, additionals=0):
    return struct.pack("!6H", 0, RESPONSE, questions, answers, authorities, additionals)


PTR_QUESTION = b"\0\x0c\0\1"
MALFORMED = {
    "pointer to itself": header(1) + b"\xc0\x0c" + PTR_QUESTION,
    "pointer forwards": header(1) + b"\xc0\x0e" + PTR_QUESTION,
    "pointer into the own run": header(1) + b"\1a\xc0\x0c" + PTR_QUESTION,
    "two pointers in a circle": header(2) + b"\xc0\x10" + PTR_QUESTION + b"\xc0\x0c" + PTR_QUESTION,
    "pointer past the end": header(1) + b"\xff\xff" + PTR_QUESTION,
    "pointer at the end": header(1) + b"\xc0",
    "reserved label type 01": header(1) + b"\x41" + b"a" * 65 + b"\0" + PTR_QUESTION,
    "reserved label type 10": header(1) + b"\x80\0" + PTR_QUESTION,
    "name of 256 bytes": header(1) + (b"\x3f" + b"a" * 63) * 4 + b"\0" + PTR_QUESTION,
    "65,535 questions": header(65535) + (b"\0" + PTR_QUESTION) * 1700,
    "65,535 answers": header(0, 65535) + b"\0\0\1\0\1\0\0\0\0\0\4\1\1\1\1" * 500,
    "65 records in three sections": header(0, 30, 30, 5) + b"\0\0\1\0\1\0\0\0\0\0\4\1\1\1\1" * 65,
    "9,001 bytes": header() + b"\0" * (MDNS_PACKET_LIMIT_BYTES - 11),
    "data longer than the packet": header(0, 1) + b"\0\0\1\0\1\0\0\0\0\xff\xff\1\1\1\1",
    "an address of 5 bytes": header(0, 1) + b"\0\0\1\0\1\0\0\0\0\0\5\1\1\1\1\1",
    "an IPv6 address of 4 bytes": header(0, 1) + b"\0\0\x1c\0\1\0\0\0\0\0\4\1\1\1\1",
    "a PTR longer than its name": header(0, 1) + b"\0\0\x0c\0\1\0\0\0\0\0\2\0\0",
    "a PTR shorter than its name": header(0, 1) + b"\0\0\x0c\0\1\0\0\0\0\0\1\1a\0",
    "an SRV without a name": header(0, 1) + b"\0\0\x21\0\1\0\0\0\0\0\6\0\0\0\0\0\1",
    "a TXT that ends in a string": header(0, 1) + b"\0\0\x10\0\1\0\0\0\0\0\3\5ab",
    "an NSEC with a block of 0 bytes": header(0, 1) + b"\0\0\x2f\0\1\0\0\0\0\0\3\0\0\0",
    "an NSEC with a block of 33 bytes": header(0, 1) + b"\0\0\x2f\0\1\0\0\0\0\0\x24\0\0\x21" + b"\1" * 33,
    "an NSEC with half a block": header(0, 1) + b"\0\0\x2f\0\1\0\0\0\0\0\4\0\0\2\1",
    "an NSEC with a name alone past its end": header(0, 1) + b"\0\0\x2f\0\1\0\0\0\0\0\1\1a\0\0",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(data):
    with pytest.raises(DnsError):
        parse_dns_message(data)


def test_the_longest_of_everything_is_read():
    name = ("a" * 63, "b" * 63, "c" * 63, "d" * 61)
    message = DnsMessage(flags=RESPONSE, answers=(DnsRecord(name, TxtData((b"x" * 255,) * 20), 1),))
    assert parse_dns_message(encode_dns_message(message)) == message
    many = DnsMessage(answers=(DnsRecord(SERVICE, PtrData(INSTANCE), 1),) * DNS_RECORDS_LIMIT)
    assert parse_dns_message(encode_dns_message(many)) == many


def test_chains_of_pointers_are_bounded():
    """A record of unknown type holds a name at offset 23 and pointers each to the one before it."""
    for length, is_read in ((31, True), (32, False), (2000, False)):
        chain = b"\1a\0" + b"".join(struct.pack("!H", 0xC000 | at) for at in (23, *range(26, 24 + 2 * length, 2)))
        carrier = b"\0" + struct.pack("!2HIH", 1000, 1, 0, len(chain)) + chain
        end = 23 + len(chain) - 2
        data = header(0, 2) + carrier + struct.pack("!H2HIH", 0xC000 | end, 1000, 1, 0, 0)
        if is_read:
            assert parse_dns_message(data).answers[1].name == ("a",)
        else:
            with pytest.raises(DnsError):
                parse_dns_message(data)


def test_what_cannot_be_written():
    for name in (("",), ("a" * 64,), ("ä" * 32,), ("a" * 63,) * 4):
        with pytest.raises(ValueError):
            encode_dns_message(DnsMessage(questions=(DnsQuestion(name, 1),)))
    with pytest.raises(ValueError):
        encode_dns_message(DnsMessage(answers=(DnsRecord((), TxtData((b"x" * 256,)), 1),)))
    with pytest.raises(ValueError):
        encode_dns_message(DnsMessage(answers=(DnsRecord((), OtherData(1000, b"x" * 1000), 1),) * 9))


def test_random_and_damaged_bytes_raise_nothing_else():
    rng, good, parsed = random.Random(6762), encode_dns_message(EVERYTHING), 0
    for turn in range(20_000):
        if turn % 4:
            data = bytearray(good)
            for _ in range(rng.randrange(1, 5)):
                data[rng.randrange(len(data))] = rng.choice((0, 1, 0xC0, 0xFF, rng.randrange(256)))
        else:
            data = bytearray(header(*(rng.randrange(3) for _ in range(4))) + rng.randbytes(rng.randrange(200)))
        try:
            message = parse_dns_message(bytes(data))
        except DnsError:
            continue
        parsed += 1
        assert len(message.answers) + len(message.authorities) + len(message.additionals) <= DNS_RECORDS_LIMIT
    assert parsed > 1000


def test_names_are_equal_ignoring_the_case_of_ascii_alone():
    assert fold_dns_name(("DVAI Hub", "_TCP", "Ärger")) == ("dvai hub", "_tcp", "Ärger")
    assert fold_dns_name(("ä",)) != fold_dns_name(("Ä",))


@pytest.mark.parametrize(
    ("strings", "attributes"),
    [
        ([], {}),
        ([b""], {}),
        ([b"deviceId=a"], {"deviceid": b"a"}),
        ([b"DeviceID=a", b"deviceid=b"], {"deviceid": b"a"}),
        ([b"secure", b"port="], {"secure": None, "port": b""}),
        ([b"secure", b"secure=1"], {"secure": None}),
        ([b"=x", b"=", b"a=b=c"], {"a": b"b=c"}),
        ([b"k\xc3\xa4y=1", b"tab\t=1", b"a b=\xff\0"], {"a b": b"\xff\0"}),
    ],
)
def test_txt_attributes(strings, attributes):
    assert parse_txt(strings) == attributes


def test_txt_strings():
    assert encode_txt({"deviceId": "ä", "secure": None, "models": ""}) == (b"deviceId=\xc3\xa4", b"secure", b"models=")
    assert encode_txt({"k": "x" * 253}) == (b"k=" + b"x" * 253,)
    for attributes in ({"": "a"}, {"a=b": ""}, {"ä": ""}, {"k": "x" * 254}, {"k": "ä" * 127}):
        with pytest.raises(ValueError):
            encode_txt(attributes)
    empty = parse_dns_message(encode_dns_message(DnsMessage(answers=(DnsRecord((), TxtData(()), 1),))))
    assert empty.answers[0].data == TxtData((b"",))


def to_dotted(name):
    return "".join(label + "." for label in name)


def test_zeroconf_reads_what_we_write():
    zeroconf = require("zeroconf")
    host = ("x", "local")
    instance = ("a device", *SERVICE)
    answers = (
        DnsRecord(SERVICE, PtrData(instance), 120),
        DnsRecord(instance, SrvData(host, 38883), 120, True),
        DnsRecord(instance, TxtData((b"deviceId=x", b"secure=0")), 120, True),
        DnsRecord(host, IPv4Address("192.0.2.1"), 120, True),
        DnsRecord(host, IPv6Address("2001:db8::1"), 120, True),
        DnsRecord(host, NsecData(host, (1, 28)), 120, True),
    )
    questions = (DnsQuestion(SERVICE, DnsType.PTR, True),)
    incoming = zeroconf.DNSIncoming(encode_dns_message(DnsMessage(id=5, flags=RESPONSE, answers=answers)))
    assert incoming.valid and incoming.is_response() and incoming.id == 5
    pointer, service, text, ipv4, ipv6, nsec = incoming.answers()
    assert (pointer.name, pointer.alias, pointer.ttl, pointer.unique) == (
        *map(to_dotted, (SERVICE, instance)),
        120,
        False,
    )
    assert (service.key, service.server, service.port, service.unique) == (
        to_dotted(instance),
        to_dotted(host),
        38883,
        True,
    )
    assert text.text == b"\x0adeviceId=x\x08secure=0"
    assert (ipv4.address, ipv6.address) == (IPv4Address("192.0.2.1").packed, IPv6Address("2001:db8::1").packed)
    assert (nsec.next_name, nsec.rdtypes) == (to_dotted(host), [1, 28])
    (question,) = zeroconf.DNSIncoming(encode_dns_message(DnsMessage(questions=questions))).questions
    assert (question.name, question.type, question.unicast) == (to_dotted(SERVICE), 12, True)


def test_we_read_what_zeroconf_writes():
    zeroconf = require("zeroconf")
    instance, host = ("a device", *SERVICE), ("x", "local")
    service, target, server = map(to_dotted, (SERVICE, instance, host))
    outgoing = zeroconf.DNSOutgoing(RESPONSE)
    outgoing.add_question(zeroconf.DNSQuestion(service, 12, 1))
    flush = 0x8001
    for record in (
        zeroconf.DNSPointer(service, 12, 1, 4500, target),
        zeroconf.DNSService(target, 33, flush, 120, 3, 4, 38883, server),
        zeroconf.DNSText(target, 16, flush, 4500, b"\x0adeviceId=x\x00"),
        zeroconf.DNSAddress(server, 1, flush, 120, IPv4Address("192.0.2.1").packed),
        zeroconf.DNSAddress(server, 28, flush, 120, IPv6Address("fe80::1").packed),
        zeroconf.DNSNsec(server, 47, flush, 120, server, [1, 28]),
    ):
        outgoing.add_answer_at_time(record, 0)
    (packet,) = outgoing.packets()
    message = parse_dns_message(packet)
    assert message.questions == (DnsQuestion(SERVICE, DnsType.PTR),)
    assert message.answers == (
        DnsRecord(SERVICE, PtrData(instance), 4500),
        DnsRecord(instance, SrvData(host, 38883, 3, 4), 120, True),
        DnsRecord(instance, TxtData((b"deviceId=x", b"")), 4500, True),
        DnsRecord(host, IPv4Address("192.0.2.1"), 120, True),
        DnsRecord(host, IPv6Address("fe80::1"), 120, True),
        DnsRecord(host, NsecData(host, (1, 28)), 120, True),
    )


def test_zeroconf_and_we_agree_on_names():
    """Whatever zeroconf reads of damaged packets and we do too has the same names."""
    zeroconf = require("zeroconf")
    rng, good, agreed = random.Random(1), encode_dns_message(DnsMessage(flags=RESPONSE, answers=EVERYTHING.answers)), 0
    for _ in range(2000):
        data = bytearray(good)
        data[rng.randrange(12, len(data))] = rng.randrange(256)
        try:
            ours = parse_dns_message(bytes(data)).answers
        except DnsError:
            continue
        theirs = zeroconf.DNSIncoming(bytes(data)).answers()
        for mine, other in zip(ours, theirs, strict=False):
            name = to_dotted(mine.name).encode(errors="surrogateescape").decode(errors="replace")
            assert name == other.name
            agreed += 1
    assert agreed > 500
