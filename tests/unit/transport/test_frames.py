import json
import pathlib
import re
import string

import jsonschema
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import REPEATABLE
from support.websocket_frames import read_frame

from chatd.messages import Code, Entry, Id, PageRequest, Post, Renewal, Typing
from chatd.transport import explainer, frames
from chatd.transport.frames import (
    FORMS,
    MESSAGE,
    STANDARD,
    Form,
    FrameError,
    is_label,
    parse_seed,
)

parse, parse_post, is_username = STANDARD.parse, STANDARD.parse_post, STANDARD.is_username

SEED_FILE = pathlib.Path(__file__).parents[3] / "seed" / "messages.json"
FIELDS = [("username", 30), ("message", 500)]
ALL_FORMS = {"message": MESSAGE} | FORMS
CONFLICT = '"value" contains a conflict between optional exclusive peers [before, after]'


def post_json(**changes):
    """Return a valid post's text, but for the changes; ... leaves a key out."""
    document = {"username": "ann", "message": "hi"} | changes
    return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()


def page_json(**changes):
    return json.dumps({"type": "history"} | changes).encode()


def typing_json(**changes):
    document = {"type": "typing", "username": "ann"} | changes
    return json.dumps({name: value for name, value in document.items() if value is not ...}).encode()


def refused(text, read=parse):
    """Return the error with which a text is refused."""
    with pytest.raises(FrameError) as caught:
        read(text)
    return caught.value


def answer_to(text, read=parse):
    """Return the parsed frame, or the words and the label of its refusal."""
    try:
        return read(text)
    except FrameError as error:
        return str(error), error.label


def refusal(text):
    return str(refused(text))


# Posts


def test_post_has_a_username_and_a_message():
    assert parse(b'{"username":"ann","message":"hi"}') == Post("ann", "hi")


def test_key_order_and_whitespace_do_not_matter():
    assert parse(b' {\r\n\t"message" : "hi",\n"username":"ann" } ') == Post("ann", "hi")


def test_last_of_duplicate_keys_counts():
    assert parse(b'{"username":"","message":"hi","username":"ann"}') == Post("ann", "hi")
    assert refusal(b'{"username":"ann","message":"hi","username":""}') == (
        'Validation error: "username" is not allowed to be empty'
    )


def test_blank_text_is_a_text():
    assert parse(post_json(message=" ")) == Post("ann", " ")


def test_escaped_control_characters_are_kept():
    assert parse(rb'{"username":"\u0000","message":"\u0007\n\u001b"}') == Post("\0", "\a\n\x1b")


def test_escaped_surrogate_pair():
    assert parse(rb'{"username":"ann","message":"\ud83d\udc4b"}') == Post("ann", "👋")


def test_text_that_looks_like_markup_or_code_is_kept_as_it_is():
    text = "<script>alert('\"}');</script>\\{0}%s\u2028"
    assert parse(post_json(message=text)).message == text


@pytest.mark.parametrize(("name", "limit"), FIELDS)
@pytest.mark.parametrize("character", ["a", "ß", "語", "😀", "\u0301", "\U0010ffff", "\0"])
def test_lengths_are_counted_in_code_points(name, limit, character):
    # An emoji is two UTF-16 units and four bytes, and a combining mark no letter of its own: each counts as one.
    longest = character * limit
    assert getattr(parse(post_json(**{name: longest})), name) == longest
    assert refusal(post_json(**{name: longest + character})) == (
        f'Validation error: "{name}" length must be less than or equal to {limit} characters long'
    )


def test_post_may_have_a_label():
    assert parse(b'{"username":"ann","message":"hi","label":"c81f"}') == Post("ann", "hi", "c81f")
    assert parse(b'{"label":"c81f","message":"hi","username":"ann"}') == Post("ann", "hi", "c81f")


def test_post_without_a_label_has_none():
    assert parse(post_json()).label is None
    assert Post("ann", "hi").label is None


# Labels

GOOD_LABELS = ["c81f", "!", "~", "0", "null", "'\"%s\\", "x" * 64, "~" * 64, "{}", "<b>", "a,b;c=d", "__proto__"]
EVERY_CHARACTER = "".join(map(chr, range(0x21, 0x7F)))
TOO_LONG = '"label" length must be less than or equal to 64 characters long'
NO_PATTERN = '"label" fails to match the required pattern: /^[!-~]*$/'
NO_STRING = '"label" must be a string'
BAD_LABELS = [
    ("", '"label" is not allowed to be empty'),
    ("x" * 65, TOO_LONG),
    ("x" * 1_000_000, TOO_LONG),
    (" " * 65, TOO_LONG),
    ("é" * 65, TOO_LONG),
    ("x" * 64 + "\n", TOO_LONG),
    ("é" * 64, NO_PATTERN),
    (" ", NO_PATTERN),
    ("a b", NO_PATTERN),
    (" x", NO_PATTERN),
    ("x ", NO_PATTERN),
    ("x\n", NO_PATTERN),
    ("x\r\n", NO_PATTERN),
    ("\nx", NO_PATTERN),
    ("x\ny", NO_PATTERN),
    ("x\t", NO_PATTERN),
    ("\0", NO_PATTERN),
    ("\x7f", NO_PATTERN),
    ("\x80", NO_PATTERN),
    ("é", NO_PATTERN),
    ("\uff58", NO_PATTERN),
    ("x\u2028", NO_PATTERN),
    ("😀", NO_PATTERN),
    (7, NO_STRING),
    (0, NO_STRING),
    (1.5, NO_STRING),
    (True, NO_STRING),
    (None, NO_STRING),
    ([], NO_STRING),
    (["x"], NO_STRING),
    ({}, NO_STRING),
    ({"x": "y"}, NO_STRING),
]
bad_labels = pytest.mark.parametrize(("label", "fault"), BAD_LABELS, ids=[ascii(one)[:20] for one, _ in BAD_LABELS])


@pytest.mark.parametrize("label", [*GOOD_LABELS, EVERY_CHARACTER[:47], EVERY_CHARACTER[47:]])
def test_label_is_1_to_64_visible_ascii_characters(label):
    assert is_label(label)
    assert parse(post_json(label=label)).label == label
    assert parse_post(post_json(label=label)).label == label
    assert parse(page_json(label=label)).label == label


def test_there_are_94_visible_characters():
    assert len(EVERY_CHARACTER) == 94
    assert {chr(code) for code in range(0x300) if is_label(chr(code))} == {*EVERY_CHARACTER}


@bad_labels
def test_ill_formed_label_is_refused_and_not_echoed(label, fault):
    assert not is_label(label)
    for text in (post_json(label=label), page_json(label=label)):
        error = refused(text)
        assert str(error) == f"Validation error: {fault}"
        assert error.label is None


@bad_labels
def test_invalid_label_is_not_echoed(label, fault):
    for text in (
        post_json(username="", label=label),
        page_json(limit=0, label=label),
        typing_json(label=label),
        post_json(type="other", label=label),
        b'{"label":%b}' % json.dumps(label).encode(),
    ):
        error = refused(text)
        assert fault not in str(error)
        assert error.label is None


@pytest.mark.parametrize("label", GOOD_LABELS)
def test_error_has_the_frames_label_if_that_is_good(label):
    for text in (
        post_json(username="", label=label),
        post_json(username=..., message=..., label=label),
        post_json(label=label, extra=1),
        post_json(label=label, type="message"),
        post_json(label=label, type=None),
        page_json(label=label, limit=0),
        page_json(label=label, before="k7Q2-1", after="k7Q2-1"),
        typing_json(label=label),
    ):
        assert refused(text).label == label
    assert refused(post_json(message=1, label=label), parse_post).label == label


def test_error_has_no_label_if_the_frame_has_none():
    for text in (b"", b"{", b"[]", b'"label"', b'["label"]', b"7", b"{}", post_json(username="")):
        assert refused(text).label is None
    assert FrameError("why").label is None
    assert str(FrameError("why", "c81f")) == "why"


def test_of_duplicate_labels_the_last_counts():
    assert parse(b'{"username":"ann","message":"hi","label":"x y","label":"z"}').label == "z"
    assert refused(b'{"username":"","message":"hi","label":"z","label":"x y"}').label is None


# Usernames


@pytest.mark.parametrize("name", ["a", "a" * 30, "😀" * 30, "\0", " ", "é", "Алиса", "ann\n", "%s", "\U0010ffff" * 30])
def test_username_has_1_to_30_code_points(name):
    assert is_username(name)
    assert parse(post_json(username=name)).username == name
    assert parse(typing_json(username=name)) == Typing(name)


@pytest.mark.parametrize("name", ["", "a" * 31, "😀" * 31, "e\u0301" * 16, "x" * 1_000_000])
def test_what_is_empty_or_longer_is_no_username(name):
    assert not is_username(name)
    assert '"username"' in refusal(post_json(username=name))
    assert '"username"' in refusal(typing_json(username=name))


# Ids

GOOD_IDS = [
    ("k7Q2xe-1042", Id("k7Q2xe", 1042)),
    ("k7Q2-0", Id("k7Q2", 0)),
    ("0000-1", Id("0000", 1)),
    ("zZ9a-10", Id("zZ9a", 10)),
    ("0123456789abcDEF-9999999999999999", Id("0123456789abcDEF", 9_999_999_999_999_999)),
]
BAD_IDS = [
    "",
    "-",
    "k7Q2xe",
    "k7Q2xe-",
    "-1042",
    "1042",
    "k7Q-1",
    "0123456789abcDEFg-1",
    "k7Q2xe-00",
    "k7Q2xe-01",
    "k7Q2xe-10000000000000000",
    "k7Q2xe-" + "9" * 5000,
    "k7Q2xe--1",
    "k7Q2xe-+1",
    "k7Q2xe-1.0",
    "k7Q2xe-1e3",
    "k7Q2xe-0x1",
    "k7Q2xe-1_0",
    "k7Q2xe-1-1",
    "k7_2xe-1",
    "k7Q2 xe-1",
    " k7Q2xe-1",
    "k7Q2xe-1 ",
    "k7Q2xe- 1",
    "k7Q2xe-1\n",
    "k7Q2xe-1\r\n",
    "\nk7Q2xe-1",
    "k7Q2xe\n-1",
    "k7Q2xe-1\nk7Q2xe-1",
    "k7Q2xe-1\0",
    "k7Q2xe-\u0661",
    "k7Q2xe-\uff11",
    "k7Q2xe-²",
    "\uff4b7Q2xe-1",
    "k7Q2xé-1",
    "k7Q2xe\u20131",
    "k7Q2xe\u22121",
]
ALPHABET = string.digits + string.ascii_letters
NO_ID = "fails to match the required pattern: /^[0-9A-Za-z]{4,16}-(0|[1-9][0-9]{0,15})$/"


@pytest.mark.parametrize(("text", "one"), GOOD_IDS)
def test_id_is_an_epoch_and_a_number(text, one):
    assert Id.parse(text) == one
    assert str(one) == f"{one}" == text
    assert parse(page_json(before=text)).before == one
    assert parse(page_json(after=text)).after == one


@pytest.mark.parametrize("text", BAD_IDS, ids=[ascii(one)[:30] for one in BAD_IDS])
def test_anything_else_is_no_id(text):
    with pytest.raises(ValueError, match=r"^an id is an epoch and a number, such as k7Q2xe-1042$"):
        Id.parse(text)
    for name in ("before", "after"):
        assert refusal(page_json(**{name: text})) == f'Validation error: "{name}" {NO_ID}'


@REPEATABLE
@given(st.text(ALPHABET, min_size=4, max_size=16), st.integers(0, 10**16 - 1))
def test_every_id_is_read_as_it_was_written(epoch, number):
    assert Id.parse(str(Id(epoch, number))) == (epoch, number)


# Page requests and typing


def test_page_request_may_ask_for_the_newest_messages():
    assert parse(b'{"type":"history"}') == PageRequest(before=None, after=None, limit=50, label=None)


def test_page_request_with_before_or_after():
    assert parse(b'{"type":"history","before":"k7Q2-1001","limit":50,"label":"h1"}') == PageRequest(
        before=Id("k7Q2", 1001), after=None, limit=50, label="h1"
    )
    assert parse(b'{"label":"h1","limit":7,"after":"k7Q2-0","type":"history"}') == PageRequest(
        before=None, after=Id("k7Q2", 0), limit=7, label="h1"
    )


def test_page_request_with_before_and_after():
    assert refusal(page_json(before="k7Q2-1", after="k7Q2-1")) == f"Validation error: {CONFLICT}"
    assert refusal(page_json(before="k7Q2-1", after="p9Zx-2", limit=1, label="h1")) == f"Validation error: {CONFLICT}"


@pytest.mark.parametrize(
    ("limit", "read"), [(b"1", 1), (b"50", 50), (b"100", 100), (b"5.0", 5), (b"1e2", 100), (b"100.0", 100), (b"1E0", 1)]
)
def test_limit_is_1_to_100_however_the_number_is_written(limit, read):
    answer = parse(b'{"type":"history","limit":%b}' % limit).limit
    assert answer == read
    assert type(answer) is int


@pytest.mark.parametrize(
    ("limit", "fault"),
    [
        (b"0", "must be greater than or equal to 1"),
        (b"-0", "must be greater than or equal to 1"),
        (b"0.0", "must be greater than or equal to 1"),
        (b"-0.0", "must be greater than or equal to 1"),
        (b"1e-999", "must be greater than or equal to 1"),  # which is 0 for a double
        (b"-1", "must be greater than or equal to 1"),
        (b"-1e30", "must be greater than or equal to 1"),
        (b"-9223372036854775809", "must be greater than or equal to 1"),
        (b"101", "must be less than or equal to 100"),
        (b"101.0", "must be less than or equal to 100"),
        (b"1e30", "must be less than or equal to 100"),
        (b"1" + b"0" * 30, "must be less than or equal to 100"),
        (b"18446744073709551616", "must be less than or equal to 100"),
        (b"1e308", "must be less than or equal to 100"),
        (b"5.5", "must be an integer"),
        (b"0.5", "must be an integer"),
        (b"100.5", "must be an integer"),
        (b"-0.5", "must be an integer"),
        (b"true", "must be an integer"),
        (b"false", "must be an integer"),
        (b"null", "must be an integer"),
        (b'"5"', "must be an integer"),
        (b'""', "must be an integer"),
        (b"[]", "must be an integer"),
        (b"[5]", "must be an integer"),
        (b"{}", "must be an integer"),
    ],
)
def test_any_other_limit_is_refused(limit, fault):
    assert refusal(b'{"type":"history","limit":%b}' % limit) == f'Validation error: "limit" {fault}'


def test_page_limit_and_default():
    assert (frames.PAGE_LIMIT, frames.PAGE_DEFAULT) == (100, 50)


def test_limit_that_no_double_can_hold_is_no_json():
    assert refusal(b'{"type":"history","limit":1e999}') == "Invalid JSON format."


@pytest.mark.parametrize("value", [None, 7, 1.5, True, [], ["k7Q2-1"], {}, {"id": "k7Q2-1"}])
@pytest.mark.parametrize("name", ["before", "after"])
def test_id_that_is_no_string_is_refused(name, value):
    assert refusal(page_json(**{name: value})) == f'Validation error: "{name}" must be a string'


def test_page_can_be_asked_for_without_json():
    assert frames.page_request({"type": "history", "after": "k7Q2-7", "limit": 3}) == PageRequest(
        before=None, after=Id("k7Q2", 7), limit=3, label=None
    )
    with pytest.raises(FrameError, match=r'^Validation error: "limit" must be less than or equal to 100$') as caught:
        frames.page_request({"type": "history", "limit": 101, "label": "h1"})
    assert caught.value.label == "h1"


def test_parse_typing():
    assert parse(b'{"type":"typing","username":"ann"}') == Typing("ann")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"username": ...}, '"username" is required'),
        ({"username": ""}, '"username" is not allowed to be empty'),
        ({"username": "a" * 31}, '"username" length must be less than or equal to 30 characters long'),
        ({"username": None}, '"username" must be a string'),
        ({"username": ["ann"]}, '"username" must be a string'),
        ({"message": "hi"}, '"message" is not allowed'),
        ({"label": "x"}, '"label" is not allowed'),
        ({"extra": 1, "username": 1}, '"username" must be a string'),
    ],
)
def test_typing_is_refused_with_the_words_of_a_post(changes, fault):
    assert refusal(typing_json(**changes)) == f"Validation error: {fault}"


@pytest.mark.parametrize(
    "kind", ["message", "", "History", "history ", "typing\n", "ack", "__class__", 'a"b', "x" * 10**6]
)
def test_type_is_one_of_the_forms_or_absent(kind):
    fault = 'Validation error: "type" must be one of [history, remove, token, typing]'
    assert refusal(post_json(type=kind)) == fault
    assert refusal(b'{"extra":1,"type":%b}' % json.dumps(kind).encode()) == fault  # before any other fault


@pytest.mark.parametrize("kind", [None, True, 0, 1.5, [], ["history"], {}, {"history": 1}])
def test_type_that_is_no_string_is_refused_with_the_same_words(kind):
    assert refusal(post_json(type=kind)) == 'Validation error: "type" must be one of [history, remove, token, typing]'


def test_post_with_another_type():
    """The type decides which schema applies."""
    assert refusal(post_json(type="history")) == 'Validation error: "username" is not allowed'
    assert refusal(post_json(type="typing")) == 'Validation error: "message" is not allowed'


# Posts over HTTP


def test_post_is_read_where_nothing_else_may_be_sent():
    assert parse_post(post_json()) == Post("ann", "hi")
    assert parse_post(post_json(label="c81f")) == Post("ann", "hi", "c81f")


@pytest.mark.parametrize("kind", ["history", "typing", "message", None])
def test_there_a_type_is_a_key_like_any_other_unknown_one(kind):
    for text, fault in [
        (post_json(type=kind), '"type" is not allowed'),
        (page_json(type=kind), '"username" is required'),
        (typing_json(type=kind), '"message" is required'),
    ]:
        assert str(refused(text, parse_post)) == f"Validation error: {fault}"


@pytest.mark.parametrize("text", [b"", b"{", b"NaN", b"\xff"])
def test_http_post_that_is_not_json(text):
    assert str(refused(text, parse_post)) == "Invalid JSON format."


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
        b"NaN",  # no number outside of JSON,
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
def test_deeply_nested_brackets(opening):
    assert refusal(opening * 100_000) == "Invalid JSON format."


@pytest.mark.parametrize(
    "text",
    [b"[]", b'[{"username":"ann","message":"hi"}]', b"null", b"true", b"false", b"0", b"-1.5e3", b'"hi"', b'""'],
)
def test_what_is_no_object_is_refused(text):
    assert refusal(text) == 'Validation error: "value" must be of type object'


@pytest.mark.parametrize("digits", [b"9223372036854775808", b"18446744073709551616", b"9" * 308])
def test_huge_integer_is_a_number_like_any_other(digits):
    assert refusal(digits) == 'Validation error: "value" must be of type object'
    assert refusal(b'{"username":"ann","message":' + digits + b"}") == 'Validation error: "message" must be a string'


def test_number_beyond_a_double():
    assert refusal(b"9" * 310) == "Invalid JSON format."
    assert refusal(b'{"username":"ann","message":' + b"9" * 10_000 + b"}") == "Invalid JSON format."


@pytest.mark.parametrize(("name", "limit"), FIELDS)
def test_missing_key_is_refused(name, limit):
    assert refusal(post_json(**{name: ...})) == f'Validation error: "{name}" is required'


@pytest.mark.parametrize(("name", "limit"), FIELDS)
def test_empty_text_is_refused(name, limit):
    assert refusal(post_json(**{name: ""})) == f'Validation error: "{name}" is not allowed to be empty'


@pytest.mark.parametrize(("name", "limit"), FIELDS)
@pytest.mark.parametrize("value", [None, True, False, 0, 1.5, [], ["hi"], {}, {"text": "hi"}])
def test_what_is_no_string_is_refused(name, limit, value):
    assert refusal(post_json(**{name: value})) == f'Validation error: "{name}" must be a string'


@pytest.mark.parametrize(("name", "limit"), FIELDS)
def test_text_that_is_too_long_is_refused(name, limit):
    assert refusal(post_json(**{name: "x" * (limit + 1)})) == (
        f'Validation error: "{name}" length must be less than or equal to {limit} characters long'
    )


def test_key_that_the_schema_does_not_know_is_refused():
    assert refusal(post_json(extra=1)) == 'Validation error: "extra" is not allowed'
    assert refusal(post_json(extra=None)) == 'Validation error: "extra" is not allowed'


@pytest.mark.parametrize("name", ["", "Username", "username ", "__proto__", "{name}", "%s", "$ref", "é", 'a"b'])
def test_unknown_key_is_named_as_it_was_written(name):
    assert refusal(post_json(**{name: "hi"})) == f'Validation error: "{name}" is not allowed'


@pytest.mark.parametrize("depth", [100, 1000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_error_does_not_depend_on_depth(depth, opening, closing):
    deep = opening * depth + b"0" + closing * depth
    assert refusal(b'{"username":"ann","message":' + deep + b"}") == 'Validation error: "message" must be a string'
    assert refusal(b'{"username":' + deep + b',"message":"hi"}') == 'Validation error: "username" must be a string'
    assert refusal(b'{"username":"ann","message":"hi","extra":' + deep + b"}") == (
        'Validation error: "extra" is not allowed'
    )
    assert refusal(b'{"username":"ann","message":"hi","label":' + deep + b"}") == f"Validation error: {NO_STRING}"
    assert (
        refusal(b'{"type":' + deep + b"}") == 'Validation error: "type" must be one of [history, remove, token, typing]'
    )
    assert refusal(b'{"type":"history","limit":' + deep + b"}") == 'Validation error: "limit" must be an integer'
    assert refusal(b'{"type":"history","before":' + deep + b"}") == 'Validation error: "before" must be a string'
    assert refusal(b'{"type":"typing","username":' + deep + b"}") == 'Validation error: "username" must be a string'
    assert refusal(b'{"type":"typing","username":"ann","":' + deep + b"}") == 'Validation error: "" is not allowed'


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
        (b'{"zeta":1,"username":"ann","":2,"message":"hi"}', '"zeta" is not allowed'),
        (b'{"":1,"username":"ann","zeta":2,"message":"hi"}', '"" is not allowed'),
        (b'{"label":"","message":1,"username":"ann"}', '"message" must be a string'),
        (b'{"extra":1,"label":"","message":"hi","username":"ann"}', '"label" is not allowed to be empty'),
        (b'{"label":1,"message":"hi"}', '"username" is required'),
        (
            b'{"extra":1,"label":1,"limit":0,"after":1,"before":1,"type":"other"}',
            '"type" must be one of [history, remove, token, typing]',
        ),
        (b'{"extra":1,"label":1,"limit":0,"after":1,"before":1,"type":"history"}', '"before" must be a string'),
        (
            b'{"extra":1,"label":1,"limit":0,"after":"x","before":"k7Q2-1","type":"history"}',
            f'"after" {NO_ID}',
        ),
        (
            b'{"extra":1,"label":1,"limit":0,"after":"k7Q2-1","before":"k7Q2-1","type":"history"}',
            '"limit" must be greater than or equal to 1',
        ),
        (
            b'{"extra":1,"label":1,"limit":1,"after":"k7Q2-1","before":"k7Q2-1","type":"history"}',
            NO_STRING,
        ),
        (
            b'{"extra":1,"label":"l","limit":1,"after":"k7Q2-1","before":"k7Q2-1","type":"history"}',
            CONFLICT,
        ),
        (b'{"":1,"after":"k7Q2-1","before":"k7Q2-1","type":"history"}', CONFLICT),
        (b'{"zeta":1,"alpha":1,"after":"k7Q2-1","type":"history"}', '"zeta" is not allowed'),
        (b'{"zeta":1,"":1,"type":"history"}', '"zeta" is not allowed'),
        (b'{"zeta":1,"username":"","type":"typing"}', '"username" is not allowed to be empty'),
        (b'{"zeta":1,"username":"ann","alpha":1,"type":"typing"}', '"zeta" is not allowed'),
    ],
)
def test_first_of_several_faults(text, first):
    """The first fault in the order of the schema is named, unknown keys last."""
    assert refusal(text) == f"Validation error: {first}"


def test_valid_document_has_no_fault():
    assert MESSAGE.explain({"username": "ann", "message": "hi"}) is None
    assert MESSAGE.explain({"username": "ann", "message": "hi", "label": "c81f"}) is None
    assert FORMS["history"].explain({"type": "history", "after": "k7Q2-7", "limit": 5.0}) is None
    assert FORMS["typing"].explain({"type": "typing", "username": "ann"}) is None


# Every document: the two validators, and the rules written a third time, agree

lengths = st.sampled_from([0, 1, 2, 29, 30, 31, 63, 64, 65, 499, 500, 501])
texts = st.text(max_size=5) | st.builds(lambda one, size: one * size, st.characters(exclude_categories=["Cs"]), lengths)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts
values = scalars | st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=4)
labels = st.sampled_from([label for label, _ in BAD_LABELS if len(str(label)) < 100] + GOOD_LABELS) | texts
ids = st.sampled_from([one for one, _ in GOOD_IDS] + BAD_IDS) | st.text(ALPHABET + "-\n", max_size=20)
limits = st.integers(-1, 102) | st.sampled_from([0.0, -1.0, 1.0, 5.0, 5.5, 100.0, 100.5, 101.0, 1e30, -1e30]) | values
extras = st.dictionaries(st.sampled_from(["", "extra", "__proto__"]), values, max_size=2)
near_posts = st.fixed_dictionaries({}, optional={"username": texts, "message": texts, "label": labels})
near_pages = st.fixed_dictionaries(
    {"type": st.just("history")}, optional={"before": ids, "after": ids, "limit": limits, "label": labels}
)
near_typing = st.fixed_dictionaries({"type": st.just("typing")}, optional={"username": texts})
near_misses = st.dictionaries(
    st.sampled_from(
        [
            *("username", "message", "label", "type", "before", "after", "limit", "id", "replaces"),
            *("Username", "", "extra", "zeta"),
        ]
    ),
    values | labels | ids,
    max_size=6,
)
near_removals = st.fixed_dictionaries({"type": st.just("remove")}, optional={"id": ids, "label": labels})
near_edits = st.builds(lambda post, id_: post | {"replaces": id_}, near_posts, ids)
near = near_posts | near_pages | near_typing | near_removals | near_edits
documents = (
    near
    | near_misses
    | st.builds(lambda one, two: one | two, extras, near)
    | st.builds(lambda one, two: one | two, near, extras)
    | st.builds(lambda one, two: one | two, near_misses, near)
    | values
)


def fault_of_text(name, value, limit):
    if not isinstance(value, str):
        return f'"{name}" must be a string'
    if not value:
        return f'"{name}" is not allowed to be empty'
    if len(value) > limit:
        return f'"{name}" length must be less than or equal to {limit} characters long'
    return None


def fault_of_id(name, value):
    if not isinstance(value, str):
        return f'"{name}" must be a string'
    epoch, _, number = value.partition("-")
    good = 4 <= len(epoch) <= 16 and not {*epoch} - {*ALPHABET} and 1 <= len(number) <= 16
    good = good and not {*number} - {*string.digits} and (number == "0" or number[0] != "0")
    return None if good else f'"{name}" {NO_ID}'


def fault_of_limit(value):
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        return '"limit" must be an integer'
    if value < 1:
        return '"limit" must be greater than or equal to 1'
    return '"limit" must be less than or equal to 100' if value > 100 else None


def fault_of_label(value):
    fault = fault_of_text("label", value, 64)
    return fault or (None if {*value} <= {*EVERY_CHARACTER} else NO_PATTERN)


RULES = {
    "username": lambda value: fault_of_text("username", value, 30),
    "message": lambda value: fault_of_text("message", value, 500),
    "label": fault_of_label,
    "type": lambda value: None,
    "before": lambda value: fault_of_id("before", value),
    "after": lambda value: fault_of_id("after", value),
    "id": lambda value: fault_of_id("id", value),
    "replaces": lambda value: fault_of_id("replaces", value),
    "token": lambda value: fault_of_text("token", value, 8192),
    "limit": fault_of_limit,
}
KEYS = {
    "message": ["username", "message", "label", "replaces"],
    "history": ["type", "before", "after", "limit", "label"],
    "typing": ["type", "username"],
    "remove": ["type", "id", "label"],
    "token": ["type", "token", "label"],
}
REQUIRED = {
    "message": {"username", "message"},
    "history": {"type"},
    "typing": {"type", "username"},
    "remove": {"type", "id"},
    "token": {"type", "token"},
}


def fault_of(form, document):
    """Return the fault of a document by the rules, as a client's author would read them."""
    if not isinstance(document, dict):
        return '"value" must be of type object'
    for name in KEYS[form]:
        if name in document:
            if fault := RULES[name](document[name]):
                return fault
        elif name in REQUIRED[form]:
            return f'"{name}" is required'
    if form == "history" and "before" in document and "after" in document:
        return CONFLICT
    return next((f'"{name}" is not allowed' for name in document if name not in KEYS[form]), None)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_validators_agree_on_every_document(form):
    @REPEATABLE
    @given(documents)
    @example({"username": "a" * 30, "message": "😀" * 500, "label": "~" * 64})
    @example({"username": "a" * 31, "message": "😀" * 501, "label": "~" * 65})
    @example({"message": "hi", "username": "ann", "extra": None})
    @example({"message": "hi", "username": "ann", "extra": None, "": None})
    @example({"message": "hi", "username": "ann", "label": "x\n"})
    @example({"type": "history", "before": "k7Q2-1\n"})
    @example({"type": "history", "before": "k7Q2-1", "after": "k7Q2-1", "": 1})
    @example({"type": "history", "limit": 1e30})
    @example({"type": "history", "limit": 2**64 - 1})
    @example({"type": "history", "limit": 10**30})
    def check(document):
        # A form is asked only about what is of its type.
        if isinstance(document, dict) and "type" in document and form != "message":
            document = document | {"type": form}
        fault = ALL_FORMS[form].explain(document)
        assert ALL_FORMS[form].accepts(document) == (fault is None)
        assert fault == fault_of(form, document)

    check()


def answer_of(document):
    """Return the expected result of `parse` for a document, by the documentation."""
    form = "message"
    if isinstance(document, dict) and "type" in document:
        form = document["type"]
        if form not in ("history", "typing", "token", "remove"):
            return 'Validation error: "type" must be one of [history, remove, token, typing]'
    fault = fault_of(form, document)
    if fault:
        return f"Validation error: {fault}"
    if form == "message":
        replaces = Id.parse(document["replaces"]) if "replaces" in document else None
        return Post(document["username"], document["message"], document.get("label"), replaces=replaces)
    if form == "token":
        return Renewal(document["token"], document.get("label"))
    if form == "remove":
        return Post("", "[removed]", document.get("label"), replaces=Id.parse(document["id"]), removed=True)
    return Typing(document["username"]) if form == "typing" else page_of(document)


def page_of(document):
    """Return the expected page request of a valid document."""
    before, after = (Id.parse(document[name]) if name in document else None for name in ("before", "after"))
    return PageRequest(before, after, document.get("limit", 50), document.get("label"))


@REPEATABLE
@given(documents)
@example({"type": "history", "zeta": 1, "": 2})
def test_parse_agrees_with_the_model(document):
    """Every document is parsed, or refused with its first fault and its label."""
    expected = answer_of(document)
    if isinstance(expected, str):
        label = document.get("label") if isinstance(document, dict) else None
        expected = (expected, None if label is None or fault_of_label(label) else label)
    assert answer_to(orjson.dumps(document)) == expected


@REPEATABLE
@given(documents)
def test_parse_and_parse_post_agree_without_type(document):
    if isinstance(document, dict):
        document.pop("type", None)
    text = orjson.dumps(document)
    assert answer_to(text, parse_post) == answer_to(text)


good_labels = st.none() | st.text(EVERY_CHARACTER, min_size=1, max_size=64)
posts = st.tuples(st.text(min_size=1, max_size=30), st.text(min_size=1, max_size=500), good_labels).map(
    lambda parts: Post(*parts)
)


@REPEATABLE
@given(posts, st.booleans())
@example(Post("\0", "\x7f\u2028\ufeff"), True)  # noqa: FBT003
def test_every_valid_post_is_read_as_it_was_written(post, ensure_ascii):
    document = {name: value for name, value in post._asdict().items() if value}
    assert parse(json.dumps(document, ensure_ascii=ensure_ascii).encode()) == post


@REPEATABLE
@given(st.binary() | documents.map(orjson.dumps))
@pytest.mark.parametrize("read", [parse, parse_post])
def test_any_bytes_are_either_something_or_refused(read, data):
    answer = answer_to(data, read)
    if isinstance(answer, Post) and answer.removed:
        assert {*json.loads(data)} - {"label"} == {"type", "id"}
    elif isinstance(answer, (Post, PageRequest, Renewal, Typing)):
        assert {*json.loads(data)} - {"type"} <= {*answer._fields}
    else:
        text, label = answer
        assert re.match(r'Invalid JSON format\.$|Validation error: "', text)
        assert label is None or is_label(label)


def test_payload_limit_without_a_schema():
    """With another payload limit, posts and errors stay the same, and long frames have bounds of their own."""
    vocabulary = frames.Vocabulary()
    vocabulary.use(MESSAGE, 100_000)
    assert vocabulary.max_bytes == 100_000
    assert vocabulary.parse(post_json(label="c81f")) == Post("ann", "hi", "c81f")
    for text in (b"{", b"[]", post_json(username=""), typing_json(username=1), page_json(limit=0)):
        assert str(refused(text, vocabulary.parse)) == refusal(text)
    assert str(refused(b"[" * 9000, vocabulary.parse)).endswith("more than 8192 brackets")


# The schemas

every_form = pytest.mark.parametrize("form", ALL_FORMS)


@every_form
def test_schema_is_a_valid_one_of_2020_12(form):
    schema = ALL_FORMS[form].schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


def test_every_schema_has_a_name_of_its_own():
    assert [one.schema["$id"] for one in ALL_FORMS.values()] == [
        "urn:chatd:message",
        "urn:chatd:page",
        "urn:chatd:remove",
        "urn:chatd:token",
        "urn:chatd:typing",
    ]


@every_form
def test_schema_parts_have_titles(form):
    schema = ALL_FORMS[form].schema
    for part in (schema, *schema["properties"].values()):
        if part != {"const": form}:
            assert part["title"]
            assert part["description"].endswith(".")
            assert part.get("examples") or part["type"] == "integer"


def test_schemas_name_the_limits():
    limits = {
        form: {
            name: (part["minLength"], part["maxLength"])
            for name, part in one.schema["properties"].items()
            if "minLength" in part
        }
        for form, one in ALL_FORMS.items()
    }
    assert limits == {
        "message": {"username": (1, 30), "message": (1, 500), "label": (1, 64)},
        "history": {"label": (1, 64)},
        "typing": {"username": (1, 30)},
        "remove": {"label": (1, 64)},
        "token": {"label": (1, 64), "token": (1, 8192)},
    }


def test_schemas_share_label_and_username():
    rules = {"type", "minLength", "maxLength", "pattern"}
    for name, forms in (
        ("label", ("message", "history")),
        ("label", ("message", "remove")),
        ("username", ("message", "typing")),
    ):
        one, two = (ALL_FORMS[form].schema["properties"][name] for form in forms)
        assert {rule: one.get(rule) for rule in rules} == {rule: two.get(rule) for rule in rules}


@every_form
def test_every_example_of_a_schema_is_accepted(form):
    schema = ALL_FORMS[form].schema
    for document in schema["examples"]:
        assert not isinstance(answer_of(document), str)
        assert parse(orjson.dumps(document)) == answer_of(document)
    for name, part in schema["properties"].items():
        for text in part.get("examples", ()):
            document = {key: text for key in schema["examples"][0] if key == name} or {name: text}
            whole = {key: value for key, value in schema["examples"][0].items() if key not in ("before", "after")}
            assert parse(orjson.dumps(whole | document)) == answer_of(whole | document)


# The seed


def test_default_seed():
    """The seed is the two messages that every new log begins with."""
    assert parse_seed(SEED_FILE.read_bytes()) == (
        Entry(1, "Alice", "Hello!", "2024-10-20T12:30:00Z"),
        Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z"),
    )
    assert [[*document] for document in json.loads(SEED_FILE.read_bytes())] == [
        ["username", "message", "timestamp"]
    ] * 2


def test_seed_with_fields_of_the_operators_own():
    form = Form({**MESSAGE.schema, "properties": {**MESSAGE.schema["properties"], "color": {"enum": ["red"]}}})
    text = b'[{"username":"ann","message":"hi","color":"red","timestamp":"2024-10-20T12:30:00Z"}]'
    assert parse_seed(text, form) == (Entry(1, "ann", "hi", "2024-10-20T12:30:00Z", extra={"color": "red"}),)
    with pytest.raises(FrameError, match=r'^message 1: "color" is not allowed$'):
        parse_seed(text)
    with pytest.raises(FrameError, match=r'^message 1: "color" must be one of \[red\]$'):
        parse_seed(text.replace(b'"red"', b'"blue"'), form)


def seed_json(*timestamps):
    documents = [{"username": "ann", "message": "hi", "timestamp": timestamp} for timestamp in timestamps]
    return json.dumps(documents).encode()


def test_seed_may_be_empty():
    assert parse_seed(b"[]") == ()


def test_seed_may_have_milliseconds_and_equal_times():
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
        (
            b'[{"username":"ann","message":"hi","timestamp":"2024-10-20T12:30:00Z","label":"c81f"}]',
            'message 1: "label" is not allowed',
        ),
        (
            b'[{"username":"ann","message":"hi","timestamp":"2024-10-20T12:30:00Z","type":"history"}]',
            'message 1: "type" is not allowed',
        ),
    ],
)
def test_invalid_seed_is_rejected_with_the_reason(text, reason):
    with pytest.raises(FrameError) as refused:
        parse_seed(text)
    assert str(refused.value).startswith(reason)
    assert "\n" not in str(refused.value)


def test_seed_error_names_the_message():
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
def test_seed_with_an_invalid_timestamp(timestamp):
    with pytest.raises(FrameError) as refused:
        parse_seed(seed_json(timestamp))
    assert str(refused.value) == 'message 1: "timestamp" must be a time such as 2024-10-20T12:30:00Z'


def test_seed_without_timestamps_is_refused():
    with pytest.raises(FrameError, match=r'^message 1: "timestamp" must be a time'):
        parse_seed(b'[{"username":"ann","message":"hi"}]')


def test_seed_that_goes_back_in_time_is_refused():
    # As text the second would come after the first: it is the time that counts.
    with pytest.raises(FrameError, match=r'^message 2: "timestamp" is before that of message 1$'):
        parse_seed(seed_json("2024-10-20T12:30:00.5Z", "2024-10-20T12:30:00Z"))


# Frames of the server


@pytest.mark.parametrize(
    ("size", "header"), [(0, 2), (1, 2), (125, 2), (126, 4), (127, 4), (65535, 4), (65536, 10), (100_000, 10)]
)
def test_text_is_one_final_frame_with_the_shortest_header(size, header):
    payload = (b"0123456789" * 10_000)[:size]
    frame = read_frame(frames.text_frame(payload))
    assert (frame.first, frame.header, frame.payload) == (0x81, header, payload)
    assert frames.payload(frames.text_frame(payload)) == payload


ANN = Entry(7, "ann", "hi", "2026-01-01T00:00:00.000Z")
BOB = Entry(8, "Боб", '"quoted", \\ and 👋\n', "2026-01-01T00:00:01.500Z")


def test_message_frame_is_these_bytes():
    assert frames.message_frame("k7Q2xY", ANN) == (
        b"\x81\x72"
        b'{"type":"message","id":"k7Q2xY-7",'
        b'"data":{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}}'
    )


def test_message_frame_escapes_only_as_json_requires():
    assert (
        read_frame(frames.message_frame("k7Q2xY", BOB)).payload
        == (
            '{"type":"message","id":"k7Q2xY-8","data":{"username":"Боб",'
            '"message":"\\"quoted\\", \\\\ and 👋\\n","timestamp":"2026-01-01T00:00:01.500Z"}}'
        ).encode()
    )


def history(epoch, number, entries, *, more=False):
    return frames.history_frame(epoch, number, [frames.message_frame(epoch, entry) for entry in entries], more=more)


def test_history_frame_is_these_bytes():
    assert history("k7Q2xY", 8, [ANN, BOB]) == (
        b"\x81\x7e\x00\xd7"
        + (
            '{"type":"history","id":"k7Q2xY-8","data":['
            '{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"},'
            '{"username":"Боб","message":"\\"quoted\\", \\\\ and 👋\\n","timestamp":"2026-01-01T00:00:01.500Z"}]}'
        ).encode()
    )


def test_history_frame_with_more():
    assert read_frame(history("k7Q2xY", 7, [ANN], more=True)).payload == (
        b'{"type":"history","id":"k7Q2xY-7","more":true,'
        b'"data":[{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}]}'
    )


def test_history_of_an_empty_room_has_the_number_0():
    assert frames.history_frame("k7Q2", 0, []) == b'\x81\x2a{"type":"history","id":"k7Q2-0","data":[]}'


def test_history_of_a_fully_trimmed_room():
    """The history is empty and keeps the number of the head."""
    assert frames.history_frame("k7Q2", 12, [], more=False) == b'\x81\x2b{"type":"history","id":"k7Q2-12","data":[]}'


def test_history_frame_with_resumed():
    ann = frames.message_frame("k7Q2", ANN)
    data = b'"data":[{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}]}'
    assert frames.payload(frames.history_frame("k7Q2", 7, [ann], resumed=True)) == (
        b'{"type":"history","id":"k7Q2-7","resumed":true,' + data
    )
    assert frames.payload(frames.history_frame("k7Q2", 7, [ann], resumed=False, more=True)) == (
        b'{"type":"history","id":"k7Q2-7","more":true,"resumed":false,' + data
    )
    assert frames.payload(frames.history_frame("k7Q2", 7, [ann], resumed=None)) == (
        b'{"type":"history","id":"k7Q2-7",' + data
    )
    assert frames.history_frame("k7Q2", 3, [], resumed=True) == (
        b'\x81\x39{"type":"history","id":"k7Q2-3","resumed":true,"data":[]}'
    )


def test_history_frame_that_answers_a_page_has_its_label():
    ann = frames.message_frame("k7Q2", ANN)
    assert frames.payload(frames.history_frame("k7Q2", 7, [ann], more=True, label="h1")) == (
        b'{"type":"history","id":"k7Q2-7","more":true,"label":"h1",'
        b'"data":[{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}]}'
    )
    assert frames.history_frame("k7Q2", 0, [], label="h1") == (
        b'\x81\x37{"type":"history","id":"k7Q2-0","label":"h1","data":[]}'
    )


@pytest.mark.parametrize(
    "label", [*GOOD_LABELS, EVERY_CHARACTER[:47], EVERY_CHARACTER[47:], '"data":', '","data":[1],"']
)
def test_label_is_returned_unchanged(label):
    history = frames.payload(frames.history_frame("k7Q2", 0, [], label=label))
    assert json.loads(history) == {"type": "history", "id": "k7Q2-0", "label": label, "data": []}
    ack = frames.payload(frames.ack_frame(Id("k7Q2", 7), label, duplicate=False))
    assert json.loads(ack) == {"type": "ack", "label": label, "id": "k7Q2-7"}
    assert json.loads(frames.payload(frames.error_frame("why", label=label)))["label"] == label


extra_fields = st.none() | st.dictionaries(
    st.text().filter(lambda name: name not in ("username", "message", "timestamp")),
    st.none() | st.integers(-(2**63), 2**63) | st.text() | st.lists(st.booleans()),
    min_size=1,
    max_size=3,
)
entries = st.builds(
    lambda number, post, extra: Entry(number, *post[:2], "2026-01-01T00:00:00.000Z", extra=extra),
    *(st.integers(1, 10**15), posts, extra_fields),
)


@REPEATABLE
@given(entries)
@example(Entry(1, '"data":', '"data":[{}]', "2026-01-01T00:00:00.000Z"))
def test_history_holds_exactly_the_data_of_its_messages(entry):
    expected = {"username": entry.username, "message": entry.message, "timestamp": entry.timestamp}
    expected |= entry.extra or {}
    message = json.loads(read_frame(frames.message_frame("k7Q2xY", entry)).payload)
    assert message == {"type": "message", "id": f"k7Q2xY-{entry.number}", "data": expected}
    both = json.loads(read_frame(history("k7Q2xY", entry.number, [entry, entry], more=True)).payload)
    assert both == {"type": "history", "id": message["id"], "more": True, "data": [expected, expected]}


edited = st.builds(
    lambda entry, replaces, replaced, removed: entry._replace(
        replaces=replaces, replaced=replaced, removed=removed and replaces is not replaced
    ),
    *(entries, st.none() | st.integers(1, 10**15), st.none() | st.integers(1, 10**15), st.booleans()),
)


@REPEATABLE
@given(edited, st.sampled_from(["k7Q2", "k7Q2xe", "k7Q2xek7Q2xek7Q2"]))
def test_frame_of_an_edit_is_read_back(entry, epoch):
    """The envelope states what was edited, data stays as it is, and entry_of() returns the entry."""
    frame = frames.message_frame(epoch, entry)
    assert frames.entry_of(frame) == entry
    message = json.loads(read_frame(frame).payload)
    assert message.keys() - {"replaces", "replaced", "removed"} == {"type", "id", "data"}
    assert message["data"].keys() == {"username", "message", "timestamp", *(entry.extra or ())}
    ids = {
        name: number and f"{epoch}-{number}"
        for name, number in (("replaces", entry.replaces), ("replaced", entry.replaced))
    }
    assert {name: message.get(name) for name in ids} == ids
    history = json.loads(read_frame(frames.history_frame(epoch, entry.number, [frame])).payload)
    assert {name: history.get(name) for name in ids} == {
        name: {str(entry.number): id_} if id_ else None for name, id_ in ids.items()
    }
    assert history.get("removed") == ([entry.number] if entry.removed else None)
    assert history["data"] == [message["data"]]


def test_history_of_the_longest_messages():
    """A history of a hundred of the longest messages is one frame."""
    longest = Entry(1, "\0" * 30, "\0" * 500, "2026-01-01T00:00:00.000Z")  # six bytes for each \u0000
    frame = read_frame(history("k7Q2xY", 100, [longest] * 100, more=True))
    assert frame.header == 10
    assert len(json.loads(frame.payload)["data"]) == 100


def test_error_frame_bytes():
    """The wire format of an error is these bytes."""
    assert frames.error_frame("Rate limit exceeded") == b'\x81\x30{"type":"error","message":"Rate limit exceeded"}'


def test_error_frame_hint():
    """Only the error for a frame that is not JSON shows what to send, and what it shows is a good frame."""
    error = json.loads(frames.payload(frames.error_frame("Invalid JSON format.")))
    assert list(error) == ["type", "message", "hint"]
    words, example = re.fullmatch(r"(.*?)(\{.*\})", error["hint"]).groups()
    assert words == "Send a JSON object such as "
    assert parse(example.encode()) == Post("ann", "hi", None)


def test_error_frame_with_code_label_and_retry_after():
    for error, text in [
        (frames.error_frame("Try again later", Code.UNAVAILABLE), b'"Try again later","code":"UNAVAILABLE"}'),
        (frames.error_frame("why", label="c82"), b'"why","label":"c82"}'),
        (frames.error_frame("why", retry_after=2), b'"why","retry_after":2}'),
        (frames.error_frame("why", retry_after=0), b'"why","retry_after":0}'),
        (frames.error_frame("why", Code.LABEL_REUSED, "c82"), b'"why","code":"LABEL_REUSED","label":"c82"}'),
        (frames.error_frame("why", Code.UNKNOWN_ID, "h1"), b'"why","code":"UNKNOWN_ID","label":"h1"}'),
    ]:
        assert read_frame(error).payload == b'{"type":"error","message":' + text


def test_error_frame_with_all_of_it_is_these_bytes():
    assert frames.error_frame("Rate limit exceeded", Code.RATE_LIMITED, "c82", 1.5) == (
        b"\x81\x66"
        b'{"type":"error","message":"Rate limit exceeded","code":"RATE_LIMITED","label":"c82","retry_after":1.5}'
    )


def test_codes_are_words_for_programs():
    assert {*Code} >= {"RATE_LIMITED", "LABEL_REUSED", "UNAVAILABLE", "UNKNOWN_ID"}
    assert all(re.fullmatch("[A-Z_]+", code) and code == code.name for code in Code)


def test_error_frame_can_carry_any_refusal():
    message = refusal(post_json(**{'a"\\\n': 1}))
    assert json.loads(read_frame(frames.error_frame(message)).payload)["message"] == message


def test_ack_frame_is_these_bytes():
    assert frames.ack_frame(Id("k7Q2", 1051), "c81f", duplicate=False) == (
        b'\x81\x2e{"type":"ack","label":"c81f","id":"k7Q2-1051"}'
    )
    assert frames.ack_frame(Id("k7Q2", 1051), "c81f", duplicate=True) == (
        b'\x81\x3f{"type":"ack","label":"c81f","id":"k7Q2-1051","duplicate":true}'
    )


def test_ack_frame_may_do_without_a_label():
    assert frames.payload(frames.ack_frame(Id("k7Q2", 7), None, duplicate=False)) == b'{"type":"ack","id":"k7Q2-7"}'


def test_presence_frame():
    """A presence frame has all users, or those that joined and left."""
    assert frames.presence_frame(3, users=["ann", "Боб", 'c"y']) == (
        b"\x81\x46" + '{"type":"presence","data":{"count":3,"users":["ann","Боб","c\\"y"]}}'.encode()
    )
    assert frames.presence_frame(4, join=["dee"], leave=[]) == (
        b'\x81\x40{"type":"presence","data":{"count":4,"join":["dee"],"leave":[]}}'
    )
    assert frames.payload(frames.presence_frame(201)) == b'{"type":"presence","data":{"count":201}}'
    assert frames.payload(frames.presence_frame(1, users=("ann",))) == (
        b'{"type":"presence","data":{"count":1,"users":["ann"]}}'
    )


def test_typing_frame():
    assert frames.typing_frame(["ann", "bob"]) == b'\x81\x30{"type":"typing","data":{"users":["ann","bob"]}}'
    assert frames.payload(frames.typing_frame([])) == b'{"type":"typing","data":{"users":[]}}'


# The same as Server-Sent Events


def test_message_is_an_event_with_its_id():
    assert frames.event(frames.message_frame("k7Q2xY", ANN)) == (
        b"event: message\n"
        b"id: k7Q2xY-7\n"
        b'data: {"type":"message","id":"k7Q2xY-7",'
        b'"data":{"username":"ann","message":"hi","timestamp":"2026-01-01T00:00:00.000Z"}}\n'
        b"\n"
    )


@pytest.mark.parametrize("size", [0, 1, 100])
def test_history_is_an_event_with_its_id_however_long_it_is(size):
    longest = Entry(1, "😀" * 30, "\0" * 500, "2026-01-01T00:00:00.000Z")
    frame = history("k7Q2xY", 100, [longest] * size, more=True)
    assert read_frame(frame).header == {0: 2, 1: 4, 100: 10}[size]
    head, data = b"event: history\nid: k7Q2xY-100\n", read_frame(frame).payload
    assert frames.event(frame) == head + b"data: " + data + b"\n\n"


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (frames.error_frame("why", Code.UNAVAILABLE), b"error"),
        (frames.error_frame('{"type":"message","id":"k7Q2-7"'), b"error"),
        (frames.presence_frame(1, users=["ann"]), b"presence"),
        (frames.presence_frame(1, join=['","id":"k7Q2-7"'], leave=[]), b"presence"),
        (frames.typing_frame(["ann"]), b"typing"),
        (frames.ack_frame(Id("k7Q2", 7), "c81f", duplicate=True), b"ack"),
    ],
)
def test_events_without_an_id(frame, kind):
    """Only messages and histories have an id to resume from."""
    assert frames.event(frame) == b"event: %b\ndata: %b\n\n" % (kind, frames.payload(frame))


def test_event_of_an_unknown_text():
    """It is a message event without an id."""
    assert frames.event(frames.text_frame(b"hello")) == b"event: message\ndata: hello\n\n"


@REPEATABLE
@given(entries)
@example(Entry(1, "\r", "\n\r\n\ndata: x\u2028\x85", "2026-01-01T00:00:00.000Z"))
@example(Entry(1, "\n", "\n" * 500, "2026-01-01T00:00:00.000Z"))
def test_event_is_three_lines_for_any_text(entry):
    frame = frames.message_frame("k7Q2xY", entry)
    lines = re.split(rb"\r\n|\r|\n", frames.event(frame))
    assert lines[:2] == [b"event: message", b"id: k7Q2xY-%d" % entry.number]
    assert lines[2] == b"data: " + frames.payload(frame)
    assert lines[3:] == [b"", b""]


def test_unknown_keys_cost_no_explanation(monkeypatch):
    """A frame of a thousand unknown keys is explained by its known keys, or by the first unknown one."""
    copied = []
    first = explainer.first_refused

    def counted(accepts, items, make):
        return first(lambda some: accepts(copied.append(len(some)) or some), items, make)

    monkeypatch.setattr(explainer, "first_refused", counted)
    many = {f"k{number}": number for number in range(1000)}
    assert MESSAGE.explain(many | {"username": "", "message": ["x"]}) == '"username" is not allowed to be empty'
    assert copied == []
    assert MESSAGE.explain({"username": "ann", "message": "hi"} | many) == '"k0" is not allowed'
    assert max(copied) <= 4
