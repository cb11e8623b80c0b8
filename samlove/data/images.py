"""Opens image files, and turns them into the pixels of a frame or the labels of a mask.

The content of a file decides its format, not its name. The functions raise SamloveError, without the path, for an image
that they refuse, and whatever Pillow raises for one that it cannot decode; samlove.data.dataset turns both into one
line with the path.
"""

import re
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, TiffImageFile

from samlove.errors import SamloveError

# MAX_PIXELS is less than what Pillow warns of. Its other warnings are about metadata, and do not name the file.
warnings.filterwarnings("ignore", module=r"PIL\.")

MAX_PIXELS = 2**26  # per image; a header of a few bytes can state any size
# Pillow's names. In some of its other formats, a truncated file goes unnoticed; one of them, EPS, is a program.
LOSSLESS = ("PNG", "BMP", "GIF", "TIFF")
LOSSY = ("JPEG", "JPEG2000", "WEBP", "AVIF")  # need not keep exact values
UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnclearMask(SamloveError):
    """The image can be read as different masks."""


def open_checked(path: Path) -> Image.Image:
    """The image at `path`, not yet decoded; of a PNG, all checksums hold, which decoding would ignore.

    Raises SamloveError for other formats than LOSSLESS and LOSSY, for an image of more than MAX_PIXELS, and for an
    animation or a file of several pages.
    """
    with identified(path) as image:
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            raise SamloveError(f"expected at most {MAX_PIXELS:,} pixels, found {size}")
        if image.format in ("JPEG", "MPO") and not _is_ended(path.read_bytes()):
            raise SamloveError("truncated image: expected a JPEG with its end marker, found none")
        if _has_wide_planes(image):
            raise SamloveError("expected interleaved channels, found 16 bits in one channel after another; use PNG")
        image.verify()
    image = identified(path)
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # the first image of an MPO is the photo, the others are previews
        image.close()
        raise SamloveError(f"expected one image, found {count} in the file")
    return image


def identified(path: Path) -> Image.Image:
    """The image at `path`, unchecked. Raises SamloveError if it has none of the formats LOSSLESS and LOSSY."""
    try:
        return Image.open(path, formats=[*LOSSLESS, *LOSSY])
    except UnidentifiedImageError:
        found = "something else or a damaged file" if path.stat().st_size else "an empty file"
        known = ", ".join((*LOSSLESS, *LOSSY))
        raise SamloveError(f"expected an image in one of the formats {known}, found {found}") from None


def _is_ended(jpeg: bytes) -> bool:
    """Whether a JPEG has an end marker after its header. Pillow also reads one that ends in zeros, as after a crash."""
    at = 2
    while jpeg[at : at + 1] == b"\xff" and jpeg[at + 1 : at + 2] != b"\xda":  # segments, up to the first scan
        filler = jpeg[at + 1 : at + 2] == b"\xff"  # any number of these bytes may precede a marker
        at += 1 if filler else 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return jpeg.find(b"\xff\xd9", at) >= 0


def _has_wide_planes(image: Image.Image) -> bool:
    """Whether the channels of a TIFF have more than 8 bits and follow each other, which Pillow reads wrong."""
    if not isinstance(image, TiffImageFile) or image.tag_v2.get(PLANAR_CONFIGURATION) != 2:
        return False
    bits = image.tag_v2.get(BITSPERSAMPLE, ())
    return len(bits) > 1 and max(bits) > 8


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 if there is none, or if the EXIF data are damaged."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # anything: Pillow parses EXIF data with few checks, and no pixel depends on them
        return 1
    return found if found in UPRIGHT else 1


def turned_upright(image: Image.Image) -> Image.Image:
    """The decoded image, turned or mirrored according to its EXIF orientation."""
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, without any alpha; grey values of 16 bits are scaled to 8.

    Raises SamloveError for 32-bit integers and floats, whose range of values no header states.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise SamloveError(f"expected 8 or 16 bits per channel, found an image of Pillow's mode {image.mode!r}")
    return image.convert("RGB")


def to_labels(image: Image.Image) -> np.ndarray:
    """A mask's labels (H, W), int or float: 0 is background, and pixels of one value or colour have one label.

    Usually the labels are the pixel values. If an image can say which pixels belong to the object in two ways, by
    colour and by palette index, or by colour and by alpha, one way decides if the other says nothing: if it marks all
    pixels, or the colour marks none. Raises UnclearMask if the two contradict each other, if the format is lossy, or
    if values are negative or NaN.
    """
    if image.format not in LOSSLESS:
        raise UnclearMask(f"expected a lossless format such as PNG, found {image.format}; export the mask again")
    if image.mode[0] not in "IF" and re.search(";16[BLN]", str(getattr(image, "tile", ""))):
        raise UnclearMask("expected 8 bits per channel, found 16, of which Pillow reads 8; save the mask as 8-bit grey")
    image.load()
    image = turned_upright(image)
    labels = _colours(image)
    if image.mode in ("P", "PA"):
        labels = _palette_labels(image, labels)
    if image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        labels = _decide(labels, alpha, "alpha")
    if not (labels >= 0).all():
        raise UnclearMask("expected values >= 0, found negative ones or NaN; save the mask with the values 0 and 255")
    return labels


def _colours(image: Image.Image) -> np.ndarray:
    """(H, W): the values of a grey image, otherwise R * 65536 + G * 256 + B. Alpha does not count."""
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "LA":
        return np.asarray(image.getchannel("L"))
    image = image.convert("RGBA" if image.mode in ("P", "PA") else "RGB")  # Pillow warns if it drops a palette's alpha
    red, green, blue = np.moveaxis(np.asarray(image)[..., :3].astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def _palette_labels(image: Image.Image, colours: np.ndarray) -> np.ndarray:
    index = np.asarray(image.getchannel(0))
    palette = np.asarray(image.getpalette("RGB") or [], dtype=np.uint8).reshape(-1, 3)
    if index.max() >= len(palette):  # these pixels have no colour; Pillow makes them black
        return index
    if not index.any() and colours.any() and (len(palette) == 1 or not palette.any(axis=1).all()):
        raise UnclearMask(
            "all pixels have palette index 0, which is background, but not black; save the mask as grey, 0 and 255"
        )
    return _decide(colours, index, "palette index")


def _decide(colours: np.ndarray, other: np.ndarray, name: str) -> np.ndarray:
    by_colour, by_other = colours > 0, other > 0
    if by_other.all() or (by_colour == by_other).all():
        return colours
    if by_colour.all() or not by_colour.any():
        return other
    raise UnclearMask(
        f"colour > 0 marks {by_colour.mean():.0%} of the pixels as object, {name} > 0 marks {by_other.mean():.0%}, "
        "not the same ones; save the mask as grey, 0 and 255"
    )
