"""The `samlove` command as a user calls it: output, one-line errors, exit status 0, 1 and 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from samlove.cli import doctor, main
from samlove.data.sizes import read_settings

ROOT = Path(__file__).parents[1]


def samlove(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command on one thread, because several wait for each other on a busy machine."""
    command = [sys.executable, "-m", "samlove.cli.main", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth") / "small"
    done = samlove("synth", "--out", str(folder), "--seed", "3", "--scale", "small")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the configurations, but without data and weights."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


def select(checkout: Path, profile: str) -> None:
    (checkout / "configs" / "profile.yaml").write_text(f"profile: {profile}\n")


def every_command() -> list[tuple[str, ...]]:
    """The words of each command that does something itself, such as ("store", "info")."""
    found: list[tuple[str, ...]] = []

    def walk(command: Any, words: tuple[str, ...]) -> None:
        if hasattr(command, "commands"):
            for name, below in command.commands.items():
                walk(below, (*words, name))
        else:
            found.append(words)

    walk(get_command(main.app), ())
    return found


def test_help_lists_the_commands_without_loading_torch() -> None:
    done = samlove("--help")
    assert done.returncode == 0
    for command in {words[0] for words in every_command()}:
        assert f"  {command} " in done.stdout
    loaded = "import sys, samlove.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT).returncode == 0


def test_help_groups_the_commands_by_task() -> None:
    lines = samlove("--help").stdout.splitlines()
    places = {name: lines.index(f"{name}:") for name in (main.BEFORE, main.AFTER, main.TOOLS)}
    for title, commands in {main.BEFORE: "doctor plan audit", main.AFTER: "results picture store"}.items():
        after = min(place for place in [*places.values(), len(lines)] if place > places[title])
        listed = [line.split()[0] for line in lines[places[title] + 1 : after] if re.match(r"  \S", line)]
        assert listed == commands.split()


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_of_each_command_has_an_example_of_it(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main.app, [*words, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    examples = result.output[result.output.rindex("Example") :].splitlines()[1:]
    assert examples and all(line.split()[: len(words) + 1] == ["samlove", *words] for line in examples)
    assert max(map(len, result.output.splitlines())) <= 80
    for line in examples:  # its options exist
        options = {word for word in line.split() if word.startswith("--")}
        assert options <= set(re.findall(r"--[\w-]+", result.output[: result.output.rindex("Example")]))


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("synth",),
        ("synth", "--out", "x", "--seed", "y"),
        ("synth", "--out", "x", "--seed", "1", "--scale", "huge"),
        ("audit",),
        ("audit", "/nowhere"),
        ("picture",),
        ("picture", "a.gif"),
        ("bench", "nothing"),
    ],
)
def test_wrong_requests_are_one_line_and_status_2(arguments: tuple[str, ...]) -> None:
    done = samlove(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_synth_never_overwrites(dataset: Path) -> None:
    done = samlove("synth", "--out", str(dataset), "--seed", "3")
    assert done.returncode == 2
    assert str(dataset) in done.stderr


def test_audit_of_a_dataset_without_faults(dataset: Path) -> None:
    done = samlove("audit", str(dataset))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "media checked" in done.stdout
    assert "no faults" in done.stdout


def test_audit_fails_if_a_fault_has_policy_fail(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(dataset, folder)
    wav = next(iter(sorted((folder / "media").glob("*/audio.wav"))))
    wav.unlink()
    done = samlove("audit", str(folder))
    assert done.returncode == 1
    assert str(wav.relative_to(folder)) in done.stdout
    assert samlove("audit", "--no-media", str(folder)).returncode == 0


def test_audit_outside_the_repository_uses_the_default_policies(dataset: Path, tmp_path: Path) -> None:
    assert samlove("audit", str(dataset), cwd=tmp_path).returncode == 0


def test_bench_ends_with_one_json_object() -> None:
    done = samlove("bench", "metrics")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ratio"] > 1
    assert result["difference"] < 1e-6


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_lists_what_the_paper_profile_is_missing(checkout: Path) -> None:
    select(checkout, "refavs")
    done = samlove("doctor", cwd=checkout)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for what in ("dataset", "audio weights", "visual weights", "text weights", "SAM 2 checkpoint"):
        place = next(i for i, line in enumerate(lines) if line.startswith("MISSING") and what in line)
        assert "-> " in lines[place + 1]


def test_doctor_accepts_what_is_there(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select(checkout, "refavs")
    for path in ("audio/vggish-10086976.pth", "visual/vit_base_patch16_224.safetensors", "sam2/sam2_hiera_large.pt"):
        file = checkout / "weights" / "refavs" / path
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    (checkout / "weights" / "refavs" / "text" / "distilroberta-base").mkdir(parents=True)
    for part in ("media", "gt_mask"):
        (checkout / "data" / "dataset" / "refavs" / part).mkdir(parents=True)
    (checkout / "data" / "dataset" / "refavs" / "metadata.csv").write_text(
        "vid,uid,split,fid,exp\na_0_10000,a_0_10000_dog_1,train,1,the dog\n"
    )
    monkeypatch.chdir(checkout)
    missing = {finding.what for finding in doctor.examine(read_settings()) if finding.missing}
    assert missing <= {"GPU memory"}


def test_doctor_finds_nothing_missing_for_the_bundled_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    findings = doctor.examine(read_settings())
    assert not [finding for finding in findings if finding.missing]
    assert "dvc repro" in doctor.render(findings)


def test_doctor_refuses_a_wrong_configuration(checkout: Path) -> None:
    (checkout / "configs" / "micro" / "train.yaml").write_text("epochs: 0\n")
    done = samlove("doctor", cwd=checkout)
    assert done.returncode == 2
    assert "train.yaml: epochs" in done.stderr


def test_doctor_finds_a_link_where_a_dataset_would_be_generated(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select(checkout, "refavs")
    dataset_yaml = checkout / "configs" / "refavs" / "dataset.yaml"
    dataset_yaml.write_text(dataset_yaml.read_text().replace("synth: null", "synth: {seed: 0}"))
    monkeypatch.chdir(checkout)
    place = checkout / "data" / "dataset" / "refavs"
    place.parent.mkdir(parents=True)
    place.symlink_to("elsewhere")
    dataset = doctor.examine(read_settings())[0]
    assert dataset.missing and "is a link" in dataset.found
    assert "synth: null in configs/refavs/dataset.yaml" in dataset.remedy
