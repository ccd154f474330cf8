"""Input and output paths: only regular files, with the right mode, and no output that replaces an input."""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastnull.noise import Noise
from fastnull.paths import check_output, check_readable, check_replaceable, same_setting
from fastnull.record import replacing, write_json


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


OBSTACLES: dict[str, Callable[[Path], object]] = {
    "a symbolic link": lambda path: (path.with_name("real").write_text("kept"), path.symlink_to("real")),
    "a symbolic link to nothing": lambda path: path.symlink_to("nothing"),
    "a named pipe": os.mkfifo,
    "a socket": bind_socket,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_only_regular_files_are_replaced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("out.json")
    OBSTACLES[kind](path)
    before = os.lstat(path)[:7]  # without times: following a link changes its time of access
    with pytest.raises(ValueError, match=f"out.json cannot be written: it is {kind.removesuffix(' to nothing')}"):
        write_json(path, {})
    assert os.lstat(path)[:7] == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) in (["out.json"], ["out.json", "real"])


def test_devices_are_not_replaced() -> None:
    with pytest.raises(ValueError, match="is a device"):
        check_replaceable(os.devnull)
    with pytest.raises(ValueError, match=r"--model must be a regular file or a folder; .* is a device"):
        check_readable("--model", os.devnull)


@pytest.mark.parametrize(("kind", "readable"), [("a symbolic link", True), ("a named pipe", False), ("a folder", True)])
def test_what_may_be_read(kind: str, readable: bool, tmp_path: Path) -> None:
    path = tmp_path / "in"
    OBSTACLES[kind](path)
    if readable:
        check_readable("--model", path)
        return
    with pytest.raises(ValueError, match="--model must be a regular file"):
        check_readable("--model", path)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def save_noise(path: Path) -> None:
    tokens, numbers = torch.zeros(1, 2, 2), (torch.zeros(1), torch.zeros(1))
    Noise(tokens, *numbers, torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long), "patch").save(path)


@pytest.mark.parametrize("write", [lambda path: write_json(path, {}), save_noise], ids=["json", "safetensors"])
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_modes(write: Callable[[Path], None], mask: int, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with umask(mask):
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode  # a new file: what the umask leaves
        path.chmod(0o604)
        write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604  # a replaced one: its own


def test_a_link_that_appears_while_it_is_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def write() -> None:
        with replacing(path) as beside:
            beside.write_text("new")
            path.symlink_to("other")

    with pytest.raises(ValueError, match="symbolic link"):
        write()
    assert path.is_symlink()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model, a folder `images` of class folders, and a folder `run` with a file of a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "images/train/cat/1.png", "images/val/cat/1.png", "run/last.safetensors", "run/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "linked").symlink_to("images")
    os.link(tmp_path / "model", tmp_path / "hard")
    return tmp_path


FILES = ("*.safetensors", "state-*")


@pytest.mark.parametrize(
    ("out", "files", "inputs"),
    [
        ("model", None, {"--model": "model"}),
        ("./run/../model", None, {"--model": "model"}),
        ("{}/model", None, {"--model": "model"}),
        ("model", None, {"--model": "link"}),
        ("hard", None, {"--model": "model"}),
        ("model", None, {"--model": "other", "--others": ["absent", "model"]}),
        ("run", FILES, {"--checkpoint": "run/last.safetensors"}),
        ("./run", FILES, {"--checkpoint": "{}/run/last.safetensors"}),
        ("images", FILES, {"--data": "images"}),
        (".", FILES, {"--data": "images"}),
        ("linked", FILES, {"--data": "images"}),
        ("images", FILES, {"--data": "linked"}),
        ("images/train", FILES, {"--data": "images"}),
        ("images/train/cat/new", FILES, {"--data": "images"}),
        ("images/val/new.json", None, {"--data": "images"}),
        ("images/train/cat/1.png", None, {"--data": "images"}),
    ],
)
def test_no_input_is_replaced(
    out: str, files: tuple[str, ...] | None, inputs: dict[str, str | list[str]], place: Path
) -> None:
    filled = {key: value.format(place) if isinstance(value, str) else value for key, value in inputs.items()}
    with pytest.raises(ValueError, match=re.escape("--out ")) as caught:
        check_output(out.format(place), filled, files=files)
    assert list(inputs)[-1] in str(caught.value)


@pytest.mark.parametrize(
    ("out", "files", "inputs"),
    [
        ("new", None, {"--model": "model", "--data": "images"}),
        ("run/results.json", None, {"--model": "run/last.safetensors"}),
        ("run", FILES, {"--config": "run/notes.txt", "--model": "model"}),
        ("images/runs/first", FILES, {"--data": "images"}),
        ("images/results.json", None, {"--data": "images"}),
        ("a/new/folder", FILES, {"--data": "digits", "--model": "vit_digits", "--start": None}),
    ],
)
def test_outputs_beside_inputs_are_fine(
    out: str, files: tuple[str, ...] | None, inputs: dict[str, str | list[str]], place: Path
) -> None:
    check_output(out, inputs, files=files)


@pytest.mark.parametrize("files", [None, FILES])
def test_a_path_back_out_of_a_missing_folder_is_refused(files: tuple[str, ...] | None, place: Path) -> None:
    name = "run" if files else "model"
    with pytest.raises(
        ValueError, match=f"--out absent/../{name} leads back \\(..\\) out of a folder that does not exist"
    ):
        check_output(f"absent/../{name}", {"--model": "model"}, files=files)
    check_output(f"run/../new/{name}", {"--model": "model"}, files=files)


def test_obstacles_are_reported_first(place: Path) -> None:
    with pytest.raises(ValueError, match="--out must be a file; run is a folder"):
        check_output("run", {})
    with pytest.raises(ValueError, match="--out must be a folder; model is a file"):
        check_output("model", {}, files=FILES)
    with pytest.raises(ValueError, match=r"model/x cannot be made: .*model is a file"):
        check_output("model/x", {}, files=FILES)
    os.mkfifo("run/state-1")
    with pytest.raises(ValueError, match="state-1 cannot be written: it is a named pipe"):
        check_output("run", {}, files=FILES)


def test_settings_that_name_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to("images")
    for same in ("images", "./images/", "x/../images", "linked", str(tmp_path / "images")):
        assert same_setting("images", same)
    for other in ("image", "images/train", None, 1):
        assert not same_setting("images", other)
    assert same_setting([1, None], [1, None])
    assert not same_setting(None, False)
