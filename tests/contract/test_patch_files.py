"""Invariants 2, 3 and 6: a file is the whole patch, it fits the right base or none, and a failed save
keeps the old one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SIZE, make_base
from safetensors.torch import load_file, save_file
from subjects import CLASSES, Subject
from torch import nn

from deltapatch.errors import DeltapatchError, PatchFileError, WrongBaseError
from deltapatch.loading import load_base
from deltapatch.method import Method, make_method, registered_methods
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

ANSWER_IN_A_NEW_PROCESS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from deltapatch.loading import load_base
from deltapatch.patched import PatchedModel
torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = PatchedModel(load_base("timm/resnet18", weights=folder / "base.safetensors", size=int(sys.argv[2])))
images = load_file(folder / "images.safetensors")["images"]
logits = {}
with torch.no_grad():
    for path in folder.glob("*.patch.safetensors"):
        name = path.name.partition(".")[0]
        model.load_patch(name, path)
        logits[name] = model(images, patch=name)
save_file(logits, folder / "logits.safetensors")
"""


def test_every_method_answers_bit_identically_in_a_new_process(resnet18: Subject, tmp_path: Path) -> None:
    expected: dict[str, torch.Tensor] = {}
    for name in registered_methods():
        patch = resnet18.new_patch(make_method(name))
        patch.save(tmp_path / f"{name}.patch.safetensors")
        expected[name] = resnet18.answer(patch)
    save_file(resnet18.base.module.state_dict(), tmp_path / "base.safetensors")
    save_file({"images": resnet18.images}, tmp_path / "images.safetensors")
    subprocess.run(
        [sys.executable, "-c", ANSWER_IN_A_NEW_PROCESS, str(tmp_path), str(SIZE)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = load_file(tmp_path / "logits.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], logits) for name, logits in expected.items())


def test_a_saved_patch_answers_bit_identically(subject: Subject, patch: Patch, tmp_path: Path) -> None:
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert torch.equal(subject.answer(loaded), subject.answer(patch))
    assert loaded.info == patch.info
    assert loaded.sites == patch.sites
    assert loaded.method == patch.method


def test_a_patch_that_was_fitted_answers_the_same_after_a_reload(
    resnet18: Subject, method: Method, tmp_path: Path
) -> None:
    """Statistics that move during a fit are the patch's own and are in its file."""
    fitted = resnet18.new_patch(method)
    model = PatchedModel(resnet18.base)
    model.add_patch("task", fitted)
    optimizer = torch.optim.SGD(fitted.parameters(), lr=0.01)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(resnet18.images, patch="task"), torch.tensor([0, 1])).backward()
        optimizer.step()
    model.eval()
    loaded = Patch.load(fitted.save(tmp_path / "patch.safetensors"))
    assert torch.equal(resnet18.answer(loaded), resnet18.answer(fitted))


def test_classes_and_preprocessing_come_from_the_file_not_from_the_base(
    resnet18: Subject, method: Method, tmp_path: Path
) -> None:
    backwards = tuple(reversed(CLASSES))
    path = method.build(resnet18.base, backwards).save(tmp_path / "patch.safetensors")
    other = load_base(resnet18.base.module, size=2 * SIZE, classes=CLASSES)
    loaded = Patch.load(path)
    assert loaded.classes == backwards
    assert loaded.info.preprocessing == resnet18.base.preprocessing != other.preprocessing


def test_a_base_of_the_same_shapes_with_other_weights_is_refused(
    resnet18: Subject, resnet18_patch: Patch, tmp_path: Path
) -> None:
    other = Subject.of(make_base(FAMILIES["resnet18"], seed=1))
    model = PatchedModel(other.base)
    path = resnet18_patch.save(tmp_path / "patch.safetensors")
    with pytest.raises(WrongBaseError) as refusal:
        model.load_patch("task", path)
    assert resnet18.base.fingerprint[:19] in str(refusal.value)
    assert other.base.fingerprint[:19] in str(refusal.value)
    assert model.patches == {}
    other.assert_untouched()


@pytest.mark.parametrize("relative", ["resnet26", "seresnet18"])
def test_a_relative_of_the_base_is_refused(resnet18_patch: Patch, relative: str) -> None:
    model = PatchedModel(load_base(f"timm/{relative}", weights="random", size=SIZE))
    with pytest.raises(WrongBaseError, match="belongs to base"):
        model.add_patch("task", resnet18_patch)
    assert model.patches == {}


def test_one_changed_buffer_makes_it_another_base(resnet18_patch: Patch) -> None:
    other = make_base(FAMILIES["resnet18"])
    other.submodule("layer4.1.bn2").running_mean[0] += 1e-3  # pyright: ignore
    with pytest.raises(WrongBaseError, match="belongs to base"):
        PatchedModel(other).add_patch("task", resnet18_patch)


def test_weights_of_a_deeper_model_are_refused_by_a_shallower_one(tmp_path: Path) -> None:
    """Loaded without strictness, resnet34's weights leave no tensor of a resnet18 missing."""
    deeper = load_base("timm/resnet34", weights="random", size=SIZE)
    save_file(deeper.module.state_dict(), tmp_path / "resnet34.safetensors")
    with pytest.raises(DeltapatchError, match=r"resnet34\.safetensors: these weights are not of resnet18"):
        load_base("timm/resnet18", weights=tmp_path / "resnet34.safetensors", size=SIZE)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_save_that_fails_half_way_leaves_the_old_file(
    resnet18: Subject, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = method.build(resnet18.base, CLASSES, seed=0).save(tmp_path / "patch.safetensors")
    old = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full_disk)
        with pytest.raises(PatchFileError, match=r"patch\.safetensors cannot be written"):
            method.build(resnet18.base, CLASSES, seed=1).save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["patch.safetensors"]


def test_a_patch_that_is_not_finite_is_not_saved_over_a_good_one(
    resnet18: Subject, method: Method, tmp_path: Path
) -> None:
    path = method.build(resnet18.base, CLASSES, seed=0).save(tmp_path / "patch.safetensors")
    old = path.read_bytes()
    diverged = resnet18.new_patch(method)
    next(diverged.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(PatchFileError, match="NaN or infinite"):
        diverged.save(path)
    assert path.read_bytes() == old
