"""Ways to execute the trainer's step on a GPU, and the least time that its matrix products could take.

Every way computes the losses and gradients of the plain step. Shapes are static, as graphs need them: texts are padded
to their full length.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from samlove.model.loss import Losses
from samlove.model.sam2 import LEVELS
from samlove.train import Batch, Trainer

WAYS = ("eager", "compiled", "graph", "compiled graph", "checkpointed")
ARRAYS = ("audio", "audio_valid", "visual", "text", "text_mask", *LEVELS, "mask")  # that a step reads
SQUARE = {"cuda": 8192, "cpu": 1024}  # side of the matrices whose product is timed
REPEATS = {"cuda": 50, "cpu": 5}


class WayTrainer(Trainer):
    """A trainer that executes its steps in one of WAYS: call `use` first."""

    replaced: Callable[..., Any] | None = None  # ARRAYS -> the four losses

    def use(self, way: str, batch: Batch) -> None:
        """Prepare the way, which can take minutes. batch: on the device, of the shapes that all batches will have.

        compiled: the blocks' attention and MLPs, and SAM 2's decoder, each compiled as a unit. graph: forward and
        backward pass are one CUDA graph each. checkpointed: the backward pass computes each block again, except the
        last. Raises ValueError if the model has no such block.
        """
        if "compiled" in way:
            compile_parts(self)
        if "graph" in way:
            arrays = tuple(batch[name] for name in ARRAYS)
            self.replaced = torch.cuda.make_graphed_callables(_LossesOfArrays(self), arrays, allow_unused_input=True)
        if way == "checkpointed":
            checkpoint_blocks(self)

    def _losses(self, batch: Batch) -> Losses:
        if self.replaced is None:
            return super()._losses(batch)
        for parameter in self.parameters.values():  # torch would take the graph's own tensors, which the next batch
            if parameter.grad is None:  # overwrites, for the gradients
                parameter.grad = torch.zeros_like(parameter)
        parts = self.replaced(*(batch[name] for name in ARRAYS))
        return Losses(*(part.clone() for part in parts))  # the next batch of the step overwrites them


class _LossesOfArrays(nn.Module):
    """A trainer's losses as a module whose inputs and outputs are tensors; only the total has a gradient."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self.model, self.trainer = trainer.model, trainer

    def forward(self, *arrays: Tensor) -> tuple[Tensor, ...]:
        total, *others = Trainer._losses(self.trainer, dict(zip(ARRAYS, arrays, strict=True)))
        return total, *(other.detach() for other in others)


def compile_parts(trainer: Trainer, **options: Any) -> None:
    """Compile the parts of the model that a step calls again and again. options: of torch.compile.

    All blocks share the compiled code. Compiling the whole step would take minutes, because it repeats them per frame.
    """
    quickly = partial(torch.compile, dynamic=False, fullgraph=True, **options)
    for block in trainer.model.fusion.blocks:
        for name in ("read", "attend"):
            setattr(block, name, quickly(getattr(block, name)))
    setattr(trainer.model.sam2, "_decode", quickly(trainer.model.sam2._decode))  # noqa: B010


def checkpoint_blocks(trainer: Trainer) -> None:
    """Keep no activations of the blocks before the last: compute them again in the backward pass.

    Raises ValueError if the model has no such block.
    """
    first, *middle = trainer.model.fusion.blocks
    if not middle:
        raise ValueError("a model of one block keeps few activations")
    for block, name in ((first, "attend"), *((block, "forward") for block in middle[:-1])):
        setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False, preserve_rng_state=False))


def static(batch: Batch) -> Batch:
    """A batch on the device whose texts the trainer will not shorten."""
    mask = batch["text_mask"].clone()
    mask[0, -1] = True
    return {**batch, "text_mask": mask}


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`; a product-sum counts as two."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def step_operations(trainer: Trainer, batch: Batch) -> int:
    """The operations of one batch, forward and backward, counted on the model itself without computing anything.

    batch: as `Trainer._on_device` returns it. The loss, which has hardly any matrix products, is left out.
    """
    model = deepcopy(trainer.model).to("meta")
    inputs = {name: batch[name].to("meta") for name in ARRAYS}

    def step() -> None:
        answer = model(inputs)
        (answer.masks.sum() + answer.object_score.sum()).backward()

    return operations(step)


def matmul_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> float:
    """Operations per second of (m,k) @ (k,n), the median of several; shape: m, k, n; None: large and square."""
    m, k, n = shape or (SQUARE[device.type],) * 3
    a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
    repeats, seconds = REPEATS[device.type], []
    for _ in range(6):
        seconds.append(_on(device, lambda: [a @ b for _ in range(repeats)]) / repeats)
    return 2 * m * k * n / median(seconds[1:])


def _on(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds until the device has finished `work`."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
