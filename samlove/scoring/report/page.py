"""The report: one self-contained HTML page, without scripts or external files."""

import json
from pathlib import Path

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from tqdm import tqdm

from samlove.data.dataset import RefAvsFolder
from samlove.errors import RequestError
from samlove.scoring.evaluate import CONTROL_NAMES, NAMES, number
from samlove.scoring.protocols import PROTOCOLS
from samlove.scoring.report.clips import Clip, choose, draw_clip
from samlove.scoring.report.curves import draw_curves, draw_presence, read_curves
from samlove.scoring.report.paper import TABLE_1
from samlove.scoring.report.provenance import checkpoint_header, fingerprints, source_revision, versions
from stores import PredictionReader

TEMPLATE = "template.html.j2"


def build_report(data: Path, folder: RefAvsFolder, clips: int, profile: str, config: dict[str, dict]) -> str:
    """The page, from the outputs below `data` (data/<profile>); curves, controls and cues appear if they exist.

    config: {section: its settings}, shown unchanged. Raises RequestError if evaluate has not run.
    """
    metrics = _read_json(data / "metrics.json")
    earlier: dict = {"late": {}, "published": {}}  # what earlier versions did not write
    details = earlier | _read_json(data / "evaluation" / "details.json")
    rows = pd.read_parquet(data / "evaluation" / "rows.parquet")
    return load_template(TEMPLATE).render(
        dataset=config["dataset"]["name"],
        profile=profile,
        metrics=metrics,
        details=details,
        by_cue=_by_cue(details),
        names=NAMES,
        control_names=CONTROL_NAMES,
        published=PROTOCOLS,
        paper=TABLE_1,
        presence=Markup(draw_presence(**details["presence"])) if details.get("presence") else None,
        curves=Markup(draw_curves(read_curves(data / "dvclive"))),  # our own SVG
        clips=_draw_clips(rows, clips, folder, data / "predictions"),
        config=config,
        revision=source_revision(),
        versions=versions(),
        fingerprints=fingerprints(data),
        checkpoint=checkpoint_header(data / "model" / "best.safetensors"),
    )


def load_template(name: str) -> Template:
    """A template of this folder. It escapes HTML, and has the filters `number` and `yaml`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "yaml": _as_yaml}
    return environment.get_template(name)


def _by_cue(details: dict) -> dict[str, dict]:
    """{split: {cues, or that the target appears later: scores}}; splits without any are left out."""
    late = {split: {"target out of sight in frame 0": scores} for split, scores in details["late"].items()}
    splits = {split: details["cues"].get(split, {}) | late.get(split, {}) for split in ("test_s", "test_u")}
    return {split: groups for split, groups in splits.items() if groups}


def _draw_clips(rows: pd.DataFrame, clips: int, folder: RefAvsFolder, predictions: Path) -> list[Clip]:
    drawn = []
    for row, rank in tqdm(choose(rows, clips), desc="report: examples", unit="video", mininterval=2):
        reader = PredictionReader(predictions / row["split"] / "predictions.h5")
        drawn.append(draw_clip(row, rank, folder, reader))
    return drawn


def _read_json(path: Path) -> dict:
    if not path.exists():
        raise RequestError(f"{path}: no such file; run: dvc repro evaluate")
    return json.loads(path.read_text(encoding="utf-8"))


def _as_yaml(values: dict) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110).rstrip()
