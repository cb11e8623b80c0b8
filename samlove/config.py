"""All settings: one frozen, validated class and one YAML file per section.

`configs/profile.yaml` names the active profile, such as `micro` or `refavs`. `configs/<profile>/<section>.yaml` holds
the values. An unknown key or a value of the wrong type is an error that names the file.
"""

import os
import re
import reprlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from samlove.errors import RequestError, absence

if TYPE_CHECKING:
    from omegaconf import DictConfig

SPLITS = ("train", "val", "test_s", "test_u", "test_n")
CONTROLLED_SPLITS = ("test_s", "test_u")  # where evaluation compares controls with predictions
Policy = Literal["drop", "keep", "fail"]
Dtype = Literal["float16", "float32"]
Resident = Literal["auto", "off", "ram", "gpu"]
Sam2Dtype = Literal["float16", "float32", "bfloat16", "int8"]
# The limits leave room for anything useful, and keep out values with which an array or a number would overflow.
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy and torch accept
Size = Annotated[int, Field(gt=0, le=2**13)]  # a number of channels, pixels, tokens, frames or layers
Count = Annotated[int, Field(gt=0, le=2**20)]
Factor = Annotated[float, Field(ge=0, le=1e3)]
Switch = Annotated[bool, Field(strict=False)]  # on, off, yes and no are strings in YAML 1.2, and accepted


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SynthConfig(Section):
    """LAVS-synth, the generated dataset."""

    seed: Seed = 0  # the same seed gives the same bytes
    scale: Literal["small", "demo", "large"] = "demo"  # number and size of the videos; samlove.synth.write.SCALES


class DatasetConfig(Section):
    """The dataset, and what to do about each kind of fault that the audit finds in it."""

    root: str  # not in the file: `load` sets data/dataset/<profile>, the folder (or link) that DVC watches
    name: str = "Ref-AVS Bench"  # shown in the report
    synth: SynthConfig | None = None  # generate LAVS-synth; None: the dataset is the user's own
    frames: Size = 10  # frames per video, one per second; shorter videos repeat their last frame
    mask_size: Size = 256  # masks are compared at mask_size x mask_size, as Ref-AVS Bench does
    check_media: Switch = True  # the index stage decodes every frame, audio file and mask
    policy: dict[str, Policy] = {}  # fault kind -> policy; kinds and defaults: samlove.data.index.POLICIES


class AudioConfig(Section):
    """VGGish, or an audio encoder of transformers (docs/encoders.md)."""

    encoder: Literal["vggish", "transformers"] = "vggish"
    weights: str  # a local file (vggish); a local folder in the transformers format, or "hub:NAME" (transformers)
    # The next four are VGGish's.
    channels: Size = 64  # channels of the first convolution; 64 in the original VGGish
    hidden: Size = 4096  # width of the fully connected layers; 4096 in the original VGGish
    postprocess: Switch = False  # PCA and quantisation to 0..255, as in AudioSet's released embeddings
    pre_relu: Switch = False  # omit the final ReLU, as the TensorFlow original does
    dtype: Dtype = "float16"  # of the stored features


class VisualConfig(Section):
    """An image model of timm, such as the paper's ViT, or CLIP's image encoder (Table 2); docs/encoders.md."""

    encoder: Literal["vit", "timm", "clip"] = "vit"  # vit and timm are the same; stores record which name was used
    model: str = Field("vit_base_patch16_224", pattern=r"^[\w.]+$")  # timm's name; ignored for clip
    model_args: dict[str, Size] = {}  # overrides of timm's architecture, for small models
    weights: str  # a local file (timm) or folder (clip), or "hub:NAME"
    # Pixels per side of the encoder's input, at least one patch; None: the size that the model was trained at.
    image_size: int | None = Field(None, ge=32, le=2**13)
    dtype: Dtype = "float16"  # of the stored features


class TextConfig(Section):
    """A text encoder of transformers: the paper's DistilRoBERTa, CLIP's (Table 2), or another of docs/encoders.md."""

    weights: str  # a local folder in the transformers format, or "hub:NAME"; its config.json says which encoder it is
    # With start and end token; longer expressions are truncated, shorter ones padded.
    max_tokens: int = Field(25, ge=2, le=2**13)
    dtype: Dtype = "float16"  # of the stored features


class Sam2Config(Section):
    """SAM 2: its architecture and weights, and where its image embeddings are cached (design decision 3)."""

    # A yaml file, or a name inside the sam2 package such as configs/sam2/sam2_hiera_l.yaml. An official checkpoint does
    # not need it: its name says which of the package's configurations it belongs to.
    config: str
    checkpoint: str  # official .pt ({"model": state dict}) or .safetensors, or "hub:NAME"
    cache_point: Literal["post_conv", "pre_conv"] = "post_conv"  # after or before the mask decoder's conv_s0, conv_s1
    dtype: Sam2Dtype = "float16"  # int8 stores one scale per channel; int8 and bfloat16 are read back as float32
    compression: Literal["none", "zstd"] = "none"  # zstd: a smaller store that reads more slowly
    train_frames: Size = 1  # frames of a training video that are stored, evenly spaced from frame 0; 1: the paper's

    @model_validator(mode="before")
    @classmethod
    def _official_config(cls, values: Any) -> Any:
        if isinstance(values, dict) and "config" not in values and isinstance(values.get("checkpoint"), str):
            if found := official_sam2_config(values["checkpoint"]):
                return {"config": found, **values}
        return values


class PackConfig(Section):
    """WebDataset shards for the trainer."""

    videos_per_shard: Count = 64


class FusionConfig(Section):
    """The fusion transformer (section 3.2) and the settings that its ablations vary (Tables 2 to 5)."""

    dim: Size = 1024  # hidden width
    blocks: Size = 6  # transformer blocks, L in Eq. 2
    heads: Size = 8  # attention heads; must divide dim
    mlp_ratio: int = Field(4, gt=0, le=64)  # width of the MLPs divided by dim; 4 as in ViT
    seg_tokens: Size = 1  # number of [seg] tokens; the first one prompts SAM 2
    prompt: Literal["seg", "mean"] = "seg"  # the learnable token, or the mean of the whole sequence (Table 5)
    accumulate_cls: Switch = True  # append the [cls] tokens of earlier frames as [his] (Eq. 4)
    # The paper leaves the following open; samlove.model.fusion and samlove.model.sam2_love say why these are the
    # defaults.
    time_embedding: Switch = True  # a learned embedding marks the audio token, patches and [cls] of each second
    prompt_start: Literal["click", "box_corner"] = "click"  # SAM 2's embedding that the prompt token starts as
    masks: Literal["single", "best_of_three"] = "single"  # SAM 2's mask tokens that answer the prompt
    # Beyond the paper: one linear layer in place of each MLP of Eq. 1 and of the one from [seg] to the prompt.
    projections: Literal["mlp", "linear"] = "mlp"

    @field_validator("heads")
    @classmethod
    def _heads_divide_dim(cls, heads: int, info: ValidationInfo) -> int:
        if info.data.get("dim", heads) % heads:
            raise ValueError(f"Input should divide dim ({info.data['dim']})")
        return heads


class LossConfig(Section):
    """Weights of the loss terms (Eq. 5), and of the object score's (`null_references: presence`)."""

    bce: Factor = 1.0
    dice: Factor = 1.0
    object_score: Factor = 0.5


class TrainConfig(Section):
    """Training (sections 3.3 and 4.1)."""

    seed: Seed = 0  # of the initial weights and the sample order
    epochs: Count
    batch_size: Count = 8
    accumulate: Count = 2  # batches per optimiser step
    lr: float = Field(1e-4, gt=0, le=1e3)  # peak learning rate
    sam2_lr_scale: Factor = 1.0  # SAM 2's parts learn at lr times this; the paper has one rate for all
    weight_decay: Factor = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the fusion module's matrices, AdamW for the rest
    warmup_steps: int = Field(100, ge=0, le=2**20)  # of linear warm-up; then lr decays linearly to 0
    clip_norm: float | None = Field(None, gt=0, le=1e6)  # largest norm of the gradient; None: no clipping
    train_prompt_encoder: Switch = True  # Table 6
    train_mask_decoder: Switch = True  # Table 6
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast
    # Threads that read samples; None: one per core, at most 8; 0: the training thread reads them.
    workers: int | None = Field(None, ge=0, le=256)
    # Processes that share the samples of every step; None: one per visible GPU, 1 without one. torchrun overrides it.
    processes: int | None = Field(None, ge=1, le=256)
    # Number of videos to draw samples from at a time; all should fit in memory: 1024 videos take 12 GB at the paper's
    # sizes (11.4 MB each). With 16 samples per step, about one step in ten has two samples of one video.
    pool: Count = 1024
    resident: Resident = "auto"  # where to hold all shards while training; auto: the GPU, else RAM, if they fit
    # The frame whose mask a sample is trained on: the first one, as in the paper, or in every epoch any of the stored
    # ones (train_frames in sam2.yaml).
    supervise: Literal["first", "any"] = "first"
    # Expressions that refer to nothing: as in the paper, or with SAM 2's object score trained on whether the target is
    # there; masks are then left empty if it is below a threshold that is chosen on the validation split.
    null_references: Literal["paper", "presence"] = "paper"
    loss: LossConfig = LossConfig()

    @property
    def weights(self) -> LossConfig:
        """The weights that apply: the paper does not train the object score."""
        return self.loss if self.null_references == "presence" else self.loss.model_copy(update={"object_score": 0.0})


class InferConfig(Section):
    """Full-video inference."""

    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: autocast
    # The frame that the token prompts: the first one, as in the paper, or the one with the highest object score, from
    # which SAM 2 tracks both ways.
    prompt_frame: Literal["first", "best"] = "first"
    # Also predict test_s and test_u with another video's audio, with permuted expressions, from the ground-truth mask.
    controls: list[Literal["swapped_audio", "permuted_text", "true_mask"]] = []


class EvaluateConfig(Section):
    """Scoring."""

    # per_expression scores each expression by itself; official_batch scores batches of four, as Ref-AVS's script does.
    protocol: Literal["per_expression", "official_batch"] = "per_expression"


class ReportConfig(Section):
    """The report."""

    clips: int = Field(8, ge=0, le=2**13)  # number of videos to show with their masks


Score = Annotated[float, Field(ge=0, le=100)]  # in percent
Triple = Annotated[tuple[Score, Score, Score], Field(strict=False)]


class PaperScores(Section):
    """J, F and J&F in percent, as published for Ref-AVS; None: not published."""

    seen: Triple | None = None
    unseen: Triple | None = None


class AblationRow(Section):
    run: str
    label: str
    paper: PaperScores | None = None


class AblationTable(Section):
    title: str
    base: str  # the run that the table compares the others with
    rows: list[AblationRow] = Field(min_length=1)


class AblationsConfig(Section):
    """Named runs, each a set of changes to the profile's configuration, and the tables that compare them."""

    seeds: list[Seed] = Field([0], min_length=1)  # every run is trained once with each of them
    controls: list[Literal["swapped_audio", "permuted_text", "true_mask"]] = []  # as in infer.yaml, for every run
    # run -> section -> setting -> value, as in the section's own file
    runs: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], dict[str, dict[str, Any]]] = Field(min_length=1)
    tables: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], AblationTable] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("Input should have each seed once")
        return seeds

    @model_validator(mode="after")
    def _tables_name_runs(self) -> "AblationsConfig":
        for name, table in self.tables.items():
            runs = [row.run for row in table.rows]
            if unknown := [run for run in (*runs, table.base) if run not in self.runs]:
                raise ValueError(f"tables.{name}: no run {unknown[0]!r} in runs")
            if table.base not in runs or len(set(runs)) < len(runs):
                raise ValueError(f"tables.{name}: expected one row per run, and one of them for base ({table.base})")
        return self


class LocalConfig(Section):
    """Workers on this machine."""

    kind: Literal["local"]
    workers: int | None = Field(None, gt=0, le=2**10)  # None: one per GPU or, without a GPU, one per four cores
    threads: int | None = Field(None, gt=0, le=2**10)  # torch threads per worker; None: cores divided by workers


class SchedulerConfig(Section):
    """Workers of a running Dask scheduler."""

    kind: Literal["scheduler"]
    address: str  # tcp://host:port
    threads: int | None = Field(None, gt=0, le=2**10)  # torch threads per worker; None: unchanged


class SlurmConfig(Section):
    """Workers as SLURM jobs, one worker per job."""

    kind: Literal["slurm"]
    jobs: Size
    cores: Size  # per job
    memory: str  # per job
    options: dict[str, Any] = {}  # arguments of dask_jobqueue.SLURMCluster


ClusterConfig = LocalConfig | SchedulerConfig | SlurmConfig
CLUSTERS: dict[str, type[ClusterConfig]] = {"local": LocalConfig, "scheduler": SchedulerConfig, "slurm": SlurmConfig}
SECTIONS: dict[str, type[Section]] = {
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
    "ablations": AblationsConfig,
}
S = TypeVar("S", bound=Section)
T = TypeVar("T")
CLUSTER = "cluster"  # the folder of configs/ that is not a profile
NO_PROFILES = (CLUSTER, "dataset")  # data/dataset holds the datasets of all profiles
SHOWN = 5  # faults of a file that a message lists
# text.yaml had this setting in earlier versions; sam2.yaml never did.
NOT_IN_TEXT = "no such setting; remove this line: the folder of the weights says which encoder it is"


def _read_yaml(path: Path) -> dict:
    """The content of a configuration file, as DVC reads it, which takes the same file for parameters: YAML 1.2.

    In YAML 1.1, `off` would be a bool and 1e-4 a string. Raises RequestError if the file is not a YAML mapping.
    """
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        in_profile = path.name != "profile.yaml" and path.parent.is_dir()
        remedy = "copy it from another profile" if in_profile else "run from the root of the repository"
        raise RequestError(f"{path}: no such configuration file; {remedy}") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise RequestError(f"{path}: not YAML: {line}{what}") from None
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that does not exist
        raise RequestError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except (LookupError, TypeError):  # ruamel's, about `!!bool abc`, `!!int ""` and a list of mappings as a key
        raise RequestError(f"{path}: not YAML: a value does not fit its tag, or a list is a key") from None
    if not isinstance(values, dict):
        found = "an empty file" if values is None else "a list" if isinstance(values, list) else _shown(values)
        raise RequestError(f"{path}: expected keys and values, found {found}")
    return values


def active_profile(configs: Path = Path("configs")) -> str:
    """The profile that configs/profile.yaml selects."""
    values = _read_yaml(configs / "profile.yaml")
    known = sorted(p.name for p in configs.iterdir() if p.is_dir() and p.name not in NO_PROFILES)
    if set(values) != {"profile"} or values["profile"] not in known:
        raise RequestError(
            f"{configs / 'profile.yaml'}: expected 'profile: NAME' with NAME in {known}, found {_shown(values)}"
        )
    return values["profile"]


def load(section: type[S], configs: Path = Path("configs"), profile: str | None = None) -> S:
    """The settings of one section, e.g. `load(TrainConfig)`. profile: None for the active one.

    Raises RequestError if the file is missing, or holds an unknown key or a value of the wrong type.
    """
    name = next(n for n, c in SECTIONS.items() if c is section)
    profile = profile or active_profile(configs)
    path = configs / profile / f"{name}.yaml"
    values = _read_yaml(path)
    if section is DatasetConfig:
        if "root" in values:
            link = f"ln -s /path/to/Ref-AVS data/dataset/{profile}"
            raise RequestError(f"{path}: root is not a setting; link your folder instead: {link}")
        values["root"] = f"data/dataset/{profile}"
    return _check(lambda: section.model_validate(values), path)


def load_cluster(name: str, configs: Path = Path("configs")) -> ClusterConfig:
    """The workers of feature stages, from configs/cluster/<name>.yaml. They do not affect what is computed.

    Raises RequestError as `load` does, or if there is no such file.
    """
    path = configs / CLUSTER / f"{name}.yaml"
    known = sorted(p.stem for p in (configs / CLUSTER).glob("*.yaml"))
    if name not in known:
        raise RequestError(f"SAMLOVE_CLUSTER={_shown(name)}: expected one of {', '.join(known)} in {configs / CLUSTER}")
    values = _read_yaml(path)
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in CLUSTERS:
        raise RequestError(f"{path}: kind: expected {' or '.join(CLUSTERS)}, found {_shown(kind)}")
    return _check(lambda: CLUSTERS[kind].model_validate(values), path)


def local_path(setting: str) -> Path:
    """The path in a setting; `~` is the home folder. Raises RequestError if the home folder is unknown."""
    try:
        return Path(setting).expanduser()
    except RuntimeError:
        raise RequestError(f"{setting}: ~ has no meaning here, because the home folder is unknown; set HOME") from None


def official_sam2_config(checkpoint: str) -> str | None:
    """The yaml inside the sam2 package of an official checkpoint, by its name; None for any other name.

    checkpoint: the path of a file such as sam2.1_hiera_base_plus.pt, or "hub:facebook/sam2.1-hiera-base-plus".
    """
    name = checkpoint.rpartition("/")[2]
    found = re.fullmatch(r"(sam2(?:\.1)?)[_-]hiera[_-](tiny|small|base[_-]plus|large)(?:\.(?:pt|safetensors))?", name)
    if found is None:
        return None
    size = {"tiny": "t", "small": "s", "large": "l"}.get(found[2], "b+")
    return f"configs/{found[1]}/{found[1]}_hiera_{size}.yaml"


def read_sam2_config(config: str) -> "DictConfig":
    """SAM 2's yaml: a file, or a name inside the sam2 package such as "configs/sam2/sam2_hiera_l.yaml".

    Raises RequestError if there is no such file, or if it has no `model`.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    own = local_path(config)
    path = own if os.path.isfile(own) else Path(str(files("sam2"))) / config
    if not os.path.isfile(path):
        known = sorted(
            f"configs/{p.parent.name}/{p.name}" for p in Path(str(files("sam2"))).glob("configs/sam2*/sam2*.yaml")
        )
        raise RequestError(
            f"{own}: {absence(own)}; expected a SAM 2 configuration, or one of the sam2 package: {', '.join(known)}"
        )
    try:
        values = OmegaConf.load(path)
        OmegaConf.resolve(values)
    except (OmegaConfBaseException, ValueError) as error:
        raise RequestError(f"{path}: not a SAM 2 configuration: {' '.join(str(error).split())}") from error
    if not isinstance(values, DictConfig) or "image_encoder" not in values.get("model", {}):
        raise RequestError(f"{path}: expected a SAM 2 configuration with model.image_encoder, found none")
    return values


def changed(settings: S, changes: dict[str, Any], where: str) -> S:
    """A section with other values. changes: setting -> value, as in the section's file.

    Raises RequestError, naming `where`, for an unknown setting or a value of the wrong type.
    """
    return _check(lambda: type(settings).model_validate(_merged(settings.model_dump(), changes)), where)


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {
        key: _merged(values[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(values.get(key), dict)
    }
    return values | changes | nested


def _check(make: Callable[[], T], path: Path | str) -> T:
    """The result of `make`; a validation error is reported as one line that names the file."""
    try:
        return make()
    except ValidationError as error:
        faults = []
        for fault in error.errors()[:SHOWN]:
            kind, reason = fault["type"], fault["msg"].removeprefix("Value error, ")
            key = ".".join(_shown(part).strip("'") for part in fault["loc"])
            reason = {
                "extra_forbidden": NOT_IN_TEXT
                if (Path(path).name, key) == ("text.yaml", "encoder")
                else "no such setting",
                "string_type": f"{reason} (in quotes)",
            }.get(kind, reason)
            faults.append(f"{key}: {reason}" + f", found {_shown(fault['input'])}" * (kind != "missing"))
        if error.error_count() > SHOWN:
            faults.append(f"and {error.error_count() - SHOWN} more faults")
        raise RequestError(f"{path}: {'; '.join(faults)}") from None


def _shown(value: object) -> str:
    """The value on one line, cut short: with aliases, a file of a few lines can hold a value of a billion parts."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 200, 200
    try:
        return short.repr(value)
    except ValueError:  # of Python, about the digits of an integer
        return "a number with thousands of digits"
