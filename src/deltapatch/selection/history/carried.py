"""The published results that are shipped with the package, as they are in the folder ``tables``."""

import csv
from dataclasses import dataclass
from importlib.resources import files

from ..score import SelectionError
from .record import Record


@dataclass(frozen=True)
class CarriedPool:
    """Models that were all fine-tuned on the same targets by the same people.

    Attributes:
        table: the file.
        model: columns that name the model, put together with "/".
        target: the column of the target.
        accuracy: the column of the accuracy.
        part_of: another pool that has all these results too.
    """

    table: str
    model: tuple[str, ...]
    target: str
    accuracy: str
    part_of: str = ""


_SOURCES = ("architecture", "source_dataset")

CARRIED_POOLS = {
    "supervised": CarriedPool(
        "ft_supervised_11models_11datasets.csv", ("model",), "dataset", "finetune_accuracy"
    ),
    "self-supervised": CarriedPool(
        "ft_selfsup_12models_11datasets.csv", ("model",), "dataset", "finetune_accuracy"
    ),
    "tllib": CarriedPool("tllib_scores_10models_8datasets.csv", ("model",), "dataset", "finetune_accuracy"),
    "regression": CarriedPool(
        "ft_regression_10models_2datasets.csv", ("model",), "dataset", "score_higher_is_better"
    ),
    "multi-source": CarriedPool(
        "ft_multisource_66models_7datasets.csv", _SOURCES, "target_dataset", "finetune_accuracy"
    ),
    "parc": CarriedPool("ft_parc_all.csv", _SOURCES, "target_dataset", "finetune_accuracy"),
    "parc-controlled": CarriedPool(
        "ft_parc_controlled.csv", _SOURCES, "target_dataset", "finetune_accuracy", part_of="parc"
    ),
    "transfergraph": CarriedPool(
        "ft_transfergraph_180models_13datasets.csv", ("model",), "dataset", "test_accuracy"
    ),
}
"""Name of a pool -> where its results are."""


def carried_records(pools: tuple[str, ...] = ()) -> tuple[Record, ...]:
    """The results of these pools; left out, of all that are not part of another one.

    Raises:
        SelectionError: there is no such pool.
    """
    wanted = pools or tuple(name for name, pool in CARRIED_POOLS.items() if not pool.part_of)
    return tuple(record for name in wanted for record in _records(name))


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a file of the folder ``tables``, by column.

    Raises:
        SelectionError: there is no such table.
    """
    found = files("deltapatch.selection").joinpath("tables", name)
    if not found.is_file():
        raise SelectionError(f"there is no table '{name}' among the published results; see their README.md")
    return list(csv.DictReader(found.read_text(encoding="utf-8").splitlines()))


def _records(name: str) -> list[Record]:
    if name not in CARRIED_POOLS:
        raise SelectionError(
            f"there is no pool '{name}' of published results; choose of {', '.join(CARRIED_POOLS)}"
        )
    pool = CARRIED_POOLS[name]
    return [
        Record(name, "/".join(row[part] for part in pool.model), row[pool.target], float(row[pool.accuracy]))
        for row in read_table(pool.table)
    ]
