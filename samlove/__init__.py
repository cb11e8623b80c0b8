"""SAM2-LOVE: segment, through a whole video, the object that a sentence refers to by what is seen and heard.

Each folder is one room: `data` (dataset, index, shards), `features` (frozen encoders), `model` (fusion transformer and
SAM 2), `train`, `infer`, `scoring` (metrics, report) and `cli`. docs/architecture.md walks through them.
"""

__version__ = "0.1.0"
