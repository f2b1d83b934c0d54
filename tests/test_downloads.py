"""Section Downloads, against a hub on loopback that breaks, lies, redirects and refuses."""

import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import dvai_bridge
from dvai_bridge import (
    DownloadError,
    HubAccess,
    HubReference,
    ModelPlace,
    PathLock,
    PullWatch,
    RemoteFile,
    StorageError,
    UnreachableError,
    UsageError,
    build_config,
    build_download_headers,
    choose_redirect,
    choose_remote_files,
    find_downloaded,
    find_models,
    find_tag,
    is_safe_path,
    is_token_allowed,
    load_hub_access,
    parse_download_url,
    parse_hub_listing,
    parse_hub_reference,
    parse_hub_url,
    pull_model,
    pull_url,
    use_hub_model,
)
from tests.support import CLEAN_ENVIRON, MODULE, PROGRAM, start_bridge, wait_for
from tests.support_gguf import ModelPlan, random_model
from tests.support_hub import (
    COMMIT,
    answer_chunks,
    answer_data,
    answer_status,
    break_after,
    build_etag,
    drip,
    hold,
    redirect,
    start_hub,
)
from tests.support_worker import build_byte_model

posix_only = pytest.mark.skipif(os.name != "posix", reason="POSIX file modes, links and signals")
MODEL = random_model(ModelPlan())
OTHER = random_model(ModelPlan(seed=2))
NAME = "user/Tiny-GGUF/tiny-Q8_0.gguf"
REFERENCE = HubReference(repo="user/Tiny-GGUF", tag="Q8_0")
TLS = Path(__file__).parent / "tls"
SIZE = len(MODEL)
assert len(OTHER) == SIZE > 8192


class Puller:
    """Pulls from a hub into a cache of its own; pauses are noted, not waited for."""

    def __init__(self, hub, cache, token=None):
        self.hub, self.cache, self.token = hub, Path(cache), token
        self.pauses, self.notices, self.progress = [], [], []
        self.places = [ModelPlace(source="the bridge's cache", path=self.cache / "models")]
        self.target = self.cache / "models" / NAME

    def options(self):
        watch = PullWatch(
            on_progress=lambda *seen: self.progress.append(seen),
            on_notice=self.notices.append,
            sleep=self.pauses.append,
        )
        return {"cache": self.cache, "access": HubAccess(endpoint=self.hub.url, token=self.token), "watch": watch}

    def pull(self, reference=REFERENCE):
        return pull_model(reference, places=self.places, **self.options())

    def pull_url(self, url):
        return pull_url(url, **self.options())

    def fails(self, words, error=DownloadError, pull=None):
        with pytest.raises(error) as caught:
            (pull or self.pull)()
        assert words in caught.value.message and "\n" not in caught.value.message, caught.value.message
        return caught.value

    def files(self):
        """What is in the cache, locks aside."""
        paths = (path for path in self.cache.rglob("*") if path.is_file() and path.suffix != ".lock")
        return {path.relative_to(self.cache / "models").as_posix(): path.read_bytes() for path in paths}

    def part(self):
        return self.files().get(f"{NAME}.part", b"")


@pytest.fixture
def puller(tmp_path):
    with start_hub({NAME: MODEL}) as hub:
        yield Puller(hub, tmp_path / "cache")


def digest(data):
    return hashlib.sha256(data).hexdigest()


# Names and choices


@pytest.mark.parametrize(
    ("text", "repo", "tag"),
    [
        ("user/repo", "user/repo", None),
        ("Us_er-1/re.po-GGUF:q4_k_m", "Us_er-1/re.po-GGUF", "q4_k_m"),
        ("u/r:dir/Some Model-Q8_0.gguf", "u/r", "dir/Some Model-Q8_0.gguf"),
    ],
)
def test_references(text, repo, tag):
    assert parse_hub_reference(text) == HubReference(repo=repo, tag=tag)
    assert str(parse_hub_reference(text)) == text and build_config(flags={"hf_repo": text}).hf_repo == text


@pytest.mark.parametrize(
    "text", ["", "repo", "a/b/c", "../x", "a/..", "a/.", "a/b.", ".a/b", "a/b:", "a/b:c:d", "a/b:\n", "a/ b", "ä/b"]
)
def test_what_is_no_reference(text):
    with pytest.raises(UsageError, match="USER/REPO"):
        parse_hub_reference(text)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/u/r", "u/r"),
        ("/u/r/resolve/main/d/x%20y.gguf?download=true", "u/r:d/x y.gguf"),
        ("/u/r/blob/main/x.gguf#L1", "u/r:x.gguf"),
        ("/u/r/resolve/v2/x.gguf", None),
        ("/u", None),
        ("", None),
    ],
)
def test_pages_of_the_hub(path, expected):
    found = parse_hub_url("https://huggingface.co" + path, "https://huggingface.co")
    assert (found and str(found)) == expected
    assert parse_hub_url("https://elsewhere.example" + path, "https://huggingface.co") is None


def remote(*paths, size=1000):
    return [RemoteFile(path=path, url=f"https://h/{path}", size_bytes=size) for path in paths]


MANY = [f"m-{tag}.gguf" for tag in ("BF16", "IQ4_NL", "Q2_K", "Q4_K_M", "Q8_0", "UD-Q4_K_M")]


@pytest.mark.parametrize(
    ("paths", "tag", "expected"),
    [
        (MANY, None, "m-Q4_K_M.gguf"),
        (MANY, "q4_k_m", "m-Q4_K_M.gguf"),
        (MANY, "UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (MANY, "bf16", "m-BF16.gguf"),
        (MANY, "m-q2_k.GGUF", "m-Q2_K.gguf"),
        (["m-UD-Q4_K_M.gguf"], "Q4_K_M", "m-UD-Q4_K_M.gguf"),
        (["m.Q4_K_M.gguf", "m.Q4_K_M-imat.gguf"], None, "m.Q4_K_M.gguf"),
        (["m-Q4_K_M-imat.gguf"], None, "m-Q4_K_M-imat.gguf"),
        (["m-Q2_K.gguf", "m-Q8_0.gguf"], None, "m-Q8_0.gguf"),
        (["m-F16.gguf", "m-Q2_K.gguf"], None, "m-F16.gguf"),
        (["MMPROJ-m-Q4_K_M.gguf", "imatrix.gguf", "m-F16.gguf"], None, "m-F16.gguf"),
        (["Q8_0/m-Q8_0.gguf", "Q2_K/m-Q2_K.gguf"], "Q2_K", "Q2_K/m-Q2_K.gguf"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "b-Q8_0.gguf", "b-Q8_0.gguf"),
        (["one.gguf"], None, "one.gguf"),
    ],
)
def test_the_quantisation_is_chosen_as_llama_cpp_does(paths, tag, expected):
    chosen = choose_remote_files(remote(*paths), HubReference(repo="u/r", tag=tag))
    assert [file.path for file in chosen] == [expected]


@pytest.mark.parametrize(
    ("paths", "tag", "words"),
    [
        (MANY, "Q5_K_M", ("no Q5_K_M", "m-Q2_K.gguf (1 kB)", "m-UD-Q4_K_M.gguf")),
        (MANY[:5], "Q5_K_M", ("no Q5_K_M", " Q2_K (1 kB), Q4_K_M")),
        (MANY, "4_NL", ("no 4_NL",)),  # half a name
        (MANY, "Q4_K", ("no Q4_K",)),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", ("several", "u/r:FILE", "a-Q8_0.gguf", "b-Q8_0.gguf")),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], None, ("several", "a-Q4_K_M.gguf")),
        (["mmproj-F16.gguf"], None, ("no GGUF model",)),
        ([], "Q8_0", ("no GGUF model",)),
        ([f"x{n}.gguf" for n in range(99)], "Q9", ("and 69 more",)),
    ],
)
def test_what_is_absent_or_could_be_several_is_told_with_what_there_is(paths, tag, words):
    with pytest.raises(UsageError) as caught:
        choose_remote_files(remote(*paths), HubReference(repo="u/r", tag=tag))
    assert all(word in caught.value.message for word in words) and "\n" not in caught.value.message


def test_a_split_model_is_all_its_parts_in_order():
    parts = [f"d/m-Q8_0-0000{n}-of-00003.gguf" for n in (3, 1, 2)]
    for tag in ("Q8_0", parts[1], "m-Q8_0.gguf"):
        chosen = choose_remote_files(remote("m-Q2_K.gguf", *parts), HubReference(repo="u/r", tag=tag))
        assert [file.path for file in chosen] == sorted(parts)
    with pytest.raises(DownloadError, match="2 of its 3 parts"):
        choose_remote_files(remote(*parts[:2]), REFERENCE)


def test_tags_are_texts_not_patterns():
    assert find_tag(["m-Q8_0", "m-Q4"], "Q._0") == [] and find_tag(["m-Q8_0"], "(") == []


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("x.gguf", True),
        ("a/b/Some Model (1).gguf", True),
        ("ä.gguf", True),
        *((path, False) for path in ("", "/x.gguf", "../x.gguf", "a/../x.gguf", "a//x.gguf", "./x.gguf", ".x.gguf")),
        *((path, False) for path in ("a\\x.gguf", "c:x.gguf", "x.gguf ", "x.gguf.", "a\n.gguf", "a\u202e.gguf")),
        *((path, False) for path in ("a/b/c/d/x.gguf", "ä" * 101 + ".gguf", "x?.gguf", "x\0.gguf")),
    ],
)
def test_names_from_a_hub_stay_below_our_directory(path, safe):
    assert is_safe_path(path) is safe


def test_a_listing():
    files = [
        {"rfilename": "a b-Q8_0.gguf", "size": 7, "lfs": {"sha256": "a" * 64, "size": 9}},
        {"rfilename": "c.GGUF", "size": 5},
        {"rfilename": "README.md", "size": 5},
        {"rfilename": "../x.gguf", "size": 5},
    ]
    first, second = parse_hub_listing(json.dumps({"sha": COMMIT, "siblings": files}).encode(), "https://h/u/r")
    assert (first.url, first.size_bytes, first.sha256) == (
        f"https://h/u/r/resolve/{COMMIT}/a%20b-Q8_0.gguf",
        9,
        "a" * 64,
    )
    assert (second.name, second.size_bytes, second.sha256) == ("c.GGUF", 5, None)
    (moved,) = parse_hub_listing(json.dumps({"sha": "../..", "siblings": files[1:2]}).encode(), "https://h/u/r")
    assert moved.url == "https://h/u/r/resolve/main/c.GGUF"


@pytest.mark.parametrize("entry", [None, 7, {}, {"rfilename": 7}, {"rfilename": "x.txt"}])
def test_entries_of_a_listing_that_are_none_are_not_there(entry):
    assert parse_hub_listing(json.dumps({"siblings": [entry]}).encode(), "https://h/u/r") == []


@pytest.mark.parametrize("size", [True, -1, 1.5, "7", 1 << 50, None])
@pytest.mark.parametrize("sha256", ["A" * 64, "a" * 63, 7, None, ["a" * 64]])
def test_sizes_and_checksums_that_are_none_are_not_known(size, sha256):
    entry = {"rfilename": "x.gguf", "lfs": {"size": size, "sha256": sha256}}
    (file,) = parse_hub_listing(json.dumps({"siblings": [entry]}).encode(), "https://h/u/r")
    assert (file.size_bytes, file.sha256) == (None, None)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"[]", b"{}", b'{"siblings": 7}', b"[" * 100_000, b'{"siblings":[NaN]}']
)
def test_what_is_no_listing(data):
    with pytest.raises(ValueError):
        parse_hub_listing(data, "https://h/u/r")


# The token


@pytest.mark.parametrize(
    ("url", "endpoint", "allowed"),
    [
        ("https://huggingface.co/u/r", "https://huggingface.co", True),
        ("https://HuggingFace.co:443/u/r", "https://huggingface.co", True),
        ("https://huggingface.co/u/r", "https://huggingface.co/mirror", True),
        ("https://cdn.huggingface.co/u/r", "https://huggingface.co", False),
        ("https://huggingface.co.evil.example/u", "https://huggingface.co", False),
        ("https://huggingface.co:444/u/r", "https://huggingface.co", False),
        ("http://huggingface.co/u/r", "https://huggingface.co", False),
        ("http://mirror.lan/u/r", "http://mirror.lan", False),  # readable on the wire
        ("http://127.0.0.1:8000/u/r", "http://127.0.0.1:8000", True),
        ("http://[::1]:8000/u/r", "http://[::1]:8000", True),
        ("http://127.0.0.1:8001/u/r", "http://127.0.0.1:8000", False),
    ],
)
def test_where_the_token_may_go(url, endpoint, allowed):
    assert is_token_allowed(url, endpoint) is allowed
    headers = build_download_headers(url, HubAccess(endpoint=endpoint, token="hf_secret"), {"Range": "bytes=1-"})
    assert ("Authorization" in headers) is allowed and headers["Range"] == "bytes=1-"


def test_the_token_is_in_no_repr():
    assert "hf_secret" not in repr(HubAccess(token="hf_secret"))


def test_where_the_token_comes_from(tmp_path):
    def load(**environ):
        return load_hub_access({"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)} | environ, "linux")

    assert load() == HubAccess(endpoint="https://huggingface.co", token=None)
    for number, (folder, environ) in enumerate(
        [
            (tmp_path / ".cache" / "huggingface", {}),
            (tmp_path / "xdg" / "huggingface", {"XDG_CACHE_HOME": str(tmp_path / "xdg")}),
            (tmp_path / "hf", {"HF_HOME": str(tmp_path / "hf")}),
            (tmp_path / "other", {"HF_TOKEN_PATH": str(tmp_path / "other" / "token")}),
        ]
    ):
        folder.mkdir(parents=True)
        (folder / "token").write_text(f"hf_{number}\n")
        assert load(**environ).token == f"hf_{number}"
        assert load(**environ, HF_TOKEN="hf_mine").token == "hf_mine"
    assert load(HF_ENDPOINT="http://127.0.0.1:9/").endpoint == "http://127.0.0.1:9"


@pytest.mark.parametrize("token", ["hf_sécret", "hf_a hf_b", "hf_a\r\nX-Evil: 1"])
def test_a_token_that_is_none_is_refused_and_not_shown(tmp_path, token):
    with pytest.raises(UsageError) as caught:
        load_hub_access({"HOME": str(tmp_path), "HF_TOKEN": token}, "linux")
    assert "hf_" not in caught.value.message


@pytest.mark.parametrize(
    "url", ["huggingface.co", "ftp://h", "https://", "https://u:p@h", "https://h:x", "https://h /", "https://h\n"]
)
def test_what_is_no_endpoint(tmp_path, url):
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        load_hub_access({"HOME": str(tmp_path), "HF_ENDPOINT": url}, "linux")
    with pytest.raises(ValueError):
        parse_download_url(url)


@pytest.mark.parametrize(
    ("location", "may_be_plain", "expected"),
    [
        ("https://cdn.example/x", False, "https://cdn.example/x"),
        ("/y?z=1", False, "https://h/y?z=1"),
        ("http://h/x", True, "http://h/x"),
        ("http://h/x", False, None),
        ("file:///etc/passwd", True, None),
        ("https://u:p@h/x", True, None),
        ("", True, None),
        (None, True, None),
    ],
)
def test_redirects(location, may_be_plain, expected):
    with contextlib.nullcontext() if expected else pytest.raises(DownloadError, match="redirects to"):
        assert choose_redirect("https://h/x", location, may_be_plain=may_be_plain) == expected


# Whole downloads


def test_a_model_is_downloaded_checked_and_found(puller):
    pulled = puller.pull()
    assert (pulled.model_id, pulled.path, pulled.size_bytes) == ("tiny-Q8_0", puller.target, SIZE)
    assert not pulled.was_present and pulled.files == (puller.target,)
    checksum = f"{digest(MODEL)}  tiny-Q8_0.gguf\n".encode()
    assert puller.files() == {NAME: MODEL, f"{NAME}.sha256": checksum}
    assert [model.path for model in find_models(puller.places)] == [puller.target]
    assert puller.hub.asked[1].target == f"/user/Tiny-GGUF/resolve/{COMMIT}/tiny-Q8_0.gguf"
    assert puller.progress == sorted(puller.progress) and puller.progress[-1] == (SIZE, SIZE)


def test_what_is_here_is_not_downloaded_again_and_what_changed_is(puller):
    puller.pull()
    assert puller.pull().was_present and len(puller.hub.downloads()) == 1
    (puller.target.with_name("tiny-Q8_0.gguf.sha256")).unlink()  # then it is read
    assert puller.pull().was_present and len(puller.hub.downloads()) == 1
    puller.hub.files[NAME] = OTHER  # of the same size
    assert not puller.pull().was_present and puller.target.read_bytes() == OTHER
    assert puller.pull().was_present and len(puller.hub.downloads()) == 2


@posix_only
def test_what_is_in_a_hubs_cache_is_used_if_it_is_the_same(puller, tmp_path):
    folder = tmp_path / "hub" / "models--user--Tiny-GGUF"
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "blobs" / digest(MODEL)).write_bytes(MODEL)
    link = folder / "snapshots" / COMMIT / "tiny-Q8_0.gguf"
    link.symlink_to(f"../../blobs/{digest(MODEL)}")
    puller.places.append(ModelPlace(source="Hugging Face", path=tmp_path / "hub"))
    pulled = puller.pull()
    assert pulled.was_present and pulled.path == link and not puller.hub.downloads()
    assert find_downloaded(REFERENCE, puller.places).path == link
    puller.hub.files[NAME] = OTHER
    assert puller.pull().path == puller.target and puller.target.read_bytes() == OTHER


def test_a_split_model_comes_with_all_its_parts(puller):
    names = [f"user/Tiny-GGUF/m-Q2_K-0000{n}-of-00002.gguf" for n in (1, 2)]
    puller.hub.files |= {names[0]: MODEL, names[1]: OTHER, "user/Tiny-GGUF/mmproj-m-Q2_K.gguf": MODEL}
    puller.hub.misbehave += [break_after(5000), lambda *_: True, break_after(3000)]
    reference = HubReference(repo="user/Tiny-GGUF", tag="q2_k")
    pulled = puller.pull(reference)
    assert pulled.model_id == "m-Q2_K" and pulled.size_bytes == 2 * SIZE and len(pulled.files) == 2
    assert {name: puller.files()[name] for name in names} == {names[0]: MODEL, names[1]: OTHER}
    assert len([name for name in puller.files() if name.endswith(".gguf")]) == 2
    assert puller.progress == sorted(puller.progress) and puller.progress[-1] == (2 * SIZE, 2 * SIZE)
    assert puller.pull(reference).was_present
    assert find_downloaded(reference, puller.places).files == pulled.files
    pulled.files[1].unlink()
    assert find_downloaded(reference, puller.places) is None
    asked = len(puller.hub.downloads())
    assert not puller.pull(reference).was_present and len(puller.hub.downloads()) == asked + 1


def test_a_hub_without_checksums_and_sizes_is_believed_with_the_header_checked(puller):
    puller.hub.listing[NAME] = {"lfs": None, "size": None}
    assert puller.pull().path.read_bytes() == MODEL
    assert puller.pull().was_present
    for path in puller.target.parent.glob("tiny*"):
        path.unlink()
    puller.hub.files[NAME] = MODEL[:-100]
    puller.fails("past the end of the file")
    assert puller.files() == {}


def test_the_checksum_may_also_come_with_the_answer(puller):
    puller.hub.listing[NAME] = {"lfs": None}
    puller.hub.headers["X-Linked-Etag"] = f'"{digest(OTHER)}"'
    puller.fails("checksum")
    puller.hub.headers["X-Linked-Etag"] = f'"{digest(MODEL)}"'
    assert puller.pull().path.read_bytes() == MODEL


# Connections that break


@pytest.mark.parametrize("reset", [False, True])
def test_a_broken_connection_is_gone_on_from(puller, reset):
    puller.hub.misbehave += [break_after(5000, reset=reset), break_after(1000, reset=reset)]
    assert puller.pull().path.read_bytes() == MODEL
    ranges = [each.headers.get("range") for each in puller.hub.downloads()]
    assert ranges[0] is None and (reset or ranges[1:] == ["bytes=5000-", "bytes=6000-"])
    assert {each.headers.get("if-range") for each in puller.hub.downloads() if "range" in each.headers} <= {
        build_etag(MODEL)
    }
    assert len(puller.pauses) == len(puller.notices) == 2 and puller.pauses[0] < puller.pauses[1] * 3


def test_a_later_run_goes_on_from_an_earlier_one(puller):
    puller.hub.misbehave += [break_after(700)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    kept = 700 * dvai_bridge.DOWNLOAD_ATTEMPTS
    error = puller.fails("times in a row; 4.2 kB are kept, and the same command goes on from there")
    assert error.exit_code == 1 and puller.part() == MODEL[:kept] and NAME not in puller.files()
    assert find_models(puller.places) == []
    assert puller.pull().path.read_bytes() == MODEL
    assert puller.hub.downloads()[-1].headers["range"] == f"bytes={kept}-"
    assert len(puller.files()) == 2


def test_a_part_that_was_whole_before_the_kill_is_not_asked_for(puller):
    puller.hub.misbehave += [break_after(1000)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    puller.fails("kept")
    part = puller.target.with_name("tiny-Q8_0.gguf.part")
    part.write_bytes(MODEL)
    asked = len(puller.hub.downloads())
    assert puller.pull().path.read_bytes() == MODEL and len(puller.hub.downloads()) == asked


def test_an_interrupt_while_the_kept_part_is_read_keeps_it(puller, monkeypatch):
    puller.hub.misbehave += [break_after(1000)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    puller.fails("kept")
    kept = puller.part()
    with monkeypatch.context() as patch:
        patch.setattr(dvai_bridge.os, "read", lambda *_: signal.raise_signal(signal.SIGINT))
        previous = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            puller.fails("stopped")
        finally:
            signal.signal(signal.SIGINT, previous)
    assert puller.part() == kept and puller.pull().path.read_bytes() == MODEL
    assert puller.hub.downloads()[-1].headers["range"] == f"bytes={len(kept)}-"


@pytest.mark.parametrize("about", [b"", b"{", b"[]", b"{}", b'{"sha256": 7}', b'{"sha256": "%b"}' % (b"0" * 64)])
def test_a_part_of_something_else_is_not_gone_on_from(puller, about):
    puller.target.parent.mkdir(parents=True)
    puller.target.with_name("tiny-Q8_0.gguf.part").write_bytes(OTHER[:5000])
    puller.target.with_name("tiny-Q8_0.gguf.part.json").write_bytes(about)
    assert puller.pull().path.read_bytes() == MODEL and "range" not in puller.hub.downloads()[0].headers


def test_a_part_that_is_too_long_is_not_gone_on_from(puller):
    puller.hub.misbehave += [break_after(1000)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    puller.fails("kept")
    puller.target.with_name("tiny-Q8_0.gguf.part").write_bytes(MODEL + b"x")
    assert puller.pull().path.read_bytes() == MODEL


def test_a_part_that_was_damaged_meanwhile_is_found_out(puller):
    puller.hub.misbehave += [break_after(1000)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    puller.fails("kept")
    part = puller.target.with_name("tiny-Q8_0.gguf.part")
    part.write_bytes(MODEL[:2000] + b"?" + part.read_bytes()[2001:])
    puller.fails("checksum")
    assert puller.files() == {} and puller.pull().path.read_bytes() == MODEL


def test_a_server_that_ignores_ranges_is_started_anew(puller):
    puller.hub.knows_ranges = False
    puller.hub.misbehave.append(break_after(5000))
    assert puller.pull().path.read_bytes() == MODEL
    assert puller.hub.downloads()[1].headers["range"] == "bytes=5000-"
    assert any("starts anew" in notice for notice in puller.notices)


@pytest.mark.parametrize("obeys", [True, False])
def test_a_file_that_changes_between_attempts_is_started_anew(puller, obeys):
    """`obeys`: the server knows If-Range; else it sends the rest of the new file, and only the ETag tells."""
    url = f"{puller.hub.url}/user/Tiny-GGUF/resolve/v1/tiny-Q8_0.gguf"
    name = "user/Tiny-GGUF/resolve/v1/tiny-Q8_0.gguf"
    puller.hub.files = {name: MODEL}

    def change(handler, asked):
        puller.hub.files[name] = OTHER + b"\0" * 32  # longer, too
        if not obeys:
            del handler.headers["If-Range"]
        return True

    puller.hub.misbehave += [break_after(5000), change]
    pulled = puller.pull_url(url)
    assert pulled.path.read_bytes() == OTHER + b"\0" * 32 and any("starts anew" in each for each in puller.notices)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (416, {}),
        (206, {}),
        (206, {"Content-Range": "bytes 7-9/10"}),
        (206, {"Content-Range": "bytes +5000-9/10"}),
        (204, {}),
    ],
)
def test_an_answer_to_another_question_is_asked_again(puller, status, headers):
    puller.hub.misbehave += [break_after(5000), answer_status(status, headers)]
    if status == 204:
        puller.fails("answers 204")
    else:
        assert puller.pull().path.read_bytes() == MODEL and "range" not in puller.hub.downloads()[2].headers


def test_a_network_that_vanishes_in_the_middle_is_waited_for(tmp_path):
    with start_hub({NAME: MODEL}) as hub, start_hub({NAME: MODEL}) as cdn:
        puller = Puller(hub, tmp_path)
        hub.misbehave += [
            break_after(5000),
            redirect("http://127.0.0.1:1/x"),
            redirect(lambda name: f"{cdn.url}/{name}"),
        ]
        assert puller.pull().path.read_bytes() == MODEL
        assert cdn.asked[0].headers["range"] == "bytes=5000-" and any("127.0.0.1" in each for each in puller.notices)


# Servers that are slow, each deadline shortened


def test_a_server_that_stops_is_asked_again(puller, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "DOWNLOAD_IDLE_S", 1)
    release = threading.Event()
    puller.hub.misbehave.append(hold(threading.Event(), release))
    assert puller.pull().path.read_bytes() == MODEL
    release.set()
    assert puller.hub.downloads()[1].headers["range"] == "bytes=1024-"


@pytest.mark.parametrize("where", ["misbehave", "misbehave_listing"])
def test_headers_that_never_end_are_cut_off(puller, monkeypatch, where):
    monkeypatch.setattr(dvai_bridge, "DOWNLOAD_HEADERS_S", 0.3)
    monkeypatch.setattr(dvai_bridge, "DOWNLOAD_ATTEMPTS", 2)
    stop = threading.Event()
    getattr(puller.hub, where).extend([drip(stop, b"HTTP/1.1 200 OK\r\nX-Slow: ")] * 2)
    puller.fails("2 times in a row")
    stop.set()


@pytest.mark.parametrize("where", ["misbehave", "misbehave_listing"])
def test_a_body_that_trickles_is_cut_off(puller, monkeypatch, where):
    monkeypatch.setattr(dvai_bridge, "DOWNLOAD_STALL_S", 0.3)
    monkeypatch.setattr(dvai_bridge, "DOWNLOAD_ATTEMPTS", 2)
    stop = threading.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\nGGUF" % SIZE
    getattr(puller.hub, where).extend([drip(stop, head), drip(stop, head.replace(b"200", b"503"))])
    puller.fails("in a row")
    stop.set()
    assert any("almost nothing" in notice for notice in puller.notices)


# Servers that lie


def test_a_length_that_is_not_the_announced_one_is_refused_before_a_byte(puller):
    for offered in (SIZE - 1, SIZE + 1):
        puller.hub.misbehave.append(answer_data(MODEL, {"Content-Length": str(offered)}))
        puller.fails(f"{SIZE} bytes were announced and {offered} are offered")
        assert puller.files() == {} and not puller.pauses
    puller.hub.headers.clear()
    puller.hub.misbehave += [break_after(5000), answer_status(206, {"Content-Range": "bytes 5000-5999/6000"})]
    puller.fails(f"{SIZE} bytes were announced and 6000 are offered")


def test_a_body_that_is_shorter_than_its_length_never_gets_a_name(puller):
    puller.hub.misbehave += [break_after(0)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    puller.fails("before the end")
    assert puller.files() == {}


def test_a_body_longer_than_announced_is_refused(puller):
    puller.hub.misbehave.append(answer_chunks([MODEL[:9000], MODEL[9000:], b"x"]))
    puller.fails(f"sends more than {SIZE} bytes")
    assert puller.files() == {}


def test_chunks_are_understood_and_their_breaking_noticed(puller):
    puller.hub.misbehave.append(answer_chunks([MODEL[:1], MODEL[1:3], MODEL[3:9000], MODEL[9000:]]))
    assert puller.pull().path.read_bytes() == MODEL
    puller.target.unlink()
    puller.hub.misbehave.append(answer_chunks([MODEL[:9000]]))  # ends in order, but too early
    assert puller.pull().path.read_bytes() == MODEL and "ended after 9000" in puller.notices[-1]


def test_a_wrong_checksum_removes_the_file(puller):
    puller.hub.misbehave.append(answer_data(OTHER))
    error = puller.fails("checksum is not the one that was announced, so it was removed")
    assert error.exit_code == 1 and puller.files() == {} and find_models(puller.places) == []
    assert puller.pull().path.read_bytes() == MODEL


def test_an_older_version_stays_until_the_new_one_is_whole(puller):
    puller.pull()
    puller.hub.files[NAME] = OTHER
    puller.hub.misbehave.append(answer_data(MODEL[:-1] + b"?"))
    puller.fails("checksum")
    assert puller.target.read_bytes() == MODEL and len(puller.files()) == 2


@pytest.mark.parametrize("size", [SIZE // 2, 100, 10])
def test_a_truncated_model_is_removed_even_if_its_checksum_is_right(puller, size):
    puller.hub.files[NAME] = MODEL[:size]
    puller.fails("tiny-Q8_0.gguf was removed: GGUF")
    assert puller.files() == {}


@pytest.mark.parametrize("pieces", [[b"<html>" * 100], [b"G", b"GU", b"x"]])
def test_what_does_not_begin_as_a_model_is_not_downloaded(puller, pieces):
    puller.hub.misbehave.append(answer_chunks(pieces))
    puller.fails("no GGUF file")
    assert puller.files() == {} and not puller.pauses


def test_compressed_bodies_are_refused(puller):
    puller.hub.headers["Content-Encoding"] = "gzip"
    puller.fails("compresses")


# Redirects


def test_the_token_goes_to_the_hub_and_not_along_a_redirect(tmp_path):
    with start_hub({NAME: MODEL}) as hub, start_hub({NAME: MODEL}) as cdn:
        puller = Puller(hub, tmp_path, token="hf_secret")
        hub.misbehave += [
            redirect(f"/{NAME}", 307),
            redirect(lambda name: f"{cdn.url}/{name}?signature=1", headers={"X-Linked-Etag": f'"{digest(MODEL)}"'}),
        ]
        assert puller.pull().path.read_bytes() == MODEL
        assert [each.token for each in hub.asked] == ["Bearer hf_secret"] * 3
        assert [each.token for each in cdn.asked] == [None]


def test_the_token_does_not_go_to_other_addresses_at_all(tmp_path):
    with start_hub({NAME: MODEL}) as hub, start_hub({"x/tiny.gguf": MODEL}) as other:
        puller = Puller(hub, tmp_path, token="hf_secret")
        puller.pull_url(f"{other.url}/x/tiny.gguf")
        assert [each.token for each in other.asked] == [None] and not hub.asked


def test_redirects_end(puller):
    puller.hub.misbehave += [redirect(f"/{NAME}")] * (dvai_bridge.DOWNLOAD_REDIRECTS_LIMIT + 1)
    puller.fails("redirects")
    assert len(puller.hub.downloads()) == dvai_bridge.DOWNLOAD_REDIRECTS_LIMIT + 1


def test_a_redirect_to_no_host_name_is_told(puller):
    puller.hub.misbehave += [redirect("http://a..b/x")]
    puller.fails("a..b cannot be reached", UnreachableError)


def test_a_renamed_repository_is_followed(puller):
    puller.hub.files = {"new/Name-GGUF/tiny-Q8_0.gguf": MODEL}
    puller.hub.misbehave_listing.append(redirect("/api/models/new/Name-GGUF", 307))
    puller.hub.misbehave.append(redirect(f"/new/Name-GGUF/resolve/{COMMIT}/tiny-Q8_0.gguf", 307))
    assert puller.pull().path == puller.target


def test_encryption_is_not_lost_on_the_way(tmp_path, monkeypatch):
    tls = (TLS / "cert.pem", TLS / "key.pem")
    with start_hub({NAME: MODEL}, tls=tls) as hub, start_hub({NAME: MODEL}) as plain:
        puller = Puller(hub, tmp_path)
        puller.fails("certificate of localhost is not trusted")
        monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
        hub.misbehave.append(redirect(lambda name: f"{plain.url}/{name}"))
        puller.fails("unencrypted")
        assert not plain.asked and puller.pull().path.read_bytes() == MODEL


# Refusals


@pytest.mark.parametrize(
    ("where", "status", "headers", "words"),
    [
        ("misbehave_listing", 401, {}, "user/Tiny-GGUF does not exist, or is private or gated (401)"),
        ("misbehave_listing", 404, {}, "user/Tiny-GGUF does not exist on 127.0.0.1 (404)"),
        ("misbehave_listing", 418, {}, "418"),
        ("misbehave", 401, {"X-Error-Code": "GatedRepo"}, "accept its licence"),
        ("misbehave", 403, {"X-Error-Code": "GatedRepo"}, "set HF_TOKEN"),
        ("misbehave", 404, {}, "tiny-Q8_0.gguf does not exist"),
        ("misbehave", 400, {}, "400"),
    ],
)
def test_a_refusal_says_what_to_do(puller, where, status, headers, words):
    getattr(puller.hub, where).append(answer_status(status, headers))
    puller.fails(words)
    assert puller.files() == {} and not puller.pauses
    puller.token = "hf_secret"
    getattr(puller.hub, where).append(answer_status(status, headers))
    error = puller.fails(words.replace("set HF_TOKEN", "see that the token (HF_TOKEN) may read it"))
    assert "hf_secret" not in error.message


@pytest.mark.parametrize("where", ["misbehave", "misbehave_listing"])
def test_a_server_that_asks_to_wait_is_waited_for(puller, where):
    getattr(puller.hub, where).extend(
        [answer_status(429, {"Retry-After": "7"}), answer_status(503), answer_status(500, {"Retry-After": "soon"})]
    )
    assert puller.pull().path.read_bytes() == MODEL
    assert puller.pauses[0] == 7 and 1 <= puller.pauses[1] <= 3 and 2 <= puller.pauses[2] <= 6
    assert "(429)" in puller.notices[0] and len(puller.notices) == 3


@pytest.mark.parametrize("where", ["misbehave", "misbehave_listing"])
def test_a_server_that_asks_to_wait_long_is_reported(puller, where):
    getattr(puller.hub, where).append(answer_status(429, {"Retry-After": "3600"}))
    assert puller.fails("(429): try again in 3600 s").retry_after_s == 3600 and not puller.pauses


def test_what_is_no_hub_is_told(puller):
    for body in (b"<html>login</html>", b"{}"):
        puller.hub.misbehave_listing.append(answer_status(200, {}, body))
        puller.fails("no Hugging Face hub")


def test_a_listing_without_end_is_refused(puller, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "HUB_LISTING_LIMIT_BYTES", 100)
    puller.fails("too many files")


def test_hosts_that_cannot_be_reached(tmp_path):
    for endpoint, words in (
        ("http://127.0.0.1:1", "127.0.0.1 cannot be reached"),
        ("http://hub.invalid", "hub.invalid"),
    ):
        with pytest.raises(UnreachableError) as caught:
            pull_model(REFERENCE, cache=tmp_path, places=[], access=HubAccess(endpoint=endpoint))
        assert words in caught.value.message and "--offline" in caught.value.message
        assert "HF_ENDPOINT" in caught.value.message


def test_a_disk_that_is_too_small_is_known_before(puller, monkeypatch):
    monkeypatch.setattr(dvai_bridge, "FREE_SPACE_RESERVE_BYTES", 1 << 62)
    puller.fails("are still to come")
    assert puller.files() == {} and not puller.hub.downloads()


def test_a_disk_that_fills_keeps_what_has_arrived(puller, monkeypatch):
    write, left = os.write, [4000]

    def write_until_full(fd, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(fd, data[: left[0]])
        left[0] -= written
        return written

    puller.target.parent.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(dvai_bridge, "_save_beside", lambda path, data: path.write_bytes(data))
        patch.setattr(dvai_bridge.os, "write", write_until_full)
        puller.fails("the disk is full; 4 kB are kept", StorageError)
    assert puller.part() == MODEL[:4000]
    assert puller.pull().path.read_bytes() == MODEL and puller.hub.downloads()[1].headers["range"] == "bytes=4000-"


def test_two_processes_do_not_download_the_same_file(puller):
    puller.target.parent.mkdir(parents=True)
    lock = PathLock(puller.target.with_name(".tiny-Q8_0.gguf.lock"))
    assert lock.try_acquire()
    puller.fails("another process is downloading")
    lock.release()
    assert puller.pull().path.read_bytes() == MODEL


# Other addresses


def test_any_url_can_be_pulled_and_gone_on_from_by_its_etag(puller):
    puller.hub.files = {"dir/some model.gguf": MODEL}
    url = f"{puller.hub.url}/dir/some%20model.gguf"
    puller.hub.misbehave += [break_after(1000)] * dvai_bridge.DOWNLOAD_ATTEMPTS
    puller.fails("kept", pull=lambda: puller.pull_url(url))
    pulled = puller.pull_url(url + "#part")
    assert pulled.path == puller.cache / "models" / "127.0.0.1" / "some model.gguf"
    assert pulled.path.read_bytes() == MODEL and puller.progress[-1] == (SIZE, SIZE)
    assert puller.hub.downloads()[-1].headers["if-range"] == build_etag(MODEL)
    asked = len(puller.hub.asked)
    assert puller.pull_url(url).was_present and len(puller.hub.asked) == asked


def test_without_an_etag_and_a_checksum_nothing_is_gone_on_from(puller):
    puller.hub.files = {"x/tiny.gguf": MODEL}
    puller.hub.knows_etags = False
    puller.hub.headers["Content-Length"] = str(SIZE)

    def break_without_etag(handler, name):
        handler.answer(200, {"Content-Length": str(SIZE)}, MODEL[:1000])

    puller.hub.misbehave += [break_without_etag] * dvai_bridge.DOWNLOAD_ATTEMPTS
    url = f"{puller.hub.url}/x/tiny.gguf"
    puller.fails("in a row", pull=lambda: puller.pull_url(url))
    puller.hub.asked.clear()
    assert puller.pull_url(url).path.read_bytes() == MODEL and "range" not in puller.hub.asked[0].headers


def test_a_split_url_is_all_its_parts(puller):
    names = [f"x/m-0000{n}-of-00002.gguf" for n in (1, 2)]
    puller.hub.files = {names[0]: MODEL, names[1]: OTHER}
    pulled = puller.pull_url(f"{puller.hub.url}/{names[0]}?a=1")
    assert [path.read_bytes() for path in pulled.files] == [MODEL, OTHER] and pulled.model_id == "m"
    assert all(each.target.endswith("?a=1") for each in puller.hub.asked)


@pytest.mark.parametrize(
    "url", ["https://h/x.bin", "https://h/", "https://h/..%2fx.gguf", "https://h/a-00001-of-99999.gguf"]
)
def test_urls_that_name_no_model(puller, url):
    puller.fails("", UsageError, pull=lambda: puller.pull_url(url))


# In a program, and without a network


def test_the_newest_of_what_is_here_is_found_by_name(tmp_path):
    place = ModelPlace(source="Hugging Face", path=tmp_path)
    for age, revision in enumerate(("new", "old")):
        folder = tmp_path / "models--user--Tiny-GGUF" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "tiny-Q8_0.gguf").write_bytes(MODEL)
        os.utime(folder / "tiny-Q8_0.gguf", (1e9 - age, 1e9 - age))
    for tag in ("Q8_0", "q8_0", "tiny-Q8_0.gguf", "somewhere/tiny-q8_0.gguf", None):
        found = find_downloaded(HubReference(repo="user/Tiny-GGUF", tag=tag), [place])
        assert found.path == tmp_path / "models--user--Tiny-GGUF" / "snapshots" / "new" / "tiny-Q8_0.gguf"
    for repo, tag in (("user/Tiny-GGUF", "Q4_K_M"), ("other/Tiny-GGUF", None)):
        assert find_downloaded(HubReference(repo=repo, tag=tag), [place]) is None


def test_a_config_means_what_is_here(tmp_path):
    place = ModelPlace(source="./models", path=tmp_path)
    config = build_config(flags={"hf_repo": "user/Tiny-GGUF:Q8_0"})
    with pytest.raises(UsageError, match="not on this machine"):
        use_hub_model(config, [place])
    (tmp_path / NAME).parent.mkdir(parents=True)
    (tmp_path / NAME).write_bytes(MODEL)
    assert use_hub_model(config, [place]).model == str(tmp_path / NAME)
    with pytest.raises(UsageError, match="keep one"):
        use_hub_model(build_config(flags={"hf_repo": "u/r", "model": "x"}), [place])
    plain = build_config(flags={"model": "x"})
    assert use_hub_model(plain, [place]) is plain


# The commands


def run_pull(hub, home, *arguments, command="pull", **environ):
    return subprocess.run(
        [*PROGRAM, command, *arguments],
        env=CLEAN_ENVIRON | {"DVAI_HOME": str(home), "HOME": str(home), "HF_ENDPOINT": hub.url} | environ,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=home,
    )


def test_pull_says_what_it_got_and_exits_0_1_or_2(tmp_path):
    with start_hub({NAME: MODEL}) as hub:
        target = tmp_path / "cache" / "models" / NAME
        done = run_pull(hub, tmp_path, "user/Tiny-GGUF")
        assert (done.returncode, done.stderr) == (0, "") and str(target) in done.stdout, done.stderr
        assert "is here now" in done.stdout and target.read_bytes() == MODEL
        shown = json.loads(
            run_pull(hub, tmp_path, f"{hub.url}/user/Tiny-GGUF/blob/main/tiny-Q8_0.gguf", "--json").stdout
        )
        assert shown == {
            "id": "tiny-Q8_0",
            "path": str(target),
            "files": [str(target)],
            "sizeBytes": SIZE,
            "wasPresent": True,
        }
        for arguments, code, words in (
            (["user/Other-GGUF"], 1, "does not exist"),
            (["user/Tiny-GGUF:Q2_K"], 2, "it has: Q8_0"),
            (["tiny"], 2, "USER/REPO"),
            ([], 2, "required"),
            (["user/Tiny-GGUF:Q2_K", "--offline"], 1, "--offline"),
            ([f"{hub.url}/x/y.gguf", "--offline"], 1, "--offline"),
        ):
            done = run_pull(hub, tmp_path, *arguments)
            assert (done.returncode, done.stdout) == (code, "") and words in done.stderr, done.stderr
            assert done.stderr.count("\n") == 1
        asked = len(hub.asked)
        done = run_pull(hub, tmp_path, "user/Tiny-GGUF", HF_HUB_OFFLINE="1")
        assert done.returncode == 0 and "was here already" in done.stdout and len(hub.asked) == asked


def test_pull_takes_what_is_here_where_no_network_is_and_says_so(tmp_path):
    with start_hub({NAME: MODEL}) as hub:
        run_pull(hub, tmp_path, "user/Tiny-GGUF")
        done = run_pull(hub, tmp_path, "user/Tiny-GGUF", HF_ENDPOINT="http://127.0.0.1:1")
        assert done.returncode == 0 and "taking what is here" in done.stderr
        done = run_pull(hub, tmp_path, "user/Other", HF_ENDPOINT="http://127.0.0.1:1")
        assert done.returncode == 1 and "cannot be reached" in done.stderr


def test_proxies_of_the_environment_are_used_and_never_see_the_token(tmp_path):
    with start_hub({NAME: MODEL}) as proxy:
        environ = {"http_proxy": proxy.url, "no_proxy": "", "HF_TOKEN": "hf_secret"}
        done = run_pull(proxy, tmp_path, "user/Tiny-GGUF", HF_ENDPOINT="http://hub.invalid", **environ)
        assert done.returncode == 0, done.stderr
        assert [each.target.partition("?")[0] for each in proxy.asked] == [
            "http://hub.invalid/api/models/user/Tiny-GGUF",
            f"http://hub.invalid/user/Tiny-GGUF/resolve/{COMMIT}/tiny-Q8_0.gguf",
        ]
        assert not any(each.token for each in proxy.asked)
        dead = {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}
        assert run_pull(proxy, tmp_path, "user/Tiny-GGUF", **dead).returncode == 0  # loopback needs none


# A shell that starts pytest in the background makes its children ignore SIGINT.
INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@posix_only
def test_an_interrupted_pull_says_what_is_kept_and_goes_on(tmp_path):
    seen, release = threading.Event(), threading.Event()
    with start_hub({NAME: MODEL}) as hub:
        hub.misbehave.append(hold(seen, release))
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTIBLE, str(MODULE), "pull", "user/Tiny-GGUF", "--home", str(tmp_path)],
            env=CLEAN_ENVIRON | {"HF_ENDPOINT": hub.url, "HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert seen.wait(30)
        part = tmp_path / "cache" / "models" / f"{NAME}.part"
        wait_for(lambda: part.exists() and part.stat().st_size == 1024, 30, "the first bytes are on the disk")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        release.set()
        assert (process.returncode, out) == (1, "") and "stopped; 1 kB are kept" in err and "Traceback" not in err
        assert run_pull(hub, tmp_path, "user/Tiny-GGUF").returncode == 0
        assert hub.downloads()[-1].headers["range"] == "bytes=1024-"


def test_serve_downloads_and_answers_and_does_so_again_without_a_network(tmp_path):
    with start_hub({"user/Tiny-GGUF/tiny-Q2_K.gguf": OTHER, NAME: build_byte_model()}) as hub:
        environ = {"HF_ENDPOINT": hub.url, "HOME": str(tmp_path)}
        with start_bridge(tmp_path / "home", "-hf", "user/Tiny-GGUF:q8_0", environ=environ) as bridge:
            status, _, body = bridge.request("POST", "/v1/completions", {"prompt": "Hi", "max_tokens": 4})
            assert status == 200 and json.loads(body)["model"] == "tiny-Q8_0"
        assert len(hub.downloads()) == 1
    environ["HF_HUB_OFFLINE"] = "1"
    with start_bridge(tmp_path / "home", "--hf-repo", "user/Tiny-GGUF", environ=environ) as bridge:
        assert json.loads(bridge.request("GET", "/v1/models")[2])["data"][0]["id"] == "tiny-Q8_0"
    for arguments, code, words in (
        (["-hf", "user/Tiny-GGUF:Q2_K", "--offline"], 1, "not on this machine"),
        (["-hf", "user/Tiny-GGUF", "--model", "x"], 2, "keep one"),
        (["-hf", "tiny"], 2, "-hf"),
    ):
        done = run_pull(hub, tmp_path, *arguments, "--port", "0", command="serve")
        assert (done.returncode, done.stderr.count("\n")) == (code, 1) and words in done.stderr, done.stderr
