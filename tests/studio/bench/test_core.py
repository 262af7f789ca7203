import json

import torch
from torch import nn

from graft.studio.bench import core
from graft.studio.bench.core import Variant


def test_the_table_compares_equal_work(tmp_path):
    result = core.run(tmp_path, rounds=1, depth=1, width=64)
    assert json.loads((tmp_path / "core.json").read_text()) == result
    assert max(result["largest_difference_to_peft"].values()) < 1e-4
    assert set(result["checks"]) == set(core.LIMITS)
    # Bytes do not depend on how busy the machine is.
    assert result["saved_mib"]["lora"] <= result["saved_mib"]["peft"]
    assert result["saved_mib"]["lora, dropout"] < 1.001 * result["saved_mib"]["lora"]
    assert result["saved_mib"]["peft, dropout"] > 1.2 * result["saved_mib"]["peft"]
    text = core.table(result)
    assert "8 adapters over 1" in text
    assert "limit 1.20" in text


def test_a_step_leaves_the_pictures_as_they_are():
    x, model = torch.randn(2, 4), nn.Linear(4, 3).requires_grad_(False)
    _, (grad,) = Variant(model, []).step(x, torch.ones(2, 3))
    torch.testing.assert_close(grad, model.weight.sum(0).expand(2, -1))
    assert not x.requires_grad
