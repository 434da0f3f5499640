"""The command line of training.

python -m cnnmpi.train                                    # one process
mpirun -n 4 python -m cnnmpi.train --model smallresnet    # four ranks: the same result
mpirun -n 2 python -m cnnmpi.train --resume               # goes on, on any number of ranks
"""

import signal
import sys
from collections.abc import Sequence

from cnnmpi import console
from cnnmpi.distributed import UserError, failing_together, start
from cnnmpi.train.config import parse
from cnnmpi.train.progress import Progress
from cnnmpi.train.setup import program
from cnnmpi.train.signals import StopSignals
from cnnmpi.train.trainer import Trainer
from cnnmpi.train.watchdog import Watchdog


def main(argv: Sequence[str] | None = None, trainer: type[Trainer] = Trainer) -> int:
    """Train as ``argv`` says (the command line's if None), with a ``trainer``. Returns the exit code."""
    console.prepare()
    with console.steady_output():
        return _train(list(sys.argv[1:] if argv is None else argv), trainer)


def _train(args: list[str], trainer: type[Trainer]) -> int:
    try:
        ranks = start()
    except UserError as error:
        print(f"cnnmpi: error: {error}", file=sys.stderr)
        return 2

    def end(number: int, doing: str) -> None:
        who, name = f"rank {ranks.rank} of {ranks.size}", signal.Signals(number).name
        print(f"cnnmpi: error: {who}: {name} asked to stop, but {doing} does not end: not saved", file=sys.stderr)
        ranks.abort(128 + number)

    with failing_together(ranks):
        ranks.agree("their command lines", args)
        ranks.agree("the programs that they run", program())
        config = ranks.on_rank0(lambda: parse(args))
        progress = Progress()
        with (
            StopSignals(progress, end) as signals,
            Watchdog(ranks, config.hang_warning, config.hang_limit, progress) as watchdog,
        ):
            run = trainer(config, ranks, signals, watchdog)
            signals.heed()  # until here a signal has ended the process: nothing could be lost
            return run.run()
    return 1


if __name__ == "__main__":
    sys.exit(main())
