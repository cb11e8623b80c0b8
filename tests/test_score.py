"""`samlove score`: the same masks in every format, what is odd about them, errors, and two methods compared."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from samlove.cli.main import app
from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError, SamloveError
from samlove.scoring.compare import paired_bootstrap
from samlove.scoring.mask_formats import _BIN_LOGITS, open_masks
from samlove.scoring.masks import grey_logits
from samlove.scoring.metrics import EDGES, quantise
from samlove.scoring.protocols import PROTOCOLS, score
from samlove.scoring.splits import Scored, compare, read_rows, score_splits
from stores import PredictionWriter
from tests.plain_user import run_as_plain_user

FRAMES, SHAPE = 3, (24, 32)
SPLITS = {"test_s": ["a_x_1", "a_x_2", "b_y_1"], "test_u": ["c_z_1", "c_z_2"], "test_n": ["null_m-a_null_1"]}
UIDS = [uid for uids in SPLITS.values() for uid in uids]
FAST = ["simtoken", "crab_plus", "omniavs"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A dataset with cues, and logits (T,h,w) and targets (T,H,W) by uid."""
    root, generator = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
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


def expected(made, logits: dict[str, np.ndarray], split: str, protocol: str) -> dict[str, float | None]:
    """What the Python function says, in percent and rounded as in the results."""
    arrays = [np.stack([of[uid] for uid in SPLITS[split]]) for of in (logits, made[2])]
    found = score(*arrays, np.full(len(arrays[0]), split == "test_n"), protocol)
    return {k: None if np.isnan(v) else pytest.approx(v * (1 if k == "S" else 100), abs=1e-4) for k, v in found.items()}


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


def test_logits_score_as_in_python(made, tmp_path):
    root, logits, _ = made
    for split, uids in SPLITS.items():
        np.save(tmp_path / f"{split}.npy", np.stack([logits[uid] for uid in uids]))
    found = scored(root, tmp_path, [*FAST, "official", "tgs_agent", "crab", "als3p_infer", "aurora"])
    for name, of_splits in found.protocols.items():
        for split in SPLITS:
            assert of_splits[split] == expected(made, logits, split, name), (name, split)
        assert of_splits["mix"]["J"] == pytest.approx((of_splits["test_s"]["J"] + of_splits["test_u"]["J"]) / 2)
    assert found.counts["test_n"] == dict.fromkeys(found.counts["test_n"], 0) | {"expressions": 1, "null": 1}


def write(kind: str, root: Path, masks: dict[str, np.ndarray]) -> Path:
    """Masks (T,h,w) by uid, in one of the formats; the path to score."""
    if kind == "archive":
        np.savez(root / "masks.npz", **masks)
        return root / "masks.npz"
    if kind in ("rle", "rle text", "rle list"):
        path = root / "masks.json"
        coded = {uid: [rle(mask, kind != "rle") for mask in of] for uid, of in masks.items()}
        entries = [
            {"uid": uid, "frame": t, "segmentation": mask} for uid, of in coded.items() for t, mask in enumerate(of)
        ]
        path.write_text(json.dumps(entries if kind == "rle list" else coded))
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


KINDS = ["png", "zero and one", "flat", "by video", "palette", "colour", "arrays", "frames", "archive", "rle",
         "rle text", "rle list"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_binary_mask_scores_the_same_in_every_format(made, tmp_path, kind):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    found = scored(root, write(kind, tmp_path, masks))
    binary = {uid: grey_logits(mask * 255, 255) for uid, mask in masks.items()}
    for split in SPLITS:
        for name in ("crab_plus", "omniavs"):
            assert found.protocols[name][split] == expected(made, binary, split, name)
        of_curve = expected(made, binary, split, "simtoken") | {"F": None, "J&F": None}  # no curve
        assert found.protocols["simtoken"][split] == of_curve
    assert not any(found.counts[split][key] for split in SPLITS for key in ("missing", "incomplete", "long"))


def test_grey_levels_and_stored_bins_are_scores(made, tmp_path):
    root, logits, _ = made
    for uid, of_uid in logits.items():
        for t, frame in enumerate(of_uid):
            save(tmp_path / "png" / uid / f"{t}.png", np.round(255 / (1 + np.exp(-frame))).astype(np.uint8))
    grey = {uid: grey_logits(np.round(255 / (1 + np.exp(-of))), 255) for uid, of in logits.items()}
    found = scored(root, tmp_path / "png")
    assert found.protocols["simtoken"]["test_s"] == expected(made, grey, "test_s", "simtoken")
    square = {uid: of[:, :, :24] for uid, of in logits.items()}
    for split, uids in SPLITS.items():
        with PredictionWriter(tmp_path / "run" / split / "predictions.h5", FRAMES, 24, EDGES) as writer:
            writer.write(uids, np.stack([quantise(square[uid]) for uid in uids]))
    bins = {uid: _BIN_LOGITS[quantise(of)] for uid, of in square.items()}
    found = scored(root, tmp_path / "run")
    assert found.protocols["simtoken"]["test_u"] == expected(made, bins, "test_u", "simtoken")
    assert found.counts["test_u"]["other_size"] == 2


def test_the_logit_of_a_bin_lies_in_it():
    np.testing.assert_array_equal(quantise(_BIN_LOGITS), np.arange(256))


def test_what_is_odd_is_counted_and_counts_as_stated(made, tmp_path):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    write("png", tmp_path, masks)
    shutil.rmtree(tmp_path / "test" / "a_x_2")  # missing
    (tmp_path / "test" / "b_y_1" / "00001.png").unlink()  # incomplete
    save(tmp_path / "test" / "c_z_1" / "00007.png", np.zeros(SHAPE, np.uint8))  # long
    save(tmp_path / "test" / "c_z_2" / "00000.png", np.full((12, 16), 255, np.uint8))  # another size
    save(tmp_path / "again" / "a_x_1" / "00000.png", np.zeros(SHAPE, np.uint8))  # doubled: it comes first
    save(tmp_path / "other" / "0.png", np.zeros(SHAPE, np.uint8))  # unused
    result = CliRunner().invoke(
        app, ["score", str(tmp_path), "--dataset", str(root), "--protocol", "omniavs,crab_plus,simtoken", "--out",
              str(tmp_path / "scores.json")]
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("test_s: 1 without any mask: every frame counts as an empty mask", "test_s: 1 without a mask on some",
                 "test_u: 1 with masks after the last frame", "test_u: 1 with masks of another size",
                 "1 masks doubled: only the first is used", "1 masks of no expression or no known format: not used", "other/0.png",
                 "Not computed: F and J&F of simtoken.", "OISA", "Crab+"):  # fmt: skip
        assert text in result.output, result.output
    assert max(map(len, result.stdout.splitlines())) < 120 + len(str(tmp_path))
    content = json.loads((tmp_path / "scores.json").read_text())
    (method,) = content["methods"]
    assert method["binary"] and method["rows"]["test_s"] == {
        "expressions": 3, "null": 0, "missing": 1, "incomplete": 1, "long": 0, "other_size": 0, "shared": 0
    }  # fmt: skip
    assert method["scores"]["simtoken"]["test_s"]["F"] is None and content["used_by"]["crab_plus"].startswith("Crab+")
    empty = np.zeros_like(masks["a_x_1"])
    masks["a_x_2"] = empty
    masks["b_y_1"] = np.where(np.arange(FRAMES)[:, None, None] == 1, False, masks["b_y_1"])
    masks["a_x_1"] = np.where(np.arange(FRAMES)[:, None, None] == 0, False, masks["a_x_1"])
    binary = {uid: grey_logits(mask * 255, 255) for uid, mask in masks.items()}
    assert method["scores"]["omniavs"]["test_s"] == expected(made, binary, "test_s", "omniavs")


def test_rows_of_one_uid_share_its_masks(made, tmp_path):
    root, logits, _ = made
    copy = tmp_path / "set"
    shutil.copytree(root, copy)
    (copy / "cues.csv").unlink()
    with open(copy / "metadata.csv", "a") as file:
        file.write("c,c_z_1,test_u,0,the thing 0\n")
    found = scored(copy, write("archive", tmp_path, logits), splits=["test_u"])
    assert found.counts["test_u"]["expressions"] == 3 and found.counts["test_u"]["shared"] == 1
    assert found.rows.loc["c_z_1#2", "J_simtoken"] == found.rows.loc["c_z_1", "J_simtoken"]
    assert set(found.protocols["simtoken"]) == {"test_u"}


def test_two_methods_are_compared_by_expression(made, tmp_path):
    root, logits, _ = made
    for name, shift in (("a", 0), ("b", 4)):
        (tmp_path / name).mkdir()
        write("arrays", tmp_path / name, {uid: np.roll(of, shift, axis=2) for uid, of in logits.items()})
    own, other = (scored(root, tmp_path / name, ["simtoken"]) for name in "ab")
    by_split = compare(own, other, "simtoken", "split")
    assert set(by_split) == {"test_s", "test_u", "test_n", "mix"} and set(by_split["test_n"]) == {"S"}
    columns = [100 * table.rows.loc[SPLITS["test_s"], "J&F_simtoken"] for table in (own, other)]
    assert by_split["test_s"]["J&F"] == paired_bootstrap(*columns) and by_split["test_s"]["J&F"].mean > 1
    assert {group: of["J"].n for group, of in compare(own, other, "simtoken", "cue").items()} == {
        "sound": 3, "sight+sound": 2
    }  # fmt: skip
    assert set(compare(own, other, "simtoken", "category")) == {"x", "y", "z"}
    assert all(d.mean == 0 and not d.distinct for of in compare(own, own, "simtoken", "split").values()
               for d in of.values())  # fmt: skip
    result = CliRunner().invoke(
        app, ["score", str(tmp_path / "a"), str(tmp_path / "b"), "--dataset", str(root), "--protocol", "simtoken"]
    )
    assert result.exit_code == 0 and "sight+sound" in result.output and "minus" in result.output, result.output


def refusal(root: Path, masks: Path, *arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, ["score", str(masks), "--dataset", str(root), *arguments]).exception


def test_invalid_requests_are_refused(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    for arguments, text in (
        (["--protocol", "best"], "--protocol best: expected all or one of official"),
        (["--split", "test_x"], "no rows of split test_x; its splits are test_n, test_s, test_u"),
        (["--out", str(tmp_path / "no" / "x.json")], "no such file; create the folder"),
    ):
        with pytest.raises(RequestError, match=text):
            raise refusal(root, masks, *arguments)
    with pytest.raises(RequestError, match="no masks of split test_n"):
        raise refusal(root, write("archive", tmp_path, {"a_x_1": logits["a_x_1"], "c_z_1": logits["c_z_1"]}))
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "absent", tmp_path / "empty", root / "metadata.csv"):
        with pytest.raises(RequestError, match=str(path)):
            raise refusal(root, path)


def test_masks_that_cannot_be_read_are_named(made, tmp_path):
    root, logits, _ = made
    masks = {uid: of > 0 for uid, of in logits.items()}
    write("png", tmp_path, masks)
    bad = tmp_path / "test" / "b_y_1" / "00002.png"
    bad.write_bytes(bad.read_bytes()[:30])
    with pytest.raises(SamloveError, match=f"{bad}: "):
        scored(root, tmp_path)
    broken = logits | {"c_z_2": np.full_like(logits["c_z_2"], np.nan)}
    with pytest.raises(SamloveError, match="c_z_2, frame 0: expected finite logits"):
        scored(root, write("archive", tmp_path, broken))


def npy(shape: str) -> bytes:
    """An .npy file whose header states a shape, without the values."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def hostile_archive(path: Path, content: object) -> None:
    """content: the array of an expression, the bytes of its .npy file, or None for an .npy file instead of an .npz."""
    if content is None:
        path.write_bytes(npy("(0,)"))
        return
    with zipfile.ZipFile(path, "w") as archive, archive.open("a_x_1.npy", "w") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "not a zip archive"),
        (npy("(1000000, 100000, 1000)"), "not a readable array"),
        (np.ones((FRAMES, *SHAPE), complex), "expected floats, whole numbers or bool, found complex128"),
        (np.full((FRAMES, *SHAPE), "x"), "expected floats, whole numbers or bool, found <U1"),
        (np.float32(1), "expected an array"),
        (np.zeros((1, 1, 2**26 + 1), bool), "at most 67,108,864 pixels"),
    ],
    ids=["npy", "huge", "complex", "text", "number", "pixels"],
)
def test_archives_of_anything_else_are_refused(made, tmp_path, content, text):
    hostile_archive(tmp_path / "masks.npz", content)
    with pytest.raises(SamloveError, match=text) as raised:
        scored(made[0], tmp_path / "masks.npz", splits=["test_s"])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"a_x_1": [null], "a_x_1": [null]}',  # the second would replace the first
        '[{"uid": "a_x_1", "frame": Infinity, "segmentation": null}]',
        '[{"uid": "a_x_1", "frame": -1, "segmentation": null}]',
        "[" * 100_000,
        '{"a_x_1": [{"size": [1000000, 1000000], "counts": [1000000000000]}]}',
        '{"a_x_1": [{"size": [-24, -32], "counts": [768]}]}',
        '{"a_x_1": "abc"}',
        "5",
    ],
    ids=lambda text: text[:30],
)
def test_json_of_anything_else_is_refused(made, tmp_path, text):
    (tmp_path / "masks.json").write_text(text)
    with pytest.raises(SamloveError, match=str(tmp_path)) as raised:
        scored(made[0], tmp_path / "masks.json", splits=["test_s"])
    assert "\n" not in str(raised.value)


def test_results_replace_no_folder_and_no_masks(made, tmp_path):
    root, logits, _ = made
    masks = write("archive", tmp_path, logits)
    for out, text in ((tmp_path, "a folder; expected a new file"), (masks, "holds masks to score")):
        before = masks.read_bytes()
        with pytest.raises(RequestError, match=text):
            raise refusal(root, masks, "--out", str(out))
        assert masks.read_bytes() == before


def test_a_folder_that_may_not_be_read_is_an_error(made, tmp_path):
    root, logits, _ = made
    write("png", tmp_path / "masks", {uid: of > 0 for uid, of in logits.items()})
    closed = next((tmp_path / "masks").rglob("b_y_1"))
    closed.chmod(0)
    try:
        done = run_as_plain_user("-m", "samlove.cli.main", "score", str(tmp_path / "masks"), "--dataset", str(root))
    finally:
        closed.chmod(0o755)
    assert done.returncode == 1 and done.stderr == f"error: {closed}: Permission denied\n"


def test_a_folder_whose_name_is_no_utf8(made, tmp_path):
    root, logits, _ = made
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    masks, out = write("archive", folder, logits), tmp_path / "scores.json"
    arguments = [str(masks), "--dataset", str(root), "--protocol", "crab_plus", "--out", str(out)]
    app(["score", *arguments], standalone_mode=False)
    assert json.loads(out.read_text(encoding="utf-8"))["methods"][0]["masks"].endswith(f"caf\ufffd/{masks.name}")


def test_every_protocol_has_a_name_for_the_table():
    assert all(protocol.used_by and len(name) < 13 for name, protocol in PROTOCOLS.items())
