r"""A start for IP-Adapter that needs no training: a picture's tokens are what the text encoder would say of its text.

The denoiser knows how to read text, and keys and values for pictures start as copies of those for text. So the nearer
the projection's tokens are to the states s of a text that tells what is in the picture, the less is left to learn. With
features f of pictures, and y = (s - b) / g, where g and b are those of the text encoder's last layer norm (where states
come from before it, as with XL, deviations and means of all states by channel), a linear map is found in closed form,

    W = argmin_W sum_i || W f_i - y_i ||^2 + ridge || W ||^2

and the layer norm behind it gets g and b. This is ours, not of the paper; a training goes on from it by `init`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from graft.diffusion.base import DiffusionBase
from graft.diffusion.ip_adapter import BASE_TOKENS, IPAdapter
from graft.studio.adapter import Adapter, Card
from graft.studio.config import to_dict
from graft.studio.errors import InputError

RIDGE = 1e-3
"""Of the features' variance."""
ROWS = 64
"""Pictures or texts that are encoded at once."""


@torch.no_grad()
def aligned_start(
    base: DiffusionBase, pictures: Sequence[Image.Image], texts: Sequence[str], method: IPAdapter | None = None
) -> Adapter:
    """An adapter of kind base that follows pictures as far as a linear map can, before any training.

    Args:
        base: nothing may be attached to it.
        pictures: some thousands.
        texts: one for each, that tells what the adapter is to see in it, and nothing else.
        method: names the image encoder; None takes the defaults.

    Raises:
        InputError: another kind, or another number of texts.
    """
    method = method or IPAdapter()
    if method.patches or len(pictures) != len(texts):
        given = f"kind {method.kind}, {len(pictures)} pictures, {len(texts)} texts"
        raise InputError(given, "this start is for the base kind, with a text for each picture", "Change it")
    parts = [method.encoder(base).features(pictures[i : i + ROWS], False) for i in range(0, len(pictures), ROWS)]
    features = torch.cat(parts).double().cpu()
    unique = list(dict.fromkeys(texts))
    states = torch.cat([_states(base, unique[i : i + ROWS]) for i in range(0, len(unique), ROWS)]).double()
    deviations, means = _norm(base, states)
    places = {text: i for i, text in enumerate(unique)}
    wanted = ((states - means) / deviations).flatten(1)[[places[text] for text in texts]]
    centre, level = features.mean(0), wanted.mean(0)
    seen = features - centre
    gram = seen.T @ seen
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, seen.T @ (wanted - level)).T
    handle = method.attach(base)
    tensors, details = handle.tensors(), handle.details
    handle.detach()
    projection = {
        "proj.weight": weight, "proj.bias": level - weight @ centre, "norm.weight": deviations, "norm.bias": means,
    }  # fmt: skip
    tensors |= {f"image_proj.{name}": tensor.float() for name, tensor in projection.items()}
    card = Card("ip_adapter", to_dict(method), "diffusion", base.name, base.hash, details=details)
    return Adapter(tensors, card)


def _norm(base: DiffusionBase, states: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and shift by channel, (d,) each."""
    encoder = base.pipe.text_encoder
    last = next((part for name, part in encoder.named_modules() if name.endswith("final_layer_norm")), None)
    if last is None or getattr(base.pipe, "text_encoder_2", None) is not None:
        return states.std((0, 1)) + 1e-6, states.mean((0, 1))
    return last.weight.double().cpu(), last.bias.double().cpu()


def _states(base: DiffusionBase, texts: Sequence[str]) -> Tensor:
    """What the denoiser is told at the end of texts: at the end token, before it and after it, (b, 4, d)."""
    ids = base.tokenize(list(texts))
    told = base.condition(ids)["text"].cpu()
    first = ids[:, 0] if ids.dim() == 3 else ids
    end = (first == base.tokenizer.eos_token_id).int().argmax(1)[:, None]
    around = (end + torch.tensor([0, -1, -2, 1])).clamp(0, told.shape[1] - 1)
    assert around.shape[1] == BASE_TOKENS
    return told.gather(1, around[..., None].expand(-1, -1, told.shape[-1]))
