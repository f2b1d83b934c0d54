"""Section Models: names of models, their quantisations, sizes for people."""

import pytest

from dvai_bridge import (
    BUILTIN_MODEL_ID,
    build_model_id,
    can_substitute,
    format_count,
    format_size,
    is_same_model,
    parse_model_name,
    parse_quantization,
    parse_split_name,
    split_address,
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


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Llama-3.2-3B-Instruct-Q4_K_M", ("llama", "3.2", "3b", "instruct")),
        ("Meta-Llama-3.1-8B-Instruct.Q5_K_M", ("llama", "3.1", "8b", "instruct")),
        ("meta-llama/Llama-3.2-3B-Instruct", ("llama", "3.2", "3b", "instruct")),
        ("meta-llama_Llama-3.2-3B-Instruct-f16", ("llama", "3.2", "3b", "instruct")),
        ("llama3.2:3b-instruct-q4_K_M", ("llama", "3.2", "3b", "instruct")),
        ("llama3.2:latest", ("llama", "3.2", "", "")),
        ("Llama-3.2-3B-Instruct-4bit", ("llama", "3.2", "3b", "instruct")),
        ("Qwen2.5-0.5B-Instruct", ("qwen", "2.5", "0.5b", "instruct")),
        ("qwen2.5-coder-7b-instruct-q4_k_m", ("qwen", "2.5", "7b", "coder instruct")),
        ("Qwen_Qwen3-30B-A3B-Instruct-2507-Q4_K_M", ("qwen", "3-2507", "30b-a3b", "instruct")),
        ("Qwen3-8B-UD-Q4_K_XL", ("qwen", "3", "8b", "")),
        ("qwen2-vl-7b", ("qwen", "2", "7b", "vl")),
        ("gemma-2-2b-it-Q4_K_M", ("gemma", "2", "2b", "instruct")),
        ("google_gemma-3n-E2B-it", ("gemma", "3n", "e2b", "instruct")),
        ("gemma-3-1b-pt", ("gemma", "3", "1b", "base")),
        ("Mistral-7B-Instruct-v0.3.Q4_0", ("mistral", "0.3", "7b", "instruct")),
        ("Mixtral-8x7B-Instruct-v0.1", ("mixtral", "0.1", "8x7b", "instruct")),
        ("Phi-3-mini-4k-instruct-q4", ("phi", "3", "", "4k instruct mini")),
        ("phi-4", ("phi", "4", "", "")),
        ("SmolLM2-135M-Instruct-Q8_0", ("smollm", "2", "135m", "instruct")),
        ("tinyllama-1.1b-chat-v1.0.Q4_K_M", ("tinyllama", "1.0", "1.1b", "chat")),
        ("DeepSeek-R1-Distill-Qwen-1.5B-Q4_K_M", ("deepseek", "", "1.5b", "distill qwen r1")),
        ("Hermes-3-Llama-3.2-3B", ("hermes", "3-3.2", "3b", "llama")),
        ("gpt-oss-20b-mxfp4", ("gpt", "", "20b", "oss")),
        ("stablelm-2-zephyr-1_6b-Q4_0", ("stablelm", "2", "1.6b", "zephyr")),
        ("stories260K", ("stories", "", "260k", "")),
        ("OLMo-2-1124-7B-Instruct", ("olmo", "2-1124", "7b", "instruct")),
        ("nomic-embed-text-v1.5.f16", ("nomic", "1.5", "", "embed text")),
        ("command-r+", ("command", "", "", "r+")),
        ("Llama-3-8B-\N{CJK UNIFIED IDEOGRAPH-4E2D}", ("llama", "3", "8b", "\N{CJK UNIFIED IDEOGRAPH-4E2D}")),
        ("Phillip-7B", None),
        ("llamafile-7B", None),
        ("my-notes", None),
        (BUILTIN_MODEL_ID, None),
        ("", None),
    ],
)
def test_what_a_name_says(name, parts):
    parsed = parse_model_name(name)
    assert (parsed and (parsed.family, parsed.version, parsed.size, " ".join(sorted(parsed.type)))) == parts


@pytest.mark.parametrize(
    ("model_id", "requested"),
    [
        ("Llama-3.2-3B-Instruct-Q8_0", "Llama-3.2-3B-Instruct-Q4_K_M"),
        ("llama3.2:3b-instruct-q4_K_M", "Llama-3.2-3B-Instruct-IQ3_XS"),
        ("Meta-Llama-3.1-8B-Instruct.Q5_K_M", "meta-llama/Llama-3.1-8B-Instruct"),
        ("gemma-2-2b-it-Q4_K_M", "gemma-2-2b-instruct-bf16"),
        ("tinyllama-1.1b-chat-v1.0.Q4_K_M", "TinyLlama-1.1B-Chat-v1.0-fp16"),
        ("phi-4-Q4_K_M", "phi-4"),
    ],
)
def test_the_same_weights_rounded_apart(model_id, requested):
    assert can_substitute(model_id, requested) and can_substitute(requested, model_id)


@pytest.mark.parametrize(
    ("model_id", "requested"),
    [
        ("Llama-3.2-3B-Instruct-Q4_K_M", "Llama-3.1-3B-Instruct-Q4_K_M"),  # version
        ("Llama-3.2-1B-Instruct-Q4_K_M", "Llama-3.2-3B-Instruct-Q4_K_M"),  # size
        ("Llama-3.2-3B-Q4_K_M", "Llama-3.2-3B-Instruct-Q4_K_M"),  # type
        ("Qwen2.5-Coder-7B-Instruct-Q4_0", "Qwen2.5-7B-Instruct-Q4_0"),  # type
        ("Qwen2.5-7B-Instruct-Q4_0", "Llama-2.5-7B-Instruct-Q4_0"),  # family
        ("Hermes-3-Llama-3.2-3B", "Llama-3.2-3B"),  # a fine-tune
        ("Llama-3.2-3B-Instruct-uncensored", "Llama-3.2-3B-Instruct"),  # another
        ("Phi-3-mini-4k-instruct", "Phi-3-mini-128k-instruct"),  # context
        ("Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.3"),
        ("Mistral-7B-Instruct", "Mistral-7B-Instruct-v0.3"),  # it does not say
        ("Qwen3-30B-A3B-Instruct-2507", "Qwen3-30B-A3B-Instruct"),
        ("command-r", "command-r+"),
        ("my-model-Q4_0", "my-model-Q8_0"),  # nobody knows the family
        (BUILTIN_MODEL_ID, "Llama-3.2-3B-Instruct"),
        (BUILTIN_MODEL_ID, f"{BUILTIN_MODEL_ID}-Q8_0"),
        ("", ""),
    ],
)
def test_what_is_no_mere_quantisation(model_id, requested):
    assert not can_substitute(model_id, requested) and not can_substitute(requested, model_id)


@pytest.mark.parametrize(
    ("name", "owners", "expected"),
    [
        ("studio/llama", ["studio"], ("studio", "llama")),
        ("Studio/Llama", ["sTUDIO"], ("sTUDIO", "Llama")),
        ("studio/meta/llama", ["studio"], ("studio", "meta/llama")),
        ("a/b/llama", ["a", "a/b"], ("a/b", "llama")),
        ("Mac Studio/llama", ["Mac Studio", "Mac"], ("Mac Studio", "llama")),
        ("STRASSE/llama", ["straße"], ("straße", "llama")),
        ("other/llama", ["studio"], (None, "other/llama")),
        ("studiollama", ["studio"], (None, "studiollama")),
        ("studio/", ["studio"], (None, "studio/")),
        ("studio", ["studio"], (None, "studio")),
        ("/llama", [""], (None, "/llama")),
        ("llama", [], (None, "llama")),
    ],
)
def test_addresses(name, owners, expected):
    assert split_address(name, owners) == expected
