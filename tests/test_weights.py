"""Columns of compact weights picked in whichever way torch is fast: the same numbers as by one selection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends import weights
from adaptconv.backends.weights import picked

ROWS = (64, 33)  # enough for the ways of large weights
INDICES = {
    "one run": tuple(range(3, 11)),
    "all of them": tuple(range(12)),
    "a run amid zeros": (-1, -1, 4, 5, 6, -1),
    "zeros alone": (-1,) * 9,
    "a window with holes": (0, -1, -1, 1, -1, 2, 3, -1, -1, 4, -1, 5, -1, 6, 7, -1, 8, -1, 9, -1, 10, 11),
    "holes over some of the taps": (2, -1, -1, 3, -1, 5, -1, -1, 7, -1, 8, -1, 11, -1),
    "an order of their own": (7, 0, 3, 11, 1, 9, 2),
    "one twice, with holes": (5, -1, 5, 2, -1, 0, 5, -1, 3, 1, -1, 2, 5, -1, 5, -1, 4, -1),
}  # fmt: skip


def selected(w: Tensor, indices: tuple[int, ...]) -> Tensor:
    index = torch.tensor([i if i >= 0 else w.shape[2] for i in indices])
    return F.pad(w, (0, 1)).index_select(2, index)


def weight(dtype: torch.dtype, rows: tuple[int, int] = ROWS) -> Tensor:
    return torch.randn(*rows, 12, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_the_columns_are_those_asked_for(name: str, dtype: torch.dtype) -> None:
    w, indices = weight(dtype), INDICES[name]
    turned = w.transpose(0, 1).contiguous().transpose(0, 1)  # as the weight of an adjoint lies
    for given in (w, turned, w.flip(2), weight(dtype, (2, 1)), w[:0]):
        found = picked(given, indices)
        assert found.dtype is dtype and found.is_contiguous()
        assert torch.equal(found, selected(given, indices))
        assert found.data_ptr() != given.data_ptr() or not given.numel(), "never a view of the weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INDICES)
def test_derivatives_are_those_of_a_selection(name: str, dtype: torch.dtype) -> None:
    w, indices = weight(dtype).requires_grad_(), INDICES[name]
    out = picked(w, indices)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (found,) = torch.autograd.grad(out, w, dy)
    (right,) = torch.autograd.grad(selected(w, indices), w, dy)
    torch.testing.assert_close(found, right)
    _, tangent = torch.func.jvp(lambda v: picked(v, indices), (w.detach(),), (w.detach(),))
    torch.testing.assert_close(tangent, selected(w.detach(), indices))
    several = torch.stack([w.detach(), 2 * w.detach()])
    assert torch.equal(torch.func.vmap(lambda v: picked(v, indices))(several)[1], 2 * selected(w.detach(), indices))


def test_a_graph_has_one_selection_and_the_fast_ways_are_for_eager_calls() -> None:
    indices = INDICES["a window with holes"]
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda w: picked(w, indices))(weight(torch.float32)).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.index_select.default" in names and "aten.index_copy.default" not in names
    assert len(weights._layout(indices)[0]) > weights._FEW_RUNS, "else the test shows nothing"
