"""Measure everything and write benchmarks/RESULTS.md: ``python -m benchmarks [ROUNDS]``. Run nothing else meanwhile."""

import sys
from pathlib import Path

from benchmarks import scaling, step
from benchmarks.rounds import hardware, refuse_slow_blas

MODELS = "simplecnn", "smallresnet"  # those with recipes of their own; others: python -m benchmarks.step --model NAME

HEAD = """# Measured speed

Written by `python -m benchmarks`. Competitors take turns in processes of their own; ratios are medians over the
rounds. A step is forward, loss, backward and optimizer on one batch of random numbers in the shape of images. First
logits and gradients are compared (each within 1 % of the norm of PyTorch's in the same type: sums in another order jump
at the kinks of a ReLU).
GFLOP/s count direct convolution: Winograd's way, which multiplies less, may exceed the machine's peak. Memory is the
peak above what the first imports take; torch.compile imports more. PyTorch is taken as it comes; docs/scaling.md says
what its way with memory costs it.
"""


def main() -> None:
    refuse_slow_blas()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    parts = [HEAD, hardware() + ".\n", "## One step\n"]
    results = Path(__file__).with_name("RESULTS.md")

    def add(part: str) -> None:
        print(part, flush=True)
        parts.append(part)
        results.write_text("\n".join(parts))

    for model in MODELS:
        for threads in (1, 2):
            add(step.compare(model, 128, threads, rounds))
    add("## Ranks and threads\n")
    for model in MODELS:
        add(scaling.compare(model, 128, rounds, most_ranks=2))
    add("## Where the time goes\n")
    for model in MODELS:
        add(step.profile(model, 128))


if __name__ == "__main__":
    main()
