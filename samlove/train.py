"""Training (sections 3.3 and 4.1): the fusion module, SAM 2's prompt encoder and mask decoder, on precomputed features.

(seed, epoch) determines the samples of an epoch and their order, so the number of samples consumed is a run's whole
position, however they are loaded. An interrupted run resumes from its state file; on the CPU the result is
bit-identical to an uninterrupted run. The state is found by a fingerprint of everything the run depends on.

SIGINT or SIGTERM saves the state and ends the run: at once while it waits for a batch, else after the current step.

With several processes (samlove.model.processes), each computes the gradients of its share of every step's samples, and
of the validation samples. The samples of a step do not depend on the number of processes. The first process writes all
files.
"""

import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from dask.system import CPU_COUNT
from dvclive import Live
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from samlove.config import FusionConfig, Sam2Config, TrainConfig
from samlove.data.batches import Batch, Items, Numbers, read_batches, split
from samlove.data.digest import source_digests
from samlove.data.loader import ExpressionDataset, collate, epoch_order, make_resident
from samlove.errors import RequestError, SamloveError
from samlove.features.lock import only_run
from samlove.model.checkpoint import Header, Origin, save_checkpoint
from samlove.model.loss import Losses, mask_loss, upsample
from samlove.model.optimizer import build_optimizer, set_learning_rate, warmup_decay
from samlove.model.processes import ALONE, Processes
from samlove.model.sam2 import FirstFrame
from samlove.model.sam2_build import checkpoint_path
from samlove.model.sam2_love import SamLove
from samlove.model.stopping import Stopped, Stopping
from samlove.model.training_state import MADE_BY, STATE, Progress, report_other_runs, restore_state, save_state
from samlove.scoring.metrics import quantise
from samlove.scoring.validation import FIELDS, SELECTED_BY, average, score_frame
from stores.fingerprint import check_fingerprint, fingerprint_id, sha256_file
from stores.manifest import replace_folder, write_json

SAVE_SECONDS = 300  # a kill without notice loses at most this much work
WORKERS = 8  # default limit of threads that read samples; more take memory and read hardly faster
SPEED = {"workers", "resident", "processes"}  # settings that do not affect the result
# The modules that determine what a step does. A run whose state other code wrote is not resumed.
CODE = (
    "samlove.data.batches",
    "samlove.data.loader",
    "samlove.model.block",
    "samlove.model.fusion",
    "samlove.model.loss",
    "samlove.model.one_block",
    "samlove.model.optimizer",
    "samlove.model.processes",
    "samlove.model.sam2",
    "samlove.model.sam2_love",
    "samlove.model.stopping",
    "samlove.model.training_state",
    "samlove.scoring.presence",
    "samlove.scoring.validation",
    "samlove.train",
)


@dataclass(frozen=True)
class Samples:
    """The training and validation samples. `collate` makes a batch, as in samlove.data.loader, from items."""

    train: Items
    val: Items
    collate: Callable[[list], Batch]
    order: Callable[[int], np.ndarray]  # epoch -> the numbers of its training items, int64; equally many in all epochs
    val_frames: int = 1  # validation samples per expression, which follow each other
    on_gpu: bool = False  # whether the items are already on the GPU


class Trainer:
    """One run: `Trainer(...).run()`."""

    def __init__(
        self,
        model: SamLove,
        origin: Origin,
        samples: Samples,
        device: torch.device,
        scratch: Path,
        bar: Callable[..., tqdm] = tqdm,
        stop: Event | None = None,
        processes: Processes = ALONE,
    ):
        """model: newly built, its SAM 2 not yet frozen; moved to `device` here. scratch: holds one folder per run.
        bar: shows the progress. stop: when it is set, the run ends as on a signal. processes: those of the run; all
        see the same scratch folder.

        Resumes the run with the same fingerprint if its state is in the scratch folder. Raises SamloveError if that
        state is damaged, if the checkpoint of its best epoch is missing, or if processes found different states.
        """
        self.processes = processes
        self.config: TrainConfig = origin.train
        self.origin, self.samples, self.device = origin, samples, device
        self.samples_per_epoch = len(samples.order(0))
        model.sam2.set_trainable(self.config.train_prompt_encoder, self.config.train_mask_decoder)
        self.model = model.to(device)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self.parameters, self.config)
        self.progress = Progress()
        self.fingerprint = run_fingerprint(origin)
        self.folder = scratch / fingerprint_id(self.fingerprint)
        self._new_bar, self._stopping = bar, Stopping(processes, stop)
        if self.state_file.exists():
            self.progress = restore_state(self.state_file, self.parameters, self.optimizer)
            if self.progress.epoch and not self.best_file.exists():
                raise SamloveError(
                    f"{self.best_file}: no such file, although the interrupted run has completed "
                    f"{self.progress.epoch} epochs; restore it, or delete {self.folder} and run: dvc repro train"
                )
        # Also a barrier: no process may write a new state before all have read this one.
        starts = processes.exchange(f"{self.folder.name} at step {self.progress.step}")
        if len(set(starts)) > 1:
            raise SamloveError(
                f"{scratch}: the processes found different runs or states ({', '.join(dict.fromkeys(starts))}); all "
                "need the same code, settings and files: put this folder on a shared file system"
            )

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    @property
    def best_file(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def total_steps(self) -> int:
        return self.config.epochs * math.ceil(self.samples_per_epoch / self._samples_per_step)

    @property
    def _samples_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulate

    @property
    def workers(self) -> int:
        """Threads that read samples; 0: the training thread reads them, as it does if they are on the GPU."""
        if self.samples.on_gpu:
            return 0
        share = max(1, CPU_COUNT // self.processes.on_machine)
        return min(share, WORKERS) if self.config.workers is None else self.config.workers

    def _learning_rate(self, step: int) -> float:
        return self.config.lr * warmup_decay(step, self.total_steps, self.config.warmup_steps)

    def run(self, live: Live | None) -> None:
        """Train to the end; `best_file` then holds the best epoch's checkpoint.

        live: gets one row per epoch; a resumed run logs the earlier epochs again. None in all processes but the first.
        Raises KeyboardInterrupt after saving the state if any process gets SIGINT or SIGTERM, SamloveError if a loss or
        a mask is not finite, OtherFailed if another process failed.
        """
        for row in self.progress.history:
            _log(live, row)
        with self._stopping.on_signals(), self._bar() as bar:
            try:
                while self.progress.epoch < self.config.epochs:
                    self._train_epoch(bar)
                    self._report(self._close_epoch(), live, bar)
            except Stopped:  # the gradients computed since the last step are dropped
                self._save()
                raise KeyboardInterrupt from None

    def _report(self, row: dict[str, float], live: Live | None, bar: tqdm) -> None:
        _log(live, row)
        bar.write(f"epoch {self.progress.epoch}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))
        if self.progress.epoch == 1 and f"val/{SELECTED_BY}" not in row:
            bar.write(
                f"no validated frame of the val split has a target, so F and {SELECTED_BY} are undefined: the "
                "checkpoint will be that of the last epoch, not of the best"
            )

    def _train_epoch(self, bar: tqdm) -> None:
        progress = self.progress
        self.model.train()
        steps = split(self.samples.order(progress.epoch)[progress.consumed :], self._samples_per_step)
        mine = [split(self._share(step), self.config.batch_size) for step in steps]
        saved = time.monotonic()
        with closing(self._read(self.samples.train, [batch for step in mine for batch in step])) as batches:
            for step, share in zip(steps, mine, strict=True):
                size = len(step)
                losses = self._step(self._next(batches, len(share)), size)
                for name, value in losses.items():
                    progress.sums[name] = progress.sums.get(name, 0.0) + value
                progress.consumed += size
                bar.update(size)
                bar.set_postfix(epoch=progress.epoch + 1, loss=f"{losses['loss'] / size:.3f}", refresh=False)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self._save()
                    saved = time.monotonic()

    def _share(self, order: Numbers) -> Numbers:
        """The part of this process."""
        return order[self.processes.rank :: self.processes.count]

    def _step(self, batches: list[Batch], size: int) -> dict[str, float]:
        """One optimiser step over `size` samples -> the sum of each loss over these samples.

        batches: the share of this process, which can be empty. Every sample has the same weight, whatever its batch and
        its process: 2 batches of 4 equal one batch of 8.
        """
        set_learning_rate(self.optimizer, self._learning_rate(self.progress.step))
        parts = self._stopping.exchange(self._backward(batches, size))
        self.processes.sum_gradients(list(self.parameters.values()))
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def _backward(self, batches: list[Batch], size: int) -> dict[str, float]:
        """Add up the gradients of the batches -> the sum of each loss over their samples."""
        parts: list[Losses] = []
        for batch in batches:
            losses = self._losses(self._on_device(batch))
            (losses.total.sum() / size).backward()
            parts.append(Losses(*(part.detach() for part in losses)))
        if not parts:
            return {"loss": 0.0, "bce": 0.0, "dice": 0.0}
        # Copied to the CPU together, once per step, because each copy waits for the GPU.
        values = Losses(*torch.stack([torch.cat(part) for part in zip(*parts, strict=True)]).cpu().double())
        if not values.total.isfinite().all():
            rows = [row for batch in batches for row in batch["row_id"]]
            raise SamloveError(self._not_finite("the loss", rows, values.total.isfinite()))
        return {"loss": values.total.sum().item(), "bce": values.bce.sum().item(), "dice": values.dice.sum().item()}

    def _losses(self, batch: Batch) -> Losses:
        return mask_loss(self._forward(batch), batch["mask"], self.config.weights)

    def _forward(self, batch: Batch) -> FirstFrame:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.model(batch)

    def _not_finite(self, what: str, rows: Sequence[str], finite: Tensor) -> str:
        """The message about the rows that are not `finite`, bool (rows,)."""
        bad = [row for row, good in zip(rows, finite.tolist(), strict=True) if not good]
        return (
            f"step {self.progress.step} (epoch {self.progress.epoch + 1}): {what} is not finite for {len(bad)} of "
            f"{len(rows)} rows: {', '.join(bad[:8])}; check the features with samlove store verify, or lower lr or "
            "set clip_norm in configs/<profile>/train.yaml"
        )

    def _close_epoch(self) -> dict[str, float]:
        """Validate, save the checkpoint if it is the best, save the state -> the row for DVCLive."""
        progress = self.progress
        self._save()
        scores = self.validate()
        row = {f"train/{name}": value / progress.consumed for name, value in progress.sums.items()}
        row["lr"] = self._learning_rate(progress.step - 1)
        row |= {f"val/{name}": value for name, value in scores.items()}
        progress.history.append(row)
        progress.epoch, progress.consumed, progress.sums = progress.epoch + 1, 0, {}
        if SELECTED_BY not in scores or scores[SELECTED_BY] > progress.best:  # undefined: the last epoch replaces all
            progress.best = scores.get(SELECTED_BY, progress.best)
            header = Header(**dict(self.origin), epoch=progress.epoch, validation=scores)
            if self.processes.first:
                save_checkpoint(self.best_file, self.model, header)
        self._save()
        return row

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The mean scores of the validation samples, as samlove.scoring.validation.average gives them.

        They are what is trained: the expressions on the first frame or, if any frame is trained, on each frame that is
        in the shards. The infer and evaluate stages score the masks of the whole video.
        Raises SamloveError if a mask is not finite.
        """
        self.model.eval()
        count = len(self.samples.val)
        batches_of_mine = split(self._share(range(count)), self.config.batch_size)
        mine: list[tuple[float, ...]] = []
        with closing(self._read(self.samples.val, batches_of_mine)) as batches:
            for _ in batches_of_mine:
                (batch,) = self._next(batches, 1)
                answer = self._forward(self._on_device(batch))
                logits = answer.best
                if not (finite := ~logits.isnan().flatten(1).any(1)).all():
                    raise SamloveError(self._not_finite("the validation mask", batch["row_id"], finite))
                bins = quantise(upsample(logits[:, None], batch["mask"].shape[-1])[:, 0])
                targets, objects = batch["mask"].cpu().numpy() > 0, answer.object_score.tolist()
                mine += map(score_frame, bins, targets, objects)
        samples = np.empty((count, len(FIELDS)))
        for rank, of_rank in enumerate(self._stopping.exchange(mine)):
            samples[rank :: self.processes.count] = np.reshape(of_rank, (-1, len(FIELDS)))
        return average(samples, self.samples.val_frames, self.config.null_references == "presence")

    def _batches(self, items: Items, order: Numbers) -> Generator[Batch, None, None]:
        """The batches of one pass over `items` in this order, in one process."""
        return self._read(items, split(order, self.config.batch_size))

    def _read(self, items: Items, batches: Sequence[Numbers]) -> Generator[Batch, None, None]:
        """These batches, on the CPU in pinned memory if the model is on a GPU."""
        pinned = self.device.type == "cuda" and not self.samples.on_gpu

        def collate(samples: list) -> Batch:
            batch = self.samples.collate(samples)
            return {k: v.pin_memory() if pinned and isinstance(v, Tensor) else v for k, v in batch.items()}

        return read_batches(items, batches, collate, self.workers)

    def _next(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """`count` more batches. A requested stop ends the run here."""
        with self._stopping.waiting():
            return list(islice(batches, count))

    def _on_device(self, batch: Batch) -> Batch:
        """The batch on the device, numbers as float32, without the text positions that are padding in every sample."""
        length = int(batch["text_mask"].any(0).nonzero().max()) + 1
        batch = {**batch, "text": batch["text"][:, :length], "text_mask": batch["text_mask"][:, :length]}
        for name, value in batch.items():
            if isinstance(value, Tensor):
                moved = value.to(self.device, non_blocking=True)
                batch[name] = moved if moved.dtype == torch.bool else moved.float()
        return batch

    def _bar(self) -> tqdm:
        samples = self.samples_per_epoch
        done = self.progress.epoch * samples + self.progress.consumed
        return self._new_bar(total=self.config.epochs * samples, initial=done, unit="expr", mininterval=2, desc="train")

    def _save(self) -> None:
        if self.processes.first:
            save_state(self.state_file, self.progress, self.parameters, self.optimizer)


def prepare(
    shards: Path,
    fusion: FusionConfig,
    config: TrainConfig,
    sam2: Sam2Config,
    device: torch.device,
    say: Callable[[str], object] = print,
) -> tuple[Origin, Samples]:
    """What `train` needs, from the shard sets `shards`/train and `shards`/val. say: is told where they are held.

    Raises RequestError or SamloveError if they are missing or damaged, or differ from each other or from `sam2`, or if
    any frame is to be trained and `sam2` stores only one.
    """
    if config.supervise == "any" and sam2.train_frames == 1:
        raise RequestError(
            "train.yaml: supervise: any needs more than one frame per video, found train_frames: 1 in sam2.yaml; set "
            "it to at least 2 and run: dvc repro train"
        )
    train_set, val_set = (ExpressionDataset(shards / split) for split in ("train", "val"))
    features = train_set.features
    check_fingerprint(val_set.made_from, train_set.made_from, shards / "val", "dvc repro pack")
    origin = Origin(
        fusion=fusion,
        train=config,
        sam2=sam2,
        sam2_sha256=sha256_file(checkpoint_path(sam2.checkpoint)),
        dims=train_set.dims,
        features=features,
        shards={"train": train_set.id, "val": val_set.id},
    )
    wanted = {"weights_sha256": origin.sam2_sha256, "cache_point": sam2.cache_point}
    found = {name: features["sam2"].get(name) for name in wanted}
    where = f"{shards / 'train'}: its SAM 2 embeddings"
    check_fingerprint(found, wanted, where, "dvc repro pack")
    check_fingerprint({"train_frames": train_set.frames}, {"train_frames": sam2.train_frames}, where, "dvc repro pack")
    resident = make_resident([train_set, val_set], config.resident, device, say)
    any_frame = config.supervise == "any"
    samples = Samples(
        train_set,
        val_set if any_frame else Subset(val_set, range(0, len(val_set), val_set.frames)),
        collate,
        order=partial(epoch_order, train_set.videos, train_set.frames, config),
        val_frames=val_set.frames if any_frame else 1,
        on_gpu=resident == "gpu",
    )
    return origin, samples


def train(
    origin: Origin,
    samples: Samples,
    device: torch.device,
    checkpoint: Path,
    live_folder: Path,
    scratch: Path,
    bar: Callable[..., tqdm] = tqdm,
    stop: Event | None = None,
    processes: Processes = ALONE,
) -> None:
    """Train a model to the end and write the checkpoint of its best epoch. Resumes the same run if it was interrupted.

    checkpoint: the file to write at the end. live_folder: DVCLive's folder. scratch: holds one folder per unfinished
    run, which is removed when the run ends. bar, stop, processes: as in `Trainer`. Raises RequestError if a split has
    no samples, SamloveError if another run is training the same checkpoint; else see `Trainer.run`.
    """
    for name, items in (("train", samples.train), ("val", samples.val)):
        if not len(items):
            raise RequestError(f"the {name} shard set has no samples; check the dataset; run: samlove audit DIR")
    first = processes.first
    with only_run(scratch.with_name(f"{scratch.name}.lock"), checkpoint) if first else nullcontext():
        torch.manual_seed(origin.train.seed)
        trainer = Trainer(origin.build(), origin, samples, device, scratch, bar if first else _Silent, stop, processes)
        if not first:
            trainer.run(None)
            return
        report_other_runs(trainer.folder, trainer.fingerprint)
        trainer.folder.mkdir(parents=True, exist_ok=True)
        write_json(trainer.folder / MADE_BY, trainer.fingerprint)
        curves = trainer.folder / live_folder.name  # in scratch, because DVCLive writes to its files in every epoch
        shutil.rmtree(curves, ignore_errors=True)  # the interrupted run's, whose epochs are logged again
        with Live(str(curves), save_dvc_exp=False, dvcyaml=None) as live:
            trainer.run(live)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        shutil.copyfile(trainer.best_file, partial)
        partial.replace(checkpoint)
        replace_folder(curves, live_folder)
        trainer.state_file.unlink()  # first: without its state, the folder is not taken for a run to resume
        shutil.rmtree(trainer.folder)


def run_fingerprint(origin: Origin) -> dict[str, Any]:
    """Everything that the result of a run depends on."""
    settings = origin.model_dump(mode="json", exclude={"train": SPEED})
    return {**settings, "code": source_digests(CODE), "torch": torch.__version__}


class _Silent(tqdm):
    """The progress bar of all processes but the first."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "disable": True})

    def write(self, *args: object) -> None:
        pass


def _log(live: Live | None, row: dict[str, float]) -> None:
    if live is None:
        return
    for name, value in row.items():
        live.log_metric(name, value)
    live.next_step()
