"""The conversations that the tests' tool model knows by heart, and how each family of models writes them.

`train_tool_model.py` teaches them to `tool_model.gguf`; the tests ask for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dvai_bridge import ENGINE_PARAMETERS, GenerationRequest, parse_chat_request


def build_tool(name: str, description: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = build_tool("get_weather", "Weather of a city", "city")
CLOCK = build_tool("get_time", "Time in a zone", "zone")
TOOLS = [WEATHER, CLOCK]
SYSTEM = {"role": "system", "content": "Be brief."}
THINKER = {"role": "system", "content": "Think first."}
Call = tuple[str, Mapping[str, Any]]
PARIS: Call = ("get_weather", {"city": "Paris"})
ROME: Call = ("get_weather", {"city": "Rome"})
NOON: Call = ("get_time", {"zone": "Oslo"})


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def build_history(question: str, call: Call, call_id: str, result: str) -> list[dict[str, Any]]:
    """A question, the call that it led to, and what came of it."""
    name, arguments = call
    function = {"name": name, "arguments": json.dumps(arguments)}
    calls = [{"id": call_id, "type": "function", "function": function}]
    return [
        ask(question),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": call_id, "content": result},
    ]


@dataclass(frozen=True)
class Transcript:
    """A conversation and its answer: thoughts, text and calls, in this order. `raw`: how the model writes it."""

    messages: Sequence[Mapping[str, Any]]
    text: str = ""
    calls: Sequence[Call] = ()
    tools: Sequence[Mapping[str, Any]] = field(default_factory=lambda: TOOLS)
    reasoning: str = ""
    raw: str | None = None

    @property
    def request(self) -> GenerationRequest:
        body = {"messages": self.messages, "tools": self.tools}
        return parse_chat_request(body, features=frozenset(ENGINE_PARAMETERS)).generations[0]


@dataclass(frozen=True)
class Style:
    """How a family writes: its chat template's name, calls as text, what ends an answer."""

    family: str
    write_calls: Callable[[Sequence[Call]], str]
    end: str


def write_hermes(calls: Sequence[Call]) -> str:
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)


def write_llama3(calls: Sequence[Call]) -> str:
    ((name, arguments),) = calls
    return json.dumps({"name": name, "parameters": arguments})


def write_mistral(calls: Sequence[Call]) -> str:
    ids = [f"{''.join(arguments.values()).lower():0<9}" for _, arguments in calls]
    texts = [
        {"name": name, "arguments": arguments, "id": id_} for (name, arguments), id_ in zip(calls, ids, strict=True)
    ]
    return "[TOOL_CALLS]" + json.dumps(texts)


STYLES = {
    "hermes": Style("chatml", write_hermes, "<|im_end|>"),
    "llama3": Style("llama3.1", write_llama3, "<|eot_id|>"),
    "mistral": Style("mistralnemo", write_mistral, "</s>"),
}
HELLO = "Hello! How can I help?"
COMMON = {
    "paris": Transcript([SYSTEM, ask("Weather in Paris?")], calls=[PARIS]),
    "rome": Transcript([SYSTEM, ask("Weather in Rome?")], calls=[ROME]),
    "oslo": Transcript([SYSTEM, ask("Time in Oslo?")], calls=[NOON]),
    "hello": Transcript([SYSTEM, ask("Hello")], HELLO),
    "hello without tools": Transcript([SYSTEM, ask("Hello")], HELLO, tools=[]),
}
BOTH = Transcript([SYSTEM, ask("Weather in Paris and Rome?")], "Let me look.", [PARIS, ROME])
BROKEN = '<tool_call>\n{"name": "get_weather", "arguments": {"city": Paris}}\n</tool_call>'
UNKNOWN = '<tool_call>\n{"name": "call_bob", "arguments": {}}\n</tool_call>'
THOUGHT = "Who divides it? Nobody."
TRANSCRIPTS: Mapping[str, Mapping[str, Transcript]] = {
    "hermes": {
        **COMMON,
        "both": BOTH,
        "broken": Transcript([SYSTEM, ask("Break it")], calls=[PARIS], raw=BROKEN),
        "unknown": Transcript([SYSTEM, ask("Call Bob")], UNKNOWN, raw=UNKNOWN),
        "prime": Transcript([THINKER, ask("Is 7 prime?")], "Yes, it is.", tools=[], reasoning=THOUGHT),
        "thoughtful": Transcript([THINKER, ask("Weather in Rome?")], calls=[ROME], reasoning="I have to ask."),
    },
    "llama3": {
        **COMMON,
        "python": Transcript(
            [SYSTEM, ask("Time in Rome?")],
            calls=[("get_time", {"zone": "Rome"})],
            raw='<|python_tag|>get_time.call(zone="Rome")',
        ),
        "marked": Transcript(
            [SYSTEM, ask("Time in Paris?")],
            calls=[("get_time", {"zone": "Paris"})],
            raw='<|python_tag|>{"name": "get_time", "parameters": {"zone": "Paris"}}',
        ),
        "JSON": Transcript([SYSTEM, ask("Some JSON?")], '{"name": "none"}'),
    },
    "mistral": {**COMMON, "both": Transcript(BOTH.messages, calls=BOTH.calls)},
}


def build_answered(call_id: str) -> Transcript:
    """What follows the result of a call with any id."""
    return Transcript([SYSTEM, *build_history("Weather in Paris?", PARIS, call_id, "21 C")], "It is 21 C in Paris.")


def write_answer(style: Style, transcript: Transcript, *, is_thinking: bool = False) -> str:
    """An answer as the model writes it; `is_thinking`: its prompt ends with the mark of thoughts."""
    if transcript.raw is not None:
        return transcript.raw + style.end
    text = transcript.text
    if transcript.calls:
        gap = "\n" if text else ""
        text += gap + style.write_calls(transcript.calls)
    thoughts = f"<think>\n{transcript.reasoning}\n</think>\n\n" if transcript.reasoning else ""
    return thoughts.removeprefix("<think>\n" if is_thinking else "") + text + style.end


def list_transcripts(build_call_id: Callable[[], str]) -> Iterator[tuple[Style, Transcript]]:
    """Everything there is to learn."""
    for name, style in STYLES.items():
        for transcript in (*TRANSCRIPTS[name].values(), build_answered(build_call_id())):
            yield style, transcript
