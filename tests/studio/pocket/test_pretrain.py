"""The trainings of the embedded models: gradients reach what is trained, and nothing else moves."""

import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.studio.job import Job, TrainConfig
from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.commands import ON_GPU, RECIPES, recipe
from graft.studio.pocket.pretrain import unet
from graft.studio.pocket.pretrain.autoencoder import Autoencoder
from graft.studio.pocket.pretrain.clip import Clip
from graft.studio.pocket.pretrain.draw import pictures, worn
from graft.studio.pocket.pretrain.unet import SCHEDULER, UnetTask, plain_scenes, varied_scenes
from graft.studio.pocket.pretrain.vit import Vit
from graft.studio.pocket.scenes import Scene
from graft.studio.runs import Run
from graft.studio.training import resume, train


def gradients(task: Any) -> dict[str, bool]:
    """Name -> whether a step moves it, of every parameter that is to be trained."""
    loss, figures = task(task.batch(0, torch.Generator().manual_seed(0)))
    loss.backward()
    assert loss.isfinite() and all(value.isfinite() for value in figures.values())
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    return {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in trained.items()}


def test_autoencoder_learns_everywhere():
    moved = gradients(Autoencoder().task(TrainConfig(batch_size=2)))
    assert [name for name, alive in moved.items() if not alive] == []
    assert any("encoder" in name for name in moved)


def test_resume_gives_the_same_bits_with_weights_in_channels_last(tmp_path: Path):
    """Checkpoints hold contiguous moments; AdamW's fused step would give them to the wrong weights."""
    changes = ["train.batch_size=2", "train.checkpoint_every=2", "train.threads=1", "train.device=cpu"]
    whole = train(Job.load(recipe("autoencoder", "cpu", 4), changes), tmp_path / "whole")
    cut = Run(shutil.copytree(whole.folder, tmp_path / "cut"))
    shutil.rmtree(cut.folder / "result")
    shutil.rmtree(cut.folder / "checkpoints" / "00000004")
    cut.write_state(status="stopped", step=2)
    again = resume(cut)
    expected, found = whole.adapter().tensors, again.adapter().tensors
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_decoder_only_leaves_the_latents_as_they_are():
    task = Autoencoder(decoder_only=True).task(TrainConfig(batch_size=2))
    moved = gradients(task)
    assert moved and all(name.startswith(("vae.decoder", "vae.post_quant_conv")) for name in moved)
    committed = models.autoencoder().state_dict()
    assert all(torch.equal(value, committed[name]) for name, value in task.vae.state_dict().items())


@pytest.mark.parametrize("step", [0, 1], ids=["captions", "names"])
def test_both_towers_of_clip_learn(step: int):
    task = Clip(bank=6).task(TrainConfig(batch_size=4))
    batch = task.batch(step, torch.Generator().manual_seed(0))
    assert (batch.target is not None) == bool(step)
    task(batch)[0].backward()
    norms = {name: p.grad.abs().sum() for name, p in task.named_parameters() if p.grad is not None}
    for tower in ("vision_model", "text_model", "visual_projection", "text_projection"):
        assert sum(value for name, value in norms.items() if tower in name) > 0, f"{tower} is dead"


def test_frozen_text_stays():
    moved = gradients(Clip(bank=6, freeze_text=True).task(TrainConfig(batch_size=4)))
    assert not any("text" in name for name in moved)
    assert any("vision_model" in name for name in moved)


def test_vit_learns_everywhere_and_its_targets_are_known_sprites():
    task = Vit().task(TrainConfig(batch_size=3))
    moved = gradients(task)
    assert [name for name, alive in moved.items() if not alive] == []
    batch = task.batch(0, torch.Generator().manual_seed(0))
    assert len(batch.target) == len(set(batch.target.tolist())) == 3
    assert len(task.known) == task.vit.num_classes


@pytest.fixture(scope="module")
def unet_task(tmp_path_factory) -> UnetTask:
    parts = models.autoencoder(), models.text_encoder(), models.load_tokenizer()
    folder: Path = tmp_path_factory.mktemp("latents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "plain_scenes", lambda colours: plain_scenes(colours)[:16])
        task = UnetTask(*parts, folder, scenes=8, batch_size=4, plain_colours=("blue",))
    assert len(list(folder.iterdir())) == 1
    return task


def test_unet_loss_is_the_velocity_formula(unet_task: UnetTask):
    [batch] = unet_task.batch(0, torch.Generator().manual_seed(1))
    loss, _ = unet_task([batch])
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(**{k: v for k, v in SCHEDULER.items() if k in ("beta_schedule", "prediction_type")})
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        text = unet_task.frozen[0](batch.input_ids)[0]
        expected = (unet_task.unet(noisy, batch.timesteps, text).sample - velocity).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_noisiest_timestep_is_the_last(unet_task: UnetTask, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))  # what rounding can make of 0.99999999
    [batch] = unet_task.batch(0, torch.Generator().manual_seed(1))
    assert batch.timesteps.max() == 999


def test_unet_hears_the_caption_and_averages(unet_task: UnetTask):
    [batch] = unet_task.batch(0, torch.Generator().manual_seed(1))
    unet_task.start_from(models.unet())
    loss = unet_task([batch])[0].item()
    shuffled = batch._replace(input_ids=batch.input_ids.roll(1, 0))
    assert unet_task([shuffled])[0].item() != loss
    before = unet_task.ema[0].clone()
    with torch.no_grad():
        next(unet_task.unet.parameters()).add_(1.0)
    unet_task.update_average()
    torch.testing.assert_close(unet_task.ema[0] - before, torch.full_like(before, 1e-3), rtol=1e-2, atol=1e-5)


def test_worn_pictures_are_half_of_them_and_stay_in_range():
    clean = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = worn(clean, torch.Generator().manual_seed(0))
    changed = (other != clean).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7
    assert other.abs().max() <= 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("network", RECIPES)
def test_recipes_are_jobs(network: str, device: str):
    usual, changed = Job.load(recipe(network, device)), Job.load(recipe(network, device, 7))
    assert usual.train.steps == {"cpu": RECIPES[network], "cuda": ON_GPU[network]["train"]}[device]["steps"]
    assert changed.train.steps == 7
    assert (usual.train.workers > 0) == (device == "cuda")


@pytest.mark.parametrize("network", ["autoencoder", "clip", "vit"])
def test_pretraining_sees_no_new_sprite(network: str, monkeypatch: pytest.MonkeyPatch):
    module = import_module(f"graft.studio.pocket.pretrain.{network}")
    seen: list[Scene] = []

    def record(scenes: Sequence[Scene]) -> torch.Tensor:
        seen.extend(scenes)
        return pictures(scenes)

    monkeypatch.setattr(module, "pictures", record)
    task = getattr(module, network.capitalize())().task(TrainConfig(batch_size=32))
    for step in range(4):
        task.batch(step, torch.Generator().manual_seed(step))
    assert {thing.sprite for scene in seen for thing in scene.things} <= set(Atlas.load().known)
    assert len(seen) == 128


def test_unet_is_trained_on_no_new_sprite():
    sprites = {thing.sprite for scene in (*plain_scenes(), *varied_scenes(2000)) for thing in scene.things}
    assert sprites == set(Atlas.load().known)
