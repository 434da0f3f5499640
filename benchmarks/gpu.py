"""One training step on a GPU, of cnnmpi's torch engine in each precision and of PyTorch with autograd.

    python -m benchmarks.gpu [--model smallresnet] [--batch 512]

Ends with a line and exit code 0 where there is no GPU.
"""

import statistics

import torch

from benchmarks.rounds import Competitor, hardware, options, ratios, spread, table, take_turns
from benchmarks.step import AUTOCAST, EAGER, LAST, LOW, check_equal

KINDS = ["torch engine", "torch engine tf32", LOW, "torch engine float16", EAGER, LAST, AUTOCAST]


def compare(model: str, batch: int, rounds: int, device: str) -> str:
    """Return the table and the ratios for one model; on a CPU, which has no tf32, without that."""
    kinds = [kind for kind in KINDS if device.startswith("cuda") or "tf32" not in kind]
    sides = {kind: Competitor(kind, model, batch, 1, device=device) for kind in kinds}
    check_equal(sides)
    take_turns(sides, rounds, seconds=0.5)
    rows = []
    for name, side in sides.items():
        if side.failure:
            rows.append([name, f"does not work here: {side.failure[:60]}", ""])
        else:
            rows.append([name, spread(side.seconds), f"{batch / statistics.median(side.seconds):.0f}"])
        side.close()
    words = [ratios(sides, "torch engine", [EAGER, LAST]), ratios(sides, LOW, [AUTOCAST])]
    return (
        f"### {model}, batch {batch}, {device}\n\n{table(['step', 'ms (quartiles)', 'images/s'], rows)}\n\n"
        f"{rounds} rounds. {'. '.join(filter(None, words))}.\n"
    )


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(batch=512)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the program")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return
    name = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "no GPU"
    print(f"{hardware()}; {name}\n")
    print(compare(args.model, args.batch, args.rounds, args.device))


if __name__ == "__main__":
    main()
