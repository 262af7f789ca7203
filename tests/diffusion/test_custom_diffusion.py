"""Custom Diffusion beside diffusers' own attention processor, trained and loaded by hand as its example script does."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

import graft
from graft.diffusion.base import DiffusionBase
from graft.diffusion.custom_diffusion import CustomDiffusion, DenseSlot, attach_custom, text_layers
from graft.diffusion.jobs import prepare, prepare_together
from graft.diffusion.previews import PreviewConfig, draw
from graft.diffusion.task import DiffusionTask
from graft.studio.adapter import Adapter
from graft.studio.errors import DataError, FormatError, InputError
from graft.studio.job import Job
from graft.studio.training import resume

CD = {"name": "custom_diffusion", "token": "<new1>", "class_word": "cat", "initializer": "red"}
PRIOR = {**CD, "class_prompt": "a photo of a cat", "class_pictures": 1, "prior_weight": 0.5}


def job(folder: Path, photos: Path, method: dict, **train) -> Job:
    settings = {"steps": 4, "batch_size": 2, "threads": 1, "device": "cpu", "mixed_precision": "no", **train}
    sample = {"steps": 1, "seeds": [0]}
    data = {"path": str(photos)}
    return Job.load({"base": str(folder), "method": method, "data": data, "train": settings, "sample": sample})


def steps(task, count: int = 3, start: int = 0) -> None:
    """A plain loop: AdamW on the task's groups, one generator per step."""
    optimizer = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    for step in range(start, count):
        loss, _ = task(task.batch(step, *(torch.Generator().manual_seed(100 + step) for _ in task.subjects)))
        optimizer.zero_grad()
        loss.backward()
        for job in range(len(task.subjects)):
            gradients = [p.grad if own == job else p.grad[job] for p, own in task.owned() if own in (None, job)]
            torch._foreach_mul_(gradients, (0.1 / torch.nn.utils.get_total_norm(gradients)).clamp(max=1.0))
        optimizer.step()


def states(base: DiffusionBase) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v.clone() for n, m in base.modules.items() for k, v in m.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CD_JOB = {"base": "pocket-sd", "data": {"path": "photos"}}


def processors(unet: UNet2DConditionModel, q_out: bool = False) -> dict[str, CustomDiffusionAttnProcessor]:
    """Those of the example script: keys and values of the text start as the base's and are trained, and so are queries
    and outputs with `q_out`."""
    made = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        text = name.endswith("attn2.processor")
        shape = attention.to_k.out_features, attention.to_k.in_features
        made[name] = CustomDiffusionAttnProcessor(text, text and q_out, *shape)
        if text and q_out:
            made[name].to_q_custom_diffusion.load_state_dict(attention.to_q.state_dict())
            made[name].to_out_custom_diffusion[0].load_state_dict(attention.to_out[0].state_dict())
        if text:
            made[name].to_k_custom_diffusion.load_state_dict(attention.to_k.state_dict())
            made[name].to_v_custom_diffusion.load_state_dict(attention.to_v.state_dict())
    return made


def stock(folder: Path, q_out: bool = False, token: str = "<new1>", like: str = "red") -> StableDiffusionPipeline:
    """A pipeline as the example script has it before the first step."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer.add_tokens(token)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight.data
    table[-1] = table[pipe.tokenizer(like, add_special_tokens=False).input_ids[0]]
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    pipe.unet.set_attn_processor(processors(pipe.unet, q_out))
    pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    return pipe


@pytest.mark.parametrize("freeze_model", ["crossattn_kv", "crossattn"])
def test_losses_are_those_of_diffusers_processors_step_by_step(folder: Path, photos: Path, freeze_model: str):
    """The same weights, noise and timesteps: target plus weighted prior, in the same training of four steps."""
    whole = freeze_model == "crossattn"
    task, pipe = prepare(job(folder, photos, {**PRIOR, "freeze_model": freeze_model})), stock(folder, whole)
    texts = [*task.subjects[0].method.prompts(None), "a photo of a cat"]
    table = pipe.text_encoder.get_input_embeddings().weight
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    ours = torch.optim.AdamW(task.param_groups(), lr=1e-2)
    theirs = torch.optim.AdamW([table, *trained], lr=1e-2, weight_decay=0.0)
    first = table.detach().clone()
    for step in range(4):
        batch = task.batch(step, torch.Generator().manual_seed(step))
        noisy = pipe.scheduler.add_noise(batch.mean + batch.std * batch.redraw, batch.noise, batch.levels)
        told = [texts[i] for i in batch.prompts[batch.prompt_of]]
        ids = pipe.tokenizer(told, padding="max_length", truncation=True, return_tensors="pt").input_ids
        errors = (pipe.unet(noisy, batch.levels, pipe.text_encoder(ids)[0]).sample - batch.noise).square()
        target, prior = errors.chunk(2)
        expected, (loss, _) = target.mean() + 0.5 * prior.mean(), task(batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        loss.backward()
        expected.backward()
        table.grad[:-1] = 0  # as the script keeps the other words
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(table[:-1], first[:-1])
    tensors = task.adapter({}).tensors
    torch.testing.assert_close(tensors["embedding.<new1>"], table[-1:].detach(), rtol=1e-4, atol=1e-4)
    for name, processor in pipe.unet.attn_processors.items():
        if processor.train_kv:
            site = name.removesuffix(".processor")
            attention = pipe.unet.get_submodule(site)
            pairs = {"to_k.change": (processor.to_k_custom_diffusion.weight, attention.to_k.weight)}
            if whole:
                pairs["to_q.change"] = processor.to_q_custom_diffusion.weight, attention.to_q.weight
                pairs["to_out.0.bias.d"] = processor.to_out_custom_diffusion[0].bias, attention.to_out[0].bias
            for name, (now, before) in pairs.items():
                change = (now - before).detach()
                torch.testing.assert_close(tensors[f"unet.{site}.{name}"], change, rtol=1e-2, atol=1e-3)


def test_what_is_trained_of_stable_diffusion_is_what_the_script_trains():
    """32 matrices, 19.17 million numbers, or all of the cross-attention, by the names and shapes of its processors."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        made = processors_of(unet)
    plan = text_layers(unet)
    theirs = {
        f"unet.{name.replace('.processor', '')}.{key.removesuffix('_custom_diffusion.weight')}": tuple(value.shape)
        for name, processor in made.items()
        for key, value in processor.named_parameters()
    }
    assert {site.name: site.shape for site in plan} == theirs
    assert (len(plan), plan.parameters) == (32, 19_169_280)
    widths = ((5, 320), (5, 640), (6, 1280))
    assert plan.parameters == sum(2 * n * c * 768 for n, c in widths)
    whole = text_layers(unet, "crossattn")
    assert whole.parameters == 19_169_280 + sum(n * (2 * c * c + c) for n, c in widths) and len(whole) == 16 * 5


def processors_of(unet: UNet2DConditionModel) -> dict[str, CustomDiffusionAttnProcessor]:
    """By the script's own rule for widths."""
    widths, made = unet.config.block_out_channels, {}
    for name in unet.attn_processors:
        block, _, rest = name.partition(".")
        of_block = {"mid_block": widths[-1:], "down_blocks": widths, "up_blocks": widths[::-1]}[block]
        width = of_block[int(rest[0]) if block != "mid_block" else 0]
        made[name] = CustomDiffusionAttnProcessor(name.endswith("attn2.processor"), False, width, 768)
    return made


def test_nothing_changes_at_first_and_detach_restores_the_bits(base: DiffusionBase):
    prompts, config = ["a photo of a red cat"], PreviewConfig(steps=2)
    before, types = states(base), [type(m) for m in base.pipe.unet.modules()]
    plain = draw(base, prompts, [0, 1], config)[0]
    handle = CustomDiffusion(token="<new1>", initializer="red").attach(base)
    assert [p.tobytes() for p in plain] == [p.tobytes() for p in draw(base, prompts, [0, 1], config)[0]]
    ids = base.tokenize(["a photo of a <new1> cat", "a photo of a red cat"])
    assert torch.equal(*base.encode(ids))
    assert same(before, states(base)) and not any(p.requires_grad for p in base.pipe.unet.parameters())
    torch.nn.init.normal_(handle.weights.slots_of(DenseSlot)[0].change)
    assert [p.tobytes() for p in plain] != [p.tobytes() for p in draw(base, prompts, [0, 1], config)[0]]
    handle.merge()
    handle.detach()
    assert same(before, states(base)) and types == [type(m) for m in base.pipe.unet.modules()]
    assert base.pipe.text_encoder.config.vocab_size == len(base.pipe.text_encoder.get_input_embeddings().weight)


def test_the_first_token_teaches_nothing(base: DiffusionBase):
    handle = CustomDiffusion().attach(base)
    slot, name = handle.weights.slots_of(DenseSlot)[0], handle.plan.sites[0].name.removeprefix("unet.")
    text = torch.randn(2, 6, 16)
    out = base.pipe.unet.get_submodule(name)(text)
    none, some = (torch.autograd.grad(part.sum(), slot.change, retain_graph=True)[0] for part in (out[:, 0], out))
    assert not none.any()
    torch.testing.assert_close(some[0], text[:, 1:].sum((0, 1)).expand(slot.change.shape[1:]))


def test_rows_of_a_batch_take_their_own_changes(base: DiffusionBase):
    methods = [CustomDiffusion(), CustomDiffusion(vectors=2)]
    handle = attach_custom(base, methods, [0, 1])
    site, [slot, *_] = handle.plan.sites[0], handle.weights.slots_of(DenseSlot)
    torch.nn.init.normal_(slot.change)
    x, layer = torch.randn(3, 6, 16), base.pipe.unet.get_submodule(site.name.removeprefix("unet."))
    handle.route(torch.tensor([1, -1, 0]))
    weight = layer._parameters["weight"]
    expected = [x[0] @ (weight + slot.change[1]).T, x[1] @ weight.T, x[2] @ (weight + slot.change[0]).T]
    torch.testing.assert_close(layer(x), torch.stack(expected))
    assert handle.spoken(1, "a <new1>") == "a <graft-1>"


def test_jobs_in_one_batch_equal_each_alone(folder: Path, photos: Path, tmp_path: Path):
    other = tmp_path / "others"
    other.mkdir()
    (other / "0.png").write_bytes((photos / "1.png").read_bytes())
    jobs = [job(folder, photos, {**CD, "vectors": 2}), job(folder, other, {**CD, "vectors": 1, "token": "<b>"})]
    alone = []
    for each in jobs:
        task = prepare(each)
        steps(task, 2)
        alone.append(task.adapter({}).tensors)
    together = prepare_together(jobs)
    steps(together, 2)
    for slot, expected in enumerate(alone):
        found = together.adapter({}, slot).tensors
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-4)
    files = together.sample(2, tmp_path / "samples")
    assert len(files) == 2 and files[0].read_bytes() != files[1].read_bytes()
    steps(together, 3, start=2)


@pytest.mark.slow
def test_bf16_trains_close_to_fp32(folder: Path, photos: Path):
    wide, narrow = (prepare(job(folder, photos, CD, mixed_precision=p)) for p in ("no", "bf16"))
    batch = wide.batch(0, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = narrow(batch)
    loss.backward()
    assert loss.item() == pytest.approx(wide(batch)[0].item(), rel=0.02)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in narrow.parameters())


@pytest.mark.slow
def test_a_training_that_was_cut_ends_with_the_same_bits(
    folder: Path, photos: Path, base: DiffusionBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    each = job(folder, photos, PRIOR, checkpoint_every=2)
    whole = graft.train(each, run_dir=tmp_path / "whole").adapter()
    monkeypatch.setattr(DiffusionTask, "forward", _failing_at(3))
    with pytest.raises(KeyboardInterrupt):
        graft.train(each, run_dir=tmp_path / "cut")
    monkeypatch.undo()
    cut = resume(tmp_path / "cut")
    assert cut.status == "finished" and same(whole.tensors, cut.adapter().tensors)
    with cut.adapter().attached(base) as handle:
        assert same(handle.tensors(), whole.tensors)
    assert whole.card.trigger == "<new1> cat" and len(whole.card.sites) == 8


def _failing_at(call: int):
    calls, forward = [], DiffusionTask.forward

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == call + 1:  # one was the probe's
            raise KeyboardInterrupt
        return forward(self, batch)

    return failing


@pytest.fixture
def two(photos: Path, tmp_path: Path) -> Path:
    """Pictures of two concepts, in a folder each."""
    for name, numbers in (("cats", (0, 1)), ("toys", (2, 3, 4))):
        (tmp_path / "two" / name).mkdir(parents=True)
        for i in numbers:
            (tmp_path / "two" / name / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
    return tmp_path / "two"


BOTH: dict = {"name": "custom_diffusion", "token": ("<new1>", "<new2>"), "class_word": ("cat", "toy")}


def test_two_concepts_are_learnt_in_one_training(folder: Path, two: Path, base: DiffusionBase):
    task = prepare(job(folder, two, {**BOTH, "folders": ("toys", "cats")}))
    [source] = task.sources
    assert len(source.prompts) == 5 and source.prompts[0] != source.prompts[4]
    [method] = [subject.method for subject in task.subjects]
    assert method.trigger == "<new1> cat and <new2> toy"
    assert method.concept_of(task.subjects[0].dataset.pictures, str(two)) == [1, 1, 0, 0, 0]
    steps(task)
    adapter = task.adapter({})
    assert {"embedding.<new1>", "embedding.<new2>"} < set(adapter.tensors)
    start = CustomDiffusion(**{k: v for k, v in BOTH.items() if k != "name"}).attach(base)
    assert all(not torch.equal(value, adapter.tensors[name]) for name, value in start.tensors().items())
    start.detach()
    with adapter.attached(base):
        assert (base.tokenize(["<new1> and <new2>"]) >= len(base.tokenizer) - 2).sum() == 2


def test_class_pictures_of_a_folder(folder: Path, photos: Path, two: Path):
    (two / "toys" / "2.txt").write_text("a toy on a toy")
    task = prepare(job(folder, photos, {**CD, "class_path": str(two), "class_prompt": "a photo of a cat"}))
    ours, theirs = task.sources
    assert Job.load({**CD_JOB, "method": {**CD, "class_path": "pictures"}}).method["class_path"].startswith("/")
    assert theirs.mean.shape[0] == 5 and theirs.std.any()
    assert [prompts[0] for prompts in theirs.prompts] == [8, 8, 9, 8, 8]
    (digest,) = task.digests
    assert task.adapter({}).card.data_digest == task.origin()["data_digest"] == digest
    assert digest != prepare(job(folder, photos, CD)).digests[0] == task.subjects[0].dataset.digest
    (two / "toys" / "2.txt").write_text("a toy on another toy")  # other class pictures or captions are other data
    assert digest != prepare(job(folder, photos, task.subjects[0].job.method)).digests[0]
    with pytest.raises(DataError, match="0.png has no caption"):
        prepare(job(folder, photos, {**CD, "class_path": str(two)}))


def test_what_cannot_be_learnt_is_told_before_the_first_step(folder: Path, photos: Path, two: Path):
    with pytest.raises(DataError, match="Make one for each of <new1>, <new2>"):
        prepare(job(folder, photos, BOTH))
    with pytest.raises(DataError, match="folders with pictures: cats, toys"):
        prepare(job(folder, two, {**BOTH, "folders": ("cats", "dogs")}))
    with pytest.raises(InputError, match="one for each of 2 words"):
        CustomDiffusion(token=("<a>", "<b>"), class_word=("cat",))
    with pytest.raises(InputError, match="different words"):
        CustomDiffusion(token=("<a>", "<a>"))
    (photos / "0.txt").write_text("a photo of something")
    with pytest.raises(InputError, match="does not contain <new1>"):
        prepare(job(folder, photos, CD))
    (photos / "0.txt").write_text("a photo of the red toy on the blue cat and " * 2 + "<new1>")
    with pytest.raises(InputError, match="cut off after 24 tokens"):
        prepare(job(folder, photos, CD))


def test_an_adapter_of_other_shapes_is_refused(folder: Path, photos: Path, base: DiffusionBase):
    adapter = prepare(job(folder, photos, CD)).adapter({})
    name = next(name for name in adapter.tensors if name.endswith("change"))
    for bad in ({**adapter.tensors, name: torch.zeros(2, 2)}, {"embedding.<new1>": torch.zeros(1, 16)}, {}):
        with pytest.raises(FormatError), Adapter(bad, adapter.card).attached(base):
            pass
    assert not hasattr(base.pipe.unet, "graft_slots") and "<new1>" not in base.tokenizer.get_vocab()
