"""Does a file do in stock diffusers what the adapter does here?

The same prompt is drawn from the same seed three times, by the pipeline of the base: as it is, with the adapter
attached here, and with the file that diffusers itself loads. Their latents are compared as in `graft.studio.outside`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.diffusion.previews import mixed, undisturbed
from graft.diffusion.textual_inversion import ENCODERS
from graft.studio.formats import diffusers, kohya, textual_inversion
from graft.studio.formats.files import read_tensors
from graft.studio.formats.peft_folder import COMPONENTS
from graft.studio.outside import REFUSALS, likeness, refusal

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter

_LORAS = ("lora", "dora", "lokr", "pivotal")


def compare(base: DiffusionBase, adapter: Adapter, source: Path | None = None, side: int = 0) -> dict[str, Any] | str:
    """Draws with the adapter as attached here and as diffusers loads its file; the base is as before afterwards.

    Args:
        base: of the adapter; nothing is attached.
        adapter: of LoRA, DoRA, LoKr, pivotal tuning or Textual Inversion.
        source: the file it was read from, which diffusers will read too; None writes one.
        side: of the pictures, in pixels; 0 takes the base's own.

    Returns:
        `library`, `file`, `change`, `error` and `same`, or `refused`, diffusers' message; for other methods, that
        they are not compared.
    """
    if adapter.card.method not in (*_LORAS, "textual_inversion"):
        return f"files of {adapter.card.method} are not loaded into stock diffusers here"
    prompt = f"a photo of {adapter.card.config.get('token', adapter.card.trigger) or 'a cat'}"
    told: dict[str, Any] = {"library": "diffusers"}
    with tempfile.TemporaryDirectory() as folder, undisturbed(base):
        plain = _latents(base, prompt, side)
        with adapter.attached(base):
            ours = _latents(base, prompt, side)
        files = _files(adapter, source, Path(folder))
        told["file"] = ", ".join(file.name for file in files)
        try:
            theirs = _stock(base, adapter, files, lambda: _latents(base, prompt, side))
        except REFUSALS as error:
            return told | refusal(error)
    return told | likeness(plain, ours, theirs)


def _files(adapter: Adapter, source: Path | None, folder: Path) -> list[Path]:
    """Files for diffusers: the source if it is another library's, else what is written for it."""
    if source is not None and adapter.card.method != "lokr":
        names = (diffusers.FILE, kohya.FILE, *textual_inversion.FILES.values())
        inside = [source / name for name in names if (source / name).is_file()]
        found = inside if source.is_dir() else [source]
        if found and _for_diffusers(found[0]):
            return found
    return [path for path in adapter.export(folder, "diffusers") if path.suffix == ".safetensors"]


def _for_diffusers(file: Path) -> bool:
    """Whether diffusers has a loader for a file."""
    tensors, header = read_tensors(file)
    components = any(key.partition(".")[0] in COMPONENTS for key in tensors)
    known = components or kohya.recognises(tensors) or textual_inversion.recognises(tensors)
    return known and "graft" not in header


def _stock(base: DiffusionBase, adapter: Adapter, files: list[Path], run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives with the files loaded by diffusers' own functions."""
    pipe, word = base.pipe, str(adapter.card.config.get("token", adapter.card.trigger))
    count = 1 if adapter.card.method in _LORAS else 0  # a LoRA's file stands first
    loras, others = files[:count], files[count:]
    with ExitStack() as former:
        for lora in loras:
            if adapter.card.method == "lokr":  # which most pipelines refuse, and every denoiser takes
                former.callback(base.denoiser.unload_lora)
                prefix = "unet" if "unet" in base.modules else "transformer"
                base.denoiser.load_lora_adapter(read_tensors(lora)[0], prefix=prefix)
                continue
            former.callback(pipe.unload_lora_weights)
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        for file in others:
            for key, rows in read_tensors(file)[0].items():
                second = key == "clip_g" or file.stem.endswith("_2")
                encoder, tokenizer = former.enter_context(
                    _kept(pipe, *ENCODERS["embedding_2" if second else "embedding"])
                )
                pipe.load_textual_inversion(rows, token=word, text_encoder=encoder, tokenizer=tokenizer)
        return run()


@contextmanager
def _kept(pipe: Any, name: str, words: str) -> Iterator[tuple[Any, Any]]:
    """A text encoder and a copy of its tokenizer, for diffusers to add to; it removes words of several rows in part."""
    encoder, former = getattr(pipe, name), getattr(pipe, words)
    table = encoder.get_input_embeddings()
    rows, size = table.weight.data, encoder.config.vocab_size
    setattr(pipe, words, copy.deepcopy(former))
    try:
        yield encoder, getattr(pipe, words)
    finally:
        setattr(pipe, words, former)
        table.weight.data, table.num_embeddings, encoder.config.vocab_size = rows, len(rows), size
        encoder.set_input_embeddings(table)


@torch.no_grad()
def _latents(base: DiffusionBase, prompt: str, side: int) -> Tensor:
    side = base.side(side)
    with mixed(base):
        drawn = base.pipe(
            prompt=prompt,
            height=side,
            width=side,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **base.guided(3.0),
        ).images
    latents: Tensor = base.as_drawn(drawn, side, side).float().cpu()
    return latents
