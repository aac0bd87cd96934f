"""Commands that answer one of several questions, each with options of its own."""

from __future__ import annotations

from collections.abc import Mapping, Set

import click
from click.core import ParameterSource

from xtrain.errors import RequestError


def require_one_mode(
    context: click.Context, modes: Mapping[str, Set[str]], asked: Mapping[str, bool]
) -> None:
    """RequestError where not exactly one of `modes` is `asked`, or an option of another one is given.

    `modes` has the names of the parameters of each mode.
    """
    command = f"xtrain {context.info_name}"
    chosen = [mode for mode, is_asked in asked.items() if is_asked]
    if len(chosen) != 1:
        *first, last = modes
        found = " and ".join(chosen) or "none of them"
        raise RequestError(f"{command}: expected one of {', '.join(first)} and {last}, found {found}")
    for option in context.command.params:
        name = option.name or ""
        if name not in modes[chosen[0]] and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            others = " or ".join(mode for mode, known in modes.items() if name in known)
            raise RequestError(
                f"{command}: {option.opts[0]} says nothing with {chosen[0]}; it belongs to {others}: "
                "leave it out"
            )
