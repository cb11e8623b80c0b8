"""`samlove predict` and `samlove bundle`: a video of one's own."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from samlove.errors import RequestError, printable

PREDICTIONS = Path("predictions")  # where results go without --out
EXAMPLE, EXAMPLE_VIDEO = "example", "video.mp4"
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A trained checkpoint, such as data/refavs/model/best.safetensors, or a folder of samlove bundle. "
        "Default: the small model that comes with samlove; it knows only LAVS-synth.",
    ),
]


def predict(
    video: Annotated[
        Path | None, typer.Argument(metavar="VIDEO", help="A video file, a folder of frames, or a picture.")
    ] = None,
    sentences: Annotated[
        list[str] | None, typer.Argument(metavar="SENTENCE", help="What to segment, one object per sentence.")
    ] = None,
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write. Default: predictions/NAME of the video.")
    ] = None,
    start: Annotated[float, typer.Option(metavar="S", help="Second at which to start.")] = 0.0,
    seconds: Annotated[
        float | None, typer.Option(metavar="S", help="Length of the part to segment. Default: to the end.")
    ] = None,
    fps: Annotated[str, typer.Option(metavar="N|all", help="Tracked frames per second; all: every frame.")] = "1",
    sound: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A sound file in place of the video's own sound.")
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Read the features that --keep-features wrote here."),
    ] = None,
    keep_features: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the features in this new folder, for other sentences.")
    ] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Make a video of LAVS-synth with sound, and segment it.")
    ] = False,
) -> None:
    """Segment what sentences refer to in a video of your own.

    Writes a video with the masks and the original sound, a contact sheet, the masks as PNG and as COCO RLE, and a
    description with the object score of each frame. Videos of any length take the same memory.
    """
    from samlove.predict.example import SENTENCES

    if example and (video is not None or sentences):
        raise RequestError("--example: takes no VIDEO and no SENTENCE; leave out one or the other")
    if not example and (video is None or not sentences):
        raise RequestError("expected VIDEO and at least one SENTENCE in quotes, or --example (samlove predict --help)")
    name = EXAMPLE if video is None else video.resolve().name if video.is_dir() else video.stem
    out = out or PREDICTIONS / name
    options = {"start": start, "seconds": seconds, "fps": _rate(fps), "sound": sound}
    stores = {"features": features, "keep_features": keep_features}
    _predict(video, sentences or list(SENTENCES), checkpoint, out, options | stores)


def _predict(video: Path | None, sentences: list[str], checkpoint: Path | None, out: Path, options: dict) -> None:
    from tqdm import tqdm

    from samlove.predict import load
    from samlove.predict.example import write_example
    from samlove.predict.output import check_out, write_run
    from stores.manifest import existing_parent, replace_folder

    given = [video, checkpoint, options["sound"], options["features"], options["keep_features"]]
    check_out(out, [path for path in given if path is not None])
    segmenter = load(checkpoint)
    if checkpoint is None and video is not None:
        print("note: without --checkpoint, a small model is used that knows only the shapes and sounds of LAVS-synth")
    with TemporaryDirectory(prefix=".samlove-", dir=existing_parent(out)) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        if video is None:
            video = new / EXAMPLE_VIDEO
            write_example(video)
        with segmenter.run(video, sentences, **options, scratch=Path(scratch), bar=tqdm) as run:
            summary = write_run(run, segmenter.setup, new)
        replace_folder(new, out)
    for line in summary:
        print(printable(line))
    print(f"{out}: written; play overlay.mp4, look at contact_sheet.png")


def _rate(fps: str) -> float | None:
    """Frames per second; None for every frame. Raises RequestError if it is neither a number nor `all`."""
    if fps == "all":
        return None
    try:
        return float(fps)
    except ValueError:
        raise RequestError(f"--fps: expected a number or all, found {fps!r}") from None


def bundle(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A trained checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; new.")],
    with_weights: Annotated[
        bool, typer.Option("--with-weights", help="Include the weights of the frozen encoders.")
    ] = False,
) -> None:
    """Collect a checkpoint and what predict needs for it in one folder.

    The folder works on other machines: samlove predict VIDEO SENTENCE --checkpoint DIR. Without --with-weights it is
    small, and the weights of the frozen encoders are put into it there.
    """
    from samlove.predict.bundle import write_bundle
    from samlove.predict.setup import find_setup

    missing = write_bundle(find_setup(checkpoint), out, with_weights)
    print(f"{out}: written")
    if missing:
        print("put these weights into it where it is used, or bundle --with-weights:")
    for name, sha256 in missing.items():
        print(f"  {name}  sha256 {sha256}")
