"""How much the active profile's pipeline makes: items and bytes, computed from the configuration, not measured."""

import json
import re
import shutil
from pathlib import Path
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
    SynthConfig,
    TextConfig,
    TrainConfig,
    VisualConfig,
    active_profile,
    load,
    read_sam2_config,
)
from samlove.data.dataset import RefAvsFolder

DATA = Path("data")
MADE = ("features", "shards", "predictions")  # what takes the room under data/, the dataset aside
VGGISH_CHANNELS = 128  # of VGGish's last layer, whatever its width
WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}  # of ViTs, by timm's names
BYTES = {"int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
PACKED_BYTES = {"int8": 2, "float16": 2, "bfloat16": 4, "float32": 4}  # of the same in shards; see samlove.data.pack
TEXT_WIDTH = 768  # DistilRoBERTa's, where its folder is not there yet; CLIP's 512 needs less


class Choices(NamedTuple):
    """The sections of a profile that decide what it needs."""

    dataset: DatasetConfig
    audio: AudioConfig
    visual: VisualConfig
    text: TextConfig
    sam2: Sam2Config
    fusion: FusionConfig
    train: TrainConfig
    infer: InferConfig
    pack: PackConfig
    synth: SynthConfig | None  # None: the dataset is the user's own


def read_choices(configs: Path = Path("configs")) -> Choices:
    """The active profile's choices; raises RequestError where a file of it is wrong."""
    synth = (configs / active_profile(configs) / "synth.yaml").exists()
    return Choices(
        load(DatasetConfig, configs),
        load(AudioConfig, configs),
        load(VisualConfig, configs),
        load(TextConfig, configs),
        load(Sam2Config, configs),
        load(FusionConfig, configs),
        load(TrainConfig, configs),
        load(InferConfig, configs),
        load(PackConfig, configs),
        load(SynthConfig, configs) if synth else None,
    )


# --- how many --------------------------------------------------------------------------------------------------------


class Count(NamedTuple):
    """What a split holds. A text counts in the first split that has it."""

    folders: int
    texts: int
    rows: int


Counts = dict[str, Count]  # by split
REF_AVS: Counts = {  # of the benchmark's metadata.csv
    "train": Count(2919, 3395, 14113),
    "val": Count(275, 243, 1349),
    "test_s": Count(273, 911, 2288),
    "test_u": Count(269, 666, 1656),
    "test_n": Count(257, 0, 1028),
}


def count(choices: Choices, data: Path = DATA) -> tuple[Counts, str]:
    """What the dataset holds, and where that is known from: the index, else metadata.csv, else what it will be."""
    index, folder = data / "index" / "expressions.parquet", Path(choices.dataset.root)
    if index.is_file():
        return count_rows(pd.read_parquet(index)), str(index)
    if (folder / "metadata.csv").is_file():
        from samlove.data.audit import parse_rows

        return count_rows(parse_rows(RefAvsFolder(folder).metadata())), str(folder / "metadata.csv")
    if not choices.synth:
        return REF_AVS, "Ref-AVS as published; there is no dataset here yet"
    from samlove.synth.write import SCALES, plan

    clips = plan(choices.synth.seed, SCALES[choices.synth.scale])
    rows = [(clip.split, clip.media_id, row.text) for clip in clips for row in clip.rows]
    return count_rows(pd.DataFrame(rows, columns=["split", "media_id", "exp"])), "what the first stage will write"


def count_rows(rows: pd.DataFrame) -> Counts:
    """rows: split, media_id, exp; splits that are none of SPLITS are not counted."""
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
    """What one folder below data/ will hold, by split. shards: rows, so large at most; predictions: uncompressed."""

    path: str
    items: dict[str, int]
    bytes: dict[str, int]


def planned(choices: Choices, counts: Counts) -> list[Planned]:
    """Everything the pipeline makes that takes room."""
    item, frames = item_bytes(choices), choices.dataset.frames
    mask = choices.dataset.mask_size**2
    folders = {split: n.folders for split, n in counts.items()}
    stores = {
        "audio": (folders, item["audio"]),
        "visual": (folders, item["visual"]),
        "text": ({split: n.texts for split, n in counts.items()}, item["text"]),
        "sam2_train": ({"train": folders["train"]}, item["sam2"]),
        "sam2_eval": ({split: n for split, n in folders.items() if split != "train"}, item["sam2"] * frames),
    }
    made = [
        Planned(f"features/{name}", items, {split: n * size for split, n in items.items()})
        for name, (items, size) in stores.items()
    ]
    for split in ("train", "val"):
        n = counts[split]
        size = n.folders * (item["audio"] + item["visual"] + item["sam2 packed"])
        size += n.rows * (item["text"] + mask)  # a text or mask that several rows of a video share is kept once
        made.append(Planned(f"shards/{split}", {split: n.rows}, {split: size}))
    for split in SPLITS[1:]:
        n = counts[split]
        variants = 1 + len(choices.infer.controls) * (split in CONTROLLED_SPLITS)
        made.append(Planned(f"predictions/{split}", {split: n.rows}, {split: n.rows * frames * mask * variants}))
    return made


def item_bytes(choices: Choices) -> dict[str, int]:
    """Bytes of one item in each store: audio and visual a media folder, text an expression, sam2 a frame.

    "sam2 packed": of a frame in a shard. Compression is not reckoned with.
    """
    dataset, audio, visual, text, sam2, *_ = choices
    tokens, width = vit_shape(visual)
    image_size, channels = sam2_shape(sam2)
    grid = image_size // 16  # of the coarsest of the three levels; the others are 2 and 4 times as fine
    # After conv_s0/conv_s1 the finer levels have a quarter and an eighth of the channels, before them all.
    levels = 1 + 4 + 16 if sam2.cache_point == "pre_conv" else 1 + 4 // 4 + 16 // 8
    scales = channels * (3 if sam2.cache_point == "pre_conv" else 1 + 1 / 4 + 1 / 8) if sam2.dtype == "int8" else 0
    values = levels * channels * grid * grid
    return {
        "audio": dataset.frames * (VGGISH_CHANNELS * BYTES[audio.dtype] + 1),  # and whether the second has sound
        "visual": dataset.frames * tokens * width * BYTES[visual.dtype],
        "text": text.max_tokens * (text_width(text) * BYTES[text.dtype] + 1),  # and whether there is a token
        "sam2": values * BYTES[sam2.dtype] + int(scales) * 4,
        "sam2 packed": values * PACKED_BYTES[sam2.dtype],
    }


def vit_shape(visual: VisualConfig) -> tuple[int, int]:
    """Tokens of a frame, [cls] included, and their width, as far as timm's name tells (CLIP: as ViT-B/16)."""
    name = "base_patch16" if visual.encoder == "clip" else visual.model
    patch = re.search(r"patch(\d+)|_s(\d+)", name)
    hybrid = re.search(r"_p(\d+)_", name)  # patches of a convolutional stem's output, four times as coarse
    width = visual.model_args.get("embed_dim", next((w for size, w in WIDTHS.items() if size in name), WIDTHS["base"]))
    side = 4 * int(hybrid[1]) if hybrid else int(patch[1] or patch[2]) if patch else 16
    return 1 + (visual.image_size // side) ** 2, width


def text_width(text: TextConfig) -> int:
    """Width of a token: what the weights' folder says, where it is there."""
    try:
        config: dict[str, Any] = json.loads((Path(text.weights) / "config.json").read_text())
        return int(config.get("text_config", config)["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return TEXT_WIDTH


def sam2_shape(sam2: Sam2Config) -> tuple[int, int]:
    """SAM2's image size and the channels of its image embedding."""
    model = read_sam2_config(sam2.config).model
    return int(model.image_size), int(model.image_encoder.neck.d_model)


def free_bytes(data: Path = DATA) -> int:
    """What is free where `data` lies."""
    return shutil.disk_usage(data if data.exists() else ".").free


def bytes_there(data: Path = DATA) -> int:
    """What of all that the pipeline makes is there already."""
    return sum(p.stat().st_size for name in MADE for p in (data / name).rglob("*") if p.is_file())
