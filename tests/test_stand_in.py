"""Stand-ins: the shape, format and dtype that torch routes by, and no memory behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptconv.backends.stand_in import stand_in

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 7), (2, 3, 4, 5, 7)], ids=str)
def test_it_is_what_empty_would_be(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.zeros(2, dtype=dtype)
    for memory_format in {torch.contiguous_format, FORMATS.get(len(shape), torch.contiguous_format)}:
        made, plain = stand_in(like, shape, memory_format), torch.empty(shape, dtype=dtype, memory_format=memory_format)
        assert (made.shape, made.dtype, made.device) == (plain.shape, plain.dtype, plain.device)
        assert made.is_contiguous(memory_format=memory_format)
        assert made.stride() == plain.stride()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_no_memory_is_behind_it() -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])

    before = resident_pages()
    made = stand_in(torch.zeros(1), (4, 64, 1024, 1024), torch.channels_last)  # a gibibyte
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert resident_pages() - before < 4096


def test_under_a_transform_and_a_mode_it_is_an_ordinary_tensor() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(stand_in(torch.zeros(1), (1, 2, 3, 4), torch.channels_last), FakeTensor)
    assert torch.func.vmap(lambda x: x + stand_in(x, (2,), torch.contiguous_format).shape[0])(torch.zeros(3)).sum() == 6
