"""Pretrained weights: from a local path, or from "hub:NAME" on the Hugging Face Hub.

Only "hub:NAME" uses the network. Reading a file unpickles nothing but tensors. What a file contains decides how it is
read, not its name.
"""

import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samlove.config import local_path
from samlove.data.links import link_problem
from samlove.errors import RequestError, SamloveError, absence

HUB = "hub:"
SHOWN = 3  # names listed in a message
LONGEST_HEADER = 10**8  # bytes; a limit of safetensors
LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # pickled, at the start of a file that torch.save wrote before 1.6
AGAIN = "download the file again"
UNPACK = "unpack it and name the file inside"
EXPORT = "in the program that made it, save the tensors alone: torch.save(model.state_dict(), 'weights.pt')"
# How files begin that are found in place of weights, what they are, and what to do.
IMPOSTORS: tuple[tuple[bytes | tuple[bytes, ...], str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "run: git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"\xfd7zXZ", "an xz archive", UNPACK),
    (b"\x89HDF", "an HDF5 file", EXPORT),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    ((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), "a pickle that torch.save did not write", EXPORT),
)
# What the pickle of plain tensors refers to. Not all that these modules have is allowed; torch decides that.
TENSOR_MODULES = {"torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter", "_codecs"}
TENSOR_NAMES = {"collections.OrderedDict", "collections.Counter"}
# torch calls these, too, with any size: they take memory that the file does not have.
RESERVES = re.compile(r"(__builtin__|builtins)\.bytearray|torch(\.\w+)*\.\w+Tensor")
PROTOCOL = 2  # of torch.save's pickles; torch does not read later ones safely


def resolve_file(weights: str, what: str, remedy: str, hub_file: str | None = None) -> Path:
    """The local file that `weights` names; "hub:NAME" downloads it from the Hugging Face Hub.

    hub_file: the name of the file in the Hub repository NAME; None if these weights are not on the Hub.
    Raises RequestError, saying what the file is and how to get it, if there is no such file; SamloveError if it cannot
    be a file of weights.
    """
    if weights.startswith(HUB):
        if hub_file is None:
            raise RequestError(f"{weights}: expected a local file, hub: is not supported for {what}; {remedy}")
        from huggingface_hub import hf_hub_download

        return Path(from_hub(weights, what, remedy, lambda name: hf_hub_download(name, hub_file)))
    path = watched_path(weights)
    if not os.path.isfile(path):
        raise RequestError(f"{path}: {absence(path)}; expected {what}; {remedy}")
    is_safetensors(path)
    return path


def watched_path(weights: str) -> Path:
    """The path in a setting. Raises RequestError if DVC would notice no change there although it watches the folder.

    DVC watches weights/PROFILE/STAGE, which may be a link, but does not follow links to folders inside it.
    """
    path = local_path(weights)
    for part in (path, *path.parents):
        inside = Path(os.path.relpath(part)).parts
        if inside[:1] == ("weights",) and len(inside) > 3 and part.is_symlink() and part.is_dir():
            raise RequestError(next(link_problem(part)))
    return path


def from_hub(weights: str, what: str, remedy: str, download: Callable[[str], str]) -> str:
    """Call `download` with the NAME of "hub:NAME". Raises RequestError if the download fails."""
    try:
        return download(weights.removeprefix(HUB))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are subclasses of these
        reason = str(error).strip().split("\n")[0]
        raise RequestError(f"{weights}: {what} cannot be downloaded from the Hub: {reason}; {remedy}") from error


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of one that torch.save wrote, by name.

    The latter may hold them under "model", as SAM 2's do. Floating-point tensors are returned as float32, whatever
    their stored dtype. Raises SamloveError, saying what the file holds, if it holds anything else or is damaged.
    """
    if is_safetensors(path):
        try:
            tensors: Any = load_file(path)
        except SafetensorError as error:
            reason = " ".join(str(error).split())
            raise SamloveError(f"{path}: truncated or damaged safetensors file ({reason}); {AGAIN}") from error
    else:
        tensors = read_torch(path)
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]
    if not isinstance(tensors, dict):
        raise SamloveError(f"{path}: expected tensors by name, found a {type(tensors).__name__}; {EXPORT}")
    others = [f"{name} ({_kind(value)})" for name, value in tensors.items() if not is_plain(value)]
    if others:
        raise SamloveError(f"{path}: expected tensors by name, found also {_some(others)}; {EXPORT}")
    plain = {_place(value): value.detach() for value in tensors.values()}  # tied weights are one tensor
    storages = [value.untyped_storage() for value in plain.values()]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if (taken := sum(value.nbytes for value in plain.values())) > stored:
        raise SamloveError(f"{path}: expected each tensor in its own memory, found {taken} bytes in {stored}; {EXPORT}")
    converted = {place: value.float() if value.is_floating_point() else value for place, value in plain.items()}
    return {str(name): converted[_place(value)] for name, value in tensors.items()}


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """Where the values of a tensor are in memory, and in which form."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def load_into(module: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path, what: str) -> None:
    """Load all weights of `module`. Raises SamloveError if a name, shape or kind of number does not fit."""
    own = module.state_dict()
    faults = [f"missing {name}" for name in own if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in own]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    faults += [  # torch would convert the integers of quantised weights, without their scales
        f"{name} is {tensors[name].dtype}, expected floating-point numbers"
        for name in own
        if name in tensors and own[name].is_floating_point() and not tensors[name].is_floating_point()
    ]
    if faults:
        raise SamloveError(
            f"{path}: these are not the weights of {what} as configured: {_some(faults, '; ')}; "
            "choose the weights of that model, or change its settings"
        )
    module.load_state_dict(tensors)


def read_torch(path: Path, remedy: str = EXPORT) -> Any:
    """What torch.save wrote to a file: tensors, numbers and texts, in lists and dictionaries.

    remedy: what to do about a file that also holds other objects.
    Raises SamloveError if it holds other objects, naming their types, or is damaged.
    """
    if sized := [name for name in _inspect_pickle(path)[0] if RESERVES.fullmatch(name)]:
        raise SamloveError(f"{path}: holds {_some(sized)}, which can reserve any memory, besides tensors; {remedy}")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():  # given a path, torch would decide by its suffix
            warnings.simplefilter("ignore")  # about unusual pickles
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises a dozen unrelated types, and its messages advise to load unsafely
        names, protocol = _inspect_pickle(path)
        others = [name for name in names if name.rpartition(".")[0] not in TENSOR_MODULES and name not in TENSOR_NAMES]
        if others:
            found = f"holds {_some(others)} besides tensors; it is not loaded, because such objects can run code"
        elif protocol > PROTOCOL:
            found, remedy = f"expected pickle protocol {PROTOCOL}, the default of torch.save, found {protocol}", EXPORT
        else:
            found, remedy = "truncated or damaged file of torch.save", AGAIN
        raise SamloveError(f"{path}: {found}; {remedy}") from error


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors; otherwise torch.save wrote it. Reads only its beginning or table of contents.

    Raises SamloveError, saying what the file is, if it is neither.
    """
    with open(path, "rb") as file:
        head = file.read(512)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return True
    if head.startswith(b"PK\x03\x04"):
        found = _recognise_zip(path)
    elif LEGACY_MAGIC in head[:40]:
        return False
    else:
        found = next(((what, remedy) for start, what, remedy in IMPOSTORS if head.startswith(start)), _describe(head))
    if found is None:
        return False
    what, remedy = found
    raise SamloveError(f"{path}: expected tensors (safetensors, or written by torch.save), found {what}; {remedy}")


def _recognise_zip(path: Path) -> tuple[str, str] | None:
    """What a ZIP archive is, and what to do; None if torch.save wrote it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a truncated or damaged file of torch.save, or a different ZIP archive", AGAIN
    names = [member.filename for member in members]
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive", EXPORT
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program", EXPORT
    if not any(name.endswith("/data.pkl") for name in names):
        return "a ZIP archive", UNPACK
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return "a compressed archive, which torch.save never writes", EXPORT
    return None


def _describe(head: bytes) -> tuple[str, str]:
    """What a file is that begins with `head` and has none of the formats above, and what to do."""
    text = head.decode(errors="ignore").lstrip("\ufeff \r\n\t")
    if not head:
        return "an empty file", AGAIN
    if text[:9].lower() == "<!doctype" or text[:5].lower() in ("<html", "<?xml"):
        return "a web page, perhaps a login or error page", AGAIN
    if text and all(c.isprintable() or c.isspace() for c in text):
        return f"a text that begins {text[:40]!r}", AGAIN
    return "a different or damaged file", AGAIN


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor that takes no more memory than the file gives it."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_nested:
        return False
    return value.device.type == "cpu" and value.numel() * value.itemsize <= value.untyped_storage().nbytes()


def _kind(value: Any) -> str:
    return "sparse, quantised or expanded tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _inspect_pickle(path: Path) -> tuple[list[str], int]:
    """The classes and functions that the pickle in a file of torch.save refers to, sorted, and its protocol.

    The pickle is disassembled, not executed.
    """
    found, protocol = set(), 0
    texts: list[str] = []
    memo: list[list[str]] = []
    with suppress(Exception):  # a damaged pickle: what precedes the damage counts
        for op, value, _ in _pickle_ops(path):
            if op.name == "PROTO":
                protocol = value
            elif op.name == "GLOBAL":
                found.add(".".join(value.split(" ")))
            elif op.name == "STACK_GLOBAL":
                found.add(".".join(texts[-2:]))
            elif op.name == "MEMOIZE":
                memo.append(texts[-1:])
            elif op.name in ("BINGET", "LONG_BINGET") and value < len(memo):
                texts += memo[value]
            elif isinstance(value, str):
                texts.append(value)
    return sorted(found), protocol


def _pickle_ops(path: Path) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith("/data.pkl"):
                    yield from pickletools.genops(archive.read(member))
    else:
        with open(path, "rb") as file:
            for _ in range(4):  # magic number, version, byte order, object
                yield from pickletools.genops(file)


def _some(names: list[str], separator: str = ", ") -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])
