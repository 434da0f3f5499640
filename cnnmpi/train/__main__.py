"""The command line of training.

python -m cnnmpi.train                                    # one process
mpirun -n 4 python -m cnnmpi.train --model smallresnet    # four ranks: the same result
mpirun -n 2 python -m cnnmpi.train --resume               # goes on, on any number of ranks
mpirun -n 4 python -m cnnmpi.train --model nets.py:Net    # a network of your own
"""

import sys
from collections.abc import Sequence

from cnnmpi.train.entry import train


def main(argv: Sequence[str] | None = None) -> int:
    """Train as ``argv`` says (the command line's if None). Returns the exit code."""
    return int(train(list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
