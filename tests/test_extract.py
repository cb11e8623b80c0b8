"""The runner of the feature stages with a one-line encoder, and the four stages with small real encoders."""

import os
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import yaml

from pipelines import audio, sam2, text, visual
from samlove.data.dataset import RefAvsFolder
from samlove.errors import SamloveError
from samlove.features.cluster import LOGGED
from samlove.features.encoders.base import Arrays, Sources, to_store
from samlove.features.encoders.frames import frame_sources
from samlove.features.encoders.sam2_image import Sam2ImageEncoder
from samlove.features.encoders.text import TextEncoder
from samlove.features.encoders.timm_image import TimmEncoder
from samlove.features.encoders.vggish import VggishEncoder
from samlove.features.extract import AHEAD, FAILURE_BUDGET, Job, extract
from stores import FeatureStore
from tests import small_encoders as small


class Numbers:
    """Reads a number from a file; its array is the number twice. Records the numbers that it computed."""

    def __init__(self, factor: int = 1) -> None:
        self.factor, self.computed, self.batches = factor, list[float](), list[int]()

    def fingerprint(self) -> dict:
        return {"encoder": "numbers", "factor": self.factor}

    def load(self, source: Path) -> float:
        if not source.exists():
            raise SamloveError(f"{source}: no such file")
        if source.read_text() == "broken":
            raise SamloveError(f"{source}: broken")
        return float(source.read_text())

    def encode(self, items: list[float]) -> list[Arrays]:
        self.computed += items
        self.batches.append(len(items))
        return [{"x": to_store("x", torch.full((2,), self.factor * item), "float16")} for item in items]


class Stopped(Numbers):
    """Stops the run in its third shard."""

    def encode(self, items: list[float]) -> list[Arrays]:
        if max(items) >= 200:
            raise RuntimeError("stopped")
        return super().encode(items)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """k000 ... k249, each a file with its number."""
    (tmp_path / "in").mkdir()
    sources = {f"k{n:03}": tmp_path / "in" / f"{n}" for n in range(250)}
    for n, path in enumerate(sources.values()):
        path.write_text(str(n))
    return sources


def job(encoder: Numbers, sources: dict[str, Path], root: Path) -> Job:
    return Job(encoder, sources, root / "numbers", root / "scratch", shard_size=100, batch_size=30)


def run(encoder: Numbers, sources: dict[str, Path], root: Path) -> FeatureStore:
    extract(job(encoder, sources, root))
    return FeatureStore.open(root / "numbers")


def test_every_item_is_in_the_store_under_its_key(tmp_path: Path, sources: dict[str, Path]) -> None:
    encoder = Numbers()
    report = extract(job(encoder, sources, tmp_path))
    store = FeatureStore.open(tmp_path / "numbers")
    assert list(store.keys()) == list(sources)
    assert [store.read(key)["x"].tolist() for key in sources] == [[n, n] for n in range(250)]
    assert store.manifest["fingerprint"] == encoder.fingerprint()
    assert sorted(encoder.batches) == [10, 10, 20, *7 * [30]]  # a batch does not cross shards
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["last", "lock"]
    assert (report.spent.items, report.spent.bytes, report.workers) == (250, 250 * 4, 1)
    assert report.rate is not None
    assert report.rate > 0
    assert "items/s after warm-up" in str(report)


def test_an_unreadable_item_is_in_the_failure_log_and_the_others_are_computed(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    sources["k007"].unlink()
    store = run(Numbers(), sources, tmp_path)
    assert len(store) == 249
    assert "k007" not in store
    assert store.failures == [("k007", "numbers", f"{sources['k007']}: no such file")]


def test_nothing_is_published_if_failures_exceed_the_budget(tmp_path: Path, sources: dict[str, Path]) -> None:
    lost = list(sources)[100 : 100 + int(FAILURE_BUDGET * 250) + 1]
    for key in lost:
        sources[key].rename(sources[key].with_suffix(".away"))
    with pytest.raises(SamloveError, match="3 of 250 items cannot be read, expected at most 1%: k100.*no such file"):
        run(Numbers(), sources, tmp_path)
    assert not (tmp_path / "numbers").exists()
    assert list(pd.read_csv(tmp_path / "scratch" / "failures.csv")["key"]) == lost


def test_a_stopped_run_resumes(tmp_path: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run(Stopped(), sources, tmp_path)
    encoder = Numbers()
    store = run(encoder, sources, tmp_path)
    assert encoder.computed == list(range(200, 250))
    assert [store.read(key)["x"][0] for key in sources] == list(range(250))


def test_only_changed_items_are_recomputed(tmp_path: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        run(Stopped(), sources, tmp_path)
    times = sources["k000"].stat()
    sources["k000"].write_text("7")  # same size; the next line restores its times
    os.utime(sources["k000"], ns=(times.st_atime_ns, times.st_mtime_ns))
    encoder = Numbers()
    assert run(encoder, sources, tmp_path).read("k000")["x"][0] == 7
    assert encoder.computed == [7, *range(200, 250)]
    again = Numbers(factor=2)
    assert run(again, sources, tmp_path).read("k001")["x"][0] == 2
    assert len(again.computed) == 249  # k000 and k007 have the same content


def test_items_with_the_same_content_are_computed_once_in_a_shard(tmp_path: Path, sources: dict[str, Path]) -> None:
    """As the frames of a video are, and of its versions that refer to nothing; what cannot be read fails for all."""
    for number, content in {10: "7", 50: "7", 150: "7", 20: "broken", 30: "broken"}.items():
        sources[f"k{number:03}"].write_text(content)
    encoder = Numbers()
    store = run(encoder, sources, tmp_path)
    assert [store.read(key)["x"][0] for key in ("k007", "k010", "k050", "k150")] == [7] * 4
    assert encoder.computed.count(7) == 2  # one in each of two shards
    assert len(encoder.computed) == 246 and len(store) == 248
    assert [failure.key for failure in store.failures] == ["k020", "k030"]
    again = Numbers()
    sources["k050"].write_text("8")
    assert run(again, sources, tmp_path).read("k050")["x"][0] == 8
    assert again.computed == [8]


def test_the_error_for_a_value_out_of_range_names_array_and_items(tmp_path: Path, sources: dict[str, Path]) -> None:
    with pytest.raises(SamloveError, match=r"k\d00 to k\d29: x: \S+ is beyond the range of float16"):
        run(Numbers(factor=10_000), sources, tmp_path)


def test_an_unexpected_error_names_the_item(tmp_path: Path, sources: dict[str, Path]) -> None:
    sources["k003"].write_text("no number")
    with pytest.raises(ValueError, match="no number") as raised:
        run(Numbers(), sources, tmp_path)
    assert raised.value.__notes__ == ["while reading 'k003'"]


def test_nothing_to_encode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SamloveError, match="expected items to encode, found none"):
        run(Numbers(), {}, tmp_path)


class Source(list[Path]):
    """A source; knows how many there are."""

    made: list[weakref.ref] = []

    def __new__(cls, *arguments: object) -> "Source":
        made = super().__new__(cls)
        cls.made.append(weakref.ref(made))
        return made

    @classmethod
    def alive(cls) -> int:
        return sum(reference() is not None for reference in cls.made)


class Slow(Numbers):
    """Records how many sources there are each time that it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = list[int]()

    def load(self, source: list[Path]) -> float:  # type: ignore[override]
        return super().load(source[0])

    def encode(self, items: list[float]) -> list[Arrays]:
        self.alive.append(Source.alive())
        time.sleep(0.02)  # the run could submit many tasks meanwhile
        return super().encode(items)


def test_only_the_sources_of_a_few_shards_exist_at_a_time(tmp_path: Path, sources: dict[str, Path]) -> None:
    encoder = Slow()
    lazy = Sources(sources, lambda key: Source([sources[key]]))
    extract(Job(encoder, lazy, tmp_path / "numbers", tmp_path / "scratch", 2, 2))
    assert len(FeatureStore.open(tmp_path / "numbers")) == 250
    assert max(encoder.alive) <= 2 * (AHEAD + 2 * LOGGED + 2)  # 2 items per shard; Dask logs two ways


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a profile of small encoders, an index of three videos, and their media."""
    monkeypatch.chdir(tmp_path)
    small.make_project(tmp_path)
    return tmp_path


def assert_stored_equals_live(store: FeatureStore, live: dict[str, Arrays]) -> None:
    assert list(store.keys()) == list(live)
    for key, arrays in live.items():
        found = store.read(key)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, rtol=2e-3, atol=1e-3, err_msg=f"{key} {name}")


def test_stages_write_what_the_encoders_compute(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, folder = torch.device("cpu"), RefAvsFolder("data/dataset/small")
    weights, media = project / "weights", ["a", "b", "c"]
    for main in (audio.main, visual.main, text.main):
        main()
    for group in ("train", "eval"):
        monkeypatch.setattr("sys.argv", ["sam2", group])
        sam2.main()
    stores = {name: FeatureStore.open(f"data/small/features/{name}") for name in ("audio", "visual", "text")}
    stores |= {f"sam2_{group}": FeatureStore.open(f"data/small/features/sam2_{group}") for group in ("train", "eval")}
    assert stores["sam2_train"].manifest["fingerprint"] == stores["sam2_eval"].manifest["fingerprint"]

    vggish = VggishEncoder(small.audio_config(weights), 3, cpu)
    live = {m: vggish.encode([vggish.load(folder.audio_path(m))])[0] for m in media}
    assert_stored_equals_live(stores["audio"], live)
    vit = TimmEncoder(small.vit_config(weights), cpu)
    frames = frame_sources(folder, media, 3)
    assert_stored_equals_live(stores["visual"], {m: vit.encode([vit.load(frames[m])])[0] for m in media})
    roberta = TextEncoder(small.roberta_config(weights / "roberta"), cpu)
    assert_stored_equals_live(stores["text"], {t: roberta.encode([t])[0] for t in ("it", "the red star")})
    encoder = Sam2ImageEncoder(small.sam2_config(weights), cpu)
    assert_stored_equals_live(stores["sam2_train"], {"a": encoder.encode([encoder.load(frames["a"][:1])])[0]})
    assert_stored_equals_live(
        stores["sam2_eval"], {m: encoder.encode([encoder.load(frames[m])])[0] for m in ("b", "c")}
    )
    one_frame = stores["sam2_eval"].read("b", slice(0, 1))["sam2_image_embed"]
    assert one_frame.shape == (1, 64, 4, 4)


@pytest.mark.parametrize("arguments", [[], ["test_s"], ["train", "eval"]])
def test_sam2_takes_one_group(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sam2", *arguments])
    with pytest.raises(SystemExit) as ended:
        sam2.main()
    assert ended.value.code == 2
    assert "expected one of train, eval" in capsys.readouterr().err


@pytest.mark.parametrize("main", [audio.main, visual.main, text.main])
def test_the_other_stages_take_only_rehash(
    main: Callable[..., None], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main("--rehsah")
    assert ended.value.code == 2
    assert "expected no argument but --rehash, found --rehsah" in capsys.readouterr().err


def test_unchanged_media_are_hashed_once_for_all_stages(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shown by a change that leaves size, modification time and inode as they are."""
    for path in Path("data/dataset/small").rglob("*.*"):
        os.utime(path, (0, 0))
    (frame,) = Path("data/dataset/small").rglob("b/frames/0.jpg")
    content = frame.read_bytes()
    visual.main()
    frame.write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])  # in the quantisation table
    os.utime(frame, (0, 0))
    capsys.readouterr()
    visual.main()
    assert "visual: nothing to compute" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["sam2", "eval"])
    sam2.main()
    visual.main("--rehash")
    assert "1 of 3 items computed" in capsys.readouterr().out
    sam2.main()
    assert "sam2_eval: 1 of 2 items computed" in capsys.readouterr().out  # the stages share the cache


def test_a_further_profile_computes_only_what_no_other_profile_has(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_stages() -> dict[str, str]:
        """Store name -> what its stage printed."""
        for main in (audio.main, visual.main, text.main):
            main()
        for group in ("train", "eval"):
            monkeypatch.setattr("sys.argv", ["sam2", group])
            sam2.main()
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if "dashboard" not in line)

    run_stages()
    before = {path: path.read_bytes() for path in Path("data/small").rglob("*") if path.is_file()}
    shutil.copytree("configs/small", "configs/other")
    section = Path("configs/other/text.yaml")
    section.write_text(yaml.safe_dump({**yaml.safe_load(section.read_text()), "max_tokens": 7}))
    Path("data/dataset/other").symlink_to("small")
    shutil.copytree("data/small/index", "data/other/index")
    Path("configs/profile.yaml").write_text("profile: other\n")
    printed = run_stages()
    assert "items computed" in printed.pop("text")
    assert len(printed) == 4 and all(report.startswith("nothing to compute") for report in printed.values())
    for name in printed:
        shards = [path for path in Path("data/other/features", name).rglob("shard-*/**/*") if path.is_file()]
        assert shards and all(path.samefile(str(path).replace("other", "small")) for path in shards)
    soundfile.write("data/dataset/small/media/a/audio.wav", np.zeros(16_000), 16_000)
    audio.main()
    assert "1 of 3 items computed" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before  # the first profile is untouched
