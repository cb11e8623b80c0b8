"""Training (sections 3.3 and 4.1): the fusion module, SAM 2's prompt encoder and mask decoder, on precomputed features.

(seed, epoch) determines the sample order, so the number of samples consumed is a run's whole position, however they
are loaded. An interrupted run resumes from its state file; on the CPU the result is bit-identical to an uninterrupted
run. The state is found by a fingerprint of everything the run depends on.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from dvclive import Live
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from samlove.config import TrainConfig
from samlove.data.digest import source_digests
from samlove.errors import RequestError, SamloveError
from samlove.features.lock import only_run
from samlove.model.checkpoint import Header, Origin, save_checkpoint
from samlove.model.loss import Losses, mask_loss, upsample
from samlove.model.optimizer import build_optimizer, set_learning_rate, warmup_decay
from samlove.model.sam2_love import SamLove
from samlove.model.training_state import MADE_BY, STATE, Progress, report_other_runs, restore_state, save_state
from samlove.scoring.metrics import quantise, scores_from_bins
from stores.fingerprint import fingerprint_id
from stores.manifest import write_json

SAVE_SECONDS = 300  # a kill without notice loses at most this much work
SELECTED_BY = "J&F"  # validation score that selects the best epoch
# The modules that determine what a step does. A run whose state other code wrote is not resumed.
CODE = (
    "samlove.data.loader",
    "samlove.model.fusion",
    "samlove.model.loss",
    "samlove.model.optimizer",
    "samlove.model.sam2",
    "samlove.model.sam2_love",
    "samlove.model.training_state",
    "samlove.train",
)

Batch = dict[str, Any]


class Items(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


@dataclass(frozen=True)
class Samples:
    """The training and validation samples. `collate` makes a batch, as in samlove.data.loader, from items."""

    train: Items
    val: Items
    collate: Callable[[list], Batch]
    order: Callable[[int], Iterable[int]]  # epoch -> a fixed permutation of the training items
    on_gpu: bool = False  # whether the items are already on the GPU


class Trainer:
    """One run: `Trainer(...).run()`."""

    def __init__(self, model: SamLove, origin: Origin, samples: Samples, device: torch.device, scratch: Path):
        """model: newly built, its SAM 2 not yet frozen; moved to `device` here. scratch: holds one folder per run.

        Resumes the run with the same fingerprint if its state is in the scratch folder.
        """
        self.config: TrainConfig = origin.train
        self.origin, self.samples, self.device = origin, samples, device
        model.sam2.set_trainable(self.config.train_prompt_encoder, self.config.train_mask_decoder)
        self.model = model.to(device)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self.parameters, self.config)
        self.progress = Progress()
        self.fingerprint = run_fingerprint(origin)
        self.folder = scratch / fingerprint_id(self.fingerprint)
        self.stop_requested = False
        if self.state_file.exists():
            self.progress = restore_state(self.state_file, self.parameters, self.optimizer)

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    @property
    def best_file(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def total_steps(self) -> int:
        return self.config.epochs * math.ceil(len(self.samples.train) / self._samples_per_step)

    @property
    def _samples_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulate

    def _learning_rate(self, step: int) -> float:
        return self.config.lr * warmup_decay(step, self.total_steps, self.config.warmup_steps)

    def run(self, live: Live) -> None:
        """Train to the end; `best_file` then holds the best epoch's checkpoint.

        live: gets one row per epoch; a resumed run logs the earlier epochs again.
        Raises KeyboardInterrupt after saving the state on SIGINT or SIGTERM, SamloveError if the loss is not finite.
        """
        for row in self.progress.history:
            _log(live, row)
        with self._stop_on_signals(), self._bar() as bar:
            while self.progress.epoch < self.config.epochs:
                self._train_epoch(bar)
                row = self._close_epoch()
                _log(live, row)
                bar.write(f"epoch {self.progress.epoch}: " + ", ".join(f"{k} {v:.4g}" for k, v in row.items()))

    def _train_epoch(self, bar: tqdm) -> None:
        progress = self.progress
        self.model.train()
        order = list(self.samples.order(progress.epoch))[progress.consumed :]
        batches = iter(self._loader(self.samples.train, order))
        saved = time.monotonic()
        for start in range(0, len(order), self._samples_per_step):
            size = min(self._samples_per_step, len(order) - start)
            losses = self._step(list(islice(batches, self.config.accumulate)), size)
            for name, value in losses.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            progress.consumed += size
            bar.update(size)
            bar.set_postfix(epoch=progress.epoch + 1, loss=f"{losses['loss'] / size:.3f}", refresh=False)
            if self.stop_requested or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                self._stop_if_requested()
                saved = time.monotonic()

    def _step(self, batches: list[Batch], size: int) -> dict[str, float]:
        """One optimiser step over batches with `size` samples in total -> the sum of each loss over these samples.

        Every sample has the same weight, whatever its batch: 2 batches of 4 equal one batch of 8.
        """
        set_learning_rate(self.optimizer, self._learning_rate(self.progress.step))
        parts: list[Losses] = []
        for batch in batches:
            losses = self._losses(self._on_device(batch))
            (losses.total.sum() / size).backward()
            parts.append(Losses(*(part.detach() for part in losses)))
        # Copied to the CPU together, once per step, because each copy waits for the GPU.
        values = Losses(*torch.stack([torch.cat(part) for part in zip(*parts, strict=True)]).cpu().double())
        if not values.total.isfinite().all():
            raise SamloveError(self._not_finite(batches, values.total))
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return {"loss": values.total.sum().item(), "bce": values.bce.sum().item(), "dice": values.dice.sum().item()}

    def _losses(self, batch: Batch) -> Losses:
        mask_logits, object_score = self._forward(batch)
        return mask_loss(mask_logits, object_score, batch["mask"], self.config.loss)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.model(batch)

    def _not_finite(self, batches: list[Batch], total: Tensor) -> str:
        rows = [row for batch in batches for row in batch["row_id"]]
        bad = [row for row, finite in zip(rows, total.isfinite().tolist(), strict=True) if not finite]
        return (
            f"step {self.progress.step} (epoch {self.progress.epoch + 1}): the loss is not finite for {len(bad)} of "
            f"{len(rows)} rows: {', '.join(bad[:8])}; the weights were not updated; check the features with "
            "samlove store verify, or lower lr or set clip_norm in configs/<profile>/train.yaml"
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
        if scores[SELECTED_BY] > progress.best:
            progress.best = scores[SELECTED_BY]
            header = Header(**dict(self.origin), epoch=progress.epoch, validation=scores)
            save_checkpoint(self.best_file, self.model, header)
        self._save()
        return row

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """J, F and J&F in percent, as means over the expressions of the validation split.

        Only on the first frame: it is the only frame that is trained, and the only one whose SAM 2 embedding and mask
        are in the shards. The infer and evaluate stages score the masks of the whole video.
        """
        self.model.eval()
        scores = []
        for batch in self._loader(self.samples.val, range(len(self.samples.val))):
            logits, _ = self._forward(self._on_device(batch))
            bins = quantise(upsample(logits, batch["mask"].shape[-1]))
            scores += [
                scores_from_bins(b[None], m[None]) for b, m in zip(bins, batch["mask"].cpu().numpy() > 0, strict=True)
            ]
            self._stop_if_requested()
        J = 100 * float(np.mean([s.J for s in scores]))
        F = 100 * float(np.nanmean([s.F for s in scores]))  # NaN if a first frame has no object
        return {"J": J, "F": F, SELECTED_BY: (J + F) / 2}

    def _loader(self, items: Any, order: Sequence[int]) -> DataLoader:
        size = self.config.batch_size
        batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
        return DataLoader(
            items,
            batch_sampler=batches,
            collate_fn=self.samples.collate,
            num_workers=0 if self.samples.on_gpu else self.config.workers,
            pin_memory=self.device.type == "cuda" and not self.samples.on_gpu,
            generator=torch.Generator(),  # else each pass draws from torch's own, and a resumed run has more passes
            worker_init_fn=_ignore_interrupts,
        )

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
        samples = len(self.samples.train)
        done = self.progress.epoch * samples + self.progress.consumed
        return tqdm(total=self.config.epochs * samples, initial=done, unit="expr", mininterval=2, desc="train")

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """On SIGINT or SIGTERM the current step is finished first; a second signal ends the process at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def request_stop(number: int, frame: object) -> None:
            self.stop_requested = True
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_requested(self) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt

    def _save(self) -> None:
        save_state(self.state_file, self.progress, self.parameters, self.optimizer)


def train(
    origin: Origin, samples: Samples, device: torch.device, checkpoint: Path, live_folder: Path, scratch: Path
) -> None:
    """Train a model to the end and write the checkpoint of its best epoch. Resumes the same run if it was interrupted.

    checkpoint: the file to write at the end. live_folder: DVCLive's folder. scratch: holds one folder per unfinished
    run, which is removed when the run ends. Raises RequestError if a split has no samples, SamloveError if another run
    is training the same checkpoint; else see `Trainer.run`.
    """
    for split, items in (("train", samples.train), ("val", samples.val)):
        if not len(items):
            raise RequestError(f"the {split} shard set has no samples; check the dataset; run: samlove audit DIR")
    with only_run(scratch.with_name(f"{scratch.name}.lock"), checkpoint):
        torch.manual_seed(origin.train.seed)
        trainer = Trainer(origin.build(), origin, samples, device, scratch)
        report_other_runs(trainer.folder, trainer.fingerprint)
        trainer.folder.mkdir(parents=True, exist_ok=True)
        write_json(trainer.folder / MADE_BY, trainer.fingerprint)
        with Live(str(live_folder), save_dvc_exp=False, dvcyaml=None) as live:
            trainer.run(live)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = checkpoint.with_name(checkpoint.name + ".partial")
        shutil.copyfile(trainer.best_file, partial)
        partial.replace(checkpoint)
        trainer.state_file.unlink()  # first: without its state, the folder is not taken for a run to resume
        shutil.rmtree(trainer.folder)


def run_fingerprint(origin: Origin) -> dict[str, Any]:
    """Everything that the result of a run depends on."""
    settings = origin.model_dump(mode="json", exclude={"train": {"workers", "resident"}})
    return {**settings, "code": source_digests(CODE), "torch": torch.__version__}


def _log(live: Live, row: dict[str, float]) -> None:
    for name, value in row.items():
        live.log_metric(name, value)
    live.next_step()


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
