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

from fastnull.checks import check_choice, refuse_renamed
from fastnull.paths import check_readable

Settings = TypeVar("Settings")

SHORTER = {"suites": "--suite", "frost_folder": "--frost"}
"""Fields whose option has a name of its own."""
POSITIONAL = ("models", "what", "sources")
"""Arguments without an option."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows each default as one would type it, unless the help text names it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, [], argparse.SUPPRESS) or "default:" in text:
            return text
        return f"{text} (default: {_shown(action.default)})"


def add_options(
    parser: argparse.ArgumentParser,
    settings: type[Any],
    *,
    skip: Collection[str] = (),
    title: str | None = None,
    prefix: str = "",
) -> None:
    """Add an option for each field of a dataclass: batch_size becomes --batch-size, a bool becomes --flag and
    --no-flag, and the option of a tuple takes several values. A field that is a dataclass becomes a group of options
    that begin with the field's name and a dot: --noise.step-size. If the class has `renamed` (old names of fields →
    new ones), an option by an old name is an error that shows the new one.

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
        full, hint = prefix + field.name, hints[field.name]
        if full in skip:
            continue
        text = field.metadata.get("help") or documented.get(field.name, "")
        nested = _nested_in(hint)
        if nested is not None:
            add_options(parser, nested, skip=skip, title=f"{full} ({text})", prefix=f"{full}.")
            continue
        if field.default is None and type(None) not in typing.get_args(hint):
            text += f" (default: by {'mode and site' if 'mode' in hints else 'augment'})"
        elif field.default is not MISSING:
            text += f" (default: {_shown(field.default)})"
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if hint is not bool:
            several = typing.get_origin(hint) is tuple
            kind = _converter(typing.get_args(hint)[0] if several else hint)
            first = text.partition(" ")[0]
            metavar = first if first in ("file", "folder") else kind.__name__
            how = {"type": kind, "metavar": metavar.upper(), "nargs": "+" if several else None}
        group.add_argument(option_of(full), dest=full, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)
    for old, new in getattr(settings, "renamed", {}).items():
        now, hidden = option_of(prefix + new), argparse.SUPPRESS
        parser.add_argument(option_of(prefix + old), nargs="*", action=_Renamed, const=now, default=hidden, help=hidden)


class _Renamed(argparse.Action):
    """An option by an old name: an error that shows the new one, its `const`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(f"{self.option_strings[0]} is called {self.const} since version 0.2")


def option_of(name: str) -> str:
    """The option of a field: `noise.step_size` is --noise.step-size."""
    return SHORTER.get(name) or "--" + name.replace("_", "-")


def from_options(
    base: Settings | type[Settings],
    arguments: argparse.Namespace,
    file: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Settings:
    """`base` with the fields of a file (see `read_fields`), then those that were given on the command line, and then
    `changes`. They are checked together: what a field needs may come from any of them.

    Args:
        base: settings whose fields are replaced; or their class, whose defaults then depend on the given fields.
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


def check_given(values: Mapping[str, Any]) -> None:
    """Check what all options have in common: no text is empty, and none names a pipe or a device.

    Raises:
        ValueError: an empty text (as a path it would be the working directory), or see `check_readable`.
    """
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
    """
    import yaml  # a dependency of timm

    check_readable("a configuration", path)
    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8
        raise ValueError(f"{path} is no YAML file: {error}") from error
    return {} if node is None else _read_mapping(f"{path}: ", node, settings)


def _read_mapping(prefix: str, node: Any, settings: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass from a node of a YAML file, whose scalars are text: YAML's own types would make 1e-5 a
    string and `on` a bool."""
    if node.id != "mapping":
        found = repr(node.value) if node.id == "scalar" else "a list"
        raise ValueError(f"{prefix.rstrip(': .')} must hold `field: value` lines; it holds {found}")
    nodes: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in nodes:
            raise ValueError(f"{prefix}{name} is given twice, in lines {lines[name]} and {line}")
        nodes[name], lines[name] = value, line
    refuse_renamed(prefix.rstrip(": ."), nodes, getattr(settings, "renamed", {}), ValueError)
    hints = typing.get_type_hints(settings)
    if prefix.endswith("."):
        hints["preset"] = str | None  # of the noise, see FinetuneConfig
    given: dict[str, Any] = {}
    for name, value in nodes.items():
        hint = hints[check_choice(f"{prefix}field", name, hints)]
        text = value.value if value.id == "scalar" else None
        if text in ("", "~", "null") and not value.style:  # YAML's null, not in quotes
            text = "none"
        nested = _nested_in(hint)
        if nested is not None and text != "none":
            given[name] = _read_mapping(f"{prefix}{name}.", value, nested)
        elif text is None or not text.strip():
            raise ValueError(f"{prefix}{name} must {'be a single value' if text is None else 'not be empty'}")
        else:
            try:
                given[name] = _converter(hint)(text)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{prefix}{name}: {error}") from error
            except ValueError as error:  # of int()
                raise ValueError(f"{prefix}{name} must be an integer; got {text!r}") from error
    return given


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotated type itself."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _nested_in(hint: Any) -> type[Any] | None:
    """The dataclass of an annotated type, or None."""
    return next((kind for kind in _kinds(hint) if is_dataclass(kind)), None)  # type: ignore[return-value]


def _converter(hint: Any) -> Callable[[str], Any]:
    """The function that reads a value of an annotated type; `none` gives None where the type allows it."""
    kinds = _kinds(hint)
    (kind,) = [kind for kind in kinds if kind is not type(None)]
    read: Callable[[str], Any] = {float: number, bool: yes_or_no}.get(kind, kind)
    if len(kinds) == 1:
        return read

    def optional(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    optional.__name__ = read.__name__
    return optional


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
        name: " ".join(text.split()).replace("`", "").rstrip(".")
        for names, text in entries
        for name in names.split(", ")
    }


def _shown(default: Any) -> str:
    """A default as one would type it: 8/255 rather than 0.03137."""
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, float):
        in_255 = default * 255
        is_fraction = 0 < default < 1 and abs(in_255 - round(in_255)) < 1e-9 and round(default, 4) != default
        return f"{round(in_255)}/255" if is_fraction else f"{default:g}"
    if isinstance(default, (tuple, list)):
        return " ".join(map(_shown, default))
    return str(default)
