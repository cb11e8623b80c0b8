"""Opens audio files, and refuses those that are truncated, too large, or do not say how long they are.

libsndfile decodes them. But it believes a WAV header that states a length of 0, and returns what remains of a truncated
file. So the samples of a WAV file are located here, and libsndfile gets a file with only the format and the samples.

The functions raise SamloveError, without the path, for a file that they refuse, and whatever soundfile raises for one
that it cannot decode; samlove.data.dataset turns both into one line with the path.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import soundfile

from samlove.errors import SamloveError

Order = Literal["little", "big"]

MAX_SAMPLES = 2**27  # over all channels; a header of a few bytes can state any length
MAX_SECONDS = 3600
MAX_RATE = 1_000_000  # Hz
MAX_BYTES = 2**30
UNKNOWN_FORMAT = 1  # libsndfile's code of this error

# Programs that write to a pipe state a length before they know it: 0, or something near the largest possible, such as
# 0x7ffff000 (sox), 0x7fffffff or 0x80000000 (arecord), 0xffffffff (ffmpeg). All of these are more than MAX_BYTES.
PLACEHOLDER = 0x7F000000
_IDS = (b"data", b"fmt ", b"fact", b"LIST", b"JUNK", b"bext")
_PLAIN = (1, 3, 0xFFFE)  # kinds of WAV files: integers, floats, extensible (usually one of these)
_HEADS: dict[bytes, Order] = {b"RIFF": "little", b"RF64": "little", b"BW64": "little", b"RIFX": "big"}
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_OTHERS = ("FLAC", "MP3", "OGG", "AIFF", "AU", "CAF", "W64")  # formats in which a truncated file is noticed
_KNOWN = ", ".join(("WAV", *_OTHERS))


@contextmanager
def open_audio(path: Path) -> Iterator[soundfile.SoundFile]:
    """A file that is complete, as far as its header tells, and whose `frames` may be allocated.

    Raises SamloveError if it is truncated, larger than MAX_SAMPLES, MAX_SECONDS, MAX_RATE or MAX_BYTES, or in a format
    in which a truncated file goes unnoticed.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SamloveError(f"expected at most {MAX_BYTES:,} bytes, found {size:,}")
    wav = _read_wav(path)
    try:
        opened = soundfile.SoundFile(path if wav is None else io.BytesIO(plain_wav(wav)))
    except soundfile.LibsndfileError as error:
        if error.code != UNKNOWN_FORMAT:
            raise
        found = "something else or a damaged file" if size else "an empty file"
        raise SamloveError(f"expected one of the formats {_KNOWN}, found {found}; convert it to WAV") from None
    with opened as file:
        frames, rate, channels = file.frames, file.samplerate, file.channels
        if frames == 2**63 - 1:
            raise SamloveError(f"expected a {file.format} file that states its length; convert the audio to WAV")
        if frames * channels > MAX_SAMPLES or frames > MAX_SECONDS * rate or rate > MAX_RATE:
            raise SamloveError(
                f"expected at most {MAX_SAMPLES:,} samples, {MAX_SECONDS:,} s and {MAX_RATE:,} Hz, "
                f"found {frames:,} samples in each of {channels} channels at {rate:,} Hz"
            )
        if wav is None:
            _check_complete(path, file)
        yield file


def _read_wav(path: Path) -> bytes | None:
    """The bytes of a WAV file, without an ID3 tag at its beginning; None if it is something else."""
    with path.open("rb") as file:
        start = _tag_length(file.read(10))
        file.seek(start)
        head = file.read(12)
        if head[:4] not in _HEADS or head[8:] != b"WAVE":
            return None
        return head + file.read()


def _check_complete(path: Path, file: soundfile.SoundFile) -> None:
    if file.format not in _OTHERS:
        raise SamloveError(f"expected one of the formats {_KNOWN}, found {file.format_info}; convert it to WAV")
    if file.frames == 0:
        raise SamloveError(f"expected samples, found none, or none that the header of this {file.format} file states")
    faults = [line.strip() for line in file.extra_info.splitlines() if "(should be" in line]  # libsndfile's log
    if faults:
        raise SamloveError(f"truncated audio, or a header with wrong lengths: {'; '.join(faults)}")
    if file.format == "OGG" and not _is_whole_ogg(path.read_bytes()):
        raise SamloveError(
            "truncated audio, or several streams in a row: expected Ogg pages with their checksums, and only the last "
            "one marked as the last, found others"
        )


def _is_whole_ogg(content: bytes) -> bool:
    """Whether all pages have their checksum, which libsndfile does not demand, and the last is marked as the last.

    libsndfile reads only the first of several streams in a row, so a page that begins a stream may not follow.
    """
    at, last = 0, False
    while content[at : at + 4] == b"OggS" or not last:
        sizes = content[at + 27 : at + 27 + int.from_bytes(content[at + 26 : at + 27])]
        end = at + 27 + len(sizes) + sum(sizes)
        page, stated = content[at:end], content[at + 22 : at + 26]
        if page[:4] != b"OggS" or end > len(content) or (last and page[5] & 2):
            return False
        if _ogg_checksum(page[:22] + bytes(4) + page[26:]) != stated:
            return False
        at, last = end, bool(page[5] & 4)
    return True


def _ogg_checksum(page: bytes) -> bytes:
    """The CRC-32 of Ogg: zlib's, with the bits of all bytes and of the result reversed, and no inversion."""
    reversed_ = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return reversed_.to_bytes(4, "big").translate(_REVERSED)


def _tag_length(head: bytes) -> int:
    """The length of an ID3 tag that a file with these first 10 bytes begins with; 0 if there is none."""
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    return 10 + size + (10 if head[5] & 0x10 else 0)  # a footer repeats the header


def plain_wav(content: bytes) -> bytes:
    """A WAV file with only the format and the samples of the WAV file `content`, and with the right lengths.

    The samples are the data chunk, or all bytes up to the end if its length is a placeholder: 0 before something that
    is not a chunk, or at least PLACEHOLDER and more than there is. Lengths of the file as a whole do not matter.
    Raises SamloveError if a chunk is truncated, or if there is no format or no data chunk.
    """
    order = _HEADS[content[:4]]
    form, long_size, at = b"", 0, 12
    while at + 8 <= len(content):
        name, size, body = content[at : at + 4], _int(content[at + 4 : at + 8], order), at + 8
        rest = len(content) - body
        if name == b"data":
            size = long_size if size == 0xFFFFFFFF and long_size else size
            if (size >= PLACEHOLDER and size > rest) or (size == 0 and not _only_chunks(content, body, order)):
                size = rest
        if size > rest:
            raise SamloveError(f"truncated audio: expected {body + size:,} bytes, found {len(content):,}")
        if name == b"data":
            _check_form(form, order)
            return _wav(content[:4], order, form, content[body : body + size])
        if name == b"fmt ":
            form = content[body : body + size]
        elif name == b"ds64":  # RF64: the length of the data, in 64 bits
            long_size = _int(content[body + 8 : body + 16], order)
        at = body + size
        if size % 2 and content[at : at + 4] not in _IDS:  # chunks begin at even offsets, but not all writers know
            at += 1
    raise SamloveError(f"truncated audio: no samples in a WAV file of {len(content):,} bytes")


def _check_form(form: bytes, order: Order) -> None:
    """Raise SamloveError without a format, or if there are bytes between the samples, which libsndfile would read."""
    if not form:
        raise SamloveError("expected a format chunk before the samples, found none")
    kind, channels, stated, bits = (_int(form[at : at + 2], order) for at in (0, 2, 12, 14))
    needed = channels * -(-bits // 8)
    if kind in _PLAIN and 0 < needed < stated:
        raise SamloveError(
            f"expected {needed} bytes for {channels} channels of {bits} bits, found {stated}; convert it to 16 bits"
        )


def _only_chunks(content: bytes, at: int, order: Order) -> bool:
    """Whether everything from `at` to the end is complete chunks; also True if there is nothing."""
    while at < len(content):
        name = content[at : at + 4]
        if len(name) < 4 or not all(32 <= byte < 127 for byte in name):
            return False
        size = _int(content[at + 4 : at + 8], order)
        at += 8 + size + size % 2
        if at > len(content) + size % 2:
            return False
    return True


def _wav(head: bytes, order: Order, form: bytes, samples: bytes) -> bytes:
    head = b"RIFX" if head == b"RIFX" else b"RIFF"
    chunks = b"".join(
        name + len(body).to_bytes(4, order) + body + bytes(len(body) % 2)
        for name, body in ((b"fmt ", form), (b"data", samples))
    )
    return head + (len(chunks) + 4).to_bytes(4, order) + b"WAVE" + chunks


def _int(field: bytes, order: Order) -> int:
    return int.from_bytes(field, order)


def _call_libsndfile_once() -> None:
    """Call the functions that reading audio uses, with a file that opens and one that does not.

    cffi 2.1 builds the type of a C function on its first call, and aborts the process if two threads do so at once.
    """
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 38, b"WAVE", b"fmt ", 16, 1, 1, 8000, 16000, 2, 16, b"data", 2)
    with soundfile.SoundFile(io.BytesIO(header + bytes(2))) as file:
        file.read(dtype="float32", always_2d=True)
    with suppress(soundfile.SoundFileError):
        soundfile.SoundFile(os.devnull)


_call_libsndfile_once()
