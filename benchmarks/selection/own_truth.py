"""How well each score ranks real bases, and their layers, by what was measured on them.

    python benchmarks/selection/ground_truth.py --work /tmp/truth
    python benchmarks/selection/own_truth.py --work /tmp/truth

The first command fits patches of every base on every set. Here every score sees the same training images,
once, and is judged by the test accuracy of the patch that is best on validation images, and of full
fine-tuning alone. A layer is judged by the test accuracy of a linear classifier on its pooled output. The
weighted tau is SciPy's default, "average".
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deltapatch.base import Base
from deltapatch.data import ImageSet, open_data
from deltapatch.fitting.solver import solve_head
from deltapatch.selection.history.prior import History, combine, prior
from deltapatch.selection.history.record import Record
from deltapatch.selection.ranking.agreement import Agreement, agreement, mean_agreement
from deltapatch.selection.ranking.candidates import Candidate
from deltapatch.selection.ranking.probing import probe_base
from deltapatch.selection.ranking.rank_bases import rank
from deltapatch.selection.score import ranking_scores

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "accuracy"))

from ground_truth import SETS, TABLE
from settings import BASES, arguments, load_base

Values = Mapping[str, float]
COMBINATIONS = {
    "shrinkage_h_score + logme + nce": ("shrinkage_h_score", "logme", "nce"),
    "linear_probe + parc": ("linear_probe", "parc"),
}
RANDOM_DRAWS = 2000


def main() -> None:
    parser = arguments("Scores against measured accuracies.", "selection_own.md")
    parser.add_argument("--work", type=Path, required=True, help="where ground_truth.py left the sets")
    parser.add_argument("--bases", nargs="*", choices=BASES, default=list(BASES))
    parser.add_argument("--draws", type=int, default=10, help="halves of the images, for the stability")
    parser.add_argument("--no-layers", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bases = [load_base(name, options.size) for name in options.bases]
    names = options.only or SETS
    patched, tuned = read_truth(options.bases)
    values, stability = scores_of_bases(
        bases, {name: options.work / "data" / f"{name}.npz" for name in names}, options.draws
    )
    for name in names:
        add_baselines(values[name], name, patched)
    lines = [
        *section(
            "Bases, by the patch that is best on validation images",
            values,
            {name: patched[name] for name in names},
            stability,
        ),
        *section("Bases, by full fine-tuning", values, {name: tuned[name] for name in names}, {}),
    ]
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not options.no_layers:
        for base in bases:
            lines += layers_of(base, {name: options.work / "data" / f"{name}.npz" for name in names})
            options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


# --- bases ------------------------------------------------------------------------------------------------


def read_truth(bases: Sequence[str]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Set -> base -> mean test accuracy in per cent over the seeds: of the best patch, and of full tuning."""
    cells: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    with TABLE.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells[row["set"], row["base"], row["seed"]].append(row)
    patched: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    tuned: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (task, base, _), rows in cells.items():
        if base not in bases:
            continue
        best = max(rows, key=lambda row: (float(row["validation"]), -int(row["parameters"])))
        patched[task][base].append(100 * float(best["test"]))
        tuned[task][base] += [100 * float(row["test"]) for row in rows if row["method"] == "full"]
    return _means(patched), _means(tuned)


def _means(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {
        task: {base: float(np.mean(seeds)) for base, seeds in of_task.items()}
        for task, of_task in found.items()
    }


def scores_of_bases(
    bases: Sequence[Base], sets: Mapping[str, Path], draws: int
) -> tuple[dict[str, dict[str, Values]], dict[str, list[float]]]:
    """Set -> score -> base -> value; and score -> its stability on each set."""
    values: dict[str, dict[str, Values]] = {}
    stability: dict[str, list[float]] = defaultdict(list)
    for name, path in sets.items():
        found = rank(path, [Candidate.of(base) for base in bases], list(ranking_scores()), draws=draws)
        problems = [f"{row.name}: {row.problem}" for row in found.rows if row.problem]
        assert not problems, problems
        values[name] = {score: {row.name: row.value(score) for row in found.rows} for score in found.scores}
        values[name]["nearest mean (baseline)"] = {row.name: row.nearest_mean for row in found.rows}
        values[name]["parameters (baseline)"] = {row.name: float(row.parameters) for row in found.rows}
        for score in found.scores:
            stability[score].append(found.stability(score))
        print(f"scored {name}", flush=True)
    return values, stability


def add_baselines(values: dict[str, Values], target: str, truth: Mapping[str, Values]) -> None:
    """The history prior from the other sets, combinations of scores, and both together."""
    records = [
        Record("own", base, task, accuracy)
        for task, of_task in truth.items()
        if task != target
        for base, accuracy in of_task.items()
    ]
    known = prior(History(tuple(records)), list(truth[target]), target)
    values["history prior (baseline)"] = known
    for name, scores in COMBINATIONS.items():
        values[name] = combine(*(values[score] for score in scores))
    values["linear_probe + history prior"] = combine(values["linear_probe"], known)


def section(
    title: str,
    values: Mapping[str, Mapping[str, Values]],
    truth: Mapping[str, Values],
    stability: Mapping[str, Sequence[float]],
) -> list[str]:
    """A table with a row for each score, the best mean weighted tau first."""
    found: dict[str, dict[str, Agreement]] = defaultdict(dict)
    for task, of_task in values.items():
        names = list(truth[task])
        for score, of_score in of_task.items():
            found[score][task] = agreement(
                [of_score.get(name, np.nan) for name in names], [truth[task][name] for name in names]
            )
    rows = sorted(found, key=lambda score: -mean_agreement(found[score]).weighted_tau)
    lines = [
        f"# {title}",
        "",
        f"{len(truth)} sets, {len(next(iter(truth.values())))} to choose from; weighted tau (average), its"
        " mean with the 95 % interval over sets drawn with replacement; regret: the accuracy of the one"
        " that is picked below the best, in points; stability: share of halves of the images that pick it.",
        "",
        "| score | mean tau | 95 % interval | worst set | Kendall | Pearson | regret | stability |"
        f" {' | '.join(truth)} |",
        "|" + "---|" * (8 + len(truth)),
    ]
    for score in rows:
        mean = mean_agreement(found[score])
        taus = np.array([found[score][task].weighted_tau for task in truth])
        low, high = _interval(taus)
        share = f"{np.nanmean(stability[score]):.2f}" if score in stability else ""
        cells = " | ".join(f"{tau:.2f}" for tau in taus)
        lines.append(
            f"| {score} | {mean.weighted_tau:.3f} | {low:.2f} to {high:.2f} | {mean.lowest_weighted_tau:.2f}"
            f" ({mean.worst_target}) | {mean.kendall_tau:.2f} | {mean.pearson:.2f} | {mean.regret:.1f} |"
            f" {share} | {cells} |"
        )
    return [*lines, ""]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    drawn = np.random.default_rng(0).choice(values, (RANDOM_DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


# --- layers -----------------------------------------------------------------------------------------------


def layers_of(base: Base, sets: Mapping[str, Path]) -> list[str]:
    """A table of how well scores choose among the stages of one base."""
    readable = {name: score for name, score in ranking_scores().items() if score.reads != "probabilities"}
    values: dict[str, dict[str, Values]] = {}
    truth: dict[str, Values] = {}
    for name, path in sets.items():
        task = open_data(path)
        assert task.train is not None and task.val is not None and task.test is not None  # noqa: PT018
        training, test = _layers(base, task.train), _layers(base, task.test)
        # Of a set with one validation image a class no base is looked at; the penalty is the default then.
        alone = np.bincount(task.val.labels).max() < 2
        validation = None if alone else _layers(base, task.val)
        if len(training[0]) < 2:
            return [f"# Layers of {base.name}", "", f"{len(training[0])} stages: nothing to choose.", ""]
        truth[name] = {
            stage: linear_accuracy(
                (training[0][stage], training[1]),
                None if validation is None else (validation[0][stage], validation[1]),
                (test[0][stage], test[1]),
                len(task.classes),
            )
            for stage in training[0]
        }
        values[name] = {
            score: {stage: _value(entry.compute, rows, training[1]) for stage, rows in training[0].items()}
            for score, entry in readable.items()
        }
        print(f"layers of {base.name} on {name}", flush=True)
    return section(f"Layers of {base.name}, by a linear classifier on their pooled output", values, truth, {})


def _layers(base: Base, images: ImageSet) -> tuple[Mapping[str, NDArray[np.float32]], NDArray[np.int64]]:
    found = probe_base(base, images, np.arange(len(images)), _no_watch, layers=True)
    return found.layers, found.labels


def _value(compute: object, rows: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return float(compute(rows, labels).value)  # type: ignore[operator]


def linear_accuracy(
    training: tuple[NDArray[np.float32], NDArray[np.int64]],
    validation: tuple[NDArray[np.float32], NDArray[np.int64]] | None,
    test: tuple[NDArray[np.float32], NDArray[np.int64]],
    classes: int,
) -> float:
    """Test accuracy in per cent of logistic regression whose penalty is chosen on validation images."""
    head = torch.nn.Linear(training[0].shape[1], classes)
    solve_head(head, _tensors(training), None if validation is None else _tensors(validation))
    with torch.no_grad():
        answers = head(torch.from_numpy(test[0])).argmax(1).numpy()
    return 100 * float((answers == test[1]).mean())


def _tensors(split: tuple[NDArray[np.float32], NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(split[0]), torch.from_numpy(split[1])


def _no_watch(label: str, images: int) -> AbstractContextManager[object]:
    return nullcontext(lambda done: None)


if __name__ == "__main__":
    main()
