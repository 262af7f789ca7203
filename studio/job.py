"""A job: the validated description of one training, from a TOML file, a mapping or Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from graft.studio.config import from_dict, parse_value, read_toml, require, to_dict, write_toml
from graft.studio.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast and on what a training runs."""

    steps: int = 300
    """Optimiser steps."""
    seed: int = 0
    """Names everything random: initial values, data order, noise."""
    batch_size: int = 4
    """Rows in a batch, before accumulation."""
    learning_rate: float | None = None
    """Peak learning rate; None takes the method's own."""
    optimiser: Literal["adamw", "galore", "mezo"] = "adamw"
    """"galore" is AdamW with the moments of large matrices in few directions; "mezo" trains by forward passes alone, in
    the memory of inference, and wants far smaller rates and far more steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes after the warm-up; cosine and linear end at zero."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Of AdamW, where the method does not set its own."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    galore_rank: int = 128
    """Directions that GaLore keeps of a matrix; one with a side of so many or fewer is plain AdamW."""
    galore_every: int = 200
    """Steps between new directions."""
    galore_scale: float = 0.25
    """Factor of GaLore's step on a matrix."""
    mezo_eps: float = 1e-3
    """How far MeZO moves the parameters to either side to find the slope."""
    patience: int = 0
    """Ends the training when its loss, smoothed over some 50 steps, has had no new low for so long; 0 never does."""
    gradient_accumulation: int = 1
    """Batches summed into one optimiser step."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Type of the forward pass; trainable tensors stay float32. "auto" is bf16 where the hardware multiplies it fast (a
    CPU with AMX or AVX-512 BF16, a GPU from NVIDIA's Ampere on), else no; the run keeps what it began with."""
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """What computes attention: "sdpa" is torch's fused function; "xformers" that library, in a denoiser on a GPU;
    "auto" the first of them, but plain products for short sequences where a CPU is faster with these."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 leaves it to `checkpoint_seconds`."""
    checkpoint_seconds: float = 120.0
    """Seconds between checkpoints; 0 leaves it to `checkpoint_every`."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay on disk."""
    validate_every: int = 0
    """Steps between measurements on data that are held out, such as the loss at fixed noise of the pictures that
    `data.validation` names; 0 measures none. The figures stand in metrics.jsonl."""
    measure_every: int = 0
    """Steps between measurements of what is drawn, with the settings of `[eval]`: fidelity, alignment, and the score of
    the pair; 0 measures none. The last step is measured too."""
    keep: Literal["last", "best"] = "last"
    """Which step becomes the result: the last, or of those measured the one with the best score (the earlier of
    equals)."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl; each holds means over them."""
    threads: int = 0
    """CPU threads of the tensor library; 0 takes all cores that this process may use."""
    workers: int = 0
    """Processes that draw batches ahead; 0 draws each when it is needed. The numbers are the same."""
    device: str | None = None
    """"cpu", "cuda", ...; None takes the accelerator if there is one."""
    processes: int = 1
    """Devices that train together, a process on each, where a scheduler starts the job."""
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where figures go beside metrics.jsonl; each needs its own library."""

    own: ClassVar[frozenset[str]] = frozenset(
        {"steps", "seed", "batch_size", "learning_rate", "schedule", "warmup_steps", "weight_decay", "max_grad_norm"}
        | {"patience"}
    )
    """Settings in which jobs that share a batch may differ."""

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "gradient_accumulation", "keep_checkpoints", "log_every", "processes")
        for name in (*whole, "galore_rank", "galore_every"):
            require(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        zero = ("warmup_steps", "patience", "weight_decay", "max_grad_norm", "checkpoint_every", "checkpoint_seconds")
        for name in (*zero, "validate_every", "measure_every", "threads", "workers"):
            require(f"train.{name}", getattr(self, name), getattr(self, name) >= 0, "0 or more")
        rate = self.learning_rate
        require("train.learning_rate", rate, rate is None or 0 < rate < 100, "a number above 0")
        for name in ("galore_scale", "mezo_eps"):
            require(f"train.{name}", getattr(self, name), getattr(self, name) > 0, "a number above 0")
        halves = self.optimiser == "mezo" and self.mixed_precision == "fp16"
        require("train.mixed_precision", self.mixed_precision, not halves, "no or bf16 with optimiser = mezo")
        measured = self.keep == "last" or self.measure_every > 0
        require("train.keep", self.keep, measured, '"last", or train.measure_every above 0 to know the best')
        require("train.seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1")


@dataclass(frozen=True)
class SampleConfig:
    """Pictures drawn while training."""

    every: int = 0
    """Steps between samples; 0 draws none on the way."""
    prompts: tuple[str, ...] = ()
    """What is drawn; "{token}" stands for the concept's word. Empty takes two of the method's own prompts."""
    seeds: tuple[int, ...] = (0, 1)
    """One picture for each prompt and seed."""
    strengths: tuple[float, ...] = (1.0,)
    """Strengths of the adapter that are drawn side by side, beside the base alone; 1 is as trained."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 3.0
    """Classifier-free guidance scale."""

    def __post_init__(self) -> None:
        require("sample.every", self.every, self.every >= 0, "0 or more")
        require("sample.steps", self.steps, 1 <= self.steps <= 1000, "1 to 1000")
        require("sample.guidance", self.guidance, self.guidance >= 0, "0 or more")


@dataclass(frozen=True)
class Job:
    """One training: what is adapted, how, to what data.

    Example:
        >>> job = Job.load({"base": "pocket-sd", "method": {"name": "lora"}, "data": {"path": "photos"}})
        >>> job.domain
        'diffusion'
    """

    base: str
    """Embedded model, local folder or hub id."""
    method: dict[str, Any]
    """`name`, and the settings of that method."""
    data: dict[str, Any]
    """`path`, and the settings of the domain's data."""
    domain: str = ""
    """"diffusion", "vision", ...; may be left out when the method or the base tells."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long and how fast."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """What is drawn on the way."""
    eval: dict[str, Any] = field(default_factory=dict)
    """Settings of `graft eval`, and of what is measured on the way."""
    name: str | None = None
    """Of the run; None takes the method's name."""

    @classmethod
    def load(cls, source: Job | Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Job:
        """Return the validated job; where it does not say how to train, as is usual for its method.

        Args:
            source: a job, its mapping, or the path of a TOML file. Relative paths in a file are taken from the file's
                folder, elsewhere from the current one.
            overrides: "train.steps=50" and the like; the value is TOML, or a string if it is not.

        Raises:
            InputError: an unknown key, method or domain, or a value that is out of range.
        """
        from graft.studio import registry

        if isinstance(source, Job):
            data: dict[str, Any] = to_dict(source)
        elif isinstance(source, Mapping):
            data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
        else:
            data = _from_file(Path(source))
        for override in overrides:
            _override(data, override)
        anchor(data, Path.cwd())
        job = from_dict(cls, data, "job").checked()
        usual = getattr(registry.method_class(job.domain, str(job.method["name"])), "train_defaults", {})
        unsaid = {key: value for key, value in usual.items() if key not in data.get("train", {})}
        return replace(job, train=replace(job.train, **unsaid))

    def checked(self) -> Job:
        """Return this job with its domain, after its method and data sections were validated.

        Raises:
            InputError: as `load`.
        """
        from graft.studio import registry

        if "name" not in self.method:
            known = ", ".join(sorted({method for _, method in registry.METHODS}))
            raise InputError("method.name", "it is required", f"Choose one of {known}")
        _at_home("base", self.base)
        domain = self.domain or registry.domain_of(str(self.method["name"]), self.base)
        section = {key: value for key, value in self.method.items() if key != "name"}
        from_dict(registry.method_class(domain, str(self.method["name"])), section, "method")
        from_dict(registry.domain(domain).DataConfig, self.data, "data")
        if self.eval:
            from_dict(registry.domain(domain).EvaluationConfig, self.eval, "eval")
        return replace(self, domain=domain)

    def to_toml(self) -> str:
        """Return the job as a file that `load` reads."""
        return write_toml(to_dict(self))


def _from_file(path: Path) -> dict[str, Any]:
    data = read_toml(path)
    anchor(data, path.absolute().parent)
    return data


PATHS = (
    ("data", "path"), ("data", "split"), ("data", "validation"), ("data", "images"), ("data", "replay_path"),
    ("method", "class_path"), ("method", "start"), ("method", "earlier"), ("eval", "path"), ("eval", "prior_path"),
)  # fmt: skip
"""Sections and keys that may name files."""


def anchor(data: dict[str, Any], folder: Path) -> None:
    """Make paths of pictures and splits absolute: the job will be read again from another folder."""
    for name, key in PATHS:
        section = data.get(name)
        if not isinstance(section, dict):
            continue
        value = section.get(key)
        if isinstance(value, str) and value:
            section[key] = str(folder / _at_home(f"{name}.{key}", value))
        elif isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            section[key] = [str(folder / _at_home(f"{name}.{key}", each)) for each in value]


def _at_home(name: str, value: str) -> Path:
    """A path, or what might be one, that the system can be asked for."""
    try:
        path = Path(value).expanduser()
        path.exists()
    except RuntimeError:
        raise InputError(f"{name} = {value!r}", "there is no such user", "Write the whole path") from None
    except OSError as error:
        raise InputError(f"{name} = {value[:60]!r}", f"it is no path ({error.strerror})", "Correct it") from None
    return path


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    *sections, last = (part.strip() for part in key.split("."))
    if not equals or not last:
        raise InputError(f"--set {text}", "it is not of the form key=value", "Write --set train.steps=50")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise InputError(f"--set {text}", f"{section!r} is a value, not a section", "Check the key")
    data[last] = parse_value(value.strip())
