"""How much the active profile's pipeline produces: items and bytes, computed from the configuration, not measured."""

import shutil
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pandas as pd

from samlove.config import (
    CONTROLLED_SPLITS,
    SPLITS,
    AudioConfig,
    DatasetConfig,
    FusionConfig,
    InferConfig,
    PackConfig,
    Sam2Config,
    TextConfig,
    TrainConfig,
    VisualConfig,
    load,
    read_sam2_config,
)
from samlove.data.dataset import RefAvsFolder
from samlove.data.frames import trained_frames
from samlove.data.layout import Layout
from samlove.features.encoders.timm_image import token_shape
from samlove.features.encoders.transformers_folder import read_config
from samlove.features.encoders.vggish import WIDTH as VGGISH_WIDTH

MADE = ("features", "shards", "predictions")  # the large folders below data/<profile>/
WIDTH = 768  # of an encoder of transformers whose folder is not there yet: DistilRoBERTa's; few have wider vectors
CLIP = SimpleNamespace(image_size=224, patch_size=16, hidden_size=WIDTH)  # until its folder is there: ViT-B/16
BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}  # per value in a feature store
PACKED_BYTES = {"int8": 2, "float16": 2, "bfloat16": 4, "float32": 4}  # per value in training shards; samlove.data.pack


class Settings(NamedTuple):
    """The sections of a profile that determine its sizes."""

    dataset: DatasetConfig
    audio: AudioConfig
    visual: VisualConfig
    text: TextConfig
    sam2: Sam2Config
    fusion: FusionConfig
    train: TrainConfig
    infer: InferConfig
    pack: PackConfig


def read_settings(configs: Path = Path("configs")) -> Settings:
    """The active profile's settings. Raises RequestError if one of its files is invalid."""
    return Settings(
        load(DatasetConfig, configs),
        load(AudioConfig, configs),
        load(VisualConfig, configs),
        load(TextConfig, configs),
        load(Sam2Config, configs),
        load(FusionConfig, configs),
        load(TrainConfig, configs),
        load(InferConfig, configs),
        load(PackConfig, configs),
    )


# --- how many --------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """The content of a split. An expression's text counts in the first split that has it."""

    folders: int  # videos, as folders of media/
    texts: int
    rows: int


Counts = dict[str, Count]  # by split
REF_AVS: Counts = {  # of Ref-AVS Bench's metadata.csv
    "train": Count(2919, 3395, 14113),
    "val": Count(275, 243, 1349),
    "test_s": Count(273, 911, 2288),
    "test_u": Count(269, 666, 1656),
    "test_n": Count(257, 0, 1028),
}


def count(settings: Settings, paths: Layout) -> tuple[Counts, str]:
    """The content of the dataset, and its source: the index, else metadata.csv, else what the dataset will be."""
    index, folder = paths.expressions, Path(settings.dataset.root)
    if index.is_file():
        return count_rows(pd.read_parquet(index)), str(index)
    if (folder / "metadata.csv").is_file():
        from samlove.data.audit import parse_rows

        return count_rows(parse_rows(RefAvsFolder(folder).metadata())), str(folder / "metadata.csv")
    if settings.dataset.synth is None:
        return REF_AVS, "Ref-AVS as published, because there is no dataset here yet"
    from samlove.synth.write import SCALES, plan

    clips = plan(settings.dataset.synth.seed, SCALES[settings.dataset.synth.scale])
    rows = [(clip.split, clip.media_id, row.text) for clip in clips for row in clip.rows]
    return count_rows(pd.DataFrame(rows, columns=["split", "media_id", "exp"])), "what the dataset stage will write"


def count_rows(rows: pd.DataFrame) -> Counts:
    """rows: columns split, media_id, exp. Splits outside SPLITS are ignored."""
    counts: Counts = {}
    seen: set[str] = set()
    for split in SPLITS:
        own = rows[rows["split"] == split]
        texts = set(own["exp"]) - seen
        seen |= texts
        counts[split] = Count(own["media_id"].nunique(), len(texts), len(own))
    return counts


# --- how large -------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """The content of one folder below data/<profile>/, by split.

    shards: expressions, and an upper bound in bytes. predictions: uncompressed.
    """

    path: str
    items: dict[str, int]
    bytes: dict[str, int]


def planned(settings: Settings, counts: Counts) -> list[Planned]:
    """All large outputs of the pipeline."""
    item, frames = item_bytes(settings), settings.dataset.frames
    trained = len(trained_frames(frames, settings.sam2.train_frames))
    mask = settings.dataset.mask_size**2
    folders = {split: n.folders for split, n in counts.items()}
    stores = {
        "audio": (folders, item["audio"]),
        "visual": (folders, item["visual"]),
        "text": ({split: n.texts for split, n in counts.items()}, item["text"]),
        "sam2_train": ({"train": folders["train"]}, item["sam2"] * trained),
        "sam2_eval": ({split: n for split, n in folders.items() if split != "train"}, item["sam2"] * frames),
    }
    made = [
        Planned(f"features/{name}", items, {split: n * size for split, n in items.items()})
        for name, (items, size) in stores.items()
    ]
    for split in ("train", "val"):
        n = counts[split]
        size = n.folders * (item["audio"] + item["visual"] + item["sam2 packed"] * trained)
        size += n.rows * (item["text"] + mask * trained)  # rows of a video share equal texts and masks
        made.append(Planned(f"shards/{split}", {split: n.rows}, {split: size}))
    for split in SPLITS[1:]:
        n = counts[split]
        variants = 1 + len(settings.infer.controls) * (split in CONTROLLED_SPLITS)
        made.append(Planned(f"predictions/{split}", {split: n.rows}, {split: n.rows * frames * mask * variants}))
    return made


def item_bytes(settings: Settings) -> dict[str, int]:
    """Bytes per item in each store: per video for audio and visual, per expression for text, per frame for sam2.

    "sam2 packed": bytes per frame in a training shard. Compression is ignored.
    """
    dataset, audio, visual, text, sam2, *_ = settings
    tokens, width = visual_shape(visual)
    image_size, channels = sam2_shape(sam2)
    grid = image_size // 16  # of the coarsest of the three levels; the others are 2 and 4 times finer
    # Before conv_s0/conv_s1 all levels have all channels; after them the finer two have a quarter and an eighth.
    levels = 1 + 4 + 16 if sam2.cache_point == "pre_conv" else 1 + 4 // 4 + 16 // 8
    scales = channels * (3 if sam2.cache_point == "pre_conv" else 1 + 1 / 4 + 1 / 8) if sam2.dtype == "int8" else 0
    values = levels * channels * grid * grid
    return {
        "audio": dataset.frames
        * (audio_width(audio) * BYTES[audio.dtype] + 1),  # and a bool per second: padding or not
        "visual": dataset.frames * tokens * width * BYTES[visual.dtype],
        "text": text.max_tokens * (text_width(text) * BYTES[text.dtype] + 1),  # and one bool per token: padding or not
        "sam2": values * BYTES[sam2.dtype] + int(scales) * 4,
        "sam2 packed": values * PACKED_BYTES[sam2.dtype],
    }


def array_shapes(
    frames: int, audio: AudioConfig, visual: VisualConfig, text: TextConfig, sam2: Sam2Config
) -> dict[str, tuple[int, ...]]:
    """The shape of each numeric feature array of an expression, as training reads it: SAM 2's levels of one frame."""
    tokens, width = visual_shape(visual)
    size, channels = sam2_shape(sam2)
    grid, fine = size // 16, sam2.cache_point == "pre_conv"
    return {
        "audio": (frames, audio_width(audio)),
        "visual": (frames, tokens, width),
        "sam2_image_embed": (channels, grid, grid),
        "sam2_high_res_0": (channels if fine else channels // 8, 4 * grid, 4 * grid),
        "sam2_high_res_1": (channels if fine else channels // 4, 2 * grid, 2 * grid),
        "text": (text.max_tokens, text_width(text)),
    }


def visual_shape(visual: VisualConfig) -> tuple[int, int]:
    """Tokens per frame, with the frame's own vector, and their width."""
    if visual.encoder != "clip":
        return token_shape(visual)
    config: Any = read_config(visual.weights, "vision") or CLIP
    side = (visual.image_size or config.image_size) // config.patch_size
    return 1 + side**2, config.hidden_size


def text_width(text: TextConfig) -> int:
    """Width of a token: from the weights' config.json or, until it is there, WIDTH."""
    return getattr(read_config(text.weights, "text"), "hidden_size", WIDTH)


def audio_width(audio: AudioConfig) -> int:
    """Width of a second: VGGish's or, as for text, the encoder's."""
    if audio.encoder == "vggish":
        return VGGISH_WIDTH
    return getattr(read_config(audio.weights, "audio"), "hidden_size", WIDTH)


def sam2_shape(sam2: Sam2Config) -> tuple[int, int]:
    """SAM 2's image size and the channels of its image embedding."""
    model = read_sam2_config(sam2.config).model
    return int(model.image_size), int(model.image_encoder.neck.d_model)


def free_bytes(paths: Layout) -> int:
    """Free bytes on the file system of data/."""
    data = paths.root.parent
    return shutil.disk_usage(data if data.exists() else ".").free


def bytes_there(paths: Layout, folders: Collection[str] = MADE) -> int:
    """Bytes of pipeline output that already exist in these folders below data/<profile>/."""
    return sum(p.stat().st_size for name in folders for p in (paths.root / name).rglob("*") if p.is_file())
