"""Computing parts of a run again, and comparing them with what its ledger and its checkpoints say."""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.audit.record import STATE, Record, Saved
from cnnmpi.common.files import open_regular
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train import Config, Trainer, set_up
from cnnmpi.train.config import from_plain
from cnnmpi.train.inputs import Data, open_data
from cnnmpi.train.judging import data_of
from cnnmpi.train.ledger import LEDGER, SKIPPED
from cnnmpi.train.state import pack, unpack

OF_A_RUN = ("model_options", "classes", "mean", "std", "data_fit", "data_archive_sha256")  # in its checkpoints


def data_of_run(record: Record, ranks: Ranks, spec: str | None, flag: str = "--data") -> Data | None:
    """Return the data of the run, or what ``spec`` means, every byte of which was looked at; None for other data.

    Raises UserError where there are none; ``flag`` is what names them.
    """

    def look() -> tuple[str, str]:
        with open_regular(record.folder / "config.toml") as file:
            settings = tomllib.loads(file.read(1 << 20).decode(errors="surrogateescape"))
        where = data_of(settings.get("data"), flag) if spec is None else spec
        try:
            found = open_data(where, Ranks(), lambda text: None)
            return where, found.dataset.digest()
        except UserError as error:
            if spec is not None and not Path(where).exists():
                raise
            return where, str(error)

    where, digest = ranks.on_rank0(look)
    wrong = "" if digest == record.opening["data_sha256"] else "not those of the run"
    if wrong and len(digest) != 64:
        wrong = digest
    record.note("data", wrong, where)
    return None if wrong else open_data(where, ranks, lambda text: None)


def trainer_of(
    record: Record, ranks: Ranks, data: Data, given: dict[str, Any], scratch: Path, begin: Saved, settings: Any = None
) -> Trainer:
    """Return the run as it was at ``begin``, in the folder ``scratch`` of its own.

    ``given`` are settings besides those of the run, such as the places of a person's code. ``settings`` are taken
    instead of those with which its ledger opens.
    """
    if begin.path is None:
        given = from_plain((settings or record.opening["config"]) | given, LEDGER)
    else:  # which brings the settings along
        given = {name: value for name, value in given.items() if name != "init"}
    config = dataclasses.replace(
        Config(**given), out=scratch / f"step-{begin.step}", resume=str(begin.path) if begin.path else None,
        data=data.dataset.source, ledger_every=0, log_every=0, report=False, quiet=True,
    )  # fmt: skip
    trainer = set_up(config, ranks, data=data.dataset)
    trainer.folder.close()
    return trainer


@contextlib.contextmanager
def scratch_folder(ranks: Ranks) -> Iterator[Path]:
    """Yield a folder that is gone afterwards, the same on all ranks of this host."""
    path = Path(ranks.on_rank0(lambda: tempfile.mkdtemp(prefix="cnnmpi-audit-")))
    try:
        yield path
    finally:
        if ranks.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def unlike_here(record: Record, trainer: Trainer, first: int, last: int) -> dict[str, str]:
    """Return {name: words} of what shaped a part of the run otherwise than it would be shaped here."""
    found: dict[str, str] = {}
    if record.opening["config"].get("reduction") != "exact":
        found["reduction"] = "bits are promised by --reduction exact alone"
    for there in record.shaping(first, last):
        for name, here in trainer.shaping.items():
            if name not in ("config", "data_sha256", "init") and there.get(name) != here:
                found[name] = f"{there.get(name)} there, {here} here"
    return found


def check_state(record: Record, trainer: Trainer, saved: Saved) -> str:
    """Compare all that a checkpoint holds with the entry of its step, and with what the data and the network are.

    ``trainer`` takes up its arrays. Return what is wrong, in words.
    """
    assert saved.path is not None
    arrays, attributes = checkpoint.load(saved.path)
    other = [name for name in OF_A_RUN if attributes.get(name) != trainer.attributes.get(name)]
    if json.loads(attributes.get("sources", "{}")) not in [each.says.get("code") for each in record.chain]:
        other.append("code")
    try:
        unpack(arrays, trainer.model, trainer.optimizer)
    except ValueError as error:
        return str(error)
    trainer.step = trainer.optimizer.steps = saved.step
    computed, said = trainer.entry(), record.said.get(saved.step, {})
    other += [name for name in STATE if said and said.get(name) != computed[name]]
    frozen = hashlib.sha256(trainer.F.to_numpy(trainer.flat.frozen).data).hexdigest()
    if frozen != record.opening.get("frozen"):
        other.append("frozen weights")
    return f"other {', '.join(other)} than the run has" if other else ""


def compute(record: Record, trainer: Trainer, last: Saved) -> tuple[str, int, float]:
    """Compute up to ``last`` again; return the first difference in words, the number of entries compared, a deviation.

    That is the largest relative difference of a loss. Checkpoints of that step which no entry vouches for are compared
    with what was computed.
    """
    first, compared, deviation = "", 0, 0.0
    if trainer.step == 0:
        first, compared = _differences(record.said[0], trainer.entry()), 1
    while trainer.step < last.step:
        loss = trainer.train_step()
        if (said := record.said.get(trainer.step)) is not None:
            compared += 1
            first = first or _differences(said, trainer.entry(loss))
            theirs = said.get("loss", SKIPPED)
            if math.isfinite(loss) and theirs != SKIPPED:
                with contextlib.suppress(ValueError):
                    size = max(abs(float.fromhex(theirs)), 1e-300)
                    deviation = max(deviation, abs(loss - float.fromhex(theirs)) / size)
    computed = pack(trainer.model, trainer.optimizer)
    for saved in record.files:
        if saved.step == last.step and saved.step not in record.said and saved.path is not None and not first:
            kept, _ = checkpoint.load(saved.path)
            other = [name for name in computed if not np.array_equal(kept.get(name, np.zeros(0)), computed[name])]
            compared += 1
            first = f"step {last.step}: other {', '.join(other[:3])} in {saved.path.name}" if other else ""
    return first, compared, deviation


def _differences(said: dict[str, Any], computed: dict[str, Any]) -> str:
    wrong = [name for name in computed if said.get(name) != computed[name]]
    return f"step {computed['step']}: other {', '.join(wrong)}" if wrong else ""
