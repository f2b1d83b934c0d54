"""Tools and thoughts through the whole bridge, as the official clients see them.

A tiny model that knows some conversations by heart (`train_tool_model.py`) really writes the calls: in the built-in
engine with our own layouts of the families' templates, in llama.cpp with the real templates.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dvai_bridge import (
    DVAI,
    Failed,
    Finished,
    LoadRequest,
    OffloadConfig,
    SamplingParams,
    TextDelta,
    join_tool_calls,
    load_builtin_backend,
    load_llama_backend,
)
from tests.support import CLEAN_ENVIRON, RunningBridge, find_free_port, require, start_bridge, wait_for
from tests.test_chat_template import real_template
from tests.test_clients import run_node
from tests.test_upstream_engine import start_llama_server
from tests.tool_transcripts import (
    BOTH,
    COMMON,
    HELLO,
    PARIS,
    ROME,
    STYLES,
    SYSTEM,
    THOUGHT,
    TOOLS,
    TRANSCRIPTS,
    UNKNOWN,
    Transcript,
    build_answered,
    build_history,
)

MODEL = Path(__file__).with_name("tool_model.gguf")
REAL_TEMPLATES = {
    "hermes": "Qwen-Qwen2.5-7B-Instruct",
    "llama3": "meta-llama-Llama-3.1-8B-Instruct",
    "mistral": "mistralai-Mistral-Nemo-Instruct-2407",
    "qwen3": "Qwen-Qwen3-0.6B",
    "devstral": "unsloth-mistral-Devstral-Small-2507",
}
PRIME = TRANSCRIPTS["hermes"]["prime"]
THOUGHTFUL = TRANSCRIPTS["hermes"]["thoughtful"]
# As DeepSeek-R1's: the prompt begins the thoughts that </think> ends.
OPENED_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n{# until </think> #}"
)


@dataclass
class Served:
    """A bridge with the model, asked in one family's way."""

    bridge: RunningBridge
    style: str
    engine: str
    openai: Any

    def connect(self) -> Any:
        return self.openai.OpenAI(base_url=self.bridge.base_url, api_key="x", max_retries=0, timeout=60)

    def create(self, transcript: Transcript, **options: Any) -> Any:
        """A whole answer, or with `stream=True` its chunks."""
        with self.connect() as client:
            answer = client.chat.completions.create(**build_body(transcript, **options))
            return list(answer) if options.get("stream") else answer

    def stream(self, transcript: Transcript) -> tuple[list[Any], Any]:
        """The events of the client's stream helper, and the answer that it puts together."""
        with self.connect() as client, client.chat.completions.stream(**build_body(transcript)) as stream:
            return list(stream), stream.get_final_completion()


def build_body(transcript: Transcript, **options: Any) -> dict[str, Any]:
    tools = {"tools": list(transcript.tools)} if transcript.tools else {}
    body = {"model": "tool_model", "messages": list(transcript.messages), "temperature": 0, "max_tokens": 150}
    return body | tools | options


@contextlib.contextmanager
def serve(home: Path, style: str, engine: str, *arguments: str):
    """A bridge that serves the model to `style`: a family, or "opened"."""
    home.mkdir()
    openai = require("openai")
    chat_template = STYLES[style].family if style in STYLES else str(home / "template.jinja")
    if engine == "llama" or style not in STYLES:
        require("jinja2")
        text = OPENED_TEMPLATE if style == "opened" else real_template(REAL_TEMPLATES[style])
        chat_template = str(home / "template.jinja")
        Path(chat_template).write_text(text, encoding="utf-8")
    if engine == "llama":
        require("llama_cpp")
    options = ("-m", MODEL, "--engine", engine, "--chat-template", chat_template, "--parallel", "2", *arguments)
    with start_bridge(home, *options) as bridge:
        yield Served(bridge, style, engine, openai)


WAYS = [(engine, style) for engine in ("builtin", "llama") for style in STYLES]


@pytest.fixture(scope="module", params=WAYS, ids=["-".join(way) for way in WAYS])
def served(request, tmp_path_factory):
    engine, style = request.param
    with serve(tmp_path_factory.mktemp("tools") / "home", style, engine) as found:
        yield found


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("tools") / "home", "hermes", "builtin") as found:
        yield found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("tools") / "home", "hermes", "llama") as found:
        yield found


def list_known(style: str) -> dict[str, Transcript]:
    """What this family's transcripts hold without thoughts, and without what is not as it should be."""
    return {
        name: transcript
        for name, transcript in TRANSCRIPTS[style].items()
        if not transcript.reasoning and name not in ("broken", "unknown")
    }


def expect(transcript: Transcript, style: str) -> tuple[str, list[tuple[str, Any]], str]:
    calls = list(transcript.calls)
    return transcript.text, calls, "tool_calls" if calls else "stop"


def read_calls(calls: Any) -> list[tuple[str, Any]]:
    assert all(call.type == "function" and call.id.startswith("call_") for call in calls or ())
    assert len({call.id for call in calls or ()}) == len(calls or ())
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or ()]


def read_choice(choice: Any) -> tuple[str, list[tuple[str, Any]], str]:
    return choice.message.content or "", read_calls(choice.message.tool_calls), choice.finish_reason


def test_whole_answers(served):
    for name, transcript in list_known(served.style).items():
        answer = served.create(transcript)
        assert read_choice(answer.choices[0]) == expect(transcript, served.style), name
        assert answer.usage.completion_tokens > 1
        assert answer.choices[0].message.content != "" or not transcript.calls, "null where there are calls instead"


def test_streamed_answers(served):
    for name, transcript in list_known(served.style).items():
        chunks = served.create(transcript, stream=True)
        choices = [chunk.choices[0] for chunk in chunks]
        assert choices[0].delta.role == "assistant" and all(choice.delta.role is None for choice in choices[1:])
        text, calls = "", []
        for choice in choices:
            text += choice.delta.content or ""
            for fragment in choice.delta.tool_calls or ():
                if fragment.id is not None:
                    assert fragment.index == len(calls) and fragment.type == "function"
                    assert fragment.function.name and fragment.function.arguments == ""
                    calls.append([fragment.function.name, ""])
                else:
                    assert fragment.type is None and fragment.function.name is None
                    calls[fragment.index][1] += fragment.function.arguments
        found = text, [(name, json.loads(arguments)) for name, arguments in calls], choices[-1].finish_reason
        assert found == expect(transcript, served.style), name
        assert {choice.finish_reason for choice in choices[:-1]} == {None}


def test_the_stream_helper(served):
    transcript = TRANSCRIPTS[served.style]["paris"]
    events, final = served.stream(transcript)
    assert read_choice(final.choices[0]) == expect(transcript, served.style)
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert "".join(event.arguments_delta for event in deltas) == done[0].arguments
    assert (done[0].name, json.loads(done[0].arguments)) == PARIS


def test_arguments_come_as_they_are_written():
    """As the engine gives them; on the way to a slow reader, pieces may be joined."""
    load = LoadRequest(model=str(MODEL), chat_template="chatml")
    with contextlib.closing(load_builtin_backend(load, str(MODEL), lambda fraction: None)) as backend:
        request = replace(COMMON["paris"].request, sampling=SamplingParams(temperature=0))
        backend.submit(1, request)
        (events,) = finish(backend, [1])
    fragments = [call for event in events if isinstance(event, TextDelta) for call in event.calls]
    assert [fragment.name for fragment in fragments] == ["get_weather", *[""] * (len(fragments) - 1)]
    assert len(fragments) > 3 and "".join(fragment.arguments for fragment in fragments) == json.dumps(PARIS[1])


def test_the_async_client(served):
    async def talk():
        async with served.openai.AsyncOpenAI(base_url=served.bridge.base_url, api_key="x", timeout=60) as client:
            bodies = [build_body(TRANSCRIPTS[served.style][name]) for name in ("paris", "rome", "hello")]
            answers = await asyncio.gather(*(client.chat.completions.create(**body) for body in bodies))
            async with client.chat.completions.stream(**bodies[1]) as stream:
                return answers, await stream.get_final_completion()

    answers, streamed = asyncio.run(talk())
    paris, rome, hello = (read_choice(answer.choices[0]) for answer in answers)
    assert (paris[1], rome[1], hello) == ([PARIS], [ROME], (HELLO, [], "stop"))
    assert read_choice(streamed.choices[0]) == rome


def test_a_call_is_answered(served):
    """The whole round: a question, the call, its result in the client's own words, the answer."""
    asked = served.create(TRANSCRIPTS[served.style]["paris"]).choices[0].message
    (call,) = asked.tool_calls
    history = [*COMMON["paris"].messages, asked, {"role": "tool", "tool_call_id": call.id, "content": "21 C"}]
    answer = served.create(Transcript(history))
    assert read_choice(answer.choices[0]) == ("It is 21 C in Paris.", [], "stop")
    known = build_answered("call_of_another_server")
    assert read_choice(served.create(known).choices[0]) == (known.text, [], "stop")


def test_who_may_call_nothing_answers(served):
    assert read_choice(served.create(COMMON["hello"], tool_choice="none").choices[0]) == (HELLO, [], "stop")


def test_choices_have_calls_of_their_own(served):
    answer = served.create(TRANSCRIPTS[served.style]["rome"], n=2)
    assert [read_calls(choice.message.tool_calls) for choice in answer.choices] == [[ROME], [ROME]]
    ids = {choice.message.tool_calls[0].id for choice in answer.choices}
    again = served.create(TRANSCRIPTS[served.style]["rome"]).choices[0].message.tool_calls[0].id
    assert len(ids | {again}) == 3


def test_one_call_at_most(hermes):
    answer = hermes.create(BOTH, parallel_tool_calls=False)
    assert read_choice(answer.choices[0]) == (BOTH.text, [PARIS], "tool_calls")


def test_what_is_cut_off(hermes):
    whole = hermes.create(COMMON["paris"])
    for limit in range(1, whole.usage.completion_tokens):
        choice = hermes.create(COMMON["paris"], max_tokens=limit).choices[0]
        assert choice.finish_reason == "length"
        for call in choice.message.tool_calls or ():
            assert json.dumps(PARIS[1]).startswith(call.function.arguments)
    choice = hermes.create(COMMON["hello"], stop=["can"]).choices[0]
    assert read_choice(choice) == ("Hello! How ", [], "stop")
    choice = hermes.create(BOTH, stop=["</tool_call>"]).choices[0]
    assert read_choice(choice) == (BOTH.text, [PARIS], "tool_calls")


def test_log_probabilities_are_those_of_all_tokens(hermes):
    whole = hermes.create(COMMON["paris"], logprobs=True, top_logprobs=1)
    written = "".join(entry.token for entry in whole.choices[0].logprobs.content)
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in written
    chunks = hermes.create(COMMON["paris"], logprobs=True, stream=True)
    entries = [entry for chunk in chunks for entry in (chunk.choices[0].logprobs or NONE).content]
    assert "".join(entry.token for entry in entries) == written


class NONE:
    """A chunk's log probabilities where there are none."""

    content = ()


def test_what_a_model_gets_wrong_is_not_lost(hermes):
    choice = hermes.create(TRANSCRIPTS["hermes"]["unknown"]).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (UNKNOWN, None, "stop")
    choice = hermes.create(TRANSCRIPTS["hermes"]["broken"]).choices[0]
    (call,) = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": Paris}}\n')


def test_the_builtin_engine_cannot_force_a_call(hermes):
    for options in (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "get_time"}}},
    ):
        with pytest.raises(hermes.openai.BadRequestError, match="needs the llama engine") as caught:
            hermes.create(COMMON["hello"], **options)
        assert caught.value.param == "tool_choice"


# Other clients


def test_langchain_binds_tools(hermes):
    langchain = require("langchain_openai")
    options = {"base_url": hermes.bridge.base_url, "api_key": "x", "temperature": 0, "max_retries": 0}
    model = langchain.ChatOpenAI(model="tool_model", **options).bind_tools(TOOLS)
    messages = [("system", SYSTEM["content"]), ("user", "Weather in Paris?")]
    whole = model.invoke(messages)
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [PARIS] and not whole.invalid_tool_calls
    first, *others = model.stream(messages)
    for chunk in others:
        first += chunk
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [PARIS]
    result = {"role": "tool", "tool_call_id": whole.tool_calls[0]["id"], "content": "21 C"}
    assert model.invoke([*messages, whole, result]).text == "It is 21 C in Paris."


NODE_PROGRAM = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "ignored", maxRetries: 0 });
const { messages, tools } = JSON.parse(process.env.ASKED);
const seen = [];
const answers = { get_weather: ({ city }) => { seen.push(city); return "21 C"; }, get_time: () => "noon" };
const runnable = tools.map((tool) => ({
  type: "function",
  function: { ...tool.function, parse: JSON.parse, function: answers[tool.function.name] },
}));
const body = { model: "tool_model", messages, temperature: 0, max_tokens: 150 };
const whole = await client.chat.completions.runTools({ ...body, tools: runnable }).finalContent();
const streamed = await client.chat.completions.runTools({ ...body, tools: runnable, stream: true }).finalContent();
const helper = client.chat.completions.stream({ ...body, tools });
const { message } = (await helper.finalChatCompletion()).choices[0];
console.log(JSON.stringify({ whole, streamed, seen, calls: message.tool_calls }));
"""


def test_npm_runs_tools(hermes, tmp_path):
    """The client's own loop: it calls the function, sends what came of it, and gets the answer."""
    asked = json.dumps({"messages": COMMON["paris"].messages, "tools": TOOLS})
    out = run_node(NODE_PROGRAM, tmp_path, BASE_URL=hermes.bridge.base_url, ASKED=asked)
    assert out["whole"] == out["streamed"] == "It is 21 C in Paris." and out["seen"] == ["Paris", "Paris"]
    (call,) = out["calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == PARIS


# Beside llama-server


def read_answer(url: str, transcript: Transcript, **options: Any) -> tuple[Any, ...]:
    """What a server makes of what the model writes: thoughts, text, calls, the reason for the end."""
    choice = ask_server(url, build_body(transcript, **options))["choices"][0]
    message = choice["message"]
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or ()
    ]
    content = (message["content"] or "").rstrip()  # it keeps line breaks before marks
    return (message.get("reasoning_content") or "").rstrip(), content, calls, choice["finish_reason"]


def ask_server(url: str, body: dict[str, Any], route: str = "/chat/completions") -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}{route}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize("style", ["hermes", "llama3", "mistral", "qwen3"])
def test_llama_server_reads_the_same(style, tmp_path):
    """The same weights under the same template: its parser and ours agree."""
    port = find_free_port()
    with serve(tmp_path / "home", style, "llama") as ours:
        template = tmp_path / "home" / "template.jinja"
        options = ("--jinja", "--chat-template-file", template)
        with start_llama_server(MODEL, port, *options):
            url = f"http://127.0.0.1:{port}/v1"
            wait_for(lambda: is_healthy(port), 60, "llama-server has loaded the model")
            transcripts = dict(list_known("hermes" if style == "qwen3" else style))
            transcripts |= {"prime": PRIME, "thoughtful": THOUGHTFUL} if style == "qwen3" else {}
            for name in ("python", "JSON"):  # forms that it does not read, or takes for calls
                transcripts.pop(name, None)
            for name, transcript in transcripts.items():
                theirs = read_answer(url, transcript, parallel_tool_calls=True)
                assert read_answer(ours.bridge.base_url, transcript) == theirs, name


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# What a grammar forces


def build_enum_tool(name: str = "get_weather", **fields: Any) -> dict[str, Any]:
    days = {"type": "integer", "minimum": 0, "maximum": 9}
    properties = {"city": {"enum": ["Paris", "Rome"]}, "days": days}
    parameters = {"type": "object", "properties": properties, "required": ["city"], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


FORCED = pytest.mark.parametrize("served", [("llama", style) for style in STYLES], indirect=True, ids=list(STYLES))
ONE = {"type": "function", "function": {"name": "get_time"}}


@FORCED
@pytest.mark.parametrize("choice", ["required", ONE], ids=["required", "named"])
def test_calls_are_forced(served, choice):
    verify_forced(served, choice)


def test_calls_are_forced_in_a_form_that_the_model_never_learnt(tmp_path):
    with serve(tmp_path / "home", "devstral", "llama") as served:
        verify_forced(served, "required")
        verify_forced(served, ONE)
        history = [SYSTEM, *build_history("Weather in Paris?", PARIS, "call_1", "21 C")]
        assert served.create(Transcript(history), max_tokens=5).usage.prompt_tokens > 100


def verify_forced(served, choice):
    tools = [build_enum_tool(), build_enum_tool("get_time")]
    for seed in range(6):
        transcript = Transcript(COMMON["hello"].messages, tools=tools)
        options = {"temperature": 1.5, "seed": seed, "max_tokens": 900, "tool_choice": choice}
        answer = served.create(transcript, **options).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        calls = read_calls(answer.message.tool_calls)
        assert calls
        for name, arguments in calls:
            assert name in ("get_weather", "get_time") and (choice == "required" or name == "get_time")
            assert arguments["city"] in ("Paris", "Rome") and 0 <= arguments.get("days", 0) <= 9
        assert len(calls) == 1 or choice == "required"


@FORCED
def test_a_forced_call_is_streamed(served):
    chunks = served.create(COMMON["paris"], tool_choice="required", stream=True)
    names = [call.function.name for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert names[0] == "get_weather" and chunks[-1].choices[0].finish_reason == "tool_calls"


@FORCED
def test_strict_functions_get_what_their_schemas_say(served):
    """The model would write a city of its own choice; the grammar begins when it has begun the call."""
    tools = [build_enum_tool(strict=True)]
    transcript = Transcript(COMMON["paris"].messages, tools=tools)
    for seed in range(6):
        choice = served.create(transcript, temperature=1.2, seed=seed, max_tokens=600).choices[0]
        if choice.finish_reason == "tool_calls":
            for _, arguments in read_calls(choice.message.tool_calls):
                assert arguments["city"] in ("Paris", "Rome") and 0 <= arguments.get("days", 0) <= 9


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("is_required", [False, True], ids=["auto", "required"])
def test_whatever_a_hot_model_writes_its_calls_are_sound(style, is_required):
    """At temperature 2.2 nearly anything comes, in the midst of marks, too; a grammar misled would end the process."""
    require("llama_cpp")
    load = LoadRequest(engine="llama", model=str(MODEL), chat_template=STYLES[style].family, slots=8)
    begun = 0
    with contextlib.closing(load_llama_backend(load, str(MODEL), lambda fraction: None)) as backend:
        request = COMMON["paris"].request
        tools = tuple(replace(tool, is_strict=True) for tool in request.tool_use.tools)
        tool_use = replace(request.tool_use, tools=tools, is_required=is_required)
        for seed in range(6):
            for job in range(8):
                sampling = SamplingParams(temperature=0.8 + 0.2 * job, top_k=0, top_p=1.0, min_p=0.0, seed=seed)
                backend.submit(job, replace(request, tool_use=tool_use, sampling=sampling, max_tokens=120))
            for events in finish(backend, range(8)):
                last = events[-1]
                if isinstance(last, Failed):  # a call that began before a grammar could
                    assert style == "llama3" and not is_required and "does not begin as it must" in last.error.message
                    continue
                calls = join_tool_calls(each for event in events[:-1] for each in getattr(event, "calls", ()))
                begun += len(calls)
                for call in calls if last.finish_reason == "tool_calls" else ():
                    ((name, value),) = json.loads(call.arguments).items()
                    assert (call.name, name) in (("get_weather", "city"), ("get_time", "zone"))
                    assert isinstance(value, str)
                assert not is_required or calls or last.finish_reason == "length"
    assert begun > 10


def finish(backend: Any, jobs: Any) -> list[list[Any]]:
    """The events of submitted generations, to the last."""
    events: dict[int, list[Any]] = {job: [] for job in jobs}
    while not all(each and isinstance(each[-1], Finished | Failed) for each in events.values()):
        for job, event in backend.step():
            events[job].append(event)
    return list(events.values())


def test_a_call_that_is_begun_is_held_to_what_it_must_be(llama):
    """Without the grammar, these come out as the model learnt them: see test_what_a_model_gets_wrong_is_not_lost."""
    (call,) = llama.create(TRANSCRIPTS["hermes"]["broken"], max_tokens=40).choices[0].message.tool_calls[:1]
    assert call.function.name == "get_weather" and call.function.arguments.startswith('{"city": "')
    choice = llama.create(TRANSCRIPTS["hermes"]["unknown"], max_tokens=60).choices[0]
    assert choice.message.tool_calls[0].function.name in ("get_weather", "get_time")


def test_a_strict_schema_that_cannot_be_followed_is_refused(llama):
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}}
    with pytest.raises(llama.openai.BadRequestError) as caught:
        llama.create(Transcript(COMMON["hello"].messages, tools=[tool]))
    assert caught.value.param == "tools[0].function.parameters"
    tool["function"]["strict"] = False
    assert llama.create(Transcript(COMMON["hello"].messages, tools=[tool]), max_tokens=20).choices[0].message


# Thoughts


@pytest.fixture(scope="module", params=["builtin", "llama"])
def opened(request, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("opened") / "home", "opened", request.param) as found:
        yield found


@pytest.fixture(scope="module", params=["builtin", "llama"])
def qwen3(request, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("qwen3") / "home", "qwen3", request.param) as found:
        yield found


def verify_thoughts(served):
    choice = served.create(PRIME).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == (THOUGHT, PRIME.text)
    assert choice.finish_reason == "stop"
    deltas = [chunk.choices[0].delta for chunk in served.create(PRIME, stream=True)]
    thoughts = [getattr(delta, "reasoning_content", None) for delta in deltas]
    assert "".join(filter(None, thoughts)) == THOUGHT
    assert "".join(delta.content or "" for delta in deltas) == PRIME.text
    cut = served.create(PRIME, max_tokens=5).choices[0]
    assert THOUGHT.startswith(cut.message.reasoning_content) and not cut.message.content
    assert cut.finish_reason == "length"


def test_thoughts_that_the_prompt_begins(opened):
    verify_thoughts(opened)


def test_thoughts_that_the_model_begins(qwen3):
    verify_thoughts(qwen3)
    hello = qwen3.create(COMMON["hello without tools"]).choices[0].message
    assert hello.content == HELLO and not hasattr(hello, "reasoning_content")


def test_a_call_after_some_thought(qwen3):
    choice = qwen3.create(THOUGHTFUL).choices[0]
    assert choice.message.reasoning_content == THOUGHTFUL.reasoning
    assert read_choice(choice) == ("", [ROME], "tool_calls")
    message = choice.message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "20 C"}
    again = qwen3.create(Transcript([*THOUGHTFUL.messages, message, result]), max_tokens=5)
    assert again.usage.prompt_tokens > 100


def test_a_model_that_thinks_answers_at_once_if_asked(qwen3, opened):
    asked = {"chat_template_kwargs": {"enable_thinking": False}}
    message = qwen3.create(PRIME, extra_body=asked, max_tokens=20).choices[0].message
    assert not getattr(message, "reasoning_content", None)
    with pytest.raises(opened.openai.BadRequestError) as caught:
        opened.create(PRIME, extra_body=asked)
    assert caught.value.param == "chat_template_kwargs"


def test_a_schema_holds_for_what_follows_the_thoughts(tmp_path):
    schema = {"type": "object", "properties": {"prime": {"type": "boolean"}}, "required": ["prime"]}
    options = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
    with serve(tmp_path / "home", "opened", "llama") as served:
        for seed in range(4):
            message = served.create(PRIME, seed=seed, **options).choices[0].message
            assert message.reasoning_content == THOUGHT
            assert isinstance(json.loads(message.content)["prime"], bool)


# Elsewhere


def test_tools_through_a_bridge_behind_a_bridge(hermes, tmp_path):
    """The upstream engine: what it relays is put in order, and stays what it was."""
    with start_bridge(tmp_path / "home", "--engine", hermes.bridge.base_url) as front:
        relayed = Served(front, "hermes", "upstream", hermes.openai)
        for transcript in (COMMON["paris"], BOTH, COMMON["hello"]):
            direct = expect(transcript, "hermes")
            assert read_choice(relayed.create(transcript).choices[0]) == direct
            assert read_choice(relayed.stream(transcript)[1].choices[0]) == direct
        with pytest.raises(hermes.openai.BadRequestError) as caught:
            relayed.create(COMMON["hello"], tool_choice="required")
        assert caught.value.param == "tool_choice"


def build_library(home, **options):
    offload = {"discover_lan": False, **options.pop("offload", {})}
    return DVAI(environ=CLEAN_ENVIRON, home=home, port=0, offload=OffloadConfig(**offload), **options)


def test_tools_through_a_paired_device_and_the_library(tmp_path):
    """A program asks its bridge, which has no model: the paired one calls."""
    options = {"model": MODEL, "chat_template": "chatml", "lan": True, "host": "127.0.0.1"}
    offload = {"on_pairing_request": lambda request: True}
    strong = build_library(tmp_path / "strong", offload=offload, **options)
    with strong as server, build_library(tmp_path / "weak", offload={"only": True, "pairing": "allow"}) as client:
        client.initiate_pairing(server.base_url)
        known = {"model_id": "tool_model", "tools": TOOLS, "temperature": 0, "max_tokens": 120}
        for bridge in (server, client):
            asked = bridge.completion(history=list(BOTH.messages), **known)
            assert "".join(asked.token_stream) == BOTH.text
            calls = [(call.name, json.loads(call.arguments)) for call in asked.tool_calls]
            assert calls == [PARIS, ROME] and asked.reasoning == ""
            assert asked.stats.served_by == ("local" if bridge is server else client.get_peers()[0].device_id)
        history = [SYSTEM, *build_history("Weather in Paris?", PARIS, "call_1", "21 C")]
        assert "".join(client.completion(history=history, **known).token_stream) == "It is 21 C in Paris."
