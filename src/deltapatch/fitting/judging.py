"""How good a patch is on labelled images, run through the whole base."""

import torch
from torch.nn.functional import cross_entropy

from ..acting import touches_of
from ..base import Base
from ..data import ImageSet, evaluation_transform, load_batches
from ..errors import DeltapatchError
from ..patch import Patch
from ..touching import touched
from ..trees import tensors_in
from .loop import Scored


@torch.no_grad()
def score(base: Base, patch: Patch, images: ImageSet, batch_size: int = 64, headless: bool = False) -> Scored:
    """Mean loss and share of right answers over the images that can be read.

    Args:
        base: the patch's base.
        patch: in eval mode.
        images: labelled.
        batch_size: images at once.
        headless: whether the base's own classifier answers, on what the patch makes of the images.

    Raises:
        DeltapatchError: no image could be read, or a label is not among the outputs.
    """
    touches = touches_of(base, patch, headless)
    prepared = images.with_transform(evaluation_transform(base.preprocessing))
    loss = right = 0.0
    count = 0
    for batch in load_batches(prepared, batch_size=batch_size, shuffle=False):
        if not len(batch.labels):
            continue
        with base.freezer.frozen(), touched(touches, instead_of=base.module):
            logits = tensors_in(base.module(batch.images.to(base.device, base.dtype)))[-1].float()
        labels = batch.labels.to(logits.device)
        if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise DeltapatchError(
                f"label {int(labels.max())} is not one of the {logits.shape[1]} outputs; label the images by"
                " the numbers of the outputs, from 0"
            )
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    if not count:
        raise DeltapatchError("none of the images can be read, so there is nothing to judge a patch on")
    return Scored(loss / count, right / count)
