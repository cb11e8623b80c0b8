"""Frames, masks and audio that real programs write and a simple reader gets wrong: read right, or refused by name."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageOps

from samlove.data.audio import MAX_RATE, MAX_SAMPLES
from samlove.data.dataset import image_size, is_turned, load_audio, load_frame, load_labels, load_mask
from samlove.data.images import MAX_PIXELS, UnclearMask
from samlove.errors import SamloveError

BUGS = Path(__file__).parents[1] / ".." / "shared" / "bugs"
SHAPE = (20, 30)  # H, W
OBJECT = np.zeros(SHAPE, dtype=bool)  # no symmetry: no turn maps it onto itself
OBJECT[2:9, 4:25] = OBJECT[9:17, 4:8] = True
BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (128, 0, 0)
RATE = 8000
SOUND = (np.sin(np.arange(2000) * 0.1) * 12000).astype("<i2")  # 0.25 s


# --- images ----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with this header, these filtered rows, and these chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in every)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(colours: list[tuple[int, ...]], labels: np.ndarray = OBJECT, **options: object) -> bytes:
    image = Image.frombytes("P", labels.shape[::-1], labels.astype(np.uint8).tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return saved(image, **options)


def grey(values: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    return saved(Image.fromarray(values), kind, **options)


def painted(inside: tuple[int, ...], outside: tuple[int, ...], kind: str = "PNG", **options: object) -> bytes:
    """The object in one colour, the rest in another; LA, RGB or RGBA by the number of values."""
    pixels = np.where(OBJECT[..., None], np.uint8(inside), np.uint8(outside))
    return saved(Image.fromarray(pixels), kind, **options)


DAVIS = [BLACK, RED, (0, 128, 0), (128, 128, 0)]
RIGHT_MASKS = {
    "grey 255": grey(OBJECT * np.uint8(255)),
    "grey 1": grey(OBJECT * np.uint8(1)),
    "1 bit": grey(OBJECT),
    "16 bits, value 1": grey(OBJECT.astype(np.uint16)),
    "TIFF of 32-bit integers": grey(OBJECT.astype(np.int32), "TIFF"),
    "TIFF of floats": grey(OBJECT.astype(np.float32), "TIFF"),
    "big-endian 16-bit TIFF": grey(OBJECT.astype(">u2"), "TIFF"),
    "BMP": grey(OBJECT * np.uint8(255), "BMP"),
    "GIF": grey(OBJECT * np.uint8(255), "GIF"),
    "colour": painted(RED, BLACK),
    "a faint colour": painted((0, 0, 1), BLACK),
    "CMYK": saved(Image.fromarray(OBJECT * np.uint8(255)).convert("RGB").convert("CMYK"), "TIFF"),
    "palette": palette([BLACK, WHITE]),
    "palette of DAVIS": palette(DAVIS),
    "palette of DAVIS, third object": palette(DAVIS, OBJECT * 3),
    "palette of 256": palette([(i, i, i) for i in range(256)], OBJECT * 255),
    "palette with one entry": palette([BLACK]),
    "palette with one entry, which is white": palette([WHITE]),
    "palette without colours": palette([BLACK, BLACK]),
    "palette too short for the label": palette([BLACK, RED], OBJECT * 200),
    "palette with a white background": palette([WHITE, RED]),
    "palette with a grey background": palette([(90, 90, 90), WHITE]),
    "palette of the web, black is not its first": saved(Image.fromarray(OBJECT).convert("RGB").convert("P")),
    "palette, index 0 unused": palette([RED, BLACK, WHITE], OBJECT + np.uint8(1)),
    "palette, transparent background": palette([BLACK, RED], transparency=0),
    "palette, white and transparent background": palette([WHITE, RED], transparency=0),
    "palette, half-transparent object": palette([BLACK, RED], transparency=bytes([0, 128])),
    "opaque grey and alpha": painted((255, 255), (0, 255)),
    "opaque colour and alpha": painted((*RED, 255), (*BLACK, 255)),
    "half-transparent throughout": painted((*RED, 99), (*BLACK, 99)),
    "white throughout, mask in alpha": painted((*WHITE, 255), (*WHITE, 0)),
    "black throughout, mask in alpha": painted((*BLACK, 255), (*BLACK, 0)),
    "grey throughout, mask in alpha": painted((255, 255), (255, 0)),
    "transparent background": painted((*RED, 255), (*BLACK, 0)),
    "transparent white background": painted((*RED, 255), (*WHITE, 0)),
    "grey with a transparent value": grey(OBJECT * np.uint8(255), transparency=0),
    "1 bit with a transparent value": grey(OBJECT, transparency=0),
    "16 bits with a transparent value": grey(OBJECT.astype(np.uint16), transparency=0),
    "colour with a transparent colour": painted(RED, WHITE, transparency=WHITE),
}


@pytest.mark.parametrize("name", RIGHT_MASKS)
def test_masks_are_read_right(tmp_path: Path, name: str) -> None:
    path = tmp_path / "00000.png"
    path.write_bytes(RIGHT_MASKS[name])
    np.testing.assert_array_equal(load_mask(path), OBJECT)
    assert len(np.unique(load_labels(path)[OBJECT])) == 1


EMPTY = np.zeros(SHAPE, np.uint8)
EMPTY_MASKS = {
    "grey": grey(EMPTY),
    "palette": palette(DAVIS, EMPTY),
    "palette with one entry": palette([BLACK], EMPTY),
    "palette with a white background": palette([WHITE, RED], EMPTY),
    "palette of the web": saved(Image.fromarray(EMPTY).convert("RGB").convert("P")),
    "opaque": saved(Image.fromarray(EMPTY).convert("RGBA")),
    "white but transparent": saved(Image.new("RGBA", SHAPE[::-1], (*WHITE, 0))),
    "transparent": saved(Image.new("RGBA", SHAPE[::-1])),
}


@pytest.mark.parametrize("name", EMPTY_MASKS)
def test_empty_masks_are_read_as_empty(tmp_path: Path, name: str) -> None:
    path = tmp_path / "00000.png"
    path.write_bytes(EMPTY_MASKS[name])
    assert load_mask(path).shape == SHAPE and not load_mask(path).any()


HALF = np.arange(SHAPE[1])[None] < SHAPE[1] // 2 * np.ones((SHAPE[0], 1))
COLOUR_16 = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in OBJECT)
ALPHA_16 = b"".join(b"\0" + np.stack([row, row], -1).astype(">u2").tobytes() for row in OBJECT)
UNCLEAR_MASKS = {
    "JPEG": grey(OBJECT * np.uint8(255), "JPEG"),
    "JPEG of one value": grey(EMPTY, "JPEG"),
    "WebP": grey(OBJECT * np.uint8(255), "WEBP", lossless=True),
    "palette of white, then black": palette([WHITE, BLACK]),
    "colours reduced by Pillow": saved(Image.fromarray(OBJECT * np.uint8(255)).convert("RGB").quantize(2)),
    "palette of white, then black, all white": palette([WHITE, BLACK], EMPTY),
    "palette of one white entry, all white": palette([WHITE], EMPTY),
    "palette with a second black entry": palette([BLACK, BLACK, WHITE], OBJECT * np.uint8(2) + (HALF & ~OBJECT)),
    "palette, transparent object": palette([BLACK, RED], transparency=1),
    "grey, transparent object": grey(OBJECT * np.uint8(255), transparency=255),
    "alpha elsewhere": saved(Image.fromarray(np.dstack([OBJECT, HALF]).astype(np.uint8) * 255)),
    "a mask, but all transparent": painted((*WHITE, 0), (*BLACK, 0)),
    "16 bits per colour channel": png(SHAPE[1], SHAPE[0], 16, 2, COLOUR_16),
    "16 bits of grey and alpha": png(SHAPE[1], SHAPE[0], 16, 4, ALPHA_16),
    "negative values": grey(OBJECT.astype(np.int32) - 1, "TIFF"),
    "NaN": grey(np.where(OBJECT, 1, np.nan).astype(np.float32), "TIFF"),
}


@pytest.mark.parametrize("name", UNCLEAR_MASKS)
def test_masks_of_more_than_one_meaning_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "00000.png"
    path.write_bytes(UNCLEAR_MASKS[name])
    with pytest.raises(UnclearMask, match="^.*00000.png: .*(expected|save the mask)"):
        load_mask(path)


def test_masks_with_several_values_are_read_above_0(tmp_path: Path) -> None:
    values = OBJECT * (1 + HALF.astype(np.uint8))
    for name, content in {
        "labels": grey(values),
        "palette": palette(DAVIS, values),
        "colours": saved(Image.fromarray(np.uint8(DAVIS)[values])),
        "alpha": saved(Image.fromarray(np.dstack([values * 0 + 255, values * 100]).astype(np.uint8))),
    }.items():
        (tmp_path / name).write_bytes(content)
        labels = load_labels(tmp_path / name)
        np.testing.assert_array_equal(labels > 0, OBJECT, err_msg=name)
        assert len(np.unique(labels)) == 3, name


def orientations(image: Image.Image, kind: str, folder: Path) -> list[Path]:
    """The image with each EXIF orientation, none, and invalid ones."""
    paths = []
    for value in (None, *range(1, 9), 0, 9, 65535):
        exif = Image.Exif()
        if value is not None:
            exif[0x0112] = value
        paths.append(folder / f"{value}.{kind}")
        image.save(paths[-1], kind, exif=exif)
    return paths


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_frames_are_turned_upright(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    for path in orientations(Image.fromarray(noise), kind, tmp_path):
        frame = load_frame(path)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        np.testing.assert_array_equal(frame, expected, err_msg=path.name)
        assert image_size(path) == frame.shape[1::-1], path.name
        assert is_turned(path) == (path.stem in list("2345678")), path.name


def test_masks_are_turned_as_frames_are(tmp_path: Path) -> None:
    image = Image.fromarray(OBJECT * np.uint8(255))
    for path in orientations(image, "PNG", tmp_path):
        expected = np.asarray(ImageOps.exif_transpose(Image.open(path))) > 0
        np.testing.assert_array_equal(load_mask(path), expected, err_msg=path.name)


def test_damaged_exif_data_do_not_matter(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(SHAPE))
    whole = saved(image, "JPEG", exif=exif)
    at = whole.index(b"Exif\0\0")
    for damage in (b"\xff" * 8, b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"XX"):
        (tmp_path / "a.jpg").write_bytes(whole[: at + 6] + damage + whole[at + 6 + len(damage) :])
        assert load_frame(tmp_path / "a.jpg").shape == (*SHAPE, 3)
        assert image_size(tmp_path / "a.jpg") == SHAPE[::-1]


def test_frames_of_16_bits_are_scaled_to_8(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 109, dtype=np.uint16)[:600].reshape(SHAPE)
    expected = np.round(ramp / 257).astype(np.uint8)[..., None].repeat(3, -1)
    colour = b"".join(b"\0" + np.repeat(row.astype(">u2"), 3).tobytes() for row in ramp)
    for name, content, tolerance in (
        ("grey.jpg", grey(ramp), 0),
        ("big_endian.jpg", grey(ramp.astype(">u2"), "TIFF"), 0),
        ("jpeg2000.jpg", grey(ramp, "JPEG2000"), 0),
        ("colour.jpg", png(SHAPE[1], SHAPE[0], 16, 2, colour), 1),
    ):
        (tmp_path / name).write_bytes(content)
        difference = load_frame(tmp_path / name).astype(int) - expected
        assert np.abs(difference).max() <= tolerance, name
        assert image_size(tmp_path / name) == SHAPE[::-1]


def frames_of(kind: str) -> bytes:
    images = [Image.new("RGB", SHAPE[::-1], colour) for colour in (RED, WHITE)]
    return saved(images[0], kind, save_all=True, append_images=images[1:])


def wide_planes() -> bytes:
    """A TIFF of 16-bit RGB whose channels follow each other, as tifffile writes (3, H, W)."""
    whole = saved(Image.merge("RGB", [Image.fromarray(OBJECT * np.uint8(255))] * 3), "TIFF")
    directory = int.from_bytes(whole[4:8], "little")
    fields, count = bytearray(whole), int.from_bytes(whole[directory : directory + 2], "little")
    for at in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, place = struct.unpack("<H6xI", fields[at : at + 12])
        if tag == 258:  # bits of each channel
            fields[place : place + 6] = struct.pack("<3H", 16, 16, 16)
        elif tag == 284:  # order of the channels
            fields[at + 8 : at + 10] = struct.pack("<H", 2)
    return bytes(fields)


def ended_by_zeros(kind: str, share: float, **options: object) -> bytes:
    """An image of which a crash has kept the length and only the first part."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12), dtype=np.uint8)
    whole = saved(Image.fromarray(noise).resize((240, 160)), kind, **options)
    return whole[: round(len(whole) * share)].ljust(len(whole), b"\0")


REFUSED_FRAMES = {
    "32-bit integers": grey(np.arange(600, dtype=np.int32).reshape(SHAPE), "TIFF"),
    "floats": grey(np.random.default_rng(0).random(SHAPE, dtype=np.float32), "TIFF"),
    "animated PNG": frames_of("PNG"),
    "animated GIF": frames_of("GIF"),
    "animated WebP": frames_of("WEBP"),
    "TIFF of two pages": frames_of("TIFF"),
    "16-bit channels one after another": wide_planes(),
    "JPEG that ends in zeros": ended_by_zeros("JPEG", 0.5, optimize=True, quality=10),
    "progressive JPEG that ends in zeros": ended_by_zeros("JPEG", 0.9, progressive=True),
    "PNG that ends in zeros": ended_by_zeros("PNG", 0.9),
    "more pixels than allowed": png(2**13 + 1, 2**13, 8, 0, b""),
    "more pixels than Pillow decodes": png(100_000, 100_000, 8, 0, b""),
    "text that grows when decompressed": png(1, 1, 8, 0, b"\0\0", (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))),
}


@pytest.mark.parametrize("name", REFUSED_FRAMES)
@pytest.mark.parametrize("read", [load_frame, image_size])
def test_frames_that_cannot_be_told_are_refused(tmp_path: Path, read: Callable[[Path], object], name: str) -> None:
    path = tmp_path / "0.jpg"
    path.write_bytes(REFUSED_FRAMES[name])
    tracemalloc.start()
    with pytest.raises(SamloveError, match="0.jpg: (expected|truncated image|image cannot be decoded)"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 20\n%%EndComments\nshowpage\n%%EOF\n"
OTHER_FORMATS = {
    "EPS, a program that Pillow would run": EPS,
    "PCX, in which truncation goes unnoticed": saved(Image.fromarray(OBJECT).convert("L"), "PCX"),
    "PPM, of which Pillow reads 8 bits": b"P6 30 20 65535\n" + OBJECT.repeat(3).astype(">u2").tobytes(),
    "an empty file": b"",
    "a text": b"404 not found",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("read", [load_frame, image_size, is_turned, load_mask])
def test_images_in_other_formats_are_refused(tmp_path: Path, read: Callable[[Path], object], name: str) -> None:
    path = tmp_path / "0.jpg"
    path.write_bytes(OTHER_FORMATS[name])
    found = "an empty file" if name == "an empty file" else "something else or a damaged file"
    with pytest.raises(SamloveError, match=f"0.jpg: expected an image in one of the formats PNG, .*, found {found}$"):
        read(path)


def test_the_limit_of_pixels_is_stated_and_masks_have_it_too(tmp_path: Path) -> None:
    (tmp_path / "00000.png").write_bytes(REFUSED_FRAMES["more pixels than allowed"])
    with pytest.raises(SamloveError, match=rf"expected at most {MAX_PIXELS:,} pixels, found 8193x8192"):
        load_mask(tmp_path / "00000.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_ordinary_frames_are_what_pillow_decodes(tmp_path: Path, mode: str, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8))
    try:
        noise.convert(mode).save(tmp_path / "0.jpg", kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    expected = np.asarray(Image.open(tmp_path / "0.jpg").convert("RGB"))
    np.testing.assert_array_equal(load_frame(tmp_path / "0.jpg"), expected)


def test_a_jpeg_with_filler_before_its_markers_and_data_after_its_end_is_read(tmp_path: Path) -> None:
    whole = saved(Image.fromarray(OBJECT * np.uint8(255)).resize((240, 160)), "JPEG")
    (tmp_path / "0.jpg").write_bytes(whole)
    expected = load_frame(tmp_path / "0.jpg")
    filled = whole.replace(b"\xff\xdb", 5 * b"\xff" + b"\xdb")
    (tmp_path / "0.jpg").write_bytes(filled + b"trailer")
    np.testing.assert_array_equal(load_frame(tmp_path / "0.jpg"), expected)


# --- audio -----------------------------------------------------------------------------------------------------------


def wav(
    data_size: int | None = None,
    riff_size: int | None = None,
    head: bytes = b"RIFF",
    before: bytes = b"",
    after: bytes = b"",
    samples: bytes = SOUND.tobytes(),
    form: bytes = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16),
) -> bytes:
    """A WAV file of SOUND whose header states these lengths; by default, the right ones."""
    order = ">I" if head == b"RIFX" else "<I"
    size = len(samples) if data_size is None else data_size
    chunks = b"WAVE" + before + b"fmt " + struct.pack(order, len(form)) + form
    chunks += b"data" + struct.pack(order, size) + samples + after
    return head + struct.pack(order, len(chunks) if riff_size is None else riff_size) + chunks


def chunk(name: bytes, body: bytes, pad: bool = True) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2 if pad else 0)


def rf64(data_size: int, riff_size: int = 2**64 - 1) -> bytes:
    """An RF64 file, whose lengths are in its ds64 chunk."""
    sizes = struct.pack("<QQQI", riff_size, data_size, len(SOUND), 0)
    return wav(0xFFFFFFFF, 0xFFFFFFFF, b"RF64", chunk(b"ds64", sizes))


def id3(length: int, footer: bool = False) -> bytes:
    size = bytes(length >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0" + bytes([0x10 if footer else 0]) + size + bytes(length) + (b"3DI\x04\0\x10" + size) * footer


EXTENSIBLE = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4) + bytes.fromhex(
    "0100000000001000800000aa00389b71"
)
INFO = chunk(b"LIST", b"INFOISFT\x0e\0\0\0Lavf58.29.100\0")
NEARLY_LARGEST = (0x7F000000, 0x7FFFF000, 0x7FFFFF00, 0x7FFFFFFF, 0x80000000, 0x80000024, 0xFFFFF000, 0xFFFFFFDB)
RIGHT_WAVS = {
    "right lengths": wav(),
    "length 0": wav(0, 0),
    "length 0, but the file's length is right": wav(0),
    "length 0, after other chunks": wav(0, 0, before=INFO),
    "length 0, silence first": wav(0, 0, samples=bytes(2000) + SOUND.tobytes()),
    **{f"length {size:#x}": wav(size, min(size + 36, 0xFFFFFFFF)) for size in (*NEARLY_LARGEST, 0xFFFFFFFF)},
    "length 0xffffffff, after other chunks": wav(0xFFFFFFFF, 0xFFFFFFFF, before=INFO),
    "length of the file 0": wav(riff_size=0),
    "length of the file too small": wav(riff_size=100),
    "length of the file too large": wav(riff_size=10**6),
    "chunks before and after": wav(before=INFO + chunk(b"JUNK", bytes(28)), after=INFO + chunk(b"id3 ", b"ID3" * 5)),
    "a fact chunk": wav(before=chunk(b"fact", struct.pack("<I", 7))),
    "a chunk of odd length": wav(before=chunk(b"LIST", b"INFO1")),
    "a chunk of odd length without its pad byte": wav(before=chunk(b"LIST", b"INFO1", pad=False)),
    "junk after the samples": wav(after=b"TAG" + bytes(range(125))),
    "an odd number of bytes": wav(samples=SOUND.tobytes() + b"\1"),
    "extensible": wav(form=EXTENSIBLE),
    "extensible, length 0": wav(0, 0, form=EXTENSIBLE),
    "a long format chunk": wav(form=struct.pack("<HHIIHHH", 1, 1, RATE, 2 * RATE, 2, 16, 0)),
    "RF64": rf64(len(SOUND) * 2),
    "RF64, lengths 0": rf64(0, 0),
    "RF64, lengths -1": rf64(2**64 - 1),
    "RF64, lengths 2^63 - 1": rf64(2**63 - 1),
    "big-endian": wav(
        head=b"RIFX", samples=SOUND.astype(">i2").tobytes(), form=struct.pack(">HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    ),
    "an ID3 tag first": id3(300) + wav(),
    "an ID3 tag first, length 0": id3(300) + wav(0, 0),
    "an ID3 tag with a footer first": id3(300, footer=True) + wav(0xFFFFFFFF),
}


@pytest.mark.parametrize("name", RIGHT_WAVS)
def test_wavs_are_read_whatever_length_their_header_states(tmp_path: Path, name: str) -> None:
    (tmp_path / "audio.wav").write_bytes(RIGHT_WAVS[name])
    samples, rate = load_audio(tmp_path / "audio.wav")
    silence = 1000 if "silence" in name else 0
    np.testing.assert_array_equal(samples, np.concatenate([np.zeros(silence), SOUND / 32768]).astype(np.float32))
    assert rate == RATE


@pytest.mark.parametrize("after", [b"", INFO, INFO + chunk(b"id3 ", bytes(9)), chunk(b"LIST", b"INFO1", pad=False)])
def test_a_wav_without_samples_is_empty_whatever_chunks_follow(tmp_path: Path, after: bytes) -> None:
    (tmp_path / "audio.wav").write_bytes(wav(0, samples=b"", after=after))
    assert len(load_audio(tmp_path / "audio.wav")[0]) == 0


FLOATS = struct.pack("<HHIIHH", 3, 1, RATE, 4 * RATE, 4, 32)
REFUSED_WAVS = {
    "half of the samples": wav(samples=SOUND[:1000].tobytes(), data_size=4000),
    "all but one byte": wav()[:-1],
    "a length just too large": wav(len(SOUND) * 2 + 44),
    "a length far too large": wav(0x7EFFFFFF),
    "RF64, half of the samples": rf64(len(SOUND) * 2)[:-2000],
    "big-endian, half of the samples": wav(head=b"RIFX", form=struct.pack(">HHIIHH", 1, 1, RATE, 16000, 2, 16))[:-2000],
    "an ID3 tag first, half of the samples": id3(300) + wav()[:-2000],
    "an ID3 tag and no more": id3(300),
    "a truncated chunk before the samples": wav(before=INFO)[:40],
    "no format": wav(form=b"")[:12] + b"data" + struct.pack("<I", 4000) + SOUND.tobytes(),
    "no samples": wav()[:36],
    "an unknown codec": wav(form=struct.pack("<HHIIHH", 0x0161, 1, RATE, 2 * RATE, 2, 16)),
    "rate 0": wav(form=struct.pack("<HHIIHH", 1, 1, 0, 0, 2, 16)),
    "rate 2^31 - 1": wav(form=struct.pack("<HHIIHH", 1, 1, 2**31 - 1, 2**31 - 1, 2, 16)),
    "more than an hour": wav(form=struct.pack("<HHIIHH", 1, 1, 1, 2, 2, 16), samples=bytes(7202)),
    "24 bits in 4 bytes": wav(form=struct.pack("<HHIIHH", 1, 1, RATE, 4 * RATE, 4, 24), samples=bytes(4000)),
    "16-bit integers as floats": wav(form=FLOATS, samples=SOUND.astype("<f4").tobytes()),
    "floats of which the mean is infinite": wav(form=FLOATS, samples=np.full(99, 3e38, "<f4").tobytes()),
    "NaN": wav(form=FLOATS, samples=np.full(99, np.nan, "<f4").tobytes()),
    "something else": b"\0\0\0\x20ftypisom" + bytes(99),
    "an empty file": b"",
    "no channels": wav(form=struct.pack("<HHIIHH", 1, 0, RATE, 2 * RATE, 2, 16)),
    "65535 channels": wav(form=struct.pack("<HHIIHH", 1, 65535, RATE, 2 * RATE, 2, 16)),
}


@pytest.mark.parametrize("name", REFUSED_WAVS)
def test_truncated_and_impossible_wavs_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "audio.wav").write_bytes(REFUSED_WAVS[name])
    with pytest.raises(SamloveError, match="audio.wav: (truncated audio|expected|audio cannot be decoded)") as refused:
        load_audio(tmp_path / "audio.wav")
    assert "BytesIO" not in str(refused.value)


def test_floats_may_exceed_1_a_little(tmp_path: Path) -> None:
    samples = (SOUND / 9000).astype("<f4")
    (tmp_path / "audio.wav").write_bytes(wav(form=FLOATS, samples=samples.tobytes()))
    np.testing.assert_array_equal(load_audio(tmp_path / "audio.wav")[0], samples)


def test_several_ogg_streams_in_a_row_are_refused(tmp_path: Path) -> None:
    (tmp_path / "audio.wav").write_bytes(encoded("OGG", "VORBIS") * 2)  # libsndfile reads the first
    with pytest.raises(SamloveError, match="audio.wav: truncated audio, or several streams in a row"):
        load_audio(tmp_path / "audio.wav")


def encoded(kind: str, subtype: str, channels: int = 1, seconds: int = 1) -> bytes:
    """One second or more of a sound that no codec can store in a few bytes."""
    buffer = io.BytesIO()
    time = np.arange(seconds * RATE)
    noise = np.random.default_rng(0).normal(size=(len(time), channels)) * 0.01
    soundfile.write(buffer, np.sin(time * 0.1)[:, None] * 0.3 + noise, RATE, format=kind, subtype=subtype)
    return buffer.getvalue()


WAVS = [("WAV", subtype) for subtype in soundfile.available_subtypes("WAV") if subtype != "MPEG_LAYER_III"]
FORMATS = [
    *WAVS, ("WAVEX", "PCM_16"), ("WAVEX", "PCM_24"), ("WAVEX", "FLOAT"), ("RF64", "PCM_16"), ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16"),
    ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("W64", "PCM_16"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_ordinary_audio_is_what_libsndfile_decodes(tmp_path: Path, kind: str, subtype: str) -> None:
    for channels in (1, 2):
        if channels == 2 and subtype.startswith(("GSM", "G721", "NMS")):
            continue  # these have one channel only
        (tmp_path / "audio.wav").write_bytes(encoded(kind, subtype, channels))
        with soundfile.SoundFile(tmp_path / "audio.wav") as file:
            expected = file.read(file.frames, dtype="float32", always_2d=True).mean(axis=1, dtype=np.float32)
        np.testing.assert_array_equal(load_audio(tmp_path / "audio.wav")[0], expected)
        assert len(expected) >= RATE


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
def test_truncated_audio_is_refused_in_every_format(tmp_path: Path, kind: str, subtype: str) -> None:
    whole = encoded(kind, subtype, seconds=3)
    for length in (len(whole) * 19 // 20, len(whole) // 2, len(whole) // 10, 100, 20, 1, 0):
        (tmp_path / "audio.wav").write_bytes(whole[:length])
        with pytest.raises(SamloveError, match="audio.wav: "):
            load_audio(tmp_path / "audio.wav")


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_damaged_audio_is_refused(tmp_path: Path, kind: str) -> None:
    whole = bytearray(encoded(kind, soundfile.default_subtype(kind), seconds=3))
    middle = len(whole) // 2
    whole[middle : middle + 300] = bytes(300)
    (tmp_path / "audio.wav").write_bytes(whole)
    with pytest.raises(SamloveError, match="audio.wav: "):
        load_audio(tmp_path / "audio.wav")


def flac_of(total: int) -> bytes:
    """A FLAC file whose header states this number of samples, 36 bits; 0: unknown."""
    whole = bytearray(encoded("FLAC", "PCM_16"))
    at = whole.index(b"fLaC") + 8 + 13  # the last 4 bits of this byte are the first of the number
    whole[at] = whole[at] & 0xF0 | total >> 32
    whole[at + 1 : at + 5] = (total & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(whole)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (0, "expected a FLAC file that states its length"),
        (2**36 - 1, rf"expected at most {MAX_SAMPLES:,} samples, .*found 68,719,476,735 samples"),
        (MAX_SAMPLES + 1, "expected at most"),
        (RATE + 1, "audio cannot be decoded, possibly truncated"),
    ],
)
def test_lengths_that_no_file_has_are_refused_before_memory_is_allocated(
    tmp_path: Path, total: int, message: str
) -> None:
    (tmp_path / "audio.wav").write_bytes(flac_of(total))
    tracemalloc.start()
    with pytest.raises(SamloveError, match=f"audio.wav: {message}"):
        load_audio(tmp_path / "audio.wav")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["NIST", "VOC", "AVR", "PAF"])
def test_formats_in_which_truncation_goes_unnoticed_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "audio.wav").write_bytes(encoded(kind, "PCM_16"))
    with pytest.raises(SamloveError, match="audio.wav: expected one of the formats WAV, FLAC, .*; convert it to WAV"):
        load_audio(tmp_path / "audio.wav")


def test_a_length_of_0_is_refused_in_other_formats(tmp_path: Path) -> None:
    whole = bytearray(encoded("AU", "PCM_16"))
    whole[8:12] = bytes(4)
    (tmp_path / "audio.wav").write_bytes(whole)
    with pytest.raises(SamloveError, match="audio.wav: expected samples, found none"):
        load_audio(tmp_path / "audio.wav")


def test_the_largest_rate_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "audio.wav", SOUND, MAX_RATE)
    assert load_audio(tmp_path / "audio.wav")[1] == MAX_RATE


# --- the files that were reported ------------------------------------------------------------------------------------


@pytest.mark.skipif(not BUGS.is_dir(), reason="no example files here")
def test_the_reported_files() -> None:
    for name in ("mask_palette_of_one_entry", "mask_in_alpha", "mask_white_background"):
        mask = load_mask(BUGS / f"{name}.png")
        assert mask.shape == (60, 80) and mask.sum() == 600, name
    sounds = [load_audio(BUGS / name)[0] for name in ("wav_data_size_0.wav", "wav_pipe_0x7fffffff.wav")]
    assert len(sounds[0]) == 16000 and np.array_equal(*sounds)
    assert load_frame(BUGS / "frame_exif_rotated.jpg").shape == (80, 60, 3)
    with pytest.raises(SamloveError, match="flac_unknown_length.wav: expected a FLAC file that states its length"):
        load_audio(BUGS / "flac_unknown_length.wav")
