"""`python -m fastnull.build_info`: what was built and what is in use."""

from __future__ import annotations

import json
from typing import Any

import torch

from fastnull import _C, __version__


def build_info() -> dict[str, Any]:
    """The build record and the libraries that this process uses."""
    cpu = _C.cpu_available()
    cuda = _C.cuda.load() if torch.cuda.is_available() else False
    return {
        "fastnull": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": {
            "loaded": cpu,
            "level": _C.cpu_level(),
            "levels": _C.cpu_levels(),
            "error": _C.cpu.error,
        },
        "cuda": {
            "loaded": cuda,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "error": _C.cuda.error if torch.cuda.is_available() else "torch sees no CUDA device",
        },
        "built": _C.build_record(),
    }


if __name__ == "__main__":
    print(json.dumps(build_info(), indent=2))
