"""Training from the command line, from a script and from a notebook: all by ``fit``."""

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnmpi import console
from cnnmpi.data import Dataset
from cnnmpi.distributed import Ranks, UserError, failing_together, start
from cnnmpi.models import Model
from cnnmpi.train.code import OURS, Code, importing
from cnnmpi.train.config import Config, named, parse
from cnnmpi.train.earlier import BEFORE, NOW
from cnnmpi.train.errors import as_user_errors
from cnnmpi.train.hooks import Hooks
from cnnmpi.train.measures import Metric
from cnnmpi.train.progress import Progress
from cnnmpi.train.setup import program, set_up
from cnnmpi.train.signals import StopSignals
from cnnmpi.train.state import Info
from cnnmpi.train.trainer import Trainer
from cnnmpi.train.watchdog import Watchdog

MODULE = "python -m cnnmpi.train"
Arrays4 = tuple[Any, Any, Any, Any]


class Result(int):
    """How a run ended: a script's exit code, 0 or (stopped by a signal, to be resumed) 75; and what it made.

    ``model`` is the trained model, in evaluation mode; ``metrics`` has for each epoch that this call has trained a
    dictionary, as metrics.jsonl has a line; ``out`` is the run's folder, with the checkpoints last.h5 and best.h5.
    """

    model: Model
    metrics: list[dict[str, Any]]
    out: Path

    @classmethod
    def of(cls, code: int, run: Trainer) -> "Result":
        """Return what ``run``, which ended with ``code``, has made."""
        result = cls(code)
        result.model, result.metrics, result.out = run.model, run.history, run.out
        return result


def fit(
    network: Callable[..., Model] | str,
    *,
    data: Dataset | Arrays4 | str | Path | None = None,
    loss: Callable[..., Any] | str | None = None,
    augment: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    on_step: Any = (),
    on_epoch: Any = (),
    on_save: Any = (),
    argv: Sequence[str] | None = None,
    **settings: Any,
) -> Result:
    """Train a network of your own with all that ``python -m cnnmpi.train`` has, on all ranks that mpirun started.

    In a script that is the main program, its command line is read, and prevails over what is given here: end it with
    ``sys.exit(cnnmpi.fit(Net, ...))``, below ``if __name__ == "__main__"``. Elsewhere, as in a notebook, none is read,
    and what is wrong raises UserError. With ``argv`` it is as in a script: an error ends the program.

    Args:
        network: a subclass of ``Model``. Of in_channels, num_classes, image_size and seed its constructor gets those
            that it has arguments for. Its attribute ``recipe`` holds settings and metrics that suit it.
        data: what ``--data`` takes; or a Dataset; or arrays x_train, y_train, x_test, y_test: images (N, C, H, W),
            uint8 or floats in 0..1, and labels (N,) or targets (N, K).
        loss: a function ``loss(logits, targets, reduction="sum") -> (loss, dlogits)``, or its name. It gets NumPy
            arrays, or with ``backend="torch"`` tensors, and its ``dlogits`` are of that kind, too.
        augment: what ``--augment`` takes, such as "flip,crop=4,mixup=0.2"; a function ``(images, labels, draw)`` that
            returns images, or images and labels, of batches (n, C, H, W); or a list of both. See ``DataLoader``.
        metrics: {name: function ``(logits, targets) -> (sum, count)``}; reported are sums over all images, divided.
            Where images are mixed, the targets in training are probabilities (n, K).
        on_step: a hook, or several: see ``train.hooks``.
        on_epoch: as well.
        on_save: as well.
        argv: a command line.
        settings: any field of ``Config``, such as ``lr=0.1``.

    """
    caller = sys._getframe(1).f_globals
    script = argv is None and caller.get("__name__") == "__main__" and "__file__" in caller
    code = Code()

    def wanted() -> tuple[Config, dict[str, Any]]:
        if importing():
            raise UserError(f"fit() is called while {importing()} is imported: put it below if __name__ == '__main__'")
        if isinstance(network, Model):
            kind = type(network).__name__
            raise UserError(f"fit() needs the class {kind}, not an object of it: the data say how many classes it has")
        if not (callable(network) or isinstance(network, str)) or "model" in settings:
            raise UserError("fit() needs a network first: a class, or its name as --model takes it; and only there")
        things = {"model": network, "loss": loss, "augment": augment}
        config = {key: named(code, key, value) for key, value in things.items() if value is not None} | settings
        if isinstance(settings.get("out"), str):
            config["out"] = Path(settings["out"])
        if not isinstance(metrics or {}, Mapping):
            raise UserError(f"metrics must be a dictionary {{name: function}}, got a {type(metrics).__name__}")
        if isinstance(data, str | Path):
            config["data"] = str(data)
        if unknown := sorted(config.keys() - {item.name for item in dataclasses.fields(Config)}):
            hint = NOW if set(BEFORE) & set(unknown) else "see python -m cnnmpi.train --help"
            raise UserError(f"fit() got {', '.join(unknown)}, which are no settings; {hint}")
        own_data = None if isinstance(data, str | Path) else data
        return Config(**config), {"data": own_data, "metrics": metrics, "hooks": Hooks(on_step, on_epoch, on_save)}

    if script:
        return train(sys.argv[1:], wanted, code, f"python {sys.argv[0]}")
    if argv is not None:
        return train(list(argv), wanted, code)
    ranks = start()
    with failing_together(ranks) if ranks.size > 1 else contextlib.nullcontext():
        config, parts = wanted()
        return _run(config, ranks, code, MODULE, Progress(), **parts)
    raise AssertionError("failing_together() has ended the program")


def train(
    args: list[str],
    wanted: Callable[[], tuple[Config, dict[str, Any]]] = lambda: (Config(), {}),
    code: Code | None = None,
    command: str = MODULE,
) -> Result:
    """Train as the command line ``args`` says and, where it is silent, as ``wanted``. Errors end the program."""
    console.prepare()
    with console.steady_output():
        try:
            ranks = start()
        except UserError as error:
            print(f"cnnmpi: error: {error}", file=sys.stderr)
            sys.exit(2)
        with failing_together(ranks):
            ranks.agree("their command lines", args)
            given, parts = wanted()
            code = code or Code()
            config = ranks.on_rank0(lambda: parse(args, given, code, command.removeprefix("python -m ")))
            return _run(config, ranks, code, command, Progress(), functools.partial(_end, ranks), **parts)
    raise AssertionError("failing_together() has ended the program")


def _run(
    config: Config,
    ranks: Ranks,
    code: Code,
    command: str,
    progress: Progress,
    end: Callable[[int, str], None] | None = None,
    data: Any = None,
    **parts: Any,
) -> Result:
    ranks.agree("the programs that they run", program())
    with (
        StopSignals(progress, end) as signals,
        Watchdog(ranks, config.hang_warning, config.hang_limit, progress) as watchdog,
        as_user_errors(),
    ):
        if data is not None and config.data is None:
            data = data if isinstance(data, Dataset) else Dataset.of(data)
            config = dataclasses.replace(config, data=data.source)
        else:
            data = None
        run = set_up(config, ranks, code, data=data, signals=signals, watchdog=watchdog, **parts)
        if data is not None and command == MODULE:
            run.how_to_resume = f'call fit() as before, with out="{run.out}" and resume="auto"'
        else:
            named_code = {name: getattr(run.config, name) or "" for name in OURS} if command == MODULE else {}
            own = "".join(f" --{name} {text}" for name, text in named_code.items() if ":" in text)
            run.how_to_resume = f"{command}{own} --resume --out {run.out}"
        if threading.current_thread() is threading.main_thread():
            signals.heed()  # until here a signal has ended the process: nothing could be lost
        ended = run.run()
    run.model.eval()
    run.model.give_input_grad()
    run.model.info = Info.of(run.describe())
    return Result.of(ended, run)


def _end(ranks: Ranks, number: int, doing: str) -> None:
    who, name = f"rank {ranks.rank} of {ranks.size}", signal.Signals(number).name
    print(f"cnnmpi: error: {who}: {name} asked to stop, but {doing} does not end: not saved", file=sys.stderr)
    ranks.abort(128 + number)
