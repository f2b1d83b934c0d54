"""Delegation as a library: provider and consumer in one process, with and without an event loop of the program's."""

import asyncio
import contextlib
import http.client
import json

import pytest

from dvai_bridge import (
    DVAI,
    BridgeError,
    DelegationError,
    InvalidRequestError,
    ModelNotFoundError,
    OffloadConfig,
    ProviderRefusedError,
    UsageError,
)
from tests.support import CLEAN_ENVIRON, wait_for
from tests.support_worker import build_byte_model

HISTORY = [{"role": "user", "content": "Hi"}]
ASKED = {"max_tokens": 8, "temperature": 0}
NOBODY = "x" * 42 + "w"  # the key of nobody who is there


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "strong.gguf"
    path.write_bytes(build_byte_model())
    return path


def build_provider(folder, model):
    """Which nobody reaches but on loopback, where the consumer is told of it."""
    offload = OffloadConfig(discover_lan=False, device_name="strong one")
    return DVAI(environ=CLEAN_ENVIRON, home=folder / "strong", port=0, model=model, engine="builtin", offload=offload)


def build_consumer(folder, provider, **options):
    options = {"model": "builtin"} | options
    on_offload = options.pop("on_offload", None)
    offload = OffloadConfig(discover_lan=False, known_peers=[provider.base_url], on_offload=on_offload)
    return DVAI(environ=CLEAN_ENVIRON, home=folder / "weak", port=0, offload=offload, **options)


def read_firewall(folder):
    return json.loads((folder / "strong" / "data" / "firewall.json").read_bytes())


def test_without_an_event_loop(tmp_path, model):
    told = []
    with (
        build_provider(tmp_path, model) as strong,
        build_consumer(tmp_path, strong, on_offload=told.append) as weak,
    ):
        key = strong.public_key
        with pytest.raises(DelegationError) as unreachable:
            weak.load_model("strong", delegate={"provider_public_key": key, "timeout": 500})
        assert unreachable.value.code == "provider_unreachable", "it is not a provider yet"
        assert strong.start_provider() == key, "the key stays"
        assert not (tmp_path / "strong" / "data" / "firewall.json").exists(), "nobody is admitted, and nothing was said"
        with pytest.raises(ProviderRefusedError, match=f"--allow {weak.public_key}"):
            weak.heartbeat(key)
        assert strong.start_provider({"mode": "allow", "public_keys": [weak.public_key]}) == key
        assert read_firewall(tmp_path)["publicKeys"] == [weak.public_key]
        assert 0 < weak.heartbeat(key) < 60
        with pytest.raises(ModelNotFoundError):
            weak.load_model("another", delegate=key)
        assert weak.load_model("STRONG", delegate={"provider_public_key": key, "timeout": 60_000}) == "strong"
        completion = weak.completion(model_id="strong", history=HISTORY, **ASKED)
        text = "".join(completion.token_stream)
        own = strong.completion(model_id="strong", history=HISTORY, **ASKED)
        assert text == "".join(own.token_stream) and text
        stats = completion.stats
        assert (stats.served_by, stats.route) == (key, "lan") and own.stats.route == "local"
        assert stats.completion_tokens == own.stats.completion_tokens > 0
        wait_for(lambda: told, 20, "on_offload is told")
        assert {each.device_id for each in told} == {key}
        weak.unload_model("strong")
        with pytest.raises(BridgeError):
            "".join(weak.completion(model_id="strong", history=HISTORY, **ASKED).token_stream)
        once = weak.completion(model_id="strong", history=HISTORY, delegate=key, **ASKED)
        assert "".join(once.token_stream) == text
        strong.stop_provider()
        with pytest.raises(DelegationError):
            weak.heartbeat({"providerPublicKey": key, "timeout": 1000})
        assert strong.start_provider() == key and weak.heartbeat(key) > 0, "whom it admitted it admits again"


def test_with_an_event_loop(tmp_path, model):
    async def run():
        async with build_provider(tmp_path, model) as strong, build_consumer(tmp_path, strong) as weak:
            key = await strong.start_provider({"mode": "deny"})
            assert key == strong.public_key
            assert await weak.load_model("strong", delegate=key) == "strong"
            completion = weak.completion(model_id="strong", history=HISTORY, **ASKED)
            text = "".join([token async for token in completion.token_stream])
            own = strong.completion(model_id="strong", history=HISTORY, stream=False, **ASKED)
            assert [token async for token in own.token_stream] == [text]
            # many at a time, by one tunnel and by new ones
            delegate = {"provider_public_key": key, "force_new_connection": True}

            async def ask(**choice):
                asked = weak.completion(model_id="strong", history=HISTORY, **ASKED, **choice)
                return "".join([token async for token in asked.token_stream])

            texts = await asyncio.gather(*(ask(**choice) for choice in ({}, {}, {"delegate": delegate})))
            assert texts == [text] * 3
            # a stream that runs when somebody is shut out ends with an error
            long = weak.completion(model_id="strong", history=HISTORY, max_tokens=100_000, logit_bias={"2": -100})
            with pytest.raises(BridgeError):
                async for _ in long.token_stream:
                    await strong.start_provider({"mode": "deny", "publicKeys": [weak.public_key]})
            with pytest.raises(ProviderRefusedError):
                await weak.heartbeat(key)
            # what runs may finish when the provider stops
            await strong.start_provider({"mode": "deny"})
            tokens = weak.completion(model_id="strong", history=HISTORY, max_tokens=40, logit_bias={"2": -100})
            pieces = tokens.token_stream
            await anext(pieces)
            await strong.stop_provider()
            async for _ in pieces:
                pass
            assert (await tokens.stats).completion_tokens == 40

    asyncio.run(run())


def test_a_model_that_is_here_too_takes_over(tmp_path, model):
    """With `fallback_to_local`, whether its provider is there when it is loaded, later, or never."""
    nobody = {"provider_public_key": NOBODY, "timeout": 300, "fallback_to_local": True}
    with build_provider(tmp_path, model) as strong, build_consumer(tmp_path, strong, on_offload=None) as weak:

        def ask(model_id):
            connection = http.client.HTTPConnection("127.0.0.1", weak.port, timeout=60)
            with contextlib.closing(connection):
                body = json.dumps({"model": model_id, "messages": HISTORY} | ASKED)
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()
                return answer.headers["X-DVAI-Served-By"], answer.headers["X-DVAI-Route"]

        with pytest.raises(UsageError):
            weak.load_model("strong", delegate=nobody)  # falls back to what is not here
        model_id = weak.load_model(str(model), delegate=nobody)
        assert (model_id, ask(model_id)[1]) == ("strong", "local")
        weak.unload_model("strong")
        key = strong.start_provider({"mode": "deny"})
        assert weak.load_model("strong", delegate=nobody | {"provider_public_key": key, "timeout": 5000}) == "strong"
        assert ask("strong") == (key, "lan")
        strong.stop_provider()
        assert ask("strong")[1] == "local"
        strong.start_provider()
        wait_for(lambda: ask("strong") == (key, "lan"), 30, "the provider answers again")
        weak.unload_model("strong")
        assert ask("strong")[1] == "local"


def test_what_is_no_delegate_and_no_firewall(tmp_path):
    offload = OffloadConfig(discover_lan=False)
    with DVAI(environ=CLEAN_ENVIRON, home=tmp_path, port=0, model="builtin", offload=offload) as dvai:
        for delegate in ("short", {}, {"provider_public_key": NOBODY, "timeout": 0}, dvai.public_key):
            for call in (dvai.heartbeat, lambda value: dvai.load_model("builtin", delegate=value)):
                with pytest.raises(InvalidRequestError):
                    call(delegate)
        for firewall in ({"mode": "some"}, {"public_keys": "key"}, {"mode": "deny", "publicKeys": ["short"]}, {"a": 1}):
            with pytest.raises(UsageError, match="firewall"):
                dvai.start_provider(firewall)
        with pytest.raises(DelegationError, match="No provider can answer"):
            dvai.heartbeat({"provider_public_key": NOBODY, "timeout": 200})
        dvai.stop_provider()  # which it is not
