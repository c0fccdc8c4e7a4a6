"""The torch.compile backend: what is recognised, what is left alone, and that nothing changes value."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import compile_fx
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import adaptconv
from adaptconv import trilinear
from adaptconv.compile import inductor
from adaptconv.compile import rewrite as rewriting
from adaptconv.compile.optimize import NotOptimizable, collect_sites, log_of
from adaptconv.problem import Direction


@pytest.fixture
def uncompiled(monkeypatch):
    """Run rewritten graphs as they are: what is tested is the rewriting, and Inductor takes seconds."""
    monkeypatch.setattr("adaptconv.compile.inductor._missing_toolchain", lambda inputs: "a test asked for it")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs uncompiled")
        yield


class Dual(nn.Module):
    """A dense and a dilated depthwise convolution of one input, added: partially dilated by hand."""

    def __init__(self, bias=(True, True)):
        super().__init__()
        self.near = nn.Conv1d(8, 8, 5, padding=2, groups=8, bias=bias[0])
        self.far = nn.Conv1d(8, 8, 11, padding=10, dilation=2, groups=8, bias=bias[1])

    def forward(self, x):
        return self.near(x) + self.far(x)


class Net(nn.Module):
    """Every kind of site in one small network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.wide = nn.Conv2d(8, 8, 7, padding=9, dilation=3, groups=8)
        self.near = nn.Conv2d(8, 8, 3, padding="same")
        self.far = nn.Conv2d(8, 8, 3, padding=4, dilation=4, bias=False)
        self.holes = adaptconv.AdaptiveConv2d(8, 8, taps="101/010/101", padding=1, groups=8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.wide(x)
        return self.holes(self.near(x) + self.far(x))


def _agree(fast, plain, x, tolerance=2e-5):
    parameters = list(plain.parameters())
    ours, theirs = fast(x), plain(x)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(theirs)
    mine = torch.autograd.grad(ours, parameters, cotangent)
    reference = torch.autograd.grad(theirs, parameters, cotangent)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance * float(b.abs().max() + 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_network_keeps_its_values_and_gradients_through_inductor(dynamic):
    net, x = Net(), torch.randn(2, 3, 32, 32)
    fast = adaptconv.optimize(net, dynamic=dynamic)
    _agree(fast, net, x)
    if dynamic:
        _agree(fast, net, torch.randn(3, 3, 40, 28))
    assert log_of(fast).graphs >= 1


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("backend", ["dense", "gather"])
def test_every_site_can_be_served_by_a_pinned_backend(backend):
    net, x = Net(), torch.randn(2, 3, 32, 32)
    with adaptconv.pinned(backend):
        fast = adaptconv.optimize(net)
        _agree(fast, net, x)
    chosen = {row.backend for row in adaptconv.report(fast).rows}
    assert chosen == {backend}


@pytest.mark.usefixtures("uncompiled")
def test_channels_last_and_autocast_answer_as_torch_does():
    net, x = Net(), torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with adaptconv.pinned("dense"), torch.autocast("cpu", torch.bfloat16):
        ours = adaptconv.optimize(net)(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = net(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1, atol=0.1)


# ---- sums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.usefixtures("uncompiled")
def test_a_dual_sum_becomes_one_convolution_on_the_union_of_taps(bias):
    net, x = Dual(bias), torch.randn(2, 8, 64, requires_grad=True)
    (site, *rest) = collect_sites(net, (x,), train=True)
    assert site.kind == "sum of 2 convs"
    assert str(site.taps) == "101010101111101010101"
    assert len(rest) == 2
    with adaptconv.pinned("gather"):
        fast = adaptconv.optimize(net)
        _agree(fast, net, x)
    (row, *_) = adaptconv.report(fast).rows
    assert row.kind == "sum of 2 convs"
    assert row.rewritten


@pytest.mark.usefixtures("uncompiled")
def test_a_sum_of_three_with_uneven_windows_is_merged():
    weights = [torch.randn(4, 1, k, requires_grad=True) for k in (3, 5, 7)]

    def net(x):
        y = F.conv1d(x, weights[0], padding=1, groups=4)
        y = y + F.conv1d(x, weights[1], padding=2, groups=4)
        y += F.conv1d(x, weights[2], padding=9, dilation=3, groups=4)
        return y

    x = torch.randn(2, 4, 40)
    kinds = [site.kind for site in collect_sites(net, (x,), train=True)]
    assert kinds == ["sum of 3 convs", "conv", "conv", "conv"]
    with adaptconv.pinned("dense"):
        torch.testing.assert_close(adaptconv.optimize(net)(x), net(x), rtol=1e-5, atol=1e-5)


def _different_inputs(x, w, v):
    return F.conv1d(x, w, padding=1) + F.conv1d(x * 2, v, padding=2)


def _changed_between(x, w, v):
    x = x.clone()
    y = F.conv1d(x, w, padding=1)
    x.mul_(2)
    return y + F.conv1d(x, v, padding=2)


def _set_between(x, w, v):
    x = x.clone()
    y = F.conv1d(x, w, padding=1)
    x[:, 0] = 0
    return y + F.conv1d(x, v, padding=2)


def _added_to_between(x, w, v):
    x = x.clone()
    y = F.conv1d(x, w, padding=1)
    x.add_(1)
    return y + F.conv1d(x, v, padding=2)


def _incremented_between(x, w, v):
    x = x.clone()
    y = F.conv1d(x, w, padding=1)
    x += x
    return y + F.conv1d(x, v, padding=2)


def _weight_changed_between(x, w, v):
    w = w.clone()
    y = F.conv1d(x, w, padding=1)
    w.zero_()
    return y + F.conv1d(x, v, padding=2)


def _under_other_modes(x, w, v):
    with torch.no_grad():
        y = F.conv1d(x, w, padding=1)
    return y + F.conv1d(x, v, padding=2)


def _under_autocast(x, w, v):
    x, w, v = x.bfloat16(), w.bfloat16(), v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv1d(x, w, padding=1)
    return y + F.conv1d(x, v, padding=2)


def _used_elsewhere(x, w, v):
    y = F.conv1d(x, w, padding=1)
    return (y + F.conv1d(x, v, padding=2)) * y


def _different_strides(x, w, v):
    return F.conv1d(x, w, padding=1, stride=2) + F.conv1d(x, v, padding=2, stride=1)[..., ::2]


def _different_groups(x, w, v):
    return F.conv1d(x, w[:, :2], padding=1, groups=2) + F.conv1d(x, v, padding=2)


def _scaled_add(x, w, v):
    return torch.add(F.conv1d(x, w, padding=1), F.conv1d(x, v, padding=2), alpha=2)


def _with_itself(x, w, v):
    y = F.conv1d(x, w, padding=1)
    return y + y


def _subtracted(x, w, v):
    return F.conv1d(x, w, padding=1) - F.conv1d(x, v, padding=2)


def _broadcast(x, w, v):
    return F.conv1d(x, w, padding=1) + F.conv1d(x, v[:1], padding=2)


@pytest.mark.parametrize(
    "net",
    [
        _different_inputs, _changed_between, _set_between, _added_to_between, _incremented_between,
        _weight_changed_between, _under_other_modes, _under_autocast, _used_elsewhere,
        _different_strides, _different_groups, _scaled_add, _with_itself, _subtracted, _broadcast,
    ],
)  # fmt: skip
@pytest.mark.usefixtures("uncompiled")
def test_what_only_looks_like_a_sum_is_not_merged(net):
    x, w, v = torch.randn(2, 4, 33), torch.randn(4, 4, 3, requires_grad=True), torch.randn(4, 4, 5, requires_grad=True)
    assert all(site.kind == "conv" for site in collect_sites(net, (x, w, v), train=True))
    # the single convolutions are rewritten all the same, and the value stays
    theirs = net(x, w, v)
    rounding = 1e-4 if theirs.dtype == torch.float32 else 3e-2
    with adaptconv.pinned("dense"):
        torch.testing.assert_close(adaptconv.optimize(net)(x, w, v), theirs, rtol=rounding, atol=rounding)


@pytest.mark.usefixtures("uncompiled")
def test_windows_that_do_not_share_a_centre_still_merge_exactly():
    w, v = torch.randn(4, 1, 4), torch.randn(4, 1, 6)

    def net(x):  # even kernels: the taps sit off centre, each by its own padding
        return F.conv1d(x, w, padding=1, groups=4) + F.conv1d(x, v, padding=2, groups=4)

    x = torch.randn(2, 4, 30)
    assert collect_sites(net, (x,))[0].kind == "sum of 2 convs"
    with adaptconv.pinned("gather"):
        torch.testing.assert_close(adaptconv.optimize(net)(x), net(x), rtol=1e-5, atol=1e-5)


# ---- what is left alone --------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_native_plans_leave_the_graph_as_it_was():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    with adaptconv.pinned("native"):
        fast = adaptconv.optimize(conv)
        fast(torch.randn(2, 8, 16, 16))
    (report,) = log_of(fast).sites
    assert not report.rewritten
    assert report.reason == "native is the plan"


@pytest.mark.usefixtures("uncompiled")
def test_a_site_that_fails_is_left_and_said_once(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(rewriting, "judge", broken)
    conv, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 8, 8)
    with pytest.warns(RuntimeWarning, match="no such luck"):
        y = adaptconv.optimize(conv)(x)
    torch.testing.assert_close(y, conv(x))


@pytest.mark.parametrize("backend", [None, "native", "gather"])
@pytest.mark.usefixtures("uncompiled")
def test_zeros_padded_before_a_layer_of_ours_become_its_padding(backend, caplog):
    layer = adaptconv.AdaptiveConv2d(4, 4, 3, padding=1)
    net = nn.Sequential(nn.ZeroPad2d((2, 0, 1, 3)), layer)
    x = torch.randn(2, 4, 12, 12, requires_grad=True)
    with adaptconv.pinned(backend) if backend else nullcontext():
        fast = adaptconv.optimize(net)
        _agree(fast, net, x)
    (report,) = log_of(fast).sites
    assert report.rewritten
    assert report.problem.padding == ((2, 4), (3, 1))
    assert not [r for r in caplog.records if "does not fit" in r.message]


def test_a_rewritten_graph_that_does_not_compile_is_compiled_as_it_was(monkeypatch):
    """Here because what is changed in place later is let through: autograd would have kept a padded copy of it."""
    monkeypatch.setattr("adaptconv.compile.effects.Effects.changed_later", lambda *arguments: False)
    conv = nn.Conv2d(4, 4, 3)

    def net(x):
        x = x * 1
        y = conv(F.pad(x, (1, 1, 1, 1)))
        return y + F.relu_(x)

    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    fast = adaptconv.optimize(net)
    with adaptconv.pinned("dense"), pytest.warns(RuntimeWarning, match="did not compile"):
        y = fast(x)
    torch.testing.assert_close(y, net(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(net(x).sum(), x))
    (report,) = log_of(fast).sites
    assert not report.rewritten
    assert "did not compile" in report.reason


def test_a_backward_that_does_not_compile_costs_a_warning_and_not_the_step(monkeypatch):
    """Torch compiles it when it is first called, which is too late to go back to the graph as it was."""
    real, calls = compile_fx.compile_fx_backward, []

    def broken_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("no such luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_backward", broken_once)
    conv, x = nn.Conv2d(4, 4, 3, dilation=2), torch.randn(1, 4, 8, 8, requires_grad=True)
    fast = adaptconv.optimize(conv)
    with adaptconv.pinned("gather"), pytest.warns(RuntimeWarning, match="did not compile: .*no such luck"):
        y = fast(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(conv(x).sum(), x))
    assert len(calls) == 2
    (report,) = log_of(fast).sites
    assert not report.rewritten


@pytest.mark.parametrize(
    "pad", [lambda x: F.pad(x, (1, 1, 2, 2)), lambda x: F.pad(x, (0, 0, 0, 0)), lambda x: F.pad(x, (3, 3))]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_zeros_before_torchs_own_convolution_become_its_padding_and_it_stays_torchs(pad, dynamic):
    """An op of ours would part its backward, and Inductor could not pack its weights nor fold batch norm into it."""
    targets, reports = [], []

    def backend(gm, example_inputs):
        reports.extend(rewriting.rewrite(gm))
        targets.extend(node.target for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    conv = nn.Conv2d(4, 6, 3, padding=1, stride=2, dilation=2, groups=2)

    def net(x):
        return conv(pad(x)).relu()

    fast = torch.compile(net, backend=backend, dynamic=dynamic, fullgraph=True)
    with adaptconv.pinned("native"):
        for size in (12, 17) if dynamic else (12,):
            x = torch.randn(2, 4, size, 15, requires_grad=True)
            y = fast(x)
            torch.testing.assert_close(y, net(x), rtol=0, atol=1e-6)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(net(x).sum(), x))
    assert [target for target in targets if "conv" in str(target) or "pad" in str(target)] == [torch.conv2d]
    (report,) = reports
    assert report.rewritten and not report.dynamic


@pytest.mark.usefixtures("uncompiled")
def test_a_construction_that_cannot_be_looked_into_leaves_the_others(monkeypatch):
    def broken(cutting):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("adaptconv.compile.folding.probe", broken)
    near, far = nn.Conv2d(4, 4, 3), nn.Parameter(torch.randn(4, 4, 3, 3))

    def net(x):
        return near(F.conv2d(x, torch.kron(far, torch.eye(2))))

    x = torch.randn(1, 4, 12, 12)
    fast = adaptconv.optimize(net)
    with pytest.warns(RuntimeWarning, match="no such luck"):
        y = fast(x)
    torch.testing.assert_close(y, net(x))
    constructed, plain = log_of(fast).sites
    assert "no such luck" in constructed.note
    assert plain.problem is not None


@pytest.mark.usefixtures("uncompiled")
def test_transposed_integer_and_unbatched_convolutions_are_left_to_torch():
    w = torch.randn(4, 4, 3)

    def net(x):
        return F.conv_transpose1d(x, w).sum() + F.conv1d(x[0], w).sum()

    x = torch.randn(2, 4, 16)
    with adaptconv.pinned("dense"):
        torch.testing.assert_close(adaptconv.optimize(net)(x), net(x))
        transposed, unbatched = collect_sites(net, (x,))
    assert transposed.problem is None and unbatched.problem is None
    assert "transposed" in transposed.reason
    assert "unbatched" in unbatched.reason


def test_no_compiler_means_one_warning_and_right_results(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    conv, x = nn.Conv2d(4, 4, 3, padding=2, dilation=2), torch.randn(1, 4, 8, 8)
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler"):
        y = adaptconv.optimize(conv)(x)
    torch.testing.assert_close(y, conv(x))


# ---- optimize ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncompiled")
def test_optimize_takes_a_class_and_a_function_and_options():
    @adaptconv.optimize
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    small, x = Small(), torch.randn(1, 4, 9)
    torch.testing.assert_close(small(x), small.conv(x))
    assert log_of(small).graphs == 1
    assert set(small.state_dict()) == {"conv.weight", "conv.bias"}
    twin = copy.deepcopy(small)
    torch.testing.assert_close(twin(x), small(x))

    @adaptconv.optimize(dynamic=False)
    def function(x, w):
        return F.conv1d(x, w)

    w = torch.randn(2, 4, 3)
    torch.testing.assert_close(function(x, w), F.conv1d(x, w))
    assert len(adaptconv.report(function).rows) == 1


def test_optimize_refuses_what_it_cannot_compile():
    with pytest.raises(NotOptimizable, match="got int"):
        adaptconv.optimize(3)
    with pytest.raises(NotOptimizable, match="got type"):
        adaptconv.optimize(int)


def test_the_backend_is_registered_by_name():
    conv, x = nn.Conv1d(4, 4, 3), torch.randn(1, 4, 9)
    assert "adaptconv" in torch._dynamo.list_backends(exclude_tags=None)
    torch.testing.assert_close(torch.compile(conv, backend="adaptconv")(x), conv(x))


def test_collecting_sites_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    x = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    collect_sites(net, (x,), train=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert net.training


def test_sites_are_found_however_often_one_asks():
    """Dynamo compiles one piece of code a few times and then gives up: traces must not count."""
    x = torch.randn(1, 4, 16)
    found = [len(collect_sites(adaptconv.AdaptiveConv1d(4, 4, 3), (x,))) for _ in range(12)]
    assert found == [1] * 12
    net = nn.Sequential(nn.Conv1d(4, 4, 3))
    assert [len(collect_sites(net, (x,))) for _ in range(12)] == [1] * 12


@pytest.mark.usefixtures("uncompiled")
def test_every_one_of_many_instances_is_optimized():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

        def forward(self, x):
            return self.conv(x)

    x = torch.randn(1, 4, 16)
    with adaptconv.pinned("gather"):
        for _ in range(12):
            small = Small()
            fast = adaptconv.optimize(small)
            torch.testing.assert_close(fast(x), small(x), rtol=1e-4, atol=1e-4)
            assert next(row.backend for row in adaptconv.report(fast).rows) == "gather"
            del fast
    assert log_of(adaptconv.optimize(small)).graphs == 1  # compiled once, for all


def test_gradients_are_planned_only_where_training_asks():
    net, x = Net(), torch.randn(1, 3, 32, 32)
    assert not any(site.grad_input or site.grad_weight for site in collect_sites(net, (x,)))
    trained = {site.where: site for site in collect_sites(net, (x,), train=True) if site.kind == "conv"}
    assert not trained["stem"].grad_input  # its input is data
    assert trained["stem"].grad_weight
    assert trained["wide"].grad_input


# ---- plans in graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "dense", "gather"])
def test_a_plan_in_the_arguments_is_what_runs(backend):
    x, w = torch.randn(2, 4, 12, 12), torch.randn(4, 4, 9)
    with adaptconv.pinned(backend):
        plan = trilinear.plan_all(_problem(x, w), False, False).text
    assert plan.startswith(f"{backend}@")
    y = torch.ops.adaptconv.conv(x, w, None, "3x3d2x2", [1, 1], [2, 2, 2, 2], 1, plan)
    torch.testing.assert_close(y, F.conv2d(x, w.reshape(4, 4, 3, 3), padding=2, dilation=2), rtol=1e-4, atol=1e-4)


def _problem(x, w):
    from adaptconv.taps import TapPattern

    taps = TapPattern.parse("3x3d2x2")
    return trilinear.forward_problem(x, w, taps, (1, 1), ((2, 2), (2, 2)), 1, False, "contiguous")


def test_a_plan_text_reads_back_and_a_wrong_one_is_refused():
    x, w = torch.randn(2, 4, 12, 12), torch.randn(4, 4, 9)
    problem = _problem(x, w)
    plans = trilinear.plan_all(problem, True, True)
    again = trilinear.plans_from_text(problem, plans.text)
    assert [again.of(d).choice for d in Direction] == [plans.of(d).choice for d in Direction]
    for text in ("nonsense", "a|b", "native@1{}|-|-", "nobody@1{}|-|-", "native@1{layout=asis,pad=__import__}|-|-"):
        with pytest.raises(ValueError, match=r".+"):
            trilinear.plans_from_text(problem, text)


def test_an_opaque_plan_trains_through_inductor():
    """A plan in another layout than Inductor's runs out of its sight, forward and backward."""
    conv, x = nn.Conv2d(64, 64, 7, padding=9, dilation=3, groups=64), torch.randn(2, 64, 24, 24, requires_grad=True)
    with adaptconv.pinned("native", layout="contiguous", pad="explicit"):
        fast = adaptconv.optimize(conv)
        _agree(fast, conv, x)
    (report,) = log_of(fast).sites
    assert report.rewritten
    assert report.plans.forward.problem.layout == "channels_last"
    assert inductor.LOG_OPTION not in torch._inductor.list_options()


@pytest.mark.parametrize("train", [False, True])
def test_what_comes_before_gathered_columns_is_computed_once(train):
    """Not once for each tap that reads it, as Inductor would have it."""
    taps = 5
    model = nn.Sequential(nn.GELU(), nn.Conv1d(8, 8, taps, stride=2, padding=1)).train(train)
    x = torch.randn(2, 8, 64)
    with adaptconv.pinned("gather"), torch.set_grad_enabled(train), inductor_config.patch(force_disable_caches=True):
        _, code = run_and_get_code(adaptconv.optimize(model), x)
    assert 0 < sum(source.count("erf(") for source in code) < taps  # a loop and its remainder


SEEN = {
    "a slice": lambda x: F.gelu(x)[:, 2:],
    "one expanded": lambda x: x[:, :1].sin().expand(-1, 6, -1, -1),
    "turned": lambda x: F.gelu(x).transpose(2, 3),
    "written to": lambda x: x.clone()[:, 2:].mul_(2),
}


@pytest.mark.parametrize(("name", "padding"), [*((name, 0) for name in SEEN), ("a slice", 1)])
def test_gathered_columns_of_what_is_a_view_in_the_graph(name, padding):
    x = torch.randn(2, 8, 12, 13, requires_grad=True)
    conv = nn.Conv2d(SEEN[name](x).shape[1], 4, 3, padding=padding)

    def call(x):
        return conv(SEEN[name](x))

    with adaptconv.pinned("gather"), inductor_config.patch(force_disable_caches=True):
        found, expected = adaptconv.optimize(call)(x), call(x)
        torch.testing.assert_close(found, expected)
        operands, dy = (x, conv.weight, conv.bias), torch.randn_like(expected)
        ours = torch.autograd.grad(found, operands, dy)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, operands, dy), rtol=1e-4, atol=1e-4)


def test_an_exported_gather_reads_inputs_of_any_strides():
    layer = adaptconv.adapt(nn.Sequential(nn.Conv2d(4, 4, 3)))
    x = torch.randn(2, 4, 9, 9)
    with adaptconv.pinned("gather"), torch.no_grad():
        program = torch.export.export(layer, (x,)).module()
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(program(turned), program(x))
