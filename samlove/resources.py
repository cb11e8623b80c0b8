"""The settings and weights of the profile micro, which come with samlove, in the repository or in a wheel."""

from pathlib import Path

from samlove.errors import RequestError

PACKAGE = Path(__file__).parent
ROOTS = (PACKAGE / "_shipped", PACKAGE.parent)  # a wheel has configs/ and weights/ in the first


def shipped(name: str) -> Path:
    """The file or folder with this path relative to the repository, such as "weights/micro/sam2/sam2.safetensors".

    Raises RequestError if this installation does not have it.
    """
    for root in ROOTS:
        if (root / name).exists():
            return root / name
    raise RequestError(f"{name}: not in this installation of samlove ({PACKAGE}); install it again")
