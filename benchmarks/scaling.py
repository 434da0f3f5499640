"""Images per second of the whole trainer on ranks and threads, and of PyTorch DDP with two processes.

    python -m benchmarks.scaling [--model smallresnet]

cnnmpi trains from its data set, with augmentation and exact reduction, in 8 shards, which any 1 to 8 ranks can share,
where nothing else is said; DDP gets the same ready-made batch each time, and each process its half in one piece.
Two processes that share nothing but the machine, on a batch each, show what two of its cores give at most.
"""

import os
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks.rounds import Competitor, hardware, options, ratios, refuse_slow_blas, spread, table, take_turns

PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
BFLOAT16, TWO_SHARDS = "2 ranks, torch bfloat16", "2 ranks, torch bfloat16, 2 shards"
APART = "2 processes, a whole batch each"
MPIRUN = shutil.which("mpirun", path=PATH) or "mpirun"


def compare(model: str, batch: int, rounds: int, most_ranks: int) -> str:
    """Return the table and the ratios for one model."""
    sides = {
        "1 process, 1 thread": Competitor("ranks", model, batch, 1),
        "1 process, 2 threads": Competitor("ranks", model, batch, 2),
    }
    for count in range(2, most_ranks + 1, 2):
        sides[f"{count} ranks, 1 thread"] = Competitor("ranks", model, batch, 1, (MPIRUN, "-n", str(count)))
    sides[BFLOAT16] = Competitor("ranks bfloat16", model, batch, 1, (MPIRUN, "-n", "2"))
    sides[TWO_SHARDS] = Competitor("ranks bfloat16 2", model, batch, 1, (MPIRUN, "-n", "2"))
    sides[APART] = Competitor("apart", model, batch, 1, (MPIRUN, "-n", "2"))
    ddp = ["DDP, 2 processes", "DDP channels_last, 2 processes", "DDP autocast bfloat16, 2 processes"]
    for name, kind in zip(ddp, ("ddp", "ddp channels_last", "ddp autocast"), strict=True):
        sides[name] = Competitor(kind, model, batch, 1)
    take_turns(sides, rounds, seconds=1.0)
    rows = []
    for name, side in sides.items():
        if side.failure:
            rows.append([name, f"does not work here: {side.failure[:60]}", ""])
        else:
            images = 2 * batch if name == APART else batch
            rows.append([name, spread(side.seconds), f"{images / statistics.median(side.seconds):.0f}"])
        side.close()
    words = [ratios(sides, "2 ranks, 1 thread", ["1 process, 1 thread", *ddp[:2]]),
             ratios(sides, BFLOAT16, ddp[2:]),
             ratios(sides, TWO_SHARDS, ddp[2:]),
             ratios(sides, "1 process, 2 threads", ["1 process, 1 thread"])]  # fmt: skip
    if alone := [
        one / two for one, two in zip(sides["1 process, 1 thread"].seconds, sides[APART].seconds, strict=False)
    ]:
        words.append(
            f"This machine does {2 * statistics.median(alone):.2f} times as much in two such processes as in one"
        )
    return (
        f"### {model}, global batch {batch}\n\n{table(['', 'ms a step (quartiles)', 'images/s'], rows)}\n\n"
        f"{rounds} rounds. {'. '.join(words)}.\n"
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--ranks", type=int, default=2, choices=range(2, 65, 2), metavar="N", help="most ranks to try, in steps of 2"
    )
    args = parser.parse_args()
    refuse_slow_blas()
    print(hardware(), "\n")
    print(compare(args.model, args.batch, args.rounds, args.ranks))


if __name__ == "__main__":
    main()
