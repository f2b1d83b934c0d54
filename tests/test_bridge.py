"""What a bridge is built from, and a bridge inside a program of one's own."""

import asyncio
import dataclasses
import http.client
import json
import os

import pytest

from dvai_bridge import (
    BUILTIN_MODEL_ID,
    DVAI,
    FoundModel,
    ModelFileError,
    UsageError,
    build_config,
    build_load_request,
    choose_engine,
    choose_serving,
    choose_servings,
    count_cores,
    decode_load_request,
    encode_load_request,
    list_models_directory,
    load_api_keys,
)
from tests.gguf_writer import build_gguf
from tests.support_worker import END_ID, build_byte_model


def search_nothing():
    pytest.fail("the machine is searched without need")


def found(path, model_id="found", obstacle=None):
    return FoundModel(
        model_id=model_id,
        path=path,
        size_bytes=1,
        source="./models",
        architecture="llama",
        quantization="Q8_0",
        n_params=1_000_000,
        n_ctx_train=512,
        has_chat_template=True,
        obstacle=obstacle,
    )


def test_the_demonstration_model_is_served_when_nothing_is_named():
    for flags in ({}, {"model": "builtin"}):
        serving = choose_serving(build_config(flags=flags), search_nothing)
        assert serving.path is None and serving.model_id == BUILTIN_MODEL_ID and serving.created > 1_000_000_000
    assert choose_serving(build_config(flags={"alias": "me"}), search_nothing).model_id == "me"


def test_a_file_is_served_under_its_name_or_its_alias(tmp_path):
    path = tmp_path / "Some-Model-Q8_0.gguf"
    path.write_bytes(b"")
    serving = choose_serving(build_config(flags={"model": str(path)}), search_nothing)
    assert (serving.model_id, serving.path) == ("Some-Model-Q8_0", str(path))
    assert choose_serving(build_config(flags={"model": str(path), "alias": "x"}), search_nothing).model_id == "x"


@pytest.fixture(params=["with llama.cpp", "without"])
def has_llama(request, monkeypatch):
    is_installed = request.param == "with llama.cpp"
    monkeypatch.setattr("dvai_bridge.is_package_installed", lambda module: is_installed and module == "llama_cpp")
    return is_installed


def choose(path, **flags):
    config = build_config(flags={"model": str(path)} | flags)
    return config, choose_serving(config, search_nothing)


def test_auto_takes_llama_cpp_where_it_can(has_llama, tmp_path):
    (tmp_path / "a.gguf").write_bytes(build_byte_model())
    choice = choose_engine(*choose(tmp_path / "a.gguf"))
    assert choice.engine == ("llama" if has_llama else "builtin")
    assert ("is installed" if has_llama else "pip install 'llama-cpp-python") in choice.reason
    assert choose_engine(*choose("builtin")).engine == "builtin"
    (tmp_path / "no.gguf").write_bytes(build_byte_model({"general.type": "adapter"}))
    assert choose_engine(*choose(tmp_path / "no.gguf")).engine == "builtin"


def test_the_engine_that_is_named_is_taken_or_missed(has_llama, tmp_path):
    (tmp_path / "a.gguf").write_bytes(build_byte_model())
    assert choose_engine(*choose(tmp_path / "a.gguf", engine="builtin")).engine == "builtin"
    if has_llama:
        assert choose_engine(*choose(tmp_path / "a.gguf", engine="llama")).engine == "llama"
        with pytest.raises(UsageError, match="--model"):
            choose_engine(*choose("builtin", engine="llama"))
    else:
        with pytest.raises(UsageError, match=r"pip install 'llama-cpp-python>=0\.3\.36'"):
            choose_engine(*choose(tmp_path / "a.gguf", engine="llama"))


def test_the_best_model_is_the_best_for_the_engine(has_llama, tmp_path):
    large = found(tmp_path / "a.gguf")
    large = dataclasses.replace(large, n_params=3_000_000_000)
    large.path.write_bytes(b"")
    serving = choose_serving(build_config(flags={"model": "auto"}), lambda: [large])
    assert serving.path == (str(large.path) if has_llama else None)
    builtin = build_config(flags={"model": "auto", "engine": "builtin"})
    assert choose_serving(builtin, lambda: [large]).path is None


def test_all_that_the_engine_needs_is_asked_for(has_llama, tmp_path):
    (tmp_path / "a.gguf").write_bytes(build_byte_model())
    flags = {"n_gpu_layers": "7", "batch_size": "64", "flash_attn": "off", "rpc": "a:1, b:2", "ctx_size": "99"}
    config, serving = choose(tmp_path / "a.gguf", **flags, threads="3", parallel="5")
    load = build_load_request(config, serving)
    assert (load.n_gpu_layers, load.batch_size, load.flash_attn, load.rpc) == (7, 64, "off", ("a:1", "b:2"))
    assert (load.n_ctx, load.threads, load.slots, load.model) == (99, 3, 5, serving.path)
    assert decode_load_request(json.loads(json.dumps(encode_load_request(load)))) == load
    environ = {"LLAMA_ARG_N_GPU_LAYERS": "3", "LLAMA_ARG_BATCH": "32", "LLAMA_ARG_FLASH_ATTN": "on"}
    config = build_config(environ=environ | {"LLAMA_ARG_RPC": "c:3"})
    assert (config.n_gpu_layers, config.batch_size, config.flash_attn, config.rpc) == (3, 32, "on", ("c:3",))


def test_a_name_is_looked_up_among_what_was_found(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"")
    models = [found(path, "other"), found(path, "Found")]
    assert choose_serving(build_config(flags={"model": "found"}), lambda: models).path == str(path)
    assert choose_serving(build_config(flags={"model": "auto"}), lambda: models).path == str(path)
    with pytest.raises(UsageError, match=r"--model ghost: .*`models`"):
        choose_serving(build_config(flags={"model": "ghost"}), lambda: models)


def test_auto_falls_back_to_the_demonstration_and_says_why(tmp_path):
    serving = choose_serving(build_config(flags={"model": "auto"}), list)
    assert serving.path is None and "no model was found" in serving.reason
    able = [found(tmp_path / "a", obstacle="it is too large")]
    assert "too large" in choose_serving(build_config(flags={"model": "auto"}), lambda: able).reason


def serve(*names, search=search_nothing, **flags):
    config = build_config(flags={"model": list(names)} | flags if names else flags)
    return choose_servings(config, search, list_models_directory)


def test_several_models_are_offered_the_first_one_first(tmp_path):
    for name in ("one.gguf", "Two.gguf", "with,comma.gguf"):
        (tmp_path / name).write_bytes(b"")
    named = [str(tmp_path / "Two.gguf"), str(tmp_path / "with,comma.gguf")]
    assert [each.model_id for each in serve()] == [BUILTIN_MODEL_ID]
    assert [each.model_id for each in serve(*named)] == ["Two", "with,comma"]
    assert [each.model_id for each in serve(named[0], "builtin")] == ["Two", BUILTIN_MODEL_ID]
    assert [each.model_id for each in serve(named[0], alias="x")] == ["x"]
    # a directory's models come behind those that were named, each once
    both = serve(named[0], models_dir=str(tmp_path))
    assert [each.model_id for each in both] == ["Two", "one", "with,comma"]
    assert [each.model_id for each in serve(models_dir=str(tmp_path))] == ["Two", "one", "with,comma"]


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [tmp_path / "x.gguf", tmp_path / "a" / "X.gguf"]
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="another model called X"):
        serve(*map(str, paths))
    with pytest.raises(UsageError, match="--alias"):
        serve(str(paths[0]), "builtin", alias="y")
    with pytest.raises(UsageError, match="--alias"):
        serve(models_dir=str(tmp_path), alias="y")
    assert [each.path for each in serve(str(paths[0]), models_dir=str(tmp_path))] == [str(paths[0])]


def test_a_directory_without_models_is_a_mistake(tmp_path):
    with pytest.raises(UsageError, match="no GGUF model in it"):
        serve(models_dir=str(tmp_path))
    with pytest.raises(UsageError, match="no such directory"):
        serve(models_dir=str(tmp_path / "nowhere"))


def test_a_directory_offers_whole_models_only(tmp_path):
    (tmp_path / "model.gguf").write_bytes(build_byte_model())
    (tmp_path / "words.gguf").write_bytes(build_gguf({"general.architecture": "llama"}, []))
    (tmp_path / "eyes.gguf").write_bytes(build_gguf({"general.architecture": "clip"}, []))
    assert [model.model_id for model in list_models_directory(str(tmp_path))] == ["model"]


@pytest.mark.parametrize(
    ("text", "words"), [(b"# only\n\n", "no key"), (b"\xff\xfe", "UTF-8"), ("schlüssel\n".encode(), "ASCII")]
)
def test_a_useless_key_file_is_refused(tmp_path, text, words):
    path = tmp_path / "keys"
    path.write_bytes(text)
    with pytest.raises(UsageError, match=words):
        load_api_keys(build_config(flags={"api_key_file": str(path)}))


def test_keys_of_file_and_environment_add_up(tmp_path):
    path = tmp_path / "keys"
    path.write_text("sk-a\n  sk-b  \n# no\n")
    config = build_config(flags={"api_key_file": str(path)}, environ={"DVAI_API_KEY": "sk-c"})
    assert load_api_keys(config) == ("sk-c", "sk-a", "sk-b")


def test_cores_are_those_that_may_be_used():
    assert 1 <= count_cores() <= 8


def ask(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps({"prompt": "hello", "max_tokens": 4, "logit_bias": {str(END_ID): -100}})  # its weights are random
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_two_bridges_in_one_program(tmp_path):
    model = tmp_path / "tiny.gguf"
    model.write_bytes(build_byte_model())

    def build(name, on_progress=None):
        flags = {"home": str(tmp_path / name), "port": "0", "model": str(model), "alias": name, "engine": "builtin"}
        return DVAI(build_config(flags=flags), environ={}, on_progress=on_progress)

    async def run():
        seen = []
        one, two = build("one", seen.append), build("two")
        assert one.engine.load.engine == "builtin"
        async with one, two:
            assert one.port != two.port and one.base_url.endswith(f":{one.port}/v1")
            answers = await asyncio.gather(asyncio.to_thread(ask, one.port), asyncio.to_thread(ask, two.port))
            assert [(status, answer["model"]) for status, answer in answers] == [(200, "one"), (200, "two")]
            assert all(answer["usage"]["completion_tokens"] == 4 for _, answer in answers)
        assert one.engine.pid is None and two.engine.pid is None and seen[-1] == 1.0

    asyncio.run(run())


def test_a_bridge_that_cannot_load_closes_what_it_opened(tmp_path):
    model = tmp_path / "damaged.gguf"
    model.write_bytes(b"GGUF" + bytes(100))

    async def run():
        flags = {"home": str(tmp_path / "home"), "port": "0", "model": str(model)}
        bridge = DVAI(build_config(flags=flags), environ=dict(os.environ))
        with pytest.raises(ModelFileError, match=r"damaged\.gguf"):
            await bridge.initialize()
        with pytest.raises(OSError):
            http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=1).connect()
        assert bridge.engine.pid is None

    asyncio.run(run())
