"""The options of a server process: where their relative paths start."""

import json
import sqlite3
from contextlib import closing

from support.servers import run

SEED = [{"username": "ann", "message": "from the seed", "timestamp": "2024-10-20T12:30:00Z"}]


def test_relative_paths_with_another_folder(tmp_path):
    """--config and --seed start where twistd was started, and the path of a store at twistd's --rundir."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "seed.json").write_text(json.dumps(SEED))
    (tmp_path / "chatd.toml").write_text('seed = "seed.json"\nstore = "sqlite:store"\nadmin = []')
    # The store opens before the ports, one of which cannot be opened: the server has run when it ends.
    options = ("--config=chatd.toml", "--listen=unix:missing/socket")
    result = run(*options, cwd=tmp_path, flags=("-n", "--pidfile=", "--rundir=folder"))
    output = result.stdout + result.stderr
    assert (result.returncode, "cannot listen on unix:missing/socket" in output) == (1, True), output
    assert not (tmp_path / "store").exists()
    with closing(sqlite3.connect(folder / "store")) as store:
        assert store.execute("SELECT message FROM messages").fetchall() == [("from the seed",)]
