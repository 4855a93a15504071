"""Channels of a network that can only be changed together, and the tensors that hold them."""

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["makes", "scales", "takes"]


@dataclass(frozen=True)
class Use:
    """How one tensor of one layer holds the channels of a group.

    Attributes:
        layer: the layer's path.
        tensor: its name in the layer.
        axis: where the channels are.
        role: whether the tensor makes the channels, scales them one by one, or takes them as input.
        repeat: how many entries in a row belong to each channel, as behind a flattening.
    """

    layer: str
    tensor: str
    axis: int
    role: Role
    repeat: int = 1


@dataclass(eq=False)
class ChannelGroup:
    """Channels that can only be changed together.

    Attributes:
        channels: how many.
        uses: every tensor that holds them.
        kept_for: why they have to stay as they are; empty where they need not.
    """

    channels: int
    uses: list[Use] = field(default_factory=list)
    kept_for: str = ""
    _tied_to: "ChannelGroup | None" = None

    @property
    def makers(self) -> tuple[str, ...]:
        """Paths of the layers that make the channels."""
        return tuple(dict.fromkeys(use.layer for use in self.uses if use.role == "makes"))

    def found(self) -> "ChannelGroup":
        """The group that this one has become a part of."""
        group = self
        while group._tied_to is not None:
            group = group._tied_to
        return group

    def tie(self, other: "ChannelGroup") -> None:
        """Makes one group of both."""
        first, second = self.found(), other.found()
        if first is not second:
            first.uses += second.uses
            first.kept_for = first.kept_for or second.kept_for
            second._tied_to = first


@dataclass(frozen=True)
class Channels:
    """Where a value of the network has its channels: ``repeat`` entries for each along an axis."""

    group: ChannelGroup
    axis: int
    repeat: int = 1
