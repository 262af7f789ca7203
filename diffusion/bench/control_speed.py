"""A step of ControlNet beside a plain loop that does what the public example scripts do: same weights, rows and noise.

The plain loop opens picture and map, encodes the picture by the VAE and the prompts by the text encoder at every step,
and updates by torch's default AdamW behind `clip_grad_norm_`. Ours is the studio's task with caches, convolutions with
the channels last, and the loop's fused AdamW. Both start from one copy of the encoder and see the same batches, so
their losses must agree.

The share of what can be kept is that of the base: `stable-diffusion-1` is a base of random weights with the shape of
Stable Diffusion 1.5 (Rombach et al., 2022, arXiv:2112.10752) at `width` times its channels, and so with its shares of
work; `pocket-sd` has a smaller autoencoder and needs more for the map.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.control import scenes
from graft.diffusion.conditions import canny
from graft.diffusion.jobs import ConceptTask, prepare
from graft.diffusion.task import Batch
from graft.studio.disk import write_atomic
from graft.studio.job import Job

LIMIT = 1.4
"""How many times faster a step promises to be, on the first of the bases."""
AGREE = 1e-3
"""Largest relative difference of losses that counts as equal."""


class Laps:
    """CPU seconds between calls, by what was done in them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.last = 0.0

    def start(self) -> None:
        """Begins a step."""
        self.last = time.process_time()

    def __call__(self, name: str) -> None:
        """Ends a part of it."""
        now = time.process_time()
        self.seconds.setdefault(name, []).append(now - self.last)
        self.last = now

    def medians(self) -> dict[str, float]:
        """Milliseconds of each part, without the first step, and of the whole step."""
        parts = {name: 1000 * median(times[1:]) for name, times in self.seconds.items()}
        return parts | {
            "step": 1000 * median(map(sum, zip(*(times[1:] for times in self.seconds.values()), strict=True)))
        }


class PlainLoop:
    """What an example script does in a step.

    Args:
        task: ours, whose pictures and first weights are taken over.
        base: the same base, loaded anew: ours lies otherwise in memory.
        maps: folder of maps, under the names of the pictures.
        rate: learning rate.
    """

    def __init__(self, task: ConceptTask, base: DiffusionBase, maps: Path, rate: float):
        from diffusers import ControlNetModel

        self.base, self.maps, self.lap = base, maps, Laps()
        self.network = ControlNetModel.from_config(task.handle.details["controlnet"]).train()
        self.network.load_state_dict(task.bank.state_dict())
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=rate, weight_decay=0.01)
        self.source, pictures = task.sources[0], task.subjects[0].dataset.pictures
        self.files = [picture.path for picture in pictures]
        self.ids = task.base.tokenize([*(picture.caption or "" for picture in pictures), ""])

    def step(self, batch: Batch) -> float:
        """One step on the pictures, prompts and noise of our batch."""
        picks = [int((self.source.mean[:, 0] == mean).flatten(1).all(1).nonzero()) for mean in batch.mean]
        empty = batch.prompts[batch.prompt_of] == (self.source.drops.empty if self.source.drops else -1)
        ids = self.ids[torch.tensor(picks).masked_fill(empty, -1)]
        pipe, lap, size = self.base.pipe, self.lap, (self.base.side(),) * 2
        lap.start()
        paths = [[self.files[row] for row in picks], [self.maps / self.files[row].name for row in picks]]
        opened = [[np.asarray(Image.open(path).convert("RGB").resize(size)) for path in some] for some in paths]
        pixels, maps = (torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2) for some in opened)
        lap("files or caches")
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels / 127.5 - 1).latent_dist
            latents = (posterior.mean + posterior.std * batch.redraw) * pipe.vae.config.scaling_factor
        lap("VAE")
        with torch.no_grad():
            text = pipe.text_encoder(ids)[0]
        lap("text encoder")
        noisy = pipe.scheduler.add_noise(latents, batch.noise, batch.levels)
        down, mid = self.network(noisy, batch.levels, text, maps / 255, return_dict=False)
        lap("ControlNet")
        led = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predicted = pipe.unet(noisy, batch.levels, text, **led).sample
        velocity = pipe.scheduler.config.prediction_type == "v_prediction"
        target = pipe.scheduler.get_velocity(latents, batch.noise, batch.levels) if velocity else batch.noise
        loss = F.mse_loss(predicted, target)
        lap("denoiser")
        loss.backward()
        lap("backward")
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        lap("optimiser")
        return loss.item()


class OurLoop:
    """The studio's task, with the optimiser and the clipping of its loop."""

    def __init__(self, task: ConceptTask, rate: float):
        self.task, self.lap = task, Laps()
        self.optimizer = torch.optim.AdamW(task.param_groups(), lr=rate, weight_decay=0.01, fused=True)
        task.bank.register_forward_pre_hook(lambda *_: self.lap("files or caches"))
        task.bank.register_forward_hook(lambda *_: self.lap("ControlNet"))

    def step(self, batch: Batch) -> float:
        """One step."""
        self.lap.start()
        loss, _ = self.task(batch)
        self.lap("denoiser")
        loss.backward()
        self.lap("backward")
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lap("optimiser")
        return loss.item()


def controlnet(
    out: Path | None = None,
    bases: tuple[str, ...] = ("stable-diffusion-1", "pocket-sd"),
    rounds: int = 5,
    width: float = 0.5,
    side: int = 256,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures and returns the table.

    Args:
        out: folder for pictures, bases and `controlnet.json`; None takes `runs/controlnet`.
        bases: `stable-diffusion-1`, of random weights, or any other base.
        rounds: timed steps of each loop, which alternate.
        width: channels of `stable-diffusion-1`, as a share of the true one's.
        side: pixels of its pictures.
        threads: CPU threads.
    """
    out = Path(out or "runs/controlnet").resolve()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {}
        for name in bases:
            made = name == "stable-diffusion-1"
            folder = shaped_base(out / f"base-{width:g}-{side}", width, side) if made else name
            found[name] = compared(out / name, str(folder), 2 if made else 16, rounds)
    finally:
        torch.set_num_threads(before)
    result = {"threads": threads, "width": width, "side": side, "bases": found, "limit": LIMIT}
    write_atomic(out / "controlnet.json", (json.dumps(result, indent=1) + "\n").encode())
    return result | {"table": table(result)}


def compared(out: Path, base: str, batch_size: int, rounds: int, count: int = 8) -> dict[str, Any]:
    """Steps of both loops on one base, in turn; the first of each is not timed."""
    rate, loaded = 1e-4, load_base(base, "cpu")
    pictures = write_pairs(out, loaded.side(), count)
    train = {"batch_size": batch_size, "device": "cpu", "mixed_precision": "no"}
    start = time.process_time()
    task = prepare(Job.load({"base": base, "method": {"name": "controlnet"}, "data": {"path": str(pictures)},
                             "train": train}))  # fmt: skip
    once = time.process_time() - start
    theirs, ours = PlainLoop(task, loaded, out / "maps", rate), OurLoop(task, rate)
    losses = []
    for step in range(rounds + 1):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        losses.append((theirs.step(batch), ours.step(batch)))
    task.handle.detach()
    apart = max(abs(a - b) / a for a, b in losses)
    parts = {"plain": theirs.lap.medians(), "ours": ours.lap.medians()}
    ratio = parts["plain"]["step"] / parts["ours"]["step"]
    return {"batch_size": batch_size, "parts": parts, "ratio": ratio, "losses apart": apart, "equal": apart < AGREE,
            "last losses": losses[-1], "prepared in": once}  # fmt: skip


def write_pairs(out: Path, side: int, count: int) -> Path:
    """Writes scenes of a side as a data folder, and their edges into `maps`."""
    for name in ("pictures", "maps"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for k, (pixels, text) in enumerate(scenes(count, seed=2)):
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(out / "pictures" / f"{k}.png")
        (out / "pictures" / f"{k}.txt").write_text(text, encoding="utf-8")
        Image.fromarray(canny(np.asarray(picture))).save(out / "maps" / f"{k}.png")
    return out / "pictures"


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
        vocab_size=len(words), hidden_size=inner, intermediate_size=4 * inner, num_hidden_layers=12,
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


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"CPU milliseconds per step, float32, {result['threads']} thread(s), medians"]
    for name, found in result["bases"].items():
        shape = f", {result['width']:g} of its width, {result['side']} pixels" if name == "stable-diffusion-1" else ""
        lines += ["", f"{name}{shape}, batch {found['batch_size']}", f"{'':20}{'plain':>10}{'ours':>10}"]
        plain, ours = found["parts"]["plain"], found["parts"]["ours"]
        lines += [f"{part:20}{ms:10.1f}{ours.get(part, 0.0):10.1f}" for part, ms in plain.items()]
        verdict = "ok" if found["ratio"] >= result["limit"] else "MISSED"
        lines.append(f"{'ratio':20}{found['ratio']:10.2f}   promised {result['limit']:.1f}  {verdict}")
        agree = "equal" if found["equal"] else "NOT EQUAL"
        lines.append(
            f"{'losses apart':20}{found['losses apart']:10.1e}   {agree}, the last {found['last losses'][1]:.4f}"
        )
        lines.append(f"{'prepared once in':20}{found['prepared in']:10.1f} s")
    return "\n".join(lines)
