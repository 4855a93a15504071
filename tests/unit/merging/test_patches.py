"""Merged patches: what the weights are, whose heads they have, and what is refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from toys import NormUnit, copied_state, disturb, enliven, same_state, toy_base

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError, WrongBaseError
from deltapatch.merging.patches import merge_patches, recipe_of_patch
from deltapatch.merging.rules import make_merge
from deltapatch.merging.running import RunOptions
from deltapatch.method import make_method
from deltapatch.methods.full import Full
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.selection.diagnosing.weights import changed_tensors

WEIGHTS = ["full", "lora", "norm", "interpolate", "dua", "random-weights"]
PARTS = ["delta", "series-adapter", "skips"]


@pytest.fixture(scope="module")
def base() -> Base:
    """Shared by all tests, since none may change it."""
    found = toy_base([NormUnit(4, 4), NormUnit(4, 4)])
    enliven(found.module)
    return found


def made(base: Base, name: str, seed: int, classes: Sequence[str] = ("a", "b"), **options: object) -> Patch:
    """A patch with random values, as after a fit."""
    options = {"alpha": 0.5, **options} if name == "interpolate" else options
    return disturb(make_method(name, options).build(base, classes, seed=0), seed)


@torch.no_grad()
def answer(base: Base, patch: Patch) -> torch.Tensor:
    model = PatchedModel(base)
    model.add_patch("one", patch)
    return model(base.example(), patch="one")


def weights(base: Base, patch: Patch) -> dict[str, torch.Tensor]:
    """All floating tensors of the base as the patch changes them."""
    own = copied_state(base.module)
    for path, tensors in changed_tensors(base, patch).items():
        own |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in own.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("name", [*WEIGHTS, *PARTS])
def test_a_patch_merged_alone_answers_as_it_did(base: Base, name: str) -> None:
    patch = made(base, name, 1)
    merged = merge_patches(base, [patch], "average", names=["one"])["one"]
    torch.testing.assert_close(answer(base, merged), answer(base, patch), rtol=1e-4, atol=1e-5)
    assert merged.classes == patch.classes


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_merge_is_arithmetic_on_the_weights_that_the_base_has_with_each_patch(
    base: Base, name: str
) -> None:
    first, second = made(base, name, 1), made(base, name, 2)
    how = make_merge("task_arithmetic", {"scale": 0.25})
    merged = merge_patches(base, [first, second], how)["patch1"]
    own, one, two = copied_state(base.module), weights(base, first), weights(base, second)
    found = weights(base, merged)
    for key, values in found.items():
        expected = own[key] + 0.25 * (one[key] - own[key] + two[key] - own[key])
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_order_does_not_matter(base: Base) -> None:
    patches = [made(base, "full", 1), made(base, "full", 2)]
    one = merge_patches(base, patches, names=["a", "b"])["a"]
    other = merge_patches(base, patches[::-1], names=["b", "a"])["a"]
    torch.testing.assert_close(answer(base, one), answer(base, other))


def test_methods_that_change_weights_can_be_mixed(base: Base) -> None:
    patches = [made(base, name, number) for number, name in enumerate(("full", "lora", "norm"))]
    merged = merge_patches(base, patches)["patch1"]
    every = [weights(base, patch) for patch in patches]
    for key, values in weights(base, merged).items():
        torch.testing.assert_close(values, torch.stack([one[key] for one in every]).mean(0))


def test_norms_stay_a_small_patch_of_norms_and_others_reach_no_further_than_they_have_to(base: Base) -> None:
    norm = merge_patches(base, [made(base, "norm", 1), made(base, "norm", 2)], "average")["patch1"]
    assert norm.method.name == "norm"
    last = merge_patches(base, [made(base, "lora", 1, modules=1), made(base, "full", 2, modules=1)])["patch1"]
    assert last.method == Full(modules=1)
    assert merge_patches(base, [made(base, "lora", 1)] * 2, names=["a", "b"])["a"].method == Full()


def test_parameters_of_patches_with_their_own_are_averaged(base: Base) -> None:
    first, second = made(base, "delta", 1), made(base, "delta", 2)
    merged = merge_patches(base, [first, second])["patch1"]
    one, two = first.parts.state_dict(), second.parts.state_dict()
    for key, values in merged.parts.state_dict().items():
        if values.is_floating_point():
            torch.testing.assert_close(values, (one[key] + two[key]) / 2)


def test_each_task_keeps_its_own_head_on_the_common_body(base: Base) -> None:
    first, second = made(base, "norm", 1), made(base, "norm", 2, ("c", "d", "e"))
    merged = merge_patches(base, [first, second], names=["birds", "cars"])
    assert list(merged) == ["birds", "cars"]
    for name, given in (("birds", first), ("cars", second)):
        assert merged[name].classes == given.classes
        assert torch.equal(merged[name].head.weight, given.head.weight)
        assert torch.equal(merged[name].head.bias, given.head.bias)
    assert merged["birds"].parts is merged["cars"].parts


def test_a_joint_head_gives_each_tasks_logits_in_a_row(base: Base) -> None:
    patches = [made(base, "norm", 1), made(base, "norm", 2, ("c", "d", "e"))]
    own = merge_patches(base, patches)
    joint = merge_patches(base, patches, heads="joint")["merged"]
    assert joint.classes == ("a", "b", "c", "d", "e")
    expected = torch.cat([answer(base, patch) for patch in own.values()], 1)
    torch.testing.assert_close(answer(base, joint), expected)


def test_classes_that_are_called_alike_get_their_patchs_name(base: Base) -> None:
    patches = [made(base, "norm", 1), made(base, "norm", 2, ("b", "c"))]
    joint = merge_patches(base, patches, heads="joint", names=["x", "y"])["merged"]
    assert joint.classes == ("x/a", "x/b", "y/b", "y/c")


def test_heads_of_the_same_classes_have_a_mean(base: Base) -> None:
    first, second = made(base, "head", 1), made(base, "head", 2)
    merged = merge_patches(base, [first, second], heads="average")["merged"]
    expected = (answer(base, first) + answer(base, second)) / 2
    torch.testing.assert_close(answer(base, merged), expected)
    with pytest.raises(DeltapatchError, match="'patch1' and 'patch2' have different classes"):
        merge_patches(base, [first, made(base, "head", 2, ("c", "d"))], heads="average")


def test_heads_alone_are_not_merged_unless_it_is_said_how(base: Base) -> None:
    with pytest.raises(DeltapatchError, match="heads of different tasks are not merged; heads='joint'"):
        merge_patches(base, [made(base, "head", 1), made(base, "head", 2)])


def test_patches_without_heads_stay_without(base: Base) -> None:
    patches = [made(base, "full", 1, ()), made(base, "full", 2)]
    merged = merge_patches(base, patches)
    assert merged["patch1"].head is None
    assert merged["patch2"].head is not None
    with pytest.raises(DeltapatchError, match="'patch1' has no head, so there is no joint head"):
        merge_patches(base, patches, heads="joint")


def test_a_variance_never_becomes_negative(base: Base) -> None:
    patches = [made(base, "full", 1), made(base, "full", 2)]
    how = make_merge("task_arithmetic", {"scale": -50.0})
    merged = merge_patches(base, patches, how)["patch1"]
    variances = [tensor for key, tensor in weights(base, merged).items() if key.endswith("running_var")]
    assert variances
    assert all((tensor > 0).all() for tensor in variances)
    assert answer(base, merged).isfinite().all()


def test_skipped_tensors_are_the_bases(base: Base) -> None:
    patches = [made(base, "full", 1), made(base, "full", 2)]
    merged = merge_patches(base, patches, run=RunOptions(skip=("stem.*",)))["patch1"]
    found, own = weights(base, merged), copied_state(base.module)
    assert torch.equal(found["stem.weight"], own["stem.weight"])
    assert not torch.equal(found["stage.0.conv1.weight"], own["stage.0.conv1.weight"])


def test_neither_base_nor_patches_change(base: Base) -> None:
    patches = [made(base, "delta", 1), made(base, "delta", 2)]
    before = [copied_state(base.module), *map(copied_state, patches)]
    merged = merge_patches(base, patches)
    disturb(merged["patch1"])
    assert same_state(base.module, before[0])
    assert all(same_state(patch, state) for patch, state in zip(patches, before[1:], strict=True))


def test_files_are_merged_into_files_with_the_recipe_in_them(base: Base, tmp_path: Path) -> None:
    given = [
        made(base, "full", number).save(tmp_path / f"{name}.safetensors")
        for number, name in enumerate(("birds", "cars"))
    ]
    merged = merge_patches(base, given, make_merge("average", {"weights": (1, 3)}), out=tmp_path / "both")
    loaded = Patch.load(tmp_path / "both" / "cars.safetensors")
    assert torch.equal(answer(base, loaded), answer(base, merged["cars"]))
    recipe = recipe_of_patch(loaded)
    assert (recipe.merge, recipe.models) == ("average", tuple(map(str, given)))
    again = merge_patches(base, recipe.models, recipe.how)["cars"]
    assert torch.equal(answer(base, again), answer(base, merged["cars"]))
    with pytest.raises(
        DeltapatchError, match="2 patches come out, one for each task's own head; give a fold"
    ):
        merge_patches(base, given, out=tmp_path / "one.safetensors")
    merge_patches(base, given, heads="average", out=tmp_path / "one.safetensors")
    assert Patch.load(tmp_path / "one.safetensors").classes == ("a", "b")


def test_a_result_can_be_stored_in_less(base: Base, tmp_path: Path) -> None:
    patches = [made(base, "full", 1), made(base, "full", 2)]
    whole, small = merge_patches(base, patches), merge_patches(base, patches, storage="int8")
    assert 0 < small["patch1"].info.figures["storage/relative_error"] < 0.01
    assert small["patch2"].method.storage == "int8"
    sizes = [one["patch1"].save(tmp_path / "x.safetensors").stat().st_size for one in (whole, small)]
    assert sizes[1] < sizes[0]


def test_what_cannot_be_merged_is_told(base: Base) -> None:
    delta, lora = made(base, "delta", 1), made(base, "lora", 1)
    with pytest.raises(DeltapatchError, match=r"'patch1' is of the delta method .* and 'patch2' of the lora"):
        merge_patches(base, [delta, lora])
    with pytest.raises(DeltapatchError, match="of the same method and options"):
        merge_patches(base, [delta, made(base, "delta", 1, modules=1)])
    with pytest.raises(DeltapatchError, match="task_arithmetic works on what models add to their base's we"):
        merge_patches(base, [delta, delta], "task_arithmetic", names=["a", "b"])
    with pytest.raises(DeltapatchError, match="there is no merge 'nothing'"):
        merge_patches(base, [lora], "nothing")
    with pytest.raises(DeltapatchError, match="there is no patch to merge"):
        merge_patches(base, [])
    with pytest.raises(DeltapatchError, match="two of the patches are called 'a'"):
        merge_patches(base, [lora, lora], names=["a", "a"])
    with pytest.raises(DeltapatchError, match="1 names were given for 2 patches"):
        merge_patches(base, [lora, lora], names=["a"])
    with pytest.raises(WrongBaseError, match="this patch belongs to base"):
        merge_patches(toy_base(), [lora])
