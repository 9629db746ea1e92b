"""The JSON Schemas of Kubernetes, from a package of PyPI that is downloaded once; none of its code runs."""

import functools
import json
import re
import sys
import zipfile

import jsonschema
from referencing import Registry, Resource
from support.booted import kept, succeed
from support.servers import ROOT, missing

LOCK = ROOT / "tests" / "kubernetes.txt"
FOLDER = "kubernetes_validate/kubernetes-json-schema"


@functools.cache
def archive():
    """Return the open wheel of the package."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    pip += ["--require-hashes", f"--requirement={LOCK}"]

    def make(folder):
        try:
            succeed(*pip, f"--dest={folder}")
        except AssertionError as error:
            missing(f"{LOCK.name} cannot be downloaded: {str(error)[-500:]}")

    (wheel,) = kept("kubernetes", make, LOCK.read_text()).glob("*.whl")
    return zipfile.ZipFile(wheel)


def versions():
    """Return the versions of Kubernetes that the package knows, such as v1.37.0, oldest first."""
    found = {name.split("/")[2].removesuffix("-local-strict") for name in archive().namelist() if "-strict/" in name}
    return sorted(found, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


@functools.cache
def definitions(version):
    """Return what the schemas of a version refer to."""
    text = archive().read(f"{FOLDER}/{version}-local-strict/_definitions.json")
    return Resource.from_contents(json.loads(text))


def schema(version, document):
    """Return the schema of a document, which allows no field that Kubernetes does not know."""
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", document["apiVersion"])
    name = f"{FOLDER}/{version}-local-strict/{document['kind'].lower()}-{group}.json"
    if name not in archive().namelist():
        return {"enum": [f"a kind of {document['apiVersion']}"]}
    return json.loads(archive().read(name))


def faults(version, documents):
    """Return a line for each fault of documents in a version of Kubernetes."""
    registry = definitions(version) @ Registry()
    return [
        f"{document['kind']}: {error.json_path}: {error.message}"
        for document in documents
        for error in jsonschema.Draft202012Validator(schema(version, document), registry=registry).iter_errors(document)
    ]
