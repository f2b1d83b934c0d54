"""GGUF: sound files read back whole; hostile headers are refused, with little work and little memory."""

from __future__ import annotations

import itertools
import math
import os
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_writer as w
import pytest

import dvai_bridge as d
from dvai_bridge import GgmlType, ModelFileError, open_gguf, parse_gguf_header, summarize_gguf
from tests.support import require

MIB = 1 << 20

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Größe ✓",
    "general.file_type": 7,
    "llama.context_length": 2048,
    "test.u8": w.Typed(w.U8, 255),
    "test.i8": w.Typed(w.I8, -128),
    "test.u16": w.Typed(w.U16, 65535),
    "test.i16": w.Typed(w.I16, -32768),
    "test.i32": -5,
    "test.u64": w.Typed(w.U64, 2**64 - 1),
    "test.i64": w.Typed(w.I64, -(2**63)),
    "test.f32": 0.5,
    "test.f64": w.Typed(w.F64, 0.1),
    "test.bool": True,
    "test.texts": ["", "a", "é", "x" * 300],
    "test.empty": w.Array(w.TEXT, []),
    "test.floats": [0.5, -1.5],
    "test.bools": [True, False],
    "test.i64s": w.Array(w.I64, [-1, 2**62]),
}
TENSORS: list[w.Tensor] = [
    ("token_embd.weight", (64, 3), GgmlType.Q8_0, bytes(range(204))),
    ("output_norm.weight", (64,), GgmlType.F32, struct.pack("<64f", *range(64))),
]


def plain(value: Any) -> Any:
    """The Python value that was written."""
    if isinstance(value, (w.Typed,)):
        return value.value
    if isinstance(value, w.Array):
        return list(value.values)
    return value


def test_every_value_type_reads_back() -> None:
    gguf = open_gguf(w.build_gguf(METADATA, TENSORS))
    for key, value in METADATA.items():
        found = gguf.metadata[key]
        assert (list(found) if isinstance(plain(value), list) else found) == plain(value), key
    assert gguf.metadata["test.texts"][-1] == "x" * 300
    assert gguf.metadata["test.texts"][1:3] == ["a", "é"]
    assert gguf.metadata["test.texts"].index("é") == 2
    with pytest.raises(IndexError):
        gguf.metadata["test.texts"][4]


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_tensors_are_found_at_absolute_offsets(alignment: int) -> None:
    data = w.build_gguf({"general.alignment": alignment}, TENSORS)
    gguf = open_gguf(data)
    for name, shape, kind, stored in TENSORS:
        tensor = gguf.tensors[name]
        assert (tensor.shape, tensor.type, tensor.size_bytes) == (shape, kind, len(stored))
        assert tensor.offset % alignment == 0
        assert data[tensor.offset : tensor.offset + tensor.size_bytes] == stored
        assert bytes(gguf.tensor_data(name)) == stored


def test_text_that_is_not_utf8_keeps_its_bytes_in_arrays() -> None:
    raw = struct.pack("<Q", 2) + b"\xff\xe2"
    text = open_gguf(w.build_gguf({"test.texts": w.Array(w.TEXT, raw, length=1)})).metadata["test.texts"][0]
    assert text.encode("utf-8", "surrogateescape") == b"\xff\xe2"
    assert open_gguf(w.build_gguf({"general.name": b"a\xff"})).metadata["general.name"] == "a\ufffd"


@pytest.mark.parametrize("mapping", ["mmap", "no mmap module", "mmap fails"])
def test_a_path_is_read_with_and_without_mmap(mapping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(w.build_gguf(METADATA, TENSORS))
    if mapping == "no mmap module":
        monkeypatch.setitem(sys.modules, "mmap", None)
    elif mapping == "mmap fails":
        import mmap

        monkeypatch.setattr(mmap, "mmap", lambda *a, **k: (_ for _ in ()).throw(OSError("no mapping here")))
    with open_gguf(path) as gguf:
        views = {name: gguf.tensor_data(name) for name, *_ in TENSORS}
        assert (gguf._view is not None) == (mapping == "mmap")
    assert all(bytes(views[name]) == stored for name, _, _, stored in TENSORS)  # views outlive close()
    with pytest.raises(ValueError, match="closed"):
        gguf.tensor_data("output_norm.weight")


def test_a_header_larger_than_the_first_read(tmp_path: Path) -> None:
    texts = [f"token {n}" for n in range(150_000)]  # 2.4 MiB
    path = tmp_path / "model.gguf"
    path.write_bytes(w.build_gguf({"tokenizer.ggml.tokens": texts}, TENSORS))
    with open_gguf(path) as gguf:
        assert list(gguf.metadata["tokenizer.ggml.tokens"]) == texts
        assert bytes(gguf.tensor_data("token_embd.weight")) == TENSORS[0][3]


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_cut_short_while_in_use(mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    large = ("large.weight", (100_000,), GgmlType.F32, bytes(400_000))
    path.write_bytes(w.build_gguf(METADATA, [*TENSORS, large]))
    if not mapped:
        monkeypatch.setitem(sys.modules, "mmap", None)
    with open_gguf(path) as gguf:
        assert gguf.tensor_data("token_embd.weight")
        os.truncate(path, path.stat().st_size - 100)
        with pytest.raises(ModelFileError, match=r"'large\.weight': the file was cut short"):
            gguf.tensor_data("large.weight")


def test_a_missing_tensor_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'rope_freqs'.*missing"):
        open_gguf(w.build_gguf({})).tensor_data("rope_freqs")
    with pytest.raises(ModelFileError, match="check the path"):
        open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelFileError):
        open_gguf(tmp_path)


def test_a_summary_names_the_model() -> None:
    summary = summarize_gguf(open_gguf(w.build_gguf(METADATA, TENSORS)))
    assert (summary.architecture, summary.name, summary.quantization) == ("llama", "Größe ✓", "Q8_0")
    assert (summary.parameter_count, summary.context_length, summary.kind) == (256, 2048, "model")


def test_a_summary_of_a_file_that_says_nothing() -> None:
    data = w.build_gguf({}, TENSORS)
    summary = summarize_gguf(parse_gguf_header(data, len(data)))
    assert (summary.architecture, summary.quantization, summary.context_length) == ("unknown", "Q8_0", None)
    assert summary.size_bytes == len(data)


def test_metadata_numbers_are_ranged() -> None:
    metadata = {"n": 4, "x": 1e-5, "flag": True, "nan": math.nan, "texts": ["a"]}
    assert d.get_metadata_int(metadata, "n") == 4
    assert d.get_metadata_int(metadata, "absent", default=7) == 7
    assert d.get_metadata_float(metadata, "x", low=0, high=1) == 1e-5
    for key, high in (("n", 3), ("absent", 9), ("flag", 9), ("texts", 9), ("x", 9)):
        with pytest.raises(ModelFileError, match=key):
            d.get_metadata_int(metadata, key, high=high)
    for key in ("nan", "absent", "texts", "flag", "n"):
        with pytest.raises(ModelFileError, match=key):
            d.get_metadata_float(metadata, key, low=0, high=1)


# ---- Hostile headers


def entry(name: str | bytes = "t", shape: Any = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return w.encode_tensor_entry(name, shape, kind, offset)


def with_tensors(*entries: bytes, data_bytes: int = 4096, keys: bytes = b"", n_keys: int = 0) -> bytes:
    head = w.encode_header(len(entries), n_keys) + keys + b"".join(entries)
    return head + bytes(-len(head) % 32 + data_bytes)


def with_key(key: bytes, value: bytes) -> bytes:
    return w.encode_header(0, 1) + struct.pack("<Q", len(key)) + key + value + bytes(256)


def with_value(key: str, value: Any) -> bytes:
    return w.build_gguf({key: value}) + bytes(256)


def alignment_of(value: Any) -> bytes:
    return w.build_gguf({"general.alignment": 32}).replace(struct.pack("<II", w.U32, 32), w.encode_value(value))


def array_head(kind: int, length: int) -> bytes:
    return struct.pack("<IIQ", w.ARRAY, kind, length)


HUGE = (2**63 - 1, 2**63, 2**64 - 1)

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic"),
    "text": (b"<!DOCTYPE html><html>", "not a GGUF model file"),
    "half a magic": (b"GG", "past the end"),
    "zip": (b"PK\x03\x04" + bytes(64), "not a GGUF model file"),
    "version 0": (w.encode_header(0, 0, version=0), "version 0"),
    "version 1": (w.encode_header(0, 0, version=1), "version 1 is not supported; use a current file"),
    "version 4": (w.encode_header(0, 0, version=4), "update the bridge"),
    "big-endian 3": (w.encode_header(0, 0, version=3 << 24), "little-endian file"),
    "big-endian 1": (w.encode_header(0, 0, version=1 << 24), "little-endian file"),
    **{f"{n} tensors": (w.encode_header(0, 0)[:8] + struct.pack("<QQ", n, 0), "tensors") for n in HUGE},
    **{f"{n} keys": (w.encode_header(0, 0)[:8] + struct.pack("<QQ", 0, n), "metadata keys") for n in HUGE},
    "4,000 keys, no bytes": (w.encode_header(0, 4000), "past the end"),
    "16,000 tensors, no bytes": (w.encode_header(16_000, 0), "past the end"),
    **{f"key of {n} bytes": (w.encode_header(0, 1) + struct.pack("<Q", n), "past the end") for n in HUGE},
    "key of 70,000 bytes": (with_key(b"k" * 70_000, w.encode_value(1)), "at most 65535"),
    "empty key": (with_key(b"", w.encode_value(1)), "empty"),
    "key not UTF-8": (with_key(b"a\xff", w.encode_value(1)), "UTF-8"),
    "key twice": (w.encode_header(0, 2) + 2 * (w.encode_text("k") + w.encode_value(1)), "'k': given twice"),
    "key shown escaped": (
        with_key(b"a\n\xe2\x80\xae" + b"x" * 100, struct.pack("<I", 99)),
        r"'a\\n\\u202ex{50,58}\.\.\.'",
    ),
    "value type 13": (with_key(b"k", struct.pack("<I", 13)), "unknown value type 13"),
    "value type 2^32-1": (with_key(b"k", b"\xff\xff\xff\xff"), "unknown value type"),
    **{f"text of {n} bytes": (with_key(b"k", struct.pack("<IQ", w.TEXT, n)), "past the end") for n in HUGE},
    "element type 77": (with_key(b"k", array_head(77, 1)), "unknown element type 77"),
    "array of arrays": (with_key(b"k", array_head(w.ARRAY, 1) * 50), "array of arrays"),
    **{f"{n} texts": (with_key(b"k", array_head(w.TEXT, n)), "past the end") for n in (40, 1000)},
    **{f"{n} texts": (with_key(b"k", array_head(w.TEXT, n)), "more than 1048576") for n in HUGE},
    **{f"{n} floats": (with_key(b"k", array_head(w.F32, n)), "past the end") for n in (100, *HUGE)},
    **{f"{n} bytes": (with_key(b"k", array_head(w.U8, n)), "past the end") for n in (1000, *HUGE)},
    **{
        f"second text of {n} bytes": (
            with_key(b"k", array_head(w.TEXT, 3) + w.encode_text("a") + struct.pack("<Q", n)),
            "past the end|out of range",
        )
        for n in (1000, *HUGE)
    },
    **{f"alignment {n}": (alignment_of(w.Typed(w.U32, n)), "power of two") for n in (0, 3, 31, 2**31, 2**32 - 1)},
    "alignment -32": (alignment_of(-32), "general.alignment"),
    "alignment of 2^63": (alignment_of(w.Typed(w.U64, 2**63)), "power of two"),
    "alignment as text": (alignment_of("32"), "general.alignment"),
    "alignment as float": (alignment_of(32.0), "general.alignment"),
    "architecture as number": (with_value("general.architecture", 7), "general.architecture.*not a text"),
    "architecture of 2 MiB": (with_value("general.architecture", "x" * (2 * MIB)), "not a text"),
    "tokens as numbers": (with_value("tokenizer.ggml.tokens", [1, 2]), "not an array of texts"),
    "scores as texts": (with_value("tokenizer.ggml.scores", ["a"]), "not a.* numbers"),
    "scores as one number": (with_value("tokenizer.ggml.scores", 1.0), "not a.* numbers"),
    "bos as text": (with_value("tokenizer.ggml.bos_token_id", "1"), "bos_token_id"),
    "bos below zero": (with_value("tokenizer.ggml.bos_token_id", -1), "bos_token_id"),
    "add_bos as number": (with_value("tokenizer.ggml.add_bos_token", 1), "add_bos_token"),
    "template as array": (with_value("tokenizer.chat_template", ["a"]), "chat_template"),
    "no dimensions": (with_tensors(entry(shape=())), "0 dimensions"),
    "five dimensions": (with_tensors(entry(shape=(1,) * 5)), "5 dimensions"),
    "2^32-1 dimensions": (with_tensors(w.encode_text("t") + b"\xff" * 4), "dimensions"),
    "zero dimension": (with_tensors(entry(shape=(32, 0))), "impossible dimensions"),
    "all zero": (with_tensors(entry(shape=(0, 0, 0, 0))), "impossible dimensions"),
    "negative dimension": (with_tensors(entry(shape=(32, -1))), "impossible dimensions"),
    "two negative dimensions": (with_tensors(entry(shape=(-32, -32))), "impossible dimensions"),
    "product 2^64": (with_tensors(entry(shape=(2**32, 2**32))), "impossible dimensions"),
    "product wraps to 32": (with_tensors(entry(shape=(2**63 + 16, 2))), "impossible dimensions"),
    "bytes wrap": (with_tensors(entry(shape=(2**62,))), "past the end"),
    "ragged rows": (with_tensors(entry(shape=(33,), kind=GgmlType.Q8_0)), "whole blocks of Q8_0"),
    "type 43": (with_tensors(entry(kind=43)), "unknown type 43"),
    "type 2^32-1": (with_tensors(entry(kind=2**32 - 1)), "unknown type"),
    "withdrawn type": (with_tensors(entry(kind=GgmlType.Q4_0_4_4)), "Q4_0_4_4.*withdrawn"),
    "name not UTF-8": (with_tensors(entry(name=b"\xc3")), "UTF-8"),
    "name too long": (with_tensors(entry(name="n" * 128)), "at most 127"),
    "name empty": (with_tensors(entry(name="")), "empty"),
    "tensor twice": (with_tensors(entry(), entry(offset=128)), "'t': given twice"),
    "offset past the end": (with_tensors(entry(offset=4096)), "past the end"),
    "offset 2^63": (with_tensors(entry(offset=2**63)), "past the end"),
    "offset wraps": (with_tensors(entry(offset=2**64 - 32)), "past the end"),
    "offset misaligned": (with_tensors(entry(offset=4)), "not a multiple of 32"),
    "last byte missing": (with_tensors(entry(shape=(1024,)), data_bytes=4095), "past the end"),
    "same place": (with_tensors(entry("a"), entry("b")), "overlaps"),
    "half overlapping": (with_tensors(entry("a", offset=64), entry("b")), "'a': overlaps tensor 'b'"),
}


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of Python `call` runs: time, without a clock."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(previous)
    return count


def refusal(data: bytes, size_bytes: int | None = None) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        parse_gguf_header(data, len(data) if size_bytes is None else size_bytes)
    return caught.value


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(case: str) -> None:
    data, pattern = HOSTILE[case]
    error = refusal(data)
    with pytest.raises(ModelFileError, match=pattern):
        raise error
    assert "; " in error.message  # what is wrong; what to do
    assert error.message.isascii()
    assert "\n" not in error.message
    assert len(error.message) < 400


def refusal_of_file(path: Path) -> None:
    with pytest.raises(ModelFileError):
        open_gguf(path)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_cost_little(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case][0])
    tracemalloc.start()
    try:
        refusal_of_file(path)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()
    assert lines_run(lambda: refusal_of_file(path)) < 3000


@pytest.mark.parametrize(
    "head",
    [
        with_key(b"k", array_head(w.TEXT, 2**32))[:-256],
        with_key(b"k", array_head(w.TEXT, 2**20 + 1))[:-256],
        with_key(b"k", array_head(w.U8, 2**33))[:-256],
        with_key(b"k", struct.pack("<IQ", w.TEXT, 2**33))[:-256],
        w.encode_header(16_000, 0),
        w.encode_header(0, 2) + w.encode_text("k") + array_head(w.U8, 23 * MIB),
    ],
)
def test_a_huge_sparse_file_costs_little(head: bytes, tmp_path: Path) -> None:
    """16 GiB of zeros behind the header: every length fits the file, so only our own limits help."""
    path = tmp_path / "model.gguf"
    path.write_bytes(head)
    os.truncate(path, 1 << 34)
    tracemalloc.start()
    try:
        refusal_of_file(path)
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()
        path.unlink()


def test_truncated_anywhere_is_refused() -> None:
    data = w.build_gguf(METADATA, TENSORS)
    end = len(data) - (-len(TENSORS[-1][3]) % 32)  # the last tensor's padding may be missing
    for length in range(end):
        assert "past the end of the file" in refusal(data[:length]).message or length == 0
        error = refusal(data[:length], len(data)) if length < 900 else None  # the file has more, we were not given it
        assert error is None or "goes on past" in error.message or length < 4
    parse_gguf_header(data[:end], end)


def test_random_damage_is_refused_or_read() -> None:
    """Seeded: bytes flipped, inserted and cut; nothing but ModelFileError comes out, and nothing else happens."""
    rng = random.Random(7)
    sound = w.build_gguf(METADATA, TENSORS)
    outcomes = [0, 0]
    for _ in range(4000):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) - 1)
            data[at : at + rng.choice((0, 1, 1, 1, 8))] = rng.choice((b"\xff", b"\x00", b"\x80", rng.randbytes(8)))
        try:
            with open_gguf(bytes(data)) as gguf:
                summarize_gguf(gguf)
                assert all(len(gguf.tensor_data(name)) == t.size_bytes for name, t in gguf.tensors.items())
                outcomes[0] += 1
        except ModelFileError:
            outcomes[1] += 1
    assert min(outcomes) > 100


def test_the_largest_header_allowed_stays_within_memory() -> None:
    data = with_key(b"k", array_head(w.TEXT, 2**20))[:-256] + bytes(2**23)
    tracemalloc.start()
    try:
        header = parse_gguf_header(data, len(data))
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()
    assert header.metadata["k"][2**20 - 1] == ""


# ---- Against the gguf package


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    sizes = require("gguf").GGML_QUANT_SIZES
    for kind, size in sizes.items():
        if kind.name != "Q8_1":  # 36 bytes in ggml (two halves and 32 bytes); the package says 40
            assert d.GGML_BLOCKS[GgmlType[kind.name]] == tuple(size), kind
            assert GgmlType[kind.name] == kind


def test_files_of_the_gguf_package_read_back(tmp_path: Path) -> None:
    gguf, numpy = require("gguf"), require("numpy")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("écrit")
    writer.add_token_list(["a", "b", "ć"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_bool("flag", True)
    weights = numpy.arange(96, dtype=numpy.float32).reshape(3, 32)
    writer.add_tensor("w", weights)
    writer.add_tensor("half", weights.astype(numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as ours:
        assert ours.metadata["general.name"] == "écrit"
        assert list(ours.metadata["tokenizer.ggml.tokens"]) == ["a", "b", "ć"]
        assert list(ours.metadata["tokenizer.ggml.scores"]) == [0.0, -1.0, -2.5]
        assert ours.metadata["flag"] is True
        assert ours.tensors["w"].shape == (32, 3)
        assert bytes(ours.tensor_data("w")) == weights.tobytes()
        assert bytes(ours.tensor_data("half")) == weights.astype(numpy.float16).tobytes()
        assert list(itertools.islice(ours.tensors, 2)) == ["w", "half"]
