"""Scikit-learn's handwritten digits at the size of CIFAR-10: a real task that needs no download."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from wdat.data.splits import Splits

TEST = 360
"""Number of test images: the last fifth of the 1,797."""


def digits() -> Splits:
    """1,437 training and 360 test images of 32×32×3, ten classes.

    The 8×8 originals, with values 0 to 16, are enlarged bilinearly and repeated over three channels. The last 360 are
    the test set, whatever the seed of the run.
    """
    from sklearn.datasets import load_digits  # a second's import, for this source alone

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).reshape(-1, 1, 8, 8)
    large = interpolate(small, scale_factor=4, mode="bilinear", align_corners=False)  # multiples of 1/64: exact
    images = (large * 255 / 16).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    y = torch.from_numpy(labels).to(torch.int64)
    return Splits(images[:-TEST], y[:-TEST], images[-TEST:], y[-TEST:])
