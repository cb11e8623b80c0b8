"""The script that trains the micro encoders: its labels fit the examples, and the bundled weights have learned them."""

import re
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import AudioConfig, TextConfig, VisualConfig, load
from samlove.features.encoders.clip_image import ClipImageEncoder
from samlove.features.encoders.text import TextEncoder
from samlove.features.encoders.timm_image import build_timm
from samlove.features.encoders.vggish import build_vggish
from samlove.micro import code, pretrain_clip
from samlove.micro.pretrain_encoders import (
    Examples,
    make_roberta,
    patches,
    said_sentences,
    sight_loss,
    sound_loss,
    voices,
)
from samlove.model.weights import load_state_dict
from samlove.synth.scene import SEEN, render, sample_scene

FRESH = 77  # a seed that training never uses

CLIP = "weights/micro/clip/clip"  # as in configs/micro/ablations.yaml


def batch_of(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([e[name] for e in examples])) for name in examples[0]}


@torch.no_grad()
def test_bundled_vit_recognises_what_it_sees() -> None:
    config = load(VisualConfig)
    batch = batch_of(list(islice(Examples(patches, FRESH, 0), 96)))
    vit = build_timm(config.model, config.model_args, config.image_size).eval()
    vit.load_state_dict(load_state_dict(Path(config.weights)))
    pictures = batch["picture"].permute(0, 3, 1, 2).float() / 127.5 - 1  # (96, 3, 128, 128)
    _, scores = sight_loss(vit.forward_features(pictures), batch)
    assert scores["category"] > 0.8 and scores["colour"] > 0.9 and scores["pulse"] > 0.9 and scores["centre"] < 0.07


@torch.no_grad()
def test_bundled_vggish_recognises_what_it_hears() -> None:
    config = load(AudioConfig)
    batch = batch_of(list(islice(Examples(voices, FRESH, 0), 200)))
    vggish = build_vggish(config.channels, config.hidden, pre_relu=True).eval()
    vggish.load_state_dict(load_state_dict(Path(config.weights)))
    _, scores = sound_loss(vggish(batch["mel"]), batch)
    assert scores["loudest"] > 0.9 and scores["lowest"] > 0.75 and scores["loudness"] < 0.5 and scores["pitch"] < 0.5


def test_bundled_roberta_recognises_what_is_asked() -> None:
    encoder = TextEncoder(load(TextConfig), torch.device("cpu"))
    texts = said_sentences(seed=0, scenes=100)
    right = []
    for text, arrays in zip(texts, encoder.encode(texts), strict=True):
        said = arrays["text"][arrays["text_mask"]].astype(np.float32)  # (tokens, WIDTH)
        assert np.abs(said - code.sentence(text)).mean() < 0.15
        right.append(((said > 0.75) == (code.sentence(text) > 0.75)).all())
    assert np.mean(right) > 0.85  # in every token and channel


@pytest.mark.slow
def test_words_are_whole_tokens_and_roberta_learns_the_code(tmp_path: Path) -> None:
    begun, learned = (make_roberta(tmp_path, seed=1, steps=steps)["squared_error"] for steps in (1, 60))
    assert learned < 0.9 * begun
    from transformers import RobertaTokenizerFast

    tokenizer = RobertaTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.tokenize("The object making the loudest sound.") == [
        "The", "Ġobject", "Ġmaking", "Ġthe", "Ġloudest", "Ġsound", "."
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "channels"),
    [
        ("The red star on the left.", [*code.CATEGORY["star"], code.COLOUR["red"], code.SIDE["left"]]),
        (
            "The object on the right of the moon.",
            [code.BESIDE["right"], *(code.REFERENCE + trait for trait in code.CATEGORY["moon"])],
        ),
        ("The source of the sound.", [code.KIND["sounding"]]),
        ("The object that didn't make any sound.", [code.KIND["silent"]]),
        ("The last object to make a sound.", [code.KIND["last"]]),
        ("The object that keeps making sound at all times.", [code.KIND["always"]]),
    ],
)
def test_code_of_a_sentence(text: str, channels: list[int]) -> None:
    assert sorted(np.flatnonzero(code.sentence(text))) == sorted(channels)


def test_traits_of_the_seen_categories_describe_the_unseen_ones() -> None:
    shared = code.TRAIT_TABLE @ code.TRAIT_TABLE.T
    assert set(shared[~np.eye(len(shared), dtype=bool)]) <= {0.0, 2.0}  # of four traits: easy to tell apart
    assert np.linalg.matrix_rank(code.TRAIT_TABLE[: len(SEEN)]) == code.TRAITS


def test_code_of_sight_and_sound_follow_the_scene() -> None:
    rng = np.random.default_rng(5)
    scene = next(s for s in iter(lambda: sample_scene(rng, SEEN), None) if sum(t.sounding.any() for t in s.things) > 1)
    for t in range(10):
        for thing, row in zip(scene.things, code.sight(scene, t), strict=True):
            assert list(np.flatnonzero(row[: code.TRAITS])) == code.CATEGORY[thing.category]
            assert (row[code.KIND["sounding"]] > 0) == thing.sounding[t]
            assert np.allclose(row[code.WHERE][:2] / 1.5, 2 * thing.path[t] - 1)
    heard = code.sound(scene)
    assert (heard >= 0).all()
    sounding = [thing for thing in scene.things if thing.sounding.any()]
    loudest, lowest = max(sounding, key=lambda thing: thing.loudness), min(sounding, key=lambda thing: thing.pitch)
    for thing, kind, first in (loudest, "loudest", 0), (lowest, "lowest", code.LOW):
        traits = heard[int(heard[:, code.KIND[kind]].argmax()), first : first + code.TRAITS]
        assert sorted(np.argsort(traits)[-4:]) == code.CATEGORY[thing.category]


def clip_encoders(folder: str) -> tuple[ClipImageEncoder, TextEncoder]:
    """With the settings of the micro profile, as the ablation has them."""
    cpu = torch.device("cpu")
    return (
        ClipImageEncoder(load(VisualConfig).model_copy(update={"encoder": "clip", "weights": folder}), cpu),
        TextEncoder(load(TextConfig).model_copy(update={"weights": folder}), cpu),
    )


def test_bundled_clip_encodes_frames_and_expressions(tmp_path: Path) -> None:
    images, texts = clip_encoders(CLIP)
    picture, _ = render(sample_scene(np.random.default_rng(FRESH), SEEN), 0, (160, 120))
    Image.fromarray(picture).save(tmp_path / "0.jpg")
    visual = images.encode([images.load([tmp_path / "0.jpg"] * 3)])[0]["visual"]
    assert visual.shape == (3, 17, code.WIDTH) and np.isfinite(visual).all()
    said = ["The star.", "The sounding object on the left of the hourglass."]
    short, long = texts.encode(said)
    assert short["text"].shape == long["text"].shape == (25, code.WIDTH)
    assert short["text_mask"].sum() == 2 + 3 and long["text_mask"].sum() == 2 + 10  # whole words and the full stop


def test_every_word_of_lavs_synth_is_a_token_of_the_bundled_clip() -> None:
    _, tokenizer = pretrain_clip.load(Path(CLIP))
    assert tokenizer.tokenize("It Didn't.") == ["i", "t</w>", "didn</w>", "'t</w>", ".</w>"]  # "it" is in no expression
    words = {word for text in said_sentences(seed=0, scenes=100) for word in re.findall(r"[a-z]+|'t", text.lower())}
    assert {f"{word}</w>" for word in words - {"t"}} <= set(tokenizer.get_vocab())


def test_bundled_clip_chooses_the_true_sentence() -> None:
    model, tokenizer = pretrain_clip.load(Path(CLIP))
    scores = pretrain_clip.zero_shot(model, tokenizer, FRESH, frames=400)
    margin = {name: score - chance for name, (score, chance) in scores.items()}
    assert margin["colour"] > 0.4 and margin["colour of a category"] > 0.25 and margin["place of a category"] > 0.12


def test_bundled_clip_finds_the_sentence_of_a_frame() -> None:
    scores = pretrain_clip.retrieval(*pretrain_clip.load(Path(CLIP)), FRESH, among=10)
    assert scores["sentence"] > 0.25 and scores["frame"] > 0.25  # chance: 0.1


@pytest.mark.parametrize(
    ("seen", "sentence"),
    [
        ([{"category": "star"}], "The star."),
        ([{"place": "left"}], "The object on the left."),
        ([{"colour": "red", "size": "big", "category": "moon"}, {"sounding": "sounding"}],
         "The big red moon and the sounding object."),
        ([{"category": "star"}, {"category": "ring", "place": "right"}, {"colour": "red"}],
         "The star, the ring on the right and the red object."),
    ],
)  # fmt: skip
def test_sentences_about_what_is_seen(seen: list[dict[str, str]], sentence: str) -> None:
    assert pretrain_clip.say(seen) == sentence


def test_false_sentences_are_true_of_nothing() -> None:
    seen = [{"category": "star", "colour": "red"}, {"category": "moon", "colour": "blue", "place": "left"}]
    choices = partial(pretrain_clip.choices, np.random.default_rng(0), seen)
    true, *false = choices("colour")
    assert true in ("The red object.", "The blue object.") and len(false) == len(code.COLOUR) - 2
    true, *false = choices("colour", "category")
    assert true in ("The red star.", "The blue moon.") and len(false) == len(code.COLOUR) - 1
    assert choices("place", "category") == ["The moon on the left.", "The moon on the right."]
    assert choices("size") == []


def test_the_command_writes_a_clip_in_the_format_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("POOL", 40), ("PATCHED", 40), ("BATCH", 8)):
        monkeypatch.setattr(pretrain_clip, name, few)
    monkeypatch.setattr(pretrain_clip, "said_sentences", partial(said_sentences, scenes=100))
    scores = pretrain_clip.make_clip(tmp_path / "clip", minutes=0.01, seed=1)
    assert scores["steps"] >= 1 and 0 < scores["loss"] < 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip"]
    for encoder in clip_encoders(str(tmp_path / "clip")):
        assert encoder.network


@pytest.mark.slow
def test_an_untrained_clip_learns_which_sentence_belongs_to_which_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_clip, "PATCHED", 40)
    tokenizer = pretrain_clip.make_tokenizer(tmp_path, said_sentences(seed=0, scenes=100))
    torch.manual_seed(0)
    model = pretrain_clip.build(tokenizer)
    pretrain_clip.prepare(model, seed=0)
    rng = np.random.default_rng(FRESH)
    batch = list(islice(pretrain_clip.views(rng), 8))
    pictures = torch.from_numpy(np.stack([view["picture"] for view in batch]))
    texts = [pretrain_clip.say(view["seen"]) for view in batch]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for _ in range(40):
        loss, _ = pretrain_clip.contrast(pretrain_clip.similarity(model, pictures, tokens), {})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    _, right = pretrain_clip.contrast(pretrain_clip.similarity(model, pictures, tokens), {})
    assert right == {"sentence": 1.0, "frame": 1.0}
