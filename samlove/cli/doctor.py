"""What the active profile still lacks on this machine, and how to get it: `samlove doctor`.

Sizes and memory are computed from the configuration, not measured.
"""

from pathlib import Path
from typing import NamedTuple

from samlove.config import Sam2Config, TextConfig, VisualConfig
from samlove.data.sizes import Choices, bytes_there, count, free_bytes, planned, sam2_shape, vit_shape

GB = 10**9
CLIP = "openai/clip-vit-base-patch16"
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


def _examine_disk(choices: Choices) -> Finding:
    counts, _ = count(choices)
    needed = sum(sum(entry.bytes.values()) for entry in planned(choices, counts))
    there, free = bytes_there(), free_bytes()
    found = (
        f"{free / GB:,.1f} GB free; {needed / GB:,.1f} GB needed, {there / GB:,.1f} GB of it there; see: samlove plan"
    )
    remedy = "make room, or clone this repository onto a bigger disk (data/ and .dvc/cache must share it)"
    return Finding("disk", found, free < needed - there, remedy)


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
