"""CLIP models from the library's names, tags, weights files and configs, and every mistake named."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import NAMES, PREPROCESSING, TOWERS, TinyClip, new_tiny_clip
from torch import Tensor, nn

from deltapatch.base import Base
from deltapatch.clip_loading import load_zero_shot
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.open_vocabulary import ZeroShotClassifier


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def untrained(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> TinyClip:
    return new_tiny_clip(open_clip, tmp_path_factory.mktemp("untrained"))


def _load(files: TinyClip, **options: Any) -> Base:
    return load_base(f"open_clip/{files.config}", **{"weights": files.weights, "classes": NAMES} | options)


@torch.no_grad()
def _answers(base: Base) -> Tensor:
    return base.module(base.example())


# --- configs and weights files ----------------------------------------------------------------------------


def test_a_config_file_brings_towers_and_preprocessing(untrained: TinyClip) -> None:
    base = _load(untrained)
    assert base.preprocessing.input_size == (3, 32, 32)
    assert base.preprocessing.mean == tuple(PREPROCESSING["mean"])
    assert (base.preprocessing.interpolation, base.preprocessing.crop_pct) == ("bicubic", 1.0)
    assert base.classes == NAMES
    assert (base.name, base.source) == ("tiny", f"open_clip/{untrained.config}")
    assert not any(part.training for part in base.module.modules())
    assert not any(parameter.requires_grad for parameter in base.module.parameters())


def test_both_towers_have_the_files_weights(untrained: TinyClip) -> None:
    module = _load(untrained).module
    assert isinstance(module, ZeroShotClassifier)
    loaded = {f"visual.{name}": tensor for name, tensor in module.visual.state_dict().items()}
    loaded |= module.text.tower.state_dict()
    expected = untrained.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("resize_mode", "crop_mode"), [("shortest", "center"), ("squash", "squash"), ("longest", "border")]
)
def test_the_way_of_resizing_is_the_configs(
    open_clip: Any, tmp_path: Path, resize_mode: str, crop_mode: str
) -> None:
    prepared = {"resize_mode": resize_mode, "interpolation": "bilinear"}
    (tmp_path / "own.json").write_text(json.dumps({"model_cfg": TOWERS, "preprocess_cfg": prepared}))
    base = load_base(f"open_clip/{tmp_path}/own.json", weights="random", classes=["a"])
    assert (base.preprocessing.crop_mode, base.preprocessing.interpolation) == (crop_mode, "bilinear")
    assert base.preprocessing.mean == open_clip.OPENAI_DATASET_MEAN


def test_a_separate_text_tower_is_built_where_the_config_says_so(open_clip: Any, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(TOWERS | {"custom_text": True}))
    base = load_base(f"open_clip/{tmp_path}/own.json", weights="random", classes=["a", "b"])
    assert isinstance(base.module, ZeroShotClassifier)
    assert isinstance(base.module.text.tower, open_clip.CustomTextCLIP)
    assert _answers(base).shape == (2, 2)


def test_a_tower_that_returns_its_tokens_too_answers_the_same(untrained: TinyClip, tmp_path: Path) -> None:
    vision = TOWERS["vision_cfg"] | {"output_tokens": True}
    (tmp_path / "own.json").write_text(json.dumps(TOWERS | {"vision_cfg": vision}))
    base = load_base(f"open_clip/{tmp_path}/own.json", weights=untrained.weights, classes=NAMES)
    assert torch.equal(_answers(base), _answers(_load(untrained)))


# --- the library's own names ------------------------------------------------------------------------------


@pytest.fixture
def registered(
    untrained: TinyClip, open_clip: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> TinyClip:
    """The tiny model in the library's own register, as ``tiny`` with two tags, for as long as a test runs."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    (tmp_path / "tiny.json").write_text(json.dumps(TOWERS))
    open_clip.add_model_config(tmp_path / "tiny.json")
    plain = {"file": str(untrained.weights)} | PREPROCESSING
    quick = plain | {"quick_gelu": True, "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"plain": plain, "quick": quick})
    return untrained


def test_a_tag_brings_its_weights_and_preprocessing(registered: TinyClip) -> None:
    base = load_base("open_clip/tiny/plain", classes=NAMES)
    assert (base.name, base.source) == ("tiny/plain", "open_clip/tiny/plain")
    assert base.preprocessing == _load(registered).preprocessing
    assert torch.equal(_answers(base), _answers(_load(registered)))


def test_a_tag_brings_the_activation_that_it_was_trained_with(registered: TinyClip) -> None:
    plain, quick = (load_base(f"open_clip/tiny/{tag}", classes=NAMES) for tag in ("plain", "quick"))
    assert not torch.allclose(_answers(quick), _answers(plain))
    activations = {type(part).__name__ for part in quick.module.modules()}
    assert "QuickGELU" in activations
    assert "GELU" not in activations


def test_own_weights_of_a_tag_are_prepared_and_activated_as_the_tags(registered: TinyClip) -> None:
    quick = load_base("open_clip/tiny/quick", classes=NAMES)
    own = load_base("open_clip/tiny/quick", weights=registered.weights, classes=NAMES)
    assert torch.equal(_answers(own), _answers(quick))
    assert own.preprocessing == quick.preprocessing
    assert own.preprocessing.crop_mode == "squash"


def test_own_weights_need_no_tag(registered: TinyClip) -> None:
    base = load_base("open_clip/tiny", weights=registered.weights, classes=NAMES)
    assert torch.equal(_answers(base), _answers(_load(registered)))


# --- what cannot be loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": None}, r"needs the names of its classes; give classes= \(--classes\)"),
        ({"classes": ()}, "needs the names of its classes"),
        ({"weights": None}, r"tiny\.json names no weights: give weights=FILE, 'random' for none, or"),
        ({"weights": "absent.pt"}, r"absent\.pt: there is no such weights file"),
        ({"templates": ()}, r"templates is empty; give at least one text such as 'a photo of a \{\}\.'"),
        ({"templates": "a {}"}, r"templates must be a sequence of texts, .* the single text 'a \{\}'"),
        ({"templates": ["a {}", "a photo"]}, r"template 'a photo' has no place for the class name; put \{\}"),
        ({"num_classes": 3}, "has one class a name, 12, not 3"),
    ],
)
def test_what_a_zero_shot_base_cannot_be_made_of_is_refused(
    untrained: TinyClip, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        _load(untrained, **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-23", "open_clip has no architecture 'ViT-B-23'; did you mean ViT-B-32"),
        ("zzzzzzzz", r"open_clip has no architecture 'zzzzzzzz'; give one of its names or a \.json config"),
        ("ViT-B-32/openei", "open_clip has no weights 'openei' for ViT-B-32; it has: openai, laion"),
        ("ViT-B-32", "ViT-B-32 names no weights: give .* open_clip/ARCHITECTURE/TAG, one of openai, laion"),
    ],
)
def test_a_name_that_the_library_has_not_is_refused_with_what_it_has(
    open_clip: Any, name: str, message: str
) -> None:
    with pytest.raises(DeltapatchError, match=message):
        load_base(f"open_clip/{name}", classes=["a"])


def test_a_config_that_is_absent_is_refused_by_path(open_clip: Any) -> None:
    with pytest.raises(DeltapatchError, match=r"absent\.json: there is no such model config"):
        load_base("open_clip/absent.json", weights="random", classes=["a"])


@pytest.mark.parametrize("content", ["[]", "{", '{"embed_dim": 64}', '{"vision_cfg": 3, "text_cfg": {}}'])
def test_a_file_that_is_no_config_is_refused_by_path(open_clip: Any, tmp_path: Path, content: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(DeltapatchError, match=r"own\.json: not a model config of open_clip's"):
        load_base(f"open_clip/{tmp_path}/own.json", weights="random", classes=["a"])


def test_a_config_that_the_library_cannot_build_is_refused(open_clip: Any, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(TOWERS | {"colour": "red"}))
    with pytest.raises(DeltapatchError, match=r"could not load open_clip/.*own\.json: TypeError: .*colour"):
        load_base(f"open_clip/{tmp_path}/own.json", weights="random", classes=["a"])


def test_weights_of_another_model_are_refused_by_path(untrained: TinyClip, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DeltapatchError, match=r"other\.safetensors as weights of open_clip/.*Missing key"):
        _load(untrained, weights=tmp_path / "other.safetensors")


def test_a_checkpoint_that_would_run_code_is_not_unpickled(untrained: TinyClip, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(DeltapatchError, match=r"could not load .*hostile\.pt as weights of open_clip/"):
        _load(untrained, weights=tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


def test_templates_belong_to_open_clip_bases_only() -> None:
    with pytest.raises(DeltapatchError, match="templates= makes the heads of open_clip bases"):
        load_base(nn.Flatten(), size=8, templates=["a {}."])


def test_without_the_library_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(DeltapatchError, match=r"open_clip/RN50/openai needs .* install deltapatch\[clip\]"):
        load_zero_shot("RN50/openai", weights=None, classes=["a"])
