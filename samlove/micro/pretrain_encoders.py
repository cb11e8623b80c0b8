"""Make the micro profile's frozen encoders: a small ViT, a small VGGish, a small RoBERTa.

The paper's encoders were trained on ImageNet, AudioSet and books, which do not fit into a repository. The micro
profile's encoders are trained on generated scenes and expressions like those of LAVS-synth, but on none of its videos.
They learn to express in the code of `samlove.micro.code` what each patch shows, what each second sounds like, and what
each expression asks for. `samlove/micro/README.md` has the commands and the scores.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import AudioConfig, VisualConfig, load
from samlove.features.encoders.timm_image import build_timm
from samlove.features.encoders.vggish import build_vggish, log_mel
from samlove.micro import code
from samlove.micro.clips import cover, random_scene
from samlove.micro.export import export
from samlove.model.weights import load_into, load_state_dict
from samlove.synth.expressions import expressions
from samlove.synth.scene import SECONDS, SEEN, UNSEEN, background, render, sample_scene
from samlove.synth.voice import mix

STREAM = 1_000_003  # separates these scenes from LAVS-synth's, which are seeded by (seed, 0..3, number)
GRID = 4  # patches per side
BARELY = 0.08  # of a patch: an object that covers less does not count

Scores = dict[str, float]


class Examples(IterableDataset):
    """An endless stream of generated examples; every worker has its own random generator."""

    def __init__(self, make: Callable[[np.random.Generator], Iterator[dict[str, Any]]], seed: int, kind: int) -> None:
        self.make, self.seed, self.kind = make, seed, kind

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        info = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, STREAM, self.kind, info.id if info else 0])
        while True:
            yield from self.make(rng)


def patches(rng: np.random.Generator, size: int = 128, seconds: int = 3) -> Iterator[dict[str, np.ndarray]]:
    """`seconds` frames of one scene, each with the code of each patch (0 if nothing is there) and of the whole frame.

    picture (size, size, 3) uint8; patches (GRID^2, WIDTH), cls (WIDTH,) float32; there (GRID^2,) bool; category and
    colour (GRID^2,), numbers, -1 for things of no category.
    """
    scene = random_scene(rng)
    behind = background(scene, (size, size))
    numbers = {
        "category": np.array([_number(code.CATEGORY, thing.category) for thing in scene.things]),
        "colour": np.array([_number(code.COLOUR, thing.colour) for thing in scene.things]),
    }
    for t in rng.choice(SECONDS, seconds, replace=False):
        picture, masks = render(scene, int(t), (size, size), behind)
        covered = cover(masks, GRID).reshape(len(masks), -1)  # (K, 16)
        owner, most = covered.argmax(axis=0), covered.max(axis=0)
        there = most >= BARELY
        things = code.sight(scene, int(t))  # (K, WIDTH)
        said = things[owner] * there[:, None]
        said[:, code.COVER] = 2 * most
        cls = np.zeros(code.WIDTH, dtype=np.float32)
        visible = np.any(masks.reshape(len(masks), -1), axis=1)
        cls[code.SEEN_OF] = (things[:, code.SEEN_OF] * visible[:, None]).max(axis=0)
        named = {name: values[owner] for name, values in numbers.items()}
        yield {"picture": picture, "patches": said, "cls": cls, "there": there, **named}


def _number(names: dict[str, Any], name: str) -> int:
    return list(names).index(name) if name in names else -1


def voices(rng: np.random.Generator, seconds: int = 5) -> Iterator[dict[str, np.ndarray]]:
    """`seconds` log-mel patches (1, 96, 64) of one scene's sound, each with its code (WIDTH,) float32."""
    scene = random_scene(rng)
    mel = log_mel(mix(scene, rng).astype(np.float32) / 32768).numpy()  # (10, 1, 96, 64)
    said = code.sound(scene)
    for t in rng.choice(SECONDS, seconds, replace=False):
        yield {"mel": mel[t], "said": said[t]}


def sight_loss(tokens: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Scores]:
    """tokens (B, 1 + 16, WIDTH) after the final norm -> the loss and scores of the patches that show something: the
    fractions with correct category, colour and pulse, and the error of the centre as a fraction of the frame."""
    cls, said = tokens[:, 0], tokens[:, 1:]
    weight = torch.full((code.WIDTH,), 0.15)  # also draws channels without a meaning to 0: noise in them would
    weight[code.SEEN_OF] = weight[code.COVER] = 1.0  # hide the others from a fusion module that trains for minutes
    weight[code.WHERE] = 3.0
    loss = ((said - batch["patches"]) ** 2 * weight).sum(-1).mean() / 12 + F.mse_loss(cls, batch["cls"])
    scores = {}
    logits_of = {"category": code.category_logits(said), "colour": said[..., list(code.COLOUR.values())]}
    for name, share in (("category", 4.0), ("colour", 1.0)):
        known = batch["there"] & (batch[name] >= 0)
        logits, truth = logits_of[name][known], batch[name][known]
        loss = loss + share * F.cross_entropy(logits, truth)
        scores[name] = float((logits.argmax(-1) == truth).float().mean())
    seen, true = said[batch["there"]].detach(), batch["patches"][batch["there"]]
    pulse = code.KIND["sounding"]
    scores["pulse"] = float(((seen[:, pulse] > 1.5) == (true[:, pulse] > 1.5)).float().mean())
    centre = slice(code.WHERE.start, code.WHERE.start + 2)
    scores["centre"] = float((seen[:, centre] - true[:, centre]).abs().mean()) / 3
    return loss, scores


def sound_loss(heard: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Scores]:
    """heard (B, WIDTH) before the last ReLU -> the loss and scores of the sounding seconds: the fractions in which the
    loudest and the lowest voice are identified, and the errors of loudness and pitch in octaves.

    Values that the ReLU will set to 0 do not count. Training through the ReLU instead would leave dead channels.
    """
    said = batch["said"]
    off = torch.where(said > 0, heard - said, heard.clamp(min=0))
    loss = (off**2).sum(-1).mean() / 4
    scores = {}
    for name, first in (("loudest", 0), ("lowest", code.LOW)):
        voice, true = (values[:, first : first + code.TRAITS] for values in (heard.clamp(min=0), said))
        named = true.amax(1) > 1.2
        logits, truth = code.category_logits(voice[named]), code.category_logits(true[named]).argmax(1)
        loss = loss + 2 * F.cross_entropy(logits, truth)
        scores[name] = float((logits.argmax(1) == truth).float().mean())
    sounds = said[:, code.KIND["sounding"]] > 0
    missed = off.detach()[sounds].abs().mean(0) / 3.6
    return loss, {
        **scores,
        "loudness": float(missed[code.KIND["loudest"]]) * code.RANGE,
        "pitch": float(missed[code.KIND["lowest"]]) * code.PITCH_RANGE,
    }


def train(
    encode: Callable[[dict[str, Tensor]], Tensor],
    parameters: list[nn.Parameter],
    judge: Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Scores]],
    examples: Examples,
    batch: int,
    minutes: float,
) -> Scores:
    """Train for `minutes`, with warm-up and cosine decay of the learning rate; returns running mean scores.

    At least one step is done.
    """
    lr = 1e-3
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02, betas=(0.9, 0.98))
    begin, step = time.monotonic(), 0
    scores: Scores = {}
    for data in DataLoader(examples, batch_size=batch, num_workers=1, prefetch_factor=6):
        done = min((time.monotonic() - begin) / 60 / minutes, 1.0)
        if done == 1 and step:
            break
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * done)))
        loss, right = judge(encode(data), data)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        for name, value in {"loss": float(loss.detach()), **right}.items():
            scores[name] = 0.97 * scores.get(name, value) + 0.03 * value
        if step % 100 == 0:
            print(f"{60 * minutes * done:6.0f} s  step {step}", {k: round(v, 3) for k, v in scores.items()}, flush=True)
    return {"steps": step, **{k: round(v, 4) for k, v in scores.items()}}


def _load_existing(model: nn.Module, path: Path) -> None:
    load_into(model, load_state_dict(path), path, "this network")


def make_vit(config: VisualConfig, minutes: float, seed: int, again: bool = False) -> Scores:
    """Train the micro ViT, or train the existing one `again`, and write it; returns scores on frames new to it."""
    torch.manual_seed(seed)
    vit: Any = build_timm(config.model, config.model_args, config.image_size)
    if again:
        _load_existing(vit, Path(config.weights))

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return vit.forward_features(batch["picture"].permute(0, 3, 1, 2).float() / 127.5 - 1)  # (B, 1 + 16, WIDTH)

    scores = train(encode, list(vit.parameters()), sight_loss, Examples(patches, seed, 7), 12, minutes)
    export(vit, Path(config.weights))
    return scores


def make_vggish(config: AudioConfig, minutes: float, seed: int, again: bool = False) -> Scores:
    """Train the micro VGGish, or train the existing one `again`, and write it; returns scores on sounds new to it."""
    torch.manual_seed(seed)
    vggish = build_vggish(config.channels, config.hidden, pre_relu=True)
    for layer in vggish.modules():
        # There are no norm layers: without this gain, little signal would pass nine layers of ReLU.
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if again:
        _load_existing(vggish, Path(config.weights))
    scores = train(
        lambda batch: vggish(batch["mel"]),
        list(vggish.parameters()),
        sound_loss,
        Examples(voices, seed, 1),
        40,
        minutes,
    )
    export(vggish, Path(config.weights))
    return scores


def said_sentences(seed: int, scenes: int = 2000) -> list[str]:
    """The expressions for `scenes` random scenes of all categories: nearly all that LAVS-synth can contain."""
    rng = np.random.default_rng([seed, STREAM, 2])
    return sorted({e.text for _ in range(scenes) for e in expressions(sample_scene(rng, SEEN + UNSEEN))})


def make_roberta(out: Path, seed: int, steps: int = 1500) -> Scores:
    """Train a two-layer RoBERTa, with a byte-level BPE of whole words, to output an expression's code in each token."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    texts = said_sentences(seed)
    out.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(texts, vocab_size=512, min_frequency=1, special_tokens=special, show_progress=False)
    bpe.save_model(str(out))
    tokenizer = RobertaTokenizerFast(str(out / "vocab.json"), str(out / "merges.txt"))
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=code.WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=40,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = RobertaModel(config, add_pooling_layer=False)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    said = torch.from_numpy(np.stack([code.sentence(text) for text in texts]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 50, 1 - step / steps)
        some = torch.randperm(len(texts), generator=generator)[:64]
        mask = tokens["attention_mask"][some]
        hidden = model(input_ids=tokens["input_ids"][some], attention_mask=mask).last_hidden_state  # (64, L, WIDTH)
        off = (hidden - said[some, None]) ** 2
        loss = (off.mean(-1) * mask).sum() / mask.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(out)
    return {"sentences": len(texts), "steps": steps, "squared_error": round(float(loss.detach()), 5)}


def main(
    vit_minutes: float = 42, vggish_minutes: float = 20, roberta_steps: int = 1500, seed: int = 0, again: bool = False
) -> None:
    """Make the encoders of the micro profile's configuration, and print their scores as JSON. 0 skips an encoder.

    again: continue ViT and VGGish from their existing weights.
    """
    torch.set_num_threads(1)
    configs = Path("configs")
    scores: dict[str, Scores] = {}
    if roberta_steps:
        scores["roberta"] = make_roberta(Path("weights/micro/text/roberta"), seed, roberta_steps)
    if vggish_minutes:
        scores["vggish"] = make_vggish(load(AudioConfig, configs), vggish_minutes, seed, again)
    if vit_minutes:
        scores["vit"] = make_vit(load(VisualConfig, configs), vit_minutes, seed, again)
    print(json.dumps(scores))


if __name__ == "__main__":
    typer.run(main)
