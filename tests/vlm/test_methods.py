"""Every method beside its formula in a few lines, its published size, and the identities it promises."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from graft.studio.errors import InputError
from graft.vlm.base import ClipBase
from graft.vlm.clip_adapter import ClipAdapter
from graft.vlm.clip_lora import ClipLoRA
from graft.vlm.cocoop import CoCoOp
from graft.vlm.coop import CoOp
from graft.vlm.cross_modal import CrossModal
from graft.vlm.head import Classifier, Head, Setting, Shots
from graft.vlm.prolip import ProLIP
from graft.vlm.task_res import TaskRes
from graft.vlm.tip_adapter import TipAdapter, TipAdapterF, class_shares, middle_of_best, search

NAMES = ("cat", "dog", "red cat")
TEMPLATES = ("a photo of a {}.", "the {}.")


@pytest.fixture
def setting(base: ClipBase) -> Setting:
    return Setting(base, NAMES, TEMPLATES)


@pytest.fixture
def shots(base: ClipBase) -> Shots:
    draw = torch.Generator().manual_seed(3)
    labels = torch.tensor([0, 1, 2]).repeat(4)
    centres = torch.randn(3, 16, generator=draw)
    pooled = centres[labels][:, None] + 0.5 * torch.randn(12, 4, 16, generator=draw)
    held = torch.tensor([0, 1, 2])
    return Shots(pooled, labels, centres[held] + 0.5 * torch.randn(3, 16, generator=draw), held)


def trained(head: Head) -> int:
    return sum(p.numel() for p in head.parameters() if p.requires_grad)


def moved(head: Head, seed: int = 5) -> Head:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return head


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def zero_shot(setting: Setting, features: Tensor) -> Tensor:
    """Prompt ensemble in three lines."""
    texts = [[t.format(n) for n in setting.names] for t in setting.templates]
    weights = unit(torch.stack([unit(setting.base.encode_text(row)) for row in texts]).mean(0))
    return setting.base.logit_scale * unit(features) @ weights.T


@torch.no_grad()
def test_zero_shot_is_the_mean_of_the_prompts_at_unit_length(setting: Setting, shots: Shots):
    features = setting.base.project(shots.held_pooled)
    torch.testing.assert_close(setting.zero_shot(features), zero_shot(setting, features), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tip_adapter_is_its_formula(setting: Setting, shots: Shots):
    head = TipAdapter(alpha=3.0, beta=2.0, search=False).build(setting)
    head.start(shots)
    features = setting.base.project(shots.held_pooled)
    keys = unit(setting.base.project(shots.pooled[:, 1:]).mean(1))
    votes = torch.exp(-2.0 * (1 - unit(features) @ keys.T)) @ F.one_hot(shots.labels).float()
    expected = zero_shot(setting, features) + 3.0 * setting.base.logit_scale / 100 * votes
    torch.testing.assert_close(head(head.prepare(shots.held_pooled)), expected, rtol=1e-5, atol=1e-5)
    assert trained(head) == 0


@torch.no_grad()
def test_tip_adapter_without_alpha_is_zero_shot_and_f_starts_as_tip(setting: Setting, shots: Shots):
    inputs = setting.base.project(shots.held_pooled)
    without = TipAdapter(alpha=0.0, search=False).build(setting)
    without.start(shots)
    assert torch.equal(without(inputs), setting.zero_shot(inputs))
    tip, tip_f = (method(search=False).build(setting) for method in (TipAdapter, TipAdapterF))
    for head in (tip, tip_f):
        head.start(shots)
    assert torch.equal(tip(inputs), tip_f(inputs))
    assert trained(tip_f) == 12 * 16  # N K d


def test_unequal_shots_vote_by_class_and_not_by_number():
    shares = class_shares(torch.tensor([0, 0, 0, 1]), 2)
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 2.0]))
    assert torch.equal(class_shares(torch.tensor([0, 1, 1, 0]), 2), torch.ones(2))


@torch.no_grad()
def test_the_search_is_the_plain_grid(setting: Setting, shots: Shots):
    draw = torch.Generator().manual_seed(0)
    plain, affinity = torch.randn(40, 3, generator=draw), torch.rand(40, 12, generator=draw)
    wanted = torch.randint(3, (40,), generator=draw)
    alphas, betas = torch.tensor([0.1, 1.0, 4.0]), torch.tensor([0.5, 2.0, 7.0, 20.0])
    table = search(plain, affinity, shots.labels, torch.ones(3), wanted, alphas, betas)
    for i, beta in enumerate(betas):
        for j, alpha in enumerate(alphas):
            logits = plain + alpha * torch.exp(-beta * (1 - affinity)) @ F.one_hot(shots.labels).float()
            assert table[i, j] == (logits.argmax(1) == wanted).float().mean()
    assert middle_of_best(torch.tensor([[0.0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]])) == (1, 2)


@torch.no_grad()
def test_without_pictures_to_spare_each_shot_is_left_out_in_turn(setting: Setting, shots: Shots):
    bare = Shots(shots.pooled, shots.labels, shots.held_pooled[:0], shots.held_labels[:0])
    head: Any = TipAdapter(alphas=3, betas=4).build(setting)
    head.start(bare)
    features, values = setting.base.project(shots.pooled[:, 0]), F.one_hot(shots.labels).float()
    keys = unit(setting.base.project(shots.pooled[:, 1:]).mean(1))
    best = {}
    for beta in torch.linspace(0.1, 20, 4):
        for alpha in torch.logspace(-1, float(torch.tensor(50.0).log10()), 3):
            hits = 0
            for i in range(12):
                others = [k for k in range(12) if k != i]
                votes = torch.exp(-beta * (1 - unit(features[i]) @ keys[others].T))[None] @ values[others]
                votes = votes[0] / values[others].sum(0) * 4
                logits = zero_shot(setting, features[i]) + alpha * setting.base.logit_scale / 100 * votes
                hits += int(logits.argmax() == shots.labels[i])
            best[float(alpha), float(beta)] = hits
    chosen = tuple(head.strengths.tolist())
    assert best[chosen] == max(best.values())
    single = Shots(shots.pooled[:3], shots.labels[:3], shots.held_pooled[:0], shots.held_labels[:0])
    head.start(single)
    head = TipAdapter().build(setting)
    head.start(single)
    assert head.strengths.tolist() == [TipAdapter().alpha, TipAdapter().beta]  # one shot: nothing to search by


@torch.no_grad()
def test_clip_adapter_is_its_formula_on_features_that_are_not_normalised(setting: Setting, shots: Shots):
    head = ClipAdapter(ratio=0.3).build(setting)
    features, state = setting.base.project(shots.held_pooled), head.state_dict()
    change = F.relu(F.relu(features @ state["down.weight"].T) @ state["up.weight"].T)
    expected = zero_shot(setting, 0.3 * change + 0.7 * features)
    torch.testing.assert_close(head(features), expected, rtol=1e-5, atol=1e-5)
    assert trained(head) == 2 * 16 * 4
    safe = ClipAdapter(safe=True).build(setting)
    assert torch.equal(safe(features), setting.zero_shot(features))


@torch.no_grad()
def test_task_res_is_its_formula_and_starts_at_zero_shot(setting: Setting, shots: Shots):
    head, features = TaskRes(alpha=0.7).build(setting), setting.base.project(shots.held_pooled)
    torch.testing.assert_close(head(features), setting.zero_shot(features), rtol=1e-5, atol=1e-5)
    moved(head)
    weights = unit(setting.weights + 0.7 * head.state_dict()["residual"])
    torch.testing.assert_close(head(features), setting.base.logit_scale * unit(features) @ weights.T)
    assert trained(head) == 3 * 16


def test_cross_modal_learns_from_names_as_from_pictures(setting: Setting, shots: Shots):
    head, features = moved(CrossModal().build(setting)), setting.base.project(shots.held_pooled)
    weight, scale = head.state_dict()["weight"], setting.base.logit_scale
    texts = torch.cat([unit(setting.base.encode_text([t.format(n) for n in NAMES])) for t in TEMPLATES])
    expected = F.cross_entropy(scale * unit(features) @ weight.T, shots.held_labels)
    expected = (expected + F.cross_entropy(scale * texts @ weight.T, torch.tensor([0, 1, 2, 0, 1, 2]))) / 2
    loss, _ = head.loss(features, shots.held_labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    fresh = CrossModal().build(setting)
    torch.testing.assert_close(fresh(features), setting.zero_shot(features), rtol=1e-5, atol=1e-5)
    assert trained(fresh) == 3 * 16


def test_prolip_is_its_formula_and_starts_at_zero_shot(setting: Setting, shots: Shots, any_base: ClipBase):
    head = ProLIP(strength=2.0).build(setting)
    head.start(shots)
    start = setting.zero_shot(setting.base.project(shots.held_pooled))
    torch.testing.assert_close(head(head.prepare(shots.held_pooled)), start, rtol=1e-5, atol=1e-5)
    moved(head)
    after = head.state_dict()["projection"]
    logits = zero_shot(setting, shots.held_pooled @ after)
    penalty = 2.0 / 4 * (after - setting.base.model.visual_projection.weight.T).square().sum()
    expected = F.cross_entropy(logits, shots.held_labels) + penalty
    torch.testing.assert_close(head.loss(shots.held_pooled, shots.held_labels)[0], expected, rtol=1e-5, atol=1e-5)
    assert head.full_batch and trained(head) == 16 * 16
    if any_base.projection is None:
        with pytest.raises(InputError, match="does not end in a linear map"):
            ProLIP().build(Setting(any_base, NAMES, TEMPLATES))


@torch.no_grad()
def test_coop_from_words_is_the_hand_prompt(any_base: ClipBase):
    setting = Setting(any_base, NAMES, ("a photo of a {}.",))
    head = CoOp(words="a photo of a").build(setting)
    features = torch.randn(5, setting.weights.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(features), setting.zero_shot(features), rtol=1e-4, atol=1e-4)
    own = CoOp(words="a photo of a", class_specific=True).build(setting)
    torch.testing.assert_close(own(features), setting.zero_shot(features), rtol=1e-4, atol=1e-4)


def test_cocoop_batched_is_cocoop_looped(any_base: ClipBase):
    setting = Setting(any_base, NAMES, ("a photo of a {}.",))
    torch.manual_seed(0)
    head: Any = CoCoOp().build(setting)
    features = torch.randn(3, setting.weights.shape[1], generator=torch.Generator().manual_seed(0))
    state = dict(head.named_parameters())

    def one(feature: Tensor) -> Tensor:
        """The paper's line: a context for one picture, a text tower for its classes."""
        f = unit(feature)
        hidden = F.relu(state["meta.0.weight"] @ f + state["meta.0.bias"])
        shift = state["meta.2.weight"] @ hidden + state["meta.2.bias"]
        texts = unit(head.table.features((state["context"] + shift)[None])[0])
        return setting.base.logit_scale * texts @ f

    looped, batched = torch.stack([one(f) for f in features]), head(features)
    torch.testing.assert_close(batched, looped, rtol=1e-4, atol=1e-4)
    a, b = (torch.autograd.grad(x.square().sum(), list(state.values())) for x in (batched, looped))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(head(features), batched, rtol=1e-5, atol=1e-5)


def test_cocoop_without_a_shift_is_the_hand_prompt(any_base: ClipBase):
    setting = Setting(any_base, NAMES, ("a photo of a {}.",))
    features = torch.randn(5, setting.weights.shape[1], generator=torch.Generator().manual_seed(0))
    head: Any = CoCoOp(safe=True).build(setting)
    torch.testing.assert_close(head(features), setting.zero_shot(features), rtol=1e-4, atol=1e-4)
    head(features).square().sum().backward()
    assert all(tensor.grad.any() for tensor in (head.context, head.meta[2].bias))  # W2's waits for a live inner unit


def test_contexts_start_as_published(setting: Setting):
    torch.manual_seed(0)
    drawn = CoOp(vectors=16).build(setting).state_dict()["context"]
    assert abs(float(drawn.std()) - 0.02) < 0.003 and abs(float(drawn.mean())) < 0.004
    words = CoCoOp().build(setting).state_dict()["context"]
    ids = setting.base.words.content("a photo of a")
    assert torch.equal(words, setting.base.model.text_model.embeddings.token_embedding.weight[ids])


def test_published_sizes_on_vit_b_16(make: Callable[..., ClipBase]):
    wide = {"hidden_size": 768, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 12}
    setting = Setting(make(512, 1, wide), NAMES, ("a {}.",))
    assert trained(CoOp().build(setting)) == 16 * 512
    assert trained(CoOp(vectors=4, class_specific=True).build(setting)) == 3 * 4 * 512
    assert trained(CoCoOp().build(setting)) == 35_360
    assert trained(ClipAdapter().build(setting)) == 131_072
    assert trained(TaskRes().build(setting)) == trained(CrossModal().build(setting)) == 3 * 512
    assert trained(ProLIP().build(setting)) == 768 * 512
    with torch.device("meta"):
        whole = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
    plan = ClipLoRA().plan({"model": whole})
    assert plan.parameters == 184_320 and len(plan) == 72


def test_clip_lora_is_the_towers_with_other_weights(make: Callable[..., ClipBase]):
    torch.manual_seed(0)
    base = make()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    setting = Setting(base, NAMES, TEMPLATES)
    expected = zero_shot(Setting(base, NAMES, ("a photo of a {}.",)), base.encode_image(pixels))
    plain = deepcopy(base.model)
    head: Any = ClipLoRA().build(setting).eval()
    torch.testing.assert_close(head(pixels), expected, rtol=1e-5, atol=1e-5)  # the start is zero-shot
    moved(head)
    for name, tensor in head.tensors().items():
        if name.endswith(".A"):
            key = name.removeprefix("model.").removesuffix(".A")
            change = head.tensors()[f"model.{key}.B"] @ tensor * 2**-0.5
            plain.get_submodule(key).weight.data += change
    with torch.no_grad():
        text = base.words([f"a photo of a {name}." for name in NAMES])
        images = plain.get_image_features(pixel_values=pixels / 127.5 - 1).pooler_output
        texts = plain.get_text_features(input_ids=text).pooler_output
        logits = base.logit_scale * unit(images) @ unit(texts).T
    torch.testing.assert_close(head(pixels), logits, rtol=1e-4, atol=1e-4)
    head.strengthen(0.0)
    torch.testing.assert_close(head(pixels), expected, rtol=1e-5, atol=1e-5)
    assert all(not t.any() for n, t in head.tensors().items() if n.endswith(".B"))  # folded into what is saved
    head.detach()
    torch.testing.assert_close(base.encode_image(pixels), setting.base.encode_image(pixels), rtol=0, atol=0)


def test_clip_lora_reaches_the_packed_attention_of_open_clip(make_open_clip: Callable[..., ClipBase]):
    """torch's own MultiheadAttention with the changed rows of its packed weight says the same."""
    torch.manual_seed(0)
    base = make_open_clip()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain = deepcopy(base.model)
    head: Any = ClipLoRA().build(Setting(base, NAMES, TEMPLATES)).eval()
    assert {(site["kind"], site["role"]) for site in head.sites} == {("mha", role) for role in "qkv"}
    moved(head)
    tensors = head.tensors()
    with torch.no_grad():
        for name in (name for name in tensors if name.endswith(".A")):
            path, rows = name.removeprefix("model.").removesuffix(".A").split("[")
            start, end = map(int, rows.rstrip("]").split(":"))
            weight = plain.get_submodule(path).in_proj_weight
            weight[start:end] += tensors[f"{name[:-2]}.B"] @ tensors[name] * 2**-0.5
        text = base.words([f"a photo of a {name}." for name in NAMES])
        images, texts = plain.encode_image(pixels / 127.5 - 1), plain.encode_text(text)
    torch.testing.assert_close(head(pixels), base.logit_scale * unit(images) @ unit(texts).T, rtol=1e-4, atol=1e-4)
    head.detach()


METHODS = [
    TipAdapterF(search=False),
    ClipAdapter(),
    TaskRes(),
    CrossModal(),
    ProLIP(),
    CoOp(vectors=2),
    CoCoOp(reduction=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_gradient_reaches_every_trained_tensor_and_nothing_else(method: Any, setting: Setting, shots: Shots):
    torch.manual_seed(1)
    head = method.build(setting)
    head.start(shots)
    moved(head)
    loss, logits = head.loss(head.prepare(shots.held_pooled), shots.held_labels)
    assert logits.shape == (3, 3)
    loss.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert all(p.grad is None for p in setting.base.model.parameters())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_other_names_on_what_was_learnt(method: Any, setting: Setting, shots: Shots):
    torch.manual_seed(1)
    head = method.build(setting)
    head.start(shots)
    classifier = Classifier(method, moved(head))
    if method.bound:
        with pytest.raises(InputError, match="belongs to the classes"):
            classifier.renamed(("the dog", "photo"))
        return
    swapped = classifier.renamed(("dog", "cat", "red cat")).logits(shots.held_pooled)
    torch.testing.assert_close(swapped[:, [1, 0, 2]], classifier.logits(shots.held_pooled), rtol=1e-4, atol=1e-4)
    assert classifier.renamed(("the dog", "photo")).logits(shots.held_pooled).shape == (3, 2)


@pytest.mark.parametrize("method", [CoOp(vectors=2), CoCoOp()], ids=lambda m: type(m).__name__)
def test_what_is_learnt_stays_float32_on_a_narrow_base(method: Any, make_open_clip: Callable[..., ClipBase]):
    torch.manual_seed(0)
    base = make_open_clip()
    base.model.to(torch.bfloat16)
    head = method.build(Setting(base, NAMES, TEMPLATES))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    loss, _ = head.loss(base.encode_image(pixels).float(), torch.tensor([0, 1]))
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in head.parameters() if p.grad is not None)
    assert head.get_parameter("context").grad.abs().sum() > 0


@torch.no_grad()
def test_strength_goes_from_zero_shot_to_what_was_learnt(setting: Setting, shots: Shots):
    head = moved(TaskRes().build(setting))
    none, half, whole = (Classifier(TaskRes(), head, t).logits(shots.held_pooled) for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(none, setting.zero_shot(setting.base.project(shots.held_pooled)))
    torch.testing.assert_close(half, (none + whole) / 2)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [(TipAdapter, "alpha", -1.0), (ClipAdapter, "ratio", 0.0), (TaskRes, "alpha", 0.0), (CrossModal, "texts", 1.0),
     (ProLIP, "strength", -1.0), (CoOp, "vectors", 0), (CoCoOp, "reduction", 0), (ClipLoRA, "rank", 0)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(method: Any, field: str, value: float):
    with pytest.raises(InputError, match=field):
        method(**{field: value})
