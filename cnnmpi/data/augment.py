"""Augmentation and normalisation: pure functions of a batch and of explicit draws.

All take images (N, C, H, W), uint8 or float, and return new ones of that shape, channels-last in memory. Channels-last
images are not copied on the way in. The loops run over whole rows of W * C numbers, not over pixels of 3. What draws
them for a batch, and in which order they are applied, says transforms.py.
"""

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnmpi.common.arrays import Array, nchw, nhwc
from cnnmpi.data.dataset import blocks

FEW = 8  # images that are stretched at a time, so that what lies between stays in the processor's cache
LIGHTNESS = 0.299, 0.587, 0.114  # of red, green and blue (ITU-R BT.601)


def random_horizontal_flip(images: Array, flip: Array) -> Array:
    """Mirror those images whose draw ``flip`` (N,), bool, is true."""
    N, C, H, W = images.shape
    rows = nhwc(images).reshape(N, H, W * C).copy()
    mirrored = np.arange(W * C).reshape(W, C)[::-1].ravel()
    if flip.shape != (N,) or flip.dtype != bool:
        raise ValueError(f"random_horizontal_flip: expected {N} draws of bool, got {flip.dtype} {flip.shape}")
    rows[flip] = rows[flip].take(mirrored, axis=2)
    return nchw(rows.reshape(N, H, W, C))


def random_crop(images: Array, top: Array, left: Array, padding: int) -> Array:
    """Pad with ``padding`` zeros on each side and cut out a window of the old size at ``top``, ``left``.

    The draws ``top`` and ``left``, (N,), are integers in 0..2 * padding; raises ValueError for others. A draw equal to
    ``padding`` leaves its image as it is.
    """
    N, C, H, W = images.shape
    for draws in (top, left):
        if draws.shape != (N,) or (N and not 0 <= draws.min() <= draws.max() <= 2 * padding):
            raise ValueError(f"random_crop: expected {N} draws in 0..{2 * padding}")
    padded = np.zeros((N, H + 2 * padding, W + 2 * padding, C), images.dtype)
    padded[:, padding : padding + H, padding : padding + W] = nhwc(images)
    n, h, w, c = padded.strides
    offsets = 2 * padding + 1
    windows = as_strided(padded, (N, offsets, offsets, H, W * C), (n, h, w, h, c), writeable=False)
    return nchw(windows[np.arange(N), top, left].reshape(N, H, W, C))


def random_resized_crop(images: Array, top: Array, left: Array, height: Array, width: Array) -> Array:
    """Cut out a window of each image and enlarge it to the old size, bilinearly (Szegedy et al., 2015).

    The window of image i has ``height[i]`` x ``width[i]`` pixels, its upper left corner at ``top[i]``, ``left[i]``: all
    integers (N,); raises ValueError for windows that are empty or reach beyond the image. A pixel's place is its centre
    and what lies beyond the window's outermost centres is as these, as in torch's ``interpolate(align_corners=False)``.
    uint8 images are rounded to the nearest.
    """
    N, C, H, W = images.shape
    top, left, height, width = _boxes("random_resized_crop", images, top, left, height, width, least=1)
    rows = nhwc(images).reshape(N, H, W * C)
    result = np.empty((N, H, W, C), images.dtype)
    for part in blocks(0, N, FEW):
        columns = _stretched(rows[part], top[part], height[part]).reshape(-1, H, W, C).swapaxes(1, 2)
        pixels = _stretched(columns.reshape(-1, W, H * C), left[part], width[part])
        if images.dtype == np.uint8:
            np.rint(pixels, out=pixels)
        result[part] = pixels.reshape(-1, W, H, C).swapaxes(1, 2)
    return nchw(result)


def color_jitter(images: Array, brightness: Array, contrast: Array, saturation: Array) -> Array:
    """Scale the brightness, then the contrast, then the saturation of each image by its draws, floats (N,).

    With L the lightness of a pixel (0.299 R + 0.587 G + 0.114 B; the mean of other numbers of channels) and m the mean
    of L over the image, x becomes b x, then m + c (x - m), then L + s (x - L): together
    b c (s x + (1 - s) L) + b (1 - c) m. A factor of 1 changes nothing. The result is cut off at 0 and at 1 (255 of
    uint8 images, which are rounded to the nearest). Raises ValueError for draws that are no such numbers.
    """
    N, C, H, W = images.shape
    for draws in (brightness, contrast, saturation):
        if draws.shape != (N,) or not (np.isfinite(draws).all() and (draws >= 0).all()):
            raise ValueError(f"color_jitter: expected {N} finite factors of at least 0")
    white = np.float32(_unit(images))
    pixels = nhwc(images).reshape(N, H * W, C).astype(np.float32)
    weights = np.array(LIGHTNESS if C == 3 else [1 / C] * C, np.float32)
    lightness = pixels[:, :, 0] * weights[0]  # (N, H W); channel by channel, for BLAS would sum in an order of its own
    for channel in range(1, C):
        lightness += pixels[:, :, channel] * weights[channel]
    mean = lightness.mean(axis=1, dtype=np.float64)
    own, grey, shift = (
        factor.astype(np.float32)[:, None]
        for factor in (
            brightness * contrast * saturation,
            brightness * contrast * (1 - saturation),
            brightness * (1 - contrast) * mean,
        )
    )
    lightness *= grey
    lightness += shift
    pixels *= own[:, :, None]
    pixels += lightness[:, :, None]
    np.clip(pixels, 0, white, out=pixels)
    if images.dtype == np.uint8:
        np.rint(pixels, out=pixels)
    return nchw(pixels.astype(images.dtype, copy=False).reshape(N, H, W, C))


def cutout(images: Array, top: Array, left: Array, size: int) -> Array:
    """Set a square of ``size`` pixels, its upper left corner at ``top``, ``left``, to 0 (DeVries and Taylor, 2017).

    The draws ``top`` and ``left``, (N,), are integers in 0..H - size and 0..W - size; raises ValueError for others.
    """
    sides = np.full(len(images), size)
    return _blanked("cutout", images, top, left, sides, sides)


def random_erasing(images: Array, top: Array, left: Array, height: Array, width: Array) -> Array:
    """Set a rectangle of each image to 0, of a size of its own (Zhong et al., 2020).

    Draws as those of ``random_resized_crop``; one of ``height`` 0 leaves its image as it is.
    """
    return _blanked("random_erasing", images, top, left, height, width)


def mixup(images: Array, targets: Array, partner: Array, share: Array) -> tuple[Array, Array]:
    """Blend each image, and its target, with those of its partner (Zhang et al., "mixup", 2018).

    ``images`` are float32, ``targets`` float32 (N, K), such as probabilities of the classes. Of image i remains
    ``share[i]``, the rest is that of image ``partner[i]``: ``share`` are floats in 0..1 and ``partner`` integers in
    0..N-1, both (N,). Returns images and targets. Raises ValueError for others.
    """
    N = len(images)
    _check_partners("mixup", images, targets, partner)
    if share.shape != (N,) or not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"mixup: expected {N} shares in 0..1")
    share = share.astype(np.float32)
    pixels, own = nhwc(images), share[:, None, None, None]
    mixed = pixels * own
    mixed += pixels[partner] * (1 - own)
    return nchw(mixed), _mixed_targets(targets, partner, share)


def cutmix(
    images: Array, targets: Array, partner: Array, top: Array, left: Array, height: Array, width: Array
) -> tuple[Array, Array]:
    """Paste a rectangle of its partner into each image, and mix the targets by area (Yun et al., "CutMix", 2019).

    Images, targets, partners and result as those of ``mixup``, rectangles as those of ``random_erasing``.
    """
    _, _, H, W = images.shape
    _check_partners("cutmix", images, targets, partner)
    top, left, height, width = _boxes("cutmix", images, top, left, height, width)
    pixels = nhwc(images)
    mixed = pixels.copy()
    boxes = np.stack([partner, top, top + height, left, left + width], axis=1).tolist()
    for image, (other, t, bottom, l, right) in zip(mixed, boxes, strict=True):
        image[t:bottom, l:right] = pixels[other, t:bottom, l:right]
    share = (1 - height * width / (H * W)).astype(np.float32)
    return nchw(mixed), _mixed_targets(targets, partner, share)


def probabilities(labels: Array, classes: int) -> Array:
    """Return labels (N,) in 0..``classes`` - 1 as float32 (N, classes), 1 at the class; floats (N, K) stay."""
    if labels.ndim == 2:
        return labels
    hot = np.zeros((len(labels), classes), np.float32)
    hot[np.arange(len(labels)), labels] = 1
    return hot


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return (x - mean) / std for each channel, as float32; x is the image, scaled to [0, 1] if it is uint8."""
    N, C, H, W = images.shape
    mean64, std64 = np.array(mean, np.float64), np.array(std, np.float64)
    if mean64.shape != (C,) or std64.shape != (C,):
        raise ValueError(f"normalize: expected a mean and a std for each of {C} channels, got {mean} and {std}")
    if not (np.isfinite(mean64).all() and np.isfinite(std64).all() and (std64 > 0).all()):
        raise ValueError(f"normalize: means must be finite and stds positive, got {mean} and {std}")
    unit = _unit(images)
    scale = np.tile((1 / (unit * std64)).astype(np.float32), W)
    shift = np.tile((-mean64 / std64).astype(np.float32), W)
    rows = nhwc(images).reshape(N * H, W * C).astype(np.float32)
    rows *= scale
    rows += shift
    return nchw(rows.reshape(N, H, W, C))


def to_unit(images: Array) -> Array:
    """Return uint8 images as float32 in [0, 1]; float images as float32, unchanged."""
    if _unit(images) == 255:
        return nchw(np.divide(nhwc(images), np.float32(255), dtype=np.float32))
    return nchw(nhwc(images).astype(np.float32))


def _unit(images: Array) -> int:
    """Return what stands for 1 in ``images``. Raises ValueError for integers but uint8: their range is not known."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"expected images of uint8, or of floats in 0..1, got {images.dtype}")
    return 255 if images.dtype == np.uint8 else 1


def _stretched(rows: Array, start: Array, length: Array) -> Array:
    """Return (N, H, M) float32: of ``rows`` (N, H, M), ``length[i]`` from ``start[i]`` on, stretched to H by lines."""
    N, H, _ = rows.shape
    at = (np.arange(H) + 0.5) * (length / H)[:, None] - 0.5  # of H centres, within the window
    at = start[:, None] + np.clip(at, 0, (length - 1)[:, None])
    before = at.astype(np.int64)
    after = np.minimum(before + 1, H - 1)  # beyond the window its weight is 0
    weight = (at - before).astype(np.float32)[:, :, None]
    image = np.arange(N)[:, None]
    stretched: Array = rows[image, before].astype(np.float32)
    difference = rows[image, after].astype(np.float32)
    difference -= stretched
    difference *= weight
    stretched += difference
    return stretched


def _blanked(op: str, images: Array, top: Array, left: Array, height: Array, width: Array) -> Array:
    """Return the images with a rectangle of each set to 0."""
    top, left, height, width = _boxes(op, images, top, left, height, width)
    pixels = nhwc(images).copy()
    boxes = np.stack([top, top + height, left, left + width], axis=1).tolist()
    for image, (t, bottom, l, right) in zip(pixels, boxes, strict=True):
        image[t:bottom, l:right] = 0
    return nchw(pixels)


def _mixed_targets(targets: Array, partner: Array, share: Array) -> Array:
    own = share[:, None]
    mixed: Array = targets * own + targets[partner] * (1 - own)
    return mixed


def _boxes(op: str, images: Array, *draws: Array, least: int = 0) -> tuple[Array, ...]:
    """Return the ``draws`` top, left, height and width as int64, whose sums do not overflow.

    Raises ValueError unless all rectangles lie in their images, with sides of at least ``least`` pixels.
    """
    N, _, H, W = images.shape
    if not all(each.shape == (N,) and each.dtype.kind in "iu" for each in draws):
        raise ValueError(f"{op}: expected draws that are {N} integers each")
    top, left, height, width = (each.astype(np.int64) for each in draws)
    for start, length, side in ((top, height, H), (left, width, W)):
        if not ((start >= 0) & (length >= least) & (start + length <= side)).all():
            raise ValueError(f"{op}: the draws give rectangles that do not lie in images of {H}x{W} pixels")
    return top, left, height, width


def _check_partners(op: str, images: Array, targets: Array, partner: Array) -> None:
    """Raise ValueError for what ``mixup`` and ``cutmix`` cannot mix."""
    N = len(images)
    if images.dtype != np.float32 or targets.dtype != np.float32 or targets.ndim != 2 or len(targets) != N:
        raise ValueError(
            f"{op}: expected float32 images and float32 targets (N, K), got {images.dtype} {images.shape} and "
            f"{targets.dtype} {targets.shape}"
        )
    if partner.shape != (N,) or partner.dtype.kind not in "iu" or (N and not 0 <= partner.min() <= partner.max() < N):
        raise ValueError(f"{op}: expected {N} partners in 0..{N - 1}")
