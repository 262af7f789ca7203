"""The report is one file that a browser shows without asking for anything else."""

import re
from pathlib import Path

import pytest

from graft.app.report import RunView, write_report

METRICS = [{"step": step, "loss": 1.0 / step, "learning_rate": 1e-3} for step in range(1, 200)]
RUN = {
    "name": "sprout <lora>",
    "job": 'base = "pocket-sd"\n',
    "metrics": METRICS,
    "summary": {"similarity": 0.8123456, "trained parameters": 384},
}


@pytest.fixture
def report(tmp_path: Path, sprite: Path) -> Path:
    tables = [("Similarity", [{"method": "base", "similarity": 0.4}, {"method": "lora", "similarity": 0.83}])]
    second = {"name": "stopped half-way", "status": "interrupted", "metrics": METRICS[:50]}
    return write_report([RUN, second], tmp_path / "new" / "index.html", "A new concept", [("a disc", sprite)], tables)


def test_report_stands_alone(report: Path) -> None:
    content = report.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", content)
    assert "<script" not in content
    assert "url(" not in content
    assert "sprout &lt;lora&gt;" in content
    assert "0.8123" in content


def test_report_refuses_unknown_keys(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        write_report([{"name": "x", "colour": "red"}], tmp_path / "x.html", "x")


def test_view_leaves_out_steps_without_the_key() -> None:
    view = RunView("x", metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "similarity": 0.5}, {"step": 3, "loss": None}])
    assert view.series() == [(1.0, 2.0)]
    assert view.series("similarity") == [(2.0, 0.5)]


@pytest.mark.alone
@pytest.mark.parametrize("width", [390, 1100])
def test_report_in_a_browser(new_page, report: Path, width: int) -> None:
    watched = new_page(width, 1600)
    page = watched.page
    page.goto(report.as_uri())
    text = page.inner_text("body")
    assert "A new concept" in text
    assert "sprout <lora>" in text
    assert "interrupted" in text

    assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [64]
    assert page.locator("svg path").count() == 4
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert watched.outside(report.as_uri()) == []
    assert watched.complaints == []
