"""The published protocols against results of the repositories' own functions, and against plain programs."""

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from samlove.errors import RequestError, SamloveError
from samlove.scoring.counts import boundary_f, count, resize_target
from samlove.scoring.protocols import PROTOCOLS, score
from tests import plain_protocols

REFERENCE = Path(__file__).parents[1] / ".." / "shared" / "refavs" / "protocol_reference.npz"
CASES = ["seen_256", "null_256", "seen_180x320", "mixed_180x320", "seen_96x128", "null_96x128", "mixed_96x128",
         "hidden_96x128"]  # fmt: skip
PLAIN = [name for name in PROTOCOLS if name != "als3p_infer"]


def blobs(seed: int, E: int, T: int, logits: tuple[int, int], target: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Smooth logits (E,T,*logits) float16 and targets (E,T,*target) that overlap; some targets are empty."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(E, T, 6, 7, generator=generator)
    large, other = (
        torch.nn.functional.interpolate(maps, shape, mode="bicubic")
        for maps, shape in ((coarse * 4, logits), (coarse + 0.5 * torch.randn(E, T, 6, 7, generator=generator), target))
    )
    masks = (other > 0.3).numpy()
    masks[torch.rand(E, T, generator=generator).numpy() < 0.25] = False
    return large.numpy().astype(np.float16), masks


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs the reference results of the repositories' functions")
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_repositories_own_functions(case):
    with np.load(REFERENCE) as reference:
        logits, target, null = (reference[f"{case}/{name}"] for name in ("logits", "target", "null"))
        expected = {name: reference[f"{case}/{name}"] for name in PROTOCOLS}
    for name in PROTOCOLS:
        found = score(logits, target, null, name)
        assert list(found) == ["J", "F", "J&F", "S"]
        np.testing.assert_allclose([*found.values()], expected[name], atol=1e-6, rtol=0, err_msg=f"{case}, {name}")


SIZES = [((20, 30), (45, 80)), ((64, 48), (50, 37)), ((33, 47), (33, 47)), ((256, 256), (60, 100)), ((5, 4), (1, 9))]


@pytest.mark.parametrize("name", PLAIN)
def test_agrees_with_a_plain_program_at_other_sizes(name):
    for seed, (small, large) in enumerate(SIZES[:1] if name == "auralsam2" else SIZES):  # slow at 1024x1024
        E, T = (7, 1) if seed % 2 else (5, 2)
        logits, target = blobs(seed, E, T, small, large)
        null = np.arange(E) % 3 == 1
        target[0] = False  # never visible
        target[null] = False
        found = score(logits, target, null, name)
        expected = plain_protocols.scores(logits, target, null, name)
        np.testing.assert_allclose([found[k] for k in "JFS"], expected, atol=2e-6, rtol=0, err_msg=f"{small}, {large}")
        assert found["J&F"] == pytest.approx((found["J"] + found["F"]) / 2)


@pytest.mark.parametrize("name", PLAIN)
def test_agrees_with_a_plain_program_on_binary_predictions(name):
    """At the size of the protocol and of the masks, where no interpolated value lies on a cut."""
    size = PROTOCOLS[name].size or 40
    if size == 1024:
        pytest.skip("the plain program is slow at this size")
    _, target = blobs(7, 3, 2, (8, 8), (size, size))
    masks = np.roll(target, 5, axis=3)
    masks[2, 0], masks[2, 1] = True, False  # everything, nothing
    null = np.array([False, False, True])
    target[2] = False
    logits = np.where(masks, 9.0, -9.0)
    expected = plain_protocols.scores(logits, target, null, name)
    np.testing.assert_allclose([score(logits, target, null, name)[k] for k in "JFS"], expected, atol=1e-6, rtol=0)


def test_als3p_infer_rounds_j_and_nothing_else():
    logits, target = blobs(3, 4, 5, (30, 40), (60, 300))
    null = np.array([False, True, False, False])
    own, exact = (score(logits, target, null, name) for name in ("als3p_infer", "simtoken"))
    assert own["S"] == exact["S"] and 0 < abs(own["J"] - exact["J"]) < 0.01
    assert own["F"] == pytest.approx(exact["F"], abs=2e-3)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_only_the_order_within_each_group_counts(name):
    logits, target = blobs(1, 9, 2, (12, 10), (20, 24))
    null = np.array([False, True, False, False, True, False, False, True, False])
    target[null] = False
    apart = np.argsort(null, kind="stable")
    expected = score(logits, target, null, name)
    assert score(logits[apart], target[apart], null[apart], name) == pytest.approx(expected, nan_ok=True, abs=1e-12)
    shown, nulls = (score(logits[part], target[part], null[part], name) for part in (~null, null))
    if name != "omniavs_all":
        assert (shown["J"], shown["F"]) == (expected["J"], expected["F"])
        assert math.isnan(nulls["J"]) and math.isnan(nulls["F"]) and math.isnan(shown["S"])
    assert nulls["S"] == pytest.approx(expected["S"], nan_ok=True)
    assert math.isnan(expected["S"]) == (name in ("omniavs", "omniavs_all", "aurora"))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_perfect_prediction_scores_fully_at_its_own_size(name):
    size = PROTOCOLS[name].size or 48
    _, target = blobs(2, 2, 2, (4, 4), (size, size))
    target[:, :, :9, :9] = True
    found = score(np.where(target, 20.0, -20.0), target, np.array([False, False]), name)
    rounding = 2e-3 if name == "als3p_infer" else 1e-6  # its recall may exceed 1
    assert found["J"] == pytest.approx(1, abs=1e-6) and found["F"] == pytest.approx(1, abs=rounding)


def test_arrays_tensors_and_float_types_give_the_same_scores():
    logits, target = blobs(4, 3, 2, (16, 16), (16, 20))
    null = np.array([False, True, False])
    expected = score(logits, target, null, "simtoken")
    for cast in (logits.astype(np.float32), logits.astype(np.float64), torch.from_numpy(logits)):
        assert score(cast, torch.from_numpy(target), torch.from_numpy(null), "simtoken") == expected
    with_gradient = torch.from_numpy(logits).float().requires_grad_()
    assert score(with_gradient, target, null, "simtoken") == expected
    assert 0 < score(torch.from_numpy(logits).bfloat16(), target, null, "simtoken")["J"] < 1
    flipped = logits[:, :, ::-1], target[:, :, ::-1]  # not contiguous
    assert score(*flipped, null, "crab_plus")["S"] == pytest.approx(score(logits, target, null, "crab_plus")["S"], 0.1)


def test_nothing_to_score_is_nan():
    for name in PROTOCOLS:
        found = score(np.zeros((0, 10, 4, 4), np.float32), np.zeros((0, 10, 8, 8), bool), np.zeros(0, bool), name)
        assert all(math.isnan(value) for value in found.values())


def test_the_target_of_a_null_expression_does_not_count():
    logits, target = blobs(5, 2, 2, (8, 8), (8, 8))
    null = np.array([True, True])
    for name in PROTOCOLS:
        expected = score(logits, np.zeros_like(target), null, name)
        assert score(logits, target, null, name) == pytest.approx(expected, nan_ok=True)


def test_invalid_inputs_are_reported():
    logits, target, null = np.zeros((2, 1, 4, 4), np.float32), np.zeros((2, 1, 8, 8), bool), np.zeros(2, bool)
    with pytest.raises(RequestError, match="no protocol 'best'; expected one of official, "):
        score(logits, target, null, "best")
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(SamloveError, match=r"logits\[1\]: expected finite logits"):
            score(np.where(np.arange(2)[:, None, None, None] == 1, bad, logits), target, null, "official")
    with pytest.raises(SamloveError, match="finite logits"):
        score(np.full((2, 1, 4, 4), 1e39), target, null, "official")
    with pytest.raises(SamloveError, match="expected logits as floats, found bool"):
        score(logits > 0, target, null, "official")
    for shapes in ((logits[:1], target, null), (logits, target[:, :0], null), (logits, target, null[:1])):
        with pytest.raises(SamloveError, match=r"\(E, T, h, w\)"):
            score(*shapes, "official")
    with pytest.raises(SamloveError, match="at least one frame"):
        score(logits[:, :0], target[:, :0], null, "official")


def test_the_example_of_the_documentation_runs_and_its_table_is_what_it_prints(capsys):
    page = (Path(__file__).parents[1] / "docs" / "protocols.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(example, "docs/protocols.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed in page and printed.count("\n") == len(PROTOCOLS)
    described = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page.split("## The protocols")[1], re.MULTILINE)
    assert [name for name, _ in described] == list(PROTOCOLS)


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [1, 3, 96, 128, 180, 256, 320, 360, 480, 640, 719, 720, 1080, 1280, 1920])
def test_nearest_targets_are_those_of_pillow_and_opencvs_formula(source):
    row = np.random.default_rng(source).random((1, source)) < 0.5
    for size in (224, 1024):
        pillow = Image.fromarray(row.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(resize_target(row, size, "centre"), np.asarray(pillow) > 0)
        opencv = [min(math.floor(i * (1 / (size / source))), source - 1) for i in range(size)]
        np.testing.assert_array_equal(resize_target(row, size, "floor")[0], row[0, opencv])
    if source == 256:
        np.testing.assert_array_equal(resize_target(np.repeat(row, 256, 0), 256, "bilinear")[0], row[0])


@pytest.mark.parametrize("shape", [(6, 9), (180, 320), (300, 255)])
def test_bilinear_targets_are_those_of_exact_arithmetic(shape):
    mask = np.random.default_rng(0).random(shape) < 0.01

    def weights(source: int) -> list[dict[int, Fraction]]:
        found = []
        for i in range(256):
            centre = max(Fraction(source, 256) * Fraction(2 * i + 1, 2) - Fraction(1, 2), Fraction(0))
            first = min(math.floor(centre), source - 1)
            pair = {first: 1 - (centre - first)}
            second = min(first + 1, source - 1)
            pair[second] = pair.get(second, Fraction(0)) + centre - first
            found.append(pair)
        return found

    rows, columns = weights(shape[0]), weights(shape[1])
    found = resize_target(mask, 256, "bilinear")
    for i, j in np.random.default_rng(1).integers(256, size=(2000, 2)):
        share = sum(a * b for y, a in rows[i].items() for x, b in columns[j].items() if mask[y, x])
        assert found[i, j] == (share * 255 >= Fraction(1, 2))


def test_counts_are_those_of_comparisons():
    logits, target = blobs(6, 1, 1, (31, 23), (31, 23))
    logits[0, 0, :4] = np.array([0, 0.5, 1, -0.0])[:, None]  # exactly on edges
    counts = count(logits[0, 0].astype(np.float32), target[0, 0])
    from samlove.scoring.counts import CURVE_LEVELS, CUT_LEVELS

    x, p = logits[0, 0].astype(np.float32), torch.from_numpy(logits[0, 0]).float().sigmoid().numpy()
    for outside_inside, of in enumerate((~target[0, 0], target[0, 0])):
        for scale, values in (("sigmoid", p), ("logit", x)):
            expected = [(values[of] >= np.float32(i / 254)).sum() for i in range(255)]
            np.testing.assert_array_equal(counts[outside_inside, CURVE_LEVELS[scale]], expected)
        cuts = {"sigmoid > 0.4": p > np.float32(0.4), "sigmoid > 0.5": p > 0.5, "logit > 0": x > 0}
        for cut, mask in cuts.items():
            assert counts[outside_inside, CUT_LEVELS[cut]] == mask[of].sum()


def test_boundaries_within_the_radius_match():
    """Radius 3 at 256x256."""
    square, empty = np.zeros((2, 256, 256), dtype=bool)
    square[50:90, 60:100] = True
    assert boundary_f(square, square) == 1 and boundary_f(empty, empty) == 1
    assert boundary_f(square, empty) == boundary_f(empty, square) == 0
    assert boundary_f(np.roll(square, 3, axis=1), square) == 1
    assert 0 < boundary_f(np.roll(square, 4, axis=1), square) < 1
    assert boundary_f(np.roll(square, 90, axis=1), square) == 0
