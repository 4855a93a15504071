"""What a fit was worth: the patch and a head alone on images that neither has seen, and the page that
says so.
"""

from dataclasses import dataclass
from pathlib import Path

from ..base import Base, fingerprint
from ..data import ImageSet, TaskData
from ..fitting.fit import FitResult
from ..patch import Patch
from .answers import Answers, answer, as_evaluation, evaluate, skip_weights
from .metrics import Evaluation
from .report import MAX_EXAMPLES, THUMBNAIL_SIDE, Example, Report, write_report


@dataclass(frozen=True)
class Worth:
    """Figures of a fitted patch and of a head alone on the same images.

    Attributes:
        split: "test", or "validation" where the data has no test images: then the patch was chosen on them.
        images: the images.
        answers: the patch's answers.
        patch: the patch's figures.
        head_only: the head's figures.
        base_unchanged: whether base's weights and buffers are what they were when it was loaded.
    """

    split: str
    images: ImageSet
    answers: Answers
    patch: Evaluation
    head_only: Evaluation
    base_unchanged: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before the figures."""
        warnings: list[str] = []
        if self.split != "test":
            warnings.append(
                "There are no test images: the figures are of the validation images, on which the"
                " best epoch was"
                " chosen, so they are optimistic."
            )
        if not self.base_unchanged:
            warnings.append(
                "The base's weights are NOT what they were when it was loaded; do not use this base."
            )
        return tuple(warnings)


def measure(base: Base, task: TaskData, result: FitResult, workers: int = 0) -> Worth | None:
    """Evaluates a fit on the test images, else on the validation images; None if there are neither."""
    splits = {"test": task.test, "validation": task.val}
    found = next(
        ((name, images) for name, images in splits.items() if images is not None and len(images)), None
    )
    if found is None:
        return None
    split, images = found
    answers = answer(base, images, result.patch, workers=workers)
    return Worth(
        split=split,
        images=images,
        answers=answers,
        patch=as_evaluation(result.patch, answers),
        head_only=evaluate(base, images, result.head_only, workers=workers),
        base_unchanged=fingerprint(base.module) == base.fingerprint,
    )


def with_figures(patch: Patch, worth: Worth) -> None:
    """Writes the figures into the patch, beside those of its fit."""
    figures = {**patch.info.figures, **worth.patch.figures(worth.split)}
    figures |= {f"head-only/{key}": value for key, value in worth.head_only.figures(worth.split).items()}
    patch.info = patch.info.model_copy(update={"figures": figures})


def write_fit_report(
    path: Path, base: Base, task: TaskData, result: FitResult, worth: Worth, file_bytes: int
) -> None:
    """Writes the page beside a patch."""
    info, patch = result.patch.info, result.patch
    options = ", ".join(f"{key}={value}" for key, value in info.method.config.items())
    facts: dict[str, str | int | float] = {
        "data": task.provenance.source,
        "training images": task.provenance.train,
        "validation images": f"{task.provenance.val} ({task.provenance.validation})",
        f"{worth.split} images evaluated": len(worth.patch.labels),
        "unreadable images left out": len(result.bad_images) + worth.patch.skipped,
        "epochs": f"{len(result.history)}, best {result.best_epoch}",
        "seed": info.fitted_on.seed if info.fitted_on else 0,
        "computed": "; ".join(result.notes),
    }
    sentence = "is" if worth.base_unchanged else "IS NOT"
    write_report(
        Report(
            title=f"{task.name}: {info.method.name} patch on {base.name}",
            base=base.name,
            fingerprint=base.fingerprint,
            method=f"{info.method.name} ({options})" if options else info.method.name,
            classes=patch.classes,
            data=facts,
            patch=worth.patch,
            head_only=worth.head_only,
            base_unchanged=(
                f"After the fit the base {sentence} bit for bit what it was before: the digest of all"
                f" its weights and"
                " buffers was taken when it was loaded and again for this page."
            ),
            history=result.history,
            examples=_examples(worth, patch),
            skips=skip_weights(patch, worth.answers),
            parameters=patch.num_parameters(),
            file_bytes=file_bytes,
            seconds=result.seconds,
            versions=info.versions,
            warnings=worth.warnings,
            split=worth.split,
        ),
        path,
    )


def _examples(worth: Worth, patch: Patch) -> tuple[Example, ...]:
    """The wrong answers that the patch was surest of."""
    examples: list[Example] = []
    for row in worth.patch.most_confused(MAX_EXAMPLES):
        index = int(worth.answers.indices[row])
        thumbnail = worth.images.image(index).copy()
        thumbnail.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        prediction = int(worth.patch.predictions[row])
        examples.append(
            Example(
                label=patch.classes[int(worth.patch.labels[row])],
                prediction=patch.classes[prediction],
                confidence=float(worth.patch.probabilities[row, prediction]),
                name=Path(worth.images.names(index)).name,
                thumbnail=thumbnail,
            )
        )
    return tuple(examples)
