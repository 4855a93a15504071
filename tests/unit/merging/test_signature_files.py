"""Quantised signatures: levels, forms, how far values are off, and what files hold."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from deltapatch.merging import MergeError, open_signature, save_signature, signature_size
from deltapatch.merging.signature_files import Form, Quantiser


def through(values: torch.Tensor, levels: int, form: Form = "linear") -> torch.Tensor:
    quantiser = Quantiser.of(values, levels, form)
    return quantiser.decode(quantiser.encode(values))


def test_halves_are_rounded_to_even() -> None:
    """(0, 1, 2, 4) with 3 levels -> (0, 0, 2, 4)."""
    assert through(torch.tensor([0.0, 1, 2, 4]), 3).tolist() == [0, 0, 2, 4]


def test_logarithms_keep_signs_and_zero() -> None:
    """Five levels are two magnitudes of each sign, here 1 and 16, and zero; log 3 is nearer to log 1."""
    values = torch.tensor([1.0, -1, 0, 16, -16, 3, -5])
    assert through(values, 5, "log2").tolist() == [1, -1, 0, 16, -16, 1, -16]


def test_tanh_divides_the_hyperbolic_tangent_evenly() -> None:
    values = torch.tensor([-1.0, 0, 1, 0.5], dtype=torch.float64)
    middle = float(torch.atanh(torch.tensor(0.5).double() * torch.tanh(torch.tensor(1.0).double())))
    torch.testing.assert_close(through(values, 5, "tanh").double(), torch.tensor([-1, 0, 1, middle]).double())
    assert torch.isfinite(through(torch.tensor([-80.0, 1, 90]), 7, "tanh")).all()


@settings(max_examples=60, deadline=None)
@given(
    levels=st.integers(3, 256),
    form=st.sampled_from(["linear", "log2", "tanh"]),
    seed=st.integers(0, 1000),
    size=st.integers(0, 80),
)
def test_there_are_no_more_values_than_levels_and_quantising_again_changes_nothing(
    levels: int, form: Form, seed: int, size: int
) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    found = through(values, levels, form)
    assert len(found.unique()) <= levels
    torch.testing.assert_close(through(found, levels, form), found, rtol=1e-5, atol=1e-6)
    if form == "linear" and size:
        step = float(values.max() - values.min()) / (levels - 1)
        assert float((found - values).abs().max()) <= step / 2 + 1e-6


@pytest.mark.parametrize("form", ["linear", "log2", "tanh"])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
def test_a_constant_stays(value: float, form: Form) -> None:
    values = torch.full((2, 3), value)
    torch.testing.assert_close(through(values, 16, form), values)


@pytest.mark.parametrize(
    ("levels", "form", "message"),
    [(1, "linear", "2 to 256"), (257, "linear", "2 to 256"), (2, "log2", "3 to 256"), (8, "cube", "linear")],
)
def test_levels_and_forms_that_cannot_be_had_are_refused(levels: int, form: str, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        Quantiser.of(torch.randn(3), levels, form)  # pyright: ignore


@pytest.mark.parametrize("levels", [None, 16, 256])
def test_a_file_gives_back_the_values_in_any_parts(tmp_path: Path, levels: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    signature = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bias": torch.randn(4, generator=generator),
        "scalar": torch.tensor(0.25),
        "none": torch.empty(0, 2),
    }
    source = open_signature(save_signature(signature, tmp_path / "fog.safetensors", levels=levels))
    for name, values in signature.items():
        expected = values if levels is None else through(values, levels)
        assert torch.equal(source.whole(name), expected)
        assert torch.equal(source.read(name, 1, 3), expected.reshape(-1)[1:3])
        assert not source.specs[name].elements or source.specs[name].is_floating


def test_a_quantised_file_has_a_byte_for_each_entry(tmp_path: Path) -> None:
    signature = {"w": torch.randn(100, 1000)}
    path = save_signature(signature, tmp_path / "fog.safetensors", levels=16)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("w").dtype == torch.uint8
        assert file.get_tensor("w").max() == 15
    size = signature_size(path, {"w": torch.randn(100, 1000), "deep": torch.randn(300, 1000)})
    assert size.model == 1_600_000
    assert 100_000 < size.file == path.stat().st_size < 100_500
    assert size.times_smaller == pytest.approx(16, rel=0.01)


def test_what_is_no_signature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="'w' holds NaN"):
        save_signature({"w": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    with pytest.raises(MergeError, match="no such file"):
        signature_size(tmp_path / "a.safetensors", {})
    damaged = tmp_path / "b.safetensors"
    save_file({"w": torch.zeros(3, dtype=torch.uint8)}, damaged, {"deltapatch_signature": '{"levels": 4}'})
    with pytest.raises(MergeError, match="ranges cannot be read"):
        open_signature(damaged)
