"""JSON schemas as grammars: their text here, and what real llama.cpp writes by them with random weights."""

from __future__ import annotations

import json
import re

import pytest

from dvai_bridge import (
    Finished,
    GenerationRequest,
    InvalidRequestError,
    LoadRequest,
    SamplingParams,
    TextDelta,
    build_integer_pattern,
    build_json_grammar,
    load_llama_backend,
    quote_grammar_text,
)
from tests.support import require
from tests.support_worker import build_byte_model

COLOUR = {"enum": ["red", 'gr"\u00e4\\n', 7, None, {"a": [1]}]}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMAS = {
    "strict": PERSON,
    "optional": {
        "type": "object",
        "properties": {"a": COLOUR, "b": {"type": "null"}, "c": {"const": 3}, '\u00e4 "\\': {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "no property": {"type": "object", "properties": {}, "additionalProperties": False},
    "exclusive": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 12},
    "any of": {
        "anyOf": [{"type": "string", "maxLength": 3}, {"type": "array", "items": COLOUR, "maxItems": 2}, COLOUR]
    },
    "types": {"type": ["integer", "null", "boolean"], "minimum": -12, "maximum": -7},
    "formats": {
        "type": "array",
        "items": {"anyOf": [{"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid")]},
        "minItems": 2,
        "maxItems": 2,
    },
    "references": {
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left"],
        "additionalProperties": False,
        "$defs": {"leaf": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": 9}]}},
    },
    "all of": {
        "allOf": [{"$ref": "#/$defs/one"}, {"properties": {"b": {"const": "y"}}, "required": ["b"]}],
        "additionalProperties": False,
        "$defs": {"one": {"type": "object", "properties": {"a": {"const": "x"}}, "required": ["a"]}},
    },
    "empty array": {"type": "array", "maxItems": 0},
}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
FORMATS = {
    "date": r"\d{4}-(0[1-9]|1[0-2])-\d\d",
    "time": r"\d\d:\d\d:\d\d(\.\d+)?(Z|[-+]\d\d:\d\d)",
    "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[-+]\d\d:\d\d)",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}


def is_valid(value, schema, root):
    """Whether a value is what a schema describes, for the keywords above."""
    if "$ref" in schema:
        return is_valid(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if not all(is_valid(value, each, root) for each in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(is_valid(value, each, root) for each in schema["anyOf"]):
        return False
    if "enum" in schema and not any(value == each and type(value) is type(each) for each in schema["enum"]):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    types = schema.get("type", list(TYPES))
    types = types if isinstance(types, list) else [types]
    if not any(type(value) is TYPES[name] for name in types):
        return False
    if isinstance(value, dict):
        return is_valid_object(value, schema, root)
    if isinstance(value, list):
        size = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**6)
        return size and all(is_valid(each, schema.get("items", {}), root) for each in value)
    if isinstance(value, str):
        size = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**6)
        return size and re.fullmatch(FORMATS.get(schema.get("format"), "(?s).*"), value) is not None
    if type(value) is int:
        low, high = schema.get("minimum", -(10**16)), schema.get("maximum", 10**16)
        return low <= value <= high and schema.get("exclusiveMinimum", low - 1) < value < schema.get(
            "exclusiveMaximum", high + 1
        )
    return True


def is_valid_object(value, schema, root):
    properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
    if "allOf" in schema:  # whose parts know their properties themselves
        return True
    if not all(name in value for name in schema.get("required", ())):
        return False
    return all(
        is_valid(value[name], properties[name], root)
        if name in properties
        else extra is True or (extra is not False and is_valid(value[name], extra, root))
        for name in value
    )


def test_the_validator_of_this_test_tells_right_from_wrong():
    good = {"name": "ab", "age": 3, "tags": [True]}
    assert is_valid(good, PERSON, PERSON)
    for bad in ({"name": "a"}, {"age": 151}, {"age": True}, {"tags": []}, {"tags": [1]}, {"more": 1}):
        assert not is_valid(good | bad, PERSON, PERSON)
    assert not is_valid({"name": "ab", "age": 3}, PERSON, PERSON)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (5, "must be an object"),
        ({"type": "text"}, "'type' must be one of"),
        ({"type": "string", "pattern": "a+"}, "'pattern' is not supported"),
        ({"type": "string", "minimum": 3}, "'minimum' does not belong to its type"),
        ({"type": "number", "minimum": 0}, "'minimum' does not belong to its type"),
        ({"not": {}}, "'not' is not supported"),
        ({"type": "string", "maxLength": 2001}, "'maxLength' must be from 0 to 2000"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "less than"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "less than"),
        ({"type": "array", "minItems": "3"}, "must be an integer"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer between"),
        ({"type": "integer", "minimum": 10**20}, "at most 16 digits"),
        ({"enum": []}, "'enum' must be an array"),
        ({"anyOf": "x"}, "'anyOf' must be an array"),
        ({"type": "object", "properties": []}, "'properties' must be an object"),
        (
            {"type": "object", "properties": {"a": {}}, "required": ["b"], "additionalProperties": False},
            "not described",
        ),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": "http://example.org/"}, "begin with '#'"),
        ({"allOf": [{"type": "string"}, {"type": "object"}]}, "differ in 'type'"),
        ({"type": "array", "items": {"enum": ["x" * 70_000]}}, "too large"),
        ({"type": "object", "properties": {str(n): {"enum": [n]} for n in range(1000)}}, "too large"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(schema, reason):
    with pytest.raises(ValueError, match=reason):
        build_json_grammar(schema)


def test_schemas_are_not_followed_without_end():
    schema = {"type": "string"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested"):
        build_json_grammar(schema)
    wide = {"anyOf": [{"$ref": "#/$defs/0"}], "$defs": {}}
    for number in range(12):
        below = {"$ref": f"#/$defs/{number + 1}"} if number < 11 else {"type": "null"}
        wide["$defs"][str(number)] = {"type": "object", "properties": {"a": below, "b": below, "c": below}}
    assert len(build_json_grammar(wide)) < 10_000  # each is visited once


def test_only_the_rules_that_are_needed_are_there():
    assert build_json_grammar({"type": "boolean"}) == 'root ::= boolean\nboolean ::= "true" | "false"'
    grammar = build_json_grammar()
    assert {line.split(" ", 1)[0] for line in grammar.splitlines()} == {
        *("root", "object", "array", "value", "string", "char", "hex", "number", "integer", "boolean", "null", "ws")
    }


def test_texts_become_literals():
    assert quote_grammar_text('a"\\\n\t\u00e4') == '"a\\"\\\\\\n\\t\u00e4"'
    assert quote_grammar_text("\x00\u2028\U000e0001") == '"\\x00\\u2028\\U000E0001"'


def as_regex(pattern):
    return re.compile(re.sub(r'[" ]', "", pattern))


@pytest.mark.parametrize(
    "bounds", [(0, 0), (0, 9), (1, 10), (7, 123), (-5, 5), (-120, -7), (99, 101), (10, 99), (-1, 0), (123, 4567)]
)
def test_integers_within_bounds(bounds):
    pattern = as_regex(build_integer_pattern(*bounds))
    for number in range(-1300, 5000):
        assert bool(pattern.fullmatch(str(number))) == (bounds[0] <= number <= bounds[1]), number
    assert not any(map(pattern.fullmatch, ("", "-", "00", "01", "-0", "007")))


def test_integers_with_one_bound():
    pattern = as_regex(build_integer_pattern(-3, None))
    assert pattern.fullmatch("-3") and pattern.fullmatch("9" * 16)
    assert not pattern.fullmatch("-4") and not pattern.fullmatch("1" + "0" * 16)
    assert as_regex(build_integer_pattern(None, -10)).fullmatch("-" + "9" * 16)
    assert not as_regex(build_integer_pattern(None, -10)).fullmatch("-9")


# By llama.cpp


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    require("llama_cpp")
    path = tmp_path_factory.mktemp("model") / "tiny-bytes.gguf"
    path.write_bytes(build_byte_model())
    load = LoadRequest(engine="llama", model=str(path), slots=8)
    loaded = load_llama_backend(load, str(path), lambda fraction: None)
    yield loaded
    loaded.close()


# Random weights would write bytes that are no UTF-8: where llama.cpp counts one character, U+FFFD would stand thrice.
ASCII = {3 + byte: -100.0 for byte in range(128, 256)}


def write_all(backend, grammar, seeds, **fields):
    """(text, finish_reason) for each seed, several at a time."""
    texts = {}
    for start in range(0, len(seeds), 8):
        jobs = {}
        for seed in seeds[start : start + 8]:
            sampling = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed, logit_bias=ASCII)
            backend.submit(seed, GenerationRequest(prompt="x", sampling=sampling, grammar=grammar, **fields))
            jobs[seed] = []
        while not all(events and isinstance(events[-1], Finished) for events in jobs.values()):
            for job, event in backend.step():
                jobs[job].append(event)
        for seed, events in jobs.items():
            text = "".join(event.text for event in events if isinstance(event, TextDelta))
            texts[seed] = text, events[-1].finish_reason
    return list(texts.values())


@pytest.mark.llama
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_the_weights_say_the_answer_follows_the_schema(name, backend):
    schema = SCHEMAS[name]
    answers = write_all(backend, build_json_grammar(schema), range(20))  # of ten schemas: 200 runs
    for text, reason in answers:
        assert reason == "stop" and is_valid(json.loads(text), schema, schema), text
    assert len({text for text, _ in answers}) >= {"no property": 1, "empty array": 1, "all of": 1, "types": 2}.get(
        name, 4
    )


@pytest.mark.llama
def test_properties_that_are_not_named_are_of_the_schema_for_the_others(backend):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}},
        "required": ["a", "z"],
        "additionalProperties": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 12},
    }
    answers = write_all(backend, build_json_grammar(schema), range(24), max_tokens=300)
    whole = [json.loads(text) for text, reason in answers if reason == "stop"]
    assert all(is_valid(value, schema, schema) for value in whole)
    assert any("b" in value for value in whole) and any(len(value) > 2 for value in whole)


@pytest.mark.llama
def test_any_object_is_an_object_as_far_as_it_goes(backend):
    ended = 0
    for text, reason in write_all(backend, build_json_grammar(), range(16), max_tokens=300):
        if reason == "stop":
            assert isinstance(json.loads(text), dict)
            ended += 1
        else:
            assert text.startswith("{")
    assert ended


@pytest.mark.llama
def test_a_grammar_of_ones_own(backend):
    answers = write_all(backend, 'root ::= ("ab" | "cd"){2,3} "\u00e4"', range(8))
    assert all(re.fullmatch("(ab|cd){2,3}\u00e4", text) for text, _ in answers)


@pytest.mark.llama
@pytest.mark.parametrize("grammar", ['no-root ::= "a"', "root ::= missing", 'root ::= root "a"', "(", "\0"])
def test_a_grammar_that_is_none_is_refused(grammar, backend):
    with pytest.raises(InvalidRequestError) as caught:
        backend.submit(1, GenerationRequest(prompt="x", grammar=grammar))
    assert caught.value.param == "grammar"


@pytest.mark.llama
def test_a_schema_that_refers_to_itself_for_ever_is_refused(backend):
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    with pytest.raises(InvalidRequestError):
        backend.submit(1, GenerationRequest(prompt="x", grammar=build_json_grammar(schema)))


@pytest.mark.llama
def test_a_recursive_schema_ends_where_the_model_ends_it(backend):
    schema = {
        "type": "object",
        "properties": {"value": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["value", "next"],
        "additionalProperties": False,
    }
    for text, reason in write_all(backend, build_json_grammar(schema), range(8), max_tokens=1500):
        assert reason == "length" or json.loads(text)["value"] in (True, False)
