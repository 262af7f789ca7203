"""LoKr against the formula, peft and diffusers, in its own and in others' files."""

import json
from types import SimpleNamespace

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lokr.layer import factorization
from peft.tuners.lycoris_utils import LycorisTuner
from safetensors.torch import load_file, save_file
from torch import nn

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.methods.lokr import LoKr, split


class Net(nn.Module):
    """Widths that split differently, and a convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(12, 18, 3, padding=1), nn.Linear(18, 32), nn.Linear(32, 7)

    def forward(self, x):
        return self.out(self.fc(self.conv(x).mean((2, 3))).relu())


X = torch.randn(2, 12, 5, 5, generator=torch.Generator().manual_seed(0))
TARGETS = ("conv", "fc", "out")


def net():
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def trained(model, method):
    handle = method.attach(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.4)
    handle.detach()
    return Adapter(handle.tensors(), Card("lokr", to_dict(method), sites=handle.plan.to_list()))


METHODS = {
    "thin": LoKr(rank=1, alpha=3.0, targets=TARGETS),
    "both thin": LoKr(rank=1, alpha=3.0, decompose_both=True, targets=TARGETS),
    "whole": LoKr(rank=99, alpha=3.0, targets=TARGETS),
    "factor 4": LoKr(rank=2, alpha=1.0, factor=4, targets=TARGETS),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_output_is_that_of_the_formula(name):
    """W + s W1 (x) W2, the kernel of a convolution belonging to W2; s is 1 where nothing is thin."""
    method, model, reference = METHODS[name], net(), net()
    adapter = trained(model, method)
    with torch.no_grad():
        for path in TARGETS:
            t = {
                key.rpartition(".")[2]: tensor for key, tensor in adapter.tensors.items() if key.startswith(f"{path}.")
            }
            weight = reference.get_submodule(path).weight
            first = t["w1"] if "w1" in t else t["w1_a"] @ t["w1_b"]
            second = (t["w2"] if "w2" in t else t["w2_a"] @ t["w2_b"]).flatten(1)
            scale = method.alpha / method.rank if len(t) > 2 else 1.0
            assert len(t) > 2 or name in ("whole", "factor 4")
            dense = torch.einsum(
                "lm,knp->lkmnp", first, second.view(len(second), weight.shape[1] // first.shape[1], -1)
            )
            weight += scale * dense.reshape(weight.shape)
    with adapter.attached(model):
        torch.testing.assert_close(model(X), reference(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 8, 16, 64, 100])
def test_widths_are_split_as_in_peft(factor):
    for width in (1, 7, 12, 32, 77, 320, 384, 640, 768, 1000, 1280):
        first, second = split(width, factor)
        assert first <= second and first * second == width
        if factor**2 <= width:  # a larger one that divides the width is taken there all the same
            assert (first, second) == tuple(factorization(width, factor))


@pytest.mark.parametrize("name", METHODS)
def test_peft_gives_the_same_both_ways(tmp_path, name):
    model, method = net(), METHODS[name]
    adapter = trained(model, method)
    with adapter.attached(model):
        expected = model(X)
    adapter.export(tmp_path / "ours", "peft")
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(theirs(X), expected, rtol=1e-4, atol=1e-5)
    with load_adapter(tmp_path / "ours").attached(model):
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("effective", [False, True])
def test_what_peft_made_is_read(tmp_path, effective):
    config = peft.LoKrConfig(
        r=2, alpha=5, target_modules=list(TARGETS), decompose_both=True, decompose_factor=2, init_weights=False,
        use_effective_conv2d=effective, rank_pattern={"fc": 1}, alpha_pattern={"fc": 4},
    )  # fmt: skip
    theirs = peft.get_peft_model(net(), config).eval()
    assert isinstance(theirs.base_model, LycorisTuner)
    theirs.save_pretrained(tmp_path)
    model = net()
    with load_adapter(tmp_path).attached(model):
        torch.testing.assert_close(model(X), theirs(X), rtol=1e-4, atol=1e-5)


def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model.requires_grad_(False)


def drawn(model, adapter=None):
    def run():
        generator = torch.Generator().manual_seed(3)
        x, words = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
        return model(x, torch.tensor([3]), words).sample

    if adapter is None:
        return run()
    with adapter.attached(SimpleNamespace(modules={"unet": model}, hash="", name="tiny")):
        return run()


def on_unet(method, model):
    adapter = trained(nn.ModuleDict({"unet": model}), method)
    return Adapter(adapter.tensors, Card("lokr", to_dict(method), "diffusion", sites=adapter.card.sites))


@pytest.mark.parametrize("targets", ["attention", pytest.param("all", marks=pytest.mark.slow)])
def test_lycoris_keys_go_out_and_in(tmp_path, targets):
    model = unet()
    adapter = on_unet(LoKr(rank=1, alpha=3.0, targets=targets), model)
    expected = drawn(model, adapter)
    assert not torch.allclose(expected, drawn(model), atol=1e-2)
    (file,) = adapter.export(tmp_path, "kohya")
    tensors = load_file(file)
    short = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {key.removeprefix(short) for key in tensors if key.startswith(f"{short}.")} == {
        ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".alpha",
    }  # fmt: skip
    read = load_adapter(file)
    assert read.card.method == "lokr"
    torch.testing.assert_close(drawn(model, read), expected, rtol=1e-4, atol=1e-5)
    if targets == "attention":
        assert read.card.config["factor"] == -1
        read.export(tmp_path / "peft", "peft")
        theirs = peft.PeftModel.from_pretrained(unet(), tmp_path / "peft" / "unet")
        torch.testing.assert_close(drawn(theirs), expected, rtol=1e-4, atol=1e-5)


def test_stock_diffusers_loads_it_into_a_unet(tmp_path):
    model = unet()
    adapter = on_unet(LoKr(rank=1, alpha=3.0), model)
    expected = drawn(model, adapter)
    (file,) = adapter.export(tmp_path, "diffusers")
    model.load_lora_adapter(load_file(file), prefix="unet")
    torch.testing.assert_close(drawn(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "scale"), [(8.0, 4.0), (1.0, 0.5), (0.0, 1.0), (None, 1.0)])
def test_alpha_is_what_lycoris_makes_of_it(tmp_path, alpha, scale):
    """Thin factors are scaled by alpha / rank; whole ones by nothing, whatever alpha says."""
    a, b, thin = torch.randn(4, 3), torch.randn(8, 2), torch.randn(2, 4)
    tensors = {"lora_unet_conv_out.lokr_w1": a, "lora_unet_conv_out.lokr_w2_a": b, "lora_unet_conv_out.lokr_w2_b": thin}
    tensors |= {"lycoris_conv_in.lokr_w1": a, "lycoris_conv_in.lokr_w2": b}
    if alpha is not None:
        tensors |= {f"{name}.alpha": torch.tensor(alpha) for name in ("lora_unet_conv_out", "lycoris_conv_in")}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path)
    assert torch.equal(adapter.tensors["unet.conv_out.w1"], scale * a)
    assert torch.equal(adapter.tensors["unet.conv_in.w1"], a)
    assert adapter.card.config["rank"] == adapter.card.config["alpha"] == 2


BAD: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "half of a factor": (
        {"lora_unet_conv_in.lokr_w1": (2, 2), "lora_unet_conv_in.lokr_w2_a": (2, 2)},
        "not two factors",
    ),
    "another key": ({"lora_unet_conv_in.lokr_w1": (2, 2), "lora_unet_conv_in.diff": (2, 2)}, "no factor of a LoKr"),
    "another model": ({"lora_unet_magic.lokr_w1": (2, 2), "lora_unet_magic.lokr_w2": (2, 2)}, "no module of Stable"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lokr_is_named(tmp_path, case):
    shapes, match = BAD[case]
    save_file({key: torch.zeros(*shape) for key, shape in shapes.items()}, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=match):
        load_adapter(tmp_path)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(InputError, match="factor 0: must be at least 1, or -1"):
        LoKr(factor=0)
    adapter = trained(net(), METHODS["thin"])
    with pytest.raises(InputError, match="LoKr is not written in it.*kohya, diffusers, peft"):
        adapter.export(tmp_path, "torchtune")
    with pytest.raises(InputError, match="names no component"):
        adapter.export(tmp_path, "diffusers")
    tensors = {**adapter.tensors, "fc.w1": torch.zeros(2, 2)}
    wrong = Adapter(tensors, adapter.card)
    with pytest.raises(FormatError, match="fc: factors .* make no change of"), wrong.attached(net()):
        pass
    tensors = {**adapter.tensors, "fc.w1": torch.zeros(1, 3), "fc.w2": torch.zeros(32, 6)}
    del tensors["fc.w2_a"], tensors["fc.w2_b"]
    with pytest.raises(InputError, match="no one factor splits all its layers"):
        Adapter(tensors, adapter.card).export(tmp_path, "peft")
    assert list(tmp_path.iterdir()) == []
    assert json.loads(adapter.card.to_json())["method"] == "lokr"
