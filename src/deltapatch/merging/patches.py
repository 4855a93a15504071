"""Several patches of one base into one: one body for all tasks, and a head for each or one for all."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..base import Base
from ..data import ImageSet
from ..differences import Storage, stored_as
from ..errors import DeltapatchError
from ..fitting.watching import FitWatch
from ..methods.full import Full
from ..patch import Patch
from .distilling import Check, Lesson, agreements, distil, lesson_of
from .gathering.patch_statistics import re_estimate_patch
from .patch_heads import Heads, results_of, with_heads
from .patch_weights import changes_weights, patch_of_weights, weights_of
from .recipe import Recipe
from .rules import Merge, make_merge
from .running import RunOptions, merge
from .sources import MemorySource, MergeError

PatchLike = Patch | str | os.PathLike[str]

_LONGEST_NOTE = 4096
_LONGEST_KEY = 128
_MOST_FIGURES = 250
"""What a patch file has room for."""


def merge_patches(
    base: Base,
    patches: Sequence[PatchLike],
    how: Merge | str = "average",
    *,
    names: Sequence[str] | None = None,
    heads: Heads = "own",
    images: Sequence[ImageSet] | None = None,
    check: Check | None = None,
    storage: Storage = "fp32",
    out: str | os.PathLike[str] | None = None,
    run: RunOptions | None = None,
    progress: bool = False,
) -> dict[str, Patch]:
    """Merges patches of one base; their bodies become one, and the base itself is not touched.

    Patches whose only effect is other weights in the base (`full`, `interpolate`, `lora`, `norm`, `dua`,
    `random-weights`, and compositions of them), also of different methods, are merged by arithmetic on these
    weights: any merge applies. The result is a `full` patch, or one of the inputs' own method where that
    holds norms alone. All other patches have to be of one method and configuration, and their own parameters
    are averaged, which is no more than a guess: give images.

    With images it is checked how often the result answers as each patch does on that patch's images.
    Statistics of batch normalisation that the result owns are re-estimated on all of them, and where it still
    agrees too seldom, it is taught to by distillation; each is kept only if the agreement, on images that are
    not taught with, rises by it. All of it stands in the result's figures.

    Args:
        base: the base of all patches.
        patches: two or more (one is enough for some merges), or files of them.
        how: the merge, or its name.
        names: of the patches, for the result, files and figures; left out, names of files.
        heads: what becomes of the heads; heads of different tasks are never merged.
        images: unlabelled images of each patch's task, in the order of the patches, as the task's own images
            look; left out, nothing is re-estimated, checked or taught.
        check: what is asked of the result on the images.
        storage: how a `full` result keeps its differences.
        out: a folder to write ``NAME.safetensors`` into, or a ``.safetensors`` file for a single result.
        run: how the merge is carried out.
        progress: whether to draw a bar of what is done with images.

    Returns:
        Name -> patch: with ``heads="own"`` one for each input, which share their parts in memory, else
        "merged".

    Raises:
        WrongBaseError: a patch is of another base.
        MergeError: the patches cannot be merged in this way; the message says which can.

    Example:
        >>> merged = merge_patches(base, ["birds.safetensors", "cars.safetensors"], "ties")
        >>> model.add_patch("birds", merged["birds"])
    """
    inputs = _opened(base, patches, names)
    how = make_merge(how, {}) if isinstance(how, str) else how
    run = run or RunOptions()
    targets = _targets(out, list(inputs), heads)
    if images is not None and len(images) != len(inputs):
        raise MergeError(f"{len(images)} sets of images were given for {len(inputs)} patches; give as many")
    body = _merged_body(base, inputs, how, run)
    student, columns = with_heads(base, body, inputs, heads)
    figures = {"merge/patches": float(len(inputs))}
    if images is not None:
        lessons = _lessons(base, inputs, images, columns, len(student.classes) if heads == "joint" else None)
        figures |= _improved(base, student, images, lessons, check or Check(), progress)
    if isinstance(student.method, Full) and storage != "fp32":
        student = stored_as(student, replace(student.method, storage=storage), base).eval()
    results = results_of(student, inputs, columns, heads)
    note = _note(how, inputs, patches, run.skip)
    for name, patch in results.items():
        _describe(patch, inputs, _figures_of(name, figures, heads), note)
    for name, path in targets.items():
        results[name].save(path)
    return results


def _opened(base: Base, patches: Sequence[PatchLike], names: Sequence[str] | None) -> dict[str, Patch]:
    """Name -> patch, each of this base and in eval mode."""
    if not patches:
        raise MergeError("there is no patch to merge; give one or more")
    called = list(names) if names is not None else [_name(patch, n) for n, patch in enumerate(patches, 1)]
    if len(called) != len(patches):
        raise MergeError(f"{len(called)} names were given for {len(patches)} patches; give as many")
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise MergeError(f"two of the patches are called '{twice}'; give names that differ")
    opened: dict[str, Patch] = {}
    for name, given in zip(called, patches, strict=True):
        patch = given if isinstance(given, Patch) else Patch.from_pretrained(given).to(base.device)
        patch.check_base(base)
        if patch.info.preprocessing != base.preprocessing:
            raise MergeError(
                f"patch '{name}' was fitted on images prepared as {patch.info.preprocessing}, but the base"
                f" expects {base.preprocessing}; load the base as it was loaded for the fit"
            )
        opened[name] = patch if not patch.training else patch.as_method(patch.method).eval()
    return opened


def _name(patch: PatchLike, number: int) -> str:
    return f"patch{number}" if isinstance(patch, Patch) else Path(patch).stem


def _targets(out: str | os.PathLike[str] | None, names: Sequence[str], heads: Heads) -> dict[str, Path]:
    """Where each result is written; found before the work, so that a place that cannot be is told at once."""
    if out is None:
        return {}
    path = Path(out)
    results = names if heads == "own" else ["merged"]
    if path.suffix == ".safetensors":
        if len(results) > 1:
            raise MergeError(
                f"{path}: {len(results)} patches come out, one for each task's own head; give a folder, or"
                " heads='joint' for one patch"
            )
        return {results[0]: path}
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeError(f"{path}: patches cannot be written there ({error.strerror})") from error
    return {name: path / f"{name}.safetensors" for name in results}


# --- bodies -----------------------------------------------------------------------------------------------


def _merged_body(base: Base, inputs: Mapping[str, Patch], how: Merge, run: RunOptions) -> Patch:
    """A new patch without a head, which shares no tensor with the inputs."""
    patches = list(inputs.values())
    if all(changes_weights(base, patch) or not patch.parts for patch in patches):
        models, own = weights_of(base, patches, list(inputs))
        if not own.specs:
            return patches[0].method.build(base)
        return patch_of_weights(base, merge(how, models, own, run=run), patches)
    return _averaged_body(base, inputs, how, run)


def _averaged_body(base: Base, inputs: Mapping[str, Patch], how: Merge, run: RunOptions) -> Patch:
    (first_name, first), *others = inputs.items()
    for name, patch in others:
        if patch.method != first.method or patch.sites != first.sites:
            raise MergeError(
                f"patch '{first_name}' is of the {_described(first)} and '{name}' of the {_described(patch)};"
                " patches that do more than change the base's weights can only be merged with others of the"
                " same method and options"
            )
    if how.needs_base:
        raise MergeError(
            f"{how.name} works on what models add to their base's weights, and {first.method.name} patches"
            " have parameters of their own instead; merge them with average"
        )
    models = [MemorySource(patch.parts.state_dict(), f"patch '{name}'") for name, patch in inputs.items()]
    body = first.method.build(base, seed=0)
    body.parts.load_state_dict(merge(how, models, None, run=run))
    return body


def _described(patch: Patch) -> str:
    options = ", ".join(f"{key}={value}" for key, value in patch.method.configuration().items())
    return f"{patch.method.name} method ({options})" if options else f"{patch.method.name} method"


# --- checking and describing ------------------------------------------------------------------------------


def _lessons(
    base: Base,
    inputs: Mapping[str, Patch],
    images: Sequence[ImageSet],
    columns: Mapping[str, slice],
    outputs: int | None,
) -> list[Lesson]:
    return [
        lesson_of(base, name, patch, found, columns[name], outputs)
        for (name, patch), found in zip(inputs.items(), images, strict=True)
        if name in columns
    ]


def _improved(
    base: Base,
    student: Patch,
    images: Sequence[ImageSet],
    lessons: Sequence[Lesson],
    check: Check,
    progress: bool,
) -> dict[str, float]:
    """Figures of how far the student agrees; statistics and what it is taught are kept, in place, if they
    help.
    """
    found = agreements(base, student, lessons)
    figures = {_key("merge/agreement_before", name): value for name, value in found.items()}

    def kept(step: Callable[[], object]) -> bool:
        nonlocal found
        before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        if step() is False:
            return False
        after = agreements(base, student, lessons)
        if lessons and sum(after.values()) <= sum(found.values()):
            student.load_state_dict(before)
            return False
        found = after
        return True

    def taught() -> None:
        with FitWatch(enabled=progress, epochs=check.epochs) as watch:
            distil(base, student, lessons, check, watch)

    figures["merge/statistics_re_estimated"] = float(kept(lambda: re_estimate_patch(base, student, images)))
    falls_short = bool(found) and min(found.values()) < check.agreement and check.epochs > 0
    figures["merge/distillation/epochs"] = float(check.epochs * (falls_short and kept(taught)))
    figures |= {_key("merge/agreement", name): value for name, value in found.items()}
    return dict(list(figures.items())[:_MOST_FIGURES])


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}"[:_LONGEST_KEY]


def _figures_of(name: str, figures: Mapping[str, float], heads: Heads) -> dict[str, float]:
    """A patch with its own head is told of its own task only."""
    if heads != "own":
        return dict(figures)
    kinds = ("merge/agreement", "merge/agreement_before")
    return {
        key: value
        for key, value in figures.items()
        if not key.startswith(tuple(f"{kind}/" for kind in kinds))
        or key in {_key(kind, name) for kind in kinds}
    }


def _note(how: Merge, inputs: Mapping[str, Patch], given: Sequence[PatchLike], skip: tuple[str, ...]) -> str:
    """The recipe, as far as a patch file's note has room for it."""
    labels = [
        name if isinstance(patch, Patch) else os.fspath(patch)
        for name, patch in zip(inputs, given, strict=True)
    ]
    # The base is named by the patch itself.
    recipe = Recipe(merge=how.name, options=how.options(), models=tuple(labels), skip=skip)
    text = recipe.to_json()
    return text if len(text) <= _LONGEST_NOTE else f"merged by {how.name} from {len(labels)} patches"


def _describe(patch: Patch, inputs: Mapping[str, Patch], figures: Mapping[str, float], note: str) -> None:
    licences = {one.info.licence for one in inputs.values()}
    patch.info = patch.info.model_copy(
        update={
            "figures": {**patch.info.figures, **figures},
            "note": note,
            "licence": licences.pop() if len(licences) == 1 else "",
        }
    )


def recipe_of_patch(patch: Patch) -> Recipe:
    """The recipe of a merged patch.

    Raises:
        DeltapatchError: it was not made by `merge_patches`, or its recipe was too long to be kept.
    """
    try:
        return Recipe.model_validate_json(patch.info.note)
    except ValueError as error:
        raise DeltapatchError("the patch's note holds no recipe of a merge; it was made otherwise") from error
