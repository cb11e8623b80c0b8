"""Makes torchvision importable with a torch build that its compiled extension does not fit.

PyPI's torchvision contains an extension built for PyPI's torch. With CPU-only torch that extension does not load, and
`import torchvision` fails ("operator torchvision::nms does not exist"), because torchvision registers fake kernels for
two operators that only the extension declares. samlove, timm and sam2 use none of torchvision's compiled operators, so
declaring the two without kernels is enough. If the extension loads, nothing is declared.

Import this module before timm, sam2 or torchvision: `import samlove.model.torchvision_ops  # noqa: F401`.
"""

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _load_extension() -> bool:
    """Load torchvision's extension as torchvision itself would; return whether its operators are available."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    extension = next((path for name in names if (path := Path(spec.origin).with_name(name)).exists()), None)
    if extension is None:
        return False
    try:
        torch.ops.load_library(str(extension))
    except OSError:
        return False
    return True


def _declare() -> torch.library.Library | None:
    if _load_extension():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


_library = _declare()  # keep a reference: the declarations are removed with the Library object
