"""Constructed kernels: random programs that make a weight, whatever is recognised in them, keep their values."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptconv
from adaptconv.compile.linear import _FUNCTIONS, _LINEAR_IN, _PRODUCTS
from adaptconv.compile.optimize import _untouched, collect_sites

Step = Callable[[Tensor, Tensor], Tensor]


def _spaced(w: Tensor, _: Tensor) -> Tensor:
    wide = w.new_zeros(*w.shape[:2], 2 * w.shape[2] - 1)
    wide[..., ::2] = w
    return wide


def _spaced_by_index(w: Tensor, _: Tensor) -> Tensor:
    wide = torch.zeros(*w.shape[:2], 2 * w.shape[2])
    return wide.index_copy(2, torch.arange(w.shape[2]) * 2, w)


def _written_through_a_view(w: Tensor, _: Tensor) -> Tensor:
    wide = torch.zeros(*w.shape[:2], w.shape[2] + 1)
    rows = wide.view(-1, w.shape[2] + 1)
    rows[:, 1:] = w.reshape(-1, w.shape[2])
    return wide


def _overwritten(w: Tensor, _: Tensor) -> Tensor:
    w = w.clone()
    w[:, :, 0] = w[:, :, -1]
    w[:, :, -1].zero_()
    return w


def _changed_in_place(w: Tensor, other: Tensor) -> Tensor:
    w = w * 1
    w.mul_(other[0, 0, 0])
    return w


def _smoothed(w: Tensor, _: Tensor) -> Tensor:
    return F.conv_transpose1d(w.reshape(-1, 1, w.shape[2]), torch.tensor([[[0.5, 1.0, 0.5]]]), stride=2).reshape(
        *w.shape[:2], -1
    )


STEPS: dict[str, Step] = {
    "spaced": _spaced,
    "spaced by index": _spaced_by_index,
    "a view": _written_through_a_view,
    "overwritten": _overwritten,
    "changed in place": _changed_in_place,
    "smoothed": _smoothed,
    "kron": lambda w, _: torch.kron(w, torch.tensor([1.0, 0.0, 0.0]))[..., :-2],
    "scaled kron": lambda w, _: torch.kron(w, torch.tensor([0.0, 0.5])),
    "flipped": lambda w, _: w.flip(2),
    "rolled": lambda w, _: w.roll(1, 2),
    "padded": lambda w, _: F.pad(w, (1, 2)),
    "padded with ones": lambda w, _: F.pad(w, (0, 1), value=1.0),
    "masked": lambda w, _: w * (torch.arange(w.shape[2]) % 2),
    "where": lambda w, _: torch.where(torch.arange(w.shape[2]) > 0, w, 0.0),
    "joined": lambda w, other: torch.cat([w, w.new_zeros(*w.shape[:2], 1), other], 2),
    "added": lambda w, _: w + w.flip(2),
    "channels rolled": lambda w, _: w.roll(1, 0),
    "transposed": lambda w, _: w.transpose(0, 1).contiguous(),
    "matrix": lambda w, _: w @ torch.eye(w.shape[2], w.shape[2] + 2),
    "einsum": lambda w, _: torch.einsum("oik,kl->oil", w, torch.eye(w.shape[2]).roll(1, 1)),
    "scaled": lambda w, other: w * other[0, 0, 0],
    "thresholded": lambda w, _: torch.where(w > 0, w, 0.0),
    "rectified": lambda w, _: w.relu(),
    "squared": lambda w, _: w * w,
    "detached": lambda w, _: w.detach() + 0 * w,
    "rounded": lambda w, _: w.bfloat16().to(w.dtype),
    "summed": lambda w, _: w.cumsum(2),
    "stacked": lambda w, _: torch.stack([w, torch.zeros_like(w)], -1).flatten(2),
}  # fmt: skip


class Program(nn.Module):
    """A convolution whose weight a few steps make."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.weight, self.other = nn.Parameter(torch.randn(4, 4, 3)), nn.Parameter(torch.randn(4, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        for name in self.names:
            weight = STEPS[name](weight, self.other)
        return F.conv1d(x, weight, padding=weight.shape[2] // 2)


def _programs(count: int) -> list[list[str]]:
    draw = random.Random(0)
    return [[name] for name in STEPS] + [draw.choices(sorted(STEPS), k=draw.randint(2, 3)) for _ in range(count)]


@pytest.mark.parametrize("names", _programs(60), ids="-".join)
def test_a_program_keeps_its_values_and_gradients(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptconv.compile.inductor._missing_toolchain", lambda inputs: "a test asked for it")
    net, x = Program(names), torch.randn(2, 4, 40, requires_grad=True)
    operands = [x, *net.parameters()]
    truth = _in_double(net)
    exact, *exact_gradients = _answers(truth, x.detach().double().requires_grad_(), list(truth.parameters()))
    plain, *plain_gradients = _answers(net, x, operands[1:])
    with warnings.catch_warnings(), adaptconv.pinned("gather"):
        warnings.filterwarnings("ignore", message=".*runs uncompiled")
        ours, *our_gradients = _answers(adaptconv.optimize(net), x, operands[1:])
    for mine, theirs, right in zip(
        (ours, *our_gradients), (plain, *plain_gradients), (exact, *exact_gradients), strict=True
    ):
        if "rounded" not in names:  # in double the weight is another by a rounding
            error = float((theirs - right).detach().abs().max())
            assert float((mine - right).detach().abs().max()) <= 4 * error + 1e-5 * float(
                right.detach().abs().max() + 1
            )
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max() + 1))


def _in_double(net: Program) -> Program:
    twin = Program(net.names).double()
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), net.parameters(), strict=True):
            mine.copy_(theirs)
    return twin


def _answers(call: Any, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    torch.set_default_dtype(x.dtype)  # the programs make their constants in it
    try:
        y = call(x)
        gradients = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)
    finally:
        torch.set_default_dtype(torch.float32)
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def _found(names: list[str]) -> Any:
    (site,) = (s for s in collect_sites(Program(names), (torch.randn(1, 4, 40),)) if s.kind == "conv")
    return site


@pytest.mark.parametrize("names", [["thresholded"], ["rectified"], ["squared"], ["scaled"], ["rounded"], ["summed"]])
def test_what_is_not_linear_is_not_taken_apart(names: list[str]) -> None:
    assert _found(names).made == ""


@pytest.mark.parametrize("first", ["thresholded", "rectified", "squared", "scaled", "rounded", "summed", "detached"])
def test_what_is_made_linearly_of_something_that_is_not_is(first: str) -> None:
    site = _found([first, "spaced"])
    assert str(site.taps) == "3d2"
    assert site.made


class Blur(nn.Module):
    """One filter for every channel, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(1, 1, 3, 3).expand(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.pad(self.filter, [0, 2, 0, 2]), groups=4)


@pytest.mark.filterwarnings("error")
def test_tensors_that_overlap_themselves_are_looked_into() -> None:
    (site,) = collect_sites(Blur(), (torch.randn(2, 4, 9, 9),))
    assert (str(site.taps), site.made != "") == ("11100/11100/11100/00000/00000", True)


class Counting(nn.Module):
    """Buffers of every kind, changed by a call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expanded", torch.zeros(1).expand(3))
        self.register_buffer("single", torch.tensor(0.0))
        self.register_buffer("sparse", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.expanded.fill_(7)
        self.single += 1
        self.sparse.mul_(2)
        return F.conv1d(x, torch.ones(1, 1, 3))


def test_a_trial_call_leaves_buffers_of_every_kind_as_they_were() -> None:
    model = Counting()
    with _untouched(model):
        model(torch.randn(1, 1, 9))
    assert (float(model.expanded.sum()), float(model.single), float(model.sparse.to_dense().sum())) == (0, 0, 3)


@pytest.mark.parametrize("holes", [True, False], ids=["holes", "whole"])
def test_a_kernel_made_in_channels_last_gives_the_answer_its_strides(
    holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptconv.compile.inductor._missing_toolchain", lambda inputs: "a test asked for it")

    def convolved(x: Tensor, w: Tensor) -> Tensor:
        kernel = torch.cat([w, torch.zeros_like(w)], -1) if holes else w * 1
        return F.conv2d(x, kernel.contiguous(memory_format=torch.channels_last), groups=2)

    x, w = torch.randn(2, 4, 9, 9), torch.randn(4, 2, 3, 3)
    with warnings.catch_warnings(), adaptconv.pinned("gather"):
        warnings.filterwarnings("ignore", message=".*runs uncompiled")
        ours = adaptconv.optimize(convolved)(x, w)
    torch.testing.assert_close(ours, convolved(x, w))
    assert ours.stride() == convolved(x, w).stride()


def test_autocast_within_the_model_hides_nothing() -> None:
    def convolved(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.conv1d(x, _spaced(w, w))

    (site,) = collect_sites(convolved, (torch.randn(2, 4, 9), torch.randn(4, 4, 3, requires_grad=True)), train=True)
    assert (str(site.taps), site.reason) == ("3d2", "")


def test_two_tensors_make_one_kernel() -> None:
    site = _found(["spaced", "joined"])
    assert str(site.taps) == "10101011"
    assert "2 tensors" in site.made


def test_the_allow_list_names_what_torch_has() -> None:
    """A name that stands for nothing would be a spelling mistake."""
    known = set(_FUNCTIONS.values()) | set(dir(Tensor))
    assert set(_LINEAR_IN) | _PRODUCTS <= known
