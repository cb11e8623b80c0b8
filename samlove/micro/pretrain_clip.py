"""Make the micro profile's small CLIP (Radford et al., 2021): the other pair of image and text encoders in Table 2.

An image encoder and a text encoder learn together which sentence belongs to which frame of a batch. The scenes are like
those of LAVS-synth, but none of them is in it; the sentences say what is seen in one frame. Like a CLIP from the web,
this one learns names of things, colours, sizes and places, and which things pulse ("sounding"). No sentence says which
thing is the loudest or the first: the words are in the vocabulary, but the network never learns their meaning.
`samlove/micro/README.md` has the command and the scores.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import samlove.model.torchvision_ops  # noqa: F401  (transformers imports torchvision)
from samlove.features.encoders.clip_image import MEAN, STD
from samlove.features.encoders.frames import normalise
from samlove.micro import code
from samlove.micro.clips import cover, random_scene
from samlove.micro.pretrain_encoders import BARELY, GRID, STREAM, Examples, Scores, said_sentences, train
from samlove.synth.expressions import LEFT, RIGHT
from samlove.synth.scene import SECONDS, Scene, render

FOLDER = Path("weights/micro/clip/clip")
SIDE = 128  # pixels of a frame
TOKENS = 40  # the longest sentence; the bundled weights have 32
BATCH = 64
POOL, USES = 4000, 4  # frames to draw from; uses of a frame, each with another sentence, as rendering takes long
PATCHED = 400  # frames whose patches determine the filters
ALONE = 0.5  # probability that a frame shows one thing alone, as photos often do
SAID = {"sounding": 0.5, "size": 0.5, "colour": 0.5, "category": 0.85, "place": 0.5}  # probability of a kind of word
WORDS: dict[str, Iterable[str]] = {
    "category": code.CATEGORY,
    "colour": code.COLOUR,
    "size": ("small", "big"),
    "place": code.SIDE,
}
QUESTIONS = {  # the kind of word that is asked for, then those that the sentence has, too
    "category": ("category",),
    "colour": ("colour",),
    "colour of a category": ("colour", "category"),
    "size of a category": ("size", "category"),
    "place of a category": ("place", "category"),
}
HOTTEST = 100.0  # the logit scale is kept below this, as in the paper

Said = dict[str, str]  # words by kind: {"colour": "red", "category": "star", "place": "left"}


def views(rng: np.random.Generator, alone: float = 0.0) -> Iterator[dict[str, Any]]:
    """One frame of each scene, and what is seen in it.

    picture (SIDE, SIDE, 3) uint8; seen: the `words` of each visible thing that there are words for, at least one.
    """
    while True:
        scene, t = random_scene(rng), int(rng.integers(SECONDS))
        if rng.random() < alone:
            scene = replace(scene, things=scene.things[:1])
        picture, masks = render(scene, t, (SIDE, SIDE))
        visible = cover(masks, GRID).max(axis=(1, 2)) >= BARELY  # (K,)
        if seen := [said for k in np.flatnonzero(visible) if (said := words(scene, int(k), t))]:
            yield {"picture": picture, "seen": seen}


def words(scene: Scene, k: int, t: int) -> Said:
    """What can be said about thing k in second t, by kind of word; without the kinds for which there is no word."""
    thing = scene.things[k]
    x = thing.path[t, 0]
    everything = {
        "sounding": "sounding" if thing.pulsing[t] else "",
        "size": "" if thing.size == "medium" else thing.size,
        "colour": thing.colour if thing.colour in code.COLOUR else "",
        "category": thing.category if thing.category in code.CATEGORY else "",
        "place": "left" if x < LEFT else "right" if x > RIGHT else "",
    }
    return {kind: word for kind, word in everything.items() if word}


def phrase(said: Said) -> str:
    """Such as "the red star on the left", or "the red object on the left" without a category."""
    adjectives = [said[kind] for kind in ("sounding", "size", "colour") if kind in said]
    name = " ".join(["the", *adjectives, said.get("category", "object")])
    return f"{name} on the {said['place']}" if "place" in said else name


def sentence(rng: np.random.Generator, seen: list[Said]) -> str:
    """A true sentence about some things of a frame, each with some of its words: "The star and the red object." """
    count = int(rng.integers(1, min(len(seen), 3) + 1))
    parts = []
    for k in rng.choice(len(seen), count, replace=False):
        kept = {kind: word for kind, word in seen[k].items() if rng.random() < SAID[kind]}
        parts.append(kept or seen[k])
    return say(parts)


def say(things: list[Said]) -> str:
    """A sentence that names things, such as "The red star, the moon and the object on the left." """
    *first, last = [phrase(said) for said in things]
    text = f"{', '.join(first)} and {last}" if first else last
    return f"T{text[1:]}."


def choices(rng: np.random.Generator, seen: list[Said], asked: str, *also: str) -> list[str]:
    """A true sentence about one thing of a frame, then false ones, in which the word of the kind `asked` is replaced.

    also: kinds whose words the sentences have, too. Empty if no thing has words of all these kinds. Sentences that are
    true of another thing are left out.
    """
    known = [said for said in seen if {asked, *also} <= said.keys()]
    if not known:
        return []
    thing = known[int(rng.integers(len(known)))]
    true = {kind: thing[kind] for kind in (asked, *also)}
    others = [true | {asked: word} for word in WORDS[asked]]
    false = [other for other in others if not any(other.items() <= said.items() for said in seen)]
    return [say([said]) for said in (true, *false)]


def load(folder: Path) -> tuple[Any, Any]:
    """The model, fp32, and the tokenizer in a folder."""
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Any, seed: int, frames: int = 1000) -> dict[str, tuple[float, float]]:
    """How often CLIP chooses the true sentence, by question, on `frames` new frames; and the score of chance."""
    rng = np.random.default_rng([seed, STREAM, 9])
    some = list(islice(views(rng), frames))
    pictures = torch.from_numpy(np.stack([view["picture"] for view in some]))
    scores = {}
    for name, kinds in QUESTIONS.items():
        asked = [(i, said) for i, view in enumerate(some) if (said := choices(rng, view["seen"], *kinds))]
        texts = sorted({text for _, said in asked for text in said})
        tokens = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        logits = similarity(model, pictures, tokens)  # (frames, texts)
        right = [int(logits[i, [texts.index(text) for text in said]].argmax()) == 0 for i, said in asked]
        chance = float(np.mean([1 / len(said) for _, said in asked]))
        scores[name] = (round(float(np.mean(right)), 4), round(chance, 4))
    return scores


@torch.no_grad()
def retrieval(model: Any, tokenizer: Any, seed: int, among: int, times: int = 20) -> Scores:
    """How often a frame finds its sentence and a sentence its frame, `among` pairs of new scenes; chance: 1 / among."""
    rng = np.random.default_rng([seed, STREAM, 11])
    fresh = views(rng)
    found = []
    for _ in range(times):
        some = list(islice(fresh, among))
        texts = [sentence(rng, view["seen"]) for view in some]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        pictures = torch.from_numpy(np.stack([view["picture"] for view in some]))
        found.append(contrast(similarity(model, pictures, tokens), {})[1])
    return {name: round(float(np.mean([each[name] for each in found])), 4) for name in found[0]}


def make_tokenizer(folder: Path, texts: list[str]) -> Any:
    """CLIP's tokenizer, lower-case byte-level BPE, with whole words of `texts` as tokens; written to a folder."""
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    ends = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank = CLIPTokenizer().backend_tokenizer  # normalises and splits as OpenAI's
    trainer = BpeTrainer(
        vocab_size=1000, special_tokens=[], initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    blank.train_from_iterator(texts, trainer)
    merges: Any = [tuple(pair) for pair in json.loads(blank.to_str())["model"]["merges"]]
    names = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *ends]  # the order of OpenAI's
    tokenizer = CLIPTokenizer(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def build(tokenizer: Any) -> Any:
    """An untrained transformers CLIPModel for frames of SIDE pixels: 4 image blocks and 2 text blocks of 128."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": code.WIDTH, "num_attention_heads": 4, "projection_dim": code.WIDTH}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"num_hidden_layers": 2, "intermediate_size": 256, "max_position_embeddings": TOKENS}
    vision = {"num_hidden_layers": 4, "intermediate_size": 512, "image_size": SIDE, "patch_size": SIDE // GRID}
    return CLIPModel(
        CLIPConfig(
            text_config={**sizes, **ends, **text, "vocab_size": len(tokenizer)},
            vision_config={**sizes, **vision},
            projection_dim=code.WIDTH,
        )
    )


@torch.no_grad()
def prepare(model: Any, seed: int) -> None:
    """Fix the projection of patches to their first principal components, and make positions as distinct as patches.

    With a trained projection the loss fell more slowly: to 3.80 after 250 steps, against 3.66 (one run each). Chen et
    al. (2021, "An Empirical Study of Training Self-Supervised Vision Transformers") fix theirs, too. Each component is
    scaled to variance 1. Positions with the usual standard deviation of 0.02 were hardly learned beside that; the
    README has the scores of the two runs, which also differ in length and pool.
    """
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight)
    filters = model.vision_model.embeddings.patch_embedding.weight.requires_grad_(False)  # (WIDTH, 3, P, P)
    rng = np.random.default_rng([seed, STREAM, 10])
    pictures = torch.from_numpy(np.stack([view["picture"] for view in islice(views(rng), PATCHED)]))
    pixels = normalise(pictures.permute(0, 3, 1, 2), MEAN, STD)
    patches = F.unfold(pixels, filters.shape[-1], stride=filters.shape[-1]).mT.flatten(0, 1)  # (PATCHED * 16, 3 P^2)
    torch.manual_seed(seed)
    _, size, directions = torch.pca_lowrank(patches, len(filters), niter=4)
    filters.copy_((directions / size * len(patches) ** 0.5).T.reshape(filters.shape))


def similarity(model: Any, pictures: Tensor, tokens: Tensor) -> Tensor:
    """uint8 pictures (B, SIDE, SIDE, 3) and token numbers (C, L) -> their scaled cosines (B, C)."""
    pixels = normalise(pictures.permute(0, 3, 1, 2), MEAN, STD)
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image


def contrast(logits: Tensor, _: dict[str, Tensor]) -> tuple[Tensor, Scores]:
    """Similarities (B, B) of frames and sentences -> InfoNCE in both directions, and how often each finds its own."""
    own = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    right = {"sentence": logits.argmax(1), "frame": logits.argmax(0)}
    return loss, {name: float((best == own).float().mean()) for name, best in right.items()}


def make_clip(folder: Path, minutes: float, seed: int) -> Scores:
    """Train a CLIP and write it to a folder in transformers' format, fp16.

    Returns running means within batches: rather too good, because a frame is used several times.
    """
    scratch = folder.with_suffix(".partial")
    tokenizer = make_tokenizer(scratch, said_sentences(seed))

    def pairs(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        fresh = views(rng, ALONE)
        pool = list(islice(fresh, POOL))
        while True:
            pool[int(rng.integers(POOL))] = next(fresh)
            for k in rng.choice(POOL, USES, replace=False):
                text = sentence(rng, pool[k]["seen"])
                tokens = tokenizer(text, padding="max_length", truncation=True, max_length=TOKENS)
                yield {"picture": pool[k]["picture"], "tokens": np.array(tokens["input_ids"])}

    torch.manual_seed(seed)
    model = build(tokenizer)
    prepare(model, seed)

    def encode(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(HOTTEST)))
        ends = (batch["tokens"] == tokenizer.eos_token_id).int().argmax(1)
        return similarity(model, batch["picture"], batch["tokens"][:, : int(ends.max()) + 1])

    scores = train(
        encode, [p for p in model.parameters() if p.requires_grad], contrast, Examples(pairs, seed, 8), BATCH, minutes
    )
    model.half().save_pretrained(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return scores


def main(folder: Path = FOLDER, minutes: float = 15, seed: int = 0) -> None:
    """Make the CLIP of the micro profile's ablations, and print its scores as JSON."""
    torch.set_num_threads(1)
    scores = make_clip(folder, minutes, seed)
    model, tokenizer = load(folder)
    new = {f"among {among}": retrieval(model, tokenizer, seed, among) for among in (10, 64)}
    print(json.dumps({"training": scores, "zero_shot": zero_shot(model, tokenizer, seed), **new}))


if __name__ == "__main__":
    typer.run(main)
