"""SAM2-LOVE: segment, through a whole video, the object that a sentence refers to by what is seen and heard.

Each folder is one room: `data` (dataset, index, shards), `features` (frozen encoders), `model` (fusion transformer and
SAM 2), `train`, `infer`, `scoring` (metrics, report), `predict` (a video of one's own) and `cli`. docs/architecture.md
walks through them.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`samlove.load` is `samlove.predict.load`, imported when it is used: it needs torch, and no stage needs it."""
    if name == "load":
        return import_module("samlove.predict").load
    raise AttributeError(f"module 'samlove' has no attribute {name!r}")
