"""Importing timm where torchvision is right, wrong or absent. Each in its own process: an import happens once."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent

# What the registry's torchvision does beside another build of torch: it registers fakes for operators that its compiled
# library would have brought, and only then the rest of the package loads.
MISMATCHED = """
import torch
torch.library.register_fake("torchvision::qnms")(lambda *a: None)
from pathlib import Path
__path__ = [{real!r}]
exec(compile(Path({real!r}, "__init__.py").read_text(), __file__, "exec"))
"""

USE = """
from fastnull.compat import import_timm
timm = import_timm()
import torch
assert import_timm() is timm
assert timm.optim and timm.scheduler and timm.data and timm.utils
model = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=1)
print("logits", *model(torch.zeros(1, 3, 8, 8)).shape)
"""


def run(code: str, before: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(path) for path in (before, PROJECT) if path is not None]
    code = f"import sys; sys.path[:0] = {paths!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    (tmp_path / "torchvision").mkdir()
    return tmp_path


def real_torchvision() -> str:
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("torchvision is not installed")
    return str(Path(found.origin).parent)


def test_timm_imports_here() -> None:
    done = run(USE)
    assert done.stdout == "logits 1 1000\n", done.stderr


def test_timm_imports_beside_a_torchvision_built_for_another_torch(fake: Path) -> None:
    (fake / "torchvision" / "__init__.py").write_text(MISMATCHED.format(real=real_torchvision()))
    plain = run("import torchvision", fake)
    assert "operator torchvision::qnms does not exist" in plain.stderr  # without help it fails as in the wild
    done = run(USE, fake)
    assert done.stdout == "logits 1 1000\n", done.stderr


def test_an_operator_declared_for_the_import_still_refuses_calls(fake: Path) -> None:
    (fake / "torchvision" / "__init__.py").write_text(MISMATCHED.format(real=real_torchvision()))
    call = (
        "from fastnull import compat; compat._declare_torchvision_operators(); import torch\n"
        "torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    )
    done = run(call, fake)
    assert done.returncode != 0
    assert "NotImplementedError" in done.stderr


def test_other_errors_of_torchvision_are_not_hidden(fake: Path) -> None:
    (fake / "torchvision" / "__init__.py").write_text("raise RuntimeError('no disk')")
    done = run(USE, fake)
    assert "RuntimeError: no disk" in done.stderr


def test_missing_timm_says_what_to_install(fake: Path) -> None:
    (fake / "timm").mkdir()
    (fake / "timm" / "__init__.py").write_text("raise ImportError('nothing here')")
    done = run(USE, fake)
    assert "ImportError: this needs timm (pip install timm): nothing here" in done.stderr
