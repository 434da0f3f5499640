"""Computing parts of a run again, and comparing them with what its ledger and its checkpoints say."""

import contextlib
import hashlib
import math
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.audit.record import STATE, Record, Saved
from cnnmpi.train import Trainer
from cnnmpi.train.ledger import SKIPPED
from cnnmpi.train.state import pack, unpack

OF_A_RUN = ("model_options", "classes", "mean", "std", "data_fit", "data_archive_sha256", "sources")  # in checkpoints


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
