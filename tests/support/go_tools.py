"""Programs of Go modules that tests run, built once from tests/tools."""

import os
import re
import subprocess

from support.booted import kept
from support.needs import ROOT, missing, need

FOLDER = ROOT / "tests" / "tools"


def go_tool(name):
    """Return the path of the program whose module is in that folder of tests/tools."""
    need("go")
    module = FOLDER / name
    recipe = [path.read_text() for path in sorted(module.iterdir())]

    def make(folder):
        package = re.search('^import _ "(.*)"$', (module / "tools.go").read_text(), re.MULTILINE)[1]
        build = ["go", "build", "-mod=readonly", "-trimpath", f"-o={folder}/{name}", package]
        result = subprocess.run(
            build, cwd=module, env=os.environ | {"CGO_ENABLED": "0"}, capture_output=True, text=True, check=False
        )
        if result.returncode:
            missing(f"{name} could not be built: {result.stderr[-500:]}")

    return kept(name, make, *recipe) / name
