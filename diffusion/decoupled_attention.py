"""Decoupled cross attention of IP-Adapter, as an attention processor of diffusers.

    Z = Attn(Q, K, V) + scale * Attn(Q, K', V'),   K' = tokens W_k',  V' = tokens W_v'

Letters: b rows, n positions or tokens, m tokens of what is shown, h heads, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from graft.kernels.gated_attention import Group, gated_attention
from graft.studio.errors import SiteError


def cross_attentions(unet: Any) -> dict[str, Any]:
    """The denoiser's attentions over text, in the order of IP-Adapter's files: down, up, middle.

    Raises:
        SiteError: none, or none that tokens of one width could join.
    """
    names = [name.removesuffix(".processor") for name in getattr(unet, "attn_processors", {})]
    found = {name: unet.get_submodule(name) for name in names if not name.endswith("attn1")}
    remedy = "use a base of Stable Diffusion 1, 2 or XL"
    widths = sorted({int(each.to_k.in_features) for each in found.values() if each.to_k is not None})
    if len(widths) != 1:
        raise SiteError("unet", f"its cross attentions take text of the widths {widths}", remedy)
    for name, each in found.items():
        further = [part for part in ("group_norm", "spatial_norm", "norm_q", "add_k_proj") if getattr(each, part, None)]
        if further or each.residual_connection or each.rescale_output_factor != 1:
            raise SiteError(name, f"this attention does more ({', '.join(further) or 'residual'})", remedy)
    return found


class KeysValues(nn.Module):
    """W_k' and W_v' of one cross attention, which start as copies of its own W_k and W_v."""

    def __init__(self, attention: Any):
        super().__init__()
        self.to_k_ip, self.to_v_ip = _copied(attention.to_k), _copied(attention.to_v)


def _copied(layer: nn.Linear) -> nn.Linear:
    copied = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    copied.weight = nn.Parameter(layer.weight.detach().float().clone())
    return copied


class Shown(NamedTuple):
    """What the rows of a batch are shown."""

    tokens: Tensor
    """(b, m, d)."""
    scale: Tensor
    """(b, 1)."""


class Shows(Protocol):
    """Knows what is shown now."""

    now: Shown | None


class Decoupled:
    """Attention processor of diffusers: text and picture, each with a softmax of its own.

    Args:
        handle: knows what is shown now; if nothing is, the former processor does as ever.
        own: W_k', W_v'.
        former: the processor that was there before.
    """

    def __init__(self, handle: Shows, own: KeysValues, former: Any):
        self.handle, self.own, self.former = handle, own, former

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(b, n, d) -> (b, n, d); diffusers calls it by these names."""
        shown, text = self.handle.now, encoder_hidden_states
        if shown is None or text is None:
            out: Tensor = self.former(attn, hidden_states, text, attention_mask, temb)
            return out
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        query, key, value = (_heads(x, attn) for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        own = (_heads(layer(shown.tokens), attn).to(query.dtype) for layer in self.own.children())
        picture = Group(next(own), next(own), shown.scale)
        if attention_mask is None:
            y = gated_attention(query, (Group(key, value), picture))
        else:
            mask = attn.prepare_attention_mask(attention_mask, text.shape[1], len(query))
            mask = mask.unflatten(0, (len(query), -1))
            y = gated_attention(query, (picture,), F.scaled_dot_product_attention(query, key, value, mask))
        layer, dropout = attn.to_out
        joined: Tensor = dropout(layer(y.transpose(1, 2).flatten(2)))
        return joined


def _heads(x: Tensor, attn: Any) -> Tensor:
    """(b, n, h * d) -> (b, h, n, d)."""
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
