"""Several views of an image, over which a trained model's outputs are averaged (test-time augmentation)."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from cnnmpi.common.arrays import Array, nchw, nhwc

Views = Literal["none", "flip", "flip+shift"]
SHIFTS = (0, 0), (-1, -1), (1, 1)  # in pixels, down and to the right


def views(images: Array, kind: Views = "none") -> Iterator[Array]:
    """Yield the views of ``images`` (N, C, H, W) that ``kind`` names: each of that shape, channels-last in memory.

    "none" is the images alone; "flip" they and their mirror images; "flip+shift" both of these as they are, moved by a
    pixel up and to the left, and down and to the right, where the border is repeated: 6 views.
    """
    if kind not in ("none", "flip", "flip+shift"):
        raise ValueError(f"tta: expected none, flip or flip+shift, got {kind!r}")
    for down, right in SHIFTS if kind == "flip+shift" else SHIFTS[:1]:
        moved = _moved(images, down, right)
        yield moved
        if kind != "none":
            yield nchw(np.ascontiguousarray(nhwc(moved)[:, :, ::-1]))


def _moved(images: Array, down: int, right: int) -> Array:
    """Return the images moved by so many pixels; what comes in is the border."""
    if not down and not right:
        return images
    _, _, H, W = images.shape
    rows, columns = np.clip(np.arange(H) - down, 0, H - 1), np.clip(np.arange(W) - right, 0, W - 1)
    return nchw(nhwc(images)[:, rows[:, None], columns])
