"""Files that are found in place of weights, and what the error about each must say."""

import argparse
import gzip
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

TENSORS = {"a": torch.ones(2, 3)}
EXPORT = r"torch\.save\(model\.state_dict\(\), 'weights\.pt'\)"


def _truncated(write: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[:-20])

    return make


def _compressed(path: Path) -> None:
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    _archive(path, members, zipfile.ZIP_DEFLATED)


def _archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _arrays(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.ones(2))


IMPOSTORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "an empty file; download the file again"),
    "git lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a Git LFS pointer.*; run: git lfs pull",
    ),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html>Sign in</html>"), "a web page.*; download"),
    "xml": (lambda path: path.write_text("<?xml version='1.0'?><Error>AccessDenied</Error>"), "a web page.*; download"),
    "text": (lambda path: path.write_text('{"error": "not found"}'), 'a text that begins \'{"error": "not found"}\''),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "a gzip archive; unpack it"),
    "zip": (lambda path: _archive(path, {"weights.pt": b"x"}), "a ZIP archive; unpack it"),
    "compressed": (_compressed, "a compressed archive"),
    "npz": (_arrays, f"a NumPy archive; .*{EXPORT}"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), f"a pickle that torch.save .*{EXPORT}"),
    "noise": (lambda path: path.write_bytes(bytes(range(255, 127, -1)) * 9), "a different or damaged file; download"),
    "truncated": (_truncated(lambda path: torch.save(TENSORS, path)), "truncated or damaged.*; download"),
    "truncated, old format": (
        _truncated(lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False)),
        "truncated or damaged file of torch.save; download",
    ),
    "truncated safetensors": (_truncated(lambda path: save_file(TENSORS, path)), "truncated or damaged.*; download"),
    "numpy scalar": (
        lambda path: torch.save({"model": TENSORS, "best": np.float64(1)}, path),
        f"holds numpy.*multiarray.scalar, numpy.dtype besides tensors;.*; .*{EXPORT}",
    ),
    "object, old format": (
        lambda path: torch.save({"a": argparse.Namespace()}, path, _use_new_zipfile_serialization=False),
        f"holds argparse.Namespace besides tensors;.*; .*{EXPORT}",
    ),
    "object, new pickle": (
        lambda path: torch.save({"a": argparse.Namespace()}, path, pickle_protocol=4),
        f"holds argparse.Namespace besides tensors;.*; .*{EXPORT}",
    ),
    "whole module": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "holds .*torch.nn.modules.linear.Linear"),
    "new pickle": (
        lambda path: torch.save(TENSORS, path, pickle_protocol=4),
        f"pickle protocol 2,.*found 4; .*{EXPORT}",
    ),
    "more than tensors": (
        lambda path: torch.save({"state_dict": TENSORS, "epoch": 3}, path),
        rf"found also state_dict \(dict\), epoch \(int\); .*{EXPORT}",
    ),
    "one tensor": (lambda path: torch.save(torch.ones(2), path), f"found a Tensor; .*{EXPORT}"),
    "a tensor of a petabyte": (
        lambda path: torch.save({"a": torch.ones(1).expand(10**7, 10**7)}, path),
        r"found also a \(sparse, quantised or expanded tensor\)",
    ),
}
