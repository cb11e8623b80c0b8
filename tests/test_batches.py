"""Batches that threads read ahead: in order, the same as without threads, and never more than a few of them."""

import sys
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from samlove.data.batches import AHEAD, read_batches, split
from samlove.data.loader import FEATURES, ExpressionDataset
from samlove.errors import SamloveError
from stores import ShardWriter


class Numbers:
    """Item i is i, after `before(i)`."""

    def __init__(self, before: Callable[[int], object] = lambda i: None) -> None:
        self.before = before
        self.read: list[int] = []

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> int:
        self.before(i)
        self.read.append(i)
        return i


def collate(items: list) -> dict:
    return {"items": items}


def read_all(items: Numbers, order: object, threads: int) -> list[list[int]]:
    return [batch["items"] for batch in read_batches(items, split(order, 3), collate, threads)]  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [0, 1, 4, 50])
@pytest.mark.parametrize("count", [0, 1, 7, 60])
def test_batches_are_in_order_for_any_number_of_threads(threads, count):
    order = np.random.default_rng(count).permutation(100)[:count]
    expected = [order[start : start + 3].tolist() for start in range(0, count, 3)]
    late = Numbers(lambda i: time.sleep(0.003 * (i % 3)))  # later batches are often read first
    assert read_all(late, order, threads) == read_all(Numbers(), order.tolist(), threads) == expected


@pytest.mark.parametrize("threads", [0, 2])
def test_what_reading_raises_comes_out_at_its_batch(threads):
    def fail(i: int) -> None:
        if i == 40:
            raise SamloveError("shard-00007.tar: damaged")

    batches = read_batches(Numbers(fail), split(range(100), 3), collate, threads)
    assert len(list(islice(batches, 13))) == 13
    with pytest.raises(SamloveError, match="^shard-00007.tar: damaged$"):
        next(batches)


@pytest.mark.parametrize("threads", [1, 3])
def test_few_batches_are_read_ahead_and_closing_ends_the_threads(threads):
    before = threading.active_count()
    items = Numbers()
    batches = read_batches(items, split(range(100), 3), collate, threads)
    next(batches)
    assert threading.active_count() == before + threads
    batches.close()
    assert len(items.read) <= 3 * (AHEAD * threads + 1)
    assert threading.active_count() == before


def test_closing_does_not_wait_for_a_read_that_does_not_return(monkeypatch):
    monkeypatch.setattr("samlove.data.batches.END_S", 0.1)
    stuck, end, before = threading.Event(), threading.Event(), threading.active_count()

    def wait(i: int) -> None:
        if i >= 3:
            stuck.set()
            end.wait()

    batches = read_batches(Numbers(wait), split(range(100), 3), collate, 2)
    next(batches)
    stuck.wait()
    batches.close()
    assert threading.active_count() > before
    end.set()


def test_threads_read_many_shards_with_few_of_them_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are mapped and closed all the time, by threads that take turns as often as possible."""
    monkeypatch.setattr("stores.remote.MOST_OPEN", 2)
    levels = dict.fromkeys(("sam2_image_embed", "sam2_high_res_0", "sam2_high_res_1"), 4)
    dimensions = {"audio": 2, "audio_valid": 1, "visual": 3, "text": 3, "text_mask": 2, **levels}
    with ShardWriter(tmp_path / "shards", 1, fingerprint={name: {} for name in FEATURES}) as writer:
        for video in range(40):
            sample = {name: np.full((2,) * count, video, np.float32) for name, count in dimensions.items()}
            masks = np.zeros((1, 2, 2, 2), np.uint8)
            rows = [{"row_id": str(video), "text": 0, "mask": 0}]
            writer.write(str(video), {**sample, "masks": masks, "rows": rows})
    dataset = ExpressionDataset(tmp_path / "shards")
    order = np.random.default_rng(0).integers(0, 80, 4000)  # two frames per video
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        batches = read_batches(
            dataset, split(order, 4), lambda items: {"visual": [i["visual"][0, 0, 0] for i in items]}, 8
        )
        found = [value for batch in batches for value in batch["visual"]]
    finally:
        sys.setswitchinterval(interval)
    assert found == (order // 2).tolist()
