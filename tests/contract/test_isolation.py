"""What a model's owner can rely on while patches are about: threads, copies, failures, modes and other
tools.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier

import pytest
import torch
from families import FAMILIES, UNUSUAL_CONVOLUTIONS, make_base
from subjects import CLASSES, Subject, patch_or_skip
from torch import Tensor, nn
from toys import copied_state, same_state

from deltapatch.errors import DeltapatchError
from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.touching import touched_modules


def _with_two_patches(subject: Subject, method: Method) -> tuple[PatchedModel, dict[str | None, Tensor]]:
    """A model with two patches of a method, and what each of them and the base answer alone."""
    model = PatchedModel(subject.base)
    expected: dict[str | None, Tensor] = {None: subject.answers}
    for seed, name in enumerate(("first", "second")):
        model.add_patch(name, subject.new_patch(method, seed))
        expected[name] = subject.answer(model.patches[name])
    return model, expected


@pytest.fixture(scope="module", params=UNUSUAL_CONVOLUTIONS)
def unusual(request: pytest.FixtureRequest) -> Subject:
    return Subject.of(make_base(UNUSUAL_CONVOLUTIONS[request.param]))


def test_dilated_and_weight_standardised_convolutions_are_patched_and_come_back(
    unusual: Subject, method: Method
) -> None:
    patch = patch_or_skip(unusual, method)
    model = PatchedModel(unusual.base)
    model.add_patch("task", patch)
    assert unusual.answer(patch).isfinite().all()
    assert torch.equal(model(unusual.images), unusual.answers)
    unusual.assert_untouched()


# --- threads and tasks ------------------------------------------------------------------------------------


def test_two_threads_with_different_patches_never_mix(resnet18: Subject, method: Method) -> None:
    model, expected = _with_two_patches(resnet18, method)
    start = Barrier(3)

    def answers(name: str | None) -> list[Tensor]:
        torch.set_num_threads(1)
        start.wait()
        with torch.no_grad():
            return [model(resnet18.images, patch=name) for _ in range(10)]

    with ThreadPoolExecutor(3) as pool:
        found = {name: pool.submit(answers, name) for name in expected}
    for name, alone in expected.items():
        assert all(torch.equal(answer, alone) for answer in found[name].result())
    resnet18.assert_untouched()


def test_a_patch_that_is_active_in_one_thread_is_not_in_another(resnet18: Subject, method: Method) -> None:
    model, expected = _with_two_patches(resnet18, method)

    def plain_call() -> Tensor:
        with torch.no_grad():
            return resnet18.base.module(resnet18.images)

    with torch.no_grad(), ThreadPoolExecutor(1) as pool, model.active("first"):
        assert torch.equal(pool.submit(plain_call).result(), expected[None])
        assert torch.equal(plain_call(), expected["first"])
    resnet18.assert_untouched()


def test_a_patch_that_is_active_in_one_task_is_not_in_another(resnet18: Subject, method: Method) -> None:
    model, expected = _with_two_patches(resnet18, method)

    async def answer(name: str) -> Tensor:
        with model.active(name):
            await asyncio.sleep(0)  # the other task enters its own context meanwhile
            return resnet18.base.module(resnet18.images)

    async def both() -> list[Tensor]:
        return await asyncio.gather(answer("first"), answer("second"))

    with torch.no_grad():
        first, second = asyncio.run(both())
    assert torch.equal(first, expected["first"])
    assert torch.equal(second, expected["second"])
    resnet18.assert_untouched()


# --- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [True, False])
def test_the_call_after_an_exception_in_a_patched_forward_is_clean(
    subject: Subject, patch: Patch, by_name: bool
) -> None:
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    def patched_call() -> Tensor:
        if by_name:
            return model(subject.images, patch="task")
        with model.active("task"):
            return subject.base.module(subject.images)

    handle = subject.base.submodule(subject.base.anatomy.head.path or "").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        patched_call()
    handle.remove()
    subject.assert_untouched()
    assert torch.equal(model(subject.images), subject.answers)
    assert torch.equal(model(subject.images, patch="task"), subject.answer(patch))


def test_an_attachment_that_fails_half_way_leaves_nothing_behind(
    resnet18: Subject, resnet18_patch: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last module that the patch touches cannot be touched, when all others have been."""
    import deltapatch.touching as touching

    model = PatchedModel(resnet18.base)
    model.add_patch("task", resnet18_patch)
    shadow, done = touching._shadow, list[nn.Module]()
    last = max(len(resnet18_patch.touches()), 1)

    def shadow_all_but_the_last(module: nn.Module, name: str, function: Callable[..., object]) -> None:
        if len(done) == last:
            raise MemoryError("on purpose")
        done.append(module)
        shadow(module, name, function)

    monkeypatch.setattr(touching, "_shadow", shadow_all_but_the_last)
    with pytest.raises(MemoryError, match="on purpose"):
        model(resnet18.images, patch="task")
    assert len(done) == last
    monkeypatch.undo()
    resnet18.assert_untouched()


def test_a_patch_that_cannot_be_added_is_not_there(resnet18: Subject, resnet18_patch: Patch) -> None:
    model = PatchedModel(resnet18.base)
    model.add_patch("task", resnet18_patch)
    for name in ("task", "../task", "Task", ""):
        with pytest.raises(DeltapatchError, match="name"):
            model.add_patch(name, resnet18_patch)
    assert list(model.patches) == ["task"]
    with pytest.raises(DeltapatchError, match="no patch named 'other'; patches here: task"):
        model(resnet18.images, patch="other")
    resnet18.assert_untouched()


# --- modes ------------------------------------------------------------------------------------------------


def test_a_caller_in_train_mode_moves_no_buffer_of_the_base(method: Method) -> None:
    """Neither the calls nor an optimiser over everything that the model calls its parameters."""
    base = make_base(FAMILIES["resnet18"])
    base.anatomy, base.fingerprint  # noqa: B018 - both are read before the caller interferes
    subject = Subject.of(base)
    model = PatchedModel(base)
    model.add_patch("task", subject.new_patch(method))
    base.module.train()
    for name in ("task", None):
        model(subject.images, patch=name)
    with model.active("task"):
        base.module.train()
        base.module(subject.images)
    assert all(module.training for module in base.module.modules())
    assert same_state(base.module, subject.state)
    base.module.eval()
    subject.assert_untouched()


def test_gradient_flags_of_the_caller_come_back(resnet18: Subject, resnet18_patch: Patch) -> None:
    model = PatchedModel(resnet18.base)
    model.add_patch("task", resnet18_patch)
    parameters = list(resnet18.base.module.parameters())
    parameters[0].requires_grad_(False)
    before = [parameter.requires_grad for parameter in parameters]
    model(resnet18.images, patch="task")
    with model.disable_patches():
        assert not any(parameter.requires_grad for parameter in parameters)
    assert [parameter.requires_grad for parameter in parameters] == before
    parameters[0].requires_grad_(True)
    resnet18.assert_untouched()


# --- other tools ------------------------------------------------------------------------------------------


def test_names_hooks_and_identities_hold_while_a_patch_is_active(
    resnet18: Subject, resnet18_patch: Patch
) -> None:
    module = resnet18.base.module
    children = dict(module.named_modules())
    model = PatchedModel(resnet18.base)
    model.add_patch("task", resnet18_patch)
    seen: list[int] = []
    handle = module.get_submodule("layer4.1").register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), model.active("task"):
        assert list(module.state_dict()) == list(resnet18.state)
        found = dict(module.named_modules())
        assert list(found) == list(children)
        assert all(found[name] is child for name, child in children.items())
        module(resnet18.images)
    handle.remove()
    assert seen == [1]
    resnet18.assert_untouched()


def test_a_copy_of_a_patched_model_answers_the_same_and_on_its_own(resnet18: Subject, method: Method) -> None:
    model, expected = _with_two_patches(resnet18, method)
    model.set_patch("first")
    copied = deepcopy(model)
    with torch.no_grad():
        next(copied.patches["first"].parameters()).zero_()
        assert torch.equal(model(resnet18.images), expected["first"])
        assert not torch.equal(copied(resnet18.images), expected["first"])
        assert torch.equal(copied(resnet18.images, patch="second"), expected["second"])
        assert torch.equal(copied(resnet18.images, patch=None), expected[None])
    resnet18.assert_untouched()


def test_a_copy_made_while_a_patch_is_active_is_a_plain_model_afterwards(
    resnet18: Subject, resnet18_patch: Patch
) -> None:
    model = PatchedModel(resnet18.base)
    model.add_patch("task", resnet18_patch)
    with torch.no_grad(), model.active("task"):
        copied = deepcopy(resnet18.base.module)
    with torch.no_grad():
        assert torch.equal(copied(resnet18.images), resnet18.answers)
    copied.train()
    assert all(part.training for part in copied.modules())
    assert touched_modules(copied) == []
    resnet18.assert_untouched()


def test_a_compiled_model_answers_the_same_and_is_the_base_again_without_the_patch(
    resnet18: Subject, resnet18_patch: Patch
) -> None:
    model = PatchedModel(resnet18.base)
    model.add_patch("task", resnet18_patch)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(resnet18.images, patch="task"), resnet18.answer(resnet18_patch))
        torch.testing.assert_close(compiled(resnet18.images), resnet18.answers)
    torch.compiler.reset()
    resnet18.assert_untouched()


def test_moving_a_patched_model_to_another_type_and_back_takes_its_patches_along(method: Method) -> None:
    subject = Subject.of(make_base(FAMILIES["own"]))
    patch = subject.new_patch(method)
    expected = subject.answer(patch)
    model = PatchedModel(subject.base)
    model.add_patch("task", patch)
    model.double()
    with torch.no_grad():
        answer = model(subject.images.double(), patch="task")
    assert answer.dtype is torch.float64
    torch.testing.assert_close(answer.float(), expected, rtol=1e-3, atol=1e-3)
    model.float()
    assert torch.equal(subject.answer(patch), expected)
    assert touched_modules(subject.base.module) == []
    assert copied_state(patch).keys() == copied_state(method.build(subject.base, CLASSES)).keys()
