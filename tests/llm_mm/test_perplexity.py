"""The choice among adapters: an adapter that was trained on a task's words finds them again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from graft.llm_mm.base import MultimodalBase
from graft.llm_mm.conversations import IGNORED, Conversation, Turn
from graft.llm_mm.data import DataConfig
from graft.llm_mm.method import LanguageLoRA, LanguagePrompt
from graft.llm_mm.perplexity import answer_by_perplexity, chat_by_perplexity, perplexities, route_by_perplexity
from graft.llm_mm.previews import chat
from graft.llm_mm.task import Reader
from graft.studio.adapter import Adapter, Card
from graft.studio.cli import main
from graft.studio.config import to_dict
from graft.studio.errors import BaseMismatchError
from graft.studio.methods.lora import LoRA
from graft.studio.training import train


def test_each_task_finds_its_adapter():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, pad_token_id=0, **size)).requires_grad_(False).eval()
    handle = LoRA(rank=4, alpha=16, targets="all-linear").attach(model, slots=2)
    optimizer = torch.optim.AdamW(handle.bank.parameters(), lr=2e-2)
    up, down = torch.arange(1, 9).repeat(2, 1), torch.arange(8, 0, -1).repeat(2, 1)
    ids = torch.cat([up, down])
    handle.route(torch.tensor([0, 0, 1, 1]))
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:]).backward()
        optimizer.step()
    handle.route(None)
    words = torch.tensor([[0, 0, 8, 7, 6, 5], [1, 2, 3, 4, 5, 6]])
    inputs = {"input_ids": words, "attention_mask": (words != 0).long()}
    found = perplexities(model, handle, inputs)
    assert handle.routed is None
    handle.route(torch.tensor([1]))
    logits = model(**{name: value[:1] for name, value in inputs.items()}).logits
    expected = F.cross_entropy(logits[0, 2:-1], words[0, 3:]).exp()
    torch.testing.assert_close(found[0, 1], expected)
    assert route_by_perplexity(model, handle, inputs).tolist() == [1, 0]
    assert handle.routed is not None
    assert handle.routed.tolist() == [1, 0]


def drawn(base: MultimodalBase, method: Any, name: str, seed: int, **details: str) -> Adapter:
    """An adapter of random tensors."""
    handle, generator = method.attach(base.model), torch.Generator().manual_seed(seed)
    try:
        tensors = {name: torch.randn(t.shape, generator=generator) for name, t in handle.tensors(0).items()}
        sites = handle.plan.to_list()
    finally:
        handle.detach()
    return Adapter(tensors, Card(name, to_dict(method), "llm_mm", base.name, base.hash, sites, details=details))


def test_adapters_of_any_methods_are_chosen_from(
    tiny: Path, photos: Callable[[str], Path], caplog: pytest.LogCaptureFixture
):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    adapters = {
        "one": drawn(base, LanguageLoRA(rank=2), "lora", 0, learn="all"),
        "two": drawn(base, LanguagePrompt(length=3), "prompt_tuning", 1, system="be short .", learn="all"),
    }
    rows = [
        Conversation(1, (Turn("user", (0, "is it red ?")),), (str(photos("a.png")),)),
        Conversation(2, (Turn("user", ("how many ?",)),)),
    ]
    told = answer_by_perplexity(base, adapters, rows, tokens=3)
    assert not caplog.records
    for row, found in zip(rows, told, strict=True):
        expected = {}
        for name, adapter in adapters.items():
            turns = [{"role": "system", "content": [{"type": "text", "text": "be short ."}]}] if name == "two" else []
            words = [{"type": "image"}] * len(row.pictures) + [{"type": "text", "text": row.turns[0].text}]
            text = base.processor.apply_chat_template(
                [*turns, {"role": "user", "content": words}], add_generation_prompt=True
            )
            shown = [Reader.of(base, DataConfig(path="-")).store.open(picture) for picture in row.pictures]
            inputs = base.processor(text=[text], images=shown or None, return_tensors="pt")
            with adapter.attached(base), torch.no_grad():
                loss = F.cross_entropy(base.model(**inputs).logits[0, :-1], inputs.input_ids[0, 1:], reduction="none")
            words_only = inputs.input_ids[0, 1:] != base.model.config.image_token_id
            expected[name] = float(loss[words_only].mean().exp())
        assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert found["chosen"] == min(expected, key=expected.__getitem__)
    first, *_ = chat(base, adapters[told[0]["chosen"]], rows[0].pictures, ["is it red ?"], tokens=3)
    again = chat_by_perplexity(base, adapters, rows[0].pictures, ["is it red ?", "and now ?"], tokens=3)
    assert first["adapter"] == told[0]["answer"] == again[0]["answer"] and len(again) == 2

    adapters["two"].card.details.pop("learn")
    answer_by_perplexity(base, adapters, rows[1:], tokens=1)
    assert "two has learnt answers alone" in caplog.text
    other = graft.load_base("pocket-llava", "cpu", domain="llm_mm")
    with pytest.raises(BaseMismatchError, match="hash"):
        answer_by_perplexity(other, adapters, rows[1:])


def test_questions_are_learnt_too_when_all_is(tiny: Path, photos: Callable[[str], Path]):
    base = graft.load_base(str(tiny), "cpu", domain="llm_mm")
    row = Conversation(1, (Turn("user", (0, "is it red ?")), Turn("assistant", ("yes",))), (str(photos("a.png")),))
    answers, everything = (
        Reader.of(base, DataConfig(path="-", learn=learn)).tokens(row)
        for learn in ("answers", "all")  # type: ignore[arg-type]
    )
    assert everything.ids == answers.ids and everything.answers == answers.answers
    image = base.processor.tokenizer.convert_tokens_to_ids("<image>")
    learnt = [IGNORED if token == image else token for token in everything.ids]
    assert everything.labels == [IGNORED, *learnt[1:]]  # nothing of a conversation tells its first token
    assert sum(label != IGNORED for label in answers.labels) < 4


@pytest.mark.slow
def test_each_question_is_answered_by_the_adapter_that_was_taught_it(
    tmp_path: Path, photos: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Two new questions about the same pictures, one with an adapter each, asked of both on the command line."""
    monkeypatch.chdir(tmp_path)
    asked = {"first": ("what is the first word ?", "red"), "last": ("what colour is left of nothing ?", "two")}
    rows = {
        name: [
            {"image": photos(f"{k}.png").name if k % 2 else "", "question": text, "answer": answer, "split": part}
            for k, part in enumerate(["train"] * 10 + ["val"] * 2)
        ]
        for name, (text, answer) in asked.items()
    }
    for name in asked:
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows[name])))
        job = {
            "base": "pocket-llava",
            "domain": "llm_mm",
            "method": {"name": "lora"},
            "data": {"path": f"{name}.jsonl", "learn": "all"},
            "train": {"steps": 40, "batch_size": 4, "device": "cpu", "threads": 1, "warmup_steps": 0},
        }
        card = train(job, run_dir=tmp_path / name).adapter().card
        assert card.metrics["val_exact"] == 1 and card.details["learn"] == "all"
    both = [rows["first"][1], rows["last"][1], rows["last"][0]]
    (tmp_path / "both.jsonl").write_text("\n".join(map(json.dumps, both)))

    def run(*argv: str) -> Any:
        capsys.readouterr()
        assert main(["chat", *argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    told = run("first", "--adapter", "last", "--data", "both.jsonl")
    assert [row["chosen"] for row in told["rows"]] == ["first", "last", "last"]
    assert told["exact"] == 1, told["rows"]
    assert told["chosen"] == {"first": 1, "last": 2}
    single = run("last", "1.png", "--adapter", "first", "--ask", asked["first"][0])
    assert single[0]["chosen"] == "first" and single[0]["answer"] == "red"
    assert single[0]["perplexity"]["first"] < single[0]["perplexity"]["last"]
    assert main(["chat", "first", "1.png", "--data", "both.jsonl"]) == 2
