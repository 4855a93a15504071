"""Small patches, good and bad, for the tests of patch files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltapatch.errors import PatchFileError
from deltapatch.file import read_patch_file
from deltapatch.info import BaseReference, MethodReference, PatchInfo, info_to_json
from deltapatch.preprocessing import Preprocessing

INFO = PatchInfo(
    task="classification",
    method=MethodReference(name="delta", config={"modules": 1}),
    base=BaseReference(name="resnet50", fingerprint="sha256:" + "0" * 64, source="timm/resnet50.a1_in1k"),
    classes=("zebra", "ant"),
    preprocessing=Preprocessing(input_size=(3, 224, 224), mean=(0.1, 0.2, 0.3), interpolation="bilinear"),
    figures={"test_accuracy": 0.75},
    versions={"torch": "2.6.0"},
    created="2025-01-31T12:00:00+00:00",
)
TENSORS = {"gain": torch.tensor([0.0, -0.0, 1.5]), "steps": torch.tensor(7), "head": torch.ones(2, 3)}
OTHER = {"gain": torch.tensor([9.0])}

Document = dict[str, Any]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape)
        assert (
            tensor.reshape(-1).view(torch.uint8).tolist()
            == right[name].reshape(-1).view(torch.uint8).tolist()
        )


def metadata() -> dict[str, str]:
    return {"format": "pt", "deltapatch": info_to_json(INFO).decode()}


def pack(header: Document | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps({"__metadata__": metadata()} | header).encode()
    return len(text).to_bytes(8, "little") + text + data


def stored(dtype: str, shape: list[int], start: int, end: int) -> Document:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(PatchFileError) as caught:
        read_patch_file(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
