"""Reads a Ref-AVS folder: its table, frames, audio and masks.

    metadata.csv                              vid,uid,split,fid,exp
    cues.csv                                  in LAVS-synth only: uid,fid,exp,template,sight,sound,time,late
    media/{media_id}/frames/{t}.jpg           one frame per second
    media/{media_id}/audio.wav
    gt_mask/{media_id}/fid_{fid}/{t:05d}.png  every pixel > 0 belongs to the object

A file that cannot be read raises SamloveError with its path: nothing is skipped, and a truncated file is never
accepted as complete. samlove.data.images and samlove.data.audio say which files are refused.
"""

import csv
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from samlove.data.audio import open_audio
from samlove.data.images import identified, open_checked, orientation, to_labels, to_rgb, turned_upright
from samlove.data.links import unwatched
from samlove.errors import RequestError, SamloveError, absence

COLUMNS = ("vid", "uid", "split", "fid", "exp")
CUE_COLUMNS = ("uid", "fid", "exp", "template", "sight", "sound", "time")  # earlier versions had no `late`
FRAME_NAME = re.compile(r"(0|[1-9][0-9]{0,8})\.jpg")
MASK_NAME = re.compile(r"([0-9]{5})\.png")
MAX_PEAK = 16  # of float samples; lossy codecs exceed 1 a little, integers saved as floats by far


class RefAvsFolder:
    """The paths and tables of a Ref-AVS folder. Holds no open file."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def check_exists(self) -> None:
        """Raise RequestError, with the remedy, if the folder does not exist, or is a link to one that does not."""
        if os.path.isdir(self.root):
            return
        if self.root.is_symlink():
            target = os.readlink(self.root)
            raise RequestError(
                f"{self.root}: link to {target}, which is not a folder; run: ln -sfn /path/to/Ref-AVS {self.root}"
            )
        if os.path.lexists(self.root):
            raise RequestError(f"{self.root}: expected a folder or a link to one, found a file; remove it")
        link = f"mkdir -p {self.root.parent} && ln -s /path/to/Ref-AVS {self.root}"
        raise RequestError(f"{self.root}: no dataset; link yours: {link}")

    def check_links(self) -> None:
        """Raise RequestError, with the remedy, for a link to a folder below this one, which DVC would not follow.

        Also for everything else that samlove.data.links finds: DVC could not watch the dataset.
        """
        problems = unwatched(self.root)
        if first := next(problems, None):
            more = sum(1 for _ in problems)
            raise RequestError(first + (f" ({more:,} more such)" if more else ""))

    def metadata(self) -> pd.DataFrame:
        """metadata.csv unchanged: the columns in COLUMNS and any others, all str; the index is the line in the file.

        Raises RequestError if there is no metadata.csv, SamloveError if it is not such a table.
        """
        path = self.root / "metadata.csv"
        if not os.path.lexists(path):
            raise RequestError(
                f"{path}: {absence(path)}; expected a folder in the layout of Ref-AVS (README.md shows it)"
            )
        return read_table(path, COLUMNS)

    def cues(self) -> pd.DataFrame | None:
        """cues.csv, all str; None if there is no such file."""
        path = self.root / "cues.csv"
        return read_table(path, CUE_COLUMNS) if os.path.lexists(path) else None

    def frame_path(self, media_id: str, t: int) -> Path:
        return self.root / "media" / media_id / "frames" / f"{t}.jpg"

    def audio_path(self, media_id: str) -> Path:
        return self.root / "media" / media_id / "audio.wav"

    def mask_path(self, media_id: str, fid: int, t: int) -> Path:
        return self.root / "gt_mask" / media_id / f"fid_{fid}" / f"{t:05d}.png"

    def frame_count(self, media_id: str) -> int:
        """The highest frame number plus 1, or 0 without frames; a gap counts as a frame.

        Raises SamloveError if the folder of the frames cannot be read.
        """
        return highest(names_in(self.frame_path(media_id, 0).parent) or [], FRAME_NAME) + 1

    def frame_paths(self, media_id: str, frames: int) -> list[Path]:
        """Exactly `frames` paths: a longer video is cut, a shorter one repeats its last frame.

        Raises SamloveError if the video has no frames.
        """
        found = self.frame_count(media_id)
        if found == 0:
            raise SamloveError(f"{self.frame_path(media_id, 0).parent}: expected frames 0.jpg, 1.jpg, ..., found none")
        return [self.frame_path(media_id, min(t, found - 1)) for t in range(frames)]

    def mask_paths(self, media_id: str, fid: int, frames: int) -> list[Path]:
        """The paths of the object's masks for the frames that `frame_paths` returns."""
        last = max(self.frame_count(media_id), 1) - 1
        return [self.mask_path(media_id, fid, min(t, last)) for t in range(frames)]

    def load_masks(self, media_id: str, fid: int, frames: int, size: int) -> np.ndarray:
        """The object's masks for the frames that `frame_paths` returns: bool (frames, size, size).

        Each is resized by nearest neighbour, whatever its own size.
        Raises SamloveError with the path of the first mask that is missing or cannot be read.
        """
        masks: dict[Path, np.ndarray] = {}
        paths = self.mask_paths(media_id, fid, frames)
        for path in paths:
            if path not in masks:  # a short video repeats its last frame
                masks[path] = resize_mask(load_mask(path), size)
        return np.stack([masks[path] for path in paths])  # (frames, size, size)


def names_in(folder: Path) -> list[str] | None:
    """The names in a folder, sorted; None if there is no such folder. Raises SamloveError if it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise SamloveError(f"{folder}: expected a folder, found a file in its place") from None
    except OSError as error:
        raise SamloveError(f"{folder}: cannot be read: {error.strerror}") from None


def highest(names: list[str], pattern: re.Pattern[str]) -> int:
    """The highest number in the names that match FRAME_NAME or MASK_NAME; -1 if none does."""
    matches = (pattern.fullmatch(name) for name in names)
    return max((int(match[1]) for match in matches if match), default=-1)


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
    """A frame: uint8 (H, W, 3), RGB, upright according to its EXIF orientation; 16 bits per channel become 8.

    Raises SamloveError with the path if it is missing or truncated, or not a single image of 8 or 16 bits per channel.
    """
    with _decoding(path, "image"), open_checked(path) as image:
        image.load()
        return np.asarray(to_rgb(turned_upright(image)))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the frame that `load_frame` returns, after decoding all of it.

    JPEGs are decoded at an eighth of their size, for speed. Raises SamloveError as `load_frame` does.
    """
    with _decoding(path, "image"), open_checked(path) as image:
        width, height = image.size
        image.draft(None, (1, 1))
        image.load()
        to_rgb(image)
        return (height, width) if orientation(image) >= 5 else (width, height)


def is_turned(path: Path) -> bool:
    """Whether the header of an image states an EXIF orientation other than upright."""
    with _decoding(path, "image"), identified(path) as image:
        return orientation(image) != 1


def load_mask(path: Path) -> np.ndarray:
    """A mask: bool (H, W), True where `load_labels` is > 0. Raises SamloveError as `load_labels` does."""
    return load_labels(path) > 0


def load_labels(path: Path) -> np.ndarray:
    """The labels of a mask: (H, W), int or float. Pixels > 0 belong to the object; usually they all have one value.

    samlove.data.images.to_labels says which values of an image are its labels. Like a frame, a mask is turned upright.
    Raises SamloveError with the path if it is missing or truncated, UnclearMask if it can be read as different masks.
    """
    with _decoding(path, "image"), open_checked(path) as image:
        return to_labels(image)


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool (H, W) -> bool (size, size), nearest neighbour by pixel centres."""
    image = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST)) > 0


def load_audio(path: Path) -> tuple[np.ndarray, int]:
    """Audio: float32 (samples,), averaged over all channels, 1 at full scale, and its sample rate in Hz.

    May be shorter or longer than the video; the encoder pads or trims it. Raises SamloveError with the path if the file
    is missing, if samlove.data.audio refuses it (a truncated file, for example), or if a sample is not finite or beyond
    MAX_PEAK.
    """
    with _decoding(path, "audio"), open_audio(path) as file:
        expected, rate = file.frames, file.samplerate
        samples = file.read(expected, dtype="float32", always_2d=True)  # (samples, channels)
        if len(samples) != expected:
            raise SamloveError(f"truncated audio: expected {expected:,} samples, found {len(samples):,}")
        if not np.isfinite(samples).all():
            raise SamloveError("expected finite samples, found NaN or infinity")
        if (peak := np.abs(samples).max(initial=0)) > MAX_PEAK:
            raise SamloveError(f"expected samples in -1..1, found {peak:g}; divide them by the largest possible value")
        return samples.mean(axis=1, dtype=np.float32), rate  # (samples,)


@contextmanager
def _decoding(path: Path, what: str) -> Iterator[None]:
    """Turn every error into a SamloveError with the path: Pillow and soundfile raise all kinds for damaged files."""
    try:
        yield
    except SamloveError as error:
        raise type(error)(f"{path}: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise SamloveError(f"{path}: no such file; expected {what}") from None
    except IsADirectoryError:
        raise SamloveError(f"{path}: expected a file, found a folder") from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise SamloveError(f"{path}: cannot be read: {error.strerror}") from None
        text = str(getattr(error, "error_string", error))  # libsndfile's, without the name of a file in memory
        reason = " ".join(text.split()).replace(str(path), "").replace("''", "it") or type(error).__name__
        raise SamloveError(f"{path}: {what} cannot be decoded, possibly truncated: {reason}") from None
