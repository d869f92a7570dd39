"""Functions of every lane against float64, for every number of lanes, and what they do with NaN and infinities."""

import numpy as np
import pytest

from cpu_mamba.lanes import entry, lane_exp2, lane_max, lane_sigmoid, lane_softplus, load, size_of, store, sums, width

WIDTHS = [1, 2, 4, 8, 16]


@entry
def apply(W, name, x, y):
    for c in range(0, x.shape[1], size_of(W)):
        v = load(W, x, 0, c)
        if name == 0:
            v = lane_exp2(v)
        elif name == 1:
            v = lane_sigmoid(v)
        elif name == 2:
            v = lane_softplus(v)
        else:
            v = lane_max(v, np.float32(-3))
        store(W, y, 0, c, v)


@entry
def add_vectors(W, x, y):
    store(W, y, 0, 0, sums(W, x, 0, 0))


def lanes(W, name, x):
    x = np.ascontiguousarray(np.resize(x, (1, -(-len(x) // 16) * 16)).astype(np.float32))
    y = np.empty_like(x)
    apply(width(W), name, x, y)
    return x[0].astype(np.float64), y[0]


@pytest.mark.parametrize("W", WIDTHS)
def test_functions_against_float64(W):
    """2**x to 3e-7 and exactly 1 at 0, 2**-125 below its range; sigmoid and softplus to that and the rounding of x log2(e); the larger of two."""
    x, y = lanes(W, 0, np.linspace(-124, 124, 4001))
    assert np.abs(y / np.exp2(x) - 1).max() < 3e-7
    assert (lanes(W, 0, np.zeros(16))[1] == 1).all() and (lanes(W, 0, np.array([-126.0, -1e30, -np.inf]))[1] == 2.0**-125).all()
    x, y = lanes(W, 1, np.linspace(-80, 80, 4001))
    assert (np.abs(y * (1 + np.exp(-x)) - 1) < 6e-7 + 2.0**-23 * np.abs(x)).all()
    x, y = lanes(W, 2, np.linspace(-80, 80, 4001))
    assert (np.abs(y / np.logaddexp(0, x) - 1) < 6e-7 + 2.0**-23 * np.abs(x)).all()
    x, y = lanes(W, 3, np.linspace(-9, 9, 4001))
    assert (y == np.maximum(x, -3)).all()


@pytest.mark.parametrize("W", WIDTHS)
@pytest.mark.parametrize("name", range(4))
def test_nan_stays_nan(W, name):
    """NaN of either sign comes out, whichever lane it is in, and leaves the others alone."""
    x = np.linspace(-2, 2, 16)
    for place in range(16):
        for bad in (np.nan, -np.nan):
            spoiled = x.copy()
            spoiled[place] = bad
            y, whole = lanes(W, name, spoiled)[1], lanes(W, name, x)[1]
            assert np.isnan(y[place]) and np.array_equal(np.delete(y, place), np.delete(whole, place))


def test_infinities():
    """The limits: 0 or 1 for the sigmoid (2**-125 is 0 here), 0 or infinity for the softplus."""
    both = np.array([-np.inf, np.inf] * 8)
    assert np.allclose(lanes(16, 1, both)[1], [0, 1] * 8, atol=1e-37)
    assert np.array_equal(lanes(16, 2, both)[1] > 1, [False, True] * 8) and np.isinf(lanes(16, 2, both)[1][1])


@pytest.mark.parametrize("W", WIDTHS)
def test_sums_of_vectors(W):
    x, y = np.arange(W * W, dtype=np.float32).reshape(1, -1), np.empty((1, W), np.float32)
    add_vectors(width(W), x, y)
    assert np.array_equal(y[0], x.reshape(W, W).sum(1))


def test_width_is_a_power_of_two():
    for size in (0, 3, -2):
        with pytest.raises(ValueError, match=f"size={size}"):
            width(size)
    assert width(8) is width(8)
