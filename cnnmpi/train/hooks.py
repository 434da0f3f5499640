"""Functions of a person's that a run calls: after each step, each epoch and each save."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from cnnmpi.distributed import UserError

Hook = TypeVar("Hook", bound=Callable[..., None])


def on_all_ranks(hook: Hook) -> Hook:
    """Mark a hook, as a decorator: it runs on every rank, where others run on rank 0 alone.

    It must do the same on each: what it changes in the weights is compared between the ranks, as after any step.
    """

    @functools.wraps(hook)  # a bound method takes no attributes of its own
    def everywhere(run: Any, argument: Any) -> None:
        return hook(run, argument)

    everywhere.on_all_ranks = True  # type: ignore[attr-defined]
    return everywhere  # type: ignore[return-value]


class Hooks:
    """The hooks of a run, each a function or several.

    ``on_step(run, loss)`` is called with the step's mean loss, ``on_epoch(run, metrics)`` with what metrics.jsonl
    receives, and ``on_save(run, path)`` with the file just written; ``run`` is the Trainer. They return nothing. What
    one raises ends all ranks.
    """

    def __init__(self, on_step: Any = (), on_epoch: Any = (), on_save: Any = ()) -> None:
        self._hooks = {"on_step": on_step, "on_epoch": on_epoch, "on_save": on_save}
        for when, hooks in self._hooks.items():
            self._hooks[when] = tuple(hooks) if isinstance(hooks, Iterable) else (hooks,)
            for hook in self._hooks[when]:
                if not callable(hook):
                    raise UserError(f"{when}: expected a function, got a {type(hook).__name__}")

    def call(self, when: str, run: Any, argument: Any) -> None:
        """Call the hooks of this kind. Raises UserError for one that returns something."""
        for hook in self._hooks[when]:
            if run.ranks.rank == 0 or getattr(hook, "on_all_ranks", False):
                run.watchdog.note(f"the {when} hook after step {run.step}", slow=True)
                if (result := hook(run, argument)) is not None:
                    name = getattr(hook, "__qualname__", type(hook).__name__)
                    raise UserError(f"the {when} hook {name} returned {result!r:.100}; a hook returns nothing")
