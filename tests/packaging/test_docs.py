"""The pages in `docs/` say what the code says."""

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from graft.studio import registry
from graft.studio.job import Job

PAGES = sorted(path.name for path in (Path(__file__).parents[2] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_made_from_the_code(root: Path, page: str) -> None:
    spec = importlib.util.spec_from_file_location("tables", root / "docs" / "tables.py")
    assert spec and spec.loader
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (root / "docs" / page).read_text()
    assert text == tables.rewritten(text), f"docs/{page} is not up to date: make docs"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_somewhere(root: Path, page: str) -> None:
    text = (root / page).read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    local = [target for target in targets if not target.startswith("https://")]
    missing = [target for target in local if not ((root / page).parent / target).exists()]
    assert not missing


def test_every_method_has_its_line(root: Path) -> None:
    text = (root / "docs" / "methods.md").read_text()
    for domain, method in registry.METHODS:
        assert f"| {domain} | `{method}` |" in text


def test_the_job_in_the_docs_is_a_job(root: Path) -> None:
    (source,) = re.findall(r"```toml\n(.*?)```", (root / "docs" / "jobs.md").read_text(), re.DOTALL)
    job = Job.load(tomllib.loads(source))
    assert job.domain == "diffusion"
    assert job.method["token"] == "<sprout>"
