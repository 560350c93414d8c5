"""Checks what was built: the native extension, and the CUDA code for every architecture where a toolkit is there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main() -> str | None:
    import torch  # noqa: F401  (the extension needs torch's libraries loaded)

    from autoq import _C

    info = _C.build_info()
    print(info)
    if (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()) and "cuda_architectures" not in info:
        return "a CUDA toolkit is here, but the extension was built without CUDA"
    return None


if __name__ == "__main__":
    sys.exit(main())
