"""Discovery: the dialects, which addresses count, the browser and the responder by the hand-turned clock, loopback."""

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import itertools
import json
import random
import socket
import sys
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

import pytest
from support import require

import dvai_bridge
from dvai_bridge import (
    ANNOUNCED_TTL_S,
    DNS_AUTHORITATIVE,
    DNS_RESPONSE,
    MDNS_PORT,
    PACKETS_PER_S_LIMIT,
    PEERS_KEPT_LIMIT,
    SERVICE_ENUMERATION,
    SERVICE_TYPE,
    Announcement,
    Browser,
    DiscoveryDiagnosis,
    DnsMessage,
    DnsQuestion,
    DnsRecord,
    DnsType,
    InterfaceDiagnosis,
    MdnsDiscovery,
    MdnsLink,
    NetworkInterface,
    NsecData,
    PeerVia,
    PtrData,
    Responder,
    SrvData,
    TxtData,
    UsageError,
    build_announcement,
    build_diagnosis_json,
    build_discovery,
    build_txt,
    choose_interfaces,
    choose_target_address,
    encode_dns_message,
    explain_interface,
    explain_machine,
    format_diagnosis,
    is_target_allowed,
    open_mdns_socket,
    parse_announcement,
    parse_dns_message,
    parse_txt,
    probe_interfaces,
)

ME, OTHER = "A" * 22, "b-_" + "B" * 19
LAN = NetworkInterface(
    name="eth0",
    index=3,
    ipv4=(IPv4Interface("192.168.1.2/24"),),
    ipv6=(IPv6Interface("2001:db8::2/64"), IPv6Interface("fe80::2/64")),
)
WIFI = NetworkInterface(name="wlan0", index=4, ipv4=(IPv4Interface("10.0.0.2/8"),))
LOOPBACK = NetworkInterface(name="lo", index=1, ipv4=(IPv4Interface("127.0.0.1/8"),), is_loopback=True)
SOURCE = IPv4Address("192.168.1.9")
NOW_MS = 1_700_000_000_000
RESPONSE = DNS_RESPONSE | DNS_AUTHORITATIVE


# Announcements


def announce(**changes):
    told = {"device_id": OTHER, "device_name": "Büro", "dvai_version": "0.1.0", "port": 38883}
    return Announcement(**told | changes)


DIALECTS = {
    "TypeScript": (
        OTHER,
        [
            *(b"dvaiVersion=4.0.0", b"deviceId=" + OTHER.encode(), b"deviceName=Mac Studio", b"models=a,b:7b"),
            *(b'capability={"a":41.5,"b:7b":9}', b"port=38883", b"secure=0"),
        ],
        38883,
        {"device_id": OTHER, "device_name": "Mac Studio", "dvai_version": "4.0.0"}
        | {"loaded_models": ("a", "b:7b"), "capability": {"a": 41.5, "b:7b": 9.0}},
    ),
    "macOS hub": (
        "DVAI Hub",
        [b"dvaiVersion=3.2.1", b"deviceId=hub-38883", b"deviceName=DVAI Hub", b"models=", b"port=38883", b"secure=0"],
        38883,
        {"device_id": "http://192.168.1.9:38883/v1", "device_name": "DVAI Hub", "dvai_version": "3.2.1"},
    ),
    "iOS": (
        "Anna's iPhone",
        [b"deviceId=ios-1", b"deviceName=Anna's iPhone", b"dvaiVersion=3.2.1", b"port=38890", b"capability={}"],
        0,
        {"device_id": "ios-1", "device_name": "Anna's iPhone", "dvai_version": "3.2.1"}
        | {"base_url": "http://192.168.1.9:38890/v1"},
    ),
    "Android": (
        "dvai-bridge-pixel",
        [b"dvaiVersion=3.2.1", b"deviceId=px", b"models= a , b:7b ", b"capability=a:12.5, b:7b:3", b"secure=true"],
        38883,
        {"device_id": "px", "device_name": "dvai-bridge-pixel", "dvai_version": "3.2.1"}
        | {"loaded_models": ("a", "b:7b"), "capability": {"a": 12.5, "b:7b": 3.0}}
        | {"secure": True, "base_url": "https://192.168.1.9:38883/v1"},
    ),
    ".NET": (
        "dvai-7f",
        [
            b"txtvers=1",
            b"device_id=7f",
            b"device_name=PC",
            b"dvai_version=3.2.1",
            b"loaded_models=a,b",
            b"secure=false",
        ],
        5001,
        {"device_id": "7f", "device_name": "PC", "dvai_version": "3.2.1"}
        | {"loaded_models": ("a", "b"), "base_url": "http://192.168.1.9:5001/v1"},
    ),
    "nothing but a name": ("a thing", [b""], 2000, {"device_id": "a thing", "device_name": "a thing"}),
}


@pytest.mark.parametrize(("instance", "strings", "port", "expected"), DIALECTS.values(), ids=DIALECTS.keys())
def test_dialects(instance, strings, port, expected):
    peer = parse_announcement(instance, strings, srv_port=port, host="192.168.1.9", now_ms=NOW_MS)
    defaults = {"dvai_version": "", "base_url": "http://192.168.1.9:38883/v1", "app_id": None, "loaded_models": ()}
    defaults |= {
        "capability": {},
        "secure": False,
        "provider_address": b"",
        "via": PeerVia.MDNS,
        "last_seen_ms": NOW_MS,
    }
    if port == 2000:
        defaults["base_url"] = "http://192.168.1.9:2000/v1"
    assert dataclasses.asdict(peer) == defaults | expected


@pytest.mark.parametrize("strings", [[b"port=80"], [b"port=99999"], [b"port=+5000"], [b"port=\xd9\xa5000"], []])
def test_a_peer_without_a_port_that_may_be_dialled_is_none(strings):
    for srv_port in (0, 80, 1023):
        with pytest.raises(ValueError):
            parse_announcement("x", strings, srv_port=srv_port, host="192.168.1.9", now_ms=0)


@pytest.mark.parametrize("instance", ["", "a\nb", "\udcff", "\u202e", "x" * 129])
def test_an_id_that_cannot_be_one(instance):
    with pytest.raises(ValueError):
        parse_announcement(instance, [], srv_port=5000, host="192.168.1.9", now_ms=0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (b"", {}),
        (b"null", {}),
        (b"[1]", {}),
        (b'{"a":-1,"b":"x","c":1e999}', {}),
        (b'{"a":1,"a":2}', {}),
        (b"{" * 200, {}),
        (b"a:nan,b:inf,c:1e3,d:1_0,:5,e:,f:007", {"f": 7.0}),
        (b"\xff\xfe", {}),
    ],
)
def test_hostile_capabilities(capability, expected):
    peer = parse_announcement("x", [b"capability=" + capability], srv_port=5000, host="192.168.1.9", now_ms=0)
    assert peer.capability == expected


def test_what_we_announce_all_dialects_read():
    own_address = "cHJvdmlkZXItYWRkcmVzcw"
    told = announce(models=("a", "b"), capability={"a": 12.5}, address=own_address)
    records = build_announcement(told, LAN.addresses)
    instance, host = (OTHER, *SERVICE_TYPE), (OTHER, "local")
    pointer, service, text, *addresses, enumeration = records
    assert pointer == DnsRecord(SERVICE_TYPE, PtrData(instance), 120)
    assert service == DnsRecord(instance, SrvData(host, 38883), 120, True)
    assert [each.data for each in addresses] == list(LAN.addresses)
    assert {each.name for each in addresses} == {host} and all(each.replaces for each in addresses)
    assert enumeration == DnsRecord(SERVICE_ENUMERATION, PtrData(SERVICE_TYPE), 120)
    assert text.data.strings == (
        *(b"dvaiVersion=0.1.0", b"deviceId=" + OTHER.encode(), "deviceName=Büro".encode(), b"models=a,b"),
        *(
            b'capability={"a":12.5}',
            b"port=38883",
            b"secure=0",
            b"device_id=" + OTHER.encode(),
            b"addr=" + own_address.encode(),
        ),
    )
    peer = parse_announcement(OTHER, text.data.strings, srv_port=38883, host="fe80::9%eth0", now_ms=NOW_MS)
    assert peer.provider_address == b"provider-address"
    assert (peer.device_id, peer.device_name, peer.loaded_models) == (OTHER, "Büro", ("a", "b"))
    assert (peer.capability, peer.base_url) == ({"a": 12.5}, "http://[fe80::9%eth0]:38883/v1")
    assert len(encode_dns_message(DnsMessage(answers=records))) < 1200
    only_ipv4 = build_announcement(announce(has_ipv6=False), LAN.addresses)
    assert [each.type for each in only_ipv4] == [DnsType.PTR, DnsType.SRV, DnsType.TXT, DnsType.A, DnsType.PTR]


@pytest.mark.parametrize("text", ["", "xyz", "cHJvdmlkZXItYWRkcmVzcw==", "cHJvdmlkZXItYWRkcmVzc3M", "not base64url!"])
def test_what_is_no_provider_address(text):
    peer = parse_announcement("x", [b"addr=" + text.encode()], srv_port=5000, host="192.168.1.9", now_ms=0)
    assert peer.provider_address == b""


def test_an_interface_with_very_many_addresses():
    records = build_announcement(announce(), [IPv4Address("10.0.0.1") + i for i in range(5000)])
    assert sum(each.type == DnsType.A for each in records) == 8


def test_models_and_scores_are_told_while_they_fit():
    models = tuple(f"a-model-with-a-long-name-{i:03}" for i in range(40))
    strings = build_txt(
        announce(device_name="ü" * 200, models=("with,comma", *models), capability=dict.fromkeys(models, 12.25))
    )
    assert all(len(each) <= 255 for each in strings) and sum(map(len, strings)) < 1200
    assert b"deviceName=a?" in build_txt(announce(device_name="a\udcff"))
    text = parse_txt(strings)
    told = text["models"].decode().split(",")
    assert told == list(models[: len(told)]) and len(told) >= 8
    scores = json.loads(text["capability"])
    assert list(scores) == list(models[: len(scores)]) and len(scores) >= 6
    assert text["devicename"].decode() == "ü" * 122


# Which addresses count


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("192.168.1.77", True),
        ("192.168.1.2", True),  # another bridge on this machine
        ("192.168.2.1", False),
        ("8.8.8.8", False),
        ("10.0.0.5", False),  # on-link elsewhere, not where the packet came in
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("0.0.0.0", False),
        ("224.0.0.251", False),
        ("255.255.255.255", False),
        ("169.254.169.254", False),
        ("fe80::77", True),
        ("2001:db8::77", True),
        ("2001:db8:1::1", False),
        ("::1", False),
        ("::", False),
        ("ff02::fb", False),
        ("fd00:ec2::254", False),
        ("::ffff:192.168.1.77", False),
        ("::ffff:127.0.0.1", False),
    ],
)
def test_targets(address, is_allowed):
    address = ipaddress.ip_address(address)
    assert is_target_allowed(address, LAN, SOURCE) is is_allowed
    everywhere = NetworkInterface(
        name="x", index=9, ipv4=(IPv4Interface("0.0.0.0/0"),), ipv6=(IPv6Interface("::1:2/0"),)
    )
    never = (str(address) not in ("192.168.2.1", "8.8.8.8", "10.0.0.5", "2001:db8:1::1")) and not is_allowed
    if never and str(address) != "255.255.255.255":
        assert not is_target_allowed(address, everywhere, address)


def test_the_source_of_the_packet_is_a_target_and_loopback_only_on_loopback():
    far = IPv4Address("172.16.0.1")
    assert is_target_allowed(far, LAN, far) and not is_target_allowed(far, LAN, SOURCE)
    here = IPv4Address("127.0.0.1")
    assert is_target_allowed(here, LOOPBACK, here) and not is_target_allowed(here, LAN, here)
    assert not is_target_allowed(SOURCE, LOOPBACK, here)


def test_the_best_address():
    def choose(*addresses):
        return str(choose_target_address([ipaddress.ip_address(each) for each in addresses], LAN, SOURCE))

    assert choose() == "192.168.1.9"
    assert choose("fe80::1", "2001:db8::9", "192.168.1.3", "192.168.1.9") == "192.168.1.9"
    assert choose("fe80::1", "2001:db8::9", "192.168.1.30", "192.168.1.4") == "192.168.1.4"
    assert choose("fe80::1", "2001:db8::9") == "2001:db8::9"
    assert choose("fe80::1", "8.8.8.8", "127.0.0.1") == "fe80::1"
    assert choose("8.8.8.8") == "None"


# The browser


def new_browser(**changes):
    browser = Browser(**{"device_id": ME, "own_port": 38883, "draw": lambda: 0.0, **changes})
    browser.set_interfaces([LAN, WIFI], 0.0)
    return browser


def hear(browser, records, *, now_s=0.0, source=SOURCE, interface=LAN, now_ms=None, section="answers", **options):
    message = DnsMessage(flags=RESPONSE, **{section: tuple(records)})
    message = parse_dns_message(encode_dns_message(message))
    now_ms = NOW_MS + int(now_s * 1000) if now_ms is None else now_ms
    browser.receive(message, interface, source, now_s=now_s, now_ms=now_ms, **options)


def records_of(address="192.168.1.9", **changes):
    return build_announcement(announce(**changes), [ipaddress.ip_address(address)])


def changes_of(browser, now_s):
    found, lost = browser.take_changes(now_s)
    return [peer.base_url for peer in found], [peer.device_id for peer in lost]


URL = "http://192.168.1.9:38883/v1"


@pytest.mark.parametrize("section", ["answers", "additionals"])
def test_a_peer_in_one_packet_whatever_the_order(section):
    for order in (1, -1):
        browser = new_browser()
        hear(browser, records_of()[::order], section=section)
        assert changes_of(browser, 0) == ([URL], [])
        assert changes_of(browser, 0.5) == ([], [])


def test_a_peer_in_pieces():
    browser = new_browser()
    pointer, service, text, address, _ = records_of("192.168.1.77")
    for piece in (pointer, service, text):
        assert changes_of(browser, 0) == ([], [])
        hear(browser, [piece])
    assert changes_of(browser, 0) == ([URL], [])  # no address told: where it came from
    hear(browser, [address])
    assert changes_of(browser, 0) == (["http://192.168.1.77:38883/v1"], [])


def test_what_is_missing_is_asked_for():
    browser = new_browser()
    pointer, service, text, address, _ = records_of()
    instance, host = pointer.data.target, service.data.target

    def ask(now_s):
        questions = [message.questions for interface, message in browser.take_queries(now_s) if interface == LAN]
        return [(each.name, each.type) for each in questions[0] if each.name != SERVICE_TYPE] if questions else []

    hear(browser, [pointer])
    description = [(instance, DnsType.SRV), (instance, DnsType.TXT)]
    assert browser.due_s() == 0 and ask(0) == description and ask(0.5) == []
    assert ask(1) == description
    hear(browser, [service, text], now_s=2)
    assert ask(2) == [(host, DnsType.A), (host, DnsType.AAAA)]
    hear(browser, [address], now_s=2.5)
    assert ask(3) == ask(5) == ask(90) == []


def test_names_that_are_never_described_are_forgotten_and_asked_for_thrice():
    browser = new_browser()
    hear(browser, [records_of()[0]])
    asked = 0
    for second in range(11):
        for interface, message in browser.take_queries(second):
            asked += interface == LAN and any(each.type == DnsType.SRV for each in message.questions)
        assert changes_of(browser, second) == ([], [])
    assert asked == 3
    assert browser._sightings == {}


def test_queries_back_off_and_say_what_is_known():
    browser = new_browser()
    assert browser.due_s() == pytest.approx(0.02)
    times, now_s = [], 0.0
    while len(times) < 16:
        now_s = browser.due_s()
        queries = browser.take_queries(now_s)
        assert [interface for interface, _ in queries] == [LAN, WIFI]
        assert all(message.questions == (DnsQuestion(SERVICE_TYPE, DnsType.PTR),) for _, message in queries)
        assert not any(message.answers for _, message in queries)
        times.append(now_s)
    pauses = [round(later - earlier) for earlier, later in itertools.pairwise(times)]
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600, 3600]


def test_known_answers():
    browser = new_browser()
    hear(browser, records_of(), now_s=0)
    ((_, query), (_, elsewhere)) = browser.take_queries(1)
    assert query.answers == (DnsRecord(SERVICE_TYPE, PtrData((OTHER, *SERVICE_TYPE)), 119),)
    assert elsewhere.answers == ()  # it was seen on the other interface
    ((_, query), _) = browser.take_queries(61)
    assert query.answers == ()  # half its life is over


def test_records_are_refreshed_before_they_end():
    browser = new_browser()
    for second in (0.02, 1.02, 3.02, 7.02, 15.02, 31.02, 63.02):
        browser.take_queries(second)
    hear(browser, records_of(), now_s=70)
    changes_of(browser, 70)
    asked = []
    while browser.due_s() < 70 + ANNOUNCED_TTL_S:
        now_s = browser.due_s()
        for interface, message in browser.take_queries(now_s):
            if interface == LAN and len(message.questions) > 1:
                asked.append((round(now_s - 70), sorted(each.type for each in message.questions)))
        assert changes_of(browser, now_s) == ([], [])
    wanted = [DnsType.A, DnsType.PTR, DnsType.TXT, DnsType.SRV]
    assert asked == [(96, wanted), (102, wanted), (108, wanted), (114, wanted)]
    assert changes_of(browser, 190) == ([], [OTHER])


def test_an_answer_in_time_keeps_the_peer():
    browser = new_browser()
    for second in range(0, 500, 100):
        hear(browser, records_of(), now_s=second)
        assert changes_of(browser, second) == ([URL], [])  # seen again
    assert changes_of(browser, 519.9) == ([], []) and changes_of(browser, 520) == ([], [OTHER])
    assert changes_of(browser, 600) == ([], [])


def test_goodbye_counts_after_a_second_unless_it_is_taken_back():
    for records in (records_of()[:1], records_of()[1:2], records_of()):
        browser = new_browser()
        hear(browser, records_of())
        changes_of(browser, 0)
        goodbye = [dataclasses.replace(each, ttl_s=0) for each in records]
        hear(browser, goodbye, now_s=10)
        assert changes_of(browser, 10.9) == ([], [])
        assert browser.due_s() <= 11 and changes_of(browser, 11) == ([], [OTHER])
        hear(browser, records_of(), now_s=20)
        changes_of(browser, 20)
        hear(browser, goodbye, now_s=30)
        hear(browser, records_of(), now_s=30.5)
        assert changes_of(browser, 31.5) == ([URL], [])
    hear(browser, goodbye, now_s=40)
    hear(new_browser(), goodbye)  # of somebody unknown


def test_news_replace_what_was_known():
    browser = new_browser()
    hear(browser, records_of())
    changes_of(browser, 0)
    hear(browser, records_of(models=("new",)), now_s=0.1)
    (found,), _ = browser.take_changes(0.1)
    assert found.loaded_models == ("new",)
    hear(browser, records_of("192.168.1.10", port=38890), now_s=0.2)
    assert changes_of(browser, 0.2) == (["http://192.168.1.10:38890/v1"], [])
    hear(browser, records_of(device_id=OTHER, port=80), now_s=0.3)  # a port that may not be dialled
    assert changes_of(browser, 0.3)[0] == []


def test_an_address_that_expires_alone():
    browser = new_browser()
    *records, address, _ = records_of("192.168.1.9")
    other = dataclasses.replace(address, data=IPv4Address("192.168.1.30"), replaces=False)
    hear(browser, [*records, dataclasses.replace(address, ttl_s=5), other])
    assert changes_of(browser, 0) == ([URL], [])
    assert changes_of(browser, 5) == (["http://192.168.1.30:38883/v1"], [])
    hear(browser, [dataclasses.replace(other, ttl_s=0)], now_s=6)
    assert changes_of(browser, 7) == ([URL], [])  # where the packets came from


def test_one_device_on_two_interfaces_is_one_peer():
    browser = new_browser()
    hear(browser, records_of("10.0.0.9"), interface=WIFI, source=IPv4Address("10.0.0.9"))
    hear(browser, records_of("192.168.1.9"))
    assert changes_of(browser, 0) == (["http://10.0.0.9:38883/v1"], [])
    browser.set_interfaces([LAN], 1)
    assert changes_of(browser, 1) == ([URL], [])
    browser.set_interfaces([], 2)
    assert changes_of(browser, 2) == ([], [OTHER]) and browser.due_s() == float("inf")
    browser.set_interfaces([WIFI], 100)
    assert browser.due_s() == pytest.approx(100.02)  # questions begin anew


def test_we_are_not_our_own_peer():
    browser = new_browser()
    hear(browser, records_of("192.168.1.2", device_id=ME))
    hear(browser, records_of("192.168.1.2", device_id="another name of ours", port=38883), source=LAN.addresses[0])
    assert changes_of(browser, 0) == ([], [])
    hear(browser, records_of("192.168.1.2", device_id="neighbour", port=38884), source=LAN.addresses[0])
    assert changes_of(browser, 0) == (["http://192.168.1.2:38884/v1"], [])
    assert changes_of(browser, 10)[1] == [] and len(browser._sightings) == 1


def test_foreign_addresses_as_targets():
    browser = new_browser()
    for i, address in enumerate(("8.8.8.8", "169.254.169.254", "127.0.0.1", "fd00:ec2::254")):
        hear(browser, records_of(address, device_id=f"evil-{i}"))
    assert changes_of(browser, 0) == ([], [])


def test_an_ipv6_link_local_target_keeps_its_scope():
    browser = new_browser()
    hear(browser, records_of("fe80::9"), source=IPv6Address("fe80::9"))
    assert changes_of(browser, 0) == (["http://[fe80::9%eth0]:38883/v1"], [])


def test_ten_thousand_peers():
    browser = new_browser()
    hear(browser, records_of())
    for i in range(10_000):
        address = str(IPv4Address("10.0.0.0") + i + 10)
        records = records_of(address, device_id=f"flood-{i}")
        hear(browser, records, interface=WIFI, source=IPv4Address(address), now_s=1)
    found, _ = browser.take_changes(1)
    assert len(found) == PEERS_KEPT_LIMIT and found[0].device_id == OTHER
    browser.take_queries(1)
    assert changes_of(browser, 121.5)[0] == []
    assert browser._sightings == {} and browser._reported == {}


def test_one_source_has_four():
    browser = new_browser()
    for i in range(100):
        hear(browser, records_of(device_id=f"flood-{i}", port=2000 + i))
    assert len(browser.take_changes(0)[0]) == 4
    for i in range(100):  # and names without a description take no more
        hear(browser, records_of(device_id=f"name-{i}")[:1])
    assert len(browser._sightings) == 4


def test_names_without_a_description_make_room_soon():
    browser = new_browser()
    for i in range(1000):
        hear(browser, records_of(device_id=f"name-{i}")[:1], source=SOURCE + i % 40)
    hear(browser, records_of(), now_s=1, source=SOURCE + 50)
    assert changes_of(browser, 1) == ([], []) and len(browser._sightings) == PEERS_KEPT_LIMIT
    for _, query in browser.take_queries(1):
        assert len(encode_dns_message(query)) < 1500
    changes_of(browser, 10)
    hear(browser, records_of(), now_s=11)
    assert changes_of(browser, 11) == ([URL], [])


def test_long_names_fit_the_queries_about_them():
    browser = new_browser()
    host = ("h" * 63, "h" * 63, "h" * 63, "h" * 55)
    for i in range(200):
        instance = (f"{i:063}", *SERVICE_TYPE)
        records = [
            DnsRecord(SERVICE_TYPE, PtrData(instance), 100),
            DnsRecord(instance, SrvData((str(i), *host), 5), 100),
        ]
        hear(browser, [*records, DnsRecord(instance, TxtData(()), 100)], source=SOURCE + i % 50)
    asked = 0
    for _, query in browser.take_queries(1):
        encode_dns_message(query)
        asked += len(query.questions)
    assert asked == 2 + 2 * PEERS_KEPT_LIMIT


def test_many_addresses_and_long_lives_are_bounded():
    browser = new_browser()
    *records, address, _ = records_of()
    many = [dataclasses.replace(address, data=SOURCE + i, replaces=False) for i in range(50)]
    hear(browser, [dataclasses.replace(each, ttl_s=0xFFFFFFFF) for each in (*records, *many)])
    (sighting,) = browser._sightings.values()
    assert len(sighting.addresses) == 8
    assert changes_of(browser, 4499) == ([URL], []) and changes_of(browser, 4500) == ([], [OTHER])


def test_records_of_other_services_and_classes_are_ignored():
    browser = new_browser()
    other = ("a", "_http", "_tcp", "local")
    pointer, service, text, address, _ = records_of()
    hear(browser, [DnsRecord(other[1:], PtrData(other), 120), DnsRecord(other, SrvData(("h", "local"), 80), 120)])
    hear(browser, [DnsRecord(SERVICE_TYPE, PtrData(other), 120), DnsRecord(SERVICE_TYPE, PtrData(SERVICE_TYPE), 120)])
    hear(browser, [DnsRecord(SERVICE_TYPE, PtrData(("a", "b", *SERVICE_TYPE)), 120)])
    hear(browser, [dataclasses.replace(pointer, dns_class=3)])
    hear(browser, [service, text, address])  # nobody said that this instance exists
    assert browser._sightings == {}


def test_names_are_compared_ignoring_case():
    browser = new_browser()
    pointer, service, text, address, _ = records_of()

    def shout(each):
        return dataclasses.replace(each, name=tuple(label.upper() for label in each.name))

    hear(browser, [shout(pointer), shout(service), shout(text), shout(address)])
    assert changes_of(browser, 0) == ([URL], [])


def test_random_packets_break_nothing():
    rng = random.Random(5353)
    names = [SERVICE_TYPE, (OTHER, *SERVICE_TYPE), (OTHER, "local"), ("x", *SERVICE_TYPE), ()]
    browser, responder, now_s = new_browser(draw=rng.random), Responder(), 0.0
    responder.set_records(build_announcement(announce(device_id=ME), LAN.addresses), 0)
    for _ in range(5000):
        now_s += rng.random() * 3
        datas = [
            PtrData(rng.choice(names)),
            SrvData(rng.choice(names), rng.randrange(65536)),
            TxtData((rng.randbytes(5),)),
        ]
        datas += [IPv4Address(rng.choice(("192.168.1.9", "127.0.0.1"))), IPv6Address("fe80::9"), NsecData((), (1,))]
        records = [
            DnsRecord(rng.choice(names), rng.choice(datas), rng.choice((0, 1, 120, 2**32 - 1)), rng.random() < 0.5)
            for _ in range(rng.randrange(8))
        ]
        hear(browser, records, now_s=now_s, source=rng.choice((SOURCE, IPv6Address("fe80::9"))))
        questions = tuple(DnsQuestion(rng.choice(names), rng.choice((1, 12, 16, 28, 33, 255))) for _ in range(3))
        query = DnsMessage(questions=questions, answers=tuple(records))
        responder.receive(query, is_legacy=rng.random() < 0.5, now_s=now_s, delay_s=0.1)
        browser.take_changes(now_s)
        for message in (*responder.take_due(now_s), *(query for _, query in browser.take_queries(now_s))):
            parse_dns_message(encode_dns_message(message))
        assert min(browser.due_s(), responder.due_s()) > now_s


# The responder


OWN = build_announcement(announce(device_id=ME), LAN.addresses)
POINTER, SERVICE, TEXT, *ADDRESSES, ENUMERATION = OWN
INSTANCE, HOST = (ME, *SERVICE_TYPE), (ME, "local")


def new_responder(*, is_announced=True):
    responder = Responder()
    assert responder.set_records(OWN, 0.0) is None
    if is_announced:
        responder.take_due(0.0)
        responder.take_due(1.0)
    return responder


def ask(responder, *questions, now_s, known=(), is_legacy=False, unicast=False, message_id=0):
    questions = tuple(DnsQuestion(name, kind, unicast) for name, kind in questions)
    query = DnsMessage(id=message_id, questions=questions, answers=tuple(known))
    return responder.receive(query, is_legacy=is_legacy, now_s=now_s, delay_s=0.05)


def test_announced_twice_a_second_apart():
    responder = new_responder(is_announced=False)
    assert responder.due_s() == 0
    (first,) = responder.take_due(0)
    assert first.is_response and first.answers == OWN[:-1] and not first.additionals
    assert responder.due_s() == 1 and responder.take_due(0.99) == []
    assert responder.take_due(1) == [first] and responder.due_s() == float("inf")


def test_the_description_rides_in_the_answer():
    responder = new_responder()
    assert ask(responder, (SERVICE_TYPE, DnsType.PTR), now_s=10) is None
    assert responder.due_s() == 10.05 and responder.take_due(10) == []
    (answer,) = responder.take_due(10.05)
    assert answer.answers == (POINTER,) and set(answer.additionals) == {SERVICE, TEXT, *ADDRESSES}


def test_nothing_about_a_name_more_than_once_a_second():
    responder, said = new_responder(), []
    for tenth in range(100, 200):
        assert ask(responder, (SERVICE_TYPE, DnsType.PTR), (INSTANCE, DnsType.SRV), now_s=tenth / 10) is None
        for message in responder.take_due(tenth / 10):
            said += [(each.name, tenth / 10) for each in message.answers]
    for name in (SERVICE_TYPE, INSTANCE):
        times = [at for said_name, at in said if said_name == name]
        assert len(times) in (9, 10)
        assert all(later - earlier > 0.999 for earlier, later in itertools.pairwise(times))


def test_an_announcement_answers_what_waits():
    responder = new_responder(is_announced=False)
    responder.take_due(0)
    ask(responder, (SERVICE_TYPE, DnsType.PTR), now_s=0.5)
    assert len(responder.take_due(1)) == 1 and responder.due_s() == float("inf")


@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ((INSTANCE, DnsType.SRV), {SERVICE}),
        ((INSTANCE, DnsType.ANY), {SERVICE, TEXT}),
        ((HOST, DnsType.A), set(ADDRESSES[:1])),
        ((HOST, DnsType.AAAA), set(ADDRESSES[1:])),
        (((ME.lower(), "LOCAL"), DnsType.ANY), set(ADDRESSES)),
        ((SERVICE_ENUMERATION, DnsType.PTR), {ENUMERATION}),
        ((INSTANCE, DnsType.A), {DnsRecord(INSTANCE, NsecData(INSTANCE, (16, 33)), 120, True)}),
        ((HOST, DnsType.TXT), {DnsRecord(HOST, NsecData(HOST, (1, 28)), 120, True)}),
        ((SERVICE_TYPE, DnsType.TXT), set()),
        (((OTHER, "local"), DnsType.A), set()),
        ((("_http", "_tcp", "local"), DnsType.PTR), set()),
        (((), DnsType.ANY), set()),
    ],
)
def test_questions(question, answers):
    responder = new_responder()
    answer = ask(responder, question, now_s=10, unicast=True)
    assert set(answer.answers if answer else ()) == answers
    if question[0] == SERVICE_ENUMERATION:
        assert answer.additionals == ()  # no more than was asked
    assert responder.due_s() == float("inf")


def test_an_answer_to_one_asker_becomes_one_to_all_when_it_was_given_a_moment_ago():
    responder = new_responder()
    assert ask(responder, (INSTANCE, DnsType.SRV), now_s=10, unicast=True).answers == (SERVICE,)
    assert ask(responder, (INSTANCE, DnsType.SRV), now_s=10.2, unicast=True) is None
    assert responder.due_s() == 11 and responder.take_due(11)[0].answers == (SERVICE,)


def test_known_answers_are_not_repeated():
    responder = new_responder()
    for known, is_answered in ((POINTER, False), (dataclasses.replace(POINTER, ttl_s=59), True)):
        ask(responder, (SERVICE_TYPE, DnsType.PTR), now_s=20, known=[known])
        assert bool(responder.take_due(30)) is is_answered


def test_legacy_resolvers_get_what_they_understand():
    responder = new_responder()
    answer = ask(responder, (SERVICE_TYPE, DnsType.PTR), now_s=10, is_legacy=True, message_id=77)
    assert answer.id == 77 and answer.questions == (DnsQuestion(SERVICE_TYPE, DnsType.PTR),)
    records = (*answer.answers, *answer.additionals)
    assert all(each.ttl_s == 10 and not each.replaces for each in records) and len(records) == 3 + len(ADDRESSES)
    assert ask(responder, (SERVICE_TYPE, DnsType.PTR), now_s=10.5, is_legacy=True) is None  # it asks again
    assert responder.due_s() == float("inf")


def test_changes_are_announced_and_what_is_gone_says_goodbye():
    responder = new_responder()
    assert responder.set_records(OWN, 10) is None and responder.due_s() == float("inf")
    changed = build_announcement(announce(device_id=ME, models=("new",)), LAN.addresses[:1])
    goodbye = responder.set_records(changed, 10)
    assert goodbye.answers == tuple(dataclasses.replace(each, ttl_s=0) for each in ADDRESSES[1:])
    (news,) = responder.take_due(10)
    assert news.answers == changed[:-1]
    responder.set_records(OWN, 10.1)
    assert responder.due_s() == 11  # no more than once a second
    farewell = responder.set_records((), 20)
    assert [each.type for each in farewell.answers][:3] == [12, 33, 16] and {
        each.ttl_s for each in farewell.answers
    } == {0}
    assert responder.due_s() == float("inf") and ask(responder, (SERVICE_TYPE, DnsType.PTR), now_s=30) is None


# Interfaces


def test_the_interfaces_of_this_machine():
    found = probe_interfaces()
    loopback = [each for each in found if each.is_loopback]
    assert loopback and IPv4Address("127.0.0.1") in loopback[0].addresses
    assert len({each.name for each in found}) == len(found)
    if hasattr(socket, "if_nameindex"):
        assert {(each.index, each.name) for each in found} <= set(socket.if_nameindex())
    assert all(not each.is_loopback for each in choose_interfaces(found, None))
    assert choose_interfaces(found, [loopback[0].name]) == loopback[:1]
    assert choose_interfaces(found, ["none"]) == []


def test_interfaces_are_guessed_where_the_system_does_not_tell(monkeypatch):
    answers = [
        (socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("192.168.7.5", 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 0)),
        (socket.AF_INET6, socket.SOCK_DGRAM, 0, "", ("fe80::5%7", 0, 0, 7)),
        (socket.AF_INET6, socket.SOCK_DGRAM, 0, "", ("2001:db8::5", 0, 0, 0)),
    ]
    monkeypatch.setattr(dvai_bridge.os, "name", "nt")
    monkeypatch.setattr(dvai_bridge.socket, "getaddrinfo", lambda *_, **__: answers)
    found = probe_interfaces()
    assert [each.name for each in choose_interfaces(found, None)] == ["192.168.7.5", "fe80::5"]
    assert found[1].is_on_link(IPv4Address("192.168.7.200")) and not found[1].is_on_link(IPv4Address("192.168.8.1"))
    assert found[2].format_address(IPv6Address("fe80::9")) == "fe80::9%7"


def test_interfaces_without_ctypes(monkeypatch):
    dvai_bridge._load_getifaddrs.cache_clear()
    monkeypatch.setitem(sys.modules, "ctypes", None)
    monkeypatch.setattr(dvai_bridge.socket, "getaddrinfo", lambda *_, **__: [])
    assert [each.name for each in probe_interfaces()] == ["127.0.0.1"]


def test_the_port_is_shared_without_so_reuseport(monkeypatch):
    monkeypatch.delattr(dvai_bridge.socket, "SO_REUSEPORT", raising=False)
    with open_mdns_socket(LO, socket.AF_INET) as one, open_mdns_socket(LO, socket.AF_INET) as other:
        assert one.getsockname()[1] == other.getsockname()[1] == MDNS_PORT


# Sockets, on loopback


LO = next((each for each in probe_interfaces() if each.is_loopback), LOOPBACK)
NAMES = [LO.name]


class Recorder:
    """Peers as a discovery reports them."""

    def __init__(self):
        self.peers, self.lost = {}, []

    def found(self, peer):
        self.peers[peer.device_id] = peer

    def gone(self, peer):
        self.lost.append(peer.device_id)


@contextlib.asynccontextmanager
async def running(discovery):
    await discovery.start()
    try:
        yield discovery
    finally:
        await discovery.stop()


def new_discovery(recorder, device_id, *, port=38883, is_announced=True, backend="own", **options):
    return build_discovery(
        device_id=device_id,
        own_port=port,
        on_found=recorder.found if recorder else None,
        on_lost=recorder.gone if recorder else None,
        announcement=announce(device_id=device_id, port=port) if is_announced else None,
        interfaces=NAMES,
        backend=backend,
        **options,
    )


async def until(condition, what):
    deadline = asyncio.get_running_loop().time() + 30
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.01)


def random_id(name):
    return f"{name}-{random.SystemRandom().randrange(10**12)}"


def test_two_on_loopback():
    async def scenario():
        one, two = random_id("one"), random_id("two")
        first, second = Recorder(), Recorder()
        async with running(new_discovery(first, one)) as discovery:
            async with running(new_discovery(second, two, port=38884)) as other:
                await until(lambda: two in first.peers and one in second.peers, "they see each other")
                assert first.peers[two].base_url == "http://127.0.0.1:38884/v1"
                other.update(announce(device_id=two, port=38884, models=("new",)))
                await until(lambda: first.peers[two].loaded_models == ("new",), "the change is seen")
                assert discovery.describe() == [f"{LO.name}: multicast DNS"]
            await until(lambda: two in first.lost, "the goodbye is heard")
        assert one not in first.peers and two not in second.peers

    asyncio.run(scenario())


@pytest.mark.parametrize("backends", [("own", "zeroconf"), ("zeroconf", "own")], ids="-".join)
def test_zeroconf_on_loopback(backends):
    require("zeroconf")

    async def scenario():
        one, two = random_id("one"), random_id("two")
        first, second = Recorder(), Recorder()
        async with running(new_discovery(first, one, backend=backends[0])):
            async with running(new_discovery(second, two, port=38884, backend=backends[1])):
                await until(lambda: two in first.peers and one in second.peers, "they see each other")
            await until(lambda: two in first.lost, "the goodbye is heard")

    asyncio.run(scenario())


def test_a_callback_that_fails_breaks_nothing(caplog):
    async def scenario():
        one, two = random_id("one"), random_id("two")
        recorder, calls = Recorder(), []

        def fail(peer):
            calls.append(peer)
            raise RuntimeError("a mistake in the callback")

        recorder.found = fail
        async with running(new_discovery(recorder, one)), running(new_discovery(None, two, port=38884)) as other:
            await until(lambda: calls, "the first call")
            other.update(announce(device_id=two, port=38884, models=("new",)))
            await until(lambda: any(peer.loaded_models == ("new",) for peer in calls), "the next call")

    asyncio.run(scenario())
    assert "a mistake in the callback" in caplog.text


def send_to_group(sock, data):
    sock.sendto(data, ("224.0.0.251", MDNS_PORT))


def test_hostile_packets_are_dropped_and_a_flood_is_bounded():
    async def scenario():
        recorder, other = Recorder(), random_id("other")
        good = encode_dns_message(
            DnsMessage(flags=RESPONSE, answers=build_announcement(announce(device_id=other, port=9999), LO.addresses))
        )
        bad = [
            good[:20],
            b"",
            b"\0" * 12,
            b"\xff" * 9001,
            good[:2] + b"\xf8\0" + good[4:],
            good[:2] + b"\x84\3" + good[4:],
        ]
        async with running(new_discovery(recorder, ME, is_announced=False)) as discovery:
            link = discovery.links[LO.name]
            with open_mdns_socket(LO, socket.AF_INET) as sock:
                for data in bad:
                    send_to_group(sock, data)
                send_to_group(sock, good)
                await until(lambda: other in recorder.peers, "the good one is heard after the bad ones")
                assert link.traffic.dropped >= 3
                with open_mdns_socket(LO, socket.AF_INET, port=0) as stranger:  # RFC 6762 section 6: not from 5353
                    send_to_group(stranger, good.replace(other.encode(), b"x" * len(other)))
                before = link.traffic.dropped

                def flood():
                    for _ in range(64):
                        send_to_group(sock, b"\0" * 12)
                    return link.traffic.dropped >= before + PACKETS_PER_S_LIMIT

                await until(flood, "what is too much is dropped")
        assert "x" * len(other) not in recorder.peers

    asyncio.run(scenario())


def test_a_legacy_resolver_is_answered_alone():
    async def scenario():
        device_id = random_id("one")
        loop = asyncio.get_running_loop()
        query = encode_dns_message(DnsMessage(id=4711, questions=(DnsQuestion((device_id, "local"), DnsType.A),)))
        async with running(new_discovery(None, device_id)):
            with open_mdns_socket(LO, socket.AF_INET, port=0) as sock:
                async with asyncio.timeout(30):
                    while True:  # the name may have been answered a moment ago
                        send_to_group(sock, query)
                        with contextlib.suppress(TimeoutError):
                            answer = parse_dns_message(await asyncio.wait_for(loop.sock_recv(sock, 9000), 0.3))
                            break
        assert answer.id == 4711 and answer.answers == (DnsRecord((device_id, "local"), LO.addresses[0], 10),)

    asyncio.run(scenario())


def test_packets_from_elsewhere_are_not_heard():
    async def scenario():
        heard = []
        link = MdnsLink(LAN, lambda *packet: heard.append(packet[1]))
        for address in (("8.8.8.8", 5353), ("10.0.0.5", 5353), ("fe80::1%wlan0", 5353, 0, 4), ("::1", 5353, 0, 0)):
            link.receive(b"far", address, None)
        for address in (("192.168.1.200", 5353), ("fe80::1%eth0", 5353, 0, 3)):
            link.receive(b"near", address, None)
        assert heard == [b"near"] * 2 and len(link.traffic.speakers) == 2

    asyncio.run(scenario())


def test_a_port_that_another_keeps(monkeypatch):
    """As a responder without SO_REUSEADDR does; the real thing is tested between namespaces."""
    real = open_mdns_socket

    def refuse(interface, family, port=MDNS_PORT):
        if port:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        return real(interface, family, port)

    async def scenario():
        one, two = random_id("one"), random_id("two")
        recorder = Recorder()
        async with running(new_discovery(None, two, port=38884)):
            monkeypatch.setattr(dvai_bridge, "open_mdns_socket", refuse)
            async with running(new_discovery(recorder, one)) as discovery:
                assert "cannot announce" in discovery.describe()[0]
                await until(lambda: two in recorder.peers, "it asks and is answered")

    asyncio.run(scenario())


def test_without_a_network_it_waits_for_one(monkeypatch):
    async def scenario():
        monkeypatch.setattr(dvai_bridge, "INTERFACES_LOOK_S", 0.02)
        interfaces = []
        monkeypatch.setattr(dvai_bridge, "probe_interfaces", lambda: list(interfaces))
        recorder, two = Recorder(), random_id("two")
        async with running(new_discovery(recorder, ME)) as discovery:
            assert discovery.describe() == []
            interfaces.append(LO)
            async with running(new_discovery(None, two, port=38884)):
                await until(lambda: two in recorder.peers, "the interface is noticed")
                interfaces.clear()
                await until(lambda: two in recorder.lost, "and that it went")

    asyncio.run(scenario())


def test_which_backend(monkeypatch):
    def kind(backend):
        return type(build_discovery(device_id=ME, on_found=None, on_lost=None, backend=backend)).__name__

    assert (kind("auto"), kind("own"), kind("zeroconf")) == ("MdnsDiscovery", "MdnsDiscovery", "ZeroconfDiscovery")
    monkeypatch.setattr(dvai_bridge.os, "name", "nt")
    monkeypatch.setattr(dvai_bridge, "_has_zeroconf", lambda: True)
    assert kind("auto") == "ZeroconfDiscovery"
    monkeypatch.setattr(dvai_bridge, "_has_zeroconf", lambda: False)
    assert kind("auto") == "MdnsDiscovery"


def test_zeroconf_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "zeroconf", None)
    with pytest.raises(UsageError, match="pip install zeroconf"):
        asyncio.run(build_discovery(device_id=ME, on_found=None, on_lost=None, backend="zeroconf").start())


def test_stopping_what_never_started():
    asyncio.run(MdnsDiscovery(device_id=ME, on_found=None, on_lost=None).stop())


# Diagnosis


def seen(**changes):
    usual = {"name": "eth0", "addresses": ("192.168.1.2",), "is_open": True, "is_shared": True, "sent": 4, "failed": 0}
    usual |= {"received": 2, "own_copies": 4, "dropped": 0, "speakers": ("192.168.1.9",), "peers": (), "error": None}
    return InterfaceDiagnosis(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peers": ("x at y",)}, []),
        ({}, ["no bridge announces itself"]),
        ({"speakers": (), "received": 0}, ["AP isolation"]),
        ({"own_copies": 0, "speakers": ()}, ["firewall on this machine"]),
        ({"own_copies": 0, "failed": 4, "error": "IPv4: Network is unreachable"}, ["route for multicast on eth0?"]),
        ({"own_copies": 0, "failed": 1, "error": "IPv6: not assigned"}, ["1 of 4 packets", "firewall on this machine"]),
        ({"is_shared": False, "own_copies": 0}, ["keeps UDP port 5353 to itself"]),
        ({"is_open": False, "error": "Operation not permitted"}, ["no socket"]),
        (
            {"failed": 2, "error": "IPv6: no", "speakers": ()},
            ["2 of 4 packets could not be sent, IPv6", "AP isolation"],
        ),
    ],
)
def test_probable_causes(changes, words):
    causes = explain_interface(seen(**changes))
    assert len(causes) == len(words) and all(word in cause for word, cause in zip(words, causes, strict=True))


def test_causes_of_the_whole_machine():
    assert "no network interface" in explain_machine([], False)[0]
    assert "container" in explain_machine([seen()], True)[0]
    assert explain_machine([seen()], False) == explain_machine([seen(peers=("x",))], True) == ()


def test_the_diagnosis_is_readable():
    diagnosis = DiscoveryDiagnosis(duration_s=5.0, interfaces=(seen(causes=("why",), dropped=1),), causes=("all",))
    assert format_diagnosis(diagnosis) == (
        "asked for 5 s by multicast DNS\n\neth0  192.168.1.2\n"
        "  packets   4 sent, 4 of them came back, 2 from others, 1 of these unusable\n"
        "  speakers  192.168.1.9\n  problem   why\n\nproblem: all"
    )
    document = build_diagnosis_json(diagnosis)
    assert json.loads(json.dumps(document)) == document and document["interfaces"][0]["ownCopies"] == 4


def test_diagnosis_on_loopback():
    async def scenario():
        device_id = random_id("one")
        async with running(new_discovery(None, device_id)):
            async with asyncio.timeout(60):
                while True:
                    (link,) = (await dvai_bridge.diagnose_discovery(1, NAMES)).interfaces
                    if "Büro at http://127.0.0.1:38883/v1" in link.peers:
                        break
        assert link.own_copies > 0 and link.is_shared

    asyncio.run(scenario())
