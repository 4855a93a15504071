"""The state of an unfinished fit on disk: written whole or not at all, read without executing anything."""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import DeltapatchError


@dataclass(frozen=True)
class Checkpoint:
    """One file, and what the fit that it belongs to is made of.

    Attributes:
        path: the file.
        identity: digest of base, data, method and configuration; a checkpoint of another fit is refused.
        resume: whether to go on from a file that is there; otherwise it is overwritten.
        notes: what else is stored with every state: choices that a resumed fit must not make anew.
    """

    path: Path
    identity: str
    resume: bool
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file at once: a kill leaves the old one or the new one."""
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}.deltapatch-tmp")
        try:
            with temporary.open("wb") as file:
                torch.save({"identity": self.identity, **self.notes, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise DeltapatchError(
                f"{self.path}: the state of the fit could not be saved: {error.strerror}"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None if there is none to go on from.

        Raises:
            DeltapatchError: the file cannot be read, or belongs to another fit.
        """
        if not self.resume or not self.path.exists():
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DeltapatchError(
                f"{self.path}: this checkpoint cannot be read ({type(error).__name__}); delete it and"
                f" fit from the start"
            ) from error
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            raise DeltapatchError(
                f"{self.path}: this checkpoint belongs to another fit (other base, data, method or options);"
                " fit with the same ones, or delete it"
            )
        return state

    def remove(self) -> None:
        """Deletes the file once the fit is over."""
        self.path.unlink(missing_ok=True)
