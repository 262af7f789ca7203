r"""LoRA, DoRA and LoKr for diffusion models, with DreamBooth's prior preservation.

Low-rank factors on the denoiser (and, if asked, the text encoder) learn a concept under a trigger word; the methods
themselves are `graft.studio.methods.lora`, `dora` and `lokr`. Prior preservation (Ruiz et al., "DreamBooth: Fine Tuning
Text-to-Image Diffusion Models for Subject-Driven Generation", 2022, arXiv:2208.12242) adds to the loss

    prior_weight * E || target(x', n, t) - denoiser(x'_t, t, text(class_prompt)) ||^2

over pictures x' that the base itself draws of the class, or that a folder holds (`class_path`), so that the class does
not turn into the subject. Differs from the authors' code: class pictures that are drawn stay latents, so that they are
exact samples of the base without a way through the VAE, and are cached by content: another base, prompt or count is
another set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion.buckets import Shape
from graft.diffusion.data import TEMPLATES, DataConfig, load_dataset
from graft.diffusion.method import DiffusionMethod, Encode, PromptTable, Subject, Work, encoded, latents
from graft.diffusion.task import Source, row_slots
from graft.diffusion.transformers import ATTENTION
from graft.studio.caches import Cache, content_key
from graft.studio.config import require
from graft.studio.errors import DataError, InputError
from graft.studio.methods.dora import DoRA
from graft.studio.methods.lokr import LoKr
from graft.studio.methods.lora import LoRA
from graft.studio.sites import Model, Plan, plan_sites

if TYPE_CHECKING:
    from graft.diffusion.base import Condition, DiffusionBase


@dataclass(frozen=True)
class Subjects(DiffusionMethod):
    """What a method on the denoiser's layers has here, beside its own settings."""

    trigger: str = "sks"
    """Word that calls the concept: put it into prompts. It needs no meaning before."""
    text_encoder: bool = False
    """Adapt the text encoder too."""
    class_prompt: str | None = None
    """What the concept is an example of, such as "a photo of a dog"; turns prior preservation on."""
    class_path: str | None = None
    """Folder of class pictures with captions (class_prompt where one has none), instead of the base's drawings."""
    class_pictures: int = 16
    """How many pictures of the class the base draws for it."""
    prior_weight: float = 1.0
    """Weight of their loss beside the concept's."""
    snr_gamma: float | None = None
    """Min-SNR's gamma (the paper's is 5); None weights all noise levels equally."""

    own = frozenset({"trigger", "class_prompt", "class_path"})
    default_learning_rate = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        require("method.trigger", self.trigger, bool(self.trigger.strip()), "a word")
        require("method.class_pictures", self.class_pictures, 1 <= self.class_pictures <= 10_000, "1 to 10,000")
        require("method.prior_weight", self.prior_weight, self.prior_weight >= 0, "0 or more")
        gamma = self.snr_gamma
        require("method.snr_gamma", gamma, gamma is None or gamma > 0, "a number above 0")

    def prompts(self, caption: str | None) -> list[str]:
        """Training prompts of a picture: its own caption, or the templates with the trigger word."""
        if caption is None:
            return [template.format(self.trigger) for template in TEMPLATES["object"]]
        return [caption.replace("{token}", self.trigger)]

    def sources(
        self, base: DiffusionBase, subject: Subject, slot: int, table: PromptTable, cache: Cache
    ) -> Iterator[Source]:
        """Yields the job's pictures and, for prior preservation, those of the class."""
        yield from super().sources(base, subject, slot, table, cache)
        rows = subject.job.train.batch_size
        if self.class_path is not None:
            classes = [self.class_prompt] if self.class_prompt else []
            mean, std, shown, digest = class_folder(base, self.class_path, classes, subject.dataset.shape, cache)
            prompts = [table.rows(slot, [prompt]) for prompt in shown]
            yield Source(mean, std, prompts, rows, self.prior_weight, slot, digest=digest)
        elif self.class_prompt is not None:
            count = subject.share(self.class_pictures)
            prior = class_latents(base, self.class_prompt, count, subject.dataset.shape, cache)
            prompts = [table.rows(slot, [self.class_prompt])] * count
            yield Source(prior["mean"][:, None], prior["std"][:, None], prompts, rows, self.prior_weight, slot)

    @classmethod
    def attach_jobs(cls, work: Work) -> tuple[Any, Encode]:
        """Attaches factors for each job; text comes from the cache unless the text encoder is adapted too."""
        base, method, prompts = work.base, work.subjects[0].method, [text for _, text in work.table.entries]
        frozen = None if method.text_encoder else encoded(base, prompts, work.cache)
        handle = method.attach(base.modules, slots=len(work.subjects))
        for slot, subject in enumerate(work.subjects):
            handle.reset(slot, subject.job.train.seed)
        handle.route(row_slots(work.sources) if len(work.subjects) > 1 else None)
        if frozen is not None:
            return handle, lambda rows: {name: part[rows.to(part.device)] for name, part in frozen.items()}
        ids, slots = base.tokenize(prompts), torch.tensor([slot for slot, _ in work.table.entries])

        def encode(rows: Tensor) -> Condition:
            """The text encoder sees prompts, the denoiser rows: each gets its own route."""
            of_batch = handle.routed
            if of_batch is not None:
                handle.route(slots[rows])
            condition = base.condition(ids[rows])
            handle.route(of_batch)
            return condition

        return handle, encode

    def plan(self: Any, model: Model) -> Plan:
        """Sites of the denoiser and, if asked, the text encoders; never of the VAE.

        Args:
            model: the base's `modules`.

        Raises:
            InputError: it is not that, or its text encoder cannot be adapted.
        """
        if isinstance(model, nn.Module) or not {"unet", "transformer"} & set(model):
            given = f"a {type(model).__name__}"
            raise InputError(given, "these are not the networks of a pipeline", "Give base.modules, or use LoRA")
        denoiser = "unet" if "unet" in model else "transformer"
        parts = [denoiser, *(name for name in model if self.text_encoder and name.startswith("text_encoder"))]
        family = ATTENTION.get(type(model[denoiser]).__name__)
        if family and self.text_encoder:
            reason = "no loader of this family takes factors of its language model"
            raise InputError("method.text_encoder = true", reason, "Leave it out")
        targets = family if family and self.targets == "attention" else self.targets
        sites = plan_sites({name: model[name] for name in parts}, targets, towers=self.towers).sites
        # The last block of SD3 throws its answers for the text away: what asks for them is dead.
        attentions = model[denoiser].named_modules(prefix=denoiser)
        dead = {f"{name}.add_q_proj" for name, module in attentions if getattr(module, "context_pre_only", False)}
        sites = tuple(site for site in sites if site.name not in dead)
        return Plan(sites, tuple(map(self.count, sites)))


@dataclass(frozen=True)
class DiffusionLoRA(Subjects, LoRA):
    """LoRA on a diffusion base.

    Example:
        >>> handle = DiffusionLoRA(rank=4, trigger="sks").attach(base.modules)  # doctest: +SKIP
    """


@dataclass(frozen=True)
class DiffusionDoRA(Subjects, DoRA):
    """DoRA on a diffusion base.

    Example:
        >>> handle = DiffusionDoRA(rank=4, trigger="sks").attach(base.modules)  # doctest: +SKIP
    """


@dataclass(frozen=True)
class DiffusionLoKr(Subjects, LoKr):
    """LoKr on a diffusion base.

    Example:
        >>> handle = DiffusionLoKr(rank=4, factor=8, trigger="sks").attach(base.modules)  # doctest: +SKIP
    """


def class_folder(
    base: DiffusionBase, path: str, classes: Sequence[str], shape: Shape, cache: Cache
) -> tuple[Tensor, Tensor, list[str], str]:
    """Class pictures of a folder.

    Args:
        base: encodes them.
        path: the folder.
        classes: the first is the caption of pictures without one.
        shape: height and width in pixels.
        cache: of pixels and latents.

    Returns:
        Mean and deviation of their posterior, (p, 1, c, h, w) each, their captions, and the folder's digest.

    Raises:
        DataError: a picture without a caption.
    """
    dataset = load_dataset(DataConfig(path=path, caption=classes[0] if classes else None), shape, cache)
    bare = [picture.path.name for picture in dataset.pictures if not picture.caption]
    if bare:
        raise DataError(path, f"{bare[0]} has no caption", "Write captions beside the pictures, or set class_prompt")
    posterior = latents(base, dataset, cache)
    captions = [picture.caption or "" for picture in dataset.pictures]
    return posterior["mean"], posterior["std"], captions, dataset.digest


def class_latents(base: DiffusionBase, prompt: str, count: int, shape: Shape, cache: Cache) -> dict[str, Tensor]:
    """What the base draws for a class prompt, as a posterior without spread.

    Args:
        base: nothing may be attached to it.
        prompt: the class.
        count: pictures; picture i is drawn from seed i, so a larger set begins with the smaller one.
        shape: height and width in pixels.
        cache: one entry per picture.

    Returns:
        `mean` and `std`, each (count, c, h, w); `std` is zero.
    """
    steps, guidance, drawn = 25, 5.0, []
    side = shape[0] if shape[0] == shape[1] else list(shape)
    for seed in range(count):
        key = content_key("class-1", base.hash, prompt, side, steps, guidance, seed, _name(base.pipe.scheduler))
        drawn.append(cache.get("class", key, partial(_draw, base, prompt, seed, shape, steps, guidance)))
    mean = torch.stack([entry["latents"] for entry in drawn])
    return {"mean": mean, "std": torch.zeros_like(mean)}


def _name(scheduler: Any) -> list[str]:
    return [type(scheduler).__name__, str(sorted(scheduler.config.items()))]


def _draw(base: DiffusionBase, prompt: str, seed: int, shape: Shape, steps: int, guidance: float) -> dict[str, Tensor]:
    latents = base.pipe(
        prompt=prompt,
        height=shape[0],
        width=shape[1],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **base.guided(guidance),
    ).images
    return {"latents": base.as_drawn(latents, *shape)[0].float()}
