from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from graft.studio.adapter import Adapter, base_hash
from graft.studio.errors import BaseMismatchError, DataError, InputError
from graft.studio.job import Job
from graft.vision import AdapterPlus, AdaptFormer, LinearProbe, VisionBase, VisionLoRA
from graft.vision.base import load_base
from graft.vision.jobs import prepare
from graft.vision.method import uncalled
from graft.vision.task import augmented
from graft.vision.verification import compare


def job(folder: Path, photos: Path, method: dict, data: dict | None = None, **train) -> Job:
    return Job.load(
        {
            "base": str(folder),
            "method": method,
            "data": {"path": str(photos), **(data or {})},
            "train": {"device": "cpu", **train},
        }
    )


def test_a_job_of_this_domain_has_its_own_defaults(folder: Path, photos: Path):
    loaded = job(folder, photos, {"name": "vpt"})
    assert (loaded.domain, loaded.train.batch_size, loaded.train.schedule) == ("vision", 32, "cosine")
    assert job(folder, photos, {"name": "vpt"}, batch_size=4).train.batch_size == 4
    assert Job.load(loaded) == loaded


@pytest.mark.parametrize("name", ["linear", "lora", "vpt", "adaptformer", "adapter_plus", "ssf", "bitfit", "full"])
def test_a_task_trains_its_bank_and_nothing_else(folder: Path, photos: Path, name: str):
    task = prepare(job(folder, photos, {"name": name}, batch_size=8))
    frozen = {k: v.clone() for k, v in task.base.model.state_dict().items()}
    optimizer = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    grouped = [id(p) for group in task.param_groups() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in task.parameters())
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss, figures = task(task.batch(step, torch.Generator().manual_seed(step)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert set(figures) == {"accuracy"}
    assert sum(losses[-3:]) < sum(losses[:3])
    if name != "full":
        assert all(torch.equal(frozen[k], v) for k, v in task.base.model.state_dict().items())
    again = prepare(job(folder, photos, {"name": name}, batch_size=8))
    again.load_state_dict(task.state_dict())
    assert torch.equal(again._logits(again.data.val.pixels), task._logits(task.data.val.pixels))


def test_vectors_are_not_decayed_and_the_classifier_has_its_own_rate(folder: Path, photos: Path):
    task = prepare(job(folder, photos, {"name": "adaptformer"}))
    found = {}
    for group in task.param_groups():
        for parameter in group["params"]:
            name = next(name for name, p in task.named_parameters() if p is parameter)
            found[name.rpartition(".")[2], "head" in name] = (group["weight_decay"], group["lr_scale"])
    assert found["down", False] == (1e-4, 1.0) and found["down_bias", False] == (0.0, 1.0)
    assert found["weight", True] == (1e-4, 0.4) and found["bias", True] == (0.0, 0.4)
    heavy = prepare(job(folder, photos, {"name": "adaptformer"}, weight_decay=0.3))
    assert heavy.param_groups()[0]["weight_decay"] == 0.3


def test_frozen_features_give_the_loss_of_the_whole_model(folder: Path, photos: Path):
    task = prepare(job(folder, photos, {"name": "linear"}))
    batch = task.batch(0, torch.Generator().manual_seed(1))
    assert batch.inputs.shape == (32, 32)
    rows = torch.cat([torch.randperm(18, generator=g) for g in [torch.Generator().manual_seed(1)] for _ in range(2)])
    pixels, labels = task.data.train.pixels[rows[:32]], task.data.train.labels[rows[:32]]
    expected = cross_entropy(task.base.model(task.base.normalise(pixels)), labels)
    torch.testing.assert_close(task(batch)[0], expected, rtol=1e-5, atol=1e-6)
    changing = prepare(job(folder, photos, {"name": "linear"}, {"augment": "crop"}))
    assert changing.batch(0, torch.Generator()).inputs.dtype == torch.uint8


def test_batches_are_pure_and_hold_no_picture_twice(folder: Path, photos: Path):
    task = prepare(job(folder, photos, {"name": "lora"}, {"augment": "crop"}, batch_size=18))
    one, two = (task.batch(3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.inputs, two.inputs) and torch.equal(one.labels, two.labels)
    plain = prepare(job(folder, photos, {"name": "lora"}, batch_size=18)).batch(3, torch.Generator().manual_seed(7))
    assert len({picture.numpy().tobytes() for picture in plain.inputs}) == 18
    assert not torch.equal(plain.inputs, one.inputs)


def test_augmentation_is_drawn_from_the_generator_alone():
    pixels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)
    before = torch.get_rng_state()
    flipped = augmented(pixels, "flip", torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, pixels, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(flipped, pixels, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True)) and any(mirrored) and any(same)
    cropped = augmented(pixels, "crop", torch.Generator().manual_seed(1))
    assert cropped.shape == pixels.shape and cropped.dtype == torch.uint8
    assert augmented(pixels, "none", torch.Generator()) is pixels


def test_only_zoom_changes_pictures_without_a_mirror():
    half = torch.zeros(24, 3, 16, 16, dtype=torch.uint8)
    half[..., 8:] = 255
    drawn = {kind: augmented(half, kind, torch.Generator().manual_seed(1)) for kind in ("zoom", "crop", "flip")}
    upright = {
        kind: [bool(p[..., 0].float().mean() < p[..., -1].float().mean()) for p in some] for kind, some in drawn.items()
    }
    assert all(upright["zoom"]) and not torch.equal(drawn["zoom"], half)
    assert {True, False} == set(upright["crop"]) == set(upright["flip"])


def test_samples_leave_no_trace(folder: Path, photos: Path, tmp_path: Path):
    task = prepare(job(folder, photos, {"name": "vpt"}))
    state, modes = torch.get_rng_state(), [module.training for module in task.modules()]
    (file,) = task.sample(5, tmp_path)
    assert file.name == "step-000005.png" and file.stat().st_size > 500
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in task.modules()] == modes


@pytest.mark.parametrize("method", [AdaptFormer(3), AdapterPlus(3), LinearProbe(), VisionLoRA(rank=2)])
def test_rows_of_a_batch_have_their_own_adapter_and_classifier(base: VisionBase, method):
    handle = method.on(base.model, ("a", "b"), slots=3)
    with torch.no_grad():
        for parameter in handle.bank.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    handle.bank.eval()
    x, route = torch.randn(4, 3, 32, 32), [2, 0, 1, 2]
    handle.route(torch.tensor(route))
    mixed = base.model(x)
    for row, slot in enumerate(route):
        handle.route(torch.tensor([slot]))
        torch.testing.assert_close(mixed[row : row + 1], base.model(x[row : row + 1]), rtol=1e-5, atol=1e-5)


def test_a_second_classifier_is_refused(base: VisionBase):
    LinearProbe().on(base.model, ("a", "b"))
    with pytest.raises(InputError, match="another adapter's classifier"):
        VisionLoRA(rank=2).on(base.model, ("c", "d"))
    assert not uncalled(base.model, {"blocks.0.attn.qkv"})


def test_an_adapter_for_another_size_of_pictures_is_refused(folder: Path, photos: Path, base: VisionBase):
    adapter = prepare(job(folder, photos, {"name": "linear"})).adapter({})
    adapter.card.details["side"] = 64
    with pytest.raises(BaseMismatchError, match="img_size=64"), adapter.attached(base):
        pass


def test_an_adapter_works_on_the_plain_timm_model(folder: Path, photos: Path):
    import timm

    task = prepare(job(folder, photos, {"name": "adaptformer"}))
    adapter, expected = task.adapter({}), task._logits(task.data.val.pixels)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with adapter.attached(model):
        found = model(task.base.normalise(task.data.val.pixels))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "ssf", "bitfit"])
def test_timm_makes_of_a_written_model_what_it_is_here(folder: Path, photos: Path, name: str):
    adapter = prepare(job(folder, photos, {"name": name})).adapter({})
    torch.manual_seed(0)
    moved = Adapter({k: t + torch.randn_like(t) * 0.3 for k, t in adapter.tensors.items()}, adapter.card)
    base = load_base(str(folder), "cpu")
    told = compare(base, moved)
    assert isinstance(told, dict) and told["same"] and told["error"] < 1e-3
    assert (told["change"] > 0.01) == (name != "linear")  # which has no strength
    assert base_hash(base.modules) == base.hash


def test_a_method_without_a_file_of_another_library_is_not_compared(folder: Path, photos: Path):
    adapter = prepare(job(folder, photos, {"name": "adaptformer"})).adapter({})
    told = compare(load_base(str(folder), "cpu"), adapter)
    assert told == "adaptformer is no change of weights, and is written in no other library's format"


def test_in_16_bits_on_a_cpu_short_sequences_take_plain_attention(folder: Path, photos: Path):
    wide, narrow = (
        prepare(job(folder, photos, {"name": "adaptformer", "dropout": 0.0}, mixed_precision=kind))
        for kind in ("no", "bf16")
    )
    assert wide.base.model.blocks[0].attn.fused_attn and not narrow.base.model.blocks[0].attn.fused_attn
    batch = wide.batch(0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(narrow(batch)[0], wide(batch)[0], rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = narrow(batch)[0]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wide(batch)[0].detach()), rel=0.02)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in narrow.parameters())


def test_bad_data_stops_before_the_first_step(folder: Path, photos: Path):
    with pytest.raises(DataError, match="no such file or folder"):
        prepare(job(folder, photos / "none", {"name": "linear"}))
    assert load_base(str(folder), "cpu").side == 32
