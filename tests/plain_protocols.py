"""The published protocols written out one by one, in float64 and with loops: what the tests compare with."""

import numpy as np
import torch
from PIL import Image


def scores(logits: np.ndarray, target: np.ndarray, null: np.ndarray, name: str) -> list[float]:
    """J, F and S of logits (E,T,h,w), targets (E,T,H,W) and null (E,); NaN where there is none."""
    size = {"official": 256, "tgs_agent": 224, "crab": 224, "crab_plus": 224, "auralsam2": 1024}.get(name)
    shape = (size, size) if size else target.shape[2:]
    x = np.stack([_to(clip, shape) for clip in logits.astype(np.float32)]) if len(logits) else logits
    p = _sigmoid(x)
    resize = {"official": _bilinear, "tgs_agent": _bicubic, "crab": _floor, "crab_plus": _centre, "auralsam2": _centre}
    y = np.stack([[resize[name](m, size) for m in clip] for clip in target]) if size and len(target) else target
    shown, nulls = np.flatnonzero(~null), np.flatnonzero(null)
    four = [shown[i : i + 4] for i in range(0, len(shown), 4)]
    null_four = [nulls[i : i + 4] for i in range(0, len(nulls), 4)]
    if name == "official":
        J = [np.mean([_j(p[e, t] > 0.4, y[e, t]) for e in b for t in range(p.shape[1])]) for b in four]
        F = [_set_f(p[b].reshape(-1, *shape), y[b].reshape(-1, *shape)) for b in four]
        S = [np.sqrt((p[b] > 0.5).mean()) for b in null_four]
    elif name == "simtoken":
        J = [np.mean([_j(p[e, t] > 0.4, y[e, t]) for t in range(p.shape[1])]) for e in shown]
        F = [_set_f(p[e], y[e]) for e in shown]
        S = [np.sqrt((p[e] > 0.5).mean()) for e in nulls]
    elif name == "tgs_agent":
        J = [np.mean([_j(x[e, t] > 0, y[e, t]) for t in range(p.shape[1])]) for e in shown]
        F = [_set_f(p[e], y[e]) for e in shown]
        S = [np.sqrt((x[e, t] > 0).mean()) for e in nulls for t in range(x.shape[1])]
    elif name == "crab":
        J = [_j(p[e, t] > 0.5, y[e, t]) for e in shown for t in range(p.shape[1])]
        F = [_set_f(p[e, t : t + 1], y[e, t : t + 1]) for e in shown for t in range(p.shape[1])]
        S = [np.sqrt((p[e, t] > 0.5).mean()) for e in nulls for t in range(x.shape[1])]
    elif name == "crab_plus":
        frames = [(x[e, t] > 0, y[e, t]) for e in shown for t in range(x.shape[1])]
        J = [(m & g).sum() / (m | g).sum() if (m | g).any() else 1.0 for m, g in frames]
        F = [_one_f(m, g) for m, g in frames]
        shares = [(x[e, t] > 0).mean() for e in nulls for t in range(x.shape[1])]
        S = [np.sqrt(s / (1 - s)) for s in shares if s < 1]
    elif name == "aurora":
        J = [np.mean([_j(p[e, t] > 0.5, y[e, t]) for t in range(p.shape[1])]) for e in shown]
        F = [_set_f(x[e], y[e]) for e in shown]
        S = []
    elif name == "auralsam2":
        J = [np.mean([_j(x[e, t] > 0, y[e, t]) for e in b for t in range(p.shape[1])]) for b in four]
        F = [_set_f(p[b].reshape(-1, *shape), y[b].reshape(-1, *shape)) for b in four]
        S = [(p[nulls] > 0.5).mean()] if len(nulls) else []
    else:
        chosen = range(len(null)) if name == "omniavs_all" else shown
        pairs = [_omniavs((logits[e] > 0).astype(np.float32), target[e] & ~null[e]) for e in chosen]
        J, F, S = [a for a, _ in pairs], [b for _, b in pairs], []
    return [float(np.mean(values)) if len(values) else float("nan") for values in (J, F, S)]


def _to(clip, shape):
    if clip.shape[1:] == tuple(shape):
        return clip
    resized = torch.nn.functional.interpolate(torch.from_numpy(clip)[None].double(), shape, mode="bilinear")
    return resized[0].numpy()


def _sigmoid(x):
    return torch.from_numpy(np.asarray(x, np.float32)).sigmoid().numpy()


def _j(mask, target):
    if not target.any():
        return (~mask).sum() / (mask.size + 1e-7)
    return (mask & target).sum() / ((mask | target).sum() + 1e-7)


def _set_f(values, targets):
    """The maximum of the mean curve over the frames with a target; 0 without any."""
    pairs = [(v, g) for v, g in zip(values, targets, strict=True) if g.any()]
    if not pairs:
        return 0.0
    curve = []
    for i in range(255):
        f = []
        for v, g in pairs:
            m = v >= np.float32(i / 254)
            hit = (m & g).sum()
            precision, recall = hit / (m.sum() + 1e-20), hit / (g.sum() + 1e-20)
            f.append(1.3 * precision * recall / (0.3 * precision + recall) if hit else 0.0)
        curve.append(np.mean(f))
    return max(curve)


def _one_f(mask, target):
    hit = (mask & target).sum()
    precision = hit / mask.sum() if mask.any() else 1.0
    recall = hit / target.sum() if target.any() else 1.0
    return 1.3 * precision * recall / (0.3 * precision + recall) if precision + recall else 0.0


def _omniavs(masks, targets):
    shape = targets.shape[1:]
    grown = _to(masks, shape) > 1e-9
    if not targets.any():
        value = float(not grown.any())
        return value, value
    J = np.mean([((m & g).sum() + 1e-7) / ((m | g).sum() + 1e-7) for m, g in zip(grown, targets, strict=True)])
    return J, np.mean([_boundary(m, g) for m, g in zip(grown, targets, strict=True)])


def _boundary(mask, target):
    radius = int(np.ceil(0.008 * np.hypot(*mask.shape)))
    a, b = (_edges(m) for m in (mask, target))
    if not len(a) or not len(b):
        return float(len(a) == len(b))
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    precision, recall = ((squares.min(axis) <= radius**2).mean() for axis in (1, 0))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _edges(mask):
    found = []
    height, width = mask.shape
    for i in range(height):
        for j in range(width):
            neighbours = [(i, j + 1), (i + 1, j), (i + 1, j + 1)]
            if any(y < height and x < width and mask[y, x] != mask[i, j] for y, x in neighbours):
                found.append((i, j))
    return np.array(found).reshape(-1, 2)


def _bilinear(mask, size):
    grey = _to(mask[None].astype(np.float64) * 255, (size, size))[0]
    return np.floor(grey + 0.5) > 0


def _bicubic(mask, size):
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BICUBIC)) > 0


def _floor(mask, size):
    rows, columns = ([min(int(i * (1 / (size / n))), n - 1) for i in range(size)] for n in mask.shape)
    return mask[np.ix_(rows, columns)]


def _centre(mask, size):
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), Image.Resampling.NEAREST)) > 0
