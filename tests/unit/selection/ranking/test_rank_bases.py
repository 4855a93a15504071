"""From images and bases to a ranking: nothing that is wrong with one base stops the others."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from digits import write_digits
from PIL import Image
from torch import Tensor, nn
from toys import NormUnit, OwnNet, enliven

import deltapatch
from deltapatch.data import TaskData, open_data
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.selection.history.prior import History
from deltapatch.selection.history.record import Record
from deltapatch.selection.ranking.candidates import Candidate
from deltapatch.selection.ranking.files import as_arrow, as_markdown, write_ranking
from deltapatch.selection.ranking.picture import draw_ranking
from deltapatch.selection.ranking.rank_bases import DEFAULT_SCORES, ORDERED_BY, rank
from deltapatch.selection.ranking.ranked import Ranking
from deltapatch.selection.ranking.scoring import nearest_mean_accuracy
from deltapatch.selection.ranking.table import LiveRanking, lines, problems, summary
from deltapatch.selection.score import SelectionError, ranking_scores

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def pair(make_base: Any) -> list[Any]:
    return [make_base(width=2), make_base(width=16)]


class Exhausting(nn.Module):
    """Runs out of memory on more images than an anatomy needs."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error
        self.unit = NormUnit(3, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise self.error("tried to allocate 2 GiB\nmore words")
        return self.fc(self.unit(x).mean((2, 3)))


class Watch:
    """Notes what it is told; may do something when a base begins."""

    def __init__(self, act: Callable[[int], None] = lambda number: None) -> None:
        self.begun: list[tuple[int, int, str]] = []
        self.done: list[int] = []
        self.finished: list[Ranking] = []
        self.act = act

    def begin(self, number: int, count: int, name: str) -> None:
        self.begun.append((number, count, name))
        self.act(number)

    def surveying(self, label: str, images: int) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(self.done.append)

    def finish(self, so_far: Ranking) -> None:
        self.finished.append(so_far)


def test_a_ranking_orders_bases_and_computes_each_score_once(task: TaskData, pair: list[Any]) -> None:
    ranking = rank(task, pair, probe=80, draws=4)
    assert ranking.scores == DEFAULT_SCORES
    assert ranking.ordered_by == ORDERED_BY
    values = [row.value(ORDERED_BY) for row in ranking.rows]
    assert values == sorted(values, reverse=True)
    assert ranking.best is ranking.rows[0]
    assert ranking.images == pytest.approx(80, abs=5)
    assert (ranking.classes, ranking.draws) == (10, 4)
    for row in ranking.rows:
        assert not row.problem
        assert set(row.cells) == set(DEFAULT_SCORES)
        assert all(cell.halves.shape == (4,) for cell in row.cells.values())
        assert 0 <= row.nearest_mean <= 1
        assert row.samples == ranking.images
    assert {row.width for row in ranking.rows} == {2, 16}


def test_values_are_those_of_the_scores_alone(task: TaskData, pair: list[Any]) -> None:
    from deltapatch.selection.drawing import draw_probe
    from deltapatch.selection.ranking.probing import probe_base

    scores = ("logme", "parc", "leep")
    ranking = rank(task, pair, scores, probe=80, draws=0)
    assert task.train is not None
    for base in pair:
        probe = probe_base(base, task.train, draw_probe(task.train.labels, 80), Watch().surveying)
        row = next(row for row in ranking.rows if row.name == base.name)
        for score in scores:
            read = probe.probabilities if score == "leep" else probe.features
            alone = ranking_scores()[score].compute(read, probe.labels)
            assert row.value(score) == pytest.approx(alone.value, rel=1e-9)
        assert np.isnan(row.cells["logme"].interval).all()


def test_the_same_seed_gives_the_same_ranking_and_another_other_images(
    task: TaskData, pair: list[Any]
) -> None:
    def halves(seed: int) -> list[float]:
        ranking = rank(task, pair[:1], ["logme"], probe=60, draws=3, seed=seed)
        return ranking.rows[0].cells["logme"].halves.tolist()

    assert halves(1) == halves(1)
    assert halves(1) != halves(2)


def test_all_bases_are_scored_on_the_same_halves(task: TaskData, make_base: Any) -> None:
    ranking = rank(task, [make_base(name="a"), make_base(name="b")], ["logme", "parc"], probe=60, draws=5)
    one, other = ranking.rows
    for score in ranking.scores:
        np.testing.assert_array_equal(one.cells[score].halves, other.cells[score].halves)
    assert ranking.ties == {"b"}


def test_every_score_that_is_registered_ranks(task: TaskData, pair: list[Any]) -> None:
    ranking = rank(task, pair, list(ranking_scores()), probe=80, draws=1)
    for row in ranking.rows:
        assert {name: cell.problem for name, cell in row.cells.items() if cell.problem} == {}


def test_layers_are_scored_without_scores_of_probabilities(task: TaskData, make_base: Any) -> None:
    module = OwnNet().eval()
    enliven(module)
    ranking = rank(task, [make_base(module=module)], ["logme", "nce"], layers=True, probe=60, draws=2)
    layers = ranking.rows[0].layers
    assert [(layer.stage, layer.width) for layer in layers] == [("narrow", 16), ("wide", 32)]
    assert all(set(layer.cells) == {"logme"} and layer.cells["logme"].score for layer in layers)
    assert layers[1].cells["logme"].value == pytest.approx(ranking.rows[0].value("logme"), rel=1e-3)


def test_a_second_ranking_reads_the_cache(task: TaskData, make_base: Any, batches: list[int]) -> None:
    first = rank(task, [make_base()], probe=60, draws=2)
    assert max(batches) == 32
    batches.clear()
    again = rank(task, [make_base()], probe=60, draws=2)
    assert max(batches) < 32
    assert first.rows[0].value(ORDERED_BY) == again.rows[0].value(ORDERED_BY)


# --- what goes wrong --------------------------------------------------------------------------------------


def _flat(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


class Zeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * 0


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("wants images of 9 channels")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            lambda: Exhausting(torch.OutOfMemoryError).eval(),
            "memory ran out (tried to allocate 2 GiB); use a",
        ),
        (lambda: Exhausting(MemoryError).eval(), "memory ran out (tried to allocate 2 GiB); use a"),
        (lambda: Exhausting(ZeroDivisionError).eval(), "ZeroDivisionError: tried to allocate 2 GiB"),
        (lambda: _flat(Zeros()), "all features are constant: this model gives the same for every image"),
        (Refusing, "Refusing failed on an input of shape (2, 3, 8, 8): wants images of 9 channels"),
        (lambda: "torchvision/nothing", "torchvision has no model 'nothing'"),
        (lambda: "own.py:network", "own.py: there is no such file"),
    ],
    ids=["device memory", "memory", "any error", "zeros", "no anatomy", "no such model", "no such file"],
)
def test_a_base_that_fails_has_a_row_that_says_why_and_the_others_are_ranked(
    task: TaskData, pair: list[Any], make_base: Any, bad: Callable[[], Any], message: str
) -> None:
    made = bad()
    wrong = Candidate("wrong", made if isinstance(made, str) else make_base(module=made))
    ranking = rank(task, [pair[0], wrong, pair[1]], ["logme", "nce"], probe=60, draws=2)
    assert ranking.rows[-1].name == "wrong"
    assert ranking.rows[-1].problem.startswith(message)
    assert "\n" not in ranking.rows[-1].problem
    assert problems(ranking) == [f"wrong: {ranking.rows[-1].problem}"]
    assert sorted(row.name for row in ranking.rows[:2]) == ["width 16", "width 2"]
    assert all(row.cells["nce"].score for row in ranking.rows[:2])
    assert [row["problem"] for row in as_arrow(ranking).to_pylist() if row["base"] == "wrong"] == [
        ranking.rows[-1].problem
    ]


def test_a_score_that_fails_for_one_base_says_why_in_its_cell(
    task: TaskData, make_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = nn.Sequential(NormUnit(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    enliven(features)
    bases = [make_base(), make_base(module=features, name="features")]
    ranking = rank(task, bases, ["logme", "leep"], probe=60, draws=2)
    row = next(row for row in ranking.rows if row.name == "features")
    assert row.cells["leep"].problem == "it has no classifier of its own"
    assert np.isnan(row.cells["leep"].halves).all()
    assert row.cells["logme"].score is not None
    assert problems(ranking) == ["leep of features: it has no classifier of its own"]

    by_leep = rank(task, bases[::-1], ["leep"], probe=60, draws=2)
    assert [row.name for row in by_leep.rows] == ["width 4", "features"]
    assert lines(by_leep)[1][:3] == ("–", "features", "–")
    assert by_leep.stability("leep") == 1


def test_a_score_that_raises_anything_leaves_the_others(
    task: TaskData, make_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any) -> Any:
        raise np.linalg.LinAlgError("did not converge")

    scores = dict(ranking_scores())
    scores["parc"] = replace(scores["parc"], compute=failing)
    monkeypatch.setattr("deltapatch.selection.ranking.rank_bases.ranking_scores", lambda: scores)
    ranking = rank(task, [make_base()], ["logme", "parc"], probe=60, draws=2)
    assert ranking.rows[0].cells["parc"].problem == "LinAlgError: did not converge"
    assert ranking.rows[0].cells["logme"].score is not None


def test_images_of_one_class_are_refused_before_a_base_is_loaded(task: TaskData) -> None:
    assert task.train is not None
    one = replace(task, train=task.train.subset(np.flatnonzero(task.train.labels == 3)))
    with pytest.raises(SelectionError, match="the labels hold one class"):
        rank(one, ["torchvision/nothing"])


def test_classes_with_one_image_and_gaps_are_dropped_and_named(tmp_path: Path, pair: list[Any]) -> None:
    labels = np.array([0, 3, 7, 3] * 15 + [0, 3, 5, 9])
    task = open_data(write_digits(tmp_path / "gaps.npz", train_labels=labels))
    ranking = rank(task, pair, list(ranking_scores()), draws=2)
    assert ranking.classes == 5
    for row in ranking.rows:
        for cell in row.cells.values():
            assert cell.problem == ""
            assert cell.score is not None
            assert cell.score.diagnostics.dropped == (5, 9)
    sentence = "2 classes with fewer than 2 samples are left out: 5, 9"
    assert any(warning.startswith(sentence) for warning in ranking.warnings)


def test_fewer_images_than_features_are_ranked(task: TaskData, make_base: Any) -> None:
    ranking = rank(task, [make_base(width=64)], list(ranking_scores()), probe=30, draws=2)
    assert ranking.rows[0].samples < ranking.rows[0].width
    assert [cell.problem for cell in ranking.rows[0].cells.values() if cell.problem] == []


def test_images_of_one_pixel_are_looked_at(tmp_path: Path, make_base: Any) -> None:
    """Of all colours alike, nothing can be told apart; of several, something."""
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        (tmp_path / "coloured" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (1, 1), "grey").save(tmp_path / "grey" / name / f"{number}.png")
            colour = (40 * number, 200 if name == "a" else 20, 90)
            Image.new("RGB", (1, 1), colour).save(tmp_path / "coloured" / name / f"{number}.png")
    grey = rank(tmp_path / "grey", [make_base()], ["logme"], draws=2)
    assert grey.rows[0].problem.startswith("all features are constant")
    assert summary(grey) == "No base could be ranked."
    coloured = rank(tmp_path / "coloured", [make_base()], ["logme"], draws=2)
    assert coloured.rows[0].problem == ""


def test_data_without_training_images_is_refused(task: TaskData, pair: list[Any]) -> None:
    with pytest.raises(DataError, match="has no training images; a ranking looks at those"):
        rank(replace(task, train=None), pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ["logme", "lagme"]}, "there is no score 'lagme'; choose from .*logme"),
        ({"scores": []}, "there is no score to rank by"),
        ({"draws": -1}, "draws -1, seed 0 and batch_size 32 are not usable"),
        ({"probe": 1}, "a probe of 1 images"),
    ],
)
def test_what_cannot_be_is_refused(
    task: TaskData, pair: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        rank(task, pair, **options)


# --- the end in the middle, the watch, the baselines --------------------------------------------------------


def test_ctrl_c_keeps_the_bases_that_are_done(task: TaskData, pair: list[Any]) -> None:
    def interrupt(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    ranking = rank(task, pair, ["logme"], probe=60, draws=2, watch=Watch(interrupt))
    assert ranking.interrupted
    assert [row.name for row in ranking.rows] == ["width 2"]
    assert "Interrupted" in as_markdown(ranking)


def test_ctrl_c_before_any_base_is_done_ends_it(task: TaskData, pair: list[Any]) -> None:
    def interrupt(number: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rank(task, pair, ["logme"], probe=60, watch=Watch(interrupt))


def test_the_watch_is_told_of_each_base(task: TaskData, pair: list[Any]) -> None:
    watch = Watch()
    rank(task, pair, ["logme"], probe=60, draws=2, watch=watch)
    assert watch.begun == [(1, 2, "width 2"), (2, 2, "width 16")]
    assert [len(one.rows) for one in watch.finished] == [1, 2]
    assert sum(watch.done) == 2 * watch.finished[0].images


def test_the_live_table_shows_what_is_done_what_failed_and_what_runs(task: TaskData, make_base: Any) -> None:
    live = LiveRanking(enabled=False)
    captions: list[str] = []
    finish = live.finish

    def noted(so_far: Ranking) -> None:
        finish(so_far)
        live.begin(2, 3, "next")
        captions.append(str(live.table().caption))

    live.finish = noted
    with live:
        rank(task, [make_base(), "torchvision/nothing"], ["logme"], probe=60, draws=2, watch=live)
    assert captions[0] == "base 2 of 3: next"
    assert captions[1].splitlines() == [
        "torchvision/nothing: torchvision has no model 'nothing'",
        "base 2 of 3: next",
    ]
    assert [column.header for column in live.table().columns][:3] == ["", "base", "logme"]
    assert live.table().row_count == 1


def test_nearest_mean_answers_by_the_means_of_the_other_half() -> None:
    features = np.array([[0.0], [0.0], [10.0], [10.0], [1.0], [4.0], [9.0], [3.0], [70.0]])
    labels = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2])
    half = np.array([[True] * 4 + [False] * 5])
    # Class 2 is not in the half; of the others only the last, 3.0 of class 1, is nearer to the wrong mean.
    assert nearest_mean_accuracy(features, labels, half) == 0.75
    assert np.isnan(nearest_mean_accuracy(features, labels, ~np.zeros((1, 9), bool)))


def test_the_history_prior_stands_beside_the_scores(task: TaskData, make_base: Any) -> None:
    known, unknown = make_base(name="known"), make_base(seed=1, name="unknown")
    history = History(
        (
            Record("own", "known", "birds", 0.9, fingerprint=known.fingerprint),
            Record("own", "other", "birds", 0.7, fingerprint="sha256:0"),
            Record("own", "known", task.name, 0.1, fingerprint=known.fingerprint),
            Record("own", "other", task.name, 0.7, fingerprint="sha256:0"),
            # Published under the name of a base with other weights.
            Record("published", "unknown", "birds", 0.9),
            Record("published", "other", "birds", 0.7),
        )
    )
    ranking = rank(task, [known, unknown], ["logme"], probe=60, draws=2, history=history)
    values = {row.name: row.history for row in ranking.rows}
    assert values["known"] == pytest.approx(1)  # never the target itself
    assert np.isnan(values["unknown"])
    assert "| history |" in as_markdown(ranking)
    assert "| history |" not in as_markdown(rank(task, [known], ["logme"], probe=60))


def test_a_base_that_was_loaded_for_the_ranking_is_let_go(task: TaskData, make_base: Any) -> None:
    import weakref

    made: list[Any] = []

    class Once(Candidate):
        def load(self, device: str | None = None, task_classes: Any = ()) -> Any:
            base = make_base()
            made.append(weakref.ref(base.module))
            return base

    rank(task, [Once("a", "a"), Once("b", "b")], ["logme"], probe=60, draws=2)
    assert [reference() for reference in made] == [None, None]


# --- files ------------------------------------------------------------------------------------------------


def test_the_files_hold_every_value(task: TaskData, pair: list[Any], tmp_path: Path) -> None:
    ranking = rank(task, pair, ["logme", "nce"], probe=60, draws=3)
    names = write_ranking(ranking, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "ranking.parquet").to_pylist()
    assert len(rows) == 4
    for row in rows:
        found = next(one for one in ranking.rows if one.name == row["base"])
        cell = found.cells[row["score"]]
        assert row["value"] == cell.value
        assert row["halves"] == cell.halves.tolist()
        assert row["orders"] == (row["score"] == "logme")
        assert row["low"] <= row["value"] <= row["high"]
        assert row["stability"] == ranking.stability(row["score"])
        assert ranking.rows[row["place"] - 1] is found
        assert row["nearest_mean_accuracy"] == found.nearest_mean
    with Image.open(tmp_path / "out" / "ranking.png") as picture:
        assert picture.width > 500


def test_names_of_bases_are_no_markup_and_no_formula(task: TaskData, make_base: Any) -> None:
    ranking = rank(task, [make_base(name="a|b [bold]$x_$ <i>\n")], ["logme"], probe=60, draws=2)
    assert "| a\\|b [bold]$x_$ &lt;i> |" in as_markdown(ranking)
    assert draw_ranking(ranking).startswith(b"\x89PNG")


def test_a_ranking_of_nothing_has_tables_and_no_picture(task: TaskData, tmp_path: Path) -> None:
    ranking = rank(task, ["torchvision/nothing"], ["logme"], probe=60)
    assert write_ranking(ranking, tmp_path) == ("ranking.parquet", "ranking.md")
    with pytest.raises(ValueError, match="no base has a value"):
        draw_ranking(ranking)


def test_rank_is_public() -> None:
    assert deltapatch.rank is rank
