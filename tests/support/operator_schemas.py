"""Schemas of messages that an operator may write."""

import json
import re

from support.servers import ROOT

_PAGE = (ROOT / "docs" / "operations.md").read_text("utf-8")
EXAMPLE_TEXT = re.search(r"## Messages of your own shape.*?```json\n(.*?)```", _PAGE, re.DOTALL)[1]
EXAMPLE = json.loads(EXAMPLE_TEXT)
"""The example of the documentation."""


def schema_with(**fields):
    """Return a small schema with these fields besides username and message, or in place of them."""
    text = {"type": "string", "maxLength": 30}
    return {
        "type": "object",
        "properties": {"username": text, "message": text, **fields},
        "required": ["username", "message"],
        "additionalProperties": False,
    }
