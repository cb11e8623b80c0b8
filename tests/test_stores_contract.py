"""What every store promises, asked of each: one suite, one small adapter a store."""

import multiprocessing
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samlove.errors import RequestError, SamloveError
from stores import FeatureStore, FeatureStoreWriter, PredictionReader, PredictionWriter, ShardReader, ShardWriter

SHAPE = (3, 4, 4)
KEYS = [
    "plain",
    "-dash",
    "--null_m-07",
    "_under.dots.npy",
    "a/b\\c",
    "..",
    "50%2E",
    "ünï 東京 \U0001f3bb",
    " the object, making the loudest sound\t(for 10 s). " * 8,
]
Items = Mapping[str, np.ndarray]


class Features:
    def write(self, path: Path, items: Items, fail_after: int | None = None) -> None:
        writer = FeatureStoreWriter(path, path.parent / "scratch", {"made": "here"}, list(items), shard_size=2)
        for number, keys in writer.todo():
            if number == fail_after:
                raise RuntimeError("stopped")
            writer.write_shard(number, {key: {"x": items[key]} for key in keys})
        writer.publish()

    def open(self, path: Path) -> FeatureStore:
        return FeatureStore.open(path)

    def keys(self, store: FeatureStore) -> list[str]:
        return store.keys()

    def read(self, store: FeatureStore, key: str) -> np.ndarray:
        return store.read(key)["x"]


class Shards:
    def write(self, path: Path, items: Items, fail_after: int | None = None) -> None:
        with ShardWriter(path, samples_per_shard=2, fingerprint={"made": "here"}) as writer:
            for number, (key, value) in enumerate(items.items()):
                if number == fail_after:
                    raise RuntimeError("stopped")
                writer.write(key, {"x": value})

    def open(self, path: Path) -> ShardReader:
        return ShardReader(path)

    def keys(self, store: ShardReader) -> list[str]:
        return store.keys()

    def read(self, store: ShardReader, key: str) -> np.ndarray:
        sample = store[store.keys().index(key)]
        assert sample["__key__"] == key
        return sample["x"]


class Predictions:
    def write(self, path: Path, items: Items, fail_after: int | None = None) -> None:
        edges = np.linspace(0, 1, 255, dtype=np.float32)
        with PredictionWriter(path, SHAPE[0], SHAPE[1], edges, {"made": "here"}) as writer:
            for number, (key, value) in enumerate(items.items()):
                if number == fail_after:
                    raise RuntimeError("stopped")
                writer.write([key], value[None])

    def open(self, path: Path) -> PredictionReader:
        return PredictionReader(path)

    def keys(self, store: PredictionReader) -> list[str]:
        return store.row_ids

    def read(self, store: PredictionReader, key: str) -> np.ndarray:
        return store.read(key)


STORES = [Features(), Shards(), Predictions()]


@pytest.fixture(params=STORES, ids=lambda s: type(s).__name__)
def kind(request):
    return request.param


def make_items(keys: list[str], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.integers(0, 256, SHAPE, np.uint8) for key in keys}


def tree(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


def assert_same(kind, path: Path, items: Items) -> None:
    store = kind.open(path)
    assert kind.keys(store) == list(items)
    assert len(store) == len(items)
    for key, value in items.items():
        found = kind.read(store, key)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("count", [0, 1, 2, len(KEYS)])
def test_round_trip(kind, tmp_path, count):
    items = make_items(KEYS[:count])
    kind.write(tmp_path / "store", items)
    assert_same(kind, tmp_path / "store", items)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), unique=True, max_size=5
    )
)
def test_any_text_is_a_key(kind, tmp_path, keys):
    items = make_items(keys)
    kind.write(tmp_path / "store", items)
    assert_same(kind, tmp_path / "store", items)


def test_zeros_come_back(kind, tmp_path):
    items = {"a": np.zeros(SHAPE, np.uint8)}
    kind.write(tmp_path / "store", items)
    assert_same(kind, tmp_path / "store", items)


def test_same_input_same_bytes(kind, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        kind.write(tmp_path / name / "store", make_items(KEYS))
    assert tree(tmp_path / "one" / "store") == tree(tmp_path / "two" / "store")


def test_a_write_that_fails_leaves_what_was_there(kind, tmp_path):
    path = tmp_path / "store"
    with pytest.raises(RuntimeError, match="stopped"):
        kind.write(path, make_items(KEYS), fail_after=1)
    assert not path.exists()
    kind.write(path, make_items(KEYS[:3]))
    before = tree(path)
    with pytest.raises(RuntimeError, match="stopped"):
        kind.write(path, make_items(KEYS), fail_after=1)
    assert tree(path) == before


def test_write_replaces_and_leaves_nothing_beside(kind, tmp_path):
    path = tmp_path / "store"
    kind.write(path, make_items(KEYS))
    kind.write(path, make_items(KEYS[:2], seed=1))
    assert_same(kind, path, make_items(KEYS[:2], seed=1))
    beside = [p for p in tmp_path.rglob("*") if p.is_file() and path not in (p, *p.parents)]
    assert beside == []


def test_absent_is_a_request_error_that_names_it(kind, tmp_path):
    with pytest.raises(RequestError, match=r"nowhere.*(run|dvc pull)"):
        kind.open(tmp_path / "nowhere")


def test_unknown_schema_or_torn_file_is_named(kind, tmp_path):
    path = tmp_path / "store"
    kind.write(path, make_items(KEYS))
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".json", ".tar")]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SamloveError, match="store"):
            store = kind.open(path)
            for key in KEYS:
                kind.read(store, key)
        file.write_bytes(whole)
    assert_same(kind, path, make_items(KEYS))


def test_a_repeated_key_is_refused(kind, tmp_path):
    class Twice(dict):
        def items(self):
            return [*super().items()] * 2

        def __iter__(self):
            return iter([*super().__iter__()] * 2)

    with pytest.raises(SamloveError, match="once"):
        kind.write(tmp_path / "store", Twice(make_items(["a"])))


def _read_all(kind, store, queue) -> None:
    queue.put({key: kind.read(store, key).tobytes() for key in kind.keys(store)})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_that_was_read_works_in_another_process(kind, tmp_path, method):
    items = make_items(KEYS)
    kind.write(tmp_path / "store", items)
    store = kind.open(tmp_path / "store")
    kind.read(store, KEYS[0])  # its files are open now
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    processes = [context.Process(target=_read_all, args=(kind, store, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [{key: value.tobytes() for key, value in items.items()}] * 2
    np.testing.assert_array_equal(kind.read(store, KEYS[1]), items[KEYS[1]])


def test_pickling_takes_no_data_along(kind, tmp_path):
    kind.write(tmp_path / "store", make_items(KEYS))
    store = kind.open(tmp_path / "store")
    kind.read(store, KEYS[0])
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(kind.read(copy, KEYS[0]), make_items(KEYS)[KEYS[0]])


def test_a_reader_is_not_disturbed_by_a_new_store_in_its_place(kind, tmp_path):
    kind.write(tmp_path / "store", make_items(KEYS))
    store = kind.open(tmp_path / "store")
    kept = np.array(kind.read(store, KEYS[0]))
    kind.write(tmp_path / "store", make_items(KEYS[1:], seed=1))
    np.testing.assert_array_equal(kept, make_items(KEYS)[KEYS[0]])
    assert_same(kind, tmp_path / "store", make_items(KEYS[1:], seed=1))
