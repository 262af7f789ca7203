"""How well an adapter shows its concept, how much of the prompt survives, and what else has changed.

Two numbers are always read together. *Image similarity* is the cosine between features of drawn and real pictures, by
CLIP (CLIP-I) and by DINO or another model (DINO-I); a copy machine would win it. *Text alignment* (CLIP-T) says whether
the rest of the prompt is still obeyed: the cosine between picture and prompt, and, measured in pixels and not by any
model, whether the background has the colour that was asked for. Beside them stand the *drift*, how far what is drawn
for other prompts has moved, and the loss at fixed noise. A ControlNet is measured by what it is for: how well drawings
follow their maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from torch import Tensor

from graft.diffusion.conditions import KINDS, condition_maps
from graft.diffusion.control_scores import following
from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.features import Clip, Eye, clip_of, eye_of
from graft.diffusion.image_encoder import as_picture
from graft.diffusion.measures import COLOURS, harmonic, kid
from graft.diffusion.pair import LOOKED_AT, Pair, real_pictures
from graft.diffusion.previews import PreviewConfig, draw
from graft.diffusion.validation import drawing_loss, held_out, subset
from graft.studio.caches import Cache
from graft.studio.config import require
from graft.studio.errors import InputError

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter
    from graft.studio.job import Job
    from graft.studio.runs import Run

FOLLOWED = 4
"""Pictures that an adapter of pictures is measured with."""
BEFORE = 1000
"""First seed of what the plain base draws for the drift; the adapted base draws from others."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What `evaluate` draws and measures with."""

    path: str = ""
    """Folder of real pictures, best ones that were not trained on. `graft eval` fills in those of the run."""
    held_out: float = 0.0
    """Only the share of them that a training with this `data.validation` holds out; 0 takes all."""
    clip: str = ""
    """CLIP that compares: pocket-clip, a transformers folder, or a hub id. Empty: pocket-clip for an embedded base, and
    for others no such figures."""
    dino: str = ""
    """Model for DINO-I and the drift: pocket-vit, one of timm (name, folder, timm/...), or a DINO of transformers
    (folder or hub id, such as facebook/dinov2-base). Empty: pocket-vit for an embedded base, and for others no such
    figures."""
    prompts: tuple[str, ...] = ("a photo of {}", "a picture of {}")
    """Prompts for image similarity; {} is the trigger."""
    background: str = "{} on a {colour} background"
    """Prompt for background alignment."""
    colours: tuple[str, ...] = ("red", "yellow", "green", "blue")
    """Colours asked for in turn."""
    class_word: str = "thing"
    """Stands for the trigger where the base or CLIP, which do not know it, read the prompt."""
    prior_prompts: tuple[str, ...] = ()
    """Prompts that have nothing to do with the concept. What is drawn for them is compared with what the plain base
    draws (`drift`). Some dozens tell something; none measures no drift."""
    prior_path: str = ""
    """Folder of pictures that prior prompts are compared with too (`kid`); its captions are the prompts if none are
    named."""
    fidelity: Literal["clip", "dino"] = "clip"
    """Whose similarity stands for fidelity in the pair that chooses the best checkpoint."""
    condition: str = ""
    """What maps are, where drawings are to follow some (see ControlNet's `condition`). `graft eval` fills in the
    adapter's."""
    reach: int = 1
    """Pixels within which an edge counts as found."""
    map_reader: str = ""
    """Model of transformers that reads the map of a drawing: a depth estimator for depth, a semantic segmenter for
    segmentation (folder or hub id)."""
    seeds: int = 4
    """Pictures of each prompt."""
    steps: int = 25
    """Denoiser calls per picture."""
    guidance: float = 3.0
    """Classifier-free guidance scale."""
    resolution: int = 0
    """Side in pixels of what is drawn, and of the real pictures; 0 takes the base's own. `graft eval` fills in that of
    the training."""
    laid_on: str = "white"
    """What transparent pictures are laid on: a colour name or #rrggbb. `graft eval` fills in the run's
    data.background."""
    caption: str = ""
    """For real pictures without one. `graft eval` fills in the run's data.caption."""

    def __post_init__(self) -> None:
        unknown = [colour for colour in self.colours if colour not in COLOURS]
        if unknown or self.seeds < 1:
            raise InputError(
                str(unknown or self.seeds), "colours must be known, seeds at least 1", f"Known: {', '.join(COLOURS)}"
            )
        require("eval.held_out", self.held_out, 0 <= self.held_out < 1, "0 to below 1")
        require("eval.condition", self.condition, self.condition in ("", *KINDS), "one of " + ", ".join(KINDS))
        require("eval.reach", self.reach, self.reach >= 0, "0 or more")
        for prompt in (*self.prompts, self.background):
            try:
                prompt.format("word", colour="red")
            except (LookupError, ValueError):
                remedy = "Write {} for the concept, and {colour} in the background's prompt"
                raise InputError(f"prompt {prompt!r}", "its braces name something else", remedy) from None

    @property
    def drawing(self) -> PreviewConfig:
        """How pictures are drawn."""
        return PreviewConfig(steps=self.steps, guidance=self.guidance, resolution=self.resolution)

    @property
    def data(self) -> DataConfig:
        """How real pictures are read."""
        return DataConfig(path=self.path, background=self.laid_on, caption=self.caption or None)

    def models(self, base: DiffusionBase) -> tuple[Clip | None, Eye | None]:
        """The models that look, of those that were named or come with the base."""
        embedded = base.name.startswith("pocket-")
        clip, dino = self.clip or "pocket-clip" * embedded, self.dino or "pocket-vit" * embedded
        return (clip_of(clip, base.device) if clip else None, eye_of(dino, base.device) if dino else None)


def evaluation_settings(adapter: Adapter, run: Run | None, path: str | None = None) -> dict[str, Any]:
    """What `graft eval` measures an adapter with: the run's `[eval]`, its held-out pictures, and what maps are."""
    told = measured_on(run.job) if run is not None else {}
    if adapter.card.config.get("condition"):
        told["condition"] = adapter.card.config["condition"]
    if adapter.card.details.get("resolution"):
        told.setdefault("resolution", adapter.card.details["resolution"])
    return told | ({"path": path, "held_out": 0.0} if path else {})


def measured_on(job: Job) -> dict[str, Any]:
    """A job's `[eval]`, with the job's held-out pictures if it names none; where nothing is held out, all. They are
    looked at as they are trained on."""
    validation = job.data.get("validation", 0.0)
    apart = isinstance(validation, str)
    usual = {"path": validation if apart else job.data["path"], "held_out": 0.0 if apart else validation}
    alike = {"resolution": "resolution", "background": "laid_on", "caption": "caption"}
    usual |= {name: job.data[key] for key, name in alike.items() if job.data.get(key)}
    return {**usual, **({"held_out": 0.0} if "path" in job.eval else {}), **job.eval}


def evaluate(
    base: DiffusionBase, adapter: Adapter | None, settings: EvaluationConfig, clip: Clip | None = None
) -> dict[str, float]:
    """Measures an adapter, or the base with the class word in the trigger's place.

    Args:
        base: the adapter's own.
        adapter: None measures the base.
        settings: pictures, prompts and models.
        clip: a loaded CLIP to use instead of loading `settings.clip`.

    Returns:
        Of a ControlNet, or where `settings.condition` says what maps are: how well they are followed (`following`) and
        `text_alignment`. Else `image_similarity`, `dino_similarity`, `text_alignment`, as far as there are models for
        them, `background_alignment`, and `drift` and `kid` (x 1000) if there are prior prompts. And of both
        `validation_loss`, unless it follows pictures.

    Raises:
        InputError: no folder of real pictures was named, or something that is needed to measure.
    """
    if not settings.path:
        raise InputError("eval.path", "there is nothing to compare with", "Name a folder of real pictures")
    measuring = _Measuring(base, settings, clip)
    if adapter is None:
        return measuring.all(None, settings.class_word)
    measuring.see_before()
    with adapter.attached(base) as handle:
        return measuring.all(handle, adapter.card.trigger or settings.class_word)


class _Measuring:
    """One base, what it is compared with, and by what."""

    def __init__(self, base: DiffusionBase, settings: EvaluationConfig, clip: Clip | None):
        self.base, self.settings = base, settings
        found, self.eye = settings.models(base) if clip is None else (clip, settings.models(base)[1])
        self.clip = clip or found
        self.data = settings.data
        self.whole = load_dataset(self.data, base.side(settings.resolution), Cache())
        share, pictures = settings.held_out, self.whole.pictures
        self.places = held_out(pictures, share) if share else list(range(len(pictures)))
        self.dataset = subset(self.whole, self.places)
        self.prior, self.pictures = _prior(settings)
        self._before: Tensor | None = None
        if self.prior and self.eye is None:
            reason = "the drift is measured by a model, and none is named for this base"
            raise InputError("eval.dino", reason, "Name one, such as facebook/dinov2-base")

    def all(self, handle: Any, word: str) -> dict[str, float]:
        """Everything, of what is attached."""
        if hasattr(handle, "show"):
            return self.followed(handle, word)
        maps = self.maps(handle)
        figures = self._pair(word, self.real) | self.drift() if maps is None else self.control(handle, maps)
        extras = {"control": maps[:, None]} if hasattr(handle, "follow_files") and maps is not None else {}
        return figures | {"validation_loss": drawing_loss(self.base, handle, self.dataset, word, extras)}

    @cached_property
    def real(self) -> list[Image.Image]:
        """The pictures, as models look at them."""
        return real_pictures(self.data, self.settings.held_out)

    def see_before(self) -> None:
        """Looks at what the plain base draws for the prior prompts, before anything is attached."""
        if self.prior and self._before is None:
            self._before = self._drawn_for_prior(BEFORE)

    def _drawn_for_prior(self, first: int) -> Tensor:
        assert self.eye is not None
        seeds = range(first, first + self.settings.seeds)
        return self.eye.images(sum(draw(self.base, self.prior, seeds, self.settings.drawing), []))

    def drift(self) -> dict[str, float]:
        """How far drawings for prior prompts are from the plain base's, and from a folder's pictures; x 1000."""
        if not self.prior:
            return {}
        self.see_before()
        assert self.eye is not None and self._before is not None
        now = self._drawn_for_prior(0)
        which = [row for row in range(len(self.prior)) for _ in range(self.settings.seeds)]
        told = {"drift": 1000 * kid(now, self._before, which)} if len(self.prior) > 1 else {}
        return told | ({"kid": 1000 * kid(now, self.eye.images(self.pictures))} if self.pictures else {})

    def followed(self, handle: Any, word: str) -> dict[str, float]:
        """The pair of an adapter of pictures, compared with what it follows."""
        rows = []
        for picture in self.real[:FOLLOWED]:
            if handle is not None:
                handle.show([[picture]])
            rows.append(self._pair(word, [picture]))
        return {name: mean(row[name] for row in rows) for name in rows[0]}

    def _pair(self, word: str, real: list[Image.Image]) -> dict[str, float]:
        of = Pair(self.settings, self.clip, self.eye, real)
        return of.measure(word, partial(draw, self.base, config=self.settings.drawing))

    def kind(self, handle: Any) -> str:
        """What maps are, if drawings are to follow some."""
        return handle.method.condition if hasattr(handle, "follow_files") else self.settings.condition

    def maps(self, handle: Any) -> Tensor | None:
        """Maps of the pictures, (p, c, h, w) uint8, if drawings are to follow some."""
        kind = self.kind(handle)
        return condition_maps(self.whole, self.data, kind, Cache())[self.places, 0] if kind else None

    def control(self, handle: Any, maps: Tensor) -> dict[str, float]:
        """How well drawings follow the maps of the folder's pictures, told their captions."""
        settings, seeds = self.settings, range(self.settings.seeds)
        if hasattr(handle, "follow_files"):
            handle.follow(maps)
        prompts = [(each.caption or "").replace("{token}", settings.class_word) for each in self.dataset.pictures]
        drawn = draw(self.base, prompts, seeds, settings.drawing)
        figures = following(
            drawn, maps, self.dataset.pixels[:, 0], self.kind(handle), settings.reach, settings.map_reader
        )
        if self.clip is not None and any(prompts):
            told = self.clip.texts([prompt for prompt in prompts for _ in seeds])
            figures["text_alignment"] = float((self.clip.images(sum(drawn, [])) * told).sum(-1).mean())
        return figures


class FollowerYardstick:
    """Scores an adapter that follows pictures or maps while it is trained.

    Fidelity is how well they are followed, 0 to 1: image similarity of pictures, and of maps the F1 of edges, the IoU
    of labels, or one less the error. Alignment is text alignment over the plain base's. The score is their harmonic
    mean, or fidelity alone where no model or no caption tells alignment.

    Args:
        base: nothing may be attached to it.
        settings: pictures, prompts, seeds and models; `condition` is what maps are, or empty for pictures.

    Raises:
        InputError: no model is named that compares pictures, or nothing here reads such maps.
    """

    def __init__(self, base: DiffusionBase, settings: EvaluationConfig):
        self.measuring = _Measuring(base, settings, None)
        if not settings.condition and (self.measuring.clip is None or self._looks() is None):
            name = "eval.clip" if self.measuring.clip is None else "eval.dino"
            reason = f"the pair is measured by a model, and none is named for {base.name}"
            raise InputError(name, reason, "Name one, or leave train.measure_every at 0")
        self.usual = self._figures(None).get("text_alignment")

    def _looks(self) -> Clip | Eye | None:
        return self.measuring.clip if self.measuring.settings.fidelity == "clip" else self.measuring.eye

    def _figures(self, handle: Any) -> dict[str, float]:
        measuring, word = self.measuring, self.measuring.settings.class_word
        if not measuring.settings.condition:
            return measuring.followed(handle, word)
        maps = measuring.maps(handle)
        assert maps is not None
        return measuring.control(handle, maps)

    def score(self, handle: Any) -> dict[str, float]:
        """All figures of what is attached, with `fidelity`, `alignment` and `score`; it follows what it did before."""
        former = getattr(handle, "maps", None)
        try:
            figures = self._figures(handle)
        finally:
            if former is not None:
                handle.follow(former)
            elif hasattr(handle, "show"):
                handle.show([])
        similar = {"clip": "image_similarity", "dino": "dino_similarity"}[self.measuring.settings.fidelity]
        right = next((name for name in (similar, "edge_f1", "iou") if name in figures), None)
        wrong = next((name for name in ("map_error", "kept_error") if name in figures), "")
        fidelity = figures[right] if right else 1 - figures[wrong]
        if not self.usual:
            return figures | {"fidelity": fidelity, "score": fidelity}
        alignment = figures["text_alignment"] / max(self.usual, 1e-9)
        return figures | {"fidelity": fidelity, "alignment": alignment, "score": harmonic(fidelity, alignment)}


def _prior(settings: EvaluationConfig) -> tuple[list[str], list[Image.Image]]:
    """Prior prompts, and pictures that they are compared with.

    Raises:
        InputError: too few, or a folder without captions.
    """
    prompts = list(settings.prior_prompts)
    if not settings.prior_path:
        if len(prompts) == 1:
            raise InputError("eval.prior_prompts", "one prompt tells no drift", "Give some dozens")
        return prompts, []
    dataset = load_dataset(DataConfig(path=settings.prior_path), LOOKED_AT, Cache())
    prompts = prompts or [each.caption for each in dataset.pictures if each.caption]
    if not prompts or len(dataset.pictures) < 2:
        reason = "prior pictures need prompts, as captions or as eval.prior_prompts, and there must be two"
        raise InputError(settings.prior_path, reason, "Add captions or more pictures")
    return prompts, [as_picture(row[0]) for row in dataset.pixels]
