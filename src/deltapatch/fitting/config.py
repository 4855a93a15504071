"""How a patch is fitted: one frozen value, stored in checkpoints so that a resumed fit is the same fit."""

from dataclasses import dataclass
from typing import Literal

from ..errors import DeltapatchError


@dataclass(frozen=True)
class FitConfig:
    """Options of a fit.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest of the one-cycle schedule; None leaves it to the method.
        weight_decay: of AdamW, on weight matrices and convolutions; not on biases and norms.
        label_smoothing: of the cross entropy.
        balance: weigh classes by the inverse of their counts.
        patience: stop after so many epochs without a better validation figure; None never stops early.
        start_from_head: fit a head on the frozen features first and start the patch from it.
        train_head: whether the head trains with the rest; otherwise it stays as it starts.
        augment: changes of training images: "flip" mirrors, "crop" cuts out, "standard" does both.
        views: how many fixed versions of each training image an augmentation has, of which each epoch draws
            one. The first is always the plain image. None is 2 for "flip"; crops are then drawn anew in every
            epoch, which rules out the cache.
        feature_noise: standard deviation of noise on the trunk's activations while training, relative to
            theirs; an augmentation that costs nothing.
        cache: whether trunk activations are kept on disk, so that each image and view runs through the trunk
            once, in this fit and in later ones. "auto" does where it saves time and the disk has room.
        cache_dtype: how they are kept: "bf16", "fp32" (exact), or "int8".
        precision: "bf16" computes in mixed precision; "auto" does where the device has it and the base's
            features stay within 2 %.
        compile: run the tail through `torch.compile`.
        on_bad: whether an image that cannot be read is skipped and counted, or ends the fit.
        validation: share of the training images that is held out where the data has no validation split.
        seed: of everything random, from 0 to 2**32 - 1.
        workers: processes that decode images.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 1e-2
    label_smoothing: float = 0.0
    balance: bool = False
    patience: int | None = 10
    start_from_head: bool = True
    train_head: bool = True
    augment: Literal["none", "flip", "crop", "standard"] = "none"
    views: int | None = None
    feature_noise: float = 0.0
    cache: Literal["auto", "on", "off"] = "auto"
    cache_dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    on_bad: Literal["skip", "fail"] = "skip"
    validation: float = 0.2
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "epochs": self.epochs >= 1,
            "batch_size": self.batch_size >= 1,
            "learning_rate": self.learning_rate is None or 0 < self.learning_rate < float("inf"),
            "weight_decay": 0 <= self.weight_decay < float("inf"),
            "label_smoothing": 0 <= self.label_smoothing < 1,
            "patience": self.patience is None or self.patience >= 1,
            "views": self.views is None or 1 <= self.views <= self._most_views(),
            "feature_noise": 0 <= self.feature_noise < float("inf"),
            "validation": 0 < self.validation < 1,
            "seed": 0 <= self.seed < 2**32,
            "workers": self.workers >= 0,
        }
        wrong = next((field for field, holds in allowed.items() if not holds), None)
        if wrong is not None:
            raise DeltapatchError(f"{wrong} cannot be {getattr(self, wrong)}")

    @property
    def fixed_views(self) -> int | None:
        """How many versions of a training image there are; None if every epoch makes new ones."""
        return {"none": 1, "flip": 2}.get(self.augment) if self.views is None else self.views

    def _most_views(self) -> int:
        return {"none": 1, "flip": 2}.get(self.augment, 1000)
