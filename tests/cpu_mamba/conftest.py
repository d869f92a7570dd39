"""Fixtures: the number of threads as it was, a seed for every test; which kernels ran."""

import pytest
import torch

from cpu_mamba import functions


@pytest.fixture(autouse=True)
def settled():
    """One thread unless a test asks for more, and the same random numbers whatever ran before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The names of the batch kernels that ran, so that no test compares the reference with itself."""
    names, whole = [], functions.over_shares
    monkeypatch.setattr(functions, "over_shares", lambda kernel, *args: names.append(kernel.py_func.__name__) or whole(kernel, *args))
    return names
