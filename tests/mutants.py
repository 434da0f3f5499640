"""Breaks the program on purpose, once for each row of mutants.toml, and looks whether the tests notice.

python tests/mutants.py                 # all of them (make mutants); ends with 1 where a mutant survives
python tests/mutants.py --only optim    # those of the files whose path holds the word

Every mutant is one text of a source file replaced by another, in a copy of the project, and is killed by the first test
that fails. A text that the source no longer holds exactly once, and tests that fail without any mutant, end the run: a
table that rots must not look like a suite that sees everything.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
LIMIT_S = 300  # a mutant that makes a test hang is killed by it, too
PASSED, FAILED, NONE_CHOSEN, HANGS = 0, 1, 5, 124  # exit codes: pytest's, and what we call a run that hangs


@dataclass(frozen=True)
class Mutant:
    """``old`` replaced by ``new`` in ``path``; the ``tests`` should fail. ``lives`` says why none can."""

    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    ranks: int
    lives: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.old.strip()!r} -> {self.new.strip()!r}"


def read(table: Path) -> list[Mutant]:
    """Return the mutants of the table. Raises SystemExit naming those that no longer fit the sources."""
    mutants = []
    for group in tomllib.loads(table.read_text())["group"]:
        where = (tuple(group["tests"].split()), group.get("ranks", 1))
        mutants += [Mutant(group["path"], old, new, *where) for old, new in group.get("killed", [])]
        mutants += [Mutant(group["path"], old, new, *where, why) for old, new, why in group.get("lives", [])]
    unfit = []
    for mutant in mutants:
        count = (ROOT / mutant.path).read_text().count(mutant.old)
        if count != 1 or mutant.old == mutant.new:
            unfit.append(f"{mutant}: the old text occurs {count} times, once is needed")
    if unfit:
        sys.exit("\n".join([*unfit, f"{len(unfit)} rows of {table.name} do not fit the sources: mend the table"]))
    return mutants


def outcome(tests: tuple[str, ...], ranks: int, mutant: Mutant | None = None) -> tuple[int, str]:
    """Return pytest's exit code for ``tests`` in a copy of the project with the mutant in it, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for part in ("benchmarks", "cnnmpi", "docs", "tests"):
            shutil.copytree(ROOT / part, folder / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant:
            path = folder / mutant.path
            path.write_text(path.read_text().replace(mutant.old, mutant.new))
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        for_ranks = [*pytest, "--with-mpi", "-m", "mpi"]
        if ranks > 1:
            mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
            return run([mpirun or "mpirun", "-n", str(ranks), *for_ranks], folder)
        code, output = run(pytest, folder)
        if code in (PASSED, NONE_CHOSEN):  # what the tests for ranks say, on one
            of_ranks, more = run(for_ranks, folder)
            code, output = (code if of_ranks == NONE_CHOSEN else of_ranks), output + more
        return code, output


def run(command: list[str], folder: Path) -> tuple[int, str]:
    """Return the exit code of a command in ``folder``, which its temporary files go to as well, and what it printed."""
    name = str(folder)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    job = subprocess.Popen(command, cwd=folder, env=os.environ | {"TMPDIR": name}, start_new_session=True, **pipes)
    try:
        output, _ = job.communicate(timeout=LIMIT_S)
        return job.returncode, output
    except subprocess.TimeoutExpired:
        kill_all(name)
        return HANGS, job.communicate()[0]
    finally:
        kill_all(name)


def kill_all(folder: str) -> None:
    """Kill all processes whose temporary files go to ``folder``: ranks outlive their mpirun at times."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == folder:
                process.kill()


def main() -> int:
    """Try the table's mutants; return 0 if what was to be killed was killed, and what was to live lived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a word in the path of the source file")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="mutants at a time")
    args = parser.parse_args()
    mutants = [mutant for mutant in read(TABLE) if args.only in mutant.path]
    begun, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        sets = sorted({(mutant.tests, mutant.ranks) for mutant in mutants})
        for (tests, _), (code, output) in zip(sets, pool.map(lambda s: outcome(*s), sets), strict=True):
            if code:
                sys.exit(f"{output[-3000:]}\n{' '.join(tests)}: fails without any mutant")
        results = pool.map(lambda mutant: outcome(mutant.tests, mutant.ranks, mutant), mutants)
        for mutant, (code, output) in zip(mutants, results, strict=True):
            killed = code in (FAILED, HANGS) or (mutant.ranks > 1 and code != 0)
            if killed == bool(mutant.lives) or (code and not killed):
                wrong += 1
                what = "killed, not alive" if killed else f"pytest ended with {code}" if code else "SURVIVED"
                print(f"{what}: {mutant}")
                print(output[-2000:] if code and not killed else "", end="", flush=True)
    lives = sum(bool(mutant.lives) for mutant in mutants)
    print(
        f"{len(mutants)} mutants: {lives} expected to live, {wrong} not as expected, the others killed; "
        f"{time.monotonic() - begun:.0f} s"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
