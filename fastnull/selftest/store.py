"""Stored results of the self-test: one file for each GPU and each version of the software."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fastnull
from fastnull import _C
from fastnull.choices import Found, Outcome
from fastnull.record import device_name, read_json, version_of, write_json


def folder() -> Path:
    """`fastnull/selftest` in the user's cache folder: XDG_CACHE_HOME, else ~/.cache. Raises OSError without one."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user without an entry, as in some containers
        raise OSError(f"{error} Set XDG_CACHE_HOME.") from error
    return cache / "fastnull" / "selftest"


@functools.cache
def identity(device: torch.device) -> dict[str, Any]:
    """What the results depend on: GPU, driver, versions and build."""
    about = {"device": device_name(device), "torch": torch.__version__, "triton": version_of("triton")}
    about |= {"fastnull": fastnull.__version__, "build": _build()}
    if device.type == "cuda":
        about["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        about["driver"] = _driver()
    return about


def path(device: torch.device) -> Path:
    """The file of this device's results."""
    about = json.dumps(identity(device), sort_keys=True)
    return folder() / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def read(device: torch.device) -> dict[str, Found]:
    """Problem → implementation → outcome; empty if the file is missing, damaged or of another identity."""
    try:
        held = read_json(path(device))
        if held["identity"] != identity(device):
            return {}
        return {
            problem: {name: _outcome(fields) for name, fields in found.items()}
            for problem, found in held["results"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def write(device: torch.device, results: Mapping[str, Found]) -> None:
    """Write the results atomically. Raises OSError or ValueError if the folder or the file cannot be written."""
    plain = {problem: {name: asdict(each) for name, each in found.items()} for problem, found in results.items()}
    write_json(path(device), {"identity": identity(device), "results": plain})


def _outcome(fields: Mapping[str, Any]) -> Outcome:
    outcome = Outcome(**fields)
    for number in (outcome.ms, outcome.error, outcome.floor):
        if number is not None and not isinstance(number, (int, float)):
            raise TypeError(f"not a number: {number!r}")
    return outcome


def _driver() -> str:
    """The version of the GPU's driver; empty if unknown."""
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@functools.cache
def _build() -> str:
    """Digest of the kernels and of the self-test: the built libraries and the Python sources."""
    root = Path(fastnull.__file__).resolve().parent
    digest = hashlib.sha256(json.dumps(_C.build_record(), sort_keys=True).encode())
    for room in ("kernels", "ops", "selftest"):
        for source in sorted((root / room).glob("*.py")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
