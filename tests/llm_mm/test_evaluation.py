"""What `graft eval` measures an adapter with."""

from types import SimpleNamespace
from typing import Any

from graft.llm_mm.evaluation import EvaluationConfig, evaluation_settings
from graft.studio.adapter import Adapter, Card
from graft.studio.config import from_dict


def test_pictures_are_fitted_as_in_training_even_without_a_run():
    adapter = Adapter(
        {}, Card("lora", {}, "llm_mm", details={"fit": "pad", "background": "black", "system": "Be brief."})
    )
    told = evaluation_settings(adapter, None, "questions.jsonl")
    config = from_dict(EvaluationConfig, told, "eval")
    assert (config.fit, config.background, config.system, config.path) == (
        "pad",
        "black",
        "Be brief.",
        "questions.jsonl",
    )
    run: Any = SimpleNamespace(job=SimpleNamespace(data={"path": "own.jsonl", "fit": "crop"}, eval={"rows": 5}))
    assert evaluation_settings(adapter, run)["fit"] == "crop" and evaluation_settings(adapter, run)["rows"] == 5
    other = evaluation_settings(adapter, run, "questions.jsonl")
    assert (other["path"], other["part"], other["fit"]) == ("questions.jsonl", "all", "crop")
