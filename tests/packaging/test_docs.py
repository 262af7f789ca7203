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


def test_counts_of_the_site_methods_are_those_of_their_formulas(root: Path) -> None:
    """By hand, on a ViT-S: blocks L, width d, inside m, four projections d x d in each block, r the default rank."""
    L, d, m, r = 12, 384, 1536, 8
    lora = 4 * L * r * (d + d)
    norms = 2 * L + 1
    outputs = d + L * (3 * d + d + m + d)  # of patch embedding, qkv, proj, fc1, fc2: all have a bias
    weights = 3 * 16 * 16 * d + L * (4 * d * d + 2 * d * m) + norms * d
    biases = outputs + norms * d
    bottleneck = 2 * 64 * d + 64 + d
    phm = 4 * (d // 4 + d // 32 // 4)  # n = 4 rank-one factors of a matrix d x d / 32
    keys = 2 * L * d
    expected = {
        "lora": lora,
        "lora_fa": lora // 2,
        "o_lora": lora,
        "moslora": lora + 4 * L * r * r,
        "dora": lora + 4 * L * d,
        "adalora": 4 * L * 12 * (d + d + 1),
        "sora": lora + 4 * L * r,
        "dylora": lora,
        "krona": 4 * L * (16 * 16 + 24 * 24),
        "lokr": 4 * L * (16 * 16 + r * (24 + 24)),
        "gated_lora": lora + 4 * L * (d + 1),
        "houlsby": 2 * L * bottleneck,
        "pfeiffer": L * bottleneck,
        "parallel": L * bottleneck,
        "compacter": 4**3 + 2 * L * (2 * phm + d // 32 + d),
        "ia3": L * (d + d + m),
        "ssf": 2 * (outputs + norms * d),
        "bitfit": biases,
        "fish_mask": round(0.005 * (weights + biases)),
        "diff_pruning": 2 * (weights + biases)
        + 2 * (1 + norms + 4 * L),  # w and alpha, and a group for each weight and bias
        "prompt_tuning": 100 * d,
        "prefix_tuning": 10 * d + 512 * (d + 1) + keys * (512 + 1),
        # D of the words and of each layer, U, a gate and a block of one head (64 wide) for each layer, at an eighth
        "ladder_side_tuning": (L + 2) * d * d // 8 + L * (1 + 4 * 64 * d // 8 + 3 * d * m // 64 + 2 * d // 8) + d // 8,
        "loftq": lora,
    }
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| ([\d,]+)(?: \(a Llama\))? \| [^|]+ \| arXiv",
        (root / "docs" / "methods.md").read_text(),
        re.M,
    )
    assert {name: int(count.replace(",", "")) for name, count in rows} == expected
    assert set(expected) == {*registry.SITE_METHODS, "loftq"}


def test_the_job_in_the_docs_is_a_job(root: Path) -> None:
    source, measured = re.findall(r"```toml\n(.*?)```", (root / "docs" / "jobs.md").read_text(), re.DOTALL)
    job = Job.load(tomllib.loads(source))
    assert Job.load(tomllib.loads(source) | tomllib.loads(measured)).train.keep == "best"
    assert job.domain == "diffusion"
    assert job.method["token"] == "<sprout>"
