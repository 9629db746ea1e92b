"""The served documents: complete in themselves, and with the schema of messages in force."""

import json

import jsonschema
import pytest
from support.operator_schemas import EXAMPLE_TEXT, schema_with
from support.servers import ROOT

from chatd.messages import Entry
from chatd.transport import frames
from chatd.transport.documents import NAMES, Documents, compose
from chatd.transport.frames import MAX_MESSAGE, MESSAGE, Vocabulary, payload
from chatd.transport.operator_schema import read

ENTRY = Entry(1, "ann", "x" * 8000, "2026-01-01T00:00:00.000Z", extra={"color": "red", "gone": 1})


@pytest.fixture
def vocabulary():
    found, vocabulary = read(EXAMPLE_TEXT.encode()), Vocabulary()
    vocabulary.use(found.form, found.max_bytes)
    return vocabulary


def walk(value):
    """Yield all objects in a value."""
    if isinstance(value, dict):
        yield value
        value = [*value.values()]
    if isinstance(value, list):
        for one in value:
            yield from walk(one)


def lookup(document, reference):
    assert reference.startswith("#/")
    for key in reference[2:].split("/"):
        document = document[key.replace("~1", "/")]
    return document


@pytest.mark.parametrize("name", NAMES)
def test_document_is_complete_in_itself(name, vocabulary):
    """Every reference leads to a place in it, with the standard messages and with those of an operator."""
    for document in (json.loads(compose(Vocabulary())[name]), json.loads(compose(vocabulary)[name])):
        references = [one["$ref"] for one in walk(document) if isinstance(one.get("$ref"), str)]
        assert references
        assert all(isinstance(lookup(document, reference), dict) for reference in references)


@pytest.mark.parametrize("reference", ["http://a.example/b", "page.json", "./page.json#/none", "#/none"])
def test_value_that_looks_like_a_reference(reference):
    """A value in an operator's schema is served as it is."""
    field = {"const": {"$ref": reference}, "default": {"$ref": reference}}
    found, vocabulary = read(json.dumps(schema_with(x=field)).encode()), Vocabulary()
    vocabulary.use(found.form, found.max_bytes)
    for name, document in compose(vocabulary).items():
        fields = [one["x"] for one in walk(json.loads(document)) if "x" in one]
        assert fields, name
        assert all(one == field for one in fields)


def test_standard_documents_are_those_of_the_project():
    """Without a schema of the operator's own, they say the same as the files."""
    served = json.loads(compose(Vocabulary())["asyncapi.json"])
    written = json.loads((ROOT / "schemas" / "asyncapi.json").read_text("utf-8"))
    assert served["components"]["messages"]["post"]["payload"] == MESSAGE.schema
    assert served["x-close-codes"] == written["x-close-codes"]
    assert served["components"]["schemas"]["Id"] == written["components"]["schemas"]["Id"]
    assert served["components"]["schemas"]["Posted"]["additionalProperties"] is False


def test_documents_have_the_fields_and_the_limit(vocabulary):
    documents = {name: json.loads(text) for name, text in compose(vocabulary).items()}
    asyncapi, openapi = (documents[name] for name in NAMES)
    post = asyncapi["components"]["messages"]["post"]["payload"]
    assert post == vocabulary.message.schema
    assert (
        openapi["paths"]["/rooms/{name}/messages"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        == post
    )
    assert asyncapi["x-close-codes"]["1009"]["reason"] == "a message of more than 100 KiB"
    assert openapi["components"]["responses"]["TooLarge"]["description"] == "The content is longer than 100 KiB."
    assert openapi["components"]["responses"]["HeadTooLarge"]["description"].endswith("is longer than 16 KiB.")
    message = {"$ref": "#/components/schemas/Message", "components": asyncapi["components"]}
    validator = jsonschema.Draft202012Validator(message)
    frame = json.loads(payload(frames.message_frame("k7Q2xe", ENTRY)))
    assert validator.is_valid(frame)
    frame["data"]["color"] = "pink"
    assert not validator.is_valid(frame)


def test_documents_change_with_the_vocabulary():
    vocabulary = Vocabulary()
    vocabulary.use(MESSAGE, 2000)
    documents = Documents(vocabulary)
    documents.refresh()
    assert b"longer than 2000 bytes" in documents.text("openapi.json")
    vocabulary.use(MESSAGE, MAX_MESSAGE)
    assert b"longer than 2000 bytes" in documents.text("openapi.json")
    documents.refresh()
    assert b"The content is longer than 16 KiB" in documents.text("openapi.json")
