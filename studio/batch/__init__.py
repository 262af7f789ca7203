"""Many subjects, one or more methods: a manifest becomes a run for each pair, and one summary of them all."""

from graft.studio.batch.manifest import Entry, read_manifest
from graft.studio.batch.plan import Batch, prepare_batch, run_batch

__all__ = ["Batch", "Entry", "prepare_batch", "read_manifest", "run_batch"]
