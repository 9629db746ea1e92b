"""The words for what a JSON Schema refuses, and that accepting and explaining agree."""

import json
import re

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE
from support.servers import ROOT

from chatd.transport import explainer
from chatd.transport.explainer import Part, compile_schema

WORDS = [
    ({"type": "string"}, 1, '"value" must be a string'),
    ({"type": "integer"}, 1.5, '"value" must be an integer'),
    ({"type": "number"}, "1", '"value" must be a number'),
    ({"type": "boolean"}, 0, '"value" must be a boolean'),
    ({"type": "array"}, {}, '"value" must be an array'),
    ({"type": "object"}, [], '"value" must be of type object'),
    ({"type": "null"}, 0, '"value" must be null'),
    ({"type": ["string", "null"]}, 0, '"value" must be one of [string, null]'),
    ({"maxLength": 1, "type": "string"}, [], '"value" must be a string'),
    ({"enum": ["red", 1, None, {"a": "b"}]}, "blue", '"value" must be one of [red, 1, null, {"a":"b"}]'),
    ({"const": "red"}, "blue", '"value" must be [red]'),
    ({"const": 1}, 2, '"value" must be [1]'),
    ({"minLength": 3}, "", '"value" is not allowed to be empty'),
    ({"minLength": 3}, "ab", '"value" length must be at least 3 characters long'),
    ({"maxLength": 3}, "abcd", '"value" length must be less than or equal to 3 characters long'),
    ({"pattern": "^a"}, "ba", '"value" fails to match the required pattern: /^a/'),
    ({"pattern": "a{2}"}, "ba", '"value" fails to match the required pattern: /a{2}/'),
    ({"format": "email"}, "ba", '"value" must be a valid email'),
    ({"minimum": 1}, 0, '"value" must be greater than or equal to 1'),
    ({"maximum": 1.5}, 2, '"value" must be less than or equal to 1.5'),
    ({"exclusiveMinimum": 1}, 1, '"value" must be greater than 1'),
    ({"exclusiveMaximum": 1}, 1, '"value" must be less than 1'),
    ({"multipleOf": 5}, 6, '"value" must be a multiple of 5'),
    ({"minItems": 2}, [], '"value" must contain at least 2 items'),
    ({"maxItems": 1}, [1, 2], '"value" must contain less than or equal to 1 item'),
    ({"uniqueItems": True}, [1, 2, 1], '"value" contains a duplicate value'),
    ({"minProperties": 1}, {}, '"value" must have at least 1 key'),
    ({"maxProperties": 2}, {"a": 1, "b": 1, "c": 1}, '"value" must have less than or equal to 2 keys'),
    ({"required": ["a", "b"]}, {"a": 1}, '"b" is required'),
    ({"properties": {"a": {"required": ["b"]}}}, {"a": {}}, '"a.b" is required'),
    ({"properties": {"b": {"type": "null"}}, "required": ["a", "b"]}, {"b": 1}, '"b" must be null'),
    ({"properties": {"a": {"type": "null"}, "b": {}}, "required": ["b"]}, {"a": 1}, '"a" must be null'),
    ({"dependentRequired": {"x": ["y"], "a": ["a", "b"]}}, {"a": 1}, '"b" is required'),
    ({"dependentSchemas": {"x": False, "a": {"required": ["b"]}}}, {"a": 1}, '"b" is required'),
    ({"patternProperties": {"^x": True, "^a": {"type": "null"}}}, {"x": 1, "ab": 1}, '"ab" must be null'),
    ({"propertyNames": {"maxLength": 1}}, {"a": 1, "bc": 1}, '"bc" is not allowed'),
    ({"additionalProperties": {"type": "null"}, "properties": {"a": True}}, {"a": 1, "b": 2}, '"b" must be null'),
    ({"additionalProperties": False, "patternProperties": {"^a": True}}, {"ab": 1, "b": 2}, '"b" is not allowed'),
    ({"properties": {"a": False}}, {"a": 1}, '"a" is not allowed'),
    ({"properties": {"": {"additionalProperties": False}}}, {"": {"": 1}}, '"." is not allowed'),
    ({"properties": {"a": {"items": {"type": "null"}}}}, {"a": [None, None, 1, 2]}, '"a[2]" must be null'),
    ({"properties": {"a": {"items": {"items": {"required": ["b"]}}}}}, {"a": [[], [{}]]}, '"a[1][0].b" is required'),
    ({"properties": {"a": {"prefixItems": [True, False]}}}, {"a": [1, 2]}, '"a[1]" is not allowed'),
    ({"properties": {"a": {"prefixItems": [True], "items": False}}}, {"a": [1, 2, 3]}, '"a[1]" is not allowed'),
    ({"contains": {"type": "null"}}, [1], '"value" does not contain a required match'),
    ({"contains": {"type": "null"}, "minContains": 2}, [None], '"value" must contain at least 2 required matches'),
    ({"contains": {"type": "null"}, "maxContains": 2}, [None] * 3, '"value" contains more than 2 required matches'),
    ({"allOf": [{"type": "string"}, {"minLength": 3}]}, "a", '"value" length must be at least 3 characters long'),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, 1, '"value" does not match any of the allowed types'),
    ({"oneOf": [{"type": "string"}, {"type": "null"}]}, 1, '"value" does not match any of the allowed types'),
    ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "a", '"value" matches more than one allowed type'),
    ({"not": {"type": "string"}}, "a", '"value" contains an invalid value'),
    ({"not": True}, "a", '"value" contains an invalid value'),
    (
        {"not": {"required": ["a", "b"]}},
        {"a": 1, "b": 1},
        '"value" contains a conflict between optional exclusive peers [a, b]',
    ),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, "a", '"value" length must be at least 2 characters long'),
    ({"if": {"type": "string"}, "else": {"type": "null"}}, 1, '"value" must be null'),
    ({"properties": {"a": True}, "unevaluatedProperties": False}, {"a": 1, "b": 2}, '"value" contains an unknown key'),
    ({"prefixItems": [True], "unevaluatedItems": False}, [1, 2], '"value" contains an unknown item'),
    (False, 1, '"value" is not allowed'),
]


@pytest.mark.parametrize(("schema", "value", "words"), WORDS, ids=lambda one: json.dumps(one)[:50])
def test_words_of_each_keyword(schema, value, words):
    part = Part(schema)
    assert not part.accepts(value)
    assert part.fault(value) == words


def test_every_keyword_has_words():
    """Every keyword of 2020-12 that jsonschema knows is in the table above, unless it only refers to others."""
    known = {*jsonschema.Draft202012Validator.VALIDATORS} - {"$ref", "$dynamicRef"}
    used = {name for schema, _, _ in WORDS for name in re.findall(r'"(\w+)":', json.dumps(schema))}
    assert known <= used


def test_page_lists_the_words():
    """The table of the protocol has the words, for all values of the examples above."""
    page = (ROOT / "docs" / "protocol.md").read_text("utf-8")
    table = page.split("| keyword | words |")[1].split("\n\n")[0]
    listed = {words for words in re.findall(r"`([^`]+)`", table) if " " in words}

    def shape(words):
        return re.sub(r"\[.*\]|/.*/|valid \w+|\d+(\.\d+)?", "…", words)

    assert {shape(words) for words in listed} == {
        shape(re.sub(r'^".*?" ', "", words)).replace("items", "item").replace("item", "items")
        if "… item" in shape(words)
        else shape(re.sub(r'^".*?" ', "", words))
        for _, _, words in WORDS
    }


def test_first_fault_of_many_items_is_found_quickly():
    """An array is searched by steps that double, and by halves: few validations, whatever its length."""
    asked = []
    accepts = compile_schema({"items": {"type": "integer"}})

    def counted(items):
        asked.append(len(items))
        return accepts(items)

    items = [1] * 10_000
    items[7654] = items[9000] = "x"
    assert explainer.first_refused(counted, items, lambda some: some) == 7654
    assert len(asked) < 30
    assert sum(asked) < 2 * len(items)
    items[2] = "x"
    asked.clear()
    assert explainer.first_refused(counted, items, lambda some: some) == 2
    assert asked == [1, 2, 1]
    for place in range(40):
        items = [1] * 40
        items[place] = "x"
        assert explainer.first_refused(accepts, items, lambda some: some) == place


def test_nothing_is_fetched():
    with pytest.raises(ValueError, match="Retrieval is disabled"):
        compile_schema({"$ref": "http://127.0.0.1:9/schema"})


def test_pattern_takes_linear_time():
    """A pattern that keeps a backtracking engine busy for ages is refused or matched at once."""
    assert not compile_schema({"pattern": "^(a+)+$"})("a" * 50_000 + "!")
    with pytest.raises(ValueError, match="regex"):
        compile_schema({"pattern": r"(a)\1"})


# Every schema and every document

names = st.sampled_from(["a", "b", "ab", ""])
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "ab", "xyz", 1.5])
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3), max_leaves=8
)
counts = st.integers(0, 3)
TYPES = ["string", "integer", "number", "boolean", "array", "object", "null"]


def keywords(inner):
    """Return schemas of several keywords, which may have schemas in them."""
    some, named = st.lists(inner, min_size=1, max_size=3), st.dictionaries(names, inner, max_size=3)
    lists = st.lists(names, max_size=3, unique=True)
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(TYPES) | st.lists(st.sampled_from(TYPES), min_size=1, unique=True),
            "enum": st.lists(documents, min_size=1, max_size=3),
            "const": documents,
            **dict.fromkeys(
                ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), counts
            ),
            **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), st.integers(-3, 3)),
            "multipleOf": st.sampled_from([1, 2, 0.5]),
            "pattern": st.sampled_from(["^a", "b$", "x", "^[ab]*$"]),
            "uniqueItems": st.booleans(),
            "required": lists,
            "properties": named,
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$"]), inner, max_size=2),
            "additionalProperties": inner,
            "propertyNames": inner,
            "dependentRequired": st.dictionaries(names, lists, max_size=2),
            "dependentSchemas": named,
            "prefixItems": some,
            "items": inner,
            "contains": inner,
            "minContains": counts,
            "maxContains": counts,
            **dict.fromkeys(("allOf", "anyOf", "oneOf"), some),
            **dict.fromkeys(("not", "if", "then", "else"), inner),
            **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), inner),
        },
    ).map(lambda schema: dict(sorted(schema.items(), key=lambda one: one[0][::-1])))


schemas = st.recursive(st.booleans(), keywords, max_leaves=6)


@REPEATABLE
@given(schemas, st.lists(documents, min_size=1, max_size=5))
def test_accepting_and_explaining_agree(schema, documents):
    """A refusal is explained by one line that begins with its place, and an independent engine agrees."""
    part = Part(schema)
    independent = jsonschema.Draft202012Validator(schema)
    for document in documents:
        accepted = part.accepts(document)
        assert accepted == independent.is_valid(document)
        if not accepted:
            words = part.fault(document)
            assert re.match(r'"[^\n]*" \w', words)
            place = re.match(r'"([^" ]*)"', words)[1]
            assert place == "value" or words.endswith("is required") or has(document, place.removeprefix("value"))


def has(document, place):
    """Return whether a document has a place, such as `a.b[1]`; names in these tests have no dot."""
    for key in re.findall(r"\[(\d+)\]|(?:^|\.)([^.\[]*)", place):
        index, name = key
        try:
            document = document[int(index)] if index else document[name]
        except (LookupError, TypeError):
            return False
    return True


def test_words_of_a_long_schema_are_cut():
    """A refused post costs no more to answer than another, however long a list of the schema is."""
    words = Part({"enum": [*map(str, range(100_000))]}).fault("a")
    assert words.startswith('"value" must be one of [0, 1, 2, 3, ')
    assert words.endswith("…")
    assert len(words) == explainer.MAX_WORDS + len('"value" ')
