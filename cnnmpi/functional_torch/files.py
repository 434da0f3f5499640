"""torch's own files of weights."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from cnnmpi.functional_torch.arrays import NumpyArray, to_numpy


def save_state(state: Mapping[str, NumpyArray]) -> bytes:
    """Return the file that torch.save writes of ``state``: {name: contiguous tensor}."""
    file = io.BytesIO()
    torch.save({name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}, file)
    return file.getvalue()


def load_state(path: Path) -> dict[str, NumpyArray]:
    """Return the arrays of a file of torch.save; no code in it runs. Raises ValueError for what is no state_dict."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("it holds no state_dict, {name: tensor}")
    return {str(name): to_numpy(value) for name, value in state.items()}
