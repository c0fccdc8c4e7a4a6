"""PyTorch's own samples and error inputs for conv1d, conv2d and conv3d, through every way adaptconv has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import adaptconv
from adaptconv import BackendRejected, pinned
from tests.cases import ON_CPU

AXES = (1, 2, 3)
OURS: dict[int, Callable[..., Tensor]] = {1: adaptconv.conv1d, 2: adaptconv.conv2d, 3: adaptconv.conv3d}
TORCHS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
NAMES = tuple(backend.name for backend in ON_CPU)
WAYS = ("default", *NAMES)
SAMPLES = {1: 10, 2: 30, 3: 20}
SELECTIVE = ("dual", "factored", "cpp")  # they leave some problems, or all with a torch weight, to others
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-14}

Arguments = tuple[list[Tensor | None], dict[str, Any]]


def op(axes: int) -> Any:
    return next(op for op in op_db if op.name == f"nn.functional.conv{axes}d")


def samples(axes: int, dtype: torch.dtype) -> list[Arguments]:
    """(input, weight, bias) and the keyword arguments of every sample."""
    torch.manual_seed(0)
    found = []
    for sample in op(axes).sample_inputs("cpu", dtype, requires_grad=True):
        tensors = [sample.input, *sample.args]
        kwargs = dict(sample.kwargs)
        tensors.append(kwargs.pop("bias", None) if len(tensors) == 2 else None)
        found.append((tensors[:3], kwargs))
    return found


def way(name: str) -> AbstractContextManager[None]:
    return nullcontext() if name == "default" else pinned(name)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach(), theirs.detach()
    scale = theirs.abs().max().clamp_min(1e-30) if theirs.numel() else torch.tensor(1.0)
    difference = (ours.double() - theirs.double()).abs().max() if theirs.numel() else torch.tensor(0.0)
    assert float(difference / scale) <= TOLERANCE[dtype]


def check(axes: int, name: str, tensors: list[Tensor | None], kwargs: dict[str, Any]) -> bool:
    """Compare one sample in one way with torch in float64, gradients included; False if the way declines."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    try:
        with way(name):
            ours = OURS[axes](*leaves, **kwargs)
    except BackendRejected:
        return False
    theirs = TORCHS[axes](*leaves, **kwargs)
    exact = TORCHS[axes](*doubles, **kwargs)
    assert (ours.dtype, ours.device, ours.stride()) == (theirs.dtype, theirs.device, theirs.stride())
    close(ours, exact, theirs.dtype)
    dy = torch.randn_like(exact)
    with way(name):
        gradients = torch.autograd.grad(ours, [t for t in leaves if t is not None], dy.to(ours.dtype))
    expected = torch.autograd.grad(exact, [t for t in doubles if t is not None], dy.to(ours.dtype).double())
    plain = torch.autograd.grad(theirs, [t for t in leaves if t is not None], dy.to(ours.dtype))
    for mine, right, torchs in zip(gradients, expected, plain, strict=True):
        close(mine, right, theirs.dtype)
        assert (mine.dtype, mine.shape, mine.stride()) == (torchs.dtype, torchs.shape, torchs.stride())
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", WAYS)
def test_every_sample_is_torchs(name: str, axes: int, dtype: torch.dtype) -> None:
    ran = sum(check(axes, name, tensors, kwargs) for tensors, kwargs in samples(axes, dtype))
    if name not in SELECTIVE:  # a torch weight is one grid without a footprint, in groups of any size
        assert ran == SAMPLES[axes]


def test_the_samples_are_all_there(capsys: pytest.CaptureFixture[str]) -> None:
    """60 samples and 30 error inputs; how many (sample, backend) pairs were not rejected."""
    pairs = dict.fromkeys(NAMES, 0)
    count = 0
    for axes in AXES:
        found = samples(axes, torch.float32)
        assert len(found) == SAMPLES[axes]
        count += len(found)
        for tensors, kwargs in found:
            for name in pairs:
                pairs[name] += check(axes, name, tensors, kwargs)
    errors = sum(len(list(error_inputs(axes))) for axes in AXES)
    assert (count, errors) == (60, 30)
    assert all(ran in (0, 60) for name, ran in pairs.items() if name != "cpp"), pairs
    assert 0 < pairs["cpp"] < 60, "the depthwise samples"
    assert pairs["native"] == pairs["dense"] == pairs["gather"] == 60
    with capsys.disabled():
        print(f"\nOpInfo: {count} samples, {errors} error inputs; pairs not rejected: {sum(pairs.values())} {pairs}")


def error_inputs(axes: int) -> Iterator[Any]:
    return iter(op(axes).error_inputs("cpu"))


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", WAYS)
def test_every_error_input_is_refused_as_torch_refuses_it(name: str, axes: int) -> None:
    for error in error_inputs(axes):
        sample = error.sample_input
        with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever torch raises is the expectation
            TORCHS[axes](sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(type(theirs.value)) as ours, way(name):
            OURS[axes](sample.input, *sample.args, **sample.kwargs)
        assert isinstance(ours.value, error.error_type)
        assert len(str(ours.value)) > 20
        if isinstance(ours.value, adaptconv.errors.AdaptConvError):  # else torch itself was asked, and answered
            assert "got" in str(ours.value), "it says what came"


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("axes", AXES)
def test_a_layer_stands_in_for_torchs(name: str, axes: int) -> None:
    """Every ``module_db`` input: the state_dict moves over, and outputs and gradients are the same."""
    theirs_class = getattr(nn, f"Conv{axes}d")
    info = next(info for info in module_db if info.module_cls is theirs_class)
    inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=True)
    seen = 0
    for each in inputs:
        args, kwargs = each.constructor_input.args, each.constructor_input.kwargs
        theirs = theirs_class(*args, **kwargs)
        ours = getattr(adaptconv, f"AdaptiveConv{axes}d")(*args, **kwargs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        forward = each.forward_input
        try:
            with way(name):
                y = ours(*forward.args, **forward.kwargs)
        except BackendRejected:
            assert name in SELECTIVE
            seen += 1
            continue
        expected = theirs(*forward.args, **forward.kwargs)
        assert y.stride() == expected.stride()
        close(y, expected, torch.float32)
        dy = torch.randn_like(expected)
        with way(name):
            y.backward(dy)
        expected.backward(dy)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            close(p.grad, q.grad, torch.float32)
        seen += 1
    assert seen >= 4
