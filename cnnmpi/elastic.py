"""Keep a run going: start mpirun, and start it again from the newest good checkpoint when ranks or hosts are lost.

python -m cnnmpi.elastic --ranks 4 -- --model smallresnet --out runs/a
python -m cnnmpi.elastic --ranks 4 -- flowers.py --out runs/a
python -m cnnmpi.elastic --hosts launch/hosts.txt --min-ranks 4 -- --out runs/a      # on the hosts that answer

What follows ``--`` is for cnnmpi.train, or is a script of your own that calls ``cnnmpi.fit``, and its arguments. The
result is that of an undisturbed run, to the bit.
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from cnnmpi import console
from cnnmpi.distributed import UserError, find_launcher, split_words
from cnnmpi.machine import usable_cores
from cnnmpi.train.code import Code
from cnnmpi.train.config import DEFAULTS, continued, parse, resolve
from cnnmpi.train.folder import find_checkpoint
from cnnmpi.train.jobs import Jobs

FINAL = {0: "done", 2: "refused", 75: "stopped on request, with a checkpoint", 130: "interrupted"}


@dataclass(frozen=True)
class Elastic:
    """Run cnnmpi.train under mpirun until it is done, on the hosts that still answer."""

    ranks: int = 0
    """Ranks to start; 0 takes one for each slot of the hosts, or core of this one, up to the shards of the run."""
    hosts: Path | None = None
    """A list of hosts, one a line: "name:slots" or "name slots=slots"."""
    min_ranks: int = 1
    """Give up when fewer ranks than this can be started."""
    max_restarts: int = 10
    """Give up after this many restarts."""
    probe: str = "ssh -o BatchMode=yes -o ConnectTimeout=5 {host} true"
    """Command that succeeds if a host answers."""
    mpirun: str = "mpirun"
    """The launcher, with any arguments of its own."""
    pause: float = 2.0
    """Seconds before a restart; the resource manager may need them."""


def read_hosts(path: Path) -> dict[str, int]:
    """Return {host: slots} of a host file of MPICH ("name:4") or Open MPI ("name slots=4"). Raises UserError."""
    hosts: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"--hosts {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([\w.-]+)(?::(\d+)|\s+slots=(\d+))?", text)
        if not match:
            raise UserError(f"--hosts {path}, line {number}: expected 'name', 'name:4' or 'name slots=4', got {text!r}")
        hosts[match[1]] = int(match[2] or match[3] or 1)
    if not hosts:
        raise UserError(f"--hosts {path} names no host")
    return hosts


def answering(hosts: dict[str, int], probe: str) -> dict[str, int]:
    """Return those of ``hosts`` for which the command ``probe`` succeeds within 30 seconds. Raises UserError."""
    words = split_words("--probe", probe)
    if not words:
        raise UserError("--probe is empty; expected a command that succeeds if a host answers")

    def answers(host: str) -> bool:
        command = [word.replace("{host}", host) for word in words]
        try:
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False

    with ThreadPoolExecutor(16) as pool:
        alive = list(pool.map(answers, hosts))
    return {host: slots for (host, slots), good in zip(hosts.items(), alive, strict=True) if good}


def launcher(config: Elastic, ranks: int, hosts: dict[str, int], folder: Path) -> list[str]:
    """Return the beginning of the command line: mpirun, the number of ranks, the hosts. Raises UserError."""
    command = [*find_launcher(config.mpirun), "-n", str(ranks)]
    if hosts:
        try:
            asked = subprocess.run([command[0], "--version"], capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"--mpirun {config.mpirun}: does not say what it is: {error}") from None
        version = asked.stdout.decode(errors="replace")
        open_mpi = "open" in version.lower() or "prte" in version.lower()
        path = folder / "hosts"
        path.write_text("".join(f"{h} slots={n}\n" if open_mpi else f"{h}:{n}\n" for h, n in hosts.items()))
        command += ["--hostfile" if open_mpi else "-f", str(path)]
    return command


def shards_of(arguments: Sequence[str]) -> int:
    """Return how many ranks at most can share the run that ``arguments`` of cnnmpi.train start or resume: its shards.

    Raises UserError or SystemExit(2) for a command line that cnnmpi.train would refuse.
    """
    asked, code = parse(arguments), Code()
    config = resolve(asked, code)
    saved = find_checkpoint(config.resume, config.out or Path(), lambda text: None) if config.resume else None
    return (continued(asked, saved.run.config, saved.path, code) if saved else config).shards or 1


def supervise(config: Elastic, arguments: Sequence[str]) -> int:
    """Run until an exit code is final; return it. Raises UserError where it cannot go on."""
    listed = read_hosts(config.hosts) if config.hosts else {}
    if console.is_script(arguments):  # a script; what it sets by itself only it knows
        program, arguments = [arguments[0]], arguments[1:]
        shards = config.ranks or parse(arguments).shards or DEFAULTS["shards"]
    else:
        program = ["-m", "cnnmpi.train"]
        shards = config.ranks or shards_of(["--resume", "auto", *arguments])
    with Jobs() as jobs, tempfile.TemporaryDirectory() as folder:
        for restart in range(config.max_restarts + 1):
            hosts = answering(listed, config.probe) if listed else {}
            for host in set(listed) - set(hosts):
                _say(f"{host} does not answer: going on without it")
            slots = sum(hosts.values()) if listed else usable_cores()
            ranks = min(config.ranks, slots) if config.ranks and listed else config.ranks or min(slots, shards)
            if ranks < max(1, config.min_ranks):
                raise UserError(f"only {ranks} ranks can be started, --min-ranks is {config.min_ranks}")
            start = launcher(config, ranks, hosts, Path(folder))
            try:
                code = jobs.run([*start, sys.executable, *program, "--resume", "auto", *arguments])
            except OSError as error:
                raise UserError(f"--mpirun {config.mpirun}: cannot be started: {error.strerror}") from None
            if code in FINAL or jobs.asked:
                _say(f"{FINAL.get(code, f'ended with code {code} after a signal')}; {restart} restarts")
                return code
            _say(f"{ranks} ranks ended with code {code}: restart {restart + 1} of {config.max_restarts}")
            time.sleep(config.pause)
    raise UserError(f"--max-restarts {config.max_restarts} is reached; see the first traceback above")


def _say(text: str) -> None:
    with contextlib.suppress(Exception):  # a run goes on where nobody hears
        print(f"cnnmpi.elastic: {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise a run as ``argv`` says (the command line's if None). Returns its exit code."""
    console.prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    own, arguments = console.parted(args)
    config = tyro.cli(Elastic, args=own, prog="cnnmpi.elastic", description=__doc__)
    try:
        if any(argument.split("=")[0] == "--resume" for argument in arguments):
            raise UserError("leave --resume out: cnnmpi.elastic gives it, and starts from the beginning without a run")
        return supervise(config, arguments)
    except UserError as error:
        print(f"cnnmpi: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
