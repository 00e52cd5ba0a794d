"""Backward CROWN once more, in NumPy on dense matrices: no autograd, no convolutions, no batches.

A network is a list of affine maps with a ReLU between each two. The policy is the package's: the interval first, then
of each unit the side that may show it to be stable, then the other one where it didn't.
"""

from __future__ import annotations

import numpy as np
import torch


def affine(function, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and offset of an affine map of float64 tensors (1, ...), by its values on the unit vectors."""
    with torch.no_grad():
        offset = function(torch.zeros(1, size, dtype=torch.float64)).flatten().numpy()
        columns = [function(row[None]).flatten().numpy() - offset for row in torch.eye(size, dtype=torch.float64)]
    return np.stack(columns, 1), offset


def crown(layers, x: np.ndarray, radius: float, norm: str, label: int) -> tuple[float, list]:
    """The bound of the margin, and the bounds of each ReLU's inputs."""
    box = np.clip(x - radius, 0, 1), np.clip(x + radius, 0, 1)
    known: list[tuple[np.ndarray, np.ndarray]] = []

    def lower(matrix, offset, depth):
        """Lower bounds of matrix · (input of layer `depth`) + offset."""
        for low, up in reversed(known[:depth]):
            inner_matrix, inner_offset = layers[depth - 1]
            depth -= 1
            new = np.zeros_like(matrix)
            offset = offset.copy()
            for j in range(matrix.shape[1]):
                if low[j] >= 0:
                    new[:, j] = matrix[:, j]
                elif up[j] > 0:
                    slope = up[j] / (up[j] - low[j])
                    flat = 1.0 if up[j] > -low[j] else 0.0
                    new[:, j] = np.where(matrix[:, j] >= 0, flat, slope) * matrix[:, j]
                    offset += np.minimum(matrix[:, j], 0) * -slope * low[j]
            matrix, offset = new @ inner_matrix, new @ inner_offset + offset
        at_box = np.maximum(matrix, 0) @ box[0] + np.minimum(matrix, 0) @ box[1] + offset
        if norm == "linf":
            return at_box
        return np.maximum(at_box, matrix @ x + offset - radius * np.sqrt((matrix**2).sum(1)))

    low, up = box
    value = x
    for depth, (matrix, offset) in enumerate(layers[:-1]):
        center, half = matrix @ (low + up) / 2 + offset, np.abs(matrix) @ (up - low) / 2
        low, up, value = center - half, center + half, matrix @ value + offset
        exact = norm == "linf" and depth == 0
        below, above = lower(matrix, offset, depth), -lower(-matrix, -offset, depth)
        for j in range(len(low)):
            for side in ("low", "up") if value[j] >= 0 else ("up", "low"):
                if exact or low[j] >= 0 or up[j] <= 0:
                    continue
                if side == "low":
                    low[j] = max(low[j], below[j])
                else:
                    up[j] = min(up[j], above[j])
        known.append((low, up))
        value, low, up = np.maximum(value, 0), np.maximum(low, 0), np.maximum(up, 0)
    matrix, offset = layers[-1]
    others = [j for j in range(len(offset)) if j != label]
    margins = lower(matrix[label] - matrix[others], offset[label] - offset[others], len(layers) - 1)
    return float(margins.min()), known
