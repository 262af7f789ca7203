"""What holds for every test: one thread, no network, one known start of the random numbers."""

import os
from pathlib import Path

# Before anything imports torch or a Hugging Face library: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton reads it when it is imported: its kernels run on the CPU, in numpy.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT
