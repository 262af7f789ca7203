"""What the domains show for the preview, with adapters that were really trained."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import graft
from graft.diffusion.previews import fader
from graft.studio import registry
from graft.studio.adapter import base_hash
from graft.studio.errors import InputError
from graft.studio.pocket.atlas import Atlas
from graft.studio.shown import Asked

pytestmark = pytest.mark.alone


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two classes of four pictures, told apart by their colour."""
    for name, colours in {
        "red": ("red", "crimson", "tomato", "brown"),
        "blue": ("blue", "navy", "teal", "cyan"),
    }.items():
        (tmp_path / "classes" / name).mkdir(parents=True)
        for colour in colours:
            Image.new("RGB", (64, 64), colour).save(tmp_path / "classes" / name / f"{colour}.png")
    return tmp_path / "classes"


def trained(tmp_path: Path, base: str, domain: str, path: Path, **method: Any) -> Any:
    job = {"base": base, "domain": domain, "method": method, "data": {"path": str(path)},
           "train": {"steps": 3, "batch_size": 2}}  # fmt: skip
    return graft.train(job, runs=tmp_path / "runs").adapter()


def test_diffusion_shows_the_base_and_each_strength(tmp_path: Path) -> None:
    from graft.diffusion.bench.pictures import write_pictures

    photos = write_pictures(tmp_path / "photos", Atlas.load().index("hedgehog"))
    adapter = trained(tmp_path, "pocket-sd", "diffusion", photos, name="lora", trigger="sks")
    base = graft.load_base("pocket-sd", device="cpu")
    before = base_hash(base.modules)
    asked = Asked(("a {token}",), seed=1, strengths=(0.0, 0.001, 1.0), weights=(0.5, 0.5), settings={"steps": 2})
    cells = registry.domain("diffusion").shown(base, [adapter, adapter], asked, tmp_path / "out")
    assert [(cell.row, cell.column) for cell in cells] == [("a sks", "base"), ("a sks", "0.001"), ("a sks", "1")]
    alone = registry.domain("diffusion").shown(
        base, [adapter], Asked(("a {token}",), seed=1, settings={"steps": 2}), tmp_path
    )
    one, two = (Image.open(cell.picture).convert("RGB") for cell in (cells[2], alone[1]))
    assert max(high for _, high in _difference(one, two)) <= 2  # two halves are one
    assert base_hash(base.modules) == before


def _difference(one: Any, two: Any) -> Any:
    from PIL import ImageChops

    return ImageChops.difference(one, two).getextrema()


@pytest.mark.parametrize(
    ("base", "domain", "method", "columns"),
    [("pocket-vit", "vision", "linear", ["linear"]), ("pocket-clip", "vlm", "tip_adapter", ["base", "tip_adapter"])],
)
def test_classifiers_show_shares(
    tmp_path: Path, classes: Path, base: str, domain: str, method: str, columns: list[str]
) -> None:
    adapter = trained(tmp_path, base, domain, classes, name=method)
    loaded = graft.load_base(base, device="cpu")
    asked = Asked(pictures=(str(classes / "red" / "red.png"), str(classes / "blue" / "blue.png")))
    cells = registry.domain(domain).shown(loaded, [adapter], asked, tmp_path)
    own = [cell for cell in cells if set(cell.shares) == {"red", "blue"}]
    assert [cell.column for cell in own][-2:] == [columns[-1]] * 2
    assert all(sum(cell.shares.values()) == pytest.approx(1, abs=1e-3) for cell in own)
    assert list(own[-1].shares.values()) == sorted(own[-1].shares.values(), reverse=True)


def test_a_word_has_no_strength() -> None:
    class Word:
        pass

    fader(Word())(1.0)
    with pytest.raises(InputError, match="a word has none"):
        fader(Word())(0.5)
