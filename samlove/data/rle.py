"""Masks as COCO's run-length encoding (RLE), as pycocotools reads and writes it.

Runs of 0 and 1 alternate, column by column, beginning with 0. Their lengths are the counts: a list, or compressed to a
text, in which each count, from the fourth on less the one two before it, is written in groups of 5 bits, lowest first,
as characters from "0" on; 32 marks that another group follows.
"""

from typing import Any, TypedDict

import numpy as np

from samlove.data.images import MAX_PIXELS
from samlove.errors import SamloveError

BITS, MORE, SIGN, FIRST = 5, 0x20, 0x10, 48  # bits of a group, its flag, the sign in the last one, the character "0"
LONGEST = 12  # groups of a count; more are no count of pixels


class Rle(TypedDict):
    size: list[int]  # [height, width]
    counts: str


def encode_rle(mask: np.ndarray) -> Rle:
    """The RLE of a mask, bool (H, W), with compressed counts."""
    pixels = np.asarray(mask, bool).T.ravel()
    ends = np.flatnonzero(np.diff(pixels)) + 1
    starts = np.concatenate([[0] if pixels[:1].any() else [], [0], ends, [len(pixels)]]).astype(np.int64)
    counts = np.diff(starts)
    counts[3:] -= np.diff(starts)[1:-2]
    return {"size": list(mask.shape), "counts": "".join(map(_characters, counts.tolist()))}


def decode_rle(rle: Any) -> np.ndarray:
    """The mask, bool (H, W), of {"size": [H, W], "counts": text or list}, from any JSON.

    Raises SamloveError if it is something else, if the counts do not fit the size, or for more than MAX_PIXELS.
    """
    try:
        height, width = map(int, rle["size"])
        counts = _counts(rle["counts"]) if isinstance(rle["counts"], str) else [int(n) for n in rle["counts"]]
    except (ValueError, TypeError, KeyError, OverflowError):
        found = ", ".join(map(str, rle)) if isinstance(rle, dict) else type(rle).__name__
        raise SamloveError(
            f'not a mask in COCO\'s RLE: expected {{"size": [height, width], "counts": text or list}}, found {found}'
        ) from None
    if not (0 < height and 0 < width and height * width <= MAX_PIXELS):
        raise SamloveError(f"RLE: expected 1 to {MAX_PIXELS:,} pixels, found the size {height} x {width}")
    if sum(counts) != height * width or min(counts) < 0:
        raise SamloveError(f"RLE: expected counts of {height * width:,} pixels ({height} x {width}), found others")
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return pixels.reshape(width, height).T


def _counts(text: str) -> list[int]:
    """The counts of a text. Raises ValueError if it ends within one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - FIRST
        value |= (group & (MORE - 1)) << shift
        shift += BITS
        if not group & MORE:
            if group & SIGN:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
        elif shift > LONGEST * BITS:
            break
    if shift:
        raise ValueError("incomplete")
    return counts


def _characters(count: int) -> str:
    text = ""
    while True:
        group, count = count & (MORE - 1), count >> BITS
        last = count == (-1 if group & SIGN else 0)
        text += chr(group + (0 if last else MORE) + FIRST)
        if last:
            return text
