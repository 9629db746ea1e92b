"""A server whose messages have a shape of the operator's own: real servers, and every form of a message."""

import http.client
import json
import signal
import subprocess
import sys

import jsonschema
import pytest
from support.loops import drive
from support.operator_schemas import EXAMPLE, EXAMPLE_TEXT, schema_with
from support.servers import LONG, ROOT, Raw, Server, environment, run
from support.watches import Watch
from support.web_doubles import EventParser
from support.websocket_frames import TEXT, frame

from chatd.client.client import Client

EXTRA = {
    "color": "red",
    "attachment": {"url": "https://a.example/%C3%A9", "size": 7},
    "reply_to": "k7Q2xe-41",
}
LONG_TEXT = "\U0001f44b" * 8000


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "schema.json").write_text(EXAMPLE_TEXT)
    return tmp_path


def request(server, method, path, body=None):
    """Return the status and the JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def post(**fields):
    return json.dumps({"username": "ann", "message": "hi"} | fields)


def fields_of(data):
    return {name: value for name, value in data.items() if name not in ("username", "message", "timestamp")}


def export(server):
    """Return the lines of an export."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)
    connection.request("GET", "/rooms/main/export")
    lines = connection.getresponse().read().splitlines()
    connection.close()
    return [json.loads(line) for line in lines]


def first_event(server):
    """Return the history of an event stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LONG)
    connection.request("GET", "/rooms/main/events")
    answer, parser = connection.getresponse(), EventParser()
    events = []
    while not events:
        events = parser.feed(answer.read1())
    connection.close()
    return events[0].json


def test_fields_in_every_form(folder):
    """Live messages, histories, pages, events, and all of them again after a kill, a backup and a restore."""
    with Server(folder, "--schema=schema.json") as server:
        with Raw(server.port) as ann:
            first = ann.join()
            assert [fields_of(data) for data in first["data"]] == [{}, {}]  # the default seed fits
            ann.send(frame(TEXT, post(label="l1", **EXTRA).encode()))
            message = ann.json()
            assert fields_of(message["data"]) == EXTRA
            assert ann.json()["label"] == "l1"
            ann.send(frame(TEXT, post(label="l1", **EXTRA).encode()))
            assert ann.json()["duplicate"]
            ann.send(frame(TEXT, post(label="l1").encode()))
            assert ann.json()["code"] == "LABEL_REUSED"
            ann.send(frame(TEXT, post(label="l2", attachment={"url": "https://a", "size": "7"}).encode()))
            words = 'Validation error: "attachment.size" must be an integer'
            assert ann.json() == {"type": "error", "message": words, "label": "l2"}
            status, answer = request(server, "POST", "/rooms/main/messages", post(color="blue"))
            assert status == 201
            assert fields_of(ann.json()["data"]) == {"color": "blue"}
            assert request(server, "POST", "/rooms/main/messages", post(color="pink")) == (
                400,
                {
                    "title": "Bad Request",
                    "status": 400,
                    "detail": 'Validation error: "color" must be one of [red, green, blue]',
                },
            )
            assert fields_of(request(server, "GET", f"/rooms/main/messages/{answer['id']}")[1]["data"]) == {
                "color": "blue"
            }
            ann.send(frame(TEXT, b'{"type":"history","limit":2}'))
            assert [fields_of(data) for data in ann.json()["data"]] == [EXTRA, {"color": "blue"}]
        expected = [{}, {}, EXTRA, {"color": "blue"}]
        assert [fields_of(data) for data in request(server, "GET", "/rooms/main/messages")[1]["data"]] == expected
        assert [fields_of(data) for data in first_event(server)["data"]] == expected
        assert [fields_of(line["data"]) for line in export(server)] == expected
        subprocess.run(
            [ROOT / "scripts/backup", "--store", "chatd.sqlite", "copy"], cwd=folder, check=True, timeout=LONG
        )
        server.kill()
    subprocess.run([ROOT / "scripts/restore", "copy", "restored"], cwd=folder, check=True, timeout=LONG)
    for store in ("chatd.sqlite", "restored"):
        with Server(folder, "--schema=schema.json", f"--store=sqlite:{store}") as server, Raw(server.port) as bob:
            assert [fields_of(data) for data in bob.join()["data"]] == expected


def test_longest_message(folder):
    """The payload limit follows from the schema: the longest valid post fits, as a frame and as a body."""
    body = post(message=LONG_TEXT)
    assert len(body) > 96_000
    with Server(folder, "--schema=schema.json") as server, Raw(server.port) as ann:
        ann.join()
        ann.send(frame(TEXT, body.encode()))
        assert ann.json()["data"]["message"] == LONG_TEXT
        assert request(server, "POST", "/rooms/main/messages", body)[0] == 201
        assert ann.json()["data"]["message"] == LONG_TEXT
        assert request(server, "POST", "/rooms/main/messages", body.ljust(104_000))[0] == 413
        ann.send(frame(TEXT, body.encode().ljust(104_000)))
        assert ann.closed() == 1009
    with Server(folder, "--max-message=200", "--store=memory:") as server, Raw(server.port) as ann:
        ann.join()
        ann.send(frame(TEXT, post(message="x" * 200).encode()))
        assert ann.closed() == 1009


def test_reload(folder):
    """SIGHUP takes up a new schema, keeps the old one if the new may not be used, and old messages stay."""
    with Server(folder, "--schema=schema.json") as server, Raw(server.port) as ann:
        ann.join()
        ann.send(frame(TEXT, post(color="red").encode()))
        assert ann.json()["data"]["color"] == "red"
        (folder / "schema.json").write_text("{}")
        server.terminate(signal.SIGHUP)
        server.log.wait(r"the old schema stays in force: /.*/schema\.json must have ")
        ann.send(frame(TEXT, post(color="blue").encode()))
        assert ann.json()["data"]["color"] == "blue"
        (folder / "schema.json").write_text(json.dumps(schema_with(size={"type": "integer"})))
        server.terminate(signal.SIGHUP)
        server.log.wait(r"read the schema in /.*/schema\.json$")
        ann.send(frame(TEXT, post(color="red").encode()))
        assert ann.json()["message"] == 'Validation error: "color" is not allowed'
        ann.send(frame(TEXT, post(size=7).encode()))
        assert ann.json()["data"]["size"] == 7
        ann.send(frame(TEXT, b'{"type":"history","limit":3}'))
        assert [fields_of(data) for data in ann.json()["data"]] == [{"color": "red"}, {"color": "blue"}, {"size": 7}]
        assert "size" in request(server, "GET", "/asyncapi.json")[1]["components"]["schemas"]["Posted"]["properties"]
        assert request(server, "POST", "/rooms/main/messages", " " * 20_000)[0] == 413


def test_served_documents_describe_the_messages(folder):
    """Each is complete in itself, and what the server sends fits it."""
    with Server(folder, "--schema=schema.json") as server, Raw(server.port) as ann:
        ann.join()
        ann.send(frame(TEXT, post(**EXTRA).encode()))
        message = ann.json()
        asyncapi, openapi = (request(server, "GET", f"/{name}api.json")[1] for name in ("async", "open"))
    for document in (asyncapi, openapi):
        assert '"./' not in json.dumps(document)
        assert "100 KiB" in json.dumps(document)
    payload = asyncapi["components"]["messages"]["post"]["payload"]
    assert payload["properties"].keys() == {*EXAMPLE["properties"], "label", "replaces"}
    assert openapi["paths"]["/rooms/{name}/messages"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ] == (payload)
    schema = {"$ref": "#/components/schemas/Message", "components": asyncapi["components"]}
    assert jsonschema.Draft202012Validator(schema).is_valid(message)
    message["data"]["color"] = "pink"
    assert not jsonschema.Draft202012Validator(schema).is_valid(message)


def test_schema_that_may_not_be_used_ends_the_start(folder):
    """The line names the file and the reason, and `--check` has the same."""
    (folder / "schema.json").write_text(json.dumps(schema_with(id={"type": "string"})))
    line = 'chatd: --schema: schema.json has a property "id", which is a name of the protocol: choose another\n'
    for options in ((), ("--check",)):
        done = run("--schema=schema.json", *options, cwd=folder)
        assert (done.returncode, done.stderr) == (1, line)


def test_client_and_load_tool(folder):
    """The client posts and receives the fields, and the load tool proves a server whose messages need some."""
    needed = schema_with(color={"enum": ["red"]}, message={"type": "string", "maxLength": 500})
    needed["required"] = [*needed["required"], "color"]
    needed["properties"]["username"] = {"type": "string", "maxLength": 60}
    (folder / "schema.json").write_text(json.dumps(needed))

    async def go(loop, url):
        client = Client(loop, url, Watch())
        client.start()
        posted = await client.post("ann", "hi", {"color": "red"})
        page = await client.page(limit=1)
        await client.stop()
        return posted, page

    with Server(folder, "--schema=schema.json") as server:
        posted, page = drive(lambda loop: go(loop, server.url))
        assert posted.id.number == 1, "the default seed does not fit, so the log begins empty"
        assert [entry.extra for entry in page.entries] == [{"color": "red"}]
        trial = [sys.executable, "-m", "chatd.load", server.url, "--clients=3", "--messages=30", "--cut=0"]
        for extra, code in ((["--extra", '{"color":"red"}'], 0), ([], 1)):
            done = subprocess.run(
                [*trial, *extra], env=environment(), capture_output=True, text=True, timeout=LONG, check=False
            )
            assert done.returncode == code, done.stderr
        assert '"color" is required' in done.stderr
