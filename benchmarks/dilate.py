"""What writing a kernel's holes as zeros costs, three ways: ``python -m benchmarks.dilate``.

``adaptconv.kernels.dilate`` against the Kronecker product with a unit corner (its tail sliced off) and the product
with the identity's dilated rows, ``U w U^T`` with ``U = eye(window)[:, ::dilation]``, both matrices made beforehand.
All three are checked to be equal, then timed interleaved; ratios are theirs over ours, so under 1.0 is a loss.
``folded`` says whether a compiled, frozen inference graph holds the dilated weight as a constant.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from adaptconv.kernels import dilate
from adaptconv.measure import interleave
from benchmarks.facts import machine_facts

Way = Callable[[Tensor], Tensor]
CASES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((64, 64, 3, 3), (2, 2)),
    ((8, 8, 3, 3), (2, 2)),
    ((512, 512, 3, 3), (2, 2)),
    ((256, 256, 3, 3), (6, 6)),
    ((384, 1, 7, 7), (3, 3)),
    ((64, 64, 3, 5), (4, 1)),
    ((256, 1, 31), (4,)),
    ((128, 128, 2), (64,)),
    ((32, 32, 3, 3, 3), (2, 2, 2)),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds (20th percentile) of one weight in one mode, and what the other ways take of ours.

    Attributes:
        weight: its shape.
        dilation: step an axis.
        mode: ``forward`` or ``forward + backward``.
        dilate_us: ours.
        kron_us: the Kronecker product's.
        matmul_us: the product's with the identity's rows.
    """

    weight: tuple[int, ...]
    dilation: tuple[int, ...]
    mode: str
    dilate_us: float
    kron_us: float
    matmul_us: float


def kron(weight: Tensor, dilation: tuple[int, ...]) -> Way:
    """The Kronecker product with a corner of one, its tail sliced off."""
    axes = len(dilation)
    corner = weight.new_zeros((1,) * (weight.dim() - axes) + dilation)
    corner[(0,) * weight.dim()] = 1
    window = [slice(0, (s - 1) * d + 1) for s, d in zip(weight.shape[-axes:], dilation, strict=True)]
    places: list[Any] = [..., *window]
    return lambda w: torch.kron(w, corner)[tuple(places)]


def matmul(weight: Tensor, dilation: tuple[int, ...]) -> Way:
    """The product with the identity's dilated rows along each axis."""
    sizes = weight.shape[-len(dilation) :]
    rows = [
        torch.eye((s - 1) * d + 1, dtype=weight.dtype, device=weight.device)[:, ::d].contiguous()
        for s, d in zip(sizes, dilation, strict=True)
    ]
    columns = [row.T.contiguous() for row in rows]
    if len(rows) == 1:
        return lambda w: w @ columns[0]
    if len(rows) == 2:
        return lambda w: rows[0] @ w @ columns[1]

    def three(w: Tensor) -> Tensor:
        planes = rows[1] @ w @ columns[2]
        full: Tensor = (rows[0] @ planes.flatten(-2)).unflatten(-1, planes.shape[-2:])
        return full

    return three


def measured(
    shape: tuple[int, ...], dilation: tuple[int, ...], device: torch.device, dtype: torch.dtype, budget_s: float
) -> list[Row]:
    """Both modes of one weight, all three ways interleaved.

    Raises:
        AssertionError: two ways differ.
    """
    weight = torch.randn(shape, device=device, dtype=dtype)
    learnt = weight.clone().requires_grad_()
    ways: dict[str, Way] = {
        "dilate": lambda w: dilate(w, dilation),
        "kron": kron(weight, dilation),
        "matmul": matmul(weight, dilation),
    }
    expected = dilate(weight, dilation)
    for name, way in ways.items():
        assert torch.equal(way(weight), expected), name
    dy = torch.randn_like(expected)

    modes: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: partial(way, weight) for name, way in ways.items()},
        "forward + backward": {name: partial(_trained, way, learnt, dy) for name, way in ways.items()},
    }
    rows = []
    for mode, candidates in modes.items():
        times = interleave(candidates, budget_s=budget_s, device=device)
        rows.append(Row(shape, dilation, mode, *(round(times[name].p20_us, 2) for name in ways)))
    return rows


def _trained(way: Way, weight: Tensor, dy: Tensor) -> object:
    return torch.autograd.grad(way(weight), weight, dy)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, dilate(self.weight, 2))


def folded() -> bool:
    """Whether Inductor's freezing leaves nothing of the dilation in the code it generates."""
    from torch._inductor.utils import run_and_get_code

    layer, x = _Layer().eval(), torch.randn(1, 8, 16, 16)
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        result, code = run_and_get_code(torch.compile(layer, fullgraph=True), x)
        torch.testing.assert_close(result, layer(x), atol=1e-4, rtol=1e-4)
    kernels = [line for line in "\n".join(code).splitlines() if "async_compile" in line and "=" in line]
    return not any("constant_pad" in line or "copy" in line for line in kernels)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table; 1 if a ratio is under 1.0 or the weight was not folded."""
    parser = argparse.ArgumentParser("python -m benchmarks.dilate", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a weight and mode (default 1)")
    parser.add_argument("--skip-folding", action="store_true", help="compile nothing")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    arguments = parser.parse_args(argv)
    rows = [
        row
        for shape, dilation in CASES
        for row in measured(shape, dilation, arguments.device, getattr(torch, arguments.dtype), arguments.budget)
    ]
    table = [
        ["x".join(map(str, row.weight)), "x".join(map(str, row.dilation)), row.mode, row.dilate_us, row.kron_us,
         row.matmul_us, row.kron_us / row.dilate_us, row.matmul_us / row.dilate_us]
        for row in rows
    ]  # fmt: skip
    headers = ("weight", "dilation", "mode", "dilate us", "kron us", "matmul us", "kron / ours", "matmul / ours")
    print(tabulate(table, headers=headers, floatfmt=".1f"))
    worst = min(min(row.kron_us, row.matmul_us) / row.dilate_us for row in rows)
    constant = None if arguments.skip_folding else folded()
    print(f"smallest ratio {worst:.2f}; folded under freezing: {'not asked' if constant is None else constant}")
    if arguments.out:
        facts = machine_facts(arguments.device)
        content = {
            "machine": facts,
            "dtype": arguments.dtype,
            "folded": constant,
            "rows": [asdict(row) for row in rows],
        }
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(worst < 1.0 or constant is False)


if __name__ == "__main__":
    raise SystemExit(main())
