"""A clean checkout, like a clone of this one."""

import shutil
import subprocess

from support.needs import ROOT, need


def copy_checkout(folder):
    """Copy to a new folder the files that git has, or would have after `git add`."""
    listing = [need("git"), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in sorted({*names} - {""}):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder
