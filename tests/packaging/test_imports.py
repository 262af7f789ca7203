"""Imports point one way: kernels <- studio <- domains <- (registry, lazily) <- command line, app."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOMAINS = {"vision", "vlm", "diffusion", "llm_mm"}
# The parts of studio that know domains by name. Even they import one only inside a function, when it is asked for.
OUTER = ("studio.registry", "studio.cli", "studio.commands", "studio.demo", "studio.bench")
# Of these, the table of names (registry) may be read by everyone; the others only by each other.
COMMANDS = OUTER[1:]


class Import(NamedTuple):
    """One import of our own code: who, what (without `graft.`), where, and whether it waits inside a function."""

    importer: str
    target: str
    line: int
    lazy: bool


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, path: Path) -> Iterator[Import]:
    """Every import of `graft.*` in a file; `if TYPE_CHECKING:` counts as lazy since it never runs."""
    importer = module_name(path)
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            yield ".".join(["graft", *base, *(node.module or "").split(".")]).rstrip(".")
        elif node.module == "graft":
            yield from (f"graft.{alias.name}" for alias in node.names)
        else:
            yield node.module or ""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in targets(node):
                if name.startswith("graft."):
                    yield Import(importer, name.removeprefix("graft."), node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inside = inside or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), lazy=False)


def within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def allowed(found: Import) -> bool:
    """Whether the direction holds for one import."""
    here, there = found.importer.split(".")[0], found.target.split(".")[0]
    if here == "kernels":
        return there == "kernels"
    if here == "app":
        return there not in DOMAINS
    if within(found.importer, OUTER):
        return there not in DOMAINS | {"app"} or found.lazy
    if here == "studio":
        return there == "kernels" or (there == "studio" and (found.lazy or not within(found.target, COMMANDS)))
    if here in DOMAINS:
        # A domain may look a method up (registry) and measure with the shared bench, but never knows a command.
        return there in {here, "kernels"} or (
            there == "studio" and not within(found.target, ("studio.cli", "studio.commands", "studio.demo"))
        )
    return False


def test_the_rule_itself() -> None:
    def verdict(path: str, source: str) -> list[bool]:
        return [allowed(found) for found in imports(source, Path(path))]

    assert verdict("kernels/x.py", "import graft.studio.sites") == [False]
    assert verdict("studio/sites.py", "from graft.diffusion import base") == [False]
    assert verdict("studio/sites.py", "def f():\n    from graft.diffusion import base") == [False]
    assert verdict("studio/cli.py", "from graft.diffusion import base") == [False]
    assert verdict("studio/cli.py", "def f():\n    from graft.diffusion import base") == [True]
    assert verdict("vision/vpt.py", "from ..diffusion import lora\nfrom . import data") == [False, True]
    assert verdict("vision/vpt.py", "from graft.vlm import coop\nfrom graft.studio.sites import Site") == [False, True]
    assert verdict("app/report.py", "def f():\n    import graft.diffusion") == [False]


def test_imports_point_one_way(root: Path, tracked: list[Path]) -> None:
    folders = DOMAINS | {"studio", "kernels", "app"}
    files = [path for path in tracked if path.suffix == ".py" and path.parts[0] in folders]
    assert files
    found = [item for path in files for item in imports((root / path).read_text(), path)]
    wrong = [f"{item.importer}:{item.line} imports graft.{item.target}" for item in found if not allowed(item)]
    assert not wrong, "\n".join(wrong)
