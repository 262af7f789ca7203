"""The four guards of the layout: code in root folders, imported as `graft.<folder>` through links."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import graft

FOLDERS = {"studio", "vision", "vlm", "diffusion", "llm_mm", "kernels", "app"}


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_kernels_is_a_namespace(root: Path) -> None:
    """With one, the root folder would hide Hugging Face's package `kernels` and break transformers."""
    assert not (root / "kernels" / "__init__.py").exists()


def test_links_are_relative_and_match_the_wheel_table(root: Path) -> None:
    links = {path.name: path.readlink() for path in (root / "src" / "graft").iterdir() if path.is_symlink()}
    assert links == {name: Path("../..") / name for name in FOLDERS}
    assert all((root / name).is_dir() for name in FOLDERS)

    targets = project(root)["tool"]["hatch"]["build"]["targets"]
    mapped = {key: value for key, value in targets["wheel"]["sources"].items() if key != "src/graft"}
    assert mapped == {name: f"graft/{name}" for name in FOLDERS}
    for target in ("wheel", "sdist"):
        assert set(targets[target]["only-include"]) >= FOLDERS


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_ruff_refuses_root_imports(root: Path, folder: str) -> None:
    """`vision.vpt.VPT` and `graft.vision.vpt.VPT` would be two classes."""
    source = f"import {folder}\nfrom {folder}.part import thing\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise"]
    command += ["--stdin-filename", str(root / "probe.py"), "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True, cwd=root)
    assert result.stdout.count("TID251") == 2, result.stdout + result.stderr


def test_public_list_is_what_is_defined() -> None:
    assert set(graft.__all__) == {*graft._PUBLIC, "__version__"}
    for name, module in graft._PUBLIC.items():
        value = getattr(graft, name)
        assert value is getattr(import_module(module), name)
        assert value.__doc__, f"graft.{name} has no docstring"
        assert value.__module__.startswith(module), f"graft.{name} is defined in {value.__module__}, listed as {module}"


@pytest.mark.parametrize("folder", sorted(FOLDERS - {"kernels"}))
def test_folder_lists_name_real_things(folder: str) -> None:
    module = import_module(f"graft.{folder}")
    assert module.__doc__
    missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    assert not missing, f"graft.{folder}.__all__ names {missing}, which it does not define"
