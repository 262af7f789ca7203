"""Does a file do in stock diffusers what the adapter does here?

The same prompt is drawn from the same seed three times, by the pipeline of the base: as it is, with the adapter
attached here, and with the file that diffusers itself loads. Their latents are compared as in `graft.studio.outside`.
What follows a picture or a map is shown the same one in both.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.diffusion import custom_diffusion_files
from graft.diffusion.image_encoder import as_picture
from graft.diffusion.previews import mixed, undisturbed
from graft.diffusion.textual_inversion import ENCODERS
from graft.studio.formats import diffusers, ip_adapter, kohya, map_networks, textual_inversion
from graft.studio.formats.files import read_tensors
from graft.studio.formats.peft_folder import COMPONENTS
from graft.studio.outside import REFUSALS, likeness, refusal

if TYPE_CHECKING:
    from graft.diffusion.base import DiffusionBase
    from graft.studio.adapter import Adapter

Load = Callable[[Any, "Adapter", "list[Path]", ExitStack], Any]
"""Loads files by diffusers' own functions until the stack is closed, and returns the pipeline that draws with them: of
a base, its adapter, and the files."""


def compare(base: DiffusionBase, adapter: Adapter, source: Path | None = None, side: int = 0) -> dict[str, Any] | str:
    """Draws with the adapter as attached here and as diffusers loads its file; the base is as before afterwards.

    Args:
        base: of the adapter; nothing is attached.
        adapter: of any method of this domain.
        source: the file it was read from, which diffusers will read too; None writes one.
        side: of the pictures, in pixels; 0 takes the base's own.

    Returns:
        `library`, `file`, `change`, `error` and `same`, or `refused`, diffusers' message; for other methods, that
        they are not compared.

    Raises:
        InputError: an adapter of pictures whose image encoder is not known.
    """
    load = _LOADS.get(adapter.card.method)
    if load is None:
        return f"files of {adapter.card.method} are not loaded into stock diffusers here"
    prompt = f"a photo of {adapter.card.trigger or adapter.card.config.get('token') or 'a cat'}"
    told: dict[str, Any] = {"library": "diffusers"}
    with tempfile.TemporaryDirectory() as folder, undisturbed(base):
        plain = _latents(base, base.pipe, prompt, side)
        with adapter.attached(base) as handle:
            shown = _show(base, handle, side)
            ours = _latents(base, base.pipe, prompt, side)
        files = _files(base, adapter, source, Path(folder))
        told["file"] = ", ".join(file.name for file in files)
        try:
            with ExitStack() as former:
                theirs = _latents(base, load(base, adapter, files, former), prompt, side, **shown)
        except REFUSALS as error:
            return told | refusal(error)
    return told | likeness(plain, ours, theirs)


def _show(base: DiffusionBase, handle: Any, side: int) -> dict[str, Any]:
    """Shows what follows pictures or maps one of chance; returns the arguments that show it to diffusers' call."""
    side = base.side(side)
    pixels = torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    if hasattr(handle, "show"):
        handle.show([[as_picture(pixels)]])
        return {"ip_adapter_image": as_picture(pixels)}
    if not hasattr(handle, "follow"):
        return {}
    handle.follow(pixels[None])
    return {"image": as_picture(pixels)}


def _files(base: DiffusionBase, adapter: Adapter, source: Path | None, folder: Path) -> list[Path]:
    """Files for diffusers: the source if it is another library's, else what is written for it."""
    if adapter.card.method == "custom_diffusion":  # of its own files diffusers reads only the words
        return custom_diffusion_files.export(adapter, folder, "merged", base)
    if source is not None and adapter.card.method != "lokr":
        names = (diffusers.FILE, kohya.FILE, ip_adapter.FILE, map_networks.FILE, *textual_inversion.FILES.values())
        inside = [source / name for name in names if (source / name).is_file()]
        found = inside if source.is_dir() else [source]
        if found and _for_diffusers(found[0]):
            return found
    return [path for path in adapter.export(folder, "diffusers") if path.suffix == ".safetensors"]


def _for_diffusers(file: Path) -> bool:
    """Whether diffusers has a loader for a file."""
    tensors, header = read_tensors(file)
    components = any(key.partition(".")[0] in COMPONENTS for key in tensors)
    libraries = (kohya, textual_inversion, ip_adapter, map_networks)
    return (components or any(each.recognises(tensors) for each in libraries)) and "graft" not in header


def _lora(base: DiffusionBase, adapter: Adapter, files: list[Path], former: ExitStack) -> Any:
    """LoRA and DoRA, and the word of pivotal tuning beside it."""
    lora, *words = files
    former.callback(base.pipe.unload_lora_weights)
    base.pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    return _word(base, adapter, words, former)


def _lokr(base: DiffusionBase, adapter: Adapter, files: list[Path], former: ExitStack) -> Any:
    """LoKr, which most pipelines refuse, and every denoiser takes."""
    former.callback(base.denoiser.unload_lora)
    prefix = "unet" if "unet" in base.modules else "transformer"
    base.denoiser.load_lora_adapter(read_tensors(files[0])[0], prefix=prefix)
    return base.pipe


def _word(base: DiffusionBase, adapter: Adapter, files: list[Path], former: ExitStack) -> Any:
    """Words, of one text encoder or two."""
    tokens = _tokens(adapter)
    for file in files:
        for key, rows in read_tensors(file)[0].items():
            second = key == "clip_g" or file.stem.endswith("_2")
            encoder, tokenizer = former.enter_context(
                _kept(base.pipe, *ENCODERS["embedding_2" if second else "embedding"])
            )
            token = key if key in tokens else tokens[0]
            base.pipe.load_textual_inversion(rows, token=token, text_encoder=encoder, tokenizer=tokenizer)
    return base.pipe


def _tokens(adapter: Adapter) -> list[str]:
    given = adapter.card.config.get("token", adapter.card.trigger)
    return [given] if isinstance(given, str) else list(given or ())


def _custom_diffusion(base: DiffusionBase, adapter: Adapter, files: list[Path], former: ExitStack) -> Any:
    """Whole weights, put into the denoiser, and words."""
    weights, *words = files
    found = read_tensors(weights)[0]
    own = {name: tensor for name, tensor in base.denoiser.state_dict().items() if name in found}
    former.callback(base.denoiser.load_state_dict, {name: each.clone() for name, each in own.items()}, strict=False)
    if strange := base.denoiser.load_state_dict(found, strict=False).unexpected_keys:
        raise KeyError(f"the denoiser has no {strange[0]}")
    return _word(base, adapter, words, former)


def _network(base: DiffusionBase, adapter: Adapter, files: list[Path], former: ExitStack) -> Any:
    """ControlNet and T2I-Adapter: a network of its own in a pipeline of its own, around the base's parts."""
    import diffusers as library

    network, part = {"controlnet": ("ControlNetModel", "controlnet"), "t2i_adapter": ("T2IAdapter", "adapter")}[
        adapter.card.method
    ]
    loaded = getattr(library, network).from_pretrained(files[0].parent, use_safetensors=True)
    ending = network.removesuffix("Model").removeprefix("T2I") + "Pipeline"
    kind = getattr(library, type(base.pipe).__name__.replace("Pipeline", ending))
    return _around(base, kind, **{part: nn.Module.to(loaded, base.device, base.dtype)})


def _ip_adapter(base: DiffusionBase, adapter: Adapter, files: list[Path], former: ExitStack) -> Any:
    """IP-Adapter, in a copy of the denoiser: diffusers leaves other attention processors behind."""
    from transformers import CLIPImageProcessor

    pipe = _around(base, type(base.pipe), unet=copy.deepcopy(base.denoiser))
    pipe.load_ip_adapter(str(files[0].parent), subfolder="", weight_name=files[0].name)
    encoder = files[0].parent / "image_encoder"
    if (encoder / "preprocessor_config.json").is_file():
        pipe.feature_extractor = CLIPImageProcessor.from_pretrained(encoder)
    return pipe


def _around(base: DiffusionBase, kind: Any, **others: Any) -> Any:
    """A pipeline of diffusers around the base's parts and others."""
    from diffusers.utils import logging

    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # that parts are cast to the type which they have is no news
    try:
        pipe = kind.from_pipe(base.pipe, dtype=base.dtype, **others)
    finally:
        logging.set_verbosity(loud)
    pipe.set_progress_bar_config(disable=True)
    return pipe


_LOADS: dict[str, Load] = {
    "textual_inversion": _word,
    "custom_diffusion": _custom_diffusion,
    "ip_adapter": _ip_adapter,
    "lora": _lora,
    "pivotal": _lora,
    "dora": _lora,
    "lokr": _lokr,
    "controlnet": _network,
    "t2i_adapter": _network,
}
"""Method -> what loads its files."""


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
def _latents(base: DiffusionBase, pipe: Any, prompt: str, side: int, **shown: Any) -> Tensor:
    side = base.side(side)
    with mixed(base):
        drawn = pipe(
            prompt=prompt,
            height=side,
            width=side,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **base.guided(3.0),
            **shown,
        ).images
    latents: Tensor = base.as_drawn(drawn, side, side).float().cpu()
    return latents
