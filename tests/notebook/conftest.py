"""The notebook's definitions, made once."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from lab import report


@pytest.fixture(scope="session")
def recall():
    """What the definition cells of recall.ipynb define."""
    torch.set_num_threads(1)  # as in the workers; small batches only wait for more threads
    return report.definitions()


@pytest.fixture
def generator():
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(7)
