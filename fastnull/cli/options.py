"""Command-line options made from a dataclass: names, types, defaults and help are written once, beside the fields."""

from __future__ import annotations

import argparse
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from fastnull.checks import as_type, check_choice, refuse_renamed
from fastnull.paths import check_readable

Settings = TypeVar("Settings")


def add_options(
    parser: argparse.ArgumentParser,
    settings: type[Any],
    *,
    skip: Collection[str] = (),
    title: str | None = None,
    prefix: str = "",
) -> None:
    """Add an option for each field of a dataclass: batch_size becomes --batch-size, a bool --flag and --no-flag, and a
    tuple an option that takes several values. A field that is a dataclass itself becomes a group of its own, whose
    options begin with the field's name and a dot: --noise.step-size. Where the class has `renamed`, old names of fields
    → new ones, options by the old names are errors that show the new ones.

    Options that are not given are absent from the parsed arguments, so that presets show through.

    Args:
        parser: to add to.
        settings: the dataclass; help comes from a field's metadata or from the class docstring's Attributes.
        skip: fields that get no option (`noise.seed` for one of a nested dataclass).
        title: of the group in the help.
        prefix: of every name.
    """
    group = parser.add_argument_group(title or settings.__name__)
    hints = typing.get_type_hints(settings)
    documented = attribute_docs(settings)
    for field in fields(settings):
        full = prefix + field.name
        if full in skip:
            continue
        text = field.metadata.get("help") or documented.get(field.name, "")
        nested = _nested_in(hints[field.name])
        if nested is not None:
            add_options(parser, nested, skip=skip, title=f"{full} ({text})", prefix=f"{full}.")
            continue
        flag = option_of(full)
        default = field.default
        if default is None:
            takes_none = type(None) in typing.get_args(hints[field.name])
            default = "none" if takes_none else "by mode and site" if "mode" in hints else "by augment"
        shown = f"{text} (default: {_shown(default)})".replace("%", "%%") if field.default is not MISSING else text
        if hints[field.name] is bool:
            action: Any = argparse.BooleanOptionalAction
            group.add_argument(flag, dest=full, action=action, default=argparse.SUPPRESS, help=shown)
        else:
            several = typing.get_origin(hints[field.name]) is tuple
            kind = _converter(typing.get_args(hints[field.name])[0] if several else hints[field.name])
            name = typing.cast("str", getattr(kind, "__name__", "value")).upper()
            how: dict[str, Any] = {"nargs": "+"} if several else {}
            group.add_argument(flag, dest=full, type=kind, default=argparse.SUPPRESS, metavar=name, help=shown, **how)
    for old, new in _renamed(settings).items():
        flag, now = option_of(prefix + old), option_of(prefix + new)
        parser.add_argument(
            flag, nargs="*", action=_Renamed, const=now, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def _renamed(settings: type[Any]) -> Mapping[str, str]:
    """Fields of a dataclass by old names → new ones."""
    return getattr(settings, "renamed", {})


class _Renamed(argparse.Action):
    """An option by an old name: an error that shows the new one, its `const`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        parser.error(f"{option} is called {self.const} since version 0.2")


def option_of(name: str) -> str:
    """The option of a field: `noise.step_size` is --noise.step-size."""
    return "--" + name.replace("_", "-")


def from_options(
    base: Settings | type[Settings],
    arguments: argparse.Namespace,
    file: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Settings:
    """`base` with the fields of a file (see `read_fields`), over them those that were given on the command line, and
    then `changes`. They are checked together: what a field needs may come from either.

    Args:
        base: settings, of which the fields that are given are replaced; or their class, whose defaults then see them.
        arguments: the parsed command line.
        file: fields of a file; those of a nested dataclass are a mapping.
        changes: further fields.
    """
    names = {field.name for field in fields(base)}  # type: ignore[arg-type]
    given = dict(file or {})
    for full, value in vars(arguments).items():
        name, _, inner = full.partition(".")
        if name in names:
            found = tuple(value) if isinstance(value, list) else value
            given[name] = {**(given.get(name) or {}), inner: found} if inner else found
    given |= changes
    if isinstance(base, type):
        return base(**given)
    for name, value in given.items():
        held = getattr(base, name)
        if is_dataclass(held) and isinstance(value, Mapping) and "preset" not in value:
            given[name] = replace(held, **value)  # type: ignore[type-var]
    return replace(base, **given)  # type: ignore[type-var]


POSITIONAL = ("models", "what", "sources")


def check_given(arguments: argparse.Namespace | Mapping[str, Any]) -> None:
    """Check what every option has in common, of any command: no text is empty, and none names a pipe or a device.

    Raises:
        ValueError: an empty text (as a path it would be the working directory), or see `check_readable`.
    """
    values = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    for name, value in values.items():
        option = name if name in POSITIONAL else option_of(name)
        for text in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(text, str):
                if not text.strip():
                    raise ValueError(f"{option} must not be empty")
                check_readable(option, text)


def read_fields(settings: type[Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of a dataclass that a YAML file names: `batch_size: 64`, values written as on the command line.

    Those of a nested dataclass are nested in the file too (`noise: {eps: 0.1}`), and a mapping in what is returned.

    Raises:
        ValueError: no regular file, not YAML, not a mapping, a field twice, an unknown one (with the nearest known
            one) or an old name (with the new one), a value of another type.
        FileNotFoundError: no such file.
        ImportError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"a configuration file needs PyYAML (pip install pyyaml): {error}") from error
    check_readable("a configuration", path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = {} if node is None else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no date
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `field: value` lines; it holds a {type(values).__name__}")
    if node is not None:
        _check_once(str(path), node)
    return _read_all(f"{path}: ", values, settings)


def _check_once(path: str, node: Any, prefix: str = "") -> None:
    """Raise ValueError where a mapping of a YAML file holds a field twice: its reader takes the last."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{path}: {name} is given twice, in lines {lines[name]} and {line}")
        lines[name] = line
        if value.id == "mapping":
            _check_once(path, value, f"{name}.")


def _read_all(prefix: str, values: Mapping[Any, Any], settings: type[Any]) -> dict[str, Any]:
    """The values of a file as the fields of a dataclass have them; those of a nested one are a mapping."""
    hints = typing.get_type_hints(settings)
    given: dict[str, Any] = {}
    refuse_renamed(prefix.rstrip(": "), values, _renamed(settings), ValueError)
    for name, value in values.items():
        check_choice(f"{prefix}field", name, hints)
        nested = _nested_in(hints[name])
        if nested is None:
            given[name] = _read(f"{prefix}{name}", value, hints[name])
        elif isinstance(value, Mapping):
            preset = {"preset": value["preset"]} if "preset" in value and hasattr(nested, "published") else {}
            others = {key: each for key, each in value.items() if key not in preset}
            given[name] = _read_all(f"{prefix}{name}.", others, nested) | preset
        elif value is None or value == "none":
            given[name] = None
        else:
            raise ValueError(f"{prefix}{name} must hold `field: value` lines; got {value!r}")
    return given


def _nested_in(hint: Any) -> type[Any] | None:
    """The dataclass of an annotated type, or None."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in kinds if is_dataclass(kind)), None)  # type: ignore[return-value]


def _read(name: str, value: Any, hint: Any) -> Any:
    """A value of a file as its field has it: YAML takes 1e-5 and 8/255 for text."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"{name} must not be empty")
    try:
        if isinstance(value, str) and bool not in kinds:
            return _converter(hint)(value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{name}: {error}") from error
    try:
        return as_type(name, value, hint)
    except TypeError as error:
        raise ValueError(str(error)) from error


def number(text: str) -> float:
    """A decimal number or a fraction such as 8/255."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or a fraction such as 8/255") from None


def yes_or_no(text: str) -> bool:
    """True or False as people write them: true, yes, on, 1; false, no, off, 0."""
    known = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true (yes, on, 1) nor false (no, off, 0)")
    return known[text.lower()]


def attribute_docs(settings: type[Any]) -> Mapping[str, str]:
    """Name → text from the Attributes section of a class docstring (an entry may name several: `lr, eps: text`)."""
    section = (settings.__doc__ or "").partition("Attributes:")[2]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section, flags=re.MULTILINE)
    return {
        name.strip(): re.sub(r"\s+", " ", text).replace("`", "").rstrip(".")
        for names, text in entries
        for name in names.split(",")
    }


def _converter(hint: Any) -> Callable[[str], Any]:
    """The function that reads a value of an annotated type; `none` gives None where the type allows it."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = [kind for kind in kinds if kind is not type(None)]
    read: Callable[[str], Any] = {float: number, bool: yes_or_no}.get(kind, kind)
    if len(kinds) == 1:
        return read

    def optional(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    optional.__name__ = read.__name__
    return optional


def _shown(default: Any) -> str:
    """The default as one would type it: 8/255 rather than 0.03137."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        in_255 = default * 255
        is_fraction = 0 < default < 1 and abs(in_255 - round(in_255)) < 1e-9 and round(default, 4) != default
        return f"{round(in_255)}/255" if is_fraction else f"{default:g}"
    if isinstance(default, tuple):
        return " ".join(map(_shown, default))
    return str(default)
