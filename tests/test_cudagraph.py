"""When two calls may share one CUDA graph, and that a replay computes what the function would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from fluxfast.cudagraph import WARMUP_CALLS, GraphedCallable, signature

X = torch.zeros(2, 3)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs: needs a CUDA GPU")


def key(*args: Any, **kwargs: Any) -> object:
    return signature(*pytree.tree_flatten((args, kwargs)))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(key(torch.zeros(3, 2), scale=1.0), id="shape"),
        pytest.param(key(torch.zeros(3, 2).T, scale=1.0), id="stride"),
        pytest.param(key(X.bfloat16(), scale=1.0), id="dtype"),
        pytest.param(key(X.to("meta"), scale=1.0), id="device"),
        pytest.param(key(X, scale=2.0), id="value"),
        pytest.param(key(X, scale=None), id="none"),
        pytest.param(key(X, scale=X), id="tensor for value"),
        pytest.param(key(X, 1.0), id="positional"),
        pytest.param(key(X, factor=1.0), id="name"),
        pytest.param(key([X], scale=1.0), id="nesting"),
        pytest.param(key(X), id="missing"),
    ],
)
def test_calls_that_differ_have_other_signatures(other: object) -> None:
    """A replay with another of any of these would be wrong."""
    assert other != key(X, scale=1.0)


def test_signature_is_not_of_the_tensors_values() -> None:
    """The same graph serves every step: only values change."""
    assert key(torch.ones(2, 3), scale=1.0) == key(X, scale=1.0)
    assert hash(key(torch.ones(2, 3), scale=1.0)) == hash(key(X, scale=1.0))


@on_a_gpu
def test_replay_computes_the_function() -> None:
    """A replay reads the new values, and its result survives the next replay."""
    double = GraphedCallable(lambda x, *, plus: x * 2 + plus)
    first, second = (double(torch.full((4,), value, device="cuda"), plus=1.0) for value in (1.0, 5.0))
    assert first.tolist() == [3.0] * 4 and second.tolist() == [11.0] * 4
    assert (double.captures, double.replays, double.function_calls) == (1, 2, WARMUP_CALLS + 1)


@on_a_gpu
def test_another_signature_is_another_capture() -> None:
    """Shape, keyword value: each gets its own graph, and going back to a known one captures nothing."""
    double = GraphedCallable(lambda x, *, plus: x * 2 + plus)
    for length, plus in ((4, 1.0), (8, 1.0), (4, 2.0), (4, 1.0)):
        assert double(torch.ones(length, device="cuda"), plus=plus).tolist() == [2.0 + plus] * length
    assert (double.captures, double.replays) == (3, 4)


@on_a_gpu
def test_structure_of_the_output_is_kept() -> None:
    """Tuples, and values that are no tensors, come back as they are."""
    both = GraphedCallable(lambda x: (x + 1, {"name": "x"}))
    out, rest = both(torch.zeros(2, device="cuda"))
    assert out.tolist() == [1.0, 1.0] and rest == {"name": "x"}
