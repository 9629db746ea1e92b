"""The files around the code: links between the documents, Dependabot, hooks and issue forms."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import pytest
from support.servers import LONG, ROOT, missing, need
from support.workflow_rules import read

ZIZMOR = pathlib.Path(sys.executable).with_name("zizmor")
MANIFESTS = {
    "pip": "*requirements*.txt",
    "npm": "package.json",
    "gomod": "go.mod",
    "docker-compose": "compose.yaml",
}
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@functools.cache
def tracked():
    """Return the files that git keeps, or would."""
    listing = [need("git"), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, timeout=LONG, check=True).stdout
    return [ROOT / name for name in sorted({*names.split("\0")} - {""}) if (ROOT / name).exists()]


# Links


def prose(text):
    """Markdown without its fenced blocks, and without code in its lines."""
    return re.sub(r"`[^`\n]+`", "`", re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text):
    """Return the anchors that GitHub makes of headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page, text):
    """Return the links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"[a-z]+:", link):
            continue
        known = anchors(text if target == page else target.read_text("utf-8")) if anchor and target.exists() else {""}
        if not target.exists() or anchor not in known:
            found.append(link)
    return found


def pictures(text):
    """Return the files of the pictures in a document."""
    found = re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    return {image or source for image, source in found}


def test_pictures_in_documents():
    """Each picture exists, is below 150 kB, and stands in a document."""
    pages = [path for path in tracked() if path.suffix == ".md"]
    shown = {(page.parent / name).resolve() for page in pages for name in pictures(page.read_text("utf-8"))}
    assert {path.name for path in shown if not path.exists()} == set()
    assert {path.name for path in tracked() if path.suffix == ".png"} - {path.name for path in shown} == set()
    assert {path.name for path in shown if path.stat().st_size >= 150_000} == set()


def test_every_link_in_a_document_leads_somewhere():
    pages = [path for path in tracked() if path.suffix == ".md"]
    assert len(pages) > 10
    assert {page.name: links for page in pages if (links := broken(page, page.read_text("utf-8")))} == {}


@pytest.mark.parametrize("link", ["docs/none.md", "README.md#none", "#none", "docs/protocol.md#coming-back"])
def test_broken_link_is_found(link):
    page = ROOT / "README.md"
    assert broken(page, f"# Here\n[here]({link}) [there](#here) [protocol](docs/protocol.md#resuming)\n") == [link]


# Dependabot, hooks and forms


def test_dependabot_watches_every_manifest():
    updates = {
        one["package-ecosystem"]: one for one in read((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    }
    assert updates.keys() == {"github-actions", *MANIFESTS}
    for ecosystem, pattern in MANIFESTS.items():
        one = updates[ecosystem]
        watched = {ROOT / folder.strip("/") for folder in one.get("directories", [one.get("directory")])}
        files = [path for path in tracked() if path.match(pattern)]
        assert watched >= {path.parent for path in files}, ecosystem
    for one in updates.values():
        assert one["schedule"] == {"interval": "weekly"}
        assert len(one["groups"]) == 1


def test_hooks_run_the_tools_of_the_checkout():
    """No hook comes from another repository, so a commit needs no network."""
    whole = read((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in whole["repos"]] == ["local"]
    hooks = whole["repos"][0]["hooks"]
    assert [hook["entry"].split()[0] for hook in hooks] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    assert {hook["language"] for hook in hooks} == {"system"}


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_issue_form_is_complete(path):
    """GitHub silently hides a form that lacks one of these."""
    form = read(path.read_text("utf-8"))
    assert form.keys() >= {"name", "description", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    names = [field["id"] for field in fields]
    assert len({*names}) == len(names)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_linter_accepts_dependabot_and_hooks():
    if not ZIZMOR.exists():
        missing("zizmor is not installed")
    command = [ZIZMOR, "--offline", "--no-config", "--strict-collection", "--no-exit-codes", "--format=json"]
    command += ["--collect=all", ROOT / ".github" / "dependabot.yml", ROOT / ".pre-commit-config.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=True)
    assert [one["ident"] for one in json.loads(result.stdout) if not one["ignored"]] == []
