"""Computing parts of a run again, and comparing them with what its ledger and its checkpoints say."""

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnnmpi import checkpoint
from cnnmpi.audit.record import Saved
from cnnmpi.audit.replay import Replay, State, differing, same, take
from cnnmpi.distributed import NotFiniteError
from cnnmpi.train.ledger import SKIPPED
from cnnmpi.train.state import pack

OF_A_RUN = ("model_options", "classes", "mean", "std")  # in its checkpoints


def check_state(replay: Replay, saved: Saved) -> str:
    """Compare all that a checkpoint holds with the entry of its step, and with what the data and the network are.

    ``replay`` takes up its arrays. Return what is wrong, in words.
    """
    assert saved.path is not None
    record, trainer = replay.record, replay.run
    arrays, attributes = checkpoint.load(saved.path)
    other = [name for name in OF_A_RUN if attributes.get(name) != trainer.attributes.get(name)]
    if attributes.get("epoch") != saved.step // trainer.steps_per_epoch:
        other.append("epoch")
    if str(attributes.get("model", "")).rpartition(":")[2] != trainer.attributes["model"].rpartition(":")[2]:
        other.append("model")
    if json.loads(attributes.get("sources", "{}")) not in [each.says.get("code") for each in record.chain]:
        other.append("code")
    own = pack(trainer.model, trainer.optimizer)
    other += sorted(name for name in arrays if name not in own or arrays[name].dtype != own[name].dtype)
    try:
        take(trainer, State.load(saved.path))
    except ValueError as error:
        return str(error)
    computed, said = trainer.entry(), record.said.get(saved.step, {})
    other += differing(said, computed) if said else []
    frozen = hashlib.sha256(trainer.F.to_numpy(trainer.flat.frozen).data).hexdigest()
    if frozen != record.opening.get("frozen"):
        other.append("frozen weights")
    return f"other {', '.join(other)} than the run has" if other else ""


@dataclass
class Computed:
    """What computing a part again has shown: the first ``difference`` in words and its ``step``, "" and 0 without.

    ``compared`` counts entries, and ``deviation`` is the largest relative difference of a loss.
    """

    difference: str = ""
    step: int = 0
    compared: int = 0
    deviation: float = 0.0

    def note(self, step: int, other: Sequence[str], where: str = "") -> None:
        """Count a comparison after ``step``, in which these are ``other``."""
        self.compared += 1
        if other and not self.difference:
            self.difference, self.step = f"step {step}: other {', '.join(other[:3])}{where}", step


def compute(replay: Replay, last: Saved) -> Computed:
    """Compute up to ``last`` again, and compare each entry on the way.

    Checkpoints of that step which no entry vouches for are compared with what was computed.
    """
    found, record = Computed(), replay.record
    if replay.run.step == 0 and 0 in record.said:
        frozen = ["frozen weights"] if replay.run.shaping["frozen"] != record.opening.get("frozen") else []
        found.note(0, differing(record.said[0], replay.run.entry()) + frozen)
    while replay.run.step < last.step:
        try:
            loss = replay.step()
        except NotFiniteError as error:  # which the run did not meet
            found.difference, found.step = found.difference or str(error), found.step or replay.run.step + 1
            return found
        trainer = replay.run
        if (said := record.said.get(trainer.step)) is not None:
            found.note(trainer.step, differing(said, trainer.entry(loss)))
            theirs = said.get("loss", SKIPPED)
            if math.isfinite(loss) and theirs != SKIPPED:
                with contextlib.suppress(ValueError, OverflowError):
                    size = max(abs(float.fromhex(theirs)), 1e-300)
                    found.deviation = max(found.deviation, abs(loss - float.fromhex(theirs)) / size)
    computed = pack(replay.run.model, replay.run.optimizer)
    for saved in record.files:
        if saved.step == last.step and saved.step not in record.said and saved.path is not None:
            kept, _ = checkpoint.load(saved.path)
            other = [name for name in computed if name not in kept or not same(kept[name], computed[name])]
            found.note(last.step, other, f" in {saved.path.name}")
    return found
