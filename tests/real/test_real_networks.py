"""The main promises on trained networks and real images."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from torch import Tensor
from toys import copied_state, same_state
from trained import NETWORKS, PATCHABLE

from deltapatch.base import Base, fingerprint
from deltapatch.data import evaluation_transform, load_batches, open_data
from deltapatch.errors import AnatomyError
from deltapatch.evaluation.answers import answer
from deltapatch.fitting.config import FitConfig
from deltapatch.fitting.fit import fit_task
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel

pytestmark = pytest.mark.real

# ImageNet classes that are a single species, and its name among the classes of the bird network.
SPECIES = {
    10: "Fringilla montifringilla",
    11: "Carduelis carduelis",
    12: "Haemorhous mexicanus",
    13: "Junco hyemalis",
    14: "Passerina cyanea",
    15: "Turdus migratorius",
    20: "Cinclus mexicanus",
    22: "Haliaeetus leucocephalus",
    24: "Strix nebulosa",
    131: "Egretta caerulea",
    132: "Ardea alba",
    133: "Botaurus lentiginosus",
    135: "Aramus guarauna",
    137: "Fulica americana",
    139: "Arenaria interpres",
    140: "Calidris alpina",
    141: "Tringa totanus",
}


@torch.no_grad()
def _logits(base: Base) -> Tensor:
    return base.module(base.example(2))


# --- what the networks can do by themselves ---------------------------------------------------------------


@torch.no_grad()
def _imagenet_answers(shared: Path, base: Base, indices: list[int]) -> Tensor:
    """The base's class for the sample image of each of these ImageNet classes, of shape (N,)."""
    transform = evaluation_transform(base.preprocessing)
    with ZipFile(shared / "data" / "imagenet1k_sample.zip") as archive:
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("labels.csv"), "utf-8")))
        files = [archive.open(rows[index]["file"]) for index in indices]
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    return torch.cat([base.module(part).argmax(1) for part in images.split(20)])


@pytest.mark.parametrize(
    ("name", "lowest", "highest"), [("mobilenet_v2", 0.65, 0.90), ("squeezenet1_1", 0.47, 0.74)]
)
def test_an_imagenet_network_is_as_good_as_is_stated_for_it(
    shared: Path, load_network: Any, name: str, lowest: float, highest: float
) -> None:
    indices = list(range(0, 1000, 20))
    answers = _imagenet_answers(shared, load_network(name, size=224), indices)
    assert lowest <= float((answers == torch.tensor(indices)).float().mean()) <= highest


def test_the_bird_network_names_birds(shared: Path, load_network: Any) -> None:
    base = load_network("birds", size=224)
    answers = _imagenet_answers(shared, base, list(SPECIES)).tolist()
    right = [
        base.classes[found].startswith(species)
        for found, species in zip(answers, SPECIES.values(), strict=True)
    ]
    assert len(base.classes) == 965
    assert sum(right) / len(right) >= 0.5


@pytest.mark.parametrize(
    ("name", "own", "lowest", "highest"),
    [
        ("resnet20", "cifar10", 0.89, 0.96),
        ("resnet56", "cifar10", 0.90, 0.97),
        ("cifar_vit", "cifar10", 0.68, 0.80),
        ("mnist_vit", "mnist", 0.95, 1.0),
    ],
)
def test_a_small_network_is_as_good_as_is_stated_for_it(
    shared: Path, load_network: Any, name: str, own: str, lowest: float, highest: float
) -> None:
    base = load_network(name)
    test = open_data(shared / "data" / f"{own}.npz").test
    assert test is not None
    images = test.subset(range(400)).with_transform(evaluation_transform(base.preprocessing))
    with torch.no_grad():
        right = [
            base.module(batch.images).argmax(1) == batch.labels
            for batch in load_batches(images, batch_size=100, shuffle=False)
        ]
    assert lowest <= float(torch.cat(right).float().mean()) <= highest


# --- where they can be patched ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_and_sub_blocks_are_found(load_network: Any, name: str) -> None:
    stages = load_network(name).anatomy.stages
    assert tuple(len(stage.sub_blocks) for stage in stages) == NETWORKS[name].sub_blocks


def test_delta_refuses_a_network_without_residual_stages(load_network: Any) -> None:
    with pytest.raises(AnatomyError, match="no stage was found in this base"):
        Delta().build(load_network("squeezenet1_1"), ("yes", "no"))


@pytest.mark.parametrize("name", PATCHABLE)
def test_a_zero_gain_patch_begins_bit_for_bit_at_the_bases_features(load_network: Any, name: str) -> None:
    base = load_network(name)
    head_only = Head().build(base, ("a", "b", "c"), seed=0)
    patch = Delta(start="zero-gain").build(base, ("a", "b", "c"), seed=1)
    assert patch.head is not None
    assert head_only.head is not None
    patch.head.load_state_dict(head_only.head.state_dict())
    model = PatchedModel(base)
    model.add_patch("head", head_only)
    model.add_patch("delta", patch)
    with torch.no_grad():
        assert torch.equal(model(base.example(4), patch="delta"), model(base.example(4), patch="head"))


# --- what a fit on real images does -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fit_moves_the_patch_and_no_bit_of_the_base_and_its_file_is_the_patch(
    load_network: Any, open_small: Any, tmp_path: Path, name: str
) -> None:
    # Without validation images the last epoch is kept, so the patch has moved in any case.
    base, task = load_network(name), replace(open_small(NETWORKS[name].task), val=None)
    before, logits = fingerprint(base.module), _logits(base)
    method = Delta(modules=1) if name in PATCHABLE else Head()
    result = fit_task(base, task, method, FitConfig(epochs=2), progress=False)
    assert fingerprint(base.module) == before
    assert torch.equal(_logits(base), logits)
    fresh = method.build(base, task.classes, seed=0)
    assert same_state(result.patch.parts, copied_state(fresh.parts)) == (name not in PATCHABLE)
    assert not same_state(result.patch, copied_state(fresh))

    loaded = Patch.load(result.patch.save(tmp_path / "patch.safetensors"))
    assert same_state(loaded, copied_state(result.patch))
    here, there = (answer(base, task.test, patch).probabilities for patch in (result.patch, loaded))
    assert (here == there).all()
