"""Section Registry: models on disk, memory, and engines that already run, on real trees, files and sockets."""

import asyncio
import contextlib
import ctypes
import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    FoundEngine,
    FoundModel,
    GgmlType,
    MemoryInfo,
    ModelFileError,
    ModelPlace,
    ScanLimits,
    build_ollama_name,
    build_serve_command,
    choose_best_model,
    choose_model_places,
    describe_engine,
    describe_model,
    find_engines,
    find_models,
    parse_ollama_host,
    parse_probe_answer,
    parse_vm_stat,
    probe_free_memory,
    verify_fits,
)
from tests.gguf_writer import build_gguf, encode_header, encode_tensor_entry, encode_text, encode_value

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX links, FIFOs and limits")
GIB = 1 << 30

LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 2048,
    "llama.attention.head_count": 2,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.chat_template": "{{ messages }}",
}


def build_header(metadata=LLAMA, *, n_embd=64, n_ff=64, n_vocab=32, n_layer=1, kind=GgmlType.F32):
    """The header of a llama model, and the size of the whole file."""
    metadata = {
        "llama.embedding_length": n_embd,
        "llama.feed_forward_length": n_ff,
        "llama.block_count": n_layer,
    } | metadata
    vectors, matrices = ["output_norm"], [("token_embd", n_embd, n_vocab)]
    for layer in range(n_layer):
        vectors += [f"blk.{layer}.{name}" for name in ("attn_norm", "ffn_norm")]
        matrices += [(f"blk.{layer}.attn_{name}", n_embd, n_embd) for name in ("q", "k", "v", "output")]
        matrices += [(f"blk.{layer}.ffn_{name}", n_embd, n_ff) for name in ("gate", "up")]
        matrices += [(f"blk.{layer}.ffn_down", n_ff, n_embd)]
    tensors = [(name, (n_embd,), GgmlType.F32) for name in vectors]
    tensors += [(name, (columns, rows), kind) for name, columns, rows in matrices]
    head = encode_header(len(tensors), len(metadata))
    head += b"".join(encode_text(key) + encode_value(value) for key, value in metadata.items())
    offset = 0
    for name, shape, tensor_kind in tensors:
        head += encode_tensor_entry(f"{name}.weight", shape, tensor_kind, offset)
        elements, octets = dvai_bridge.GGML_BLOCKS[tensor_kind]
        offset += -(-(math.prod(shape) // elements * octets) // 32) * 32
    head += bytes(-len(head) % 32)
    return head, len(head) + offset


def build_model(metadata=LLAMA, **sizes):
    """A sound model of 30,912 parameters (by default), all zero."""
    head, size_bytes = build_header(metadata, **sizes)
    return head.ljust(size_bytes, b"\0")


def write_sparse_model(path, **sizes):
    """A model of any size, whose weights are a hole in the file."""
    head, size_bytes = build_header(kind=GgmlType.Q8_0, **sizes)
    path.write_bytes(head)
    os.truncate(path, size_bytes)


def find_one(path, memory=None):
    (found,) = find_models([ModelPlace(source="./models", path=path.parent)], memory=memory)
    return found


# ---- places ---------------------------------------------------------------------------


def list_places(environ, platform):
    places = choose_model_places(environ, Path("/h"), Path("/w"), Path("/cache"), platform=platform, root=Path("/r"))
    return [(place.source, place.path.as_posix()) for place in places]


def test_places_by_default():
    assert list_places({}, "linux") == [
        ("./models", "/w/models"),
        ("the bridge's cache", "/cache/models"),
        ("Hugging Face", "/h/.cache/huggingface/hub"),
        ("LM Studio", "/h/.lmstudio/models"),
        ("LM Studio", "/h/.cache/lm-studio/models"),
        ("llama.cpp", "/h/.cache/llama.cpp"),
        ("Ollama", "/h/.ollama/models"),
        ("Ollama", "/r/usr/share/ollama/.ollama/models"),
    ]


@pytest.mark.parametrize(
    ("environ", "platform", "place"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "linux", ("Hugging Face", "/a")),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "linux", ("Hugging Face", "/b/hub")),
        ({"XDG_CACHE_HOME": "/c"}, "linux", ("Hugging Face", "/c/huggingface/hub")),
        ({"XDG_CACHE_HOME": "/c"}, "linux", ("llama.cpp", "/c/llama.cpp")),
        ({"LLAMA_CACHE": "/l"}, "darwin", ("llama.cpp", "/l")),
        ({}, "darwin", ("llama.cpp", "/h/Library/Caches/llama.cpp")),
        ({"LOCALAPPDATA": "/L"}, "win32", ("llama.cpp", "/L/llama.cpp")),
        ({"OLLAMA_MODELS": "/o"}, "linux", ("Ollama", "/o")),
    ],
)
def test_places_by_environment(environ, platform, place):
    assert place in list_places(environ, platform)


# ---- what is found --------------------------------------------------------------------


def write_ollama_model(place, name, data, layers=None):
    digest = hashlib.sha256(data).hexdigest()
    manifest = place / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = layers or [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(data)},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    (place / "blobs").mkdir(exist_ok=True)
    (place / "blobs" / f"sha256-{digest}").write_bytes(data)


def write_hugging_face_model(hub, repository, files, revisions=("r1",)):
    folder = hub / ("models--" + repository.replace("/", "--"))
    (folder / "blobs").mkdir(parents=True)
    for name, data in files.items():
        blob = folder / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        for revision in revisions:
            link = folder / "snapshots" / revision / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))


@posix_only
def test_every_place_is_searched_and_each_file_told_once(tmp_path):
    models, hub, ollama = tmp_path / "models", tmp_path / "hub", tmp_path / "ollama"
    models.mkdir()
    (models / "tiny-Q8_0.gguf").write_bytes(build_model(kind=GgmlType.Q8_0))
    (models / "notes.txt").write_bytes(b"GGUF")
    write_hugging_face_model(hub, "org/repo", {"sub/Chat.GGUF": build_model(n_vocab=64)}, ("r1", "r2"))
    (hub / "datasets--x" / "snapshots").mkdir(parents=True)
    (hub / "datasets--x" / "snapshots" / "data.gguf").write_bytes(build_model())
    write_ollama_model(ollama, "registry.ollama.ai/library/llama3.2/1b", build_model(n_vocab=96))
    write_ollama_model(ollama, "hf.co/org/repo/Q4_K_M", build_model(n_vocab=128))
    places = [
        ModelPlace(source="./models", path=models),
        ModelPlace(source="missing", path=tmp_path / "nowhere"),
        ModelPlace(source="Hugging Face", path=hub),
        ModelPlace(source="llama.cpp", path=models),
        ModelPlace(source="Ollama", path=ollama),
    ]
    found = find_models(places)
    assert [(m.model_id, m.source, m.n_params, m.quantization) for m in found] == [
        ("tiny-Q8_0", "./models", 30912, "Q8_0"),
        ("Chat", "Hugging Face", 32960, "F32"),
        ("hf.co/org/repo:Q4_K_M", "Ollama", 37056, "F32"),
        ("llama3.2:1b", "Ollama", 35008, "F32"),
    ]
    assert found[1].path == hub / "models--org--repo/snapshots/r1/sub/Chat.GGUF"
    assert found[3].path.parent == ollama / "blobs"
    assert [m.size_bytes for m in found] == [m.path.stat().st_size for m in found]
    assert {(m.architecture, m.n_ctx_train, m.has_chat_template, m.obstacle) for m in found} == {
        ("llama", 2048, True, None)
    }


def test_the_parts_of_a_split_model_are_one(tmp_path):
    for index in (1, 2, 3):
        data = build_model(LLAMA | {"split.count": 3}) if index == 1 else b"x" * index
        (tmp_path / f"big-Q4_K_M-0000{index}-of-00003.gguf").write_bytes(data)
    (tmp_path / "other-00002-of-00002.gguf").write_bytes(build_model())
    (tmp_path / "single-00001-of-00001.gguf").write_bytes(build_model())
    found = {model.model_id: model for model in find_models([ModelPlace(source="./models", path=tmp_path)])}
    assert sorted(found) == ["big-Q4_K_M", "other", "single"]
    big = found["big-Q4_K_M"]
    assert big.path.name == "big-Q4_K_M-00001-of-00003.gguf"
    assert big.size_bytes == big.path.stat().st_size + 2 + 3
    assert "split into 3 files" in big.obstacle
    assert found["other"].obstacle == "1 of its 2 parts are missing"
    assert found["single"].obstacle is None


@pytest.mark.parametrize(
    ("data", "obstacle"),
    [
        (build_model(LLAMA | {"general.type": "mmproj"}), "image projector"),
        (build_model({"general.architecture": "clip"}), "image projector"),
        (build_model(LLAMA | {"general.type": "adapter"}), "no whole model but: adapter"),
        (build_model(LLAMA | {"general.type": "\x1b[2J" + "z" * 100}), r"but: \x1b[2Jzzz"),
        (build_gguf(LLAMA), "only a vocabulary"),
        (build_model(LLAMA | {"general.architecture": "gemma3"}), "architecture 'gemma3'"),
        (build_model(kind=GgmlType.Q3_K, n_embd=256, n_ff=256), "type Q3_K"),
        (build_model(LLAMA | {"llama.expert_count": 8}), "mixture of experts"),
        (build_model(LLAMA | {"tokenizer.ggml.model": "bert"}), "tokenizer is 'bert'"),
        (build_model({key: LLAMA[key] for key in list(LLAMA)[:3]}), "has no tokenizer"),
        (build_model(LLAMA | {"tokenizer.ggml.pre": "unheard-of"}), "pre-tokenizer 'unheard-of'"),
        (build_gguf(LLAMA, [("a", (32, 1), 0, bytes(128))]), "token_embd.weight is missing"),
        (b"", "magic"),
        (b"not a model at all", "magic"),
        (build_model()[:200], "damaged"),
    ],
)
def test_obstacles(tmp_path, data, obstacle):
    (tmp_path / "x.gguf").write_bytes(data)
    found = find_one(tmp_path / "x.gguf").obstacle
    assert obstacle in found
    assert "\n" not in found and "\x1b" not in found


@posix_only
def test_size_and_memory_are_obstacles_too(tmp_path):
    large, small = tmp_path / "large", tmp_path / "small"
    large.mkdir()
    small.mkdir()
    write_sparse_model(large / "x.gguf", n_embd=2048, n_ff=8192, n_vocab=32_000, n_layer=18)
    write_sparse_model(small / "x.gguf", n_embd=576, n_ff=1536, n_vocab=49_152, n_layer=30)
    assert "1.3 billion parameters" in find_one(large / "x.gguf").obstacle
    assert find_one(small / "x.gguf").n_params == 147_786_048
    assert find_one(small / "x.gguf").obstacle is None
    assert find_one(small / "x.gguf", MemoryInfo(free_bytes=4 * GIB, limit_source="free memory")).obstacle is None
    assert find_one(small / "x.gguf", MemoryInfo(free_bytes=None, limit_source="")).obstacle is None
    scarce = MemoryInfo(free_bytes=100_000_000, limit_source="the container's limit")
    obstacle = find_one(small / "x.gguf", scarce).obstacle
    assert re.fullmatch(r"needs about [0-9]+ MB and 100 MB are left \(the container's limit\)", obstacle)


# ---- hostile directories --------------------------------------------------------------


@posix_only
def test_loops_fifos_and_dangling_links_are_survived(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "self.gguf").symlink_to("self.gguf")
    (tmp_path / "dangling.gguf").symlink_to("nowhere")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "a" / "b" / "good.gguf").write_bytes(build_model())
    found = find_models([ModelPlace(source="./models", path=tmp_path)])
    assert [model.model_id for model in found] == ["good"]


@posix_only
def test_unreadable_files_and_folders_are_survived(tmp_path):
    for name in ("closed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.gguf").write_bytes(build_model())
    (tmp_path / "secret.gguf").write_bytes(build_model())
    (tmp_path / "secret.gguf").chmod(0)
    (tmp_path / "closed").chmod(0)
    try:
        found = {model.model_id: model for model in find_models([ModelPlace(source="./models", path=tmp_path)])}
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert found["open"].obstacle is None
    if os.geteuid() != 0:  # root reads everything
        assert sorted(found) == ["open", "secret"]
        assert "cannot open" in found["secret"].obstacle


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file system that takes any byte in names")
def test_names_that_are_not_text(tmp_path):
    directory = os.fsencode(tmp_path)
    for name in (b"caf\xe9.gguf", b"two\nlines.gguf", "\u202egnp.gguf".encode(), b"\x1b[2J.gguf"):
        with open(os.path.join(directory, name), "wb") as file:
            file.write(build_model())
    found = find_models([ModelPlace(source="./models", path=tmp_path)])
    assert sorted(model.model_id for model in found) == ["_[2J", "_gnp", "caf_", "two_lines"]
    for model in found:
        assert model.obstacle is None
        for line in (describe_model(model), build_serve_command(model, "linux"), model.model_id):
            assert line.isprintable() and line.encode("utf-8")


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        (ScanLimits(), 30),
        (ScanLimits(entries=10), 10),
        (ScanLimits(files=7), 7),
        (ScanLimits(timeout_s=0.0), 0),
    ],
)
def test_a_huge_folder_costs_a_bounded_search(tmp_path, caplog, limits, count):
    for number in range(30):
        (tmp_path / f"{number:02}.gguf").write_bytes(build_model())
    found = find_models([ModelPlace(source="./models", path=tmp_path)], limits)
    assert len(found) == count
    assert bool(caplog.records) == (count < 30)


def test_a_deep_tree_is_searched_so_far(tmp_path):
    folder = tmp_path
    for depth in range(9):
        (folder / f"depth-{depth}.gguf").write_bytes(build_model())
        folder = folder / "d"
        folder.mkdir()
    found = find_models([ModelPlace(source="./models", path=tmp_path)])
    assert [model.model_id for model in found] == [f"depth-{depth}" for depth in range(7)]


MODEL_LAYER = "application/vnd.ollama.image.model"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"null",
        b'{"layers": {}}',
        b'{"layers": [null, 5, {}]}',
        b'{"layers": [{"mediaType": "%s", "digest": "sha256:../../../../etc/passwd"}]}' % MODEL_LAYER.encode(),
        b'{"layers": [{"mediaType": "%s", "digest": "sha256-%s"}]}' % (MODEL_LAYER.encode(), b"0" * 64),
        b'{"layers": [{"mediaType": "%s", "digest": "sha256:%s"}]}' % (MODEL_LAYER.encode(), b"0" * 64),
        b'{"layers": [{"mediaType": "%s", "digest": ["sha256"]}]}' % MODEL_LAYER.encode(),
        b"\xff\xfe",
        b" " * (1 << 20) + b"{}",
    ],
)
def test_hostile_ollama_manifests_are_survived(tmp_path, content):
    write_ollama_model(tmp_path, "registry.ollama.ai/library/good/latest", build_model())
    bad = tmp_path / "manifests/registry.ollama.ai/library/bad/latest"
    bad.parent.mkdir(parents=True)
    bad.write_bytes(content)
    found = find_models([ModelPlace(source="Ollama", path=tmp_path)])
    assert [model.model_id for model in found] == ["good:latest"]


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("registry.ollama.ai", "library", "llama3.2", "1b"), "llama3.2:1b"),
        (("registry.ollama.ai", "ada", "mine", "latest"), "ada/mine:latest"),
        (("hf.co", "org", "repo", "Q8_0"), "hf.co/org/repo:Q8_0"),
        (("registry.ollama.ai", "library", "odd"), "library:odd"),
        (("x", "a\nb", "1"), "x/a_b:1"),
    ],
)
def test_ollama_names(parts, name):
    assert build_ollama_name(parts) == name


# ---- the command that serves it -------------------------------------------------------


def make_model(model_id="x", path="models/x.gguf", **details):
    fields = {
        "size_bytes": 1000,
        "source": "./models",
        "architecture": "llama",
        "quantization": "Q8_0",
        "n_params": 135_000_000,
        "n_ctx_train": 2048,
        "has_chat_template": True,
        "obstacle": None,
    }
    return FoundModel(model_id=model_id, path=Path(path), **(fields | details))


@pytest.mark.parametrize(
    ("model_id", "path", "command"),
    [
        ("x", "models/x.gguf", "python3 dvai_bridge.py serve --model models/x.gguf"),
        ("my x", "my models/my x.gguf", "python3 dvai_bridge.py serve --model 'my models/my x.gguf'"),
        ("llama3.2:1b", "/b/sha256-0", "python3 dvai_bridge.py serve --model /b/sha256-0 --alias llama3.2:1b"),
        ("a_b", "a\nb.gguf", "python3 dvai_bridge.py serve --model $'a\\x0ab.gguf'"),
    ],
)
def test_serve_command(model_id, path, command):
    assert build_serve_command(make_model(model_id, path), "linux") == command


def test_serve_command_for_windows():
    command = build_serve_command(make_model("my x", "my models/my x.gguf"), "win32", program="py dvai_bridge.py")
    assert command == f'py dvai_bridge.py serve --model "{Path("my models/my x.gguf")}"'


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "name",
    [b"plain", b'it\'s; rm -rf $HOME `id` \\ "q"', b"\n\r\t\x1b[0m'\\", b"\xff\xe9'", "zwölf\u202e".encode(), b"!$x#"],
)
def test_a_shell_reads_the_path_back(name):
    quoted = dvai_bridge.quote_argument(os.fsdecode(name), "linux")
    assert "\n" not in quoted and "\x1b" not in quoted
    result = subprocess.run(["bash", "-c", "printf %s " + quoted], capture_output=True, timeout=30, check=True)
    assert result.stdout == name


# ---- the best one ---------------------------------------------------------------------


def choose(*models):
    choice = choose_best_model(models, tok_per_s=lambda n_params: 500e6 / n_params)
    return choice.model.model_id if choice.model else None, choice.reason


def test_the_best_model():
    base = make_model("SmolLM2-135M", has_chat_template=False, n_params=135_000_000)
    chat = make_model("SmolLM2-135M-Instruct-Q8_0", size_bytes=145)
    rough = make_model("SmolLM2-135M-Instruct-Q4_K_M", size_bytes=105)
    tiny = make_model("tiny-15M-chat", n_params=15_000_000)
    larger = make_model("some-200M", n_params=200_000_000)
    slow = make_model("Qwen2.5-0.5B-Instruct", n_params=494_000_000)
    other = make_model("gemma-3-270m-it", obstacle="its architecture is gemma3", n_params=None)
    assert choose(tiny, rough, chat, base, slow, other)[0] == chat.model_id
    assert choose(chat, larger)[0] == chat.model_id
    assert choose(base, larger)[0] == larger.model_id
    assert choose(base, other)[0] == base.model_id
    assert choose(base, tiny)[0] == tiny.model_id
    name, reason = choose(tiny, rough, chat, base, slow, other)
    assert "of 4" in reason and "expected: 3.7" in reason and name in reason


def test_no_model_is_chosen_with_a_reason():
    assert choose() == (None, "no model was found: put a GGUF file into ./models")
    name, reason = choose(make_model("Qwen2.5-0.5B", n_params=500_000_000))
    assert name is None and "about 1.0 tokens a second" in reason and "--model" in reason
    name, reason = choose(
        make_model("large", size_bytes=10**10, obstacle="too large"),
        make_model("odd", obstacle="its architecture is x"),
    )
    assert name is None and reason.endswith("none of the 2 models found; the smallest, odd: its architecture is x")


# ---- memory ---------------------------------------------------------------------------


def build_root(tmp_path, files):
    files = {"proc/meminfo": "MemTotal: 16000000 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"} | files
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
NO_LIMIT_V1 = "9223372036854771712\n"
FREE, CONTAINER = "free memory", "the container's or service's memory limit"


@pytest.mark.parametrize(
    ("files", "free_bytes", "source"),
    [
        ({}, 8 * GIB, FREE),
        ({"proc/self/cgroup": "0::/\n"}, 8 * GIB, FREE),
        ({"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max\n"}, 8 * GIB, FREE),
        (
            {
                "proc/self/cgroup": "0::/\n",
                f"{V2}/memory.max": f"{2 * GIB}\n",
                f"{V2}/memory.current": f"{GIB}\n",
                f"{V2}/memory.stat": f"anon 5\nactive_file 7\ninactive_file {GIB // 2}\n",
            },
            GIB + GIB // 2,
            CONTAINER,
        ),
        (  # the limit of a level above counts
            {
                "proc/self/cgroup": "0::/user.slice/app.scope\n",
                f"{V2}/user.slice/memory.max": f"{GIB}\n",
                f"{V2}/user.slice/memory.current": f"{GIB // 4}\n",
                f"{V2}/user.slice/app.scope/memory.max": f"{4 * GIB}\n",
                f"{V2}/user.slice/app.scope/memory.current": "0\n",
            },
            GIB - GIB // 4,
            CONTAINER,
        ),
        (  # memory.high throttles long before memory.max kills
            {"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": f"{4 * GIB}", f"{V2}/a/memory.high": f"{GIB}"},
            GIB,
            CONTAINER,
        ),
        (  # inside a container whose own group is the root of what is mounted
            {
                "proc/self/cgroup": "12:cpu,cpuacct:/docker/1\n9:memory:/docker/1\n0::/docker/1\n",
                f"{V1}/memory.limit_in_bytes": f"{GIB}\n",
                f"{V1}/memory.usage_in_bytes": f"{GIB // 2}\n",
                f"{V1}/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB // 4}\n",
            },
            GIB - GIB // 4,
            CONTAINER,
        ),
        (
            {"proc/self/cgroup": "9:memory:/a\n", f"{V1}/a/memory.limit_in_bytes": NO_LIMIT_V1},
            8 * GIB,
            FREE,
        ),
        (  # a hybrid system: v2 is mounted beside v1
            {"proc/self/cgroup": "1:name=systemd:/\n0::/s\n", f"{V2}/unified/s/memory.max": "1000000"},
            1_000_000,
            CONTAINER,
        ),
        ({"proc/self/cgroup": "0::/../../other\n", f"{V2}/memory.max": "5000"}, 5000, CONTAINER),
        (
            {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "5000", f"{V2}/memory.current": "6000"},
            0,
            CONTAINER,
        ),
        ({"proc/self/cgroup": "nonsense\n\n:::\n", f"{V2}/memory.max": "-1"}, 8 * GIB, FREE),
        ({"proc/meminfo": ""}, None, "this system does not say how much memory is free"),
    ],
)
def test_free_memory_of_linux(tmp_path, files, free_bytes, source):
    memory = probe_free_memory(build_root(tmp_path, files), "linux")
    assert memory == MemoryInfo(free_bytes=free_bytes, limit_source=source)


@posix_only
def test_the_limit_on_address_space_counts():
    program = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import dvai_bridge as b, pathlib\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "m = b.probe_free_memory(pathlib.Path('/nowhere'))\n"
        "print(m.free_bytes == 2 << 30, m.limit_source)\n"
        "print(b.probe_free_memory(pathlib.Path('/')).free_bytes < 2 << 30)\n"
    )
    arguments = [sys.executable, "-c", program, str(Path(dvai_bridge.__file__).parent)]
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems do not enforce RLIMIT_AS")
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "True the limit of `ulimit -v`\nTrue\n"


def test_this_machine_has_memory():
    memory = probe_free_memory()
    assert memory.free_bytes is None or 1 << 20 < memory.free_bytes < 1 << 50


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            400000.
Pages inactive:                           20000.
Pages speculative:                          300.
Pages throttled:                              0.
Pages purgeable:                             50.
"""


@posix_only
def test_free_memory_of_macos(tmp_path, monkeypatch):
    assert parse_vm_stat(VM_STAT) == 30350 * 16384
    assert parse_vm_stat("") is None
    program = tmp_path / "vm_stat"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{VM_STAT}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert probe_free_memory(platform="darwin").free_bytes == 30350 * 16384
    program.unlink()
    assert probe_free_memory(platform="darwin").free_bytes is None


def test_free_memory_of_windows(monkeypatch):
    """The structure as GlobalMemoryStatusEx wants it: 64 bytes, length first, then load and seven 64-bit counts."""

    def fill(pointer):
        status = ctypes.string_at(pointer, 4)
        assert int.from_bytes(status, sys.byteorder) == 64
        counts = [16 * GIB, 4 * GIB, 20 * GIB, 3 * GIB, 1 << 47, 1 << 46, 0]
        octets = b"".join(count.to_bytes(8, sys.byteorder) for count in counts)
        ctypes.memmove(ctypes.cast(pointer, ctypes.c_void_p).value + 8, octets, 56)
        return 1

    kernel = types.SimpleNamespace(GlobalMemoryStatusEx=fill)
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert probe_free_memory(platform="win32") == MemoryInfo(free_bytes=3 * GIB, limit_source="free memory")


def test_what_does_not_fit_is_refused_with_advice():
    memory = MemoryInfo(free_bytes=1_300_000_000, limit_source="the container's limit")
    verify_fits(1_300_000_000, memory)
    verify_fits(10**15, MemoryInfo(free_bytes=None, limit_source="not known"))
    with pytest.raises(ModelFileError) as caught:
        verify_fits(2_100_000_000, memory)
    assert caught.value.message == (
        "the model needs about 2.1 GB and 1.3 GB are left (the container's limit): take a smaller model or "
        "quantisation, lower --ctx-size, or use another device"
    )


# ---- engines that run here ------------------------------------------------------------


@contextlib.contextmanager
def serve(answer):
    """A TCP server on a free loopback port; `answer(connection, target)` deals with each request."""
    listener = socket.create_server(("127.0.0.1", 0))
    targets = []

    def handle(connection):
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            request = b""
            while b"\r\n\r\n" not in request:
                received = connection.recv(65536)
                if not received:
                    return
                request += received
            targets.append(request.split()[1].decode())
            answer(connection, targets[-1])

    def accept():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], targets
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def http(body, status="200 OK", headers=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def by_target(table):
    """Answers from a table; the connection stays open, as with servers that do not mind `Connection: close`."""

    def answer(connection, target):
        connection.sendall(table.get(target, http({"error": "no such route"}, "404 Not Found")))
        connection.recv(1)

    return answer


def find_at(*ports, environ=None):
    return asyncio.run(asyncio.wait_for(find_engines(environ or {}, ports), 20))


def models(*names, owner="someone"):
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in names]}


@pytest.mark.parametrize(
    ("answer", "product"),
    [
        (http(models("a", "b"), headers="Server: llama.cpp\r\n"), "llama-server"),
        (http(models("a", "b"), headers="server: llamafile/0.9\r\n"), "llamafile"),
        (http(models("a", "b", owner="llamacpp")), "llama-server"),
        (http(models("a", "b", owner="library")), "Ollama"),
        (http(models("a", "b", owner="organization_owner")), "LM Studio"),
        (http(models("a", "b", owner="vllm"), headers="server: uvicorn\r\n"), "vLLM"),
        (http(models("a", "b", owner="me"), headers="server: uvicorn\r\n"), "llama_cpp.server"),
        (http(models("a", "b")), "an OpenAI-compatible server"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(models("a", "b")).encode(), "an OpenAI-compatible server"),
    ],
)
def test_engines_are_recognised(answer, product):
    def respond(connection, target):
        if target == "/v1/models":
            connection.sendall(answer)
        else:
            connection.sendall(http({}, "404 Not Found"))

    with serve(respond) as (port, _):
        expected = FoundEngine(product=product, base_url=f"http://127.0.0.1:{port}/v1", models=("a", "b"))
        assert find_at(port) == [expected]


def test_an_ollama_without_the_openai_route_is_found_by_its_tags():
    with serve(by_target({"/api/tags": http({"models": [{"name": "llama3.2:1b", "size": 5}]})})) as (port, targets):
        (engine,) = find_at(port)
        assert (engine.product, engine.models) == ("Ollama", ("llama3.2:1b",))
        assert targets == ["/v1/models", "/api/tags"]


def test_a_bridge_is_no_engine():
    health = {"status": "ok", "version": "0.1.0", "uptimeSec": 5, "currentModelId": None}
    with serve(by_target({"/v1/models": http(models("x")), "/v1/dvai/health": http(health)})) as (port, _):
        assert find_at(port) == []


def test_engines_are_asked_all_at_once_and_a_closed_port_is_none():
    with socket.socket() as unused, serve(by_target({"/v1/models": http(models("a", owner="vllm"))})) as (one, _):
        unused.bind(("127.0.0.1", 0))
        with serve(by_target({"/v1/models": http(models("b", owner="me"))})) as (two, _):
            found = find_at(unused.getsockname()[1], one, two)
    assert [engine.product for engine in found] == ["vLLM", "llama_cpp.server"]


def test_ollama_host_is_asked_where_it_is():
    with serve(by_target({"/v1/models": http(models("a", owner="library"))})) as (port, _):
        assert find_at(environ={"OLLAMA_HOST": f"http://0.0.0.0:{port}"})[0].product == "Ollama"
        assert find_at(port, environ={"OLLAMA_HOST": f"localhost:{port}"})[0].product == "Ollama"
        assert find_at(environ={"OLLAMA_HOST": f"192.0.2.1:{port}"}) == []


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1", ("127.0.0.1", 11434)),
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("127.9.9.9", ("127.9.9.9", 11434)),
        (":8000", ("127.0.0.1", 8000)),
        ("", ("127.0.0.1", 11434)),
        (" http://localhost:8000/ ", ("127.0.0.1", 8000)),
        ("0.0.0.0", ("127.0.0.1", 11434)),
        ("[::1]:8000", ("::1", 8000)),
        ("[::]", ("::1", 11434)),
        ("192.168.1.5:11434", None),
        ("ollama.example.com", None),
        ("localhost.example.com", None),
        ("127.0.0.999", None),
        ("localhost:0", None),
        ("localhost:99999", None),
        ("[::1", None),
        ("http://user@127.0.0.1", None),
    ],
)
def test_ollama_host(value, address):
    assert parse_ollama_host(value) == address


def drip(connection, target):
    for _ in range(1000):
        connection.sendall(b"H")
        if threading.Event().wait(0.02):
            return


def pour(connection, target):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"[" * 65536)


def stay_silent(connection, target):
    connection.recv(1)


def send(data):
    return lambda connection, target: connection.sendall(data)


HOSTILE = {
    "silent": stay_silent,
    "one byte at a time": drip,
    "without end": pour,
    "closes at once": lambda connection, target: None,
    "not HTTP": send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "binary": send(bytes(range(256)) * 64),
    "HTML": send(http(b"<html>a web site</html>")),
    "100,000 brackets": send(http(b"[" * 100_000)),
    "100,000 braces": send(http(b'{"data":' * 10_000)),
    "a 5,000-digit number": send(http(b'{"data": ' + b"9" * 5000 + b"}")),
    "null": send(http(b"null")),
    "data is a number": send(http({"data": 5})),
    "models are numbers": send(http({"data": [5], "models": [5]})),
    "500": send(http(models("a"), "500 Internal Server Error")),
    "401": send(http(models("a"), "401 Unauthorized")),
    "chunked": send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    "shorter than it says": send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}"),
    "a head without end": send(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000),
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_hostile_answers_are_survived(answer):
    good = by_target({"/v1/models": http(models("a", owner="vllm"))})
    with serve(answer) as (port, _), serve(good) as (other, _):
        assert [engine.product for engine in find_at(port, other)] == ["vLLM"]


def test_redirects_are_not_followed():
    with serve(by_target({"/v1/models": http(models("secret", owner="vllm"))})) as (goal, targets):
        redirect = http(b"", "307 Temporary Redirect", f"Location: http://127.0.0.1:{goal}/v1/models\r\n")
        with serve(send(redirect)) as (port, _):
            assert find_at(port) == []
    assert targets == []


def test_names_from_engines_are_bounded_and_printable():
    names = ["\x1b[2Jevil\n", "x" * 5000] + [str(n) for n in range(500)]
    data = models(*names, owner="vllm")
    data["data"].insert(0, {"id": 5})
    with serve(by_target({"/v1/models": http(data)})) as (port, _):
        (engine,) = find_at(port)
    assert len(engine.models) == dvai_bridge.ENGINE_MODELS_LIMIT - 1
    assert engine.models[0] == r"\x1b[2Jevil\n"
    assert max(map(len, engine.models)) == 64
    assert describe_engine(engine).isprintable()


def test_engine_line():
    engine = FoundEngine(product="Ollama", base_url="http://127.0.0.1:11434/v1", models=tuple("abcdefg"))
    assert describe_engine(engine) == "Ollama serves 7 models (a, b, c, d, e, …) at http://127.0.0.1:11434/v1"
    one = FoundEngine(product="vLLM", base_url="http://127.0.0.1:8000/v1", models=("a",))
    assert describe_engine(one) == "vLLM serves 1 model (a) at http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    "data",
    [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 999 X\r\n\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n"],
)
def test_what_is_no_answer(data):
    assert parse_probe_answer(data) is None


def test_an_answer_in_parts():
    answer = parse_probe_answer(b"HTTP/1.1 204 No Content\r\nServer: X: y\r\nodd\r\n\r\nrest")
    assert (answer.status, answer.headers["server"], answer.body) == (204, "X: y", b"rest")
