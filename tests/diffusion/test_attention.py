"""The job's choice of what computes attention. xformers stands in as a module of its one function."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from diffusers.utils import import_utils
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from graft.diffusion.base import DiffusionBase, attend_by, load_base
from graft.diffusion.precision import ShortAttention, narrow
from graft.studio.cli import main
from graft.studio.errors import InputError


def predicted(base: DiffusionBase) -> Tensor:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    return base.denoise(x, torch.tensor([3, 7]), base.condition(base.tokenize(["a red cat", "a toy"])))


def processors(base: DiffusionBase) -> set[type]:
    return {type(each) for each in base.denoiser.attn_processors.values()}


@torch.no_grad()
def test_sdpa_is_what_auto_takes_and_stays_where_auto_would_leave_it(base: DiffusionBase, folder: Path) -> None:
    asked = load_base(str(folder), "cpu", attention="sdpa")
    assert processors(asked) == processors(base) == {AttnProcessor2_0}
    assert asked.pipe.text_encoder.config._attn_implementation == "sdpa"
    assert torch.equal(predicted(asked), predicted(base))
    base.denoiser.set_attn_processor(AttnProcessor())
    attend_by(base, "sdpa")
    assert processors(base) == {AttnProcessor2_0}
    for each, kept in ((asked, AttnProcessor2_0), (load_base(str(folder), "cpu"), ShortAttention)):
        narrow(each, "bf16")
        assert processors(each) == {kept}


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """diffusers as it is with xformers and a GPU; the list grows by one with each call."""
    calls: list[Any] = []

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, **rest: Any) -> Tensor:
        calls.append(q.shape)
        return scaled_dot_product_attention(q, k, v, attn_bias, scale=rest.get("scale"))

    module = ModuleType("xformers")
    module.ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", module)
    monkeypatch.setattr(attention_processor, "xformers", module, raising=False)
    for place in (import_utils, attention_processor):
        monkeypatch.setattr(place, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    drawn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device=None, **rest: drawn(*size, **rest))  # its trial on "cuda"
    return calls


@torch.no_grad()
def test_xformers_computes_the_denoisers_attention(base: DiffusionBase, xformers: list[Any]) -> None:
    expected = predicted(base)
    attend_by(base, "xformers")
    assert (processors(base), base.attention) == ({XFormersAttnProcessor}, "xformers")
    xformers.clear()
    torch.testing.assert_close(predicted(base), expected, rtol=1e-4, atol=1e-5)
    assert len(xformers) == len(base.denoiser.attn_processors)
    assert base.pipe.text_encoder.config._attn_implementation == "sdpa"


def test_what_xformers_itself_refuses_is_said(
    base: DiffusionBase, xformers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\nand more")

    monkeypatch.setattr(base.denoiser, "enable_xformers_memory_efficient_attention", partial(broken))
    with pytest.raises(InputError, match=r"xformers does not run here \(No operator found.*\)\. Take"):
        attend_by(base, "xformers")


def test_without_xformers_or_a_gpu_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'xformers' is not installed.*pip install xformers"):
        load_base(str(folder), "cuda", attention="xformers")
    monkeypatch.setattr(import_utils, "is_xformers_available", lambda: True)
    with pytest.raises(InputError, match=r"computes on a GPU .* goes to 'cpu'\. Take"):
        load_base(str(folder), "cpu", attention="xformers")
    with pytest.raises(InputError, match="attention = 'flash'"):
        load_base(str(folder), "cpu", attention="flash")


def test_a_job_is_refused_before_anything_is_written(
    folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    job = tmp_path / "job.toml"
    job.write_text(f'base = "{folder}"\ndomain = "diffusion"\n[method]\nname = "lora"\n[data]\npath = "{photos}"\n')
    changes = ["--set", 'train.attention="xformers"', "--set", 'train.device="cpu"']
    assert main(["train", str(job), *changes]) == 2
    assert "'xformers' is not installed" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"job.toml", "photos", "cache"}
