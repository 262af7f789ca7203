import json

import pytest

from graft.studio.bench import slots
from graft.studio.errors import InputError


def test_an_adapter_of_peft_gives_the_same_output(tmp_path):
    result = slots.run(tmp_path, adapters=36, depth=1, width=64)
    assert json.loads((tmp_path / "slots.json").read_text()) == result
    assert result["difference to peft"] < 1e-5
    assert [row["adapter"] for row in result["rows"]] == ["2", "33", "mean", "slowest"]
    assert "36 adapters" in result["table"]
    with pytest.raises(InputError, match="too few"):
        slots.run(adapters=3)
