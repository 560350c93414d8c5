"""Checks what was built: the native extension, and the GPU code of every architecture where a toolkit is there.

Of the GPU code, that the kernels have the instructions they are written for, no register was spilled to memory, and
what has to wait for earlier kernels does: what a compiler does silently, and what tests without a GPU cannot see.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

# Instructions that each kernel must have, as the beginnings of their names in the machine code: the tensor cores'
# product with sums in fp32, copies from global to shared memory, both 16 bytes wide.
WANTED = {
    "linear_kernelINS0_4Half": ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.128"),
    "linear_kernelINS0_8BFloat16": ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDS.128"),
    "dequantize_kernelINS0_4Half": ("STG.E.128",),
    # One query of a key head, and four: wide loads of the cache.
    "attend_kernelINS0_4HalfELi8ELi1ELi1E": ("LDG.E.128",),
    "attend_kernelINS0_4HalfELi8ELi4ELi1E": ("LDG.E.128",),
    "norm_kernelINS0_4HalfELi8E": ("LDG.E.128", "STG.E.128"),
}
# What only code for sm_90a has: products of warpgroups, bulk copies.
WANTED_OF_HOPPER = {
    "warpgroup_kernelINS0_4Half": ("HGMMA.64x64x16.F32", "UBLKCP", "LDS.128"),
    "warpgroup_kernelINS0_8BFloat16": ("HGMMA.64x64x16.F32.BF16", "UBLKCP", "LDS.128"),
}
# Reads and writes of a thread's own memory.
SPILLS = ("LDL", "STL")
# The wait for earlier kernels (csrc/cuda/overlap.h), and what must not come before it: accesses to global memory. But
# linear_kernel copies weights by then.
WAIT = "ACQBULK"
ACCESSES = ("LD", "LDG", "ST", "STG", "ATOM", "ATOMG", "RED", "LDGSTS", "UBLKCP")
EARLY = f"an access before {WAIT}"


def main() -> str | None:
    import torch  # noqa: F401  (the extension needs torch's libraries loaded)

    from autoq import _C

    info = _C.build_info()
    print(info)
    if not info["cuda_architectures"]:
        has_toolkit = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
        return "a CUDA toolkit is here, but the extension was built without CUDA" if has_toolkit else None
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        return "the GPU code cannot be looked at: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return check_instructions(cuobjdump, Path(_C.__file__), info["cuda_architectures"])


def find_cuobjdump() -> Path | None:
    """The toolkit's disassembler, or the one from the package nvidia-cuda-cuobjdump."""
    folders = ["/usr/local/cuda/bin"]
    nvidia = importlib.util.find_spec("nvidia")
    for place in (nvidia and nvidia.submodule_search_locations) or []:
        folders += map(str, Path(place).glob("cu*/bin"))
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(folders))
    return None if found is None else Path(found)


def check_instructions(cuobjdump: Path, library: Path, architectures: str) -> str | None:
    problems = []
    for architecture in re.split("[; ]", architectures.replace("+PTX", "")):
        name = f"sm_{architecture.replace('.', '')}"
        kernels = instructions(cuobjdump, library, name)
        problems += problems_of(name, kernels)
        products = sum(counts["HMMA"] + counts["HGMMA"] for counts in kernels.values())
        print(f"{name}: {len(kernels)} kernels, {products} products on the tensor cores")
    return "\n".join(problems) or None


def instructions(cuobjdump: Path, library: Path, architecture: str) -> dict[str, Counter[str]]:
    """How often each kernel has each instruction, by its full name and by its first part; and EARLY."""
    # The disassembler that cuobjdump calls lies beside it.
    environment = {"PATH": f"{cuobjdump.parent}:/usr/bin:/bin"}
    command = [str(cuobjdump), "-sass", "-arch", architecture, str(library)]
    kernels: defaultdict[str, Counter[str]] = defaultdict(Counter)
    kernel, accesses = "", 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"Function : (\S+)", line):
                kernel, accesses = match[1], 0
            elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", line):
                name = match[1].partition(".")[0]
                kernels[kernel].update({match[1], name})
                accesses += name in ACCESSES and not (name == "LDGSTS" and "linear_kernel" in kernel)
                if name == WAIT:
                    kernels[kernel][EARLY] += accesses
    return dict(kernels)


def problems_of(architecture: str, kernels: dict[str, Counter[str]]) -> list[str]:
    problems = [f"{architecture}: {kernel} has {EARLY}" for kernel, counts in kernels.items() if counts[EARLY]]
    for wanted, names in (WANTED | WANTED_OF_HOPPER if architecture == "sm_90a" else WANTED).items():
        found = {kernel: counts for kernel, counts in kernels.items() if wanted in kernel}
        if not found:
            problems.append(f"{architecture}: there is no {wanted}")
        for kernel, counts in found.items():
            problems += [
                f"{architecture}: {kernel} has no {name}"
                for name in names
                if not any(i.startswith(name) for i in counts)
            ]
            problems += [f"{architecture}: {kernel} has {counts[name]} {name}" for name in SPILLS if counts[name]]
    return problems


if __name__ == "__main__":
    sys.exit(main())
