"""``dilate`` writes a kernel with holes as a dense one: exactly, differentiably, in eager and in compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from adaptconv.errors import ConvArgumentError
from adaptconv.kernels import dilate

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
KERNELS: list[tuple[tuple[int, ...], int | tuple[int, ...], int | None]] = [
    ((4, 3, 5), 2, None),
    ((4, 3, 5), (3,), None),
    ((2, 3, 3, 3), 2, None),
    ((2, 3, 3, 4), (3, 2), None),
    ((2, 3, 1, 4), (3, 1), None),
    ((2, 1, 3, 2, 3), 2, None),
    ((2, 1, 2, 3, 2), (1, 4, 2), None),
    ((7,), 3, 1),
    ((3, 2), 2, 2),
    ((3, 2), (2, 5), None),
    ((5, 4, 3, 2), 2, 1),
    ((6, 5, 4, 3, 2), 2, 2),
    ((2, 2, 1, 1), 7, None),
    ((0, 3, 3, 3), 2, None),
    ((2, 3, 0, 3), 2, None),
]


def spread(weight: Tensor, dilation: int | tuple[int, ...], axes: int | None) -> Tensor:
    """The meaning, written by hand: one value after another."""
    axes = axes or (len(dilation) if isinstance(dilation, tuple) else weight.dim() - 2)
    steps = dilation if isinstance(dilation, tuple) else (dilation,) * axes
    lead, size = weight.shape[:-axes], weight.shape[-axes:]
    window = [max((extent - 1) * step + 1, 0) for extent, step in zip(size, steps, strict=True)]
    full = weight.detach().new_zeros(*lead, *window)
    for place in torch.cartesian_prod(*(torch.arange(extent) for extent in size)).reshape(-1, axes).tolist():
        full[(..., *(i * step for i, step in zip(place, steps, strict=True)))] = weight[(..., *place)].detach()
    return full


@pytest.fixture(params=[False, True], ids=["eager", "traced"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager way, or that of compiled code, both in eager mode."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int32])
@pytest.mark.parametrize(("shape", "dilation", "axes"), KERNELS, ids=str)
def test_every_value_lands_where_it_belongs(
    shape: Any, dilation: Any, axes: Any, dtype: torch.dtype, learnt: bool
) -> None:
    weight = torch.randint(1, 100, shape).to(dtype)
    weight.requires_grad_(learnt and dtype is not torch.int32)
    got = dilate(weight, dilation, axes=axes)
    assert got.dtype is dtype and got.requires_grad == weight.requires_grad
    assert torch.equal(got, spread(weight, dilation, axes))


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("shape", "dilation", "axes"), KERNELS[:-2], ids=str)
def test_gradients_of_first_and_second_order(shape: Any, dilation: Any, axes: Any) -> None:
    weight = torch.randn(tuple(min(extent, 3) for extent in shape), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: dilate(w, dilation, axes=axes), weight, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w: dilate(w, dilation, axes=axes).sin(), weight, fast_mode=True)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_dense_kernel_convolves_as_the_dilated_one(axes: int) -> None:
    x = torch.randn(2, 4, *(9,) * axes, dtype=torch.float64)
    weight = torch.randn(6, 2, *(3, 2, 3)[:axes], dtype=torch.float64)
    dilation = (2, 3, 2)[:axes]
    torch.testing.assert_close(
        CONV[axes](x, dilate(weight, dilation), groups=2), CONV[axes](x, weight, dilation=dilation, groups=2)
    )


def test_nothing_to_do_is_nothing_done() -> None:
    weight = torch.randn(2, 3, 3, 3)
    assert dilate(weight, 1) is weight
    assert dilate(weight, (1, 1)) is weight
    assert dilate(weight, 2).is_contiguous()
    assert dilate(weight.contiguous(memory_format=torch.channels_last), 2).is_contiguous()
    assert dilate(weight.requires_grad_(), 2).is_contiguous()
    with torch.no_grad():
        assert not dilate(weight, 2).requires_grad


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded", "channels_last", "conjugate"])
def test_views_of_any_strides(kind: str) -> None:
    weight = {
        "transposed": torch.randn(3, 4, 2, 5).permute(1, 3, 0, 2),
        "sliced": torch.randn(4, 6, 8, 8)[1:, ::2, 1:6:2, :5],
        "expanded": torch.randn(1, 1, 3, 1).expand(4, 2, 3, 3),
        "channels_last": torch.randn(4, 2, 3, 3).contiguous(memory_format=torch.channels_last),
        "conjugate": torch.randn(4, 2, 3, 3, dtype=torch.complex64).conj(),
    }[kind]
    before = weight.clone()
    assert torch.equal(dilate(weight, (2, 3)), spread(weight, (2, 3), None))
    learnt = weight.clone(memory_format=torch.preserve_format).requires_grad_()
    assert torch.equal(dilate(learnt, (2, 3)), dilate(weight, (2, 3)))
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("says", "shape", "dilation", "axes"),
    [
        (r"1 to 3 spatial axes, got 0 for a weight of shape \(3, 3\)", (3, 3), 2, None),
        ("1 to 3 spatial axes, got 4", (2, 2, 2, 2, 2, 2), 2, None),
        ("1 to 3 spatial axes, got 3 ", (3, 3), (2, 2, 2), None),
        ("1 to 3 spatial axes, got -1", (2, 3, 3), 2, -1),
        ("say which with axes=", (3,), 2, None),
        (r"dilation must be at least 1; got 0", (2, 2, 3, 3), 0, None),
        (r"dilation must be at least 1; got \(2, -1\)", (2, 2, 3, 3), (2, -1), None),
        (r"dilation must be an int or 2 ints", (2, 2, 3, 3), (2,), 2),
        (r"dilation must be an int or 2 ints", (2, 2, 3, 3), 2.5, None),
        (r"dilation must be an int or 2 ints", (2, 2, 3, 3), True, None),
    ],
)
def test_what_makes_no_sense_is_refused(says: str, shape: Any, dilation: Any, axes: Any) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        dilate(torch.randn(shape), dilation, axes=axes)


@pytest.mark.usefixtures("_way")
def test_tensors_without_values() -> None:
    assert dilate(torch.empty(4, 2, 3, 3, device="meta"), 2).shape == (4, 2, 5, 5)
    with FakeTensorMode():
        assert dilate(torch.empty(4, 2, 3, 3), (2, 3)).shape == (4, 2, 5, 7)
    traced = make_fx(lambda w: dilate(w, 2), tracing_mode="fake")(torch.randn(4, 2, 3, 3))
    weight = torch.randn(4, 2, 3, 3)
    assert torch.equal(traced(weight), dilate(weight, 2))


def test_function_transforms() -> None:
    weights = torch.randn(3, 2, 2, 3, 3, dtype=torch.float64)

    def energy(w: Tensor) -> Tensor:
        return dilate(w, 2).square().sum()

    assert torch.equal(torch.func.vmap(lambda w: dilate(w, 2))(weights), dilate(weights, 2, axes=2))
    assert torch.equal(torch.func.vmap(torch.func.grad(energy))(weights), 2 * weights)
    out, tangent = torch.func.jvp(lambda w: dilate(w, 2), (weights[0],), (weights[1],))
    assert torch.equal(out, dilate(weights[0], 2))
    assert torch.equal(tangent, dilate(weights[1], 2))
    hessian = torch.func.hessian(energy)(weights[0, 0])
    assert torch.equal(hessian.reshape(18, 18), 2 * torch.eye(18, dtype=torch.float64))


def test_compiled_whole_and_with_a_gradient() -> None:
    torch._dynamo.reset()
    weight = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(lambda w: dilate(w, (2, 3)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), dilate(weight, (2, 3)))
    dy = torch.randn(4, 2, 5, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(compiled(weight), weight, dy)
    assert torch.equal(gradient, dy[..., ::2, ::3])


class Dilated(nn.Module):
    """A convolution with its holes written out in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, dilate(self.weight, 2))


def test_export_keeps_the_result() -> None:
    model, x = Dilated().eval(), torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_freezing_folds_a_frozen_weight_to_a_constant() -> None:
    model, x = Dilated().eval(), torch.randn(1, 8, 9, 9)

    def kernels_of_the_weight() -> tuple[Tensor, int]:
        """The result, and how many generated kernels name the dilation's operators."""
        torch._dynamo.reset()
        result, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
        names = [line for line in "\n".join(code).splitlines() if "async_compile" in line and "=" in line]
        return result, sum("constant_pad" in name or "copy" in name for name in names)

    with torch.no_grad():
        plain, unfolded = kernels_of_the_weight()
        with torch._inductor.config.patch(freezing=True):
            frozen, folded = kernels_of_the_weight()
        torch.testing.assert_close(frozen, model(x))
        torch.testing.assert_close(plain, model(x))
    assert folded == 0 < unfolded
