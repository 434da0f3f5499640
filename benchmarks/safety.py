"""What the guarantees cost, and the records: exact reduction, agreement, watchdog, lines of steps; shares of a step.

mpirun -n 2 python -m benchmarks.safety [--model simplecnn] [--steps 30]

Steps of the trainer, with all of them on, alternate with each part by itself: a step's noise exceeds what they cost.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnnmpi.data import synthetic, write_hdf5
from cnnmpi.distributed import ExactReducer, Ranks, Reducer, start
from cnnmpi.machine import one_blas_thread
from cnnmpi.train import Config, set_up
from cnnmpi.train.phases import COMPUTE, LOAD, REDUCE, UPDATE
from cnnmpi.train.watchdog import INTERVAL_S, Watchdog


def milliseconds(ranks: Ranks, body: Callable[[], object]) -> float:
    ranks.gather(None)
    begun = time.perf_counter()
    body()
    return 1000 * (time.perf_counter() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("simplecnn", "smallresnet"), default="smallresnet")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    ranks = start()
    if ranks.size == 1:
        sys.exit("one process has nobody to agree with: start it by mpirun -n 2")
    folder = Path(ranks.on_rank0(lambda: tempfile.mkdtemp()))
    ranks.on_rank0(lambda: write_hdf5(folder / "data.h5", synthetic(train=5000, test=100)))
    config = Config(model=args.model, data=str(folder / "data.h5"), threads=1, epochs=1000, out=folder / "run")
    with Watchdog(ranks, 60, 600) as watchdog:
        trainer = set_up(config, ranks, watchdog=watchdog)
        reducers = {
            kind: kind(ranks, trainer.reducer.shards, trainer.reducer.sizes) for kind in (ExactReducer, Reducer)
        }
        shard = [np.full(size, 0.1, np.float32) for size in trainer.reducer.sizes]

        def reduce(kind: type[Reducer]) -> None:
            for number in trainer.shards:
                reducers[kind].add(number, *shard)
            reducers[kind].reduce()

        gradient = np.full(trainer.reducer.sizes[0], 0.1)

        @one_blas_thread()  # as the trainer's steps
        def write_down() -> None:
            """As many steps as get one line: their phases, what is shown of them, and that line."""
            for step in range(1, config.log_every + 1):
                for phase in (COMPUTE, REDUCE, UPDATE):
                    with trainer.phases(phase):
                        pass
                trainer.phases.move(0.0, COMPUTE, LOAD)
                norm = math.sqrt(gradient @ gradient) if trainer.report.records.wants(step) else math.nan
                line = {"step": step, "epoch": 1, "loss": 0.5, "lr": 0.1, "grad_norm": norm}
                trainer.report.step(line, 1000, 10, 128)

        parts: dict[str, Callable[[], object]] = {
            "step": trainer.train_step,
            "exact": lambda: reduce(ExactReducer),
            "float32": lambda: reduce(Reducer),
            "agree": trainer._agree,
            "look": watchdog._observe,
            "lines": write_down,
            "entry": lambda: trainer.ledger.enter(trainer.entry(0.5)),
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(args.steps):
            for name, body in parts.items():
                times[name].append(milliseconds(ranks, body))
    ms = {name: statistics.median(values) for name, values in times.items()}
    if ranks.rank == 0:
        seconds = ms["step"] / 1000
        costs = {
            f"exact rather than float32 reduction ({ms['exact']:.2f} and {ms['float32']:.2f} ms)": ms["exact"]
            - ms["float32"],
            f"agreement, once in 50 steps ({ms['agree']:.2f} ms)": ms["agree"] / 50,
            f"watchdog, once a second ({ms['look']:.2f} ms)": ms["look"] * seconds / INTERVAL_S,
            f"phases and records, a line every {config.log_every} steps ({ms['lines']:.2f} ms)": ms["lines"]
            / config.log_every,
            f"ledger, an entry every {config.ledger_every} steps ({ms['entry']:.2f} ms)": ms["entry"]
            / config.ledger_every,
        }
        print(f"{args.model}, {ranks.size} ranks: median step {ms['step']:.1f} ms")
        for what, cost in costs.items():
            print(f"{cost / ms['step']:7.2%}  {what}")
        print(f"{sum(costs.values()) / ms['step']:7.2%}  together")
    return 0


if __name__ == "__main__":
    sys.exit(main())
