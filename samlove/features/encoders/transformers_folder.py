"""Pretrained models in the transformers format: a folder with configuration, weights and tokenizer."""

import hashlib
from pathlib import Path
from typing import Any

import torch

import samlove.model.torchvision_ops  # noqa: F401  (transformers imports torchvision)
from samlove.errors import RequestError, SamloveError
from samlove.model.weights import HUB, from_hub
from stores.fingerprint import sha256_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read
READ = ("*.json", "*.txt", *WEIGHTS)  # configuration, vocabulary, weights
CLIP = "openai/clip-vit-base-patch16"


def resolve_folder(weights: str, what: str, name: str) -> Path:
    """The local folder that `weights` names; "hub:NAME" downloads it from the Hugging Face Hub.

    name: the Hub name of the paper's model, for the message.
    Raises RequestError, saying what the folder is and how to get it, if it or one of its files is missing.
    """
    remedy = f"set weights: hub:{name}, or run: hf download {name} --local-dir FOLDER"
    if weights.startswith(HUB):
        from huggingface_hub import snapshot_download

        folder = Path(from_hub(weights, what, remedy, lambda n: snapshot_download(n, allow_patterns=list(READ))))
    else:
        folder = Path(weights)
    if not (folder / "config.json").is_file() or not any((folder / file).is_file() for file in WEIGHTS):
        raise RequestError(f"{folder}: config.json or weights ({' or '.join(WEIGHTS)}) of {what} missing; {remedy}")
    return folder


def sha256_model(folder: Path) -> str:
    """Hash of the names and bytes of all files that are read from a model's folder."""
    weights = next(name for name in WEIGHTS if (folder / name).is_file())
    names = {path.name for pattern in READ for path in folder.glob(pattern)} - set(WEIGHTS) | {weights}
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def load_network(model: Any, folder: Path, **options: Any) -> Any:
    """A transformers class loaded from a folder, float32, in evaluation mode, without network access.

    Raises SamloveError if a weight is missing; transformers would only warn and leave it random.
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
    if missing := sorted(loaded["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SamloveError(
            f"{folder}: weights of {model.__name__} missing: {missing[0]}{more}; download the folder again"
        )
    return network.eval()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises SamloveError if it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise _unreadable(folder, "tokenizer", error) from error


def _unreadable(folder: Path, what: str, error: Exception) -> SamloveError:
    reason = str(error).strip().split("\n")[0]
    return SamloveError(f"{folder}: not readable as a {what}: {reason}; download the folder again")
