"""torch's own files of weights."""

import io
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
import torch

from cnnmpi.functional_torch.arrays import NumpyArray, to_numpy

REMEDY = "save module.state_dict()"


def save_state(state: Mapping[str, NumpyArray]) -> bytes:
    """Return the file that torch.save writes of ``state``: {name: contiguous tensor}."""
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}, file)
    return file.getvalue()


def load_state(file: BinaryIO) -> dict[str, NumpyArray]:
    """Return the arrays of a file of torch.save; no code in it runs. Raises ValueError for what is no state_dict."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # of many kinds, whose texts tell how to run the code in it, or little
        raise ValueError(f"it is damaged, or holds more than tensors: {REMEDY}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, no state_dict: {REMEDY}")
    if others := [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"it holds {', '.join(others):.200}, which are no tensors: {REMEDY}")
    return {str(name): to_numpy(value) for name, value in state.items()}
