"""Rows give back what was put into them: bit by bit, or within a bound that can be computed."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltapatch.errors import DeltapatchError
from deltapatch.fitting.cache_rows import RowLayout


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _round_trip(activations: list[Tensor], features: Tensor, stored_as: str) -> tuple[list[Tensor], Tensor]:
    layout = RowLayout.of(activations, features, stored_as)
    rows = layout.encode(activations, features)
    assert (rows.dtype, rows.shape) == (np.uint8, (len(features), layout.stride))
    return layout.decode(rows)


def _assert_identical(found: Tensor, expected: Tensor) -> None:
    """Also where a value is NaN, which equals nothing."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(_bytes(found), _bytes(expected))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("stored_as", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_activations_come_back_bit_by_bit_in_the_type_they_are_stored_as(
    stored_as: str, dtype: torch.dtype, given: torch.dtype
) -> None:
    activations = [_noise(5, 3, 4, 4).to(given), _noise(5, 7, seed=1).to(given)]
    found, features = _round_trip(activations, _noise(5, 6, seed=2), stored_as)
    for tensor, expected in zip(found, activations, strict=True):
        _assert_identical(tensor, expected.to(dtype))
    _assert_identical(features, _noise(5, 6, seed=2))


def test_values_that_are_no_numbers_keep_their_bits() -> None:
    odd = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-42]])
    found, features = _round_trip([odd], odd, "fp32")
    _assert_identical(found[0], odd)
    _assert_identical(features, odd)


def test_int8_is_off_by_half_a_scale_at_most_and_reaches_its_ends() -> None:
    images = _noise(6, 4, 5, 5) * torch.logspace(-20, 20, 6).reshape(6, 1, 1, 1)
    (found,), features = _round_trip([images], _noise(6, 2), "int8")
    largest = images.abs().amax(dim=(1, 2, 3), keepdim=True)
    scales = largest / 127
    # The sum of the roundings of x / s, of s itself and of the product, each 2**-24 of at most 127 s.
    assert ((found - images).abs() <= scales * (0.5 + 127 * 3 * 2**-24)).all()
    assert torch.allclose(found.abs().amax(dim=(1, 2, 3), keepdim=True), largest, rtol=1e-6)
    _assert_identical(features, _noise(6, 2))


def test_int8_gives_each_image_and_each_tensor_a_scale_of_its_own() -> None:
    small, large = torch.full((1, 3), 1e-3), torch.full((1, 3), 1e3)
    (first, second), _ = _round_trip(
        [torch.cat([small, large]), torch.cat([large, small])], _noise(2, 1), "int8"
    )
    assert torch.allclose(first, torch.cat([small, large]), rtol=1e-6)
    assert torch.allclose(second, torch.cat([large, small]), rtol=1e-6)


def test_int8_keeps_zeros() -> None:
    (found,), _ = _round_trip([torch.zeros(2, 3)], _noise(2, 1), "int8")
    assert torch.equal(found, torch.zeros(2, 3))


def test_int8_does_not_turn_the_sign_of_values_whose_scale_is_hardly_a_number() -> None:
    # max|x| / 127 is 1.496 times the smallest fp32 number, and is rounded to 1 times.
    smallest = 2.0**-149
    (found,), _ = _round_trip([torch.tensor([[190 * smallest, -190 * smallest]])], _noise(1, 1), "int8")
    assert torch.equal(found, torch.tensor([[127 * smallest, -127 * smallest]]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_int8_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(DeltapatchError, match=r"NaN or infinite activations.*keep them as bf16 or fp32"):
        _round_trip([torch.tensor([[1.0, value]])], _noise(1, 1), "int8")


@pytest.mark.parametrize("stored_as", ["fp32", "bf16", "int8"])
def test_other_types_are_stored_as_they_are(stored_as: str) -> None:
    activations = [
        torch.tensor([[True, False], [False, False]]),
        torch.tensor([2**60, -1]),
        torch.tensor([[200], [3]], dtype=torch.uint8),
        torch.zeros(2, 0, 3),
    ]
    found, _ = _round_trip(activations, _noise(2, 3), stored_as)
    for tensor, expected in zip(found[:3], activations[:3], strict=True):
        _assert_identical(tensor, expected)
    assert found[3].shape == (2, 0, 3)


def test_features_alone_make_rows() -> None:
    activations, features = _round_trip([], _noise(4, 10), "bf16")
    assert activations == []
    _assert_identical(features, _noise(4, 10))


def test_no_images_make_no_rows() -> None:
    (found,), features = _round_trip([torch.zeros(0, 2, 3)], torch.zeros(0, 5), "int8")
    assert (found.shape, features.shape) == ((0, 2, 3), (0, 5))


def test_a_memory_layout_or_gradient_of_its_own_does_not_change_the_row() -> None:
    images, features = _noise(2, 3, 4, 4), _noise(2, 5)
    layout = RowLayout.of([images], features, "bf16")
    expected = layout.encode([images], features)
    for given_images in (images.to(memory_format=torch.channels_last), images.clone().requires_grad_()):
        assert np.array_equal(layout.encode([given_images], features), expected)


def test_some_of_the_rows_are_decoded_in_the_order_asked_for() -> None:
    images, features = _noise(5, 3), _noise(5, 2)
    layout = RowLayout.of([images], features, "fp32")
    (found,), chosen = layout.decode(layout.encode([images], features), np.array([4, 0, 4]))
    assert torch.equal(found, images[[4, 0, 4]])
    assert torch.equal(chosen, features[[4, 0, 4]])
    assert found.is_contiguous()


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), max_size=3),
    features=st.integers(1, 40),
    images=st.integers(1, 3),
    stored_as=st.sampled_from(["bf16", "fp32", "int8"]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_stride_is_the_sum_of_the_parts_each_filled_up_to_64_bytes(
    shapes: list[tuple[int, ...]], features: int, images: int, stored_as: str
) -> None:
    activations = [_noise(images, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    layout = RowLayout.of(activations, torch.zeros(images, features), stored_as)
    bytes_each = {"bf16": 2, "fp32": 4, "int8": 1}[stored_as]
    scale = 4 if stored_as == "int8" else 0
    parts = [int(np.prod(shape)) * bytes_each + scale for shape in shapes] + [4 * features]
    assert layout.stride == sum(-(-part // 64) * 64 for part in parts)
    found, _ = _round_trip(activations, torch.zeros(images, features), stored_as)
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in activations]
    assert all(
        torch.allclose(a.float(), b, atol=4 / 127, rtol=2**-8)
        for a, b in zip(found, activations, strict=True)
    )


def test_the_description_is_plain_values_and_differs_where_the_layout_does() -> None:
    layouts = [
        RowLayout(((2, 3),), (torch.float32,), 5, "bf16"),
        RowLayout(((3, 2),), (torch.float32,), 5, "bf16"),
        RowLayout(((2, 3),), (torch.float16,), 5, "bf16"),
        RowLayout(((2, 3),), (torch.float32,), 6, "bf16"),
        RowLayout(((2, 3),), (torch.float32,), 5, "int8"),
    ]
    texts = [json.dumps(layout.description) for layout in layouts]
    assert len(set(texts)) == len(layouts)
    assert all(json.loads(text) == layout.description for text, layout in zip(texts, layouts, strict=True))


@pytest.mark.parametrize(
    ("activations", "features", "message"),
    [
        ([torch.zeros(2, 4)], torch.zeros(2, 5), r"\(4,\) float32 do not fit into rows of \(3,\) float32"),
        ([torch.zeros(2, 3).half()], torch.zeros(2, 5), r"\(3,\) float16 do not fit"),
        ([], torch.zeros(2, 5), "activations none do not fit"),
        ([torch.zeros(2, 3)], torch.zeros(2, 4), r"features of shape \(2, 4\) .* rows of 5 features"),
        ([torch.zeros(2, 3)], torch.zeros(3, 5), "tensors of 2 and of 3 images"),
    ],
)
def test_tensors_of_another_layout_are_refused(
    activations: list[Tensor], features: Tensor, message: str
) -> None:
    layout = RowLayout(((3,),), (torch.float32,), 5, "fp32")
    with pytest.raises(DeltapatchError, match=message):
        layout.encode(activations, features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((((3,),), (), 5, "fp32"), "1 shapes and 0 dtypes"),
        (((), (), 0, "fp32"), "holds nothing"),
        (((), (), 5, "fp8"), "stored_as is 'fp8'; choose one of bf16, fp32, int8"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(DeltapatchError, match=message):
        RowLayout(*arguments)
