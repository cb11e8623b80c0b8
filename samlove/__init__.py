"""SAM2-LOVE: segment, through a whole video, the object that a sentence refers to by what is seen and heard.

Each folder is one room: `data` (dataset, index, shards), `features` (frozen encoders), `model` (fusion transformer and
SAM 2), `train`, `infer`, `scoring` (metrics, report), `predict` (a video of one's own) and `cli`. docs/architecture.md
walks through them.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from samlove.predict import Segmenter

__version__ = "0.1.0"


def load(checkpoint: str | Path | None = None, device: str | None = None) -> "Segmenter":
    """A segmenter for videos: samlove.predict.load, which describes the arguments. Imports torch only when called."""
    from samlove.predict import load

    return load(checkpoint, device)
