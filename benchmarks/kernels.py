"""What the Triton kernels compile to, on a machine without a GPU: ``python -m benchmarks.kernels``.

Every kernel in its default and extreme configurations is compiled for three GPU families; of what comes out this
counts registers, spills, shared memory, matrix instructions and asynchronous copies. A kernel that spills, or whose
products no longer reach the matrix units, is slow on every card, and this shows it in a second. The committed table is
``benchmarks/results/kernels.json``; a test compiles the kernels again and fails where they became worse.

sm80 and sm90 are NVIDIA's (A100; H100 and H200), read from the machine code by the disassembler that Triton brings;
gfx942 is AMD's (MI300), read from the assembly's own notes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("sparse", "depthwise", "banded")
FAMILIES = ("sm80", "sm90", "gfx942")
COMMITTED = Path(__file__).with_name("results") / "kernels.json"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one build came to.

    Attributes:
        label: the build.
        family: the GPU family it was compiled for.
        registers: vector registers a thread.
        spills: spilled registers' instructions (NVIDIA) or registers (AMD).
        shared_bytes: shared memory a program.
        matrix: matrix instructions: wgmma, mma or mfma.
        wide: whether they are wgmma, sm90's own.
        copies: asynchronous copies into shared memory.
        loop: instructions in the longest innermost loop; 0 where none was found or the family is AMD's.
        loop_matrix: matrix instructions in it.
        loop_loads: loads from memory in it.
    """

    label: str
    family: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: int
    wide: bool
    copies: int
    loop: int
    loop_matrix: int
    loop_loads: int


def compiled(build: Any, family: str) -> Compiled:
    """Compile one build for one family.

    Args:
        build: an ``adaptconv.backends.triton.builds.Build``.
        family: of ``FAMILIES``.

    Raises:
        RuntimeError: Triton interprets in this process.
        Exception: whatever the compiler raises.
    """
    if os.environ.get("TRITON_INTERPRET", "") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled in this process")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", family, 64) if family.startswith("gfx") else GPUTarget("cuda", int(family[2:]), 32)
    names = list(build.kernel.arg_names)
    signature = {name: build.types.get(name, "constexpr") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in build.divisible
    }
    source = ASTSource(build.kernel, signature, dict(build.constants), aligned)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    made = triton.compile(source, target=target, options=options)
    read = _read_amd(made.asm["amdgcn"]) if "amdgcn" in made.asm else read_nvidia(made.asm["cubin"])
    return Compiled(build.label, family, shared_bytes=made.metadata.shared, **read)


def _read_amd(assembly: str) -> dict[str, Any]:
    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": note("vgpr_count"), "spills": note("vgpr_spill_count"),
        "matrix": len(re.findall(r"\bv_mfma", assembly)), "wide": False, "copies": 0, "loop": 0, "loop_matrix": 0,
        "loop_loads": 0,
    }  # fmt: skip


_MATRIX = re.compile(r"\b[HQI]GMMA\b|\b[HQID]MMA\b")
_LOAD = re.compile(r"\b(LDG|LDGSTS|UTMALDG)\b")
_SPILL = re.compile(r"\b(STL|LDL)\b")


def read_nvidia(binary: bytes) -> dict[str, Any]:
    """What a cubin holds: all of ``Compiled`` that is read from machine code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    lines = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/|\s*\.L_x_\d+:", line)]
    loop = _innermost(lines)
    return {
        "registers": int(registers[1]) if registers else 0,
        "spills": len(_SPILL.findall(code)),
        "matrix": len(_MATRIX.findall(code)),
        "wide": bool(re.search(r"\b[HQI]GMMA\b", code)),
        "copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", code)),
        "loop": len(loop),
        "loop_matrix": sum(bool(_MATRIX.search(line)) for line in loop),
        "loop_loads": sum(bool(_LOAD.search(line)) for line in loop),
    }


def _innermost(lines: Sequence[str]) -> list[str]:
    """The longest loop without another in it: from a label to a branch back to it."""
    places = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    loops = []
    for end, line in enumerate(lines):
        back = re.search(r"\bBRA\b.*`?\((\.L_x_\d+)\)", line)
        if back and places.get(back[1], end) < end:
            loops.append((places[back[1]], end))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    bodies = [
        [line for line in lines[a : b + 1] if "/*" in line and ".L_x" not in line.split("/*")[0]] for a, b in inner
    ]
    real = [body for body in bodies if len(body) > 2]  # a jump to itself after the end is no loop
    return max(real, key=len, default=[])


def _output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def builds_of(backend: str, family: str) -> list[Any]:
    """What a backend's kernels are compiled for on a family."""
    module = importlib.import_module(f"adaptconv.backends.triton.{backend}.compiled")
    found: list[Any] = module.builds(family)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    head = f"{'family':7} {'build':58} {'regs':>5} {'spills':>6} {'shared':>7} {'matrix':>10} {'copies':>6} {'loop':>5}"
    lines = [head, "-" * len(head)]
    for row in rows:
        kind = ("wgmma" if row["wide"] else "mma") if row["matrix"] else ""
        lines.append(
            f"{row['family']:7} {row['label']:58} {row['registers']:5} {row['spills']:6} {row['shared_bytes']:7} "
            f"{row['matrix'] or '':>4} {kind:5} {row['copies'] or '':>6} {row['loop'] or '':>5}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write; 1 if anything spills or does not compile."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--only", metavar="TEXT", help="builds whose label contains this")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args(argv)
    rows, bad = [], 0
    for backend in arguments.backends:
        for family in arguments.families:
            for build in builds_of(backend, family):
                if arguments.only and arguments.only not in build.label:
                    continue
                start = time.monotonic()
                try:
                    row = asdict(compiled(build, family))
                except Exception as failure:  # noqa: BLE001 - a compiler fails in many ways: say so and go on
                    print(f"{family} {build.label}: {type(failure).__name__}: {failure}", file=sys.stderr)
                    bad += 1
                    continue
                rows.append(row)
                bad += bool(row["spills"])
                print(f"{family} {build.label}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    print(table(rows))
    if arguments.out:
        import triton

        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"triton": triton.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
