"""J, F and S under each published protocol of Ref-AVS: one description each, and one computation for all.

Source: the evaluation programs of the repositories that `Protocol.used_by` names. They differ in the size at which
masks are compared, in how the target gets to that size, in the cuts of J and S, in what F is and on which frames its
maximum is taken, and in averaging; docs/protocols.md explains the effect.

Letters: E expressions, T frames, h and w height and width of the logits, H and W of the target.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from samlove.errors import RequestError, SamloveError
from samlove.scoring.counts import (
    CURVE_LEVELS,
    CUT_LEVELS,
    Cut,
    Resizing,
    Scale,
    boundary_f,
    count,
    foreground,
    resize_logits,
    resize_target,
)
from samlove.scoring.metrics import BETA_SQUARED, Array, f_curves, overlaps

BATCH = 4  # expressions
Group = Literal["frame", "expression", "batch", "split"]
Scores = dict[str, float]
Frame = tuple[np.ndarray, np.ndarray]  # logits (h, w) float32, target (H, W) bool


@dataclass(frozen=True)
class Protocol:
    """How masks become scores."""

    used_by: str
    size: int | None  # masks are compared at size x size; None: at the size of the mask file
    target: Resizing | None  # how the target gets there
    cut: Cut  # J: which pixels are foreground
    # J of a frame without a target is the fraction of correctly empty pixels ("share"; "bfloat16": with all counts in
    # that precision), or 1 if the mask is empty, else 0 ("exact").
    region: Literal["share", "bfloat16", "exact"]
    # F: the maximum of the curve over 255 thresholds, or that of the one mask, or of the boundaries of the one mask.
    # boundary: the mask is cut before it is resized; an expression never visible scores 1 if its mask is empty, else 0.
    f: Literal["curve", "mask", "boundary"]
    scale: Scale  # on which the thresholds of the curve lie
    group: Group  # frames that share one threshold of F; J and F are means over the groups
    null_group: Group | None  # frames on which S is one value; S is the mean over the groups; None: no S
    null_cut: Cut = "sigmoid > 0.5"
    root: bool = True  # S: the square root of the fraction of marked pixels, or that fraction
    of: Literal["all pixels", "background"] = "all pixels"  # S: fraction of these pixels
    takes_null: bool = False  # J and F: null expressions count as expressions that are never visible

    @property
    def needs_scores(self) -> bool:
        """Whether F needs a score per pixel: a binary mask has no curve."""
        return self.f == "curve"


def _of(used_by: str, size: int | None, target: Resizing | None, cut: Cut, group: Group, **other: Any) -> Protocol:
    fields = {"region": "share", "f": "curve", "scale": "sigmoid", "null_group": group} | other
    return Protocol(used_by, size, target, cut, group=group, **fields)


_OISA = "OISA, for its own set (FudanCVL/OmniAVS, ICCV 2025)"
_BOUNDARY: dict[str, Any] = {"region": "exact", "f": "boundary", "null_group": None}
PROTOCOLS: dict[str, Protocol] = {
    "official": _of("EEMC (GeWu-Lab/Ref-AVS, ECCV 2024)", 256, "bilinear", "sigmoid > 0.4", "batch"),
    "simtoken": _of("SimToken (ICASSP 2026), ALS3P's training", None, None, "sigmoid > 0.4", "expression"),
    "als3p_infer": _of("ALS3P's inference", None, None, "sigmoid > 0.4", "expression", region="bfloat16"),
    "tgs_agent": _of("TGS-Agent (AAAI 2026)", 224, "bicubic", "logit > 0", "expression", null_group="frame",
                     null_cut="logit > 0"),
    "crab": _of("Crab (CVPR 2025)", 224, "floor", "sigmoid > 0.5", "frame"),
    "crab_plus": _of("Crab+ (arXiv 2603.04128)", 224, "centre", "logit > 0", "frame", region="exact", f="mask",
                     null_cut="logit > 0", of="background"),
    "omniavs": _of(_OISA, None, None, "logit > 0", "expression", **_BOUNDARY),
    "omniavs_all": _of(f"{_OISA}, with null expressions", None, None, "logit > 0", "expression", takes_null=True,
                       **_BOUNDARY),
    "aurora": _of("AURORA (AAAI 2026)", None, None, "sigmoid > 0.5", "expression", scale="logit", null_group=None),
    "auralsam2": _of("AuralSAM2 (arXiv 2506.01015)", 1024, "centre", "logit > 0", "batch", null_group="split",
                     root=False),
}  # fmt: skip


class Levels(NamedTuple):
    """Where to find, in counts of pixels that reach each level, those of a protocol's decisions."""

    curve: np.ndarray  # (255,)
    cut: int
    null_cut: int


class Measure(NamedTuple):
    """What one expression contributes to the scores of a split. J and F are NaN if it counts for S only."""

    null: bool
    J: float
    F: float  # with the expression, or each of its frames, as a group
    curve: np.ndarray | None  # (255,) sum over the frames with a target, for groups of several expressions
    visible: int  # frames with a target
    marked: np.ndarray  # (T,) foreground pixels at the cut of S
    pixels: np.ndarray  # (T,) all pixels


NAN = float("nan")


def score(logits: Array, target: Array, null: Array, protocol: str) -> Scores:
    """{"J", "F", "J&F", "S"} of a split under the protocol of that name in PROTOCOLS.

    logits: (E, T, h, w) any float dtype, NumPy or torch: mask logits of the whole frame at any size. target:
    (E, T, H, W) bool at the size of the mask files. null: (E,) bool, True for null expressions, whose target is taken
    as empty. The expressions are in the order of the dataset, which matters if the protocol scores batches.
    Scores are fractions, 0..1 (S over the background may exceed 1), J&F is the mean of the final J and F; NaN where the
    protocol has no such score or the split no such expression.
    Raises RequestError for an unknown name, SamloveError if shapes or dtypes do not fit or a logit is not finite.
    """
    if protocol not in PROTOCOLS:
        raise RequestError(f"no protocol {protocol!r}; expected one of {', '.join(PROTOCOLS)}")
    nulls = np.asarray(null)
    _check_shapes(logits, target, nulls)

    def measured(i: int) -> Measure:
        frames = list(zip(finite(logits[i], f"logits[{i}]"), np.asarray(target[i], dtype=bool), strict=True))
        return measure(frames, bool(nulls[i]), [protocol])[protocol]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return summarise(list(pool.map(measured, range(len(nulls)))), PROTOCOLS[protocol])


def finite(logits: Array, name: str) -> np.ndarray:
    """Logits as float32 on the CPU. Raises SamloveError, naming them, unless they are floats and finite."""
    values: Array = logits.detach().cpu() if isinstance(logits, torch.Tensor) else np.asarray(logits)
    if not (values.is_floating_point() if isinstance(values, torch.Tensor) else values.dtype.kind == "f"):
        raise SamloveError(f"{name}: expected logits as floats, found {logits.dtype}; a mask is not a logit")
    with np.errstate(over="ignore"):
        values = np.array(values.float().numpy() if isinstance(values, torch.Tensor) else values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise SamloveError(f"{name}: expected finite logits, found NaN or infinity (in float32)")
    return values


def _check_shapes(logits: Array, target: Array, null: np.ndarray) -> None:
    shapes = [tuple(array.shape) for array in (logits, target, null)]
    if [len(shape) for shape in shapes] != [4, 4, 1] or shapes[0][:2] != shapes[1][:2] or shapes[0][:1] != shapes[2]:
        found = ", ".join(map(str, shapes))
        raise SamloveError(f"expected logits (E, T, h, w), target (E, T, H, W) and null (E,), found {found}")
    if shapes[2][0] and 0 in (*shapes[0], *shapes[1]):
        raise SamloveError(f"expected at least one frame and one pixel, found {shapes[0]} and {shapes[1]}")


# --- one expression --------------------------------------------------------------------------------------------------


def measure(frames: Sequence[Frame], null: bool, protocols: Iterable[str]) -> dict[str, Measure]:
    """What an expression contributes under each of the protocols.

    frames: T of them; sizes may differ. The target of a null expression is taken as empty. Counts are shared between
    protocols.
    """
    if null:
        frames = [(logits, np.zeros_like(target)) for logits, target in frames]
    shared: dict[tuple[int | None, Resizing | None], np.ndarray] = {}
    found = {}
    for name in protocols:
        protocol = PROTOCOLS[name]
        if protocol.f == "boundary":
            found[name] = _boundary_measure(frames, null, protocol)
            continue
        if null and protocol.null_group is None:
            found[name] = Measure(True, NAN, NAN, None, 0, np.empty(0), np.empty(0))
            continue
        way = (protocol.size, None if null else protocol.target)
        if way not in shared:
            shared[way] = np.stack([count(logits, _resized(target, *way)) for logits, target in frames])
        levels = Levels(CURVE_LEVELS[protocol.scale], CUT_LEVELS[protocol.cut], CUT_LEVELS[protocol.null_cut])
        found[name] = measure_counts(shared[way], null, protocol, levels)
        if protocol.region == "bfloat16" and not null:
            found[name] = found[name]._replace(J=_bfloat16_overlap(frames, protocol.cut))
    return found


def _resized(target: np.ndarray, size: int | None, how: Resizing | None) -> np.ndarray:
    if size is None:
        return target
    return np.zeros((size, size), dtype=bool) if how is None else resize_target(target, size, how)


def measure_counts(counts: np.ndarray, null: bool, protocol: Protocol, levels: Levels) -> Measure:
    """What an expression contributes, from (T, 2, L) pixels that reach each level, outside and inside of the target."""
    pixels, marked = counts[:, :, 0], counts[:, :, levels.null_cut].sum(1)  # (T, 2), (T,)
    if null:
        return Measure(True, NAN, NAN, None, 0, marked, pixels.sum(1))
    cut, seen = counts[:, :, levels.cut], pixels[:, 1] > 0
    J = overlaps(cut, pixels) if protocol.region != "exact" else _exact_overlaps(cut, pixels)
    if protocol.f == "mask":
        F = _mask_f(cut, pixels).mean()
        return Measure(False, float(J.mean()), float(F), None, int(seen.sum()), marked, pixels.sum(1))
    rounded = _bfloat16(pixels[:, 1]) if protocol.region == "bfloat16" else pixels[:, 1]
    curves = f_curves(counts[seen][:, :, levels.curve], rounded[seen])  # (visible frames, 255)
    # A group without a visible frame has an F of 0, and counts.
    F = curves.max(1).sum() / len(counts) if protocol.group == "frame" else curves.sum(0).max() / max(len(curves), 1)
    curve = curves.sum(0) if protocol.group == "batch" else None
    return Measure(False, float(J.mean()), float(F), curve, len(curves), marked, pixels.sum(1))


def _exact_overlaps(cut: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Intersection over union of each frame, (T,); 1 if both are empty."""
    union = cut[:, 0] + pixels[:, 1]
    return np.where(union > 0, cut[:, 1] / np.maximum(union, 1), 1.0)


def _mask_f(cut: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """F of each frame, (T,), at one cut. Nothing predicted: precision 1; nothing to find: recall 1."""
    predicted, target = cut.sum(1), pixels[:, 1]
    precision = np.where(predicted > 0, cut[:, 1] / np.maximum(predicted, 1), 1.0)
    recall = np.where(target > 0, cut[:, 1] / np.maximum(target, 1), 1.0)
    weighted = BETA_SQUARED * precision + recall
    return np.where(weighted > 0, (1 + BETA_SQUARED) * precision * recall / np.where(weighted > 0, weighted, 1), 0.0)


def _bfloat16(values: np.ndarray | np.floating | float) -> np.ndarray:
    """Values rounded to bfloat16, as float32."""
    return torch.as_tensor(values, dtype=torch.float32).bfloat16().float().numpy()


def _bfloat16_overlap(frames: Sequence[Frame], cut: Cut) -> float:
    """J of an expression with every count a sum of row counts, and every result, rounded to bfloat16."""

    def pixels(mask: np.ndarray) -> np.ndarray:
        return _bfloat16(_bfloat16(mask.sum(1)).sum(dtype=np.float32))

    ratios = []
    for logits, target in frames:
        mask = foreground(logits, target.shape, cut)
        if target.any():
            part, whole = pixels(mask & target), pixels(mask | target)
        else:
            part, whole = pixels(~mask), _bfloat16(target.size)
        ratios.append(_bfloat16(part / _bfloat16(whole + np.float32(1e-7))))
    return float(_bfloat16(_bfloat16(np.sum(ratios, dtype=np.float32)) / np.float32(len(ratios))))


def _boundary_measure(frames: Sequence[Frame], null: bool, protocol: Protocol) -> Measure:
    if null and not protocol.takes_null:
        return Measure(True, NAN, NAN, None, 0, np.empty(0), np.empty(0))
    # Every pixel that the bilinear resizing reaches from the binary mask is object: the object grows.
    masks = [resize_logits(foreground(lo, lo.shape, protocol.cut).astype(np.float32), t.shape) > 0 for lo, t in frames]
    targets = [target for _, target in frames]
    visible = sum(target.any() for target in targets)
    if not visible:
        J = F = float(not any(mask.any() for mask in masks))
    else:
        pairs = list(zip(masks, targets, strict=True))
        F = float(np.mean([boundary_f(mask, target) for mask, target in pairs]))
        both = [np.count_nonzero(mask & target) for mask, target in pairs]
        any_ = [np.count_nonzero(mask | target) for mask, target in pairs]
        J = float(np.mean([(b + 1e-7) / (a + 1e-7) for b, a in zip(both, any_, strict=True)]))
    return Measure(null, J, F, None, int(visible), np.empty(0), np.empty(0))


# --- a split ---------------------------------------------------------------------------------------------------------


def summarise(measures: Sequence[Measure], protocol: Protocol) -> Scores:
    """{"J", "F", "J&F", "S"} of expressions in the order of the dataset, null ones and others apart, as in `score`."""
    groups = [group_scores(group) for group in grouped([m for m in measures if not np.isnan(m.J)], protocol.group)]
    J, F = ([group[i] for group in groups] for i in range(2))
    S: list[float] = []
    if protocol.null_group is not None:
        nulls = [m for m in measures if m.null]
        S = [s for group in grouped(nulls, protocol.null_group) for s in null_scores(group, protocol)]
    means = [float(np.mean(values)) if values else NAN for values in (J, F, S)]
    return {"J": means[0], "F": means[1], "J&F": (means[0] + means[1]) / 2, "S": means[2]}


def grouped(measures: list[Measure], group: Group) -> list[list[Measure]]:
    """The expressions that are scored together; the last batch may be smaller, and weighs as much as the others."""
    size = {"batch": BATCH, "split": max(len(measures), 1)}.get(group, 1)
    return [measures[i : i + size] for i in range(0, len(measures), size)]


def group_scores(group: list[Measure]) -> tuple[float, float]:
    """J and F of expressions that are scored together; F is 0 if no frame has a target."""
    J = float(np.mean([m.J for m in group]))
    curves = [m.curve for m in group if m.curve is not None]
    if not curves:
        return J, float(np.mean([m.F for m in group]))
    return J, float(np.sum(curves, axis=0).max() / max(sum(m.visible for m in group), 1))


def null_scores(group: list[Measure], protocol: Protocol) -> list[float]:
    """S of null expressions that are scored together: one value, or one per frame."""
    marked, pixels = (np.concatenate([m[i] for m in group]).astype(float) for i in (5, 6))
    if protocol.null_group != "frame":
        marked, pixels = marked.sum(keepdims=True), pixels.sum(keepdims=True)
    if protocol.of == "background":
        pixels = pixels - marked
        marked, pixels = marked[pixels > 0], pixels[pixels > 0]  # a frame without background has no S
    fractions = marked / pixels
    return [float(s) for s in (np.sqrt(fractions) if protocol.root else fractions)]
