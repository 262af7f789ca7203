"""What the code imports is what `pyproject.toml` asks for."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

FOLDERS = {"studio", "vision", "vlm", "diffusion", "llm_mm", "kernels", "app"}
# Import name -> distribution, where they differ; triton comes with torch.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "open_clip": "open_clip_torch",
    "tomli_w": "tomli-w",
    "triton": "torch",
    "sklearn": "scikit-learn",
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[><=;~! ]", requirement, maxsplit=1)[0] for requirement in requirements}


def outside_imports(source: str) -> Iterator[tuple[str, bool]]:
    """(distribution, whether it is imported inside a function, or never) of every third-party import."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))  # never runs
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        for top in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"graft"}:
            yield DISTRIBUTIONS.get(top, top), id(node) in inside


def test_every_import_is_asked_for(root: Path, tracked: list[Path]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    base = names(project["dependencies"])
    extras = {name: names(wanted) for name, wanted in project["optional-dependencies"].items()}
    folder_extra = {"vision": "vision", "vlm": "vlm", "diffusion": "diffusion", "llm_mm": "llm", "app": "app"}
    missing = []
    for path in tracked:
        if path.suffix != ".py" or path.parts[0] not in FOLDERS:
            continue
        own = base | extras.get(folder_extra.get(path.parts[0], ""), set())
        anywhere = own.union(*extras.values())
        for distribution, lazy in outside_imports((root / path).read_text()):
            if distribution not in (anywhere if lazy else own):
                missing.append(f"{path}: {distribution}")
    assert not missing, "\n".join(sorted(missing))


def test_pins_are_of_things_asked_for_or_under_them(root: Path) -> None:
    """Every pin names one version, and every direct dependency that `make setup` installs has a pin."""
    pins = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins), pins
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = names(project["dependencies"] + extras["dev"] + extras["vision"] + extras["vlm"]) - {"graft-studio"}
    assert asked <= names(pins)
