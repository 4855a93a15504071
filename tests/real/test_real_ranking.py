"""A ranking of trained networks on real images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltapatch.data import open_data
from deltapatch.selection.ranking.rank_bases import rank

pytestmark = pytest.mark.real


def test_a_network_that_knows_the_images_is_ranked_first(shared: Path, load_network: Any) -> None:
    """Two networks that were trained on the set, and one that was trained on digits."""
    bases = [load_network(name) for name in ("mnist_vit", "cifar_vit", "resnet20")]
    ranking = rank(shared / "data" / "cifar10.npz", bases, probe=200, draws=6)
    assert [row.problem for row in ranking.rows] == ["", "", ""]
    assert ranking.rows[0].name == load_network("resnet20").name
    for score in ranking.scores:
        best = ranking.best_by(score)
        assert best is not None
        assert best.name == load_network("resnet20").name
        assert ranking.stability(score) >= 0.8
    assert load_network("mnist_vit").name not in ranking.ties
    by_name = {row.name: row for row in ranking.rows}
    assert by_name[load_network("resnet20").name].nearest_mean > 0.8
    assert by_name[load_network("mnist_vit").name].nearest_mean < 0.5


def test_deeper_stages_tell_more_of_the_classes_a_network_was_trained_on(
    shared: Path, load_network: Any
) -> None:
    task = open_data(shared / "data" / "cifar10.npz")
    ranking = rank(task, [load_network("resnet20")], ["shrinkage_h_score"], layers=True, probe=200, draws=0)
    values = [layer.cells["shrinkage_h_score"].value for layer in ranking.rows[0].layers]
    assert len(values) == 3
    assert np.all(np.diff(values) > 0)
