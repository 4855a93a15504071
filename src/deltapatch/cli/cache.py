"""``deltapatch cache``: the trunk activations that fits have kept on disk."""

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DeltapatchError

if TYPE_CHECKING:
    from rich.console import Console

    from ..fitting.cache_sweeping import CacheEntry

EXAMPLE = "deltapatch cache clear --older-than 30"


class Action(StrEnum):
    """What to do with the caches."""

    LIST = "list"
    CLEAR = "clear"


def command(
    action: Annotated[Action, typer.Argument(help="What to do with them.", show_default=False)],
    digest_prefix: Annotated[
        str, typer.Argument(help="Only caches whose digest begins so.", show_default=False)
    ] = "",
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Only those unused for so many days.", show_default=False)
    ] = None,
) -> None:
    """List or delete the trunk activations that fits keep on disk. They are computed anew where they are
    missing.
    """
    from rich.console import Console

    from ..fitting.cache_folders import cache_root
    from ..fitting.cache_sweeping import clear_caches, select_caches

    root = cache_root()
    chosen = select_caches(root, older_than, digest_prefix)
    if digest_prefix and not chosen and older_than is None:
        raise DeltapatchError(
            f"no trunk cache in {root} has a digest that begins with '{digest_prefix}'; deltapatch cache list"
            " shows them"
        )
    console = Console(width=None if Console().is_terminal else 120)
    if action is Action.LIST:
        if chosen:
            _print_table(console, chosen)
        console.print(f"{_total(chosen)} in {root}", soft_wrap=True, highlight=False)
        return
    removed = clear_caches(root, older_than, digest_prefix)
    console.print(f"deleted {_total(removed)} from {root}", soft_wrap=True, highlight=False)
    gone = {entry.digest for entry in removed}
    for entry in chosen:
        if entry.digest not in gone and (root / entry.digest).exists():
            console.print(
                f"{entry.digest[:12]} stays: a fit is filling it, or a file that is not ours lies in it",
                soft_wrap=True,
                highlight=False,
            )


def _print_table(console: "Console", entries: "Sequence[CacheEntry]") -> None:
    from rich.table import Table

    from ..evaluation.wording import file_size

    table = Table("digest", "base", "divergence", "stored as", "views", "rows filled", "size", "last used")
    for entry in entries:
        table.add_row(
            entry.digest[:12],
            entry.base.removeprefix("sha256:")[:12],
            entry.divergence or "none, features only",
            entry.stored_as,
            str(entry.views),
            f"{entry.filled:,} of {entry.rows:,}",
            file_size(entry.bytes),
            f"{entry.last_used.astimezone():%Y-%m-%d %H:%M}",
        )
    console.print(table)


def _total(entries: "Sequence[CacheEntry]") -> str:
    from ..evaluation.wording import file_size

    count = f"{len(entries)} trunk cache{'' if len(entries) == 1 else 's'}"
    return f"{count}, {file_size(sum(entry.bytes for entry in entries))}"
