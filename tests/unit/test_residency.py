"""Patch files that are attached: read late, within a budget, never in the way of a running computation."""

import gc
import os
import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import OwnNet, disturb, enliven

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError, PatchFileError, WrongBaseError
from deltapatch.joint import stacked
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel
from deltapatch.residency import Shelf, patch_bytes


@pytest.fixture(scope="module")
def base() -> Base:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    return load_base(module, size=16)


@pytest.fixture(scope="module")
def files(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("patches")
    return [_patch(base, seed).save(folder / f"p{seed}.safetensors") for seed in range(6)]


def _patch(base: Base, seed: int) -> Patch:
    return disturb(Delta(modules=1).build(base, ("a", "b", "c"), seed=seed), seed)


def _model(base: Base, files: list[Path], budget: int | None = None) -> PatchedModel:
    model = PatchedModel(base, budget)
    for file in files:
        model.attach_patch(file.stem, file)
    return model


def _loaded(model: PatchedModel) -> list[str]:
    return [name for name, patch in model._patches.items() if getattr(patch, "patch", None) is not None]


def _size(files: list[Path]) -> int:
    return patch_bytes(Patch.load(files[0]))


@torch.no_grad()
def test_an_attached_patch_answers_bit_for_bit_as_an_added_one(base: Base, files: list[Path]) -> None:
    model, eager = _model(base, files), PatchedModel(base)
    images = base.example(3)
    for file in files:
        eager.load_patch(file.stem, file)
        assert torch.equal(model(images, patch=file.stem), eager(images, patch=file.stem))
    for name, answer in model.all(images).items():
        torch.testing.assert_close(answer, eager(images, patch=name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_but_the_header_is_read_until_the_first_use(base: Base, files: list[Path]) -> None:
    model = _model(base, files)
    assert model.resident_bytes == 0
    assert [info.classes for info in model.patch_info.values()] == [("a", "b", "c")] * 6
    assert model.resident_bytes == 0
    model(base.example(), patch="p2")
    assert _loaded(model) == ["p2"]
    assert model.resident_bytes >= _size(files)


@torch.no_grad()
def test_the_patches_not_used_for_longest_leave_when_the_budget_is_full(
    base: Base, files: list[Path]
) -> None:
    size = _size(files)
    model = _model(base, files, budget=3 * size + 10)
    images = base.example()
    expected = {file.stem: _model(base, files)(images, patch=file.stem) for file in files}
    for name in ("p0", "p1", "p2", "p0", "p3"):
        assert torch.equal(model(images, patch=name), expected[name])
    assert _loaded(model) == ["p0", "p2", "p3"]
    for name in ("p4", "p5", "p1", "p0", "p4", "p2"):
        assert torch.equal(model(images, patch=name), expected[name])
        assert model.resident_bytes <= 3 * size + 10


@torch.no_grad()
def test_a_patch_larger_than_the_budget_runs_alone(base: Base, files: list[Path]) -> None:
    model = _model(base, files, budget=1)
    images = base.example()
    for name in ("p0", "p1", "p0"):
        assert torch.equal(model(images, patch=name), _model(base, files)(images, patch=name))
        assert _loaded(model) == [name]
    assert model.resident_bytes == _size(files)


@torch.no_grad()
def test_a_row_is_not_written_while_a_computation_holds_its_patch(base: Base, files: list[Path]) -> None:
    """The patch is evicted while it runs: what it computes with stays, and is free afterwards."""
    model = _model(base, files, budget=_size(files))
    images = base.example()
    held = model.patches["p0"]
    before = {name: tensor.clone() for name, tensor in held.state_dict().items()}
    model(images, patch="p1")
    model(images, patch="p2")
    assert _loaded(model) == ["p2"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.state_dict().items())
    del held
    gc.collect()
    model(images, patch="p3")
    assert model.resident_bytes == _size(files)


@torch.no_grad()
def test_resident_patches_are_stacked_without_a_copy(base: Base, files: list[Path]) -> None:
    model = _model(base, files)
    patches = list(model.patches.values())
    weights = [patch.parts[0].delta.fc.weight for patch in patches[:3]]
    assert stacked(weights).untyped_storage().data_ptr() == weights[0].untyped_storage().data_ptr()
    assert not any(parameter.requires_grad for patch in patches for parameter in patch.parameters())


@torch.no_grad()
def test_the_last_row_that_is_left_frees_its_shelf(base: Base, files: list[Path]) -> None:
    model = _model(base, files)
    model.all(base.example())
    assert model.resident_bytes > 0
    for file in files:
        model.delete_patch(file.stem)
    gc.collect()
    assert model.resident_bytes == 0


@torch.no_grad()
def test_replacing_flips_from_the_old_answer_to_the_new_one(base: Base, files: list[Path]) -> None:
    model = _model(base, files[:1])
    images = base.example()
    old, new = (_model(base, files)(images, patch=name) for name in ("p0", "p1"))
    running = model.patches["p0"]
    model.replace_patch("p0", files[1])
    assert torch.equal(model(images, patch="p0"), new)
    assert torch.equal(running.head.weight, Patch.load(files[0]).head.weight)
    model.replace_patch("p0", Patch.load(files[0]))
    assert torch.equal(model(images, patch="p0"), old)


@torch.no_grad()
def test_under_load_every_answer_is_wholly_old_or_wholly_new(base: Base, files: list[Path]) -> None:
    model = _model(base, files[:1], budget=2 * _size(files))
    images = base.example()
    allowed = [_model(base, files)(images, patch=name) for name in ("p0", "p1", "p2")]
    wrong: list[Tensor] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answer = model(images, patch="p0")
            if not any(torch.equal(answer, one) for one in allowed):
                wrong.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        model.replace_patch("p0", files[(turn + 1) % 3])
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_new_patch_that_is_refused_leaves_the_old_one(
    base: Base, files: list[Path], tmp_path: Path
) -> None:
    model = _model(base, files[:1])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(files[1].read_bytes()[:-7])
    before = model(base.example(), patch="p0")
    with pytest.raises(PatchFileError, match=r"broken\.safetensors"):
        model.replace_patch("p0", broken)
    assert torch.equal(model(base.example(), patch="p0"), before)
    with pytest.raises(DeltapatchError, match="there is no patch named 'p9'"):
        model.replace_patch("p9", files[1])


def test_a_file_that_changed_since_it_was_attached_is_refused(base: Base, tmp_path: Path) -> None:
    path = _patch(base, 0).save(tmp_path / "task.safetensors")
    model = PatchedModel(base)
    model.attach_patch("task", path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(PatchFileError, match="has changed since it was attached"):
        model(base.example(), patch="task")
    path.unlink()
    with pytest.raises(PatchFileError, match="cannot be read"):
        model(base.example(), patch="task")


def test_what_cannot_be_attached_is_refused_at_once(base: Base, files: list[Path], tmp_path: Path) -> None:
    model = _model(base, files[:1])
    with pytest.raises(DeltapatchError, match="there is a patch named 'p0' already"):
        model.attach_patch("p0", files[1])
    with pytest.raises(PatchFileError, match="cannot be read"):
        model.attach_patch("gone", tmp_path / "gone.safetensors")
    torch.manual_seed(1)
    other = PatchedModel(load_base(OwnNet().eval(), size=16))
    with pytest.raises(WrongBaseError):
        other.attach_patch("p0", files[0])
    assert list(other.patches) == []


@torch.no_grad()
def test_attached_patches_follow_the_model_to_another_type(files: list[Path]) -> None:
    torch.manual_seed(0)
    module = OwnNet().eval()
    enliven(module)
    model = _model(load_base(module, size=16), files[:2])
    images = torch.randn(2, 3, 16, 16)
    single = model(images, patch="p0")
    model.double()
    assert {p.dtype for p in model.patches["p0"].parameters()} == {torch.float64}
    torch.testing.assert_close(model(images.double(), patch="p0").float(), single, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_deep_copy_reads_its_own_patches(base: Base, files: list[Path]) -> None:
    model = _model(base, files[:2])
    images = base.example()
    expected = model(images, patch="p0")
    copied = deepcopy(model)
    assert _loaded(copied) == []
    assert torch.equal(copied(images, patch="p0"), expected)


def test_attached_patches_stay_in_eval_mode(base: Base, files: list[Path]) -> None:
    model = _model(base, files[:1])
    model.train()
    assert not model.patches["p0"].training


def test_a_shelf_hands_out_each_row_once(base: Base) -> None:
    shelf = Shelf(_patch(base, 0), rows=2)
    first, second = shelf.place(_patch(base, 1)), shelf.place(_patch(base, 2))
    assert shelf.free == []
    assert torch.equal(first.head.weight, _patch(base, 1).head.weight)
    assert torch.equal(second.head.weight, _patch(base, 2).head.weight)
    del first
    gc.collect()
    assert len(shelf.free) == 1
    assert not shelf.is_empty
