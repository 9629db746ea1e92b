"""The systemd units of the project, as text and as systemd-analyze sees them."""

import subprocess

from support.booted import UNITS
from support.servers import LONG, environment, need


def unit(name):
    """Return the settings of a unit: the values of each, in order."""
    settings = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(key, []).append(value)
    return settings


def analyze(*arguments):
    """Run `systemd-analyze`; return its output and its exit status."""
    result = subprocess.run(
        [need("systemd-analyze"), *arguments],
        env=environment(SYSTEMD_COLORS="0", SYSTEMD_EMOJI="0"),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    return result.stdout + result.stderr, result.returncode
