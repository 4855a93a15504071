"""Several methods in one patch."""

from pathlib import Path

import pytest
import torch
from toys import OwnNet, disturb, enliven

from deltapatch.base import Base
from deltapatch.errors import AnatomyError, DeltapatchError
from deltapatch.loading import load_base
from deltapatch.methods.compose import Compose, Member
from deltapatch.methods.delta import Delta
from deltapatch.methods.norm import Norm
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.split import divergence_of


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    net = OwnNet().eval()
    enliven(net)
    return load_base(net, size=16, name="own")


@torch.no_grad()
def _answers(base: Base, patch: Patch) -> torch.Tensor:
    model = PatchedModel(base)
    model.add_patch("task", patch)
    return model(base.example(), patch="task")


def test_the_parameters_are_those_of_the_methods_together(base: Base) -> None:
    composed = Compose(("delta:modules=1", "norm")).build(base)
    assert (
        composed.num_parameters()
        == Delta(modules=1).build(base).num_parameters() + Norm().build(base).num_parameters()
    )


def test_each_method_does_in_company_what_it_does_alone(base: Base) -> None:
    """With the other one at its start, which is the base."""
    composed = Compose(("delta:modules=1", "norm")).build(base, seed=0)
    for chosen, alone in ((0, Delta(modules=1)), (1, Norm())):
        single = disturb(alone.build(base, seed=0))
        both = Compose(composed.method.methods).build(base, seed=0)
        mine = [part for site, part in zip(both.sites, both.parts, strict=True) if site.method == chosen]
        for part, fitted in zip(mine, single.parts, strict=True):
            part.load_state_dict(fitted.state_dict())
        assert torch.equal(_answers(base, both), _answers(base, single))


def test_methods_that_act_at_the_same_modules_act_one_around_the_other(base: Base) -> None:
    """Full fine-tuning changes the weights that delta's sub-blocks run with."""
    both = disturb(Compose(("delta:modules=1", "full:statistics=kept")).build(base, seed=0))
    answers = _answers(base, both)
    for index in (0, 1):
        reset = Compose(both.method.methods).build(base, seed=0)
        for site, part, fitted in zip(both.sites, reset.parts, both.parts, strict=True):
            if site.method == index:
                part.load_state_dict(fitted.state_dict())
        assert not torch.equal(_answers(base, reset), answers)


def test_delta_trains_with_norms_that_follow_the_batches(base: Base) -> None:
    patch = Compose(("delta:modules=1", "norm:statistics=own")).build(base, ("a", "b"), seed=0).train()
    model = PatchedModel(base)
    model.add_patch("task", patch)
    patch.train()
    model(base.example(), patch="task").sum().backward()
    assert all(parameter.grad is not None for parameter in patch.parameters())


def test_the_patch_begins_where_the_first_of_its_methods_does(base: Base) -> None:
    assert divergence_of(base, Compose(("delta:modules=1", "norm:modules=2")).build(base)) == "narrow.0.norm1"
    assert divergence_of(base, Compose(("delta:modules=1", "norm:modules=1")).build(base)) == "wide.0"


def test_a_file_holds_them_all(base: Base, tmp_path: Path) -> None:
    patch = disturb(Compose(("delta:modules=1", "norm:statistics=own")).build(base, ("a", "b"), seed=0))
    loaded = Patch.load(patch.save(tmp_path / "both.safetensors"))
    assert loaded.sites == patch.sites
    assert isinstance(loaded.sites[0], Member)
    assert torch.equal(_answers(base, loaded), _answers(base, patch))
    loaded.check_base(base)


def test_each_part_is_fitted_with_its_own_methods_learning_rate(base: Base) -> None:
    composed = Compose(("delta:modules=1", "full"))
    rates = {site.method: composed.learning_rate_of(site) for site in composed.sites(base.anatomy)}
    assert rates == {0: 3e-3, 1: 1e-3}


def test_statistics_are_gathered_if_one_of_the_methods_wants_it() -> None:
    assert Compose(("delta", "norm")).gathering() is None
    assert Compose(("delta", "norm:statistics=re-estimated")).gathering() is not None


def test_two_methods_for_the_weights_of_one_layer_are_refused(base: Base) -> None:
    with pytest.raises(AnatomyError, match="change the weights of one layer"):
        Compose(("norm", "full")).build(base).touches()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (("delta",), "two methods or more"),
        (("delta", "interpolate"), "'interpolate' cannot be composed"),
        (("delta", "full:storage=int8"), "cannot be composed"),
        (("delta", "nothing"), "no method 'nothing'"),
        (("delta", "norm:modules"), "KEY=VALUE"),
    ],
)
def test_compositions_that_cannot_be(methods: tuple[str, ...], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        Compose(methods)
