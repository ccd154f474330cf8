"""--dry-run and --config: what a run would be, and settings from a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastnull.cli import main
from fastnull.cli.options import read_fields
from fastnull.finetune import FinetuneConfig
from fastnull.finetune.dry_run import _encoder, _kept, dry_run
from fastnull.models import create_model, save_checkpoint

pytest.importorskip("sklearn")


def test_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = f"--augment boundary --site patch --epochs 2 --batch-size 32 --accumulate 2 --out {out}".split()
    assert main(["finetune", "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    # 1167 images: 36 batches an epoch; an image costs 6 for two views, 3 x 2 for the noise
    assert "steps      72 of 32 images in 2 epochs (1 processes x 2 parts of 16)" in text
    assert "synthesis  6 of 12 forward passes per image and step" in text
    assert f"cost       {72 * 32 * 12:,} forward passes" in text
    assert "53,354 parameters" in text
    assert "0.9 MB for weights, gradients, two moments; " in text  # 4 x 4 x 53,354 bytes
    assert "of weights in the synthesis's encoder" in text
    assert "| vit_digits |" in text  # the nullspace
    assert not out.exists()


def test_dry_run_looks_at_the_model_that_would_be_trained(tmp_path: Path) -> None:
    """Its size, and the nullspace of its weights: not those of the architecture's name."""
    model = create_model("vit_digits", img_size=16)
    with torch.no_grad():
        model.network.patch_embed.proj.weight[5:] = 0
    weights = tmp_path / "weights.safetensors"
    save_checkpoint(model, weights)
    table = dry_run(FinetuneConfig(checkpoint=str(weights), img_size=28)).split("\n\n")[1]
    heads, _, cells = ([cell.strip() for cell in row.split("|")] for row in table.splitlines())
    row = dict(zip(heads, cells, strict=True))
    assert (row["model"], row["weights"]) == ("vit_digits", str(weights))
    assert (row["tokens"], row["rank"], row["nullity"]) == ("49", "5", "43")
    assert " random |" in dry_run(FinetuneConfig())


def test_a_model_without_a_nullspace_to_measure_is_named() -> None:
    assert "resnet18: " in dry_run(FinetuneConfig(model="resnet18", augment="none")).splitlines()[-1]


def test_the_encoder_of_the_synthesis_counts() -> None:
    model = create_model("vit_digits")
    weights = sum(parameter.numel() for parameter in model.parameters())
    config = FinetuneConfig(augment="boundary", backend="reference")
    assert _encoder(model, config, sharded=False) == 0  # the model's own
    assert _encoder(model, config, sharded=True) == 4 * weights
    assert _encoder(model, replace(config, amp="bfloat16"), sharded=False) == 2 * weights
    assert _encoder(model, replace(config, augment="trades"), sharded=True) == 0
    written_out = _encoder(model, replace(config, backend="cpu"), sharded=False)
    assert 2 * weights < written_out < 12 * weights  # folded and packed


def test_a_sharded_run_needs_a_shard_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastnull.distributed.processes.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("fastnull.distributed.processes.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("fastnull.distributed.processes.distributed.get_world_size", lambda: 4)
    text = dry_run(FinetuneConfig(augment="none", shard=True, epochs=1))
    assert "(4 processes x 1 parts of 16)" in text
    assert "0.2 MB for weights, gradients, two moments (a shard of 4); " in text


def test_dry_run_refuses_what_the_run_would() -> None:
    with pytest.raises(ValueError, match="batch_size must be divisible"):
        dry_run(FinetuneConfig(batch_size=10, accumulate=3))


def test_memory_is_what_autograd_keeps() -> None:
    """Of a linear layer, a sigmoid and a linear layer: the input, and the sigmoid's result for both that need it."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 2))
    assert _kept(model, torch.rand(7, 3, 2, 2), FinetuneConfig()) == 7 * 4 * (12 + 5)


def test_settings_from_a_file_under_options(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "augment: none\nlr: 1e-3\nattack_eps: 4/255\nclip_grad: null\nepochs: 1\ntrain_fraction: 0.1\nema_decay: 0\n"
        "noise:\n"
    )
    config = replace(FinetuneConfig(augment="none", clip_grad=1.0), **read_fields(FinetuneConfig, file))
    assert (config.lr, config.attack_eps, config.clip_grad, config.ema_decay) == (1e-3, 4 / 255, None, 0.0)
    words = ["--config", str(file), "--lr", "0.25", "--no-progress", "--out", str(tmp_path / "run")]
    assert main(["finetune", *words]) == 0
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (resolved["augment"], resolved["lr"], resolved["epochs"]) == ("none", 0.25, 1)  # and every other field
    assert resolved.keys() == FinetuneConfig().to_dict().keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 64", "field must be one of .* got 'batchsize'. Did you mean 'batch_size'"),
        ("epochs: many", "epochs must be an integer; got 'many'"),
        ("epochs: 2.5", "epochs must be an integer; got '2.5'"),
        ("pretrained: 3", "pretrained: '3' is neither true"),
        ("pretrained: maybe", "pretrained: 'maybe' is neither true"),
        ("lr: yes", "lr: 'yes' is not a number"),
        ("augment: boundry", "Did you mean 'boundary'"),
        ("false", "must hold `field: value` lines; it holds 'false'"),
        ("- lr", "must hold `field: value` lines; it holds a list"),
        ("lr: [", "is no YAML file"),
        ("seed: 2024-13-45", "seed must be an integer; got '2024-13-45'"),
        ("lr: [1e-3]", "lr must be a single value"),
        ("lr: nan", "lr must be a number or None; got nan"),
        ("lr: 1\nepochs: 2\nlr: 2", "run.yaml: lr is given twice, in lines 1 and 3"),
        ("overwrite: no\nout: a\noverwrite: yes", "overwrite is given twice, in lines 1 and 3"),
        ("1: 2", "field must be one of"),
        ("? [lr]\n: 1", "field must be one of"),
        ("label: ''", "label must not be empty"),
        ("noise: 3", r"noise must hold `field: value` lines; it holds '3'"),
        ("noise:\n  esp: 1", "noise.field must be one of .* Did you mean 'eps'"),
        ("noise:\n  eps: many", "noise.eps: 'many' is not a number"),
        ("noise:\n  eps: 1\n  eps: 2", "noise.eps is given twice, in lines 2 and 3"),
        ("eps: 0.1\nnoise_share: 0.5", "eps is now noise.eps, noise_share is now noise_fraction"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        replace(FinetuneConfig(), **read_fields(FinetuneConfig, tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("resume: true", ["--out", "{out}"], {"resume": True}),
        ("overwrite: true", ["--out", "{out}"], {"overwrite": True}),
        ("overwrite: true", ["--out", "{out}", "--no-overwrite", "--resume"], {"resume": True, "overwrite": False}),
        ("force: true", ["--resume", "--out", "{out}"], {"force": True}),
        ("min_lr: 1e-2", ["--lr", "0.1"], {"min_lr": 0.01, "lr": 0.1}),
        ("mixup: 0.5\nbatch_size: 7", ["--batch-size", "8"], {"mixup": 0.5, "batch_size": 8}),
        ("noise: {preset: first}", ["--augment", "universal", "--noise.eps", "0.5"], {"augment": "universal"}),
        ("augment: trades", ["--noise-fraction", "0.5", "--augment", "boundary"], {"augment": "boundary"}),
        ("log: tensorboard", ["--out", "{out}"], {"log": "tensorboard"}),
    ],
)
def test_a_file_and_options_are_checked_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: list[str], expected: dict[str, Any]
) -> None:
    """What a field of the file needs may stand on the command line."""
    seen: list[FinetuneConfig] = []

    def run(config: FinetuneConfig) -> str:
        seen.append(config)
        return ""

    monkeypatch.setattr("fastnull.finetune.dry_run.dry_run", run)
    (tmp_path / "run.yaml").write_text(text)
    words = [word.replace("{out}", str(tmp_path / "run")) for word in words]
    assert main(["finetune", "--dry-run", "--config", str(tmp_path / "run.yaml"), *words]) == 0
    assert {name: seen[0].to_dict()[name] for name in expected} == expected


@pytest.mark.parametrize("text", ["resume: true", "min_lr: 1", "log: wandb", "force: true"])
def test_what_no_option_completes_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["finetune", "--dry-run", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "fastnull: error: " in capsys.readouterr().err
