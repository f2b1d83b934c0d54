"""Several models behind one endpoint: real `serve` processes, and a bridge inside a program of one's own."""

import asyncio
import contextlib
import http.client
import json
import subprocess

import pytest

from dvai_bridge import (
    DVAI,
    BridgeError,
    ModelFileError,
    ModelNotFoundError,
    NoLocalBackendError,
    UsageError,
    build_config,
)
from tests.support import CLEAN_ENVIRON, PROGRAM, read_health, start_bridge, wait_for
from tests.support_worker import END_ID, build_byte_model

PROMPT = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "logit_bias": {str(END_ID): -100}}
CHAT = {"max_tokens": 6, "temperature": 0, "logit_bias": {str(END_ID): -100}}
HISTORY = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with two models, and what is none."""
    directory = tmp_path_factory.mktemp("models")
    (directory / "anna.gguf").write_bytes(build_byte_model(seed=1))
    (directory / "deeper").mkdir()
    (directory / "deeper" / "Berta.gguf").write_bytes(build_byte_model(seed=2))
    whole = (directory / "anna.gguf").read_bytes()
    (directory / "damaged.gguf").write_bytes(whole[: len(whole) // 2])
    (directory / "notes.txt").write_text("no model")
    return directory


def ask(bridge, model=None, **body):
    request = PROMPT | body | ({} if model is None else {"model": model})
    status, _, data = bridge.request("POST", "/v1/completions", request, timeout_s=60)
    return status, json.loads(data)


def read_states(bridge):
    return {model["id"]: model["state"] for model in read_health(bridge)["models"]}


def find_workers(bridge):
    """Process ids of the bridge's children."""
    try:
        with open(f"/proc/{bridge.process.pid}/task/{bridge.process.pid}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        pytest.skip("finds the worker in /proc")


def test_a_directory_is_offered_and_loaded_model_by_model(models, tmp_path):
    with start_bridge(tmp_path, "--models-dir", models, "--models-max", 1) as bridge:
        assert read_states(bridge) == {"anna": "unloaded", "damaged": "unloaded", "Berta": "unloaded"}
        _, _, listed = bridge.request("GET", "/v1/models")
        assert [model["id"] for model in json.loads(listed)["data"]] == ["anna", "damaged", "Berta"]
        assert bridge.request("GET", "/v1/models/berta")[0] == 200
        answers = {}
        for name, other in (("anna", "Berta"), ("berta", "anna")) * 2:
            status, answer = ask(bridge, name)
            assert status == 200 and answer["model"].casefold() == name, answer
            assert answers.setdefault(name, answer["choices"][0]["text"]) == answer["choices"][0]["text"]
            states = read_states(bridge)
            assert states[answer["model"]] == "loaded" and states[other] == "unloaded"
            assert read_health(bridge)["currentModelId"] == answer["model"]
        assert ask(bridge)[1]["model"] == "anna", "the first is meant when none is named"


def test_the_memory_of_a_displaced_model_is_given_back(models, tmp_path):
    with start_bridge(tmp_path, "--models-dir", models, "--models-max", 1) as bridge:
        seen = set()
        for name in ("anna", "berta", "anna"):
            assert ask(bridge, name)[0] == 200
            (worker,) = find_workers(bridge)
            assert worker not in seen
            seen.add(worker)


def test_a_model_that_cannot_be_loaded_says_why_and_harms_no_other(models, tmp_path):
    with start_bridge(tmp_path, "--models-dir", models) as bridge:
        for _ in range(2):
            status, answer = ask(bridge, "damaged")
            assert status == 503 and answer["error"]["code"] == "model_load_failed"
            assert "damaged.gguf" in answer["error"]["message"] and "download it again" in answer["error"]["message"]
        assert ask(bridge, "anna")[0] == 200 and ask(bridge, "berta")[0] == 200
        assert read_states(bridge) == {"anna": "loaded", "damaged": "failed", "Berta": "loaded"}
        assert read_health(bridge)["status"] == "ok"
        status, answer = ask(bridge, "carla")
        assert status == 404 and answer["error"]["code"] == "model_not_found" and "'anna'" in answer["error"]["message"]
        shown = subprocess.run(
            [*PROGRAM, "status", "--home", str(tmp_path)],
            env=CLEAN_ENVIRON,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "anna: loaded" in shown.stdout and "damaged: failed (" in shown.stdout


def test_a_client_that_leaves_while_its_model_loads(models, tmp_path):
    with start_bridge(tmp_path, "--models-dir", models, "--models-max", 1) as bridge:
        assert ask(bridge, "anna")[0] == 200
        connection = http.client.HTTPConnection("127.0.0.1", bridge.port, timeout=30)
        body = json.dumps(PROMPT | {"model": "berta", "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_for(lambda: read_states(bridge)["Berta"] in ("loading", "loaded"), 60, "it is being loaded")
        connection.close()
        assert ask(bridge, "anna")[0] == 200 and ask(bridge, "berta")[0] == 200
        wait_for(lambda: read_health(bridge)["queue"]["running"] == 0, 60, "nobody is left")


def test_a_model_sleeps_when_a_request_says_so_and_returns(models, tmp_path):
    with start_bridge(tmp_path, "--model", models / "anna.gguf") as bridge:
        assert read_states(bridge) == {"anna": "loaded"}
        assert ask(bridge, keep_alive=0)[0] == 200
        wait_for(lambda: read_states(bridge)["anna"] == "sleeping", 60, "it sleeps")
        health = read_health(bridge)
        assert health["status"] == "ok" and health["currentModelId"] == "anna" and find_workers(bridge) == []
        assert ask(bridge)[0] == 200 and read_states(bridge) == {"anna": "loaded"}
        for wrong in ("soon", True, [], "5 m"):
            status, answer = ask(bridge, keep_alive=wrong)
            assert status == 400 and answer["error"]["param"] == "keep_alive"
        assert ask(bridge, keep_alive="5m")[0] == 200 and ask(bridge, keep_alive=-1, ttl=3)[0] == 200
        assert read_states(bridge) == {"anna": "loaded"}


def test_idle_models_sleep_after_the_configured_time(models, tmp_path):
    with start_bridge(tmp_path, "--model", models / "anna.gguf", "--sleep-idle-seconds", 1, ready=False) as bridge:
        wait_for(lambda: read_states(bridge)["anna"] == "sleeping", 60, "it sleeps")
        assert ask(bridge)[0] == 200
        wait_for(lambda: read_states(bridge)["anna"] == "sleeping", 60, "it sleeps again")


def test_several_models_by_name(models, tmp_path):
    one, two = models / "anna.gguf", models / "deeper" / "Berta.gguf"
    with start_bridge(tmp_path, "--model", two, "--model", one) as bridge:
        assert read_states(bridge) == {"Berta": "loaded", "anna": "unloaded"}
        assert ask(bridge)[1]["model"] == "Berta" and ask(bridge, "anna")[0] == 200
        assert read_states(bridge) == {"Berta": "loaded", "anna": "loaded"}, "there is room for both"
        wait_for(lambda: any(line.startswith("serving anna") for line in bridge.lines), 20, "it says so")


def test_another_device_gets_what_is_loaded_and_nothing_else(models, tmp_path):
    def peers_of(bridge):
        return json.loads(bridge.request("GET", "/v1/dvai/peers")[2])["peers"]

    lan = ("--lan", "--host", "127.0.0.1", "--pairing", "allow")
    with contextlib.ExitStack() as stack:
        strong = stack.enter_context(start_bridge(tmp_path / "strong", "--models-dir", models, *lan))
        assert ask(strong, "anna")[0] == 200
        peer = f"http://127.0.0.1:{strong.port}"
        weak = stack.enter_context(
            start_bridge(tmp_path / "weak", "--offload-only", "--no-discover-lan", "--peer", peer)
        )
        command = [*PROGRAM, "pair", "request", peer, "--yes", "--home", str(tmp_path / "weak")]
        subprocess.run(command, env=CLEAN_ENVIRON, capture_output=True, timeout=60, check=True)
        wait_for(lambda: [each["state"] for each in peers_of(weak)] == ["ready"], 60, "the peer is ready")
        _, _, listed = weak.request("GET", "/v1/models")
        assert [model["id"] for model in json.loads(listed)["data"]] == ["anna"]
        status, _, data = weak.request("POST", "/v1/chat/completions", CHAT | {"model": "anna", "messages": HISTORY})
        assert status == 200, data
        status, _, data = weak.request("POST", "/v1/chat/completions", CHAT | {"model": "Berta", "messages": HISTORY})
        assert status == 503 and json.loads(data)["error"]["type"] == "no_capable_device"
        assert read_states(strong)["Berta"] == "unloaded"


# Inside a program


def build(tmp_path, **flags):
    return DVAI(build_config(flags={"home": str(tmp_path / "home"), "port": "0"} | flags), environ={})


def test_models_come_and_go_in_a_program(models, tmp_path):
    async def run():
        seen = []
        async with build(tmp_path, model=str(models / "anna.gguf")) as dvai:
            model_id = await dvai.load_model(str(models / "deeper" / "Berta.gguf"), on_progress=seen.append)
            assert model_id == "Berta" and seen[-1] == 1.0
            completion = dvai.completion(model_id=model_id, history=HISTORY, **CHAT)
            text = "".join([piece async for piece in completion.token_stream])
            stats = await completion.stats
            assert stats.completion_tokens == 6 and stats.prompt_tokens > 0 and stats.tokens_per_s > 0
            assert (stats.served_by, stats.route) == ("local", "local") and stats.time_to_first_token_s > 0
            whole = dvai.completion(model_id=model_id, history=HISTORY, stream=False, **CHAT)
            assert [piece async for piece in whole.token_stream] == [text]
            unread = dvai.completion(history=HISTORY, **CHAT)
            assert (await unread.stats).completion_tokens == 6, "the default model"

            await dvai.unload_model("berta")
            with pytest.raises(ModelNotFoundError):
                await dvai.completion(model_id="Berta", history=HISTORY, **CHAT).stats
            assert await dvai.load_model("Berta") == "Berta"
            assert (await dvai.completion(model_id="Berta", history=HISTORY, **CHAT).stats).completion_tokens == 6

            with pytest.raises(ModelFileError, match=r"damaged\.gguf"):
                await dvai.load_model(str(models / "damaged.gguf"))
            with pytest.raises(UsageError):
                await dvai.load_model(str(models / "nobody.gguf"))
            with pytest.raises(BridgeError):
                await dvai.completion(model_id="damaged", history=HISTORY, **CHAT).stats

            await dvai.unload()
            with pytest.raises(NoLocalBackendError):
                await dvai.completion(history=HISTORY, **CHAT).stats
            assert dvai.model_id is None and await dvai.load_model("anna") == "anna" == dvai.model_id

    asyncio.run(run())


def test_a_completion_that_is_left_ends(models, tmp_path):
    async def run():
        async with build(tmp_path, model=str(models / "anna.gguf")) as dvai:
            completion = dvai.completion(history=HISTORY, **CHAT | {"max_tokens": 1500})
            async for _ in completion.token_stream:
                break
            await completion.aclose()
            local = dvai.host.models.get(None)
            assert local.queue.running == local.engine.users == 0
            with pytest.raises(BridgeError, match="to its end"):
                await completion.stats

    asyncio.run(run())


def test_the_same_without_an_event_loop(models, tmp_path):
    with build(tmp_path, model=str(models / "anna.gguf")) as dvai:
        assert dvai.load_model(str(models / "deeper" / "Berta.gguf")) == "Berta"
        completion = dvai.completion(model_id="Berta", history=HISTORY, **CHAT)
        text = "".join(completion.token_stream)
        assert completion.stats.completion_tokens == 6
        again = dvai.completion(model_id="Berta", history=HISTORY, stream=False, **CHAT)
        assert list(again.token_stream) == [text]
        left = dvai.completion(history=HISTORY, **CHAT | {"max_tokens": 1500})
        next(left.token_stream)
        left.close()
        dvai.unload_model("Berta")
        with pytest.raises(ModelNotFoundError):
            list(dvai.completion(model_id="Berta", history=HISTORY, **CHAT).token_stream)
