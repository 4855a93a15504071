"""What an anatomy says is believed only where running the model bears it out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import Net, Unit, toy_base

from deltapatch.anatomy import Anatomy, Join, Stage
from deltapatch.base import Base
from deltapatch.verification import verify_anatomy


class Decoy(Unit):
    """Adds twice, and throws the first sum away."""

    def forward(self, x: Tensor) -> Tensor:
        x + self.branch(x)
        return super().forward(x)


@pytest.fixture
def base() -> Base:
    return toy_base([Decoy(4), Decoy(4)])


def _verified(base: Base, stage: Stage) -> tuple[Stage, ...]:
    anatomy = Anatomy((stage,), base.anatomy.head)
    return verify_anatomy(base.module, anatomy, base.example()).stages


def _with_join(stage: Stage, join: Join) -> Stage:
    return replace(stage, sub_blocks=tuple(replace(sub_block, join=join) for sub_block in stage.sub_blocks))


def test_what_was_found_is_kept(base: Base) -> None:
    (stage,) = base.anatomy.stages
    assert stage.sub_blocks[0].join == Join(addition=1, shortcut=1, has_shortcut=True)
    assert _verified(base, stage) == (stage,)


@pytest.mark.parametrize(
    "join",
    [
        Join(addition=0, shortcut=0, has_shortcut=True),  # not on the way to the output
        Join(addition=2, shortcut=1, has_shortcut=True),  # never runs
    ],
)
def test_a_join_that_does_not_decide_the_output_is_refused(base: Base, join: Join) -> None:
    (stage,) = base.anatomy.stages
    assert _verified(base, _with_join(stage, join)) == ()


class Scaled(Unit):
    """Adds twice its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.branch(x), x, alpha=2)


def test_a_join_that_is_more_than_a_sum_is_refused() -> None:
    base = toy_base([Scaled(4), Scaled(4)])
    (stage,) = base.anatomy.stages
    assert stage.sub_blocks[0].join.addition is None
    assert _verified(base, _with_join(stage, Join(addition=0, shortcut=1, has_shortcut=True))) == ()


@pytest.mark.parametrize("wrong", [{"in_channels": 5}, {"channels": 5}])
def test_a_stage_of_other_shapes_is_refused(base: Base, wrong: dict[str, int]) -> None:
    (stage,) = base.anatomy.stages
    assert _verified(base, replace(stage, **wrong)) == ()


def test_one_wrong_stage_does_not_take_a_right_one_with_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Net([Unit(4), Unit(4)], 4).stem, nn.Sequential(Unit(4), Unit(4)), nn.Conv2d(4, 6, 1))
    net.extend([nn.Sequential(Unit(6), Unit(6)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)])
    base = Base(net.eval(), "two stages", "", toy_base().preprocessing)
    first, second = base.anatomy.stages
    wrong = replace(first, channels=5)
    kept = verify_anatomy(net, Anatomy((wrong, second), base.anatomy.head), base.example())
    assert kept.stages == (second,)
