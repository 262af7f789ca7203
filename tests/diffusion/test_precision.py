import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from graft.diffusion import precision
from graft.diffusion.base import DiffusionBase
from graft.diffusion.precision import ShortAttention, narrow


@pytest.mark.parametrize(
    ("shape", "keys", "plain"), [((2, 9, 16), 9, True), ((2, 10, 16), 10, False), ((2, 16, 4, 5), 4, True)]
)
def test_few_scores_are_computed_plainly(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], keys: int, plain: bool
) -> None:
    """The same values and gradients either way, and the way that the number of scores asks for."""
    monkeypatch.setattr(precision, "PLAIN_SCORES", 90)
    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8)
    context = torch.randn(2, keys, 16) if len(shape) == 4 else None
    found = []
    for processor in (ShortAttention(), AttnProcessor2_0(), AttnProcessor()):
        attention.set_processor(processor)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        out = attention(x, context)
        out.square().sum().backward()
        found.append((out, x.grad))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-5)
    short = ShortAttention()
    monkeypatch.setattr(short, "fused" if plain else "plain", None)
    attention.set_processor(short)
    attention(x, context)  # without the other one


def test_a_narrow_base_attends_quickly_and_keeps_its_name(base: DiffusionBase) -> None:
    wide = base.hash
    narrow(base, "no")
    assert base.dtype == torch.float32
    assert {type(p) for p in base.denoiser.attn_processors.values()} == {AttnProcessor2_0}
    assert base.pipe.text_encoder.config._attn_implementation == "sdpa"
    own = next(iter(base.denoiser.attn_processors))
    special = AttnProcessor()
    base.denoiser.set_attn_processor(base.denoiser.attn_processors | {own: special})
    narrow(base, "bf16")
    assert base.dtype == torch.bfloat16
    assert base.hash == wide
    processors = base.denoiser.attn_processors
    assert processors.pop(own) is special
    assert {type(p) for p in processors.values()} == {ShortAttention}
    assert base.pipe.text_encoder.config._attn_implementation == "eager"


def test_a_long_text_keeps_the_fused_attention(base: DiffusionBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "PLAIN_SCORES", 24 * 24 - 1)
    narrow(base, "bf16")
    assert base.pipe.text_encoder.config._attn_implementation == "sdpa"
