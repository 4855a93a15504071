"""How well each real base is patched to each set: what rankings of bases are judged by.

    python benchmarks/selection/ground_truth.py --work /tmp/truth

Every base × set × method is fitted by `deltapatch compare` on the same training images; the patch that is
best on validation images is answered once on the test images. ``--work`` keeps the ledgers, from which the
command goes on after an end.
"""

import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accuracy"))

from settings import BASES, REPOSITORY, arguments, capped_set, load_base
from single import SETS as ALL_SETS

from deltapatch.evaluation.comparing.comparison import compare
from deltapatch.evaluation.comparing.planning import ComparisonConfig
from deltapatch.fitting.fit import FitConfig

SETS = tuple(name for name in ALL_SETS if name != "mnist")  # one set of digits is enough
METHODS = ("head", "delta:modules=1", "full")
COLUMNS = ("base", "set", "method", "seed", "validation", "test", "parameters", "seconds")
TABLE = REPOSITORY / "benchmarks" / "results" / "selection_ground_truth.csv"


def main() -> None:
    parser = arguments("Accuracy of patches of every base on every set.", TABLE.name)
    parser.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--most", type=int, nargs=3, default=(300, 200, 1000), help="train, val, test images")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the ledgers and the patches")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    most = dict(zip(("train", "val", "test"), options.most, strict=True))
    sets = [capped_set(name, options.work / "data", most) for name in options.only or SETS]
    rows: list[dict[str, str | int | float]] = []
    for name in options.bases:
        found = compare(
            load_base(name, options.size),
            sets,
            ",".join(options.methods),
            options.work / name,
            ComparisonConfig(seeds=options.seeds),
            FitConfig(epochs=options.epochs, patience=None),
            progress=False,
        )
        for planned, row in found.done:
            rows += [
                {
                    "base": name,
                    "set": score.task,
                    "method": planned.contender,
                    "seed": row.seed,
                    "validation": round(score.validation_accuracy, 4),
                    "test": round(score.accuracy, 4),
                    "parameters": row.parameters,
                    "seconds": round(row.seconds, 2),
                }
                for score in row.scores
            ]
        _write(options.out, rows)
        print(f"{name}: done", flush=True)


def _write(path: Path, rows: list[dict[str, str | int | float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
