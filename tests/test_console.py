"""What commands print: any text through any encoding and into any pipe, and tables that lose nothing."""

import importlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from cnnmpi import console
from cnnmpi.__main__ import COMMANDS
from cnnmpi.__main__ import main as cnnmpi
from cnnmpi.data import synthetic, write_hdf5
from cnnmpi.train.terminal import Terminal


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """A folder whose name is not UTF-8, with data, a run on them, and a picture."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path_factory.mktemp("odd")) + b"/\xff \xe7\x8c\xab"))
    folder.mkdir()
    write_hdf5(folder / "data.h5", synthetic(train=40, test=20))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "é.png")
    return folder


@pytest.mark.mpi_skip  # it trains
@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_no_command_is_stopped_by_a_path_or_an_encoding(odd, monkeypatch, encoding):
    output = io.BytesIO(), io.BytesIO()
    for name, buffer in zip(("stdout", "stderr"), output, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
    out = odd / encoding
    run, data, gone = out / "last.h5", odd / "data.h5", odd / "é猫"
    for arguments, code in (
        (["train", "--data", data, "--out", out, "--epochs", "1", "--batch-size", "20", "--threads", "1"], 0),
        (["train", "--config", out / "config.toml", "--out", f"{out}2", "--max-steps", "1"], 0),
        (["train", "--resume", gone], 2),
        (["evaluate", run, "--data", data, "--threads", "1"], 0),
        (["evaluate", gone], 2),
        (["predict", run, odd / "é.png", gone], 0),
        (["checkpoint", "show", run], 0),
        (["checkpoint", "verify", run, gone], 1),
        (["checkpoint", "diff", run, gone], 2),
        (["data", "--archive", gone], 2),
        (["elastic", "--hosts", gone], 2),
        (["chaos", "--mpirun", gone], 2),
        (["chaos", "--mpirun", "a 'b"], 2),
        ([gone], 2),
    ):
        try:
            assert cnnmpi([str(word) for word in arguments]) == code
        except SystemExit as end:  # train's errors
            assert end.code == code
    sys.stderr.flush()
    printed, errors = (buffer.getvalue() for buffer in output)
    assert b"\\udcff" in printed and b"\\udcff" in errors and b"Traceback" not in errors
    assert errors.count(b"\n") == 11 + (1 + len(COMMANDS))  # one line each, predict's count, and the usage


def test_every_command_prepares_its_output(monkeypatch):
    class PreparedError(Exception):
        pass

    def prepare() -> None:
        raise PreparedError

    monkeypatch.setattr(console, "prepare", prepare)
    for module, _ in COMMANDS.values():
        with pytest.raises(PreparedError):
            importlib.import_module(module).main(["--help"])
    with pytest.raises(PreparedError):
        cnnmpi(["--help"])


@pytest.mark.parametrize("lines", [1, 100_000])  # fails in the last flush, and in the midst of printing
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(monkeypatch, capfd, lines):
    @console.command
    def main() -> int:
        print("line\n" * lines)
        return 0

    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:  # noqa: PTH123 - a descriptor
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main() == 141
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "")


def test_a_command_that_ends_by_itself_flushes_too(monkeypatch):
    @console.command
    def main() -> int:
        print("help")
        raise SystemExit(0)

    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main() == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device here")
def test_a_full_disk_is_told_in_one_line(monkeypatch, capfd):
    @console.command
    def main() -> int:
        print("line")
        return 0

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main() == 2
    monkeypatch.undo()
    assert capfd.readouterr() == ("", "cnnmpi: error: the output cannot be written: No space left on device\n")


def test_other_errors_and_exits_pass(capsys):
    def ending(error: BaseException):
        @console.command
        def main() -> int:
            raise error

        return main

    for error in (ValueError("a fault of ours"), FileNotFoundError(2, "No such file", "name"), SystemExit(3)):
        with pytest.raises(type(error)):
            ending(error)()
    assert ending(KeyboardInterrupt())() == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stream", [None, object(), io.StringIO()])
def test_streams_that_are_no_files_will_do(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream if stream is None else io.StringIO())
    monkeypatch.setattr(sys, "stderr", stream)
    assert console.command(lambda: 0)() == 0
    assert not console.is_terminal(stream)
    closed = io.StringIO()
    closed.close()
    assert not console.is_terminal(closed)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[2J\x9b", "\\x1b[2J\\x9b"),
        ("\udcff", "\\udcff"),
        ("\u202eevil\u2028", "\\u202eevil\\u2028"),  # turns what follows; ends a line
        ("e\u0301 猫 \u00a0\u3000😀", "e\u0301 猫 \u00a0\u3000😀"),
        ("\\n [red] :smile: {0} %s", "\\n [red] :smile: {0} %s"),
        (Path("a/b"), "a/b"),
    ],
)
def test_text_is_shown_as_it_is_but_for_what_terminals_obey(text, shown):
    assert console.printable(text) == shown


# -- tables ------------------------------------------------------------------------------------------------------------

HEAD, ROWS = ("name", "a", "bb", "ccc"), [("猫", 1, 22, 3), ("e\u0301x", 4444, 5, 6)]


def test_a_table_is_aligned_by_what_is_seen():
    assert console.table(HEAD, ROWS, 99).splitlines() == [
        "name     a  bb  ccc",
        "猫       1  22    3",  # two columns wide on a screen
        "e\u0301x    4444   5    6",  # an e and its accent are one
    ]


@pytest.mark.parametrize("width", [1, 10, 14, 19, 99])
def test_columns_without_room_go_below(width):
    text = console.table(HEAD, ROWS, width)
    blocks = [[line.split() for line in block.splitlines()] for block in text.split("\n\n")]
    for row, expected in enumerate((HEAD, *ROWS)):
        assert all(block[row][0] == expected[0] for block in blocks)
        assert [cell for block in blocks for cell in block[row][1:]] == [str(cell) for cell in expected[1:]]
    assert len(blocks) == {1: 3, 10: 3, 14: 2, 19: 1, 99: 1}[width]
    if width > 9:
        assert max(map(cell_len, text.splitlines())) <= width


def test_a_terminals_width_counts_and_a_pipes_does_not(monkeypatch):
    wide = console.table(["name", *map(str, range(200))], [["x", *range(200)]])
    assert wide.count("\n") == 1  # all columns in one line: nothing is lost in a pipe or a file
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "40")
    narrow = console.table(["name", *map(str, range(200))], [["x", *range(200)]])
    assert max(map(len, narrow.splitlines())) <= 40 and narrow.split().count("x") > 10
    assert [word for word in narrow.split() if word.isdecimal()].count("199") == 2


def test_a_table_without_rows_has_its_head():
    assert console.table(HEAD, []) == "name  a  bb  ccc"


# -- what a run shows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_prints_names_as_they_are(monkeypatch, capsys, terminal):
    monkeypatch.setattr("cnnmpi.train.terminal.is_terminal", lambda stream: terminal)
    shown = Terminal()
    shown.begin(0, 2)
    shown.line("a[/b] [red] :smile: \x1b[2J a\nb " + "x" * 200)
    shown.step("1/2", 1, 2, 0.5, 10)
    shown.close()
    out = capsys.readouterr().out
    assert "a[/b] [red] :smile: \\x1b[2J a\\nb " + "x" * 200 + "\n" in out
