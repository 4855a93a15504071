"""How far a patch moves features: closed forms of linear CKA, and stages that are compared where they end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from digits import write_bad_image, write_digits, write_tree
from toys import OwnNet, copied_state, disturb, same_state, toy_base

from deltapatch.base import Base
from deltapatch.data import open_data
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.method import make_method, registered_methods
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.selection.diagnosing.drift import HEAD, feature_drift, linear_cka, some_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("drift") / "digits", (0, 1, 2), 8)


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    return load_base(OwnNet().eval(), size=16)


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def build(base: Base, name: str) -> Patch:
    return make_method(name).build(base, ("a", "b"), seed=0)


def test_rotation_scale_and_shift_leave_cka_at_1() -> None:
    x, turn = rows(40, 6), np.linalg.qr(rows(6, 6, seed=1))[0]
    assert linear_cka(x, -3 * x @ turn + 5) == pytest.approx(1)
    assert linear_cka(x, np.repeat(x, 2, axis=1)) == pytest.approx(1)


def test_features_without_anything_in_common_have_cka_0() -> None:
    first = np.array([[1.0], [1.0], [-1.0], [-1.0]])
    second = np.array([[1.0], [-1.0], [1.0], [-1.0]])
    assert linear_cka(first, second) == pytest.approx(0, abs=1e-12)


def test_one_of_two_equal_directions_in_common_is_a_cka_of_1_over_root_2() -> None:
    first = np.array([[1.0], [1.0], [-1.0], [-1.0]])
    both = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert linear_cka(first, both) == pytest.approx(0.5**0.5)


def test_constant_features_have_no_cka() -> None:
    assert linear_cka(rows(5, 2), np.full((5, 3), 0.1)) is None


@pytest.mark.parametrize("name", sorted(registered_methods()))
def test_every_method_is_compared_at_every_stage_and_the_base_stays(
    base: Base, folder: Path, name: str
) -> None:
    before = copied_state(base.module)
    found = feature_drift(base, disturb(build(base, name)), some_images(str(folder)))
    assert [place.name for place in found.places] == ["narrow", "wide", HEAD]
    assert (found.images, found.unreadable) == (24, 0)
    drifts = [place.relative for place in found.places]
    if name == "head":
        assert drifts == [0, 0, 0]
        assert [place.cka for place in found.places] == pytest.approx([1, 1, 1])
    else:
        assert drifts[-1] > 1e-4
        assert all(place.cka is not None and 0 < place.cka < 1 for place in found.places[-1:])
    assert same_state(base.module, before)


def test_before_the_first_touched_stage_nothing_moves(base: Base, folder: Path) -> None:
    patch = disturb(make_method("delta", {"modules": 1}).build(base, ("a",), seed=0))
    found = feature_drift(base, patch, some_images(str(folder)))
    assert found.places[0].relative == 0
    assert found.places[1].relative > 0


def test_the_input_of_the_head_is_what_the_patchs_head_reads(base: Base, folder: Path) -> None:
    """Recomputed from hooks: the mean over images of the relative distance of the classifier's inputs."""
    patch = disturb(build(base, "lora"))
    images = some_images(str(folder))
    found = feature_drift(base, patch, images, batch_size=7)
    model = PatchedModel(base)
    model.add_patch("p", patch)
    seen: list[torch.Tensor] = []
    base.submodule("classifier").register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    from deltapatch.data import evaluation_transform

    ready = images.with_transform(evaluation_transform(patch.info.preprocessing))
    batch = torch.stack([ready[index][0] for index in range(len(ready))])  # pyright: ignore
    with torch.no_grad():
        model(batch, patch=None)
        model(batch, patch="p")
    plain, patched = seen
    expected = ((patched - plain).norm(dim=1) / plain.norm(dim=1)).mean()
    assert found.places[-1].relative == pytest.approx(float(expected), rel=1e-4)


def test_of_a_base_with_one_stage_every_sub_block_is_looked_at(folder: Path) -> None:
    base = toy_base()
    found = feature_drift(base, disturb(build(base, "lora")), some_images(str(folder)))
    assert [place.name for place in found.places] == ["stage.0", "stage.1", HEAD]


def test_few_images_are_said_to_be_few(base: Base, folder: Path) -> None:
    found = feature_drift(base, disturb(build(base, "norm")), some_images(str(folder)))
    assert found.notes == ("24 images are few, which makes CKA too large",)


def test_unreadable_images_are_counted_and_none_at_all_is_refused(base: Base, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "digits", (0, 1), 3)
    write_bad_image(folder / "one" / "bad.png")
    found = feature_drift(base, build(base, "head"), some_images(str(folder)))
    assert (found.images, found.unreadable) == (6, 1)
    (tmp_path / "bad").mkdir()
    bad = write_bad_image(tmp_path / "bad" / "bad.png")
    with pytest.raises(DeltapatchError, match="no readable image"):
        feature_drift(base, build(base, "head"), some_images(str(bad)))


def test_images_come_from_folders_of_any_form_and_from_the_test_split(folder: Path, tmp_path: Path) -> None:
    assert len(some_images(str(folder / "one"))) == 8
    assert len(some_images(str(folder), 5)) == 5
    file = write_digits(tmp_path / "digits.npz", train=20, val=10, test=15)
    drawn = some_images(str(file), 6)
    test = open_data(file).test
    assert test is not None
    assert {drawn.names(index) for index in range(6)} <= {test.names(index) for index in range(15)}
    assert np.array_equal(drawn.rows, some_images(str(file), 6).rows)
    with pytest.raises(DeltapatchError, match="no such file or folder"):
        some_images(str(tmp_path / "nothing"))
