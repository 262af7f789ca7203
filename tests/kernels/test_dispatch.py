"""Which path is taken: the library's, unless another one was measured to be faster here."""

import json

import pytest
import torch

from graft.kernels import dispatch
from graft.kernels.dispatch import fastest, refusals

CUDA = torch.device("cuda")
KEY = ("operation", 64, torch.float16)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card whose paths take the times that the test says."""
    times: dict[str, float] = {}
    monkeypatch.setattr(dispatch, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_file", lambda device: tmp_path / "kernels" / "card.json")
    monkeypatch.setattr(dispatch, "_milliseconds", lambda run, path, expected: times[path])
    dispatch._table.cache_clear()
    yield times
    dispatch._table.cache_clear()


def choose(paths=("library", "split", "inline")):
    return fastest(KEY, dict.fromkeys(paths, list), CUDA)


@pytest.mark.parametrize(
    ("split", "inline", "chosen"), [(0.9, 0.8, "inline"), (0.98, 1.2, "library"), (2.0, 2.0, "library")]
)
def test_the_library_stays_unless_something_is_faster(card, split, inline, chosen):
    card |= {"library": 1.0, "split": split, "inline": inline}
    assert choose() == chosen


def test_a_choice_is_measured_once_and_kept_for_other_processes(card, tmp_path):
    card |= {"library": 1.0, "split": 0.5, "inline": 0.7}
    assert choose() == "split"
    card |= {"library": 0.1}
    assert choose() == "split"
    dispatch._known.clear()  # as in another process
    dispatch._table.cache_clear()
    assert choose() == "split"
    assert json.loads((tmp_path / "kernels" / "card.json").read_text()) == {"operation/64/torch.float16": "split"}
    dispatch._known.clear()
    assert choose(("library", "inline")) == "library"  # a path that is no more


def test_a_torn_table_is_measured_again(card, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "card.json").write_text('{"operation')
    card |= {"library": 1.0, "split": 0.5, "inline": 0.7}
    assert choose() == "split"


def test_a_cpu_has_the_library_only(card):
    assert fastest(KEY, {"library": list, "split": list}, torch.device("cpu")) == "library"


def test_a_path_that_fails_is_left_out(caplog):
    def broken():
        raise RuntimeError("out of resources")

    assert dispatch._milliseconds(broken, "split", []) == float("inf")
    assert "split is left out: out of resources" in caplog.text
    with pytest.raises(RuntimeError, match="out of resources"):
        dispatch._milliseconds(broken, "library", [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_with_other_results_is_left_out(caplog, dtype):
    right = torch.linspace(-1, 1, 64).to(dtype)
    rounded, wrong, poisoned = right * (1 + torch.finfo(dtype).eps), right.roll(1), right.clone()
    poisoned[3] = float("nan")
    assert dispatch.agree([right, rounded], [right, right])
    assert not dispatch.agree([right, wrong], [right, right])
    assert dispatch._milliseconds(lambda: [poisoned], "split", [right]) == float("inf")
    assert "split is left out: its results are not the library's" in caplog.text


def test_compiled_code_takes_what_is_known(card):
    def run(x):
        return x + 1 if fastest(KEY, {"library": list}, CUDA) == "library" else x + 2

    assert torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1
    dispatch._known[KEY] = "split"
    torch._dynamo.reset()
    assert torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 2


def test_why_no_kernel_can_run(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert refusals(torch.empty(0, dtype=torch.float64), torch.empty(1, device="meta"), None) == [
        "triton is not installed",
        "tensors on cpu, meta",
        "device cpu has no Triton",
        "torch.float64 is not float16, bfloat16 or float32",
        "no elements",
    ]
