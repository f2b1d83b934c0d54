"""The official clients, unchanged, against a real `serve`: what they do is what users do."""

import asyncio
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import read_health, require, start_bridge

MODEL = "dvai-demo"
QUESTION = [{"role": "user", "content": "Hello! What are you?"}]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    with start_bridge(tmp_path_factory.mktemp("home"), "--ctx-size", "512") as running:
        yield running


@pytest.fixture
def openai():
    return require("openai")


@pytest.fixture
def client(openai, bridge):
    with openai.OpenAI(base_url=bridge.base_url, api_key="ignored", max_retries=0, timeout=60) as client:
        yield client


def wait_until_idle(bridge):
    """A cancelled generation must give its place back within a second."""
    deadline = time.monotonic() + 1
    while read_health(bridge)["queue"]["running"]:
        assert time.monotonic() < deadline, "the generation goes on after its client has left"
        time.sleep(0.01)


def test_openai_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    assert answer.choices[0].message.role == "assistant" and len(answer.choices[0].message.content) > 10
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.model == MODEL
    assert answer.usage.prompt_tokens > 5 and answer.usage.completion_tokens > 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_stream_says_what_the_whole_answer_says(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    assert [c.choices[0].finish_reason for c in chunks][-1] == whole.choices[0].finish_reason
    assert {c.choices[0].finish_reason for c in chunks[:-1]} == {None}
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1 and all(c.usage is None for c in chunks)


def test_openai_stream_usage_comes_last_and_once(client):
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, stream_options=options))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_openai_stream_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert final.choices[0].message.content == text and final.choices[0].finish_reason == "stop"


def test_openai_legacy_completion(client):
    answer = client.completions.create(model=MODEL, prompt=["Hello", "The bridge"], max_tokens=5, n=2, temperature=0.5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    chunks = list(client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, stream=True, echo=True))
    assert chunks[0].choices[0].text == "Hello" and chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_openai_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the most probable token"


def test_openai_embeddings_default_to_base64_and_agree_with_floats(client):
    texts = ["hello there", "a relay sees only ciphertext"]
    default = client.embeddings.create(model=MODEL, input=texts)
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [item.index for item in default.data] == [0, 1] and default.usage.prompt_tokens > 4
    for one, other in zip(default.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4)


def test_openai_models(client):
    listed = client.models.list().data
    assert [model.id for model in listed] == [MODEL]
    assert client.models.retrieve(MODEL).created == listed[0].created > 1_000_000_000


def test_openai_errors_are_typed(client, openai):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert caught.value.code == "model_not_found" and MODEL in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=99)
    assert caught.value.param == "temperature"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, tools=tools)
    assert caught.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 2000}])
    assert caught.value.code == "context_length_exceeded" and caught.value.body["n_ctx"] == 512


def test_openai_cancelled_stream(client, bridge):
    stream = client.completions.create(model=MODEL, prompt="Hello", max_tokens=450, stream=True)
    next(iter(stream))
    stream.close()
    wait_until_idle(bridge)


def test_openai_async(openai, bridge):
    async def talk():
        async with openai.AsyncOpenAI(base_url=bridge.base_url, api_key="ignored", max_retries=0) as client:

            async def ask():
                stream = await client.chat.completions.create(
                    model=MODEL, messages=QUESTION, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            answers = await asyncio.gather(*(ask() for _ in range(5)))
            await client.embeddings.create(model=MODEL, input="hello")
            async with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
                final = await stream.get_final_completion()
            return {*answers, final.choices[0].message.content}

    assert len(asyncio.run(talk())) == 1


def test_langchain(bridge):
    langchain = require("langchain_openai")
    model = langchain.ChatOpenAI(model=MODEL, base_url=bridge.base_url, api_key="ignored", temperature=0, max_retries=0)
    whole = model.invoke("Hello! What are you?")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream("Hello! What are you?")) == whole.text
    embeddings = langchain.OpenAIEmbeddings(
        model=MODEL, base_url=bridge.base_url, api_key="ignored", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_documents(["one", "two"])) == 2
    with pytest.raises(require("openai").NotFoundError):
        langchain.ChatOpenAI(model="nobody", base_url=bridge.base_url, api_key="x", max_retries=0).invoke("hi")
    stream = model.stream("Hello! What are you?")
    next(stream)
    stream.close()
    wait_until_idle(bridge)


NODE_PROGRAM = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "ignored", maxRetries: 0 });
const model = process.env.MODEL;
const messages = [{ role: "user", content: "Hello! What are you?" }];
const out = {};
const whole = await client.chat.completions.create({ model, messages, temperature: 0 });
out.whole = whole.choices[0].message.content;
out.usage = whole.usage;
const stream = await client.chat.completions.create({
  model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
});
out.streamed = "";
for await (const chunk of stream) {
  out.streamed += chunk.choices[0]?.delta?.content ?? "";
  if (chunk.usage) out.streamUsage = chunk.usage;
}
const helper = client.chat.completions.stream({ model, messages, temperature: 0 });
out.helped = await helper.finalContent();
const embedded = await client.embeddings.create({ model, input: ["hello", "bridge"] });
out.dimensions = embedded.data.map((item) => item.embedding.length);
out.models = (await client.models.list()).data.map((item) => item.id);
out.model = (await client.models.retrieve(model)).id;
const failures = [];
try { await client.models.retrieve("some/other:model"); } catch (error) { failures.push([error.status, error.code]); }
try { await client.chat.completions.create({ model, messages, n: -1 }); } catch (error) {
  failures.push([error.status, error.param]);
}
out.failures = failures;
const cancelled = await client.completions.create({ model, prompt: "Hello", max_tokens: 450, stream: true });
for await (const chunk of cancelled) { cancelled.controller.abort(); break; }
console.log(JSON.stringify(out));
"""


def run_node(source, directory, **environ):
    """What a program with the npm package `openai` prints as JSON."""
    modules = os.environ.get("DVAI_NODE_MODULES")
    if not modules or not shutil.which("node"):
        assert os.environ.get("DVAI_TEST_ALL") != "1", "node and DVAI_NODE_MODULES are needed"
        pytest.skip("needs node and the npm package openai (make test-all installs them)")
    (directory / "node_modules").symlink_to(Path(modules))
    program = directory / "program.mjs"
    program.write_text(source)
    done = subprocess.run(["node", str(program)], env=os.environ | environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_npm_openai(bridge, tmp_path):
    out = run_node(NODE_PROGRAM, tmp_path, BASE_URL=bridge.base_url, MODEL=MODEL)
    assert out["whole"] == out["streamed"] == out["helped"]
    assert out["usage"]["completion_tokens"] == out["streamUsage"]["completion_tokens"] > 0
    assert out["models"] == [MODEL] and out["model"] == MODEL and len(set(out["dimensions"])) == 1
    assert out["failures"] == [[404, "model_not_found"], [400, "n"]]
    wait_until_idle(bridge)
