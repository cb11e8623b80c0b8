"""The script that trains the micro encoders: its labels fit the examples, and the bundled weights have learned them."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import samlove.model.torchvision_ops  # noqa: F401
from samlove.config import AudioConfig, TextConfig, VisualConfig, load
from samlove.features.encoders.roberta import RobertaEncoder
from samlove.features.encoders.vggish import build_vggish
from samlove.features.encoders.vit import build_vit
from samlove.micro import code
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
from samlove.synth.scene import SEEN, sample_scene

FRESH = 77  # a seed that training never uses


def batch_of(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([e[name] for e in examples])) for name in examples[0]}


@torch.no_grad()
def test_bundled_vit_recognises_what_it_sees() -> None:
    config = load(VisualConfig)
    batch = batch_of(list(islice(Examples(patches, FRESH, 0), 96)))
    vit = build_vit(config.model, config.model_args, config.image_size).eval()
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
    encoder = RobertaEncoder(load(TextConfig), torch.device("cpu"))
    texts = said_sentences(seed=0, scenes=100)
    right = []
    for text, arrays in zip(texts, encoder.encode(texts), strict=True):
        said = arrays["text"][arrays["text_mask"]].astype(np.float32)  # (tokens, WIDTH)
        assert np.abs(said - code.sentence(text)).mean() < 0.15
        right.append(((said > 0.75) == (code.sentence(text) > 0.75)).all())
    assert np.mean(right) > 0.85  # in every token and channel


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
