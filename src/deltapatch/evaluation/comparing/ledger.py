"""What is known of finished jobs: a small JSON file each, written whole or not at all, checked when read."""

import base64
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...errors import DeltapatchError, PatchFileError
from ...file import file_digest
from ..protocols.splits import MeasuredOn
from .job import Job, ProtocolName, Selection

_STORED = ConfigDict(frozen=True, extra="forbid")
Part = Annotated[float, Field(ge=0, le=1)]


class Score(BaseModel):
    """How well a job's patch does on one task.

    Attributes:
        task: its name.
        accuracy: on the images of ``measured_on``, 0..1.
        images: how many were answered.
        measured_on: "test"; "validation" where the task has no test images; "test-selected" where the test
            images chose the epoch as well.
        validation_accuracy: what the epoch and the variant are chosen by, 0..1.
        correct: which images were answered right: bits, packed as numpy does, in base64; empty where only
            the accuracy is known.
    """

    model_config = _STORED

    task: str
    accuracy: Part
    images: int
    measured_on: MeasuredOn
    validation_accuracy: Part
    correct: str = ""

    @property
    def answers(self) -> NDArray[np.bool_] | None:
        """Whether each image was answered right, of shape (images,); None where that is not known."""
        if not self.correct:
            return None
        packed = np.frombuffer(base64.b64decode(self.correct), np.uint8)
        return np.unpackbits(packed, count=self.images).astype(bool)


def packed(correct: NDArray[np.bool_]) -> str:
    """Whether each image was answered right, as `Score` stores it."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode("ascii")


class SavedPatch(BaseModel):
    """A patch file of a job: for which task, its name in the folder of patches, its digest and its bytes."""

    model_config = _STORED

    task: str
    name: str
    digest: str
    bytes: int


class Matrix(BaseModel):
    """The accuracies of a protocol after each of its steps; None where nothing was measured."""

    model_config = _STORED

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


class BaseAccuracy(BaseModel):
    """How well the base does on its own task, and on how many images."""

    model_config = _STORED

    accuracy: Part
    images: int


class Row(BaseModel):
    """The result of one job.

    Attributes:
        digest: of the job.
        method: its name.
        options: its configuration as plain values.
        seed: of everything random.
        protocol: what was done with the tasks.
        amount: how many of the training images were used, in words.
        selection: which images chose the epoch.
        refused: why there is no result, in one line; empty where there is one.
        scores: one for each task.
        base_accuracy: of the base alone on its own task, 0..1; None where that was not measured.
        supporting_accuracy: on that task afterwards.
        parameters: that were learned, without the heads.
        head_parameters: of the heads.
        seconds: of the fits.
        job_seconds: of everything that the job took, evaluation included.
        patches: the files.
        matrix: for protocols of several tasks.
    """

    model_config = _STORED

    digest: str
    method: str
    options: dict[str, object]
    seed: int
    protocol: ProtocolName
    amount: str
    selection: Selection
    refused: str = ""
    scores: tuple[Score, ...] = ()
    base_accuracy: Part | None = None
    supporting_accuracy: Part | None = None
    parameters: int = 0
    head_parameters: int = 0
    seconds: float = 0.0
    job_seconds: float = 0.0
    patches: tuple[SavedPatch, ...] = ()
    matrix: Matrix | None = None

    @property
    def file_bytes(self) -> int:
        """Of all patch files together."""
        return sum(patch.bytes for patch in self.patches)

    @property
    def validation_accuracy(self) -> float:
        """What variants are chosen by: the mean over the tasks."""
        return float(np.mean([score.validation_accuracy for score in self.scores]))


def read_row(folder: Path, job: Job) -> Row | None:
    """The result of a job that is done; None where it has to be done, since its entry or one of its patch
    files is missing, damaged or another's, or since a task has been given another name.
    """
    try:
        row = Row.model_validate_json(entry_of(folder, job).read_bytes())
    except (OSError, ValidationError):
        return None
    if row.digest != job.digest or (not row.refused and not row.patches):
        return None
    if not row.refused and [score.task for score in row.scores] != [source.name for source in job.data]:
        return None
    for patch in row.patches:
        try:
            if file_digest(folder / "patches" / patch.name) != patch.digest:
                return None
        except PatchFileError:
            return None
    return row


def write_row(folder: Path, job: Job, row: Row) -> None:
    """Notes that a job is done."""
    replace_file(entry_of(folder, job), row.model_dump_json(indent=1).encode())


def entry_of(folder: Path, job: Job) -> Path:
    """Where a job's result stands."""
    return folder / "jobs" / f"{job.digest}.json"


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one.

    Raises:
        DeltapatchError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.deltapatch-tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DeltapatchError(f"{path} cannot be written: {error.strerror}; check the folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
