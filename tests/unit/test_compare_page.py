"""Each claim of docs/compare.md has its source."""

import re

import pytest
from support.needs import ROOT

PAGE = ROOT / "docs" / "compare.md"
WITHOUT_SOURCE = {"—", "your code"}


def rows(page):
    """Return the cells of each row of the table, without its head."""
    table = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (.*)\|$", page, re.MULTILINE)]
    assert len({len(cells) for cells in table}) == 1
    return table[1:]


def unsourced(page):
    """Return the facts of the table that have no link, and the links that have no address."""
    facts = [(name, cell) for name, *cells in rows(page) for cell in cells if cell not in WITHOUT_SOURCE]
    addresses = set(re.findall(r"^\[([\w-]+)\]: https://", page, re.MULTILINE))
    named = re.findall(r"\]\[([\w-]+)\]", page)
    return [fact for fact in facts if "](" not in fact[1] and "][" not in fact[1]] + [
        name for name in named if name not in addresses
    ]


def test_each_claim_has_a_source():
    """Each cell about a system is a link, a dash or the reader's own work, and each address is used."""
    page = PAGE.read_text("utf-8")
    assert len(rows(page)) > 10
    assert unsourced(page) == []
    addresses = re.findall(r"^\[([\w-]+)\]: ", page, re.MULTILINE)
    assert sorted(addresses) == sorted(set(re.findall(r"\]\[([\w-]+)\]", page)))


@pytest.mark.parametrize(
    ("cell", "found"), [("faster", [("speed", "faster")]), ("[faster][x-none]", ["x-none"]), ("—", [])]
)
def test_claim_without_a_source_is_found(cell, found):
    """A cell without a link, and a link without an address, are reported."""
    page = f"| | chatd | Other |\n|---|---|---|\n| speed | [fast](performance.md) | {cell} |\n"
    assert unsourced(page) == found
