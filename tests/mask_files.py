"""A small dataset, and predicted masks for it in the formats that `samlove score` reads."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pytest import approx

from samlove.data.dataset import RefAvsFolder
from samlove.scoring.mask_formats import open_masks
from samlove.scoring.protocols import score
from samlove.scoring.splits import Scored, read_rows, score_splits

FRAMES, SHAPE = 3, (24, 32)
SPLITS = {"test_s": ["a_x_1", "a_x_2", "b_y_1"], "test_u": ["c_z_1", "c_z_2"], "test_n": ["null_m-a_null_1"]}
UIDS = [uid for uids in SPLITS.values() for uid in uids]
FAST = ["simtoken", "crab_plus", "omniavs"]
Made = tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]


def make_dataset(root: Path) -> Made:
    """A dataset with cues; returns its folder, and logits (T,h,w) and targets (T,H,W) by uid."""
    generator = np.random.default_rng(0)
    table, cues, logits, targets = ["vid,uid,split,fid,exp"], ["uid,fid,exp,template,sight,sound,time"], {}, {}
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    for split, uids in SPLITS.items():
        for i, uid in enumerate(uids):
            media_id, *_ = uid.rsplit("_", 2)
            table.append(f"{media_id.removeprefix('null_m-')},{uid},{split},{i},the thing {i}")
            cues.append(f"{uid},{i},the thing {i},t,{i % 2},1,0")
            disc = np.stack([(x - 10 - t - i) ** 2 + (y - 12) ** 2 - 40 for t in range(FRAMES)]) / 8.0
            targets[uid] = (disc < 0) & (split != "test_n")
            logits[uid] = (-disc + generator.normal(size=disc.shape) + 1).astype(np.float32)
            for t in range(FRAMES):
                save(root / "media" / media_id / "frames" / f"{t}.jpg", np.zeros(SHAPE, np.uint8))
                if split != "test_n":
                    save(root / "gt_mask" / media_id / f"fid_{i}" / f"{t:05d}.png", targets[uid][t] * np.uint8(255))
    (root / "metadata.csv").write_text("\n".join(table) + "\n")
    (root / "cues.csv").write_text("\n".join(cues) + "\n")
    return root, logits, targets


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def scored(root: Path, masks: Path, protocols: list[str] = FAST, splits: list[str] | None = None) -> Scored:
    splits = splits or list(SPLITS)
    folder = RefAvsFolder(root)
    every, rows = read_rows(folder, splits)
    return score_splits(open_masks(masks, every, splits, FRAMES), rows, folder, protocols, 10)


def expected(made: Made, logits: dict[str, np.ndarray], split: str, protocol: str) -> dict[str, float | None]:
    """What the Python function says, in percent and rounded as in the results."""
    arrays = [np.stack([of[uid] for uid in SPLITS[split]]) for of in (logits, made[2])]
    found = score(*arrays, np.full(len(arrays[0]), split == "test_n"), protocol)
    return {k: None if np.isnan(v) else approx(v * (1 if k == "S" else 100), abs=1e-4) for k, v in found.items()}


def rle(mask: np.ndarray, as_text: bool) -> dict:
    """COCO's encoding of a mask, as its format says."""
    flat = np.append(mask.T.ravel(), 2)
    ends = np.flatnonzero(np.diff(np.append(0, flat)))
    runs = np.diff(np.append(0, ends)).tolist()
    if not as_text:
        return {"size": list(mask.shape), "counts": runs}
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            done = value == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if done else 32))
            if done:
                break
    return {"size": list(mask.shape), "counts": text}


def write(kind: str, root: Path, masks: dict[str, np.ndarray]) -> Path:
    """Masks (T,h,w) by uid, in one of the formats; the path to score."""
    if kind == "archive":
        np.savez(root / "masks.npz", **masks)
        return root / "masks.npz"
    if kind.startswith("rle"):
        path, start = root / "masks.json", int(kind == "rle list from 1")
        coded = {uid: [rle(mask, kind != "rle") for mask in of] for uid, of in masks.items()}
        entries = [
            {"uid": uid, "frame": t, "segmentation": mask}
            for uid, of in coded.items()
            for t, mask in enumerate(of, start)
        ]
        path.write_text(json.dumps(entries if "list" in kind else coded))
        return path
    for uid, of_uid in masks.items():
        media_id, name, number = uid.rsplit("_", 2)
        if kind == "arrays":
            np.save(root / f"{uid}.npy", of_uid[:, None])
        for t, mask in enumerate(of_uid):
            path = {
                "png": root / "test" / uid / f"{t:05d}.png",
                "zero and one": root / uid / "mask" / f"{t}.png",
                "flat": root / f"{uid}_{t}.png",
                "by video": root / media_id / f"{name}_{number}" / f"frame_{t + 1}.png",
                "palette": root / uid / f"{t}.png",
                "colour": root / uid / f"{t}.png",
                "frames": root / uid / f"{t}.npy",
            }.get(kind)
            if kind == "frames":
                path.parent.mkdir(exist_ok=True)
                np.save(path, mask)
            elif kind == "palette":
                path.parent.mkdir(exist_ok=True)
                image = Image.fromarray(mask.astype(np.uint8), "P")
                image.putpalette([0, 0, 0, 128, 0, 0])
                image.save(path)
            elif path:
                image = mask.astype(np.uint8) * np.uint8(1 if kind == "zero and one" else 255)
                save(path, np.stack([image] * 3, axis=-1) if kind == "colour" else image)
    return root
