"""Kernels from elements at real-valued positions: each element spread onto a window by one profile an axis.

``K = sum_n w_n / (S_n + eps) * g_0 (x) g_1 (x) g_2``, the construction of "Dilated convolution with learnable
spacings" (Khalfaoui-Hassani et al., ICLR 2023; the Gaussian: arXiv 2306.00817). Every version is separable, so that a
kernel is one small matrix product a channel, and its gradients need nothing but the parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.base import full_precision
from adaptconv.kernels.profiles import WITH_SIGMA, Profiles, Rule, profiles, through


def construct(
    weight: Tensor, position: Tensor, sigma: Tensor | None, window: tuple[int, ...], version: str = "gauss"
) -> Tensor:
    """Spread elements onto a window: ``[*lead, n]`` to ``[*lead, *window]``, usually with ``lead = [O, I/g]``.

    With ``p = P + k // 2`` along each axis, clamped to ``[0, k - 1]``, and i a position of the window:

    ======== ========================================== ====================
    version  value g(i) along an axis                   normalised to sum 1
    ======== ========================================== ====================
    v0       ``relu(1 - |i - p|)``                      no
    v1       ``relu(1 - |i - p|)``                      yes
    max      ``relu(s - |i - p|)``, ``s = |SIG| + 1``   yes
    gauss    ``exp(-((i - p)/s)^2 / 2)``, ``s = |SIG| + 0.27``  yes
    ======== ========================================== ====================

    Where a hat has a corner its derivative is 0 (v1, max) or the one to the right (v0), the derivative of a value
    read by linear interpolation.

    Args:
        weight: ``[*lead, n]``, n elements each.
        position: ``[axes, *lead, n]``, in positions from the window's centre.
        sigma: like ``position``, for max and gauss; else None.
        window: positions along each axis.
        version: see above.

    Returns:
        ``[*lead, *window]`` in the weight's dtype, computed in float32 or wider whatever autocast says. Twice
        differentiable; the parameters alone are kept for the backward pass.

    Raises:
        ConvArgumentError: shapes that do not fit, an unknown version, or SIG missing or not wanted.
    """
    return spread(weight, position, sigma, Rule.of(version, window))


def spread(weight: Tensor, position: Tensor, sigma: Tensor | None, rule: Rule) -> Tensor:
    """``construct`` by a rule."""
    shape = (len(rule.window), *weight.shape)
    if (sigma is not None) != (rule.version in WITH_SIGMA):
        need = "needs SIG" if sigma is None else "has no SIG: max and gauss do"
        raise ConvArgumentError(f"version {rule.version!r} of learnable spacings {need}")
    for name, tensor in (("P", position), ("SIG", sigma)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ConvArgumentError(
                f"{name} is [axes, *weight.shape] = {shape} for weight {tuple(weight.shape)} and window {rule.window}; "
                f"got {tuple(tensor.shape)}"
            )
    if torch.compiler.is_compiling():
        # Traced as formulas: the compiler fuses them, and recomputes them in backward itself.
        with full_precision(weight.device):
            return _forward(weight, position, sigma, rule, False)
    result: Tensor = _Spread.apply(weight, position, sigma, rule)
    return result


class _Spread(torch.autograd.Function):
    """Saves its inputs and nothing else: profiles are made anew in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, position: Tensor, sigma: Tensor | None, rule: Rule) -> Tensor:
        with full_precision(weight.device):
            return _forward(weight, position, sigma, rule, _in_place())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, position, sigma, ctx.rule = inputs
        ctx.save_for_backward(weight, position, sigma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(grad.device):
            weight, position, sigma = ctx.saved_tensors
            needs = ctx.needs_input_grad
            return (*_backward(grad, weight, position, sigma, ctx.rule, needs, _in_place()), None)


def _in_place() -> bool:
    """Whether results may be written over their operands: nobody differentiates or batches this pass."""
    return not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


# ---- the passes ---------------------------------------------------------------------------------


def _operands(weight: Tensor, position: Tensor, sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flattened to ``[B, n]`` and ``[axes, B, n]``, in the dtype of the computation."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, position.dtype), torch.float32)
    n = weight.shape[-1]
    batch = math.prod(weight.shape[:-1])
    flat = (position.shape[0], batch, n)
    return (
        weight.to(dtype).reshape(batch, n),
        position.to(dtype).reshape(flat),
        None if sigma is None else sigma.to(dtype).reshape(flat),
    )


def _sums(made: Profiles) -> list[Tensor]:
    return [g.sum(1, keepdim=True) for g in made.values]


def _product(factors: list[Tensor]) -> Tensor:
    result = factors[0]
    for factor in factors[1:]:
        result = result * factor
    return result


def _forward(weight: Tensor, position: Tensor, sigma: Tensor | None, rule: Rule, own: bool) -> Tensor:
    w, p, s = _operands(weight, position, sigma)
    made = profiles(p, s, rule, own)
    scale = w.unsqueeze(1)
    if rule.normalised:
        scale = scale / (_product(_sums(made)) + rule.eps)
    kernel = outer(made.values, scale)
    return kernel.reshape(*weight.shape[:-1], *rule.window).to(weight.dtype)


def outer(factors: list[Tensor], scale: Tensor) -> Tensor:
    """``sum_n scale_n g_0 (x) g_1 (x) g_2`` of factors ``[B, k, n]`` and a scale ``[B, 1, n]``: ``[B, prod k]``."""
    *lead, last = factors
    left = scale
    for g in lead:
        left = (left.unsqueeze(2) * g.unsqueeze(1)).flatten(1, 2)
    return torch.bmm(left, last.transpose(1, 2)).flatten(1)


def _partials(grad: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The gradient contracted with every axis' profile but one's: ``[B, k, n]`` an axis."""
    batch, n = factors[0].shape[0], factors[0].shape[2]
    sizes = [g.shape[1] for g in factors]
    if len(factors) == 1:
        return [grad.reshape(batch, -1, 1).expand(-1, -1, n)]
    if len(factors) == 2:
        dense = grad.reshape(batch, *sizes)
        return [torch.bmm(dense, factors[1]), torch.bmm(dense.transpose(1, 2), factors[0])]
    a, b, c = factors
    dense = grad.reshape(batch, sizes[0] * sizes[1], sizes[2])
    ab = (a.unsqueeze(2) * b.unsqueeze(1)).flatten(1, 2)
    rest = torch.bmm(dense, c).reshape(batch, sizes[0], sizes[1], n)
    return [
        (rest * b.unsqueeze(1)).sum(2), (rest * a.unsqueeze(2)).sum(1), torch.bmm(dense.transpose(1, 2), ab),
    ]  # fmt: skip


def _backward(
    grad: Tensor, weight: Tensor, position: Tensor, sigma: Tensor | None, rule: Rule, needs: tuple[bool, ...], own: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight, P and SIG, themselves differentiable unless ``own``.

    With ``c = w / (S + eps)``, ``M_a`` the gradient contracted with all profiles but axis a's and T with all:
    ``dw = T / (S + eps)`` and ``dg_a = c (M_a - T / (S + eps) prod_{b != a} S_b)``.
    """
    w, p, s = _operands(weight, position, sigma)
    made = profiles(p, s, rule, own)
    grad = grad.to(w.dtype)
    partials = _partials(grad, made.values)
    last = len(rule.window) - 1
    total = (partials[last] * made.values[last]).sum(1, keepdim=True)
    scale, sums, inverse = w.unsqueeze(1), [], None
    if rule.normalised:
        sums = _sums(made)
        inverse = (_product(sums) + rule.eps).reciprocal()
        scale = scale * inverse
    by_p: list[Tensor] = [total] * len(rule.window)
    by_s: list[Tensor] = [total] * len(rule.window)
    if needs[1] or needs[2]:
        for axis, partial in enumerate(partials):
            if inverse is not None:
                # T from this axis' own terms: what cancels then cancels to rounding where few taps are touched.
                here = total if axis == last else (partial * made.values[axis]).sum(1, keepdim=True)
                mean = _product([here * inverse, *(one for other, one in enumerate(sums) if other != axis)])
                # On one axis the partial is a view of the gradient, expanded.
                partial = partial.sub_(mean) if own and last > 0 else partial - mean
            row = rule.order[axis]
            by_p[row], by_s[row] = through(partial, made, axis, rule, scale, own)
    if inverse is not None:
        total = total * inverse
    return (
        total.reshape(weight.shape).to(weight.dtype) if needs[0] else None,
        torch.stack(by_p).reshape(position.shape).to(position.dtype) if needs[1] else None,
        torch.stack(by_s).reshape(sigma.shape).to(sigma.dtype) if sigma is not None and needs[2] else None,
    )
