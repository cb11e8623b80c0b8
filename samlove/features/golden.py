"""The golden sample: a few items of a feature store, recomputed with the current encoder and media."""

from dataclasses import dataclass

import numpy as np

from samlove.data.digest import source_ids
from samlove.errors import SamloveError
from samlove.features.extract import Job
from stores import FeatureStore

SAMPLE = 3  # items, spread evenly over the store, including its first and last
# Length of the difference divided by the length of the stored array. Rounding to fp16 gives 3e-4, a different batch or
# type of processor up to 1e-3, a different resize filter about 1e-2, different weights 1.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Row:
    """One array of one item: its relative distance from the stored array (see `distance`), or why there is none."""

    key: str
    array: str
    distance: float
    fault: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.fault or f'{self.array} differs by {self.distance:.1e}'}"

    @property
    def good(self) -> bool:
        return not self.fault and self.distance <= TOLERANCE


def golden_keys(store: FeatureStore) -> list[str]:
    """The keys of the sample: all keys if there are at most SAMPLE."""
    places = np.linspace(0, len(store) - 1, min(SAMPLE, len(store))).round().astype(int)
    return [store.key(int(place)) for place in places]


def check_live(job: Job, store: FeatureStore) -> list[Row]:
    """Recompute the sample in one batch, and compare each array with the one in `store`.

    An item is a fault if its source cannot be read or has changed since the item was computed.
    """
    rows: list[Row] = []
    items = {}
    for key in golden_keys(store):
        if key not in job.sources:
            rows.append(Row(key, "", 0.0, "no longer in the index"))
            continue
        source = job.sources[key]
        if store.id_of(key) != source_ids({key: source})[key]:
            rows.append(Row(key, "", 0.0, "its source has changed or cannot be read"))
        else:
            try:
                items[key] = job.encoder.load(source)
            except SamloveError as error:
                rows.append(Row(key, "", 0.0, str(error)))
    live = job.encoder.encode(list(items.values())) if items else []
    for key, arrays in zip(items, live, strict=True):
        stored = store.read(key)
        if stored.keys() != arrays.keys():
            rows.append(Row(key, "", 0.0, f"expected arrays {sorted(stored)}, found {sorted(arrays)}"))
            continue
        rows += [Row(key, name, distance(stored[name], array)) for name, array in arrays.items()]
    return rows


def distance(stored: np.ndarray, live: np.ndarray) -> float:
    """|live - stored| / |stored|, Euclidean; infinite if dtype or shape differ, or if only `stored` is zero."""
    if stored.dtype != live.dtype or stored.shape != live.shape:
        return float("inf")
    difference = float(np.linalg.norm(live.astype(np.float64) - stored.astype(np.float64)))
    length = float(np.linalg.norm(stored.astype(np.float64)))
    return difference / length if length else (float("inf") if difference else 0.0)
