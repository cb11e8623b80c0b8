"""Configuration: every profile is readable, and a wrong value is refused with its file named."""

import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from samlove.config import SECTIONS, DatasetConfig, FusionConfig, TrainConfig, active_profile, load
from samlove.errors import RequestError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))


@pytest.mark.parametrize("profile", ["micro", "refavs"])
def test_every_section_of_a_profile_loads(configs: Path, profile: str) -> None:
    (configs / "profile.yaml").write_text(f"profile: {profile}\n")
    assert active_profile(configs) == profile
    assert {path.stem for path in (configs / profile).glob("*.yaml")} == set(SECTIONS)
    for name in SECTIONS:
        load(SECTIONS[name], configs)


def test_the_repository_selects_the_demo_profile() -> None:
    assert active_profile(CONFIGS) == "micro"


def test_refavs_is_the_papers_configuration(configs: Path) -> None:
    (configs / "profile.yaml").write_text("profile: refavs\n")
    train, fusion = load(TrainConfig, configs), load(FusionConfig, configs)
    assert (train.lr, train.weight_decay, train.warmup_steps) == (1e-4, 0, 100)  # section 4.1
    assert (train.loss.bce, train.loss.dice, train.loss.object_score) == (1, 1, 0)  # Eq. 5
    assert (fusion.blocks, fusion.seg_tokens, fusion.prompt, fusion.accumulate_cls) == (6, 1, "seg", True)


def test_the_dataset_is_where_dvc_watches_it(configs: Path) -> None:
    assert load(DatasetConfig, configs).root == "data/dataset/micro"
    (configs / "micro" / "dataset.yaml").write_text("root: /elsewhere\n")
    with pytest.raises(RequestError, match=r"micro/dataset.yaml: root is not a setting; link .* data/dataset/micro"):
        load(DatasetConfig, configs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block: 6\n", r"block: no such setting, found 6"),
        ("blocks: 0\n", r"blocks: .*greater than 0, found 0"),
        ("blocks: many\n", r"blocks: .*integer.*found 'many'"),
        ("prompt: average\n", r"prompt: .*'seg' or 'mean', found 'average'"),
        ("- blocks\n", r"expected keys and values, found a list"),
        ("", r"expected keys and values, found an empty file"),
        ("blocks: [\n", r"not YAML"),
    ],
)
def test_wrong_values_are_one_line_that_names_the_file(configs: Path, text: str, message: str) -> None:
    path = configs / "micro" / "fusion.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        load(FusionConfig, configs)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_unknown_profile_is_an_error_that_lists_the_profiles(configs: Path) -> None:
    (configs / "dataset").mkdir()  # a reserved name: data/dataset holds the datasets of all profiles
    (configs / "profile.yaml").write_text("profile: macro\n")
    with pytest.raises(RequestError, match=r"\['micro', 'refavs'\], found .*macro"):
        load(FusionConfig, configs)


def test_error_for_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such configuration file; run from the root of the repository"):
        load(FusionConfig, tmp_path)


def test_error_for_a_missing_section_says_where_to_get_it(configs: Path) -> None:
    (configs / "micro" / "fusion.yaml").unlink()
    with pytest.raises(
        RequestError, match="micro/fusion.yaml: no such configuration file; copy it from another profile"
    ):
        load(FusionConfig, configs)


def test_values_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        FusionConfig().blocks = 2
