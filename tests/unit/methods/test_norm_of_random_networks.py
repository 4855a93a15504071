"""Norms trained on random features: their counts, their start, and a model that is a seed and a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import copied_state, disturb

from deltapatch.base import Base
from deltapatch.errors import DeltapatchError
from deltapatch.loading import load_base
from deltapatch.method import make_method
from deltapatch.methods.norm import Norm
from deltapatch.patched import PatchedModel

EXAMPLE = Path(__file__).parents[3] / "examples" / "cifar_resnet.py"
FROM_THE_SOURCE = Norm(statistics="own", gain="uniform")


def _random_base() -> Base:
    return load_base(f"{EXAMPLE}:resnet14_random", size=32, crop_pct=1.0)


@pytest.fixture(scope="module")
def base() -> Base:
    return _random_base()


# Depth 6 D + 2 -> scales and shifts; from the table of the source, there as 1.12K ... 8.29K.
COUNTS = {14: 1_120, 32: 2_464, 56: 4_256, 110: 8_288}


@pytest.mark.parametrize("depth", COUNTS)
def test_parameters_are_counted_as_published(depth: int) -> None:
    blocks = (depth - 2) // 6
    base = load_base(_resnet(depth), size=32)
    patch = Norm().build(base)
    assert patch.num_parameters() == COUNTS[depth] == 2 * (112 + 224 * blocks)


def _resnet(depth: int) -> torch.nn.Module:
    from importlib.util import module_from_spec, spec_from_file_location

    specification = spec_from_file_location("cifar_resnet", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    example = module_from_spec(specification)
    specification.loader.exec_module(example)
    return example.random_resnet(depth).eval()


def test_the_random_network_has_projections_and_weights_of_the_given_variance(base: Base) -> None:
    weights = {name: p for name, p in base.module.named_parameters() if p.ndim >= 2}
    shortcuts = [weight for name, weight in weights.items() if "shortcut" in name]
    assert sum(weight.numel() for weight in shortcuts) == 16 * 32 + 32 * 64
    assert sum(p.numel() for p in base.module.linear.parameters()) == 650
    for weight in weights.values():
        scaled = weight * (weight[0].numel() / 2) ** 0.5
        assert scaled.std().item() == pytest.approx(1, abs=4 / weight.numel() ** 0.5)


def test_a_depth_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not 15"):
        _resnet(15)


def test_gains_start_uniform_and_shifts_at_zero(base: Base) -> None:
    parts = FROM_THE_SOURCE.build(base, seed=0).parts
    gains = torch.cat([part.weight.detach() for part in parts])
    assert gains.numel() == 560
    assert ((gains >= 0) & (gains < 1)).all()
    # The standard error of the mean of so many is 0.012.
    assert gains.mean().item() == pytest.approx(0.5, abs=0.05)
    assert all((part.bias == 0).all() for part in parts)
    assert all((part.running_mean == 0).all() and (part.running_var == 1).all() for part in parts)


def test_shifts_start_at_zero_on_a_base_that_has_others() -> None:
    base = _random_base()
    torch.nn.init.ones_(base.module.bn1.bias)
    assert (FROM_THE_SOURCE.build(base, seed=0).parts[0].bias == 0).all()
    assert (Norm(statistics="own").build(base, seed=0).parts[0].bias == 1).all()


def test_gains_depend_on_the_seed_alone(base: Base) -> None:
    torch.manual_seed(1)
    first = copied_state(FROM_THE_SOURCE.build(base, seed=3))
    torch.manual_seed(2)
    again, other = (FROM_THE_SOURCE.build(base, seed=seed).state_dict() for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["parts.0.weight"], other["parts.0.weight"])


def test_a_gain_that_is_not_known_is_refused() -> None:
    with pytest.raises(DeltapatchError, match="gain"):
        make_method("norm", {"gain": "normal"})


# --- seed and patch are the whole model -------------------------------------------------------------------

ANSWER_FROM_SEED_AND_PATCH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from deltapatch.loading import load_base
from deltapatch.patched import PatchedModel
torch.set_num_threads(1)
torch.manual_seed(12345)  # what the process drew before is of no account
folder = Path(sys.argv[1])
model = PatchedModel(load_base(sys.argv[2] + ":resnet14_random", size=32, crop_pct=1.0))
model.load_patch("task", folder / "patch.safetensors")
with torch.no_grad():
    logits = model(load_file(folder / "images.safetensors")["images"], patch="task")
save_file({"logits": logits}, folder / "logits.safetensors")
"""


@torch.no_grad()
def _logits(base: Base, images: Tensor, path: Path) -> Tensor:
    model = PatchedModel(base)
    model.load_patch("task", path)
    return model(images, patch="task")


def test_two_networks_of_one_seed_are_the_same_base(base: Base) -> None:
    torch.manual_seed(99)
    assert _random_base().fingerprint == base.fingerprint


def test_seed_and_patch_give_the_model_again_bit_for_bit_in_a_new_process(base: Base, tmp_path: Path) -> None:
    images = base.example(4)
    patch = disturb(FROM_THE_SOURCE.build(base, ("a", "b", "c"), seed=0))
    path = patch.save(tmp_path / "patch.safetensors")
    assert path.stat().st_size < 40_000
    save_file({"images": images}, tmp_path / "images.safetensors")
    subprocess.run(
        [sys.executable, "-c", ANSWER_FROM_SEED_AND_PATCH, str(tmp_path), str(EXAMPLE)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    assert torch.equal(found, _logits(base, images, path))
