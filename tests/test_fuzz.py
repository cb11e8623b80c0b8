"""Every parser of files from elsewhere refuses damaged files, reads nothing else, and needs little memory.

See tests/fuzzing.py. docs/benchmarks.md has the figures of the long run.
"""

import pytest

from tests.fuzzing import MEMORY, run

PARSERS = (
    "tar", "table", "manifest", "zarr", "wav", "csv", "hdf5_export", "hdf5_predictions", "safetensors"
)  # fmt: skip


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "inputs",
    [200, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_random_changes_of_a_file_are_refused_or_read(parser, inputs):
    result = run(parser, inputs)
    print(parser, result)
    assert result.faults == []
    assert result.tried == inputs and result.accepted > inputs // 100 and result.refused > inputs // 100
    assert result.megabytes < MEMORY
