"""What data and checkpoints refuse, as the one line that a user sees."""

import contextlib
from collections.abc import Iterator

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.data import DataError
from cnnmpi.distributed import UserError


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn what data and checkpoints refuse into UserError."""
    try:
        yield
    except (DataError, CheckpointError) as error:
        raise UserError(str(error)) from None
