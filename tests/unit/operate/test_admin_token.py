"""The token of the admin port: read at the start, and again when the server reloads."""

import pytest
from twisted.logger import capturedLogs, formatEvent

from chatd.operate.admin_token import AdminToken

TOKEN = "0123456789abcdef"


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


def test_token_is_the_text_of_the_file(file):
    """White space around it does not count."""
    assert AdminToken(file).value == TOKEN.encode()


def test_no_file_is_no_token():
    token = AdminToken(None)
    token.reload()
    assert token.value is None


@pytest.mark.parametrize(
    "content", [b"", b"short", b"0123456789 abcdef", b"\xff" * 20, "0123456789abcde\u00e9".encode()]
)
def test_file_without_a_token_is_refused(file, content):
    """The line names the remedy, and not what the file holds."""
    file.write_bytes(content)
    with pytest.raises(ValueError, match="--admin-token-file") as refused:
        AdminToken(file)
    assert str(file) in str(refused.value)
    assert "0123" not in str(refused.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="this user cannot read it: create it, or chown it"):
        AdminToken(tmp_path / "token")


def test_reload_takes_the_new_token(file):
    token = AdminToken(file)
    file.write_text(TOKEN[::-1])
    token.reload()
    assert token.value == TOKEN[::-1].encode()


def test_reload_keeps_the_old_token_if_there_is_no_new_one(file):
    token = AdminToken(file)
    file.unlink()
    with capturedLogs() as events:
        token.reload()
    assert token.value == TOKEN.encode()
    assert formatEvent(events[0]).startswith("the old token of the admin port stays: --admin-token-file ")
