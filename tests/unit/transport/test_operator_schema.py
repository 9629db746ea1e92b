"""An operator's own schema of a message: what may be used, the payload limit, the cost, and the reload."""

import json
import time
from itertools import count, pairwise

import orjson
import pytest
from support.operator_schemas import EXAMPLE, schema_with
from twisted.logger import capturedLogs, formatEvent

from chatd.messages import Id, Post
from chatd.transport import operator_schema
from chatd.transport.documents import compose
from chatd.transport.frames import MAX_MESSAGE, MESSAGE, FrameError, Vocabulary
from chatd.transport.operator_schema import MAX_DEPTH, MAX_NESTING, MAX_PARTS, SchemaFile, expand, read, read_file
from chatd.transport.schema_cost import MOST_BYTES, Estimate, longest, texts

ID = r"^[0-9A-Za-z]{4,16}-(0|[1-9][0-9]{0,15})$"


def read_schema(document, max_bytes=0):
    return read(orjson.dumps(document), max_bytes)


def refusal(document, max_bytes=0):
    """Return the line with which a schema is refused."""
    with pytest.raises(ValueError, match=r".") as refused:
        read(document if isinstance(document, bytes) else orjson.dumps(document), max_bytes)
    line = str(refused.value)
    assert "\n" not in line
    return line


def vocabulary_of(document, max_bytes=0):
    found = read_schema(document, max_bytes)
    vocabulary = Vocabulary()
    vocabulary.use(found.form, found.max_bytes)
    return vocabulary


def refused(vocabulary, **fields):
    """Return the words with which a post is refused."""
    with pytest.raises(FrameError) as error:
        vocabulary.parse(orjson.dumps({"username": "ann", "message": "hi"} | fields))
    return str(error.value).removeprefix("Validation error: ")


# The root


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (b"{", "is not JSON (unexpected end of data: line 1 column 2 (char 1))"),
        (b"[]", "is not a JSON object"),
        (b" " * (operator_schema.MAX_FILE + 1), "is larger than 1 MiB"),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, f"has another $schema than {operator_schema.DRAFT}"),
        ({}, 'must have "type": "object" and "additionalProperties": false'),
        (EXAMPLE | {"additionalProperties": True}, 'must have "type": "object" and "additionalProperties": false'),
        (EXAMPLE | {"type": ["object"]}, 'must have "type": "object" and "additionalProperties": false'),
        (EXAMPLE | {"required": ["username"]}, 'must require "message", a string with a maxLength'),
        (schema_with(username={"type": "string"}), 'must require "username", a string with a maxLength'),
        (schema_with(message={"maxLength": 3}), 'must require "message", a string with a maxLength'),
        (schema_with(message=True), 'must require "message", a string with a maxLength'),
        (EXAMPLE | {"required": ["username", "message", "x"]}, 'requires "x", which its properties lack'),
        (EXAMPLE | {"patternProperties": {}}, "must name its fields in properties, not in patternProperties"),
        *(
            (schema_with(**{name: True}), f'has a property "{name}", which is a name of the protocol: choose another')
            for name in operator_schema.RESERVED
        ),
    ],
    ids=lambda one: repr(one)[:60],
)
def test_schema_must_be_that_of_a_message(document, line):
    assert refusal(document) == line


def test_reserved_names():
    """The names that the protocol and its envelopes need are reserved."""
    assert {*operator_schema.RESERVED} == {"type", "label", "replaces", "timestamp", "room", "id", "removed"}


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ({"type": "objekt"}, "is not a JSON Schema: /properties/x/type: "),
        ({"maxlength": 3}, 'has the unknown keyword "maxlength"'),
        ({"dependencies": {}}, 'has the unknown keyword "dependencies"'),
        ({"format": "emial"}, 'has the format "emial", which is not one of date, date-time, duration, email, '),
        ({"format": "regex"}, 'has the format "regex", which is not one of '),
        ({"pattern": "(?=a)b"}, "has the pattern (?=a)b, which looks around or back, or is too large"),
        ({"pattern": r"(a)\1"}, r"has the pattern (a)\1, which looks around or back, or is too large"),
        ({"pattern": "a{1000}{1000}"}, "has the pattern a{1000}{1000}, which looks around or back, or is too large"),
        ({"contentSchema": {"$ref": "http://127.0.0.1:9/x"}}, 'refers to "http://127.0.0.1:9/x", and must stay '),
        ({"contentSchema": {"$ref": "#/nowhere"}}, 'refers to "#/nowhere", where no schema is'),
        ({"$id": "urn:x"}, "has an $id inside, and may have one at its top only"),
        ({"$ref": "http://127.0.0.1:9/x"}, 'refers to "http://127.0.0.1:9/x", and must stay within its own file'),
        ({"$ref": "file:///etc/passwd"}, 'refers to "file:///etc/passwd", and must stay within its own file'),
        ({"$ref": "other.json"}, 'refers to "other.json", and must stay within its own file'),
        ({"$ref": "#"}, 'refers to itself by "#"'),
        ({"$ref": "#/properties/x"}, 'refers to itself by "#/properties/x"'),
        ({"items": {"$ref": "#/properties/x"}}, 'refers to itself by "#/properties/x"'),
        ({"$ref": "#/$defs/none"}, 'refers to "#/$defs/none", where no schema is'),
        ({"$ref": "#/required/7"}, 'refers to "#/required/7", where no schema is'),
        ({"$ref": "#/required/0"}, 'refers to "#/required/0", where no schema is'),
        ({"$ref": "#none"}, 'refers to "#none", where no schema is'),
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_field_that_may_not_be_used(field, line):
    assert refusal(schema_with(x=field)).startswith(line)


@pytest.mark.parametrize("depth", [MAX_NESTING, 240, 900])
@pytest.mark.parametrize("field", ['{"const":%s}', '{"default":%s}', '{"x-a":%s}', '{"not":%s}', '{"$defs":%s}'])
def test_deep_values_are_refused(field, depth):
    """A walk through the schema, and the encoding of the served documents, would fail."""
    nested = '{"a":' * depth + "1" + "}" * depth
    text = orjson.dumps(schema_with(x="FIELD")).replace(b'"FIELD"', (field % nested).encode())
    assert refusal(text) in {f"is nested deeper than {MAX_NESTING}", "cannot be used (Recursion limit reached)"}


def test_deepest_schema_is_served():
    """References add to its nesting."""
    deep = orjson.loads("[" * (MAX_NESTING - 4) + "]" * (MAX_NESTING - 4))
    links = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(MAX_DEPTH - 3)}
    last = {f"d{MAX_DEPTH - 3}": {"const": deep}}
    vocabulary = vocabulary_of(schema_with(x={"$ref": "#/$defs/d0"}) | {"$defs": links | last})
    assert len(compose(vocabulary)) == 2


def test_annotations_are_allowed():
    """They stay in the served schema, as do keywords that begin with `x-`."""
    field = {"title": "X", "description": "Y", "x-order": 1, "examples": [1], "default": 2, "$comment": "", "const": 3}
    found = read_schema(schema_with(x=field) | {"$id": "urn:mine", "$schema": operator_schema.DRAFT})
    assert found.form.schema["properties"]["x"] == field
    assert found.form.explain({"username": "a", "message": "b", "x": 4}) == '"x" must be [3]'


# References


def test_references_within_the_file():
    """Pointers, anchors and references beside other keywords lead to what they name."""
    vocabulary = vocabulary_of(
        schema_with(
            a={"$ref": "#/$defs/a~1b%20~0/anyOf/1", "maxLength": 2},
            b={"$ref": "#short", "allOf": [{"minLength": 2}]},
            c={"$dynamicRef": "#short"},
            d={"$ref": "#/$defs/no"},
        )
        | {
            "$defs": {
                "a/b ~": {"anyOf": [True, {"type": "string"}]},
                "s": {"$anchor": "short", "$dynamicAnchor": "short", "maxLength": 3},
                "no": False,
            }
        }
    )
    assert refused(vocabulary, a=1) == '"a" must be a string'
    assert refused(vocabulary, a="abc") == '"a" length must be less than or equal to 2 characters long'
    assert refused(vocabulary, b="abcd") == '"b" length must be less than or equal to 3 characters long'
    assert refused(vocabulary, b="a") == '"b" length must be at least 2 characters long'
    assert refused(vocabulary, c="abcd") == '"c" length must be less than or equal to 3 characters long'
    assert refused(vocabulary, d=1) == '"d" is not allowed'


def test_references_that_multiply_are_refused():
    """Ten definitions that name the next one twice would be a thousand schemas."""
    names = [f"d{number}" for number in range(11)]
    chained = {
        one: {"anyOf": [{"$ref": f"#/$defs/{other}"}, {"$ref": f"#/$defs/{other}"}]} for one, other in pairwise(names)
    }
    document = schema_with(x={"$ref": "#/$defs/d0"}) | {"$defs": chained | {names[-1]: {"type": "null"}}}
    line = f"has more than {MAX_PARTS} schemas in it, or nests them deeper than {MAX_DEPTH}"
    assert refusal(document) == line


def test_deep_schema_is_refused():
    deep = {"type": "null"}
    for _ in range(MAX_DEPTH + 1):
        deep = {"items": deep, "maxItems": 1}
    assert refusal(schema_with(x=deep)).startswith(f"has more than {MAX_PARTS} schemas in it, or nests them")


# The payload limit


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, 0),
        ({"x": {"type": "string", "maxLength": 1000}}, 12_002),
        ({"x": {"type": ["string", "null"], "maxLength": 1000}}, 12_002),
        ({"x": {"type": "integer"}}, 32),
        ({"x": {"const": "é👋"}}, 2 + 6 + 12),
        ({"x": {"enum": [1, "abc", ["a", {"b": None}]]}}, 2 + 1 + 8 + 1 + 2 + 2 + 8 + 32),
        ({"x": {"type": "string", "enum": ["a"]}}, 8),
        ({"x": {"type": "array", "items": {"type": "integer"}, "maxItems": 10}}, 2 + 10 * 33),
        ({"x": {"type": "array", "prefixItems": [{"type": "null"}], "items": False}}, 2 + 33),
        ({"x": {"type": "array", "prefixItems": [{"type": "null"}], "items": {"const": "a"}, "maxItems": 3}}, 53),
        ({"x": {"type": "array", "maxItems": 0}}, 2),
        ({"x": {"type": "object", "properties": {"ab": {"type": "null"}}, "additionalProperties": False}}, 50),
        ({"x": {"allOf": [{"type": "string"}, {"maxLength": 3}, {"type": "string", "maxLength": 3}]}}, 38),
        ({"x": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]}}, 38),
        ({"x": False}, 0),
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_longest_frame(fields, size):
    """The size of the longest value is that of the value with every character escaped."""
    whole = expand(schema_with(**fields))
    bare = longest(expand(schema_with()))
    names = sum(2 + 2 + 6 * len(name) for name in fields)
    assert longest(whole) - bare == size + names


@pytest.mark.parametrize(
    "field",
    [
        {},
        {"type": "string"},
        {"type": ["string", "null"]},
        {"type": "array", "items": {"type": "null"}},
        {"type": "array", "maxItems": 3},
        {"type": "array", "prefixItems": [True], "items": False},
        {"type": "object"},
        {"type": "object", "properties": {"a": True}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"a": False}, "additionalProperties": False, "maxProperties": 3},
        {"anyOf": [{"type": "null"}, {"type": "string"}]},
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_unbounded_frame_has_the_usual_limit(field):
    assert read_schema(schema_with(x=field)).max_bytes == MAX_MESSAGE


def test_payload_limit_follows_from_the_schema():
    """The limit is the longest frame in KiB with some white space, or 16 KiB if that is more, or what is given."""
    assert read_schema(schema_with()).max_bytes == MAX_MESSAGE
    long = schema_with(message={"type": "string", "maxLength": 8000})
    found = read_schema(long)
    assert 96_000 < found.max_bytes <= MOST_BYTES
    assert 48_000 < found.longest < found.max_bytes / 2
    post = {
        "username": "\U0001f44b" * 30,
        "message": "\U0001f44b" * 8000,
        "label": "x" * 64,
        "replaces": "a" * 16 + "-1",
    }
    text = json.dumps(post).encode()
    assert 90_000 < len(text) <= found.max_bytes
    assert vocabulary_of(long).parse(text).message == post["message"]
    assert read_schema(long, 20_000).max_bytes == 20_000
    longer = schema_with(message={"type": "string", "maxLength": 9000})
    line = refusal(longer)
    assert line.endswith(f"bytes, and the most is {MOST_BYTES}: shorten its fields, or give --max-message")
    assert read_schema(longer, MOST_BYTES).max_bytes == MOST_BYTES


# The cost


@pytest.mark.parametrize(
    "field",
    [
        {"items": {"allOf": [{"type": "integer"}] * 50}},
        {"contains": {"allOf": [{"type": "integer"}] * 50}},
        {"uniqueItems": True},
        {"uniqueItems": True, "items": {"type": "integer"}},
        {"uniqueItems": True, "prefixItems": [True], "items": {"type": "integer"}, "maxItems": 9},
        {"additionalProperties": {"type": "integer"}},
        {"propertyNames": {"maxLength": 3}},
        {"patternProperties": {"^a": {"type": "integer"}}},
        {"items": {"enum": [[str(number)] for number in range(20)]}, "maxItems": 1000},
        {"items": {"const": {"a": 1}}},
        {"items": {"format": "idn-hostname"}, "maxItems": 10},
        {"properties": {"a": {"items": {"items": {"allOf": [True] * 40}}}}},
        {"unevaluatedItems": {"allOf": [True] * 30}},
        {"unevaluatedProperties": {"type": "integer"}},
        {"unevaluatedProperties": False, "anyOf": [True, *[{"properties": {"a": True}}] * 20]},
        {"unevaluatedItems": False, "anyOf": [{"prefixItems": [True]}] * 20},
        {"items": {"multipleOf": 2}},
        {"items": {"minimum": 0.5}, "maxItems": 100},
        {"items": {"const": 1}, "maxItems": 100},
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_expensive_schema_is_refused(field):
    """The line names the cost and the remedy, and a bound of the document makes the schema good."""
    words = refusal(schema_with(x=field), 100_000)
    assert words.startswith("may take ")
    assert ": give arrays a maxItems, objects a maxProperties and strings with a pattern a maxLength; " in words
    assert words.endswith("and compare few numbers")
    bounds = {"maxItems": 8, "maxProperties": 8, "maxLength": 8}
    bounded = {name: value | bounds if isinstance(value, dict) else value for name, value in field.items()}
    bounded |= {name: value for name, value in bounds.items() if name != "maxLength"}
    if "properties" not in field and "patternProperties" not in field:
        if "uniqueItems" in field:
            bounded |= {"items": {"type": "integer"}, "prefixItems": [{"type": "null"}]}
        read_schema(schema_with(x=bounded), 100_000)


@pytest.mark.parametrize(
    "field",
    [
        {"enum": [*range(100_000)]},
        {"type": "integer", "enum": [*range(100)]},
        {"enum": [number + 0.5 for number in range(20)]},
        {"enum": [[0] * 50 + [number] for number in range(50)]},
        {"enum": [{"a": 5e-324, "b": number} for number in range(20)]},
        {"enum": [1, *map(str, range(100_000))]},
        {"type": "array", "uniqueItems": True, "items": {"type": "number"}, "maxItems": 12},
        {"type": "array", "uniqueItems": True, "items": {"type": "integer"}, "maxItems": 100},
        {"items": {"multipleOf": 0.01}, "maxItems": 10},
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_comparisons_of_numbers_are_expensive(field):
    """The engine compares numbers by exact fractions, and one such as 5e-324 takes 20 microseconds."""
    assert refusal(schema_with(x=field), 100_000).startswith("may take ")


@pytest.mark.parametrize(
    "field",
    [
        {"type": "string", "enum": [*range(100)]},
        {"enum": [1, 2, 3, True, None]},
        {"type": "integer", "enum": [*range(30)]},
        {"type": "number", "minimum": -90.5, "maximum": 90.5, "multipleOf": 0.01},
        {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "maxItems": 30},
        {"type": "array", "uniqueItems": True, "items": {"type": "integer"}, "maxItems": 15},
        {"type": "object", "properties": {"a": True}, "unevaluatedProperties": False, "maxProperties": 9},
        {"type": "string", "pattern": r"^[\p{L}\p{N} _-]{1,30}$", "maxLength": 30},
        {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
        {"type": "string", "pattern": ID},
        {"type": "string", "pattern": "^https://[^ ]+$", "maxLength": 2000},
        {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 20, "uniqueItems": True},
        {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 50},
        {
            "if": {"const": 1},
            "then": True,
            "else": {"not": {"const": 2}},
            "dependentSchemas": {"a": {"required": ["b"]}},
        },
        {"dependentRequired": {"a": ["b"]}},
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_usual_fields_are_cheap(field):
    read_schema(schema_with(x=field), 100_000)


@pytest.mark.parametrize(("format_", "length"), [("idn-hostname", 4_000), ("iri", 70_000)])
def test_long_formats_are_expensive(format_, length):
    """A character of an internationalized name takes up to 40 nanoseconds, and one of an IRI 3."""
    field = {"type": "string", "format": format_}
    assert refusal(schema_with(x=field | {"maxLength": length}), 100_000).startswith("may take ")
    read_schema(schema_with(x=field | {"maxLength": length // 2}), 100_000)


def test_slow_pattern_is_refused():
    """Its bound is too high, and so is what the clock shows; a quick one of the same size is good."""
    document = orjson.dumps(schema_with(x={"pattern": "[ab]*a[ab]{300}c", "maxLength": 8000}))
    slow, quick = count(), count()
    with pytest.raises(ValueError, match=r"^may take \d+ microseconds"):
        read(document, 0, lambda: next(slow) * 0.001)
    read(document, 0, lambda: next(quick) * 1e-6)
    assert next(slow) == next(quick) > 50


def test_texts_that_measure_a_pattern():
    """They are made of the pattern's characters, one, two or all of them, and the same in every run."""
    found = [*texts(r"[ab]*\p{Lu}c", 50)]
    assert found == [*texts(r"[ab]*\p{Lu}c", 50)]
    assert {len(text) for text in found} == {50}
    assert {"a", "b"} in [{*text} for text in found]
    assert {"a"} in [{*text} for text in found]
    assert [len(text) for text in texts("a", 5000)] == [5000] * len([*texts("a", 50)])


def test_cost_of_the_example_is_low():
    whole = expand(EXAMPLE)
    assert Estimate(100_000, time.perf_counter).explanation(whole) < operator_schema.BUDGET / 3


# In force


def test_example_accepts_posts_with_its_fields():
    vocabulary = vocabulary_of(EXAMPLE)
    extra = {"color": "red", "attachment": {"url": "https://a.example/b", "size": 7}, "reply_to": "k7Q2xe-41"}
    text = orjson.dumps({"message": "x" * 8000, **extra, "username": "ann", "label": "l", "replaces": "k7Q2xe-7"})
    post = Post("ann", "x" * 8000, "l", replaces=Id("k7Q2xe", 7), extra=extra)
    assert vocabulary.parse(text) == vocabulary.parse_post(text) == post
    assert vocabulary.parse(b'{"username":"ann","message":"hi"}') == Post("ann", "hi")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"color": "pink"}, '"color" must be one of [red, green, blue]'),
        ({"color": None}, '"color" must be one of [red, green, blue]'),
        ({"attachment": []}, '"attachment" must be of type object'),
        ({"attachment": {}}, '"attachment.url" is required'),
        ({"attachment": {"url": "https://a", "size": "7"}}, '"attachment.size" must be an integer'),
        ({"attachment": {"url": "https://a", "size": -1}}, '"attachment.size" must be greater than or equal to 0'),
        ({"attachment": {"url": "https://a b"}}, '"attachment.url" must be a valid uri'),
        ({"attachment": {"url": "http://a"}}, '"attachment.url" fails to match the required pattern: /^https:///'),
        ({"attachment": {"url": "https://a", "alt": ""}}, '"attachment.alt" is not allowed'),
        ({"reply_to": "41"}, f'"reply_to" fails to match the required pattern: /{ID}/'),
        ({"message": "x" * 8001}, '"message" length must be less than or equal to 8000 characters long'),
        ({"message": "", "color": 1}, '"message" is not allowed to be empty'),
        ({"label": "a b"}, '"label" fails to match the required pattern: /^[!-~]*$/'),
        ({"extra": 1}, '"extra" is not allowed'),
        ({"timestamp": "x"}, '"timestamp" is not allowed'),
    ],
)
def test_example_refuses(fields, words):
    assert refused(vocabulary_of(EXAMPLE), **fields) == words


def test_refusal_has_the_label():
    with pytest.raises(FrameError) as error:
        vocabulary_of(EXAMPLE).parse(b'{"username":"ann","message":"hi","color":1,"label":"c81f"}')
    assert error.value.label == "c81f"


def test_deep_and_bracketed_frames_are_refused():
    """A field of any shape is bounded too: it must be possible to encode it again, and quick to parse it."""
    vocabulary = vocabulary_of(schema_with(x=True))
    deep = 0
    for depth in range(1, 300):
        deep = [deep]
        text = (
            orjson.dumps({"username": "ann", "message": "hi", "label": "l"})[:-1]
            + b',"x":'
            + b"[" * depth
            + b"]" * depth
        )
        if depth < 253:
            assert orjson.dumps(vocabulary.parse(text + b"}").extra)
        elif depth > 253:
            with pytest.raises(FrameError) as error:
                vocabulary.parse(text + b"}")
            assert (str(error.value), error.value.label) == ('Validation error: "value" is nested too deeply', "l")
    many = {"username": "ann", "message": "hi", "x": [[]] * 8191}
    assert refused(vocabulary, **many) == '"value" contains more than 8192 brackets'
    assert refused(vocabulary, x="[" * 8192) == '"value" contains more than 8192 brackets'
    assert len(vocabulary.parse(orjson.dumps(many | {"x": [[]] * 8190})).extra["x"]) == 8190


def test_usernames_follow_the_schema():
    """Typing notices, queries and tokens have the usernames of posts."""
    vocabulary = vocabulary_of(schema_with(username={"type": "string", "maxLength": 40, "pattern": "^[a-z]*$"}))
    assert vocabulary.usernames == "0 to 40 characters"
    assert vocabulary.is_username("a" * 40)
    assert not vocabulary.is_username("A")
    assert vocabulary.parse(b'{"type":"typing","username":"%b"}' % (b"a" * 40)).username == "a" * 40
    with pytest.raises(FrameError, match='"username" fails to match'):
        vocabulary.parse(b'{"type":"typing","username":"A"}')
    assert Vocabulary().usernames == "1 to 30 characters"


# The file


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "schema.json"
    path.write_bytes(orjson.dumps(EXAMPLE))
    return path


def test_file_that_cannot_be_used_is_named(file):
    assert read_file(file).form.schema["properties"]["color"] == {"enum": ["red", "green", "blue"]}
    file.write_text("{}")
    with pytest.raises(ValueError, match=rf'^{file} must have "type": "object" and '):
        read_file(file)
    with pytest.raises(ValueError, match=rf"^{file}x cannot be read \(No such file or directory\)$"):
        read_file(file.with_name("schema.jsonx"))


def test_reload(file):
    """A new schema is in force at once, and one that may not be used leaves the old one in force."""
    vocabulary, changes = Vocabulary(), []
    schema = SchemaFile(file, 0, vocabulary, lambda: changes.append(vocabulary.max_bytes))
    with capturedLogs() as log:
        schema.reload()
        assert vocabulary.parse(b'{"username":"a","message":"b","color":"red"}').extra == {"color": "red"}
        file.write_text("{")
        schema.reload()
        assert refused(vocabulary, color=1) == '"color" must be one of [red, green, blue]'
        file.write_bytes(orjson.dumps(schema_with()))
        schema.reload()
        assert refused(vocabulary, color="red") == '"color" is not allowed'
    assert changes == [read_schema(EXAMPLE).max_bytes, MAX_MESSAGE]
    lines = [formatEvent(event) for event in log]
    assert lines[0] == lines[2] == f"read the schema in {file}"
    assert lines[1].startswith(f"the old schema stays in force: {file} is not JSON (")
    assert MESSAGE.accepts({"username": "a", "message": "b"})


def test_long_reason_is_cut(file):
    file.write_bytes(orjson.dumps(schema_with(x={"pattern": "(?=" + "a" * 10_000 + ")"})))
    with pytest.raises(ValueError, match="has the pattern") as refused:
        read_file(file)
    assert len(str(refused.value)) == len(f"{file} ") + operator_schema.MAX_REASON


def test_schema_that_the_engine_refuses(monkeypatch):
    """No such schema passes the other checks today; another version of the engine may know one."""

    def refuse(_):
        raise ValueError("too odd\nfor me")

    monkeypatch.setattr(operator_schema, "Form", refuse)
    assert refusal(EXAMPLE) == "cannot be used (too odd)"
