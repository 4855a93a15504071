"""A probe holds what a base's classifier is given and answers: one pass, through the cache that fits use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digits import write_bad_image, write_tree
from torch import Tensor, nn
from toys import Net, NormUnit, OwnNet, Unit, copied_state, enliven, same_state

from deltapatch.base import Base
from deltapatch.data import TaskData, evaluation_transform, load_batches, open_data
from deltapatch.errors import DataError, DeltapatchError
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.deciding import MEASURED_IMAGES
from deltapatch.fitting.fit import fit_task
from deltapatch.methods.head import Head
from deltapatch.open_vocabulary import TextEmbedder, ZeroShotClassifier
from deltapatch.selection.ranking.probing import Probe, probe_base

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def probed(task: TaskData, no_watch: Any) -> Callable[..., Probe]:
    def run(base: Base, of: TaskData = task, count: int = 60, **options: Any) -> Probe:
        assert of.train is not None
        return probe_base(base, of.train, np.arange(min(count, len(of.train))), no_watch, **options)

    return run


def _images(base: Base, task: TaskData, count: int = 60) -> Tensor:
    assert task.train is not None
    prepared = task.train.subset(range(count)).with_transform(evaluation_transform(base.preprocessing))
    return next(iter(load_batches(prepared, batch_size=count, shuffle=False))).images


class Wrapped(nn.Module):
    """A toy network with something done to its logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net([Unit(4), Unit(4)], 4)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_features_and_probabilities_are_those_of_the_whole_base(
    make_base: Any, task: TaskData, probed: Any
) -> None:
    base = make_base()
    before = copied_state(base.module)
    images = _images(base, task)
    found = probed(base)
    expected = base.module.stage(base.module.stem(images)).mean((2, 3))
    np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.probabilities, base.module(images).softmax(1), rtol=1e-4)
    assert task.train is not None
    assert found.labels.tolist() == task.train.labels[:60].tolist()
    assert found.kept.all()
    assert found.fingerprint == base.fingerprint
    assert found.parameters == sum(tensor.numel() for tensor in base.module.parameters())
    assert found.seconds_per_image > 0
    assert same_state(base.module, before)


def test_a_second_probe_runs_the_base_on_the_few_measured_images_only(
    make_base: Any, probed: Any, batches: list[int]
) -> None:
    first = probed(make_base())
    assert max(batches) == 32
    batches.clear()
    again = probed(make_base())
    assert max(batches) == MEASURED_IMAGES
    np.testing.assert_array_equal(first.features, again.features)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)


def test_the_fit_of_a_head_reads_the_rows_of_a_probe_and_a_probe_those_of_a_fit(
    make_base: Any, task: TaskData, probed: Any, batches: list[int]
) -> None:
    without_val = replace(task, val=None)
    probed(make_base(), count=120)
    batches.clear()
    fit_task(make_base(), without_val, Head(), progress=False)
    assert max(batches) == MEASURED_IMAGES
    fit_task(make_base(seed=1), without_val, Head(), progress=False)
    batches.clear()
    probed(make_base(seed=1))
    assert max(batches) == MEASURED_IMAGES


def test_a_fit_after_a_smaller_probe_runs_the_rest(
    make_base: Any, task: TaskData, probed: Any, batches: list[int]
) -> None:
    probed(make_base(), count=80)
    batches.clear()
    fit_task(make_base(), replace(task, val=None), Head(), FitConfig(batch_size=50), progress=False)
    assert max(batches) == 120 - 80


@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_layers_are_the_pooled_ends_of_the_stages(make_base: Any, task: TaskData, probed: Any) -> None:
    module = OwnNet().eval()
    enliven(module)
    base = make_base(module=module)
    narrow = module.narrow(module.stem(_images(base, task)))
    found = probed(base, layers=True)
    assert list(found.layers) == ["narrow", "wide"]
    np.testing.assert_allclose(found.layers["narrow"], narrow.mean((2, 3)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.layers["wide"], found.features, rtol=1e-4, atol=1e-5)


def test_layers_come_in_the_same_pass_and_again_when_only_features_are_in_the_cache(
    make_base: Any, probed: Any, batches: list[int]
) -> None:
    one_pass = [32, 28]
    first = probed(make_base(), layers=True)
    assert [size for size in batches if size > MEASURED_IMAGES] == one_pass
    again = probed(make_base(), layers=True)
    assert [size for size in batches if size > MEASURED_IMAGES] == one_pass * 2
    np.testing.assert_array_equal(first.layers["stage"], again.layers["stage"])


def test_layers_of_rows_that_are_half_in_the_cache_are_those_of_their_images(
    make_base: Any, probed: Any
) -> None:
    probed(make_base(), count=30)
    whole = probed(make_base(), layers=True)
    np.testing.assert_allclose(whole.layers["stage"], whole.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda logits: logits.relu(), lambda logits: logits.relu().softmax(1)),
        (lambda logits: logits.softmax(1), lambda logits: logits.softmax(1)),
    ],
    ids=["not linear", "probabilities already"],
)
@pytest.mark.usefixtures("exact")
@torch.no_grad()
def test_what_comes_after_the_classifier_is_part_of_the_answer(
    make_base: Any, task: TaskData, probed: Any, change: Any, expected: Any
) -> None:
    base = make_base(module=Wrapped(change).eval())
    logits = base.module.net(_images(base, task))
    for _ in range(2):  # the second time, features are in the cache and answers are not
        np.testing.assert_allclose(probed(base).probabilities, expected(logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            nn.Sequential(NormUnit(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            "has no classifier of its own",
        ),
        (
            nn.Sequential(NormUnit(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)),
            "not one number for each of two or more classes",
        ),
        (
            ZeroShotClassifier(
                nn.Sequential(NormUnit(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                nn.Linear(4, 3, bias=False),
                TextEmbedder(nn.Identity(), lambda texts: torch.zeros(len(texts), 1)),
            ),
            "its classes are texts",
        ),
    ],
    ids=["features", "one output", "open vocabulary"],
)
def test_a_base_without_classes_of_its_own_has_no_probabilities_and_says_why(
    make_base: Any, probed: Any, module: nn.Module, reason: str
) -> None:
    enliven(module)
    found = probed(make_base(module=module.eval()))
    assert found.probabilities is None
    assert reason in found.no_probabilities
    assert found.features.shape == (60, 4)


def test_images_that_cannot_be_read_are_left_out_and_marked(
    make_base: Any, probed: Any, tmp_path: Path
) -> None:
    folder = write_tree(tmp_path / "tree", (0, 1), 6)
    write_bad_image(folder / "one" / "002.png")
    found = probed(make_base(), open_data(folder, validation=0))
    assert found.kept.tolist() == [True] * 2 + [False] + [True] * 9
    assert found.labels.tolist() == [0] * 5 + [1] * 6
    assert len(found.features) == len(found.probabilities) == 11


def test_a_probe_of_unreadable_images_says_which(make_base: Any, probed: Any, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "tree", (0, 1), 2)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"none of the 4 images of the probe could be read: .*000.png"):
        probed(make_base(), open_data(folder, validation=0))


class _Broken(nn.Module):
    """Maps that become zero, NaN, or NaN where they are of dark images."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3), keepdim=True) < -1
        maps = self.conv(x)
        return {"zero": maps * 0, "nan": maps * torch.nan, "dark": maps.where(~dark, torch.nan)}[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("zero", "all features are constant: this model gives the same for every image"),
        ("nan", "own gives NaN on images of noise; check its weights"),
        ("dark", r"features hold NaN or infinite numbers in \d+ of 60 rows"),
    ],
)
def test_features_that_tell_nothing_are_refused(make_base: Any, probed: Any, kind: str, message: str) -> None:
    module = nn.Sequential(_Broken(kind), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(DeltapatchError, match=message):
        probed(make_base(name="own", module=module.eval()))


def test_a_base_in_half_precision_is_probed(make_base: Any, probed: Any) -> None:
    base, half = make_base(width=16), make_base(width=16)
    half.module.to(torch.bfloat16)
    exact, found = probed(base), probed(half)
    assert found.features.dtype == np.float32
    np.testing.assert_allclose(found.probabilities, exact.probabilities, atol=0.02)
