"""evaluate(): its numbers by hand, resuming, refusals, and what it leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastnull.data.subset import even_subset
from fastnull.robustness import EvaluationSettings, corrupt, evaluate, fgsm, format_table, pgd
from fastnull.robustness.metrics import ALEXNET_ERRORS
from fastnull.robustness.table import eps_name, summarize
from tests.robustness.small_model import CLASSES, Returning, make_model
from tests.robustness.test_batches import Pairs

# float64 in the comparisons of batch sizes: float32 sums may differ by a bit, and a sign with it
QUICK: dict[str, Any] = {
    "eps": (1 / 255, 4 / 255), "steps": 3, "corruptions": ("gaussian_noise", "contrast"), "severities": (1, 4),
    "progress": False,
}  # fmt: skip


def make_data(count: int = 50, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=dtype)
    labels = make_model(dtype=dtype)(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % CLASSES  # a clean accuracy of 80 %
    return images, labels


@pytest.fixture
def net() -> nn.Module:
    return make_model(dtype=torch.float64)


class Counting(nn.Module):
    """Counts calls, and raises after some."""

    def __init__(
        self,
        fail_after: int | None = None,
        nan_after: int | None = None,
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        super().__init__()
        self.inner = make_model(dtype=torch.float64)
        self.calls = 0
        self.fail_after, self.nan_after, self.error = fail_after, nan_after, error

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise self.error
        logits = self.inner(images)
        return logits * math.nan if self.nan_after is not None and self.calls > self.nan_after else logits


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(1) == labels).double().mean().item()


def test_numbers_are_those_of_the_parts(net: nn.Module) -> None:
    images, labels = make_data()
    record = evaluate(net, (images, labels), **QUICK)
    results = record["results"]
    assert results["clean"] == pytest.approx(80)
    assert results["clean_top5"] >= results["clean"]
    for name, eps in (("1/255", 1 / 255), ("4/255", 4 / 255)):
        assert results["fgsm"][name] == pytest.approx(accuracy(net, fgsm(net, images, labels, eps), labels))
        assert results["pgd"][name] == pytest.approx(accuracy(net, pgd(net, images, labels, eps, steps=3), labels))
    for name in ("gaussian_noise", "contrast"):
        for severity in (1, 4):
            expected = accuracy(net, corrupt(images, name, severity), labels)
            assert results["corruptions"][name][str(severity)] == pytest.approx(expected)
    attacks = [*results["fgsm"].values(), *results["pgd"].values()]
    corruptions = [value for table in results["corruptions"].values() for value in table.values()]
    assert record["summary"] == {
        "clean": results["clean"],
        "adversarial_mean": pytest.approx(sum(attacks) / 4),
        "corruption_mean": pytest.approx(sum(corruptions) / 4),
        "mce": None,
    }
    assert 0 < record["summary"]["adversarial_mean"] < results["clean"]


def test_protocol_says_what_was_done(net: nn.Module) -> None:
    protocol = evaluate(net, make_data(), limit=20, seed=3, **QUICK)["protocol"]
    assert protocol["n"] == 20
    assert protocol["subset"] == "20, drawn evenly over the classes by the seed"
    assert protocol["eps"] == ["1/255", "4/255"]
    assert protocol["mean"] == pytest.approx([0.4, 0.5, 0.6])
    assert protocol["std"] == pytest.approx([0.2, 0.25, 0.3])
    assert protocol["dtype"] == "float64"
    assert (protocol["seed"], protocol["steps"], protocol["restarts"], protocol["norm"]) == (3, 3, 1, "linf")
    assert {"torch", "commit", "device_name", "date"} <= protocol["provenance"].keys()
    json.dumps(protocol, allow_nan=False)


def test_every_kind_of_data_and_batch_size_gives_the_same(net: nn.Module) -> None:
    images, labels = make_data()
    expected = evaluate(net, (images, labels), **QUICK)
    for data, size in (
        ((images, labels), 7),
        (Pairs(images, labels), 16),
        (DataLoader(TensorDataset(images, labels), batch_size=13), 1),
        (DataLoader(Pairs(images, labels), batch_size=50), 1),
    ):
        record = evaluate(net, data, batch_size=size, **QUICK)
        assert record["results"] == expected["results"]
        differing = {key for key in expected["protocol"] if record["protocol"][key] != expected["protocol"][key]}
        assert differing <= {"provenance"}


def test_limit_is_even_over_the_classes(net: nn.Module) -> None:
    images, labels = make_data()
    chosen = even_subset(labels, 21, seed=0)
    expected = evaluate(net, (images, labels), limit=21, **QUICK)["results"]
    assert expected["clean"] == pytest.approx(accuracy(net, images[chosen], labels[chosen]))
    # an image has the noise that it has without a limit
    noisy = corrupt(images, "gaussian_noise", 4)[chosen]
    assert expected["corruptions"]["gaussian_noise"]["4"] == pytest.approx(accuracy(net, noisy, labels[chosen]))
    assert evaluate(net, (images, labels), limit=21, batch_size=8, **QUICK)["results"] == expected
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    assert evaluate(net, loader, limit=21, **QUICK)["results"] == expected


def test_suites_can_be_left_out_and_apgd_added(net: nn.Module) -> None:
    record = evaluate(net, make_data(), suites=("apgd",), eps=(2 / 255,), steps=5, progress=False)
    assert record["results"].keys() == {"apgd"}
    assert record["summary"] == {"clean": None, "adversarial_mean": None, "corruption_mean": None, "mce": None}


def test_l2_norm(net: nn.Module) -> None:
    images, labels = make_data()
    record = evaluate(net, (images, labels), suites=("pgd",), eps=(0.25,), norm="l2", steps=3, progress=False)
    expected = accuracy(net, pgd(net, images, labels, 0.25, norm="l2", steps=3), labels)
    assert record["results"]["pgd"] == {"0.25": pytest.approx(expected)}


def test_float16_attacks_are_warned_of_and_bfloat16_ones_are_not(recwarn: pytest.WarningsRecorder) -> None:
    settings: dict[str, Any] = {"suites": ("fgsm",), "eps": (1 / 255,), "progress": False}
    record = evaluate(make_model(dtype=torch.bfloat16), make_data(dtype=torch.float32), **settings)
    assert record["protocol"]["dtype"] == "bfloat16"
    assert not recwarn.list
    with pytest.warns(UserWarning, match="vanish in float16"):
        evaluate(make_model(dtype=torch.float16), make_data(dtype=torch.float32), **settings)


# --- resuming


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"steps": 4}, r"steps \(3 there, 4 now\)"),
        ({"seed": 1}, "seed"),
        ({"eps": (1 / 255,)}, "eps"),
        ({"limit": 30}, "subset"),
        ({"severities": (1,)}, "severities"),
        ({"suites": ("clean",)}, "suites"),
    ],
)
def test_another_protocol_is_refused_by_name(tmp_path: Path, net: nn.Module, change: dict[str, Any], key: str) -> None:
    out = tmp_path / "result.json"
    data = make_data()
    evaluate(net, data, out=out, **QUICK)
    before = out.read_text()
    with pytest.raises(ValueError, match=f"another protocol: .*{key}"):
        evaluate(net, data, out=out, **{**QUICK, **change})
    assert out.read_text() == before


def test_other_weights_and_other_data_are_refused(tmp_path: Path, net: nn.Module) -> None:
    out = tmp_path / "result.json"
    images, labels = make_data()
    evaluate(net, (images, labels), out=out, **QUICK)
    with pytest.raises(ValueError, match="another protocol: weights"):
        evaluate(make_model(seed=1, dtype=torch.float64), (images, labels), out=out, **QUICK)
    with pytest.raises(ValueError, match="another protocol: data"):
        evaluate(net, (images.flip(0), labels.flip(0)), out=out, **QUICK)
    evaluate(make_model(seed=1, dtype=torch.float64), (images, labels), out=out, resume=False, **QUICK)


# --- refusals


@pytest.mark.parametrize(
    ("nan_after", "where"),
    [(0, "clean"), (1, "fgsm/1/255"), (5, "pgd/1/255"), (13, "corruptions/gaussian_noise/1")],
)
def test_nan_logits_name_the_suite(nan_after: int, where: str) -> None:
    with pytest.raises(ValueError, match=f"^{where}: .*NaN"):
        evaluate(Counting(nan_after=nan_after), make_data(), **QUICK)


def test_a_model_that_returns_no_logits(net: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"model must return logits \[B, K\] or an output with \.logits; got dict"):
        evaluate(Returning(net, lambda logits: {"features": logits}), make_data(), **QUICK)


def test_bad_data(net: nn.Module) -> None:
    images, labels = make_data()
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(net, (images[:0], labels[:0]), **QUICK)
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(net, DataLoader(TensorDataset(images[:0], labels[:0])), **QUICK)
    with pytest.raises(ValueError, match=r"^clean: labels must lie in 0\.\.6"):
        evaluate(net, (images, labels + 3), **QUICK)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        evaluate(net, (images * 2, labels), **QUICK)
    with pytest.raises(ValueError, match=r"labels must be classes \[50\]"):
        evaluate(net, (images, labels[:3]), **QUICK)
    for channels in (1, 4):
        with pytest.raises(ValueError, match="clean: images must have 3 channels"):
            evaluate(net, (images[:, :1].expand(-1, channels, -1, -1), labels), **QUICK)
    with pytest.raises(TypeError, match="data must be a pair of tensors"):
        evaluate(net, images, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pairs"):
        evaluate(net, DataLoader(images), **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suites": "clean"}, "suites must be a sequence of names"),
        ({"source": "last.safetensors"}, r"source must be a torch\.nn\.Module; got str"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "gpu"}, "gpu"),
        ({"suites": ("clean", "pdg")}, "Did you mean 'pgd'"),
        ({"suites": ()}, "at least one"),
        ({"eps": (8,)}, "eps must be"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"corruptions": ("rain",)}, "corruption must be one of"),
        ({"severities": (0,)}, "severities must be among"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"limit": 0}, "limit must be >= 1"),
    ],
)
def test_bad_settings(net: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(net, make_data(), **{**QUICK, **settings})


# --- what is left behind, and tables


def test_modes_and_random_state_are_restored(net: nn.Module) -> None:
    net.train()
    images, labels = make_data()
    state = torch.get_rng_state()
    evaluate(net, DataLoader(TensorDataset(images, labels), batch_size=20), **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_progress_bar_goes_to_stderr(net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(net, make_data(), **{**QUICK, "progress": True})
    captured = capsys.readouterr()
    assert "450/450" in captured.err  # 50 images in each of 9 measurements
    assert captured.out == ""


def test_eps_names() -> None:
    assert [eps_name(k / 255) for k in (1, 2, 0.5, 16)] == ["1/255", "2/255", "0.5/255", "16/255"]
    assert eps_name(0.0313) == "0.0313"
    assert eps_name(0) == "0/255"
    assert eps_name(2 / 255, "l2") == str(2 / 255)


def test_summary_has_mce_when_all_fifteen_are_there() -> None:
    tables = {n: {str(s): 100 * (1 - e) for s, e in enumerate(errors, 1)} for n, errors in ALEXNET_ERRORS.items()}
    assert summarize({"corruptions": tables})["mce"] == pytest.approx(100)
    del tables["fog"]["5"]
    assert summarize({"corruptions": tables})["mce"] is None


def test_tables(net: nn.Module) -> None:
    record = evaluate(net, make_data(), **QUICK)
    lines = format_table(record).splitlines()
    assert lines[0] == "| | accuracy |"
    assert "| clean | 80.0 |" in lines
    assert any(line.startswith("| PGD 4/255 | ") for line in lines)
    assert any(line.startswith("| gaussian_noise (mean of severities 1, 4) | ") for line in lines)
    assert lines[-1].startswith("| **corruption mean (in memory)** | ")
    clean = evaluate(net, make_data(), suites=("clean",), progress=False)
    both = format_table({"a": clean, "b": record}).splitlines()
    assert both[0] == "| | a | b |"
    assert any(line.startswith("| PGD 4/255 | – | ") for line in both)
    assert all(line.count("|") == 4 for line in both)
    with pytest.raises(ValueError, match="at least one result"):
        format_table({})


def test_settings_and_keywords_say_the_same(net: nn.Module) -> None:
    settings = EvaluationSettings(suites=("clean", "fgsm"), eps=(1 / 255, 4 / 255), progress=False)
    expected = evaluate(net, make_data(), suites=["clean", "fgsm"], eps=[1 / 255, 4 / 255], progress=False)["results"]
    assert evaluate(net, make_data(), settings)["results"] == expected
    one = evaluate(net, make_data(), settings, eps=(4 / 255,))["results"]  # a keyword goes before the settings
    assert one["fgsm"] == {"4/255": expected["fgsm"]["4/255"]}
    with pytest.raises(TypeError, match="epsilon"):
        evaluate(net, make_data(), epsilon=(1 / 255,))
