"""A base with patches: which one answers is said per call, per context or for the model."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from toys import disturb, same_state, toy_base

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError, DeltapatchWarning, PatchFileError, WrongBaseError
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def base() -> Base:
    return toy_base()


@pytest.fixture
def model(base: Base) -> PatchedModel:
    model = PatchedModel(base)
    model.add_patch("birds", disturb(Delta().build(base, CLASSES, seed=0)))
    model.add_patch("signs", disturb(Head().build(base, ("stop", "go"), seed=1), seed=1))
    return model


def _answers(model: PatchedModel) -> dict[str | None, Tensor]:
    with torch.no_grad():
        return {name: model(model.base.example(), patch=name) for name in (None, "birds", "signs")}


# --- which patch answers ----------------------------------------------------------------------------------


def test_each_name_answers_with_its_own_classes_and_none_is_the_base(model: PatchedModel) -> None:
    answers = _answers(model)
    assert {name: answer.shape for name, answer in answers.items()} == {
        None: (2, 5),
        "birds": (2, 3),
        "signs": (2, 2),
    }
    assert torch.equal(answers[None], model.base.module(model.base.example()))


def test_the_head_method_is_a_linear_layer_on_the_bases_features(model: PatchedModel) -> None:
    features: list[Tensor] = []
    handle = model.base.submodule("fc").register_forward_pre_hook(lambda _, args: features.append(args[0]))
    model(model.base.example())
    handle.remove()
    assert torch.equal(_answers(model)["signs"], model.patches["signs"].head(features[0]))


def test_the_selection_is_by_call_then_context_then_model(model: PatchedModel) -> None:
    images, answers = model.base.example(), _answers(model)
    assert model.active_patches == ()
    model.set_patch("birds")
    assert model.active_patches == ("birds",)
    assert torch.equal(model(images), answers["birds"])
    with model.active("signs"):
        assert model.active_patches == ("signs",)
        assert torch.equal(model(images), answers["signs"])
        assert torch.equal(model(images, patch="birds"), answers["birds"])
        assert torch.equal(model(images, patch=None), answers[None])
    with model.disable_patches():
        assert model.active_patches == ()
        assert torch.equal(model(images), answers[None])
    assert torch.equal(model(images), answers["birds"])
    model.set_patch(None)
    assert torch.equal(model(images), answers[None])


def test_two_models_around_one_base_keep_their_selections_apart(model: PatchedModel, base: Base) -> None:
    other = PatchedModel(base)
    other.add_patch("birds", disturb(Delta().build(base, CLASSES, seed=5), seed=5))
    images = base.example()
    with torch.no_grad(), model.active("birds"):
        assert other.active_patches == ()
        assert torch.equal(other(images), _answers(model)[None])
        assert not torch.equal(other(images, patch="birds"), model(images))


def test_selecting_a_patch_that_is_not_there_names_those_that_are(model: PatchedModel) -> None:
    for select in (model.set_patch, lambda name: model(model.base.example(), patch=name), model.delete_patch):
        with pytest.raises(
            DeltapatchError, match="there is no patch named 'fish'; patches here: birds, signs"
        ):
            select("fish")
    with pytest.raises(DeltapatchError, match="patches here: none"):
        PatchedModel(model.base).set_patch("fish")


# --- the set of patches -----------------------------------------------------------------------------------


def test_a_taken_name_is_refused_and_the_patch_under_it_stays(model: PatchedModel) -> None:
    old = model.patches["birds"]
    with pytest.raises(DeltapatchError, match="there is a patch named 'birds' already; delete it first"):
        model.add_patch("birds", Head().build(model.base, CLASSES))
    assert model.patches["birds"] is old


@pytest.mark.parametrize("name", ["", "Birds", "../birds", "a/b", "con", "birds.", "x" * 65])
def test_a_name_that_is_no_safe_file_name_is_refused(model: PatchedModel, name: str) -> None:
    with pytest.raises(PatchFileError, match="the patch name"):
        model.add_patch(name, Head().build(model.base, CLASSES))
    assert list(model.patches) == ["birds", "signs"]


def test_a_patch_of_another_base_is_not_added(model: PatchedModel) -> None:
    torch.manual_seed(1)
    other = load_base(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), size=8)
    with pytest.raises(WrongBaseError):
        model.add_patch("other", Head().build(other, CLASSES))
    assert list(model.patches) == ["birds", "signs"]


def test_a_deleted_default_leaves_the_base_answering(model: PatchedModel) -> None:
    model.set_patch("birds")
    model.delete_patch("birds")
    assert model.active_patches == ()
    assert list(model.patches) == ["signs"]
    assert model(model.base.example()).shape == (2, 5)


def test_the_patches_that_are_shown_are_those_of_one_moment(model: PatchedModel) -> None:
    shown = model.patches
    model.delete_patch("birds")
    assert list(shown) == ["birds", "signs"]
    assert len(shown) == 2
    assert list(model.patches) == ["signs"]


def test_a_patch_that_is_deleted_while_it_is_active_answers_to_the_end(model: PatchedModel) -> None:
    images, expected = model.base.example(), _answers(model)["birds"]
    with torch.no_grad(), model.active("birds"):
        model.delete_patch("birds")
        assert torch.equal(model.base.module(images), expected)
    assert torch.equal(model.base.module(images), _base_answer(model))


def _base_answer(model: PatchedModel) -> Tensor:
    return model(model.base.example(), patch=None)


# --- modules ----------------------------------------------------------------------------------------------


def test_a_patched_models_state_is_that_of_its_base(model: PatchedModel) -> None:
    names = [f"base_module.{name}" for name in model.base.module.state_dict()]
    assert list(model.state_dict()) == names


def test_the_mode_is_that_of_the_patches_and_never_of_the_base(model: PatchedModel) -> None:
    model.train()
    assert all(patch.training for patch in model.patches.values())
    model.add_patch("late", Head().build(model.base, CLASSES))
    assert model.patches["late"].training
    assert not model.base.module.training
    model.eval()
    assert not any(patch.training for patch in model.patches.values())


def test_the_base_answers_the_same_while_the_patches_train(model: PatchedModel) -> None:
    expected = _base_answer(model)
    model.base.module.train()
    model.train()
    assert torch.equal(_base_answer(model), expected)


def test_converting_a_model_converts_its_patches(model: PatchedModel) -> None:
    model.double()
    assert {p.dtype for patch in model.patches.values() for p in patch.parameters()} == {torch.float64}
    assert model(model.base.example(), patch="birds").dtype is torch.float64


def test_a_copy_shares_nothing_with_its_original(model: PatchedModel) -> None:
    model.set_patch("birds")
    before = {name: patch.state_dict() for name, patch in deepcopy(model).patches.items()}
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in (*copied.base.module.parameters(), *copied.patches["birds"].parameters()):
            parameter.zero_()
    copied.delete_patch("signs")
    assert copied.active_patches == model.active_patches == ("birds",)
    assert all(same_state(patch, before[name]) for name, patch in model.patches.items())
    assert _base_answer(model).abs().max() > 0


def test_a_patch_reaches_through_a_model_that_holds_the_bases_modules(model: PatchedModel) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    outer, images, answers = Doubled(model.base.module), model.base.example(), _answers(model)
    with torch.no_grad():
        with model.active("birds"):
            assert torch.equal(outer(images), 2 * answers["birds"])
        assert torch.equal(outer(images), 2 * answers[None])


def test_a_loaded_patch_is_added_under_its_name(model: PatchedModel, tmp_path: object) -> None:
    path = model.patches["birds"].save(f"{tmp_path}/birds.safetensors")
    loaded = model.load_patch("again", path)
    assert isinstance(loaded, Patch)
    with torch.no_grad():
        answer = model(model.base.example(), patch="again")
    assert torch.equal(answer, _answers(model)["birds"])


def test_a_patch_for_images_prepared_in_another_way_is_added_with_a_warning(base: Base) -> None:
    patch = Head().build(base, CLASSES)
    other = base.preprocessing.model_copy(update={"crop_pct": 0.5})
    patch.info = patch.info.model_copy(update={"preprocessing": other})
    with pytest.warns(DeltapatchWarning, match=r"crop_pct=0\.5"):
        PatchedModel(base).add_patch("other", patch)
