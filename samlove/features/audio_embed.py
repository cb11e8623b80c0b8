"""Imports the audio embeddings of another Ref-AVS project, one `MEDIA_ID.pt` per video, as a feature store.

The files do not say how they were computed, so the store's fingerprint holds `imported` and a hash of the files.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from samlove.config import Dtype
from samlove.errors import RequestError, SamloveError
from samlove.features.encoders.base import to_store
from samlove.model.weights import is_plain, is_safetensors, read_torch
from stores import FeatureStoreWriter
from stores.fingerprint import sha256_file
from stores.manifest import refuse_existing

SHAPE = (10, 128)  # seconds, VGGish's width
SHARD = 512  # videos
TENSOR = "save each array as a tensor: torch.save(torch.as_tensor(array), 'MEDIA_ID.pt')"


def import_audio_embed(folder: Path, path: Path, dtype: Dtype = "float16") -> int:
    """Write every `*.pt` in `folder`, each a tensor (10,128), to the new store `path`; returns the number of videos.

    Items are {audio (10,128) of `dtype`, audio_valid (10,) bool, all True}, keyed by the MEDIA_ID of the file name.
    Raises RequestError if there are no such files or `path` exists; SamloveError, naming the file, if it does not hold
    such a tensor or its values do not fit `dtype`.
    """
    files = sorted(folder.glob("*.pt"))
    if not files:
        raise RequestError(f"{folder}: expected files MEDIA_ID.pt, found none")
    refuse_existing(path)
    hashes = "".join(f"{file.name}\0{sha256_file(file)}\n" for file in files)
    fingerprint = {
        "encoder": "imported",
        "files_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "seconds": SHAPE[0],
        "dtype": dtype,
    }
    by_key = {file.stem: file for file in files}
    scratch = path.with_name(f".{path.name}.partial")
    try:
        writer = FeatureStoreWriter(path, scratch, fingerprint, list(by_key), SHARD)
        for number, keys in writer.plan():
            writer.write_shard(number, {key: _read(by_key[key], dtype) for key in keys})
        writer.publish()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(by_key)


def _read(file: Path, dtype: Dtype) -> dict[str, np.ndarray]:
    if is_safetensors(file):
        raise SamloveError(f"{file}: expected a tensor that torch.save wrote, found a safetensors file; {TENSOR}")
    value = read_torch(file, TENSOR)
    if not isinstance(value, torch.Tensor):
        raise SamloveError(f"{file}: expected a tensor {SHAPE}, found {type(value).__name__}")
    if not is_plain(value) or value.is_complex():
        raise SamloveError(f"{file}: expected real numbers, all of them in the file, found {value.dtype}; {TENSOR}")
    if tuple(value.shape) != SHAPE:
        raise SamloveError(f"{file}: expected a tensor {SHAPE}, found {tuple(value.shape)}")
    return {"audio": to_store(str(file), value, dtype), "audio_valid": np.ones(SHAPE[0], bool)}
