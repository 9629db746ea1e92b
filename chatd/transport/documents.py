"""The documents of the protocol as a server serves them: AsyncAPI and OpenAPI, with the schema of messages in force.

`schemas/` has them in files that refer to each other.  Here each is complete in itself, for tools that read one file.
"""

import importlib.resources
from http import HTTPStatus
from typing import Any, Final

import orjson
from twisted.web.http import Request

from chatd.transport.frames import MAX_MESSAGE, MESSAGE, Vocabulary
from chatd.transport.http import ChatResource, answer

NAMES: Final = "asyncapi.json", "openapi.json"
_OTHERS: Final = "join.json", "leave.json", "page.json", "remove.json", "token.json", "typing.json"
_SIZE: Final = "a message of more than {size}", "The content is longer than {size}"
"""How the documents mention the payload limit."""


class _Own(dict[str, Any]):
    """A part of an operator's schema, which has no references; what looks like one is a value, as in a `const`."""


def _own(schema: Any) -> Any:
    return _Own(schema) if isinstance(schema, dict) else schema


def _load(name: str) -> Any:
    return orjson.loads(importlib.resources.files("chatd").joinpath(f"schemas/{name}").read_bytes())


def compose(vocabulary: Vocabulary) -> dict[str, bytes]:
    """Return the documents by name."""
    size = vocabulary.max_bytes
    files = {name: _load(name) for name in (*NAMES, *_OTHERS)} | {"message.json": vocabulary.message.schema}
    files["openapi.json"]["servers"] = [{"url": "/", "description": "This server."}]
    if vocabulary.message is not MESSAGE:
        _extend(files)
    return {name: _with_size(orjson.dumps(_whole(files, name, name, files[name])), size) for name in NAMES}


def _extend(files: dict[str, Any]) -> None:
    """Let the messages of the server have the fields of an operator's schema, and those of an earlier one."""
    fields = files["message.json"]["properties"]
    for name in ("join.json", "typing.json"):
        files[name]["properties"]["username"] = _own(fields["username"])
    posted = files["asyncapi.json"]["components"]["schemas"]["Posted"]
    own = {
        name: _own(field) for name, field in fields.items() if name not in ("username", "message", "label", "replaces")
    }
    posted["properties"] |= own
    posted["additionalProperties"] = True
    posted["description"] += " Messages from before a change of the schema may not fit it."


def _whole(files: dict[str, Any], document: str, name: str, value: Any) -> Any:
    """Return a value of the file `name` without references to other files than the document."""
    if isinstance(value, list):
        return [_whole(files, document, name, item) for item in value]
    if not isinstance(value, dict) or isinstance(value, _Own):
        return value
    if not isinstance(value.get("$ref"), str):
        return {key: _whole(files, document, name, item) for key, item in value.items()}
    file, _, pointer = value["$ref"].partition("#")
    target = file.removeprefix("./") or name
    if target == document:
        return {"$ref": f"#{pointer}"}
    found = files[target]
    for key in pointer.split("/")[1:]:
        found = found[key]
    return found if target == "message.json" else _whole(files, document, target, found)


def _with_size(document: bytes, max_bytes: int) -> bytes:
    """Return a document that states the payload limit in force."""
    for words in _SIZE:
        usual, now = (words.format(size=_kib(size)).encode() for size in (MAX_MESSAGE, max_bytes))
        document = document.replace(usual, now)
    return document


def _kib(size: int) -> str:
    return f"{size} bytes" if size % 1024 else f"{size >> 10} KiB"


class Documents:
    """The documents for a vocabulary, each as a resource of the web site; they are there after the first refresh()."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._texts: dict[str, bytes] = {}
        self.resources = {name: _Served(self, name) for name in NAMES}

    def refresh(self) -> None:
        """Compose the documents again, because the vocabulary has changed."""
        self._texts = compose(self._vocabulary)

    def text(self, name: str) -> bytes:
        """Return a document."""
        return self._texts[name]


class _Served(ChatResource):
    def __init__(self, documents: Documents, name: str) -> None:
        super().__init__()
        self._documents, self._name = documents, name

    def render_GET(self, request: Request) -> bytes:
        """Answer with the document, which every page may read."""
        return answer(request, HTTPStatus.OK, self._documents.text(self._name), access_control_allow_origin="*")
