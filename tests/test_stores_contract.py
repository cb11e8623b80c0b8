"""The properties of every store class: one suite over the adapters of tests/store_kinds.py.

Some tests do not apply to some classes. An export never overwrites a file, so a failed one has no old file to preserve
(tests/test_stores_hdf5.py checks that it leaves none). The tensors of a checkpoint come as a dict, whose keys cannot
repeat. tests/test_stores_verify.py checks that damage is found in each.
"""

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samlove.errors import RequestError, SamloveError
from stores.verify import verify
from tests.store_kinds import (
    KEYS,
    STORES,
    Exported,
    Items,
    Kind,
    Steps,
    Tensors,
    Watched,
    assert_same,
    files_of,
    make_items,
    tree,
)

quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def kinds(*left_out: type) -> pytest.MarkDecorator:
    chosen = [kind for kind in STORES if not isinstance(kind, left_out)]
    return pytest.mark.parametrize("kind", chosen, ids=lambda kind: type(kind).__name__)


@kinds()
@pytest.mark.parametrize("count", [0, 1, 2, len(KEYS)])
def test_round_trip(kind: Kind, tmp_path: Path, count: int) -> None:
    items = make_items(KEYS[:count])
    kind.write(tmp_path / "store", items)
    assert_same(kind, tmp_path / "store", items)


@kinds()
@quick
@given(
    keys=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), unique=True, max_size=5
    )
)
def test_any_text_is_a_key(kind: Kind, tmp_path: Path, keys: list[str]) -> None:
    items = make_items(keys)
    kind.write(tmp_path / "store", items)
    assert_same(kind, tmp_path / "store", items)


@kinds()
@quick
@given(data=st.data())
def test_any_supported_array_comes_back(kind: Kind, tmp_path: Path, data: st.DataObject) -> None:
    value = data.draw(kind.values)
    items = {"first": value, "second": np.array(np.flip(value)), "zeros": np.zeros_like(value)}
    kind.write(tmp_path / "store", items)
    assert_same(kind, tmp_path / "store", items)


@kinds()
def test_the_same_input_gives_the_same_bytes(kind: Kind, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        kind.write(tmp_path / name / "store", make_items(KEYS))
    assert tree(tmp_path / "one" / "store") == tree(tmp_path / "two" / "store")


def stop_after(count: int) -> Callable[[], None]:
    """A function that raises from its call number `count` + 1 on."""
    left = iter(range(count))

    def on_each() -> None:
        if next(left, None) is None:
            raise RuntimeError("stopped")

    return on_each


@kinds(Exported)
def test_a_failed_write_leaves_the_old_store(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "store"
    with pytest.raises(RuntimeError, match="stopped"):
        kind.write(path, Watched(make_items(KEYS), stop_after(3)))
    assert not path.exists()
    kind.write(path, make_items(KEYS[:3]))
    before = tree(path)
    with pytest.raises(RuntimeError, match="stopped"):
        kind.write(path, Watched(make_items(KEYS), stop_after(3)))
    assert tree(path) == before


def beside(path: Path) -> list[Path]:
    """Files next to a store that do not belong to it."""
    return [p for p in path.parent.rglob("*") if p.is_file() and path not in (p, *p.parents)]


@kinds()
def test_a_write_replaces_the_store_and_leaves_no_other_files(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "store"
    kind.write(path, make_items(KEYS))
    kind.write(path, make_items(KEYS[:2], seed=1))
    assert_same(kind, path, make_items(KEYS[:2], seed=1))
    assert beside(path) == []


@kinds(Tensors)
def test_a_missing_store_is_a_request_error_that_names_it(kind: Kind, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nowhere.*(run|dvc pull)"):
        kind.open(tmp_path / "nowhere")


@kinds()
def test_a_truncated_file_is_named(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "store"
    kind.write(path, make_items(KEYS))
    suffixes, unread = (".json", ".tar", ".arrow"), ".zarr/zarr.json"  # a shard's attributes: only writers read them
    files = [path] if path.is_file() else [p for p in files_of(path) if p.suffix in suffixes]
    for file in [file for file in files if not str(file).endswith(unread)]:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SamloveError, match="store"):
            store = kind.open(path)
            for key in KEYS:
                kind.read(store, key)
        file.write_bytes(whole)
    assert_same(kind, path, make_items(KEYS))


@kinds()
def test_an_unknown_key_is_named(kind: Kind, tmp_path: Path) -> None:
    kind.write(tmp_path / "store", make_items(KEYS[:2]))
    with pytest.raises((SamloveError, ValueError), match="nothing of this name"):
        kind.read(kind.open(tmp_path / "store"), "nothing of this name")


@kinds(Tensors)
def test_a_repeated_key_is_refused(kind: Kind, tmp_path: Path) -> None:
    class Twice(dict):
        def items(self):
            return [*super().items()] * 2

        def __iter__(self):
            return iter([*super().__iter__()] * 2)

    with pytest.raises(SamloveError, match="once"):
        kind.write(tmp_path / "store", Twice(make_items(["a"])))


# --- more than one process -------------------------------------------------------------------------------------------


def read_all(kind: Kind, store: Any) -> dict[str, bytes]:
    return {key: kind.read(store, key).tobytes() for key in kind.keys(store)}


def read_into(queue: Any, kind: Kind, store: Any) -> None:
    queue.put(read_all(kind, store))


@kinds()
def test_a_store_that_was_read_works_in_forked_processes(kind: Kind, tmp_path: Path) -> None:
    items = make_items(KEYS)
    kind.write(tmp_path / "store", items)
    store = kind.open(tmp_path / "store")
    kind.read(store, KEYS[0])  # its files are open now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=read_into, args=(queue, kind, store)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == [{key: items[key].tobytes() for key in kind.keys(store)}] * 3
    np.testing.assert_array_equal(kind.read(store, KEYS[1]), items[KEYS[1]])


@pytest.fixture(scope="module")
def spawned() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@kinds()
def test_a_store_that_was_read_works_in_spawned_processes(
    kind: Kind, tmp_path: Path, spawned: ProcessPoolExecutor
) -> None:
    items = make_items(KEYS)
    kind.write(tmp_path / "store", items)
    store = kind.open(tmp_path / "store")
    kind.read(store, KEYS[0])
    found = list(spawned.map(read_all, [kind] * 4, [store] * 4))
    assert found == [{key: items[key].tobytes() for key in kind.keys(store)}] * 4


@kinds()
def test_a_store_that_was_read_can_be_pickled(kind, tmp_path):
    kind.write(tmp_path / "store", make_items(KEYS))
    store = kind.open(tmp_path / "store")
    kind.read(store, KEYS[0])
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(kind.read(copy, KEYS[0]), make_items(KEYS)[KEYS[0]])


@kinds()
def test_a_reader_gets_old_values_or_an_error_while_the_store_is_replaced(kind: Kind, tmp_path: Path) -> None:
    path, before, after = tmp_path / "store", make_items(KEYS), make_items(KEYS[::-1], seed=1)
    kind.write(path, before)
    reader = kind.open(path)
    reads = 0

    def while_writing() -> None:
        nonlocal reads
        reads += 1
        fresh = kind.open(path)
        for key in KEYS:
            np.testing.assert_array_equal(kind.read(reader, key), before[key])
            np.testing.assert_array_equal(kind.read(fresh, key), before[key])

    late = kind.open(path)  # it opens some of its files only after the new store is there
    kind.read(late, KEYS[0])
    kind.write(path, Watched(after, while_writing))
    assert reads >= len(KEYS)
    for old in (reader, late, pickle.loads(pickle.dumps(late))):
        for key in KEYS:
            try:
                found = kind.read(old, key)
            except SamloveError as error:
                assert "replaced since it was opened" in str(error)
            else:
                np.testing.assert_array_equal(found, before[key])
    assert_same(kind, path, after)


def _write_until(kind: Kind, path: Path, items: Items, kill_at: int, report: Path) -> None:
    """Write, killed before step `kill_at`; a step takes an item or changes the disk. Reports the number of steps."""
    steps = Steps(kill_at)
    kind.write(path, Watched(items, steps.step))
    total, steps.kill_at = steps.seen, -1
    report.write_text(str(total))


@kinds()
def test_a_killed_writer_leaves_the_old_or_the_new_store_and_the_next_write_succeeds(
    kind: Kind, tmp_path: Path
) -> None:
    """Or no store, if it is killed between two renames; never an incomplete one."""
    context, report = multiprocessing.get_context("fork"), tmp_path / "steps"
    before, after = make_items(KEYS), make_items(KEYS[::-1], seed=1)

    def write(folder: str, kill_at: int) -> int | None:
        (tmp_path / folder).mkdir()
        kind.write(tmp_path / folder / "store", before)
        process = context.Process(target=_write_until, args=(kind, tmp_path / folder / "store", after, kill_at, report))
        process.start()
        process.join(60)
        return process.exitcode

    assert write("whole", -1) == 0
    expected, steps = tree(tmp_path / "whole" / "store"), int(report.read_text())
    assert steps > len(KEYS)
    states = set()
    for kill_at in np.unique(np.linspace(0, steps - 1, 12).astype(int)):
        path = tmp_path / f"killed_{kill_at}" / "store"
        assert write(path.parent.name, int(kill_at)) == -signal.SIGKILL
        if path.exists():
            assert verify(path, deep=True) == []
            store = kind.open(path)
            new = all((kind.read(store, key) == after[key]).all() for key in kind.keys(store))
            assert_same(kind, path, after if new else before)
            states.add("new" if new else "old")
        kind.write(path, after)
        assert tree(path) == expected
        assert beside(path) == []
    assert "old" in states
