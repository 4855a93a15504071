"""Touches act in their context and thread only, and leave nothing on a module."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltapatch.touching import Freezer, Touch, touched, touched_modules

X = torch.ones(1, 2)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _plus(value: float) -> Touch:
    def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) + value

    return touch


def test_a_touched_module_runs_as_its_touch_says_and_then_as_itself() -> None:
    module = Double()
    attributes = dict(module.__dict__)
    with touched({module: _plus(1)}):
        assert torch.equal(module(X), torch.full((1, 2), 3.0))
        assert touched_modules(module) == [""]
    assert torch.equal(module(X), 2 * X)
    assert module.__dict__ == attributes
    assert touched_modules(module) == []


def test_the_inner_touch_wins_and_the_outer_one_comes_back() -> None:
    module = Double()
    with touched({module: _plus(1)}):
        with touched({module: _plus(10)}):
            assert module(X)[0, 0] == 12
        assert module(X)[0, 0] == 3


def test_outer_touches_of_a_model_are_laid_aside_and_those_of_others_are_not() -> None:
    inside, outside = nn.Sequential(Double(), Double()), Double()
    with (
        touched({inside[0]: _plus(1), outside: _plus(1)}),
        touched({inside[1]: _plus(10)}, instead_of=inside),
    ):
        assert inside(X)[0, 0] == 14
        assert outside(X)[0, 0] == 3


def test_touches_are_taken_off_after_an_exception() -> None:
    module = Double()
    attributes = dict(module.__dict__)
    with pytest.raises(RuntimeError, match="on purpose"), touched({module: _plus(1)}):
        raise RuntimeError("on purpose")
    assert module.__dict__ == attributes


def test_modules_touched_before_one_that_cannot_be_are_restored() -> None:
    good, bad = Double(), Double()
    bad.__dict__["_deltapatch_shadows"] = None
    attributes = dict(good.__dict__)
    with pytest.raises(AttributeError), touched({good: _plus(1), bad: _plus(1)}):
        pytest.fail("the context was entered")
    assert good.__dict__ == attributes
    assert good(X)[0, 0] == 2


def test_a_forward_that_was_set_on_the_instance_is_run_and_kept() -> None:
    module = Double()
    own = module.forward = lambda x: 5 * x
    with touched({module: _plus(1)}):
        assert module(X)[0, 0] == 6
    assert module.__dict__["forward"] is own
    assert module(X)[0, 0] == 5


def test_hooks_of_others_run_on_a_touched_module() -> None:
    module, seen = Double(), list[float]()
    module.register_forward_hook(lambda module, args, output: seen.append(output[0, 0].item()))
    with touched({module: _plus(1)}):
        module(X)
    assert seen == [3.0]


def test_threads_see_their_own_touches_only() -> None:
    module, barrier = Double(), Barrier(3)

    def run(value: float | None) -> float:
        with touched({} if value is None else {module: _plus(value)}):
            barrier.wait()
            result = module(X)[0, 0].item()
            barrier.wait()
        return result

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, [1.0, 10.0, None])) == [3.0, 12.0, 2.0]
    assert touched_modules(module) == []


def test_a_copy_of_a_touched_module_is_untouched() -> None:
    module = Double()
    with touched({module: _plus(1)}):
        copied = deepcopy(module)
        assert copied(X)[0, 0] == 2
        assert touched_modules(copied) == []
        with touched({copied: _plus(10)}):
            assert copied(X)[0, 0] == 12
            assert module(X)[0, 0] == 3
    assert copied(X)[0, 0] == 2


def test_a_copy_of_a_touched_module_keeps_a_forward_of_its_own() -> None:
    module = Double()
    module.forward = lambda x: 5 * x
    with touched({module: _plus(1)}):
        copied = deepcopy(module)
    assert copied(X)[0, 0] == 5


# --- freezer ----------------------------------------------------------------------------------------------


def _model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    return model


def _flags(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


def test_a_frozen_model_is_in_eval_mode_without_gradients_and_comes_back_as_it_was() -> None:
    model = _model()
    before = _flags(model)
    with Freezer(model).frozen():
        assert not any(map(any, _flags(model)))
    assert _flags(model) == before


def test_the_last_computation_to_leave_puts_the_flags_back() -> None:
    model = _model()
    before, freezer = _flags(model), Freezer(model)
    with freezer.frozen():
        with freezer.frozen():
            pass
        assert not any(map(any, _flags(model)))
    assert _flags(model) == before


def test_flags_come_back_after_an_exception() -> None:
    model = _model()
    before = _flags(model)
    with pytest.raises(RuntimeError, match="on purpose"), Freezer(model).frozen(hold_mode=True):
        raise RuntimeError("on purpose")
    assert _flags(model) == before
    assert "train" not in model.__dict__


def test_train_has_no_effect_while_the_mode_is_held() -> None:
    model = _model()
    with Freezer(model).frozen(hold_mode=True):
        assert nn.ModuleList([model]).train() is not None
        assert model.train() is model
        assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


def test_a_copy_made_while_the_mode_is_held_can_be_put_into_train_mode() -> None:
    model = _model()
    with Freezer(model).frozen(hold_mode=True):
        copied = deepcopy(model)
        copied.train()
        assert all(module.training for module in copied.modules())
        assert not any(module.training for module in model.modules())


def test_a_copied_freezer_keeps_the_copy() -> None:
    freezer = Freezer(_model().train())
    copied = deepcopy(freezer)
    with copied.frozen():
        assert not copied.root.training
        assert freezer.root.training
