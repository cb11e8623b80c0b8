"""dvc.yaml against the source: what each stage lists is what it uses, and an edit re-runs what it must and no more."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from samlove.ablations.runs import ENCODERS, VARIED
from samlove.config import SECTIONS
from tests.stage_code import ROOT, has_code, imported_files, loaded_parameters

PROFILES = ("micro", "refavs")
FEATURES = {"audio", "visual", "text", "sam2-train", "sam2-eval"}
SPLITS = ("val", "test_s", "test_u", "test_n")
AFTER_TRAIN = {*(f"infer-{split}" for split in SPLITS), "evaluate", "report"}
AFTER_PACK = {"train", *AFTER_TRAIN}
EVERY_STAGE = {"dataset", "index", *FEATURES, "pack", *AFTER_PACK}
# Stage name without the profile -> its definition in dvc.yaml.
DEFINITIONS = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in DEFINITIONS.items()}
UNSEEN = {line[1:] for line in (ROOT / ".dvcignore").read_text().splitlines() if line.startswith("/")}
ABLATIONS = yaml.safe_load((ROOT / "pipelines" / "ablations" / "pipeline.yaml").read_text())["stages"]
EVERY_DEFINITION = STAGES | {name: stage["do"] for name, stage in ABLATIONS.items()}
by_stage = pytest.mark.parametrize("stage", STAGES)
by_profile = pytest.mark.parametrize("profile", PROFILES)


def script_of(stage: str) -> Path:
    return ROOT / "pipelines" / f"{stage}.py"


def listed_parameters(stage: str) -> dict[str, set[str] | None]:
    """Section -> the keys listed, None for the whole file."""
    listed: dict[str, set[str] | None] = {}
    for entry in EVERY_DEFINITION[stage].get("params", []):
        for path, keys in entry.items():
            listed[Path(path).stem] = None if keys is None else set(keys)
    return listed


@pytest.mark.parametrize("stage", EVERY_DEFINITION)
def test_lists_exactly_the_code_it_runs(stage: str) -> None:
    listed: set[str] = set()
    for dep in EVERY_DEFINITION[stage]["deps"]:
        if not dep.startswith(("data/", "weights/")):
            assert (ROOT / dep).exists(), f"{dep}: listed, but not there"
            files = [ROOT / dep] if (ROOT / dep).is_file() else sorted((ROOT / dep).rglob("*.py"))
            code = {str(file.relative_to(ROOT)) for file in files if file.suffix == ".py" and has_code(file)}
            listed |= code - UNSEEN
    assert listed == imported_files(script_of(stage))


@by_stage
def test_lists_exactly_the_parameters_it_reads(stage: str) -> None:
    listed = listed_parameters(stage)
    read = {name: keys for name, keys in loaded_parameters(script_of(stage)).items() if keys is None or keys}
    assert set(listed) == set(read)
    for section, keys in listed.items():
        every = set(SECTIONS[section].model_fields) - {"root"}
        assert (every if keys is None else keys) == (read[section] or every), section


def test_the_ablation_stages_list_the_settings_that_runs_can_change() -> None:
    features, runs, tables = (listed_parameters(stage) for stage in ABLATIONS)
    assert set(features) == {"ablations", *ENCODERS, "pack", "dataset"}
    assert set(runs) == {"ablations", *VARIED, "evaluate", "dataset"}
    assert set(tables) == {"ablations", "dataset"}
    assert all(listed[section] is None for listed in (features, runs) for section in listed.keys() & VARIED.keys())
    assert features["ablations"] == {"runs"} and runs["ablations"] == {"seeds", "controls", "runs"}


@by_profile
def test_every_setting_is_a_parameter_of_some_stage(profile: str) -> None:
    listed = [listed_parameters(stage) for stage in EVERY_DEFINITION if stage != "report"]
    for path in (ROOT / "configs" / profile).glob("*.yaml"):
        sections = [stage[path.stem] for stage in listed if path.stem in stage]
        keys = set(yaml.safe_load(path.read_text())) - {"name"}  # only the report shows it
        covered = keys if None in sections else set().union(*(s or () for s in sections))
        assert path.stem == "report" or keys <= covered, path


@by_profile
def test_listed_keys_are_in_the_files(profile: str) -> None:
    for stage in EVERY_DEFINITION:
        for section, keys in listed_parameters(stage).items():
            path = ROOT / "configs" / profile / f"{section}.yaml"
            assert (keys or set()) <= set(yaml.safe_load(path.read_text())), f"{stage}: {path}"


# --- what an edit re-runs, by DVC itself -----------------------------------------------------------------------------

# Stands in for Python on PATH, so that DVC runs the real graph with stages that take no time. Every output gets new
# content, except a dataset that is there already.
STAND_IN = """#!{python}
import json, os, pathlib, sys, uuid
sys.path.insert(0, os.getcwd())
from pipelines import keep_other_profiles
keep_other_profiles()
here = pathlib.Path(__file__).parent
command = " ".join(["python", *sys.argv[1:]])
stage, outs = json.loads((here / "outs.json").read_text())[command]
with open(here / "log", "a") as log:
    log.write(stage + "\\n")
for out in outs:
    path = pathlib.Path(out)
    if "dataset" in out and path.exists():
        continue
    if not path.suffix:
        names = ["media/a", "gt_mask/a"] if "dataset" in out else ["manifest.json", "metrics.json"]
    for file in [path] if path.suffix else [path / name for name in names]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({{"value": uuid.uuid4().int % 10**6}}))
"""


def without_profile(stage: str) -> str:
    """'audio@micro' -> 'audio', 'sam2@micro-train' -> 'sam2-train'."""
    name, item = stage.split("@")
    return "-".join([name, *item.split("-")[1:]])


class Project:
    """A copy of the pipeline with its commands replaced by the stand-in, reproduced once in profile micro."""

    def __init__(self, root: Path, tools: Path):
        self.root, self.tools = root, tools
        for name in ("dvc.yaml", "configs", "pipelines", "samlove", "stores", ".dvcignore", ".gitignore"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        for file in [*root.rglob("dvc.lock"), *root.rglob("*.pyc")]:
            file.unlink()
        for profile in PROFILES:
            for stage in ("audio", "visual", "text", "sam2"):
                folder = root / "weights" / profile / stage
                folder.mkdir(parents=True)
                (folder / "w").write_text(stage)
        for folder in ("media", "gt_mask"):
            (root / "data" / "dataset" / "refavs" / folder).mkdir(parents=True)
            (root / "data" / "dataset" / "refavs" / folder / "a").write_text(folder)
        self.run("git", "init", "--quiet")
        self.run("git", "config", "user.email", "test@example.org")
        self.run("git", "config", "user.name", "test")
        self.run("dvc", "init", "--quiet")
        self.run("dvc", "config", "core.analytics", "false")
        self.ran_first = self.reproduce()
        self.commit()

    def run(self, *command: str) -> str:
        path = f"{self.tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, cwd=self.root, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def write_stand_in(self) -> None:
        with Repo(str(self.root)) as repo:
            outs = {
                str(stage.cmd): [
                    stage.addressing.split(":")[-1],
                    [str(Path(o.fs_path).relative_to(self.root)) for o in stage.outs],
                ]
                for stage in repo.index.stages
            }
        (self.tools / "outs.json").write_text(json.dumps(outs))
        (self.tools / "python").write_text(STAND_IN.format(python=sys.executable))
        (self.tools / "python").chmod(0o755)

    def logged(self, *command: str) -> list[str]:
        """The stages that `command` runs, in order, without the profile in their names."""
        self.write_stand_in()
        (self.tools / "log").write_text("")
        self.run(*command)
        return [without_profile(name) for name in (self.tools / "log").read_text().split()]

    def reproduce(self) -> list[str]:
        return self.logged("dvc", "repro")

    def changed(self) -> set[str]:
        """The stages of the main dvc.yaml that see a change themselves, without the stages downstream."""
        with Repo(str(self.root)) as repo:
            return {without_profile(n.split(":")[-1]) for n in map(str, repo.status()) if "/ablations/" not in n}

    def commit(self) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", "x")

    def edit(self, path: str, **values: object) -> None:
        file = self.root / path
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | values))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("tools"))


def test_first_run_is_everything_and_the_second_nothing(project: Project) -> None:
    assert project.ran_first[:2] == ["dataset", "index"]
    assert sorted(project.ran_first) == sorted(EVERY_STAGE)
    assert project.reproduce() == []


@pytest.mark.parametrize(
    ("path", "values", "ran"),
    [
        ("configs/micro/fusion.yaml", {"blocks": 3}, AFTER_PACK),
        pytest.param(
            *("configs/micro/visual.yaml", {"model": "vit_small_patch16_224"}, {"visual", "pack", *AFTER_PACK}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_edited_setting_reruns_its_stage_and_those_downstream(
    project: Project, path: str, values: dict, ran: set[str]
) -> None:
    project.edit(path, **values)
    assert set(project.reproduce()) == ran


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("configs/micro/text.yaml", {"text", "pack", "report"}),
        ("configs/micro/train.yaml", {"train", "report"}),
        ("configs/micro/evaluate.yaml", {"evaluate", "report"}),
        ("weights/micro/visual/w", {"visual"}),
        ("weights/refavs/visual/w", set()),
        ("samlove/model/loss.py", {"train"}),
        ("samlove/features/encoders/vggish.py", {"audio"}),
        ("stores/features.py", set(STAGES) - {"dataset", "index"}),
        ("data/micro/index/gt_mask.sha256", {"index", "pack", "infer", "evaluate", "report"}),
        ("data/dataset/micro/gt_mask/a", {"dataset", "index"}),
    ],
)
def test_an_edit_is_seen_by_the_stages_that_list_it(project: Project, path: str, changed: set[str]) -> None:
    file = project.root / path
    before = file.read_bytes()
    file.unlink()  # DVC may have linked it to its cache
    file.write_bytes(before + b"\nnever_written_before: 1\n")
    try:
        assert {name.split("-")[0] for name in project.changed()} == changed
    finally:
        file.write_bytes(before)


@pytest.mark.slow
def test_an_experiment_changes_a_setting_by_option(project: Project) -> None:
    project.commit()
    option = "configs/micro/fusion.yaml:blocks=5"
    assert set(project.logged("dvc", "exp", "run", "-S", option)) == AFTER_PACK
    shown = json.loads(project.run("dvc", "exp", "show", "--json"))
    experiments = [e for line in shown for e in (line["experiments"] or [])]
    assert len(experiments) == 1
    data = experiments[0]["revs"][0]["data"]
    assert data["params"]["configs/micro/fusion.yaml"]["data"]["blocks"] == 5
    assert "value" in data["metrics"]["data/micro/metrics.json"]["data"]


# --- profiles side by side -------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_switching_profiles_back_and_forth_reruns_and_deletes_nothing(project: Project) -> None:
    project.edit("configs/profile.yaml", profile="micro")
    project.reproduce()
    micro = files(project.root / "data" / "micro")
    project.edit("configs/profile.yaml", profile="refavs")
    assert set(project.reproduce()) == EVERY_STAGE
    assert project.changed() == set()
    refavs = files(project.root / "data" / "refavs")
    for profile in ("micro", "refavs"):
        project.edit("configs/profile.yaml", profile=profile)
        assert project.changed() == set()
        assert project.reproduce() == []
    assert files(project.root / "data" / "micro") == micro
    assert files(project.root / "data" / "refavs") == refavs


@pytest.mark.slow
def test_dvc_commands_keep_the_results_of_other_profiles(project: Project) -> None:
    """Except those of the last stage that ran, which DVC restores from its cache."""
    for profile in ("refavs", "micro"):
        project.edit("configs/profile.yaml", profile=profile)
        project.reproduce()
        project.commit()
    refavs = project.root / "data" / "refavs"
    before = files(refavs)
    project.run("dvc", "exp", "run", "-S", "configs/micro/fusion.yaml:heads=1")
    project.run("dvc", "checkout", "--force")
    shutil.rmtree(refavs / "report", ignore_errors=True)
    assert files(refavs) == {path: content for path, content in before.items() if refavs / "report" not in path.parents}
    project.edit("configs/profile.yaml", profile="refavs")
    assert project.reproduce() == []
    assert project.changed() == set()
    assert files(refavs) == before


@pytest.mark.slow
def test_metrics_of_two_profiles_are_shown_together(project: Project) -> None:
    for profile in ("refavs", "micro"):
        project.edit("configs/profile.yaml", profile=profile)
        project.reproduce()
    shown = json.loads(project.run("dvc", "metrics", "show", "--json"))[""]["data"]
    assert set(shown) == {"data/micro/metrics.json", "data/micro/dvclive/metrics.json"}
    paths = [f"data/{profile}/metrics.json" for profile in PROFILES]
    shown = json.loads(project.run("dvc", "metrics", "show", "--json", *paths))[""]["data"]
    assert set(shown) == set(paths)


@pytest.mark.slow
def test_a_further_profile_takes_two_commands_and_shares_dataset_and_weights(project: Project) -> None:
    project.run("bash", "-c", "cp -r configs/refavs configs/clip")
    project.run("bash", "-c", "for d in weights data/dataset; do ln -s refavs $d/clip; done")
    project.edit("configs/profile.yaml", profile="clip")
    before = files(project.root / "data" / "refavs")
    assert set(project.reproduce()) == EVERY_STAGE
    assert project.changed() == set()
    assert files(project.root / "data" / "refavs") == before
    weight = project.root / "weights" / "refavs" / "visual" / "w"
    weight.write_text("other")
    assert project.changed() == {"visual"}
    (project.root / "data" / "dataset" / "refavs" / "media" / "a").write_text("other")
    assert project.changed() == {"visual", "dataset", "index"}
    project.reproduce()
    assert (project.root / "data" / "dataset" / "clip").is_symlink()


def test_dvc_never_deletes_the_users_dataset(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.root / "data" / "dataset" / "refavs", tmp_path / "mine")
    place = project.root / "data" / "dataset" / "refavs"
    shutil.rmtree(place)
    place.symlink_to(tmp_path / "mine")
    before = files(tmp_path / "mine")
    project.edit("configs/profile.yaml", profile="refavs")
    assert set(project.logged("dvc", "repro", "--force", "--single-item", "dataset", "index")) == {"dataset", "index"}
    project.run("dvc", "checkout", "--force", "dataset", "index")
    assert place.is_symlink() and files(tmp_path / "mine") == before
