"""The frames of connections that may be in many rooms."""

import json

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.helpers import REPEATABLE

from chatd.messages import Code, Entry, Id, Join, Leave, PageRequest, Post, Renewal, Typing
from chatd.room.presence import EVENTS
from chatd.transport import frames
from chatd.transport.frames import JOIN, LEAVE, FrameError, Vocabulary
from chatd.transport.framing import payload, text_frame

VOCABULARY = Vocabulary()
parse = VOCABULARY.parse
FORMS = {"join": JOIN, "leave": LEAVE}
ID = "k7Q2xe-41"
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.sampled_from(
        ["", "ann", "a" * 31, "team", "Team", "presence", "typing", "join", ID, "k7Q2xe-041", "a b", "x\n"]
    )
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["room", "x"]), inner, max_size=2),
    max_leaves=4,
)
names = st.sampled_from(
    ["room", "last_event_id", "username", "label", "events", "message", "id", "limit", "before", "x"]
)
documents = st.dictionaries(names, values, max_size=6)


def parse_addressed(text):
    return frames.parse_addressed(text, VOCABULARY)


def outcome(parser, document):
    """Return what a parser makes of a document: its result, or the words and the label of its error."""
    try:
        return parser(orjson.dumps(document))
    except FrameError as error:
        return str(error), error.label


@pytest.mark.parametrize("kind", FORMS)
def test_validators_agree(kind):
    """The fast validator accepts exactly the frames in which the slow one finds no fault."""

    @REPEATABLE
    @given(documents)
    @example({"room": "team", "events": ["presence", "typing", "presence"]})
    @example({"room": "team", "events": [{}]})
    @example({"room": "team", "events": ["typing"], "x": 1})
    @example({"room": "team", "last_event_id": ID, "username": "a" * 30, "label": "~" * 64, "events": []})
    def check(document):
        document["type"] = kind
        assert FORMS[kind].accepts(document) == (FORMS[kind].explain(document) is None)

    check()


@pytest.mark.parametrize("form", FORMS.values())
def test_any_other_value_is_refused(form):
    assert form.explain([]) == '"value" must be of type object'


@REPEATABLE
@given(documents, st.sampled_from([None, "history", "remove", "typing"]))
@example({"room": "team", "username": "ann", "message": "hi", "label": "x"}, None)
def test_room_is_all_that_differs(document, kind):
    """A frame with a valid room is read, or refused, as the same frame without it on another connection."""
    if kind is not None:
        document["type"] = kind
    document["room"] = "team"
    alone = {name: value for name, value in document.items() if name != "room"}
    expected = outcome(parse, alone)
    found = outcome(parse_addressed, document)
    assert found == (expected if type(expected) is tuple else ("team", expected))


@REPEATABLE
@given(st.one_of(values, documents))
def test_anything_is_read_or_refused(document):
    """No document raises another error."""
    try:
        room, _ = parse_addressed(orjson.dumps(document))
    except FrameError as error:
        room = error.room
    assert room is None or document["room"] == room


@pytest.mark.parametrize(
    ("document", "frame"),
    [
        ({"type": "join", "room": "team"}, Join(None, frozenset(), None, None)),
        (
            {"type": "join", "room": "team", "last_event_id": ID, "events": [*EVENTS], "username": "ann", "label": "j"},
            Join(Id("k7Q2xe", 41), EVENTS, "ann", "j"),
        ),
        ({"type": "leave", "room": "team"}, Leave(None)),
        ({"type": "leave", "room": "team", "label": "l"}, Leave("l")),
        ({"room": "team", "username": "ann", "message": "hi"}, Post("ann", "hi")),
        ({"room": "team", "type": "typing", "username": "ann"}, Typing("ann")),
        ({"room": "team", "type": "history"}, PageRequest(None, None, 50, None)),
        ({"room": "team", "type": "remove", "id": ID}, frames.removal(Id("k7Q2xe", 41), None)),
    ],
)
def test_valid_frame(document, frame):
    assert parse_addressed(orjson.dumps(document)) == ("team", frame)


def test_schema_of_the_operator():
    """Messages have its fields, and usernames its length, also in a join."""
    schema = json.loads(json.dumps(frames.MESSAGE.schema))
    schema["properties"]["username"]["maxLength"] = 40
    schema["properties"]["color"] = {"type": "string"}
    vocabulary = Vocabulary()
    vocabulary.use(frames.Form(schema), 1 << 14)
    name = "a" * 40
    (_, join), (_, post) = (
        frames.parse_addressed(orjson.dumps({"room": "team", "username": name, **more}), vocabulary)
        for more in ({"type": "join"}, {"message": "hi", "color": "red"})
    )
    assert (join.username, post.username, post.extra) == (name, name, {"color": "red"})


def test_token_has_no_room():
    assert parse_addressed(b'{"type":"token","token":"t"}') == (None, Renewal("t", None))


def test_events_are_shared():
    """Equal sets of events are one object, so that a subscription holds none of its own."""
    one, other = (
        parse_addressed(orjson.dumps({"type": "join", "room": "team", "events": events}))[1].events
        for events in (["presence", "typing"], ["typing", "presence", "typing"])
    )
    assert one is other


@pytest.mark.parametrize("label", [None, "x"])
def test_label_of_a_broken_frame(label):
    with pytest.raises(FrameError) as refused:
        parse_addressed(orjson.dumps({"room": "A b", "label": label or 7}))
    assert (refused.value.label, refused.value.room) == (label, None)


# Frames of the server


@pytest.mark.parametrize(
    "frame",
    [
        frames.message_frame("k7Q2xe", Entry(1, "ann", "x" * size, "2026-01-01T00:00:00.000Z"))
        for size in (1, 20, 60, 500)
    ]
    + [
        frames.history_frame("k7Q2xe", 0, []),
        frames.error_frame("No.", Code.NOT_JOINED, "x"),
        frames.left_frame(),
        frames.left_frame("x", "No.", Code.EVICTED, 1.5),
    ],
)
def test_form_adds_the_room(frame):
    """The room stands after the type, and nothing else changes."""
    document = json.loads(payload(frame))
    found = frames.addressed("team")(frame)
    assert json.loads(payload(found)) == document | {"room": "team"}
    assert found == text_frame(payload(found))
    assert [*json.loads(payload(found))][:2] == ["type", "room"]


def test_label_of_a_join():
    history = frames.history_frame("k7Q2xe", 0, [], resumed=True)
    assert frames.labelled(history, None) is history
    assert json.loads(payload(frames.labelled(history, 'a"b'))) == json.loads(payload(history)) | {"label": 'a"b'}


@given(st.lists(st.sampled_from([0, 1, 125, 126, 65535, 65536]), max_size=4))
def test_joined_frames_are_taken_apart(sizes):
    single = [text_frame(b"x" * size) for size in sizes]
    assert [*frames.each_frame(b"".join(single))] == single
