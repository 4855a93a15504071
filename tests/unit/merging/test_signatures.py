"""Weight signatures: their closed form, of which tensors they are taken, taking them off to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deltapatch.merging import (
    MergeError,
    extract_signature,
    put_on_signatures,
    shallow_tensors,
    take_off_signatures,
)


def vector(*values: float) -> dict[str, Tensor]:
    return {"w": torch.tensor(values, dtype=torch.float32)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()),
        nn.Conv2d(4, 6, 3),
        nn.Linear(6, 5),
    )


def moved(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def test_the_signature_is_the_part_that_is_orthogonal_to_clean_training() -> None:
    """u = (1, 0), w = (2, 3) -> (0, 3)."""
    assert extract_signature(vector(1, 0), vector(2, 3), vector(0, 0))["w"].tolist() == [0, 3]


def test_every_tensor_is_projected_alone() -> None:
    state = network().state_dict()
    clean, robust = moved(state, 1), moved(state, 2)
    signature = extract_signature(clean, robust, state)
    for name in ("0.weight", "0.bias", "2.0.weight", "4.weight"):
        u, w = (clean[name] - state[name]).flatten(), (robust[name] - state[name]).flatten()
        assert float(signature[name].flatten() @ u) == pytest.approx(0, abs=1e-4)
        torch.testing.assert_close(signature[name].flatten(), w - u * (w @ u) / (u @ u))


def test_without_clean_training_the_signature_is_all_that_was_learned() -> None:
    assert extract_signature(vector(0, 0), vector(2, 3), vector(0, 0))["w"].tolist() == [2, 3]


def test_batch_norms_take_the_robust_models_values_and_their_statistics_have_no_signature() -> None:
    state = network().state_dict()
    clean, robust, other = moved(state, 1), moved(state, 2), moved(state, 3)
    signatures = [extract_signature(clean, one, state) for one in (robust, other)]
    worn, _ = put_on_signatures(clean, signatures, 0.5)
    for name in ("1.weight", "1.bias"):
        torch.testing.assert_close(worn[name], (robust[name] + other[name]) / 2)
    assert not {"1.running_mean", "1.running_var", "1.num_batches_tracked"} & {*signatures[0], *worn}


def test_the_first_layers_come_with_the_norms_between_them() -> None:
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert shallow_tensors(network(), 1) == tuple(names)
    assert shallow_tensors(network(), 2) == (*names, "2.0.weight")
    with pytest.raises(MergeError, match="the network has 4 "):
        shallow_tensors(network(), 5)


def test_only_the_chosen_tensors_are_compared() -> None:
    """Heads of other shapes do not matter where they are not asked for."""
    state = network().state_dict()
    robust = {**moved(state, 2), "4.weight": torch.zeros(9, 6)}
    signature = extract_signature(moved(state, 1), robust, state, tensors=shallow_tensors(network(), 2))
    assert list(signature) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.0.weight"]
    assert list(extract_signature(state, robust, state, tensors=("2.*", "*.bias"))) == [
        "0.bias",
        "1.bias",
        "2.0.weight",
        "3.bias",
        "4.bias",
    ]
    with pytest.raises(MergeError, match=r"no floating tensor 'conv\.\*'"):
        extract_signature(state, robust, state, tensors=("conv.*",))
    with pytest.raises(MergeError, match=r"4\.weight"):
        extract_signature(state, robust, state)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    exponent=st.integers(-12, 12),
    scale=st.floats(-2, 2),
    seed=st.integers(0, 1000),
)
def test_taking_off_restores_every_bit(dtype: torch.dtype, exponent: int, scale: float, seed: int) -> None:
    """Also where the signature is far larger than the weights, whose low digits the sum then loses."""
    generator = torch.Generator().manual_seed(seed)
    target = {"w": torch.randn(50, generator=generator).to(dtype), "scalar": torch.tensor(-0.0, dtype=dtype)}
    before = {name: tensor.clone() for name, tensor in target.items()}
    signatures = [{"w": torch.randn(50, generator=generator) * 2.0**exponent}, {"w": torch.ones(50)}]
    worn, stored = put_on_signatures(target, signatures, scale)
    again = take_off_signatures({**target, **worn}, stored)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for name, tensor in again.items():
        assert torch.equal(tensor.view(bits), before[name].view(bits))
    assert all(torch.equal(target[name].view(bits), before[name].view(bits)) for name in before)


def test_subtracting_what_was_added_does_not_restore_every_bit() -> None:
    """So that the test above is worth something."""
    w, s = torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.full((1000,), 3.3)
    assert not torch.equal(w + s - s, w)


def test_a_module_wears_a_signature_and_takes_it_off() -> None:
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    signature = extract_signature(
        moved(before, 1), moved(before, 2), before, tensors=shallow_tensors(module, 1)
    )
    worn, stored = put_on_signatures(module, [signature])
    module.load_state_dict(worn, strict=False)
    torch.testing.assert_close(module[0].weight, before["0.weight"] + signature["0.weight"])
    module.load_state_dict(take_off_signatures(module, stored), strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_what_was_stored_of_another_model_is_refused() -> None:
    _, stored = put_on_signatures(vector(1, 2), [vector(3, 4)])
    with pytest.raises(MergeError, match="no tensor 'w' of shape"):
        take_off_signatures(vector(1, 2, 3), stored)
    with pytest.raises(MergeError, match=r"torch\.float64"):
        take_off_signatures({"w": torch.zeros(2, dtype=torch.float64)}, stored)
