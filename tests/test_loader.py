"""The loader: batches as trained on, exact and resumable epochs, workers of both kinds."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samlove.dataset import resize_mask
from samlove.errors import RequestError, SamloveError
from samlove.loader import EpochSampler, ExpressionDataset, collate
from stores import ShardWriter
from tests.tiny_pack import PATCHES, ROWS, SIZE, L, N, features_of, make_shards, true_mask


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
    assert set(kinds.values()) == {torch.float32}
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


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (2, "fork"), (1, "spawn")])
def test_workers_change_nothing(dataset, workers, method):
    order = EpochSampler(len(dataset), seed=3, epoch=1)
    collate([dataset[0]])  # the files are mapped before the workers start
    context = {"multiprocessing_context": method} if workers else {}
    loader = DataLoader(dataset, 4, sampler=order, collate_fn=collate, num_workers=workers, **context)
    expected = list(order)
    for start, batch in zip((0, 4), loader, strict=True):
        assert_equal(batch, collate([dataset[i] for i in expected[start : start + 4]]))


def test_an_epoch_has_each_item_once_in_an_order_of_its_own():
    orders = {(seed, epoch): list(EpochSampler(100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    assert list(EpochSampler(100, 1, 2)) == orders[1, 2]
    sampler = EpochSampler(100, 1, 2)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("start", [0, 1, 37, 100])
def test_an_epoch_taken_up_again_goes_on_where_it_was(start):
    rest = EpochSampler(100, 1, 2, start)
    assert list(rest) == list(EpochSampler(100, 1, 2))[start:]
    assert len(rest) == 100 - start


def test_the_order_is_the_same_on_every_machine():
    assert list(EpochSampler(8, 0, 0)) == [2, 4, 3, 6, 5, 0, 1, 7]


def test_a_position_outside_the_epoch_is_refused():
    with pytest.raises(SamloveError, match="found 101"):
        EpochSampler(100, 0, 0, 101)


def test_shards_that_are_not_packs_are_refused(tmp_path):
    with pytest.raises(RequestError, match="expected a folder with"):
        ExpressionDataset(tmp_path)
    with ShardWriter(tmp_path / "other") as writer:
        writer.write("clip", {"audio": np.zeros((2, 3))})
    with pytest.raises(SamloveError, match=r"'clip' lacks \['audio_valid', .*dvc repro pack"):
        ExpressionDataset(tmp_path / "other")
    with ShardWriter(tmp_path / "none"):
        pass
    with pytest.raises(SamloveError, match="at least one expression"):
        ExpressionDataset(tmp_path / "none")
