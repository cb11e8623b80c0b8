"""`samlove store`: feature stores as things to give and take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

store = typer.Typer(help="Work on a feature store.", no_args_is_help=True)


class Kept(StrEnum):
    float16 = "float16"
    float32 = "float32"


@store.command("export")
def export_(
    path: Annotated[Path, typer.Argument(help="A feature store, such as data/features/audio.")],
    file: Annotated[Path, typer.Argument(help="The HDF5 file to write; new.")],
) -> None:
    """Write a feature store to one HDF5 file, which `samlove store import` takes back, equal to the last bit."""
    from stores import export_store

    print(f"{file}: {export_store(path, file):,} items of {path}")


@store.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file that export wrote, or a folder of MEDIA_ID.pt.")],
    path: Annotated[Path, typer.Argument(help="The store to write; new.")],
    dtype: Annotated[Kept, typer.Option(help="Of a folder's tensors; as `dtype` in audio.yaml.")] = Kept.float16,
) -> None:
    """Bring in a feature store: one that was exported, or the audio_embed/*.pt of another Ref-AVS project.

    The latter are tensors of 10x128, read without unpickling anything else; what made them is not known, and the
    store's fingerprint says `imported`.
    """
    if source.is_dir():
        from samlove.audio_embed import import_audio_embed

        count = import_audio_embed(source, path, dtype.value)
    else:
        from stores import import_store

        count = import_store(source, path)
    print(f"{path}: {count:,} items of {source}")
