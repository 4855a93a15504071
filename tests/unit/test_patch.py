"""One task's parameters: built, described, checked against a base, saved and loaded."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import Unit, copied_state, disturb, same_state, toy_base

from deltapatch.base import Base
from deltapatch.classifier import HeadSite
from deltapatch.errors import AnatomyError, DeltapatchError, PatchFileError, WrongBaseError
from deltapatch.file import read_patch_file, write_patch_file
from deltapatch.info import PatchInfo
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import FILE_NAME, Patch, pooled

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def base() -> Base:
    return toy_base()


@pytest.fixture
def patch(base: Base) -> Patch:
    return disturb(Delta().build(base, CLASSES, seed=0))


# --- building ---------------------------------------------------------------------------------------------


def test_a_patch_says_what_it_is_and_whose(base: Base, patch: Patch) -> None:
    assert patch.info.method.name == "delta"
    options = {"modules": "all", "norm": "both", "start": "zero-gain", "module": "light"}
    assert patch.info.method.config == options
    assert (patch.info.base.name, patch.info.base.fingerprint) == (base.name, base.fingerprint)
    assert patch.info.preprocessing == base.preprocessing
    assert patch.classes == CLASSES
    assert patch.info.versions.keys() == {"deltapatch", "torch", "torchvision", "timm", "safetensors"}


def test_a_patch_is_built_in_eval_mode_with_all_its_parameters_trainable(patch: Patch) -> None:
    assert not any(module.training for module in patch.modules())
    assert all(parameter.requires_grad for parameter in patch.parameters())


def test_parameters_are_counted_with_and_without_the_head(base: Base) -> None:
    patch = Head().build(base, CLASSES)
    assert patch.num_parameters() == 3 * 4 + 3
    assert patch.num_parameters(head=False) == 0


def test_a_patch_without_classes_has_no_head(base: Base) -> None:
    patch = Delta().build(base)
    assert patch.head is None
    assert patch.info.head is None
    assert not any(name.startswith("head") for name in patch.state_dict())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("cat", "classes must be a sequence of names, but it is the single text 'cat'"),
        (("cat", "cat"), "classes: .*same name 'cat'"),
        (("cat", ""), "classes.1: "),
        (("cat", "a\nb"), "classes.1: .*control characters"),
    ],
)
def test_class_names_that_cannot_be_stored_are_refused_at_once(
    base: Base, classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        Head().build(base, classes)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 4), "NC"), ((2, 4, 3, 5), "NCHW"), ((2, 7, 4), "NLC"), ((2, 3, 5, 4), "NC"), ((2, 3, 5, 4), "NLC")],
)
def test_features_are_averaged_over_positions(shape: tuple[int, ...], layout: str) -> None:
    """Every channel holds its own number, whatever the position."""
    channels = torch.arange(4.0)
    values = channels.view(4, 1, 1) if layout == "NCHW" else channels
    assert torch.equal(pooled(values.expand(shape), layout), channels.expand(2, 4))


def test_the_head_answers_for_pooled_features(patch: Patch) -> None:
    features = torch.randn(2, 4, 3, 3)
    expected = patch.head(features.mean((2, 3)))
    torch.testing.assert_close(patch.logits(features, HeadSite(None, 4, "NCHW")), expected)


def test_features_of_another_type_are_taken_in_the_heads_own(patch: Patch) -> None:
    features: Tensor = torch.randn(2, 4, dtype=torch.float64)
    assert patch.logits(features, HeadSite(None, 4, "NC")).dtype is torch.float32


# --- the right base ---------------------------------------------------------------------------------------


def test_another_base_is_refused_by_both_names_and_fingerprints(patch: Patch) -> None:
    torch.manual_seed(1)
    other = load_base(type(toy_base().module)([Unit(4), Unit(4)], 4), size=8, name="the other")
    with pytest.raises(WrongBaseError) as refusal:
        patch.check_base(other)
    for part in (patch.info.base.name, patch.info.base.fingerprint[:19], "the other", other.fingerprint[:19]):
        assert part in str(refusal.value)


def test_the_same_weights_in_another_structure_are_refused(base: Base, patch: Patch) -> None:
    """Nothing in the weights shows that a unit's forward no longer adds its shortcut."""

    class WithoutShortcut(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.branch(x))

    for index, unit in enumerate(base.module.stage):
        base.module.stage[index] = WithoutShortcut(4)
        base.module.stage[index].load_state_dict(unit.state_dict())
    other = load_base(base.module, size=8)
    assert other.fingerprint == patch.info.base.fingerprint
    with pytest.raises(WrongBaseError, match="has the weights this patch belongs to, but another structure"):
        patch.check_base(other)


def test_the_right_base_is_accepted_whatever_it_is_called(base: Base, patch: Patch) -> None:
    patch.check_base(load_base(base.module, size=8, name="renamed"))


def test_batch_counters_do_not_make_another_base() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = load_base(module, size=8).fingerprint
    module[1].num_batches_tracked += 5
    assert load_base(module, size=8).fingerprint == before
    module[1].running_var += 1e-3
    assert load_base(module, size=8).fingerprint != before


def test_a_method_that_finds_no_place_builds_no_patch() -> None:
    base = load_base(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), size=8)
    with pytest.raises(AnatomyError, match="no stage was found"):
        Delta().build(base, CLASSES)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "classes"),
    [
        (Head(), CLASSES),
        (Delta(), CLASSES),
        (Delta(), ()),
        (Delta(modules=1, norm="sum", start="identity"), CLASSES),
    ],
)
def test_a_loaded_patch_is_the_saved_one(
    base: Base, tmp_path: Path, method: Delta | Head, classes: tuple[str, ...]
) -> None:
    patch = disturb(method.build(base, classes, seed=0))
    loaded = Patch.load(patch.save(tmp_path / "patch.safetensors"))
    assert same_state(loaded, copied_state(patch))
    assert (loaded.method, loaded.sites, loaded.info) == (patch.method, patch.sites, patch.info)
    assert not loaded.training
    loaded.check_base(base)


def test_every_tensor_of_the_file_is_in_the_patch_and_the_other_way_round(
    patch: Patch, tmp_path: Path
) -> None:
    path = patch.save(tmp_path / "patch.safetensors")
    assert load_file(path).keys() == patch.state_dict().keys()
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def _rewritten(path: Path, info: PatchInfo, tensors: dict[str, Tensor]) -> Path:
    write_patch_file(path, tensors, info)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("head.bias"), r"the tensor 'head\.bias' is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "the tensor 'extra' does not belong"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(4)}),
            r"'head\.bias' has shape \(4,\), but its configuration asks for \(3,\)",
        ),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(3, dtype=torch.int64)}),
            r"'head\.bias' has type torch\.int64, but torch\.float32 was expected",
        ),
    ],
)
def test_tensors_that_the_configuration_does_not_ask_for_are_refused(
    patch: Patch, tmp_path: Path, change: object, message: str
) -> None:
    path = patch.save(tmp_path / "patch.safetensors")
    info, tensors = read_patch_file(path)
    change(tensors)
    with pytest.raises(PatchFileError, match=message):
        Patch.load(_rewritten(path, info, tensors))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "unheard-of", "there is no method 'unheard-of'"),
        ("config", {"modules": -1}, "modules must be 1 or more"),
        ("config", {"colour": "red"}, "has no option 'colour'"),
        ("sites", ({"path": "stage"},), "its method cannot be built from what it says"),
    ],
)
def test_a_method_that_cannot_be_built_is_reported_by_the_files_path(
    patch: Patch, tmp_path: Path, field: str, value: object, message: str
) -> None:
    path = patch.save(tmp_path / "patch.safetensors")
    info, tensors = read_patch_file(path)
    changed = info.model_copy(update={"method": info.method.model_copy(update={field: value})})
    with pytest.raises(PatchFileError, match=message) as refusal:
        Patch.load(_rewritten(path, changed, tensors))
    assert str(path) in str(refusal.value)


def test_sizes_that_a_file_only_claims_are_not_allocated(patch: Patch, tmp_path: Path) -> None:
    """A stage of 2^40 channels would need more memory than there is; the tensors do not have that shape."""
    path = patch.save(tmp_path / "patch.safetensors")
    info, tensors = read_patch_file(path)
    sites = tuple(site | {"in_channels": 2**20} for site in info.method.sites)
    changed = info.model_copy(update={"method": info.method.model_copy(update={"sites": sites})})
    with pytest.raises(PatchFileError, match="its configuration asks for"):
        Patch.load(_rewritten(path, changed, tensors))


def test_a_folder_holds_the_patch_and_a_card_that_names_its_base(patch: Patch, tmp_path: Path) -> None:
    path = patch.save_pretrained(tmp_path / "new" / "folder")
    assert path.name == FILE_NAME
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    assert f"# A delta patch for {patch.info.base.name}" in card
    assert "3 classes" in card
    assert patch.info.base.fingerprint in card
    for source in (path, path.parent):
        assert same_state(Patch.from_pretrained(source), copied_state(patch))


def test_a_name_that_is_nowhere_says_where_it_was_looked_for() -> None:
    with pytest.raises(
        PatchFileError, match=r"'nobody/nothing' is no file or folder here, and patch\.safetensors"
    ):
        Patch.from_pretrained("nobody/nothing", local_files_only=True)


def test_a_mistyped_file_is_told_without_asking_a_hub(tmp_path: Path) -> None:
    with pytest.raises(PatchFileError, match=r"brids\.safetensors: there is no such patch file"):
        Patch.from_pretrained(tmp_path / "brids.safetensors")
