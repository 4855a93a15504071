"""The user's own results in a CSV file, one line each, which several processes may add to."""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import DeltapatchWarning
from ...file import sweep_temporary_files
from ..score import SelectionError
from .record import OWN, Record

COLUMNS = tuple(field.name for field in fields(Record))
_NEEDED = ("model", "target", "accuracy")
_PATIENCE_SECONDS = 30


def own_history_path() -> Path:
    """Where the user's results are kept: DELTAPATCH_HISTORY, else ``deltapatch/history.csv`` in the user's
    data folder.
    """
    if own := os.environ.get("DELTAPATCH_HISTORY"):
        return Path(own).expanduser()
    folder = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    return folder / "deltapatch" / "history.csv"


def read_records(path: str | Path) -> tuple[Record, ...]:
    """The results of a file in the order of its lines. A damaged line is skipped with a warning.

    Args:
        path: a CSV file with the columns model, target and accuracy, and any others of `Record`.

    Raises:
        SelectionError: it cannot be read, or its first line does not name these columns.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SelectionError(f"{path} cannot be read: {error.strerror}; check the path") from error
    return tuple(_parse(path, content))


def append(records: Iterable[Record], path: str | Path | None = None) -> int:
    """Adds results to a file, all of them or none, also where other processes add to it at the same time.

    Results of fits that the file has already are not added again.

    Args:
        records: what to add.
        path: the file, made if missing with its folder; the user's own where left out.

    Returns:
        How many were new.

    Raises:
        SelectionError: the file has other columns, or cannot be read.
        DeltapatchError: it cannot be written.
    """
    from ...evaluation.comparing.ledger import replace_file  # with it come all the methods

    path = own_history_path() if path is None else Path(path)
    # A link to the file stays one.
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=_PATIENCE_SECONDS):
            sweep_temporary_files(path.parent)
            content = path.read_bytes() if path.exists() else b""
            new = _without_known(records, _parse(path, content) if content else ())
            if new:
                replace_file(path, _with_lines(path, content, new))
    except Timeout as error:
        raise SelectionError(
            f"{path} has been in another process's hands for {_PATIENCE_SECONDS} seconds; try again later"
        ) from error
    except OSError as error:
        raise SelectionError(f"{path} cannot be written: {error.strerror}; check the folder") from error
    return len(new)


def _without_known(records: Iterable[Record], known: Iterable[Record]) -> list[Record]:
    jobs = {record.job for record in known if record.job}
    new: list[Record] = []
    for record in records:
        if record.job not in jobs:
            new.append(record)
            jobs |= {record.job} - {""}
    return new


def _with_lines(path: Path, content: bytes, new: list[Record]) -> bytes:
    if content and _header(path, content) != list(COLUMNS):
        raise SelectionError(
            f"{path} cannot be added to: its first line is not {','.join(COLUMNS)}; set DELTAPATCH_HISTORY to"
            " another file"
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not content:
        writer.writeheader()
    # A name with a line break in it would take two lines.
    writer.writerows(
        {name: " ".join(str(value).split()) for name, value in asdict(record).items()} for record in new
    )
    ended = content if not content or content.endswith(b"\n") else content + b"\n"
    return ended + text.getvalue().encode()


def _parse(path: Path, content: bytes) -> Iterator[Record]:
    header = _header(path, content)
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise SelectionError(
            f"{path} is no history of results: its first line does not name the columns {', '.join(missing)};"
            " see the page on the history"
        )
    for number, line in enumerate(content.splitlines()[1:], start=2):
        if not line.strip():
            continue
        try:
            yield _record(header, _cells(line))
        except (ValueError, csv.Error) as error:
            warnings.warn(
                f"{path}, line {number}, is no result and is skipped: {error}",
                DeltapatchWarning,
                stacklevel=2,
            )


def _header(path: Path, content: bytes) -> list[str]:
    first = content.splitlines()[0] if content.strip() else b""
    try:
        return [name.strip() for name in _cells(first.removeprefix(b"\xef\xbb\xbf"))]
    except (ValueError, csv.Error) as error:
        raise SelectionError(
            f"{path} is no history of results: its first line is damaged: {error}"
        ) from error


def _cells(line: bytes) -> list[str]:
    """Each line is read alone, so that a quote without an end damages no other line."""
    return next(csv.reader([line.decode()], strict=True), [])


def _record(header: list[str], cells: list[str]) -> Record:
    if len(cells) != len(header):
        raise SelectionError(f"it has {len(cells)} cells where the first line names {len(header)}")
    row = dict(zip(header, cells, strict=True))
    texts = {name: row[name].strip() for name in COLUMNS if name in row and name != "accuracy"}
    record = Record(**({"pool": OWN} | texts), accuracy=float(row["accuracy"]))
    return record if record.pool else replace(record, pool=OWN)
