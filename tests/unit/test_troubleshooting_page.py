"""The words that docs/troubleshooting.md quotes are words of the code."""

import ast
import functools
import re

import pytest
from support.needs import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"
QUOTES = 80
"""The page has at least so many quotations.  With fewer, this file does not find them."""


def literal(node):
    """Return a string of the code, with … for what varies in it; None for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
        text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
        return re.sub(r"\{\w+(:[^}]*)?\}|%[bds]", VARIES, text)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or VARIES for part in node.values)
    return None


def strings(code):
    """Return the strings of a file of Python, without its docstrings."""
    nodes = list(ast.walk(ast.parse(code)))
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
    return [text for node in nodes if node not in docstrings and (text := literal(node))]


@functools.cache
def words():
    """Return a line for each string of the server and of scripts/moderate, and the script that installs chatd."""
    scripts = ROOT / "scripts"
    code = [*(ROOT / "chatd").rglob("*.py"), scripts / "moderate", scripts / "adminport.py"]
    found = [text.replace("\n", " ") for path in code for text in strings(path.read_text("utf-8"))]
    return "\n".join([*found, (ROOT / "scripts" / "venv").read_text("utf-8")])


def quotations(page):
    """Return the code in the first cell of each row of each table, without the heads of the tables."""
    rows = re.findall(r"^\| (.*?) \| (?!.*\n\|---)", page, re.MULTILINE)
    return [quotation for row in rows for quotation in re.findall(r"`([^`]+)`", row)]


def unknown(page):
    """Return the quotations that are no part of one string of the code."""
    patterns = {one: ".*".join(re.escape(part) for part in one.split(VARIES)) for one in quotations(page)}
    return [one for one, pattern in patterns.items() if not re.search(pattern, words())]


def test_quoted_words_are_in_the_code():
    """Each quotation of the page is in a string of the code, in which anything can stand for …."""
    page = PAGE.read_text("utf-8")
    assert len(quotations(page)) >= QUOTES
    assert unknown(page) == []


@pytest.mark.parametrize(
    "quotation", ["cannot hear on …", "… is in use by some chatd", "too fast: …", "too slow: recon…x"]
)
def test_words_that_are_not_in_the_code(quotation):
    """Words that the code lacks are reported, whether they are the page's only ones or beside others."""
    row = f"| close 1013, `too slow: reconnect`, `{quotation}` | cause | `remedy` |\n"
    assert unknown(f"| you see | cause | remedy `x y z` |\n|---|---|---|\n{row}") == [quotation]


def test_docstrings_are_not_quoted():
    """Words that only a docstring has are not what people see, and each piece of a string is."""
    assert strings('"""Said."""\nclass A:\n    b = f"a {c} d"\n    """Said."""\n') == ["a … d", "a ", " d"]
