"""Bases from every source, with every weight accounted for and every mistake named."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from toys import Net, Unit, copied_state, same_state

from deltapatch.errors import DeltapatchError
from deltapatch.loading import imagenet_classes, load_base, read_state_dict

OWN_FILE = """
import torch
from torch import nn

def network(num_classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, num_classes))

def no_network():
    return "text"

nothing = 3
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN_FILE)
    return path


def _weights(path: Path, **changes: torch.Tensor) -> Path:
    """A file of resnet18's random weights, with some tensors exchanged."""
    torch.manual_seed(3)
    save_file(timm.create_model("resnet18").state_dict() | changes, path)
    return path


# --- sources ----------------------------------------------------------------------------------------------


def test_a_timm_name_brings_its_preprocessing_and_classes() -> None:
    base = load_base("timm/resnet18.a1_in1k", weights="random")
    assert base.preprocessing.input_size == (3, 224, 224)
    assert base.preprocessing.interpolation == "bicubic"
    assert base.classes[0] == "tench"
    assert (base.name, base.source) == ("resnet18.a1_in1k", "timm/resnet18.a1_in1k")


def test_a_torchvision_name_brings_its_preprocessing_and_classes() -> None:
    base = load_base("torchvision/mobilenet_v3_small", weights="random")
    assert base.preprocessing.input_size == (3, 224, 224)
    assert base.preprocessing.interpolation == "bilinear"
    assert base.preprocessing.crop_pct == pytest.approx(224 / 256)
    assert len(base.classes) == 1000


def test_a_base_by_name_is_frozen_and_in_eval_mode() -> None:
    module = load_base("timm/resnet18", weights="random").module
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_module_stays_the_callers_own() -> None:
    module = Net([Unit(4)], 4).train()
    base = load_base(module, size=8, name="mine", classes=("a", "b", "c", "d", "e"))
    assert base.module is module
    assert module.training
    assert (base.name, base.source, base.classes) == ("mine", "", ("a", "b", "c", "d", "e"))


def test_a_function_in_a_file_makes_the_module(own_file: Path) -> None:
    base = load_base(f"{own_file}:network", size=8)
    assert base.module(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert base.name == "network"
    assert load_base(f"{own_file}:network", size=8, num_classes=7).module[-1].out_features == 7


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "resnet18",
            "'resnet18' is not a base: expected timm/NAME, torchvision/NAME, FILE.py:FUNCTION or demo",
        ),
        ("timm/", "'timm/' is not a base"),
        ("timm/resnett18", "timm has no model 'resnett18'; did you mean resnet18"),
        ("timm/zzzzzzzz", "timm has no model 'zzzzzzzz'$"),
        ("torchvision/resnet_18", "torchvision has no model 'resnet_18'; did you mean resnet18"),
        ("nowhere.py:make", r"nowhere\.py: there is no such file; expected FILE\.py:FUNCTION"),
    ],
)
def test_a_source_that_is_none_is_refused_with_what_is_close(source: str, message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        load_base(source, size=8, weights="random")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", r"own\.py has no function 'absent'"),
        ("nothing", r"own\.py has no function 'nothing'"),
        ("no_network", r"own\.py:no_network returned a str; it must return an nn\.Module"),
    ],
)
def test_a_function_that_makes_no_module_is_refused(own_file: Path, function: str, message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        load_base(f"{own_file}:{function}", size=8)


def test_a_file_that_fails_says_how(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    with pytest.raises(DeltapatchError, match=r"broken\.py could not be run: ZeroDivisionError"):
        load_base(f"{path}:network", size=8)


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_a_plain_torch_checkpoint_is_read_also_where_it_is_wrapped(
    tmp_path: Path, wrapping: str | None
) -> None:
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / "weights.pt"
    torch.save(state if wrapping is None else {wrapping: state, "epoch": 3}, path)
    assert same_state(load_base("timm/resnet18", weights=path).module, state)


def test_names_from_data_parallel_training_are_read(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / "weights.pt"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    assert same_state(load_base("timm/resnet18", weights=path).module, state)


def test_the_number_of_classes_is_that_of_the_weights(tmp_path: Path) -> None:
    path = _weights(tmp_path / "w.safetensors", **{"fc.weight": torch.ones(7, 512), "fc.bias": torch.ones(7)})
    assert load_base("timm/resnet18", weights=path).module.get_submodule("fc").out_features == 7


def test_weights_without_batch_counters_are_whole(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / "w.safetensors"
    save_file({name: tensor for name, tensor in state.items() if "num_batches" not in name}, path)
    assert same_state(load_base("timm/resnet18", weights=path).module, state)


def test_weights_are_in_memory_of_their_own(tmp_path: Path) -> None:
    path = _weights(tmp_path / "w.safetensors")
    module = load_base("timm/resnet18", weights=path).module
    before = copied_state(module)
    path.write_bytes(bytes(path.stat().st_size))
    assert same_state(module, before)


def _save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.pt", r"absent\.pt: there is no such weights file"),
        (
            lambda folder: _save({"fc.weight": torch.zeros(1)}, folder / "part.pt"),
            r"part\.pt: these weights are not of resnet18: they lack \d+ of its tensors",
        ),
        (
            lambda folder: _weights(folder / "more.safetensors", extra=torch.zeros(1)),
            r"more\.safetensors: these weights are not of resnet18: they hold 1 that it has not .*'extra'",
        ),
        (
            lambda folder: _weights(
                folder / "shape.safetensors", **{"conv1.weight": torch.zeros(64, 1, 7, 7)}
            ),
            r"'conv1\.weight' has shape \(64, 1, 7, 7\), but resnet18 needs \(64, 3, 7, 7\)",
        ),
        (
            lambda folder: _save(nn.Linear(2, 2), folder / "module.pt"),
            r"module\.pt: not a safetensors file or plain torch checkpoint",
        ),
        (lambda folder: _save([1, 2], folder / "list.pt"), r"list\.pt: does not hold a state dict"),
        (lambda folder: _save({"a": 1}, folder / "int.pt"), r"int\.pt: does not hold a state dict"),
    ],
)
def test_weights_that_do_not_fit_exactly_are_refused_by_path(
    tmp_path: Path, make: object, message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        load_base("timm/resnet18", weights=make(tmp_path))


def test_a_checkpoint_that_would_run_code_is_not_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))

    path = _save({"weight": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(
        DeltapatchError, match=r"hostile\.pt: not a safetensors file or plain torch checkpoint"
    ):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()


# --- preprocessing and classes ----------------------------------------------------------------------------


def test_one_mean_makes_a_grey_input() -> None:
    base = load_base(nn.Flatten(), size=(8, 6), mean=0.5, std=0.25)
    assert base.preprocessing.input_size == (1, 8, 6)
    assert (base.preprocessing.mean, base.preprocessing.std) == ((0.5,), (0.25,))


def test_what_is_given_wins_over_what_the_library_knows() -> None:
    base = load_base("timm/resnet18", weights="random", size=96, interpolation="bilinear", crop_pct=1.0)
    assert base.preprocessing.input_size == (3, 96, 96)
    assert (base.preprocessing.interpolation, base.preprocessing.crop_pct) == ("bilinear", 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the input size of Flatten is not known; give size="),
        ({"size": 8, "mean": (0.5, 0.5)}, "mean has 2 values and std has 3"),
        ({"size": 8, "mean": (0.5, 0.5, 0.5), "std": (1, 1)}, "mean has 3 values and std has 2"),
        ({"size": 0}, "preprocessing of Flatten: input_size"),
        ({"size": 8, "std": 0}, "mean has 3 values and std has 3|std"),
        ({"size": 8, "crop_pct": 2}, "preprocessing of Flatten: crop_pct"),
        ({"size": 8, "interpolation": "cubist"}, "preprocessing of Flatten: interpolation"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        load_base(nn.Flatten(), **options)


def test_class_names_come_from_a_sequence_a_file_or_imagenet(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("ant\n\n bee \ncat\n")
    module = nn.Flatten()
    assert load_base(module, size=8, classes=["ant", "bee"]).classes == ("ant", "bee")
    assert load_base(module, size=8, classes=str(path)).classes == ("ant", "bee", "cat")
    assert load_base(module, size=8, classes="imagenet1k").classes == imagenet_classes()
    assert len(imagenet_classes()) == 1000
    with pytest.raises(DeltapatchError, match=r"absent\.txt: there is no such file of class names"):
        load_base(module, size=8, classes="absent.txt")


def test_a_base_is_shown_by_its_name_and_the_start_of_its_fingerprint() -> None:
    base = load_base(nn.Linear(2, 2), size=8, name="small")
    assert str(base) == f"small ({base.fingerprint[7:19]})"
