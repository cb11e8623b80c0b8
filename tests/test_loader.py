"""The loader: the trainer's batches, exact and resumable epochs, forked and spawned workers."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samlove.config import TrainConfig
from samlove.data.dataset import resize_mask
from samlove.data.loader import ExpressionDataset, PoolSampler, collate, epoch_order, make_resident
from samlove.errors import RequestError, SamloveError
from stores import ShardReader, ShardWriter
from stores.shard_index import COLUMNS, INDEX
from stores.table import Table, TableWriter
from tests.tiny_pack import PATCHES, ROWS, SIZE, L, N, features_of, make_shards, mask_on, true_mask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    make_shards(root)
    return ExpressionDataset(root / "shards")


def assert_equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
        else:
            assert found[name] == value


def test_a_batch_is_what_the_trainer_expects(dataset):
    batch = collate([dataset[i] for i in range(len(dataset))])
    assert dataset.dims == {"audio": 6, "visual": 7, "text": 8, "frames": N}
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "audio": (6, N, 6),
        "audio_valid": (6, N),
        "visual": (6, N, 1 + PATCHES, 7),
        "sam2_image_embed": (6, 8, 2, 2),
        "sam2_high_res_0": (6, 2, 8, 8),
        "sam2_high_res_1": (6, 4, 4, 4),
        "text": (6, L, 8),
        "text_mask": (6, L),
        "mask": (6, SIZE, SIZE),
    }
    kinds = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds.pop("audio_valid") == kinds.pop("text_mask") == torch.bool
    assert kinds.pop("mask") == torch.uint8 and set(kinds.values()) == {torch.float16}  # as stored
    assert batch["row_id"] == list(ROWS["row_id"]) and batch["media_id"] == list(ROWS["media_id"])
    for i, row in enumerate(ROWS.itertuples()):
        mask = np.zeros((SIZE, SIZE)) if row.null else resize_mask(true_mask(row.media_id, row.fid), SIZE)
        np.testing.assert_array_equal(batch["mask"][i].numpy(), mask)
        np.testing.assert_array_equal(batch["text"][i].numpy(), features_of("text", row.exp)["text"])
        np.testing.assert_array_equal(batch["text_mask"][i].numpy(), features_of("text", row.exp)["text_mask"])
        np.testing.assert_array_equal(batch["visual"][i].numpy(), features_of("visual", row.media_id)["visual"])


def test_features_are_the_fingerprints_of_the_four_stores(dataset):
    assert set(dataset.features) == {"audio", "visual", "text", "sam2"}


def test_a_batch_may_be_changed_without_harm(dataset):
    batch = collate([dataset[0]])
    batch["audio"].add_(1)
    batch["text_mask"].zero_()
    assert_equal(collate([dataset[0]]), collate([dataset[0]]))
    np.testing.assert_array_equal(dataset[0]["audio"], features_of("audio", "m_a")["audio"])
    assert dataset[0]["text_mask"].any()


def test_samples_in_memory_give_the_same_batches(dataset):
    held = ExpressionDataset(dataset.reader.root)
    held.to(torch.device("cpu"))
    assert all(isinstance(held[i]["mask"], torch.Tensor) for i in range(len(held)))
    assert_equal(collate([held[i] for i in range(len(held))]), collate([dataset[i] for i in range(len(held))]))


@pytest.fixture(scope="module")
def all_frames(tmp_path_factory):
    root = tmp_path_factory.mktemp("all_frames")
    make_shards(root, frames=range(N))
    return ExpressionDataset(root / "shards")


@pytest.mark.parametrize("held", [False, True])
def test_an_item_is_an_expression_on_a_frame(dataset, all_frames, held):
    """Item expression * K + k: SAM 2's embedding and the mask are those of its frame, all else is the whole video's."""
    several = ExpressionDataset(all_frames.reader.root)
    if held:
        several.to(torch.device("cpu"))
    assert (several.expressions, several.frames, len(several)) == (len(ROWS), N, len(ROWS) * N)
    assert several.videos.tolist() == dataset.videos.tolist()
    for i in range(len(several)):
        item = collate([several[i]])
        row, frame = ROWS.iloc[i // N], i % N
        mask = np.zeros((SIZE, SIZE)) if row["null"] else resize_mask(mask_on(row["media_id"], row["fid"], frame), SIZE)
        np.testing.assert_array_equal(item["mask"][0].numpy(), mask)
        for level, value in features_of("sam2", row["media_id"]).items():
            np.testing.assert_array_equal(item[level][0].numpy(), value[frame])
        first = collate([dataset[i // N]])
        of_frame = {"mask", *features_of("sam2", "")}
        assert list(item) == list(first)
        assert_equal(*({name: v for name, v in each.items() if name not in of_frame} for each in (item, first)))
    with pytest.raises(IndexError):
        several[len(several)]


def config(**settings) -> TrainConfig:
    return TrainConfig(epochs=1, **settings)


@pytest.mark.parametrize("frames", [1, 4])
def test_an_epoch_has_each_expression_once_on_its_first_or_on_any_frame(frames):
    videos = np.array(VIDEOS)
    for seed, epoch in ((0, 0), (0, 1), (3, 0)):
        plain = PoolSampler(VIDEOS, 7, seed, epoch).order()
        first = epoch_order(videos, frames, config(seed=seed, pool=7), epoch)
        drawn = epoch_order(videos, frames, config(seed=seed, pool=7, supervise="any"), epoch)
        np.testing.assert_array_equal(first, plain * frames)
        np.testing.assert_array_equal(drawn // frames, plain)
        again = epoch_order(videos, frames, config(seed=seed, pool=7, supervise="any"), epoch)
        np.testing.assert_array_equal(drawn, again)


def test_any_frame_is_drawn_anew_in_every_epoch_and_each_equally_often():
    orders = [epoch_order(np.array(VIDEOS), 4, config(supervise="any"), epoch) for epoch in range(200)]
    frames = np.array([order[np.argsort(order // 4)] % 4 for order in orders])  # (epochs, expressions)
    counts = np.array([(frames == k).sum() for k in range(4)])
    assert np.abs(counts - frames.size / 4).max() < 4 * np.sqrt(frames.size * 3 / 16)
    assert all(set(one) == {0, 1, 2, 3} for one in frames.T)
    other = epoch_order(np.array(VIDEOS), 4, config(seed=1, supervise="any"), 0)
    assert (np.sort(other) != np.sort(orders[0])).mean() > 0.5


@pytest.mark.parametrize(("asked", "place"), [("auto", "ram"), ("ram", "ram"), ("off", "off")])
def test_residency_prints_one_line(dataset, capsys, asked, place):
    assert make_resident([dataset, dataset], asked, torch.device("cpu")) == place
    (line,) = capsys.readouterr().out.splitlines()
    where = "held in RAM" if place == "ram" else "read from disk"
    assert line.startswith(f"shards are {where}: {2 * dataset.reader.nbytes / 1e9:.3g} GB; usable: 0 GB on the GPU, ")


def test_residency_without_enough_memory_is_refused(dataset):
    with pytest.raises(RequestError, match="resident: gpu needs more memory .* 0 GB on the GPU"):
        make_resident([dataset], "gpu", torch.device("cpu"))


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (2, "fork"), (1, "spawn")])
def test_workers_change_nothing(dataset, workers, method):
    order = PoolSampler(dataset.videos, pool=2, seed=3, epoch=1)
    collate([dataset[0]])  # the files are mapped before the workers start
    context = {"multiprocessing_context": method} if workers else {}
    loader = DataLoader(dataset, 4, sampler=order, collate_fn=collate, num_workers=workers, **context)
    expected = list(order)
    for start, batch in zip((0, 4), loader, strict=True):
        assert_equal(batch, collate([dataset[i] for i in expected[start : start + 4]]))


VIDEOS = [video for video in range(30) for _ in range(1 + video % 6)]  # the video of each of 105 items
pools = pytest.mark.parametrize("pool", [1, 4, 30, 1000])


@pools
def test_an_epoch_has_each_item_once_in_its_own_order(pool):
    orders = {(seed, epoch): list(PoolSampler(VIDEOS, pool, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(105)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    sampler = PoolSampler(VIDEOS, pool, 1, 2)
    assert list(sampler) == list(sampler) == orders[1, 2]


def most_open(order: list[int]) -> int:
    """The largest number of videos that are partly drawn (some of their items, but not all) at the same time."""
    drawn = [VIDEOS[item] for item in order]
    first = {video: drawn.index(video) for video in drawn}
    last = {video: place for place, video in enumerate(drawn)}
    return max(sum(first[v] <= place <= last[v] for v in first) for place in range(len(drawn)))


@pools
def test_no_more_videos_than_the_pool_holds_are_open_at_once(pool):
    assert all(most_open(list(PoolSampler(VIDEOS, pool, 0, epoch))) <= pool for epoch in range(20))


@pytest.mark.parametrize("pool", [30, 1000])
def test_a_pool_of_all_videos_is_a_plain_permutation(pool):
    """Every item is equally likely at every place: over 400 epochs, its mean place is the middle."""
    places = np.array([np.argsort(list(PoolSampler(VIDEOS, pool, 0, epoch))) for epoch in range(400)])
    deviation = np.sqrt((105**2 - 1) / 12 / 400)
    assert np.abs(places.mean(0) - 52).max() < 4.5 * deviation
    assert np.abs(places[:, 1:] - places[:, :-1]).mean() == pytest.approx(106 / 3, rel=0.03)  # neighbours lie apart


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 3), (2, 3), (4, 5)])
@pytest.mark.parametrize("start", [0, 1, 37, 104, 105])
def test_a_rank_gets_its_share_of_the_remaining_items(start, rank, ranks):
    share = PoolSampler(VIDEOS, 4, 1, 2, start, rank, ranks)
    assert list(share) == list(PoolSampler(VIDEOS, 4, 1, 2))[start:][rank::ranks]
    assert len(share) == len(list(share))


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(VIDEOS)

    def __getitem__(self, i: int) -> int:
        return i


def steps(start: int, ranks: int, workers: int, count: int | None = None, batch: int = 12) -> list[int]:
    """The items of `count` steps of `batch`, each step shared by `ranks` processes with `workers` workers each."""
    loaders = [
        DataLoader(
            Numbers(), batch // ranks, sampler=PoolSampler(VIDEOS, 4, 5, 6, start, r, ranks), num_workers=workers
        )
        for r in range(ranks)
    ]
    shares = [torch.cat(list(loader)[:count]).tolist() for loader in loaders]
    longest = max(map(len, shares))
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


def test_resuming_with_different_ranks_and_workers_keeps_the_order():
    whole = list(PoolSampler(VIDEOS, 4, 5, 6))
    assert steps(0, 1, 0) == whole
    first = steps(0, ranks=2, workers=1, count=3)
    second = steps(len(first), ranks=3, workers=2, count=2)
    third = steps(len(first + second), ranks=1, workers=0, count=1)
    rest = steps(len(first + second + third), ranks=4, workers=1)
    assert len(first) == 36 and len(second) == 24 and len(third) == 12
    assert first + second + third + rest == whole


def test_the_order_is_the_same_on_every_machine():
    assert list(PoolSampler([0, 0, 0, 1, 1, 2, 3, 3], 2, 0, 0)) == [5, 2, 3, 1, 0, 7, 6, 4]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"start": 106}, "105 items, found 106"),
        ({"start": -1}, "found -1"),
        ({"pool": 0}, "pool >= 1"),
        ({"rank": 2, "ranks": 2}, "rank < ranks"),
    ],
)
def test_a_position_outside_the_epoch_is_refused(changes, match):
    with pytest.raises(SamloveError, match=match):
        PoolSampler(**{"videos": VIDEOS, "pool": 4, "seed": 0, "epoch": 0, **changes})


def test_shards_of_a_different_kind_are_refused(tmp_path):
    with pytest.raises(RequestError, match="expected a folder with"):
        ExpressionDataset(tmp_path)
    with ShardWriter(tmp_path / "other") as writer:
        writer.write("clip", {"audio": np.zeros((2, 3))})
    with pytest.raises(SamloveError, match=r"a sample has no audio_valid, .*dvc repro pack"):
        ExpressionDataset(tmp_path / "other")
    with ShardWriter(tmp_path / "none"):
        pass
    with pytest.raises(SamloveError, match="at least one expression"):
        ExpressionDataset(tmp_path / "none")


def change_index(root: Path, change: Callable[[dict, dict], object]) -> None:
    """Change the second sample of an index and the table's metadata; without a manifest, no checksum is expected."""
    old = Table(root / INDEX, COLUMNS, "", sorted_by="key")
    rows = [
        {
            name: old.bytes_at(name, i) if kind == "bytes" else old.text(name, i) if kind == "text" else
            int(old.numbers(name)[i]) for name, kind in COLUMNS.items()
        }
        for i in range(len(old))
    ]  # fmt: skip
    change(rows[1], old.metadata)
    writer = TableWriter(COLUMNS, sorted_by="key")
    for row in rows:
        writer.add(**row)
    writer.write(root / INDEX, old.metadata)
    for name in ("manifest.json", "files.arrow"):
        (root / name).unlink()


def read_all(root: Path) -> None:
    dataset = ExpressionDataset(root)
    PoolSampler(dataset.videos, 4, seed=0, epoch=0).order()
    collate([dataset[i] for i in range(len(dataset))])


@pytest.mark.parametrize("numbers", [(2**63 - 1,), (2**63 - 8,), (2**40,), (-1,), (0, 2**62), (0, -1), (0, 2**63 - 1)])
def test_arrays_outside_their_shard_are_refused(tmp_path, numbers):
    """An offset near 2**63 overflows NumPy's own check: reading the array ended the process."""
    make_shards(tmp_path)
    root = tmp_path / "shards"
    start = struct.pack(f"<{len(numbers)}q", *numbers)
    change_index(root, lambda row, _: row.update(place=start + row["place"][len(start) :]))
    reader = ShardReader(root)
    with pytest.raises(SamloveError, match="not in its shard of"):
        [value.sum() for value in reader[1].values() if isinstance(value, np.ndarray)]


@pytest.mark.parametrize(
    "row",
    ["[0]", '{"row_id": "a", "text": [0, 0], "mask": 0}', '{"row_id": "a", "text": null, "mask": 0}',
     '{"row_id": "a", "text": true, "mask": 0}', '{"row_id": "a", "text": -1, "mask": 0}',
     '{"row_id": "a", "text": 0, "mask": -2}', '{"row_id": "a", "text": 0, "mask": 1e400}',
     '{"row_id": 5, "text": 0, "mask": 0}', '{"row_id": "a", "text": 0}'],
)  # fmt: skip
def test_rows_that_are_not_those_of_their_sample_are_refused(tmp_path, row):
    make_shards(tmp_path)
    change_index(tmp_path / "shards", lambda sample, _: sample.update(rows=f"[{row},{row}]".encode()))
    with pytest.raises(SamloveError, match="is not one of sample 1"):
        read_all(tmp_path / "shards")


@pytest.mark.parametrize("end", [-1, 2**62, 2**63 - 1])
def test_numbers_of_rows_that_do_not_add_up_are_refused(tmp_path, end):
    make_shards(tmp_path)
    change_index(tmp_path / "shards", lambda sample, _: sample.update(end=end))
    with pytest.raises(SamloveError, match="fewer than 0 rows"):
        read_all(tmp_path / "shards")


@pytest.mark.parametrize(("field", "value"), [(1, ">f2"), (1, "<f16"), (3, 1), (3, 4)])
def test_arrays_of_another_form_than_the_pack_stage_writes_are_refused(tmp_path, field, value):
    make_shards(tmp_path)

    def change(_: dict, metadata: dict) -> None:
        for layout in metadata["layouts"]:
            next(member for member in layout if member[0] == "audio")[field] = value

    change_index(tmp_path / "shards", change)
    with pytest.raises(SamloveError, match="audio of a sample: expected 2 dimensions"):
        read_all(tmp_path / "shards")


def test_samples_of_different_shapes_are_refused(dataset):
    items = [dict(dataset[0]), dict(dataset[1])]
    items[1]["audio"] = items[1]["audio"][:1]
    with pytest.raises(SamloveError, match="audio: expected one shape in all samples"):
        collate(items)
