"""Training (sections 3.3 and 4.1): the fusion module and SAM2's two prompted parts, on cached features.

One epoch is an order of all expressions by (seed, epoch); what has been consumed of it is the whole position of
a run, whatever reads the samples. A run that was interrupted goes on from its state file to the very bits that it
would have reached uninterrupted, on the CPU; the state is found by a fingerprint of everything the run depends on.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from samlove.errors import RequestError, SamloveError
from samlove.model.checkpoint import Header, Origin, read_tensors, save_checkpoint, write_tensors
from samlove.model.loss import Losses, mask_loss, upsample
from samlove.model.sam2_love import SamLove
from samlove.scoring.metrics import quantise, scores_from_bins
from stores.fingerprint import differing, fingerprint_id, flat, sha256_file
from stores.manifest import write_json

SAVE_SECONDS = 300  # at most this much work is lost by a kill that gives no notice
SELECTED_BY = "J&F"
STATE, MADE_BY = "state.safetensors", "made_by.json"  # of an interrupted run, in its folder
# A state left by other code must not be taken up: these files decide what a step does.
CODE = (
    "data/loader.py",
    "model/fusion.py",
    "model/loss.py",
    "model/sam2.py",
    "model/sam2_love.py",
    "train.py",
)

Batch = dict[str, Any]


class Items(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


@dataclass(frozen=True)
class Samples:
    """What is trained on. `collate` makes the batch of samlove.data.loader from items."""

    train: Items
    val: Items
    collate: Callable[[list], Batch]
    order: Callable[[int], Iterable[int]]  # epoch -> a permutation of the training items, always the same
    on_gpu: bool = False  # whether items are tensors there already


@dataclass
class Progress:
    """Where a run is, besides its tensors."""

    epoch: int = 0
    consumed: int = 0  # samples of this epoch, over all processes
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of each loss over the samples consumed
    best: float = -1.0  # by SELECTED_BY, which is 0 at least
    history: list[dict[str, float]] = field(default_factory=list)  # what DVCLive was told, an epoch each


class Trainer:
    """One run: `Trainer(...).run()`."""

    def __init__(self, model: SamLove, origin: Origin, samples: Samples, device: torch.device, scratch: Path):
        """model: fresh, its SAM2 not yet frozen; moved to `device` here. scratch: holds a folder a run.

        Takes up the run of the same fingerprint where the scratch folder has its state.
        """
        self.config: TrainConfig = origin.train
        self.origin, self.samples, self.device = origin, samples, device
        model.sam2.set_trainable(self.config.train_prompt_encoder, self.config.train_mask_decoder)
        self.model = model.to(device)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = [
            {
                "params": [p for name, p in self.parameters.items() if name.startswith("sam2.") == of_sam2],
                "scale": self.config.sam2_lr_scale if of_sam2 else 1.0,
            }
            for of_sam2 in (False, True)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=self.config.weight_decay, fused=True)
        self.progress = Progress()
        self.folder = scratch / fingerprint_id(made_by(origin))
        self.stop_asked = False
        if self.state_file.exists():
            self._restore()

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    @property
    def best_file(self) -> Path:
        return self.folder / "best.safetensors"

    @property
    def total_steps(self) -> int:
        return self.config.epochs * math.ceil(len(self.samples.train) / self._samples_a_step)

    @property
    def _samples_a_step(self) -> int:
        return self.config.batch_size * self.config.accumulate

    def _learning_rate(self, step: int) -> float:
        return self.config.lr * warmup_decay(step, self.total_steps, self.config.warmup_steps)

    def run(self, live: Live) -> None:
        """Train to the end; `best_file` then holds the best epoch's checkpoint.

        live: gets a row an epoch, those of before an interruption again.
        Raises KeyboardInterrupt, the state saved, on SIGINT or SIGTERM; SamloveError where the loss is not finite.
        """
        for row in self.progress.history:
            _log(live, row)
        with self._signals_ask_to_stop(), self._bar() as bar:
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
        for start in range(0, len(order), self._samples_a_step):
            size = min(self._samples_a_step, len(order) - start)
            losses = self._step(list(islice(batches, self.config.accumulate)), size)
            for name, value in losses.items():
                progress.sums[name] = progress.sums.get(name, 0.0) + value
            progress.consumed += size
            bar.update(size)
            bar.set_postfix(epoch=progress.epoch + 1, loss=f"{losses['loss'] / size:.3f}", refresh=False)
            if self.stop_asked or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                self._stop_if_asked()
                saved = time.monotonic()

    def _step(self, batches: list[Batch], size: int) -> dict[str, float]:
        """One step of the optimiser over `size` samples in all -> the sums of the losses over them.

        A sample weighs the same whatever the batch it came in, so that 2 batches of 4 are one of 8.
        """
        for options in self.optimizer.param_groups:
            options["lr"] = options["scale"] * self._learning_rate(self.progress.step)
        parts: list[Losses] = []
        for batch in batches:
            losses = self._losses(self._on_device(batch))
            (losses.total.sum() / size).backward()
            parts.append(Losses(*(part.detach() for part in losses)))
        # On the CPU all together: each copy waits for a GPU, and so once a step is enough.
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
            f"the loss of step {self.progress.step} (epoch {self.progress.epoch + 1}) is not finite for {len(bad)} of "
            f"{len(rows)} rows: {', '.join(bad[:8])}; look at their features (samlove store verify), "
            "or lower lr or set clip_norm in configs/*/train.yaml; no step was taken with them"
        )

    def _close_epoch(self) -> dict[str, float]:
        """Validate, keep the best, save: the row for DVCLive."""
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
        """J, F and J&F in percent, the mean over the validation split's expressions.

        On the first frame: it is the only one whose SAM2 embedding and mask the shards hold, and the one that is
        trained. What the masks become over the video is for the infer and evaluate stages.
        """
        self.model.eval()
        scores = []
        for batch in self._loader(self.samples.val, range(len(self.samples.val))):
            logits, _ = self._forward(self._on_device(batch))
            bins = quantise(upsample(logits, batch["mask"].shape[-1]))
            scores += [
                scores_from_bins(b[None], m[None]) for b, m in zip(bins, batch["mask"].cpu().numpy() > 0, strict=True)
            ]
            self._stop_if_asked()
        J = 100 * float(np.mean([s.J for s in scores]))
        F = 100 * float(np.nanmean([s.F for s in scores]))  # NaN where a first frame has no target
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
            generator=torch.Generator(),  # else each pass draws from torch's, which a resumed run makes more of
            worker_init_fn=_leave_interrupts_to_the_trainer,
        )

    def _on_device(self, batch: Batch) -> Batch:
        """Moved, all numbers in float32, and without the text columns that are padding in every sample of it."""
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
    def _signals_ask_to_stop(self) -> Iterator[None]:
        """SIGINT and SIGTERM are heeded after the step in hand; a second one ends the process at once."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: object) -> None:
            self.stop_asked = True
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        if self.stop_asked:
            raise KeyboardInterrupt

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        for name, parameter in self.parameters.items():
            tensors[f"model/{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        write_tensors(self.state_file, tensors, json.dumps(asdict(self.progress)))

    def _restore(self) -> None:
        tensors, header = read_tensors(self.state_file)
        self.progress = Progress(**json.loads(header))
        torch.set_rng_state(tensors.pop("random"))
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors.pop("random_cuda"), self.device)
        with torch.no_grad():
            for key, value in tensors.items():
                kind, name = key.split("/", 1)
                parameter = self.parameters[name]
                if kind == "model":
                    parameter.copy_(value)
                else:
                    self.optimizer.state[parameter][kind] = value.to(self.device)


def train(
    origin: Origin, samples: Samples, device: torch.device, checkpoint: Path, live_folder: Path, scratch: Path
) -> None:
    """Train a model to the end, or go on where the same run was interrupted, and publish its best epoch.

    checkpoint: the file to write at the end; live_folder: DVCLive's; scratch: for what an interrupted run leaves, one
    folder a run, removed when it has ended. Raises as `Trainer.run`; RequestError where a split has no sample.
    """
    for split, items in (("train", samples.train), ("val", samples.val)):
        if not len(items):
            raise RequestError(f"the {split} shards hold no expression; look at the index: samlove audit DIR")
    torch.manual_seed(origin.train.seed)
    trainer = Trainer(origin.build(), origin, samples, device, scratch)
    tell_other_runs(trainer.folder, origin)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    write_json(trainer.folder / MADE_BY, made_by(origin))
    with Live(str(live_folder), save_dvc_exp=False, dvcyaml=None) as live:
        trainer.run(live)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    partial = checkpoint.with_name(checkpoint.name + ".partial")
    shutil.copyfile(trainer.best_file, partial)
    partial.replace(checkpoint)
    trainer.state_file.unlink()  # first: without it what is left is no run to go on with
    shutil.rmtree(trainer.folder)


def warmup_decay(step: int, total: int, warmup: int) -> float:
    """The share of the learning rate at a step, counted from 0: DeepSpeed's WarmupDecayLR, section 4.1.

    Linear up to 1 over `warmup` steps, then linear down to 0 at `total`. Two differences: DeepSpeed's own default
    rises by the logarithm, and starts with a step at 0, which would be wasted.
    """
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def made_by(origin: Origin) -> dict[str, Any]:
    """Everything that the outcome of a run depends on."""
    code = {name: sha256_file(Path(__file__).parent / name) for name in CODE}
    asked = origin.model_dump(mode="json", exclude={"train": {"workers", "resident"}})
    return {**asked, "code": code, "torch": torch.__version__}


def tell_other_runs(folder: Path, origin: Origin) -> None:
    """Say which interrupted runs beside that in `folder` are not gone on with, and in what they differ."""
    for other in sorted(folder.parent.glob(f"*/{MADE_BY}")):
        if other.parent != folder and (other.parent / STATE).exists():
            then, now = flat(json.loads(other.read_text())), flat(made_by(origin))
            fields = "; ".join(f"{name}: {a!r} there, {b!r} now" for name, (a, b) in differing(then, now).items())
            tqdm.write(
                f"{other.parent}: an interrupted run of another kind is not gone on with ({fields}); "
                f"to go on with it, bring those back and: dvc repro train; to be rid of it, remove that folder"
            )


def _log(live: Live, row: dict[str, float]) -> None:
    for name, value in row.items():
        live.log_metric(name, value)
    live.next_step()


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
