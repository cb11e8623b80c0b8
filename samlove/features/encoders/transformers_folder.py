"""Pretrained models in the transformers format: a folder with configuration, weights and tokenizer."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

import samlove.model.torchvision_ops  # noqa: F401  (transformers imports torchvision)
from samlove.config import local_path
from samlove.errors import RequestError, SamloveError, absence
from samlove.model.weights import AGAIN, HUB, from_hub, is_safetensors, load_state_dict, read_torch, watched_path
from stores.fingerprint import sha256_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read
SEVERAL = "model.safetensors.index.json"  # names any files, which transformers prefers to pytorch_model.bin
READ = ("*.json", "*.txt", "*.model", *WEIGHTS)  # configuration, vocabulary, weights
CLIP = "openai/clip-vit-base-patch16"
INSIDE = ("*/config.json", "snapshots/*/config.json")  # of sentence-transformers, of the Hub's own cache


def resolve_folder(weights: str, what: str, name: str, model_types: tuple[str, ...]) -> Path:
    """The local folder that `weights` names; "hub:NAME" downloads it from the Hugging Face Hub.

    name: the Hub name of such a model, for the message. model_types: the architectures in config.json that are
    accepted; transformers may load the weights of a different one without an error, and compute something else.
    Raises RequestError, saying what the folder is and how to get it, if it or one of its files is missing, or if it has
    a different architecture; SamloveError if one of its files is damaged.
    """
    remedy = f"set weights: hub:{name}, or run: hf download {name} --local-dir FOLDER"
    if weights.startswith(HUB):
        from huggingface_hub import snapshot_download

        folder = Path(from_hub(weights, what, remedy, lambda n: snapshot_download(n, allow_patterns=list(READ))))
    else:
        folder = watched_path(weights)
    if not os.path.isdir(folder):
        raise RequestError(f"{folder}: {absence(folder)}; expected the folder of {what}; {remedy}")
    if not os.path.isfile(folder / "config.json"):
        for pattern in INSIDE:
            for inside in sorted(folder.glob(pattern)):
                if _type(inside) in model_types:
                    raise RequestError(f"{folder}: the model is in a folder inside it; set weights: {inside.parent}")
    for names in (("config.json",), WEIGHTS):
        if not any(os.path.isfile(folder / name) for name in names):
            found = absence(folder / names[0])
            raise RequestError(f"{folder / ' or '.join(names)}: {found}; expected as a part of {what}; {remedy}")
    found = model_type(folder)
    if found not in model_types:
        expected = " or ".join(filter(None, (", ".join(map(repr, model_types[:-1])), repr(model_types[-1]))))
        raise RequestError(f"{folder / 'config.json'}: expected model_type {expected}, found {found!r}; {remedy}")
    if _weights(folder).name != WEIGHTS[0] and os.path.lexists(folder / SEVERAL):
        raise RequestError(
            f"{folder / SEVERAL}: expected the weights in one file, found a list of several, which transformers reads "
            f"instead of {_weights(folder).name}; remove it, or {remedy}"
        )
    is_safetensors(_weights(folder))
    return folder


def model_type(folder: Path) -> Any:
    """The architecture that the folder's config.json names. Raises SamloveError if it is not such a file."""
    return _type(folder / "config.json")


def _type(config: Path) -> Any:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise SamloveError(f"{config}: expected the configuration of a model, found something else; {AGAIN}") from error


def _weights(folder: Path) -> Path:
    return next(folder / name for name in WEIGHTS if os.path.isfile(folder / name))


def sha256_model(folder: Path) -> str:
    """Hash of the names and bytes of all files that are read from a model's folder."""
    digest = hashlib.sha256()
    for file in model_files(folder):
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """All files that are read from a model's folder, sorted by name."""
    names = {path.name for pattern in READ for path in folder.glob(pattern)} - set(WEIGHTS) | {_weights(folder).name}
    return [folder / name for name in sorted(names)]


def read_config(weights: str, part: str) -> Any | None:
    """transformers' configuration of the model that `weights` names, or of its `part` (text, vision or audio).

    "hub:NAME" downloads config.json alone. None if the file is not there or not readable.
    """
    from transformers import AutoConfig

    try:
        if weights.startswith(HUB):
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(weights.removeprefix(HUB), "config.json")).parent
        else:
            folder = local_path(weights)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises a dozen unrelated types for a broken folder
        return None
    return getattr(config, f"{part}_config", config)


def load_network(name: str, folder: Path, **options: Any) -> Any:
    """The class `name` of transformers, loaded from a folder, float32, in evaluation mode, without network access.

    Raises SamloveError if the weights are not exactly those of the configuration: one is missing, has a different shape
    or is not floating-point, or there are further layers. transformers would at most warn.
    """
    import transformers
    from transformers.utils import logging

    model = getattr(transformers, name)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        network, loaded = model.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **options,
        )
    except Exception as error:  # transformers raises a dozen unrelated types for a broken folder
        weights = _weights(folder)
        if not is_safetensors(weights):
            read_torch(weights)  # says what is wrong with the file, if it is the file
        raise _unreadable(folder, name, error) from error
    own = dict(network.named_parameters())
    layers = {_numberless(weight) for weight in own}
    stored = load_state_dict(_weights(folder))
    first = next(iter(own))
    prefix = next((weight.removesuffix(first) for weight in stored if f".{weight}".endswith(f".{first}")), "")
    ours = {weight: weight.removeprefix(prefix) for weight in stored if weight.startswith(prefix)}
    # Integers are quantised weights; transformers would convert them without their scales.
    integers = [weight for weight, mine in ours.items() if mine in own and not stored[weight].is_floating_point()]
    further = [weight for weight, mine in ours.items() if mine not in own and _numberless(mine) in layers]
    for what, names in (
        ("missing", loaded["missing_keys"]),
        ("whose shapes differ from config.json", [weight for weight, *_ in loaded["mismatched_keys"]]),
        ("that are integers", integers),
        ("not in config.json", further),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SamloveError(f"{folder}: weights of {name} {what}: {min(names)}{more}; download the folder again")
    return network.eval()


def _numberless(name: str) -> str:
    """The name of a weight without the number of its layer."""
    return re.sub(r"\.\d+\.", ".N.", name)


def load_tokenizer(folder: Path, families: tuple[str, ...], network: Any, ids: tuple[str, ...], spare: int = 0) -> Any:
    """The folder's tokenizer.

    families: classes of transformers that it may have. network: the network that it belongs to. ids: the special
    tokens, such as pad_token_id, whose numbers in the network's configuration are the tokenizer's. spare: how many
    words more than the tokenizer the network may have.
    Raises SamloveError if it cannot be read, or is not the tokenizer that the network was trained with; transformers
    makes up a tokenizer without words if a file is missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise _unreadable(folder, " or ".join(families), error) from error
    config = network.config
    family, tokens = type(tokenizer).__name__.removesuffix("Fast"), len(tokenizer)
    faults = []
    if family not in families:
        faults.append(f"class {' or '.join(families)}, found {family}")
    if not config.vocab_size - spare <= tokens <= config.vocab_size:
        least = f"{config.vocab_size - spare} to " if spare else ""
        faults.append(f"tokens {least}{config.vocab_size}, found {tokens}")
    wanted, found = ({name: getattr(owner, name) for name in ids} for owner in (config, tokenizer))
    faults += [f"{name} {wanted[name]}, found {found[name]}" for name in ids if wanted[name] != found[name]]
    if faults:
        raise SamloveError(
            f"{folder}: its tokenizer does not fit the network or is incomplete: expected {faults[0]}; "
            "download the folder again"
        )
    return tokenizer


def load_extractor(folder: Path) -> Any:
    """The feature extractor of preprocessor_config.json.

    Raises RequestError if that file is missing, SamloveError if it is not readable.
    """
    from transformers import AutoFeatureExtractor

    path = folder / "preprocessor_config.json"
    if not os.path.isfile(path):
        raise RequestError(f"{path}: {absence(path)}; expected the settings of the feature extractor; {AGAIN}")
    try:
        return AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as above
        raise _unreadable(folder, "feature extractor", error) from error


def _unreadable(folder: Path, what: str, error: Exception) -> SamloveError:
    reason = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().split("\n")[0]
    return SamloveError(f"{folder}: not readable as a {what}: {reason}; download the folder again")
