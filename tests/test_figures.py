"""Figures are the same whatever matplotlib's settings are on the machine, and text with $ is no formula."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from samlove.data.dataset import RefAvsFolder
from samlove.scoring.report.curves import draw_curves
from samlove.scoring.report.picture import draw_picture
from stores import PredictionReader
from tests.made_run import make_run

DRAW = """
import sys
from pathlib import Path
import pandas as pd
from samlove.scoring.report.curves import draw_curves
from samlove.scoring.report.picture import draw_picture, save
from samlove.data.dataset import RefAvsFolder
from stores import PredictionReader
data = Path(sys.argv[1])
row = pd.read_parquet(data / "index" / "expressions.parquet").assign(J=0.5, F=0.5).iloc[0].to_dict()
reader = PredictionReader(data / "predictions" / "test_s" / "predictions.h5")
save(draw_picture(row, RefAvsFolder(data / "set"), reader), Path(sys.argv[2]))
curve = pd.DataFrame({"epoch": [1, 2, 3], "value": [1e-7, 2e-7, 4e-7]})
Path(sys.argv[3]).write_text(draw_curves({"loss": {"train": curve, "val": curve}}))
"""
RC = """
text.usetex: True
backend: TkAgg
figure.dpi: 33
savefig.format: pdf
axes.grid: True
axes.unicode_minus: False
axes.formatter.use_mathtext: True
lines.linewidth: 9
font.family: fantasy
font.size: 40
svg.fonttype: path
not.a.setting: 1
"""
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": "style/matplotlibrc"}
NOWHERE = {"HOME": "/proc/nobody", "MPLCONFIGDIR": "/proc/nobody/matplotlib", "XDG_CONFIG_HOME": "/proc/nobody"}
ENVIRONMENTS = {
    "notebook": NOTEBOOK,
    "container": NOWHERE | {"MPLBACKEND": "nope", "WORKING_FOLDER": "style"},  # where a matplotlibrc is
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("run")
    make_run(data, {"test_s": 3})
    (data / "style").mkdir()
    (data / "style" / "matplotlibrc").write_text(RC)
    return data


def draw(data: Path, name: str, **variables: str) -> tuple[bytes, bytes]:
    """The picture and the curves that a process with these variables draws."""
    folder = data / variables.pop("WORKING_FOLDER", ".")
    outputs = data / f"{name}.png", data / f"{name}.svg"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MPL", "MATPLOTLIB"))}
    environment = clean | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables
    done = subprocess.run(
        [sys.executable, "-c", DRAW, data, *outputs], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    picture, curves = (path.read_bytes() for path in outputs)
    return picture, curves


@pytest.fixture(scope="module")
def plain(data: Path) -> tuple[bytes, bytes]:
    return draw(data, "plain")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_settings_of_the_user_change_no_byte(name: str, data: Path, plain: tuple[bytes, bytes]) -> None:
    assert draw(data, name, **ENVIRONMENTS[name]) == plain


@pytest.mark.parametrize("text", ["costs $5 or $6", r"the $\frac{$ sign", "$x$", r"back\slash _ ^ { } # % &"])
def test_text_between_dollars_is_no_formula(text: str, data: Path) -> None:
    row = pd.read_parquet(data / "index" / "expressions.parquet").assign(J=0.5, F=0.5).iloc[0].to_dict()
    reader = PredictionReader(data / "predictions" / "test_s" / "predictions.h5")
    drawn, other = (
        np.asarray(draw_picture(row | {"exp": exp}, RefAvsFolder(data / "set"), reader))
        for exp in (text, text.replace("$", "S"))
    )
    assert drawn.shape == other.shape and ((drawn != other).any() == ("$" in text))
    curve = pd.DataFrame({"epoch": [1, 2], "value": [1.0, 2.0]})
    assert text.replace("&", "&amp;") in draw_curves({text: {"train": curve}})
