"""Results of a benchmark as they come: one line each in a file, so that a run that was ended goes on."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Finished:
    """Entries that are done, in a ``.jsonl`` file beside the table.

    Attributes:
        path: the file; made with the first entry.
        keys: the fields that say what an entry is a result of; the others are the result.
    """

    path: Path
    keys: Sequence[str]
    entries: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.entries = [_entry(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            self.entries = [entry for entry in self.entries if entry]

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether there is a result for this key."""
        return any(all(entry[name] == key[name] for name in self.keys) for entry in self.entries)

    def add(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Writes a result down, prints it, and keeps it."""
        entry = {**{name: key[name] for name in self.keys}, **result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left a line without an end.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + json.dumps(entry) + "\n")
        self.entries.append(entry)
        print(entry, flush=True)

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        """The entries with these values."""
        return [entry for entry in self.entries if all(entry[name] == wanted[name] for name in wanted)]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation over seeds; one value alone; a dash without values."""
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _entry(line: str) -> dict[str, Any]:
    """An entry; nothing for a line that a kill cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
