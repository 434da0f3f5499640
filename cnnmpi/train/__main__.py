"""The command line of training.

python -m cnnmpi.train                                    # one process
mpirun -n 4 python -m cnnmpi.train --model smallresnet    # four ranks: the same result
mpirun -n 2 python -m cnnmpi.train --resume               # goes on, on any number of ranks
"""

import sys
from collections.abc import Sequence

from cnnmpi import console
from cnnmpi.distributed import UserError, failing_together, start
from cnnmpi.train.config import parse
from cnnmpi.train.setup import program
from cnnmpi.train.signals import StopSignals
from cnnmpi.train.trainer import Trainer
from cnnmpi.train.watchdog import Watchdog


def main(argv: Sequence[str] | None = None, trainer: type[Trainer] = Trainer) -> int:
    """Train as ``argv`` says (the command line's if None), with a ``trainer``. Returns the exit code."""
    console.prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        ranks = start()
    except UserError as error:
        print(f"cnnmpi: error: {error}", file=sys.stderr)
        return 2
    with failing_together(ranks):
        ranks.agree("their command lines", args)
        ranks.agree("the programs that they run", program())
        config, named = ranks.on_rank0(lambda: parse(args))
        with StopSignals() as signals, Watchdog(ranks, config.hang_warning, config.hang_limit) as watchdog:
            return trainer(config, ranks, named, signals, watchdog).run()
    return 1


if __name__ == "__main__":
    sys.exit(main())
