"""Masks as COCO's run-length encoding (RLE), in its compressed form, as pycocotools reads and writes it.

Runs of 0 and 1 alternate, column by column, beginning with 0. Each count, from the fourth on less the one two before
it, is written in groups of 5 bits, lowest first, as characters from "0" on; 32 marks that another group follows.
"""

from typing import TypedDict

import numpy as np

from samlove.errors import SamloveError

BITS, MORE, SIGN, FIRST = 5, 0x20, 0x10, 48  # bits of a group, its flag, the sign in the last one, the character "0"


class Rle(TypedDict):
    size: list[int]  # [height, width]
    counts: str


def encode_rle(mask: np.ndarray) -> Rle:
    """The RLE of a mask, bool (H, W)."""
    pixels = np.asarray(mask, bool).T.ravel()
    ends = np.flatnonzero(np.diff(pixels)) + 1
    starts = np.concatenate([[0] if pixels[:1].any() else [], [0], ends, [len(pixels)]]).astype(np.int64)
    counts = np.diff(starts)
    counts[3:] -= np.diff(starts)[1:-2]
    return {"size": list(mask.shape), "counts": "".join(map(_characters, counts.tolist()))}


def decode_rle(rle: Rle) -> np.ndarray:
    """The mask of an RLE, bool (H, W). Raises SamloveError if the counts do not fit its size."""
    height, width = rle["size"]
    counts: list[int] = []
    value = shift = 0
    for character in rle["counts"]:
        group = ord(character) - FIRST
        value |= (group & (MORE - 1)) << shift
        shift += BITS
        if not group & MORE:
            if group & SIGN:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift or sum(counts) != height * width or min(counts, default=0) < 0:
        raise SamloveError(f"RLE: expected counts of {height * width} pixels, found others")
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return pixels.reshape(width, height).T


def _characters(count: int) -> str:
    text = ""
    while True:
        group, count = count & (MORE - 1), count >> BITS
        last = count == (-1 if group & SIGN else 0)
        text += chr(group + (0 if last else MORE) + FIRST)
        if last:
            return text
