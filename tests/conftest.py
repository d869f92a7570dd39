"""Fixtures: the notebook's definitions as a module, loaded once."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def recall(tmp_path_factory):
    """The definitions of recall.ipynb as a module."""
    import report
    module = report.load_definitions(ROOT / "recall.ipynb", tmp_path_factory.mktemp("definitions"))
    torch.set_num_threads(1)  # as in the workers; small batches only wait for more threads
    return module


@pytest.fixture
def generator():
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(7)
