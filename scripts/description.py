"""The hook of Hatch that makes the description of the package from README.md.

Package indexes show the description beside no other file, so a relative link leads nowhere there.
"""

# ruff: noqa: INP001 -- Hatch loads this file by its path

import pathlib
import re
from typing import Any, Final

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE: Final = re.compile(r"<picture>.*?</picture>\n*", re.DOTALL)
_LINK: Final = re.compile(r"\[([^][]+)\]\((?![a-z]+:)[^)\s]+\)")


def describe(readme: str) -> str:
    """Return a page in Markdown without its pictures; of relative links it keeps only the words."""
    return _LINK.sub(r"\1", _PICTURE.sub("", readme))


class DescriptionHook(MetadataHookInterface):
    """The hook, as Hatch calls it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the description to the metadata of the project."""
        text = pathlib.Path(self.root, "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": describe(text)}
