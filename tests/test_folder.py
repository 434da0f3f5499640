"""The folder of a run: only what a run wrote is moved aside, whatever the folder is, and a crash loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train.folder import BOARD, KEPT, WRITTEN, RunFolder, kept_name

pytestmark = pytest.mark.mpi_skip
FILES = [f"{name}/file" if name in (BOARD, KEPT) else name for name in WRITTEN]


def begin(path: Path, config: str = "lr = 0.5\n", fresh: bool = True) -> list[str]:
    """Open ``path`` for a run, close it, and return what was said."""
    said: list[str] = []
    run = RunFolder(path, Ranks())
    try:
        run.open(fresh, config, said.append)
    finally:
        run.close()
    return said


def write_run(path: Path, text: str = "old") -> None:
    for name in (BOARD, KEPT):
        (path / name).mkdir()
    for name in FILES:
        (path / name).write_text(f"{text} {name}")


def contents(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_the_working_directory_keeps_all_that_no_run_wrote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = {"train.py": "print()", "data/cifar10.h5": "images", ".git/HEAD": "main", "lock": "mine", "notes.h5": "1"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert begin(Path()) == []
    for number in (1, 2):
        write_run(tmp_path, f"run {number}")
        (said,) = begin(Path())
        assert f"was moved to {tmp_path}/old-{number}" in said
    moved = {f"old-{number}/{name}": f"run {number} {name}" for number in (1, 2) for name in FILES}
    assert contents(tmp_path) == mine | moved | {"config.toml": "lr = 0.5\n"}


def test_a_resumed_run_stays_where_it_is(tmp_path):
    write_run(tmp_path)
    assert begin(tmp_path, fresh=False) == []
    assert {*contents(tmp_path)} == {*FILES, "lock"} and contents(tmp_path)["config.toml"] == "lr = 0.5\n"


def test_somebodys_settings_are_not_overwritten(tmp_path):
    (tmp_path / "config.toml").write_text("# mine\nlr = 0.5\n")
    begin(tmp_path)
    assert contents(tmp_path)["old-1/config.toml"] == "# mine\nlr = 0.5\n"
    begin(tmp_path)
    assert not (tmp_path / "old-2").exists(), "what a run that never began has left is used again"


@pytest.mark.fault
@pytest.mark.parametrize("moved", range(len(WRITTEN)))
def test_a_move_that_is_cut_short_is_completed_by_the_next_run(moved, tmp_path, monkeypatch):
    write_run(tmp_path)
    rename, left = Path.rename, moved

    def until_it_dies(path, target):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", until_it_dies)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path)
    monkeypatch.undo()
    here = {*contents(tmp_path)}
    assert "last.h5" in here or "previous.h5" not in here, "--resume must not take the older one for the newest"
    begin(tmp_path)
    assert contents(tmp_path) == {f"old-1/{name}": f"old {name}" for name in FILES} | {
        "lock": "", "config.toml": "lr = 0.5\n"
    }  # fmt: skip


def test_a_folder_of_that_name_that_is_somebodys_is_left_alone(tmp_path):
    write_run(tmp_path)
    (tmp_path / "old-1").mkdir()
    (tmp_path / "old-1" / "letter.txt").write_text("dear")
    (tmp_path / "old-2").write_text("a file")
    (tmp_path / "old-3").symlink_to("nowhere")
    begin(tmp_path)
    assert (tmp_path / "old-4" / "last.h5").exists() and len([*(tmp_path / "old-1").iterdir()]) == 1


def test_settings_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("old")

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match=r"config\.toml.*No space left"):
        begin(tmp_path, fresh=False)
    assert (tmp_path / "config.toml").read_text() == "old" and not [*tmp_path.glob(".*")]


def test_a_path_that_is_not_unicode(tmp_path):
    path = tmp_path / os.fsdecode(b"run\xff")
    begin(path, f'out = "{path}"\n')
    assert os.fsencode(path) in (path / "config.toml").read_bytes()


def test_links_lead_to_the_folder_and_what_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "link").symlink_to("real")
    begin(tmp_path / "link")
    assert (tmp_path / "real" / "config.toml").exists()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "lock").mkdir(parents=True)
    for name in ("loop", "file", "file/below", "taken", "x" * 300):
        with pytest.raises(UserError, match=r"^--out .* cannot be used: ") as error:
            begin(tmp_path / name)
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


IN_A_MOUNT = """
mount -t tmpfs tmpfs "$1" || exit 99
mkdir "$1/runs" && mount -t tmpfs tmpfs "$1/runs" && mount -o remount,ro "$1" || exit 99
shift; exec "$@"
"""


@pytest.mark.fault
def test_a_mounted_volume_below_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    code = (
        "from pathlib import Path; from cnnmpi.distributed import Ranks; from cnnmpi.train.folder import RunFolder\n"
        f"path = Path({str(tmp_path / 'runs')!r})\n"
        "(path / 'last.h5').write_text('old')\n"
        "RunFolder(path, Ranks()).open(True, '', print)\n"
        "assert (path / 'old-1/last.h5').read_text() == 'old' and not (path / 'last.h5').exists()"
    )
    command = ["unshare", "--mount", "sh", "-c", IN_A_MOUNT, "sh", str(tmp_path), sys.executable, "-c", code]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("only root may mount here")
    assert result.returncode == 0 and "was moved to" in result.stdout, result.stderr


@pytest.mark.fault
def test_a_checkpoint_that_cannot_be_kept_costs_no_earlier_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, Ranks())

    def content() -> tuple[dict, dict]:
        return {"model/w": np.zeros(3, np.float32)}, {"step": 1}

    for epoch in (1, 2):
        folder.keep(kept_name(epoch), content, 2)

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        with pytest.raises(UserError, match="No space left"):
            folder.keep(kept_name(3), content, 2)
    assert [path.name for path in sorted((tmp_path / "kept").iterdir())] == ["epoch-0001.h5", "epoch-0002.h5"]
    (tmp_path / "kept" / "epoch-notes.h5.txt").write_text("mine")
    for epoch in (9999, 10000):  # by number, not by name
        folder.keep(kept_name(epoch), content, 2)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "epoch-10000.h5", "epoch-9999.h5", "epoch-notes.h5.txt"
    ]  # fmt: skip
