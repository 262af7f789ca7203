"""`pocket-llava`: its tokenizer, its training, its standard folder, and how its answers are counted.

None of this needs trained weights: a network from its configuration, with random ones, is put in their place.
"""

import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from graft.studio.job import Job, TrainConfig
from graft.studio.pocket import models
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.commands import install_network, list_models
from graft.studio.pocket.pretrain import llava as training
from graft.studio.pocket.pretrain.llava import PATCHES, Llava, LlavaTask
from graft.studio.pocket.qa import Score, answer, exact_match, mean_accuracy
from graft.studio.pocket.questions import KINDS, Question, ask, question_scene
from graft.studio.pocket.scenes import SIDE, centred, render
from graft.studio.pocket.tokenizer import load_llava_tokenizer, load_tokenizer
from graft.studio.runs import Run
from graft.studio.training import resume, train

OUTSIDER = """
import json, sys
import numpy as np, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
inputs = processor(images=[np.load(sys.argv[2])], text=[prompt], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]
ids = model.generate(**inputs, do_sample=False, max_new_tokens=5)[0, inputs.input_ids.shape[1]:]
print(json.dumps({"class": type(processor).__name__, "logits": logits.tolist(), "answer": processor.decode(ids)}))
"""
PROMPT = "<|startoftext|><image>{} <assistant>"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights with those of an untrained `pocket-llava`, in the place of the committed ones."""
    folder = tmp_path_factory.mktemp("weights")
    shutil.copytree(models.WEIGHTS, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "WEIGHTS", folder)
        models.weights_hash.cache_clear()
        torch.manual_seed(0)
        task = LlavaTask(models.clip().vision_model, batch_size=4)
        with torch.no_grad():  # as far from 0 as trained ones: else no picture changes an answer
            for parameter in task.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
        adapter = task.adapter({"steps": 0})
        install_network("llava", adapter.tensors, adapter.card.metrics)
        yield folder
    models.weights_hash.cache_clear()


@pytest.fixture(scope="module")
def model(weights):
    return models.llava()


@pytest.fixture(scope="module")
def processor(weights):
    return models.llava_processor()


def scenes(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [question_scene(rng, Atlas.load().known) for _ in range(count)]


def test_tokenizer_keeps_the_vocabulary_and_gives_names_back():
    ours, clip = load_llava_tokenizer(), load_tokenizer()
    assert {token: ours.get_vocab()[token] for token in clip.get_vocab()} == clip.get_vocab()
    assert all(ours.decode(ours(name).input_ids) == name for name in Atlas.load().names)
    text = "zürich 東京 <sprout> is it a t-shirt ?"
    assert ours.decode(ours(text).input_ids) == text
    marks = [ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.image_token_id]
    assert len(set(marks)) == 4 and max(marks) < len(ours) == max(ours.get_vocab().values()) + 1
    assert [len(ours(word).input_ids) for word in ("what", "colour", "yes", "middle")] == [1] * 4


def test_answers_end_mark_included_are_what_the_template_marks(processor):
    """The training's own rows are the conversations that the processor makes, with the same tokens learnt."""
    asked = [Question("name", "what is this ?", "woman's boot"), Question("exists", "is there a cat ?", "no")]
    turns = []
    for k, question in enumerate(asked):
        picture = [{"type": "image", "image": render(scenes(1)[0])}] if k == 0 else []
        turns.append({"role": "user", "content": [*picture, {"type": "text", "text": question.text}]})
        turns.append({"role": "assistant", "content": question.answer})
    theirs = processor.apply_chat_template(
        [turns], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    task = LlavaTask(models.clip().vision_model)
    ids, labels, _, _ = task._row(asked, apart=False)
    count = theirs["input_ids"].shape[1]
    assert theirs["input_ids"][0].tolist() == ids[:count]
    assert theirs["assistant_masks"][0].tolist() == [int(label != -100) for label in labels[:count]]
    learnt = [label for label in labels if label != -100]
    assert task.tokenizer.decode(learnt).split("<|endoftext|>") == ["woman's boot ", "no ", ""]
    assert set(ids[count:]) == {task.tokenizer.pad_token_id}


def test_loss_is_that_of_each_question_asked_alone(model, processor):
    """Rows of many questions against stock transformers: one question, one picture, no mask of ours."""
    task = LlavaTask(models.clip().vision_model, batch_size=4)
    start = models.llava().model
    del start.vision_tower
    task.llava.load_state_dict(start.state_dict())
    batch = task.batch(0, torch.Generator().manual_seed(0))
    loss, _ = task(batch)
    total, count = 0.0, 0
    for row in range(4):
        segments = batch.segments[row]
        labels = batch.labels[row]
        for segment in sorted(set(segments[labels != -100].tolist())):
            own = ((segments == segment) | (segments == 0)) & (batch.input_ids[row] != task.tokenizer.pad_token_id)
            ids = batch.input_ids[row][own][None]
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=batch.pictures[row : row + 1]).logits[0, :-1]
            target = labels[own][1:]
            total += cross_entropy(logits, target, reduction="sum").item()
            count += int((target != -100).sum())
    assert count == int((batch.labels != -100).sum())
    assert loss.item() == pytest.approx(total / count, rel=1e-4)
    assert batch.segments[0].max() == 0 and batch.segments[1:].max(1).values.min() >= 4


def test_everything_but_the_tower_learns_and_rows_are_full():
    task = Llava().task(TrainConfig(batch_size=16))
    tower = {name: value.clone() for name, value in task.frozen[0].state_dict().items()}
    batch = task.batch(0, torch.Generator().manual_seed(0))
    task(batch)[0].backward()
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(torch.equal(value, tower[name]) for name, value in task.frozen[0].state_dict().items())
    assert not any("vision" in name for name, _ in task.named_parameters())
    assert (batch.input_ids == task.tokenizer.pad_token_id).float().mean() < 0.12
    assert (batch.labels[:, : 1 + PATCHES] == -100).all()


def test_the_file_is_small_and_without_the_tower(weights):
    assert (weights / "llava.safetensors").stat().st_size <= 3.0e6
    adapter = LlavaTask(models.clip().vision_model).adapter({})
    assert {name.split(".")[0] for name in adapter.tensors} == {"multi_modal_projector", "language_model"}
    rows = {row["name"]: row for row in list_models()}
    assert rows["pocket-llava"]["present"] and rows["pocket-llava"]["networks"] == ["clip", "llava"]
    assert models.facts("llava")["parameters"] == sum(tensor.numel() for tensor in adapter.tensors.values())


def test_list_copes_with_weights_that_are_not_there(weights, tmp_path, monkeypatch):
    shutil.copytree(weights, tmp_path / "less", ignore=shutil.ignore_patterns("llava.*"))
    monkeypatch.setattr(models, "WEIGHTS", tmp_path / "less")
    rows = {row["name"]: row for row in list_models()}
    assert rows["pocket-llava"] == {"name": "pocket-llava", "networks": ["clip", "llava"], "present": False}
    models.weights_hash.cache_clear()
    with pytest.raises(models.InputError, match="graft pocket train llava"):
        models.resolve("pocket-llava")


def test_its_tower_is_that_of_pocket_clip(model):
    clip = models.clip().vision_model.state_dict()
    tower = model.model.vision_tower.state_dict()
    assert tower.keys() == clip.keys()
    assert all(torch.equal(tower[key], clip[key]) for key in tower)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_outsider_gets_the_same_outputs(model, processor, tmp_path, outsider):
    """A program with transformers only."""
    folder = models.export("pocket-llava", tmp_path / "out")
    picture = render(scenes(1)[0])
    np.save(tmp_path / "picture.npy", picture)
    theirs = outsider(OUTSIDER, folder, tmp_path / "picture.npy")
    assert theirs["class"] == "LlavaProcessor"
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    tokenizer = load_llava_tokenizer()
    ids = tokenizer(PROMPT.replace("<image>", "<image>" * PATCHES).format("what is this ?"), return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=ids.input_ids, pixel_values=pixels).logits[0, -1]
    torch.testing.assert_close(torch.tensor(theirs["logits"]), logits, rtol=1e-4, atol=1e-3)
    told = model.generate(**ids, pixel_values=pixels, do_sample=False, max_new_tokens=5)[0, ids.input_ids.shape[1] :]
    assert theirs["answer"] == tokenizer.decode(told)


def test_generation_is_the_likeliest_token_again_and_again(model, processor):
    """Greedy generation of a batch of questions of unequal length equals teacher-forced argmax of each alone."""
    shown = [render(scene) for scene in scenes(3)]
    texts = ["what is this ?", "on which side of the old key is the red apple ?", "count the things"]
    answers = answer(model, processor, shown, texts)
    for picture, text, told in zip(shown, texts, answers, strict=True):
        inputs = processor(images=[picture], text=[PROMPT.format(text)], return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        first = inputs.input_ids.shape[1]
        assert processor.decode(ids[0, first:], skip_special_tokens=True) == told
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs.pixel_values).logits
        assert logits[0, first - 1 : -1].argmax(-1).tolist() == ids[0, first:].tolist()


def test_the_picture_reaches_the_answer_unless_the_tower_is_dead(weights, processor):
    model = models.llava()
    pictures = [render(centred(sprite, "blue")) for sprite in Atlas.load().known[:2]] + [
        np.zeros((SIDE, SIDE, 3), "u1")
    ]
    inputs = processor(images=pictures, text=[PROMPT.format("what is this ?")] * 3, return_tensors="pt")

    def spread() -> float:
        with torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        return min((logits[0] - logits[1]).abs().max().item(), (logits[0] - logits[2]).abs().max().item())

    assert spread() > 1e-2
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[2].layer_norm1.weight.zero_()  # one dead layer is not a dead tower
        assert spread() > 1e-3
        for parameter in model.model.vision_tower.embeddings.parameters():
            parameter.zero_()
    assert spread() == 0


def test_exact_match_counts_what_is_right_to_the_letter(monkeypatch):
    """With a reader of the truth, of half of it, and of other pictures, instead of a model."""
    known, chosen = Atlas.load().known, scenes(40)
    truth = {}
    rng = np.random.default_rng(4)
    for scene in chosen:
        for kind in KINDS:
            if question := ask(scene, kind, rng, known):
                truth[render(scene).tobytes(), question.text] = question.answer

    def reader(answers):
        def read(model, processor, shown, texts):
            return [answers.get((picture.tobytes(), text), "") for picture, text in zip(shown, texts, strict=True)]

        monkeypatch.setattr("graft.studio.pocket.qa.answer", read)

    reader(truth)
    scores = exact_match(None, None, chosen, seed=4)
    assert mean_accuracy(scores) == 1 and scores["colour"] == Score(40, 40)
    assert sum(score.asked for score in scores.values()) == len(truth)
    assert exact_match(None, None, chosen, seed=4, shuffled=True)["name"].right == 0
    reader(dict.fromkeys(truth, "yes"))
    scores = exact_match(None, None, chosen, ("exists", "colour"), seed=4)
    assert scores["colour"] == Score(0, 40) and 0 < scores["exists"].right < 40
    assert mean_accuracy(scores) == scores["exists"].accuracy / 2


def test_a_stopped_training_resumes_with_the_same_bits(tmp_path, monkeypatch):
    section = {"steps": 3, "batch_size": 2, "warmup_steps": 1, "schedule": "cosine", "threads": 1, "device": "cpu"}
    data = {"base": "", "domain": "pocket", "method": {"name": "llava", "tokens": 96}, "data": {}, "train": section}
    whole = train(Job.load(data), tmp_path / "whole").adapter().tensors
    original = training.LlavaTask.batch

    def batch(self, step, generator):
        if step == 1 and not (tmp_path / "asked").exists():
            (tmp_path / "asked").touch()
            Run(tmp_path / "run").request("stop")
        return original(self, step, generator)

    monkeypatch.setattr(training.LlavaTask, "batch", batch)
    assert train(Job.load(data), tmp_path / "run").status == "stopped"
    run = resume(tmp_path / "run")
    assert run.status == "finished"
    tensors = run.adapter().tensors
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[key], whole[key]) for key in whole)


def test_going_on_starts_from_the_weights_that_are_there(model):
    task = Llava(go_on=True).task(TrainConfig(batch_size=2))
    start, ours = model.model.state_dict(), task.llava.state_dict()
    assert ours and all(torch.equal(value, start[key]) for key, value in ours.items())
