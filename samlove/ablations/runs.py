"""The runs of configs/<profile>/ablations.yaml: a profile's configuration with some values changed, once per seed.

A run reads the profile's own features and training shards, unless it changes an encoder: then the stage
`ablation_features` computes feature stores and shards for it, once for all runs with the same encoders.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samlove.config import (
    AblationsConfig,
    AudioConfig,
    FusionConfig,
    InferConfig,
    Sam2Config,
    Section,
    TextConfig,
    TrainConfig,
    VisualConfig,
    changed,
    load,
)
from samlove.data.digest import source_digests
from samlove.data.layout import Layout
from samlove.errors import RequestError
from stores.fingerprint import fingerprint_id, flat

ENCODERS: dict[str, type[Section]] = {
    "audio": AudioConfig,
    "visual": VisualConfig,
    "text": TextConfig,
    "sam2": Sam2Config,
}
VARIED = ENCODERS | {
    "fusion": FusionConfig,
    "train": TrainConfig,
    "infer": InferConfig,
}  # sections that a run can change
STORES = {"audio": "audio", "visual": "visual", "text": "text", "sam2_train": "sam2", "sam2_eval": "sam2"}  # -> section


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    sections: dict[str, Any]  # of VARIED, with the run's values, its seed and the controls asked for
    changes: dict[str, list]  # "section.setting" -> [value of the profile, value of this run]

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def own(self, section: str) -> bool:
        """Whether this run changes a section."""
        return any(setting.startswith(f"{section}.") for setting in self.changes)

    def owns(self, store: str) -> bool:
        """Whether this run changes a section that determines the feature store (of STORES)."""
        others = {"sam2.train_frames"} if store == "sam2_eval" else set()
        return any(setting.startswith(f"{STORES[store]}.") for setting in self.changes.keys() - others)

    def store(self, name: str, paths: Layout) -> Path:
        """The feature store `name` (of STORES) that this run reads."""
        if not self.owns(name):
            return paths.features / name
        settings = self.sections[STORES[name]].model_dump(mode="json")
        if name == "sam2_eval":
            del settings["train_frames"]
        return paths.ablation_features / f"{name}-{fingerprint_id(settings)}"

    def shards(self, paths: Layout) -> Path:
        """The folder of the shard sets `train` and `val` that this run is trained on."""
        if not any(map(self.own, ENCODERS)):
            return paths.shards
        encoders = {section: self.sections[section].model_dump(mode="json") for section in ENCODERS}
        return paths.ablation_shards / fingerprint_id({**encoders, "code": source_digests(["samlove.data.pack"])})


def plan_runs(config: AblationsConfig, profile: str) -> list[Run]:
    """All runs with all seeds, in the order of the file.

    Raises RequestError if a run names an unknown section or setting, or a value of the wrong type.
    """
    path = f"configs/{profile}/ablations.yaml"
    base = {section: load(kind, profile=profile) for section, kind in VARIED.items()}
    base["infer"] = changed(base["infer"], {"controls": list(config.controls)}, path)
    runs = []
    for name, changes in config.runs.items():
        if unknown := changes.keys() - VARIED.keys():
            raise RequestError(
                f"{path}: runs.{name}: expected sections {', '.join(VARIED)}, found {', '.join(sorted(unknown))}; "
                "another dataset needs a profile of its own"
            )
        for section, setting, remedy in (("train", "seed", "seeds"), ("infer", "controls", "controls")):
            if setting in changes.get(section, {}):
                raise RequestError(f"{path}: runs.{name}: {section}.{setting} is not a run's; set {remedy} of the file")
        own = {
            section: changed(base[section], values, f"{path}: runs.{name}.{section}")
            for section, values in changes.items()
        }
        different = _differences(base, own)
        for seed in config.seeds:
            sections = base | own
            sections["train"] = changed(sections["train"], {"seed": seed}, path)
            runs.append(Run(name, seed, sections, different))
    return runs


def _differences(base: dict[str, Any], own: dict[str, Any]) -> dict[str, list]:
    """{"section.setting": [value of base, value of own]} of all settings that differ."""
    found: dict[str, list] = {}
    for section, settings in own.items():
        before, after = (flat({section: values.model_dump(mode="json")}) for values in (base[section], settings))
        found |= {key: [before.get(key), after.get(key)] for key in before | after if before.get(key) != after.get(key)}
    return found
