"""Errors that all ranks have a part in, and the exit codes that they stand for."""


class UserError(Exception):
    """Something that the user can mend: shown as one line, without a traceback."""

    code = 2  # the exit code that it stands for


class NotFiniteError(UserError):
    """A sum over the ranks had a part that was not finite or too large; all ranks meet it at the same step.

    ``backward`` says that it came up in the backward pass: all but gradients was in order.
    """

    def __init__(self, message: str, backward: bool = False) -> None:
        super().__init__(message)
        self.backward = backward


class DisagreementError(UserError):
    """Ranks that must hold the same no longer do: not the user's doing, and gone after a restart."""

    code = 1


class RemoteError(Exception):
    """Another rank failed and has said why; this one ends as well."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rank 0 ended with code {code}")
        self.code = code


def exit_code(error: BaseException) -> int:
    """Return the exit code that an exception stands for: mostly 2 for the user's errors, 130 for Ctrl-C, else 1."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError | RemoteError):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
