"""What torch.compile takes, ``optimize`` takes: modes and options reach Inductor, and what it lacks is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adaptconv
from adaptconv._version import __version__
from adaptconv.compile import inductor
from adaptconv.compile.optimize import NotOptimizable, forget_compiled, log_of


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Inductor was asked, one entry a graph; the graphs then run as they are."""
    asked: list[dict[str, Any]] = []

    def compile_nothing(gm: Any, inputs: Any, options: dict[str, Any]) -> Callable[..., Any]:
        asked.append({"options": options, "tag": torch.compiler.config.cache_key_tag})
        run: Callable[..., Any] = gm.forward
        return run

    monkeypatch.setattr(torch._inductor, "compile", compile_nothing)
    return asked


def hole(dilation: int = 2) -> nn.Conv1d:
    return nn.Conv1d(4, 4, 3, padding=dilation, dilation=dilation)


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_options_reach_inductor(mode: str, compilations: list[dict[str, Any]]) -> None:
    x, wanted = torch.randn(1, 4, 16), torch._inductor.list_mode_options(mode)
    adaptconv.optimize(hole(), mode=mode)(x)
    assert compilations[-1]["options"] == wanted
    adaptconv.optimize(hole(4), mode=mode, options={"epilogue-fusion": False, "max_autotune": False})(x)
    assert compilations[-1]["options"] == {**wanted, "epilogue_fusion": False, "max_autotune": False}
    forget_compiled()
    torch.compile(hole(), backend="adaptconv", mode=mode)(x)
    assert compilations[-1]["options"] == wanted
    assert len(compilations) == 3


def test_the_class_and_the_function_form_take_options_too(compilations: list[dict[str, Any]]) -> None:
    @adaptconv.optimize(mode="max-autotune-no-cudagraphs")
    class Small(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    Small(4, 4, 3)(torch.randn(1, 4, 16))
    assert compilations[-1]["options"]["max_autotune"] is True

    @adaptconv.optimize(mode="max-autotune")
    class Plain(nn.Sequential):
        """Its forward is torch's own, which dynamo by itself leaves alone."""

    plain, x = Plain(hole()), torch.randn(1, 4, 16)
    torch.testing.assert_close(plain(x), plain[0](x))
    assert len(compilations) == 2
    assert [site.where for site in log_of(plain).sites] == ["0"]

    @adaptconv.optimize(options={"max_autotune": False})
    def function(x: Tensor) -> Tensor:
        return x + 1

    function(torch.randn(2))
    assert compilations[-1]["options"] == {"max_autotune": False}


def test_what_inductor_does_not_have_is_refused_at_once() -> None:
    with pytest.raises(RuntimeError, match="Unrecognized mode=fastest"):
        adaptconv.optimize(hole(), mode="fastest")
    with pytest.raises(RuntimeError, match="Unexpected optimization option max_speed"):
        adaptconv.optimize(hole(), options={"max_speed": True})
    with pytest.raises(NotOptimizable, match="got backend='eager'"):
        adaptconv.optimize(hole(), backend="eager")


def test_the_backend_ignores_arguments_it_does_not_know(compilations: list[dict[str, Any]]) -> None:
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    run = inductor.backend(gm, [torch.ones(2)], name="a region", of_a_later_torch=3)
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    assert compilations == [{"options": {}, "tag": f"adaptconv-{__version__}"}]


def test_the_caches_on_disk_tell_releases_apart(
    compilations: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an op is traced into is this release's code, and torch's cache keys hold the op's name alone."""
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    inductor.backend(gm, [torch.ones(2)])
    monkeypatch.setattr(inductor, "__version__", "99.0")
    with torch.compiler.config.patch(cache_key_tag="mine-"):
        inductor.backend(gm, [torch.ones(2)])
    assert [asked["tag"] for asked in compilations] == [f"adaptconv-{__version__}", "mine-adaptconv-99.0"]
    assert torch.compiler.config.cache_key_tag == ""


@pytest.mark.parametrize(
    ("version", "kind", "forced"),
    [("2.11.0", "cuda", True), ("2.12.1+cu130", "cuda", True), ("2.13.0", "cuda", False), ("2.12.1", "cpu", False)],
)
def test_inductors_triton_convolution_is_kept_out_where_it_is_wrong(
    version: str, kind: str, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        x = torch.empty_strided((1, 2), (2, 1), device=f"{kind}:0" if kind == "cuda" else kind)
    monkeypatch.setattr(torch, "__version__", version)
    options = inductor._safe_options([x, 3])
    assert options == ({"max_autotune_conv_backends": "ATEN"} if forced else {})
    assert "max_autotune_conv_backends" in torch._inductor.list_options()
