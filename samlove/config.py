"""Every choice a user can make: one frozen, checked class a concern, one YAML file each.

`configs/profile.yaml` names the profile (`micro` or `refavs`); `configs/<profile>/<section>.yaml`
holds the values. A key that is unknown or of the wrong type is an error that names the file.
"""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from samlove.errors import RequestError

if TYPE_CHECKING:
    from omegaconf import DictConfig

SPLITS = ("train", "val", "test_s", "test_u", "test_n")
CONTROLLED_SPLITS = ("test_s", "test_u")  # where evaluation compares controls with predictions
Policy = Literal["drop", "keep", "fail"]
Dtype = Literal["float16", "float32"]
Resident = Literal["auto", "off", "ram", "gpu"]
Sam2Dtype = Literal["float16", "float32", "bfloat16", "int8"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SynthConfig(Section):
    """LAVS-synth, the embedded benchmark (micro profile only)."""

    seed: int = 0
    scale: Literal["small", "demo", "large"] = "demo"


class DatasetConfig(Section):
    """The Ref-AVS folder and what to do with each kind of fault the audit finds in it."""

    root: str  # not in the file: `load` sets data/dataset/<profile>, the folder (or link) that DVC watches
    frames: int = Field(10, gt=0)  # frames a video, one a second; shorter ones repeat their last
    mask_size: int = Field(256, gt=0)  # masks are compared at mask_size x mask_size, as the benchmark does
    check_media: bool = True
    policy: dict[str, Policy] = {}  # fault kind -> policy; kinds and defaults: samlove.data.index.POLICIES


class AudioConfig(Section):
    """VGGish."""

    weights: str  # a local file
    channels: int = 64  # channels of the first convolution; 64 is VGGish itself
    hidden: int = 4096  # width of the fully connected layers; 4096 is VGGish itself
    postprocess: bool = False  # PCA and quantisation to 0..255, as AudioSet's released embeddings
    pre_relu: bool = False  # leave out the final ReLU, as the TensorFlow original does
    dtype: Dtype = "float16"


class VisualConfig(Section):
    """ViT through timm, or CLIP's image tower (Table 2)."""

    encoder: Literal["vit", "clip"] = "vit"
    model: str = "vit_base_patch16_224"  # timm's name; not read for clip
    model_args: dict[str, int] = {}  # overrides of timm's architecture, for small models
    weights: str  # a local file (vit) or folder (clip), or "hub:NAME"
    image_size: int = 224
    dtype: Dtype = "float16"


class TextConfig(Section):
    """DistilRoBERTa, or CLIP's text tower (Table 2)."""

    encoder: Literal["roberta", "clip"] = "roberta"
    weights: str  # a local folder in the transformers format, or "hub:NAME"
    max_tokens: int = 25
    dtype: Dtype = "float16"


class Sam2Config(Section):
    """SAM2: which one, and where in its image encoder the cache is taken (design decision 3)."""

    config: str  # a yaml file, or a name inside the sam2 package such as configs/sam2/sam2_hiera_l.yaml
    checkpoint: str  # official .pt ({"model": state dict}) or .safetensors
    cache_point: Literal["post_conv", "pre_conv"] = "post_conv"
    dtype: Sam2Dtype = "float16"  # int8: with a scale a channel; it and bfloat16 are read back as float32
    compression: Literal["none", "zstd"] = "none"  # zstd: a smaller store, read more slowly


class PackConfig(Section):
    """WebDataset shards for the trainer."""

    videos_per_shard: int = Field(64, gt=0)


class FusionConfig(Section):
    """The fusion transformer (section 3.2) and the choices its ablations vary (Tables 2 to 5)."""

    dim: int = 1024
    blocks: int = Field(6, gt=0)
    heads: int = Field(8, gt=0)
    mlp_ratio: int = Field(4, gt=0)  # width of the MLPs over dim; 4 as in ViT
    seg_tokens: int = Field(1, gt=0)  # the first one prompts SAM2
    prompt: Literal["seg", "mean"] = "seg"  # learnable token, or the mean of the whole sequence
    accumulate_cls: bool = True  # Eq. 4


class LossConfig(Section):
    """Eq. 5; object_score supervises SAM2's occlusion score, which the paper does not (0)."""

    bce: float = 1.0
    dice: float = 1.0
    object_score: float = 0.0


class TrainConfig(Section):
    seed: int = 0
    epochs: int = Field(gt=0)
    batch_size: int = Field(8, gt=0)
    accumulate: int = Field(2, gt=0)  # batches a step
    lr: float = 1e-4
    sam2_lr_scale: float = Field(1.0, ge=0)  # SAM2's parts learn at lr times this; the paper has one rate for all
    weight_decay: float = 0.0
    warmup_steps: int = 100
    clip_norm: float | None = None
    train_prompt_encoder: bool = True
    train_mask_decoder: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    workers: int = Field(0, ge=0)  # processes that read samples; 0 reads between the steps
    # Videos whose samples are drawn together, all of which should fit in memory: 1024 are 12 GB at the paper's sizes
    # (11.4 MB each), and two samples of a step of 16 are of one video once in ten steps.
    pool: int = Field(1024, gt=0)
    resident: Resident = "auto"  # where all shards are held while training, if they fit; says what it decided
    loss: LossConfig = LossConfig()


class InferConfig(Section):
    precision: Literal["float32", "bfloat16"] = "float32"
    absent: Literal["track", "empty"] = "track"  # what becomes of an object that SAM2 finds absent on frame 0
    controls: list[Literal["swapped_audio", "permuted_text", "true_mask"]] = []


class EvaluateConfig(Section):
    protocol: Literal["per_expression", "official_batch"] = "per_expression"


class ReportConfig(Section):
    clips: int = 8  # how many clips are shown with their masks


class LocalConfig(Section):
    """Workers on this machine. None: one worker a GPU or every four cores; threads, the cores divided by workers."""

    kind: Literal["local"]
    workers: int | None = Field(None, gt=0)
    threads: int | None = Field(None, gt=0)  # torch's, of a worker


class SchedulerConfig(Section):
    """Workers of a Dask scheduler that is there already."""

    kind: Literal["scheduler"]
    address: str  # tcp://host:port
    threads: int | None = Field(None, gt=0)  # torch's, of a worker; None leaves them as the workers were started


class SlurmConfig(Section):
    """Workers as jobs of SLURM, one each."""

    kind: Literal["slurm"]
    jobs: int = Field(gt=0)
    cores: int = Field(gt=0)  # of a job
    memory: str  # of a job
    options: dict[str, Any] = {}  # of dask_jobqueue.SLURMCluster


ClusterConfig = Annotated[LocalConfig | SchedulerConfig | SlurmConfig, Field(discriminator="kind")]
SECTIONS: dict[str, type[Section]] = {
    "synth": SynthConfig,
    "dataset": DatasetConfig,
    "audio": AudioConfig,
    "visual": VisualConfig,
    "text": TextConfig,
    "sam2": Sam2Config,
    "pack": PackConfig,
    "fusion": FusionConfig,
    "train": TrainConfig,
    "infer": InferConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
}
S = TypeVar("S", bound=Section)
T = TypeVar("T")
CLUSTER = "cluster"  # the folder beside the profiles that is none


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"{path}: no such configuration file; run from the repository's root") from None
    except yaml.YAMLError as error:
        raise RequestError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def active_profile(configs: Path = Path("configs")) -> str:
    """The profile that configs/profile.yaml selects."""
    values = _read_yaml(configs / "profile.yaml")
    known = sorted(p.name for p in configs.iterdir() if p.is_dir() and p.name != CLUSTER)
    if set(values) != {"profile"} or values["profile"] not in known:
        raise RequestError(f"{configs / 'profile.yaml'}: expected 'profile: NAME' with NAME in {known}, found {values}")
    return values["profile"]


def load(section: type[S], configs: Path = Path("configs")) -> S:
    """The active profile's values of one section, e.g. `load(TrainConfig)`.

    Raises RequestError where the file is missing, holds an unknown key, or a value of the wrong type.
    """
    name = next(n for n, c in SECTIONS.items() if c is section)
    profile = active_profile(configs)
    path = configs / profile / f"{name}.yaml"
    values = _read_yaml(path)
    if section is DatasetConfig:
        if "root" in values:
            raise RequestError(f"{path}: root is not a choice; link your folder to data/dataset/{profile} instead")
        values["root"] = f"data/dataset/{profile}"
    return _check(lambda: section(**values), path)


def load_cluster(name: str, configs: Path = Path("configs")) -> LocalConfig | SchedulerConfig | SlurmConfig:
    """Where feature stages compute, configs/cluster/<name>.yaml; it never changes what they compute.

    Raises RequestError as `load` does, and where there is no such file.
    """
    path = configs / CLUSTER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (configs / CLUSTER).glob("*.yaml"))
        raise RequestError(f"SAMLOVE_CLUSTER={name}: expected one of {', '.join(known)} in {path.parent}")
    adapter: TypeAdapter = TypeAdapter(ClusterConfig)
    return _check(lambda: adapter.validate_python(_read_yaml(path)), path)


def read_sam2_config(config: str) -> "DictConfig":
    """SAM2's yaml: a file, or a name inside the sam2 package such as "configs/sam2/sam2_hiera_l.yaml".

    Raises RequestError where there is no such file or it holds no `model`.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

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


def _check(make: Callable[[], T], path: Path) -> T:
    """What `make` makes of a file's values, its faults as one line."""
    try:
        return make()
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
        raise RequestError(f"{path}: {faults}") from None
