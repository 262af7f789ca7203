"""A step of the studio beside a plain loop that does what the public example scripts do: same weights, rows and noise.

The plain loop opens the pictures, encodes them by the VAE and the prompts by the text encoder at every step, and
updates by torch's default AdamW behind `clip_grad_norm_`. Ours is the studio's task with caches, and the loop's fused
AdamW. Both start from the same weights and see the same batches, so their losses must agree. Steps alternate; seconds
are of the CPU, by part.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from graft.diffusion.base import DiffusionBase
from graft.diffusion.jobs import ConceptTask
from graft.diffusion.task import Batch
from graft.studio.disk import write_atomic

AGREE = 1e-3
"""Largest relative difference of losses that counts as equal."""
RANDOM = "stable-diffusion-1"
"""Name of the base with random weights."""


class Laps:
    """CPU seconds between calls, by what was done in them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last = 0.0

    def start(self) -> None:
        """Begins a step."""
        self.steps.append({})
        self.last = time.process_time()

    def __call__(self, name: str) -> None:
        """Ends a part of it; a part may come in pieces."""
        now = time.process_time()
        if self.steps:
            self.steps[-1][name] = self.steps[-1].get(name, 0.0) + now - self.last
        self.last = now

    def medians(self) -> dict[str, float]:
        """Milliseconds of each part, without the first step, and of the whole step."""
        timed = self.steps[1:]
        parts = {name: 1000 * median(step[name] for step in timed) for name in timed[0]}
        return parts | {"step": 1000 * median(sum(step.values()) for step in timed)}


class ScriptLoop:
    """What an example script does in a step, but for what it trains.

    Args:
        task: ours, whose pictures, prompts and first weights are taken over.
        base: the same base, loaded anew: ours lies otherwise in memory.
        texts: prompt of every picture of every source.
        files: and its file.
    """

    def __init__(
        self, task: ConceptTask, base: DiffusionBase, texts: Sequence[Sequence[str]], files: Sequence[Sequence[Path]]
    ):
        self.base, self.files, self.sources, self.lap = base, files, task.sources, Laps()
        known = {
            rows[0]: text
            for source, some in zip(task.sources, texts, strict=True)
            for rows, text in zip(source.prompts, some, strict=True)
        }
        known |= {source.drops.empty: "" for source in task.sources if source.drops}
        self.prompts = [known.get(row, "") for row in range(max(known) + 1)]
        self.ids = base.tokenize(self.prompts)

    def train(self, parameters: list[nn.Parameter], clipped: list[nn.Parameter], rate: float) -> None:
        """Makes the optimiser of the scripts."""
        self.clipped = clipped
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)

    def text(self, ids: Tensor) -> Tensor:
        """The prompts, encoded without a gradient."""
        with torch.no_grad():
            return self.base.pipe.text_encoder(ids)[0]  # type: ignore[no-any-return]

    def denoise(self, noisy: Tensor, levels: Tensor, text: Tensor, paths: Sequence[Path]) -> Tensor:
        """The denoiser's prediction."""
        return self.base.pipe.unet(noisy, levels, text).sample  # type: ignore[no-any-return]

    def after_backward(self) -> None:
        """What is done to gradients before they are clipped."""

    def opened(self, paths: Sequence[Path]) -> Tensor:
        """Pictures as the scripts open them: (b, 3, h, w) uint8."""
        side = self.base.side()
        pictures = [np.asarray(_cut(Image.open(path), side)) for path in paths]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)

    def step(self, batch: Batch) -> float:
        """One step on the pictures, prompts and noise of our batch."""
        pipe, lap = self.base.pipe, self.lap
        paths = list(self._paths(batch))
        lap.start()
        pixels = self.opened(paths)
        lap("files or caches")
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels / 127.5 - 1).latent_dist
            latents = (posterior.mean + posterior.std * batch.redraw) * pipe.vae.config.scaling_factor
        lap("VAE")
        text = self.text(self.ids[batch.prompts[batch.prompt_of]])
        lap("text encoder")
        noisy = pipe.scheduler.add_noise(latents, batch.noise, batch.levels)
        predicted = self.denoise(noisy, batch.levels, text, paths)
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        target = pipe.scheduler.get_velocity(latents, batch.noise, batch.levels) if velocity else batch.noise
        errors = (predicted - target).square().flatten(1).mean(1).split([source.rows for source in self.sources])
        weighted = [source.weight * some.mean() for source, some in zip(self.sources, errors, strict=True)]
        loss = torch.stack(weighted).sum()
        lap("denoiser")
        loss.backward()  # type: ignore[no-untyped-call]
        lap("backward")
        self.after_backward()
        torch.nn.utils.clip_grad_norm_(self.clipped, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimiser")
        return loss.item()

    def _paths(self, batch: Batch) -> Iterator[Path]:
        """Files of the rows, which are known by their latents."""
        start = 0
        for source, files in zip(self.sources, self.files, strict=True):
            for mean in batch.mean[start : start + source.rows]:
                yield files[int((source.mean[:, 0] == mean).flatten(1).all(1).nonzero()[0])]
            start += source.rows


def _cut(image: Image.Image, side: int) -> Image.Image:
    """Turned as EXIF says, its shorter side resized, the middle of it."""
    whole = ImageOps.exif_transpose(image).convert("RGB")
    width, height = (round(length * side / min(whole.size)) for length in whole.size)
    left, top = (width - side) // 2, (height - side) // 2
    small = whole.resize((width, height), Image.Resampling.BILINEAR)
    return small.crop((left, top, left + side, top + side))


class OurLoop:
    """The studio's task, with the optimiser and the clipping of its loop.

    Args:
        task: to train.
        rate: learning rate.
        parts: networks whose time is told apart, by what the table calls them.
    """

    def __init__(self, task: ConceptTask, rate: float, parts: Mapping[str, nn.Module]):
        self.task, self.lap = task, Laps()
        self.optimizer = torch.optim.AdamW(task.param_groups(), lr=rate, weight_decay=0.01, fused=True)
        for name, module in parts.items():
            module.register_forward_pre_hook(lambda *_: self.lap("files or caches"))
            module.register_forward_hook(lambda *_, name=name: self.lap(name))  # type: ignore[misc]

    def step(self, batch: Batch) -> float:
        """One step."""
        self.lap.start()
        loss, _ = self.task(batch)
        self.lap("denoiser")
        loss.backward()  # type: ignore[no-untyped-call]
        self.lap("backward")
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lap("optimiser")
        return loss.item()


def alternated(task: ConceptTask, theirs: ScriptLoop, ours: OurLoop, rounds: int) -> dict[str, Any]:
    """Steps of both loops in turn, on the same batches; the first of each is not timed."""
    losses = []
    for step in range(rounds + 1):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        losses.append((theirs.step(batch), ours.step(batch)))
    task.handle.detach()
    apart = max(abs(a - b) / a for a, b in losses)
    parts = {"plain": theirs.lap.medians(), "ours": ours.lap.medians()}
    ratio = parts["plain"]["step"] / parts["ours"]["step"]
    return {"parts": parts, "ratio": ratio, "losses apart": apart, "equal": apart < AGREE, "last losses": losses[-1]}


def on_bases(
    file: Path,
    bases: Sequence[str],
    shape: tuple[float, int],
    threads: int,
    limit: float,
    measure: Callable[[str, str, bool], Mapping[str, Any]],
) -> dict[str, Any]:
    """Measures on every base, writes the result and returns it with its table.

    Args:
        file: to write; bases of random weights come into its folder.
        bases: `RANDOM`, or any other base.
        shape: channels of `RANDOM`, as a share of the true one's, and pixels of its pictures.
        threads: CPU threads.
        limit: what the ratio promises to be.
        measure: a base's name, what it is loaded by, and whether its weights are random -> findings by their title.
    """
    before, (width, side) = torch.get_num_threads(), shape
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    try:
        for name in bases:
            made = name == RANDOM
            base = str(shaped_base(file.parent / f"base-{width:g}-{side}", width, side)) if made else name
            found |= measure(name, base, made)
    finally:
        torch.set_num_threads(before)
    result = {"threads": threads, "width": width, "side": side, "bases": found, "limit": limit}
    write_atomic(file, (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": table(result)}


def shaped_base(folder: Path, width: float, side: int) -> Path:
    """A pipeline of random weights with the shape of Stable Diffusion 1.5 at a share of its channels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from graft.studio.pocket.models import load_tokenizer

    if folder.exists():
        return folder
    torch.manual_seed(0)
    words, inner = load_tokenizer(), round(768 * width)
    words.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49_408, hidden_size=inner, intermediate_size=4 * inner, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=side // 8, block_out_channels=[round(c * width) for c in (320, 640, 1280, 1280)],
        cross_attention_dim=inner, attention_head_dim=8, norm_num_groups=16,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[round(c * width) for c in (128, 256, 512, 512)], layers_per_block=2, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, norm_num_groups=16,
        sample_size=side,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=words, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    draft = folder.with_name(folder.name + "-draft")
    shutil.rmtree(draft, ignore_errors=True)
    pipe.save_pretrained(draft)
    draft.rename(folder)
    return folder


def table(result: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [f"CPU milliseconds per step, float32, {result['threads']} thread(s), medians"]
    for name, found in result["bases"].items():
        shape = f", {result['width']:g} of its width, {result['side']} pixels" if name.startswith(RANDOM) else ""
        lines += ["", f"{name}{shape}, batch {found['batch_size']}", f"{'':20}{'plain':>10}{'ours':>10}"]
        plain, ours = found["parts"]["plain"], found["parts"]["ours"]
        lines += [f"{part:20}{ms:10.1f}{ours.get(part, 0.0):10.1f}" for part, ms in plain.items()]
        verdict = "ok" if found["ratio"] >= result["limit"] else "MISSED"
        lines.append(f"{'ratio':20}{found['ratio']:10.2f}   promised {result['limit']:.1f}  {verdict}")
        agree = "equal" if found["equal"] else found.get("reason", "NOT EQUAL")
        lines.append(
            f"{'losses apart':20}{found['losses apart']:10.1e}   {agree}, the last {found['last losses'][1]:.4f}"
        )
        lines.append(f"{'prepared once in':20}{found['prepared in']:10.1f} s")
    return "\n".join(lines)
