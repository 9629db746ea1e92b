"""The places that the log goes to."""

import os
import pathlib
import pty
import select
import socket
import stat

import pytest

from chatd.operate import sinks
from chatd.operate.sinks import ROTATE_BYTES, ROTATED_FILES, RotatingFile, Stream, Syslog, standard_output, to_path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "log"


@pytest.fixture(autouse=True)
def _closed(monkeypatch):
    """Close every sink after the test."""
    made = []
    for kind in (RotatingFile, Stream):
        begin = kind.__init__

        def init(self, *arguments, begin=begin):
            begin(self, *arguments)
            made.append(self)

        monkeypatch.setattr(kind, "__init__", init)
    yield
    for sink in made:
        sink.close()


def test_file_is_appended_to(file):
    file.write_bytes(b"old\n")
    sink = to_path(str(file))
    assert sink.write(b"new\n") == 4
    assert file.read_bytes() == b"old\nnew\n"


def test_file_is_reopened_under_its_name(file):
    """After another program has moved the file, the log begins a new one with the same mode."""
    sink = RotatingFile(file)
    file.chmod(0o640)
    sink.write(b"one")
    file.rename(file.with_name("moved"))
    sink.write(b"two")
    old = os.umask(0o077)
    sink.reopen()
    os.umask(old)
    sink.write(b"three")
    assert file.with_name("moved").read_bytes() == b"onetwo"
    assert file.read_bytes() == b"three"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_reopened_file_of_another_program_keeps_its_mode(file):
    """A program that moves the file may create the next one, with a mode of its own."""
    sink = RotatingFile(file)
    file.rename(file.with_name("moved"))
    file.touch(0o600)
    sink.reopen()
    sink.write(b"one")
    assert file.read_bytes() == b"one"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_old_file_stays_if_it_cannot_be_reopened(file):
    sink = RotatingFile(file)
    file.rename(file.with_name("moved"))
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        sink.reopen()
    sink.write(b"one")
    assert file.with_name("moved").read_bytes() == b"one"


def test_rotation_on_request(file):
    """The old files are numbered, the newest with 1."""
    sink = RotatingFile(file)
    for text in (b"one", b"two", b"three"):
        sink.write(text)
        sink.rotate()
    assert {one.name: one.read_bytes() for one in file.parent.iterdir()} == {
        "log": b"",
        "log.1": b"three",
        "log.2": b"two",
        "log.3": b"one",
    }


def test_rotated_files_are_limited(file):
    """The oldest file is removed; files that chatd did not number stay."""
    other = file.with_name(f"log.{ROTATED_FILES + 1}")
    other.touch()
    sink = RotatingFile(file)
    for _ in range(ROTATED_FILES + 3):
        sink.rotate()
    assert len([*file.parent.iterdir()]) == 1 + ROTATED_FILES + 1
    assert other.exists()


def test_full_file_is_rotated(file, monkeypatch):
    """A file is rotated at its limit, unless another program has truncated it."""
    monkeypatch.setattr(sinks, "ROTATE_BYTES", 8)
    sink = RotatingFile(file)
    sink.write(b"12345678")
    os.truncate(file, 0)
    sink.write(b"one")
    sink.write(b"45678")
    sink.write(b"two")
    assert file.read_bytes() == b"two"
    assert file.with_name("log.1").read_bytes() == b"one45678"
    assert not file.with_name("log.2").exists()


def test_file_that_cannot_be_rotated_continues(file, monkeypatch):
    """Without the right to rotate, the log continues in the old file."""
    monkeypatch.setattr(sinks, "ROTATE_BYTES", 8)
    sink = RotatingFile(file)
    file.with_name("log.9").touch()
    (file.with_name("log.10") / "full").mkdir(parents=True)
    for text in (b"12345678", b"one", b"two"):
        sink.write(text)
    assert file.read_bytes() == b"12345678onetwo"


def test_size_of_the_log_is_bounded():
    assert ROTATE_BYTES * (ROTATED_FILES + 1) < 256 << 20


def fill(sink, data=b"x" * 4096):
    """Write until the sink takes no more."""

    def endless():
        while True:
            sink.write(data)

    with pytest.raises(BlockingIOError):
        endless()


@pytest.mark.parametrize("shared", [False, True])
def test_full_pipe_does_not_block(shared, monkeypatch):
    """A pipe whose reader does not read refuses more, also if it cannot be opened again, and stays in its mode."""
    reading, writing = os.pipe()
    if shared:
        monkeypatch.setattr("os.open", lambda *_: (_ for _ in ()).throw(PermissionError))
    sink = standard_output(writing)
    assert sink.write(b"one\n") == 4
    fill(sink)
    assert os.get_blocking(writing)
    assert os.read(reading, 4) == b"one\n"
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        sink.write(b"two\n")
    os.close(writing)


def test_full_terminal_does_not_block():
    """A terminal that is stopped refuses more."""
    other, terminal = pty.openpty()
    fill(standard_output(terminal))
    assert os.get_blocking(terminal)
    os.close(other)
    os.close(terminal)


def test_full_socket_does_not_block():
    """A socket, such as that of systemd's journal, refuses more when its reader does not read."""
    one, other = socket.socketpair()
    fill(standard_output(one.fileno()))
    assert one.getblocking()
    one.close()
    other.close()


def test_standard_output_in_a_file(file):
    with file.open("wb") as output:
        sink = standard_output(output.fileno())
        sink.write(b"one")
        sink.rotate()
        sink.reopen()
        sink.write(b"two")
    assert file.read_bytes() == b"onetwo"


def test_closed_standard_output(monkeypatch):
    """Another file may have the descriptor of standard output, so the log goes nowhere."""
    reading, writing = os.pipe()
    monkeypatch.setattr("sys.__stdout__", None)
    assert standard_output(writing).write(b"one") == 3
    os.close(writing)
    assert os.read(reading, 9) == b""
    os.close(reading)


def test_log_file_that_is_a_pipe(file):
    """--logfile may name a pipe that has a reader."""
    os.mkfifo(file)
    with pytest.raises(OSError, match="No such device"):
        to_path(str(file))
    reading = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    sink = to_path(str(file))
    sink.write(b"one")
    assert os.read(reading, 9) == b"one"
    fill(sink)
    os.close(reading)


def test_syslog_gets_a_datagram_for_each_line(tmp_path):
    """Lines are sent one by one, without waiting, and again to a syslog that was restarted."""
    address = str(tmp_path / "log")
    with pytest.raises(FileNotFoundError):
        Syslog(address)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            daemon.bind(address)
            sink = Syslog(address)
            data = b"<14>x: one\n<14>x: two\n"
            while data:
                data = data[sink.write(data) :]
            assert [daemon.recv(99) for _ in range(2)] == [b"<14>x: one", b"<14>x: two"]
            fill(sink, b"x" * 1000 + b"\n")
            assert select.select([daemon], [], [], 0)[0]
        pathlib.Path(address).unlink()
        with pytest.raises(OSError, match="No such file"):
            sink.write(b"three\n")
