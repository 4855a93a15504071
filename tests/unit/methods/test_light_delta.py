"""The light Δ-module: what it costs beside the published one, and files from before there was a choice."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toys import OwnNet, disturb

from deltapatch.base import Base
from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta, DeltaModule
from deltapatch.patch import Patch


@pytest.fixture(scope="module", params=["resnet18", "resnet50", "convnext_tiny"])
def base(request: pytest.FixtureRequest) -> Base:
    return load_base(f"timm/{request.param}", weights="random", size=224)


def _modules(base: Base) -> tuple[DeltaModule, DeltaModule]:
    (stage,) = base.anatomy.last_stages(1)
    light, published = (Delta(module=kind).delta_module(stage) for kind in ("light", "published"))
    assert isinstance(light, DeltaModule)
    assert isinstance(published, DeltaModule)
    return light, published


def test_it_has_at_most_a_fifth_of_the_published_parameters(base: Base) -> None:
    light, published = (sum(p.numel() for p in module.parameters()) for module in _modules(base))
    assert light <= published / 5


def test_its_convolutions_have_an_eighth_of_the_channels(base: Base) -> None:
    """C · C/8 · 9 and C/8 · C/8 · 9 weights."""
    light, _ = _modules(base)
    (stage,) = base.anatomy.last_stages(1)
    width = stage.in_channels // 8
    weights = [p.numel() for p in light.layers.parameters() if p.ndim == 4]
    assert weights == [stage.in_channels * width * 9, width * width * 9]


@torch.no_grad()
def test_it_takes_at_most_a_fiftieth_of_the_bases_multiply_adds(base: Base) -> None:
    light, _ = _modules(base)
    (stage,) = base.anatomy.last_stages(1)
    given: list[torch.Tensor] = []
    first = base.submodule(stage.sub_blocks[0].path)
    handle = first.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with FlopCounterMode(display=False) as whole:
        base.module(base.example(1))
    handle.remove()
    with FlopCounterMode(display=False) as own:
        light.eval()(given[0])
    assert 0 < own.get_total_flops() <= whole.get_total_flops() / 50


@pytest.mark.parametrize(("channels", "width"), [(8, 4), (16, 8), (32, 16), (64, 16), (128, 16), (256, 32)])
def test_a_narrow_stage_keeps_enough_channels(channels: int, width: int) -> None:
    assert DeltaModule(channels, 3, "NCHW", True, light=True).fc.in_features == width


def test_on_tokens_it_is_linear_layers_of_the_same_width() -> None:
    module = DeltaModule(192, 3, "NLC", True, light=True).eval()
    assert module.fc.in_features == 24
    assert module(torch.randn(2, 5, 192)).shape == (2, 3)


def test_a_file_without_the_option_has_the_published_module(tmp_path: Path) -> None:
    base = load_base(OwnNet().eval(), size=16)
    patch = disturb(Delta(module="published").build(base, ("a", "b"), seed=0))
    path = patch.save(tmp_path / "new.safetensors")
    _forget_option(path)
    old = Patch.load(path)
    assert old.method == Delta(module="published")
    assert all(torch.equal(tensor, old.state_dict()[name]) for name, tensor in patch.state_dict().items())


def _forget_option(path: Path) -> None:
    """Writes the file as it was written before the option was there."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = next(key for key in header["__metadata__"] if "module" in header["__metadata__"][key])
    info = json.loads(header["__metadata__"][key])
    assert info["method"]["config"].pop("module") == "published"
    header["__metadata__"][key] = json.dumps(info)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
