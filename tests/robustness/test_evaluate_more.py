"""evaluate() beyond single numbers: killed within a measurement, shared out over processes, transfer, noise."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from fastnull.data import evaluation_data
from fastnull.models import create_model
from fastnull.noise import Noise
from fastnull.robustness import cw_l2, evaluate, fgsm, mi_fgsm, patch_attack, pgd
from fastnull.robustness.protocol import AS_GIVEN
from fastnull.vit import NormalizedModel
from tests.finetune.runs import BLUE, RED, coloured
from tests.robustness.small_model import Returning, make_model
from tests.robustness.test_evaluate import QUICK, Counting, accuracy, make_data

# the package's attribute of that name is the function
MODULE = importlib.import_module("fastnull.robustness.evaluate")

# --- killed within a measurement


# an interrupt saves what is done; any other end, as by SIGKILL, leaves the last save of every SAVE_SECONDS
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_a_measurement_resumes_where_it_was_killed(
    tmp_path: Path, kind: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "SAVE_SECONDS", 0.0)
    images, labels = make_data()  # 50: batches of 8, the last of 2
    data: Any = (images, labels) if kind == "tensors" else DataLoader(TensorDataset(images, labels), batch_size=8)
    out, settings = tmp_path / "result.json", {**QUICK, "suites": ("clean", "pgd"), "eps": (4 / 255,), "batch_size": 8}
    whole = Counting()
    expected = evaluate(whole, data, out=tmp_path / "other.json", **settings)
    assert whole.calls == 7 * (1 + 4)  # PGD: 3 steps and the answer
    with pytest.raises(error):
        evaluate(Counting(fail_after=7 + 3 * 4 + 2, error=error), data, out=out, **settings)  # in PGD's fourth batch
    kept = json.loads(out.read_text())
    assert kept["results"]["clean"] == expected["results"]["clean"]
    assert (kept["partial"]["measurement"], kept["partial"]["position"]) == ("pgd/4/255", 24)
    rest = Counting()
    record = evaluate(rest, data, out=out, **settings)
    assert rest.calls == 4 * 5  # which images are right is found again
    for found in (record, json.loads(out.read_text())):
        assert (found["results"], found["summary"]) == (expected["results"], expected["summary"])
        assert "partial" not in found
    again = Counting()
    assert evaluate(again, data, out=out, **settings)["results"] == expected["results"]
    assert again.calls == 0


# --- several processes


def _shard(rank: int, folder: str, world: int, fail: bool) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/join", rank=rank, world_size=world)
    model = Counting(fail_after=8 if fail else None)
    try:
        record = evaluate(model, make_data(), out=f"{folder}/out.json", batch_size=4, **SHARDED)
    except KeyboardInterrupt:
        os._exit(3)  # as a killed process: the group is not left
    Path(folder, f"rank-{rank}.json").write_text(json.dumps({"results": record["results"], "calls": model.calls}))
    distributed.destroy_process_group()


SHARDED: dict[str, Any] = {**QUICK, "suites": ("clean", "pgd", "corruptions"), "corruptions": ("gaussian_noise",)}


def test_two_processes_equal_one(tmp_path: Path) -> None:
    whole = Counting()
    expected = evaluate(whole, make_data(), batch_size=4, **SHARDED)
    torch.multiprocessing.spawn(_shard, (str(tmp_path), 2, False), nprocs=2)
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for found in ranks:
        assert found["results"] == expected["results"]
    # 13 batches: 7 and 6, nothing twice
    assert sum(found["calls"] for found in ranks) == whole.calls
    assert abs(ranks[0]["calls"] - ranks[1]["calls"]) == whole.calls // 13
    on_disk = json.loads((tmp_path / "out.json").read_text())
    assert on_disk["results"] == expected["results"]
    # one process completes, or finds complete, what two began
    again = Counting()
    assert evaluate(again, make_data(), out=tmp_path / "out.json", **SHARDED)["results"] == expected["results"]
    assert again.calls == 0


def test_a_loader_cannot_be_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    loader = DataLoader(TensorDataset(*make_data()), batch_size=8)
    with pytest.raises(ValueError, match="cannot be split over processes"):
        evaluate(make_model(dtype=torch.float64), loader, **QUICK)


# --- more attacks, transfer, noise


def test_attacks_without_and_with_a_radius() -> None:
    net, (images, labels) = make_model(dtype=torch.float64), make_data(24)
    suites = ("mi_fgsm", "apgd", "apgd_t", "cw")
    found = evaluate(net, (images, labels), suites=suites, eps=(4 / 255,), steps=5, progress=False, limit=24)
    results = found["results"]
    expected = accuracy(net, mi_fgsm(net, images, labels, 4 / 255, steps=5), labels)
    assert results["mi_fgsm"] == {"4/255": pytest.approx(expected)}
    settings: dict[str, Any] = {"initial_const": 1.0, "search_steps": 1, "steps": 50, "lr": 0.01}
    assert results["cw"] == pytest.approx(accuracy(net, cw_l2(net, images, labels, **settings), labels))
    assert set(results["apgd_t"]) == {"4/255"}
    with pytest.raises(ValueError, match="patch: "):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(768, 9)).double(), (images, labels), suites=("patch",))


def test_patch_on_a_vit(vit: NormalizedModel, images: Tensor) -> None:
    labels = torch.arange(8)
    found = evaluate(vit, (images, labels), suites=("patch",), progress=False)["results"]["patch"]
    assert found == pytest.approx(accuracy(vit, patch_attack(vit, images, labels), labels))


def test_transfer_attacks_the_source_and_tries_the_model() -> None:
    one, other = make_model(dtype=torch.float64), make_model(seed=1, dtype=torch.float64)
    images, labels = make_data()
    settings = {**QUICK, "suites": ("clean", "fgsm", "pgd")}
    record = evaluate(one, (images, labels), source=other, **settings)
    results = record["results"]
    assert results["clean"] == pytest.approx(accuracy(one, images, labels))
    assert results["fgsm"]["4/255"] == pytest.approx(accuracy(one, fgsm(other, images, labels, 4 / 255), labels))
    assert results["pgd"]["4/255"] == pytest.approx(accuracy(one, pgd(other, images, labels, 4 / 255, steps=3), labels))
    direct = evaluate(one, (images, labels), **settings)
    assert results["pgd"]["4/255"] > direct["results"]["pgd"]["4/255"] + 10, "another model's attack is weaker"
    assert direct["protocol"]["attacked_model"] == "itself"
    assert record["protocol"]["attacked_model"] != "itself"


def make_noise(tokens: Tensor, site: str = "patch") -> Noise:
    count = len(tokens)
    zeros = torch.zeros(count)
    return Noise(tokens, zeros, zeros, zeros.bool(), zeros.long(), site)


def test_noise_of_another_model(vit: NormalizedModel, images: Tensor) -> None:
    labels = vit(images).argmax(1)
    zero = evaluate(vit, (images, labels), suites=("noise",), noise=make_noise(torch.zeros(1, 16, 32)), progress=False)
    assert zero["results"]["noise"] == {"learned": 100.0, "permuted": 100.0}
    # noise i mod M: only odd images get the loud one
    loud = torch.cat([torch.zeros(1, 16, 32), 30 * torch.randn(1, 16, 32)])
    found = evaluate(vit, (images, labels), suites=("noise",), noise=make_noise(loud), progress=False, batch_size=3)
    assert 50 <= found["results"]["noise"]["learned"] < 100
    pixels = make_noise(torch.zeros(1, 3, 16, 16), "pixels")
    assert evaluate(vit, (images, labels), suites=("noise",), noise=pixels, progress=False)["results"]["noise"]
    with pytest.raises(ValueError, match="noise/learned: the noise is of shape"):
        evaluate(vit, (images, labels), suites=("noise",), noise=make_noise(torch.zeros(1, 9, 32)), progress=False)
    with pytest.raises(ValueError, match="suite noise needs a noise"):
        evaluate(vit, (images, labels), suites=("noise",), progress=False)


def test_outputs_with_logits_are_unwrapped() -> None:
    model = make_model(dtype=torch.float64)
    expected = evaluate(model, make_data(), **QUICK)["results"]
    wrapped = Returning(model, lambda logits: SimpleNamespace(logits=logits))
    assert evaluate(wrapped, make_data(), **QUICK)["results"] == expected


def test_the_view_of_files_is_recorded(tmp_path: Path) -> None:
    """Earlier files, which lack it, can be completed."""
    data = coloured(tmp_path / "data", {"cat": RED, "dog": BLUE})
    model, out = create_model("vit_digits", num_classes=2).eval(), tmp_path / "results.json"
    files = evaluation_data(str(data), model)
    record = evaluate(model, files, suites=("clean",), out=out, progress=False)
    view = "resized (crop 0.875, bicubic), cropped to 16x16"
    assert record["protocol"]["transform"] == view
    record["protocol"]["transform"] = AS_GIVEN
    record["results"] = {}
    out.write_text(json.dumps(record))
    again = evaluate(model, files, suites=("clean",), out=out, progress=False)
    assert again["protocol"]["transform"] == json.loads(out.read_text())["protocol"]["transform"] == view
    images, labels = (torch.stack(part) for part in zip(*((i, torch.tensor(k)) for i, k in files), strict=True))
    given = evaluate(model, (images, labels), suites=("clean",), progress=False)
    assert given["protocol"]["transform"] == AS_GIVEN
