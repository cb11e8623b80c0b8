"""What the active profile still lacks on this machine, and how to get it: `samlove doctor`.

Sizes and memory are computed from the configuration, not measured.
"""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from samlove.config import (
    AudioConfig,
    DatasetConfig,
    FusionConfig,
    InferConfig,
    Sam2Config,
    SynthConfig,
    TextConfig,
    TrainConfig,
    VisualConfig,
    active_profile,
    load,
)
from samlove.dataset import RefAvsFolder

GB = 10**9
DATA = Path("data")
MADE = ("features", "shards", "predictions")  # what takes the room under data/, the dataset aside
VGGISH_CHANNELS = 128  # of VGGish's last layer, whatever its width
WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}  # of ViTs, by timm's names
BYTES = {"float16": 2, "float32": 4}
CLIP = "openai/clip-vit-base-patch16"
TEXT_WIDTH = 768  # DistilRoBERTa's; CLIP's 512 needs less
CPU_IS_ENOUGH = 4 * GB  # a training that needs less memory than this runs on a CPU in minutes
MARKERS = 3  # [aud], [vis], [his]
VGGISH_AT = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/"
SAM2_AT = "https://dl.fbaipublicfiles.com/segment_anything_2/"


class Finding(NamedTuple):
    """One thing that the profile needs: what was found, and how to get what is lacking."""

    what: str
    found: str
    lacking: bool = False
    remedy: str = ""


class Counts(NamedTuple):
    """How much a dataset holds; the defaults are Ref-AVS's, for when it is not there yet."""

    folders: int = 4001
    train: int = 2919
    val: int = 275
    evaluation: int = 1074  # folders of val and the three test splits
    texts: int = 5232
    evaluated_rows: int = 6321  # expressions of val and the three test splits


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
        load(SynthConfig, configs) if synth else None,
    )


def examine(choices: Choices) -> list[Finding]:
    """Everything that the profile needs, found or lacking, in the order in which the stages need it."""
    return [_examine_dataset(choices), *_examine_weights(choices), _examine_disk(choices), _examine_gpu(choices)]


def render(findings: list[Finding]) -> str:
    """The findings for reading, a line each and one more for what to do."""
    lines = []
    for finding in findings:
        lines.append(f"{'LACKING' if finding.lacking else 'ok':8}{finding.what:18}{finding.found}")
        if finding.lacking:
            lines.append(f"{'':26}-> {finding.remedy}")
    lacking = sum(finding.lacking for finding in findings)
    lines.append(
        f"\n{lacking} of {len(findings)} lacking" if lacking else "\nnothing is lacking; run it with: dvc repro"
    )
    return "\n".join(lines)


# --- dataset and weights ---------------------------------------------------------------------------------------------


def _examine_dataset(choices: Choices) -> Finding:
    root = Path(choices.dataset.root)
    if choices.synth:
        return Finding(
            "dataset", f"{root}, " + ("there" if root.exists() else "not yet there: the first stage writes it")
        )
    missing = [name for name in ("metadata.csv", "media", "gt_mask") if not (root / name).exists()]
    if missing:
        remedy = (
            "get Ref-AVS from its authors (https://github.com/GeWu-Lab/Ref-AVS), then: "
            f"mkdir -p {root.parent} && ln -s /path/to/your/folder {root}"
        )
        return Finding("dataset", f"{root}: no {', no '.join(missing)}", True, remedy)
    folders = sum(1 for entry in (root / "media").iterdir() if entry.is_dir())
    return Finding("dataset", f"{root}, {folders:,} media folders; look into it with: samlove audit {root}")


def _examine_weights(choices: Choices) -> list[Finding]:
    _, audio, visual, text, sam2, *_ = choices
    return [
        _weights("audio weights", audio.weights, f"curl -L {VGGISH_AT}vggish-10086976.pth -o {audio.weights}"),
        _weights("visual weights", visual.weights, _vit_remedy(visual)),
        _weights("text weights", text.weights, _text_remedy(text)),
        _weights("SAM2 checkpoint", sam2.checkpoint, _sam2_remedy(sam2)),
    ]


def _vit_remedy(visual: VisualConfig) -> str:
    path = Path(visual.weights)
    if visual.encoder == "clip":
        return f"hf download {CLIP} --local-dir {path}"
    name = f"timm/{visual.model}.augreg2_in21k_ft_in1k"
    return (
        f"hf download {name} model.safetensors --local-dir {path.parent} && mv {path.parent}/model.safetensors {path}"
    )


def _text_remedy(text: TextConfig) -> str:
    name = CLIP if text.encoder == "clip" else "distilbert/distilroberta-base"
    return f"hf download {name} --local-dir {text.weights}"


def _sam2_remedy(sam2: Sam2Config) -> str:
    name = Path(sam2.checkpoint).name
    return f"curl -L {SAM2_AT}{'092824' if name.startswith('sam2.1') else '072824'}/{name} -o {sam2.checkpoint}"


def _weights(what: str, weights: str, remedy: str) -> Finding:
    if weights.startswith("hub:"):
        return Finding(what, f"{weights}, fetched from the Hugging Face hub on first use")
    path = Path(weights)
    if not path.exists():
        ours = path.is_relative_to("weights/micro")
        return Finding(what, f"{path}: not there", True, f"git restore {path}" if ours else remedy)
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
    return Finding(what, f"{path}, {size / 1e6:,.1f} MB")


# --- disk ------------------------------------------------------------------------------------------------------------


def item_bytes(choices: Choices) -> dict[str, int]:
    """Bytes of one item in each store: audio and visual a media folder, text an expression, sam2 a frame."""
    dataset, audio, visual, text, sam2, *_ = choices
    tokens, width = vit_shape(visual)
    image_size, channels = sam2_shape(sam2)
    grid = image_size // 16  # of the coarsest of the three levels; the others are 2 and 4 times as fine
    # After conv_s0/conv_s1 the finer levels have a quarter and an eighth of the channels, before them all.
    levels = 1 + 4 + 16 if sam2.cache_point == "pre_conv" else 1 + 4 // 4 + 16 // 8
    return {
        "audio": dataset.frames * VGGISH_CHANNELS * BYTES[audio.dtype],
        "visual": dataset.frames * tokens * width * BYTES[visual.dtype],
        "text": text.max_tokens * TEXT_WIDTH * BYTES[text.dtype],
        "sam2": levels * channels * grid * grid * BYTES[sam2.dtype],
    }


def needed_bytes(choices: Choices, counts: Counts) -> dict[str, int]:
    """Bytes of everything the pipeline makes: feature stores, shards, and predictions before their compression."""
    item, frames = item_bytes(choices), choices.dataset.frames
    return {
        "features/audio": item["audio"] * counts.folders,
        "features/visual": item["visual"] * counts.folders,
        "features/text": item["text"] * counts.texts,
        "features/sam2_train": item["sam2"] * counts.train,
        "features/sam2_eval": item["sam2"] * frames * counts.evaluation,
        "shards": (item["audio"] + item["visual"] + item["sam2"]) * (counts.train + counts.val),
        "predictions": counts.evaluated_rows
        * frames
        * choices.dataset.mask_size**2
        * (1 + len(choices.infer.controls)),
    }


def vit_shape(visual: VisualConfig) -> tuple[int, int]:
    """Tokens of a frame, [cls] included, and their width, as far as timm's name tells (CLIP: as ViT-B/16)."""
    name = "base_patch16" if visual.encoder == "clip" else visual.model
    patch = re.search(r"patch(\d+)", name)
    width = visual.model_args.get("embed_dim", next((w for size, w in WIDTHS.items() if size in name), WIDTHS["base"]))
    return 1 + (visual.image_size // int(patch[1] if patch else 16)) ** 2, width


def sam2_shape(sam2: Sam2Config) -> tuple[int, int]:
    """SAM2's image size and the channels of its image embedding."""
    from samlove.sam2_build import read_sam2_config

    model = read_sam2_config(sam2.config).model
    return int(model.image_size), int(model.image_encoder.neck.d_model)


def _examine_disk(choices: Choices) -> Finding:
    needed = sum(needed_bytes(choices, _count(choices)).values())
    there = sum(p.stat().st_size for name in MADE for p in (DATA / name).rglob("*") if p.is_file())
    free = shutil.disk_usage(DATA if DATA.exists() else ".").free
    found = f"{free / GB:,.1f} GB free; {needed / GB:,.1f} GB needed, {there / GB:,.1f} GB of it there"
    remedy = "make room, or clone this repository onto a bigger disk (data/ and .dvc/cache must share it)"
    return Finding("disk", found, free < needed - there, remedy)


def _count(choices: Choices) -> Counts:
    folder = Path(choices.dataset.root)
    if (folder / "metadata.csv").exists():
        from samlove.audit import parse_rows

        rows = parse_rows(RefAvsFolder(folder).metadata())
        folders = rows.groupby("split")["media_id"].nunique()
        evaluated = rows["split"].isin(["val", "test_s", "test_u", "test_n"])
        return Counts(
            folders=int(rows["media_id"].nunique()),
            train=int(folders.get("train", 0)),
            val=int(folders.get("val", 0)),
            evaluation=int(rows.loc[evaluated, "media_id"].nunique()),
            texts=int(rows["exp"].nunique()),
            evaluated_rows=int(evaluated.sum()),
        )
    if not choices.synth:
        return Counts()
    from samlove.synth.write import SCALES, plan

    clips = plan(choices.synth.seed, SCALES[choices.synth.scale])
    train = sum(clip.split == "train" for clip in clips)
    return Counts(
        folders=len(clips),
        train=train,
        val=sum(clip.split == "val" for clip in clips),
        evaluation=len(clips) - train,
        texts=len({row.text for clip in clips for row in clip.rows}),
        evaluated_rows=sum(len(clip.rows) for clip in clips if clip.split != "train"),
    )


# --- memory ----------------------------------------------------------------------------------------------------------


def training_bytes(choices: Choices) -> int:
    """Memory that a training step takes, about.

    Activations kept for the backward pass: 34 bytes a token, channel and layer in 16 bit (Korthikanti et al.,
    "Reducing activation recomputation in large transformer models", Eq. 1 without the attention matrix, which is not
    kept). Weights, gradients and AdamW's two moments: 16 bytes a parameter, 12 D^2 parameters a block.
    """
    dataset, _, visual, text, sam2, fusion, train, *_ = choices
    tokens, _ = vit_shape(visual)
    image_size, channels = sam2_shape(sam2)
    kept = 34 if train.precision == "bfloat16" else 68
    sequence = fusion.seg_tokens + dataset.frames + text.max_tokens + tokens + MARKERS
    fusing = train.batch_size * dataset.frames * sequence * fusion.dim * fusion.blocks * kept
    decoding = train.batch_size * (image_size // 16) ** 2 * channels * 2 * kept  # two layers over the image
    upscaling = train.batch_size * (image_size // 4) ** 2 * channels // 8 * kept
    return fusing + decoding + upscaling + 16 * 12 * fusion.dim**2 * fusion.blocks


def _examine_gpu(choices: Choices) -> Finding:
    import torch

    needed = training_bytes(choices)
    about = f"training takes about {needed / GB:,.1f} GB"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found = f"{device.name}, {device.total_memory / GB:,.1f} GB; {about}"
        return Finding(
            "GPU memory", found, device.total_memory < needed, "in train.yaml halve batch_size, double accumulate"
        )
    if needed < CPU_IS_ENOUGH:
        return Finding("GPU memory", f"no GPU, and none needed: {about}")
    return Finding("GPU memory", f"no CUDA device; {about}", True, "run on a machine with a CUDA GPU of that memory")
