"""A step of Custom Diffusion, or of LoRA as in DreamBooth, beside what the public example scripts do in one.

How is said in `script_loop`; the bases are those of `control_speed`, whose random one has a table of 49,408 words as
CLIP has. Both recipes are those of the scripts' own pages, without gradient checkpointing, which neither has there.
Custom Diffusion: diffusers' own attention processors with keys and values in full; the whole table of words as a
parameter, whose gradient is cleared but for the new word's row, clipped and given to AdamW; as many rows of the class
as of the concept; no augmentation. LoRA: peft's layers of rank 4 on the attention's projections, no prior.

The concept's pictures are as small as they are trained, or phone photos of 12 megapixels; the class's are always small.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from graft.diffusion.base import DiffusionBase, load_base
from graft.diffusion.bench.pictures import new_sprites, training_pictures, write_phone_photos
from graft.diffusion.bench.script_loop import RANDOM, OurLoop, ScriptLoop, alternated, on_bases
from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.jobs import ConceptTask, prepare
from graft.studio.caches import Cache
from graft.studio.job import Job

LIMITS = {"custom_diffusion": 2.0, "lora": 1.5}
"""How many times faster a step promises to be."""
BATCH = {"custom_diffusion": 2, "lora": 1}
"""Rows of the concept in the scripts' recipes; the pocket model gets four times as many."""
TOKEN, CLASS, WORD = "<new1>", "a photo of a toy", "sks"
RATE = 1e-4


class PlainCustomDiffusion(ScriptLoop):
    """The script of Custom Diffusion."""

    def __init__(self, task: ConceptTask, base: DiffusionBase, classes: Path):
        from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

        encoder, unet, words = base.pipe.text_encoder, base.pipe.unet, base.pipe.tokenizer
        words.add_tokens([TOKEN])
        self.new = words.convert_tokens_to_ids(TOKEN)
        encoder.resize_token_embeddings(max(self.new + 1, encoder.get_input_embeddings().num_embeddings))
        self.table = encoder.get_input_embeddings().weight.requires_grad_(True)
        with torch.no_grad():
            self.table[self.new] = task.handle.words.tensors()["embedding"][0]
        processors: dict[str, Any] = {}
        for name in unet.attn_processors:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            across = attention.to_k.in_features if name.endswith("attn2.processor") else None
            width = attention.to_k.out_features
            made = CustomDiffusionAttnProcessor2_0(across is not None, False, width, across)
            if across is not None:
                made.to_k_custom_diffusion.load_state_dict(attention.to_k.state_dict())
                made.to_v_custom_diffusion.load_state_dict(attention.to_v.state_dict())
            processors[name] = made
        unet.set_attn_processor(dict(processors))  # it empties what it is given
        layers = list(nn.ModuleList(processors.values()).parameters())
        pictures = task.subjects[0].dataset.pictures
        others = load_dataset(DataConfig(path=str(classes)), base.side(), Cache()).pictures
        method = task.subjects[0].method
        texts = [[method.prompts(picture.caption)[0] for picture in pictures], [CLASS] * len(others)]
        super().__init__(task, base, texts, [[picture.path for picture in some] for some in (pictures, others)])
        self.train([self.table, *layers], [*encoder.parameters(), *layers], RATE)

    def text(self, ids: Tensor) -> Tensor:
        """The prompts; the gradient goes into the whole table."""
        return self.base.pipe.text_encoder(ids)[0]  # type: ignore[no-any-return]

    def after_backward(self) -> None:
        """Clears the gradient of all words but the new one."""
        assert self.table.grad is not None
        others = torch.arange(len(self.table)) != self.new
        self.table.grad[others, :] = self.table.grad[others, :].fill_(0)


class PlainLoRA(ScriptLoop):
    """The script of DreamBooth with LoRA; peft makes the layers."""

    def __init__(self, task: ConceptTask, base: DiffusionBase, out: Path):
        pictures, method = task.subjects[0].dataset.pictures, task.subjects[0].method
        texts = [[method.prompts(picture.caption)[0] for picture in pictures]]
        super().__init__(task, base, texts, [[picture.path for picture in pictures]])
        task.adapter({}).export(out, "diffusers")
        base.pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
        factors = [p.requires_grad_(True) for name, p in base.pipe.unet.named_parameters() if "lora_" in name]
        self.train(factors, factors, RATE)


def custom_diffusion_speed(
    out: Path | None = None,
    bases: tuple[str, ...] = (RANDOM, "pocket-sd"),
    rounds: int = 3,
    width: float = 0.5,
    side: int = 256,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures and returns the table.

    Args:
        out: folder for pictures, bases and `custom_diffusion.json`; None takes `runs/custom_diffusion-speed`.
        bases: `stable-diffusion-1`, of random weights, or any other base.
        rounds: timed steps of each loop, which alternate.
        width: channels of `stable-diffusion-1`, as a share of the true one's.
        side: pixels of its pictures.
        threads: CPU threads.
    """
    return _measured("custom_diffusion", out, bases, rounds, width, side, threads)


def lora_speed(
    out: Path | None = None,
    bases: tuple[str, ...] = (RANDOM, "pocket-sd"),
    rounds: int = 3,
    width: float = 0.5,
    side: int = 256,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures and returns the table.

    Args:
        out: folder for pictures, bases and `lora.json`; None takes `runs/lora-speed`.
        bases: `stable-diffusion-1`, of random weights, or any other base.
        rounds: timed steps of each loop, which alternate.
        width: channels of `stable-diffusion-1`, as a share of the true one's.
        side: pixels of its pictures.
        threads: CPU threads.
    """
    return _measured("lora", out, bases, rounds, width, side, threads)


def _measured(
    method: str, folder: Path | None, bases: tuple[str, ...], rounds: int, width: float, side: int, threads: int
) -> dict[str, Any]:
    """Both kinds of pictures on every base."""
    out = Path(folder or f"runs/{method}-speed").resolve()

    def measure(name: str, base: str, made: bool) -> dict[str, Any]:
        rows = BATCH[method] * (1 if made else 4)
        kinds = ("small pictures", "phone photos")
        return {f"{name}, {kind}": compared(out / name / kind, method, base, rows, rounds) for kind in kinds}

    return on_bases(out / f"{method}.json", bases, (width, side), threads, LIMITS[method], measure)


def compared(out: Path, method: str, base: str, rows: int, rounds: int) -> dict[str, Any]:
    """Steps of both loops on one base, in turn; the folder's name says what pictures."""
    loaded = load_base(base, "cpu")
    pictures = write_concept(out / "pictures", loaded.side(), out.name.startswith("phone"))
    classes = write_class(out / "class", loaded.side())
    settings: dict[str, Any] = {"trigger": WORD, "rank": 4, "alpha": 4.0}
    if method == "custom_diffusion":
        settings = {"token": TOKEN, "class_word": "toy", "class_prompt": CLASS, "class_path": str(classes)}
    job = {
        "base": base, "method": {"name": method, **settings}, "data": {"path": str(pictures)},
        "train": {"batch_size": rows, "device": "cpu", "mixed_precision": "no"},
    }  # fmt: skip
    start = time.process_time()
    task = prepare(Job.load(job))
    once = time.process_time() - start
    theirs: ScriptLoop
    parts: dict[str, Any] = {"denoiser": task.base.denoiser}
    if method == "custom_diffusion":
        theirs = PlainCustomDiffusion(task, loaded, classes)
        parts["text encoder"] = task.base.pipe.text_encoder
    else:
        theirs = PlainLoRA(task, loaded, out / "lora")
    found = {"batch_size": rows, "prepared in": once} | alternated(task, theirs, OurLoop(task, RATE, parts), rounds)
    return found | ({"reason": "other filters scale the photos"} if out.name.startswith("phone") else {})


def write_concept(folder: Path, side: int, phone: bool) -> Path:
    """Writes five pictures of a sprite, of a side or of a phone, all with one caption."""
    sprite = new_sprites(1)[0]
    folder.mkdir(parents=True, exist_ok=True)
    if phone:
        write_phone_photos(folder, sprite)
    else:
        _write(folder, training_pictures(sprite), side)
    for i in range(5):
        (folder / f"{i}.txt").write_text("a photo of {token}", "utf-8")
    return folder


def write_class(folder: Path, side: int, count: int = 8) -> Path:
    """Writes pictures of other sprites of a side, with the class as their caption."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, [training_pictures(sprite)[i % 5] for i, sprite in enumerate(new_sprites(count + 1)[1:])], side)
    for i in range(count):
        (folder / f"{i}.txt").write_text(CLASS, "utf-8")
    return folder


def _write(folder: Path, pictures: list[Image.Image], side: int) -> None:
    for i, picture in enumerate(pictures):
        picture.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
