"""A wheel, installed where no checkout is in sight, holds the whole program."""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone
FOLDERS = ["studio", "vision", "vlm", "diffusion", "llm_mm", "kernels", "app"]


def check(command: list[str | Path], cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the source distribution, as a release is."""
    out = tmp_path_factory.mktemp("dist")
    check([sys.executable, "-m", "build", "--no-isolation", "--outdir", out, root], cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of an environment with this wheel and without the editable installation.

    The dependencies come from this environment's site-packages, put on the path by a `.pth` file. Python does not
    read the `.pth` files of a folder that was itself added so; the editable installation is one, and stays out.
    """
    home = tmp_path_factory.mktemp("clean") / "venv"
    check([sys.executable, "-m", "venv", "--without-pip", home], cwd=home.parent)
    scripts = home / "bin"
    (site,) = home.glob("lib/python*/site-packages")
    check([sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "-q", wheel], cwd=home)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return scripts


def test_wheel_holds_every_file(wheel: Path, tracked: list[Path]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"graft/{path}" for path in map(str, tracked) if path.split("/")[0] in FOLDERS}
    assert not expected - names
    outside = {name for name in names if not name.startswith(("graft/", "graft_studio-"))}
    assert not outside, "the wheel would install names of its own beside `graft`"


def test_every_module_imports_elsewhere(clean: Path, tracked: list[Path], tmp_path: Path) -> None:
    files = [path for path in tracked if path.suffix == ".py" and path.parts[0] in FOLDERS]
    modules = [".".join(("graft", *path.with_suffix("").parts)).removesuffix(".__init__") for path in files]
    assert {name.split(".")[1] for name in modules} >= {path.parts[0] for path in files}
    lines = [
        "import importlib, graft",
        *(f"importlib.import_module({name!r})" for name in sorted(modules)),
        "print(graft.__file__)",
    ]
    where = check([clean / "python", "-c", "\n".join(lines)], cwd=tmp_path).strip()
    assert where.startswith(str(clean.parent)), where


def test_command_runs_elsewhere(clean: Path, tmp_path: Path) -> None:
    assert "usage" in check([clean / "graft", "--help"], cwd=tmp_path).lower()
    assert "textual_inversion" in check([clean / "graft", "methods", "--json"], cwd=tmp_path)
    assert check([clean / "python", "-m", "graft", "methods", "--json"], cwd=tmp_path)
    assert not shutil.which("graft", path=str(tmp_path))
