"""Makes the micro profile's SAM 2: `python -m samlove.micro.pretrain_sam2 --out DIR --minutes M --seed S`.

SAM2Base of `sam2_micro.yaml`, from scratch, on generated moving shapes (`samlove.micro.clips`): first single
images, then clips, as SAM 2 itself was trained (Ravi et al., 2024, section 4). All schedules depend on elapsed time, so
a complete run takes M minutes. DIR gets checkpoint.pt (the same command resumes from it), sam2.safetensors (fp16, a
running mean of the weights), log.jsonl and, at the end, scores.json.

Letters: B clips, T frames, N targets (objects) of all clips, S the side of an image (128).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from samlove.micro import code
from samlove.micro.clips import SIDE, Clip, ClipPool, absent, augment, describe, draw_clip, name_map
from samlove.micro.export import export
from samlove.model.sam2_build import instantiate_sam2, load_sam2_weights
from samlove.synth.scene import SECONDS

CONFIG = Path(__file__).with_name("sam2_micro.yaml")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in SAM 2's predictors
VISIBLE = 64  # pixels that an object must show on frame 0 to be a target
CERTAIN = 16  # with at least so many pixels, an object counts as present; the score's loss skips smaller remainders
IMAGE_PART = 0.14  # fraction of the time with single images only
LENGTHS = ((0.15, 2, 4), (0.4, 3, 6), (0.7, 4, 8), (1.0, 6, SECONDS))  # until this part of the clip stage: T from, to
LEARNING_RATE, LAST_RATE, WARM_UP = 1e-3, 0.02, 100  # peak; fraction of it at the end; steps
IMAGES_AGAIN = 0.65  # the same for a run from earlier weights: new kinds of prompts are learned on images
GO_ON = 0.4  # a run from earlier weights goes through this last fraction of the schedules
CHECKPOINT_EVERY, SCORE_EVERY = 120, 420  # seconds

KINDS = ("point", "box", "mask", "code")


class Prompt(NamedTuple):
    """The prompts for N targets on frame 0: SAM 2's own point_inputs and mask_inputs, or a token with a code."""

    points: dict[str, Tensor] | None = None
    masks: Tensor | None = None
    token: Tensor | None = None  # (N, 1, code.WIDTH)


def initialise(model: SAM2Base) -> None:
    """Initial values without which such a short training would not use the memory for a long time.

    Keys that equal queries let attention match equal positions and appearances from the start. Biases of the memory's
    queries and keys make nearby positions match under rotary encoding. A positive object score lets masks through
    (SAM 2 replaces the mask of an absent object by -1024, which passes no gradient).
    """
    with torch.no_grad():
        decoder = model.sam_mask_decoder
        decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
        attentions = [decoder.transformer.final_attn_token_to_image]
        for layer in decoder.transformer.layers:
            attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
        for attention in attentions:
            attention.q_proj.weight.mul_(1.4)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
        for layer in model.memory_attention.layers:
            cross = layer.cross_attn_image
            for projection in cross.q_proj, cross.k_proj:
                projection.weight.mul_(0.5)
                projection.bias.fill_(1.2)
            for projection in cross.v_proj, cross.out_proj:
                projection.weight.mul_(1.7)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        model.mask_downsample.weight.fill_(20 / 16)  # from 0..1 to about -10..10, the scale of mask logits
        model.mask_downsample.bias.fill_(-10.0)


def images_tensor(frames: np.ndarray) -> Tensor:
    """(..., S, S, 3) uint8 to (..., 3, S, S) float32, normalised."""
    images = (torch.from_numpy(np.ascontiguousarray(frames)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return images.movedim(-1, -3)  # (..., 3, S, S)


def make_prompt(rng: np.random.Generator, kind: str, masks: np.ndarray, empty: np.ndarray) -> Prompt:
    """A prompt for frame 0 of each of N targets: "point", "box" or "mask"; `make_batch` makes codes.

    masks: (N, S, S) bool, what the prompt shows; empty: (N, S, S) bool, where to put the point of a target whose mask
    is empty. A box is off by a pixel or two.
    """
    if kind == "mask":
        return Prompt(masks=torch.from_numpy(masks).float()[:, None])  # (N, 1, S, S)
    count = 1 if kind == "point" else 2
    coords, labels = np.zeros((len(masks), count, 2), np.float32), np.ones((len(masks), count), np.int32)
    for n, mask in enumerate(masks):
        ys, xs = np.nonzero(mask if mask.any() else empty[n])
        if kind == "point":
            pick = rng.integers(len(ys))
            coords[n] = xs[pick], ys[pick]
        else:
            coords[n] = (xs.min(), ys.min()), (xs.max(), ys.max())
            coords[n] += rng.normal(0, 1.5, (2, 2))
            labels[n] = 2, 3
    return Prompt({"point_coords": torch.from_numpy(coords), "point_labels": torch.from_numpy(labels)})


def track(
    model: SAM2Base, images: Tensor, clip_of: list[int], prompt: Prompt, forced: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """Run SAM 2 on T frames for N targets, prompted on frame 0, with gradients.

    images: (B, T, 3, S, S). clip_of: the clip of each target. forced: (N, T, S, S) ground-truth masks that the
    memory stores instead of the predicted ones; only while SAM 2 learns to use its memory.
    Returns for each frame `raw` (N, 1, S/4, S/4) mask logits and `score` (N, 1) from the decoder, `iou` (N, 1),
    and `masks` (N, 1, S/4, S/4), the output of SAM 2: the mask prompt itself on frame 0, -1024 where absent.
    """
    frames = images.shape[1]
    encoded = model.forward_image(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    _, levels, positions, sizes = model._prepare_backbone_features(encoded)  # (hw, B T, C) each
    decoded: list[tuple[Tensor, ...]] = []
    hooks = [model.sam_mask_decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))]
    if prompt.token is not None:
        hooks.append(model.sam_prompt_encoder.register_forward_hook(_append_once(model, prompt.token)))
    bank: dict[str, dict[int, dict]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    steps = []
    try:
        for t in range(frames):
            rows = torch.tensor(clip_of) * frames + t
            features = [level[:, rows] for level in levels]
            points, masks = (prompt.points, prompt.masks) if t == 0 else (None, None)
            out = model.track_step(
                frame_idx=t,
                is_init_cond_frame=t == 0,
                current_vision_feats=features,
                current_vision_pos_embeds=[position[:, rows] for position in positions],
                feat_sizes=sizes,
                point_inputs=points,
                mask_inputs=masks,
                output_dict=bank,
                num_frames=SECONDS,  # scales the pointers' temporal positions; the same for clips of any length
                run_mem_encoder=False,
            )
            raw, iou, _, score = decoded.pop()
            steps.append({"raw": raw, "score": score, "iou": iou, "masks": out["pred_masks"]})
            if t + 1 < frames:  # also the memory of a mask prompt comes from its low-resolution mask
                kept, present = F.interpolate(out["pred_masks"], size=SIDE, mode="bilinear"), out["object_score_logits"]
                if forced is not None:
                    kept = forced[:, t, None] * 20.0 - 10.0
                    present = forced[:, t].flatten(1).any(1, keepdim=True) * 20.0 - 10.0
                model._encode_memory_in_output(features, sizes, points, True, kept, present, out)
            bank["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = out
    finally:
        for hook in hooks:
            hook.remove()
    return steps


def _append_once(model: SAM2Base, token: Tensor) -> Callable:
    """A hook that appends a token to the prompt encoder's first output, as samlove.model.sam2 appends [seg].

    The embedding of a click is added to the token, as to [seg] when its training starts.
    """
    left = [token + model.sam_prompt_encoder.point_embeddings[1].weight]  # (N, 1, code.WIDTH)

    def join(module: nn.Module, inputs: tuple, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sparse, dense = embeddings
        return (torch.cat([sparse, left.pop()], dim=1), dense) if left else embeddings

    return join


def name_loss(features: Tensor, namer: nn.Module, clips: list[Clip]) -> tuple[Tensor, float]:
    """The loss of a linear layer that reads from the image embeddings (B, C, h, w) what each cell shows, and the
    fraction of cells with a category in which it reads the correct one."""
    said = torch.from_numpy(np.stack([name_map(clip, features.shape[-1]) for clip in clips]))  # (B, h, w, channels)
    read = namer(features.movedim(1, -1))
    named = said[..., : code.TRAITS].amax(-1) > 0
    logits, truth = code.category_logits(read[named]), code.category_logits(said[named]).argmax(-1)
    loss = F.cross_entropy(logits, truth) + ((read - said) ** 2).sum(-1).mean() / 8
    return loss, float((logits.argmax(-1) == truth).float().mean())


def loss_of(steps: list[dict[str, Tensor]], targets: Tensor) -> Tensor:
    """5 BCE + Dice of the mask, BCE of the object score, L1 of the predicted IoU; targets (N, T, S, S) float 0/1.

    It uses the decoder's raw mask, so that a mask that SAM 2 suppresses as absent still learns. If the object is
    absent, its mask learns to be empty, with less weight; Dice and IoU do not count.
    """
    truth = targets.transpose(0, 1).flatten(0, 1)  # (T N, S, S)
    raw = torch.cat([step["raw"] for step in steps])
    logits = F.interpolate(raw, size=SIDE, mode="bilinear", align_corners=False)[:, 0]  # (T N, S, S)
    area = truth.sum((1, 2))
    present, certain = (area > 0).float(), ((area == 0) | (area >= CERTAIN)).float()
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * truth).sum((1, 2)) + 1) / (chance.sum((1, 2)) + area + 1)
    with torch.no_grad():
        guess = (logits > 0).float()
        both = (guess * truth).sum((1, 2))
        overlap = both / (guess.sum((1, 2)) + area - both).clamp(min=1)
    score = torch.cat([step["score"] for step in steps])[:, 0]
    scored = F.binary_cross_entropy_with_logits(score, present, reduction="none") * certain
    off = (torch.cat([step["iou"] for step in steps])[:, 0] - overlap).abs() * present
    return (5 * bce * (0.3 + 0.7 * present) + dice * present + 0.2 * scored + 0.1 * off).mean()


class Batch(NamedTuple):
    images: Tensor  # (B, T, 3, S, S)
    clip_of: list[int]  # of each target
    prompt: Prompt
    targets: Tensor  # (N, T, S, S) float 0 or 1
    clips: list[Clip]


def make_batch(rng: np.random.Generator, pool: ClipPool, count: int, length: int, per_clip: int, kind: str) -> Batch:
    """A batch of `count` clips with up to `per_clip` targets each.

    One prompt in twenty shows nothing (an empty mask, a point on the background, no point, a code that matches no
    thing). Its target is empty on all frames: the object score learns that an object can be absent.
    """
    while True:
        clips = [augment(rng, clip, length) for clip in pool.take(rng, count)]
        able = [np.flatnonzero(clip.masks[:, 0].sum((1, 2)) >= VISIBLE) for clip in clips]
        chosen = [(c, k) for c, possible in enumerate(able) for k in rng.permutation(possible)[:per_clip]]
        if chosen:
            break
    clip_of = [c for c, _ in chosen]
    truth = np.stack([clips[c].masks[k] for c, k in chosen])
    if kind != "box":
        truth[rng.random(len(truth)) < 0.05] = False
    images = images_tensor(np.stack([clip.frames for clip in clips]))
    if kind == "code":
        codes = [
            describe(rng, clips[c], k) if mask[0].any() else absent(rng, clips[c])
            for (c, k), mask in zip(chosen, truth, strict=True)
        ]
        prompt = Prompt(token=torch.from_numpy(np.stack(codes))[:, None])
        return Batch(images, clip_of, prompt, torch.from_numpy(truth).float(), clips)
    prompt = make_prompt(rng, kind, truth[:, 0], np.stack([~clips[c].masks[:, 0].any(0) for c in clip_of]))
    points = prompt.points
    if kind == "point" and points:  # padding as in SAM 2's other prompts; an absent target may have only padding
        labels = points["point_labels"]
        labels[torch.from_numpy(~truth[:, 0].any((1, 2)) & (rng.random(len(truth)) < 0.3))] = -1
        if rng.random() < 0.5:
            points["point_coords"] = F.pad(points["point_coords"], (0, 0, 0, 1))
            points["point_labels"] = F.pad(labels, (0, 1), value=-1)
    return Batch(images, clip_of, prompt, torch.from_numpy(truth).float(), clips)


def jaccard(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU (N,) of logits (N, 1, h, w), enlarged, with truth (N, S, S) bool; 1 if both are empty."""
    guess = F.interpolate(logits, size=SIDE, mode="bilinear", align_corners=False)[:, 0] > 0
    union = (guess | truth).sum((1, 2))
    return torch.where(union > 0, (guess & truth).sum((1, 2)) / union.clamp(min=1), 1.0)


@torch.no_grad()
def evaluate(model: SAM2Base, count: int, seed: int) -> dict[str, float]:
    """Mean J on `count` clips of SECONDS frames at SIDE pixels, one target each, not used in training.

    Keys: KIND_J0 on frame 0 and KIND_J on the frames after it, prompted with a code, a point, a box and the
    ground-truth mask; mask_last on the last frame; copy_J of the ground-truth mask of frame 0, copied to every frame;
    absent, the fraction of frames without the target, and absent_found, the fraction of these that the object score
    detects (ground-truth mask as prompt).
    """
    rng = np.random.default_rng([seed, 200_200])
    clips: list[tuple[Clip, int]] = []
    while len(clips) < count:
        clip = draw_clip(rng)
        able = np.flatnonzero(clip.masks[:, 0].sum((1, 2)) >= VISIBLE)
        if len(able):
            clips.append((clip, int(rng.choice(able))))
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, 20):
        part = clips[start : start + 20]
        images = images_tensor(np.stack([clip.frames for clip, _ in part]))
        truth = np.stack([clip.masks[k] for clip, k in part])
        codes = Prompt(token=torch.from_numpy(np.stack([describe(rng, clip, k) for clip, k in part]))[:, None])
        target = torch.from_numpy(truth)
        scores: dict[str, Tensor] = {}
        for kind in ("code", "point", "box", "mask"):
            prompt = codes if kind == "code" else make_prompt(rng, kind, truth[:, 0], ~truth[:, 0])
            steps = track(model, images, list(range(len(part))), prompt)
            each = [jaccard(step["masks"], target[:, t]) for t, step in enumerate(steps)]
            scores |= {f"{kind}_J0": each[0], f"{kind}_J": torch.stack(each[1:])}
        scores["mask_last"] = each[-1]
        same, later = target[:, :1], target[:, 1:]
        scores["copy_J"] = (same & later).sum((2, 3)) / (same | later).sum((2, 3)).clamp(min=1)
        gone = ~target[:, 1:].flatten(2).any(2).T  # (T - 1, N)
        scores["absent"] = gone.float()
        scores["absent_found"] = (torch.stack([step["score"][:, 0] for step in steps[1:]]) < 0)[gone].float()
        for name, values in scores.items():
            found.setdefault(name, []).append(values.flatten())
    return {name: round(float(torch.cat(values).mean()), 4) for name, values in found.items()}


def plan_step(rng: np.random.Generator, done: float, images: bool) -> tuple[int, int, int, str]:
    """(clips, frames, targets per clip, prompt) of a step at `done` (0..1) of the schedules: for images, or for clips
    mixed with some images."""
    if images or rng.random() < 0.2:
        return 8, 1, 3, str(rng.choice(KINDS, p=[0.1, 0.05, 0.05, 0.8]))
    clip_part = (done - IMAGE_PART) / (1 - IMAGE_PART)
    low, high = next((low, high) for until, low, high in LENGTHS if clip_part <= until)
    length = int(rng.integers(low, high + 1))
    return max(2, 20 // length), length, 3, str(rng.choice(KINDS, p=[0.25, 0.1, 0.4, 0.25]))


def pretrain(out: Path, minutes: float, seed: int, weights: Path | None = None, scored_clips: int = 200) -> None:
    """Run the complete recipe or, from the `weights` of an earlier run, its last fraction GO_ON; see the module.

    `scored_clips`: number of clips for the final scores.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model: SAM2Base = instantiate_sam2(str(CONFIG))  # evaluation mode: no dropout, and scores are returned
    if weights is None:
        initialise(model)
    else:
        load_sam2_weights(model, str(weights))
    model.image_encoder.to(memory_format=torch.channels_last)
    mean = copy.deepcopy(model)
    # An auxiliary task: name what each cell shows, so that the decoder can find what a code asks for.
    namer = nn.Linear(code.WIDTH, code.SEEN_OF.stop)
    seen: list[Tensor] = []
    model.image_encoder.register_forward_hook(lambda module, inputs, output: seen.append(output["vision_features"]))
    parameters: list[Tensor] = list(model.parameters())
    mean_parameters: list[Tensor] = list(mean.parameters())
    optimiser = torch.optim.AdamW(
        [*parameters, *namer.parameters()], lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True
    )
    step, spent = 0, 0.0
    if (checkpoint := out / "checkpoint.pt").is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        mean.load_state_dict(state["mean"])
        namer.load_state_dict(state["namer"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng([seed, 1, step])
    pool = ClipPool([seed, 2, step])
    start = time.monotonic() - spent
    saved = scored = spent
    running: dict[str, float] = {}
    while (spent := time.monotonic() - start) < 60 * minutes:
        part = spent / (60 * minutes)
        done = part if weights is None else 1 - GO_ON + GO_ON * part
        rate = LAST_RATE + (1 - LAST_RATE) * (0.5 + 0.5 * float(np.cos(np.pi * max(0.0, (done - 0.25) / 0.75))))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate * min(1.0, (step + 1) / WARM_UP)
        clips, length, per_clip, kind = plan_step(rng, done, part < (IMAGE_PART if weights is None else IMAGES_AGAIN))
        batch = make_batch(rng, pool, clips, length, per_clip, kind)
        forced = batch.targets if rng.random() < 0.5 - done else None  # less and less often, never in the second half
        loss = loss_of(track(model, batch.images, batch.clip_of, batch.prompt, forced), batch.targets)
        running[kind] = 0.97 * running.get(kind, loss.item()) + 0.03 * loss.item()
        if length == 1:
            naming, right = name_loss(seen.pop(), namer, batch.clips)
            loss = loss + 0.5 * naming
            running["named"] = 0.97 * running.get("named", right) + 0.03 * right
        seen.clear()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(mean_parameters, parameters, max(0.004, 1 / step))
        line: dict[str, float] = {}
        if step % 50 == 0:
            line = {name: round(value, 4) for name, value in running.items()} | {"drawn": pool.drawn}
        if spent - scored > SCORE_EVERY:
            line |= evaluate(mean, 40, seed=seed + 1)  # different clips from the final ones
            scored = spent
        if spent - saved > CHECKPOINT_EVERY:
            state = {"model": model.state_dict(), "mean": mean.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(
                state | {"namer": namer.state_dict(), "step": step, "spent": spent}, checkpoint.with_suffix(".partial")
            )
            checkpoint.with_suffix(".partial").replace(checkpoint)
            export(mean, out / "sam2.safetensors")
            saved = spent
        if line:
            with open(out / "log.jsonl", "a", encoding="utf-8") as log:
                print(json.dumps({"seconds": round(spent), "step": step} | line), file=log)
    pool.worker.terminate()
    export(mean, out / "sam2.safetensors")
    scores = {"minutes": minutes, "seed": seed, "steps": step, "clips": pool.drawn}
    scores |= evaluate(mean, scored_clips, seed)
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the micro profile's SAM 2")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights, log and scores")
    parser.add_argument("--minutes", type=float, default=51)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="sam2.safetensors of an earlier run, to continue from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretrain(arguments.out, arguments.minutes, arguments.seed, arguments.weights)


if __name__ == "__main__":
    main()
