"""Bottleneck adapters and Compacter against their formula, on the blocks of timm and transformers."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from graft.studio.errors import SiteError
from graft.studio.methods.bottleneck import Houlsby, Parallel, Pfeiffer
from graft.studio.methods.compacter import Compacter
from graft.studio.sites import plan_blocks

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    return model.requires_grad_(False).eval()


def randomised(method, model, slots=1):
    handle = method.attach(model.requires_grad_(False), slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    return handle


def adapter(t, name, x, f):
    return f(x @ t[f"{name}.D"].T + t[f"{name}.d"]) @ t[f"{name}.U"].T + t[f"{name}.e"]


def test_houlsby_stands_between_each_sublayer_and_its_residual():
    model, x = vit(), torch.randn(3, 5, 16)
    block = model.blocks[0]
    attention, mlp = block.attn(block.norm1(x)), block.mlp
    handle = randomised(Houlsby(width=4), model)
    t = handle.tensors()
    middle = x + attention + adapter(t, "blocks.0.attn.proj", attention, F.gelu)
    handle.detach()
    inside = mlp(block.norm2(middle))
    expected = middle + inside + adapter(t, "blocks.0.mlp.fc2", inside, F.gelu)
    Houlsby(width=4).attach(model).load(t)
    torch.testing.assert_close(block(x), expected)


def test_parallel_reads_the_input_of_its_sublayer_and_each_row_its_own():
    model, x = vit(), torch.randn(2, 5, 16)
    block = model.blocks[1]
    plain = [block.mlp(x), block.attn(x)]
    handle = randomised(Parallel(width=4, targets=("mlp", "attention")), model, slots=2)
    handle.route(torch.tensor([1, 0]))
    for name, y in zip(("blocks.1.mlp", "blocks.1.attn"), plain, strict=True):
        rows = [y[row] + 4 * adapter(handle.tensors(slot), name, x[row], F.relu) for row, slot in enumerate((1, 0))]
        torch.testing.assert_close(model.get_submodule(name)(x), torch.stack(rows))


def test_transformers_blocks_called_by_keyword_with_several_outputs():
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **SIZE)).requires_grad_(False).eval()
    picture = torch.randn(2, 3, 32, 32)
    base = model(picture).last_hidden_state
    blocks = [site.key for site in plan_blocks(model)]
    assert [name.rpartition(".")[2] for name in blocks] == ["self_attn", "mlp"] * 2
    handle = Parallel(width=4, targets=("attention", "mlp")).attach(model)
    assert torch.equal(model(picture).last_hidden_state, base)
    handle.probe(lambda: model(picture).last_hidden_state)
    handle.detach()
    assert torch.equal(model(picture).last_hidden_state, base)
    serial = Houlsby(width=4).attach(model)
    assert len(serial.plan) == 4
    serial.probe(lambda: model(picture).last_hidden_state)


def test_sublayers_of_a_decoder_and_of_a_model_that_hides_them():
    decoder = LlamaModel(LlamaConfig(vocab_size=50, **SIZE))
    assert [site.key for site in plan_blocks(decoder, "mlp")] == ["layers.0.mlp", "layers.1.mlp"]
    bert = BertModel(BertConfig(vocab_size=50, **SIZE))
    with pytest.raises(SiteError, match=r"sublayers attention, mlp: the model has none as modules"):
        plan_blocks(bert)
    assert len(Houlsby().plan(bert)) == 4  # its output layers are there all the same
    with pytest.raises(SiteError, match="use attention or mlp"):
        plan_blocks(decoder, "everything")


def test_initial_values_are_those_of_the_papers():
    model = vit()
    serial = Pfeiffer(width=64).attach(model).tensors()
    weights = torch.cat([t.flatten() for name, t in serial.items() if name[-1] in "DU"])
    assert weights.abs().max() <= 0.02
    assert weights.std().item() == pytest.approx(0.0088, rel=0.05)  # of a normal 0.01 cut at two deviations
    assert not any(t.any() for name, t in serial.items() if name[-1] in "de")
    parallel = Parallel(width=64).attach(model).tensors()
    assert not any(t.any() for name, t in parallel.items() if name[-1] in "deU")
    assert parallel["blocks.0.mlp.D"].abs().max() <= 1 / 4


def test_compacter_is_a_sum_of_kronecker_products_with_shared_factors():
    model, x = vit(), torch.randn(3, 5, 16)
    layer = model.blocks[1].mlp.fc2
    inside = torch.randn(3, 5, 64)
    base = layer(inside)
    handle = randomised(Compacter(reduction=2, n=4), model)
    t = handle.tensors()
    assert [name for name in t if name.endswith(".C")] == ["blocks.0.attn.proj.C"]
    assert sum(tensor.numel() for tensor in t.values()) == handle.plan.parameters == 4 * 3 * (8 + 16) + 64
    name, shared = "blocks.1.mlp.fc2", t["blocks.0.attn.proj.C"]

    def weight(a, b):
        return sum(torch.kron(shared[k], torch.outer(a[k], b[k])) for k in range(4))

    down = weight(t[f"{name}.down_a"], t[f"{name}.down_b"])
    up = weight(t[f"{name}.up_a"], t[f"{name}.up_b"])
    expected = base + F.gelu(base @ down.T + t[f"{name}.d"]) @ up.T + t[f"{name}.e"]
    torch.testing.assert_close(layer(inside), expected)
    with pytest.raises(SiteError, match="no multiple of n = 3"):
        Compacter(n=3).attach(vit())
    handle.add(t)
    assert len({id(slot.get_parameter("C")) for slot in handle._slots}) == 1
    assert x.shape == block_output(model, x).shape


def block_output(model, x):
    return model.blocks[0](x)


def test_a_shared_factor_does_not_hide_a_dead_site():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    handle = Compacter(n=2, targets=("used", "idle"), spread=1.0).attach(model.requires_grad_(False))
    used = model["used"]
    with pytest.raises(SiteError, match="idle: 1 of 2 sites"):
        handle.probe(lambda: used(torch.randn(2, 8)))
