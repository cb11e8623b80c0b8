"""Reads a Ref-AVS folder: its table, frames, audio and masks.

    metadata.csv                              vid,uid,split,fid,exp
    cues.csv                                  in LAVS-synth only: uid,fid,exp,template,sight,sound,time
    media/{media_id}/frames/{t}.jpg           one frame per second
    media/{media_id}/audio.wav
    gt_mask/{media_id}/fid_{fid}/{t:05d}.png  every pixel > 0 belongs to the object

A file that cannot be read raises SamloveError with its path: nothing is skipped, and a truncated file is never
accepted as complete.
"""

import csv
import io
import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from PIL import Image

from samlove.errors import RequestError, SamloveError

COLUMNS = ("vid", "uid", "split", "fid", "exp")
CUE_COLUMNS = ("uid", "fid", "exp", "template", "sight", "sound", "time")

# Pillow raises these for files that are truncated or not images; not all of them are OSError.
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # data sizes in the header of a wav that was written to a pipe


class RefAvsFolder:
    """The paths and tables of a Ref-AVS folder. Holds no open file."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def check_exists(self) -> None:
        """Raise RequestError, with the remedy, if the folder does not exist, or is a link to one that does not."""
        if self.root.is_dir():
            return
        if self.root.is_symlink():
            target = os.readlink(self.root)
            raise RequestError(
                f"{self.root}: link to {target}, which is not a folder; run: ln -sfn /path/to/Ref-AVS {self.root}"
            )
        if self.root.exists():
            raise RequestError(f"{self.root}: expected a folder or a link to one, found a file; remove it")
        link = f"mkdir -p {self.root.parent} && ln -s /path/to/Ref-AVS {self.root}"
        raise RequestError(f"{self.root}: no dataset; link yours: {link}")

    def metadata(self) -> pd.DataFrame:
        """metadata.csv unchanged: the columns in COLUMNS and any others, all str; the index is the line in the file.

        Raises RequestError if there is no metadata.csv, SamloveError if it is not such a table.
        """
        path = self.root / "metadata.csv"
        if not path.is_file():
            raise RequestError(f"{path}: no such file; expected a folder in the layout of Ref-AVS (README.md shows it)")
        return read_table(path, COLUMNS)

    def cues(self) -> pd.DataFrame | None:
        """cues.csv, all str; None if there is no such file."""
        path = self.root / "cues.csv"
        return read_table(path, CUE_COLUMNS) if path.is_file() else None

    def frame_path(self, media_id: str, t: int) -> Path:
        return self.root / "media" / media_id / "frames" / f"{t}.jpg"

    def audio_path(self, media_id: str) -> Path:
        return self.root / "media" / media_id / "audio.wav"

    def mask_path(self, media_id: str, fid: int, t: int) -> Path:
        return self.root / "gt_mask" / media_id / f"fid_{fid}" / f"{t:05d}.png"

    def frame_count(self, media_id: str) -> int:
        """The highest frame number plus 1, or 0 without frames; a gap counts as a frame."""
        numbers = [int(p.stem) for p in self.frame_path(media_id, 0).parent.glob("*.jpg") if p.stem.isdecimal()]
        return max(numbers, default=-1) + 1

    def frame_paths(self, media_id: str, frames: int) -> list[Path]:
        """Exactly `frames` paths: a longer video is cut, a shorter one repeats its last frame.

        Raises SamloveError if the video has no frames.
        """
        found = self.frame_count(media_id)
        if found == 0:
            raise SamloveError(f"{self.frame_path(media_id, 0).parent}: expected frames 0.jpg, 1.jpg, ..., found none")
        return [self.frame_path(media_id, min(t, found - 1)) for t in range(frames)]

    def load_masks(self, media_id: str, fid: int, frames: int, size: int | None = None) -> np.ndarray:
        """The object's masks for the frames that `frame_paths` returns: bool (frames, size, size).

        Resized by nearest neighbour to `size` x `size`; with `size=None` they keep their own (H, W).
        Raises SamloveError with the path of the first mask that is missing or cannot be read.
        """
        last = max(self.frame_count(media_id), 1) - 1
        masks: list[np.ndarray] = []
        for t in range(min(frames, last + 1)):
            path = self.mask_path(media_id, fid, t)
            mask = load_mask(path)
            if size is not None:
                mask = resize_mask(mask, size)
            elif masks and mask.shape != masks[0].shape:
                raise SamloveError(f"{path}: expected a mask of {masks[0].shape} as in frame 0, found {mask.shape}")
            masks.append(mask)
        masks += [masks[-1]] * (frames - len(masks))
        return np.stack(masks)  # (frames, H, W)


def read_table(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """A csv file with at least `columns`: all values are unchanged str; the index is the line on which a row begins.

    Stricter than pandas, which guesses types, fills short rows and reads NULL as a missing value.
    Raises SamloveError with the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            absent = [c for c in columns if c not in header]
            if absent or len(set(header)) != len(header):
                raise SamloveError(f"{path}: expected the columns {','.join(columns)}, found {','.join(header)}")
            lines, rows, line = [], [], reader.line_num + 1
            for row in reader:
                if row:  # skips blank lines
                    if len(row) != len(header):
                        raise SamloveError(f"{path}:{line}: expected {len(header)} fields, found {len(row)}: {row}")
                    lines.append(line)
                    rows.append(row)
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise SamloveError(f"{path}: not a UTF-8 csv file: {error}") from None
    except OSError as error:
        raise SamloveError(f"{path}: {error.strerror}") from None
    if not rows:
        raise SamloveError(f"{path}: expected rows below the header, found none")
    return pd.DataFrame(rows, columns=header, index=pd.Index(lines, name="line"), dtype=str)


def load_frame(path: Path) -> np.ndarray:
    """A frame: uint8 (H, W, 3), RGB. Raises SamloveError with the path if it is missing or truncated."""
    return np.asarray(_open_image(path)[0].convert("RGB"))


def load_mask(path: Path) -> np.ndarray:
    """A mask: bool (H, W), True where any colour channel is > 0.

    Raises SamloveError with the path if it is missing or truncated.
    """
    image, _ = _open_image(path)
    if image.mode in ("P", "PA"):
        image = image.convert("RGB")  # the colour counts, not the palette index
    elif image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])  # an opaque pixel need not belong to the object
    pixels = np.atleast_3d(np.asarray(image) > 0)  # (H, W, channels)
    return np.asarray(pixels.any(axis=-1))  # (H, W)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image, after decoding all of it; JPEGs at an eighth of their size, for speed.

    Raises SamloveError with the path if it is missing or truncated.
    """
    return _open_image(path, quick=True)[1]


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool (H, W) -> bool (size, size), nearest neighbour by pixel centres."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST)) > 0


def load_audio(path: Path) -> tuple[np.ndarray, int]:
    """Audio: float32 (samples,) in -1..1, averaged over all channels, and its sample rate in Hz.

    May be shorter or longer than the video; the encoder pads or trims it. Raises SamloveError with the path if the
    file is missing, truncated (libsndfile itself would return the remaining samples) or has non-finite samples.
    """
    try:
        _check_wav_length(path)
        with soundfile.SoundFile(path) as file:
            expected, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)  # (samples, channels)
    except (OSError, soundfile.SoundFileError) as error:
        raise _unreadable(path, "audio", error) from None
    if len(samples) != expected:
        raise SamloveError(f"{path}: truncated audio: expected {expected} samples, found {len(samples)}")
    if not np.isfinite(samples).all():
        raise SamloveError(f"{path}: expected finite samples, found NaN or infinity")
    return samples.mean(axis=1, dtype=np.float32), rate  # (samples,)


def _check_wav_length(path: Path) -> None:
    """Raises SamloveError if a RIFF file is shorter than its data chunk says."""
    length = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return  # another format, left to libsndfile
        while len(chunk := file.read(8)) == 8:
            name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
            if name == b"data" and size in _UNKNOWN_SIZE:
                return
            end = file.tell() + size
            if end > length:
                raise SamloveError(f"{path}: truncated audio: expected {end} bytes, found {length}")
            if name == b"data":
                return
            file.seek(end + size % 2)  # chunks begin at even offsets
    raise SamloveError(f"{path}: truncated audio: no samples in a wav file of {length} bytes")


def _open_image(path: Path, quick: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """A fully decoded image (`quick`: JPEGs at an eighth of their size), and its (width, height)."""
    try:
        with Image.open(path) as image:
            image.verify()  # checks a PNG's checksums, which decoding ignores
        with Image.open(path) as image:
            size = image.size
            if quick:
                image.draft(None, (1, 1))
            image.load()
            return image, size
    except _IMAGE_ERRORS as error:
        raise _unreadable(path, "image", error) from None


def _unreadable(path: Path, what: str, error: BaseException) -> SamloveError:
    if isinstance(error, FileNotFoundError):
        return SamloveError(f"{path}: no such file; expected {what}")
    reason = " ".join(str(error).split()).replace(str(path), "").replace("''", "it")
    return SamloveError(f"{path}: {what} cannot be decoded, possibly truncated: {reason}")


def _call_libsndfile_once() -> None:
    """Call the functions that `load_audio` uses, with a file that opens and one that does not.

    cffi 2.1 builds the type of a C function on its first call, and aborts the process if two threads do so at once.
    """
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 38, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16, b"data", 2)
    with soundfile.SoundFile(io.BytesIO(header + bytes(2))) as file:
        file.read(dtype="float32", always_2d=True)
    with suppress(soundfile.SoundFileError):
        soundfile.SoundFile(os.devnull)


_call_libsndfile_once()
