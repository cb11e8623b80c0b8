"""The `samlove` command. Exit status: 0 success, 1 failure or a failed check, 2 invalid request. Errors are one line.

Each command imports what it needs itself, so that `samlove --help` does not wait for torch.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from samlove.cli.help import GroupedHelp, examples
from samlove.cli.predict import bundle, predict
from samlove.cli.store import store
from samlove.cli.web import web
from samlove.config import DatasetConfig, load
from samlove.environment import check_code
from samlove.errors import RequestError, one_line_errors

UsageError = cast(type[Exception], typer.BadParameter.__base__)  # click's or, in newer versions, typer's copy of it
INTERRUPTED = 130  # what typer returns after Ctrl-C
PROFILE = Path("configs/profile.yaml")
OWN, BEFORE, AFTER, TOOLS = "Your own video", "Before a run", "After a run", "Generated data and benchmarks"  # groups
PIPELINE = """\b
Run the pipeline with DVC:
  dvc repro                      Run every stage that is not up to date.
  dvc exp run -S FILE:KEY=VALUE  Run them with a changed setting.
  dvc exp show                   Compare such runs.

\b
samlove COMMAND --help describes a command and gives examples.
Exit status: 0 success, 1 failure or a failed check, 2 invalid request.
"""

app = typer.Typer(
    cls=GroupedHelp,
    help="SAM2-LOVE on precomputed features: segment the object that an expression refers to in a video with sound.",
    epilog=PIPELINE,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    cls=GroupedHelp,
    help="Measure speed and size on this machine.\n\nThe last line of output is one JSON object.",
    no_args_is_help=True,
)
app.add_typer(store, name="store", cls=GroupedHelp, rich_help_panel=AFTER)
app.add_typer(bench, name="bench", rich_help_panel=TOOLS)


app.command(
    rich_help_panel=OWN,
    epilog=examples(
        "samlove predict --example",
        'samlove predict clip.mp4 "the guitar that plays" --checkpoint bundle',
    ),
)(predict)
app.command(
    rich_help_panel=OWN,
    epilog=examples("samlove web", "samlove web --checkpoint data/refavs/model/best.safetensors --port 8080"),
)(web)
app.command(
    rich_help_panel=OWN,
    epilog=examples("samlove bundle data/micro/model/best.safetensors --out bundle --with-weights"),
)(bundle)


class Scale(StrEnum):
    small = "small"
    demo = "demo"
    large = "large"


# --- before a run ----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=BEFORE, epilog=examples("samlove doctor"))
def doctor() -> None:
    """Check what the active profile needs, and say how to get it.

    Checks git and DVC, dataset, weights (by loading them), disk and GPU memory. Exits with status 1 if anything is
    missing.
    """
    from samlove.cli.doctor import examine, render
    from samlove.features.sizes import read_settings

    findings = examine(read_settings())
    print(render(findings))
    if any(finding.missing for finding in findings):
        raise typer.Exit(1)


@app.command(
    rich_help_panel=BEFORE, epilog=examples("samlove plan", "samlove plan --no-calibrate", "samlove plan --ablations")
)
def plan(
    calibrate: Annotated[bool, typer.Option(help="Time the encoders on a few items of the dataset.")] = True,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Plan the runs of ablations.yaml instead; times a few steps of each.")
    ] = False,
) -> None:
    """Estimate items, files, disk space and time of a run.

    Can be run before any stage: it counts from the index or, if there is none yet, from metadata.csv or Ref-AVS's
    published numbers.
    The time covers the feature stages. Exits with status 1 if the disk has too little space.
    """
    from samlove.cli import plan, plan_ablations

    if not (plan_ablations.run() if ablations else plan.run(calibrate)):
        raise typer.Exit(1)


@app.command(
    rich_help_panel=BEFORE,
    epilog=examples("samlove audit data/dataset/refavs", "samlove audit --no-media data/dataset/refavs"),
)
def audit(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A dataset in the Ref-AVS layout: metadata.csv, media/, gt_mask/.")
    ],
    media: Annotated[
        bool, typer.Option(help="Also decode frames, audio and masks; --no-media checks the tables only.")
    ] = True,
) -> None:
    """Count what a Ref-AVS dataset contains, and list its faults.

    Exits with status 1 if a fault has policy `fail`. Policies come from the active profile's
    configs/<profile>/dataset.yaml or, without a configs folder, the defaults.
    """
    from samlove.data.index import audit_folder

    config = load(DatasetConfig) if PROFILE.exists() else DatasetConfig(root=str(folder))
    found = audit_folder(folder, media, dict(config.policy), config.frames)
    print(found.render())
    if found.failed:
        raise typer.Exit(1)


# --- after a run -----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=AFTER, epilog=examples("samlove results"))
def results() -> None:
    """Print the result table of the last run, and the path of its report."""
    from samlove.cli.results import render_results

    print(render_results())


@app.command(
    rich_help_panel=AFTER,
    epilog=examples("samlove picture picture.png", "samlove picture heart.jpg --row ID_0_10000_heart_3"),
)
def picture(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .png or .jpg file; replaced if it exists.")],
    row: Annotated[
        str | None,
        typer.Option(
            metavar="ROW_ID",
            help="The expression to draw, by its row_id in data/<profile>/evaluation/rows.parquet. "
            "Default: the seen expression with the highest J&F of those that need sound but not sight.",
        ),
    ] = None,
) -> None:
    """Draw a video of the last run: frames, masks and loudness.

    Shows one expression, the predicted mask, the outline of the ground-truth mask and the J and F of the expression.
    """
    from samlove.cli.results import write_picture

    print(write_picture(out, row))


@app.command(
    rich_help_panel=AFTER,
    epilog=examples(
        "samlove score masks --dataset refavs",
        "samlove score masks.json --dataset refavs --protocol crab_plus",
        "samlove score ours theirs --dataset refavs --out scores.json",
    ),
)
def score(
    masks: Annotated[
        Path, typer.Argument(metavar="MASKS", help="PNG, .npy, .npz, COCO RLE or predictions.h5 (docs/protocols.md).")
    ],
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="The masks of another method, to compare with.")
    ] = None,
    *,
    dataset: Annotated[Path, typer.Option(metavar="DIR", help="The dataset: metadata.csv, media/, gt_mask/.")],
    split: Annotated[str, typer.Option(metavar="SPLIT,...", help="The splits to score.")] = "test_s,test_u,test_n",
    protocol: Annotated[str, typer.Option(metavar="all|NAME,...", help="The protocols to score under.")] = "all",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write the results here; replaced if it exists.")
    ] = None,
) -> None:
    """Score the masks of any method under each published protocol of Ref-AVS.

    Missing, doubled and unmatched masks and other sizes are counted and listed, with what each counts as. With OTHER,
    also shows the difference between both methods with its 95 % interval, by split, cue and category. Needs only the
    dataset, no configs folder.
    """
    from samlove.cli.score import run

    run([masks] if other is None else [masks, other], dataset, list(dict.fromkeys(split.split(","))), protocol, out)


# --- generated data and benchmarks -----------------------------------------------------------------------------------


@app.command(rich_help_panel=TOOLS, epilog=examples("samlove synth --out lavs --seed 0 --scale small"))
def synth(
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same bytes.")],
    scale: Annotated[Scale, typer.Option(help="Number and size of the videos.")] = Scale.demo,
) -> None:
    """Write the generated dataset LAVS-synth, in the Ref-AVS layout."""
    from samlove.synth.write import write_dataset

    write_dataset(out, seed, scale.value)
    print(f"{out}: written")


@bench.command("metrics", epilog=examples("samlove bench metrics"))
def bench_metrics() -> None:
    """Compute F from one histogram, and compare with a loop over its 255 thresholds."""
    from samlove.bench.metrics import run

    run()


@bench.command("loader", epilog=examples("samlove bench loader"))
def bench_loader() -> None:
    """Read training shards as the trainer does, and compare with other formats and a plain read."""
    from samlove.bench.loader import run

    run()


@bench.command("precision", epilog=examples("samlove bench precision"))
def bench_precision() -> None:
    """Store SAM 2's embeddings in each precision, and compare size, read speed and effect on masks.

    Uses the micro profile's SAM 2.
    """
    from samlove.bench.precision import run

    run()


@bench.command("extract", epilog=examples("samlove bench extract", "samlove bench extract --items 256 --workers 2"))
def bench_extract(
    profile: Annotated[
        str, typer.Option(help="Profile (configs/PROFILE) that sets the architectures; weights are random.")
    ] = "micro",
    items: Annotated[int, typer.Option(min=1, help="Videos for ViT, frames for SAM 2.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Number of times to time each variant.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Number of local workers to compare with one.")] = 1,
) -> None:
    """Run a feature stage, reading and writing included, and compare with its encoder alone."""
    from samlove.bench.extract import run

    run(profile, items, rounds, workers)


@bench.command("train", epilog=examples("samlove bench train", "samlove bench train --profile refavs --steps 8"))
def bench_train(
    profile: Annotated[
        str, typer.Option(help="Profile (configs/PROFILE) that sets sizes and settings; weights are random.")
    ] = "micro",
    videos: Annotated[int, typer.Option(min=4, help="Number of videos in the generated training shards.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Number of timed steps per round.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Number of times to time each variant.")] = 3,
) -> None:
    """Train from shards on disk, in memory and on the GPU, and compare with one batch and with online features.

    Online steps decode and encode the media of their samples instead of reading features. On a GPU, also compares
    plain, compiled and recorded steps, and measures memory. On a CPU, a step of --profile refavs takes minutes.
    """
    from samlove.bench.train import run

    run(profile, videos, steps, rounds)


@bench.command("infer", epilog=examples("samlove bench infer", "samlove bench infer --profile refavs --videos 4"))
def bench_infer(
    profile: Annotated[
        str, typer.Option(help="Profile (configs/PROFILE) that sets sizes and settings; weights are random.")
    ] = "micro",
    videos: Annotated[int, typer.Option(min=1, help="Number of generated videos, of five expressions each.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Number of times to time each variant.")] = 3,
) -> None:
    """Predict whole videos as the infer stage does, and compare with the computation alone."""
    from samlove.bench.infer import run

    run(profile, videos, rounds)


@bench.command(
    "scale",
    epilog=examples("samlove bench scale", "samlove bench scale --sizes 3000,30000,300000,1000000 --folder /scratch"),
)
def bench_scale(
    sizes: Annotated[str, typer.Option(metavar="N,N,...", help="Increasing numbers of videos.")] = "3000,30000",
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write temporary files, 13 kB per video. Default: the system's."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Seconds after which a step is given up.")] = 1800,
) -> None:
    """Write, open, list, sample and verify more and more tiny videos, and compare time and memory.

    Also plans and runs an extraction for each number of videos. The default takes about 3 minutes, a million videos
    take an hour. Needs Linux.
    """
    from samlove.bench.scale import parse_sizes, run

    run(parse_sizes(sizes), folder, limit)


@one_line_errors
def main() -> None:
    check_code()
    try:
        status = app(standalone_mode=False)
    except UsageError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if "Usage:" in message:  # a command group called without a command
            print(message)
            sys.exit(2)
        raise RequestError(" ".join(message.split())) from None
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    sys.exit(status)


if __name__ == "__main__":
    main()
