"""Make the micro profile's frozen encoders: a small ViT, a small VGGish, a small RoBERTa.

The paper's encoders learned from ImageNet, AudioSet and books; none of that fits into a repository, so
the micro profile's learn a little of LAVS-synth's world from scenes of their own (never a clip of the
benchmark, never an unseen category): the ViT to tell what, which colour, how large and where each patch's
object is and whether it pulses, the VGGish to tell which voices sound, how loud and how high. Each says it in
channels of its own features, so that a fusion module finds it in minutes. RoBERTa keeps its seeded random weights:
its tokens only have to be told apart. `samlove/micro/README.md` holds the command and the scores.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from samlove.config import AudioConfig, VisualConfig
from samlove.encoders.vggish import build_vggish, log_mel
from samlove.encoders.vit import build_vit
from samlove.synth.expressions import expressions
from samlove.synth.scene import COLOURS, RADII, SECONDS, SEEN, UNSEEN, Scene, background, render, sample_scene
from samlove.synth.voice import TIMBRES, mix

STREAM = 1_000_003  # keeps these scenes apart from the benchmark's, which draw from (seed, 0..3, number)
GRID = 8  # patches a side
PATCH_SECONDS = 0.96  # a VGGish patch
PITCHES = np.log2([160.0, 270.0, 450.0, 750.0])  # the four registers of LAVS-synth's voices
OTHER = len(SEEN)  # the class of a random shape or timbre
LOGIT = 4.0  # a channel's value times this is a logit: answers stay of the size of normalised tokens
CATEGORY = {name: k for k, name in enumerate((*SEEN, "other"))}
COLOUR = {name: k for k, name in enumerate((*COLOURS, "other"))}
SIZE = {name: k for k, name in enumerate(RADII)}


class Scenes(IterableDataset):
    """An endless stream of made examples; every worker draws from a generator of its own."""

    def __init__(self, make: Callable[[np.random.Generator], Iterator[dict[str, Any]]], seed: int, kind: int) -> None:
        self.make, self.seed, self.kind = make, seed, kind

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, STREAM, self.kind, info.id if info else 0])
        while True:
            yield from self.make(rng)


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene of seen categories, in which a fifth of the things are random shapes of random colour and timbre."""
    scene = sample_scene(rng, SEEN)
    things = []
    for thing in scene.things:
        if rng.random() < 0.2:
            corners = int(rng.integers(3, 10))
            angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
            outline = rng.uniform(0.6, 1.1, (corners, 1)) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
            timbre = f"other{int(rng.integers(64))}"
            if timbre not in TIMBRES:
                weights = tuple(rng.uniform(0, 1, int(rng.integers(1, 9))))
                TIMBRES[timbre] = (weights, float(rng.choice([0, rng.uniform(2, 14)])), float(rng.uniform(0, 0.4)))
            thing = replace(thing, category=timbre, colour="other", rgb=(red, green, blue), outline=outline, hole=0.0)
        things.append(thing)
    return replace(scene, things=tuple(things))


def _kind(category: str) -> int:
    return CATEGORY.get(category, OTHER)


def patches(rng: np.random.Generator, size: int = 128, seconds: int = 3) -> Iterator[dict[str, np.ndarray]]:
    """`seconds` frames of one scene with what the ViT is to tell of each of the 8 x 8 patches, -1 where nothing is."""
    scene = random_scene(rng)
    behind = background(scene, (size, size))
    side = size // GRID
    centres = (np.arange(GRID) + 0.5) / GRID
    for t in rng.choice(SECONDS, seconds, replace=False):
        picture, masks = render(scene, int(t), (size, size), behind)
        cover = masks.reshape(len(masks), GRID, side, GRID, side).mean(axis=(2, 4))  # (K, 8, 8)
        owner, most = cover.argmax(axis=0), cover.max(axis=0)
        empty = most < 0.2
        said = {
            "category": [_kind(thing.category) for thing in scene.things],
            "colour": [COLOUR[thing.colour] for thing in scene.things],
            "size": [SIZE[thing.size] for thing in scene.things],
            "pulse": [int(thing.sounding[t]) for thing in scene.things],
        }
        field = {name: np.where(empty, -1, np.array(values)[owner]) for name, values in said.items()}
        where = np.array([thing.path[t] for thing in scene.things])[owner]  # (8, 8, 2)
        offset = where - np.stack(np.meshgrid(centres, centres), axis=-1)
        there = masks.reshape(len(masks), -1).max(axis=1)
        summary = np.zeros((2, len(CATEGORY) + len(COLOUR)), dtype=np.float32)
        for k, thing in enumerate(scene.things):
            if there[k]:
                for row in range(1 + int(thing.sounding[t])):
                    summary[row, [_kind(thing.category), len(CATEGORY) + COLOUR[thing.colour]]] = 1
        yield {
            "picture": picture,
            "cover": most.astype(np.float32),
            "offset": offset.astype(np.float32),
            "empty": empty,
            "summary": summary.reshape(-1),  # what is there, and what pulses
            **{name: value.astype(np.int64) for name, value in field.items()},
        }


class PatchReadout(nn.Module):
    """The ViT's own first channels, read as answers, and their loss; it has no weights.

    The channels left over are drawn to 0: what a frozen feature holds beside the answers only hides them from a
    fusion module that has minutes to learn in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.classes = {"category": len(CATEGORY), "colour": len(COLOUR), "size": len(SIZE), "pulse": 2}

    def forward(self, tokens: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """tokens (B, 1 + 64, dim) after the final norm; returns the loss and each part's accuracy."""
        sizes = [*self.classes.values(), 2, 1]
        out = tokens[:, 1:].unflatten(1, (GRID, GRID))  # (B, 8, 8, dim)
        *logits, offset, cover, rest = out.split([*sizes, out.shape[-1] - sum(sizes)], dim=-1)
        offset = offset / 4
        summary = tokens[:, 0, : batch["summary"].shape[1]]
        thing = ~batch["empty"]
        loss = F.mse_loss(cover[..., 0], batch["cover"]) * 5 + 0.5 * rest.square().mean()
        loss = loss + 20 * F.smooth_l1_loss(offset[thing], batch["offset"][thing], beta=0.05)
        loss = loss + F.binary_cross_entropy_with_logits(LOGIT * summary, batch["summary"]) * 2
        right = {}
        for name, logit in zip(self.classes, logits, strict=True):
            loss = loss + (2 if name == "category" else 1) * F.cross_entropy(LOGIT * logit[thing], batch[name][thing])
            loss = loss + 0.2 * logit[~thing].square().mean()  # nothing there, no answer
            right[name] = float((logit[thing].argmax(-1) == batch[name][thing]).float().mean())
        right["offset"] = float((offset[thing] - batch["offset"][thing]).detach().abs().mean())
        return loss, right


def voices(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """The ten log-mel patches of one scene's sound, with what VGGish is to tell of each.

    share: part of the patch in which each category sounds; register: loudness of each of the four pitches,
    log2 over the faintest voice, 0 where none sounds.
    """
    scene = random_scene(rng)
    mel = log_mel(mix(scene, rng).astype(np.float32) / 32768).numpy()  # (10, 1, 96, 64)
    share = np.zeros((SECONDS, len(CATEGORY)), dtype=np.float32)
    register = np.zeros((SECONDS, len(PITCHES)), dtype=np.float32)
    for thing in scene.things:
        fine = np.repeat(thing.sounding, 100)  # hundredths of a second
        part = np.array([fine[round(96 * k) : round(96 * (k + 1))].mean() for k in range(SECONDS)])
        kind, pitch = _kind(thing.category), int(np.abs(PITCHES - np.log2(thing.pitch)).argmin())
        share[:, kind] = np.maximum(share[:, kind], part)
        register[:, pitch] += part * (1 + np.log2(thing.loudness / 0.03).clip(0))
    for k in range(SECONDS):
        yield {"mel": mel[k], "share": share[k], "register": register[k]}


class VoiceReadout(nn.Module):
    """VGGish's own first values, read as answers, and their loss; the others are drawn to 0, as the ViT's."""

    def forward(self, embedding: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """embedding (B, 128) after the last ReLU; returns the loss and each part's accuracy."""
        share, register, rest = embedding.split([len(CATEGORY), len(PITCHES), 128 - len(CATEGORY) - len(PITCHES)], 1)
        loss = F.mse_loss(share, 2 * batch["share"]) * 3 + 0.5 * rest.square().mean()
        loss = loss + F.smooth_l1_loss(register, batch["register"], beta=0.5)
        right = ((share > 1) == (batch["share"] > 0.5)).float().mean()
        return loss, {"share": float(right), "register": float((register - batch["register"]).detach().abs().mean())}


def train(
    encode: Callable[[dict[str, Tensor]], Tensor],
    parameters: list,
    heads: nn.Module,
    examples: Scenes,
    batch: int,
    minutes: float,
    lr: float,
) -> dict:
    """Train for `minutes`, the rate warmed up and then falling to 0 as a cosine of the time; the last scores."""
    optimiser = torch.optim.AdamW([*parameters, *heads.parameters()], lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    begin, step = time.monotonic(), 0
    scores: dict[str, float] = {}
    for data in DataLoader(examples, batch_size=batch, num_workers=1, prefetch_factor=4):
        done = (time.monotonic() - begin) / 60 / minutes
        if done >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * done)))
        loss, right = heads(encode(data), data)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        for name, value in {"loss": float(loss.detach()), **right}.items():
            scores[name] = 0.95 * scores.get(name, value) + 0.05 * value
        if step % 50 == 0:
            print(f"{60 * minutes * done:6.0f} s  step {step}", {k: round(v, 3) for k, v in scores.items()}, flush=True)
    return {"steps": step, **{k: round(v, 4) for k, v in scores.items()}}


def _save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items()}, partial
    )
    os.replace(partial, path)


def make_vit(out: Path, minutes: float, seed: int) -> dict:
    """Train the micro ViT and write it to `out`; returns its scores on scenes it had not seen."""
    torch.manual_seed(seed)
    config = VisualConfig(
        model="vit_tiny_patch16_224",
        model_args={"embed_dim": 128, "depth": 4, "num_heads": 4},
        weights=str(out),
        image_size=128,
    )
    vit: Any = build_vit(config.model, config.model_args, config.image_size)
    if out.exists():  # a further run goes on from the last one's weights
        vit.load_state_dict({name: value.float() for name, value in load_file(out).items()})
        seed += 1000  # other scenes

    def encode(batch: dict[str, Tensor]) -> Tensor:
        pictures = batch["picture"].permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 128, 128)
        return vit.forward_features(pictures)

    scores = train(encode, list(vit.parameters()), PatchReadout(), Scenes(patches, seed, 0), 48, minutes, 1e-3)
    _save(vit, out)
    return scores


def make_vggish(out: Path, minutes: float, seed: int) -> dict:
    """Train the micro VGGish and write it to `out`; returns its scores on sounds it had not heard."""
    torch.manual_seed(seed)
    config = AudioConfig(weights=str(out), channels=16, hidden=256)
    vggish = build_vggish(config.channels, config.hidden)
    if out.exists():  # a further run goes on from the last one's weights
        vggish.load_state_dict({name: value.float() for name, value in load_file(out).items()})
        seed += 1000  # other scenes
    else:  # there are no norm layers: without this gain, nine layers of ReLU let little through
        for layer in vggish.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return vggish(batch["mel"])

    scores = train(encode, list(vggish.parameters()), VoiceReadout(), Scenes(voices, seed, 1), 100, minutes, 1e-3)
    _save(vggish, out)
    return scores


def make_roberta(out: Path, seed: int) -> None:
    """Write a two-layer RoBERTa with seeded random weights and a byte-level BPE made of LAVS-synth's sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    rng = np.random.default_rng([seed, STREAM, 2])
    said = {e.text for _ in range(2000) for e in expressions(sample_scene(rng, SEEN + UNSEEN))}
    out.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(sorted(said), vocab_size=512, special_tokens=special, show_progress=False)
    bpe.save_model(str(out))
    RobertaTokenizerFast(str(out / "vocab.json"), str(out / "merges.txt")).save_pretrained(out)
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=40,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = RobertaModel(config, add_pooling_layer=False)
    with torch.no_grad():  # so wide that the words, not their places, make most of the difference between tokens
        words, places = model.embeddings.word_embeddings.weight, model.embeddings.position_embeddings.weight
        words.normal_(0, 1.0)
        places.normal_(0, 0.3)
        words[config.pad_token_id] = 0
    model.save_pretrained(out)


def main(out: Path = Path("weights/micro"), vit_minutes: float = 15, vggish_minutes: float = 8, seed: int = 0) -> None:
    """Make the micro profile's encoders; prints the scores of each as JSON. One given 0 minutes is left as it is."""
    torch.set_num_threads(1)
    make_roberta(out / "text/roberta", seed)
    scores: dict[str, dict] = {}
    if vggish_minutes:
        scores["vggish"] = make_vggish(out / "audio/vggish.safetensors", vggish_minutes, seed)
    if vit_minutes:
        scores["vit"] = make_vit(out / "visual/vit.safetensors", vit_minutes, seed)
    print(json.dumps(scores))


if __name__ == "__main__":
    typer.run(main)
