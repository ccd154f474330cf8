"""Training states and the folder of a run: what a crash, a foreign file or another setting does to them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from fastnull.checkpoint import RunFolder, read_state, write_state

CONFIG = {"lr": 0.1, "epochs": 2, "betas": (0.9, 0.99), "workers": 0}


def folder(path, **changes):
    made = RunFolder(path, CONFIG, **changes)
    made.open()
    made.describe(CONFIG, "cpu")
    return made


def state(step):
    return {"step": step, "weights": torch.arange(6.0).view(2, 3) + step, "best": (None, 1.5), "history": [{"a": 1}]}


def same(left, right):
    return left["step"] == right["step"] and torch.equal(left["weights"], right["weights"])


def test_state_round_trip_is_bitwise(tmp_path):
    values = torch.tensor([1e-45, -0.0, 3.14, float("inf")])
    write_state(tmp_path / "state.pt", {"values": values, "half": values.bfloat16(), "best": (2, None)})
    found = read_state(tmp_path / "state.pt")
    assert found["values"].view(torch.int32).equal(values.view(torch.int32))
    assert found["half"].dtype == torch.bfloat16
    assert found["best"] == (2, None)
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]  # nothing is left beside it


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped bit", "appended", "foreign"])
def test_damaged_state_is_recognised_and_the_one_before_used(tmp_path, damage):
    run = folder(tmp_path)
    run.save_state(state(1), 1, keep=2)
    newest = run.save_state(state(2), 2, keep=2)
    whole = newest.read_bytes()
    # any one bit counts: a middle one lies in the tensors or the zip's tables
    flipped = bytes([whole[len(whole) // 2] ^ 1])
    newest.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "flipped bit": whole[: len(whole) // 2] + flipped + whole[len(whole) // 2 + 1 :],
            "appended": whole + b"\0",
            "foreign": b"PK something else" * 100,
        }[damage]
    )
    with pytest.warns(UserWarning, match="state-000000002"):
        assert same(run.load_state(), state(1))
    run.states()[1].write_bytes(b"")
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match=r"no training state .* can be read"):
        run.load_state()


def test_state_with_code_is_refused(tmp_path):
    """A state with a right checksum is still read with weights_only: a checksum is no signature."""

    class Harmful:
        def __reduce__(self):
            return (print, ("executed",))

    write_state(tmp_path / "state-000000001.pt", {"step": Harmful()})
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(tmp_path / "state-000000001.pt")


def test_a_failed_write_leaves_the_state_before(tmp_path, monkeypatch):
    run = folder(tmp_path)
    run.save_state(state(1), 1, keep=2)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        run.save_state(state(2), 2, keep=2)
    monkeypatch.undo()
    assert same(run.load_state(), state(1))
    assert not list(tmp_path.glob(".state*"))


def test_the_newest_states_are_kept(tmp_path):
    run = folder(tmp_path)
    for step in (5, 90, 100, 1000):  # 90 and 100: by number, not by letters
        run.save_state(state(step), step, keep=2)
    assert [read_state(path)["step"] for path in run.states()] == [1000, 100]


def test_folder_without_states_starts_over(tmp_path):
    assert folder(tmp_path / "new", resume=True).load_state() is None


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    run = folder(tmp_path)
    run.log({"step": 1})
    run.save_state(state(1), 1, keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"resume=True.*overwrite=True"):
        RunFolder(tmp_path, CONFIG)
    again = RunFolder(tmp_path, CONFIG, overwrite=True)
    assert run.states()  # still there: the new run has not started
    again.open()
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "notes.txt", CONFIG)


def test_resume_with_other_settings_names_them(tmp_path):
    folder(tmp_path)
    RunFolder(tmp_path, {**CONFIG, "workers": 2}, resume=True)  # how it runs, not what it computes
    with pytest.raises(ValueError, match=r"epochs \(was 2, now 3\), lr \(was 0.1, now 0.2\). force=True goes on"):
        RunFolder(tmp_path, {**CONFIG, "lr": 0.2, "epochs": 3}, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no configuration of a run"):
        RunFolder(tmp_path, CONFIG, resume=True)


def test_forced_settings_are_taken_over_and_written_down(tmp_path):
    folder(tmp_path)
    for step, lr in ((3, 0.2), (5, 0.3)):
        run = RunFolder(tmp_path, {**CONFIG, "lr": lr}, resume=True, force=True)
        run.describe({**CONFIG, "lr": lr}, "cpu", step=step)
    RunFolder(tmp_path, {**CONFIG, "lr": 0.3}, resume=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["config"]["lr"] == 0.3
    assert written["changes"] == [
        {"step": 3, "changed": {"lr": {"was": 0.1, "now": 0.2}}},
        {"step": 5, "changed": {"lr": {"was": 0.2, "now": 0.3}}},
    ]
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("settings", 3), ("settings", 5)]


@pytest.mark.parametrize(
    ("was", "now"), [({"opt": "adamw"}, {"opt": "sgd"}), ({"num_classes": 10}, {"num_classes": 5}),
                     ({"ema_decay": None}, {"ema_decay": 0.9}), ({"layer_decay": 0.8}, {"layer_decay": None})],
)  # fmt: skip
def test_what_a_state_is_tied_to_cannot_be_forced(tmp_path, was, now):
    run = RunFolder(tmp_path, was)
    run.open()
    run.describe(was, "cpu")
    with pytest.raises(
        ValueError, match=f"states are tied to {next(iter(was))} .*a new run can start from its weights"
    ):
        RunFolder(tmp_path, now, resume=True, force=True)


def test_resume_on_other_data_is_told(tmp_path):
    run = RunFolder(tmp_path, CONFIG)
    run.open()
    run.describe(CONFIG, "cpu", data={"train": 43})
    with pytest.raises(ValueError, match=r"data \(was {'train': 43}, now {'train': 44}\)"):
        RunFolder(tmp_path, CONFIG, resume=True).describe(CONFIG, "cpu", step=2, data={"train": 44})
    RunFolder(tmp_path, CONFIG, resume=True, force=True).describe(CONFIG, "cpu", step=2, data={"train": 44})
    RunFolder(tmp_path, CONFIG, resume=True).describe(CONFIG, "cpu", step=2, data={"train": 44})


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    run = folder(tmp_path)
    for step in (1, 2, 3):
        run.log({"step": step})
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # cut off by a crash
    run.rewind(2)
    run.log({"step": 3, "again": True})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    with pytest.raises(ValueError, match="Out of range"):
        run.log({"step": 5, "loss": float("nan")})
