"""Makes the micro profile's SAM2: `python -m samlove.micro.pretrain_sam2 --out DIR --minutes M --seed S`.

SAM2Base of `sam2_micro.yaml`, from scratch, on generated moving shapes (`samlove.synth.scene.random_clip`): single
images first, clips after, as SAM 2 itself was trained (Ravi et al., 2024, section 4). All schedules follow the clock,
so M minutes are one whole run. DIR gets checkpoint.pt (the same command goes on from it), sam2.safetensors (fp16, a
running mean of the weights), log.jsonl and, at the end, scores.json.

Letters: B clips, T frames, N targets (objects) of all clips, S the side of an image (128).
"""

import argparse
import copy
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from samlove.sam2_build import instantiate_sam2, load_sam2_weights
from samlove.synth.scene import SECONDS, random_clip

CONFIG = Path(__file__).with_name("sam2_micro.yaml")
SIDE = 128
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as SAM2's predictors normalise
VISIBLE = 64  # pixels an object must show on frame 0 to be asked for
CERTAIN = 16  # pixels from which a remainder of an object counts as present; fewer are left out of the score's loss
IMAGE_PART = 0.14  # of the time, images only
LENGTHS = ((0.15, 2, 4), (0.4, 3, 6), (0.7, 4, 8), (1.0, 6, SECONDS))  # until this part of the clip stage: T from, to
LEARNING_RATE, LAST_RATE, WARM_UP = 1e-3, 0.02, 100  # peak; its part at the end; steps
GO_ON = 0.4  # of the schedules, what a run from an earlier one's weights goes through
POOL = 1200  # clips kept to draw from, so that training never waits for the renderer
CHECKPOINT_EVERY, SCORE_EVERY = 120, 420  # seconds

Clip = tuple[np.ndarray, np.ndarray]  # frames (T, S, S, 3) uint8, masks (K, T, S, S) bool
Prompt = tuple[dict[str, Tensor] | None, Tensor | None]  # SAM2's point_inputs, mask_inputs


def draw_clip(rng: np.random.Generator) -> Clip:
    """SECONDS frames; every other one drawn at twice the size and averaged down, smooth as resized photographs are."""
    if rng.random() < 0.5:
        return random_clip(rng, SECONDS, SIDE)
    frames, masks = random_clip(rng, SECONDS, 2 * SIDE)
    halves = (SIDE, 2, SIDE, 2)
    frames = frames.reshape(SECONDS, *halves, 3).mean((2, 4)).round().astype(np.uint8)
    return frames, masks.reshape(len(masks), SECONDS, *halves).mean((3, 5)) >= 0.5


def _draw_for_ever(clips: multiprocessing.Queue, seed: list[int]) -> None:
    os.nice(5)
    rng = np.random.default_rng(seed)
    while True:
        clips.put(draw_clip(rng))


class ClipPool:
    """The latest POOL clips of a renderer in a process of its own."""

    def __init__(self, seed: list[int]):
        context = multiprocessing.get_context("spawn")
        self.fresh = context.Queue(maxsize=16)
        self.worker = context.Process(target=_draw_for_ever, args=(self.fresh, seed), daemon=True)
        self.worker.start()
        self.clips: list[Clip] = [self.fresh.get() for _ in range(8)]  # enough for any step
        self.drawn = len(self.clips)

    def take(self, rng: np.random.Generator, count: int) -> list[Clip]:
        """Any `count` of the pool's clips, after taking in what the renderer has ready; waits while it has too few."""
        while len(self.clips) < count or not self.fresh.empty():
            clip = self.fresh.get()
            if len(self.clips) < POOL:
                self.clips.append(clip)
            else:
                self.clips[self.drawn % POOL] = clip
            self.drawn += 1
        return [self.clips[i] for i in rng.choice(len(self.clips), count, replace=False)]


def initialise(model: SAM2Base) -> None:
    """Starting points without which so short a training leaves the memory unused for long.

    Keys like queries let attention find equal places and looks from the start; biases of the memory's queries and
    keys make, under rotary positions, near places match; a positive object score lets masks through (SAM2 replaces
    the mask of an absent object by -1024, which passes no gradient).
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


def augment(rng: np.random.Generator, clip: Clip, length: int) -> Clip:
    """`length` frames in a row of a clip, perhaps mirrored, turned or backwards."""
    start = int(rng.integers(0, len(clip[0]) - length + 1))
    frames, masks = clip[0][start : start + length], clip[1][:, start : start + length]
    if rng.random() < 0.5:
        frames, masks = frames[::-1], masks[:, ::-1]
    if rng.random() < 0.5:
        frames, masks = frames[:, :, ::-1], masks[..., ::-1]
    if rng.random() < 0.5:
        frames, masks = frames.swapaxes(1, 2), masks.swapaxes(2, 3)
    return frames, masks


def images_tensor(frames: np.ndarray) -> Tensor:
    """(..., S, S, 3) uint8 to (..., 3, S, S) float32, normalised."""
    images = (torch.from_numpy(np.ascontiguousarray(frames)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return images.movedim(-1, -3)  # (..., 3, S, S)


def make_prompt(rng: np.random.Generator, kind: str, masks: np.ndarray, empty: np.ndarray) -> Prompt:
    """A prompt for frame 0 of each of N targets, "point", "box" or "mask".

    masks: (N, S, S) bool, what the prompt shows; empty: (N, S, S) bool, where a point of a target whose mask has
    no pixel is put. A box is off by a pixel or two.
    """
    if kind == "mask":
        return None, torch.from_numpy(masks).float()[:, None]  # (N, 1, S, S)
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
    return {"point_coords": torch.from_numpy(coords), "point_labels": torch.from_numpy(labels)}, None


def track(
    model: SAM2Base, images: Tensor, clip_of: list[int], prompt: Prompt, forced: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """SAM2 through T frames for N targets, prompted on frame 0, with gradients.

    images: (B, T, 3, S, S). clip_of: the clip of each target. forced: (N, T, S, S) true masks that the memory keeps
    instead of the predicted ones; only while it learns to use its memory.
    Returns for each frame `raw` (N, 1, S/4, S/4) mask logits and `score` (N, 1) as the decoder gave them, `iou`
    (N, 1), and `masks` (N, 1, S/4, S/4), SAM2's output: the mask prompt itself on frame 0, -1024 where absent.
    """
    frames = images.shape[1]
    encoded = model.forward_image(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
    _, levels, positions, sizes = model._prepare_backbone_features(encoded)  # (hw, B T, C) each
    decoded: list[tuple[Tensor, ...]] = []
    hook = model.sam_mask_decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
    bank: dict[str, dict[int, dict]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    steps = []
    try:
        for t in range(frames):
            rows = torch.tensor(clip_of) * frames + t
            features = [level[:, rows] for level in levels]
            points, masks = prompt if t == 0 else (None, None)
            out = model.track_step(
                frame_idx=t,
                is_init_cond_frame=t == 0,
                current_vision_feats=features,
                current_vision_pos_embeds=[position[:, rows] for position in positions],
                feat_sizes=sizes,
                point_inputs=points,
                mask_inputs=masks,
                output_dict=bank,
                num_frames=SECONDS,  # scales the pointers' temporal positions: the same for clips of any length
                run_mem_encoder=False,
            )
            raw, iou, _, score = decoded.pop()
            steps.append({"raw": raw, "score": score, "iou": iou, "masks": out["pred_masks"]})
            if t + 1 < frames:  # the memory of a mask prompt, too, is made from its low-resolution mask
                kept, present = F.interpolate(out["pred_masks"], size=SIDE, mode="bilinear"), out["object_score_logits"]
                if forced is not None:
                    kept = forced[:, t, None] * 20.0 - 10.0
                    present = forced[:, t].flatten(1).any(1, keepdim=True) * 20.0 - 10.0
                model._encode_memory_in_output(features, sizes, points, True, kept, present, out)
            bank["cond_frame_outputs" if t == 0 else "non_cond_frame_outputs"][t] = out
    finally:
        hook.remove()
    return steps


def loss_of(steps: list[dict[str, Tensor]], targets: Tensor) -> Tensor:
    """5 BCE + Dice of the mask, BCE of the object score, L1 of the predicted IoU; targets (N, T, S, S) float 0/1.

    Of the decoder's raw mask: one that SAM2 suppresses as absent still learns. Where the object is absent its mask
    learns to be empty, at less weight, and neither Dice nor the IoU says anything.
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


def make_batch(
    rng: np.random.Generator, pool: ClipPool, clips: int, length: int, per_clip: int, kind: str
) -> tuple[Tensor, list[int], Prompt, Tensor]:
    """(images (B, T, 3, S, S), clip_of, prompt, targets (N, T, S, S)).

    One prompt in twenty shows nothing (an empty mask, a point on the background, no point): its target is empty
    throughout, so that the object score learns that there need not be an object.
    """
    while True:
        frames: list[np.ndarray] = []
        targets, clip_of, empty = [], [], []
        for clip in pool.take(rng, clips):
            pictures, masks = augment(rng, clip, length)
            able = np.flatnonzero(masks[:, 0].sum((1, 2)) >= VISIBLE)
            for k in rng.permutation(able)[:per_clip]:
                targets.append(masks[k].copy())
                clip_of.append(len(frames))
                empty.append(~masks[:, 0].any(0))
            frames.append(pictures)
        if targets:
            truth = np.stack(targets)
            break
    if kind != "box":
        truth[rng.random(len(truth)) < 0.05] = False
    prompt = make_prompt(rng, kind, truth[:, 0], np.stack(empty))
    points, _ = prompt
    if kind == "point" and points:  # padding, as other prompts of SAM2 carry it; an absent target may have no more
        labels = points["point_labels"]
        labels[torch.from_numpy(~truth[:, 0].any((1, 2)) & (rng.random(len(truth)) < 0.3))] = -1
        if rng.random() < 0.5:
            points["point_coords"] = F.pad(points["point_coords"], (0, 0, 0, 1))
            points["point_labels"] = F.pad(labels, (0, 1), value=-1)
    return images_tensor(np.stack(frames)), clip_of, prompt, torch.from_numpy(truth).float()


def jaccard(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU (N,) of logits (N, 1, h, w), enlarged, with truth (N, S, S) bool; 1 where both are empty."""
    guess = F.interpolate(logits, size=SIDE, mode="bilinear", align_corners=False)[:, 0] > 0
    union = (guess | truth).sum((1, 2))
    return torch.where(union > 0, (guess & truth).sum((1, 2)) / union.clamp(min=1), 1.0)


@torch.no_grad()
def evaluate(model: SAM2Base, count: int, seed: int) -> dict[str, float]:
    """Mean J on `count` clips of SECONDS frames at SIDE pixels, one target each, that no training sees.

    Keys: KIND_J0 on frame 0 and KIND_J on the frames after it, from a point, a box and the true mask of frame 0;
    mask_last on the last frame; copy_J of the true mask of frame 0 copied; absent, the part of the frames without the
    target, and absent_found, the part of these where the object score says so (true mask).
    """
    rng = np.random.default_rng([seed, 200_200])
    clips: list[tuple[np.ndarray, np.ndarray]] = []
    while len(clips) < count:
        frames, masks = random_clip(rng, SECONDS, SIDE)
        able = np.flatnonzero(masks[:, 0].sum((1, 2)) >= VISIBLE)
        if len(able):
            clips.append((frames, masks[rng.choice(able)]))
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, 20):
        part = clips[start : start + 20]
        images, truth = images_tensor(np.stack([f for f, _ in part])), np.stack([m for _, m in part])
        target = torch.from_numpy(truth)
        scores: dict[str, Tensor] = {}
        for kind in ("point", "box", "mask"):
            steps = track(model, images, list(range(len(part))), make_prompt(rng, kind, truth[:, 0], ~truth[:, 0]))
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


def export(model: SAM2Base, path: Path) -> None:
    """The parameters in fp16, the buffers as they are, for samlove.sam2_build.load_sam2_weights; atomic."""
    parameters = dict(model.named_parameters())
    tensors = {n: (v.half() if n in parameters else v).contiguous() for n, v in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def plan_step(rng: np.random.Generator, done: float) -> tuple[int, int, int, str]:
    """(clips, frames, targets of a clip, prompt) of a step at `done` (0..1) of the time."""
    if done < IMAGE_PART or rng.random() < 0.2:
        return 8, 1, 3, str(rng.choice(["point", "box", "mask"], p=[0.55, 0.35, 0.1]))
    clip_part = (done - IMAGE_PART) / (1 - IMAGE_PART)
    low, high = next((low, high) for until, low, high in LENGTHS if clip_part <= until)
    length = int(rng.integers(low, high + 1))
    return max(2, 20 // length), length, 3, str(rng.choice(["point", "box", "mask"], p=[0.35, 0.15, 0.5]))


def pretrain(out: Path, minutes: float, seed: int, weights: Path | None = None, scored_clips: int = 200) -> None:
    """The whole recipe, or, from the `weights` of an earlier run, the last GO_ON of it over again; see the module.

    The scores are of `scored_clips` clips.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model: SAM2Base = instantiate_sam2(str(CONFIG))  # evaluation mode: there is no dropout, and the scores are returned
    if weights is None:
        initialise(model)
    else:
        load_sam2_weights(model, str(weights))
    model.image_encoder.to(memory_format=torch.channels_last)
    mean = copy.deepcopy(model)
    parameters: list[Tensor] = list(model.parameters())
    mean_parameters: list[Tensor] = list(mean.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    step, spent = 0, 0.0
    if (checkpoint := out / "checkpoint.pt").is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        mean.load_state_dict(state["mean"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["spent"]
    rng = np.random.default_rng([seed, 1, step])
    pool = ClipPool([seed, 2, step])
    start = time.monotonic() - spent
    saved = scored = spent
    running: dict[str, float] = {}
    while (spent := time.monotonic() - start) < 60 * minutes:
        done = spent / (60 * minutes)
        if weights is not None:
            done = 1 - GO_ON + GO_ON * done
        rate = LAST_RATE + (1 - LAST_RATE) * (0.5 + 0.5 * float(np.cos(np.pi * max(0.0, (done - 0.25) / 0.75))))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate * min(1.0, (step + 1) / WARM_UP)
        clips, length, per_clip, kind = plan_step(rng, done)
        images, clip_of, prompt, targets = make_batch(rng, pool, clips, length, per_clip, kind)
        forced = targets if rng.random() < 0.5 - done else None  # less and less, never in the second half
        loss = loss_of(track(model, images, clip_of, prompt, forced), targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(mean_parameters, parameters, max(0.004, 1 / step))
        stage, value = "image" if length == 1 else "clip", loss.item()
        running[stage] = 0.97 * running.get(stage, value) + 0.03 * value
        line: dict[str, float] = {}
        if step % 50 == 0:
            line = {name: round(value, 4) for name, value in running.items()} | {"drawn": pool.drawn}
        if spent - scored > SCORE_EVERY:
            line |= evaluate(mean, 40, seed=seed + 1)  # other clips than the final ones
            scored = spent
        if spent - saved > CHECKPOINT_EVERY:
            state = {"model": model.state_dict(), "mean": mean.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"step": step, "spent": spent}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
            export(mean, out / "sam2.safetensors")
            saved = spent
        if line:
            with open(out / "log.jsonl", "a") as log:
                print(json.dumps({"seconds": round(spent), "step": step} | line), file=log)
    pool.worker.terminate()
    export(mean, out / "sam2.safetensors")
    scores = {"minutes": minutes, "seed": seed, "steps": step, "clips": pool.drawn}
    scores |= evaluate(mean, scored_clips, seed)
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(json.dumps(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the micro profile's SAM2")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint, weights, log and scores")
    parser.add_argument("--minutes", type=float, default=51)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help="sam2.safetensors of an earlier run, to improve on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pretrain(arguments.out, arguments.minutes, arguments.seed, arguments.weights)


if __name__ == "__main__":
    main()
