"""A patch acts wherever the base's modules are called: in a detector's backbone and in a segmentation
network.
"""

from dataclasses import dataclass

import pytest
import torch
from families import SIZE
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.segmentation import deeplabv3_resnet50
from toys import copied_state, disturb, enliven, same_state

from deltapatch.base import Base
from deltapatch.loading import load_base
from deltapatch.method import Method
from deltapatch.patch import Patch
from deltapatch.patched import PatchedModel


@dataclass(frozen=True)
class Outer:
    """A network around a base, made for a batch of images, and how its own heads are trained."""

    network: nn.Module
    base: Base
    images: Tensor

    @torch.no_grad()
    def answers(self) -> list[Tensor]:
        """All tensors that the network answers with in eval mode."""
        self.network.eval()
        output = self.network(list(self.images) if self.is_detector else self.images)
        return (
            [tensor for part in output for tensor in part.values()]
            if self.is_detector
            else list(output.values())
        )

    @property
    def is_detector(self) -> bool:
        return hasattr(self.network, "roi_heads")

    def loss(self) -> Tensor:
        """The network's own training loss in its present mode."""
        if self.is_detector:
            target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
            return sum(self.network(list(self.images), [target, target]).values())
        return self.network(self.images)["out"].square().mean()


def _detector() -> Outer:
    torch.manual_seed(0)
    network = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=SIZE, max_size=SIZE, box_score_thresh=0.0
    ).eval()
    body = network.backbone.body
    # Its frozen norms keep their ones and zeros: lively ones make random features overflow.
    return Outer(network, load_base(body, size=SIZE, name="detector body"), torch.rand(2, 3, SIZE, SIZE))


def _segmenter() -> Outer:
    torch.manual_seed(0)
    network = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    enliven(network.backbone)
    return Outer(network, load_base(network.backbone, size=SIZE), torch.rand(2, 3, SIZE, SIZE))


NETWORKS = {"fasterrcnn": _detector, "deeplabv3": _segmenter}


@pytest.fixture(scope="module", params=NETWORKS)
def outer(request: pytest.FixtureRequest) -> Outer:
    return NETWORKS[request.param]()


def _headless(outer: Outer, method: Method) -> tuple[PatchedModel, Patch]:
    patch = disturb(method.build(outer.base, seed=0))
    model = PatchedModel(outer.base)
    model.add_patch("task", patch)
    return model, patch


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_stages_are_found_in_a_body_that_returns_a_dict(outer: Outer) -> None:
    assert [len(stage.sub_blocks) for stage in outer.base.anatomy.stages] == [3, 4, 6, 3]
    assert outer.base.anatomy.head.path is None
    assert outer.base.anatomy.head.features == 2048


def test_a_patch_without_classes_changes_what_the_outer_network_sees(outer: Outer, method: Method) -> None:
    before = outer.answers()
    assert sum(tensor.numel() for tensor in before) > 0
    model, patch = _headless(outer, method)
    assert patch.head is None
    with model.active("task"):
        inside = outer.answers()
        assert _same(outer.answers(), inside)
    assert _same(before, inside) == (not patch.touches())
    assert _same(outer.answers(), before)


def test_the_features_inside_are_those_of_the_patched_body(outer: Outer, method: Method) -> None:
    model, _ = _headless(outer, method)
    with torch.no_grad():
        expected = list(model(outer.images, patch="task").values())
        with model.active("task"):
            found = list(outer.base.module(outer.images).values())
    assert _same(found, expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("trained_inside", [True, False])
def test_training_the_outer_heads_moves_nothing_of_the_base(
    network: str, method: Method, trained_inside: bool
) -> None:
    """The owner puts the whole network into train mode, before or inside the context, and steps its heads."""
    outer = NETWORKS[network]()
    model, _ = _headless(outer, method)
    before = copied_state(outer.base.module)
    of_base = {id(parameter) for parameter in outer.base.module.parameters()}
    heads = [parameter for parameter in outer.network.parameters() if id(parameter) not in of_base]
    moved = [parameter.detach().clone() for parameter in heads]
    optimizer = torch.optim.SGD(heads, lr=0.01)
    if not trained_inside:
        outer.network.train()
    with model.active("task"):
        if trained_inside:
            outer.network.train()
        assert not any(module.training for module in outer.base.module.modules())
        optimizer.zero_grad()
        outer.loss().backward()
        optimizer.step()
    assert same_state(outer.base.module, before)
    assert all(parameter.grad is None for parameter in outer.base.module.parameters())
    assert not all(map(torch.equal, heads, moved))
    assert outer.base.module.training != trained_inside
