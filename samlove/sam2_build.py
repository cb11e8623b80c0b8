"""SAM2 from its own classes: any of its yaml files, whole or without the image encoder, and its checkpoints.

Nothing of Hydra's global configuration is used: the yaml is read by OmegaConf and instantiated as it stands.
"""

import hashlib
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import samlove.torchvision_ops  # noqa: F401
from samlove.encoders.weights import load_into, load_state_dict, resolve_file
from samlove.errors import RequestError

CHECKPOINTS = "https://dl.fbaipublicfiles.com/segment_anything_2/072824/"  # SAM 2; SAM 2.1 is in 092824/


class NoImageEncoder(nn.Module):
    """Stands where SAM2Base keeps its image encoder, and says what SAM2Base asks of it: the width of its output."""

    def __init__(self, d_model: int):
        super().__init__()
        self.neck = SimpleNamespace(d_model=d_model)

    def forward(self, images: torch.Tensor) -> None:
        raise RuntimeError("this SAM2 was built without its image encoder: give it cached embeddings")


def read_sam2_config(config: str) -> DictConfig:
    """SAM2's yaml: a file, or a name inside the sam2 package such as "configs/sam2/sam2_hiera_l.yaml".

    Raises RequestError where there is no such file or it holds no `model`.
    """
    path = Path(config)
    if not path.is_file():
        path = Path(str(files("sam2"))) / config
    if not path.is_file():
        known = sorted(
            f"configs/{p.parent.name}/{p.name}" for p in Path(str(files("sam2"))).glob("configs/sam2*/sam2*.yaml")
        )
        raise RequestError(
            f"{config}: no such SAM2 configuration, neither a file nor one of sam2's own: {', '.join(known)}"
        )
    try:
        values = OmegaConf.load(path)
        OmegaConf.resolve(values)
    except (OmegaConfBaseException, ValueError) as error:
        raise RequestError(f"{path}: not a SAM2 configuration: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig) or "image_encoder" not in values.get("model", {}):
        raise RequestError(f"{path}: expected a SAM2 configuration with model.image_encoder, found none")
    return values


def instantiate_sam2(config: str, image_encoder: bool = True) -> nn.Module:
    """A SAM2 with fresh weights, in evaluation mode, of the class that the yaml names (SAM2Base).

    image_encoder: False leaves the image encoder out (most of the weights); the model then works on cached
        embeddings only, which is all that training and full-video inference need.
    """
    from hydra.utils import instantiate

    model = read_sam2_config(config).model
    if image_encoder:
        return instantiate(model).eval()
    encoder = NoImageEncoder(model.pop("image_encoder").neck.d_model)
    model.compile_image_encoder = False
    return instantiate(model, _partial_=True)(image_encoder=encoder).eval()


def checkpoint_path(checkpoint: str) -> Path:
    """The checkpoint's file; raises RequestError that says how to get it."""
    return resolve_file(
        checkpoint, "a SAM2 checkpoint (.pt or .safetensors)", f"the official ones: {CHECKPOINTS}NAME.pt"
    )


def load_sam2_weights(model: nn.Module, checkpoint: str) -> None:
    """Give `model`, from instantiate_sam2, the weights of an official .pt or a .safetensors, as float32.

    A model without image encoder takes the rest. Raises RequestError where there is no such file, SamloveError where
    the weights are not those of this configuration.
    """
    path = checkpoint_path(checkpoint)
    tensors = load_state_dict(path)
    if isinstance(model.image_encoder, NoImageEncoder):
        tensors = {name: value for name, value in tensors.items() if not name.startswith("image_encoder.")}
    load_into(model, tensors, path, "this SAM2")


def decoder_convs_sha256(checkpoint: str) -> str:
    """Of the mask decoder's conv_s0 and conv_s1 as float32: what embeddings cached after them depend on."""
    tensors = load_state_dict(checkpoint_path(checkpoint))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if name.startswith(("sam_mask_decoder.conv_s0.", "sam_mask_decoder.conv_s1.")):
            digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
