"""Thoughts, text and calls told apart, however they are cut; grammars that force calls."""

from __future__ import annotations

import json
import random

import pytest

from dvai_bridge import (
    CALL_HELD_LIMIT_CHARS,
    JSON_DEPTH_LIMIT,
    MAX_TOOLS,
    PYTHON_CALL_LIMIT_CHARS,
    TOOL_FORMATS,
    AnswerParser,
    JsonScanner,
    Tool,
    ToolUse,
    build_tool_grammar,
    parse_python_call,
    quote_grammar_text,
    start_grammar,
)

NOTHING = {"type": "object", "properties": {}}
TOOLS = tuple(Tool(name=name, description=None, parameters=NOTHING) for name in ("get_weather", "f"))
USE = ToolUse(tools=TOOLS)
ONE = ToolUse(tools=TOOLS, is_parallel=False)
HERMES, LLAMA, MISTRAL, DEVSTRAL = (TOOL_FORMATS[name] for name in ("hermes", "llama3", "mistral", "devstral"))
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
ANSWER_F = ("", "", [("f", '{"a": 1}')])


def read(parser, pieces):
    """(text, reasoning, [(name, arguments)]) of what a parser makes of some pieces."""
    text, reasoning, calls = "", "", []
    for piece in [*map(parser.push, pieces), parser.finish()]:
        text += piece.text
        reasoning += piece.reasoning
        for delta in piece.calls:
            if delta.name:
                assert delta.index == len(calls), "calls are numbered from 0"
                calls.append((delta.name, ""))
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.arguments)
    return text, reasoning, calls


def chop(text, rng):
    pieces = []
    while text:
        cut = rng.choice((1, 2, 3, 7, 20))
        pieces.append(text[:cut])
        text = text[cut:]
    return pieces


def check(text, expected, build):
    """The same, however the text is cut."""
    assert read(build(), [text]) == expected, "whole"
    assert read(build(), list(text)) == expected, "character by character"
    for seed in range(20):
        assert read(build(), chop(text, random.Random(seed))) == expected, seed


HERMES_CASES = {
    "no call": ("Hello, <b>you</b>. ", ("Hello, <b>you</b>. ", "", [])),
    "nothing": ("", ("", "", [])),
    "white space only": (" \n", (" \n", "", [])),
    "one call": (F, ANSWER_F),
    "text before": (f"I will look.\n\n{F}", ("I will look.", "", [("f", '{"a": 1}')])),
    "white space before": (f"\n\n{F}\n", ANSWER_F),
    "text on both sides": (f"Wait.\n\n{F}\nDone.", ("Wait.\n\nDone.", "", [("f", '{"a": 1}')])),
    "text after": (f"{F}\nDone.", ("Done.", "", [("f", '{"a": 1}')])),
    "two calls": (f"{F}\n{F.replace('1', '2')}", ("", "", [("f", '{"a": 1}'), ("f", '{"a": 2}')])),
    "two calls, no space": (F + F, ("", "", [("f", '{"a": 1}')] * 2)),
    "text between": (f"a {F} b {F} c", ("a b c", "", [("f", '{"a": 1}')] * 2)),
    "no space at all": ('<tool_call>{"name":"f","arguments":{"a":1}}</tool_call>', ("", "", [("f", '{"a":1}')])),
    "spread out": ('<tool_call> { "name" : "f" , "arguments" : { } } </tool_call>', ("", "", [("f", "{ }")])),
    "arguments first": (
        '<tool_call>{"arguments": {"a": [1, {}]}, "name": "f"}</tool_call>',
        ("", "", [("f", '{"a": [1, {}]}')]),
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
    "null": ('<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", "", [("f", "{}")])),
    "empty": ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', ("", "", [("f", "{}")])),
    "as a text": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\u00e9\\"}"}</tool_call>',
        ("", "", [("f", '{"a": "\\u00e9"}')]),
    ),
    "parameters": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', ANSWER_F),
    "more members": (
        '<tool_call>{"id": 7, "x": [{"name": "g"}], "name": "f", "arguments": {"a": 1}, "z": "}"}</tool_call>',
        ANSWER_F,
    ),
    "marks within strings": (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>{\\"}", "b": "<tool_call>"}}</tool_call>',
        ("", "", [("f", '{"a": "</tool_call>{\\"}", "b": "<tool_call>"}')]),
    ),
    "every kind of value": (
        '<tool_call>{"name": "f", "arguments": {"a": [-1.5e-3, true, null, "\\ud83d\\ude00 é"], "": {}}}</tool_call>',
        ("", "", [("f", '{"a": [-1.5e-3, true, null, "\\ud83d\\ude00 é"], "": {}}')]),
    ),
    "a line break in a string": (
        '<tool_call>{"name": "f", "arguments": {"code": "a\n\tb"}}</tool_call>',
        ("", "", [("f", '{"code": "a\\n\\tb"}')]),
    ),
    # What the model got wrong is not lost: text if it is no call, arguments if it begins as one.
    "an unknown function": (F.replace('"f"', '"g"'), (F.replace('"f"', '"g"'), "", [])),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', ('<tool_call>{"arguments": {}}</tool_call>', "", [])),
    "a name that is none": ('x <tool_call>{"name": 5}</tool_call>', ('x <tool_call>{"name": 5}</tool_call>', "", [])),
    "no object": ("<tool_call>f(1)</tool_call>", ("<tool_call>f(1)</tool_call>", "", [])),
    "an array": ('<tool_call>[{"name": "f"}]</tool_call>', ('<tool_call>[{"name": "f"}]</tool_call>', "", [])),
    "arguments that are a list": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "", []),
    ),
    "broken before its arguments": (
        '<tool_call>{"name": f}</tool_call>',
        ('<tool_call>{"name": f}</tool_call>', "", []),
    ),
    "a call after a broken one": (f'<tool_call>{{"name" {F}', ('<tool_call>{"name" ', "", [("f", '{"a": 1}')])),
    "broken in its arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call> ok',
        ("ok", "", [("f", '{"a": 1,}}')]),
    ),
    "unfinished arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": [1</tool_call>',
        ("", "", [("f", '{"a": [1')]),
    ),
    "a forgotten brace": ('<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', ANSWER_F),
    "cut off in its arguments": ('<tool_call>{"name": "f", "arguments": {"a', ("", "", [("f", '{"a')])),
    "cut off before": ('a\n<tool_call>\n{"name": "f", "argu', ('a\n<tool_call>\n{"name": "f", "argu', "", [])),
    "cut off in the mark": ("a <tool_c", ("a <tool_c", "", [])),
    "cut off in the end mark": ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_', ANSWER_F),
    "no end mark": ('<tool_call>{"name": "f", "arguments": {"a": 1}}', ANSWER_F),
    "an end mark alone": ("a</tool_call>b", ("a</tool_call>b", "", [])),
}
LLAMA_CASES = {
    "text": ("It is warm.", ("It is warm.", "", [])),
    "bare": ('{"name": "f", "parameters": {"a": 1}}', ANSWER_F),
    "bare with space": ('\n {"name": "f", "parameters": {"a": 1}}\n', ANSWER_F),
    "with a type": ('{"type": "function", "name": "f", "parameters": {"a": 1}}', ANSWER_F),
    "behind the mark": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ANSWER_F),
    "several": (
        '{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 2}}',
        ("", "", [("f", '{"a": 1}'), ("f", '{"a": 2}')]),
    ),
    "several marks": (
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}<|python_tag|>{"name": "f", "parameters": {"a": 2}}',
        ("", "", [("f", '{"a": 1}'), ("f", '{"a": 2}')]),
    ),
    "its own way": (
        '<|python_tag|>get_weather.call(city="Paris", days=[1, 2])',
        ("", "", [("get_weather", '{"city": "Paris", "days": [1, 2]}')]),
    ),
    "code": ("<|python_tag|>print(1)", ("<|python_tag|>print(1)", "", [])),
    "JSON that is no call": ('{"answer": 42}', ('{"answer": 42}', "", [])),
    "an unknown function": ('{"name": "g", "parameters": {}}', ('{"name": "g", "parameters": {}}', "", [])),
    "no arguments": ('{"name": "f", "gp": {}}', ('{"name": "f", "gp": {}}', "", [])),
    "an object within text": ('See {"name": "f", "parameters": {}}', ('See {"name": "f", "parameters": {}}', "", [])),
    "text after": ('{"name": "f", "parameters": {"a": 1}} ok', ("ok", "", [("f", '{"a": 1}')])),
    "broken in its arguments": ('{"name": "f", "parameters": {a: 1}}', ("", "", [("f", "{a: 1}}")])),
}
MISTRAL_CASES = {
    "text": ("[TOOL] calls", ("[TOOL] calls", "", [])),
    "one": ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', ANSWER_F),
    "one, spread out": (' [TOOL_CALLS] [ {"name": "f", "arguments": {"a": 1}} ] ', ANSWER_F),
    "two": (
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]',
        ("", "", [("f", '{"a": 1}'), ("get_weather", "{}")]),
    ),
    "two marks": (
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}][TOOL_CALLS][{"name": "f", "arguments": {"a": 2}}]',
        ("", "", [("f", '{"a": 1}'), ("f", '{"a": 2}')]),
    ),
    "text around": ('a [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}] b', ("a b", "", [("f", '{"a": 1}')])),
    "an empty list": ("[TOOL_CALLS][]", ("[TOOL_CALLS][]", "", [])),
    "no list": ('[TOOL_CALLS]{"name": "f"}', ('[TOOL_CALLS]{"name": "f"}', "", [])),
    "no list at all": ("[TOOL_CALLS] or not", ("[TOOL_CALLS] or not", "", [])),
    "an end that is missing": ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}', ANSWER_F),
    "text in the list": (
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, and',
        ("and", "", [("f", '{"a": 1}')]),
    ),
}
DEVSTRAL_CASES = {
    "text": ("[ARGS]{}", ("[ARGS]{}", "", [])),
    "one": ('[TOOL_CALLS]f[ARGS]{"a": 1}', ANSWER_F),
    "one with an id": ('[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', ANSWER_F),
    "one, spread out": (' [TOOL_CALLS] f [ARGS] {"a": 1} ', ANSWER_F),
    "two": (
        '[TOOL_CALLS]f[ARGS]{"a": "}["}[TOOL_CALLS]get_weather[ARGS]{}',
        ("", "", [("f", '{"a": "}["}'), ("get_weather", "{}")]),
    ),
    "text around": ('a [TOOL_CALLS]f[ARGS]{"a": 1} b', ("a b", "", [("f", '{"a": 1}')])),
    "an unknown function": ("[TOOL_CALLS]g[ARGS]{}", ("[TOOL_CALLS]g[ARGS]{}", "", [])),
    "no arguments": ("[TOOL_CALLS]f[ARGS][1]", ("[TOOL_CALLS]f[ARGS][1]", "", [])),
    "no mark": ("[TOOL_CALLS]" + "x" * 600, ("[TOOL_CALLS]" + "x" * 600, "", [])),
    "a list": ('[TOOL_CALLS][{"name": "f"}]', ('[TOOL_CALLS][{"name": "f"}]', "", [])),
    "cut off": ("[TOOL_CALLS]f[AR", ("[TOOL_CALLS]f[AR", "", [])),
    "cut off in its arguments": ('[TOOL_CALLS]f[ARGS]{"a', ("", "", [("f", '{"a')])),
    "broken in its arguments": ("[TOOL_CALLS]f[ARGS]{a: 1}", ("", "", [("f", "{a: 1}")])),
}
CASES = [
    pytest.param(tool_format, *case, id=f"{tool_format.name}: {name}")
    for tool_format, cases in (
        (HERMES, HERMES_CASES),
        (LLAMA, LLAMA_CASES),
        (MISTRAL, MISTRAL_CASES),
        (DEVSTRAL, DEVSTRAL_CASES),
    )
    for name, case in cases.items()
]


@pytest.mark.parametrize(("tool_format", "text", "expected"), CASES)
def test_calls_are_told_from_text(tool_format, text, expected):
    check(text, expected, lambda: AnswerParser(tool_format, USE))


@pytest.mark.parametrize(("tool_format", "text", "expected"), CASES)
def test_thoughts_come_first_and_hold_no_calls(tool_format, text, expected):
    thoughts = f"<think>\n Maybe {F} or [TOOL_CALLS]? </thin \n\n</think>\n\n{text}"
    answer, _, calls = expected
    expected = (answer.lstrip(), f"Maybe {F} or [TOOL_CALLS]? </thin", calls)
    check(thoughts, expected, lambda: AnswerParser(tool_format, USE, thinks=True))
    opened = thoughts.removeprefix("<think>")
    check(opened, expected, lambda: AnswerParser(tool_format, USE, thinks=True, is_thinking=True))


THOUGHTS = {
    "no thoughts": ("Hi <think>there", ("Hi <think>there", "", [])),
    "space first": ("\n Hi", ("\n Hi", "", [])),
    "empty": ("<think>\n\n</think>\n\nHi\n", ("Hi\n", "", [])),
    "thoughts": ("\n<think>a\n b\n</think>Hi", ("Hi", "a\n b", [])),
    "cut off": ("<think>a\nb </thi", ("", "a\nb </thi", [])),
    "nothing else": ("<think>a</think>\n", ("", "a", [])),
    "nearly a mark": ("<thinking>a", ("<thinking>a", "", [])),
    "cut off in the mark": (" <thi", (" <thi", "", [])),
    "a second end": ("<think>a</think>b</think>c", ("b</think>c", "a", [])),
}


@pytest.mark.parametrize(("text", "expected"), THOUGHTS.values(), ids=THOUGHTS)
def test_thoughts_are_told_from_text(text, expected):
    check(text, expected, lambda: AnswerParser(None, None, thinks=True))
    check(text, expected, lambda: AnswerParser(HERMES, USE, thinks=True))
    check(text, (text, "", []), lambda: AnswerParser(None, None))


@pytest.mark.parametrize(("tool_format", "text", "expected"), CASES)
def test_who_has_no_tools_gets_text(tool_format, text, expected):
    check(text, (text, "", []), lambda: AnswerParser(tool_format, None))


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        (HERMES, F + F),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {}}'),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {}}]'),
    ],
)
def test_an_answer_is_over_after_the_only_call_that_it_may_make(tool_format, text):
    check(text, ANSWER_F, lambda: AnswerParser(tool_format, ONE))
    parser = AnswerParser(tool_format, ONE)
    parser.push(text)
    assert parser.is_over


def test_what_no_grammar_holds_is_no_call_of_a_strict_function():
    strict = ToolUse(tools=(Tool(name="f", description=None, parameters=NOTHING, is_strict=True),))
    check("<|python_tag|>f.call()", ("<|python_tag|>f.call()", "", []), lambda: AnswerParser(LLAMA, strict))


def test_arguments_come_while_they_are_written():
    parser = AnswerParser(HERMES, USE)
    assert parser.push('Look:\n<tool_call>\n{"name": "f", "argu').text == "Look:"
    (delta,) = parser.push('ments": {"city": "Pa').calls
    assert (delta.index, delta.name, delta.arguments) == (0, "f", '{"city": "Pa')
    (delta,) = parser.push('ris"').calls
    assert (delta.index, delta.name, delta.arguments) == (0, "", 'ris"')
    assert parser.push("}}\n</tool_call>").calls[0].arguments == "}"
    assert parser.push(F).calls[0].index == 1


def test_a_grammar_takes_over_where_the_call_begins():
    parser = AnswerParser(HERMES, USE)
    parser.push("a <tool_ca")
    assert parser.since_mark is None
    parser.push('ll>\n{"na')
    assert parser.since_mark == '\n{"na'
    parser = AnswerParser(LLAMA, USE)
    parser.push('{"name": "f", "parameters"')
    assert parser.since_mark is None, "it may yet be text"
    parser.push(": {")
    assert parser.since_mark == '{"name": "f", "parameters": {'
    parser = AnswerParser(None, None, thinks=True)
    parser.push("<think>a</think>\n")
    assert parser.since_thoughts == "\n"


# What hostile models write


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"x": "' + "a" * (CALL_HELD_LIMIT_CHARS + 9),
        "<tool_call>" + " " * (CALL_HELD_LIMIT_CHARS + 9) + "{}",
        '<tool_call>{"x": ' + "[" * (JSON_DEPTH_LIMIT + 1),
        '<tool_call>{"x": ' + "1" * 5000 + "}",
        "<tool_call>" * 3000,
        "<tool_call>{" * 3000,
        "<" * 5000,
    ],
)
def test_what_is_held_back_is_bounded_and_not_lost(text):
    parser = AnswerParser(HERMES, USE)
    shown = "".join(parser.push(text[at : at + 4000]).text for at in range(0, len(text), 4000))
    assert len(parser._held) + len(parser._raw) + len(parser._reader.raw) <= CALL_HELD_LIMIT_CHARS + 4000
    assert shown + parser.finish().text == text


def test_calls_are_bounded():
    text, _, calls = read(AnswerParser(HERMES, USE), [F * (MAX_TOOLS + 2)])
    assert len(calls) == MAX_TOOLS
    assert text == F * 2
    bare = '{"name": "f", "parameters": {}}'
    text, _, calls = read(AnswerParser(LLAMA, USE), [bare * (MAX_TOOLS + 2)])
    assert len(calls) == MAX_TOOLS
    assert text == bare * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f.call()", ("f", {})),
        (
            " f.call(a='x', b=-1.5, c=[True, None], d={'e': 1}) ",
            ("f", {"a": "x", "b": -1.5, "c": [True, None], "d": {"e": 1}}),
        ),
        ("g.call()", None),
        ("f.call(1)", None),
        ("f.call(**{})", None),
        ("f.call(a=open('/etc/passwd'))", None),
        ("f.call(a={1, 2})", None),
        ("f.call(a=1e999)", None),
        ("f.call(a=", None),
        ("f.call(a=1); f.call()", None),
        ("f.call(a='\0')", None),
        (f"f.call(a={'(' * 5000})", None),
        (f"f.call(a={'-' * 5000}1)", None),
        (f"f.call(a='{'x' * PYTHON_CALL_LIMIT_CHARS}')", None),
    ],
)
def test_calls_in_python(text, expected):
    found = parse_python_call(text, frozenset({"f"}))
    assert (found and (found[0], json.loads(found[1]))) == expected


def test_random_output_is_never_lost():
    """Whatever a model writes: either it is all text, or a call came of it."""
    parts = [
        "<tool_call>",
        "</tool_call>",
        '{"name"',
        ': "f"',
        ', "arguments"',
        ": {",
        "}",
        "[",
        "]",
        '"',
        "\\",
        " ",
        "x",
        "1,",
    ]
    parts += [
        "[ARGS]",
        "f",
        "[CALL_ID]",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        '"parameters"',
        "\n",
        "é",
        "<think>",
        "</think>",
        ";",
    ]
    for seed in range(3000):
        rng = random.Random(seed)
        text = "".join(rng.choices(parts, k=rng.randrange(30)))
        tool_format = rng.choice((HERMES, LLAMA, MISTRAL, DEVSTRAL))
        found = read(AnswerParser(tool_format, USE), [text])
        assert found == read(AnswerParser(tool_format, USE), list(text)), text
        assert found[2] or found[0] == text


# JSON


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '""', '{"a": [1, 2.5, -0, 1e9, {"b": null}], "c": "\\u00e9\\n"}', '[[], {"": ""}]', "[true, false]"],
)
def test_json_is_taken(text):
    scanner = JsonScanner()
    assert not any(scanner.is_complete or not scanner.push(char) for char in text)
    assert scanner.is_complete
    assert not scanner.push("x")


@pytest.mark.parametrize(
    "text",
    [
        *("x,", "}", "{,", "{1", '{"a"}', '{"a",', '{"a" 1', '{"a": }', '{"a": 1]', '{"a": 1,}', "[1}", "[,", "[1,]"),
        *("[1 2]", "[01]", "[1.]", "[.5]", "[+1]", "[-]", "[tru]", "[NaN]", '["\\x"]', '["\\u00g0"]'),
        *("[" + "1" * 65 + "]", "[" * 65),
    ],
)
def test_what_is_no_json_is_refused_where_it_breaks(text):
    scanner = JsonScanner()
    assert not all(map(scanner.push, text))


# Grammars


def build_schema(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize(
    ("tool_format", "root"),
    [
        (HERMES, '"<tool_call>" ws r11 ws "</tool_call>" (ws "<tool_call>" ws r11 ws "</tool_call>"){0,15}'),
        (MISTRAL, '"[TOOL_CALLS]" ws "[" ws r11 ("," ws r11){0,15} ws "]"'),
        (DEVSTRAL, '"[TOOL_CALLS]" r11 (ws "[TOOL_CALLS]" r11){0,15}'),
        (LLAMA, "r11"),
    ],
)
def test_a_grammar_of_calls(tool_format, root, is_open):
    schema = build_schema(a={"type": "null"})
    tools = tuple(Tool(name=name, description=None, parameters=schema) for name in ("f", '"'))
    grammar = build_tool_grammar(ToolUse(tools=tools), tool_format, is_open=is_open)
    opening = quote_grammar_text(tool_format.opening) + " "
    assert grammar.split("\n")[0] == "root ::= " + (root.removeprefix(opening) if is_open else root)
    second = (
        r'"\"\\\"\""' if tool_format is not DEVSTRAL else r'"\""'
    )  # a name is a JSON text, but where it stands alone
    assert (r'"\"f\""' if tool_format is not DEVSTRAL else '::= "f" (') in grammar and second in grammar
    use = ToolUse(tools=tools, only="f", is_parallel=False)
    single = build_tool_grammar(use, tool_format, is_open=is_open)
    assert f" {second} " not in single and "{0,15}" not in single


def test_schemas_are_followed_strictly_or_as_far_as_they_can_be():
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x*"}}, "required": ["a"]}
    impossible = {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}
    for schema, rule in ((odd, r'"\"a\"" ":" ws string'), (impossible, '":" ws object ws')):
        lenient = ToolUse(tools=(Tool(name="f", description=None, parameters=schema),))
        assert rule in build_tool_grammar(lenient, HERMES, is_open=False)
        strict = ToolUse(tools=(Tool(name="f", description=None, parameters=schema, is_strict=True),))
        with pytest.raises(ValueError, match=r"is not supported|not described"):
            build_tool_grammar(strict, HERMES, is_open=False)


def test_each_schema_has_definitions_of_its_own():
    tools = tuple(
        Tool(name=name, description=None, parameters={"$ref": "#/$defs/x", "$defs": {"x": build_schema(**{name: {}})}})
        for name in ("f", "g")
    )
    grammar = build_tool_grammar(ToolUse(tools=tools), HERMES, is_open=True)
    assert r'"\"f\"" ":" ws value' in grammar and r'"\"g\"" ":" ws value' in grammar


def test_a_grammar_begins_where_the_answer_is():
    grammar, root = start_grammar('root ::= "a"', 'x"\n')
    assert root == "begun-answer"
    assert grammar == 'root ::= "a"\nbegun-answer ::= "x\\"\\n" [ \\t\\r\\n]{0,8} root\n'
