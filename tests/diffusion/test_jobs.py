from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from graft.diffusion.base import DiffusionBase
from graft.diffusion.data import DataConfig, load_dataset
from graft.diffusion.jobs import prepare, prepare_together
from graft.diffusion.lora import DiffusionLoRA
from graft.diffusion.method import latents
from graft.diffusion.previews import PreviewConfig, draw
from graft.studio.adapter import Adapter
from graft.studio.caches import Cache
from graft.studio.errors import BaseMismatchError, DataError, InputError
from graft.studio.job import Job, SampleConfig

TI = {"name": "textual_inversion", "token": "<cat>", "vectors": 2}
LORA = {"name": "lora", "rank": 2, "trigger": "sks"}


def job(folder: Path, photos: Path, method: dict, **train) -> Job:
    return Job.load(
        {
            "base": str(folder),
            "domain": "diffusion",
            "method": method,
            "data": {"path": str(photos)},
            "train": {"steps": 3, "batch_size": 2, **train},
        }
    )


def steps(task, count: int = 3, start: int = 0) -> list[float]:
    """A plain loop: AdamW on the task's groups, one generator per step and job, each job's gradients clipped."""
    optimizer = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    losses = []
    for step in range(start, count):
        loss, _ = task(task.batch(step, *(torch.Generator().manual_seed(100 + step) for _ in task.subjects)))
        optimizer.zero_grad()
        loss.backward()
        for job in range(len(task.subjects)):
            gradients = [p.grad if own == job else p.grad[job] for p, own in task.owned() if own in (None, job)]
            norm = torch.nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, (0.1 / norm).clamp(max=1.0))
        optimizer.step()
        losses.append(loss.item())
    return losses


def states(base: DiffusionBase) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in base.modules.items() for k, v in m.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


DORA = {**LORA, "name": "dora"}
PIVOTAL = {"name": "pivotal", "rank": 2, "trigger": "<cat>"}


@pytest.fixture(
    params=[
        TI,
        pytest.param(DORA, marks=pytest.mark.slow),
        {**LORA, "targets": "all", "text_encoder": True},
        pytest.param(PIVOTAL, marks=pytest.mark.slow),
    ],
    ids=["ti", "dora", "lora-all", "pivotal"],
)
def method(request: pytest.FixtureRequest) -> dict:
    return request.param


def test_a_task_trains_its_bank_and_nothing_else(folder: Path, photos: Path, method: dict):
    task = prepare(job(folder, photos, method))
    before, start = states(task.base), {k: v.clone() for k, v in task.state_dict().items()}
    losses = steps(task)
    assert all(np.isfinite(losses))
    assert same(before, states(task.base))
    assert all(not torch.equal(start[name], value) for name, value in task.state_dict().items())
    assert [id(p) for g in task.param_groups() for p in g["params"]] == [id(p) for p in task.parameters()]
    assert set(dict(task.named_parameters())) == set(task.state_dict())


def test_the_loss_is_the_plain_recipe(folder: Path, photos: Path):
    """Encode, draw, noise, predict: written out with the pipeline's own parts."""
    task = prepare(job(folder, photos, {**TI, "snr_gamma": 5.0}))
    batch, pipe = task.batch(0, torch.Generator().manual_seed(1)), task.base.pipe
    latents = batch.mean + batch.std * batch.redraw
    noisy = pipe.scheduler.add_noise(latents, batch.noise, batch.levels)
    text = pipe.encode_prompt(
        [task.subjects[0].method.prompts(None)[i] for i in batch.prompts[batch.prompt_of]], "cpu", 1, False
    )[0]
    prediction = pipe.unet(noisy, batch.levels, text).sample
    abar = pipe.scheduler.alphas_cumprod[batch.levels]
    snr = abar / (1 - abar)
    weights = snr.clamp(max=5) / snr
    expected = ((prediction - batch.noise).square().mean((1, 2, 3)) * weights).mean()
    torch.testing.assert_close(task(batch)[0], expected, rtol=1e-5, atol=1e-6)


def test_batches_are_pure_and_visit_every_picture(folder: Path, photos: Path):
    task = prepare(job(folder, photos, TI, batch_size=5))
    one, two = (task.batch(3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[:7], two[:7], strict=True))
    assert len({row.numpy().tobytes() for row in one.mean}) == 5
    assert not torch.equal(one.noise, task.batch(3, torch.Generator().manual_seed(8)).noise)


def test_a_second_run_takes_everything_from_the_cache(folder: Path, photos: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="graft.diffusion.jobs")
    first, second = (prepare(job(folder, photos, LORA)) for _ in range(2))
    assert "latents 0 hits, 5 misses" in caplog.messages[0] and "text 0 hits, 8 misses" in caplog.messages[0]
    assert "latents 5 hits, 0 misses" in caplog.messages[1] and "text 8 hits, 0 misses" in caplog.messages[1]
    assert steps(first) == steps(second)


def test_resume_is_exact(folder: Path, photos: Path, method: dict):
    whole, cut = (prepare(job(folder, photos, method)) for _ in range(2))
    optimizers = [torch.optim.AdamW(t.param_groups(), lr=1e-2) for t in (whole, cut)]

    def step(task, optimizer, i):
        optimizer.zero_grad()
        task(task.batch(i, torch.Generator().manual_seed(i)))[0].backward()
        optimizer.step()

    for i in range(4):
        step(whole, optimizers[0], i)
    for i in range(2):
        step(cut, optimizers[1], i)
    again = prepare(job(folder, photos, method))
    again.load_state_dict(cut.state_dict())
    resumed = torch.optim.AdamW(again.param_groups(), lr=1e-2)
    resumed.load_state_dict(optimizers[1].state_dict())
    for i in range(2, 4):
        step(again, resumed, i)
    assert same(whole.state_dict(), again.state_dict())


def test_samples_leave_no_trace(folder: Path, photos: Path, tmp_path: Path, method: dict):
    quiet, sampled = (prepare(job(folder, photos, method)) for _ in range(2))
    first = steps(quiet, 2)
    steps(sampled, 1)
    optimizer_free = torch.random.get_rng_state()
    modes = [m.training for m in sampled.modules()]
    [file] = sampled.sample(1, tmp_path / "samples")
    assert file.name == "step-000001.png" and file.stat().st_size > 100
    assert torch.equal(torch.random.get_rng_state(), optimizer_free)
    assert [m.training for m in sampled.modules()] == modes
    assert steps(prepare(job(folder, photos, method)), 2) == first


def test_lora_starts_as_the_base(folder: Path, photos: Path, base: DiffusionBase):
    prompts, seeds, config = ["a photo of a red cat"], [3], PreviewConfig(steps=2)
    plain = draw(base, prompts, seeds, config)[0][0]
    task = prepare(job(folder, photos, {**LORA, "targets": "all", "text_encoder": True}))
    assert plain.tobytes() == draw(task.base, prompts, seeds, config)[0][0].tobytes()


def test_adapter_round_trip_and_detach(folder: Path, photos: Path, base: DiffusionBase, tmp_path: Path, method: dict):
    task = prepare(job(folder, photos, method))
    steps(task)
    prompts, seeds, config = ["a photo of <cat> sks"], [3, 4], PreviewConfig(steps=2)
    trained = draw(task.base, prompts, seeds, config)[0]
    adapter = task.adapter({"loss": 1.0})
    adapter.save(tmp_path / "result")
    before = states(base)
    plain = draw(base, prompts, seeds, config)[0]
    with Adapter.load(tmp_path / "result").attached(base):
        again = draw(base, prompts, seeds, config)[0]
    assert [p.tobytes() for p in trained] == [p.tobytes() for p in again]
    assert same(before, states(base))
    assert [p.tobytes() for p in plain] == [p.tobytes() for p in draw(base, prompts, seeds, config)[0]]
    assert adapter.card.base_hash == base.hash and adapter.card.trigger in ("<cat>", "sks")
    with torch.no_grad():
        base.pipe.vae.decoder.conv_out.bias[0] += 1
    with pytest.raises(BaseMismatchError), adapter.attached(DiffusionBase("other", base.pipe)):
        pass


def test_stock_diffusers_draws_the_same_from_the_lora_file(folder: Path, photos: Path, tmp_path: Path):
    task = prepare(job(folder, photos, {**LORA, "alpha": 5.0, "targets": "all", "text_encoder": True}))
    steps(task)
    task.adapter({}).export(tmp_path, format="diffusers")
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    plain = np.asarray(picture(stock, "a photo of sks"))
    stock.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    theirs, ours = picture(stock, "a photo of sks"), picture(task.base.pipe, "a photo of sks")
    assert np.abs(plain - ours).max() > 1e-3
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_stock_diffusers_draws_the_same_from_the_word_and_its_factors(folder: Path, photos: Path, tmp_path: Path):
    task = prepare(job(folder, photos, {**PIVOTAL, "text_encoder": True}))
    steps(task)
    files = task.adapter({}).export(tmp_path, format="diffusers")
    assert [file.name for file in files] == ["pytorch_lora_weights.safetensors", "<cat>.safetensors"]
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    stock.load_textual_inversion(files[1], token="<cat>")
    plain = picture(stock, "a photo of <cat>")
    stock.load_lora_weights(tmp_path, weight_name=files[0].name)
    ours = picture(task.base.pipe, "a photo of <cat>")
    assert np.abs(plain - ours).max() > 1e-3
    np.testing.assert_allclose(picture(stock, "a photo of <cat>"), ours, atol=1e-5)


def picture(pipe, prompt: str) -> np.ndarray:
    generator = torch.Generator().manual_seed(11)
    return pipe(prompt, num_inference_steps=3, height=8, width=8, generator=generator, output_type="np").images[0]


def test_prior_preservation_adds_the_bases_own_pictures(folder: Path, photos: Path, base: DiffusionBase):
    prior = {**LORA, "class_prompt": "a photo of a toy", "class_pictures": 3, "prior_weight": 0.5}
    task = prepare(job(folder, photos, prior))
    ours, theirs = task.sources
    first = base.pipe(
        "a photo of a toy", height=8, width=8, num_inference_steps=25, guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(theirs.mean[0], first)
    assert theirs.mean.shape[0] == 3 and not theirs.std.any()
    batch = task.batch(0, torch.Generator().manual_seed(0))
    assert batch.mean.shape[0] == 4
    assert task.shares.tolist() == [0.5, 0.5, 0.25, 0.25]
    wide = prepare(job(folder, photos, {**prior, "class_pictures": 4}))
    assert torch.equal(wide.sources[1].mean[:3], theirs.mean)


def test_pictures_of_the_class_may_be_a_folders(folder: Path, photos: Path, tmp_path: Path):
    """With their own captions, else the class prompt; they count in the digest, and none is drawn."""
    toys = tmp_path / "toys"
    toys.mkdir()
    for i in range(3):
        (toys / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    (toys / "1.txt").write_text("a blue toy")
    prior = {**LORA, "class_path": str(toys), "class_prompt": "a toy", "prior_weight": 0.5}
    task = prepare(job(folder, photos, prior))
    _, theirs = task.sources
    assert theirs.mean.shape[0] == 3 and theirs.std.any() and task.shares.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert len({prompts[0] for prompts in theirs.prompts}) == 2
    assert task.digests[0] != prepare(job(folder, photos, LORA)).digests[0]
    with pytest.raises(DataError, match="0.png has no caption"):
        prepare(job(folder, photos, {**LORA, "class_path": str(toys)}))


@pytest.mark.parametrize(
    "method",
    [TI, LORA, {**PIVOTAL, "text_encoder": True}],
    ids=["ti", "lora", "pivotal"],
)
@pytest.mark.slow
def test_jobs_trained_together_equal_each_alone(folder: Path, photos: Path, tmp_path: Path, method: dict):
    other = tmp_path / "others"
    other.mkdir()
    for i in range(2):
        (other / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    jobs = [job(folder, photos, method), job(folder, other, method)]
    alone = []
    for each in jobs:
        task = prepare(each)
        steps(task)
        alone.append(task.adapter({}).tensors)
    together = prepare_together(jobs)
    steps(together)
    for slot, expected in enumerate(alone):
        found = together.adapter({}, slot).tensors
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-4)
    assert not all(torch.equal(alone[0][name], alone[1][name]) for name in alone[0])
    files = together.sample(3, tmp_path / "samples")
    assert [f.name for f in files] == ["step-000003-0.png", "step-000003-1.png"]
    assert files[0].read_bytes() != files[1].read_bytes()
    steps(together, 4, start=3)  # routes are those of training again


@pytest.mark.slow
def test_bf16_trains_close_to_fp32_and_samples(folder: Path, photos: Path, tmp_path: Path, method: dict):
    wide, narrow = (prepare(job(folder, photos, method, mixed_precision=p)) for p in ("no", "bf16"))
    assert narrow.base.dtype == torch.bfloat16 and narrow.base.hash == wide.base.hash
    batch = wide.batch(0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = narrow(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wide(batch)[0].item(), rel=0.02)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in narrow.parameters())
    assert narrow.sample(0, tmp_path)[0].exists()
    assert {t.dtype for t in narrow.adapter({}).tensors.values()} == {torch.float32}


def test_jobs_that_differ_cannot_share_a_batch(folder: Path, photos: Path):
    with pytest.raises(InputError, match="its method differs"):
        prepare_together([job(folder, photos, LORA), job(folder, photos, {**LORA, "rank": 4})])
    sampled = replace(job(folder, photos, LORA), sample=SampleConfig(every=5))
    with pytest.raises(InputError, match="its sample.every differs"):
        prepare_together([job(folder, photos, LORA), sampled])
    with pytest.raises(InputError, match="other masks"):
        prepare_together([job(folder, photos, {**LORA, "dropout": 0.1})] * 2)


def test_bad_data_stops_before_the_first_step(folder: Path, photos: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        prepare(job(folder, tmp_path / "none", TI))
    (photos / "0.txt").write_text("a photo of something")
    with pytest.raises(InputError, match="does not contain <cat>"):
        prepare(job(folder, photos, TI))


def test_a_resolution_that_cannot_be_drawn_stops_before_the_first_step(folder: Path, photos: Path):
    bad = job(folder, photos, TI)
    bad.data["resolution"] = 20
    with pytest.raises(InputError, match="resolution 20"):
        prepare(bad)


def test_a_caption_that_is_cut_off_before_the_word_is_refused(folder: Path, photos: Path):
    (photos / "3.txt").write_text("a photo of the red toy on the blue cat and " * 2 + "<cat>")
    with pytest.raises(InputError, match="cut off after 24 tokens"):
        prepare(job(folder, photos, TI))


def test_another_scale_of_latents_is_another_entry(folder: Path, photos: Path, base: DiffusionBase, tmp_path: Path):
    cache = Cache(tmp_path / "latents")
    dataset = load_dataset(DataConfig(path=str(photos)), 8, cache)
    one = latents(base, dataset, cache)["mean"]
    base.pipe.vae.register_to_config(scaling_factor=2 * base.pipe.vae.config.scaling_factor)
    torch.testing.assert_close(latents(base, dataset, cache)["mean"], 2 * one)


def test_a_plain_model_is_no_pipeline(base: DiffusionBase):
    with pytest.raises(InputError, match="not the networks of a pipeline"):
        DiffusionLoRA().attach(base.pipe.unet)
