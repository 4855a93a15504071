"""The kinds of patches that a comparison is between: what ``--methods`` says."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...errors import DeltapatchError
from ...method import Method, make_method, parse_option, registered_methods


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        name: what it is called there.
        variants: the configurations of one method, of which the validation images choose one.
    """

    name: str
    variants: tuple[Method, ...]


def parse_contenders(text: str) -> tuple[Contender, ...]:
    """Reads a list of methods as the command line gives it.

    A method is its name, or ``NAME:OPTION=VALUE`` with ``+`` between several options and ``|`` between
    several values of one option, which make variants. ``all`` stands for every method as it is by default.

    Raises:
        DeltapatchError: a method, an option or a value is not known, or a method is there twice.

    Example:
        >>> [contender.name for contender in parse_contenders("head,delta:modules=1|2")]
        ['head', 'delta']
    """
    words = _split(text, ",")
    if not words:
        raise DeltapatchError("there is no method to compare; name some, as in head,delta, or give all")
    entries = [entry for word in words for entry in (registered_methods() if word == "all" else [word])]
    names = [entry.partition(":")[0] for entry in entries]
    contenders = tuple(
        Contender(name if names.count(name) == 1 else entry, _variants(entry))
        for name, entry in zip(names, entries, strict=True)
    )
    _check_different(contenders)
    return contenders


def describe(method: Method) -> str:
    """A method and those of its options that are not the default ones, as in "delta (modules=1)"."""
    usual = make_method(method.name).configuration()
    options = [
        f"{key}=[{', '.join(map(str, value))}]" if isinstance(value, tuple) else f"{key}={value}"
        for key, value in method.configuration().items()
        if value != usual[key]
    ]
    return f"{method.name} ({', '.join(options)})" if options else method.name


def _variants(entry: str) -> tuple[Method, ...]:
    name, _, options = entry.partition(":")
    choices: list[list[tuple[str, Any]]] = []
    for option in _split(options, "+"):
        key, _, values = option.partition("=")
        choices.append(
            [parse_option(f"{key}={value}") for value in _split(values, "|")] or [parse_option(option)]
        )
    keys = [choice[0][0] for choice in choices]
    if len(set(keys)) < len(keys):
        raise DeltapatchError(f"'{entry}' gives one option twice; put | between its values instead")
    return tuple(make_method(name, dict(values)) for values in product(*choices))


def _split(text: str, sign: str) -> list[str]:
    """The parts between signs, except those inside of brackets, which belong to a value that is a list."""
    parts = re.split(rf"{re.escape(sign)}(?![^\[]*\])", text)
    return [part.strip() for part in parts if part.strip()]


def _check_different(contenders: Sequence[Contender]) -> None:
    seen: set[Method] = set()
    for contender in contenders:
        for variant in contender.variants:
            if variant in seen:
                raise DeltapatchError(
                    f"{describe(variant)} would be compared with itself; name each method and variant once"
                )
            seen.add(variant)
