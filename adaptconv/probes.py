"""Probes: the convolutions on which the constants of the cost model are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptconv.backends import Config, backend_named
from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern


@dataclass(frozen=True, slots=True)
class Probe:
    """A convolution that a constant is measured on.

    Attributes:
        constant: a field of ``Rates``.
        backend: name of the backend that runs it.
        what: the convolution in words.
        problem: the convolution.
        knobs: where they differ from the backend's defaults.
    """

    constant: str
    backend: str
    what: str
    problem: Problem
    knobs: tuple[tuple[str, str], ...] = ()

    @property
    def config(self) -> Config:
        """The configuration it runs under."""
        return backend_named(self.backend).space(self.problem).complete(dict(self.knobs))

    def call(self) -> Callable[[], Tensor]:
        """What runs it, on operands of its own."""
        backend, problem, config = backend_named(self.backend), self.problem, self.config
        noise = torch.Generator().manual_seed(0)  # the process's own generator is not ours to move
        x, y = (
            torch.rand(*shape, generator=noise).contiguous(memory_format=problem.memory_format)
            for shape in (problem.input_shape, problem.output_shape)
        )
        w = torch.rand(*problem.weight_shape, generator=noise)
        a, b = (x, y) if problem.direction is Direction.GRAD_WEIGHT else (x, w)
        return lambda: backend.run(problem, config, a, b)


def probes(device: Device) -> tuple[Probe, ...]:
    """The convolutions to measure, in the order in which their constants are solved for."""
    batch = min(max(4, 2 * device.threads), 16)  # work for every thread, in a few hundred MiB for all probes

    def depthwise(
        taps: str, pad: int, layout: str = "contiguous", direction: Direction = Direction.FORWARD,
        spatial: tuple[int, ...] = (56, 56), channels: tuple[int, int, int] = (64, 64, 64), images: int = batch,
    ) -> Problem:  # fmt: skip
        axes = len(spatial)
        return Problem(
            direction, images, *channels, spatial, TapPattern.parse(taps), (1,) * axes, ((pad, pad),) * axes,
            "float32", layout, device,
        )  # fmt: skip

    def tiny(taps: str) -> Problem:
        return depthwise(taps, 2, spatial=(8, 8), channels=(4, 4, 4), images=1)

    dense = (64, 64, 1)
    wide, wide_pad = "7x7d3x3", 9
    return (
        Probe("call_us", "native", "a tiny convolution", tiny("3x3d2x2")),
        Probe("gemm_gflops", "native", "3x3, 64 to 64 channels", depthwise("3x3", 1, channels=dense)),
        *(
            Probe("direct_gflops", "native", f"depthwise {k}x{k}, {layout}", depthwise(f"{k}x{k}", k // 2, layout))
            for layout in ("contiguous", "channels_last")
            for k in (3, 7, 13)
        ),
        Probe("slow_gflops", "native", "depthwise 7x7, dilation 3", depthwise(wide, wide_pad)),
        Probe(
            "relayout_gbytes", "native", "depthwise 3x3, contiguous by way of channels_last", depthwise("3x3", 1),
            (("layout", "channels_last"),),
        ),
        Probe("product_gflops", "gather", "3x3, 64 to 64 channels", depthwise("3x3", 1, channels=dense)),
        # An image's columns stay under the size from which malloc maps fresh pages at every call.
        Probe("matvec_gflops", "gather", "depthwise 7x7, dilation 3", depthwise(wide, wide_pad, channels=(32, 32, 32))),
        Probe("dense_call_us", "dense", "a tiny convolution", tiny("3x3d2x2")),
        Probe("gather_call_us", "gather", "a tiny convolution", tiny("3x3d2x2")),
        Probe("dual_call_us", "dual", "a tiny convolution of two grids", tiny("10001/00000/00100/00000/10001")),
        Probe("factored_call_us", "factored", "a tiny interpolated one", tiny("2x2d2x2*0.5,1,0.5x0.5,1,0.5")),
        Probe("cpp_call_us", "cpp", "a tiny convolution", tiny("3x3d2x2")),
        Probe("cpp_gflops", "cpp", "depthwise 7x7, dilation 3", depthwise(wide, wide_pad)),
        Probe(
            "cpp_weight_gflops", "cpp", "its gradient of the weight",
            depthwise(wide, wide_pad, direction=Direction.GRAD_WEIGHT),
        ),
        Probe("cpp_line_gflops", "cpp", "depthwise 31 on one axis", depthwise("31", 15, spatial=(2048,))),
    )  # fmt: skip
