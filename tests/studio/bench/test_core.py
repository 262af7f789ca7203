import json

import pytest
import torch
from torch import nn

from graft.studio.bench import core, measure
from graft.studio.bench.core_variants import Variant


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(measure, "_SHORTEST", 1e-9)


@pytest.mark.alone
def test_the_table_compares_equal_work(tmp_path, short):
    result = core.run(tmp_path, rounds=1, models="vit", tiny=True)
    text = result.pop("table")
    assert json.loads((tmp_path / "core.json").read_text()) == result
    assert set(result["checks"]) == set(core.LIMITS)
    assert set(result["models"]) == {"vit", "mha text", "mha image", "mha tower"}
    for report in result["models"].values():
        for name, apart in report["differences"].items():
            if "bf16" not in name and not name.startswith("peft"):
                assert max(apart.values()) < 1e-4
    # peft's own results are far from the formula where out_proj has a change.
    assert result["models"]["mha text"]["differences"]["peft's to the formula"]["output"] > 1e-2
    # Bytes do not depend on how busy the machine is.
    saved = {name: row["saved"] for name, row in result["models"]["vit"]["step"].items()}
    assert saved["lora"] <= saved["peft lora"]
    assert saved["lora, dropout"] < 1.001 * saved["lora"]
    assert saved["peft lora, dropout"] > 1.2 * saved["peft lora"]
    for name in (
        "LoRA saved bytes over peft's",
        "DoRA saved bytes over peft's",
        "dropout saved bytes over peft's",
        "bf16 base saved bytes over peft's",
    ):
        assert result["checks"][name]["values"]["vit"] <= core.LIMITS[name]
    assert "8 adapters over 1, step" in text
    assert "limit 0.95" in text


@pytest.mark.alone
def test_all_models_agree_with_peft(short):
    result = core.run(rounds=1, mha=False, tiny=True)
    for report in result["models"].values():
        for name, apart in report["differences"].items():
            assert max(apart.values()) < (0.05 if "bf16" in name else 1e-4)


def test_a_step_leaves_the_input_as_it_is():
    x, model = torch.randn(2, 4), nn.Linear(4, 3).requires_grad_(False)
    _, gradients = Variant(model).step((x,), torch.ones(2, 3))
    torch.testing.assert_close(gradients["input"], model.weight.sum(0).expand(2, -1))
    assert not x.requires_grad


def test_a_peak_is_the_rise_while_working():
    rise = measure.peak_rise(lambda: torch.zeros(2**24).add_(1))
    if rise is None:
        pytest.skip("not on Linux")
    assert 0.9 * 2**26 < rise < 1.3 * 2**26
    assert (measure.peak_rise(lambda: None) or 0) < 2**23


def test_what_tensors_take_at_most_is_counted_to_the_byte():
    def work():
        kept = torch.empty(1000)
        torch.empty(3000)
        return kept + torch.empty(1000)

    assert measure.peak_allocated(work) == 4 * (1000 + 3000)
