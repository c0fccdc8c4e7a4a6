"""The whole networks of the benchmark: they build, run, and have the convolutions that their papers say."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adaptconv
from adaptconv.kernels import LearnableSpacing
from benchmarks import nets
from benchmarks.zoo import NETWORKS, Network, hub, papers, sequences, variants

Made = Callable[[], nn.Module]
Kind = tuple[tuple[int, ...], tuple[int, ...], bool]  # kernel, dilation, depthwise
PICTURE = (1, 3, 64, 64)

PAPERS: dict[str, tuple[Made, tuple[int, ...], tuple[int, ...]]] = {
    "replknet": (lambda: papers.RepLKNet((4, 4, 8, 8), (1, 1, 1, 1), classes=5), PICTURE, (1, 5)),
    "van": (lambda: papers.VAN((4, 4, 8, 8), (1, 1, 1, 1), (2, 2, 2, 2), classes=5), PICTURE, (1, 5)),
    "conv-tasnet": (lambda: sequences.ConvTasNet(8, 4, 8, blocks=4, stacks=2), (2, 1, 160), (2, 2, 160)),
    "wavenet": (lambda: sequences.WaveNet(4, 6, 10, blocks=4, stacks=2), (1, 1, 60), (1, 10, 60)),
    "uxnet3d": (lambda: sequences.UXNetEncoder((2, 2, 4, 4)), (1, 1, 32, 32, 32), (1, 4, 2, 2, 2)),
}
HUB: dict[str, tuple[Made, tuple[int, ...], tuple[int, ...]]] = {
    "hf-convnext": (lambda: hub.convnext((1, 1, 1, 1), (8, 8, 16, 16)), PICTURE, (1, 100)),
    "hf-mobilenetv2-os8": (lambda: hub.mobilenet_v2_segmenter(0.35, 64), PICTURE, (1, 21, 8, 8)),
    "hf-segformer": (lambda: hub.segformer((1, 1, 1, 1), (8, 16, 40, 64), 16), PICTURE, (1, 21, 16, 16)),
    "hf-mobilevit-os8": (lambda: hub.mobilevit_segmenter(64), PICTURE, (1, 21, 8, 8)),
    "hf-hifigan": (lambda: hub.hifigan(32, 8), (1, 6, 8), (1, 6 * 256)),
    "hf-conformer": (lambda: hub.conformer(1, 32, 16), (1, 3200), (1, 9, 32)),
}
HAVE_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAVE_TRANSFORMERS, reason="the transformers package is not installed")
EVERY = [pytest.param(name, id=name) for name in PAPERS] + [
    pytest.param(name, id=name, marks=needs_transformers) for name in HUB
]


def _tiny(name: str) -> tuple[nn.Module, Tensor, tuple[int, ...]]:
    make, shape, answer = {**PAPERS, **HUB}[name]
    torch.manual_seed(1)
    return make().double().eval(), torch.randn(shape, dtype=torch.float64), answer


def _convolutions(model: nn.Module) -> Counter[Kind]:
    kinds: Counter[Kind] = Counter()
    for m in model.modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kinds[tuple(m.kernel_size), tuple(m.dilation), m.groups == m.in_channels > 1] += 1
    return kinds


@pytest.mark.parametrize("name", EVERY)
def test_it_runs_and_adapting_keeps_its_outputs(name: str) -> None:
    model, x, shape = _tiny(name)
    adapted = adaptconv.adapt(copy.deepcopy(model))
    layers = [m for m in adapted.modules() if isinstance(m, adaptconv.AdaptiveConv1d | adaptconv.AdaptiveConv2d
                                                         | adaptconv.AdaptiveConv3d)]  # fmt: skip
    assert len(layers) == sum(_convolutions(model).values()) > 4
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(adapted(x), y, rtol=1e-9, atol=1e-10)
    assert tuple(y.shape) == shape and y.isfinite().all() and y.std() > 1e-3


@pytest.mark.parametrize("name", PAPERS)
def test_every_parameter_learns(name: str) -> None:
    model, x, _ = _tiny(name)
    model(x).square().mean().backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still


def test_replknet_has_its_four_kernels_and_a_5x5_beside_each() -> None:
    kinds = _convolutions(papers.RepLKNet((4, 4, 8, 8), (1, 2, 3, 1)))
    for kernel, depth in ((31, 1), (29, 2), (27, 3), (13, 1)):
        assert kinds[(kernel, kernel), (1, 1), True] == depth
    assert kinds[(5, 5), (1, 1), True] == 7


def test_van_takes_a_21x21_field_apart() -> None:
    kinds = _convolutions(papers.VAN((4, 4, 8, 8), (1, 2, 3, 1)))
    assert kinds[(5, 5), (1, 1), True] == kinds[(7, 7), (3, 3), True] == kinds[(3, 3), (1, 1), True] == 7


def test_conv_tasnet_doubles_its_dilation_in_every_stack() -> None:
    kinds = _convolutions(sequences.ConvTasNet(8, 4, 8, blocks=5, stacks=3))
    assert {dilation: n for ((k,), (dilation,), dw), n in kinds.items() if dw} == dict.fromkeys((1, 2, 4, 8, 16), 3)
    assert all(k == 3 for (k,), _, dw in kinds if dw)


def test_wavenet_doubles_its_dilation_and_sees_no_later_sample() -> None:
    model = sequences.WaveNet(4, 6, 10, blocks=5, stacks=2).double()
    found = {dilation: n for ((k,), (dilation,), _), n in _convolutions(model).items() if k == 2}
    assert found == dict.fromkeys((1, 2, 4, 8, 16), 2)
    x = torch.randn(1, 1, 80, dtype=torch.float64)
    changed = x.clone()
    changed[..., 50:] += 1
    before, after = model(x), model(changed)
    torch.testing.assert_close(after[..., :50], before[..., :50])
    assert not torch.allclose(after[..., 50:], before[..., 50:])


def test_uxnet_is_depthwise_with_7x7x7_and_scales_each_channel_by_itself() -> None:
    kinds = _convolutions(sequences.UXNetEncoder((2, 2, 4, 4), (1, 2, 1, 1)))
    assert kinds[(7, 7, 7), (1, 1, 1), True] == 5
    scaling = [m for m in sequences.UXNetEncoder((2, 2, 4, 4)).modules() if isinstance(m, sequences.UXBlock)]
    assert all(m.widen.groups == m.narrow.groups == m.depthwise.in_channels for m in scaling)


@needs_transformers
def test_the_hub_models_have_the_convolutions_they_are_there_for() -> None:
    found = {name: _convolutions(HUB[name][0]()) for name in HUB}
    assert found["hf-convnext"][(7, 7), (1, 1), True] == 4
    dilations = {dilation[0] for (_, dilation, dw) in found["hf-mobilenetv2-os8"] if dw}
    assert dilations == {1, 2, 4}  # output stride 8: dilation in place of the last two strides
    assert found["hf-segformer"][(3, 3), (1, 1), True] == 4
    assert {d[0] for (_, d, _) in found["hf-mobilevit-os8"]} >= {6, 12, 18}
    assert {(k[0], d[0]) for (k, d, _) in found["hf-hifigan"]} >= {(k, d) for k in (3, 7, 11) for d in (1, 3, 5)}
    assert found["hf-conformer"][(31,), (1,), True] == 1


def test_convnext_dcls_has_learnt_positions_that_adapting_keeps() -> None:
    pytest.importorskip("DCLS")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package, about extensions it would like
        model = papers.convnext_dcls((4, 4, 8, 8), window=9, count=5).double().eval()
        positions = [p for name, p in model.named_parameters() if name.endswith(".P")]
        assert len(positions) == 4 and all(p.shape[0] == 2 and p.abs().max() > 2 for p in positions)
        x = torch.randn(PICTURE, dtype=torch.float64)
        with torch.no_grad():
            y = model(x)
            adapted = adaptconv.adapt(copy.deepcopy(model))
            torch.testing.assert_close(adapted(x), y, rtol=1e-7, atol=1e-9)
    spaced = [m for m in adapted.modules() if isinstance(getattr(m, "family", None), LearnableSpacing)]
    assert len(spaced) == 4 and all(m.groups == m.in_channels for m in spaced)


def test_a_network_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    (first, (x,)), (second, (again,)) = NETWORKS["wavenet"].build(), NETWORKS["wavenet"].build()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x, again) and not first.training
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_variants_follow_rank_and_purpose() -> None:
    assert variants.names_for(NETWORKS["van"], "forward") == [*variants.TORCH, *variants.OURS]
    assert "channels_last" not in variants.names_for(NETWORKS["wavenet"], "forward")
    assert not any("freezing" in name for name in variants.names_for(NETWORKS["van"], "training step"))


def test_the_error_is_relative_and_never_hides_what_is_not_finite() -> None:
    truth = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    assert variants.error(truth, truth) == 0
    off = [torch.tensor([3.0, 4.5]), torch.ones(1)]
    assert math.isclose(variants.error(off, truth), 0.1, rel_tol=1e-6)
    assert variants.error([torch.tensor([3.0, math.nan]), torch.ones(1)], truth) == math.inf
    assert variants.error([off[0], torch.tensor([math.nan])], truth) == math.inf


def test_the_file_keeps_what_other_runs_measured_and_the_chart_is_drawn_from_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, chart = tmp_path / "nets.json", tmp_path / "nets.png"
    facts: dict[str, object] = {"device": "a test", "toolchain": {"torch": "0"}, "adaptconv": "0"}
    times = {"eager": 3.0, "compile": 2.0, "adapt": 1.5, "optimize": 1.0}
    nets._write(out, facts, [nets.Row("van", "VAN", "forward", times, grouped=0.4)], add=True)
    nets._write(out, facts, [nets.Row("wavenet", "WaveNet", "forward", {"eager": 1.0})], add=True)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["network"], row["ratio"], row["compile_ratio"]) for row in rows] == [
        ("van", 2.0, 2.0), ("wavenet", None, None),
    ]  # fmt: skip
    assert nets.main(["--draw", str(out), "--chart", str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_bad_error_or_a_variant_of_ours_that_fails_is_wrong() -> None:
    row = nets.Row("van", "VAN", "forward", errors={"eager": 1e-6, "adapt": 2.5e-6, "optimize": 1.9e-6})
    row.failed = {"optimize freezing": "RuntimeError: no", "compile": "RuntimeError: no"}
    wrong = nets._wrong(row, 2e-6)
    assert len(wrong) == 2 and wrong[0].startswith("optimize freezing") and wrong[1].startswith("adapt:")


def test_what_torch_gets_wrong_sets_no_bound() -> None:
    assert nets._sound([2e-2, 1.3e23, math.inf, 3e-2]) == [2e-2, 3e-2]
    assert nets._sound([1e-5, 6e-3, 0.2]) == [1e-5, 6e-3]  # a kink is no garbage


@pytest.mark.parametrize("precision", [
    variants.Precision(torch.bfloat16), variants.Precision(torch.bfloat16, autocast=True),
])  # fmt: skip
@pytest.mark.parametrize("name", ["eager", "adapt"])
def test_a_training_step_in_half_precision(name: str, precision: variants.Precision) -> None:
    network = Network(
        "small", "a test", lambda: papers.VAN((4, 4, 8, 8), (1, 1, 1, 1), (2, 2, 2, 2), classes=5), PICTURE
    )
    run = variants.Run(name, network, train=True, precision=precision)
    answer, *gradients = run.results()
    assert answer.dtype is torch.bfloat16 and answer.isfinite().all()
    kept = torch.float32 if precision.autocast else torch.bfloat16
    assert {g.dtype for g in gradients} == {p.dtype for p in run.model.parameters()} == {kept}
    exact = variants.exact(network, train=True, precision=precision)
    assert exact[0].dtype is torch.float64
    near = (answer.double() - exact[0]).norm() / exact[0].norm()
    assert 0 < near < 0.1  # of bfloat16's rounding, which is 0.004 a number
    assert min(variants.conditioning(network, exact, train=True, precision=precision, draws=1)) > 0


def test_autocast_needs_something_to_narrow_to(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        nets.main(["--autocast"])
    assert "--autocast needs --dtype" in capsys.readouterr().err
