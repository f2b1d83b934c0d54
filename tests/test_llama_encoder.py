"""Embedding models that do not write, in llama.cpp: beside llama-server, on a tiny BERT of random weights."""

from __future__ import annotations

import math

import pytest

from dvai_bridge import (
    ContextLengthError,
    Embedded,
    EmbeddingRequest,
    GenerationRequest,
    InvalidRequestError,
    LoadRequest,
    ModelFileError,
    load_llama_backend,
)
from tests.support import find_free_port, require, start_bridge, wait_for
from tests.support_bert import N_CTX, N_EMBD, build_bert
from tests.test_tools_end_to_end import ask_server, is_healthy
from tests.test_upstream_engine import start_llama_server

TEXTS = ["hello world", "rain in paris.", "warm", "hello hello hello"]


def load_bert(path, **header):
    require("llama_cpp")
    path.write_bytes(build_bert(**header))
    return load_llama_backend(LoadRequest(engine="llama", model=str(path)), str(path), lambda fraction: None)


@pytest.mark.parametrize("pooling", [1, 2], ids=["mean", "first"])
def test_vectors_are_llama_servers(tmp_path, pooling):
    openai = require("openai")
    require("llama_cpp")
    model, port = tmp_path / "tiny-bert.gguf", find_free_port()
    model.write_bytes(build_bert(pooling))
    with start_bridge(tmp_path / "home", "-m", model, "--engine", "llama", "--threads", "1") as bridge:
        client = openai.OpenAI(base_url=bridge.base_url, api_key="x", max_retries=0)
        ours = client.embeddings.create(model="tiny-bert", input=TEXTS)
        assert [item.index for item in ours.data] == [0, 1, 2, 3] and ours.usage.prompt_tokens == 4 + 6 + 3 + 5
        with pytest.raises(openai.BadRequestError, match="makes embeddings and does not write") as caught:
            client.chat.completions.create(model="tiny-bert", messages=[{"role": "user", "content": "hello"}])
        assert caught.value.param == "model"
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="tiny-bert", input="hello " * N_CTX)
        assert caught.value.code == "context_length_exceeded"
    with start_llama_server(model, port, "--embeddings", "-b", str(N_CTX), "-ub", str(N_CTX)):
        wait_for(lambda: is_healthy(port), 60, "llama-server has loaded the model")
        url = f"http://127.0.0.1:{port}/v1"
        theirs = ask_server(url, {"model": "x", "input": TEXTS}, "/embeddings")["data"]
    for one, other in zip(ours.data, theirs, strict=True):
        assert one.embedding == pytest.approx(other["embedding"], abs=1e-5)


def test_jobs_take_turns_and_can_be_cancelled(tmp_path):
    backend = load_bert(tmp_path / "bert.gguf")
    try:
        for job, texts in ((1, TEXTS), (2, TEXTS[:1]), (3, TEXTS[1:])):
            backend.submit(job, EmbeddingRequest(inputs=tuple(texts)))
        backend.cancel(3)
        backend.cancel(99)
        events = [event for _ in range(5) for event in backend.step()]
        assert [job for job, _ in events] == [2, 1]
        vectors = [event.vectors for _, event in events if isinstance(event, Embedded)]
        assert vectors[0][0] == vectors[1][0] and len(vectors[1]) == 4
        assert all(len(vector) == N_EMBD and math.isclose(math.hypot(*vector), 1) for vector in vectors[1])
        with pytest.raises(ContextLengthError):
            backend.submit(4, EmbeddingRequest(inputs=((5,) * N_CTX,)))
        with pytest.raises(InvalidRequestError):
            backend.submit(5, GenerationRequest(prompt="hello"))
    finally:
        backend.close()


@pytest.mark.parametrize(("pooling", "said"), [(4, "ranks texts"), (None, "one vector of a text")])
def test_models_for_something_else_are_refused(tmp_path, pooling, said):
    with pytest.raises(ModelFileError, match=said):
        load_bert(tmp_path / "bert.gguf", pooling=pooling)
