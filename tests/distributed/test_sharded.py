"""A sharded run (FSDP2) on two processes equals that of one, resumes on any number, and ends if one process dies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, multiprocessing, nn

from fastnull.compat import import_timm
from fastnull.data import digits
from fastnull.distributed import Processes
from fastnull.distributed.sharded import is_sharded, shard
from fastnull.distributed.sharded_state import write_shards
from fastnull.encoder import FrozenEncoder
from fastnull.finetune import finetune
from fastnull.finetune.checkpoint import RunFolder, read_state
from fastnull.finetune.config import AUGMENTS
from fastnull.models import create_model, load_model
from tests.distributed.test_processes import (
    MIXED,
    PLAIN,
    ROUNDED,
    SMALL,
    assert_ends_with_a_dead_process,
    assert_nearly_same_run,
    assert_same_run,
    launch,
    simplify,
    started,
    untrained,
    with_noise,
)

pytest.importorskip("sklearn")
timm = import_timm()
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

ALL: dict[str, Any] = {
    "augment": "boundary", "backend": "cpu", "accumulate": 2, "epochs": 2, "checkpoint_every": 1, "keep_last": 9,
    **MIXED,
}  # fmt: skip
FORCED = {**ALL, "resume": True, "force": True, "lr": 1e-3, "weight_decay": 0.2, "epochs": 3}
CASES: dict[str, dict[str, Any]] = {
    # float64 runs on the reference backend where none is asked for: here a copy of the model
    **{augment: {"augment": augment} for augment in AUGMENTS},
    "per_image, written out": {"augment": "per_image", "backend": "cpu"},
    "universal, written out": {"augment": "universal", "backend": "cpu", "val_fraction": 0.0},
    "boundary in pixels": {"augment": "boundary", "site": "pixels", "noise": {"limit": 8 / 255}},
    "boundary at block 0": {"augment": "boundary", "site": "block0", "backend": "cpu"},
    "adversarial in parts": {"augment": "adversarial", "accumulate": 2},
    "compiled, channels last": {"augment": "boundary", "compile": True, "channels_last": True, "accumulate": 2},
    "all": ALL,
    **ROUNDED,
}


def train(changes: dict[str, Any], out: Path) -> nn.Module:
    """Train in float64, except ROUNDED, so that rounding errors are small. The model has LayerScale, and a frozen patch
    embedding."""
    images, labels = digits()[0].tensors
    rounded = "amp" in changes
    model = untrained(double=not rounded, **({} if rounded else {"init_values": 0.5}))
    if changes.get("backend") == "cpu":
        model.network.patch_embed.requires_grad_(False)
    config = replace(SMALL, **with_noise({"epochs": 1, **changes}), out=str(out))
    return finetune(config, model, (images[:48], labels[:48])).model


def up_to(step: int, source: Path, out: Path) -> Path:
    """A copy of a run that was killed right after it had saved this step."""
    shutil.copytree(source, out)
    for later in out.glob("state-*"):
        if int(later.stem[6:]) > step:
            shutil.rmtree(later) if later.is_dir() else later.unlink()
    return out


def _together(rank: int, folder: str) -> None:
    """What two processes do; the tests look at what they leave in the folder."""
    torch.set_num_threads(1)
    simplify(pytest.MonkeyPatch())
    out = Path(folder)
    distributed.init_process_group("gloo", f"file://{folder}/join", rank=rank, world_size=2)
    for name, changes in CASES.items():
        model = train({**changes, "shard": True}, out / name)
        assert all(is_sharded(value) for value in model.parameters())  # also after the last evaluation
    if rank == 0:
        up_to(2, out / "all", out / "2 to 2")
        up_to(2, out / "all", out / "forced")
    distributed.barrier()
    for name in ("2 to 2", "1 to 2"):
        train({**ALL, "shard": True, "resume": True}, out / name)
    train({**FORCED, "shard": True}, out / "forced")
    save_file(_overflowed(rank), out / f"overflowed-{rank}.safetensors")
    _more_gathers_than_images(out / "uneven")
    save_file(_clipped(), out / f"norm-{rank}.safetensors")
    _errors(rank, out)
    distributed.barrier()
    distributed.destroy_process_group()


def _more_gathers_than_images(out: Path) -> None:
    """17 held-out images in batches of 8: 9 for the first process, which needs one batch more."""
    images, labels = digits()[0].tensors
    model = create_model("vit_digits", num_classes=10)
    config = replace(SMALL, epochs=1, shard=True, out=str(out))
    finetune(config, model, (images[:32], labels[:32]), (images[32:49], labels[32:49]))


def _clipped() -> dict[str, Tensor]:
    """The norm of all gradients as clipping sees it, and the gradients of one block after it."""
    torch.manual_seed(0)
    model = create_model("vit_digits", num_classes=10).double()
    shard(model)
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(images).logsumexp(1).sum().backward()
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    gradients = {name: value.grad.full_tensor() for name, value in model.network.blocks[0].named_parameters()}
    return {"norm": norm.full_tensor(), **gradients}


def _overflowed(rank: int) -> dict[str, Tensor]:
    """Weights before and after two steps with scaled gradients, of which one process's shard overflows in the first."""
    torch.manual_seed(0)
    model = create_model("vit_digits", num_classes=10)
    shard(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    weight: Any = model.network.blocks[0].attn.qkv.weight
    found = {"0": weight.full_tensor().clone()}
    for step in (1, 2):
        scaler.scale(model(torch.ones(4, 3, 16, 16)).logsumexp(1).sum()).backward()
        if step == 1 and rank == 0:
            weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found[str(step)] = weight.full_tensor().clone()
    return {**found, "scale": torch.tensor(scaler.get_scale())}


def _errors(rank: int, out: Path) -> None:
    """Errors of two processes."""
    model = create_model("vit_digits", num_classes=10)
    with pytest.raises(ValueError, match="is not sharded: call fully_shard"), FrozenEncoder(model).sharding():
        pass
    shard(model)
    with pytest.raises(ValueError, match=r"sharded already.*encoder\.sharding"):
        FrozenEncoder(model)
    with pytest.raises(ValueError, match="Linear has no list of modules of one class"):
        shard(nn.Linear(2, 2))
    (out / "file").touch()
    distributed.barrier()
    with pytest.raises(OSError, match="process 0: Not a directory"):
        write_shards(out / "file" / "state", dict(model.state_dict()), Processes())
    with pytest.raises(ValueError, match=r"another model or optimiser: .* only in the state"):
        train({**ALL, "ema_decay": None, "resume": True, "shard": True}, _without_settings(out / "all"))


def _without_settings(run: Path) -> Path:
    """The run without the file that would tell other settings first."""
    (run / "config.json").unlink(missing_ok=True)
    distributed.barrier()
    return run


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have run every case."""
    folder = tmp_path_factory.mktemp("together")
    train({**ALL, "accumulate": 1}, folder / "alone")
    up_to(2, folder / "alone", folder / "1 to 2")
    train({**FORCED, "accumulate": 1}, up_to(2, folder / "alone", folder / "forced alone"))
    multiprocessing.spawn(_together, (str(folder),), nprocs=2)
    return folder


@pytest.mark.filterwarnings("ignore:the universal noise")
@pytest.mark.parametrize("case", [case for case in CASES if case != "all"])
def test_two_shards_are_one_model(together: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simplify(monkeypatch)
    train({**CASES[case], **PLAIN}, tmp_path / "alone")
    same = assert_nearly_same_run if case in ROUNDED else assert_same_run
    same(together / case, tmp_path / "alone")


def test_resume_on_as_many_more_and_fewer_processes(together: Path) -> None:
    """Also Mixup, CutMix, clipping, averaging, layer decay, parts, LayerScale, frozen weights: "all" has them."""
    assert_same_run(together / "all", together / "alone")
    assert_same_run(together / "2 to 2", together / "all", bitwise=True)
    assert_same_run(together / "1 to 2", together / "alone")
    resumed = up_to(3, together / "1 to 2", together / "1 to 2 to 1")
    with pytest.warns(UserWarning, match="shard: there is only one process"):
        train({**ALL, "shard": True, "resume": True}, resumed)
    assert_same_run(resumed, together / "alone")
    assert "model" in read_state(resumed / "state-000000004.pt")  # whole again
    assert_same_run(together / "forced", together / "forced alone")


def test_what_a_sharded_run_leaves(together: Path) -> None:
    files = sorted(path.name for path in (together / "boundary").iterdir())
    assert files == [
        "best.safetensors", "config.json", "last.safetensors", "metrics.jsonl", "state-000000002.pt",
        "state-000000002.shards",
    ]  # fmt: skip
    assert all(path.suffix == ".safetensors" for path in (together / "boundary" / files[-1]).iterdir())
    model = load_model(together / "boundary" / "best.safetensors")
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    theirs = create_model("vit_digits", num_classes=10, init_values=0.5).network
    timm.models.load_checkpoint(theirs, str(together / "boundary" / "best.safetensors"), strict=True)
    assert torch.equal(theirs.head.weight, model.network.head.weight)
    assert (together / "uneven" / "last.safetensors").exists()


def test_an_overflow_in_one_shard_skips_the_step_of_all(together: Path) -> None:
    first, second = (load_file(together / f"overflowed-{rank}.safetensors") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(first["1"], first["0"])
    assert not torch.equal(first["2"], first["1"])
    assert first["scale"] == 2.0**9


def test_clipping_has_one_norm(together: Path) -> None:
    first, second = (load_file(together / f"norm-{rank}.safetensors") for rank in range(2))
    torch.manual_seed(0)
    model = create_model("vit_digits", num_classes=10).double()
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model(images).logsumexp(1).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    expected = {name: value.grad for name, value in model.network.blocks[0].named_parameters()}
    assert torch.equal(first["norm"], second["norm"])
    torch.testing.assert_close(first, {"norm": norm, **expected})
    torch.testing.assert_close(second, first)


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "missing", "foreign", "no folder"])
def test_damaged_shards_are_recognised_and_the_state_before_used(together: Path, tmp_path: Path, damage: str) -> None:
    run = up_to(3, together / "2 to 2", tmp_path / "run")
    shards = run / "state-000000003.shards"
    file = sorted(shards.iterdir())[-1]
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-1])
    elif damage == "flipped bit":
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "missing":
        file.unlink()
    elif damage == "foreign":
        (shards / "another.safetensors").write_bytes(whole)
    else:
        shutil.rmtree(shards)
    (run / "config.json").unlink()
    folder = RunFolder(run, {}, resume=True)
    with pytest.warns(UserWarning, match="000003.*using the previous state"):
        state = folder.load_state()
    assert state is not None
    assert state["step"] == 2


def test_what_a_killed_save_left_is_removed(together: Path, tmp_path: Path) -> None:
    run = up_to(3, together / "2 to 2", tmp_path / "run")
    (run / "state-000000003.pt").unlink()
    (run / ".state-000000004.shards.tmp").mkdir()
    (run / "config.json").unlink()
    RunFolder(run, {}, resume=True).open()
    assert {path.name for path in run.glob("*state*")} == {
        f"state-{step:09d}{suffix}" for step in (1, 2) for suffix in (".pt", ".shards")
    }
    RunFolder(run, {}, overwrite=True).open()
    assert not list(run.iterdir())


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes through /proc")
def test_a_dead_process_ends_the_job(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with launch("--out", str(out), "--epochs", "300", "--log-every", "1", "--shard") as process:
        started(process, out)
        assert_ends_with_a_dead_process(process)
