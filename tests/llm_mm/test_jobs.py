"""From a file of questions to a trained adapter: parts, stages, exact resume, figures, and what is refused before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.llm_mm import jobs
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import Conversation, Turn
from graft.llm_mm.data import DataConfig, read_rows
from graft.llm_mm.evaluation import EvaluationConfig, evaluate, exact_match, measured, rotated
from graft.llm_mm.jobs import check_sight, prepare
from graft.llm_mm.llava import LlavaTuning
from graft.llm_mm.method import LanguageLoRA
from graft.llm_mm.parts import is_dead, part_of
from graft.llm_mm.pictures import PictureStore
from graft.llm_mm.previews import answered, chat
from graft.llm_mm.task import Batch, LanguageTask, Reader
from graft.studio.adapter import Adapter
from graft.studio.bench.measure import saved_bytes
from graft.studio.caches import Cache
from graft.studio.cli import main
from graft.studio.config import write_toml
from graft.studio.errors import BaseMismatchError, InputError
from graft.studio.job import Job
from graft.studio.runs import Run
from graft.studio.training import train

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def job(tiny: Path, questions: Path) -> Make:
    """Describes a training of a few steps: `job("lora", rank=2)`."""

    def make(method: str = "lora", data: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
        return {
            "base": str(tiny),
            "domain": "llm_mm",
            "method": {"name": method, **settings},
            "data": {"path": str(questions), "validation": 0.2, "test": 0.2, **(data or {})},
            "train": {"steps": 4, "batch_size": 4, "device": "cpu", "threads": 1, "log_every": 1},
        }

    return make


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "towers": ["language", "projector", "vision"], "dropout": 0.1},
    "dora": {"rank": 2},
    "lora_fa": {"rank": 2},
    "o_lora": {"rank": 2},
    "ia3": {},
    "ladder_side_tuning": {"reduction": 2},
    "ladder_side_tuning, fisher": {"reduction": 2, "pruning": "fisher"},
    "prefix_tuning": {"length": 2},
    "prompt_tuning": {"length": 2},
    "llava": {"rank": 2, "vision": "full"},
    "llava, stage 1": {"stage": 1, "fresh": True},
    "llava, full": {"language": "full"},
    "llama_adapter": {"num_tokens": 2},
    "llama_adapter_multimodal": {"num_tokens": 2, "levels": 2, "hidden": 4},
    "llama_adapter_v2": {"num_tokens": 2, "visual_tokens": 2, "visual_blocks": 1},
    "llama_adapter_v2, late": {"num_tokens": 2, "visual_blocks": 1, "fusion": "late", "scale_at": "input"},
    "llama_adapter_v2, disjoint": {"num_tokens": 2, "visual_tokens": 2, "visual_blocks": 1, "disjoint": True},
    "lora, packed": {"rank": 2, "data": {"packing": 200}},
    "lora, replay": {"rank": 2},
    "lora, mezo": {"rank": 2},
    "llava, galore": {"language": "full"},
    "llava, stage 1 of a resampler": {"stage": 1, "fresh": True},
    "llava, with a resampler": {"rank": 2, "start": "stage 1"},
}


TRAINED: dict[str, dict[str, Any]] = {
    "lora, mezo": {"optimiser": "mezo"},
    "llava, galore": {"optimiser": "galore", "galore_rank": 2, "galore_every": 2},
}
"""What `[train]` says for some of them."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if "stage 1" in case else pytest.mark.slow) for case in METHODS]
)
def test_every_method_resumes_with_the_same_bits(
    case: str, job: Make, resampled: Path, tmp_path: Path, resumed: Callable[[Run], dict[str, Any]]
):
    """Cut behind its second step, projector included, a run ends as one that was not."""
    settings = {**METHODS[case]}
    if case == "lora, replay":
        settings["data"] = {"replay": 0.5, "replay_path": job()["data"]["path"]}
    made = job(case.partition(",")[0], **settings)
    if "resampler" in case:
        made["base"] = str(resampled)
    if "start" in settings:
        first = {**made, "method": {"name": "llava", "stage": 1, "fresh": True, "projector_rate": 1e-2}}
        made["method"]["start"] = str(train(first, tmp_path / "first").folder)
    made["train"] |= {"checkpoint_every": 2, **TRAINED.get(case, {})}
    whole = train(made, tmp_path / "whole")
    one, two = whole.adapter().tensors, resumed(whole)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    parts = {part_of(name) for name in one}
    if case == "lora, packed":
        made["data"]["packing"] = 0
        other = train(made, tmp_path / "apart").adapter().tensors
        assert all(torch.allclose(other[name], one[name], rtol=1e-4, atol=1e-5) for name in one)
    assert ("projector" in parts) == (case.startswith("llava") or case == "lora")
    assert ("language" in parts) == ("stage 1" not in case)
    assert ("vision" in parts) == (case in ("lora", "llava"))  # where it is asked for, and nowhere else
    start = graft.load_base(made["base"], "cpu", domain="llm_mm")
    before = start.hash
    with Adapter.load(tmp_path / "whole" / "result").attached(start):
        pass
    assert MultimodalBase("again", start.model, start.processor).hash == before


def test_parts_are_told_by_whole_paths_and_dead_layers_left_out(
    job: Make, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    task = prepare(Job.load(job("llava", rank=2, vision="lora", projector_rate=1e-3, language_rate=2e-3)))
    told = {line.split()[0]: line.split() for line in capsys.readouterr().err.splitlines() if line}
    assert told["vision"][2] == told["language"][2] == "LoRA" and told["projector"][2] == "full"
    assert told["projector"][3:] == [f"{16 * 16 * 2 + 16 * 2:,}", "0.001"] and told["language"][4] == "0.002"
    sites = [site.name for site in task.handle.plan]
    assert any("vision_tower.encoder.layers.1" in name for name in sites)
    assert not any("layers.2" in name and "vision" in name for name in sites)  # behind the layer that is read
    assert is_dead("model.vision_tower.post_layernorm", task.reader.base.model)
    scales = {group["lr_scale"] for group in task.param_groups()}
    assert {round(scale * task.default_learning_rate, 6) for scale in scales} == {2e-3, 1e-3, 2e-4}
    by_role = LanguageLoRA(targets=("q", "v")).plan(task.reader.base.model)  # the tower has layers of these names, too
    assert [site.name for site in by_role] == [
        f"model.language_model.layers.{k}.self_attn.{name}_proj" for k in (0, 1) for name in "qv"
    ]
    with pytest.raises(InputError, match="the targets name nothing that acts in vision"):
        LanguageLoRA(targets="lm_head", towers=("vision",)).plan(task.reader.base.model)
    with pytest.raises(InputError, match="a part that is not frozen"):
        LlavaTuning(language="frozen", projector="frozen")


@pytest.mark.slow
def test_stage_two_starts_from_the_projector_of_stage_one(job: Make, tmp_path: Path):
    first = train(job("llava", stage=1, fresh=True, projector_rate=1e-2), tmp_path / "first").adapter().tensors
    task = prepare(Job.load(job("llava", rank=2, start=str(tmp_path / "first"))))
    own = task.handle.tensors()
    assert first and all(torch.equal(own[name], first[name]) for name in first)
    with pytest.raises(InputError, match="does not train the projector in full"):
        prepare(Job.load(job("llava", projector="frozen", start=str(tmp_path / "first"))))


@pytest.mark.slow
def test_o_lora_keeps_the_factors_of_the_task_before_and_stays_out_of_their_way(job: Make, tmp_path: Path):
    first = train(job("lora", rank=2), tmp_path / "first").adapter()
    second = {}
    for weight in (0.0, 100.0):
        made = job("o_lora", rank=2, earlier=[str(tmp_path / "first")], orthogonality=weight)
        second[weight] = train(made, tmp_path / f"second{weight}").adapter()
    overlap = dict.fromkeys(second, 0.0)
    for weight, adapter in second.items():
        for name in (name for name in adapter.tensors if name.endswith(".A")):
            assert torch.equal(adapter.tensors[f"{name}_past"], first.tensors[name])
            overlap[weight] += float((first.tensors[name] @ adapter.tensors[name].T).abs().sum())
    assert overlap[100.0] < overlap[0.0]
    base = graft.load_base(job()["base"], "cpu", domain="llm_mm")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        with first.attached(base):
            expected = base.model(input_ids=ids).logits
        empty = {name: t.zero_() if name.endswith(".B") else t for name, t in second[0.0].tensors.items()}
        with Adapter(empty, second[0.0].card).attached(base):
            found = base.model(input_ids=ids).logits
    torch.testing.assert_close(found, expected)  # without the new factors it is the first task's adapter


def test_the_towers_words_are_kept_by_content(job: Make):
    cache = Cache()
    data = DataConfig(**job()["data"])
    rows = [row for row in read_rows(data).train if row.pictures][:3]
    reader = Reader.of(graft.load_base(job()["base"], "cpu", domain="llm_mm"), data, cache)
    one = reader.store.features([row.pictures[0] for row in rows])
    assert cache.counts["vision", "miss"] == 3
    again = Reader.of(reader.base, data, cache)
    assert torch.equal(again.store.features([row.pictures[0] for row in rows]), one)
    assert cache.counts["vision", "miss"] == 3
    other = Reader.of(reader.base, DataConfig(**{**job()["data"], "fit": "pad"}), cache)
    assert not torch.equal(other.store.features([rows[0].pictures[0]])[0], one[0])
    assert cache.counts["vision", "miss"] == 4
    reader.base.model.config.vision_feature_layer = -1  # the same weights, of which more are read
    later = Reader.of(reader.base, data, cache).store
    assert not torch.equal(later.features([rows[0].pictures[0]])[0], one[0])
    assert cache.counts["vision", "miss"] == 5


def test_old_rows_have_their_share_of_a_batch(job: Make, tmp_path: Path):
    old = tmp_path / "old.jsonl"
    old.write_text("\n".join(json.dumps({"question": f"old {k}", "answer": "old"}) for k in range(8)))
    task = prepare(Job.load(job(data={"replay_path": str(old), "replay": 0.5})))
    drawn: list[Conversation] = []
    real, Reader.batch = Reader.batch, lambda self, rows, most=0: (drawn.extend(rows), real(self, rows))[1]  # type: ignore[method-assign,assignment,func-returns-value,misc]
    try:
        task.batch(0, torch.Generator().manual_seed(0))
    finally:
        Reader.batch = real  # type: ignore[method-assign]
    assert sum(row.answers == ("old",) for row in drawn) == 2 == len(drawn) - 2
    assert {"val_exact", "old_exact"} <= set(task.validate())


def test_a_packed_batch_is_the_same_rows_with_less_padding(job: Make):
    batches = []
    for packing in (0, 200):
        task = prepare(Job.load(job(rank=2, data={"packing": packing})))
        batch = task.batch(0, torch.Generator().manual_seed(0))
        batches.append((batch, task(batch)[0]))
    (apart, loss), (packed, same) = batches
    assert len(apart.ids) == 4 and len(packed.ids) == 2 and packed.ids.shape[1] <= 200
    assert sorted(map(str, apart.pictures)) == sorted(map(str, packed.pictures))
    assert int(apart.mask.sum()) == int(packed.mask.sum())
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-5)


def test_rows_with_pictures_and_rows_of_text_teach_separate_parts_of_one_batch(job: Make):
    """The gradients are those of two batches, each with one kind of rows and one part of the parameters."""
    settings = METHODS["llama_adapter_v2, disjoint"]
    task = prepare(Job.load(job("llama_adapter_v2", **settings)))
    with torch.no_grad():
        for name, parameter in task.bank.named_parameters():
            parameter.add_(torch.randn_like(parameter) if name.endswith(".g") else 0)
    batch = task.batch(0, torch.Generator().manual_seed(0))
    shown = (batch.ids == task.reader.writer.image_id).any(1)
    assert shown.tolist() == [True, True, True, False]  # two of ten rows are of text: one of four, at the least
    loss, told = task(batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in task.bank.named_parameters()}
    task.bank.zero_grad()
    parts = task.method.parts(task.handle)
    names = {id(parameter): name for name, parameter in task.bank.named_parameters()}
    total = 0.0
    for part, rows in (("captions", shown), ("instructions", ~shown)):
        some = Batch(
            batch.ids[rows], batch.labels[rows], batch.mask[rows], batch.pictures if part == "captions" else ()
        )
        alone = torch.nn.functional.cross_entropy(*task.reader.logits(some, False))
        total += alone.item()
        torch.testing.assert_close(told[part], alone.detach())
        want = torch.autograd.grad(alone, parts[part])
        assert all(gradient.any() for gradient in want)
        for parameter, gradient in zip(parts[part], want, strict=True):
            torch.testing.assert_close(found.pop(names[id(parameter)]), gradient)
    assert not found and loss.item() == pytest.approx(total)


def test_parts_that_nothing_would_teach_are_refused(job: Make, tmp_path: Path, questions: Path):
    settings = METHODS["llama_adapter_v2, disjoint"]
    lines = questions.read_text().splitlines()
    for name, some, why in (
        ("shown", lines[:10], "every row to train on has a picture, so nothing would teach all but the picture's part"),
        ("bare", lines[10:], "no row to train on has a picture, so nothing would teach the picture's part"),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))
        data = {"path": str(tmp_path / f"{name}.jsonl"), "validation": 0, "test": 0}
        with pytest.raises(InputError, match=f"{why}.*method.disjoint = false"):
            prepare(Job.load(job("llama_adapter_v2", data=data, **settings)))
    for key, value in (("batch_size", 1), ("optimiser", "mezo")):
        made = job("llama_adapter_v2", **settings)
        made["train"][key] = value
        with pytest.raises(InputError, match=f"train.{key}.*method.disjoint = false"):
            prepare(Job.load(made))
    with pytest.raises(InputError, match="method.fusion = 'none'"):
        prepare(Job.load(job("llama_adapter_v2", **settings, fusion="none")))


def test_memory_is_told_before_the_first_step(job: Make):
    """What is kept for the backward pass, told from four rows, against a whole batch of twelve."""
    made = job(rank=2)
    made["train"]["batch_size"] = 12
    task = prepare(Job.load(made))
    found = re.search(r"memory: about (.*) MiB: (.*) MiB of weights, (.*) MiB of .*moments, (.*) MiB kept", task.facts)
    assert found is not None
    total, weights, learnt, kept = map(float, found.groups())
    model, own = list(task.reader.base.model.parameters()), list(task.bank.parameters())
    assert weights == pytest.approx(sum(p.numel() for p in model) * 4 / 2**20, abs=0.05)
    assert learnt == pytest.approx(sum(p.numel() for p in own) * 4 * 4 / 2**20, abs=0.05)
    batch = task.batch(0, torch.Generator().manual_seed(0))
    assert kept == pytest.approx(saved_bytes(lambda: task(batch), [*model, *own]) / 2**20, rel=0.2)
    assert total == pytest.approx(weights + learnt + kept, abs=0.2)
    made["train"]["optimiser"] = "mezo"
    assert "0.0 MiB kept for the backward pass" in prepare(Job.load(made)).facts


def test_pictures_are_opened_when_they_are_needed(job: Make, monkeypatch: pytest.MonkeyPatch):
    """Before the first step: for the dry step alone, not for the table. In training: once each, with a frozen tower."""
    opened: list[str] = []
    real = PictureStore.open

    def open_it(self: PictureStore, picture: Any) -> Any:
        opened.append(str(picture))
        return real(self, picture)

    monkeypatch.setattr(PictureStore, "open", open_it)
    task = prepare(Job.load(job(rank=2)))
    assert sum(name.endswith(".png") for name in opened) == 2  # of four rows, two have none
    for step in range(8):
        task.batch(step, torch.Generator().manual_seed(step))
        task(task.batch(step, torch.Generator().manual_seed(step)))
    files = [name for name in opened if name.endswith(".png")]
    assert len(files) == len(set(files)) and len(files) > 2


def test_a_method_that_looks_at_data_sees_rows_from_all_over_it(job: Make, monkeypatch: pytest.MonkeyPatch):
    """- log p of their answers, all tokens of them together, by the whole model."""
    base = graft.load_base(job()["base"], "cpu", domain="llm_mm")
    reader = Reader.of(base, DataConfig(**job()["data"]), Cache())
    rows = read_rows(DataConfig(**{**job()["data"], "validation": 0, "test": 0})).train
    monkeypatch.setattr(jobs, "LOOKED", 5)
    found = [float(loss) for loss in jobs.losses(reader, rows)]
    want = []
    for row in rows[::3]:
        tokens = reader.tokens(row)
        given = {"input_ids": torch.tensor([tokens.ids]), **reader.store.inputs(row.pictures)}
        with torch.no_grad():
            told = base.model(**given).logits[0].log_softmax(-1)
        ((start, end),) = tokens.answers
        want.append(-sum(float(told[k - 1, tokens.ids[k]]) for k in range(start, end)))
    assert len(rows) == 12 and found == pytest.approx(want, rel=1e-4)


def test_rows_that_lose_turns_are_counted_before_the_first_step(
    job: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    turns = [{"role": role, "content": "is it ?"} for _ in range(9) for role in ("user", "assistant")]
    rows = [{"messages": turns}, *({"messages": turns[:2]} for _ in range(3))]
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    prepare(
        Job.load(job(rank=2, data={"path": str(tmp_path / "talks.json"), "length": 30, "validation": 0, "test": 0}))
    )
    assert "1 of 4 rows lose their last turns to data.length = 30" in caplog.text


def test_an_adapter_is_refused_where_pictures_are_shown_otherwise(job: Make, tiny: Path, tmp_path: Path):
    """Weights are the same, so the base's hash is; the processor's crop is not."""
    adapter = prepare(Job.load(job(rank=2))).adapter({})
    adapter.save(tmp_path / "adapter")
    shutil.copytree(tiny, tmp_path / "base")
    told = json.loads((tmp_path / "base" / "processor_config.json").read_text())
    told["image_processor"] |= {"size": {"shortest_edge": 80}}
    (tmp_path / "base" / "processor_config.json").write_text(json.dumps(told))
    saved = Adapter.load(tmp_path / "adapter")
    with saved.attached(graft.load_base(str(tiny), "cpu", domain="llm_mm")):
        pass
    other, message = graft.load_base(str(tmp_path / "base"), "cpu"), r"in its training: size was .*64.* and is .*80"
    with pytest.raises(BaseMismatchError, match=message), saved.attached(other):
        pass


def test_learning_rates_are_those_of_llavas_scripts():
    """arXiv:2310.03744, and its scripts for LoRA: 1e-3, then 2e-5; with LoRA 2e-4 and 2e-5 for the projector."""
    want: dict[float, LlavaTuning] = {
        1e-3: LlavaTuning(stage=1),
        2e-4: LlavaTuning(),
        2e-5: LlavaTuning(language="full"),
    }
    for rate, method in want.items():
        assert method.default_learning_rate == rate
    assert LlavaTuning().rates()["projector"] == LlavaTuning(language="full").rates()["projector"] == 2e-5


def test_a_model_that_does_not_see_is_refused(tiny: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader = Reader.of(base, DataConfig(path="-"))
    check_sight(base, reader.store)
    with torch.no_grad():
        base.model.model.multi_modal_projector.linear_2.weight.zero_()
    with pytest.raises(InputError, match="a black and a white picture give the same logits"):
        check_sight(base, reader.store)


def test_rows_that_cannot_be_used_stop_the_job(job: Make):
    with pytest.raises(InputError, match=r"(?s)rows cannot be used.*row 1: its first answer ends at token 72"):
        prepare(Job.load(job(data={"length": 68})))


def told(kind: str, answer: str, picture: Any = None, choices: tuple[str, ...] = ()) -> Conversation:
    parts = (*([0] if picture is not None else ()), "is it ?")
    shown = (picture,) if picture is not None else ()
    return Conversation(1, (Turn("user", parts), Turn("assistant", (answer,))), shown, kind, choices)


def test_figures_are_those_counted_by_hand(tiny: Path, monkeypatch: pytest.MonkeyPatch, photos: Callable[[str], Path]):
    """With a model that knows the truth of some pictures, instead of weights."""
    from graft.llm_mm import evaluation

    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader = Reader.of(base, DataConfig(path="-"))
    pictures = [str(photos(f"{k}.png")) for k in range(4)]
    rows = [told("a", answer, pictures[k]) for k, answer in enumerate(("yes", "yes", "no", "no"))]
    rows.append(told("b", "red apple", None, ("red apple", "blue apple")))
    truth = {(pictures[0], "yes"): 1, (pictures[1], "no"): 1, (pictures[2], "no"): 1, (pictures[3], "yes"): 1}

    def logits(self: Reader, batch: Any, frozen_tower: bool) -> tuple[torch.Tensor, torch.Tensor]:
        labels, right, shown = batch.labels[batch.labels != -100], [], iter(batch.pictures)
        for ids, row in zip(batch.ids, batch.labels, strict=True):
            said = self.writer.tokenizer.decode(row[row != -100], skip_special_tokens=True).strip()
            key = next(shown) if bool((ids == self.writer.image_id).any()) else None
            good = said == "red apple" if key is None else isinstance(key, str) and (key, said) in truth
            right += [good] * int((row != -100).sum())
        hit = torch.nn.functional.one_hot(labels, len(self.writer.tokenizer)).float()
        sign = torch.tensor(right).float()[:, None] * 2 - 1
        return hit * sign, labels

    monkeypatch.setattr(evaluation.Reader, "logits", logits)
    figures = evaluation.measured(reader, rows)
    assert figures["exact"] == 3 / 5 and figures["exact a"] == 2 / 4 and figures["exact b"] == 1
    assert figures["choice"] == 1 and figures["blank"] == 0 and figures["questions"] == 5
    assert (figures["yes_no"], figures["precision"], figures["recall"], figures["yes_rate"]) == (0.5, 0.5, 0.5, 0.5)
    more = [rows[k] for k in (0, 2, 3)]  # right, right, and yes where no is right
    figures = evaluation.measured(reader, more)
    assert [round(figures[name], 4) for name in ("yes_no", "precision", "recall", "f1", "yes_rate")] == [
        0.6667, 0.5, 1.0, 0.6667, 0.6667,
    ]  # fmt: skip
    turned = rotated(reader, rows[:4])
    assert [row.pictures[0] for row in turned] == [*pictures[1:], pictures[0]]
    assert exact_match(reader, rows, "rotated") == 0
    assert exact_match(reader, [rows[k] for k in (2, 1)], "rotated") == 0.5  # picture 1 is told "no", too


def test_turns_that_do_not_fit_are_not_asked(tiny: Path, photos: Callable[[str], Path]):
    """With fewer tokens, the figures are those of the rows without their last turns."""
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    said = [Turn("user", (0, "is it ?")), Turn("assistant", ("yes",))]
    said += [Turn("user", ("is it blue ?",)), Turn("assistant", ("no",))]
    choices = ("yes", "no, and this is a long answer")

    def row(number: int, turns: int) -> Conversation:
        return Conversation(number, tuple(said[:turns]), (str(photos("a.png")),), f"kind {number}", choices)

    whole = Reader.of(base, DataConfig(path="-"))
    limited = Reader.of(base, DataConfig(path="-", length=len(whole.tokens(row(1, 4)).ids) - 1))
    found, want = measured(limited, [row(1, 2), row(2, 4)]), measured(whole, [row(1, 2), row(2, 2)])
    assert found.keys() == want.keys() and found["questions"] == 2
    assert [found[name] for name in want] == pytest.approx([want[name] for name in want], nan_ok=True)
    assert measured(whole, [row(1, 4), row(2, 4)])["questions"] == 4


@torch.no_grad()
def test_right_to_the_letter_is_what_greedy_decoding_writes(tiny: Path, photos: Callable[[str], Path]):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    reader = Reader.of(base, DataConfig(path="-"))
    row = told("a", "x", str(photos("a.png")))
    (said,) = answered(reader, [row.asking()], tokens=3)
    assert said
    batch, tokens = reader.batch([row.answering(said)])
    logits, labels = reader.logits(batch, True)
    spoken = reader.writer.tokenizer(said).input_ids
    assert labels[:-1].tolist() == spoken
    assert logits.argmax(-1)[: len(spoken) - 1].tolist() == spoken[:-1]  # the last piece was cut within its word
    rows = chat(base, None, [row.pictures[0]], ["is it ?", "and now ?"], tokens=3)
    assert rows[0]["base"] == said and set(rows[1]) == {"question", "base"}


@pytest.mark.slow
def test_from_the_command_line(
    job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    made = job("lora", rank=2)
    made["sample"] = {"every": 2}
    (tmp_path / "job.toml").write_text(write_toml(made))

    def run(*argv: str) -> Any:
        capsys.readouterr()
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    shown = run("data", "preview", "job.toml", "--rows", "2", "--out", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert len(shown["rows"]) == 2 and 'src="data:image/png;base64,' in page and 'class="learnt"' in page
    assert [kind for kind, _ in shown["rows"][0]["runs"]].count("image") == 1
    assert run("train", "job.toml", "--run-dir", "run")["status"] == "finished"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "val_exact_rotated" in rows[0] and "val_exact" not in rows[1] and "val_exact" in rows[2]
    assert (tmp_path / "run" / "parts.txt").read_text().startswith("part")
    assert (tmp_path / "run" / "result" / "preview.png").exists()
    figures = run("eval", "run")
    assert figures["adapter"]["questions"] == 2 and {"exact", "rotated", "blank"} <= set(figures["base"])
    asked = run("chat", "run", "0.png", "--ask", "is it red ?")
    assert set(asked[0]) == {"question", "base", "adapter"}
    files = run("preview", "run", "--prompt", "is it red ?", "--set", "path=1.png", "--out", "out")["files"]
    assert [Path(file).name for file in files] == ["sheet.png", "answers.json"]


def test_what_is_measured_is_what_the_run_put_aside(job: Make, tiny: Path):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    path = job()["data"]["path"]
    tested = evaluate(base, None, EvaluationConfig(path=path, validation=0.2, test=0.2))
    assert tested["questions"] == 2
    assert evaluate(base, None, EvaluationConfig(path=path, part="all"))["questions"] == 12
    assert issubclass(LanguageTask, torch.nn.Module)


def test_what_is_measured_in_training_is_what_graft_eval_measures(
    job: Make, tiny: Path, photos: Callable[[str], Path], tmp_path: Path
):
    rows = [
        {"image": photos(f"{k}.png").name, "question": "is it ?", "answer": answer, "kind": kind, "choices": choices}
        for k, (answer, kind, choices) in enumerate([("yes", "is it", ""), ("red", "the colour", "red|blue")] * 10)
    ]
    path = tmp_path / "kinds.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = prepare(Job.load(job(data={"path": str(path), "validation": 0.6, "replay": 0.5, "replay_path": str(path)})))
    found = task.validate()
    task.handle.detach()
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    told = evaluate(base, None, EvaluationConfig(path=str(path), part="val", validation=0.6, test=0.2))
    names = {"exact", "choice", "yes_no", "yes_rate", "recall", "exact is it", "exact the colour"}
    assert names <= set(told) and {"val_exact_rotated", "val_exact_blank", "old_exact"} <= set(found)
    for name in names:
        assert found[f"val_{name.replace(' ', '_')}"] == pytest.approx(told[name], abs=1e-4)
    assert found["val_exact_blank"] == pytest.approx(told["blank"], abs=1e-4)
