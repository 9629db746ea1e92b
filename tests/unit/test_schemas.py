"""The documents of the protocol agree with each other, the program and the generated page."""

import functools
import json
import re

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012
from support.servers import ROOT

from chatd import messages as domain
from chatd.messages import Code, Entry, Id
from chatd.room import presence
from chatd.transport import admission, frames
from chatd.transport.frames import FrameError

SCHEMAS = ROOT / "schemas"
PAGE = ROOT / "docs" / "protocol.md"
FILES = [
    *("asyncapi.json", "openapi.json", "message.json", "page.json", "typing.json", "token.json", "remove.json"),
    *("join.json", "leave.json"),
]
SENT = ["history", "message", "ack", "error", "presence", "typing", "token", "left"]
SHARED = {"join", "leave", "left"}
"""The frames of connections that may be in many rooms only."""
RECEIVED = {
    "post": "message.json",
    "pageRequest": "page.json",
    "typingNotice": "typing.json",
    "newToken": "token.json",
    "removal": "remove.json",
    "join": "join.json",
    "leave": "leave.json",
}

LABEL, ID = "c81f", Id("k7Q2xe", 2)
ANN = Entry(1, "ann", "hi", "2026-01-01T00:00:00.000Z")
SEEDED = Entry(2, "Bob", "Hi Alice!", "2024-10-20T12:31:00Z")
EDITED = [
    frames.message_frame("k7Q2xe", entry)
    for entry in (
        Entry(3, "ann", "new", ANN.timestamp, "a", replaced=4),
        Entry(4, "ann", "[removed]", ANN.timestamp, "a", replaces=2, removed=True),
    )
]
POSTED = {"username": "ann", "message": "hi", "timestamp": ANN.timestamp}


@functools.cache
def read(name):
    return json.loads((SCHEMAS / name).read_text("utf-8"))


ASYNCAPI, OPENAPI = read("asyncapi.json"), read("openapi.json")


def retrieve(uri):
    return Resource.from_contents(read(uri.rpartition("/")[2]), default_specification=DRAFT202012)


REGISTRY = Registry(retrieve=retrieve)


def validator(schema, file):
    """Return a validator for a schema in one of the files; references are relative to that file."""
    resolver = REGISTRY.resolver((SCHEMAS / file).as_uri())
    return jsonschema.Draft202012Validator(schema, registry=REGISTRY, _resolver=resolver)


def faults(schema, file, document):
    return [error.message for error in validator(schema, file).iter_errors(document)]


def frame_faults(kind, document):
    """List the faults of a server's frame of that type."""
    return faults(ASYNCAPI["components"]["messages"][kind]["payload"], "asyncapi.json", document)


def walk(node, place=""):
    """Yield all objects in a document, each after its JSON pointer; examples are left out."""
    if isinstance(node, dict):
        yield place, node
        for key, value in node.items():
            if key not in ("example", "examples", "default", "const", "enum") or place.endswith("/properties"):
                yield from walk(value, f"{place}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{place}/{index}")


def schemas(file):
    """Return the schemas in a file that are not inside other schemas."""
    document = read(file)
    if file == "asyncapi.json":
        binding = document["components"]["channelBindings"]["chat"]["ws"]
        return [*document["components"]["schemas"].values(), binding["query"], binding["headers"]]
    if file == "openapi.json":
        inside = [node["schema"] for _, node in walk(document["paths"]) if "schema" in node]
        inside += [node["schema"] for _, node in walk(document["components"]) if "schema" in node]
        return [*document["components"]["schemas"].values(), *inside]
    return [document]


# The standards


@pytest.mark.parametrize("file", FILES)
def test_schema_is_valid_in_each_draft(file):
    for schema in schemas(file):
        jsonschema.Draft202012Validator.check_schema(schema)
        if file != "openapi.json":  # AsyncAPI reads by draft 7
            jsonschema.Draft7Validator.check_schema(schema)
    with pytest.raises(jsonschema.SchemaError):
        jsonschema.Draft202012Validator.check_schema({"type": "objekt"})


@pytest.mark.parametrize("file", FILES)
def test_each_reference_resolves(file):
    references = [(place, node["$ref"]) for place, node in walk(read(file)) if "$ref" in node]
    assert bool(references) == (file in ("asyncapi.json", "openapi.json"))
    resolver = REGISTRY.resolver((SCHEMAS / file).as_uri())
    for place, reference in references:
        assert isinstance(resolver.lookup(reference).contents, dict), place
        assert reference.partition("#")[0] in ("", *(f"./{name}" for name in FILES)), place


def test_each_definition_is_used():
    used = {
        reference.lstrip("./") if "#" not in reference else f"{reference.partition('#')[0].lstrip('./') or file}{tail}"
        for file in FILES
        for _, node in walk(read(file))
        if "$ref" in node
        for reference in [node["$ref"]]
        for tail in [reference[reference.find("#") :]]
    }
    for file, document in (("asyncapi.json", ASYNCAPI), ("openapi.json", OPENAPI)):
        for kind, parts in document["components"].items():
            for name in parts:
                pointer = f"{file}#/components/{kind}/{name}"
                assert any(one == pointer or one.startswith(f"{pointer}/") for one in used), pointer


@pytest.mark.parametrize("file", FILES)
def test_each_example_is_valid(file):
    seen = 0
    for place, node in walk(read(file)):
        schema = node.get("schema", {}) if "example" in node else node
        examples = [node["example"]] if "example" in node else node.get("examples", [])
        for example in examples:
            assert faults(schema, file, example) == [], f"{place}: {example}"
            seen += 1
    assert seen


def test_invalid_example_is_found():
    assert faults(ASYNCAPI["components"]["schemas"]["Id"], "asyncapi.json", "k7Q2xe-01")
    assert faults(OPENAPI["components"]["schemas"]["Problem"], "openapi.json", {"title": "?", "status": 400})


@pytest.mark.parametrize("file", FILES)
def test_object_schemas_are_closed(file):
    objects = [
        (place, node)
        for schema in schemas(file)
        for place, node in walk(schema)
        if node.get("type") == "object" and schema.get("description") not in OPEN
    ]
    for place, node in objects:
        assert node.get("additionalProperties") is False or all("$ref" in part for part in node["allOf"]), place
        assert "required" in node or "allOf" in node, place
        assert set(node.get("required", ())) <= set(node.get("properties", node.get("required", ()))), place


OPEN = {ASYNCAPI["components"]["channelBindings"]["chat"]["ws"][name]["description"] for name in ("query", "headers")}
"""The query and the headers of a handshake may have other keys."""


# Frames from the client


def test_client_frames_have_one_source():
    messages = ASYNCAPI["components"]["messages"]
    assert {name: messages[name]["payload"] for name in messages if name not in SENT} == {
        name: {"$ref": f"./{file}"} for name, file in RECEIVED.items()
    }
    received = {
        reference["$ref"].rpartition("/")[2]
        for operation in ASYNCAPI["operations"].values()
        if operation["action"] == "receive"
        for reference in operation["messages"]
    }
    assert received == {*RECEIVED}
    body = OPENAPI["paths"]["/rooms/{name}/messages"]["post"]["requestBody"]
    assert body["content"] == {"application/json": {"schema": {"$ref": "./message.json"}}}


@pytest.mark.parametrize("channel", ["main", "room", "shared"])
def test_channels_have_every_message(channel):
    """Each channel has all messages, and each message is sent or received."""
    messages = [name for name in ASYNCAPI["components"]["messages"] if name not in SHARED or channel == "shared"]
    assert [*ASYNCAPI["channels"][channel]["messages"]] == messages
    said = set()
    for operation in ASYNCAPI["operations"].values():
        if operation["channel"]["$ref"] == f"#/channels/{channel}":
            said |= {one["$ref"] for one in [*operation["messages"], *operation.get("reply", {}).get("messages", [])]}
    assert said == {f"#/channels/{channel}/messages/{name}" for name in messages}


def test_limits_and_patterns_match_the_program():
    shared, parameters = ASYNCAPI["components"]["schemas"], OPENAPI["components"]["parameters"]
    assert shared["Code"]["enum"] == [*Code]
    assert shared["History"]["then"]["properties"]["data"]["maxItems"] == frames.PAGE_LIMIT
    assert OPENAPI["components"]["schemas"]["Messages"]["properties"]["data"]["maxItems"] == frames.PAGE_LIMIT
    people = shared["Presence"]["properties"]["data"]["properties"]
    assert {people[name]["maxItems"] for name in ("users", "join", "leave")} == {presence.MAX_USERS}
    assert shared["Typing"]["properties"]["data"]["properties"]["users"]["maxItems"] == presence.MAX_TYPING
    events = "|".join(sorted(presence.EVENTS))
    assert parameters["events"]["schema"]["pattern"] == f"^({events})(,({events}))*$"
    query = ASYNCAPI["components"]["channelBindings"]["chat"]["ws"]["query"]["properties"]
    assert query["events"]["pattern"] == parameters["events"]["schema"]["pattern"]
    assert f"^/rooms/({parameters['name']['schema']['pattern'].strip('^$')})$" == f"^{admission._PATH.pattern}$"
    ids = {shared["Id"]["pattern"], *(read("page.json")["properties"][name]["pattern"] for name in ("before", "after"))}
    assert ids == {f"^{domain._ID.pattern.replace('({4', '{4').replace('([0-9A-Za-z]{4,16})', '[0-9A-Za-z]{4,16}')}$"}


# Frames from the server


def test_type_of_a_frame_names_its_message():
    messages, shared = ASYNCAPI["components"]["messages"], ASYNCAPI["components"]["schemas"]
    assert [name for name in messages if name not in RECEIVED] == SENT
    for name, message in messages.items():
        assert message["name"] == name
    for name in SENT:
        assert messages[name]["payload"] == {"$ref": f"#/components/schemas/{name.capitalize()}"}
        schema = shared["Receipt" if name == "ack" else name.capitalize()]
        assert schema["properties"]["type"] == {"const": name}
        assert "type" in schema["required"]


MADE = [
    frames.message_frame("k7Q2xe", ANN),
    frames.message_frame("k7Q2xe", SEEDED),
    *EDITED,
    frames.history_frame("k7Q2xe", 4, EDITED),
    frames.history_frame("k7Q2xe", 0, []),
    frames.history_frame("k7Q2xe", 2, [frames.message_frame("k7Q2xe", entry) for entry in (ANN, SEEDED)], more=True),
    frames.history_frame("k7Q2xe", 2, [], resumed=True),
    frames.history_frame("k7Q2xe", 2, [], more=True, resumed=False),
    frames.history_frame("k7Q2xe", 2, [], more=True, label=LABEL),
    frames.ack_frame(ID, LABEL, duplicate=False),
    frames.ack_frame(ID, LABEL, duplicate=True),
    frames.error_frame("Invalid JSON format."),
    *(frames.error_frame("No.", code, LABEL, 1.5 if code is Code.RATE_LIMITED else None) for code in Code),
    frames.presence_frame(300),
    frames.presence_frame(2, users=["ann", "bob"]),
    frames.presence_frame(2, join=[], leave=["ann"]),
    frames.typing_frame(["ann"]),
    frames.token_frame(1790000000.0, LABEL),
    *map(frames.addressed("team"), [frames.message_frame("k7Q2xe", ANN), frames.left_frame(LABEL)]),
    frames.addressed("team")(frames.labelled(frames.history_frame("k7Q2xe", 2, [], resumed=True), LABEL)),
    frames.addressed("team")(frames.left_frame(None, "No.", Code.FORBIDDEN, 1.5)),
]


@pytest.mark.parametrize("frame", [frames.payload(frame).decode() for frame in MADE])
def test_frames_fit_their_schemas(frame):
    """Frames of the program fit, and undocumented ones do not."""
    document = json.loads(frame)
    kind = document["type"]
    assert frame_faults(kind, document) == []
    for place, node in [*walk(document)]:
        if not place.startswith("/data/") or "/" not in place[6:]:
            node["undocumented"] = 1
            assert frame_faults(kind, document), place
            del node["undocumented"]
    optional = {"room"} if kind != "left" else {"message"}
    for name in (
        document.keys()
        - optional
        - {
            "replaces",
            "replaced",
            "removed",
            "more",
            "resumed",
            "duplicate",
            "hint",
            "label",
            "code",
            "retry_after",
        }
    ):
        assert frame_faults(kind, {key: value for key, value in document.items() if key != name}), name


NO_NAMES = [f"n{number}" for number in range(201)]


@pytest.mark.parametrize(
    "document",
    [
        {"type": "history", "id": "k7Q2xe-1", "more": False, "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-1", "more": True, "resumed": True, "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-1", "label": LABEL, "resumed": True, "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-1", "label": LABEL, "resumed": False, "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-101", "label": LABEL, "data": [POSTED] * 101},
        {"type": "history", "id": "k7Q2xe-1", "label": "a b", "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-1", "data": [{"username": "ann", "message": "hi"}]},
        {"type": "history", "id": "k7Q2xe-1", "data": [POSTED | {"label": LABEL}]},
        {"type": "history", "id": "k7Q2xe-1", "replaces": {}, "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-1", "replaced": {"01": "k7Q2xe-2"}, "data": [POSTED]},
        {"type": "history", "id": "k7Q2xe-1", "removed": [], "data": [POSTED]},
        {"type": "message", "id": "k7Q2xe-1", "removed": False, "data": POSTED},
        {"type": "message", "id": "k7Q2xe-1", "replaces": "1", "data": POSTED},
        {"type": "message", "id": "k7Q-1", "data": POSTED},
        {"type": "message", "id": "k7Q2xe-01", "data": POSTED},
        {"type": "message", "id": "k7Q2xe-1", "data": POSTED | {"username": ""}},
        {"type": "message", "id": "k7Q2xe-1", "data": POSTED | {"message": "x" * 501}},
        {"type": "message", "id": "k7Q2xe-1", "data": POSTED | {"timestamp": "2026-01-01 00:00:00"}},
        {"type": "message", "id": "k7Q2xe-1", "data": POSTED | {"timestamp": "2026-01-01T00:00:00+01:00"}},
        {"type": "ack", "id": "k7Q2xe-1"},
        {"type": "ack", "id": "k7Q2xe-1", "label": LABEL, "duplicate": False},
        {"type": "error", "message": ""},
        {"type": "error", "message": "No.", "code": "NO"},
        {"type": "error", "message": "No.", "code": None},
        {"type": "error", "message": "No.", "retry_after": 1},
        {"type": "error", "message": "No.", "code": "NOT_JOINED", "retry_after": 1},
        {"type": "error", "message": "No.", "code": "RATE_LIMITED", "retry_after": -1},
        {"type": "presence", "data": {"users": ["ann"]}},
        {"type": "presence", "data": {"count": 1, "users": ["ann", "ann"]}},
        {"type": "presence", "data": {"count": 201, "users": NO_NAMES}},
        {"type": "presence", "data": {"count": 1, "join": ["ann"]}},
        {"type": "presence", "data": {"count": 1, "users": [], "join": [], "leave": []}},
        {"type": "typing", "data": {"users": []}},
        {"type": "typing", "data": {"users": NO_NAMES[:11]}},
    ],
    ids=lambda document: json.dumps(document)[:90],
)
def test_forbidden_frame_is_invalid(document):
    assert frame_faults(document["type"], document)


# HTTP


def resolved(reference):
    name = reference["$ref"].rpartition("/")[2]
    return OPENAPI["components"]["responses"][name]


def answers():
    """Yield all responses, each after its place and its status."""
    for path, item in OPENAPI["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                for status, reference in operation.get("responses", operation).items():
                    yield f"{method} {path}", status, resolved(reference)
    for status, reference in OPENAPI["x-other-paths"].items():
        yield "anything", status, resolved(reference)


def test_methods_of_the_http_document():
    """GET implies HEAD and OPTIONS, and other methods are 405."""
    for path, item in OPENAPI["paths"].items():
        assert ("head" in item) == ("get" in item), path
        assert "405" in item["x-other-methods"], path
        tags = item.get("get", item.get("post"))["tags"]
        assert ("options" in item) == (tags not in (["health"], ["admin"], ["documents"], ["static"])), path
        assert [name.strip("{}") for name in re.findall(r"{\w+}", path)] == [
            reference["$ref"].rpartition("/")[2] for reference in item.get("parameters", [])
        ]
    names = [operation["operationId"] for _, operation in walk(OPENAPI["paths"]) if "operationId" in operation]
    assert len({*names}) == len(names)


def test_errors_are_problems():
    """Every error but that of /readyz is a problem with its status."""
    for place, status, response in answers():
        if status >= "400" and place.partition(" ")[2] != "/readyz":
            ((kind, media),) = response["content"].items()
            assert kind == "application/problem+json", place
            assert media["schema"]["properties"]["status"] == {"const": int(status)}, place
            assert media["example"]["status"] == int(status)
            problem = {"title": "No", "status": int(status) + 1, "detail": "No."}
            assert faults(media["schema"], "openapi.json", problem), place


def test_documented_headers():
    """503 and 429 have Retry-After, and posts have a Location."""
    required = {"429": "Retry-After", "405": "Allow", "201": "Location"}
    for place, status, response in answers():
        headers = {
            name: OPENAPI["components"]["headers"][name] if "$ref" in header else header
            for name, header in response["headers"].items()
        }
        if status in required or (status == "503" and "readyz" not in place):
            assert headers[required.get(status, "Retry-After")]["required"], place
        assert {*headers} <= {*OPENAPI["components"]["headers"]}
        assert all(
            header["$ref"].endswith(f"/{name}") for name, header in response["headers"].items() if "$ref" in header
        )


def test_http_pages_and_new_posts():
    """Pages have no label, and new posts are not duplicates."""
    responses = OPENAPI["components"]["responses"]

    def fits(name, document):
        return not faults(responses[name]["content"]["application/json"]["schema"], "openapi.json", document)

    page = {"type": "history", "id": "k7Q2xe-1", "more": True, "data": [POSTED]}
    assert fits("Messages", page)
    assert not fits("Messages", page | {"label": LABEL})
    assert not fits("Messages", {"type": "history", "id": "k7Q2xe-1", "resumed": False, "data": [POSTED]})
    assert not fits("Messages", {"type": "history", "id": "k7Q2xe-101", "data": [POSTED] * 101})
    ack = {"type": "ack", "id": "k7Q2xe-1"}
    assert fits("Posted", ack)
    assert fits("Posted", ack | {"label": LABEL})
    assert not fits("Posted", ack | {"label": LABEL, "duplicate": True})
    assert fits("PostedBefore", ack | {"label": LABEL, "duplicate": True})
    assert not fits("PostedBefore", ack | {"label": LABEL})
    assert not fits("Posted", ack | {"more": True})


# The page


def rows(heading):
    """Return the cells of the table with this heading."""
    _, table = PAGE.read_text("utf-8").split(heading, 1)
    lines = table.lstrip("\n").split("\n\n", 1)[0].splitlines()[1:]
    return [[cell.strip(" `").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_page_lists_the_errors_that_are_sent():
    errors = rows("| fault | a frame that has it | `message` |")
    assert len(errors) == 14
    for fault, sent, message in errors:
        with pytest.raises(FrameError) as refused:
            frames.STANDARD.parse(sent.encode())
        assert str(refused.value) == message, fault
    assert {row[0] for row in rows("| `code` | `message` | what to do |")} == {*Code}
