"""Finds the faults of the frames, audio files and masks that the rows of a Ref-AVS folder's table refer to."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from samlove.data.audit import Fault
from samlove.data.dataset import (
    FRAME_NAME,
    MASK_NAME,
    RefAvsFolder,
    highest,
    image_size,
    is_turned,
    load_audio,
    load_labels,
    names_in,
)
from samlove.data.images import UnclearMask
from samlove.errors import SamloveError

AUDIO_TOLERANCE = 0.1  # seconds; ffmpeg cuts videos a few hundredths too short or too long

_MEDIA_NAME = re.compile(r"frames|audio\.wav")
_OBJECT_NAME = re.compile(r"fid_(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class MediaInfo:
    """Properties of a video's files; None if they were not checked or cannot be read."""

    media_id: str
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    audio_seconds: float | None = None
    audio_rate: int | None = None


@dataclass
class _Media:
    """A video that is being checked."""

    media_id: str
    lines: tuple[int, ...]
    objects: dict[int, tuple[int, ...]]  # fid -> lines of the rows that refer to it
    info: MediaInfo = field(init=False)
    faults: list[Fault] = field(default_factory=list)

    def fault(self, kind: str, where: Path, found: object, lines: tuple[int, ...] | None = None) -> None:
        text = str(found).removeprefix(f"{where}: ")
        self.faults.append(Fault(kind, str(where), text, self.lines if lines is None else lines))

    def names(
        self, place: Path, missing: str, expected: re.Pattern[str], lines: tuple[int, ...] | None = None
    ) -> list[str] | None:
        """The names in a folder, of which those that are not `expected` are a fault; None, and a fault, without it."""
        try:
            names = names_in(place)
        except SamloveError as error:
            self.fault("bad_folder", place, error, lines)
            return None
        if names is None:
            self.fault(missing, place, "no such folder", lines)
            return None
        if stray := [name for name in names if not expected.fullmatch(name)]:
            self.fault("stray_file", place / stray[0], "ignored" + _more(stray), lines)
        return names


def media_faults(rows: pd.DataFrame, folder: RefAvsFolder, frames: int) -> tuple[list[MediaInfo], list[Fault]]:
    """Decode the frames, audio files and masks that `rows` refer to, in threads, with a progress bar.

    Only the first `frames` frames and masks of a video are checked. Masks of null expressions are skipped, because
    nothing reads them.
    """
    checks = []
    for media_id, group in rows.groupby("media_id", sort=False):
        objects = {int(str(f)): tuple(map(int, g.index)) for f, g in group[~group["null"]].groupby("fid")}
        checks.append(_Media(str(media_id), tuple(map(int, group.index)), objects))
    with ThreadPoolExecutor((os.cpu_count() or 1) + 2) as pool:  # decoding releases the GIL; reading waits for the disk
        jobs = pool.map(lambda media: _check_one(media, folder, frames), checks)
        for _ in tqdm(jobs, total=len(checks), desc="check media", unit="video", mininterval=2):
            pass
    faults = [*_stray_files(folder, set(rows["media_id"])), *(fault for media in checks for fault in media.faults)]
    return [media.info for media in checks], faults


def _stray_files(folder: RefAvsFolder, media_ids: set[str]) -> Iterable[Fault]:
    """Files beside the folders of the videos. Other folders are not a fault: a table may use a part of the media."""
    for part in ("media", "gt_mask"):
        place = folder.root / part
        names = (names_in(place) or []) if place.is_dir() else []
        if stray := [name for name in names if name not in media_ids and not (place / name).is_dir()]:
            yield Fault("stray_file", str(place / stray[0]), "ignored" + _more(stray), ())


def _check_one(media: _Media, folder: RefAvsFolder, frames: int) -> None:
    media.info = MediaInfo(media.media_id)
    place = folder.audio_path(media.media_id).parent
    if media.names(place, "missing_media", _MEDIA_NAME) is None:
        return
    masks = _mask_names(media, folder)
    mask_count = max((highest(names, MASK_NAME) for names in masks.values()), default=-1) + 1
    frame_count, sizes = _check_frames(media, folder, frames, mask_count)
    seconds, rate = _check_audio(media, folder, frames)
    for fid in masks:
        _check_masks(media, folder, fid, sizes)
    width, height = next((s for s in sizes if s), (None, None))
    media.info = MediaInfo(media.media_id, frame_count, width, height, seconds, rate)


def _mask_names(media: _Media, folder: RefAvsFolder) -> dict[int, list[str]]:
    """The names in the mask folders of the objects that have one."""
    if not media.objects:
        return {}
    place = folder.mask_path(media.media_id, 0, 0).parent.parent
    lines = tuple(sorted(line for lines in media.objects.values() for line in lines))
    if media.names(place, "missing_mask", _OBJECT_NAME, lines) is None:
        return {}
    found = {}
    for fid, lines in media.objects.items():
        names = media.names(folder.mask_path(media.media_id, fid, 0).parent, "missing_mask", MASK_NAME, lines)
        if names is not None:
            found[fid] = names
    return found


def _check_frames(
    media: _Media, folder: RefAvsFolder, frames: int, mask_count: int
) -> tuple[int | None, list[tuple[int, int] | None]]:
    """The number of frames, and (width, height) of each of the first `frames`; None for a frame that cannot be read."""
    names = media.names(folder.frame_path(media.media_id, 0).parent, "missing_frame", FRAME_NAME)
    if names is None:
        return None, []
    found = highest(names, FRAME_NAME) + 1
    if found == 0:
        media.fault("missing_frame", folder.frame_path(media.media_id, 0), "no such file; the video has no frames")
        return 0, []
    count = max(found, mask_count)  # a mask implies that there was a frame
    if count != frames:
        end = folder.frame_path(media.media_id, min(count, frames))
        which = "the first extra one" if count > frames else "the first missing one"
        media.fault("frame_count", end, f"{count} frames, expected {frames}; this is {which}")
    sizes: list[tuple[int, int] | None] = []
    turned = []
    for t in range(min(count, frames)):
        path = folder.frame_path(media.media_id, t)
        size = None
        if path.name not in names:
            media.fault("missing_frame", path, f"no such file, but frame or mask {count - 1} exists")
        else:
            try:
                size = image_size(path)
                turned += [path] if is_turned(path) else []
            except SamloveError as error:
                media.fault("bad_frame", path, error)
        first = next((s for s in sizes if s), size)
        if size and first and size != first:
            media.fault("frame_size", path, f"{size[0]}x{size[1]}, but an earlier frame is {first[0]}x{first[1]}")
        sizes.append(size)
    if turned:
        media.fault("turned_frame", turned[0], "its EXIF orientation is not upright" + _more(turned))
    return found, sizes


def _check_audio(media: _Media, folder: RefAvsFolder, seconds: int) -> tuple[float | None, int | None]:
    path = folder.audio_path(media.media_id)
    if not os.path.lexists(path):
        media.fault("missing_audio", path, "no such file")
        return None, None
    try:
        samples, rate = load_audio(path)
    except SamloveError as error:
        media.fault("bad_audio", path, error)
        return None, None
    length = len(samples) / rate
    if length < seconds - AUDIO_TOLERANCE:
        media.fault("short_audio", path, f"{length:.3f} s, expected {seconds} s")
    elif length > seconds + AUDIO_TOLERANCE:
        media.fault("long_audio", path, f"{length:.3f} s, expected {seconds} s")
    return length, rate


def _check_masks(media: _Media, folder: RefAvsFolder, fid: int, sizes: list[tuple[int, int] | None]) -> None:
    lines = media.objects[fid]
    read, seen = 0, False
    odd: defaultdict[str, list[tuple[Path, object]]] = defaultdict(list)  # kind -> [(path, what is odd)]
    for t, size in enumerate(sizes):
        path = folder.mask_path(media.media_id, fid, t)
        if not os.path.lexists(path):
            media.fault("missing_mask", path, "no such file", lines)
            continue
        try:
            labels = load_labels(path)
        except UnclearMask as error:
            odd["unclear_mask"].append((path, error))
            continue
        except SamloveError as error:
            media.fault("bad_mask", path, error, lines)
            continue
        mask = labels > 0
        values = labels[mask]
        read, seen = read + 1, seen or values.size > 0
        if all(edge.all() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])):
            odd["whole_mask"].append((path, f"all pixels at the edges are > 0, and {mask.mean():.0%} of all pixels"))
        if values.size and values.min() != values.max():
            odd["mask_values"].append((path, f"{len(np.unique(values))} values > 0"))
        if size and mask.shape != size[::-1]:
            kind = "turned_mask" if mask.shape == size else "mask_size"
            odd[kind].append((path, f"{mask.shape[1]}x{mask.shape[0]}, but the frame is {size[0]}x{size[1]}"))
    for kind, masks in odd.items():  # one fault per object: its masks usually all have the same
        path, found = masks[0]
        media.fault(kind, path, f"{str(found).removeprefix(f'{path}: ')}{_more(masks)}", lines)
    if read and not seen:
        media.fault("empty_mask", folder.mask_path(media.media_id, fid, 0).parent, f"all {read} masks are empty", lines)


def _more(found: list) -> str:
    return f"; {len(found)} such in this folder" if found[1:] else ""
