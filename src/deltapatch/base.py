"""The frozen model that patches are learned for: the module, its preprocessing, its classes, its
fingerprint.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, example_batch, read_anatomy
from .errors import AnatomyError
from .preprocessing import Preprocessing
from .touching import Freezer
from .verification import verify_anatomy


def fingerprint(module: nn.Module) -> str:
    """``sha256:`` and the digest of all parameters and buffers: names, dtypes, shapes and bytes.

    Batch counters of normalisation layers are left out: no output depends on them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


@dataclass(eq=False)
class Base:
    """A frozen model and what has to be known to use it. Make one with `deltapatch.load_base`.

    The module stays the caller's: it is put into eval mode and its gradients are switched off only while a
    computation of ours runs, and put back afterwards.

    Attributes:
        module: the model; its output for a batch of images are the logits.
        name: what it is called in messages and files.
        source: how `load_base` got it, such as ``timm/resnet50.a1_in1k``; empty for a module given as an
        object.
        preprocessing: how an image becomes its input.
        classes: names of its classes in the order of its logits; may be empty.
    """

    module: nn.Module
    name: str
    source: str
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()
    freezer: Freezer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.freezer = Freezer(self.module)

    @cached_property
    def fingerprint(self) -> str:
        """The digest of all weights and buffers as they were when this was first asked for."""
        return fingerprint(self.module)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Stages, sub-blocks, joins and classifier, found in one forward pass and verified in two more.

        Raises:
            AnatomyError: the model cannot be run on an input of its own size, or what was found does not
            hold.
        """
        example = self.example()
        with self.freezer.frozen():
            anatomy = read_anatomy(self.module, example)
            return verify_anatomy(self.module, anatomy, example)

    @property
    def device(self) -> torch.device:
        """Where the first of its tensors lives."""
        return next((t.device for t in self.module.state_dict().values()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of its first parameter."""
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def example(self, images: int = 2) -> Tensor:
        """A batch of noise of the base's own input size, of shape (images, C, H, W)."""
        return example_batch(self.preprocessing.input_size, self.device, images).to(self.dtype)

    def submodule(self, path: str) -> nn.Module:
        """The module of that name.

        Raises:
            AnatomyError: there is none.
        """
        try:
            return self.module.get_submodule(path)
        except AttributeError as error:
            raise AnatomyError(f"base {self.name} has no module named '{path}'") from error

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint[7:19]})"
