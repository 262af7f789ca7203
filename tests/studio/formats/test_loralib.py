"""loralib's state dicts, against its layers' formulas (loralib 0.1) in plain torch."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import FormatError, InputError
from graft.studio.methods.lora import LoRA

FILE = "loralib.safetensors"
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    return model.requires_grad_(False).eval()


def words():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 5)).requires_grad_(False)


class Linear(nn.Module):
    def __init__(self, base, a, b, s, enable):
        super().__init__()
        self.base, self.a, self.b, self.s, self.enable = base, a, b, s, enable

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T * self.s


class Embedding(Linear):
    def forward(self, x):
        return self.base(x) + F.embedding(x, self.a.T) @ self.b.T * self.s


class MergedLinear(Linear):
    """Layer of a packed projection: a grouped convolution, its result put where ``enable_lora`` says."""

    def forward(self, x):
        on = torch.tensor(self.enable)
        low = F.conv1d((x @ self.a.T).mT, self.b[..., None], groups=int(on.sum())).mT
        out = x.new_zeros(*x.shape[:-1], len(on), self.base.out_features // len(on))
        out[..., on, :] = low.unflatten(-1, (int(on.sum()), -1))
        return self.base(x) + out.flatten(-2) * self.s


def theirs(model, tensors, alpha, embedding=(), enable=None):
    """The model with loralib's layers, holding a state dict's factors."""
    for name in {key.rpartition(".")[0] for key in tensors if key.endswith(".lora_A")}:
        a, b, base = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], model.get_submodule(name)
        kind = Embedding if name in embedding else MergedLinear if name in (enable or {}) else Linear
        model.set_submodule(name, kind(base, a, b, alpha / b.shape[1], (enable or {}).get(name)))
    return model


def read_back(folder):
    with safe_open(folder / FILE, "pt") as file:
        return load_file(folder / FILE), json.loads(file.metadata()["loralib"])


@pytest.mark.parametrize(
    ("make", "x", "targets", "enabled"),
    [
        (vit, PICTURES, ("q", "v"), [True, False, True]),
        (vit, PICTURES, ("k", "o", "mlp"), [False, True, False]),
        (vit, PICTURES, ("attention",), [True, True, True]),
        (words, IDS, ("1", "embedding"), None),
    ],
)
def test_loralibs_layers_give_the_same_with_our_export(tmp_path, make, x, targets, enabled):
    model, method = make(), LoRA(rank=2, alpha=5, targets=targets)
    handle = method.attach(model)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    expected = model(x)
    handle.detach()
    Adapter(handle.tensors(), Card("lora", to_dict(method), sites=handle.plan.to_list())).export(tmp_path, "loralib")
    tensors, header = read_back(tmp_path)
    assert all(value == enabled for value in header["enable_lora"].values())
    got = theirs(make(), tensors, header["lora_alpha"], header["embedding"], header["enable_lora"])(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with load_adapter(tmp_path).attached(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


FACTORS = {"blocks.0.attn.qkv.lora_A": torch.randn(4, 16), "blocks.0.attn.qkv.lora_B": torch.randn(32, 2),
           "blocks.1.mlp.fc1.lora_A": torch.randn(3, 16), "blocks.1.mlp.fc1.lora_B": torch.randn(64, 3)}  # fmt: skip
HEADER = {"lora_alpha": 6, "enable_lora": {"blocks.0.attn.qkv": [False, True, True]}}


def written(folder, tensors, header=HEADER):
    save_file(tensors, folder / FILE, {"loralib": json.dumps(header)} if header is not None else None)
    return folder


def test_we_give_the_same_with_loralibs_factors_alone_and_in_a_whole_model(tmp_path):
    expected = theirs(vit(), FACTORS, 6, enable=HEADER["enable_lora"])(PICTURES)
    model = vit()
    with load_adapter(written(tmp_path, FACTORS)).attached(model):
        torch.testing.assert_close(model(PICTURES), expected, rtol=1e-4, atol=1e-5)
    written(tmp_path, {**vit().state_dict(), **FACTORS})
    with pytest.warns(UserWarning, match="beside the factors are taken for the base's"):
        whole = load_adapter(tmp_path)
    with whole.attached(model):
        torch.testing.assert_close(model(PICTURES), expected, rtol=1e-4, atol=1e-5)


BAD = [
    (FACTORS, None, "lora_alpha is not in a state dict.*save_file"),
    (FACTORS, {"lora_alpha": 6, "alpha": 1}, "lora_alpha is not in"),
    (FACTORS, {"lora_alpha": 6}, "blocks.0.attn.qkv: A has 4 rows, B 2 columns, for 1 parts.*enable_lora"),
    (FACTORS, {**HEADER, "embedding": ["blocks.0.mlp.fc1"]}, "blocks.0.mlp.fc1: the header names it.*did you mean"),
    ({**FACTORS, "blocks.0.attn.qkv.bias": torch.zeros(48)}, HEADER, "qkv.bias: no factor.*trained biases"),
    ({**FACTORS, "blocks.0.mlp.fc1.lora_A": torch.zeros(2, 16)}, HEADER, "fc1.lora_A: .*without its partner"),
    ({**FACTORS, "blocks.0.mlp.fc1.lora_C": torch.zeros(2, 16)}, HEADER, "fc1.lora_C: not a LoRA factor"),
]


@pytest.mark.parametrize(("tensors", "header", "match"), BAD)
def test_what_a_state_dict_does_not_say_is_asked_for(tmp_path, tensors, header, match):
    with pytest.raises(FormatError, match=match):
        load_adapter(written(tmp_path, tensors, header))


def test_what_loralib_has_no_layer_for_is_refused(tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "attn": nn.MultiheadAttention(8, 2)})
    for targets in ("conv", "q"):
        method = LoRA(targets=targets)
        handle = method.attach(model)
        adapter = Adapter(handle.tensors(), Card("lora", to_dict(method), sites=handle.plan.to_list()))
        handle.detach()
        with pytest.raises(InputError, match="loralib has no such LoRA"):
            adapter.export(tmp_path, "loralib")
