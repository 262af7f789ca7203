"""The result of `graft bench core` as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """Returns the promises, the figures beside them, and for each model times, memory and differences."""
    models = result["models"]
    lines = [result["how"], *(f"{name:9} {report['work']}" for name, report in models.items()), "", "promises"]
    for name, check in result["checks"].items():
        verdict = "ok" if check["passed"] else "MISSED"
        lines.append(f"{name:48} limit {check['limit']:.2f} {verdict:7}{_cells(check['values'], check['limit'])}")
    lines += ["", "beside them"]
    rows = dict.fromkeys(name for report in models.values() for name in report["beside"])
    for name in rows:
        values = {model: report["beside"][name] for model, report in models.items() if name in report["beside"]}
        lines.append(f"{name:67}{_cells(values)}")
    for model, report in models.items():
        for part, timed in report.items():
            if part not in ("work", "promised", "beside", "differences"):
                lines += ["", f"{model}, {part}", *(_row(name, row) for name, row in timed.items())]
        lines += ["", f"{model}, largest relative difference to peft's"]
        for name, found in report["differences"].items():
            lines.append(f"{name:40} output {found['output']:8.1e}  gradients {found['gradients']:8.1e}")
    return "\n".join(lines)


def _cells(values: Mapping[str, float], limit: float | None = None) -> str:
    cells = (
        f"{model} {value:.3f}{'!' if limit is not None and value > limit else ' '}" for model, value in values.items()
    )
    return " ".join(cells).rstrip()


def _row(name: str, row: Mapping[str, float | None]) -> str:
    line = f"{name:28}{_milliseconds(row['cpu'])} CPU {_milliseconds(row['wall'])} wall"
    if "saved" in row:
        line += f"{_mib(row['saved'])} saved {_mib(row['peak'])} peak"
    return line


def _milliseconds(seconds: float | None) -> str:
    return f"{1e3 * (seconds or 0):10.2f} ms"


def _mib(count: float | None) -> str:
    return f"{'-':>9}    " if count is None else f"{count / 2**20:9.1f} MiB"
