"""Tensors in files: those that share memory, have strides or lie nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastnull.tensor_files import write_tensors

BASE = torch.arange(12.0)
LAID: dict[str, dict[str, torch.Tensor]] = {
    "one tensor twice": {"a": BASE, "b": BASE},
    "views": {"a": BASE[:8], "b": BASE[4:].view(2, 4)},
    "strides": {"a": BASE.view(3, 4).t(), "b": BASE[::2]},
    "channels last": {"a": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)},
    "expanded": {"a": BASE[:1].expand(5)},
    "a parameter": {"a": torch.nn.Parameter(BASE)},
    "no dimension": {"a": torch.tensor(3), "b": torch.zeros(0, 2)},
    "16 bits": {"a": BASE.bfloat16(), "b": BASE.half(), "c": BASE > 3},
}


@pytest.mark.parametrize("case", LAID)
def test_round_trip(tmp_path: Path, case: str) -> None:
    tensors = LAID[case]
    write_tensors(tmp_path / "file.safetensors", tensors, {"about": "it"})
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(2, device="meta"), ValueError, "^w is on the meta device and has no values$"),
        (torch.eye(2).to_sparse(), TypeError, "^w must be a dense tensor; got torch.sparse_coo"),
        ([1, 2], TypeError, "^w must be a tensor; got list"),
    ],
)
def test_what_has_no_values_is_named_and_the_file_stays(
    tmp_path: Path, value: Any, error: type[Exception], message: str
) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": BASE}, {})
    with pytest.raises(error, match=message):
        write_tensors(path, {"w": value}, {})
    assert torch.equal(load_file(path)["w"], BASE)


def test_a_full_disk_is_the_systems_error(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": BASE}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*file.safetensors'"):
            write_tensors(path, {"w": torch.zeros(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_file(path)["w"], BASE)
    assert [file.name for file in tmp_path.iterdir()] == ["file.safetensors"]
