"""Compile kernels for a chip that is not there, and read what they take off the code.

The launchers run as they are, on small tensors in memory. A stand-in for Triton's driver
names the chip; each launch is compiled with the very specialisation of its arguments that
a launch on the chip would have, and nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from moegen_triton.kernels.chips import CHIPS, generation

KERNELS = "moegen_triton.kernels"
#: Registers of a processor; a program's must fit, or it does not start.
REGISTERS = 65536
#: Instructions of tensor cores on 64 rows or more: of Hopper, and of Blackwell's large
#: chips. On fewer rows, and on other chips, they are those that all chips have.
LARGE, SMALL = {90: "HGMMA", 100: "UTCHMMA"}, "HMMA"


class Resources(NamedTuple):
    """What one compiled kernel takes of a processor."""

    function: str
    registers: int
    #: Bytes of a thread that are in memory: its stack, and other local arrays.
    stack: int
    local: int
    #: Bytes of shared memory of a program.
    shared: int
    warps: int
    #: Instructions of tensor cores by name, and those that spill to memory or fetch back.
    tensor: dict[str, int]
    spilled: int
    fetched: int
    seconds: float


class Compiled(NamedTuple):
    """One kernel as it is launched: Triton's product, and how long it took."""

    kernel: Any
    seconds: float

    @property
    def ir(self) -> str:
        """Triton's intermediate code, which still has types and shapes of addresses."""
        return str(self.kernel.asm["ttir"])


class _Driver:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # Triton caches by device, so each chip is one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def compiling(capability: int) -> Iterator[list[Compiled]]:
    """Compile, for a chip, what is launched inside; yields a list that fills with it.

    Kernels are compiled once for each distinct launch and set of constants.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are Python, not compiled")
    found: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **rest: Any) -> Any:
        began = time.perf_counter()
        rest.setdefault("enable_fp_fusion", True)  # the default, which 3.9 wants said
        kernel = run(self, *args, grid=grid, warmup=True, **rest)
        found.append(Compiled(kernel, time.perf_counter() - began))
        return kernel

    def pretended(device: Any = None) -> tuple[int, int]:
        return divmod(capability, 10)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(capability)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for name, module in list(sys.modules.items()):
            if name.startswith(KERNELS) and hasattr(module, "capability"):
                stack.enter_context(mock.patch.object(module, "capability", pretended))
        yield found


def resources(compiled: Compiled) -> Resources:
    """Read a kernel's resources and the instructions that matter off its machine code.

    Instructions are listed, which takes time, only if there may be some that matter.
    """
    kernel = compiled.kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        found = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", usage)}
        matter = found["STACK"] or found["LOCAL"] or "mma" in kernel.asm["ptx"]
        code = _cuobjdump("-sass", file.name) if matter else ""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code)
    tensor = sorted({name for name in names if name.endswith("MMA")})
    return Resources(
        function=kernel.name,
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor={name: names.count(name) for name in tensor},
        spilled=names.count("STL"),
        fetched=names.count("LDL"),
        seconds=round(compiled.seconds, 2),
    )


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, file], capture_output=True, text=True, check=True)
    return done.stdout


def problems(found: Resources, capability: int, products: bool, rows: int = 64) -> list[str]:
    """Return what is wrong with a kernel on a chip, in sentences; none if it is sound.

    ``products`` says that it is to use the tensor cores, on so many ``rows``.
    """
    chip, said = CHIPS[generation(capability)], []
    if found.stack or found.local or found.spilled or found.fetched:
        said.append(
            f"spills registers: {found.stack} + {found.local} bytes a thread, "
            f"{found.spilled} STL, {found.fetched} LDL"
        )
    if found.registers * found.warps * 32 > REGISTERS:
        said.append(f"{found.registers} registers in {found.warps} warps do not fit")
    if found.shared > chip.shared:
        said.append(f"{found.shared} bytes of shared memory are more than {chip.shared}")
    wanted = LARGE.get(chip.capability, SMALL) if rows >= 64 else SMALL
    if products and wanted not in found.tensor:
        said.append(f"no {wanted} among {found.tensor or 'its instructions'}")
    return said


def narrow_offsets(ir: str) -> list[str]:
    """Return the lines of Triton's code that use a product of two 32-bit unknowns in an address.

    Such a product, of a row and a stride, overflows in large tensors, also if it is widened
    afterwards. A product with a constant is a place within a tile, or of a tile among others;
    what is divided by one is a program's number, of which there are fewer than 2**31.
    """
    constants: set[str] = set()
    suspects: set[str] = set()
    found = []
    for line in ir.splitlines():
        names = re.findall(r"%[\w#:]+", line)
        made, used = (names[:1], set(names[1:])) if " = " in line else ([], set(names))
        if "arith.constant" in line:
            constants.update(made)
        elif "arith.muli" in line and re.search(r"\bi32|xi32", line) and not used & constants:
            suspects.update(made)
        elif "tt.addptr" in line and suspects & used:
            found.append(line.strip())
        elif suspects & used and not re.search(r"arith\.(cmpi|minsi|remsi|divsi)|tt\.load", line):
            suspects.update(made)
    return found
