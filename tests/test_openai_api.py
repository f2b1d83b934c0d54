"""Requests in, answers out: tables of what clients send, and of what must be refused by name."""

import base64
import json
import math
import struct

import pytest

from dvai_bridge import (
    CHAT_ROLE_DELTA,
    GRAMMAR_FEATURES,
    MAX_CHOICES,
    MAX_EMBEDDING_INPUTS,
    SAMPLING_FEATURES,
    THINKING_FEATURES,
    TOOL_FEATURES,
    AnswerHead,
    ChatMessage,
    Choice,
    InvalidRequestError,
    SamplingParams,
    TokenLogprob,
    ToolCall,
    Usage,
    build_chat_chunk,
    build_chat_completion,
    build_chat_usage_chunk,
    build_embeddings,
    build_model,
    build_model_list,
    build_text_chunk,
    build_text_completion,
    build_text_usage_chunk,
    combine_usage,
    parse_chat_request,
    parse_completion_request,
    parse_embeddings_request,
    parse_keep_alive,
)
from tests.support import require

HELLO = [{"role": "user", "content": "hello"}]
HEAD = AnswerHead(id="chatcmpl-1", created=1700000000, model="m")


def chat(**fields):
    return parse_chat_request({"messages": HELLO} | fields, features=SAMPLING_FEATURES, tenant="t")


def completion(**fields):
    return parse_completion_request({"prompt": "once"} | fields, features=SAMPLING_FEATURES)


def embeddings(**fields):
    return parse_embeddings_request({"input": "text"} | fields)


def messages_of(*items):
    return chat(messages=list(items)).generations[0].messages


def test_a_minimal_chat_has_the_documented_defaults():
    request = chat()
    assert (request.model, request.stream, request.include_usage) == (None, False, False)
    (generation,) = request.generations
    assert generation.messages == (ChatMessage(role="user", content="hello"),)
    assert generation.prompt is None and generation.max_tokens is None and generation.stop == ()
    assert generation.top_logprobs is None and generation.tenant == "t"
    sampling = generation.sampling
    assert sampling == SamplingParams()
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 40, 0.95, 0.05)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", 0, 0.0),
        ("temperature", 2.0, 2.0),
        ("top_p", 1, 1.0),
        ("min_p", 0.5, 0.5),
        ("top_k", 7.0, 7),
        ("top_k", -1, 0),
        ("seed", 3.0, 3),
        ("seed", -1, None),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("presence_penalty", -2, -2.0),
        ("frequency_penalty", 2, 2.0),
        ("repeat_penalty", 1.1, 1.1),
        ("logit_bias", {"15": -100, "7": 0.5}, {15: -100.0, 7: 0.5}),
        ("temperature", None, 0.8),
    ],
)
def test_sampling_parameters(name, value, expected):
    assert getattr(chat(**{name: value}).generations[0].sampling, name) == expected
    assert getattr(completion(**{name: value}).generations[0].sampling, name) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5.0}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"max_tokens": -1}, None),
        ({"max_tokens": None}, None),
    ],
)
def test_max_tokens_by_either_name(fields, expected):
    assert chat(**fields).generations[0].max_tokens == expected


@pytest.mark.parametrize(
    ("stop", "expected"),
    [("x", ("x",)), (["a", "b", "c", "d"], ("a", "b", "c", "d")), (None, ()), ([], ()), ("", ()), (["", "a"], ("a",))],
)
def test_stop_is_a_string_or_a_list(stop, expected):
    assert chat(stop=stop).generations[0].stop == expected


def test_choices_differ_in_their_seeds_only():
    assert [generation.sampling.seed for generation in chat(n=3, seed=7).generations] == [7, 8, 9]
    assert [generation.sampling.seed for generation in chat(n=3).generations] == [None] * 3
    assert len({generation.messages for generation in chat(n=3, seed=7).generations}) == 1


def test_chat_logprobs():
    assert chat(logprobs=True).generations[0].top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20.0).generations[0].top_logprobs == 20
    assert chat(logprobs=False).generations[0].top_logprobs is None


def test_stream_options():
    request = chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert request.stream and request.include_usage
    assert not chat(stream=True, stream_options={}).include_usage


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "system", "content": "s"}, ("system", "s")),
        ({"role": "developer", "content": "s"}, ("system", "s")),
        ({"role": "user", "content": "", "name": "ann"}, ("user", "")),
        ({"role": "assistant", "content": None}, ("assistant", "")),
        ({"role": "assistant", "content": "a", "tool_calls": [], "refusal": None}, ("assistant", "a")),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, ("assistant", "no")),
        ({"role": "tool", "tool_call_id": "call_1", "content": "42"}, ("tool", "42")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ("user", "a\nb")),
        ({"role": "user", "content": []}, ("user", "")),
    ],
)
def test_messages(message, expected):
    assert [(m.role, m.content) for m in messages_of(message)] == [expected]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[1]"),
        ({}, "messages[1].role"),
        ({"role": "robot", "content": ""}, "messages[1].role"),
        ({"role": 1, "content": ""}, "messages[1].role"),
        ({"role": "user"}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 5}, "messages[1].content"),
        ({"role": "user", "content": ["a"]}, "messages[1].content[0]"),
        ({"role": "user", "content": [{"text": "a"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[1].content[0].text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]},
            "messages[1].content[1]",
        ),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[1].content[0]"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"role": "assistant", "tool_calls": {}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": {"id": "a"}}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{"id": "call_1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "messages[1].tool_calls[0].type"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[1].tool_calls[0].function.name"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"role": "tool", "content": "a", "tool_call_id": 5}, "messages[1].tool_call_id"),
        ({"role": "assistant", "content": "a", "reasoning_content": 5}, "messages[1].reasoning_content"),
    ],
)
def test_refused_messages(message, param):
    with pytest.raises(InvalidRequestError) as caught:
        messages_of(HELLO[0], message)
    assert caught.value.param == param


IGNORED = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": ""},
    "keep_alive": "5m",
    "cache_prompt": True,
    "something_new": [1],
}
NEUTRAL = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "grammar": "",
    "logprobs": None,
    "functions": None,
    "typical_p": 1.0,
    "mirostat": 0,
    "repeat_last_n": 64,
}


@pytest.mark.parametrize("fields", [IGNORED, NEUTRAL])
def test_what_does_not_change_the_answer_is_accepted(fields):
    assert chat(**fields) == chat()
    assert completion(**fields) == completion()


BAD_EVERYWHERE = [
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 10**400),
    ("top_p", 1.01),
    ("top_p", []),
    ("min_p", -1),
    ("top_k", 1.5),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_k", "40"),
    ("seed", 0.5),
    ("seed", 2**64),
    ("seed", True),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repeat_penalty", 0),
    ("max_tokens", 0.5),
    ("max_tokens", -2),
    ("max_tokens", 1e300),
    ("max_completion_tokens", "1"),
    ("n", 0),
    ("n", MAX_CHOICES + 1),
    ("n", False),
    ("stop", 1),
    ("stop", [1]),
    ("stop", ["a"] * 5),
    ("stop", "x" * 2000),
    ("stop", {"a": 1}),
    ("stream", 1),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("model", 5),
    ("model", "m" * 1000),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"５": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1" * 20: 1}),
    ("logit_bias", [[1, 2]]),
    ("logit_bias", {str(n): 1 for n in range(2000)}),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("response_format", "text"),
    ("grammar", "root ::= x"),
    ("audio", {"voice": "alloy"}),
    ("modalities", ["text", "audio"]),
    ("web_search_options", {}),
    ("reasoning_effort", "high"),
    ("functions", [{"name": "f"}]),
    ("mirostat", 2),
]


@pytest.mark.parametrize(("name", "value"), BAD_EVERYWHERE)
def test_refused_parameters_are_named(name, value):
    for parse in (chat, completion):
        with pytest.raises(InvalidRequestError) as caught:
            parse(**{name: value})
        assert caught.value.param == name and f"'{name}'" in caught.value.message
        assert caught.value.status == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": HELLO * 5000}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ],
)
def test_refused_chats(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [None, [], "text", 5, True])
@pytest.mark.parametrize(
    "parse",
    [
        lambda body: parse_chat_request(body, features=frozenset()),
        lambda body: parse_completion_request(body, features=frozenset()),
        parse_embeddings_request,
    ],
)
def test_a_body_must_be_an_object(parse, body):
    with pytest.raises(InvalidRequestError, match="must be a JSON object"):
        parse(body)


def test_features_of_the_engine_decide():
    for name, value in (("logprobs", True), ("logit_bias", {"1": 1})):
        with pytest.raises(InvalidRequestError) as caught:
            parse_chat_request({"messages": HELLO, name: value}, features=frozenset())
        assert caught.value.param == name


SCHEMA = {"type": "boolean"}
BOOLEAN = 'root ::= boolean\nboolean ::= "true" | "false"'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "text"}, "grammar": "root ::= x"}, "root ::= x"),
        ({"grammar": ""}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}, BOOLEAN),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, BOOLEAN),
        ({"json_schema": SCHEMA}, BOOLEAN),
    ],
)
def test_a_grammar_comes_from_whatever_asks_for_one(fields, expected):
    body = {"messages": HELLO, "n": 2} | fields
    parsed = parse_chat_request(body, features=GRAMMAR_FEATURES)
    assert [each.grammar for each in parsed.generations] == [expected] * 2
    assert (
        parse_completion_request({"prompt": "x"} | fields, features=GRAMMAR_FEATURES).generations[0].grammar == expected
    )


def test_a_json_object_is_any_object():
    parsed = parse_chat_request(
        {"messages": HELLO, "response_format": {"type": "json_object"}}, features=GRAMMAR_FEATURES
    )
    assert parsed.generations[0].grammar.startswith("root ::= object\n")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "required"),
        ({"json_schema": {"type": "number", "multipleOf": 3}}, "json_schema", "multipleOf"),
        ({"json_schema": SCHEMA, "grammar": "x"}, "grammar", "combined"),
        ({"grammar": 5}, "grammar", "string"),
        ({"grammar": "x" * 70_000}, "grammar", "65536"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused(fields, param, said):
    with pytest.raises(InvalidRequestError, match=said) as caught:
        parse_chat_request({"messages": HELLO} | fields, features=GRAMMAR_FEATURES)
    assert caught.value.param == param


def test_an_engine_without_grammars_names_the_one_that_has_them():
    for name, value in (("grammar", "root ::= x"), ("response_format", {"type": "json_object"})):
        with pytest.raises(InvalidRequestError, match="pip install") as caught:
            parse_chat_request({"messages": HELLO, name: value}, features=SAMPLING_FEATURES)
        assert caught.value.param == name


# Tools

TOOL_ENGINE = SAMPLING_FEATURES | GRAMMAR_FEATURES | TOOL_FEATURES | THINKING_FEATURES


def tool(name="f", **fields):
    return {"type": "function", "function": {"name": name, **fields}}


def use(features=TOOL_ENGINE, **fields):
    body = {"messages": HELLO, "tools": [tool(), tool("g")]} | fields
    return parse_chat_request(body, features=features).generations[0].tool_use


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (False, None, True)),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, (False, None, False)),
        ({"tool_choice": "required"}, (True, None, True)),
        ({"tool_choice": tool("g")}, (True, "g", False)),
        ({"tool_choice": tool("g"), "parallel_tool_calls": True}, (True, "g", False)),
    ],
)
def test_what_may_be_called(fields, expected):
    found = use(**fields)
    assert (found.is_required, found.only, found.is_parallel) == expected
    assert [each.name for each in found.tools] == ["f", "g"]
    assert [each.name for each in found.callable_tools] == ([expected[1]] if expected[1] else ["f", "g"])


def test_nothing_is_called_without_leave():
    assert use(tool_choice="none") is None
    assert use(tools=None) is None
    assert use(tools=[], tool_choice="auto") is None


def test_functions_are_described_to_the_model_as_openai_does():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    (found,) = use(tools=[tool(description="adds", parameters=schema, strict=True)]).tools
    assert found.is_strict
    described = {"name": "f", "description": "adds", "parameters": schema}
    assert found.build_json() == {"type": "function", "function": described}
    (bare,) = use(tools=[tool()]).tools
    assert bare.build_json()["function"] == {"name": "f", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tools": [tool()] * 129}, "tools"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a" * 129)]}, "tools[0].function.name"),
        ({"tools": [tool(5)]}, "tools[0].function.name"),
        ({"tools": [tool(), tool("g", description=5)]}, "tools[1].function.description"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(strict=True, parameters={"type": "odd"})]}, "tools[0].function.parameters"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"tool_choice": tool("h")}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.function"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ],
)
def test_refused_tools(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        use(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "features", "param", "said"),
    [
        ({}, TOOL_ENGINE - TOOL_FEATURES, "tools", "a model whose chat template has tools"),
        ({"tool_choice": "required"}, TOOL_ENGINE - GRAMMAR_FEATURES, "tool_choice", "needs the llama engine"),
        (
            {"tools": [tool(strict=True)]},
            TOOL_ENGINE - GRAMMAR_FEATURES,
            "tools[0].function.strict",
            "the llama engine",
        ),
        ({"chat_template_kwargs": {"a": 1}}, TOOL_ENGINE - THINKING_FEATURES, "chat_template_kwargs", "not supported"),
    ],
)
def test_what_an_engine_cannot_do_with_tools_is_named(fields, features, param, said):
    with pytest.raises(InvalidRequestError, match=said) as caught:
        use(features, **fields)
    assert caught.value.param == param


def test_tools_are_for_chats():
    for fields in (
        {"tools": [tool()]},
        {"tool_choice": "required"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        with pytest.raises(InvalidRequestError, match="for chat completions only") as caught:
            parse_completion_request({"prompt": "a"} | fields, features=TOOL_ENGINE)
        assert caught.value.param in fields


def test_thoughts_are_asked_for():
    def asks(**kwargs):
        body = {"messages": HELLO, "chat_template_kwargs": kwargs}
        return parse_chat_request(body, features=TOOL_ENGINE).generations[0].enable_thinking

    assert (asks(), asks(enable_thinking=True), asks(enable_thinking=False)) == (True, True, False)


def test_calls_and_thoughts_of_a_history():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assistant = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    answered, result = messages_of(
        assistant, {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]}
    )
    (made,) = answered.tool_calls
    assert (made.call_id, made.name, made.arguments) == ("call_1", "f", '{"a": 1}')
    assert (answered.content, answered.reasoning) == ("", "hm")
    assert (result.role, result.content, result.tool_call_id) == ("tool", "2", "call_1")


def test_an_answer_with_calls_has_no_empty_content():
    made = ToolCall(call_id="call_1", name="f", arguments="{}")
    choices = [
        Choice(text="", finish_reason="tool_calls", tool_calls=(made,), reasoning="hm"),
        Choice(text="a", finish_reason="tool_calls", tool_calls=(made,)),
        Choice(text="", finish_reason="stop"),
    ]
    first, second, third = (choice["message"] for choice in build_chat_completion(HEAD, choices, USAGE)["choices"])
    function = {"name": "f", "arguments": "{}"}
    assert first["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]
    assert (first["content"], first["reasoning_content"]) == (None, "hm")
    assert second["content"] == "a" and "reasoning_content" not in second
    assert third == {"role": "assistant", "content": "", "refusal": None}


def test_refusals_do_not_repeat_the_prompt():
    for fields in ({"messages": "my secret"}, {"messages": [{"role": "my secret"}]}, {"stop": {"my secret": 1}}):
        with pytest.raises(InvalidRequestError) as caught:
            chat(**fields)
        assert "my secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2.0], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        (["a", [1]], ["a", (1,)]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt, expected):
    assert [generation.prompt for generation in completion(prompt=prompt).generations] == expected


@pytest.mark.parametrize("prompt", [None, [], {}, 5, [None], [1, "a"], [-1], [True], [2**31], ["a", 5], [[1], ["a"]]])
def test_refused_prompts(prompt):
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_completion_choices_are_ordered_by_prompt():
    request = completion(prompt=["a", "b"], n=2, seed=5, best_of=2)
    assert [(g.prompt, g.sampling.seed) for g in request.generations] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert request.n == 2


def test_completion_defaults_and_echo():
    request = completion()
    assert request.generations[0].max_tokens == 16
    assert request.generations[0].top_logprobs is None and request.build_prefix(0) == ""
    assert completion(max_tokens=0).generations[0].max_tokens == 0
    assert completion(logprobs=0).generations[0].top_logprobs == 0
    echoed = completion(prompt=["a", "b"], echo=True, n=2)
    assert [echoed.build_prefix(index) for index in range(4)] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
    ],
)
def test_refused_completions(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2]], ((1,), (2,)))],
)
def test_the_four_forms_of_an_embedding_input(value, expected):
    request = embeddings(input=value, encoding_format="base64", model="e", user="u")
    assert request.embedding.inputs == expected
    assert (request.model, request.encoding_format, request.dimensions) == ("e", "base64", None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"] * (MAX_EMBEDDING_INPUTS + 1)}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"encoding_format": 1}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "8"}, "dimensions"),
    ],
)
def test_refused_embeddings(fields, param):
    with pytest.raises(InvalidRequestError) as caught:
        embeddings(**fields)
    assert caught.value.param == param


def test_dimensions_are_honoured_or_refused():
    embeddings(dimensions=8.0).verify_dimensions(8)
    embeddings().verify_dimensions(8)
    with pytest.raises(InvalidRequestError) as caught:
        embeddings(dimensions=4).verify_dimensions(8)
    assert caught.value.param == "dimensions" and "8" in caught.value.message


def token(text, logprob, *top, offset=0):
    return TokenLogprob(token_id=1, text=text, data=text.encode(), logprob=logprob, top=tuple(top), text_offset=offset)


USAGE = Usage(prompt_tokens=10, cached_tokens=6, completion_tokens=4, prompt_ms=200.0, predicted_ms=500.0)
USAGE_JSON = {
    "prompt_tokens": 10,
    "completion_tokens": 4,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 6},
}
TIMINGS_JSON = {
    "cache_n": 6,
    "prompt_n": 4,
    "prompt_ms": 200.0,
    "prompt_per_token_ms": 50.0,
    "prompt_per_second": 20.0,
    "predicted_n": 4,
    "predicted_ms": 500.0,
    "predicted_per_token_ms": 125.0,
    "predicted_per_second": 8.0,
}


def test_chat_completion_object():
    choices = [
        Choice(text="hi", finish_reason="stop", logprobs=(token("hi", -0.5, token("hi", -0.5), token("ho", -1.5)),)),
        Choice(text="ho", finish_reason="length"),
    ]
    assert build_chat_completion(HEAD, choices, USAGE) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hi", "refusal": None},
                "finish_reason": "stop",
                "logprobs": {
                    "content": [
                        {
                            "token": "hi",
                            "logprob": -0.5,
                            "bytes": [104, 105],
                            "top_logprobs": [
                                {"token": "hi", "logprob": -0.5, "bytes": [104, 105]},
                                {"token": "ho", "logprob": -1.5, "bytes": [104, 111]},
                            ],
                        }
                    ],
                    "refusal": None,
                },
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "ho", "refusal": None},
                "finish_reason": "length",
                "logprobs": None,
            },
        ],
        "usage": USAGE_JSON,
        "timings": TIMINGS_JSON,
    }


def test_chat_chunks():
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1700000000, "model": "m"}
    first = build_chat_chunk(HEAD, 0, CHAT_ROLE_DELTA)
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
    assert first == common | {"choices": [choice]}
    middle = build_chat_chunk(HEAD, 1, {"content": "é"}, logprobs=[token("é", -1.0)], include_usage=True)
    logprobs = {
        "content": [{"token": "é", "logprob": -1.0, "bytes": [0xC3, 0xA9], "top_logprobs": []}],
        "refusal": None,
    }
    choice = {"index": 1, "delta": {"content": "é"}, "finish_reason": None, "logprobs": logprobs}
    assert middle == common | {"choices": [choice], "usage": None}
    last = build_chat_chunk(HEAD, 0, {}, finish_reason="stop", include_usage=True)
    choice = {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    assert last == common | {"choices": [choice], "usage": None}
    usage = {"usage": USAGE_JSON, "timings": TIMINGS_JSON}
    assert build_chat_usage_chunk(HEAD, USAGE) == common | {"choices": []} | usage


def test_text_completion_and_chunks():
    tokens = (token("a", -0.5, token("a", -0.5), token("b", -1.0), token("b", -3.0)), token("b", -1.0, offset=1))
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, "b": -1.0}, {}],
        "text_offset": [0, 1],
    }
    common = {"id": "chatcmpl-1", "object": "text_completion", "created": 1700000000, "model": "m"}
    whole = build_text_completion(HEAD, [Choice(text="ab", finish_reason="length", logprobs=tokens)], USAGE)
    choice = {"index": 0, "text": "ab", "finish_reason": "length", "logprobs": logprobs}
    assert whole == common | {"choices": [choice], "usage": USAGE_JSON, "timings": TIMINGS_JSON}
    chunk = build_text_chunk(HEAD, 2, "ab", logprobs=tokens, include_usage=True)
    assert chunk == common | {"choices": [choice | {"index": 2, "finish_reason": None}], "usage": None}
    last = build_text_chunk(HEAD, 0, "", finish_reason="stop")
    choice = {"index": 0, "text": "", "finish_reason": "stop", "logprobs": None}
    assert last == common | {"choices": [choice]}
    assert build_text_usage_chunk(HEAD, USAGE)["choices"] == []


def test_usage_counts_each_prompt_once():
    usages = [
        Usage(prompt_tokens=count, cached_tokens=1, completion_tokens=2, prompt_ms=3, predicted_ms=4)
        for count in (5, 5, 7, 7)
    ]
    assert combine_usage(usages, 2) == Usage(
        prompt_tokens=12, cached_tokens=2, completion_tokens=8, prompt_ms=6, predicted_ms=16
    )
    assert combine_usage([USAGE]) == USAGE
    nothing = build_chat_completion(HEAD, [], Usage(prompt_tokens=3, cached_tokens=3))["timings"]
    assert nothing["prompt_per_second"] == nothing["predicted_per_second"] == nothing["predicted_per_token_ms"] == 0


def test_embeddings_as_numbers_and_as_base64():
    vectors = [(0.6, -0.8), (1.0, 0.0)]
    numbers = build_embeddings("e", vectors, 5, "float")
    assert numbers == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.6, -0.8]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
        ],
        "model": "e",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    packed = build_embeddings("e", vectors, 5, "base64")["data"][0]["embedding"]
    assert base64.b64decode(packed) == struct.pack("<2f", 0.6, -0.8)
    assert packed == "mpkZP83MTL8="


def test_model_list():
    entry = build_model("a/b:c", 1700000000, "local")
    assert build_model_list([entry]) == {
        "object": "list",
        "data": [{"id": "a/b:c", "object": "model", "created": 1700000000, "owned_by": "local"}],
    }


def test_the_official_client_reads_what_we_build():
    types = require("openai.types.chat")
    choices = [Choice(text="hi", finish_reason="stop", logprobs=(token("hi", -0.5, token("ho", -1.5)),))]
    whole = types.ChatCompletion.model_validate_json(json.dumps(build_chat_completion(HEAD, choices, USAGE)))
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].bytes == [104, 111]
    assert whole.usage.prompt_tokens_details.cached_tokens == 6
    chunk = build_chat_chunk(HEAD, 0, {"content": "x"}, logprobs=choices[0].logprobs, include_usage=True)
    assert types.ChatCompletionChunk.model_validate_json(json.dumps(chunk)).choices[0].delta.content == "x"


# How long a model is to stay


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"keep_alive": None, "ttl": None}, None),
        ({"keep_alive": 0}, 0.0),
        ({"keep_alive": 300}, 300.0),
        ({"keep_alive": 1.5}, 1.5),
        ({"keep_alive": -1}, math.inf),
        ({"keep_alive": "-1"}, math.inf),
        ({"keep_alive": "-1m"}, math.inf),
        ({"keep_alive": "0"}, 0.0),
        ({"keep_alive": "300"}, 300.0),
        ({"keep_alive": "5m"}, 300.0),
        ({"keep_alive": "1h30m"}, 5400.0),
        ({"keep_alive": "1.5h"}, 5400.0),
        ({"keep_alive": "250ms"}, 0.25),
        ({"ttl": 60}, 60.0),
        ({"keep_alive": "10s", "ttl": 60}, 10.0),
    ],
)
def test_keep_alive(body, expected):
    assert parse_keep_alive(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        *({"keep_alive": wrong} for wrong in ("", "m", "5 m", "5x", "m5", "--1", True, [], {}, "１m", "9" * 30, 1e10)),
        *({"ttl": wrong} for wrong in ("60", True, [])),
    ],
)
def test_a_wrong_keep_alive_is_refused(body):
    with pytest.raises(InvalidRequestError) as refused:
        parse_keep_alive(body)
    assert refused.value.param == next(iter(body))
