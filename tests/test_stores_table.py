"""Tables: every value comes back, every key is found, and a file in any other form is refused."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samlove.errors import SamloveError
from stores import table
from stores.table import Table, TableWriter

COLUMNS = {"key": "text", "small": "int32", "large": "int64", "crc": "uint32", "data": "bytes"}
rows = st.tuples(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=8),
)


def write(path: Path, values: list[tuple], metadata: dict | None = None) -> Table:
    writer = TableWriter(COLUMNS, sorted_by="key", folder=path.parent)
    for row in values:
        writer.add(**dict(zip(COLUMNS, row, strict=True)))
    writer.write(path, metadata)
    return open_table(path)


def open_table(path: Path) -> Table:
    return Table(path, COLUMNS, "make it again", sorted_by="key")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(rows, max_size=30, unique_by=lambda row: row[0]), flush=st.sampled_from([1, 2, 7, 100]))
def test_every_value_comes_back_and_every_key_is_found(tmp_path, monkeypatch, values, flush):
    monkeypatch.setattr(table, "_FLUSH", flush)
    (tmp_path / "t").unlink(missing_ok=True)
    found = write(tmp_path / "t", values, {"a": ["ü"]})
    assert found.metadata == {"a": ["ü"]} and [path.name for path in tmp_path.iterdir()] == ["t"]
    for each in (found, pickle.loads(pickle.dumps(found))):
        columns = [
            list(each.texts("key")),
            *(each.numbers(name).tolist() for name in ("small", "large", "crc")),
            [each.bytes_at("data", row) for row in range(len(each))],
        ]
        assert list(zip(*columns, strict=True)) == values
        assert [each.find(key) for key, *_ in values] == list(range(len(values)))
        assert each.find("no such key") is each.find("\udcff") is None
    assert pa.ipc.open_file(tmp_path / "t").read_all().column("key").to_pylist() == [row[0] for row in values]


def test_a_table_in_memory_is_the_same(tmp_path):
    values = [("b", 1, 2, 3, b"x"), ("a", 4, 5, 6, b"")]
    write(tmp_path / "t", values)
    assert Table((tmp_path / "t").read_bytes(), COLUMNS, "", sorted_by="key").find("a") == 1


def test_values_that_do_not_fit_are_refused(tmp_path):
    writer = TableWriter({"key": "text"})
    with pytest.raises(SamloveError, match="UTF-8"):
        writer.add(key="\udcff")
    with pytest.raises(OverflowError):
        TableWriter({"n": "int32"}).add(n=2**31)


def ipc(batch: pa.RecordBatch, count: int = 1, **options) -> bytes:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, batch.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for _ in range(count):
            writer.write_batch(batch)
    return stream.getvalue().to_pybytes()


def replaced(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    columns = {field.name: batch.column(field.name) for field in batch.schema} | {name: values}
    return pa.RecordBatch.from_pydict(columns, metadata=batch.schema.metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: ipc(batch, compression="zstd"),
        lambda batch: ipc(batch, compression="lz4"),
        lambda batch: ipc(batch, count=2),
        lambda batch: ipc(batch, count=0),
        lambda batch: ipc(batch.drop_columns(["small"])),
        lambda batch: ipc(replaced(batch, "more", pa.array([1, 2, 3], pa.int32()))),
        lambda batch: ipc(replaced(batch, "small", pa.array([1, None, 3], pa.int32()))),
        lambda batch: ipc(replaced(batch, "small", pa.array([1, 2, 3], pa.int64()))),
        lambda batch: ipc(replaced(batch, "key", pa.array(["a", "b", "c"], pa.string()))),
        lambda batch: ipc(replaced(batch, "key", pa.array(["a", "b", "c"]).dictionary_encode())),
        lambda batch: ipc(replaced(batch, "key", pa.array([["a"], [], None]))),
        lambda batch: ipc(batch.replace_schema_metadata({})),
        lambda batch: ipc(batch.replace_schema_metadata({"samlove": "[1"})),
        lambda batch: ipc(batch.replace_schema_metadata({"samlove": "[" * 100_000})),
        lambda batch: ipc(batch)[:-1000],
        lambda batch: ipc(batch)[8:],
        lambda batch: b"",
        lambda batch: b"PAR1" * 100,
    ],
)
def test_a_file_in_another_form_is_refused(tmp_path, change: Callable[[pa.RecordBatch], bytes]):
    write(tmp_path / "t", [("a", 1, 1, 1, b"a"), ("b", 2, 2, 2, b"b"), ("c", 3, 3, 3, b"c")])
    data = change(pa.ipc.open_file((tmp_path / "t").read_bytes()).get_batch(0))
    (tmp_path / "t").unlink()
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(SamloveError, match="t: not a complete table .*; make it again"):
        open_table(tmp_path / "t")


@pytest.mark.parametrize("ends", [[0, 5, 2, 3], [-1, 1, 2, 3], [0, 1, 2, 10**15], [0, 2**63 - 1, 2, 3]])
def test_positions_outside_the_file_are_refused_when_they_are_used(tmp_path, ends):
    write(tmp_path / "t", [("a", 1, 1, 1, b"a"), ("b", 2, 2, 2, b"b"), ("c", 3, 3, 3, b"c")])
    content = (tmp_path / "t").read_bytes()
    batch = pa.ipc.open_file(content).get_batch(0)
    ends_of_keys = batch.column("key").buffers()[1].to_pybytes()[:32]
    changed = content.replace(ends_of_keys, np.array(ends, "<i8").tobytes(), 1)
    assert changed != content
    (tmp_path / "t").unlink()
    (tmp_path / "t").write_bytes(changed)
    with pytest.raises(SamloveError, match="t: not a complete table"):
        list(open_table(tmp_path / "t").texts("key"))


def test_opening_takes_no_memory_for_the_rows(tmp_path):
    writer = TableWriter(COLUMNS, sorted_by="key", folder=tmp_path)
    for number in range(400_000):
        writer.add(key=str(number), small=0, large=0, crc=0, data=b"x" * 100)
    writer.write(tmp_path / "t")
    code = (
        "import sys, resource; from pathlib import Path; from stores.table import Table;"
        f"open_table = lambda path: Table(path, {COLUMNS}, '', sorted_by='key');"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; table = open_table(Path(sys.argv[1]));"
        "assert len(table) == 400_000 and table.find('123456') == 123456;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t")], check=True, capture_output=True, text=True
    )
    assert int(grown.stdout) < 10_000  # kB; the file has 60 MB
