"""Methods by name, and configurations of plain values checked field by field."""

from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
from torch import nn
from toys import toy_base

import deltapatch.method
from deltapatch import methods
from deltapatch.anatomy import Anatomy
from deltapatch.classifier import HeadSite
from deltapatch.errors import DeltapatchError
from deltapatch.method import Method, make_method, register_method, registered_methods
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


def test_the_methods_of_the_package_are_known_by_name() -> None:
    known = registered_methods()
    assert known["delta"] is Delta
    assert known["head"] is Head
    assert list(known) == sorted(known)
    assert methods.Delta is Delta


def test_an_unknown_class_of_the_methods_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        methods.Nothing  # noqa: B018


@pytest.mark.parametrize("name", registered_methods())
def test_a_configuration_makes_the_same_method_again(name: str) -> None:
    method = make_method(name)
    assert make_method(name, method.configuration()) == method
    assert method.name == name


@pytest.mark.parametrize("name", registered_methods())
def test_a_method_cannot_be_changed_once_it_is_made(name: str) -> None:
    method = make_method(name)
    field = next(iter(method.configuration()), "anything")
    with pytest.raises(FrozenInstanceError):
        setattr(method, field, 1)


@pytest.mark.parametrize(
    ("name", "configuration", "message"),
    [
        ("dleta", {}, "there is no method 'dleta'; known methods are: .*delta, .*head"),
        (
            "delta",
            {"moduls": 1},
            "method 'delta' has no option 'moduls'; it has: modules, norm, start, module$",
        ),
        ("delta", {"modules": "many"}, "method 'delta': modules.*was 'many'"),
        ("delta", {"modules": 0}, "modules must be 1 or more stages or 'all', not 0"),
        ("delta", {"norm": "layer"}, "method 'delta': norm: .*was 'layer'"),
        ("head", {"size": 3}, "method 'head' has no option 'size'; it has: none$"),
        ("head", {"site_type": "x"}, "method 'head' has no option 'site_type'"),
    ],
)
def test_a_wrong_name_or_option_is_refused_with_what_is_allowed(
    name: str, configuration: dict[str, object], message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        make_method(name, configuration)


def test_a_method_of_the_users_own_needs_its_one_class_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Registered, it is built, attached, saved and loaded like every other."""
    monkeypatch.setattr(deltapatch.method, "_registry", dict(deltapatch.method._registry))

    @register_method("scale")
    @dataclass(frozen=True)
    class Scale(Method):
        start: float = 2.0
        site_type = HeadSite

        def sites(self, anatomy: Anatomy) -> tuple[HeadSite, ...]:
            return (anatomy.head,)

        def part(self, site: HeadSite) -> nn.Module:
            part = nn.Module()
            part.factor = nn.Parameter(torch.tensor(self.start))
            return part

        def touches(self, site: HeadSite, part: Any) -> dict[str, Any]:
            return {"stage": lambda forward, *args, **kwargs: forward(*args, **kwargs) * part.factor}

    base = toy_base()
    model = PatchedModel(base)
    model.add_patch("task", Patch.load(make_method("scale", {"start": 3.0}).build(base).save(tmp_path / "p")))
    with torch.no_grad():
        features = base.module.stage(base.module.stem(base.example()))
        expected = base.module.fc((3 * features).mean((2, 3)))
        torch.testing.assert_close(model(base.example(), patch="task"), expected)


def test_the_callers_random_numbers_go_on_after_a_seeded_build() -> None:
    base = toy_base()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Delta().build(base, ("a",), seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_value_that_the_method_refuses_is_explained_in_its_own_words() -> None:
    with pytest.raises(
        DeltapatchError, match=r"^method 'delta': modules must be 1 or more stages or 'all', not 0$"
    ):
        make_method("delta", {"modules": 0})
