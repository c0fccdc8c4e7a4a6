"""conv1d, conv2d, conv3d: what they accept, and what they say to what they cannot."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adaptconv
from adaptconv import BackendRejected, Kernel, TapPattern, pinned, records, trilinear
from adaptconv.backends import backend_named
from adaptconv.dispatch import current_pin
from adaptconv.errors import AdaptConvError, UnknownBackend, UnknownKnob
from adaptconv.problem import Direction

OURS: dict[int, Callable[..., Tensor]] = {1: adaptconv.conv1d, 2: adaptconv.conv2d, 3: adaptconv.conv3d}
TORCHS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ROOT = Path(__file__).resolve().parents[1]
RING = TapPattern.parse("111/101/111")
SPREAD = RING.spread_by(((0.5, 1.0), (1.0,)))

X = torch.randn(1, 4, 8, 8)
W = torch.randn(6, 2, 3, 3)
K = Kernel(torch.randn(6, 2, 8), RING)


def bad(name: str, says: str, *args: Any, axes: int = 2, kind: type[Exception] = RuntimeError, **kwargs: Any) -> Any:
    return pytest.param(axes, args, {"groups": 2, **kwargs}, kind, says, id=name)


# What is wrong, what the message must hold, the call. ``groups=2`` unless said otherwise.
BAD = [
    # shapes
    bad("input-rank-2", r"4-dimensional.*got shape \(8, 8\)", X[0, 0], W),
    bad("input-rank-5", r"4-dimensional.*got shape \(1, 1, 4, 8, 8\)", X[None], W),
    bad("weight-rank-3", r"\[C_out, C_in/groups, H, W\].*got shape \(6, 2, 3\)", X, W[..., 0]),
    bad("weight-rank-5", r"\[C_out, C_in/groups, H, W\]", X, W[..., None]),
    bad("weight-for-conv3d", r"\[C_out, C_in/groups, D, H, W\]", X[None], W, axes=3),
    bad("channels", r"expect an input with 4 channels, got 5", torch.randn(1, 5, 8, 8), W),
    bad("unbatched-channels", r"expect an input with 4 channels, got 3", torch.randn(3, 8, 8), W),
    bad("bias-length", r"shape \[6\].*got \(5,\)", X, W, torch.randn(5)),
    bad("bias-rank", r"shape \[6\].*got \(6, 1\)", X, W, torch.randn(6, 1)),
    bad("bias-scalar", r"shape \[6\].*got \(\)", X, W, torch.tensor(1.0)),
    bad("window-over-input", r"smaller than the kernel's window.*\(8, 8\).*\(17, 17\)", X, W, dilation=8),
    bad("taps-over-input", r"smaller than the kernel's window.*\(2, 2\).*\(3, 3\)", X[..., :2, :2], K),
    bad("taps-over-nothing", r"no axis of the input may be empty.*\(1, 4, 0, 8\)", X[:, :, :0], K, padding=2),
    bad("taps-of-another-rank", r"3 axes, got a pattern with window \(3, 3\)", X[None], K, axes=3),
    # groups
    bad("groups-zero", r"groups=0", X, W, groups=0),
    bad("groups-negative", r"groups=-1", X, W, groups=-1),
    bad("groups-not-dividing", r"divisible by groups=4", X, W, groups=4),
    bad("groups-over-outputs", r"at least 8", torch.randn(1, 16, 8, 8), W, groups=8),
    # dtypes
    bad("mixed", r"float32.*float64|same", X, W.double()),
    bad("mixed-bias", r"bias float64|same", X, W, torch.randn(6).double()),
    bad("mixed-taps", r"input float64, weight float32", X.double(), K),
    bad("integer-taps", r"float64, float32, bfloat16, float16; got int64", X.long(), Kernel(K.weight.long(), RING)),
    bad("complex-taps", r"got complex64", X.cfloat(), Kernel(K.weight.cfloat(), RING)),
    # devices
    bad("weight-on-meta", r"one device, got input on cpu, weight on meta", X, W.to("meta")),
    bad("bias-on-meta", r"one device.*bias on meta", X, W, torch.randn(6, device="meta")),
    bad("taps-on-meta", r"one device", X, Kernel(K.weight.to("meta"), RING)),
    # geometry
    bad("stride-zero", r"stride=0, expected at least 1", X, W, stride=0),
    bad("stride-negative", r"stride=\(1, -1\)", X, W, stride=(1, -1)),
    bad("stride-three", r"an int or 2 ints, got \(1, 1, 1\)", X, W, stride=(1, 1, 1)),
    bad("stride-none", r"got \(\)", X, W, stride=()),
    bad("dilation-zero", r"dilation=0", X, W, dilation=0),
    bad("padding-negative", r"padding=-1", X, W, padding=-1),
    bad("padding-word", r"'same' or 'valid', got 'full'", X, W, padding="full"),
    bad("same-strided", r"got stride=\(2, 2\)", X, W, padding="same", stride=2),
    bad("padding-pairs", r"2 pairs of ints >= 0, got \(\(1, 1\),\)", X, W, padding=((1, 1),)),
    bad("padding-negative-pair", r"pairs of ints >= 0", X, W, padding=((1, -1), (0, 0))),
    bad("dilated-taps", r"dilation 2 .* leave dilation at 1", X, K, dilation=2),
    # types: TypeError, as torch
    bad("input-list", r"input must be a tensor, got list", [1.0], W, kind=TypeError),
    bad("input-array", r"input must be a tensor, got ndarray", X.numpy(), W, kind=TypeError),
    bad("weight-none", r"weight must be a tensor.*got NoneType", X, None, kind=TypeError),
    bad("weight-array", r"weight must be a tensor.*got ndarray", X, W.numpy(), kind=TypeError),
    bad("bias-list", r"bias must be a tensor.*got list", X, W, [0.0] * 6, kind=TypeError),
    bad("stride-float", r"stride must be an int or 2 ints, got 1.5", X, W, kind=TypeError, stride=1.5),
    bad("stride-string", r"stride must be an int or 2 ints, got '2'", X, W, kind=TypeError, stride="2"),
    bad("stride-null", r"stride must be an int or 2 ints, got None", X, W, kind=TypeError, stride=None),
    bad("stride-bool", r"got \(True, 2\)", X, W, kind=TypeError, stride=(True, 2)),
    bad("dilation-floats", r"dilation must be .* got \(2.5, 1\)", X, W, kind=TypeError, dilation=(2.5, 1)),
    bad("padding-float", r"padding must be .* got 0.5", X, W, kind=TypeError, padding=0.5),
    bad("padding-mixed-pair", r"pairs of ints", X, W, kind=TypeError, padding=((0.5, 1), (0, 0))),
    bad("groups-float", r"groups must be an int, got 2.5", X, W, kind=TypeError, groups=2.5),
    bad("groups-string", r"groups must be an int, got '2'", X, W, kind=TypeError, groups="2"),
]  # fmt: skip


# Torch knows no taps, and takes tensors on meta with any others.
TORCHS_TOO = [p for p in BAD if not {"taps", "meta"} & set(p.id.split("-"))]


# Warm and unpinned is missing: what was prepared as torch's own call is torch's to refuse.
@pytest.mark.parametrize(
    ("way", "warm"), [(None, False), ("dense", False), ("dense", True), ("gather", False), ("gather", True)]
)
@pytest.mark.parametrize(("axes", "args", "kwargs", "kind", "says"), BAD)
def test_bad_input_is_told_what_was_expected_and_what_came(
    axes: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kind: type[Exception],
    says: str,
    way: str | None,
    warm: bool,
) -> None:
    with pinned(way) if way else nullcontext():
        if warm:  # a good call of nearly the same shape was prepared before
            adaptconv.conv2d(X, W, torch.randn(6), groups=2)
            adaptconv.conv2d(X, K, groups=2)
            adaptconv.conv2d(X, W, groups=2)
        with pytest.raises(kind, match=says) as caught:
            OURS[axes](*args, **kwargs)
    assert isinstance(caught.value, AdaptConvError)
    assert f"conv{axes}d" in str(caught.value)


@pytest.mark.parametrize(("axes", "args", "kwargs", "kind", "says"), TORCHS_TOO)
def test_torch_refuses_the_same_calls_with_the_same_kind_of_error(
    axes: int, args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Exception], says: str
) -> None:
    if isinstance(kwargs.get("padding"), tuple) and isinstance(kwargs["padding"][0], tuple):
        return  # pairs are adaptconv's own spelling
    with pytest.raises((RuntimeError, TypeError, ValueError)) as theirs:
        TORCHS[axes](*args, **kwargs)
    with pytest.raises(type(theirs.value)):
        OURS[axes](*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_a_dtype_without_plans_is_torchs_to_answer(dtype: torch.dtype) -> None:
    x, w = (torch.ones(1, 2, 5).to(dtype), torch.ones(2, 2, 3).to(dtype))

    def answer(conv: Callable[..., Tensor]) -> str:
        try:
            return str(conv(x, w))
        except RuntimeError as error:
            return str(error)

    assert answer(adaptconv.conv1d) == answer(F.conv1d)
    with pytest.raises(RuntimeError, match=f"got {str(dtype)[6:]}"), pinned("gather"):
        adaptconv.conv1d(x, w)


@pytest.mark.parametrize(
    ("says", "make"),
    [
        (r"tap \(3,\) lies outside its window \(3,\)", lambda: TapPattern(((0,), (3,)), (3,))),
        (r"tap \(-1,\) lies outside", lambda: TapPattern(((-1,),), (3,))),
        (r"tap \(1,\) appears more than once", lambda: TapPattern(((1,), (1,)), (3,))),
        (r"1 coordinates but the window \(3, 3\) has 2 axes", lambda: TapPattern(((1,),), (3, 3))),
        (r"at least one position each, got \(0,\)", lambda: TapPattern((), (0,))),
        (r"1 to 3 axes", lambda: TapPattern((), ())),
        (r"1 to 3 axes", lambda: TapPattern((), (1, 1, 1, 1))),
        (r"size must be .* got 0", lambda: TapPattern.grid(0)),
        (r"dilation must be .* got \(1,\)", lambda: TapPattern.grid((3, 3), (1,))),
        (r"size must be .* got True|size must be", lambda: TapPattern.grid((3, 2.5))),  # type: ignore[arg-type]
        (r"odd on every axis, got \(4,\)", lambda: TapPattern.partial(4, 1, 2)),
        (r"wing must be .* got -1", lambda: TapPattern.partial(3, -1, 2)),
        (r"rectangular", lambda: TapPattern.from_mask([[1, 0], [1]])),
        (r"rectangular", lambda: TapPattern.parse("101/11")),
        (r"cannot read tap pattern '3y3'", lambda: TapPattern.parse("3y3")),
        (r"cannot read tap pattern ''", lambda: TapPattern.parse("")),
        (r"cannot read tap pattern 'x'", lambda: TapPattern.parse("x")),
        (r"dilation must be", lambda: TapPattern.parse("3x3d2")),
        (r"different ranks", lambda: RING.union(TapPattern.grid(3))),
        (r"no common centre", lambda: RING.union(TapPattern.grid((2, 2)))),
        (r"T = 8 taps, got shape \(6, 2, 9\)", lambda: Kernel(torch.randn(6, 2, 9), RING)),
        (r"T = 8 taps, got shape \(6, 2, 3, 3\)", lambda: Kernel(W, RING)),
        (
            r"one filter an axis, of at least one value: expected 2, got \(\(1.0,\),\)",
            lambda: RING.spread_by(((1.0,),)),
        ),
        (r"at least one value", lambda: RING.spread_by(((1.0,), ()))),
        (r"must be finite", lambda: RING.spread_by(((1.0, math.nan), (1.0,)))),
        (r"already has a footprint", lambda: SPREAD.spread_by(((0.5, 1), (1,)))),
        (r"needs one footprint", lambda: SPREAD.union(RING)),
        (r"cannot be told apart", lambda: Kernel.from_dense(torch.randn(6, 2, 4, 3), SPREAD)),
        (r"cannot read the footprint '1,y'", lambda: TapPattern.parse("3*1,y")),
        (r"expected 2 filters", lambda: TapPattern.parse("3x3*1,2")),
        (r"weight window \(3, 2\) is not the taps' window \(3, 3\)", lambda: Kernel.from_dense(W[..., :2], RING)),
        (r"taps must be a TapPattern, got str", lambda: Kernel(torch.randn(6, 2, 3), "101")),  # type: ignore[arg-type]
        (r"weight must be a tensor, got list", lambda: Kernel([1.0], RING)),  # type: ignore[arg-type]
    ],
)
def test_a_pattern_or_kernel_that_makes_no_sense_is_refused(says: str, make: Callable[[], object]) -> None:
    with pytest.raises(AdaptConvError, match=says):
        make()


def test_an_unknown_backend_or_knob_names_the_known_ones() -> None:
    with pytest.raises(UnknownBackend, match=r"'fastest'; registered: native, dense"), pinned("fastest"):
        pass
    with pytest.raises(UnknownKnob, match=r"unknown knob 'color'; declared: layout, pad"), pinned("native", color=1):
        adaptconv.conv2d(X, W, groups=2)
    with pytest.raises(UnknownKnob, match=r"'workspace_mib' cannot be 7; declared"), pinned("gather", workspace_mib=7):
        adaptconv.conv2d(X, W, groups=2)
    with pytest.raises(UnknownKnob, match=r"cannot be '32'"), pinned("gather", workspace_mib="32"):
        adaptconv.conv2d(X, W, groups=2)


def test_a_rejection_says_who_why_what_and_what_to_do() -> None:
    with pytest.raises(BackendRejected) as caught, pinned("native"):
        adaptconv.conv2d(X, K, groups=2)
    message = str(caught.value)
    assert caught.value.backend == "native"
    assert "not one regular grid" in caught.value.reason
    assert all(part in message for part in ("native", caught.value.reason, "problem:", "explain", "8 taps"))


# ---- good input in every spelling -----------------------------------------------------------------


@pytest.mark.parametrize("way", [None, "native", "dense", "gather"])
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": [2, 1]},
        {"stride": (2,), "padding": [1]},
        {"stride": np.int64(2), "dilation": np.int32(2)},
        {"stride": (np.int64(1), 2), "padding": (np.int16(1), 0)},
        {"padding": torch.Size([1, 2])},
        {"padding": "same", "dilation": (2, 1)},
        {"padding": "valid", "stride": 3},
        {"groups": np.int64(2)},
        {"dilation": torch.tensor(2)},
    ],
    ids=str,
)
def test_every_spelling_torch_takes_is_taken(geometry: dict[str, Any], way: str | None) -> None:
    arguments = {"groups": 2, **geometry}
    for _ in range(2):  # cold, then warm
        with pinned(way) if way else nullcontext():
            ours = adaptconv.conv2d(X, W, **arguments)
        torch.testing.assert_close(ours, F.conv2d(X, W, **arguments))


def test_a_tensor_for_an_int_is_read_each_time() -> None:
    dilation = torch.tensor(2)
    with pinned("gather"):
        for value in (2, 3):
            dilation.fill_(value)
            ours = adaptconv.conv2d(X, W, dilation=dilation, groups=2)
            torch.testing.assert_close(ours, F.conv2d(X, W, dilation=value, groups=2))


@pytest.mark.parametrize("way", [None, "native", "dense", "gather"])
@pytest.mark.parametrize("pairs", [((1, 0), (0, 2)), ((0, 3), (1, 1)), [[2, 1], [0, 0]], ((0, 1), 2)], ids=str)
def test_uneven_padding_pads_each_side_for_itself(way: str | None, pairs: Any) -> None:
    flat = [zeros for pair in reversed(pairs) for zeros in (pair if not isinstance(pair, int) else (pair, pair))]
    x, w = X.double().requires_grad_(), W.double().requires_grad_()
    right = F.conv2d(F.pad(x, flat), w, groups=2)
    with pinned(way) if way else nullcontext():
        ours = adaptconv.conv2d(x, w, padding=pairs, groups=2)
    torch.testing.assert_close(ours, right)
    dy = torch.randn_like(right)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, w), dy), torch.autograd.grad(right, (x, w), dy))


@pytest.mark.parametrize("way", [None, "native", "dense", "gather"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_empty_batch_gives_an_empty_answer_and_zero_gradients(axes: int, way: str | None) -> None:
    x = torch.randn(0, 2, *(5,) * axes, requires_grad=True)
    w = torch.randn(3, 2, *(3,) * axes, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    with pinned(way) if way else nullcontext():
        y = OURS[axes](x, w, b, padding=1)
    assert y.shape == (0, 3, *(5,) * axes)
    y.sum().backward()
    assert w.grad is not None
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert not w.grad.any()


def test_no_taps_give_the_bias_and_no_channels_give_what_torch_gives() -> None:
    none = TapPattern.parse("000/000")
    b = torch.randn(3)
    y = adaptconv.conv2d(X, Kernel(torch.randn(3, 4, 0), none), b)
    torch.testing.assert_close(y, b[None, :, None, None].expand(1, 3, 7, 6))
    x = X.clone().requires_grad_()
    adaptconv.conv2d(x, Kernel(torch.randn(3, 4, 0, requires_grad=True), none)).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()
    nothing = torch.randn(1, 0, 8, 8), torch.randn(3, 0, 3, 3)
    assert torch.equal(adaptconv.conv2d(*nothing), F.conv2d(*nothing))


def test_meta_tensors_flow_through_every_backend() -> None:
    x, w = X.to("meta"), W.to("meta")
    for way in ("native", "dense", "gather"):
        with pinned(way):
            assert adaptconv.conv2d(x, w, groups=2, padding=1).shape == (1, 6, 8, 8)
    assert adaptconv.conv2d(x, Kernel(K.weight.to("meta"), RING), groups=2).is_meta


def test_a_view_of_a_larger_tensor_is_read_where_it_lies() -> None:
    whole = torch.randn(2, 8, 20, 20)
    x = whole[:, 1:5, 3:17:2]
    before = whole.clone()
    for way in ("native", "dense", "gather"):
        with pinned(way):
            torch.testing.assert_close(adaptconv.conv2d(x, W, groups=2), F.conv2d(x, W, groups=2))
    assert torch.equal(whole, before)


@pytest.mark.parametrize("way", ["dense", "gather"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", ["input", "weight", "both"])
@pytest.mark.parametrize("axes", [2, 3])
def test_memory_formats_are_torchs_in_the_answer_and_the_gradients(
    axes: int, last: str, dtype: torch.dtype, way: str
) -> None:
    """Torch keeps channels_last where its kernel for the dtype and sizes knows it, and only there."""
    memory_format = torch.channels_last if axes == 2 else torch.channels_last_3d
    for batch, groups, dilation in ((1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 1, 2)):
        x = torch.randn(batch, 4, *(6,) * axes).to(dtype)
        w = torch.randn(4, 4 // groups, *(2,) * axes).to(dtype)
        x = (x.contiguous(memory_format=memory_format) if last != "weight" else x).requires_grad_()
        w = (w.contiguous(memory_format=memory_format) if last != "input" else w).requires_grad_()
        theirs = TORCHS[axes](x, w, None, 1, 1, dilation, groups)
        with pinned(way):
            ours = OURS[axes](x, w, None, 1, 1, dilation, groups)
        assert ours.stride() == theirs.stride(), (batch, groups, dilation)
        dy = torch.randn_like(theirs)
        (mine,), (right,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
        assert mine.stride() == right.stride(), (batch, groups, dilation)


# ---- pins ----------------------------------------------------------------------------------------


def test_pins_nest_and_are_left_even_by_an_error() -> None:
    assert current_pin() is None
    with pinned("gather"):
        with pinned("dense", pad="explicit"):
            pin = current_pin()
            assert pin is not None
            assert pin.backend == "dense"
        with pytest.raises(ZeroDivisionError), pinned("native"):
            raise ZeroDivisionError
        pin = current_pin()
        assert pin is not None
        assert pin.backend == "gather"
    assert current_pin() is None


def test_a_pin_is_for_its_own_thread() -> None:
    seen: list[object] = []
    with pinned("dual"):  # which would reject a plain grid
        thread = threading.Thread(target=lambda: seen.extend((current_pin(), adaptconv.conv2d(X, W, groups=2))))
        thread.start()
        thread.join()
    assert seen[0] is None
    assert torch.equal(seen[1], F.conv2d(X, W, groups=2))  # type: ignore[arg-type]


def test_threads_convolving_at_once_agree() -> None:
    right = F.conv2d(X, W, groups=2)
    wrong: list[object] = []

    def work(way: str) -> None:
        for _ in range(20):
            with pinned(way):
                if not torch.allclose(adaptconv.conv2d(X, W, groups=2), right, atol=1e-5):
                    wrong.append(way)

    threads = [threading.Thread(target=work, args=(way,)) for way in ("native", "dense", "gather", "native")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


_ENDLESS = """
import torch, adaptconv
torch.set_num_threads(2)
CONVS = {1: adaptconv.conv1d, 2: adaptconv.conv2d, 3: adaptconv.conv3d}
LAST = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}
for dtype in (torch.bfloat16, torch.float16):
    for extents, kernel in (((55,), (17,)), ((3, 55), (3, 17)), ((2, 3, 55), (1, 3, 17))):
        for form in (torch.contiguous_format, LAST[len(extents)]):
            x = torch.randn(2, 4, *extents).to(dtype).contiguous(memory_format=form).requires_grad_()
            w = torch.randn(4, 1, *kernel).to(dtype).contiguous(memory_format=form).requires_grad_()
            conv = CONVS[len(extents)]
            right = conv(x.double(), w.double(), groups=4)
            exact = torch.autograd.grad(right, (x, w), torch.ones_like(right))
            for way in ("native", "dense", "gather", None):
                with adaptconv.pinned(way) if way else torch.enable_grad():
                    y = conv(x, w, groups=4)
                    found = torch.autograd.grad(y, (x, w), torch.ones_like(y))
                for got, want in zip((y, *found), (right, *exact)):
                    want = want.double()
                    assert (got.double() - want).norm() < 0.01 * want.norm(), (dtype, extents, form, way)
with adaptconv.pinned("native", route="grouped"):
    x, dy = torch.randn(1, 2, 70).half(), torch.randn(1, 2, 40).half()
    w = torch.randn(2, 1, 31).half().requires_grad_()
    adaptconv.conv1d(x, w, groups=2).backward(dy)
"""


def test_a_call_on_which_onednn_never_returns_is_answered() -> None:
    """Half-precision depthwise kernels 15 or more wide over few channels: torch's own call loops forever here, in
    bfloat16 in channels_last and in volumes, in float16 in any layout where the processor has instructions for it.
    """
    subprocess.run([sys.executable, "-c", _ENDLESS], check=True, timeout=120, cwd=ROOT)


_UNWRITTEN = """
import torch, adaptconv
torch.manual_seed(0)
for extents, kernel, step, groups in (
    ((20, 40), (3, 3), 2, 8), ((20, 29), (3, 5), (3, 1), 4), ((20, 40), (3, 3), 1, 8), ((3, 6, 6), (5, 3, 3), 1, 8)
):
    form = torch.channels_last if len(extents) == 2 else torch.channels_last_3d
    conv = {2: adaptconv.conv2d, 3: adaptconv.conv3d}[len(extents)]
    x = torch.randn(2, 8, *extents).bfloat16().contiguous(memory_format=form)
    w = torch.randn(8, 8 // groups, *kernel).bfloat16().contiguous(memory_format=form)
    way = {"padding": 2, "dilation": step, "groups": groups}
    dy = torch.randn_like(conv(x, w, **way))
    def gradient(x, w, dy):
        return torch.autograd.grad(conv(x, w.requires_grad_(), **way), w, dy)[0]
    right = gradient(x.double(), w.double(), dy.double())
    for name in ("native", "dense", None):
        with adaptconv.pinned(name) if name else torch.enable_grad():
            got = gradient(x, w.detach(), dy)
        assert (got.double() - right).norm() < 0.01 * right.norm(), (extents, name)
"""


def test_what_onednn_reads_unwritten_is_convolved_in_float32() -> None:
    """bfloat16 weight gradients of grouped dilated kernels in channels_last: torch's own call sums up free memory."""
    mess = {**os.environ, "MALLOC_PERTURB_": "170"}  # glibc fills what it gives out
    subprocess.run([sys.executable, "-c", _UNWRITTEN], check=True, timeout=120, cwd=ROOT, env=mess)


@pytest.mark.parametrize("way", ["native", "dense"])
def test_channels_last_where_extents_of_1_leave_the_strides_open(way: str) -> None:
    """Torch reads the layout off the strides: an input and a weight of which it does not think alike go wrong, on one
    thread.
    """
    threads = torch.get_num_threads()
    x = torch.randn(31, 27, 12, 1).permute(3, 2, 0, 1)
    w, dy = torch.randn(48, 2, 1, 1, requires_grad=True), torch.randn(1, 48, 31, 27)
    right = torch.autograd.grad(F.conv2d(x.double(), w.double(), groups=6), w, dy.double())[0]
    try:
        torch.set_num_threads(1)
        with adaptconv.pinned(way, layout="channels_last"):
            (got,) = torch.autograd.grad(adaptconv.conv2d(x, w, groups=6), w, dy)
    finally:
        torch.set_num_threads(threads)
    assert (got - right).norm() < 1e-5 * right.norm()


def test_flags_of_float32_that_differ_by_operation_are_no_error() -> None:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    x, w = torch.randn(1, 2, 9), torch.randn(3, 2, 3)
    right = F.conv1d(x, w)
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        for _ in range(2):
            torch.testing.assert_close(adaptconv.conv1d(x, w), right)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before  # type: ignore[attr-defined]


# ---- what Python costs --------------------------------------------------------------------------


def _recorded(x: Tensor, weight: Tensor, gain_us: float, native_us: float = 1e3) -> None:
    """Records of all three directions in which gather gains so much."""
    forward = trilinear.forward_problem(
        x, weight, TapPattern.grid((3,), (1,)), (1,), ((1, 1),), 1, False, "contiguous"
    )  # fmt: skip
    for direction in Direction:
        problem = forward.facing(direction)
        choice = backend_named("gather").default(problem)
        records.default_store().write(
            records.Record(
                key=problem.key(), backend=choice.backend, version=choice.version, config=dict(choice.config),
                p20_us=native_us - gain_us, median_us=native_us, p80_us=native_us, native_us=native_us, error=1e-7,
                native_error=1e-7, toolchain=records.toolchain(x.device), measured_on="2026-01-31",
            )
        )  # fmt: skip


@pytest.mark.parametrize(("gain_us", "infers", "trains"), [(1.0, "native", "native"), (20.0, "gather", "native"),
                                                           (60.0, "gather", "gather")])  # fmt: skip
def test_torchs_own_call_is_left_where_that_gains_what_python_costs(gain_us: float, infers: str, trains: str) -> None:
    layer, x = adaptconv.AdaptiveConv1d(4, 4, 3, padding=1, bias=False), torch.randn(1, 4, 20)
    _recorded(x, layer.weight, gain_us)
    with torch.no_grad():
        layer(x)
    assert layer.plans is not None and layer.plans.forward.choice.backend == infers
    y = layer(x.requires_grad_())
    plans = layer.plans
    assert [p.choice.backend for p in (plans.forward, plans.grad_input, plans.grad_weight) if p] == [trains] * 3
    if trains == "native" != infers:
        assert f"gain {3 * gain_us:.0f} us" in plans.forward.why and "of Python" in plans.forward.why
        assert plans.forward.record is None and plans.forward.gain_us == 0
    torch.testing.assert_close(y, F.conv1d(x, layer.weight, padding=1))


def test_taps_that_are_no_grid_leave_torchs_own_call_whatever_it_gains() -> None:
    layer, x = adaptconv.AdaptiveConv1d(4, 4, taps="1101", bias=False), torch.randn(1, 4, 20, requires_grad=True)
    layer(x)
    assert layer.plans is not None and layer.plans.forward.gain_us is None and not layer.plans.plain


def test_the_gradient_of_an_input_is_a_tensor_of_its_own() -> None:
    """Autograd adds up in place only what is nobody's view."""
    x, w = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(3, 4, 1, 1, requires_grad=True)
    with adaptconv.pinned("gather"):
        y = adaptconv.conv2d(x, w)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y._is_view() and not dx._is_view()


def test_an_inferred_result_is_a_tensor_of_its_own() -> None:
    x = torch.randn(2, 4, 6, 5)
    for size in (1, 3):
        layer = adaptconv.AdaptiveConv2d(4, 3, size)
        with adaptconv.pinned("gather"), torch.no_grad():
            y = layer(x)
        y.detach_().mul_(layer.bias[:, None, None])
