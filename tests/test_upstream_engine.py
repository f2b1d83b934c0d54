"""Servers behind the bridge: what documented ones really send, how they come and go, and bridges in front of them."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading

import openai
import pytest

from dvai_bridge import (
    AdmissionQueue,
    AttemptOutcome,
    ForwardForm,
    ForwardOutcome,
    ForwardRequest,
    FoundEngine,
    HttpClient,
    InvalidRequestError,
    UpstreamBackend,
    UpstreamConnectError,
    UpstreamEngine,
    UpstreamError,
    UpstreamIntervals,
    UpstreamModel,
    UpstreamPool,
    UpstreamState,
    UpstreamTimeoutError,
    build_restricted_body,
    build_upstream_json,
    choose_health_word,
    is_near,
    parse_upstream_answer,
)
from tests.support import CLEAN_ENVIRON, PROGRAM, find_free_port, read_health, require, start_bridge, wait_for
from tests.support_worker import build_byte_model
from tests.test_http_client import Server
from tests.test_metrics import parse_exposition

PATIENCE_S = 60
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
QUICK = UpstreamIntervals(up_s=0.02, list_s=0.05, down_s=0.02, down_limit_s=0.05)
PATIENT = UpstreamIntervals(up_s=3600, list_s=3600, down_s=3600, down_limit_s=3600)


# -- what an answer says --


def listing(*ids, owner="x", **more):
    return json.dumps({"object": "list", "data": [{"id": each, "owned_by": owner} for each in ids]} | more).encode()


@pytest.mark.parametrize(
    ("status", "data", "state", "models", "error"),
    [
        (200, listing("a", "b/c:d"), UpstreamState.UP, ("a", "b/c:d"), ""),
        (200, listing(), UpstreamState.UP, (), ""),
        (200, b'{"models":[{"name":"llama3.2:latest"}]}', UpstreamState.UP, ("llama3.2:latest",), ""),
        (200, listing("a", "A", "", "x" * 300, "b\n"), UpstreamState.UP, ("a",), ""),
        (200, b'{"data":[1,null,{"id":5},{"id":"a","created":"x"}]}', UpstreamState.UP, ("a",), ""),
        (200, b'{"data":{}}', UpstreamState.DOWN, None, "list models"),
        (200, b"<html>", UpstreamState.DOWN, None, "not JSON"),
        (200, b"[]", UpstreamState.DOWN, None, "list models"),
        (404, b"", UpstreamState.UP, None, ""),
        (401, b"", UpstreamState.REFUSED, None, "API key"),
        (403, b"", UpstreamState.REFUSED, None, "API key"),
        (503, b'{"error":{"message":"Loading model"}}', UpstreamState.LOADING, None, "loading"),
        (500, b"", UpstreamState.DOWN, None, "500"),
        (302, b"", UpstreamState.DOWN, None, "302"),
    ],
)
def test_what_a_list_of_models_says(status, data, state, models, error):
    word = parse_upstream_answer(status, {}, data)
    found = None if word.models is None else tuple(model.model_id for model in word.models)
    assert (word.state, found) == (state, models) and error in word.error and bool(error) == bool(word.error)


@pytest.mark.parametrize(
    ("headers", "owner", "product"),
    [
        ({"server": "llama.cpp"}, "llamacpp", "llama-server"),
        ({"server": "uvicorn"}, "vllm", "vLLM"),
        ({"server": "uvicorn"}, "me", "llama_cpp.server"),
        ({}, "library", "Ollama"),
        ({}, "organization_owner", "LM Studio"),
        ({}, "dvai-bridge", "DVAI Bridge"),
        ({}, "somebody", None),
    ],
)
def test_products_are_recognised(headers, owner, product):
    assert parse_upstream_answer(200, headers, listing("a", owner=owner)).product == product


@pytest.mark.parametrize(
    ("upstreams", "word"),
    [
        ([], "ok"),
        ([UpstreamState.UP], "ok"),
        ([UpstreamState.DOWN, UpstreamState.UP], "ok"),
        ([UpstreamState.DOWN], "degraded"),
        ([UpstreamState.REFUSED], "degraded"),
        ([UpstreamState.UNKNOWN], "loading"),
        ([UpstreamState.LOADING, UpstreamState.DOWN], "loading"),
    ],
)
def test_health_is_what_is_left(upstreams, word):
    assert choose_health_word(upstreams) == word


def test_which_servers_are_near():
    assert [is_near(f"http://{host}/v1") for host in ("localhost:1", "127.0.0.2", "[::1]:5")] == [True] * 3
    assert not is_near("http://192.168.1.2:11434/v1") and not is_near("https://example.org/v1")


# -- what other devices may ask for --


def test_a_foreign_request_is_rebuilt_from_known_fields():
    body = CHAT | {"model": "m", "temperature": 0.5, "max_tokens": 10**6, "id_slot": 3, "lora": None, "user": "u"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    restricted = build_restricted_body(ForwardForm.CHAT, body | {"tools": tools}, 100)
    assert restricted == CHAT | {
        "model": "m",
        "temperature": 0.5,
        "tools": tools,
        "max_tokens": 100,
        "max_completion_tokens": 100,
    }
    text = build_restricted_body(ForwardForm.TEXT, {"prompt": "x", "max_tokens": 5}, 100)
    assert text == {"prompt": "x", "max_tokens": 5}
    assert build_restricted_body(ForwardForm.EMBEDDINGS, {"input": "x", "truncate": True}, 100) == {"input": "x"}
    data = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with_image = {"messages": [{"role": "user", "content": [data, {"type": "text", "text": "?"}]}]}
    assert build_restricted_body(ForwardForm.CHAT, with_image, 100)["messages"] == with_image["messages"]


def test_a_foreign_request_keeps_its_tools():
    """Whatever schemas its functions have: the engine behind us knows what it can follow."""
    schema = {"type": "object", "not": {}}
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    fields = {
        "tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "chat_template_kwargs": {"enable_thinking": False},
        "messages": [
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        ],
    }
    restricted = build_restricted_body(ForwardForm.CHAT, fields, 100)
    assert restricted == fields | {"max_tokens": 100, "max_completion_tokens": 100}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": {"xml_tools": []}}, "chat_template_kwargs"),
        ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls[0]"),
        ({"temperature": 9}, "temperature"),
        ({"n": 10**6}, "n"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"mirostat": 2}, "mirostat"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        *(
            ({"messages": [{"role": "user", "content": [part]}]}, "messages[0]")
            for part in (
                {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
                {"type": "image_url", "image_url": "file:///etc/passwd"},
                {"type": "image_url"},
                {"type": "video_url", "video_url": {"url": "http://10.0.0.1/"}},
                5,
            )
        ),
    ],
)
def test_a_foreign_request_out_of_bounds_is_refused(fields, param):
    with pytest.raises(InvalidRequestError) as refused:
        build_restricted_body(ForwardForm.CHAT, CHAT | fields, 100)
    assert refused.value.param == param


# -- the wire of known engines, as they document it and as people have met it --


def encode_answer(body, status="200 OK", kind="application/json", more=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def encode_stream(*events, done=True, names=()):
    """A chunked stream; `names`: the `event:` of the last ones."""
    pieces = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    for back, name in enumerate(reversed(names), 1):
        pieces[-back] = f"event: {name}\n{pieces[-back]}"
    pieces += ["data: [DONE]\n\n"] if done else []
    chunks = "".join(f"{len(piece.encode()):x}\r\n{piece}\r\n" for piece in pieces)
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return (head + chunks + "0\r\n\r\n").encode()


class EngineServer(Server):
    """Answers by path from `answers`: bytes, or a coroutine function(server, reader, writer, body) for the rest."""

    def __init__(self, answers):
        super().__init__(self.play)
        self.answers = answers
        self.writers = []

    @property
    def port(self):
        return self.server.sockets[0].getsockname()[1]

    async def stop(self):
        """Gone like a process that was killed."""
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()

    async def restart(self, port):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", port)

    async def play(self, _, reader, writer):
        self.writers.append(writer)
        while True:
            await self.read_request(reader)
            head, body = self.requests[-1]
            answer = self.answers.get(head.split(b" ")[1].decode(), encode_answer({}, "404 Not Found"))
            if not isinstance(answer, bytes):
                return await answer(self, reader, writer, body)
            writer.write(answer)
            await writer.drain()

    @property
    def asked(self):
        """The heads and JSON bodies of the requests for inference."""
        return [(head.decode(), json.loads(body)) for head, body in self.requests if body]


@contextlib.asynccontextmanager
async def put_behind(answers, intervals=PATIENT, timeout_s=PATIENCE_S, **options):
    """A server with these answers and the engine that is made of it, looked at once."""
    client = HttpClient()
    async with asyncio.timeout(PATIENCE_S), EngineServer(answers) as server:
        engine = UpstreamEngine(f"{server.url}/v1", client, timeout_s=timeout_s, intervals=intervals, **options)
        engine.start()
        try:
            await engine.ready()
            yield server, engine
        finally:
            await engine.close()
            await client.close()


async def ask(engine, body=CHAT, form=ForwardForm.CHAT, model_id="m", **options):
    request = ForwardRequest(form=form, body=body, request_id="req_1")
    return await engine.forward(request, model_id=model_id, **options)


async def read_events(answer):
    data = b"".join([piece async for piece in answer.body])
    return [
        event if event == "[DONE]" else json.loads(event)
        for event in (block.removeprefix("data: ") for block in data.decode().split("\n\n") if block)
    ]


def exchange(answer, body=CHAT, form=ForwardForm.CHAT, **options):
    """What the client gets for one answer of an engine: (ForwardAnswer, its values, the server)."""

    async def main():
        async with put_behind({f"/v1{form.value}": answer}, **options) as (server, engine):
            got = await ask(engine, body, form)
            values = json.loads(got.body) if isinstance(got.body, bytes) else await read_events(got)
            return got, values, server

    return asyncio.run(main())


def chunk(delta, finish="none", **more):
    choice = {"index": 0, "delta": delta} | ({} if finish == "none" else {"finish_reason": finish})
    return {"id": "chatcmpl-7", "object": "o", "created": 5, "model": "m", "choices": [choice]} | more


ZERO = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
STREAMS = {
    "Ollama: a role on every chunk, its fingerprint": encode_stream(
        chunk({"role": "assistant", "content": "he"}, None, system_fingerprint="fp_ollama"),
        chunk({"role": "assistant", "content": "llo"}, None, system_fingerprint="fp_ollama"),
        chunk({"role": "assistant", "content": ""}, "stop", system_fingerprint="fp_ollama"),
        {"id": "chatcmpl-7", "object": "chat.completion.chunk", "choices": [], "usage": {"prompt_tokens": 3}},
    ),
    "LocalAI: no finish_reason until the end, usage of nothing everywhere": encode_stream(
        chunk({"role": "assistant", "content": ""}, usage=ZERO),
        chunk({"content": "he"}, usage=ZERO),
        chunk({"content": "llo"}, "", usage=ZERO),
        chunk({"content": ""}, "stop", usage=ZERO),
    ),
    "LocalAI of 2023: no [DONE], no id": encode_stream(
        *({"model": "m", "choices": [{"delta": {"content": text}}], "usage": ZERO} for text in ("he", "llo")),
        {"model": "m", "choices": [{"delta": {}, "finish_reason": "stop"}]},
        done=False,
    ),
    "vLLM: usage counted on the way": encode_stream(
        chunk({"role": "assistant", "content": ""}, None, usage={"prompt_tokens": 3, "completion_tokens": 0}),
        chunk({"content": "hello"}, None, usage={"prompt_tokens": 3, "completion_tokens": 2}),
        chunk({"content": ""}, "stop", stop_reason=None),
    ),
    "llama-server: timings": encode_stream(
        chunk({"role": "assistant", "content": None}, None),
        chunk({"content": "hello"}, None),
        chunk({}, "stop", timings={"predicted_per_second": 12.5, "prompt_per_second": 100.0}),
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_any_engine_is_in_order(name):
    answer, events, server = exchange(STREAMS[name], CHAT | {"stream": True})
    headers = dict(answer.headers)
    assert headers["X-DVAI-Route"] == "upstream" and headers["X-DVAI-Served-By"] == "local"
    *chunks, done = events
    deltas = [event["choices"][0]["delta"] for event in chunks]
    assert done == "[DONE]" and deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "hello"
    assert [event["choices"][0]["finish_reason"] for event in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(event["id"], event["created"], event["model"]) for event in chunks}) == 1
    assert all("usage" not in event for event in chunks)
    ((head, body),) = server.asked
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True} and body["model"] == "m"
    assert "x-request-id" not in head.lower() and "authorization" not in head.lower()


def tool_delta(**call):
    return chunk({"role": "assistant", "content": "", "tool_calls": [call]}, None)


CALL = {"name": "f", "arguments": '{"a":1}'}
TOOL_STREAMS = {
    "Ollama: whole calls, all with index 0, and an end that says stop": encode_stream(
        tool_delta(index=0, id="call_a", type="function", function=CALL),
        tool_delta(index=0, id="call_b", type="function", function=CALL),
        chunk({"role": "assistant", "content": ""}, "stop"),
    ),
    "Ollama of 2024: no index": encode_stream(
        tool_delta(id="call_a", type="function", function=CALL),
        tool_delta(id="call_b", type="function", function=CALL),
        chunk({"content": ""}, "stop"),
    ),
    "LM Studio: fragments with an empty name": encode_stream(
        *(
            tool_delta(index=index, **({"id": f"call_{index}"} if not n else {}), type="function", function=function)
            for index in (0, 1)
            for n, function in enumerate(
                [{"name": "f", "arguments": ""}, {"name": "", "arguments": '{"a"'}, {"name": "", "arguments": ":1}"}]
            )
        ),
        chunk({}, "tool_calls"),
    ),
    "arguments that are an object": encode_stream(
        tool_delta(index=0, id="call_a", function={"name": "f", "arguments": {"a": 1}}),
        tool_delta(index=1, id="call_b", function={"name": "f", "arguments": {"a": 1}}),
        chunk({}, "tool_calls"),
    ),
}


@pytest.mark.parametrize("name", TOOL_STREAMS)
def test_tool_calls_of_any_engine_are_in_order(name):
    _, events, _ = exchange(TOOL_STREAMS[name], CHAT | {"stream": True, "tools": [{"type": "function"}]})
    calls = {}
    for event in events[:-1]:
        for fragment in event["choices"][0]["delta"].get("tool_calls", ()):
            call = calls.setdefault(fragment["index"], {"id": fragment.get("id"), "name": "", "arguments": ""})
            call["name"] += fragment["function"].get("name", "")
            call["arguments"] += fragment["function"]["arguments"]
    assert sorted(calls) == [0, 1] and len({call["id"] for call in calls.values()}) == 2
    assert all((call["name"], json.loads(call["arguments"])) == ("f", {"a": 1}) for call in calls.values())
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_whole_answer_is_asked_for_as_a_whole():
    """Some engines drop tool calls when they stream, and some count no tokens then."""
    call = {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "", "reasoning": "hm", "tool_calls": [call]}
    sent = {
        "id": "chatcmpl-1",
        "model": "served",
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
    answer, value, server = exchange(encode_answer(sent), CHAT | {"tools": [{"type": "function"}], "seed": 2**63})
    assert value["object"] == "chat.completion" and value["model"] == "served" and value["usage"]["total_tokens"] == 13
    got = value["choices"][0]
    assert got["finish_reason"] == "tool_calls" and got["message"]["tool_calls"][0]["function"] == call["function"]
    assert got["message"]["reasoning"] == "hm" and got["message"]["content"] is None
    ((head, body),) = server.asked
    assert body == CHAT | {"tools": [{"type": "function"}], "seed": 2**63, "model": "m"}
    assert "Accept: application/json" in head and dict(answer.headers)["X-DVAI-Served-By"] == "local"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_come_in_the_format_that_was_asked_for(encoding):
    """Ollama and LM Studio give numbers whatever they are asked for."""
    data = [{"object": "embedding", "index": n, "embedding": [1.0, -0.5]} for n in range(2)]
    sent = {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 2, "total_tokens": 2}}
    body = {"input": ["a", "b"], "encoding_format": encoding}
    _, value, _ = exchange(encode_answer(sent), body, ForwardForm.EMBEDDINGS)
    wanted = [1.0, -0.5] if encoding == "float" else "AACAPwAAAL8="
    assert [item["embedding"] for item in value["data"]] == [wanted, wanted] and value["usage"]["prompt_tokens"] == 2


REFUSALS = {
    "OpenAI": ("400 Bad Request", {"error": {"message": "no", "type": "x_error", "param": "n", "code": "c"}}, "no"),
    "Ollama": ("404 Not Found", {"error": {"message": 'model "m" not found', "type": "api_error"}}, "not found"),
    "Ollama, its own API": ("400 Bad Request", {"error": "invalid options"}, "invalid options"),
    "LM Studio": ("400 Bad Request", {"error": "No models loaded."}, "No models loaded"),
    "vLLM": (
        "400 Bad Request",
        {"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400},
        "too long",
    ),
    "FastAPI": ("422 Unprocessable Entity", {"detail": [{"loc": ["body", "n"], "msg": "not valid"}]}, "n: not valid"),
    "FastAPI, a route": ("404 Not Found", {"detail": "Not Found"}, "Not Found"),
    "LocalAI": ("500 Internal Server Error", {"error": {"code": 500, "message": "rpc error", "type": ""}}, "rpc error"),
    "llama-server": (
        "501 Not Implemented",
        {"error": {"code": 501, "message": "This server does not support embeddings", "type": "not_supported_error"}},
        "does not support embeddings",
    ),
    "a proxy": ("503 Service Unavailable", b"<html>", "503"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_the_engines_own_in_our_form(name, stream):
    status, body, text = REFUSALS[name]
    answer, value, _ = exchange(encode_answer(body, status), CHAT | {"stream": stream})
    assert answer.status == int(status[:3])
    error = value["error"]
    assert set(error) == {"message", "type", "param", "code"} and text in error["message"] and error["type"]
    if name != "OpenAI":
        assert "server" in error["type"] or answer.status < 500 or name == "llama-server"
    assert dict(answer.headers).get("x-should-retry") == ("false" if answer.status < 500 else None)


def test_mistakes_that_llama_cpp_server_calls_its_own_are_the_clients():
    message = "2 validation errors:\n  {'type': 'float_parsing', 'loc': ('body', 'temperature')}"
    sent = {"error": {"message": message, "type": "internal_server_error", "param": None, "code": None}}
    answer, value, _ = exchange(encode_answer(sent, "500 Internal Server Error"))
    assert answer.status == 400 and value["error"]["type"] == "invalid_request_error"


def test_a_full_engine_says_when_to_come_back():
    sent = encode_answer({"error": {"message": "busy"}}, "429 Too Many Requests", more="Retry-After: 7\r\n")
    answer, value, _ = exchange(sent)
    headers = dict(answer.headers)
    assert (answer.status, headers["Retry-After"]) == (429, "7") and "x-should-retry" not in headers
    assert value["error"]["type"] == "rate_limit_error"


FAILURES = {
    "LM Studio: an error event": (
        encode_stream({"error": {"message": "Model was unloaded"}}, done=False, names=["error"]),
        UpstreamError,
        "Model was unloaded",
    ),
    "an error object as an answer": (
        encode_answer({"object": "error", "message": "no such model", "code": 404}),
        UpstreamError,
        "no such model",
    ),
    "another key": (encode_answer({}, "401 Unauthorized"), UpstreamError, "DVAI_UPSTREAM_API_KEY"),
    "a redirect": (encode_answer(b"", "302 Found", more="Location: http://evil/\r\n"), UpstreamError, "302"),
    "a page": (encode_answer(b"<html>", kind="text/html"), UpstreamError, "neither events nor JSON"),
    "an empty stream": (encode_stream(done=False), UpstreamError, "too early"),
    "nothing": (b"", UpstreamError, "closed the connection"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_no_answer_is_an_error_that_names_the_engine(name, stream):
    sent, kind, text = FAILURES[name]

    async def hang_up(server, reader, writer, body):
        pass

    with pytest.raises(kind) as failed:
        exchange(sent or hang_up, CHAT | {"stream": stream})
    assert failed.value.status == 502 and text in failed.value.message
    assert "an OpenAI-compatible server at http://127.0.0.1:" in failed.value.message


def test_an_error_in_the_middle_is_the_last_event():
    async def fail(server, reader, writer, body):
        writer.write(encode_stream(chunk({"content": "he"}), done=False)[: -len("0\r\n\r\n")])
        await server.committed.wait()
        error = b'data: {"error": {"message": "out of memory"}}\n\n'
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(error), error))
        await writer.drain()

    async def main():
        async with put_behind({"/v1/chat/completions": fail}) as (server, engine):
            server.committed, reports, pieces = asyncio.Event(), [], []
            answer = await ask(engine, CHAT | {"stream": True}, on_end=reports.append)
            server.committed.set()
            with pytest.raises(UpstreamError):
                while True:
                    pieces.append(await anext(answer.body))
            assert b"out of memory" in pieces[-1] and not any(b"[DONE]" in piece for piece in pieces)
            assert reports[0].outcome is ForwardOutcome.PEER_FAILED

    asyncio.run(main())


def test_an_engine_that_says_nothing_is_given_up():
    async def hang(server, reader, writer, body):
        await server.wait_left(reader)

    with pytest.raises(UpstreamTimeoutError) as late:
        exchange(hang, timeout_s=0.1)
    assert late.value.status == 504 and "--timeout" in late.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_ends_the_engines_work(stream):
    async def work(server, reader, writer, body):
        if json.loads(body).get("stream"):
            writer.write(encode_stream(chunk({"content": "x"}), done=False)[: -len("0\r\n\r\n")])
            await writer.drain()
        server.begun.set()
        await server.wait_left(reader)

    async def main():
        async with put_behind({"/v1/chat/completions": work}) as (server, engine):
            server.begun = asyncio.Event()
            asking = asyncio.create_task(ask(engine, CHAT | {"stream": stream}))
            await server.begun.wait()
            if stream:
                await (await asking).body.aclose()
            else:
                asking.cancel()
                await asyncio.wait([asking])
            await server.left.wait()

    asyncio.run(main())


def test_the_key_goes_to_this_server_and_nowhere_else():
    async def main():
        async with put_behind({}, api_key="secret") as (server, engine):
            await ask(engine)
            assert all(b"Authorization: Bearer secret\r\n" in head for head, _ in server.requests)
            assert len(server.requests) >= 2 and "secret" not in repr(engine.__dict__.get("state"))

    asyncio.run(main())


# -- how engines come and go --


def list_answer(*ids):
    return encode_answer(listing(*ids))


async def until(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.005)


def test_loss_and_return_are_noticed_without_a_request():
    async def main():
        async with put_behind({"/v1/models": list_answer("a")}, QUICK) as (server, engine):
            assert engine.state is UpstreamState.UP and [model.model_id for model in engine.models] == ["a"]
            port = server.port
            await server.stop()
            await until(lambda: engine.state is UpstreamState.DOWN)
            assert "127.0.0.1" in engine.error and build_upstream_json(engine)["state"] == "down"
            server.answers["/v1/models"] = list_answer("b")
            await server.restart(port)
            await until(lambda: engine.state is UpstreamState.UP)
            assert [model.model_id for model in engine.models] == ["b"] and not engine.error

    asyncio.run(main())


def test_a_request_is_the_first_to_notice():
    async def main():
        async with put_behind({"/v1/models": list_answer("a")}) as (server, engine):
            await server.stop()
            attempts = []
            with pytest.raises(UpstreamConnectError) as refused:
                await ask(engine, on_attempt=attempts.append)
            assert engine.state is UpstreamState.DOWN and "start it" in refused.value.message
            assert [attempt.outcome for attempt in attempts] == [AttemptOutcome.UNREACHABLE]

    asyncio.run(main())


def test_an_engine_still_loading_or_locked_is_used_when_it_is_ready():
    async def main():
        answers = {"/v1/models": encode_answer({}, "503 Service Unavailable")}
        async with put_behind(answers, QUICK) as (_, engine):
            assert engine.state is UpstreamState.LOADING
            answers["/v1/models"] = encode_answer({}, "401 Unauthorized")
            await until(lambda: engine.state is UpstreamState.REFUSED)
            answers["/v1/models"] = list_answer("a")
            await until(lambda: engine.state is UpstreamState.UP)
            answers["/v1/models"] = list_answer("a", "b")
            await until(lambda: len(engine.models) == 2)

    asyncio.run(main())


def test_a_busy_engine_is_not_lost():
    """Its list of models does not come in time, but it takes connections; in the end it is lost all the same."""

    async def hang(server, reader, writer, body):
        await server.wait_left(reader)

    async def main():
        answers = {"/v1/models": list_answer("a")}
        async with put_behind(answers, QUICK) as (server, engine):
            states = []
            answers["/v1/models"], engine._answer_s = hang, 0.05
            await until(lambda: states.append(engine.state) or engine.state is UpstreamState.DOWN)
            late = [head for head, _ in server.requests if b"/v1/models" in head]
            assert len(late) >= 4 and UpstreamState.UP in states and [each.model_id for each in engine.models] == ["a"]

    asyncio.run(main())


def test_an_old_ollama_is_asked_in_its_own_way():
    async def main():
        tags = encode_answer({"models": [{"name": "llama3.2:latest"}, {"name": "nomic-embed-text:v1.5"}]})
        async with put_behind({"/api/tags": tags}) as (_, engine):
            assert engine.product == "Ollama" and engine.state is UpstreamState.UP
            assert engine.find_model("LLAMA3.2") == engine.find_model("llama3.2:latest") == "llama3.2:latest"
            assert engine.find_model("nomic-embed-text") is None and engine.find_model("llama3") is None

    asyncio.run(main())


def test_creation_stays_what_was_said_first():
    """llama-server says "now" each time it is asked."""

    async def main():
        def answer(created):
            return encode_answer({"data": [{"id": "a", "created": created}]})

        async with put_behind({"/v1/models": answer(5)}, QUICK) as (server, engine):
            server.answers["/v1/models"] = answer(9)
            asked = len(server.requests)
            await until(lambda: len(server.requests) >= asked + 2)
            assert engine.models == (UpstreamModel(model_id="a", created=5),)

    asyncio.run(main())


def test_traffic_measures_the_models():
    sent = STREAMS["llama-server: timings"]

    async def main():
        async with put_behind({"/v1/chat/completions": sent}) as (_, engine):
            await read_events(await ask(engine, CHAT | {"stream": True}))
            assert engine.scores == {"m": 12.5}

    asyncio.run(main())


def test_a_whole_answer_measures_nothing_that_it_does_not_say():
    sent = {
        "choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4},
    }

    async def main():
        answers = {"/v1/chat/completions": encode_answer(sent)}
        async with put_behind(answers) as (_, engine):
            reports = []
            await ask(engine, on_end=reports.append)
            answers["/v1/chat/completions"] = encode_answer(sent | {"timings": {"predicted_per_second": 9.5}})
            await ask(engine, on_end=reports.append)
            assert [report.decode_tok_per_s for report in reports] == [None, 9.5] and engine.scores == {"m": 9.5}
            assert reports[0].completion_tokens == 4 and reports[0].first_content_s is None

    asyncio.run(main())


# -- several of them --


def test_a_pool_finds_who_has_a_model():
    async def main():
        client = HttpClient()
        servers = [EngineServer({"/v1/models": list_answer(*ids)}) for ids in (("a", "b"), ("B", "c:latest"))]
        async with asyncio.timeout(PATIENCE_S), servers[0], servers[1]:
            found = [FoundEngine(product=f"E{n}", base_url=f"{s.url}/v1", models=()) for n, s in enumerate(servers)]
            pool = UpstreamPool(
                find=lambda: asyncio.sleep(0, found * 20),
                build=lambda each: UpstreamEngine(
                    each.base_url, client, timeout_s=9, product=each.product, intervals=PATIENT
                ),
            )
            pool.start()
            await pool.ready()
            first, second = pool.engines
            assert [(model.model_id, engine.product) for model, engine in pool.list_models()] == [
                ("a", "E0"),
                ("b", "E0"),
                ("c:latest", "E1"),
            ]
            assert await pool.find("B") == (first, "b") and await pool.find("c") == (second, "c:latest")
            assert await pool.find(None) == (first, "a") and pool.find_default() == "a"
            assert await pool.find("nobody") is None
            await servers[0].stop()
            with pytest.raises(UpstreamConnectError):
                await ask(first)
            assert await pool.find("b") == (second, "B"), "who answers goes before who does not"
            assert await pool.find("a") == (first, "a"), "it may have come back"
            await pool.close()
        await client.close()

    asyncio.run(main())


def test_the_decision_knows_short_names_and_takes_the_unmeasured_for_good_enough():
    async def main():
        async with put_behind({"/v1/models": list_answer("a", "b:latest")}) as (_, engine):
            engine.scores["a"] = 3.5
            pool = UpstreamPool(named=engine, default_model="b:latest")
            backend = UpstreamBackend(pool=pool, queue=AdmissionQueue(1, 0), timeout_s=9)
            listed = [(model.model_id, model.score) for model in backend.list_local(10.0)]
            assert listed == [("b:latest", 10.0), ("a", 3.5), ("b", 10.0)]

    asyncio.run(main())


def test_a_model_that_was_just_added_is_found():
    async def main():
        client, answers = HttpClient(), {"/v1/models": list_answer("a")}
        async with asyncio.timeout(PATIENCE_S), EngineServer(answers) as server:
            clock_s = [0.0]
            engine = UpstreamEngine(
                f"{server.url}/v1", client, timeout_s=9, intervals=PATIENT, clock=lambda: clock_s[0]
            )
            pool = UpstreamPool(named=engine, default_model="b")
            pool.start()
            await pool.ready()
            answers["/v1/models"] = list_answer("a", "b")
            assert await pool.find("b") is None, "it was asked a moment ago"
            clock_s[0] = 2.0
            assert await pool.find(None) == (engine, "b")
            await pool.close()
        await client.close()

    asyncio.run(main())


def test_an_engine_that_lists_nothing_is_asked_for_anything():
    async def main():
        async with put_behind({}) as (_, engine):
            pool = UpstreamPool(named=engine)
            assert await pool.find("whatever") == (engine, "whatever") and await pool.find(None) == (engine, "")

    asyncio.run(main())


# -- real bridges in front of real servers --


HELLO = CHAT | {"max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "bytes.gguf"
    path.write_bytes(build_byte_model(extra={"llama.pooling_type": 1}))  # mean, or llama.cpp gives a vector per token
    return path


@pytest.fixture(scope="module")
def chain(tmp_path_factory, model):
    """A bridge with a model, and one that has that bridge as its engine, with metrics."""
    home = tmp_path_factory.mktemp("homes")
    key = {"DVAI_API_KEY": "secret-of-the-engine"}
    with (
        start_bridge(home / "engine", "--model", model, environ={"DVAI_PARALLEL": "4"}) as engine,
        start_bridge(home / "front", "--engine", f"http://127.0.0.1:{engine.port}", "--metrics", environ=key) as front,
    ):
        yield engine, front


@pytest.fixture(scope="module")
def client(chain):
    return openai.OpenAI(base_url=chain[1].base_url, api_key="secret-of-the-engine", max_retries=0)


AUTH = {"Authorization": "Bearer secret-of-the-engine"}


def test_a_bridge_serves_the_models_of_the_engine_behind_it(chain, client):
    engine, front = chain
    assert [model.id for model in client.models.list()] == ["bytes"]
    assert client.models.list().data[0].owned_by == "DVAI Bridge"
    assert any("serving bytes through DVAI Bridge at" in line for line in front.lines)
    status, headers, data = front.request("POST", "/v1/chat/completions", HELLO, AUTH)
    direct = json.loads(engine.request("POST", "/v1/chat/completions", HELLO)[2])
    answer = json.loads(data)
    assert status == 200 and headers["X-DVAI-Route"] == "upstream" and headers["X-DVAI-Served-By"] == "local"
    assert answer["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == direct["usage"]["completion_tokens"]


def test_the_official_client_uses_everything(chain, client):
    stream = client.chat.completions.create(model="bytes", stream=True, stream_options={"include_usage": True}, **HELLO)
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens > 0 and chunks[-2].choices[0].finish_reason
    whole = client.completions.create(model="bytes", prompt="x", max_tokens=4, logprobs=2)
    assert whole.choices[0].logprobs.tokens and whole.usage.completion_tokens == 4
    vectors = client.embeddings.create(model="bytes", input=["a", "b"])
    assert len(vectors.data) == 2 and isinstance(vectors.data[0].embedding[0], float)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=HELLO["messages"])
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="bytes", messages=HELLO["messages"], temperature=9)
    assert refused.value.body["param"] == "temperature", "the engine's own words"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="bytes", messages=HELLO["messages"], tools=[{"type": "function"}])


def test_metrics_count_every_request_once(chain, client):
    _, front = chain

    def read():
        status, headers, data = front.request("GET", "/metrics", headers=AUTH)
        assert status == 200 and headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return parse_exposition(data)

    def total(families, name, **wanted):
        return sum(value for (_, labels), value in families[name][1].items() if wanted.items() <= dict(labels).items())

    before = read()
    client.chat.completions.create(model="bytes", **HELLO)
    list(client.chat.completions.create(model="bytes", stream=True, **HELLO))
    with contextlib.suppress(openai.NotFoundError):
        client.chat.completions.create(model="nobody", **HELLO)

    def grown(name, **wanted):
        return total(after, name, **wanted) - total(before, name, **wanted)

    wait_for(lambda: total(read(), "dvai_requests_total") - total(before, "dvai_requests_total") == 3, 20, "3 more")
    after = wait_for(
        lambda: (now := read())["dvai_upstreams"][1]["dvai_upstreams", (("state", "up"),)] and now, 20, "up"
    )
    upstream = {"path": "/chat/completions", "route": "upstream", "status": "200", "outcome": "ok"}
    assert grown("dvai_requests_total", **upstream) == 2
    assert grown("dvai_requests_total", status="404", outcome="model_not_found", route="none") == 1
    assert grown("dvai_completion_tokens_total", route="upstream") > 0
    assert grown("dvai_offloads_total", route="upstream", outcome="committed") == 2
    first = {("dvai_time_to_first_token_seconds_count", (("route", "upstream"),))}
    samples = after["dvai_time_to_first_token_seconds"][1]
    assert first <= set(samples)
    assert after["dvai_requests_running"][1]["dvai_requests_running", ()] == 0
    assert front.request("GET", "/metrics")[0] == 401


def test_without_the_switch_there_are_no_metrics(chain):
    status, _, data = chain[0].request("GET", "/metrics")
    assert status == 404 and "--metrics" in json.loads(data)["error"]["message"]


def test_who_leaves_frees_the_engine(chain):
    engine, front = chain
    endless = HELLO | {"stream": True, "max_tokens": 100_000, "temperature": 1, "logit_bias": {"2": -100}}
    with socket.create_connection(("127.0.0.1", front.port)) as connection:
        body = json.dumps(endless).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        fields = f"Content-Type: application/json\r\nAuthorization: {AUTH['Authorization']}\r\n\r\n"
        connection.sendall(head.encode() + fields.encode() + body)
        wait_for(lambda: read_health(engine)["queue"]["running"] == 1, 30, "the engine computes")
        wait_for(lambda: json.loads(front.request("GET", "/health", headers=AUTH)[2])["queue"]["running"] == 1, 9, "so")
    wait_for(lambda: read_health(engine)["queue"]["running"] == 0, 30, "the engine is free")
    wait_for(lambda: json.loads(front.request("GET", "/health", headers=AUTH)[2])["queue"]["running"] == 0, 9, "free")


def test_loss_and_return_show_in_health_and_answers(tmp_path, model):
    port = find_free_port()
    with start_bridge(tmp_path / "front", "--engine", f"http://127.0.0.1:{port}/v1", ready=False) as front:
        wait_for(lambda: read_health(front)["status"] == "degraded", 30, "nobody is there")
        assert read_health(front)["upstreams"][0]["state"] == "down"
        for _ in range(2):
            status, _, data = front.request("POST", "/v1/chat/completions", HELLO)
            error = json.loads(data)["error"]
            assert (status, error["code"]) == (502, "upstream_unreachable") and "start it" in error["message"]
            with start_bridge(tmp_path / "engine", "--model", model, "--port", port):
                wait_for(lambda: read_health(front)["status"] == "ok", 30, "the engine is seen")
                assert read_health(front)["upstreams"][0]["models"] == ["bytes"]
                assert front.request("POST", "/v1/chat/completions", HELLO)[0] == 200
            wait_for(lambda: read_health(front)["status"] == "degraded", 30, "its loss is seen")
            assert json.loads(front.request("GET", "/v1/models")[2])["data"] == []


def test_with_offload_the_engine_counts_as_this_device(tmp_path, chain):
    engine, _ = chain
    arguments = ("--offload", "--no-discover-lan", "--engine", f"http://127.0.0.1:{engine.port}")
    with start_bridge(tmp_path / "front", *arguments) as front:
        status, headers, _ = front.request("POST", "/v1/chat/completions", HELLO | {"model": "bytes"})
        assert (status, headers["X-DVAI-Route"]) == (200, "upstream") and "enough" in headers["X-DVAI-Reason"]
        required = {"X-DVAI-Offload": "require"}
        status, _, data = front.request("POST", "/v1/chat/completions", HELLO | {"model": "bytes"}, required)
        assert status == 503 and json.loads(data)["error"]["type"] == "no_capable_device"
        scores = json.loads(front.request("GET", "/v1/dvai/capability")[2])["scores"]
        assert [score["modelId"] for score in scores] == ["bytes"] and scores[0]["tokPerSec"] > 0


def test_two_bridges_do_not_ask_in_a_circle(tmp_path):
    ports = find_free_port(), find_free_port()

    def start(here, there):
        home = tmp_path / str(here)
        arguments = ("--port", ports[here], "--engine", f"http://127.0.0.1:{ports[there]}")
        return start_bridge(home, *arguments, ready=False)

    with start(0, 1) as one, start(1, 0):
        wait_for(lambda: read_health(one)["status"] == "ok", 30, "they see each other")
        assert json.loads(one.request("GET", "/v1/models")[2])["data"] == []
        status, _, data = one.request("POST", "/v1/chat/completions", HELLO)
        assert status == 503 and json.loads(data)["error"]["type"] == "no_local_backend"


def test_paired_devices_use_the_engine_behind_within_bounds(tmp_path, model):
    """source → (signed, LAN) → bridge → (plain) → engine."""
    strong = tmp_path / "strong"
    with (
        start_bridge(tmp_path / "engine", "--model", model) as engine,
        start_bridge(
            strong,
            *("--engine", f"http://127.0.0.1:{engine.port}", "--lan", "--host", "127.0.0.1", "--pairing", "allow"),
        ) as middle,
        start_bridge(
            tmp_path / "weak",
            *("--offload-only", "--no-discover-lan", "--pairing", "allow"),
            *("--peer", f"http://127.0.0.1:{middle.port}"),
        ) as weak,
    ):
        wait_for(lambda: weak.request("POST", "/v1/chat/completions", HELLO | {"model": "bytes"})[0] == 200, 60, "used")
        status, headers, _ = weak.request("POST", "/v1/chat/completions", HELLO | {"model": "bytes"})
        assert status == 200 and headers["X-DVAI-Route"] == "lan"
        url = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
        foreign = {"model": "bytes", "messages": [{"role": "user", "content": [url]}]}
        status, _, data = weak.request("POST", "/v1/chat/completions", foreign)
        assert status == 400 and "as data" in json.loads(data)["error"]["message"]


def test_the_key_of_the_engine_stands_in_the_environment_only(tmp_path, model):
    key = "key-of-the-engine"
    with start_bridge(tmp_path / "engine", "--model", model, environ={"DVAI_API_KEY": key}) as engine:
        url = f"http://127.0.0.1:{engine.port}"
        with start_bridge(tmp_path / "one", "--engine", url, ready=False) as front:
            wait_for(lambda: read_health(front)["upstreams"][0]["state"] == "refused", 30, "no key")
            status, headers, data = front.request("POST", "/v1/chat/completions", HELLO)
            assert status == 502 and "DVAI_UPSTREAM_API_KEY" in json.loads(data)["error"]["message"]
            assert headers["x-should-retry"] == "false"
        environ = {"DVAI_UPSTREAM_API_KEY": key}
        with start_bridge(tmp_path / "two", "--engine", url, "-v", environ=environ) as front:
            assert front.request("POST", "/v1/chat/completions", HELLO)[0] == 200
            assert not any(key in line for line in front.lines + front.log)
    command = [*PROGRAM, "serve", "--engine", url, "--upstream-api-key", key]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and key not in refused.stderr and "DVAI_UPSTREAM_API_KEY" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--engine", "ftp://x"), "--engine"),
        (("--engine", "nonsense"), "--engine"),
        (("--engine", "http://u:p@h/v1"), "--engine"),
        (("--engine", "http://127.0.0.1:1", "--alias", "x"), "--alias"),
        (("--engine", "http://127.0.0.1:1", "-hf", "user/repo"), "--hf-repo"),
    ],
)
def test_what_cannot_be_an_engine(tmp_path, arguments, text):
    command = [*PROGRAM, "serve", "--home", str(tmp_path), "--offline", *arguments]
    refused = subprocess.run(command, capture_output=True, text=True, env=CLEAN_ENVIRON)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and text.strip("-") in refused.stderr


def list_models(environ):
    command = [*PROGRAM, "models"]
    return subprocess.run(command, env=CLEAN_ENVIRON | environ, capture_output=True, text=True, check=True).stdout


def test_auto_offers_what_runs_here_beside_our_own(tmp_path):
    """OLLAMA_HOST leads to a server that lists models as Ollama does."""
    sent = encode_stream(chunk({"content": "from "}), chunk({"content": "behind"}), chunk({}, "stop"))

    async def play(ready, stop):
        answers = {
            "/v1/models": encode_answer(listing("tiny:latest", "other:7b", owner="library")),
            "/v1/chat/completions": sent,
        }
        async with EngineServer(answers) as server:
            ready.append(server.port)
            await asyncio.to_thread(stop.wait)

    ready, stop = [], threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(play(ready, stop)))
    thread.start()
    try:
        port = wait_for(lambda: ready, 30, "the server runs")[0]
        environ = {"OLLAMA_HOST": f"127.0.0.1:{port}"}
        with start_bridge(tmp_path / "auto", "--engine", "auto", environ=environ) as bridge:
            wait_for(lambda: len(json.loads(bridge.request("GET", "/v1/models")[2])["data"]) >= 3, 30, "it is found")
            data = json.loads(bridge.request("GET", "/v1/models")[2])["data"]
            listed = {each["id"]: each["owned_by"] for each in data}
            assert listed["tiny:latest"] == "Ollama" and listed["dvai-demo"] == "dvai-bridge"
            body = CHAT | {"model": "tiny", "stream": True}
            status, headers, data = bridge.request("POST", "/v1/chat/completions", body)
            assert status == 200 and headers["X-DVAI-Route"] == "upstream" and b"behind" in data
            _, headers, _ = bridge.request("POST", "/v1/chat/completions", CHAT)
            assert headers["X-DVAI-Route"] == "local", "without a name, our own model answers"
        with start_bridge(tmp_path / "plain", environ=environ) as bridge:
            listed = json.loads(bridge.request("GET", "/v1/models")[2])["data"]
            assert [each["id"] for each in listed] == ["dvai-demo"], "plain serve only names it"
            assert bridge.request("POST", "/v1/chat/completions", CHAT | {"model": "tiny"})[0] == 404
        wait_for(lambda: f"serve --engine http://127.0.0.1:{port}/v1" in list_models(environ), 60, "it is named")
    finally:
        stop.set()
        thread.join()


# -- engines of others, for real --


LLAMA_SERVER = os.environ.get("DVAI_LLAMA_SERVER", "")


@contextlib.contextmanager
def run_engine(command, port, timeout_s=120):
    """Another program's server on `port`, once it takes connections.

    It sees only the variables that a program needs: llama_cpp.server takes any other (CACHE, MODEL...) for a setting.
    """
    words = list(map(str, command))
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log, env=environ)

        def accepts():
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(f"{command} ended: {log.read()[-2000:]}")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        try:
            wait_for(accepts, timeout_s, words[0])
            yield process
        finally:
            process.kill()
            process.wait()


def start_llama_server(model, port, *options):
    if not LLAMA_SERVER:
        pytest.skip("needs llama-server (DVAI_LLAMA_SERVER)")
    command = [LLAMA_SERVER, "-m", model, "--port", port, "-c", "2048", "-np", "2", "-t", "1"]
    return run_engine([*command, *(options or ("--embeddings", "--pooling", "mean"))], port)


def start_llama_cpp_server(model, port):
    for package in ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings"):
        require(package)
    command = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", port]
    return run_engine([*command, "--n_ctx", "2048", "--n_threads", "1", "--embedding", "true"], port)


STARTS = {"llama-server": start_llama_server, "llama_cpp.server": start_llama_cpp_server}


@pytest.mark.parametrize("product", STARTS)
def test_engines_of_others(tmp_path, model, product):
    start = STARTS[product]
    port = find_free_port()
    with start_bridge(tmp_path, "--engine", f"http://127.0.0.1:{port}", ready=False) as front:
        client = openai.OpenAI(base_url=front.base_url, api_key="x", max_retries=0)
        with start(model, port) as process:
            wait_for(lambda: read_health(front)["status"] == "ok", 60, "the engine is seen")
            (shown,) = read_health(front)["upstreams"]
            assert shown["product"] == product
            (listed,) = client.models.list().data
            name = listed.id
            whole = client.chat.completions.create(model=name, **HELLO)
            assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.prompt_tokens > 0
            chunks = list(client.chat.completions.create(model=name, stream=True, **HELLO))
            assert [each.choices[0].finish_reason for each in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1].choices[0].finish_reason and len({each.id for each in chunks}) == 1
            text = client.completions.create(model=name, prompt="x", max_tokens=4)
            assert text.object == "text_completion" and text.usage.completion_tokens > 0
            vectors = client.embeddings.create(model=name, input=["a", "b"])
            assert len(vectors.data) == 2 and vectors.usage.prompt_tokens > 0
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model=name, messages=HELLO["messages"], temperature="x")
            assert "temperature" in refused.value.message
            process.kill()
            wait_for(lambda: read_health(front)["status"] == "degraded", 60, "its loss is seen")
            with pytest.raises(openai.APIStatusError) as gone:
                client.chat.completions.create(model=name, **HELLO)
            assert gone.value.status_code == 502
        with start(model, port):
            wait_for(lambda: read_health(front)["status"] == "ok", 60, "its return is seen")
            assert client.chat.completions.create(model=name, **HELLO).usage.completion_tokens > 0
