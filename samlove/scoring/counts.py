"""Counts the pixels of a frame by logit: what J, F and S under any protocol are computed from, in one pass.

Every decision of a protocol is that a logit reaches an edge: the logit of a threshold of F, or of the cut of J or S.
The counts of pixels at or above each edge are therefore enough, and no resized map is kept in memory.

Letters: h and w height and width of the logits, H and W of the target, L = len(EDGES) + 1 levels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numba import njit
from PIL import Image

from samlove.scoring.metrics import THRESHOLDS

Resizing = Literal["bilinear", "bicubic", "floor", "centre"]
Cut = Literal["sigmoid > 0.4", "sigmoid > 0.5", "logit > 0"]
Scale = Literal["sigmoid", "logit"]


def _lowest(sigmoids: np.ndarray) -> np.ndarray:
    """The lowest logits, float32, whose sigmoid (torch's, in float32) reaches each of `sigmoids`, 0 < s <= 1."""

    def floats(order: np.ndarray) -> np.ndarray:  # float32 numbers and their bits, without the sign, have one order
        return np.sign(order).astype(np.float32) * np.abs(order).astype(np.int32).view(np.float32)

    high = np.full(len(sigmoids), np.float32(100).view(np.int32), np.int64)
    low = -high
    while (high - low).max() > 1:
        middle = (low + high) // 2
        reached = torch.from_numpy(floats(middle)).sigmoid().numpy() >= sigmoids
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return floats(high)


_ONE = np.float32(1)
_CURVES = {"sigmoid": np.append(np.float32(-np.inf), _lowest(THRESHOLDS[1:])), "logit": THRESHOLDS}
_ABOVE = _lowest(np.nextafter(np.array([0.4, 0.5], np.float32), _ONE))
_CUTS: dict[Cut, np.float32] = {
    "sigmoid > 0.4": _ABOVE[0],
    "sigmoid > 0.5": _ABOVE[1],
    "logit > 0": np.nextafter(np.float32(0), _ONE),
}
EDGES = np.unique(np.concatenate([_CURVES["sigmoid"][1:], _CURVES["logit"], [*_CUTS.values()]])).astype(np.float32)

# Levels: a logit reaches an edge if it is at or above the edge's level. All logits reach level 0.
CURVE_LEVELS: dict[Scale, np.ndarray] = {
    "sigmoid": np.searchsorted(EDGES, _CURVES["sigmoid"], side="right"),  # (255,) each
    "logit": np.searchsorted(EDGES, _CURVES["logit"], side="right"),
}
CUT_LEVELS: dict[Cut, int] = {cut: int(np.searchsorted(EDGES, edge, side="right")) for cut, edge in _CUTS.items()}


def _first_levels() -> np.ndarray:
    """The level of the lowest number with each upper half of a float32's bits, (65536,): where to start a search."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    lowest = np.where(upper >> 31, upper | 0xFFFF, upper).astype(np.uint32).view(np.float32)
    return np.searchsorted(EDGES, np.nan_to_num(lowest, nan=0), side="right").astype(np.int64)


_FIRST_LEVELS = _first_levels()
_ENDED_EDGES = np.append(EDGES, np.float32(np.inf))


def count(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Pixels of a frame that reach each level: (2, L) int64, outside and inside of the target; level 0 counts all.

    logits: (h, w) float32, finite; resized to the target bilinearly, as by torch's `interpolate` with
    `align_corners=False`. target: (H, W) bool.
    """
    counts = np.zeros((2, len(EDGES) + 1), dtype=np.int64)
    rows, columns = (_axis(*sizes) for sizes in zip(logits.shape, target.shape, strict=True))
    _count(
        np.ascontiguousarray(logits), np.ascontiguousarray(target), *rows, *columns, _FIRST_LEVELS, _ENDED_EDGES, counts
    )
    return counts[:, ::-1].cumsum(1)[:, ::-1]


@njit(nogil=True)
def _count(logits, target, tops, bottoms, downs, lefts, rights, asides, first_levels, edges, counts):
    row = np.empty(target.shape[1], np.float32)
    bits = row.view(np.uint32)
    one = np.float32(1)
    for i in range(target.shape[0]):
        top, bottom, down = logits[tops[i]], logits[bottoms[i]], downs[i]
        for j in range(target.shape[1]):
            left, right, aside = lefts[j], rights[j], asides[j]
            above = (one - aside) * top[left] + aside * top[right]
            below = (one - aside) * bottom[left] + aside * bottom[right]
            row[j] = (one - down) * above + down * below
        for j in range(target.shape[1]):
            level = first_levels[bits[j] >> 16]
            while row[j] >= edges[level]:
                level += 1
            counts[int(target[i, j]), level] += 1


@lru_cache(maxsize=64)
def _axis(source: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` pixels, its two source pixels and the weight of the second, in torch's float32 arithmetic."""
    scale = np.float32(source) / np.float32(size)
    centres = scale * (np.arange(size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    centres = np.maximum(centres, np.float32(0))
    first = np.minimum(centres.astype(np.int64), source - 1)
    second = np.minimum(first + 1, source - 1)
    return first, second, np.clip(centres - first.astype(np.float32), 0, 1).astype(np.float32)


def resize_logits(logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(h, w) float32 -> (H, W) float32, bilinear, by torch; unchanged if the shape fits."""
    if logits.shape == shape:
        return logits
    stacked = torch.from_numpy(np.ascontiguousarray(logits))[None, None]
    return torch.nn.functional.interpolate(stacked, shape, mode="bilinear", align_corners=False)[0, 0].numpy()


def foreground(logits: np.ndarray, shape: tuple[int, ...], cut: Cut) -> np.ndarray:
    """The pixels of the resized logits that the cut takes: bool (H, W)."""
    return resize_logits(logits, shape) >= _CUTS[cut]


def resize_target(target: np.ndarray, size: int, how: Resizing) -> np.ndarray:
    """bool (H, W) -> bool (size, size). A protocol's loader resizes the mask file, which holds 0 and 255, in one way:

    bilinear: rounded to whole grey levels, every pixel above 0 is object; adds up to a source pixel along each edge.
    bicubic: Pillow's, every pixel above 0 is object. floor: OpenCV's nearest pixel. centre: Pillow's nearest pixel.
    """
    if how == "bilinear":
        return resize_logits(target.astype(np.float32), (size, size)) * 255 >= 0.5
    if how == "bicubic":
        image = Image.fromarray(target.astype(np.uint8) * np.uint8(255))
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) > 0
    nearest = _NEAREST[how]
    rows, columns = (nearest(length, size) for length in target.shape)
    return target.take(rows, axis=0).take(columns, axis=1)


def _floor(source: int, size: int) -> np.ndarray:
    """OpenCV's nearest source pixels. The reciprocal of the scale is rounded first, which changes a few sizes."""
    return np.minimum((np.arange(size) * (1 / (size / source))).astype(np.int64), source - 1)


def _centre(source: int, size: int) -> np.ndarray:
    """Pillow's nearest source pixels. Centres are added up, and their rounding error decides between two pixels."""
    steps = np.full(size, source / size)
    steps[0] /= 2
    return np.minimum(np.cumsum(steps).astype(np.int64), source - 1)  # cumsum adds in order


_NEAREST: dict[str, Callable[[int, int], np.ndarray]] = {
    "floor": lru_cache(maxsize=64)(_floor),
    "centre": lru_cache(maxsize=64)(_centre),
}


# --- boundaries ------------------------------------------------------------------------------------------------------


def boundary_f(mask: np.ndarray, target: np.ndarray) -> float:
    """F of the boundaries of two masks, bool (H, W), 0..1: the measure of DAVIS, as in FudanCVL/OmniAVS.

    Precision: the share of the mask's edge pixels within 0.8 % of the diagonal of one of the target's; recall the other
    way round. 1 if neither has edges, 0 if only one has.
    """
    edges, true_edges = _edges(mask), _edges(target)
    if not edges.any() or not true_edges.any():
        return float(edges.any() == true_edges.any())
    offsets = _disk(int(np.ceil(0.008 * np.sqrt(mask.shape[0] ** 2 + mask.shape[1] ** 2))))
    precision = _share_near(edges, true_edges, offsets)
    recall = _share_near(true_edges, edges, offsets)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _edges(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower right neighbour; (H, W) bool."""
    edges = np.zeros_like(mask)
    edges[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edges[:-1] |= mask[:-1] != mask[1:]
    edges[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edges


@lru_cache(maxsize=16)
def _disk(radius: int) -> np.ndarray:
    """The offsets (n, 2) of at most `radius`, nearest first."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].reshape(2, -1)
    squares = y**2 + x**2
    order = np.argsort(squares, kind="stable")
    return np.stack([y, x], axis=1)[order[: (squares <= radius**2).sum()]]


@njit(nogil=True)
def _share_near(edges, others, offsets):
    """The share of the pixels in `edges` with a pixel in `others` at one of the offsets."""
    height, width = edges.shape
    found = total = 0
    for i in range(height):
        for j in range(width):
            if edges[i, j]:
                total += 1
                for k in range(len(offsets)):
                    y, x = i + offsets[k, 0], j + offsets[k, 1]
                    if 0 <= y < height and 0 <= x < width and others[y, x]:
                        found += 1
                        break
    return found / total
