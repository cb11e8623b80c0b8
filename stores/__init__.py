"""The formats samlove keeps arrays in; no knowledge of models, only arrays, keys and manifests.

`features`: Zarr v3 store of frozen features, random access, the canonical and shareable form.
`shards`: WebDataset tar shards with an index, read by mapping files and without copying.
`hdf5`: a feature store as one HDF5 file, and back.
`predictions`: one HDF5 file of binned masks a split.
`tensors`: one safetensors file of a checkpoint's tensors, with what made them.
`remote`: stores behind a URL, read through a local cache that processes share.
`fingerprint`: what made an artefact, and the refusal of an artefact made otherwise.
"""

from stores.features import Failure, FeatureStore, FeatureStoreWriter
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
