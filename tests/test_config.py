"""Configuration: every profile is readable, and a wrong value is refused with its file named."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from dvc.utils.serialize import load_yaml
from pydantic import ValidationError

from samlove.config import (
    CLUSTERS,
    SECTIONS,
    DatasetConfig,
    FusionConfig,
    TextConfig,
    TrainConfig,
    active_profile,
    load,
    load_cluster,
)
from samlove.errors import RequestError, SamloveError
from samlove.train import train
from tests import tiny_training as tiny

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
    assert (train.weights.bce, train.weights.dice, train.weights.object_score) == (1, 1, 0)  # Eq. 5
    assert (fusion.blocks, fusion.seg_tokens, fusion.prompt, fusion.accumulate_cls) == (6, 1, "seg", True)


def test_the_dataset_is_where_dvc_watches_it(configs: Path) -> None:
    assert load(DatasetConfig, configs).root == "data/dataset/micro"
    (configs / "micro" / "dataset.yaml").write_text("root: /elsewhere\n")
    with pytest.raises(RequestError, match=r"micro/dataset.yaml: root is not a setting; link .* data/dataset/micro"):
        load(DatasetConfig, configs)


def test_the_encoder_of_texts_is_no_setting(configs: Path) -> None:
    """It was one in earlier versions."""
    path = configs / "micro" / "text.yaml"
    path.write_text("encoder: roberta\n" + path.read_text())
    with pytest.raises(RequestError, match="text.yaml: encoder: no such setting; remove this line: .*'roberta'"):
        load(TextConfig, configs)


# Ten lines that hold a list of ten billion parts: each line lists the one before ten times.
LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block: 6\n", r"block: no such setting, found 6"),
        ("blocks: 0\n", r"blocks: .*greater than 0, found 0"),
        ("blocks: many\n", r"blocks: .*integer.*found 'many'"),
        ("prompt: average\n", r"prompt: .*'seg' or 'mean', found 'average'"),
        ("dim: 30\nheads: 4\n", r"heads: Input should divide dim \(30\), found 4"),
        ("- blocks\n", r"expected keys and values, found a list"),
        ("blocks\n", r"expected keys and values, found 'blocks'"),
        ("", r"expected keys and values, found an empty file"),
        ("1: 2\n", r"1: Keys should be strings"),
        ("blocks: [\n", r"not YAML: line 2: "),
        ("blocks: 1\nblocks: 2\n", r"not YAML: line 2: .*duplicate key"),
        ("blocks: 1\n---\nblocks: 2\n", r"not YAML: line 2: .*another document"),
        ("blocks: *a\n", r"not YAML: line 1: .*alias"),
        ("blocks: !!python/object:os.x {}\n", r"not YAML: line 1: .*tag"),
        ("blocks: 2024-13-01\n", r"not YAML: month"),
        ("[" * 500, r"not YAML"),
        ("blocks: !!bool abc\n", r"not YAML: a value does not fit its tag"),
        ("blocks: !!int ''\n", r"not YAML: a value does not fit its tag"),
        ("? [[{}]]\n: 1\n", r"not YAML: .*list is a key"),
        ('"a\\nb\\e[31m": 1\n', r"a\\nb\\x1b\[31m: no such setting, found 1"),
        (f"blocks: 0x{'f' * 5000}\n", r"blocks: .*found a number with thousands of digits"),
        (f"blocks: {'x' * 10**5}\n", r"blocks: .*found 'x+\.\.\.x+'$"),
        ("".join(f"a{n}: 1\n" for n in range(1000)), r"a4: no such setting, found 1; and 995 more faults$"),
        (LAUGHS, r"a0: no such setting, found \[.*; and 5 more faults$"),
    ],
)
def test_wrong_values_are_one_line_that_names_the_file(configs: Path, text: str, message: str) -> None:
    path = configs / "micro" / "fusion.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        load(FusionConfig, configs)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("content", [b"blocks: 1 # \xff", "blocks: 1".encode("utf-16"), None])
def test_a_file_that_cannot_be_read_is_one_line(configs: Path, content: bytes | None) -> None:
    path = configs / "micro" / "fusion.yaml"
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(RequestError, match=r"^.*fusion\.yaml: (not YAML|cannot be read)"):
        load(FusionConfig, configs)


# --- words that mean different things in versions of YAML ------------------------------------------------------------

WORDS = (
    "off", "on", "yes", "no", "y", "n", "Off", "true", "False", "null", "~", "1e-4", "1.e-4", "1e3", "010", "0o10",
    "0x1f", "1:30", "1_000", ".5", ".inf", "-.inf", ".nan", "2024-01-02", "'8'", "+1", "1.", "é",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_what_dvc_takes_it_for(configs: Path, word: str) -> None:
    """DVC reads the same files as parameters: if the two disagreed, a stage would re-run too often or not at all."""
    path = configs / "micro" / "fusion.yaml"
    path.write_text(f"other: {word}\n", encoding="utf-8")
    with pytest.raises(RequestError) as refused:  # the message has the value
        load(FusionConfig, configs)
    assert str(refused.value).endswith(f"found {load_yaml(str(path))['other']!r}")


@pytest.mark.parametrize(
    ("section", "text", "value"),
    [
        ("train", "epochs: 1\nresident: off", "off"),
        ("train", "epochs: 1\nresident: 'off'", "off"),
        ("train", "epochs: 1\nlr: 1e-4", 1e-4),
        ("train", "epochs: 1\nlr: 1", 1.0),
        ("train", "epochs: 010", 10),
        ("train", "\ufeffepochs: 1\r\n", 1),
        ("train", "epochs: 1\ntrain_mask_decoder: off", False),
        ("dataset", "check_media: no", False),
        ("dataset", "check_media: Yes", True),
        ("dataset", "name: on", "on"),
        ("dataset", "name: 1:30", "1:30"),
    ],
)
def test_words_of_settings(configs: Path, section: str, text: str, value: object) -> None:
    (configs / "micro" / f"{section}.yaml").write_text(text, encoding="utf-8")
    found = getattr(load(SECTIONS[section], configs), text.splitlines()[-1].partition(":")[0].lstrip("\ufeff"))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name", ["on", "no", "y", "null_", "1e", "micro2"])
def test_a_profile_may_have_such_a_name(configs: Path, name: str) -> None:
    (configs / "micro").rename(configs / name)
    (configs / "profile.yaml").write_text(f"profile: {name}\n")
    assert active_profile(configs) == name and load(TrainConfig, configs).epochs > 0


def test_a_text_that_yaml_takes_for_something_else_belongs_in_quotes(configs: Path) -> None:
    (configs / "micro" / "dataset.yaml").write_text("name: 2024-01-02\n")
    with pytest.raises(RequestError, match=r"name: Input should be a valid string \(in quotes\), found datetime.date"):
        load(DatasetConfig, configs)


# --- numbers out of range --------------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number that can be set: the section's schema, the keys that lead to it, and its own schema."""

    section: str
    keys: tuple[str, ...]
    schema: dict[str, Any]

    @property
    def largest(self) -> float:
        return self.schema.get("maximum", self.schema.get("exclusiveMaximum"))

    @property
    def smallest(self) -> float:
        return self.schema.get("minimum", self.schema.get("exclusiveMinimum"))


def numbers_in(section: str, schema: dict, definitions: dict, keys: tuple[str, ...] = ()) -> Iterator[Number]:
    for option in [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])]:
        option = definitions.get(option.get("$ref", "").split("/")[-1], option)
        if option.get("type") in ("integer", "number"):
            yield Number(section, keys, option)
        for name, inner in option.get("properties", {}).items():
            yield from numbers_in(section, inner, definitions, (*keys, name))
        if isinstance(inner := option.get("additionalProperties"), dict):
            yield from numbers_in(section, inner, definitions, (*keys, "any"))


def all_numbers() -> Iterator[Number]:
    for name, section in SECTIONS.items():
        schema = section.model_json_schema()
        yield from numbers_in(name, schema, schema.get("$defs", {}))
    for name, cluster in CLUSTERS.items():
        yield from numbers_in(name, cluster.model_json_schema(), {})


NUMBERS = list(all_numbers())
REQUIRED: dict[str, dict] = {
    "audio": {"weights": "w"},
    "visual": {"weights": "w"},
    "text": {"weights": "w"},
    "sam2": {"config": "c", "checkpoint": "c"},
    "train": {"epochs": 1},
    "local": {"kind": "local"},
    "scheduler": {"kind": "scheduler", "address": "tcp://host:1"},
    "slurm": {"kind": "slurm", "jobs": 1, "cores": 1, "memory": "1GB"},
}


def write_number(configs: Path, number: Number, text: str) -> Path:
    """Write the section's file with `text` as the value of the number."""
    folder = "cluster" if number.section in ("local", "scheduler", "slurm") else "micro"
    path = configs / folder / f"{number.section}.yaml"
    values: Any = "PLACE"
    for key in reversed(number.keys):
        values = {key: values}
    path.write_text(yaml.safe_dump(REQUIRED.get(number.section, {}) | values).replace("PLACE", text))
    return path


def read_number(configs: Path, number: Number) -> object:
    return (
        load_cluster(number.section, configs)
        if number.section not in SECTIONS
        else load(SECTIONS[number.section], configs)
    )


def test_every_number_has_a_smallest_and_a_largest_value() -> None:
    assert len(NUMBERS) > 30
    assert [n for n in NUMBERS if n.smallest is None or n.largest is None] == []


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: ".".join((n.section, *n.keys)))
def test_a_number_out_of_range_is_one_line_that_names_it(configs: Path, number: Number) -> None:
    beyond = (number.smallest - 1, number.largest + 1, -(10**30), 10**30)
    for text in [
        *(str(value) for value in beyond),
        "true",
        "'1'",
        ".inf",
        "-.inf",
        ".nan",
        "1e400",
        "2024-01-02",
        "[1]",
    ]:
        path = write_number(configs, number, text)
        with pytest.raises(RequestError) as refused:
            read_number(configs, number)
        message = str(refused.value)
        assert message.startswith(f"{path}: ") and number.keys[-1] in message and "\n" not in message, text


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e3, "sam2_lr_scale": 1e3},
        {"lr": 1e-300, "warmup_steps": 2**20, "weight_decay": 1e3},
        {"clip_norm": 1e6, "warmup_steps": 0, "seed": 2**32 - 1},
        {"clip_norm": 1e-300, "loss": {"bce": 0.0, "dice": 0.0}},
        {"loss": {"bce": 1e3, "dice": 1e3, "object_score": 1e3}, "batch_size": 2**20, "accumulate": 2**20},
    ],
    ids=str,
)
def test_the_largest_and_smallest_numbers_train_or_end_with_one_line(settings: dict, tmp_path: Path) -> None:
    origin = tiny.origin(tiny.write_sam2(tmp_path / "sam2.safetensors"), epochs=1, **settings)
    try:
        train(origin, tiny.samples(), torch.device("cpu"), tmp_path / "best", tmp_path / "live", tmp_path / "scratch")
    except SamloveError as error:
        assert "expected numbers, found NaN" in str(error) or "not finite" in str(error)


@pytest.mark.parametrize(
    ("text", "found"), [("workers: 1", "None"), ("kind: pbs", "'pbs'"), (LAUGHS + "kind: *a9", r"\[\[.*")]
)
def test_an_unknown_kind_of_cluster_is_one_line(configs: Path, text: str, found: str) -> None:
    (configs / "cluster" / "local.yaml").write_text(text)
    with pytest.raises(RequestError, match=rf"local.yaml: kind: expected local or scheduler or slurm, found {found}$"):
        load_cluster("local", configs)


def test_unknown_profile_is_an_error_that_lists_the_profiles(configs: Path) -> None:
    (configs / "dataset").mkdir()  # a reserved name: data/dataset holds the datasets of all profiles
    (configs / "profile.yaml").write_text("profile: macro\n")
    with pytest.raises(RequestError, match=r"\['micro', 'refavs'\], found .*macro"):
        load(FusionConfig, configs)
    (configs / "profile.yaml").write_text(LAUGHS)
    with pytest.raises(RequestError, match=r"\['micro', 'refavs'\], found \{'a0': "):
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
