"""SAM2-LOVE: segment, through a whole video, the object that a sentence refers to by sight and sound.

Read top down: `config` (every choice), `dataset` and `index` (the Ref-AVS folder), `encoders` and
`extract` (frozen features), `fusion` and `sam2` (the method), `train`, `infer`, `metrics`, `evaluate`.
"""

__version__ = "0.1.0"
