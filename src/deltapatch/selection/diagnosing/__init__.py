"""What a fitted patch did to its base: how far weights moved by layer, and features by stage."""

from dataclasses import dataclass
from pathlib import Path

from ...base import Base
from ...data import ImageSet
from ...errors import DeltapatchError
from ...patch import Patch
from .drift import FeatureDrift, feature_drift
from .weights import WeightChanges, weight_changes


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        weights: what the patch did to the base's own tensors; None where it changes none.
        drift: what it did to activations; None where there were no images to look at.
    """

    weights: WeightChanges | None
    drift: FeatureDrift | None


def diagnose(
    base: Base,
    patch: Patch,
    images: ImageSet | None = None,
    *,
    random: Path | None = None,
    batch_size: int = 32,
    workers: int = 0,
) -> Diagnosis:
    """Looks at a patch's weights where it changes the base's, and at its features where there are images.

    Args:
        base: the base that the patch belongs to.
        patch: the patch; it is moved to the base's device.
        images: images without labels, at most a few hundred; needed for a patch that changes no weights.
        random: file of the weights that the base's pre-training began from; estimated where it is left out.
        batch_size: images in a forward pass.
        workers: processes that decode images.

    Raises:
        WrongBaseError: the patch belongs to another base.
        DeltapatchError: the patch changes no weights, and there are no images.
    """
    patch.check_base(base)
    patch.to(base.device)
    weights = weight_changes(base, patch, random)
    if images is None:
        if weights is None:
            raise DeltapatchError(
                f"a {patch.method.name} patch changes no weights of its base, so only its features can be"
                " looked at; give images with --data, labels are not needed"
            )
        return Diagnosis(weights, None)
    return Diagnosis(weights, feature_drift(base, patch, images, batch_size=batch_size, workers=workers))
