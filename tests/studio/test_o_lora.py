"""O-LoRA: the earlier adapters act, the new one keeps out of their way, and the file is one LoRA."""

import pytest
import timm
import torch
from torch import nn

from graft.studio.adapter import Adapter, Card, load_adapter
from graft.studio.config import to_dict
from graft.studio.errors import InputError
from graft.studio.methods.lora import LoRA
from graft.studio.methods.o_lora import LaterSlot, OrthogonalLoRA
from graft.studio.methods.ssf import SSF


def base():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    return model.requires_grad_(False).eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(method, name, folder):
    """An adapter with values of its own in a folder."""
    handle = method.attach(base())
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    Adapter(handle.tensors(), Card(name, to_dict(method), sites=handle.plan.to_list())).save(folder)
    return str(folder)


@torch.no_grad()
def test_earlier_adapters_act_beside_the_new_one_and_the_file_holds_all(tmp_path):
    first = saved(LoRA(rank=2, alpha=5.0), "lora", tmp_path / "first")
    second = saved(LoRA(rank=3, rslora=True), "lora", tmp_path / "second")
    method = OrthogonalLoRA(rank=4, alpha=2.0, earlier=(first, second))
    model = base()
    with load_adapter(first).attached(model), load_adapter(second).attached(model):
        expected = model(X)
    handle = method.attach(model, slots=2)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)  # the new one starts at nothing
    for parameter in handle.bank.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = model(X)
    handle.merge()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    handle.unmerge()
    card = Card("o_lora", to_dict(method), sites=handle.plan.to_list())
    adapter = Adapter(handle.tensors(), card)
    adapter.save(tmp_path / "third")
    for path in (tmp_path / "first", tmp_path / "second"):
        path.rename(path.with_name(f"{path.name} is gone"))
    with load_adapter(tmp_path / "third").attached(fresh := base()):
        assert torch.equal(fresh(X), expected)
    plain = OrthogonalLoRA.as_lora(adapter)
    assert plain.card.config["rank"] == 2 + 3 + 4
    with plain.attached(fresh):
        torch.testing.assert_close(fresh(X), expected, rtol=1e-4, atol=1e-5)
    adapter.export(tmp_path / "peft", "peft")
    with load_adapter(tmp_path / "peft").attached(fresh):
        torch.testing.assert_close(fresh(X), expected, rtol=1e-4, atol=1e-5)
    # The next task takes the third one alone: it holds the others.
    fourth = OrthogonalLoRA(rank=1, targets="attention", earlier=(str(tmp_path / "third"),)).attach(fresh)
    torch.testing.assert_close(fresh(X), expected, rtol=1e-4, atol=1e-5)
    assert fourth.slots_of(LaterSlot)[0].A_past.shape[1] == 9


def test_the_penalty_is_the_papers_and_turns_the_new_factors_away(tmp_path):
    path = saved(LoRA(rank=2, targets="q"), "lora", tmp_path / "first")
    handle = OrthogonalLoRA(rank=2, targets="q", earlier=(path,), orthogonality=0.5, shrink=0.1).attach(base())
    t, slots = handle.tensors(), handle.slots_of(LaterSlot)
    expected = sum(
        0.5 * (t[f"{s.site.key}.A_past"] @ t[f"{s.site.key}.A"].T).abs().sum()
        + 0.1 * (t[f"{s.site.key}.A"].norm() + t[f"{s.site.key}.B"].norm())
        for s in slots
    )
    penalty = handle.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty.detach(), expected)
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=1e-2)
    before = sum(slot.overlap().item() for slot in slots)
    for _ in range(40):
        optimizer.zero_grad()
        penalty = handle.penalty()
        assert penalty is not None
        penalty.backward()
        optimizer.step()
    assert sum(slot.overlap().item() for slot in slots) < 0.2 * before
    assert torch.equal(handle.tensors()[f"{slots[0].site.key}.A_past"], t[f"{slots[0].site.key}.A_past"])


def test_what_is_no_lora_or_acts_elsewhere_is_refused(tmp_path):
    other = saved(SSF(), "ssf", tmp_path / "ssf")
    with pytest.raises(InputError, match="a ssf is no LoRA"):
        OrthogonalLoRA(earlier=(other,)).attach(base())
    wide, model = saved(LoRA(targets="mlp"), "lora", tmp_path / "mlp"), base()
    with pytest.raises(InputError, match="where this method has no site"):
        OrthogonalLoRA(targets="q", earlier=(wide,)).attach(model)
    assert torch.equal(model(X), base()(X))  # nothing stays attached
