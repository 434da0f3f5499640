"""``cnnmpi <command>``: the same commands as ``python -m cnnmpi.<command>``."""

import importlib
import sys

from cnnmpi.console import command

COMMANDS = {
    "train": ("cnnmpi.train.__main__", "train a model; start it with mpirun for several ranks"),
    "elastic": ("cnnmpi.elastic", "train under mpirun, and restart when ranks or hosts are lost"),
    "evaluate": ("cnnmpi.evaluate", "accuracy, loss and confusion matrix of a checkpoint"),
    "predict": ("cnnmpi.predict", "classes of image files"),
    "export": ("cnnmpi.export", "a checkpoint's model as ONNX, safetensors or a torch state_dict"),
    "data": ("cnnmpi.data.__main__", "make data files of images, arrays, MNIST or CIFAR; show and verify them"),
    "report": ("cnnmpi.report.__main__", "a page that shows a run, or compares several"),
    "profile": ("cnnmpi.profile.__main__", "where the time and the memory of a training step go, layer by layer"),
    "study": ("cnnmpi.study", "an accuracy with its spread over seeds, and settings compared"),
    "bisect": ("cnnmpi.bisect.__main__", "find where two runs part that should agree"),
    "audit": ("cnnmpi.audit.__main__", "check a run: compute parts of it again and compare"),
    "doctor": ("cnnmpi.doctor", "check MPI, cores, BLAS, disk and data before a job"),
    "chaos": ("cnnmpi.chaos", "train under random faults and compare the weights"),
    "checkpoint": ("cnnmpi.checkpoint.__main__", "show, verify or compare checkpoints, or make one of other files"),
}


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names, with the others. Returns its exit code."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in COMMANDS:
        code: int = importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])
        return code
    usage = "usage: cnnmpi <command> [arguments]; each takes --help\n" + "".join(
        f"  {name:<11} {text}\n" for name, (_, text) in COMMANDS.items()
    )
    if args in (["-h"], ["--help"]):
        print(usage, end="")
        return 0
    problem = f"no command {args[0]!r}" if args else "no command given"
    print(f"cnnmpi: error: {problem}\n{usage}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
