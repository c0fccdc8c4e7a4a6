"""Gates and separable blocks: against their formulas by hand, in every rank, and wherever a module goes."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv.attention import (
    ChannelAttention1d,
    ChannelAttention2d,
    ChannelAttention3d,
    DepthwiseSeparable1d,
    DepthwiseSeparable2d,
    DepthwiseSeparable3d,
    SpatialAttention1d,
    SpatialAttention2d,
    SpatialAttention3d,
)
from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.kernels import FixedTaps, Grid

CHANNEL: list[Any] = [ChannelAttention1d, ChannelAttention2d, ChannelAttention3d]
SPATIAL: list[Any] = [SpatialAttention1d, SpatialAttention2d, SpatialAttention3d]
SEPARABLE: list[Any] = [DepthwiseSeparable1d, DepthwiseSeparable2d, DepthwiseSeparable3d]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BATCH_NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
axes_of = pytest.mark.parametrize("axes", [1, 2, 3])


def data(*shape: int, **how: Any) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, **how)


# ---- channels ---------------------------------------------------------------------------------------


@axes_of
@pytest.mark.parametrize("max_pool", [False, True])
def test_channel_gate_by_hand(axes: int, max_pool: bool) -> None:
    gate = CHANNEL[axes - 1](12, 4, max_pool=max_pool, dtype=torch.float64)
    x = data(2, 12, *(5, 4, 3)[:axes])
    flat = x.flatten(2)

    def score(pooled: Tensor) -> Tensor:
        hidden = (pooled @ gate.fc1.weight.T + gate.fc1.bias).clamp(min=0)
        return hidden @ gate.fc2.weight.T + gate.fc2.bias

    expected = score(flat.mean(2)) + (score(flat.max(2).values) if max_pool else 0)
    expected = (flat / (1 + (-expected).exp())[:, :, None]).reshape(x.shape)
    torch.testing.assert_close(gate(x), expected)
    torch.testing.assert_close(gate(x[1]), expected[1])
    torch.testing.assert_close(gate(x[:1]), expected[:1])


@pytest.mark.parametrize(
    ("channels", "reduction", "least", "hidden"),
    [(64, 16, 1, 4), (64, 16, 8, 8), (4, 16, 1, 1), (4, 16, 8, 4), (33, 2, 1, 16)],
)
def test_the_hidden_width_has_a_floor(channels: int, reduction: int, least: int, hidden: int) -> None:
    gate = ChannelAttention2d(channels, reduction, least=least)
    assert gate.fc1.weight.shape == (hidden, channels)
    assert gate.fc2.weight.shape == (channels, hidden)
    assert gate(torch.randn(1, channels, 1, 1)).shape == (1, channels, 1, 1)


def test_one_position_is_its_own_mean_and_maximum() -> None:
    gate = ChannelAttention2d(6, 2, dtype=torch.float64)
    x = data(1, 6, 1, 1)
    score = gate.fc2(gate.fc1(x.flatten(1)).relu())
    torch.testing.assert_close(gate(x), x * score.sigmoid()[..., None, None])
    gate.max_pool = True
    torch.testing.assert_close(gate(x), x * (2 * score).sigmoid()[..., None, None])


def test_settings_of_the_linear_layers() -> None:
    gate = ChannelAttention1d(8, 2, bias=False, activation=nn.SiLU, dtype=torch.float64)
    assert sorted(gate.state_dict()) == ["fc1.weight", "fc2.weight"]
    x = data(3, 8, 5)
    expected = x * (F.silu(x.mean(2) @ gate.fc1.weight.T) @ gate.fc2.weight.T).sigmoid()[..., None]
    torch.testing.assert_close(gate(x), expected)
    assert repr(ChannelAttention2d(8, 4, max_pool=True)).startswith("ChannelAttention2d(\n  8, reduction=4, max_pool")


# ---- positions --------------------------------------------------------------------------------------


@axes_of
@pytest.mark.parametrize("kernel", ["ints", "grid", "taps"])
def test_spatial_gate_by_hand(axes: int, kernel: str) -> None:
    family = {
        "ints": 3, "grid": Grid(3, 2), "taps": FixedTaps.of(["101", "101/010", "101/010//010/111"][axes - 1]),
    }[kernel]  # fmt: skip
    gate = SPATIAL[axes - 1](family, dtype=torch.float64, bias=True)
    x = data(2, 5, *(7, 6, 5)[:axes])
    dense = gate.conv.kernel.dense()
    pooled = torch.stack([x.mean(1), x.max(1).values], 1)
    expected = x * CONV[axes](pooled, dense, gate.conv.bias, padding="same").sigmoid()
    torch.testing.assert_close(gate(x), expected)
    torch.testing.assert_close(gate(x[1]), expected[1])
    assert gate(x[:, :1, ...]).shape == x[:, :1].shape  # any number of channels


def test_the_spatial_gate_is_cbams_by_default() -> None:
    gate = SpatialAttention2d()
    assert {name: tuple(value.shape) for name, value in gate.state_dict().items()} == {"conv.weight": (1, 2, 7, 7)}


# ---- separable blocks -------------------------------------------------------------------------------


@axes_of
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["ints", "taps"])
def test_separable_block_by_hand(axes: int, stride: int, kernel: str) -> None:
    family: Any = 3 if kernel == "ints" else FixedTaps.of(["10101", "101/010/110", "111//010//001"][axes - 1])
    if kernel == "taps" and axes == 3:
        family = FixedTaps.of([[[1, 0, 1]] * 3, [[0, 1, 0]] * 3, [[1, 1, 0]] * 3])
    block = SEPARABLE[axes - 1](4, 6, family, stride, dtype=torch.float64)
    x = data(2, 4, *(9, 8, 7)[:axes])
    dense = block.depthwise.kernel.dense()
    pads = [extent // 2 for extent in dense.shape[2:]]
    middle = CONV[axes](x, dense, block.depthwise.bias, stride, pads, groups=4)
    expected = CONV[axes](middle, block.pointwise.weight, block.pointwise.bias)
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x[0]), expected[0])
    assert block(x).shape[2:] == tuple(-(-extent // stride) for extent in x.shape[2:])


@axes_of
def test_separable_block_with_everything_between(axes: int) -> None:
    block = SEPARABLE[axes - 1](
        4, 6, Grid(3, 2), norm=BATCH_NORM[axes], activation=nn.ReLU6, attention=CHANNEL[axes - 1]
    )
    assert [name for name, _ in block.named_children()] == [
        "depthwise", "depthwise_norm", "depthwise_activation", "attention", "pointwise", "norm", "activation",
    ]  # fmt: skip
    assert block.depthwise.bias is None and block.pointwise.bias is None
    x = torch.randn(2, 4, *(7,) * axes)
    expected = x
    for part in copy.deepcopy(block).children():
        expected = part(expected)
    torch.testing.assert_close(block(x), expected)
    assert isinstance(block[1:3], nn.Sequential) and len(block[1:3]) == 2
    assert block[0] is block.depthwise


def test_an_even_window_takes_torchs_same_and_explicit_padding() -> None:
    x = data(1, 3, 9)
    block = DepthwiseSeparable1d(3, 3, 4, dtype=torch.float64)
    assert block(x).shape == (1, 3, 9)
    with pytest.raises(ConvArgumentError, match=r"stride 2 needs a window that is odd .* got \(4,\); give the padding"):
        DepthwiseSeparable1d(3, 3, 4, 2)
    assert DepthwiseSeparable1d(3, 3, 4, 2, padding=1, dtype=torch.float64)(x).shape == (1, 3, 4)


# ---- all of them ------------------------------------------------------------------------------------

MODULES: dict[str, Any] = {
    "channel": lambda axes, **how: CHANNEL[axes - 1](4, 2, **how),
    "channel max": lambda axes, **how: CHANNEL[axes - 1](4, 2, max_pool=True, **how),
    "spatial": lambda axes, **how: SPATIAL[axes - 1](3, **how),
    "spatial taps": lambda axes, **how: SPATIAL[axes - 1](Grid(2, 3), **how),
    "separable": lambda axes, **how: SEPARABLE[axes - 1](4, 3, 3, 2, activation=nn.Tanh, attention=_smooth, **how),
}


def _smooth(channels: int) -> nn.Module:
    return nn.Identity()


module_of = pytest.mark.parametrize("name", MODULES)


@axes_of
@module_of
def test_gradients(name: str, axes: int) -> None:
    module = MODULES[name](axes, dtype=torch.float64)
    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.__class__ = nn.Tanh  # type: ignore[assignment]  # smooth where differences are taken
    x = data(1, 4, *(4, 3, 3)[:axes], requires_grad=True)
    names, values = zip(*module.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values))
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True)


@axes_of
@module_of
def test_a_checkpoint_and_a_copy_say_the_same(name: str, axes: int) -> None:
    module, fresh = MODULES[name](axes), MODULES[name](axes)
    x = torch.randn(2, 4, *(6,) * axes)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    assert not torch.equal(fresh(x), module(x))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x), module(x))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for value in other.parameters():
            value.zero_()
    assert torch.equal(fresh(x), module(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 4, 6, 5), (1, 4, 1, 1)], ids=str)
@module_of
def test_memory_format_is_kept(name: str, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    module = MODULES[name](2)
    x = torch.randn(shape).to(memory_format=layout)
    y = module(x)
    assert y.is_contiguous(memory_format=layout)
    if "separable" not in name and x.shape[2:] != (1, 1):  # strides of extents of one say nothing
        assert (y.shape, y.stride()) == (x.shape, x.stride())


@module_of
def test_an_empty_batch_stays_one(name: str) -> None:
    assert MODULES[name](2)(torch.randn(0, 4, 6, 5)).shape == ((0, 3, 3, 3) if name == "separable" else (0, 4, 6, 5))


@module_of
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_keeps_the_inputs_dtype_and_its_accuracy(name: str, dtype: torch.dtype) -> None:
    module, x = MODULES[name](2), torch.randn(2, 4, 6, 6, requires_grad=True)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.to(dtype))
    assert y.dtype is (torch.bfloat16 if name == "separable" else dtype)
    torch.testing.assert_close(y.float(), exact, atol=0.04, rtol=0.04)
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in module.parameters())


@pytest.mark.parametrize("name", ["channel max", "spatial taps", "separable"])
def test_compiled_whole_in_both_modes_and_exported(name: str) -> None:
    torch._dynamo.reset()
    module, x = MODULES[name](2), torch.randn(2, 4, 6, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(compiled(x), module(x))
        torch.testing.assert_close(compiled(x[0]), module(x[0]))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


# ---- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("ChannelAttention2d: channels must be an int of at least 1, got 0", {"channels": 0}),
        ("reduction must be an int of at least 1, got -2", {"channels": 4, "reduction": -2}),
        (r"reduction must be an int of at least 1, got 0\.25", {"channels": 4, "reduction": 0.25}),
        ("least must be an int of at least 1, got True", {"channels": 4, "least": True}),
    ],
)
def test_settings_that_do_not_fit(says: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        ChannelAttention2d(**arguments)


def test_inputs_that_do_not_fit() -> None:
    for gate in (ChannelAttention2d(4), SpatialAttention2d(3)):
        for shape in ((4, 5), (2, 4, 5, 5, 5), ()):
            with pytest.raises(ConvArgumentError, match=r"expected \[N, C, \*spatial\] .* 2 spatial axes, got shape"):
                gate(torch.randn(shape))
        with pytest.raises(ConvTypeError, match="input must be a tensor, got list"):
            gate([1.0])
    with pytest.raises(ConvArgumentError, match=r"made for 4 channels, got an input of shape \(2, 5, 3, 3\)"):
        ChannelAttention2d(4)(torch.randn(2, 5, 3, 3))
    with pytest.raises(ConvArgumentError, match="needs taps with 2 axes"):
        SpatialAttention2d(FixedTaps.of("101"))
    with pytest.raises(ValueError, match=r"groups|in_channels"):
        DepthwiseSeparable2d(0, 4, 3)


def test_gates_stand_in_a_model_and_learn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        DepthwiseSeparable2d(3, 8, Grid(3, 2), norm=nn.BatchNorm2d, activation=nn.ReLU, attention=ChannelAttention2d),
        ChannelAttention2d(8, 4, max_pool=True),
        SpatialAttention2d(Grid(3, 2)),
    )
    x, target = torch.randn(4, 3, 8, 8), torch.rand(8)[:, None, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
