"""How well scores and the history prior rank models in the published pools that the package carries.

    python benchmarks/selection/quality.py

No model is run: accuracies, and the values of the scores, are those that others printed. The prior leaves
out each target in turn. Rankings of our own bases, with our own scores, are judged by the file beside this
one.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from reporting import Figures, TauTable, markdown, tau_of

from deltapatch.selection.history.carried import CARRIED_POOLS, read_table
from deltapatch.selection.history.prior import History, combine, prior
from deltapatch.selection.history.record import plain
from deltapatch.selection.ranking.agreement import (
    Agreement,
    Variant,
    agreement,
    bootstrap_over_models,
    leave_one_model_out,
    mean_agreement,
)

RESULTS = Path(__file__).resolve().parents[1] / "results"
MODEL_SPIDER = "modelspider_scores_10models_8datasets.csv"
TLLIB = "tllib_scores_10models_8datasets.csv"

# Which formula a publication's figures follow; where that is not stated they are in no table.
PRINTED_VARIANTS: dict[str, Variant] = {"scipy default": "average", "ground-truth rank only": "by-accuracy"}
# Column of a table of scores -> name and sign. OTCE is a distance.
SCORES = {
    "hscore": ("H-score", 1),
    "leep": ("LEEP", 1),
    "logme": ("LogME", 1),
    "nce": ("NCE", 1),
    "nleep": ("NLEEP", 1),
    "otce": ("−OTCE", -1),
    "pactrandirichlet": ("PACTran", 1),
    "gbc": ("GBC", 1),
    "lfc": ("LFC", 1),
}
TOGETHER = ("hscore", "logme", "nce")
PRIOR, PRIOR_OF_ALL = "history prior", "history prior, all pools"

Values = dict[str, dict[str, dict[str, float]]]
"""Column -> target -> model -> value of the score."""

INTRODUCTION = """\
# Rankings of models in published pools

Weighted Kendall tau between the order by a score and the order by accuracy after fine-tuning, of each target.
Its variant is named at each table, and figures of different variants must not be compared. "Printed" rows are
as published; all others are computed here from published accuracies and scores. The history prior sees the
accuracies of the same models on the *other* targets and no image; the row "all pools" those of all carried
pools, in which the same models were tuned by other recipes; the target is left out under all its names.
Scores see the target's images and no other accuracy, so the two are not rivals on equal terms: see the
combination.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Weighted tau of scores in the carried pools.")
    parser.add_argument("--out", type=Path, default=RESULTS / "selection_pools.md")
    options = parser.parse_args()
    parts = [
        INTRODUCTION,
        "## 11 supervised networks (SFDA's pool)\n",
        _printed_pool("supervised", "11 supervised"),
        "## 12 self-supervised ResNet-50s (PED's pool)\n",
        "PED printed no figures for SUN397; its accuracies are in the history of the others.\n",
        _printed_pool("self-supervised", "12 self-supervised"),
        "## 10 supervised networks (TLlib's and Model Spider's pool)\n",
        _scored_pool(),
        "## The history prior in every pool\n",
        _prior_in_every_pool(),
        "## How far single targets can be trusted\n",
        "The prior's weighted tau (average) with its 95 % interval over models drawn with replacement, and"
        " the lowest and highest figure without one of the models.\n",
        _intervals(),
    ]
    text = "\n".join(parts)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")


def _printed_pool(pool: str, printed_as: str) -> str:
    """What the publications printed, beside the prior, on the targets that they printed."""
    printed = _printed(printed_as)
    wanted = {plain(target) for figures in printed.values() for target in figures}
    targets = [target for target in History.carried(pool).targets if plain(target) in wanted]
    table = TauTable("average", targets)
    for (method, variant), figures in printed.items():
        by_name = {plain(target): tau for target, tau in figures.items()}
        ours = {target: by_name[plain(target)] for target in targets if plain(target) in by_name}
        table.add(f"{method}, printed", ours, variant)
    _add_priors(table, pool)
    return f"Variant: {table.variant}.\n\n{table.as_markdown()}"


def _scored_pool() -> str:
    """The pool with the scores' own values: they, the prior, and both together, in two variants."""
    parts: list[str] = []
    values = _values(MODEL_SPIDER)
    for variant in ("average", "by-accuracy"):
        table = _scored_table(values, variant, "tllib")
        for (method, of_variant), figures in _printed("10 supervised").items():
            if of_variant == variant:
                names = {plain(target): target for target in table.targets}
                ours = {names[plain(target)]: tau for target, tau in figures.items()}
                table.add(f"{method}, printed", ours, of_variant)
        parts.append(f"Variant: {variant}. Values of the scores: Model Spider's.\n\n{table.as_markdown()}")
    table = _scored_table(_values(TLLIB), "average", "tllib")
    parts.append(
        f"Variant: {table.variant}. Values of the scores: TLlib's, without those of DTD that cannot be"
        f" right.\n\n{table.as_markdown()}"
    )
    parts.append(
        "H-score, LogME and NCE were put together after these tables had been seen, so their combination is a"
        " little optimistic. GBC's values break its hard bound on five targets, and say nothing about GBC.\n"
    )
    return "\n".join(parts)


def _scored_table(values: Values, variant: Variant, pool: str) -> TauTable:
    history = History.carried(pool)
    table = TauTable(variant, list(history.targets))
    for column, by_target in values.items():
        figures = {
            target: tau_of(by_target[target], history.accuracies(target), variant)
            for target in table.targets
            if target in by_target
        }
        table.add(SCORES[column][0], figures, variant)
    _add_priors(table, pool)
    scored: Figures = {}
    combined: Figures = {}
    for target in table.targets:
        columns = [values[column][target] for column in TOGETHER if target in values[column]]
        if len(columns) == len(TOGETHER):
            accuracies = history.accuracies(target)
            together = combine(*columns)
            scored[target] = tau_of(together, accuracies, variant)
            combined[target] = tau_of(
                combine(together, prior(history, accuracies, target)), accuracies, variant
            )
    table.add("H-score + LogME + NCE", scored, variant)
    table.add("(H-score + LogME + NCE) + history prior", combined, variant)
    return table


def _add_priors(table: TauTable, pool: str) -> None:
    history, everything = History.carried(pool), History.carried()
    for name, known in ((PRIOR, history), (PRIOR_OF_ALL, everything)):
        figures: Figures = {}
        for target in table.targets:
            accuracies = history.accuracies(target)
            figures[target] = tau_of(prior(known, accuracies, target), accuracies, table.variant)
        table.add(name, figures, table.variant)


def _prior_in_every_pool() -> str:
    rows: list[list[str]] = []
    for pool in CARRIED_POOLS:
        history = History.carried(pool)
        rows.append(_summary(pool, history, partial(_prior_on, history)))
    history = History.carried("transfergraph")
    for column, name in (("parameters", "parameter count"), ("feature_dim", "feature width")):
        # The one model whose size is not known ranks last.
        rows_of_models = read_table("transfergraph_models.csv")
        sizes = {row["model"]: float(row[column] or "nan") for row in rows_of_models}
        rows.append(_summary(f"transfergraph, by {name} instead", history, partial(_same_on_all, sizes)))
    columns = ["pool", "models", "targets", "tau, average", "worst", "tau, by-accuracy", "Kendall", "Pearson"]
    return markdown([*columns, "Rel@1"], rows)


def _summary(name: str, history: History, score_on: Callable[[str], Mapping[str, float]]) -> list[str]:
    """A row: the score over all targets of a pool, and what share of the best accuracy its choice has."""
    found: dict[Variant, dict[str, Agreement]] = {"average": {}, "by-accuracy": {}}
    for target in history.targets:
        accuracies, scores = history.accuracies(target), score_on(target)
        values = [scores[model] for model in accuracies]
        for variant, by_target in found.items():
            by_target[target] = agreement(values, list(accuracies.values()), variant)
    usual, by_accuracy = (mean_agreement(by_target) for by_target in found.values())
    chosen = statistics.mean(one.relative_accuracy[1] for one in found["average"].values())
    return [
        name,
        f"{max(one.models for one in found['average'].values())}",
        f"{usual.targets}",
        f"{usual.weighted_tau:.3f}",
        f"{usual.lowest_weighted_tau:.3f} ({usual.worst_target})",
        f"{by_accuracy.weighted_tau:.3f}",
        f"{usual.kendall_tau:.3f}",
        f"{usual.pearson:.3f}",
        "–" if math.isnan(chosen) else f"{chosen:.3f}",  # a share of a negated error is no figure
    ]


def _prior_on(history: History, target: str) -> Mapping[str, float]:
    return prior(history, history.accuracies(target), target)


def _same_on_all(scores: Mapping[str, float], target: str) -> Mapping[str, float]:
    return scores


def _intervals() -> str:
    rows: list[list[str]] = []
    for pool in ("supervised", "self-supervised", "tllib", "multi-source", "parc"):
        history = History.carried(pool)
        for target in history.targets:
            accuracies = history.accuracies(target)
            scores = prior(history, accuracies, target)
            given = [scores[model] for model in accuracies], list(accuracies.values())
            interval, without = bootstrap_over_models(*given), leave_one_model_out(*given)
            lowest = list(accuracies)[int(without.argmin())]
            rows.append(
                [
                    pool,
                    target,
                    f"{interval.value:.3f}",
                    f"{interval.low:.3f} to {interval.high:.3f}",
                    f"{without.min():.3f} (without {lowest})",
                    f"{without.max():.3f}",
                ]
            )
    return markdown(["pool", "target", "tau", "95 % interval", "lowest without a model", "highest"], rows)


def _values(table: str) -> Values:
    """The values of the scores, but for those that the table's own remarks say cannot be right."""
    history = History.carried("tllib")
    targets = {plain(target): target for target in history.targets}
    models = {plain(model): model for model in history.accuracies(history.targets[0])}
    found: Values = {}
    for row in read_table(table):
        target, model = targets[plain(row["dataset"])], models[plain(row["model"])]
        for column, (_, sign) in SCORES.items():
            if column in row and not (column in ("hscore", "nce") and row.get("caveat")):
                by_model = found.setdefault(column, {}).setdefault(target, {})
                by_model[model] = sign * float(row[column])
    # A target of which some models' values are wrong is no ranking.
    most = max(len(by_model) for by_target in found.values() for by_model in by_target.values())
    return {
        column: {target: by_model for target, by_model in by_target.items() if len(by_model) == most}
        for column, by_target in found.items()
    }


def _printed(pool: str) -> dict[tuple[str, Variant], Figures]:
    """(method, variant) -> figures as published, of those whose variant is stated."""
    found: dict[tuple[str, Variant], Figures] = {}
    for row in read_table("published_weighted_tau.csv"):
        if row["model_pool"] == pool and row["tau_variant"] in PRINTED_VARIANTS:
            figures = found.setdefault((row["method"], PRINTED_VARIANTS[row["tau_variant"]]), {})
            figures[row["target_dataset"]] = float(row["weighted_tau"])
    return found


if __name__ == "__main__":
    main()
