"""What every method promises. A method joins by one line in `CASES`."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from graft.llm_mm.llama_adapter import LlamaAdapter
from graft.llm_mm.llama_adapter_multimodal import MultimodalLlamaAdapter
from graft.llm_mm.llama_adapter_v2 import LlamaAdapterV2
from graft.studio.adapter import Adapter, Card, base_hash, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError, SiteError
from graft.studio.methods.adalora import AdaLoRA
from graft.studio.methods.bitfit import BitFit
from graft.studio.methods.bottleneck import Houlsby, Parallel, Pfeiffer
from graft.studio.methods.compacter import Compacter
from graft.studio.methods.diff_pruning import DiffPruning
from graft.studio.methods.dora import DoRA
from graft.studio.methods.dylora import DyLoRA
from graft.studio.methods.fish_mask import FishMask
from graft.studio.methods.gated_lora import GatedLoRA
from graft.studio.methods.ia3 import IA3
from graft.studio.methods.krona import KronA
from graft.studio.methods.ladder_side_tuning import LadderSideTuning
from graft.studio.methods.lokr import LoKr
from graft.studio.methods.lora import LoRA
from graft.studio.methods.lora_fa import LoRAFA
from graft.studio.methods.moslora import MoSLoRA
from graft.studio.methods.o_lora import OrthogonalLoRA
from graft.studio.methods.prefix_tuning import PrefixTuning
from graft.studio.methods.prompt_tuning import PromptTuning
from graft.studio.methods.sora import SoRA
from graft.studio.methods.ssf import SSF
from graft.studio.registry import METHODS, SITE_METHODS, method_class, site_method
from graft.studio.slots import Handle


class Tokens(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table, self.conv, self.out = nn.Embedding(11, 8), nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, ids):
        return self.out(self.conv(self.table(ids).mT).mT)


class Packed(nn.Module):
    """torch's own transformer; with an odd number of heads the base takes the same path as with slots."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 1, 32, dropout=0.0, batch_first=True)
        self.embed, self.encoder = nn.Conv2d(3, 16, 8, 8), nn.TransformerEncoder(layer, 2)
        self.encoder.layers[0].self_attn.in_proj_bias.data.normal_()

    def forward(self, x):
        return self.encoder(self.embed(x).flatten(2).mT)


class Decoder(nn.Module):
    """A small language model."""

    def __init__(self):
        super().__init__()
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.lm = LlamaForCausalLM(LlamaConfig(vocab_size=11, num_key_value_heads=2, **size))

    def forward(self, ids):
        return self.lm(ids).logits


class Seer(nn.Module):
    """A small language model that reads a picture, which follows from the words."""

    def __init__(self):
        super().__init__()
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision, text = CLIPVisionConfig(image_size=16, patch_size=8, **size), LlamaConfig(vocab_size=12, **size)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=11)
        self.llava = LlavaForConditionalGeneration(config)

    def forward(self, ids):
        pictures = (ids[:, :3, None, None] - 5.0) * torch.linspace(-1, 1, 256).view(16, 16)
        ids = torch.cat([ids.new_full((len(ids), 4), 11), ids], 1)
        return self.llava(ids, pixel_values=pictures).logits


def vit(name="vit_tiny_patch16_224"):
    return timm.create_model(name, img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)


def beit():
    return vit("beit_base_patch16_224")


@dataclass(frozen=True)
class Case:
    method: Any
    model: Callable[[], nn.Module] = vit
    mixed: bool = True
    """Whether rows of a batch can choose."""
    exact: bool = True
    """Whether it starts at the base, or only near it."""
    merges: bool = True
    """Whether it can become part of the base."""
    fades: bool = True
    """Whether there is a way between it and the base: a start near it, and rows of a batch without it."""

    slow: bool = False
    """Whether a faster case is close enough for every day."""

    def attach(self, model: nn.Module, slots: int = 1) -> Handle:
        if isinstance(self.method, FishMask):  # it looks at data first
            x = self.x()
            places = self.method.choose(model, (model(row[None]).square().mean() for row in x))
            return self.method.attach(model, slots, places=places)
        return self.method.attach(model, slots=slots)

    @property
    def name(self) -> tuple[str, str]:
        """Domain, empty for methods without one, and name."""
        of_domain = [key for key in METHODS if key[0] == "llm_mm" and method_class(*key) is type(self.method)]
        return next(iter(of_domain), None) or ("", next(k for k in SITE_METHODS if site_method(k) is type(self.method)))

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().requires_grad_(False).eval()

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.model in (Tokens, Decoder, Seer):
            return torch.randint(11, (4, 7), generator=generator)
        return torch.randn(4, 3, 32, 32, generator=generator)


CASES = {
    "lora": Case(LoRA(rank=2)),
    "lora, all sites": Case(LoRA(rank=2, alpha=5.0, targets=("all", "head"))),
    "lora, rank-stabilised, dropout": Case(LoRA(rank=2, rslora=True, dropout=0.2, targets="all-linear")),
    "lora, embedding and convolution": Case(LoRA(rank=2, targets=("embedding", "all", "out")), Tokens),
    "lora, convolution with dropout": Case(LoRA(rank=2, dropout=0.2, targets="all"), Tokens),
    "lora, weight mode": Case(LoRA(rank=2, targets="q", weight_mode=("attn.qkv",)), beit, mixed=False),
    "lora, packed attention": Case(LoRA(rank=2, targets="all-linear"), Packed),
    "lora_fa": Case(LoRAFA(rank=2, targets="all", dropout=0.2)),
    "o_lora": Case(OrthogonalLoRA(rank=2, targets="all-linear")),
    "moslora": Case(MoSLoRA(rank=2, targets="all")),
    "dora": Case(DoRA(rank=2)),
    "dora, all sites": Case(DoRA(rank=2, alpha=3.0, targets="all", dropout=0.2)),
    "dora, weight mode": Case(DoRA(rank=2, targets="q", weight_mode=("attn.qkv",)), beit, mixed=False),
    "dora, packed attention": Case(DoRA(rank=2), Packed),
    "gated_lora": Case(GatedLoRA(rank=2, targets="all-linear"), merges=False),
    "gated_lora, per token": Case(GatedLoRA(rank=2, per="token"), Packed, merges=False),
    "adalora": Case(AdaLoRA(rank=3, target_rank=2, targets="all-linear")),
    "sora": Case(SoRA(rank=2, targets="all")),
    "dylora": Case(DyLoRA(rank=2)),
    "dylora, rank-stabilised": Case(DyLoRA(rank=4, rslora=True), Packed),
    "krona": Case(KronA(targets="all-linear")),
    "krona, packed attention": Case(KronA(size=2), Packed),
    "lokr, all sites, both factors thin": Case(LoKr(rank=1, targets="all", decompose_both=True)),
    "lokr, convolution": Case(LoKr(rank=1, targets=("conv", "out")), Tokens),
    "lokr, packed attention": Case(LoKr(rank=2, factor=2), Packed),
    "houlsby": Case(Houlsby(width=4), exact=False, merges=False),
    "houlsby, packed attention": Case(Houlsby(width=4), Packed, exact=False, merges=False),
    "pfeiffer": Case(Pfeiffer(width=16), exact=False, merges=False),
    "parallel": Case(Parallel(width=4, targets=("attention", "mlp")), merges=False),
    "parallel, packed attention": Case(Parallel(width=4, targets="attention"), Packed, merges=False),
    "compacter": Case(Compacter(reduction=4, n=2, spread=0.01), exact=False, merges=False),
    "ia3": Case(IA3()),
    "ia3, convolution": Case(IA3(targets="conv", inputs=("out",)), Tokens),
    "ia3, packed attention": Case(IA3(), Packed),
    "ssf": Case(SSF(), exact=False),
    "ssf, from the identity": Case(SSF(spread=0.0, targets="all"), Tokens),
    "ssf, packed attention": Case(SSF(spread=0.0), Packed),
    "bitfit": Case(BitFit()),
    "bitfit, packed attention": Case(BitFit(targets=("q", "up", "norm")), Packed),
    "fish_mask": Case(FishMask(density=0.1), mixed=False),
    "fish_mask, packed attention": Case(FishMask(density=0.1), Packed, mixed=False),
    "prompt_tuning": Case(PromptTuning(length=3), Decoder, exact=False, merges=False, fades=False),
    "prompt_tuning, vision": Case(PromptTuning(length=3), exact=False, merges=False, fades=False),
    "prefix_tuning": Case(PrefixTuning(length=3, hidden=8), Decoder, exact=False, merges=False, fades=False),
    "prefix_tuning, direct": Case(PrefixTuning(length=3, hidden=None), Decoder, exact=False, merges=False, fades=False),
    "prefix_tuning, vision": Case(PrefixTuning(length=3, hidden=8), exact=False, merges=False, fades=False),
    "prefix_tuning, packed attention": Case(
        PrefixTuning(length=3, hidden=None), Packed, exact=False, merges=False, fades=False
    ),
    "ladder_side_tuning": Case(LadderSideTuning(reduction=2), Decoder, merges=False),
    "llama_adapter": Case(LlamaAdapter(num_tokens=3, layers=1), Decoder, merges=False),
    "llama_adapter_multimodal": Case(
        MultimodalLlamaAdapter(num_tokens=3, layers=2, hidden=4), Seer, merges=False, slow=True
    ),
    "llama_adapter_v2, early": Case(
        LlamaAdapterV2(num_tokens=3, visual_tokens=2, visual_blocks=1, visual_width=8), Seer, merges=False, slow=True
    ),
    "llama_adapter_v2, late": Case(
        LlamaAdapterV2(num_tokens=3, fusion="late", visual_blocks=1, scale_at="input"), Seer, merges=False, slow=True
    ),
    "llama_adapter_v2, words": Case(LlamaAdapterV2(num_tokens=3, fusion="none"), Decoder, merges=False, slow=True),
}
# Gates that are hardly ever exactly open or closed, so that each has a gradient.
SOFT = DiffPruning(alpha=0.5, lower=-1e-3, upper=1 + 1e-3)
CASES |= {
    "diff_pruning": Case(SOFT, mixed=False),
    "diff_pruning, packed attention": Case(replace(SOFT, structured=False), Packed, mixed=False),
}


def cases(mixed: bool) -> list[Any]:
    """The cases, or those whose rows can choose."""
    marks = {True: [pytest.mark.slow], False: []}
    kept = {name: case for name, case in CASES.items() if case.mixed or not mixed}
    return [pytest.param(case, id=name, marks=marks[case.slow]) for name, case in kept.items()]


every_method = pytest.mark.parametrize("case", cases(mixed=False))


def moved(case, model, slots=1):
    """A handle whose slots all do something, in inference mode."""
    handle = case.attach(model, slots)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    handle.bank.eval()
    return handle


def train(model, handle, x, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def adamw(handle):
    return torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)


@every_method
def test_identity_at_init_is_bit_identical(case):
    model, x = case.base(), case.x()
    expected = model(x)
    case.attach(model)
    if case.exact:
        assert torch.equal(model(x), expected)
    elif not case.fades:
        assert model(x).shape == expected.shape
    else:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0.2)


@every_method
def test_gradient_reaches_every_trainable_tensor_and_nothing_else(case):
    model, x = case.base(), case.x()
    handle = case.attach(model)
    train(model, handle, x, adamw(handle), steps=2)
    for name, parameter in handle.bank.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in model.parameters())


@every_method
def test_every_site_passes_the_probe(case):
    model, x = case.base(), case.x()
    case.attach(model).probe(lambda: model(x))


@every_method
def test_detach_restores_bits_keys_and_classes(case):
    model, x = case.base(), case.x()
    before, expected = deepcopy(model), model(x)
    handle = moved(case, model)
    assert not torch.equal(model(x), expected)
    if case.merges:
        handle.merge()
    handle.detach()
    assert torch.equal(model(x), expected)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in before.named_modules()
    }
    for (name, tensor), (other, same) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, same)


@every_method
@torch.no_grad()
def test_a_saved_adapter_gives_the_same_output_on_a_fresh_base(case, tmp_path):
    model, x = case.base(), case.x()
    handle = moved(case, model)
    expected = model(x)
    handle.detach()
    domain, name = case.name
    card = Card(name, to_dict(case.method), domain, base_hash=base_hash({"": model}), sites=handle.plan.to_list())
    Adapter(handle.tensors(), card).save(tmp_path)
    fresh = case.base()
    with load_adapter(tmp_path).attached(fresh):
        assert torch.equal(fresh(x), expected)


@every_method
def test_merged_equals_attached(case):
    model, x = case.base(), case.x()
    handle = moved(case, model)
    attached = model(x)
    if not case.merges:
        with pytest.raises(SiteError, match="cannot be part of the base"):
            handle.merge()
        return
    handle.merge()
    assert (model(x) - attached).norm() <= 1e-5 * attached.norm()


@pytest.mark.parametrize("case", cases(mixed=True))
def test_mixed_rows_equal_separate_rows(case):
    model, x = case.base(), case.x()
    base = model(x)
    handle = moved(case, model, slots=3)
    route = [1, -1 if case.fades else 2, 0, 2]
    handle.route(torch.tensor(route))
    mixed = model(x)
    for row, slot in enumerate(route):
        handle.route(torch.tensor([slot]))
        torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]), rtol=1e-5, atol=1e-5)
    if case.fades:
        torch.testing.assert_close(mixed[1], base[1], rtol=0, atol=0)
        return
    with pytest.raises(InputError, match="cannot go without"):
        handle.route(torch.tensor([-1]))
    with pytest.raises(InputError, match="no strength"):
        handle.scale(0, 0.5)


@every_method
def test_the_plan_counts_what_is_trained(case):
    model = case.base()
    handle = case.attach(model, 2)
    plan = handle.plan if isinstance(case.method, FishMask) else case.method.plan(case.base())
    assert sum(parameter.numel() for parameter in handle.bank.parameters()) == 2 * plan.parameters
    assert handle.plan.sites == plan.sites


@every_method
def test_training_resumes_exactly(case):
    x = case.x()

    def start():
        torch.manual_seed(2)
        model = case.base()
        handle = case.attach(model)
        return model, handle, adamw(handle)

    model, handle, optimizer = start()
    train(model, handle, x, optimizer, steps=2)
    saved = deepcopy((handle.bank.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    train(model, handle, x, optimizer, steps=2)
    again, other, resumed = start()
    other.bank.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    train(again, other, x, resumed, steps=2)
    for name, tensor in handle.bank.state_dict().items():
        assert torch.equal(tensor, other.bank.state_dict()[name]), name


@every_method
def test_an_evaluation_before_training_does_not_freeze_anything(case):
    model, x = case.base(), case.x()
    handle = case.attach(model)
    handle.bank.eval()
    with torch.inference_mode():
        model(x)
    handle.bank.train()
    start = handle.tensors()
    train(model, handle, x, adamw(handle), steps=2)
    for name, _ in handle.bank.named_parameters():
        assert not torch.equal(handle.tensors()[name], start[name]), name
