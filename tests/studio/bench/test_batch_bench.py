"""What the benchmark of batches counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graft.studio.bench import batch


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux adopts what a killed process leaves")
def test_the_time_of_orphans_is_counted() -> None:
    busy = "import time\nwhile time.process_time() < 0.4: pass"
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {busy!r}], start_new_session=True)"
    before = batch._cpu()
    with batch._adopting():
        subprocess.run([sys.executable, "-c", orphan], check=True)
        batch._gather()
    assert batch._cpu() - before > 0.4
