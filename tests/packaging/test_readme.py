"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest
from PIL import Image

from graft.studio.cli import build_parser
from graft.studio.pocket.atlas import Atlas
from graft.studio.pocket.scenes import centred, render


def block(root: Path, language: str) -> str:
    (first, *_) = re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    return first


def test_every_command_is_named(root: Path) -> None:
    (line,) = [line for line in (root / "README.md").read_text().splitlines() if line.startswith("| command line |")]
    listed = re.findall(r"^    (\w+) ", build_parser().format_help(), re.MULTILINE)
    assert len(listed) > 8
    assert re.findall(r"`(\w+)`", line) == listed


@pytest.mark.alone
def test_the_example_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, on the embedded model; two steps instead of the default number, since what it draws is not judged."""
    code = block(root, "python")
    short = code.replace('"data": {"path": "photos"}', '"data": {"path": "photos"}, "train": {"steps": 2}')
    assert short != code
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) <= 5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for colour in ("blue", "yellow"):
        picture = Image.fromarray(render(centred(Atlas.load().new[0], colour)))
        picture.save(tmp_path / "photos" / f"{colour}.png")
    exec(compile(short, "README.md", "exec"), {})
    assert (tmp_path / "sks.png").stat().st_size > 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "result" / "adapter.safetensors").exists()
