"""Half precision on a CPU: computed in float32 where torch has no kernel for it, or one that goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptconv
from adaptconv import dispatch, trilinear
from adaptconv.backends import Config, backend_named, halves
from adaptconv.backends.native import is_plain
from adaptconv.compile.judging import judge
from adaptconv.compile.optimize import collect_sites
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern
from tests.cases import CPU

ROOT = Path(__file__).parents[1]
HERE = Device.of(CPU)
HOLES = "101/010/101"
CASES = {
    "full": ("3x3", 1), "dilated": ("3x3d2x2", 1), "depthwise": ("5x5", 8), "holes": (HOLES, 1),
    "depthwise holes": (HOLES, 8), "spread": ("3x3d2x2*0.5,1,0.5x0.5,1,0.5", 1),
}  # fmt: skip


def problem(
    name: str = "full", dtype: str = "float16", direction: Direction = Direction.FORWARD, layout: str = "contiguous"
) -> Problem:
    text, groups = CASES[name]
    taps = TapPattern.parse(text)
    return Problem(
        direction, 2, 8, 8, groups, (14, 15), taps, (1, 1), ((1, 1), (1, 1)), dtype, layout, HERE
    )  # fmt: skip


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A processor that has instructions for half precision, and one that has not."""
    monkeypatch.setattr(halves, "has_kernels", lambda dtype: request.param)
    dispatch._MEMO.clear()
    yield request.param
    dispatch._MEMO.clear()


# ---- the knob ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "dense", "gather", "dual", "factored"])
def test_half_precision_on_a_cpu_may_be_computed_in_float32_and_nothing_else_may(name: str) -> None:
    backend = backend_named(name)
    here = problem({"dual": "holes", "factored": "spread"}.get(name, "full"))
    assert backend.rejects(here) is None

    def values(p: Problem) -> list[object]:
        return [value for knob in backend.space(p).knobs if knob.name == "compute" for value in knob.values]

    assert values(here) == values(replace(here, dtype="bfloat16")) == ["asis", "float32"]
    assert "compute=asis" in str(backend.default(here))
    for other in (
        replace(here, dtype="float32"), replace(here, dtype="float64"), replace(here, fp32_precision="conv-bf16"),
        replace(here, device=Device("cuda", "a card", 0)),
    ):  # fmt: skip
        assert values(other) == []


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "case"),
    [("native", "full"), ("native", "depthwise"), ("dense", "holes"), ("gather", "holes"), ("factored", "spread")],
)
def test_it_is_the_float32_answer_rounded_once(name: str, case: str, dtype: str, direction: Direction) -> None:
    here = problem(case, dtype, direction)
    x, w, dy = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(here.torch_dtype)
        for i, shape in enumerate((here.input_shape, here.weight_shape, here.output_shape))
    )
    a, b = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[direction]
    backend, bias = backend_named(name), torch.ones(8) if direction is Direction.FORWARD else None
    wide = replace(here, dtype="float32")
    right = backend.run(wide, backend.default(wide).config, a.float(), b.float(), bias)
    config = backend.space(here).complete({"compute": "float32"})
    half_bias = None if bias is None else bias.to(here.torch_dtype)
    assert torch.equal(backend.run(here, config, a, b, half_bias), right.to(here.torch_dtype))


# ---- what is predicted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("case", ["full", "dilated", "depthwise", "holes"])
def test_torchs_loops_are_left_where_it_has_no_kernel(
    kernels: bool, case: str, direction: Direction, dtype: str
) -> None:
    here = replace(problem(case, dtype, direction), batch=16, c_in=64, c_out=64)
    here = replace(here, groups=64 if here.groups > 1 else 1, spatial=(56, 56))
    chosen = dispatch.plan_from_costs(here).choice
    in_loops = chosen.config.get("compute") == "asis" and not (kernels and chosen.backend == "gather")
    if not kernels:  # cpp has float32 sums of its own
        assert not in_loops, chosen
    if kernels and dtype == "float16" and direction is Direction.GRAD_WEIGHT:
        assert not in_loops, chosen
    if kernels and dtype == "bfloat16" and case == "full":
        assert chosen == backend_named("native").default(here)


def test_a_prediction_in_float32_is_that_of_float32_and_of_converting() -> None:
    pairs = {"native": "full", "dense": "holes", "gather": "holes", "dual": "holes", "factored": "spread"}
    for name, case in pairs.items():
        backend, here = backend_named(name), problem(case)
        wide = replace(here, dtype="float32")
        alone = backend.cost(wide, backend.default(wide).config)
        converted = backend.cost(here, backend.space(here).complete({"compute": "float32"}))
        assert alone < converted < alone + 10, name


# ---- flags ------------------------------------------------------------------------------------------------


def test_float32_that_is_set_to_be_bfloat16_is_no_way_to_compute_float16() -> None:
    flags = torch.backends.mkldnn.conv
    before = flags.fp32_precision  # type: ignore[attr-defined]
    x, w = torch.randn(1, 4, 9, 9).half(), torch.randn(4, 4, 3, 3).half()
    with adaptconv.pinned("native", compute="float32"):
        adaptconv.conv2d(x, w)
        try:
            flags.fp32_precision = "bf16"  # type: ignore[attr-defined]
            assert fp32_precision(torch.float16, CPU) == "conv-bf16"
            assert fp32_precision(torch.float32, CPU) == "conv-bf16"
            assert fp32_precision(torch.bfloat16, CPU) == "ieee"
            with pytest.raises(adaptconv.errors.UnknownKnob, match="unknown knob 'compute'"):
                adaptconv.conv2d(x, w)
            adaptconv.conv2d(x.bfloat16(), w.bfloat16())
        finally:
            flags.fp32_precision = before  # type: ignore[attr-defined]
        assert fp32_precision(torch.float32, CPU) == fp32_precision(torch.float16, CPU) == "ieee"
        adaptconv.conv2d(x, w)


# ---- what torch gets wrong --------------------------------------------------------------------------------


def wide_kernel(dtype: str, layout: str = "contiguous", axes: int = 2) -> Problem:
    taps = TapPattern.grid((*(1,) * (axes - 1), 17))
    spatial = (*(2,) * (axes - 1), 60)
    return Problem(
        Direction.FORWARD, 1, 4, 4, 4, spatial, taps, (1,) * axes, ((0, 0),) * axes, dtype, layout, HERE
    )  # fmt: skip


def test_what_never_returns_is_known_by_dtype_and_format(kernels: bool) -> None:
    plain, last = torch.contiguous_format, torch.channels_last
    for dtype, form, axes, endless in (
        ("float16", plain, 2, kernels), ("float16", last, 2, kernels), ("float16", plain, 1, kernels),
        ("bfloat16", plain, 2, False), ("bfloat16", last, 2, True), ("bfloat16", None, 2, True),
        ("bfloat16", plain, 3, True), ("float32", last, 2, False),
    ):  # fmt: skip
        assert halves.never_returns(wide_kernel(dtype, axes=axes), form) is endless, (dtype, form, axes)
    assert not halves.never_returns(replace(wide_kernel("bfloat16"), c_in=17, c_out=17, groups=17))
    adjoint = replace(wide_kernel("bfloat16"), direction=Direction.GRAD_INPUT)
    assert not halves.never_returns(adjoint) and halves.never_returns(adjoint.adjoint())  # type: ignore[arg-type]


def test_what_is_unsound_in_some_layout_is_no_plain_call_in_any() -> None:
    here = wide_kernel("bfloat16")
    assert not is_plain(here, backend_named("native").default(here))
    narrow = replace(here, taps=TapPattern.grid((1, 13)))
    assert is_plain(narrow, backend_named("native").default(narrow))


class Thin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, (3, 17), padding="same", groups=8)
        self.far = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.all = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all(self.far(self.wide(x)))


def test_a_graph_is_not_left_with_a_call_that_a_compiler_would_make_unsound() -> None:
    """Inductor convolves in channels_last, whatever the operands' format: there the first never returns, and the
    second's weight gradient reads what nothing wrote.
    """
    model, x = Thin().bfloat16(), torch.randn(2, 8, 8, 40).bfloat16()
    for train, expected in ((False, [True, False, False]), (True, [True, True, False])):
        verdicts = [judge(site)[1] for site in collect_sites(model, (x,), train=train)]
        assert [verdict.rewritten for verdict in verdicts] == expected, train


_COMPILED = """
import torch, adaptconv
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(2)
model = nn.Sequential(nn.Conv2d(8, 8, (3, 17), padding="same", groups=8), nn.ReLU()).bfloat16()
x = torch.randn(2, 8, 8, 40).bfloat16()
exact = nn.Sequential(*[m for m in model]).double()(x.double())
model = model.bfloat16()
with torch.no_grad():
    got = adaptconv.optimize(model)(x)
assert (got.double() - exact).norm() < 0.01 * exact.norm()
"""


def test_a_compiled_graph_returns_where_torchs_own_does_not() -> None:
    subprocess.run([sys.executable, "-c", _COMPILED], check=True, timeout=300, cwd=ROOT)


_WITHOUT = """
import torch, adaptconv
from adaptconv.backends import halves
assert not halves.has_kernels("float16") and not halves.has_kernels("bfloat16")
for dtype in (torch.float16, torch.bfloat16):
    x, w = torch.randn(4, 64, 32, 32).to(dtype).requires_grad_(), torch.randn(64, 64, 3, 3).to(dtype).requires_grad_()
    y = adaptconv.conv2d(x, w, padding=1)
    y.sum().backward()
    plans = adaptconv.explain(adaptconv.AdaptiveConv2d(64, 64, 3, padding=1).to(dtype), x.detach())
    assert "native@1{compute=float32" in plans, plans
    exact = torch.conv2d(x.double(), w.double(), padding=1)
    assert (y.double() - exact).norm() < 0.005 * exact.norm()
"""


def test_a_torch_without_onednn_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not halves.has_kernels.__wrapped__("float16") and not halves.has_kernels.__wrapped__("bfloat16")


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="oneDNN's ISAs of x86")
def test_a_processor_without_instructions_for_it_computes_in_float32() -> None:
    """oneDNN can be told to do as an older processor has to."""
    older = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", _WITHOUT], check=True, timeout=120, cwd=ROOT, env=older)


def test_it_goes_through_autocast_and_double_backward(kernels: bool) -> None:
    x = torch.randn(2, 8, 9, 9).div_(8).requires_grad_()  # so that nothing grows beyond float16
    w = torch.randn(8, 8, 3, 3).div_(8).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16), adaptconv.pinned("native", compute="float32"):
        y = adaptconv.conv2d(x, w)
        assert y.dtype is torch.float16
        exact = F.conv2d(x.half().double(), w.half().double())
        assert (y.double() - exact).norm() < 1e-3 * exact.norm()
        (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        (ddw,) = torch.autograd.grad(dx.square().sum(), w)
    truth = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(F.conv2d(*truth).square().sum(), truth[0], create_graph=True)
    (want,) = torch.autograd.grad(dx.square().sum(), truth[1])
    assert (ddw.double() - want).norm() < 0.01 * want.norm()


def test_configurations_name_it_in_plans_and_plans_are_read_back() -> None:
    here = problem()
    plan = dispatch.plan_from_choice(
        here, dispatch.Choice.parse("native@1{compute=float32,layout=asis,pad=implicit}"), dispatch.Source.PINNED, ""
    )
    assert not plan.plain and plan.choice.config == Config(compute="float32", layout="asis", pad="implicit")
    plans = trilinear.Plans(plan)
    assert trilinear.plans_from_text(here, plans.text).forward.choice == plan.choice
