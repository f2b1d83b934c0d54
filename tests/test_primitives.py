"""Section Primitives: the RFCs' vectors with both backends, what both refuse, and one against the other."""

import hmac
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support import MODULE, require

import dvai_bridge
from dvai_bridge import (
    AEAD_TAG_BYTES,
    CryptoError,
    CryptographyBackend,
    DecryptionError,
    KeyRefusedError,
    OwnBackend,
    build_key_pair,
    build_provider_address,
    choose_crypto_backend,
    compute_hkdf,
    compute_hkdf_expand,
    compute_relay_proof,
    compute_x25519,
    compute_x25519_public,
    derive_relay_proof_key,
    derive_x25519_private,
    encode_base64url,
    find_x25519_fault,
    parse_base64url,
    probe_crypto_backend,
    verify_public_key,
)

FOLDER = Path(__file__).parent / "vectors"
RFC = json.loads((FOLDER / "rfc-primitives.json").read_text("utf-8"))
KNOWN = json.loads((FOLDER / "dvai-known-answers.json").read_text("utf-8"))
unhex = bytes.fromhex

PRIME = 2**255 - 19
TOP_BIT = 2**255
ORDER_8 = (
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
)
LOW_ORDER = (0, 1, PRIME - 1, *ORDER_8)
LOW_ORDER_OTHERWISE_SPELT = (PRIME, PRIME + 1, *(u | TOP_BIT for u in (*LOW_ORDER, PRIME, PRIME + 1)))


def encode_u(u):
    return u.to_bytes(32, "little")


def by_section(case):
    return case.get("section") or str(case.get("case", "-"))


# ---- the vectors ----------------------------------------------------------------------


@pytest.mark.parametrize("case", RFC["x25519"]["multiply"], ids=["1", "2"])
def test_x25519(case, crypto_backend):
    assert crypto_backend.x25519(unhex(case["scalar"]), unhex(case["u"])).hex() == case["result"]


@pytest.mark.parametrize("count", RFC["x25519"]["iterated"])
def test_x25519_iterated(count, crypto_backend):
    scalar = u = encode_u(9)
    for _ in range(int(count)):
        scalar, u = crypto_backend.x25519(scalar, u), scalar
    assert scalar.hex() == RFC["x25519"]["iterated"][count]


def test_x25519_agreement(crypto_backend):
    case = {name: unhex(text) for name, text in RFC["x25519"]["agreement"].items()}
    alice = build_key_pair(case["alicePrivate"], crypto_backend)
    bob = build_key_pair(case["bobPrivate"], crypto_backend)
    assert (alice.public, bob.public) == (case["alicePublic"], case["bobPublic"])
    assert crypto_backend.x25519(alice.private, bob.public) == case["shared"]
    assert crypto_backend.x25519(bob.private, alice.public) == case["shared"]


@pytest.mark.parametrize("case", RFC["chacha20Block"], ids=by_section)
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17])
def test_chacha20_block(case, n):
    """A block is the same wherever it stands among those computed with it."""
    for first in {max(0, case["counter"] - n + 1), case["counter"]}:
        stream = dvai_bridge._generate_chacha20(unhex(case["key"]), first, unhex(case["nonce"]), n)
        start = 64 * (case["counter"] - first)
        assert stream[start : start + 64].hex() == case["block"]
        assert len(stream) == 64 * n


@pytest.mark.parametrize("case", RFC["chacha20"], ids=by_section)
def test_chacha20(case):
    plaintext = unhex(case["plaintext"])
    blocks = -(-len(plaintext) // 64)
    stream = dvai_bridge._generate_chacha20(unhex(case["key"]), case["counter"], unhex(case["nonce"]), blocks)
    assert dvai_bridge._xor(plaintext, stream[: len(plaintext)]).hex() == case["ciphertext"]


@pytest.mark.parametrize("case", RFC["poly1305"], ids=by_section)
def test_poly1305(case):
    assert dvai_bridge._compute_poly1305(unhex(case["key"]), unhex(case["message"])).hex() == case["tag"]


@pytest.mark.parametrize("length", [*range(500, 530), 16 * 64, 16 * 64 + 1, 16_400])
def test_poly1305_of_many_blocks(length):
    """Groups of blocks are summed at once: as block by block, which section 2.5 of the RFC describes."""
    key, message = random.Random(length).randbytes(32), random.Random(length + 1).randbytes(length)
    r, total = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF, 0
    for start in range(0, length, 16):
        total = (total + int.from_bytes(message[start : start + 16] + b"\1", "little")) * r % (2**130 - 5)
    tag = (total + int.from_bytes(key[16:], "little")) % 2**128
    assert dvai_bridge._compute_poly1305(key, message) == tag.to_bytes(16, "little")


@pytest.mark.parametrize("case", RFC["poly1305KeyGeneration"], ids=by_section)
def test_poly1305_key_generation(case):
    key, stream = OwnBackend().aead(unhex(case["key"]))._generate(unhex(case["nonce"]), 0)
    assert (key.hex(), stream) == (case["result"], b"")


@pytest.mark.parametrize("case", RFC["aead"], ids=by_section)
def test_aead(case, crypto_backend):
    aead = crypto_backend.aead(unhex(case["key"]))
    nonce, plaintext, data = (unhex(case[name]) for name in ("nonce", "plaintext", "associatedData"))
    sealed = unhex(case["ciphertext"] + case["tag"])
    assert aead.encrypt(nonce, plaintext, data) == sealed
    assert aead.decrypt(nonce, sealed, data) == plaintext


@pytest.mark.parametrize("case", RFC["hkdf"], ids=by_section)
def test_hkdf(case):
    key_material, salt, info, prk = (unhex(case[name]) for name in ("ikm", "salt", "info", "prk"))
    assert compute_hkdf(salt, key_material, info, case["length"]).hex() == case["okm"]
    assert compute_hkdf_expand(prk, info, case["length"]).hex() == case["okm"]


@pytest.mark.parametrize("case", RFC["hmac"], ids=by_section)
def test_hmac_of_the_standard_library(case):
    mac = hmac.digest(unhex(case["key"]), unhex(case["data"]), "sha256").hex()
    assert mac[: len(case["mac"])] == case["mac"]


def test_vectors_are_all_there():
    """Case 5 of RFC 4231 is a truncated one; the RFC's iterated vector of a million takes hours in Python."""
    counts = {name: len(cases) for name, cases in RFC.items() if name != "about"}
    assert counts == {
        "x25519": 3,
        "chacha20Block": 6,
        "chacha20": 4,
        "poly1305": 12,
        "poly1305KeyGeneration": 4,
        "aead": 2,
        "hkdf": 3,
        "hmac": 7,
    }


def test_known_answer_of_the_seed(crypto_backend):
    case = KNOWN["seededIdentity"]
    pair = build_key_pair(derive_x25519_private(unhex(case["seed"])), crypto_backend)
    assert (pair.private.hex(), pair.public.hex()) == (case["secret"], case["publicKeyHex"])
    assert encode_base64url(pair.public) == case["publicKey"]


def test_known_answer_of_the_relay_proof(crypto_backend):
    case = KNOWN["relayProof"]
    relay = build_key_pair(unhex(case["relayEphemeralSecret"]), crypto_backend)
    provider = build_key_pair(unhex(case["providerSecret"]), crypto_backend)
    assert encode_base64url(relay.public) == case["relayEphemeralPubKey"]
    assert encode_base64url(provider.public) == case["providerPublicKey"]
    address = build_provider_address(provider.public)
    assert address.hex() == case["address"]
    for mine, theirs in ((relay, provider), (provider, relay)):
        shared = crypto_backend.x25519(mine.private, theirs.public)
        key = derive_relay_proof_key(shared, relay.public, provider.public, case["relayHostPort"])
        assert key.hex() == case["key"]
        assert encode_base64url(compute_relay_proof(key, parse_base64url(case["nonce"]), address)) == case["mac"]


# ---- what both refuse -----------------------------------------------------------------


@pytest.mark.parametrize("u", (*LOW_ORDER, *LOW_ORDER_OTHERWISE_SPELT), ids=hex)
def test_low_order_keys_are_refused(u, crypto_backend):
    for private in (bytes(32), bytes([0xFF] * 32), bytes(range(32))):
        with pytest.raises(KeyRefusedError):
            crypto_backend.x25519(private, encode_u(u))
        with pytest.raises(ValueError):
            compute_x25519(private, encode_u(u))
    with pytest.raises(KeyRefusedError):
        verify_public_key(encode_u(u))


def find_roots(b, c):
    """Every x with x² + bx + c = 0 in the field; a square root as in RFC 8032 section 5.1.3."""
    square = (b * b - 4 * c) % PRIME
    root = pow(square, (PRIME + 3) // 8, PRIME)
    if root * root % PRIME != square:
        root = root * pow(2, (PRIME - 1) // 4, PRIME) % PRIME
    if root * root % PRIME != square:
        return set()
    return {(sign * root - b) * pow(2, -1, PRIME) % PRIME for sign in (1, -1)}


def find_halves(u):
    """Every x whose double is u, that is (x² - 1)² = 4u(x³ + Ax² + x); divided by x², a square in w = x + 1/x."""
    a = 486662
    if u == 0:
        return {1, PRIME - 1}
    return set().union(*(find_roots(-w, 1) for w in find_roots(-4 * u, -4 * (u * a + 1))))


def test_these_are_all_of_low_order():
    """Orders on the curve and its twist that are small divide 8: three doublings, backwards from infinity."""
    order_2 = {0} | find_roots(486662, 1)
    order_4 = set().union(*map(find_halves, order_2))
    order_8 = set().union(*map(find_halves, order_4))
    assert (order_2, order_4, order_8) == ({0}, {1, PRIME - 1}, set(ORDER_8))
    assert set().union(*map(find_halves, order_8)) == set()
    assert set(dvai_bridge._LOW_ORDER_25519) == set(LOW_ORDER)


@pytest.mark.parametrize("u", [*range(PRIME, TOP_BIT), 9 | TOP_BIT, PRIME + 9 | TOP_BIT, 2**256 - 1], ids=hex)
def test_other_spellings_of_a_key_are_refused(u):
    with pytest.raises(KeyRefusedError, match="not in canonical form"):
        verify_public_key(encode_u(u))


@pytest.mark.parametrize("u", [*range(PRIME + 2, TOP_BIT), 9 | TOP_BIT, 2**256 - 1], ids=hex)
def test_other_spellings_mean_the_same_to_both(u, crypto_backend):
    """The arithmetic takes them, as RFC 7748 asks; the channel's keys must be canonical."""
    private = bytes(range(32))
    assert crypto_backend.x25519(private, encode_u(u)) == compute_x25519(private, encode_u(u % TOP_BIT % PRIME))


def test_a_sound_key_has_no_fault():
    assert find_x25519_fault(encode_u(9)) is None
    verify_public_key(encode_u(PRIME - 2))
    assert find_x25519_fault(encode_u(PRIME)) == "not in canonical form"
    assert find_x25519_fault(encode_u(1)) == "of low order"
    assert find_x25519_fault(bytes(31)) == "not 32 bytes"


@pytest.mark.parametrize("length", [0, 1, 31, 33, 64])
def test_wrong_lengths_are_the_callers_mistake(length, crypto_backend):
    wrong, right = bytes([9] * length), bytes([9] * 32)
    for call in (
        lambda: crypto_backend.x25519(wrong, right),
        lambda: crypto_backend.x25519(right, wrong),
        lambda: crypto_backend.x25519_public(wrong),
        lambda: crypto_backend.aead(wrong),
        lambda: crypto_backend.aead(right).encrypt(wrong, b"", b""),
        lambda: crypto_backend.aead(right).decrypt(wrong, bytes(16), b""),
        lambda: compute_x25519(right, wrong),
        lambda: compute_x25519_public(wrong),
        lambda: derive_x25519_private(wrong),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(KeyRefusedError):
        verify_public_key(wrong)


def test_hkdf_has_an_end():
    assert len(compute_hkdf(b"", b"", b"", 8160)) == 8160
    assert compute_hkdf(b"", b"", b"", 0) == b""
    for length in (8161, -1):
        with pytest.raises(ValueError):
            compute_hkdf(b"", b"", b"", length)


def test_a_flipped_bit_is_noticed(crypto_backend):
    aead, nonce = crypto_backend.aead(bytes(range(32))), bytes(range(12))
    sealed = aead.encrypt(nonce, b"twenty bytes of text", b"associated")
    for index in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[index // 8] ^= 1 << index % 8
        with pytest.raises(DecryptionError):
            aead.decrypt(nonce, bytes(changed), b"associated")
    for data in (b"", b"associatee", b"associated\0"):
        with pytest.raises(DecryptionError):
            aead.decrypt(nonce, sealed, data)
    with pytest.raises(DecryptionError):
        aead.decrypt(bytes(12), sealed, b"associated")
    with pytest.raises(DecryptionError):
        crypto_backend.aead(bytes(32)).decrypt(nonce, sealed, b"associated")


@pytest.mark.parametrize("length", range(AEAD_TAG_BYTES))
def test_less_than_a_tag_is_no_message(length, crypto_backend):
    with pytest.raises(DecryptionError):
        crypto_backend.aead(bytes(32)).decrypt(bytes(12), bytes(length), b"")


def test_errors_say_nothing_of_the_cause():
    assert issubclass(DecryptionError, CryptoError) and issubclass(KeyRefusedError, CryptoError)
    assert str(DecryptionError()) == "a message of the secure channel was changed or forged"


# ---- one against the other ------------------------------------------------------------


def test_ours_against_cryptography():
    require("cryptography")
    ours, theirs = OwnBackend(), CryptographyBackend()
    chance = random.Random(20260921)
    for _ in range(60):
        private, point = chance.randbytes(32), chance.randbytes(32)
        assert ours.x25519_public(private) == theirs.x25519_public(private)
        assert ours.x25519(private, point) == theirs.x25519(private, point)
    lengths = [*range(70), *(chance.randrange(20_000) for _ in range(40)), 64 * 15, 64 * 16 - 1, 64 * 16, 65_519]
    for length in lengths:
        key, nonce, text = chance.randbytes(32), chance.randbytes(12), chance.randbytes(length)
        data = chance.randbytes(chance.randrange(70))
        sealed = ours.aead(key).encrypt(nonce, text, data)
        assert sealed == theirs.aead(key).encrypt(nonce, text, data)
        assert ours.aead(key).decrypt(nonce, sealed, data) == text
        assert theirs.aead(key).decrypt(nonce, sealed, data) == text


def test_edges_against_cryptography():
    """Words and halves that are all ones or zeros, where carries go furthest."""
    require("cryptography")
    from cryptography.hazmat.primitives.poly1305 import Poly1305

    chance = random.Random(8439)
    pieces = [bytes(16), b"\xff" * 16, b"\xfb" + b"\xff" * 15, b"\xfa" + b"\xff" * 15, b"\1" + bytes(15)]
    for _ in range(300):
        key = chance.choice(pieces) + chance.choice(pieces)
        count, rest = chance.choice([0, 1, 2, 31, 32, 33, 64, 65, 70]), chance.choice([0, 1, 15])
        message = b"".join(chance.choices(pieces, k=count)) + b"\xff" * rest
        assert dvai_bridge._compute_poly1305(key, message) == Poly1305.generate_tag(key, message)
    ours, theirs = OwnBackend(), CryptographyBackend()
    for u in [*range(2, 20), *range(PRIME - 20, PRIME - 1), *(1 << n for n in range(1, 255, 17))]:
        for private in (bytes(32), b"\xff" * 32):
            assert ours.x25519(private, encode_u(u)) == theirs.x25519(private, encode_u(u))


def test_hkdf_against_cryptography():
    require("cryptography")
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

    chance = random.Random(5869)
    for _ in range(50):
        salt, key, info = (chance.randbytes(chance.randrange(100)) for _ in range(3))
        length = chance.randrange(1, 300)
        assert compute_hkdf(salt, key, info, length) == HKDF(SHA256(), length, salt, info).derive(key)
        assert compute_hkdf_expand(key, info, length) == HKDFExpand(SHA256(), length, info).derive(key)


# ---- which one is used ----------------------------------------------------------------


def test_cryptography_is_used_where_it_works():
    require("cryptography")
    backend, obstacle = probe_crypto_backend()
    assert (backend.name, obstacle) == ("cryptography", None)


def test_ours_is_used_without_it_and_says_so_once():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['cryptography'] = None\n"
        "import dvai_bridge as b, logging; logging.basicConfig(format='%(message)s')\n"
        "assert b.choose_crypto_backend().name == 'own' and b.choose_crypto_backend() is b.choose_crypto_backend()\n"
    )
    command = [sys.executable, "-c", program, str(MODULE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == (
        "the package cryptography is not installed: our own X25519 and ChaCha20-Poly1305 are used, which are not "
        "constant-time; mend it with: pip install cryptography\n"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("raise ImportError('libssl.so.9 is missing')", "cannot be imported: libssl.so.9 is missing"),
        ("raise RuntimeError('no such algorithm')", "does not work: RuntimeError: no such algorithm"),
    ],
)
def test_a_broken_cryptography_is_said(content, says, tmp_path, monkeypatch, caplog):
    (tmp_path / "cryptography").mkdir()
    (tmp_path / "cryptography" / "__init__.py").write_text(content)
    for name in [each for each in sys.modules if each.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING, "dvai_bridge.crypto"):
        assert choose_crypto_backend.__wrapped__().name == "own"
    assert says in caplog.text and "not constant-time" in caplog.text


def test_importing_the_bridge_does_not_import_it():
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dvai_bridge\n"
        "assert not any(name.startswith('cryptography') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(MODULE.parent)], check=True)


def test_a_key_pair_does_not_show_its_secret():
    pair = build_key_pair(bytes(range(32)), OwnBackend())
    assert repr(pair.private) not in repr(pair) and pair.private.hex() not in repr(pair)
    assert repr(pair).startswith("KeyPair(public=")


def test_the_shared_block_stands_alone():
    """rendezvous_server.py carries the same text: it must run with nothing but the standard library around it."""
    source = MODULE.read_text("utf-8")
    begin = "# -- begin: shared with rendezvous_server.py: X25519 and HKDF --\n"
    block = source.partition(begin)[2].partition("# -- end: shared with rendezvous_server.py: X25519 and HKDF --")[0]
    names = {"hmac": hmac}
    exec(block, names)
    case = RFC["x25519"]["agreement"]
    assert names["compute_x25519"](unhex(case["alicePrivate"]), unhex(case["bobPublic"])).hex() == case["shared"]
    assert names["compute_x25519_public"](unhex(case["alicePrivate"])).hex() == case["alicePublic"]
    assert names["find_x25519_fault"](bytes(32)) == "of low order"
    case = RFC["hkdf"][0]
    okm = names["compute_hkdf"](unhex(case["salt"]), unhex(case["ikm"]), unhex(case["info"]), case["length"])
    assert okm.hex() == case["okm"]
