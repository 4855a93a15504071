"""The errors that deltapatch raises and the warnings that it gives.

Every message is one sentence for a person: it names the file, module, tensor or value, what was expected, and
what to do. The command line prints it as one line and exits with code 2.
"""


class DeltapatchError(ValueError):
    """Something that the user gave cannot be used; the message says what and why."""


class AnatomyError(DeltapatchError):
    """A model, or a place in it, that cannot be patched."""


class PatchFileError(DeltapatchError):
    """A patch file that is damaged, hostile, from a newer version, or not a patch."""


class WrongBaseError(DeltapatchError):
    """A patch that belongs to another base than the one it was given."""


class DataError(DeltapatchError):
    """A folder or file of labelled images that cannot be read as such."""


class ImageError(DataError):
    """One image that cannot be decoded, or that is refused.

    Attributes:
        path: where the image came from (a file path, or a name such as ``photos.npz[train][17]``).
        reason: why it was refused, in words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return ImageError, (self.path, self.reason)


class DeltapatchWarning(UserWarning):
    """Something that works but that the user should know about."""


class CacheError(DeltapatchError):
    """The trunk cache cannot be made, read or written; what was filled before stays."""
