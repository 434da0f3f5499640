"""The factor by which the loss of a float16 run is scaled up, so that small gradients are not rounded to 0."""

from dataclasses import dataclass

FIRST = 2.0**12  # of the loss summed over a shard; PyTorch begins at 2**16, of a mean
GROWTH = 2000  # steps in a row without an overflow until the factor is doubled, as PyTorch's GradScaler does
LARGEST = 2.0**24


@dataclass
class LossScale:
    """A power of two, so that multiplying and dividing by it round nothing (Micikevicius et al., 2018).

    It depends on nothing but which steps overflowed, on which all ranks agree: so it is the same on each.
    """

    factor: float = 1.0
    steady: int = 0  # steps in a row without an overflow
    moves: bool = False

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        """Return what a run of this precision begins with: a factor of 1 for ever, except in float16."""
        return cls(FIRST, moves=True) if precision == "float16" else cls()

    def succeeded(self) -> None:
        """Note that a step did not overflow."""
        self.steady += 1
        if self.moves and self.steady >= GROWTH:
            self.factor, self.steady = min(2 * self.factor, LARGEST), 0

    def failed(self) -> bool:
        """Halve the factor after a step that overflowed; return False where that cannot help."""
        self.steady = 0
        if not self.moves or self.factor <= 1:
            return False
        self.factor /= 2
        return True
