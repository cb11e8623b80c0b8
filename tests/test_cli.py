"""The `samlove` command as a user calls it: output, one-line errors, exit status 0, 1 and 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from samlove.cli import doctor, main
from samlove.features.audio_embed import import_audio_embed
from samlove.features.sizes import read_settings
from stores import export_store
from tests.impostors import IMPOSTORS
from tests.repository import git, make_repository

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
    for title, commands in {main.BEFORE: "doctor plan audit", main.AFTER: "results picture score store"}.items():
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


# --- files that are no artefacts, and places that cannot be written -------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_text('{"J&F": 1}'), "a different kind of file; expected a feature store"),
        (lambda path: path.write_bytes(b""), "a different kind of file; expected a feature store"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), ""),
        (lambda path: path.mkdir(), "expected "),
        (lambda path: (path / "features" / "audio").mkdir(parents=True), "expected "),
        (lambda path: path.mkdir() or (path / "shard-000000.tar").touch(), ""),
        (lambda path: path.mkdir() or (path / "manifest.json").write_text('{"name": "an app"}'), "/manifest.json: "),
        (lambda path: path.mkdir() or (path / "manifest.json").write_text("null"), "/manifest.json: "),
        (lambda path: path.symlink_to("gone"), "link to gone, which does not exist; expected a feature store"),
        (os.mkfifo, "a device, pipe or socket; expected a feature store"),
    ],
)
@pytest.mark.parametrize("command", [("info",), ("verify",), ("verify", "--deep")], ids=" ".join)
def test_what_is_no_artefact_is_said_in_one_line_and_never_to_be_deleted(
    make: Callable[[Path], object],
    says: str,
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "any"
    make(path)
    monkeypatch.setattr("sys.argv", ["samlove", "store", *command, str(path)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    printed = capsys.readouterr()
    line = printed.out + printed.err
    assert ended.value.code in (1, 2)
    assert line.count("\n") == 1
    assert f"{path}" in line and says in line
    assert not re.search("delete|remove|overwrit", line)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    (root / "embed").mkdir()
    torch.save(torch.zeros(10, 128), root / "embed" / "a.pt")
    import_audio_embed(root / "embed", root / "audio")
    return root


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("new/folder/x", None),
        ("file/x", "Not a directory"),
        ("folder", "already exists and will not be overwritten"),
        ("dangling", "already exists and will not be overwritten"),
        ("dangling/x", "File exists"),
        ("/proc/x", "/proc"),
        ("x" * 250, "File name too long"),
    ],
)
@pytest.mark.parametrize("command", ["export", "import", "import .pt"])
def test_a_store_is_written_to_any_new_place_or_leaves_nothing(
    place: str,
    says: str | None,
    command: str,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported = tmp_path / "audio.h5"
    export_store(store / "audio", exported)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("gone")
    before = sorted(tmp_path.rglob("*"))
    source = {"export": store / "audio", "import": exported, "import .pt": store / "embed"}[command]
    target = tmp_path / place
    monkeypatch.setattr("sys.argv", ["samlove", "store", command.split()[0], str(source), str(target)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    printed = capsys.readouterr()
    if says is None:
        assert not ended.value.code, printed.err
        assert target.exists()
        assert sorted(path.name for path in target.parent.iterdir()) == [target.name]
    else:
        assert ended.value.code in (1, 2)
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert says in printed.err
        assert sorted(tmp_path.rglob("*")) == before


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_doctor_lists_what_the_paper_profile_is_missing(checkout: Path) -> None:
    select(checkout, "refavs")
    done = samlove("doctor", cwd=checkout)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for what in ("dataset", "audio weights", "visual weights", "text weights", "SAM 2 checkpoint"):
        place = next(i for i, line in enumerate(lines) if line.startswith("MISSING") and what in line)
        assert "-> " in lines[place + 1]


@pytest.fixture
def micro(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with the weights of the micro profile; the working folder."""
    shutil.copytree(ROOT / "weights" / "micro", checkout / "weights" / "micro")
    (checkout / "samlove" / "micro").mkdir(parents=True)
    shutil.copy(ROOT / "samlove" / "micro" / "sam2_micro.yaml", checkout / "samlove" / "micro")
    make_repository(checkout)
    monkeypatch.chdir(checkout)
    return checkout


def missing() -> dict[str, doctor.Finding]:
    """What doctor finds missing; a GPU may be."""
    return {f.what: f for f in doctor.examine(read_settings()) if f.missing and f.what != "GPU memory"}


def test_doctor_accepts_what_is_there(micro: Path) -> None:
    select(micro, "refavs")
    for section in ("audio", "visual", "text", "sam2"):
        shutil.copy(micro / "configs" / "micro" / f"{section}.yaml", micro / "configs" / "refavs")
    for part in ("media", "gt_mask"):
        (micro / "data" / "dataset" / "refavs" / part).mkdir(parents=True)
    (micro / "data" / "dataset" / "refavs" / "metadata.csv").write_text(
        "vid,uid,split,fid,exp\na_0_10000,a_0_10000_dog_1,train,1,the dog\n"
    )
    assert missing().keys() <= {"disk"}


WEIGHTS = {
    "audio weights": "audio/vggish.safetensors",
    "visual weights": "visual/vit.safetensors",
    "text weights": "text/roberta/model.safetensors",
    "SAM 2 checkpoint": "sam2/sam2.safetensors",
}


@pytest.mark.parametrize(
    "kinds",
    [
        ("empty", "git lfs", "html", "numpy scalar"),
        ("truncated safetensors", "truncated, old format", "git lfs", "npz"),
    ],
)
def test_doctor_says_what_is_there_in_place_of_weights(kinds: tuple[str, ...], micro: Path) -> None:
    for path, kind in zip(WEIGHTS.values(), kinds, strict=True):
        (micro / "weights/micro" / path).unlink()
        IMPOSTORS[kind][0](micro / "weights/micro" / path)
    found = missing()
    assert found.keys() == WEIGHTS.keys()
    for finding, path, kind in zip(found.values(), WEIGHTS.values(), kinds, strict=True):
        assert re.search(f"weights/micro/{path}: .*{IMPOSTORS[kind][1]}", f"{finding.found}; {finding.remedy}")
        assert re.search(r", or get the original: git restore weights/micro/\S+$", finding.remedy)


def test_doctor_says_which_weights_are_of_another_model(micro: Path) -> None:
    weights = micro / "weights" / "micro"
    shutil.copy(weights / "audio/vggish.safetensors", weights / "visual/vit.safetensors")
    shutil.copy(weights / "visual/vit.safetensors", weights / "sam2/sam2.safetensors")
    config = weights / "text/roberta/config.json"
    config.write_text(config.read_text().replace('"roberta"', '"bert"'))
    found = missing()
    assert found.keys() == {"visual weights", "text weights", "SAM 2 checkpoint"}
    assert "these are not the weights of timm's vit_tiny_r_s16_p8_224 as configured" in found["visual weights"].found
    assert "these are not the weights of this SAM 2 as configured" in found["SAM 2 checkpoint"].found
    assert "tokenizer does not fit" in found["text weights"].found


def test_doctor_says_which_paths_lead_nowhere(micro: Path) -> None:
    weights = micro / "weights" / "micro"
    for path, target in (("audio/vggish.safetensors", "/gone"), ("sam2/sam2.safetensors", "sam2.safetensors")):
        (weights / path).unlink()
        (weights / path).symlink_to(target)
    (weights / "visual/vit.safetensors").unlink()
    (weights / "visual/vit.safetensors").mkdir()
    shutil.rmtree(weights / "text/roberta")
    found = {what: finding.found for what, finding in missing().items()}
    assert found == {
        "audio weights": "weights/micro/audio/vggish.safetensors: link to /gone, which does not exist",
        "visual weights": "weights/micro/visual/vit.safetensors: a folder; expected timm's weights of "
        "vit_tiny_r_s16_p8_224",
        "text weights": "weights/micro/text/roberta: no such file",
        "SAM 2 checkpoint": "weights/micro/sam2/sam2.safetensors: link to sam2.safetensors, which leads back to it",
    }


def test_doctor_says_that_dvc_cannot_run_and_goes_on(micro: Path) -> None:
    shutil.rmtree(micro / ".git")
    (micro / "weights/micro/audio/vggish.safetensors").unlink()
    found = missing()
    assert found.keys() == {"repository", "audio weights"}
    assert "no git repository with a commit" in found["repository"].found
    assert "git init" in found["repository"].remedy
    git(micro, "init")
    git(micro, "commit", "--allow-empty", "-m", "start")
    (micro / "data").symlink_to("configs")
    assert "data: link to configs" in missing()["repository"].found


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda root: (root / "media/a/frames").rmdir() or (root / "media/a/frames").symlink_to("/tmp"),
            "media/a/frames",
        ),
        (lambda root: (root / "metadata.csv").write_text("vid,uid\n"), "metadata.csv"),
        (lambda root: (root / "metadata.csv").write_bytes(b"\xff\xfe"), "metadata.csv"),
        (lambda root: (root / "metadata.csv").unlink() or os.mkfifo(root / "metadata.csv"), "metadata.csv: neither"),
    ],
)
def test_doctor_names_a_dataset_that_cannot_be_used(spoil: Callable[[Path], object], says: str, micro: Path) -> None:
    (micro / "configs/micro/dataset.yaml").write_text("synth: null\n")
    root = micro / "data/dataset/micro"
    (root / "media/a/frames").mkdir(parents=True)
    (root / "gt_mask").mkdir()
    (root / "metadata.csv").write_text("vid,uid,split,fid,exp\na,a_cat_1,train,0,it\n")
    assert "dataset" not in missing()
    spoil(root)
    assert says in missing()["dataset"].found


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
    dataset = next(finding for finding in doctor.examine(read_settings()) if finding.what == "dataset")
    assert dataset.missing and "is a link" in dataset.found
    assert "synth: null in configs/refavs/dataset.yaml" in dataset.remedy
