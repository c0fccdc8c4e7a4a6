"""The 1-D profiles by which an element at a real-valued position is spread, and their derivatives.

Tensors are [B, k, n] for B kernels, k positions along an axis and n elements: products over n or k then need no copy,
and sums over k are sums of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaptconv.errors import ConvArgumentError

VERSIONS = ("v0", "v1", "max", "gauss")
WITH_SIGMA = ("max", "gauss")
LEAST_WIDTH = {"v0": 0.0, "v1": 0.0, "max": 1.0, "gauss": 0.27}  # added to |SIG|

_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}  # exp is many times slower where its result is no normal number


@dataclass(frozen=True)
class Rule:
    """How elements are spread, all of it static.

    Attributes:
        version: ``"v0"``, ``"v1"``, ``"max"`` or ``"gauss"``.
        window: positions along each axis of the window.
        order: which row of P moves along each axis of the window.
        centre: what is added to that row to count from the window's first position.
        clamped: whether positions outside the window are read at its border (their gradient passes through).
        eps: added to the sum that normalises an element.
        least: width of an element whose SIG is 0.
    """

    version: str
    window: tuple[int, ...]
    order: tuple[int, ...]
    centre: tuple[int, ...]
    clamped: bool
    eps: float
    least: float

    @staticmethod
    def of(version: str, window: tuple[int, ...]) -> Rule:
        """P[a] moves along axis a, counted from the window's centre ``k // 2``; nothing is lost at the border.

        Raises:
            ConvArgumentError: an unknown version.
        """
        if version not in VERSIONS:
            known = ", ".join(map(repr, VERSIONS))
            raise ConvArgumentError(f"unknown version {version!r} of learnable spacings; expected one of {known}")
        centre = tuple(k // 2 for k in window)
        return Rule(version, window, tuple(range(len(window))), centre, True, 0.0, LEAST_WIDTH[version])

    @property
    def normalised(self) -> bool:
        """Whether an element's values are divided by their sum."""
        return self.version != "v0"


@dataclass(frozen=True)
class Profiles:
    """The 1-D factors of all elements, an axis each: g; and ``i - p`` and s (of max: |SIG|), to derive it by."""

    values: list[Tensor]
    offsets: list[Tensor]
    widths: list[Tensor | None]
    signs: list[Tensor | None]  # of SIG


def profiles(position: Tensor, sigma: Tensor | None, rule: Rule, own: bool = False) -> Profiles:
    """The profiles ``[B, k, n]`` of ``position [axes, B, n]``; in-place where ``own``."""
    made = Profiles([], [], [], [])
    for axis, extent in enumerate(rule.window):
        p = position[rule.order[axis]] + rule.centre[axis]
        if rule.clamped:
            p = p.detach().clamp(0, extent - 1) + (p - p.detach())
        u = torch.arange(extent, device=p.device, dtype=p.dtype).unsqueeze(1) - p.unsqueeze(1)
        s = None
        if sigma is not None:
            raw = sigma[rule.order[axis]].unsqueeze(1)
            s = raw.abs() + rule.least if rule.version == "gauss" else raw.abs()
            made.signs.append(raw.sign())
        made.values.append(_profile(u, s, rule, own))
        made.offsets.append(u)
        made.widths.append(s)
    return made


def _profile(u: Tensor, s: Tensor | None, rule: Rule, own: bool) -> Tensor:
    if rule.version == "gauss":
        assert s is not None
        z = u / s
        z = z.square_().mul_(-0.5) if own else z.square() * -0.5
        low = _FLOOR[z.dtype]
        return z.clamp_(min=low).exp_() if own else z.clamp(min=low).exp()
    if rule.version == "v0" and not own:
        # The same hat, differentiated to the right at its corners.
        zero = torch.zeros((), dtype=u.dtype, device=u.device)
        return torch.where((u > 0) & (u <= 1), 1 - u, torch.where((u <= 0) & (u > -1), 1 + u, zero))
    # 1 - |u| is exact where it matters, near the hat's foot: the width is added last.
    if own:
        rest = u.abs().neg_().add_(1)
        return (rest if s is None else rest.add_(s)).relu_()
    rest = 1 - u.abs()
    return torch.relu(rest if s is None else rest + s)


def _slopes(made: Profiles, axis: int, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """dg/dp and dg/ds along an axis."""
    g, u, s = made.values[axis], made.offsets[axis], made.widths[axis]
    if rule.version == "gauss":
        assert s is not None
        by_p = g * u / s.square()
        return by_p, by_p * u / s
    if rule.version == "v0":
        cell = u.ceil()  # 1 and 0 on the two taps that the position lies between
        return (cell == 1).to(u.dtype) - (cell == 0).to(u.dtype), None
    inside = (g > 0).to(u.dtype)
    return u.sign() * inside, inside if s is not None else None


def through(
    partial: Tensor, made: Profiles, axis: int, rule: Rule, scale: Tensor, own: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of p and SIG along an axis from that of its profile, ``partial * scale``."""
    sign = made.signs[axis] if made.signs else None
    if rule.version == "gauss" and own:
        g, u, s = made.values[axis], made.offsets[axis], made.widths[axis]
        assert s is not None and sign is not None
        first = partial.mul_(g).mul_(u)
        scale = scale / s.square()
        by_p = first.sum(1, keepdim=True) * scale
        return by_p, first.mul_(u).sum(1, keepdim=True) * (scale / s) * sign
    slope_p, slope_s = _slopes(made, axis, rule)
    by_p = (partial * slope_p).sum(1, keepdim=True) * scale
    if slope_s is None or sign is None:
        return by_p, by_p
    return by_p, (partial * slope_s).sum(1, keepdim=True) * scale * sign
