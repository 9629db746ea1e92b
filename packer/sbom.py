"""Write the packages of a Python environment as a CycloneDX document, with the hashes of wheels in some folders."""
# ruff: noqa: INP001 -- a program of its own

import datetime as dt
import hashlib
import importlib.metadata
import json
import pathlib
import re
import sys
import uuid
from typing import Any


def normal(name: str) -> str:
    """Normalize a name as PyPI does."""
    return re.sub(r"[-_.]+", "-", name).lower()


wheels = {}
for folder in sys.argv[1:]:
    for wheel in pathlib.Path(folder).glob("*.whl"):
        wheels[normal(wheel.name.split("-")[0])] = hashlib.sha256(wheel.read_bytes()).hexdigest()

components = []
for found in importlib.metadata.distributions():
    name = normal(found.metadata["Name"])
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": f"pkg:pypi/{name}@{found.version}",
        "name": name,
        "version": found.version,
        "purl": f"pkg:pypi/{name}@{found.version}",
    }
    if name in wheels:
        component["hashes"] = [{"alg": "SHA-256", "content": wheels[name]}]
    if "License-Expression" in found.metadata:
        component["licenses"] = [{"expression": found.metadata["License-Expression"]}]
    components.append(component)
components.sort(key=lambda component: component["name"])

chatd = next(component for component in components if component["name"] == "chatd")
document = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "serialNumber": uuid.uuid4().urn,
    "version": 1,
    "metadata": {
        "timestamp": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "component": {**chatd, "type": "application"},
    },
    "components": [component for component in components if component is not chatd],
}
json.dump(document, sys.stdout, indent=1)
