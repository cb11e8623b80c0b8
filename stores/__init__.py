"""The storage formats of samlove. They know arrays, keys and manifests, but nothing of models.

`features`, `feature_writer`: feature stores in Zarr v3: random access, the canonical form, and the one to share.
`shards`: WebDataset training shards with an index, read by memory mapping, without copies.
`hdf5`: exports a feature store to one HDF5 file, and imports it.
`predictions`: binned masks, one HDF5 file per split.
`tensors`: a checkpoint's tensors and header in one safetensors file.
`remote`: stores behind a URL, read through a download cache that processes share.
`fingerprint`: what an artefact was computed from; rejects an artefact with a different fingerprint.
"""

from stores import environment  # noqa: F401
from stores.feature_writer import FeatureStoreWriter
from stores.features import Failure, FeatureStore
from stores.hdf5 import ExportReader, export_store, import_store
from stores.predictions import PredictionReader, PredictionWriter
from stores.shards import ShardReader, ShardWriter
from stores.tensors import TensorReader

__all__ = [
    "ExportReader",
    "Failure",
    "FeatureStore",
    "FeatureStoreWriter",
    "PredictionReader",
    "PredictionWriter",
    "ShardReader",
    "ShardWriter",
    "TensorReader",
    "export_store",
    "import_store",
]
