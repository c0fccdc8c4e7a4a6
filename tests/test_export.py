"""torch.export and AOTInductor: what an exported model holds, and where it runs without adaptconv."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import adaptconv

ROOT = Path(adaptconv.__file__).parents[1]
ANY_BATCH = ({0: Dim("batch", min=2, max=64)},)
OP = "adaptconv.conv.default"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Torch's own deprecations, of its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Net(nn.Module):
    """A dilated convolution that knows nothing of adaptconv, and a layer of adaptconv's own."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 8, 3, padding=2, dilation=2)
        self.own = adaptconv.AdaptiveConv2d(8, 8, taps="101/010/101", padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.own(F.relu(self.plain(x)))
        return result


def called(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def images(batch: int) -> Tensor:
    return torch.randn(batch, 4, 12, 12)


# ---- what is in it -------------------------------------------------------------------------------

MAKE: dict[str, Callable[[nn.Module], Any]] = {
    "model": lambda net: net,
    "optimized": adaptconv.optimize,
    "compiled in place": lambda net: net.compile(backend="adaptconv") or net,
    "adapted": adaptconv.adapt,
}


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("made", MAKE)
def test_exporting_at_known_sizes(made: str, strict: bool) -> None:
    """Traced, the plans are in the program as torch operations; strict, the op is, and its plan is made later.

    torch.export ignores torch.compile, so an optimized model exports as the model it is of: what is to be planned in a
    program must be adaptive, and ``adapt`` makes it so.
    """
    net, x = Net().eval(), images(2)
    right = net(x)
    with adaptconv.pinned("gather"):
        program = export(MAKE[made](net), (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), right, rtol=1e-4, atol=1e-5)
    found = called(program)
    assert ("aten.conv2d.default" in found) == (made != "adapted")
    assert (OP in found) == strict
    assert ("aten.matmul.default" in found) == (not strict), "gather"
    with adaptconv.pinned("gather"):
        program = program.run_decompositions()
    assert not [target for target in called(program) if "adaptconv" in target]
    torch.testing.assert_close(program.module()(x), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("pin", [None, "dense"])
def test_exporting_for_any_batch(pin: str | None, strict: bool) -> None:
    """The op plans at run time; pinned to dense, which asks for no extent, it is torch operations."""
    net = Net().eval()
    with adaptconv.pinned(pin) if pin else nullcontext():
        program = export(net, (images(2),), dynamic_shapes=ANY_BATCH, strict=strict)
        plain = program.run_decompositions()
    assert OP in called(program)
    own = [target for target in called(plain) if "adaptconv" in target]
    assert own == ([] if pin else ["adaptconv.direction.default"])
    for batch in (2, 5):
        x = images(batch)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain.module()(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("taps", ["3x3d2x2", "111/101/111", "2x2*0.5,1,0.5x1,-0.5"])
@pytest.mark.parametrize("padding", [1, ((2, 0), (1, 1))])
def test_every_kind_of_taps_is_written_out_for_any_batch(taps: str, padding: Any) -> None:
    layer = adaptconv.AdaptiveConv2d(4, 4, taps=taps, padding=padding, stride=2)
    with adaptconv.pinned("dense"):
        program = export(layer, (images(2),), dynamic_shapes=ANY_BATCH).run_decompositions()
    assert not [target for target in called(program) if "adaptconv" in target]
    x = images(6)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


# ---- where it runs -------------------------------------------------------------------------------

_LOADS = """
import json, sys, warnings
warnings.simplefilter("ignore")
folder, ours = sys.argv[1], sys.argv[2] == "with"
if ours:
    import adaptconv
else:
    sys.modules["adaptconv"] = None  # import adaptconv fails from here on
import torch
inputs = torch.load(f"{folder}/inputs.pt")
found = {}
for name in ("static", "dense", "planned"):
    for kind in ("export", "aoti"):
        path = f"{folder}/{name}.{kind}.pt2"
        try:
            if kind == "export":
                model = torch.export.load(path).module()
            elif name != "static":
                model = torch._inductor.aoti_load_package(path)
            else:
                continue
            results = [model(x) for x in (inputs[:1] if name == "static" else inputs)]
            torch.save(results, f"{folder}/{name}.{kind}.results.pt")
            found[f"{name} {kind}"] = "ran"
        except Exception as error:
            found[f"{name} {kind}"] = f"{type(error).__name__}: {error}"
found["tuner"] = [name for name in ("optuna", "adaptconv.tuner") if name in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """Programs and AOTInductor packages on disk, and what they should answer to two batches."""
    folder = tmp_path_factory.mktemp("packages")
    torch.manual_seed(0)
    net, inputs = Net().eval(), [images(2), images(5)]
    torch.save(inputs, folder / "inputs.pt")
    with torch.no_grad():
        with adaptconv.pinned("gather"):
            torch.export.save(export(net, (inputs[0],)), folder / "static.export.pt2")
        for name in ("dense", "planned"):
            with adaptconv.pinned("dense") if name == "dense" else nullcontext():
                program = export(net, (inputs[0],), dynamic_shapes=ANY_BATCH)
                plain = program.run_decompositions() if name == "dense" else program
                torch.export.save(plain, folder / f"{name}.export.pt2")
                options = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # the compiler's time is the test's
                torch._inductor.aoti_compile_and_package(
                    program, package_path=str(folder / f"{name}.aoti.pt2"), inductor_configs=options
                )
        return folder, [net(x) for x in inputs]


def load(folder: Path, with_adaptconv: bool) -> dict[str, Any]:
    for stale in folder.glob("*.results.pt"):
        stale.unlink()
    command = [sys.executable, "-c", _LOADS, str(folder), "with" if with_adaptconv else "without"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_results(folder: Path, name: str, right: list[Tensor]) -> None:
    results = torch.load(folder / f"{name.replace(' ', '.')}.results.pt")
    for mine, expected in zip(results, right, strict=False):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_plans_of_torch_operations_run_where_there_is_no_adaptconv(packages: tuple[Path, list[Tensor]]) -> None:
    folder, right = packages
    found = load(folder, False)
    for name in ("static export", "dense export", "dense aoti"):
        assert found[name] == "ran", found[name]
        check_results(folder, name, right)
    assert "deserializing" in found["planned export"], "planned at run time, by adaptconv"
    assert "adaptconv::direction" in found["planned aoti"]


def test_plans_made_at_run_time_need_adaptconv_and_not_its_tuner(packages: tuple[Path, list[Tensor]]) -> None:
    folder, right = packages
    found = load(folder, True)
    assert found.pop("tuner") == []
    assert set(found.values()) == {"ran"}, found
    for name in found:
        check_results(folder, name, right)
