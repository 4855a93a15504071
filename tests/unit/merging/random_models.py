"""Small state dicts to merge, with a scalar, an empty tensor, norm statistics and a counter among them."""

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from deltapatch.merging import RunOptions

SHAPES: dict[str, tuple[int, ...]] = {
    "stem.weight": (5, 3, 2, 2),
    "stem.bias": (5,),
    "norm.weight": (5,),
    "norm.running_mean": (5,),
    "norm.running_var": (5,),
    "temperature": (),
    "nothing": (0, 4),
    "body.weight": (7, 5),
}
STATISTICS = ("norm.running_mean", "norm.running_var")


def random_model(
    seed: int, dtype: torch.dtype = torch.float32, among: int | None = None
) -> dict[str, Tensor]:
    """Normal values, or whole ones below ``among`` in magnitude; variances above 0."""
    generator = torch.Generator().manual_seed(seed)
    model: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        if name.endswith("running_var"):
            values = torch.rand(shape, generator=generator) + 0.5
        elif among is None:
            values = torch.randn(shape, generator=generator)
        else:
            values = torch.randint(1 - among, among, shape, generator=generator)
        model[name] = values.to(dtype)
    model["norm.num_batches_tracked"] = torch.tensor(7)
    return model


def weights(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model without norm statistics and the counter."""
    return {
        name: tensor for name, tensor in model.items() if not name.startswith("norm.") or "weight" in name
    }


def equal(first: Any, second: Any) -> bool:
    """Whether two state dicts are the same to the last bit."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def assert_close(first: Any, second: Any) -> None:
    """Two state dicts are the same but for roundings."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


ways_to_run = st.builds(
    RunOptions,
    chunk_elements=st.sampled_from([3, 7, 16, 60, 1000]),
    threads=st.integers(1, 3),
)
