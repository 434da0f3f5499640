"""Checkpoints: {name: array} and attributes <-> one HDF5 file, written atomically and verified when read.

    save(path, {"model/fc.weight": W}, {"epoch": 3})
    arrays, attributes = load(path)

The format is described in docs/checkpoint-format.md; ``python -m cnnmpi.checkpoint show FILE`` prints a file.
"""

from cnnmpi.checkpoint.atomic import CheckpointError, write_atomically
from cnnmpi.checkpoint.format import FORMAT_VERSION, Attribute, load, save, weights_digest

__all__ = ["FORMAT_VERSION", "Attribute", "CheckpointError", "load", "save", "weights_digest", "write_atomically"]
