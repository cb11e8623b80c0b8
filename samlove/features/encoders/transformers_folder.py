"""Pretrained models in the transformers format: a folder with a configuration, weights and a tokenizer."""

import hashlib
from pathlib import Path
from typing import Any

import torch

import samlove.model.torchvision_ops  # noqa: F401  (transformers imports torchvision)
from samlove.errors import RequestError, SamloveError
from samlove.model.weights import HUB, from_hub
from stores.fingerprint import sha256_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read
READ = ("*.json", "*.txt", *WEIGHTS)  # configuration, vocabulary, weights
CLIP = "openai/clip-vit-base-patch16"


def resolve_folder(weights: str, what: str, name: str) -> Path:
    """The local folder that `weights` names; for "hub:NAME" a snapshot of it, which touches the network.

    name: where on the hub the model that the paper uses is, for the message.
    Raises RequestError, saying what the folder is and how to get it, where there is none.
    """
    remedy = f"set weights: hub:{name}, or run: hf download {name} --local-dir FOLDER"
    if weights.startswith(HUB):
        from huggingface_hub import snapshot_download

        folder = Path(from_hub(weights, what, remedy, lambda n: snapshot_download(n, allow_patterns=list(READ))))
    else:
        folder = Path(weights)
    if not (folder / "config.json").is_file() or not any((folder / file).is_file() for file in WEIGHTS):
        raise RequestError(f"{folder}: expected config.json and {' or '.join(WEIGHTS)} of {what}, found none; {remedy}")
    return folder


def sha256_model(folder: Path) -> str:
    """Of the names and bytes of all that is read of a model's folder."""
    weights = next(name for name in WEIGHTS if (folder / name).is_file())
    names = {path.name for pattern in READ for path in folder.glob(pattern)} - set(WEIGHTS) | {weights}
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def load_network(model: Any, folder: Path, **options: Any) -> Any:
    """A transformers class from a folder, float32, in evaluation mode, without a look at the network.

    Raises SamloveError where the folder lacks a weight, which transformers would leave random with a warning.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        network, loaded = model.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # transformers raises a dozen unrelated types for a broken folder
        raise _unreadable(folder, model.__name__, error) from error
    if lacking := sorted(loaded["missing_keys"]):
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise SamloveError(f"{folder}: expected the weights of a {model.__name__}, found none for {lacking[0]}{more}")
    return network.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; raises SamloveError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise _unreadable(folder, "tokenizer", error) from error


def _unreadable(folder: Path, what: str, error: Exception) -> SamloveError:
    reason = str(error).strip().split("\n")[0]
    return SamloveError(f"{folder}: not readable as a {what}: {reason}; fetch the folder again")
