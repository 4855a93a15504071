"""The prior never sees its own target, says what it does not know, and gives the figures of the tables."""

import re
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest

from deltapatch.selection import SelectionError
from deltapatch.selection.history.carried import CARRIED_POOLS, read_table
from deltapatch.selection.history.prior import History, combine, prior
from deltapatch.selection.history.record import Record, plain
from deltapatch.selection.ranking.agreement import Variant, weighted_tau


def tau_of(
    scores: Mapping[str, float], accuracies: Mapping[str, float], variant: Variant = "average"
) -> float:
    return weighted_tau([scores[model] for model in accuracies], list(accuracies.values()), variant)


def each_target_left_out(pool: str, variant: Variant = "average") -> dict[str, float]:
    history = History.carried(pool)
    found: dict[str, float] = {}
    for target in history.targets:
        accuracies = history.accuracies(target)
        found[target] = tau_of(prior(history, accuracies, target), accuracies, variant)
    return found


def mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def known(*accuracies: tuple[str, str, float], pool: str = "pool") -> History:
    return History(tuple(Record(pool, model, target, value) for model, target, value in accuracies))


@pytest.mark.parametrize(
    ("pool", "variant", "expected"),
    [
        ("supervised", "average", 0.826),
        ("tllib", "average", 0.749),
        ("tllib", "by-accuracy", 0.757),
        ("multi-source", "average", 0.618),
    ],
)
def test_each_target_left_out_gives_the_mean_over_targets(
    pool: str, variant: Variant, expected: float
) -> None:
    assert mean(each_target_left_out(pool, variant)) == pytest.approx(expected, abs=1e-3)


def test_the_self_supervised_pool_over_the_ten_targets_that_were_printed() -> None:
    found = each_target_left_out("self-supervised")
    printed = {target: tau for target, tau in found.items() if target != "sun397"}
    assert len(printed) == 10
    assert mean(printed) == pytest.approx(0.668, abs=1e-3)


def test_in_a_pool_of_many_sources_the_prior_fails_on_aircraft() -> None:
    assert each_target_left_out("multi-source")["Aircraft"] == pytest.approx(0.117, abs=1e-3)


@pytest.mark.parametrize(
    ("variant", "alone", "with_prior"), [("average", 0.731, 0.794), ("by-accuracy", 0.731, 0.801)]
)
def test_scores_of_the_target_s_images_and_the_prior_are_better_together(
    variant: Variant, alone: float, with_prior: float
) -> None:
    history = History.carried("tllib")
    rows = read_table("modelspider_scores_10models_8datasets.csv")
    scored: dict[str, float] = {}
    combined: dict[str, float] = {}
    for target in dict.fromkeys(row["dataset"] for row in rows):
        of_target = [row for row in rows if row["dataset"] == target]
        accuracies = {row["model"]: float(row["finetune_accuracy"]) for row in of_target}
        columns = [
            {row["model"]: float(row[name]) for row in of_target} for name in ("hscore", "logme", "nce")
        ]
        together = combine(*columns)
        expected = prior(history, accuracies, target)
        assert not expected.missing
        scored[target] = tau_of(together, accuracies, variant)
        combined[target] = tau_of(combine(together, expected), accuracies, variant)
    assert mean(scored) == pytest.approx(alone, abs=1e-3)
    assert mean(combined) == pytest.approx(with_prior, abs=1e-3)


def test_the_target_itself_is_never_used_under_whatever_name() -> None:
    history = known(("a", "birds", 0.9), ("b", "birds", 0.1), ("a", "Stanford Cars", 0.1), ("b", "cars", 0.9))
    assert dict(prior(history, ["a", "b"], "birds")) == pytest.approx({"a": -1.0, "b": 1.0})
    assert dict(prior(history, ["a", "b"], "StanfordCars")) == pytest.approx({"a": 1.0, "b": -1.0})
    digested = History(tuple(Record("p", model, "old name", 0.5, digest="d1") for model in "ab"))
    assert not prior(digested, ["a", "b"], "new name", digest="d1")


def test_accuracies_are_standardised_on_each_target_and_averaged() -> None:
    easy = (("a", "easy", 98.0), ("b", "easy", 96.0), ("c", "easy", 97.0))
    hard = (("a", "hard", 40.0), ("b", "hard", 20.0))
    found = prior(known(*easy, *hard), ["a", "b", "c"], "new")
    outer = np.sqrt(3 / 2)
    assert found["a"] == pytest.approx((outer + 1) / 2)
    assert found["b"] == pytest.approx((-outer - 1) / 2)
    assert found["c"] == pytest.approx(0.0)
    assert found.targets == {"a": ("easy", "hard"), "b": ("easy", "hard"), "c": ("easy",)}


def test_a_target_says_nothing_where_one_model_is_known_or_all_are_alike() -> None:
    history = known(("a", "alone", 0.9), ("a", "alike", 0.5), ("b", "alike", 0.5))
    found = prior(history, ["a", "b"], "new")
    assert not found
    assert found.missing == ("a", "b")


def test_a_model_without_a_history_has_no_value_and_it_is_said() -> None:
    found = prior(known(("a", "birds", 0.9), ("b", "birds", 0.1)), ["b", "stranger", "a"], "new")
    assert list(found) == ["b", "a"]
    assert found.missing == ("stranger",)
    assert "stranger" not in found
    assert str(found) == "history of 2 of 3 models; none of stranger"


def test_pools_are_not_compared_with_each_other() -> None:
    strong = known(("a", "birds", 99.0), ("b", "birds", 98.0), pool="strong")
    weak = known(("c", "birds", 50.0), ("d", "birds", 49.0), pool="weak")
    assert dict(prior(strong + weak, "abcd", "new")) == pytest.approx(
        {"a": 1.0, "b": -1.0, "c": 1.0, "d": -1.0}
    )


def test_of_several_results_for_the_same_base_and_images_the_last_one_counts() -> None:
    history = known(("a", "birds", 0.1), ("b", "birds", 0.5), ("a", "birds", 0.9))
    assert dict(prior(history, "ab", "new")) == pytest.approx({"a": 1.0, "b": -1.0})
    assert history.accuracies("birds") == {"a": 0.9, "b": 0.5}


def test_another_base_of_the_same_name_is_known_by_its_fingerprint() -> None:
    history = History(
        (
            Record("own", "net", "birds", 0.9, fingerprint="sha256:1"),
            Record("own", "net", "birds", 0.1, fingerprint="sha256:2"),
            Record("pool", "net", "cars", 0.2),
            Record("pool", "other", "cars", 0.1),
        )
    )
    found = prior(history, ["net"], "new", fingerprints={"net": "sha256:2"})
    assert found["net"] == pytest.approx((-1.0 + 1.0) / 2)
    assert prior(history, ["net"], "cars", fingerprints={"net": "sha256:3"}).missing == ("net",)


def test_names_are_found_however_they_are_written() -> None:
    found = prior(History.carried("supervised"), ["ResNet-50", "MobileNet V2", "MNasNet"], "new")
    assert not found.missing
    assert len({plain(name) for name in ("StanfordCars", "cars", "stanford_cars")}) == 1
    assert len({plain(name) for name in ("OxfordIIITPets", "Pet", "oxford_pets", "Pets")}) == 1


def test_what_is_carried_is_what_the_tables_hold() -> None:
    sizes = {name: len(History.carried(name).records) for name in CARRIED_POOLS}
    assert sizes == {
        "supervised": 121,
        "self-supervised": 132,
        "tllib": 80,
        "regression": 20,
        "multi-source": 462,
        "parc": 469,
        "parc-controlled": 196,
        "transfergraph": 2253,
    }
    everything = History.carried()
    assert len(everything.records) == sum(sizes.values()) - sizes["parc-controlled"]
    assert len(everything.of_pool("tllib").targets) == 8


def test_a_pool_that_is_part_of_another_one_has_the_same_numbers() -> None:
    whole = {(one.model, one.target): one.accuracy for one in History.carried("parc").records}
    for one in History.carried("parc-controlled").records:
        assert whole[one.model, one.target] == one.accuracy


def test_a_pool_or_table_that_is_not_there_is_refused() -> None:
    with pytest.raises(SelectionError, match=re.escape("no pool 'nets' of published results; choose of")):
        History.carried("nets")
    with pytest.raises(SelectionError, match=re.escape("no table 'nets.csv'")):
        read_table("nets.csv")


def test_every_table_is_described() -> None:
    tables = {pool.table for pool in CARRIED_POOLS.values()}
    from importlib.resources import files

    folder = files("deltapatch.selection").joinpath("tables")
    shipped = {entry.name for entry in folder.iterdir() if entry.name.endswith(".csv")}
    assert tables <= shipped
    described = set(re.findall(r"^\| `(\S+\.csv)`", folder.joinpath("README.md").read_text("utf-8"), re.M))
    assert described == shipped


def test_a_combination_is_the_sum_of_standardised_scores() -> None:
    found = combine({"a": 1.0, "b": 3.0}, {"a": -50.0, "b": -70.0}, {"b": 4.0, "a": 2.0})
    assert found == pytest.approx({"a": -1.0, "b": 1.0})


def test_a_score_that_is_missing_counts_as_the_mean_of_the_others() -> None:
    full = {"a": 0.0, "b": 1.0, "c": 2.0}
    found = combine(full, {"a": 5.0, "b": 7.0, "c": float("nan")})
    outer = np.sqrt(3 / 2)
    assert found == pytest.approx({"a": -outer - 1, "b": 1.0, "c": 2 * outer})
    assert combine(full, {"d": float("nan")}).keys() == full.keys()


def test_a_constant_score_changes_no_order() -> None:
    found = combine({"a": 0.0, "b": 1.0, "c": 5.0}, {"a": 2.0, "b": 2.0, "c": 2.0})
    assert all(found[one] < found[other] for one, other in pairwise("abc"))
    assert found == pytest.approx(combine({"a": 0.0, "b": 1.0, "c": 5.0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accuracy": float("nan")}, "the accuracy nan of net on birds is no number"),
        ({"model": " "}, "needs the names of a model and of a target"),
        ({"target": ""}, "needs the names of a model and of a target"),
    ],
)
def test_a_result_that_is_none_is_refused(fields: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"pool": "own", "model": "net", "target": "birds", "accuracy": 0.5}
    with pytest.raises(SelectionError, match=message):
        Record(**(values | fields))  # type: ignore[arg-type]
