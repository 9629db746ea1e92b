import json
import pathlib
import re
from typing import NamedTuple

import jsonschema
import orjson
import pytest
from helpers import REPEATABLE
from hypothesis import example, given
from hypothesis import strategies as st

from chatd import frames
from chatd.frames import SCHEMA, Entry, FrameError, Post, parse_post, parse_seed

SEED_FILE = pathlib.Path(__file__).parents[1] / "seed" / "messages.json"
FIELDS = [("username", 30), ("message", 500)]


def post_json(**changes):
    """A valid post's text, but for the changes; ... leaves a key out."""
    document = {"username": "ann", "message": "hi"} | changes
    return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()


def refusal(text):
    with pytest.raises(FrameError) as refused:
        parse_post(text)
    return str(refused.value)


# What is a post


def test_a_post_has_a_username_and_a_message():
    assert parse_post(b'{"username":"ann","message":"hi"}') == Post("ann", "hi")


def test_the_order_of_the_keys_and_the_blanks_between_them_do_not_matter():
    assert parse_post(b' {\r\n\t"message" : "hi",\n"username":"ann" } ') == Post("ann", "hi")


def test_of_duplicate_keys_the_last_counts():
    assert parse_post(b'{"username":"","message":"hi","username":"ann"}') == Post("ann", "hi")
    assert refusal(b'{"username":"ann","message":"hi","username":""}') == (
        'Validation error: "username" is not allowed to be empty'
    )


def test_a_blank_text_is_a_text():
    assert parse_post(post_json(message=" ")) == Post("ann", " ")


def test_escaped_control_characters_are_kept():
    assert parse_post(rb'{"username":"\u0000","message":"\u0007\n\u001b"}') == Post("\0", "\a\n\x1b")


def test_an_escaped_pair_of_surrogates_is_the_character_that_it_stands_for():
    assert parse_post(rb'{"username":"ann","message":"\ud83d\udc4b"}') == Post("ann", "👋")


def test_text_that_looks_like_markup_or_code_is_kept_as_it_is():
    text = "<script>alert('\"}');</script>\\{0}%s\u2028"
    assert parse_post(post_json(message=text)).message == text


@pytest.mark.parametrize(("name", "limit"), FIELDS)
@pytest.mark.parametrize("character", ["a", "ß", "語", "😀", "\u0301", "\U0010ffff", "\0"])
def test_lengths_are_counted_in_code_points(name, limit, character):
    # An emoji is two UTF-16 units and four bytes, and a combining mark no letter of its own: each counts as one.
    longest = character * limit
    assert getattr(parse_post(post_json(**{name: longest})), name) == longest
    assert refusal(post_json(**{name: longest + character})) == (
        f'Validation error: "{name}" length must be less than or equal to {limit} characters long'
    )


# The words of a refusal


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"hello",
        b"{",
        b"{}}",
        b'{"username":"ann","message":"hi"',
        b'{"username":"ann","message":"hi"}{}',
        b'{"username":"ann","message":"hi",}',  # RFC 8259 has no trailing commas,
        b'["a",]',
        b"{'username':'ann','message':'hi'}",  # no single quotes,
        b'{username:"ann","message":"hi"}',  # no bare names,
        b'{"username":"ann","message":"hi"} // hi',  # no comments,
        b"NaN",  # no numbers that are none,
        b"Infinity",
        b"-Infinity",
        b'{"username":"ann","message":NaN}',
        b'{"username":"ann","message":-Infinity}',
        b"01",
        b"+1",
        b".5",
        b"1e999",
        b"True",
        b"undefined",
        b'{"username":"ann","message":"a\nb"}',  # no control characters but escaped ones,
        b'{"username":"ann","message":"a\0b"}',
        b'{"username":"ann","message":"a\tb"}',
        rb'{"username":"ann","message":"\x41"}',
        rb'{"username":"ann","message":"\ud83d"}',  # no surrogate without its other half,
        rb'{"username":"ann","message":"\udc4b\ud83d"}',
        rb'{"username":"ann","message":"hi","\ud83d":1}',
        b"\xef\xbb\xbf" + post_json(),  # no byte order mark,
        post_json().decode().encode("utf-16"),
        b"\xc2\xa0" + post_json(),  # no blanks but its four,
        b'{"username":"ann","message":"\xff"}',  # and nothing but UTF-8:
        b'{"username":"ann","message":"\xc3"}',
        b'{"username":"ann","message":"\xc0\xaf"}',
        b'{"username":"ann","message":"\xed\xa0\xbd"}',
        b'{"username":"ann","message":"\xf4\x90\x80\x80"}',
        post_json() + b"\0",
    ],
)
def test_what_is_not_json_is_refused(text):
    assert refusal(text) == "Invalid JSON format."


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"username":"ann","message":['])
def test_a_hundred_thousand_brackets_are_refused_like_any_other_nonsense(opening):
    assert refusal(opening * 100_000) == "Invalid JSON format."


@pytest.mark.parametrize(
    "text",
    [b"[]", b'[{"username":"ann","message":"hi"}]', b"null", b"true", b"false", b"0", b"-1.5e3", b'"hi"', b'""'],
)
def test_what_is_no_object_is_refused(text):
    assert refusal(text) == 'Validation error: "value" must be of type object'


@pytest.mark.parametrize("digits", [b"9223372036854775808", b"18446744073709551616", b"9" * 308])
def test_a_huge_integer_is_a_number_like_any_other(digits):
    assert refusal(digits) == 'Validation error: "value" must be of type object'
    assert refusal(b'{"username":"ann","message":' + digits + b"}") == 'Validation error: "message" must be a string'


def test_a_number_that_no_double_can_hold_is_refused_as_infinity_is():
    assert refusal(b"9" * 310) == "Invalid JSON format."
    assert refusal(b'{"username":"ann","message":' + b"9" * 10_000 + b"}") == "Invalid JSON format."


@pytest.mark.parametrize(("name", "limit"), FIELDS)
def test_a_missing_key_is_refused(name, limit):
    assert refusal(post_json(**{name: ...})) == f'Validation error: "{name}" is required'


@pytest.mark.parametrize(("name", "limit"), FIELDS)
def test_an_empty_text_is_refused(name, limit):
    assert refusal(post_json(**{name: ""})) == f'Validation error: "{name}" is not allowed to be empty'


@pytest.mark.parametrize(("name", "limit"), FIELDS)
@pytest.mark.parametrize("value", [None, True, False, 0, 1.5, [], ["hi"], {}, {"text": "hi"}])
def test_what_is_no_string_is_refused(name, limit, value):
    assert refusal(post_json(**{name: value})) == f'Validation error: "{name}" must be a string'


@pytest.mark.parametrize(("name", "limit"), FIELDS)
def test_a_text_that_is_too_long_is_refused(name, limit):
    assert refusal(post_json(**{name: "x" * (limit + 1)})) == (
        f'Validation error: "{name}" length must be less than or equal to {limit} characters long'
    )


def test_a_key_that_the_schema_does_not_know_is_refused():
    assert refusal(post_json(extra=1)) == 'Validation error: "extra" is not allowed'
    assert refusal(post_json(extra=None)) == 'Validation error: "extra" is not allowed'


@pytest.mark.parametrize("name", ["", "Username", "username ", "__proto__", "{name}", "%s", "$ref", "é", 'a"b'])
def test_an_unknown_key_is_named_as_it_was_written(name):
    assert refusal(post_json(**{name: "hi"})) == f'Validation error: "{name}" is not allowed'


@pytest.mark.parametrize("depth", [100, 1000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_a_value_is_refused_with_the_same_words_however_deep_it_is(depth, opening, closing):
    deep = opening * depth + b"0" + closing * depth
    assert refusal(b'{"username":"ann","message":' + deep + b"}") == 'Validation error: "message" must be a string'
    assert refusal(b'{"username":' + deep + b',"message":"hi"}') == 'Validation error: "username" must be a string'
    assert refusal(b'{"username":"ann","message":"hi","extra":' + deep + b"}") == (
        'Validation error: "extra" is not allowed'
    )


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (b"{}", '"username" is required'),
        (b'{"username":"ann"}', '"message" is required'),
        (b'{"message":"","username":""}', '"username" is not allowed to be empty'),
        (b'{"message":1}', '"username" is required'),
        (b'{"message":1,"username":null}', '"username" must be a string'),
        (b'{"extra":1}', '"username" is required'),
        (b'{"extra":1,"username":"ann","message":2}', '"message" must be a string'),
        (b'{"extra":1,"username":"ann"}', '"message" is required'),
        (b'{"zeta":1,"username":"ann","alpha":2,"message":"hi"}', '"zeta" is not allowed'),
        (b'{"alpha":1,"username":"ann","zeta":2,"message":"hi"}', '"alpha" is not allowed'),
    ],
)
def test_of_several_faults_the_first_in_the_schemas_order_is_told_and_unknown_keys_last(text, first):
    assert refusal(text) == f"Validation error: {first}"


def test_a_valid_document_has_no_fault():
    assert frames.explain({"username": "ann", "message": "hi"}) is None


# Every document: the two validators, and the rules written a third time, agree

lengths = st.sampled_from([0, 1, 2, 29, 30, 31, 499, 500, 501])
texts = st.text(max_size=5) | st.builds(lambda one, size: one * size, st.characters(exclude_categories=["Cs"]), lengths)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts
values = scalars | st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=4)
near_posts = st.fixed_dictionaries({}, optional={"username": texts, "message": texts})
near_misses = st.dictionaries(st.sampled_from(["username", "message", "type", "Username", "", "extra"]), values)
documents = near_posts | near_misses | st.builds(lambda one, two: one | two, near_misses, near_posts) | values


def fault_of(document):
    """The rules, as a client's author would read them."""
    if not isinstance(document, dict):
        return '"value" must be of type object'
    for name, limit in FIELDS:
        if name not in document:
            return f'"{name}" is required'
        if not isinstance(document[name], str):
            return f'"{name}" must be a string'
        if not document[name]:
            return f'"{name}" is not allowed to be empty'
        if len(document[name]) > limit:
            return f'"{name}" length must be less than or equal to {limit} characters long'
    return next((f'"{name}" is not allowed' for name in document if name not in ("username", "message")), None)


@REPEATABLE
@given(documents)
@example({"username": "a" * 30, "message": "😀" * 500})
@example({"username": "a" * 31, "message": "😀" * 501})
@example({"message": "hi", "username": "ann", "extra": None})
def test_the_fast_validator_and_the_slow_one_agree_on_every_document(document):
    fault = frames.explain(document)
    assert frames._accepts(document) == (fault is None)
    assert fault == fault_of(document)


posts = st.builds(Post, st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=500))


@REPEATABLE
@given(posts, st.booleans())
@example(Post("\0", "\x7f\u2028\ufeff"), True)  # noqa: FBT003
def test_every_valid_post_is_read_as_it_was_written(post, ensure_ascii):
    assert parse_post(json.dumps(post._asdict(), ensure_ascii=ensure_ascii).encode()) == post


@REPEATABLE
@given(st.binary() | documents.map(orjson.dumps))
def test_any_bytes_are_either_a_post_or_refused(data):
    try:
        answer = parse_post(data)
    except FrameError as error:
        answer = str(error)
    if isinstance(answer, Post):
        assert json.loads(data) == answer._asdict()
    else:
        assert re.match(r'Invalid JSON format\.$|Validation error: "', answer)


# The schema


def test_the_schema_is_a_valid_one_of_2020_12():
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_says_what_it_is_about():
    for part in (SCHEMA, *SCHEMA["properties"].values()):
        assert part["title"]
        assert part["description"].endswith(".")
        assert part["examples"]


def test_the_schema_names_the_limits():
    limits = {name: (part["minLength"], part["maxLength"]) for name, part in SCHEMA["properties"].items()}
    assert limits == {"username": (1, 30), "message": (1, 500)}


def test_every_example_of_the_schema_is_accepted():
    for document in SCHEMA["examples"]:
        assert parse_post(orjson.dumps(document)) == Post(**document)
    for name, part in SCHEMA["properties"].items():
        for text in part["examples"]:
            assert getattr(parse_post(post_json(**{name: text})), name) == text


def test_every_keyword_of_the_schema_has_words():
    # Whoever adds a keyword gives it its words too: without them the first refusal would be a KeyError.
    annotations = {"title", "description", "examples"}
    handled_apart = {"$schema", "$id", "properties", "type", "additionalProperties"}
    assert SCHEMA.keys() - annotations - handled_apart <= frames._WORDS.keys()
    for part in SCHEMA["properties"].values():
        assert part.keys() - annotations <= frames._WORDS.keys()
        assert part["type"] == "string"  # which is what the words for "type" say


# The seed


def test_the_seed_is_the_two_messages_that_every_new_log_begins_with():
    assert parse_seed(SEED_FILE.read_bytes()) == (
        Entry(1, "Alice", "Hello!", "2024-10-20T12:30:00Z"),
        Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z"),
    )
    assert [[*document] for document in json.loads(SEED_FILE.read_bytes())] == [
        ["username", "message", "timestamp"]
    ] * 2


def seed_json(*timestamps):
    documents = [{"username": "ann", "message": "hi", "timestamp": timestamp} for timestamp in timestamps]
    return json.dumps(documents).encode()


def test_a_seed_may_be_empty():
    assert parse_seed(b"[]") == ()


def test_a_seed_may_have_milliseconds_and_equal_times():
    times = ["2024-10-20T12:30:00Z", "2024-10-20T12:30:00.0Z", "2024-10-20T12:30:00.5Z", "2024-10-20T12:30:00.500Z"]
    assert [entry.timestamp for entry in parse_seed(seed_json(*times))] == times


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not JSON: "),
        (b"[{]", "is not JSON: "),
        (b"{}", "must be a list of messages"),
        (b'"hi"', "must be a list of messages"),
        (b"[1]", 'message 1: "value" must be of type object'),
        (b"[[]]", 'message 1: "value" must be of type object'),
        (b'[{"username":"ann","timestamp":"2024-10-20T12:30:00Z"}]', 'message 1: "message" is required'),
        (
            b'[{"username":"","message":"hi","timestamp":"2024-10-20T12:30:00Z"}]',
            'message 1: "username" is not allowed to be empty',
        ),
        (
            b'[{"username":"ann","message":"hi","timestamp":"2024-10-20T12:30:00Z","id":1}]',
            'message 1: "id" is not allowed',
        ),
    ],
)
def test_a_seed_that_cannot_be_used_is_refused_with_the_reason(text, reason):
    with pytest.raises(FrameError) as refused:
        parse_seed(text)
    assert str(refused.value).startswith(reason)
    assert "\n" not in str(refused.value)


def test_a_fault_of_the_seed_is_told_with_its_place():
    text = seed_json("2024-10-20T12:30:00Z", "2024-10-20T12:30:00Z")[:-1] + b',{"username":"ann"}]'
    with pytest.raises(FrameError, match=r'^message 3: "message" is required$'):
        parse_seed(text)


@pytest.mark.parametrize(
    "timestamp",
    [
        None,
        1729427400,
        "",
        "now",
        "2024-10-20",
        "2024-10-20T12:30:00",  # whose noon?
        "2024-10-20T12:30:00+00:00",
        "2024-10-20 12:30:00Z",
        "2024-10-20T12:30Z",
        "2024-10-20T12:30:00.Z",
        "2024-10-20T12:30:00.1234567Z",
        "2024-10-20T12:30:00Z\n",
        "2024-02-30T12:30:00Z",  # no calendar has it
        "2024-13-01T12:30:00Z",
        "2024-10-20T25:30:00Z",
        "0000-01-01T00:00:00Z",
    ],
)
def test_a_seed_whose_timestamp_is_none_is_refused(timestamp):
    with pytest.raises(FrameError) as refused:
        parse_seed(seed_json(timestamp))
    assert str(refused.value) == 'message 1: "timestamp" must be a time such as 2024-10-20T12:30:00Z'


def test_a_seed_without_timestamps_is_refused():
    with pytest.raises(FrameError, match=r'^message 1: "timestamp" must be a time'):
        parse_seed(b'[{"username":"ann","message":"hi"}]')


def test_a_seed_that_goes_back_in_time_is_refused():
    # As text the second would come after the first: it is the time that counts.
    with pytest.raises(FrameError, match=r'^message 2: "timestamp" is before that of message 1$'):
        parse_seed(seed_json("2024-10-20T12:30:00.5Z", "2024-10-20T12:30:00Z"))


# What leaves


class Frame(NamedTuple):
    fin: bool
    opcode: int
    header: int
    payload: bytes


def read_frame(data):
    """Read the one WebSocket frame that `data` is, by RFC 6455, section 5.2."""
    assert data[0] & 0x70 == 0, "a reserved bit is set"
    assert data[1] & 0x80 == 0, "a server's frame is masked"
    size, header = data[1], 2
    if size == 126:
        size, header = int.from_bytes(data[2:4], "big"), 4
        assert size > 125, "the length could be shorter"
    elif size == 127:
        size, header = int.from_bytes(data[2:10], "big"), 10
        assert 65535 < size < 1 << 63, "the length could be shorter, or is none"
    assert len(data) == header + size
    return Frame(data[0] & 0x80 != 0, data[0] & 0x0F, header, data[header:])


@pytest.mark.parametrize(
    ("size", "header"), [(0, 2), (1, 2), (125, 2), (126, 4), (127, 4), (65535, 4), (65536, 10), (100_000, 10)]
)
def test_a_text_is_one_final_frame_with_the_shortest_header(size, header):
    payload = (b"0123456789" * 10_000)[:size]
    assert read_frame(frames.text_frame(payload)) == Frame(fin=True, opcode=1, header=header, payload=payload)


ANN = Entry(7, "ann", "hi", "2026-01-01T00:00:00.000Z")
BOB = Entry(8, "Боб", '"quoted", \\ and 👋\n', "2026-01-01T00:00:01.500Z")


def test_a_message_frame_is_these_bytes():
    assert frames.message_frame("k7Q2xY", ANN) == (
        b"\x81\x72"
        b'{"type":"message","id":"k7Q2xY-7",'
        b'"data":{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}}'
    )


def test_text_in_a_message_frame_is_utf_8_and_escaped_only_where_json_asks_for_it():
    assert (
        read_frame(frames.message_frame("k7Q2xY", BOB)).payload
        == (
            '{"type":"message","id":"k7Q2xY-8","data":{"username":"Боб",'
            '"message":"\\"quoted\\", \\\\ and 👋\\n","timestamp":"2026-01-01T00:00:01.500Z"}}'
        ).encode()
    )


def history(epoch, number, entries, *, more):
    return frames.history_frame(epoch, number, [frames.message_frame(epoch, entry) for entry in entries], more=more)


def test_a_history_frame_is_these_bytes():
    assert history("k7Q2xY", 8, [ANN, BOB], more=False) == (
        b"\x81\x7e\x00\xd7"
        + (
            '{"type":"history","id":"k7Q2xY-8","data":['
            '{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"},'
            '{"username":"Боб","message":"\\"quoted\\", \\\\ and 👋\\n","timestamp":"2026-01-01T00:00:01.500Z"}]}'
        ).encode()
    )


def test_a_history_frame_says_more_only_when_there_is_more():
    assert read_frame(history("k7Q2xY", 7, [ANN], more=True)).payload == (
        b'{"type":"history","id":"k7Q2xY-7","more":true,'
        b'"data":[{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}]}'
    )


def test_the_history_of_an_empty_room_has_the_number_0():
    assert frames.history_frame("k7Q2", 0, [], more=False) == b'\x81\x2a{"type":"history","id":"k7Q2-0","data":[]}'


def test_the_history_of_a_room_where_all_was_trimmed_keeps_its_number():
    assert frames.history_frame("k7Q2", 12, [], more=False) == b'\x81\x2b{"type":"history","id":"k7Q2-12","data":[]}'


entries = st.builds(
    lambda number, post: Entry(number, *post, "2026-01-01T00:00:00.000Z"), st.integers(1, 10**15), posts
)


@REPEATABLE
@given(entries)
@example(Entry(1, '"data":', '"data":[{}]', "2026-01-01T00:00:00.000Z"))
def test_a_history_holds_exactly_the_data_of_its_messages(entry):
    expected = {"username": entry.username, "message": entry.message, "timestamp": entry.timestamp}
    message = json.loads(read_frame(frames.message_frame("k7Q2xY", entry)).payload)
    assert message == {"type": "message", "id": f"k7Q2xY-{entry.number}", "data": expected}
    both = json.loads(read_frame(history("k7Q2xY", entry.number, [entry, entry], more=True)).payload)
    assert both == {"type": "history", "id": message["id"], "more": True, "data": [expected, expected]}


def test_a_history_of_a_hundred_of_the_longest_messages_is_still_one_frame():
    longest = Entry(1, "\0" * 30, "\0" * 500, "2026-01-01T00:00:00.000Z")  # six bytes for each \u0000
    frame = read_frame(history("k7Q2xY", 100, [longest] * 100, more=True))
    assert frame.header == 10
    assert len(json.loads(frame.payload)["data"]) == 100


def test_an_error_frame_is_these_bytes():
    assert frames.error_frame("Invalid JSON format.") == b'\x81\x31{"type":"error","message":"Invalid JSON format."}'


def test_an_error_frame_may_have_a_code():
    assert read_frame(frames.error_frame("Try again later", "UNAVAILABLE")).payload == (
        b'{"type":"error","message":"Try again later","code":"UNAVAILABLE"}'
    )


def test_an_error_frame_can_carry_any_refusal():
    message = refusal(post_json(**{'a"\\\n': 1}))
    assert json.loads(read_frame(frames.error_frame(message)).payload)["message"] == message
