"""Signatures added to a model: linear in their scales, only where they have tensors, from files too."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions

GENERATOR = torch.Generator().manual_seed(0)
TARGET = {
    "conv": torch.randn(3, 2, 3, 3, generator=GENERATOR),
    "deep": torch.randn(4, 4, generator=GENERATOR),
    "scalar": torch.tensor(2.0),
    "none": torch.empty(0, 3),
    "count": torch.tensor(7),
}
FOG = {"conv": torch.randn(3, 2, 3, 3, generator=GENERATOR), "scalar": torch.tensor(-1.0)}
NOISE = {"conv": torch.randn(3, 2, 3, 3, generator=GENERATOR), "none": torch.empty(0, 3)}


def test_the_scale_counts_once() -> None:
    """u = (1, 0), w = (2, 3): at 0.5 the second entry moves by 1.5, not by 0.75."""
    pretrained, clean, robust = (
        {"w": torch.tensor(values)} for values in ([0.0, 0.0], [1.0, 0.0], [2.0, 3.0])
    )
    signature = merging.extract_signature(clean, robust, pretrained)
    for scale in (0.0, 0.5, 1.0, -1.0):
        merged = merging.weight_signature([clean], signatures=[signature], scale=scale)
        assert merged["w"].tolist() == [1.0, 3 * scale]


def test_several_are_summed_with_their_scales_and_other_tensors_stay() -> None:
    merged = merging.weight_signature([TARGET], signatures=[FOG, NOISE], scale=(0.5, -2))
    torch.testing.assert_close(merged["conv"], TARGET["conv"] + 0.5 * FOG["conv"] - 2 * NOISE["conv"])
    assert merged["scalar"] == 1.5
    assert torch.equal(merged["deep"], TARGET["deep"])
    assert merged["count"] == 7
    swapped = merging.weight_signature([TARGET], signatures=[NOISE, FOG], scale=(-2, 0.5))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, swapped[name])


def test_scale_zero_and_no_signature_change_no_bit() -> None:
    target = {**TARGET, "deep": torch.tensor([-0.0, 1.0])}
    for merged in (
        merging.weight_signature([target], signatures=[FOG], scale=0),
        merging.weight_signature([target], signatures=[]),
    ):
        assert all(torch.equal(merged[name], tensor) for name, tensor in target.items())
        assert torch.equal(merged["deep"].view(torch.int32), target["deep"].view(torch.int32))


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 60), threads=st.integers(1, 3))
def test_parts_and_threads_change_no_bit(length: int, threads: int) -> None:
    run = RunOptions(chunk_elements=length, threads=threads)
    whole = merging.weight_signature([TARGET], signatures=[FOG, NOISE], scale=0.7)
    parted = merging.weight_signature([TARGET], signatures=[FOG, NOISE], scale=0.7, run=run)
    assert all(torch.equal(whole[name], parted[name]) for name in TARGET)


@pytest.mark.parametrize("levels", [None, 32])
def test_files_are_merged_and_their_recipe_repeats_it(tmp_path: Path, levels: int | None) -> None:
    save_file(TARGET, tmp_path / "target.safetensors")
    fog = merging.save_signature(FOG, tmp_path / "fog.safetensors", levels=levels)
    out = tmp_path / "foggy.safetensors"
    merging.weight_signature([tmp_path / "target.safetensors"], signatures=[fog], scale=0.5, out=out)
    opened = merging.open_signature(fog)
    values = {name: opened.whole(name) for name in FOG}
    expected = merging.weight_signature([TARGET], signatures=[values], scale=0.5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())
    recipe = merging.Recipe.read(out)
    assert recipe.options == {"signatures": [str(fog)], "scale": 0.5}
    again = merging.merge(recipe.how, recipe.models, None, tmp_path / "again.safetensors")
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("signatures", "scale", "message"),
    [
        ([{"fc": torch.zeros(2)}], 1.0, "signature 1 has a tensor 'fc'"),
        ([FOG, {"deep": torch.zeros(2)}], 1.0, r"'deep' has shape \(2,\) .* signature 2"),
        ([{"deep": torch.zeros(4, 4, dtype=torch.int64)}], 1.0, "is torch.int64"),
        ([{"count": torch.tensor(1.0)}], 1.0, "'count'"),
        ([FOG], (1.0, 2.0), "2 scales were given for 1 signatures"),
        ([{"scalar": torch.tensor(float("inf"))}], 1.0, "'scalar' holds NaN or infinite"),
    ],
)
def test_signatures_that_do_not_fit_are_refused(
    signatures: list[dict[str, Tensor]], scale: float | tuple[float, ...], message: str
) -> None:
    with pytest.raises(MergeError, match=message):
        merging.weight_signature([TARGET], signatures=signatures, scale=scale)


def test_there_is_one_model() -> None:
    with pytest.raises(MergeError, match="2 were given"):
        merging.weight_signature([TARGET, TARGET], signatures=[FOG])
