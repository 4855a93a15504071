"""CLIP bases: classes are texts, the text tower makes the heads, and patches act as on any other base."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import write_digits
from tiny_clip import CAPTION, NAMES, TOWERS, TinyClip, read_characters, train_tiny_clip
from torch import Tensor
from torch.nn import functional
from toys import disturb, toy_base

import deltapatch
from deltapatch.base import Base, fingerprint
from deltapatch.errors import DeltapatchError
from deltapatch.fitting.config import FitConfig
from deltapatch.loading import load_base
from deltapatch.method import Method
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.open_vocabulary import ZeroShotClassifier, zero_shot_base, zero_shot_head
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def tiny(open_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> TinyClip:
    return train_tiny_clip(open_clip, tmp_path_factory.mktemp("tiny_clip"))


def _load(tiny: TinyClip, **options: Any) -> Base:
    return load_base(f"open_clip/{tiny.config}", **{"weights": tiny.weights, "classes": NAMES} | options)


@pytest.fixture
def base(tiny: TinyClip) -> Base:
    return _load(tiny)


@torch.no_grad()
def _answers(base: Base, images: Tensor | None = None) -> Tensor:
    return base.module(base.example(4) if images is None else images)


def _text(base: Base) -> Any:
    assert isinstance(base.module, ZeroShotClassifier)
    return base.module.text


# --- zero-shot answers ------------------------------------------------------------------------------------


def test_a_clip_trained_on_captions_reads_letters_in_new_fonts_zero_shot(base: Base) -> None:
    images, labels = read_characters(600, 1, "held-out")
    accuracy = (_answers(base, images).argmax(1) == labels).double().mean()
    assert accuracy > 4 / len(NAMES)


def test_the_logits_are_those_of_the_library(tiny: TinyClip, open_clip: Any, base: Base) -> None:
    tokens = open_clip.SimpleTokenizer(context_length=16)([CAPTION.format(name) for name in NAMES])
    with torch.no_grad():
        image_features, text_features, scale = tiny.model(base.example(4), tokens)
    torch.testing.assert_close(_answers(base), scale * image_features @ text_features.T, rtol=0, atol=1e-5)


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(tiny: TinyClip) -> None:
    text = _text(_load(tiny, classes=["character A", "character 3"], templates=TEMPLATES))
    expected = []
    for name in ("character A", "character 3"):
        prompts = text.tokenizer([template.replace("{}", name) for template in TEMPLATES])
        with torch.no_grad():
            first, second = tiny.model.encode_text(prompts)
        mean = (first / first.norm() + second / second.norm()) / 2
        expected.append(mean / mean.norm())
    found = text.class_embeddings(["character A", "character 3"])
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-6)
    assert not torch.allclose(found, text.class_embeddings(["character A", "character 3"], TEMPLATES[:1]))


def test_many_classes_are_embedded_as_each_is_alone(base: Base) -> None:
    names = [f"character {number}" for number in range(300)]
    found = _text(base).class_embeddings(names)
    torch.testing.assert_close(found[-1:], _text(base).class_embeddings(names[-1:]), rtol=0, atol=1e-5)


# --- the base ---------------------------------------------------------------------------------------------


def test_class_names_come_from_a_file_too(tiny: TinyClip, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    base = _load(tiny, classes=tmp_path / "classes.txt")
    assert base.classes == NAMES
    assert base.fingerprint == _load(tiny).fingerprint


def test_the_text_tower_is_no_part_of_the_base(base: Base) -> None:
    module = base.module
    assert {name.partition(".")[0] for name in module.state_dict()} == {"visual", "classifier"}
    copy = deepcopy(module)
    assert isinstance(copy, ZeroShotClassifier)
    assert copy.text is _text(base)
    assert copy.visual is not module.visual
    with torch.no_grad():
        assert torch.equal(copy(base.example()), module(base.example()))
        assert copy.double()(base.example().double()).dtype == torch.float64


def test_classes_are_named_also_where_the_image_tower_is_on_another_device(base: Base) -> None:
    base.module.to("meta")
    other = zero_shot_base(base, NAMES[:3])
    assert {tensor.device.type for tensor in other.module.state_dict().values()} == {"meta"}
    assert zero_shot_head(base, NAMES[:3]).weight.device.type == "meta"
    assert _text(base).class_embeddings(NAMES[:3]).device.type == "cpu"


def test_the_fingerprint_covers_the_classes(tiny: TinyClip, base: Base) -> None:
    assert zero_shot_base(base, NAMES).fingerprint == base.fingerprint
    assert zero_shot_base(base, NAMES[:3]).fingerprint != base.fingerprint
    assert zero_shot_base(base, NAMES, TEMPLATES).fingerprint != base.fingerprint
    assert _load(tiny, templates=TEMPLATES).fingerprint == zero_shot_base(base, NAMES, TEMPLATES).fingerprint


def test_another_set_of_classes_shares_the_image_tower(base: Base) -> None:
    other = zero_shot_base(base, NAMES[:3])
    assert other.classes == NAMES[:3]
    assert other.module.get_submodule("visual") is base.module.get_submodule("visual")
    torch.testing.assert_close(_answers(other), _answers(base)[:, :3], rtol=0, atol=1e-5)


# --- patches ----------------------------------------------------------------------------------------------

RESNET = {"layers": [2, 2, 2, 2], "width": 16, "image_size": 64}


@pytest.mark.parametrize(
    ("vision", "sub_blocks", "layout"),
    [(TOWERS["vision_cfg"], [2], "NLC"), (RESNET, [2, 2, 2, 2], "NCHW")],
    ids=["transformer", "resnet"],
)
def test_the_anatomy_has_the_towers_stages_and_the_zero_shot_head(
    open_clip: Any, tmp_path: Path, vision: dict[str, Any], sub_blocks: list[int], layout: str
) -> None:
    (tmp_path / "towers.json").write_text(json.dumps(TOWERS | {"vision_cfg": vision}))
    base = load_base(f"open_clip/{tmp_path}/towers.json", weights="random", classes=["a", "b", "c"])
    assert [len(stage.sub_blocks) for stage in base.anatomy.stages] == sub_blocks
    assert {stage.layout for stage in base.anatomy.stages} == {layout}
    assert (base.anatomy.head.path, base.anatomy.head.features) == ("classifier", 64)


@pytest.mark.parametrize("method", [Delta(), Head()], ids=["delta", "head"])
def test_a_patch_fits_and_the_base_stays_bit_identical(
    tiny: TinyClip, base: Base, tmp_path: Path, method: Method
) -> None:
    before, answers = fingerprint(base.module), _answers(base)
    config = FitConfig(epochs=1, precision="fp32", cache="off")
    patch = deltapatch.fit(base, write_digits(tmp_path / "digits.npz"), method, config, progress=False)
    assert patch.info.figures["validation/accuracy"] > 0.3
    model, again = PatchedModel(base), PatchedModel(_load(tiny))
    model.add_patch("digits", patch)
    again.load_patch("digits", patch.save(tmp_path / "patch.safetensors"))
    images = base.example(4)
    assert torch.equal(again(images, patch="digits"), model(images, patch="digits"))
    assert torch.equal(model(images, patch=None), answers)
    assert torch.equal(_answers(base), answers)
    assert fingerprint(base.module) == before


def test_a_head_made_from_text_answers_as_the_base_does_zero_shot(base: Base) -> None:
    patch = Head().build(base, NAMES[2:6])
    assert patch.head is not None
    patch.head.load_state_dict(zero_shot_head(base, NAMES[2:6]).state_dict())
    model = PatchedModel(base)
    model.add_patch("some", patch)
    answers = model(base.example(4), patch="some")
    torch.testing.assert_close(answers, _answers(base)[:, 2:6], rtol=0, atol=1e-5)


def test_a_head_has_prompts_of_its_own_where_they_are_given(base: Base) -> None:
    head = zero_shot_head(base, NAMES, TEMPLATES)
    scale = _text(base).tower.logit_scale.exp()
    expected = _text(base).class_embeddings(NAMES, TEMPLATES)
    torch.testing.assert_close(functional.normalize(head.weight, dim=1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head.weight.norm(dim=1), scale.expand(len(NAMES)), rtol=1e-5, atol=0)
    assert head.bias.count_nonzero() == 0


def test_a_patched_tower_answers_other_classes_while_the_patch_is_active(base: Base) -> None:
    other = zero_shot_base(base, NAMES[:3])
    without = _answers(other)
    model = PatchedModel(base)
    model.add_patch("task", disturb(Delta().build(base, NAMES[:5], seed=0), scale=1.0))
    with model.active("task"):
        assert not torch.allclose(_answers(other), without)
    assert torch.equal(_answers(other), without)


def test_a_patch_of_other_classes_is_refused_by_fingerprint(base: Base, tmp_path: Path) -> None:
    path = Head().build(base, NAMES[:2]).save(tmp_path / "p.safetensors")
    with pytest.raises(DeltapatchError, match="this patch belongs to base"):
        PatchedModel(zero_shot_base(base, NAMES[:3])).load_patch("task", path)
    assert Patch.load(path).info.base.fingerprint == base.fingerprint


@pytest.mark.parametrize("make", [zero_shot_base, zero_shot_head])
def test_a_base_without_a_text_tower_cannot_name_classes(make: Any) -> None:
    with pytest.raises(DeltapatchError, match="base Net has no text tower to name classes with"):
        make(toy_base(), ["cat"])


def test_a_single_text_is_no_sequence_of_class_names(base: Base) -> None:
    with pytest.raises(
        DeltapatchError, match=r"classes must be a sequence of names, .* the single text 'cat'"
    ):
        zero_shot_head(base, "cat")
