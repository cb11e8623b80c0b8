"""The `samlove` command. Exit status: 0 done, 1 the work failed, 2 the request was wrong; an error is one line.

Each command imports what it needs itself, so that `samlove --help` does not wait for torch.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from samlove.cli.store import store
from samlove.config import DatasetConfig, load
from samlove.errors import RequestError, one_line_errors

UsageError = cast(type[Exception], typer.BadParameter.__base__)  # click's or, in newer versions, typer's copy of it
PROFILE = Path("configs/profile.yaml")

app = typer.Typer(
    help="SAM2-LOVE: referring audio-visual segmentation over a precomputed embedding store.",
    epilog="The pipeline itself is run with dvc: dvc repro, dvc exp run, dvc metrics show.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure; the last line printed is one JSON object.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(store, name="store")


class Scale(StrEnum):
    small = "small"
    demo = "demo"
    large = "large"


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")],
    scale: Annotated[Scale, typer.Option(help="How many clips, and how big.")] = Scale.demo,
) -> None:
    """Write LAVS-synth, the generated benchmark, in the Ref-AVS layout."""
    from samlove.synth.write import write_dataset

    write_dataset(out, seed, scale.value)
    print(f"{out}: written")


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="A Ref-AVS folder: metadata.csv, media/, gt_mask/.")],
    media: Annotated[bool, typer.Option(help="Open every frame, wav and mask, or read metadata.csv alone.")] = True,
) -> None:
    """Say what is in a Ref-AVS folder, and what is wrong with it.

    Exit status 1 where a fault must not pass: which may is the active profile's `policy` in
    configs/<profile>/dataset.yaml or, where there is no configs folder, the defaults.
    """
    from samlove.data.index import audit_folder

    config = load(DatasetConfig) if PROFILE.exists() else DatasetConfig(root=str(folder))
    found = audit_folder(folder, media, dict(config.policy), config.frames)
    print(found.render())
    if found.failed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Say what the active profile still lacks on this machine.

    Data set, weights, disk, GPU memory, each with how to get it; exit status 1 where one is lacking.
    """
    from samlove.cli.doctor import examine, render
    from samlove.data.sizes import read_choices

    findings = examine(read_choices())
    print(render(findings))
    if any(finding.lacking for finding in findings):
        raise typer.Exit(1)


@app.command()
def plan(
    calibrate: Annotated[bool, typer.Option(help="Time the encoders on a few items of the dataset.")] = True,
) -> None:
    """Say how many items, files and GiB the active profile will make, and how long its features take here.

    Computed from the configuration and the index or, before there is one, metadata.csv; before anything has run.
    Exit status 1 where the disk has too little room for it.
    """
    from samlove.cli.plan import run

    if not run(calibrate):
        raise typer.Exit(1)


@bench.command("metrics")
def bench_metrics() -> None:
    """F from one histogram against the plain loop over its 255 thresholds."""
    from samlove.bench.metrics import run

    run()


@bench.command("loader")
def bench_loader() -> None:
    """Shards as the trainer reads them against other formats and a plain read."""
    from samlove.bench.loader import run

    run()


@bench.command("precision")
def bench_precision() -> None:
    """Bytes, reading and effect on the masks of each precision of SAM2's embeddings (micro profile's SAM2)."""
    from samlove.bench.precision import run

    run()


@bench.command("extract")
def bench_extract(
    profile: Annotated[str, typer.Option(help="Whose architectures, configs/PROFILE; weights are random.")] = "micro",
    items: Annotated[int, typer.Option(min=1, help="Clips for ViT, frames for SAM 2.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way is timed.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Compare so many local workers with one.")] = 1,
) -> None:
    """A feature stage, reading and writing included, against its encoder alone."""
    from samlove.bench.extract import run

    run(profile, items, rounds, workers)


@bench.command("train")
def bench_train(
    profile: Annotated[str, typer.Option(help="Whose sizes and setting, configs/PROFILE; random weights.")] = "micro",
    videos: Annotated[int, typer.Option(min=4, help="Videos of the made-up shards.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed each round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each way is timed.")] = 3,
) -> None:
    """Training steps with their reading, from every residency, against steps on one batch."""
    from samlove.bench.train import run

    run(profile, videos, steps, rounds)


@one_line_errors
def main() -> None:
    try:
        status = app(standalone_mode=False)
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if "Usage:" in message:  # a command group called with nothing after it
            print(message)
            sys.exit(2)
        raise RequestError(" ".join(message.split())) from None
    sys.exit(status)


if __name__ == "__main__":
    main()
