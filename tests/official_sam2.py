"""The official SAM2VideoPredictor on small random weights, for comparison with the light SAM 2."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from PIL import Image, ImageDraw
from sam2.build_sam import build_sam2_video_predictor

from samlove.model.sam2_build import instantiate_sam2
from samlove.synth.scene import SECONDS, Scene, render

TINY = str(Path(__file__).parent / "sam2_tiny.yaml")  # image 64: embedding 4x4, mask logits 16x16


def random_checkpoint(path: Path, seed: int, config: str = TINY, object_score: float = 2.0) -> Path:
    """Write a checkpoint in the official format, {"model": state dict}, of a random but non-trivial SAM 2.

    SAM 2's initial weights give near-constant masks and ignore memory: layer scales are 1e-6, embeddings 0.02. Here,
    every vector and embedding is redrawn at a size that has an effect, and object scores are biased to `object_score`.
    """
    torch.manual_seed(seed)
    model = instantiate_sam2(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("gamma", "weight")) and value.ndim == 1:  # layer scales, norms
                value.uniform_(0.5, 1.5)
            elif name.endswith(("_embed", "_enc", "_ptr", "_spatial", "_token.weight", "_tokens.weight")):
                value.normal_()
        for head in model.sam_mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight *= 20  # logits as large as trained ones
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(object_score)
    torch.save({"model": model.state_dict()}, path)
    return path


def official_predictor(checkpoint: Path, config: str = TINY):
    """The predictor as built by a user of the sam2 package, on the CPU, with apply_postprocessing=False.

    config: a file, or a name inside the package.
    """
    file = Path(config)
    packaged = not file.is_file()
    if not packaged:
        GlobalHydra.instance().clear()
        initialize_config_dir(str(file.parent.resolve()), version_base="1.2")
    try:
        name = config if packaged else file.name
        return build_sam2_video_predictor(name, str(checkpoint), device="cpu", apply_postprocessing=False)
    finally:
        if not packaged:
            GlobalHydra.instance().clear()
            initialize_config_module("sam2", version_base="1.2")


def write_clip(folder: Path, seed: int, frames: int, size: tuple[int, int] = (96, 72)) -> np.ndarray:
    """Write JPEG frames of two discs moving over noise; returns the discs' masks on frame 0, bool (2, H, W)."""
    rng = np.random.default_rng(seed)
    width, height = size
    folder.mkdir(parents=True)
    ground = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize(size)
    starts = rng.uniform(0.3, 0.7, (2, 2)) * size
    steps = rng.uniform(-0.04, 0.04, (2, 2)) * size
    colours = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2)]
    radius = height // 5
    masks = []
    for t in range(frames):
        image = ground.copy()
        for start, step, colour in zip(starts, steps, colours, strict=True):
            x, y = start + step * t
            disc = (x - radius, y - radius, x + radius, y + radius)
            ImageDraw.Draw(image).ellipse(disc, fill=colour)
            if t == 0:
                mask = Image.new("L", size)
                ImageDraw.Draw(mask).ellipse(disc, fill=1)
                masks.append(np.asarray(mask, dtype=bool))
        image.save(folder / f"{t:05d}.jpg", quality=95)
    return np.stack(masks)


def write_scene(folder: Path, scene: Scene, short_side: int = 128) -> np.ndarray:
    """Write the JPEG frames of a scene as LAVS-synth does; returns the masks of its K things on frame 0, (K, H, W)."""
    size = (round(short_side * max(1, scene.aspect)), round(short_side * max(1, 1 / scene.aspect)))
    folder.mkdir(parents=True)
    drawn = [render(scene, t, size) for t in range(SECONDS)]
    for t, (frame, _) in enumerate(drawn):
        Image.fromarray(frame).save(folder / f"{t}.jpg", quality=92)
    return drawn[0][1]


def live_embeds(predictor, state: dict, before_convs: bool = False) -> dict[str, torch.Tensor]:
    """The output of the predictor's image encoder for each frame, under the store's array names, (T, C, h, w) each."""
    levels = []
    with torch.no_grad():
        for t in range(state["num_frames"]):
            image = state["images"][t : t + 1].float()
            encode = predictor.image_encoder if before_convs else predictor.forward_image
            levels.append(encode(image)["backbone_fpn"])
    names = ("sam2_high_res_0", "sam2_high_res_1", "sam2_image_embed")
    return {name: torch.cat([frame[i] for frame in levels]) for i, name in enumerate(names)}


def official_logits(predictor, state: dict, prompt: Callable[[int], None], objects: int) -> torch.Tensor:
    """Call `prompt(obj_id)` for each object, then propagate to the end and back to frame 0: logits (B, T, H, W) at the
    video's size."""
    predictor.reset_state(state)
    for obj_id in range(objects):
        prompt(obj_id)
    found = {t: logits[:, 0] for t, _, logits in predictor.propagate_in_video(state)}
    found |= {t: logits[:, 0] for t, _, logits in predictor.propagate_in_video(state, reverse=True)}
    return torch.stack([found[t] for t in range(state["num_frames"])], dim=1)
