"""Section Models: names of models, their quantisations, sizes for people."""

import pytest

from dvai_bridge import (
    build_model_id,
    format_count,
    format_size,
    is_same_model,
    parse_quantization,
    parse_split_name,
)


@pytest.mark.parametrize(
    ("path", "alias", "model_id"),
    [
        ("models/SmolLM2-135M-Instruct-Q8_0.gguf", None, "SmolLM2-135M-Instruct-Q8_0"),
        ("C:\\models\\tiny.GGUF", None, "tiny"),
        ("/m/llama-70b-00001-of-00003.gguf", None, "llama-70b"),
        ("/m/llama-70b-00004-of-00003.gguf", None, "llama-70b-00004-of-00003"),
        ("/m/llama-70b-1-of-3.gguf", None, "llama-70b-1-of-3"),
        ("/m/two\nlines-00001-of-00002.gguf", None, "two_lines"),
        ("/m/caf\udce9-\u202efdp.gguf", None, "caf_-_fdp"),
        ("v1.5.gguf", None, "v1.5"),
        (".gguf", None, ".gguf"),
        ("no-suffix", None, "no-suffix"),
        ("models/x.gguf", "gpt-4o", "gpt-4o"),
        ("models/x.gguf", "", "x"),
    ],
)
def test_ids(path, alias, model_id):
    assert build_model_id(path, alias) == model_id


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("x-00001-of-00003", ("x", 1, 3)),
        ("x-00003-of-00003", ("x", 3, 3)),
        ("x-00000-of-00003", None),
        ("x-00004-of-00003", None),
        ("-00001-of-00001", None),
        ("x-00001-of-00003.part", None),
        ("x-\N{FULLWIDTH DIGIT ONE}0001-of-00003", None),
        ("x", None),
    ],
)
def test_split_names(stem, split):
    assert parse_split_name(stem) == split


def test_equality_ignores_case_and_nothing_else():
    assert is_same_model("Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b-INSTRUCT")
    assert is_same_model("STRASSE", "straße")
    assert not is_same_model("qwen2.5-0.5b", "qwen2.5-0.5b-q8_0")


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("SmolLM2-135M-Instruct-Q4_K_M", "Q4_K_M"),
        ("smollm2-135m-instruct-q8_0", "Q8_0"),
        ("Llama-3.2-1B.IQ3_XS", "IQ3_XS"),
        ("Qwen3-8B-UD-Q4_K_XL", "Q4_K_XL"),
        ("model-Q6_K", "Q6_K"),
        ("model.Q2_K_S.old", "Q2_K_S"),
        ("x-IQ4_NL", "IQ4_NL"),
        ("x-TQ1_0", "TQ1_0"),
        ("gpt-oss-20b-mxfp4", "MXFP4"),
        ("tinyllama-BF16", "BF16"),
        ("tinyllama-fp16", "F16"),
        ("tinyllama.f32", "F32"),
        ("Q4_0-experiment-Q5_1", "Q5_1"),
        ("llama3.2:1b-instruct-q4_K_M", "Q4_K_M"),
        ("x-Q4_0_4_4", "Q4_0_4_4"),
        ("gemma-2b", None),
        ("F160-runs", None),
        ("xQ4_0x", None),
        ("", None),
    ],
)
def test_quantizations(name, quantization):
    assert parse_quantization(name) == quantization


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (84_400, "84 kB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (531_067_904, "531 MB"),
        (1_240_000_000, "1.2 GB"),
        (9_960_000_000, "10 GB"),
        (10**18, "1000 PB"),
    ],
)
def test_sizes(size_bytes, text):
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (15_191_712, "15M"), (134_515_008, "135M"), (1_100_048_384, "1.1B"), (999_999_999, "1B")],
)
def test_counts(count, text):
    assert format_count(count) == text
