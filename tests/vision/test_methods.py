"""Each method beside its formula, written out in a few lines; and the published numbers of parameters."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from graft.studio.errors import InputError, SiteError
from graft.vision import VPT, AdapterPlus, AdaptFormer, FullTuning, VisionBitFit, VisionLoRA, VisionSSF
from graft.vision.base import picture_side


@pytest.fixture
def model(build) -> Any:
    return build()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def moved(method, model):
    """A handle with random values, in inference mode."""
    handle = method.attach(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    handle.bank.eval()
    return handle


PUBLISHED = {
    "VPT-shallow, 10": (VPT(10, deep=False), 10 * 768),
    "VPT-deep, 10": (VPT(10), 12 * 10 * 768),
    "VPT-deep, 100": (VPT(100), 921_600),
    "AdaptFormer-64": (AdaptFormer(), 12 * (2 * 768 * 64 + 64 + 768)),
    "AdaptFormer-8": (AdaptFormer(8), 156_768),
    "Adapter+, 8": (AdapterPlus(), 12 * (2 * 768 * 8 + 8 + 2 * 768)),
    "SSF": (VisionSSF(), 205_824),
    "BitFit": (VisionBitFit(), 102_912),
    "LoRA, 8, q and v": (VisionLoRA(targets=("q", "v")), 294_912),
    "full": (FullTuning(), 85_798_656),
}


@pytest.fixture(scope="module")
def vit_b() -> Any:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=0).eval()


@pytest.mark.parametrize(("method", "count"), PUBLISHED.values(), ids=list(PUBLISHED))
def test_vit_b_has_the_published_number_of_parameters(vit_b, method, count: int):
    assert method.plan(vit_b).parameters == count


def tokens_of(model, x):
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))


@pytest.mark.parametrize("deep", [True, False])
def test_vpt_is_its_formula(model, x, deep: bool):
    prompts = list(moved(VPT(4, deep=deep), model).bank.parameters())
    found = model(x)
    plain = tokens = tokens_of(timm_copy(model), x)
    for k, block in enumerate(timm_copy(model).blocks):
        if deep or k == 0:
            patches = plain[:, 1:] if k == 0 else tokens[:, 5:]
            tokens = torch.cat([tokens[:, :1], prompts[k][0].expand(3, -1, -1), patches], 1)
        tokens = block(tokens)
    expected = timm_copy(model)
    torch.testing.assert_close(found, expected.forward_head(expected.norm(tokens)), rtol=1e-5, atol=1e-5)
    assert len(prompts) == (3 if deep else 1)


def timm_copy(model):
    """The model without its slots."""
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5
    )
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def test_vpt_starts_uniform_with_the_papers_bound():
    model = timm.create_model("vit_base_patch16_224", depth=2, num_classes=0)
    handle = VPT(50).attach(model)
    for prompts in handle.bank.parameters():
        assert prompts.abs().max() <= 0.0625
        assert float(prompts.detach().std()) == pytest.approx(0.0625 / 3**0.5, rel=0.02)
    assert (VPT(1).dropped, VPT(1, deep=False).dropped, VPT(1, dropout=0.3).dropped) == (0.1, 0.0, 0.3)


def test_adaptformer_is_its_formula(model, x):
    method = AdaptFormer(6, scale=0.3)
    handle = moved(method, model)
    found, plain = model(x), timm_copy(model)
    tensors = handle.tensors()
    tokens = tokens_of(plain, x)
    for k, block in enumerate(plain.blocks):
        down, b, up, c = (tensors[f"blocks.{k}.{name}"] for name in ("down", "down_bias", "up", "up_bias"))
        stream = tokens + block.attn(block.norm1(tokens))
        tokens = stream + block.mlp(block.norm2(stream)) + 0.3 * (F.relu(stream @ down.T + b) @ up.T + c)
    torch.testing.assert_close(found, plain.forward_head(plain.norm(tokens)), rtol=1e-5, atol=1e-5)


def test_adaptformer_starts_as_the_paper_says(model, x):
    expected = model(x)
    handle = AdaptFormer(6).attach(model)
    assert torch.equal(model(x), expected)
    for name, tensor in handle.tensors().items():
        if name.endswith(".down"):
            assert tensor.abs().max() <= 1 / 32**0.5 and tensor.std() == pytest.approx(1 / (3 * 32) ** 0.5, rel=0.2)
        else:
            assert not tensor.any()


def test_adapter_plus_is_its_formula(model, x):
    handle = moved(AdapterPlus(4), model)
    found, plain, tensors = model(x), timm_copy(model), handle.tensors()
    tokens = tokens_of(plain, x)
    for k, block in enumerate(plain.blocks):
        down, b, up, c, sigma = (
            tensors[f"blocks.{k}.{name}"] for name in ("down", "down_bias", "up", "up_bias", "sigma")
        )
        h = block(tokens)
        tokens = h + sigma * (F.gelu(h @ down.T + b) @ up.T + c)
    torch.testing.assert_close(found, plain.forward_head(plain.norm(tokens)), rtol=1e-5, atol=1e-5)


def test_adapter_plus_starts_near_the_model_and_drops_whole_pictures(model, x):
    before = model(x)
    handle = AdapterPlus(4, drop_path=0.5).attach(model)
    handle.bank.eval()
    assert 0 < (model(x) - before).abs().max() < 0.05 * before.abs().max()
    tensors = handle.tensors()
    assert all(tensors[f"blocks.{k}.{part}"].abs().max() <= 0.02 for k in range(3) for part in ("down", "up"))
    assert all(bool((tensors[f"blocks.{k}.sigma"] == 1).all()) for k in range(3))
    slot: Any = handle._slots[0].train()
    branch = torch.ones(400, 2, 3)
    kept = slot._dropped(branch)[:, 0, 0]
    assert set(kept.tolist()) == {0.0, 2.0} and 140 < int((kept == 0).sum()) < 260


def test_ssf_is_a_scale_and_a_shift_behind_every_operation(model, x):
    tensors = moved(VisionSSF(), model).tensors()
    found, plain = model(x), timm_copy(model)
    names = {name.rpartition(".")[0] for name in tensors}
    kinds = nn.Linear | nn.LayerNorm | nn.Conv2d
    assert names == {name for name, m in plain.named_modules() if isinstance(m, kinds)} - {"head"}
    for name in names:
        channels = (-1, 1, 1) if isinstance(plain.get_submodule(name), nn.Conv2d) else (-1,)
        pair = tensors[f"{name}.gamma"].view(channels), tensors[f"{name}.beta"].view(channels)
        plain.get_submodule(name).register_forward_hook(lambda m, a, y, pair=pair: pair[0] * y + pair[1])
    torch.testing.assert_close(found, plain(x), rtol=1e-5, atol=1e-5)


def test_ssf_starts_around_the_identity(model):
    tensors = VisionSSF().attach(model).tensors()
    gamma = torch.cat([t for name, t in tensors.items() if name.endswith("gamma")])
    beta = torch.cat([t for name, t in tensors.items() if name.endswith("beta")])
    assert gamma.mean() == pytest.approx(1, abs=2e-3) and gamma.std() == pytest.approx(0.02, rel=0.1)
    assert beta.mean() == pytest.approx(0, abs=2e-3) and beta.std() == pytest.approx(0.02, rel=0.1)


def test_bitfit_is_a_change_of_all_biases(model, x):
    tensors = moved(VisionBitFit(), model).tensors()
    found, plain = model(x), timm_copy(model)
    biases = {name: p for name, p in plain.named_parameters() if name.endswith(".bias") and "head" not in name}
    assert len(tensors) == len(biases)
    with torch.no_grad():
        for name, change in tensors.items():
            biases[name.removesuffix(".d")].add_(change)
    torch.testing.assert_close(found, plain(x), rtol=1e-5, atol=1e-5)


def test_full_tuning_changes_the_weights_and_gives_them_back(model, x):
    before, expected = deepcopy(model.state_dict()), model(x)
    handle = FullTuning().attach(model)
    assert sum(p.numel() for p in handle.bank.parameters()) == sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("head.")
    )
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    trained, changed = handle.tensors(), model(x)
    assert not torch.equal(changed, expected)
    handle.detach()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, trained[name]) for name, value in handle.tensors().items())
    FullTuning().attach(model).load(trained)
    assert torch.equal(model(x), changed)


def test_the_last_blocks_alone(model):
    names = {site.name for site in FullTuning(blocks=1).plan(model)}
    assert {name.split(".")[0] for name in names} == {"blocks", "norm"}
    assert {name.split(".")[1] for name in names if name.startswith("blocks")} == {"2"}
    with pytest.raises(SiteError, match="has 3 blocks"):
        FullTuning(blocks=4).plan(model)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: VPT(0), "num_tokens 0"),
        (lambda: VPT(4, dropout=1.0), "dropout 1.0"),
        (lambda: AdaptFormer(0), "bottleneck 0"),
        (lambda: AdaptFormer(scale=0), "scale 0"),
        (lambda: AdapterPlus(drop_path=1), "drop_path 1"),
        (lambda: FullTuning(blocks=-1), "blocks = -1"),
    ],
)
def test_settings_out_of_range_are_refused(make, told: str):
    with pytest.raises(InputError, match=told):
        make()


def test_methods_work_on_a_plain_model_with_its_own_classifier(model, x):
    """Without the rest of the studio: the classifier stays, `backward` reaches the prompts only."""
    handle = VPT(num_tokens=3, deep=True).attach(model)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.bank.parameters())
    assert all(p.grad is None for p in model.parameters())
    assert picture_side(model) == 32
    handle.detach()
    assert not hasattr(model.blocks[0], "graft_slots")


def test_rows_of_a_batch_have_their_own_prompts(model, x):
    handle = VPT(2).attach(model, slots=2)
    handle.bank.eval()
    handle.route(torch.tensor([1, 0, 1]))
    mixed = model(x)
    for row, slot in enumerate([1, 0, 1]):
        handle.route(torch.tensor([slot]))
        torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), rtol=1e-5, atol=1e-5)
    handle.route(torch.tensor([0, -1, 0]))
    with pytest.raises(SiteError, match="equally many tokens"):
        model(x)
