"""Captions of pictures by any model of transformers that looks at pictures and writes text.

Two kinds are known: models of conversations (LLaVA, Qwen-VL, SmolVLM and their like), which are asked a question, and
models that only caption (BLIP, GIT). Captions are written beside the pictures as name.txt, each whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from graft.diffusion.base import without_progress_bars
from graft.diffusion.data import DataConfig
from graft.diffusion.folder import caption_file, find
from graft.studio.config import require
from graft.studio.disk import write_atomic
from graft.studio.errors import DataError, InputError
from graft.studio.pictures import BROKEN, checked_bytes, complaint, open_picture

PROMPT = "Describe this picture in one sentence."
"""What models of conversations are asked."""
LARGEST = 1024
"""Pixels that a model is shown of the shorter side, about; it scales the picture as it needs."""


class Captioner:
    """A model that captions pictures.

    Example:
        >>> Captioner("Salesforce/blip-image-captioning-base")(picture)  # doctest: +SKIP
        'a red apple on a table'
    """

    def __init__(self, name: str, device: str | None = None, prompt: str | None = None, max_tokens: int = 60):
        """Loads the model.

        Args:
            name: a hub id, a folder of transformers, or pocket-llava.
            device: where it runs; None takes the accelerator if there is one.
            prompt: what it is asked; models that only caption may be given the beginning of the caption.
            max_tokens: length of a caption at most.

        Raises:
            InputError: no such model, one that captions nothing, or a length out of range.
        """
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        source = name
        if name.startswith("pocket-"):
            from graft.studio.pocket import resolve

            source = str(resolve(name))
        require("--max-tokens", max_tokens, 1 <= max_tokens <= 4096, "1 to 4096")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype: Any = torch.float32 if device == "cpu" else "auto"
        remedy = "Give a captioner of transformers, such as Salesforce/blip-image-captioning-base, or its folder"
        try:
            kind = AutoConfig.from_pretrained(source).model_type
            with without_progress_bars():
                self.model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True)
            self.processor = AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError, TypeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            if "Unrecognized configuration class" in lines[0]:
                raise InputError(f"--model {name}", f"{kind} is no model that captions pictures", remedy) from error
            raise InputError(f"--model {name}", f"no captioner can be loaded from it ({lines[0]})", remedy) from error
        nn.Module.to(self.model.eval(), device)
        self.prompt, self.max_tokens = prompt, max_tokens

    def __call__(self, picture: Image.Image) -> str:
        """The caption of an RGB picture, in one line."""
        text = self.prompt
        if getattr(self.processor, "chat_template", None):
            asked = [{"type": "image"}, {"type": "text", "text": text or PROMPT}]
            turns = [{"role": "user", "content": asked}]
            text = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        given = self.processor(images=picture, **({"text": text} if text else {}), return_tensors="pt")
        with torch.no_grad():
            ids = self.model.generate(
                **given.to(self.model.device, self.model.dtype),
                max_new_tokens=self.max_tokens,
                do_sample=False,
                num_beams=1,
            )
        before = given["input_ids"].shape[1] if "input_ids" in given and self._repeats else 0
        told: str = self.processor.batch_decode(ids[:, before:], skip_special_tokens=True)[0]
        return " ".join(told.split())

    @property
    def _repeats(self) -> bool:
        """Whether the answer begins with all that was asked, which is no part of the caption."""
        return bool(getattr(self.processor, "chat_template", None))


def write_captions(
    path: Path, model: str, settings: Mapping[str, Any], overwrite: bool = False, device: str | None = None
) -> list[dict[str, Any]]:
    """Writes name.txt beside every picture of a folder that has no caption of its own.

    Args:
        path: the folder, searched with its sub-folders.
        model: as `Captioner` takes it.
        settings: `prefix`, what captions begin with; `prompt` and `max_tokens` as `Captioner` takes them.
        overwrite: replace captions that are there.
        device: as `Captioner` takes it.

    Returns:
        One row per picture: its path, its caption, and whether it was written.

    Raises:
        InputError: no such model, or one that captions nothing; nothing is written then.
        DataError: no pictures, a picture that cannot be read, or a caption without a word.
    """
    found = find(DataConfig(path=str(path), mask="files"), [])
    wanted = [each for each in found if overwrite or not (each.caption or _has_caption(each.path))]
    told = dict[Path, str]()
    if wanted:
        captioner = Captioner(model, device, settings.get("prompt"), settings.get("max_tokens", 60))
        for each in wanted:
            try:
                data = checked_bytes(each.path, DataConfig(path="").max_megapixels)
                caption = captioner(open_picture(data, near=LARGEST // 2))
            except BROKEN as error:
                reason = complaint(error)
                raise DataError(str(each.path), reason, "Repair or remove it; captions so far are written") from error
            if not caption:
                raise DataError(str(each.path), f"{model} has nothing to say of it", "Use another model, or --prompt")
            told[each.path] = f"{settings.get('prefix', '')}{caption}"
            write_atomic(caption_file(each.path) or each.path.with_suffix(".txt"), f"{told[each.path]}\n".encode())
    return [
        {"picture": str(each.path), "caption": told.get(each.path, each.caption), "written": each.path in told}
        for each in found
    ]


def _has_caption(path: Path) -> bool:
    file = caption_file(path)
    return file is not None and bool(file.read_bytes().strip())
