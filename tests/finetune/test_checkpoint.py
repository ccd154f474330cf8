"""Training states and the folder of a run: what a crash, a foreign file or another setting does to them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings

import pytest
import torch

from fastnull.finetune.checkpoint import RunFolder, read_state, write_state

CONFIG = {"lr": 0.1, "epochs": 2, "betas": (0.9, 0.99), "workers": 0, "data": "images"}


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
    """A state with a correct checksum is still read with weights_only: a checksum is not a signature."""

    class Harmful:
        def __reduce__(self):
            return (print, ("executed",))

    write_state(tmp_path / "state-000000001.pt", {"step": Harmful()})
    with pytest.raises(ValueError, match="cannot be read"):
        read_state(tmp_path / "state-000000001.pt")


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


def test_a_run_that_failed_before_it_had_a_result_may_start_again(tmp_path):
    folder(tmp_path)
    config = tmp_path / "config.json"
    before = config.read_text()
    again = RunFolder(tmp_path, {**CONFIG, "workers": 2})
    assert config.read_text() == before  # the new run has not started
    again.open()
    again.describe(CONFIG, "cpu", data={"train": 5})  # the folder of images was repaired
    assert json.loads(config.read_text())["data"] == {"train": 5}
    with pytest.raises(ValueError, match="holds a run already"):
        RunFolder(tmp_path, {**CONFIG, "lr": 0.2})
    for name in ("metrics.jsonl", "best.safetensors", "last.safetensors", "state-000000001.pt"):
        (tmp_path / name).write_text("something")
        with pytest.raises(ValueError, match="holds a run already"):
            RunFolder(tmp_path, CONFIG)
        (tmp_path / name).unlink()
    config.write_text('{"model_type": "vit"}')  # of another program
    with pytest.raises(ValueError, match="holds a run already"):
        RunFolder(tmp_path, CONFIG)


def test_resume_with_other_settings_names_them(tmp_path):
    folder(tmp_path)
    # how it runs, not what it computes; and another spelling of a path
    RunFolder(tmp_path, {**CONFIG, "workers": 2, "data": os.path.abspath("images")}, resume=True)
    with pytest.raises(ValueError, match=r"epochs \(was 2, now 3\), lr \(was 0.1, now 0.2\). force=True uses"):
        RunFolder(tmp_path, {**CONFIG, "lr": 0.2, "epochs": 3}, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not the configuration of a run"):
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
                     ({"ema_decay": None}, {"ema_decay": 0.9}), ({"layer_decay": 0.8}, {"layer_decay": None}),
                     ({"start_fraction": 0.0}, {"start_fraction": 0.5})],
)  # fmt: skip
def test_what_a_state_is_tied_to_cannot_be_forced(tmp_path, was, now):
    run = RunFolder(tmp_path, was)
    run.open()
    run.describe(was, "cpu")
    with pytest.raises(ValueError, match=f"with another value of {next(iter(was))} .*start a new run from its weights"):
        RunFolder(tmp_path, now, resume=True, force=True)


def test_resume_on_other_data_is_refused(tmp_path):
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


def test_lost_metrics_give_a_warning_and_epochs_are_restored(tmp_path):
    run = folder(tmp_path)
    epochs = [{"kind": "epoch", "step": step, "loss": step / 10} for step in (2, 4)]
    logged = [{"step": 1}, {"step": 2}, epochs[0], {"step": 3}, {"step": 4}, epochs[1]]
    for record in logged:
        run.log(record)
    state = read_state(run.save_state({"step": 4}, 4, keep=2))
    assert state["lines"] == 6
    whole = run.metrics.read_text()

    def resumed(text, warns):
        run.metrics.write_text(text)
        again = folder(tmp_path, resume=True)
        with pytest.warns(UserWarning, match=warns) if warns else contextlib.nullcontext():
            again.rewind(4, epochs, state["lines"])
        return [json.loads(line) for line in run.metrics.read_text().splitlines()]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resumed(whole, None) == logged
        assert resumed(whole + '{"step": 5}\n{"step": 6, "lo', None) == logged
    lines = whole.splitlines(keepends=True)
    assert resumed("".join(lines[:2]), "lacks 4 records up to step 4; those of 2 epochs") == [*logged[:2], *epochs]
    assert resumed("".join(lines[:4]), "lacks 2 records up to step 4; those of 1 epochs") == [*logged[:4], epochs[1]]
    assert resumed("".join(lines[1:]), r"lacks 1 records up to step 4; the others") == logged[1:]
    assert resumed("", "lacks 6 records") == epochs
    run.metrics.unlink()
    again = folder(tmp_path, resume=True)
    with pytest.warns(UserWarning, match="lacks 6 records"):
        again.rewind(4, epochs, state["lines"])
    again.log({"step": 5})
    assert read_state(again.save_state({"step": 5}, 5, keep=2))["lines"] == 3  # what there is from now on


BAD_LINES = {
    "word": b"nonsense", "number": b"5", "list": b"[1]", "no step": b'{"loss": 1}', "text for a step": b'{"step": "x"}',
    "no step at all": b'{"step": null}', "bytes": b"\xff\xfe", "cut off": b'{"step": 2, "lo', "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_of_the_metrics_is_named_and_does_not_block(tmp_path, case):
    run = folder(tmp_path)
    run.metrics.write_bytes(b'{"step": 1}\n' + BAD_LINES[case] + b'\n{"step": 2}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line 2, is not a record with a step and is ignored"):
        run.rewind(2)
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_state_of_another_run_is_refused(tmp_path):
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other")
    assert one.run
    assert other.run
    assert one.run != other.run
    one.save_state(state(1), 1, keep=2)
    foreign = other.save_state(state(2), 2, keep=2)
    shutil.copy(foreign, one.path)
    with pytest.raises(ValueError, match=rf"state-000000002.pt is of another run \({other.run}\) than .*\({one.run}\)"):
        folder(one.path, resume=True).load_state()
    (one.path / foreign.name).unlink()
    again = folder(one.path, resume=True)
    assert same(again.load_state(), state(1))
    assert again.run == one.run
    # one that lost its settings keeps the name that its states have
    (one.path / "config.json").unlink()
    again = RunFolder(one.path, CONFIG, resume=True)
    again.load_state()
    again.describe(CONFIG, "cpu")
    assert json.loads((one.path / "config.json").read_text())["run"] == one.run


def test_an_overwritten_folder_holds_another_run(tmp_path):
    first = folder(tmp_path).run
    assert folder(tmp_path, overwrite=True).run not in (None, first)


def test_a_later_state_that_cannot_be_read_does_not_push_others_out(tmp_path):
    run = folder(tmp_path)
    for step in (1, 9):
        run.save_state(state(step), step, keep=2)
    run.states()[0].write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="state-000000009"):
        run.load_state()
    run.save_state(state(2), 2, keep=1)
    assert [path.name for path in run.states()] == ["state-000000009.pt", "state-000000002.pt"]


@pytest.mark.parametrize("content", [[1, 2], {"weights": torch.zeros(1)}, {"step": "two"}, torch.zeros(2)], ids=str)
def test_a_state_without_a_step_is_none(tmp_path, content):
    run = folder(tmp_path)
    write_state(tmp_path / "state-000000001.pt", content)
    with pytest.warns(UserWarning, match="has no step"), pytest.raises(ValueError, match="can be read"):
        run.load_state()


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[]", b"{}", b'{"config": 3}'])
def test_broken_settings_are_named(tmp_path, text):
    folder(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"config.json is not the configuration of a run"):
        RunFolder(tmp_path, CONFIG, resume=True)
