"""Measure everything and write benchmarks/RESULTS.md: ``python -m benchmarks [ROUNDS]``. Run nothing else meanwhile."""

import sys
from pathlib import Path

from benchmarks import scaling, step
from benchmarks.rounds import hardware, refuse_slow_blas
from cnnmpi import functional
from cnnmpi.models import MODELS

HEAD = """# Measured speed

Written by `python -m benchmarks`. Competitors take turns in processes of their own; ratios are medians over the
rounds. A step is forward, loss, backward and optimizer on one batch of synthetic images, from equal weights; logits and
gradients were found equal first. GFLOP/s count direct convolution: Winograd's way, which multiplies less, may exceed
the machine's peak. Memory is the peak above what the imports take.
"""


def main() -> None:
    refuse_slow_blas()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    parts = [HEAD, hardware() + ".\n", "## One step\n"]
    for model in MODELS:
        for threads in (1, 2):
            print(part := step.compare(model, 128, threads, rounds), flush=True)
            parts.append(part)
    parts.append("## Ranks and threads\n")
    for model in MODELS:
        print(part := scaling.compare(model, 128, rounds, most_ranks=2), flush=True)
        parts.append(part)
    parts.append("## Where the time goes\n")
    functional.set_threads(1)
    parts += [step.profile(model, 128, 1) for model in MODELS]
    Path(__file__).with_name("RESULTS.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
