"""What is told before a training starts: what is doubtful about its pictures, and what it will take.

Both are what the command line says: `graft data doctor` and `graft train --dry-run`. The second is a process of its
own, so that a job too large for the machine ends only that one. What it measured is kept beside the runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from html import escape
from pathlib import Path
from typing import Any

from graft.app.handlers import note
from graft.app.place import Place
from graft.studio.config import write_toml
from graft.studio.disk import write_json
from graft.studio.errors import GraftError, InputError
from graft.studio.estimate import Estimate, told_size, told_time

SECONDS = 900.0
"""After which nobody waits for an estimate any more."""
FILES = 6
"""Names of files told of each finding."""


def estimate_file(place: Place, job: Mapping[str, Any]) -> Path:
    """Where the estimate of a job is kept: how long it goes on, and what it is called, do not matter."""
    train = {key: value for key, value in job["train"].items() if key != "steps"}
    sampled = bool(job.get("sample", {}).get("every"))
    rest = [job["base"], job["domain"], job["method"], job["data"], train, sampled]
    name = hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()
    return place.work / "estimates" / f"{name[:32]}.json"


def known(place: Place, job: Mapping[str, Any]) -> Estimate | None:
    """The estimate of a job, if it was measured before."""
    try:
        found = json.loads(estimate_file(place, job).read_text(encoding="utf-8"))
        return Estimate(**found)
    except (OSError, ValueError, TypeError):
        return None


def measure(place: Place, job: Mapping[str, Any]) -> Estimate:
    """Take a job's first steps in a process of its own, and keep what they took.

    Raises:
        InputError: anything wrong with the job, or too little memory.
        GraftError: it would fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.toml"
        file.write_text(write_toml(dict(job)), encoding="utf-8")
        command = [sys.executable, "-m", "graft", "train", str(file), "--dry-run", "--json"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise GraftError(
                f"no estimate after {SECONDS / 60:.0f} minutes: the base is large for this machine"
            ) from None
    try:
        told = json.loads(done.stdout)
    except ValueError:
        why = "for want of memory, it seems" if done.returncode == -9 else f"with exit code {done.returncode}"
        raise GraftError(f"the first steps ended {why}: the training would, too") from None
    if "error" in told:
        error = told["error"]
        if "given" in error:
            raise InputError(error["given"], error["reason"], error["remedy"])
        raise GraftError(error["message"])
    found = Estimate(**{field.name: told[field.name] for field in fields(Estimate)})
    write_json(estimate_file(place, job), asdict(found))
    return found


def told_estimate(place: Place, job: Mapping[str, Any], found: Estimate) -> str:
    """Time, memory and disk of a job, for its page."""
    train, every = dict(job["train"]), int(job.get("sample", {}).get("every", 0))
    there = next(path for path in (place.runs, *place.runs.parents) if path.exists())
    need, free = found.disk(train, every), shutil.disk_usage(there).free
    text = (
        f"About {told_time(found.seconds(train, every))}, {told_size(found.peak)} of memory on {found.device} "
        f"({told_size(found.memory)} there), {told_size(need)} on disk ({told_size(free)} free). "
        "Measured by its first steps, on this machine as busy as it was."
    )
    faults = []
    if not found.fits:
        faults.append("The memory is too little: set a smaller batch_size, with gradient_accumulation.")
    if need > free:
        faults.append("The disk is too full: free some space.")
    warned = "".join(f'<p class="notice" role="alert">{escape(fault)}</p>' for fault in faults)
    return f'<div class="graft" id="estimate"><p class="soft">{escape(text)}</p>{warned}</div>'


def told_findings(report: Mapping[str, Any]) -> str:
    """What the doctor found, the worst first, with what to do."""
    if not report["findings"]:
        return '<div class="graft" id="findings"><p role="status">Nothing is wrong with the pictures.</p></div>'
    items = []
    for finding in report["findings"]:
        files = list(finding["files"].items())
        names = [escape(f"{name}: {about}" if about else name) for name, about in files[:FILES]]
        names += [f"and {len(files) - FILES} more"] * (len(files) > FILES)
        items.append(
            f'<li class="{escape(finding["level"])}"><strong>{escape(finding["kind"])}</strong> ({len(files)}). '
            f"{code(finding['remedy'])}.<small>{', '.join(names)}</small></li>"
        )
    return f'<div class="graft" id="findings"><ul class="findings">{"".join(items)}</ul></div>'


def code(text: str) -> str:
    """Text whose commands stand between backticks."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def told_error(error: GraftError) -> str:
    """What a training would fail of."""
    return f'<div class="graft"><p class="notice" role="alert">{escape(str(error))}</p></div>'


def findings(place: Place, job: Mapping[str, Any]) -> str:
    """The doctor's findings for a job's pictures, or what keeps it from looking."""
    try:
        return told_findings(place.models.ask("doctor", job=job))
    except GraftError as error:
        return told_error(error)


def estimate(place: Place, job: Mapping[str, Any]) -> str:
    """What a job will take, measured now unless it was before, or what it would fail of."""
    try:
        return told_estimate(place, job, known(place, job) or measure(place, job))
    except GraftError as error:
        return told_error(error)


WORKING = note("Looking at the pictures and taking the first steps of the training: some seconds.")
"""What stands there meanwhile."""
