"""Arrays as pictures: confusion matrices, images side by side, filters. Pixels are uint8, (H, W, 3)."""

import math

import numpy as np

from cnnmpi.common.arrays import Array

LEAST = 400  # pixels of a side, at which a cell can still be seen
FULL = np.array([11, 98, 196])  # the colour of all images of a class


def confusion_pixels(matrix: Array) -> Array:
    """Return a picture of a confusion matrix (K, K): the darker [row, column], the more of the row is there."""
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    shade = np.sqrt(parts)[:, :, None]  # so that one image in a hundred is seen, too
    pixels = np.rint(255 - shade * (255 - FULL)).astype(np.uint8)
    times = max(1, LEAST // len(matrix))
    large: Array = pixels.repeat(times, axis=0).repeat(times, axis=1)
    return large


def grid(images: Array, gap: int = 2) -> Array:
    """Return images (N, C, H, W), uint8 or floats in 0..1, side by side in about a square, on gray.

    Of other numbers of channels than 3 the first one is shown.
    """
    images = to_uint8(images)
    images = images if images.shape[1] == 3 else images[:, :1].repeat(3, axis=1)
    number, _, height, width = images.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    pixels = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 128, np.uint8)
    for index, image in enumerate(images):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        pixels[y : y + height, x : x + width] = image.transpose(1, 2, 0)
    return pixels


def filter_images(weight: Array) -> Array:
    """Return filters (O, C, kH, kW) as images (N, 3, kH, kW) of floats in 0..1: gray is 0.

    A filter of three channels is one image in colour, of others each channel is one in gray. Each has its own scale.
    """
    if weight.shape[1] != 3:
        weight = weight.reshape(-1, 1, *weight.shape[2:]).repeat(3, axis=1)
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    images: Array = 0.5 + 0.5 * weight / np.where(largest > 0, largest, 1)
    return images


def to_uint8(images: Array) -> Array:
    """Return uint8 images as they are, and others, of 0..1, scaled to 0..255."""
    if images.dtype == np.uint8:
        return images
    scaled: Array = np.rint(np.clip(np.nan_to_num(images), 0, 1) * 255).astype(np.uint8)
    return scaled
