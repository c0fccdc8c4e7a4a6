"""Networks over waveforms and volumes, written from their papers in plain torch; see ``papers``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.papers import ChannelNorm

# ---- Conv-TasNet ---------------------------------------------------------------------------------


class SeparationBlock(nn.Module):
    """1x1, a dilated depthwise convolution, and two 1x1: what goes on and what is skipped to the end.

    Shapes: ``[N, C, L] -> [N, C, L], [N, C, L]``; inside, ``hidden`` channels.
    """

    def __init__(self, channels: int, hidden: int, kernel: int, dilation: int, last: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv1d(channels, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden))
        pad = (kernel - 1) * dilation // 2
        self.depthwise = nn.Conv1d(hidden, hidden, kernel, padding=pad, dilation=dilation, groups=hidden)
        self.normal = nn.Sequential(nn.PReLU(), nn.GroupNorm(1, hidden))
        self.onward = None if last else nn.Conv1d(hidden, channels, 1)
        self.skip = nn.Conv1d(hidden, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum with the input (the input itself in the last block), and the part that skips."""
        y = self.normal(self.depthwise(self.enter(x)))
        return x if self.onward is None else x + self.onward(y), self.skip(y)


class ConvTasNet(nn.Module):
    """Speech separation (arXiv:1809.07454): learnt filter bank, masks from stacks of dilations 1, 2, .. 2^(blocks - 1).

    Args:
        filters: N of the paper, its filter bank; 16 samples each at a hop of 8.
        channels: B, between blocks.
        hidden: H, inside a block.
        blocks: X, blocks in a stack.
        stacks: R.
        speakers: how many to tell apart.

    Shapes: ``[N, 1, L] -> [N, speakers, L]``, L a multiple of 8.
    """

    def __init__(
        self, filters: int = 256, channels: int = 128, hidden: int = 256, blocks: int = 8, stacks: int = 1,
        speakers: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.speakers = speakers
        self.encode = nn.Conv1d(1, filters, 16, 8, padding=8, bias=False)
        self.enter = nn.Sequential(nn.GroupNorm(1, filters), nn.Conv1d(filters, channels, 1))
        self.blocks = nn.ModuleList(
            SeparationBlock(channels, hidden, 3, 2 ** (i % blocks), last=i == stacks * blocks - 1)
            for i in range(stacks * blocks)
        )
        self.mask = nn.Sequential(nn.PReLU(), nn.Conv1d(channels, filters * speakers, 1), nn.Sigmoid())
        self.decode = nn.ConvTranspose1d(filters, 1, 16, 8, padding=8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mask the encoded mixture once a speaker, and decode."""
        encoded = F.relu(self.encode(x))
        y, total = self.enter(encoded), torch.zeros((), dtype=x.dtype, device=x.device)
        for block in self.blocks:
            y, skipped = block(y)
            total = total + skipped
        masks = self.mask(total).unflatten(1, (self.speakers, -1))
        waves: Tensor = self.decode((masks * encoded[:, None]).flatten(0, 1))
        return waves.reshape(len(x), self.speakers, -1)


# ---- WaveNet -------------------------------------------------------------------------------------


class CausalBlock(nn.Module):
    """A gated causal convolution of two taps (arXiv:1609.03499).

    Shapes: ``[N, C, L] -> [N, C, L], [N, skip, L]``.
    """

    def __init__(self, channels: int, skip: int, dilation: int, last: bool) -> None:
        super().__init__()
        self.dilation = dilation
        self.gated = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.onward = None if last else nn.Conv1d(channels, channels, 1)
        self.skip = nn.Conv1d(channels, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum with the input (the input itself in the last block), and the part that skips."""
        signal, gate = self.gated(F.pad(x, (self.dilation, 0))).chunk(2, dim=1)
        y = signal.tanh() * gate.sigmoid()
        return x if self.onward is None else x + self.onward(y), self.skip(y)


class WaveNet(nn.Module):
    """Stacks of causal dilations 1, 2, .. 512 over a waveform: ``[N, 1, L] -> [N, levels, L]``, the next sample's.

    No output depends on a later input.
    """

    def __init__(
        self, channels: int = 32, skip: int = 128, levels: int = 256, blocks: int = 10, stacks: int = 1
    ) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, channels, 1)
        self.blocks = nn.ModuleList(
            CausalBlock(channels, skip, 2 ** (i % blocks), last=i == stacks * blocks - 1)
            for i in range(stacks * blocks)
        )
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, levels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Score every level at every sample."""
        y, total = self.enter(x), torch.zeros((), dtype=x.dtype, device=x.device)
        for block in self.blocks:
            y, skipped = block(y)
            total = total + skipped
        scores: Tensor = self.leave(total)
        return scores


# ---- 3D UX-Net -----------------------------------------------------------------------------------


class UXBlock(nn.Module):
    """Depthwise 7x7x7, norm, and depthwise scaling to four times the width and back (arXiv:2209.15076).

    Shapes: ``[N, C, D, H, W] -> [N, C, D, H, W]``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(channels, channels, 7, padding=3, groups=channels)
        self.norm = ChannelNorm(channels)
        self.widen = nn.Conv3d(channels, 4 * channels, 1, groups=channels)
        self.narrow = nn.Conv3d(4 * channels, channels, 1, groups=channels)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block finds."""
        y: Tensor = self.narrow(F.gelu(self.widen(self.norm(self.depthwise(x)))))
        return x + self.scale * y


class UXNetEncoder(nn.Sequential):
    """The encoder of 3D UX-Net: ``[N, 1, D, H, W] -> [N, C, D/16, H/16, W/16]`` with four stages."""

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 192), depths: Sequence[int] = (1, 1, 1, 1)) -> None:
        parts: list[nn.Module] = [nn.Conv3d(1, widths[0], 7, 2, 3)]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                parts += [ChannelNorm(widths[stage - 1]), nn.Conv3d(widths[stage - 1], width, 2, 2)]
            parts += [UXBlock(width) for _ in range(depth)]
        super().__init__(*parts, ChannelNorm(widths[-1]))
