"""One video of the user's own: from any container to masks, in constant memory.

`load` finds a checkpoint's encoders (`setup.py`). `clip.py` says which seconds and frames are used, `features.py`
encodes them into temporary stores, `tracking.py` tracks the objects, and `segment.py` puts these together.
"""

from samlove.predict.segment import Segmentation, Segmenter, WindowPrompts, load
from samlove.predict.tracking import Prompt

__all__ = ["Prompt", "Segmentation", "Segmenter", "WindowPrompts", "load"]
