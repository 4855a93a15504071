"""Which lighter Δ-module is as good as the published one, and what each costs.

Judged on images held out from the training sets (test images are not touched): each training set, or at most
``--most`` of its images, is halved by class, once for each seed. The last epoch counts, not the best one.

    python benchmarks/accuracy/light.py --modules 1
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from settings import arguments, development_split, load_base, load_task, write_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deltapatch as dp
from deltapatch.anatomy import Stage
from deltapatch.data import TaskData
from deltapatch.fitting.fit import FitConfig, fit_task
from deltapatch.method import Method, register_method
from deltapatch.methods.delta import Delta
from deltapatch.touching import Touch

SETS = ("flowers5", "dtd10", "brain_tumor_mri", "bccd_cells", "omniglot", "mnist")
BASES = ("MobileNetV2", "ResNet-56")


def narrow_width(channels: int) -> int:
    """An eighth of the channels, but no fewer than 16 (or than the published half)."""
    return max(channels // 8, min(channels // 2, 16))


class Candidate(nn.Module):
    """Layers on maps, the mean over positions, and a linear layer for the skips."""

    def __init__(self, layers: list[nn.Module], width: int, skips: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(width, skips)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=1e-2 / math.sqrt(width))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


def convolution(given: int, made: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(given, made, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(made)]


def narrow(c: int, skips: int) -> nn.Module:
    """3x3 convolutions, C -> C/8 at stride 2 -> C/8."""
    w = narrow_width(c)
    return Candidate(
        [*convolution(c, w, 3, 2), nn.ReLU(), *convolution(w, w, 3), nn.ReLU()],
        w,
        skips,
    )


def separable(c: int, skips: int) -> nn.Module:
    """Depthwise 3x3 at stride 2, 1x1 to C/8, depthwise 3x3, 1x1."""
    w = narrow_width(c)
    first = [*convolution(c, c, 3, 2, c), *convolution(c, w, 1), nn.ReLU()]
    second = [*convolution(w, w, 3, 1, w), *convolution(w, w, 1), nn.ReLU()]
    return Candidate([*first, *second], w, skips)


def pointwise(c: int, skips: int) -> nn.Module:
    """Mean over 2x2 positions, 1x1 to C/8, 3x3."""
    w = narrow_width(c)
    first = [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), *convolution(c, w, 1), nn.ReLU()]
    return Candidate([*first, *convolution(w, w, 3), nn.ReLU()], w, skips)


def single(c: int, skips: int) -> nn.Module:
    """Mean over 2x2 positions, 1x1 to C/8, and nothing more."""
    w = narrow_width(c)
    pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)
    return Candidate([pool, *convolution(c, w, 1), nn.ReLU()], w, skips)


def pooled(c: int, skips: int) -> nn.Module:
    """Mean over all positions first, then C -> C/8 -> C/8."""
    w = narrow_width(c)
    first = [nn.AdaptiveAvgPool2d(1), *convolution(c, w, 1), nn.ReLU()]
    return Candidate([*first, *convolution(w, w, 1), nn.ReLU()], w, skips)


def constant(c: int, skips: int) -> nn.Module:
    """Control: skip weights that do not depend on the image."""
    return Constant(skips)


class Constant(nn.Module):
    def __init__(self, skips: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(skips))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + x.new_zeros(len(x), 1)


CANDIDATES: Mapping[str, Callable[[int, int], nn.Module]] = {
    "narrow": narrow,
    "separable": separable,
    "pointwise": pointwise,
    "single": single,
    "pooled": pooled,
    "constant": constant,
}


@register_method("delta-candidate")
@dataclass(frozen=True)
class DeltaCandidate(Delta):
    """Δ-Networks with one of the candidates as Δ-module."""

    candidate: str = "narrow"

    def delta_module(self, stage: Stage) -> nn.Module:
        return CANDIDATES[self.candidate](stage.in_channels, stage.skips)


@register_method("delta-with-norms")
@dataclass(frozen=True)
class CandidateWithNorms(DeltaCandidate):
    """The same, and the stages' own batch normalisations get a scale and a shift that train.

    `norms` are the module names of the base's batch normalisations and their channels; a subclass has them.
    """

    norms: ClassVar[tuple[tuple[str, int], ...]] = ()

    def norms_of(self, stage: Stage) -> list[tuple[str, int]]:
        inside = tuple(f"{sub_block.path}." for sub_block in stage.sub_blocks)
        return [(path, channels) for path, channels in self.norms if path.startswith(inside)]

    def part(self, site: Stage) -> nn.Module:
        part = super().part(site)
        part.scales = nn.ParameterList(torch.ones(channels) for _, channels in self.norms_of(site))
        part.shifts = nn.ParameterList(torch.zeros(channels) for _, channels in self.norms_of(site))
        return part

    def touches(self, site: Stage, part: nn.Module) -> Mapping[str, Touch]:
        touches = dict(super().touches(site, part))
        owned = cast(Any, part)
        for (path, _), scale, shift in zip(self.norms_of(site), owned.scales, owned.shifts, strict=True):
            touches[path] = affine_touch(scale, shift)
        return touches


def affine_touch(scale: Tensor, shift: Tensor) -> Touch:
    def touch(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return torch.addcmul(shift[:, None, None], forward(*args, **kwargs), scale[:, None, None])

    return touch


def batch_norms(base: dp.Base) -> tuple[tuple[str, int], ...]:
    named = base.module.named_modules()
    return tuple((path, m.num_features) for path, m in named if isinstance(m, nn.BatchNorm2d))


def variants(base: dp.Base, modules: int | str) -> dict[str, Method]:
    """Name -> what is compared."""

    class OfThisBase(CandidateWithNorms):
        norms = batch_norms(base)

    light = {name: DeltaCandidate(modules=modules, candidate=name) for name in CANDIDATES}
    both = {f"{name} + norms": OfThisBase(modules=modules, candidate=name) for name in ("narrow", "pooled")}
    return {"published": Delta(modules=modules), **light, **both}


@dataclass(frozen=True)
class Cost:
    """What the Δ-modules of a patch cost: parameters, and multiply-adds as a share of the base's."""

    parameters: int
    share: float


def cost(base: dp.Base, method: Method) -> Cost:
    """Counted by running the base, then the Δ-modules on the stage inputs that it gives them."""
    patch = method.build(base, seed=0)
    given: dict[str, Tensor] = {}
    hooks = [
        base.submodule(site.sub_blocks[0].path).register_forward_pre_hook(
            lambda module, args, path=site.path: given.update({path: args[0]})
        )
        for site in patch.sites
    ]
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        base.module(base.example(1))
    for hook in hooks:
        hook.remove()
    parts = [cast(Any, part).delta for part in patch.parts]
    with FlopCounterMode(display=False) as own, torch.no_grad():
        for site, part in zip(patch.sites, parts, strict=True):
            part(given[site.path])
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    return Cost(parameters, own.get_total_flops() / whole.get_total_flops())


def main() -> None:
    parser = arguments(__doc__ or "", "light.md")
    parser.add_argument("--modules", default="1")
    parser.add_argument("--most", type=int, default=500)
    parser.add_argument("--variants", nargs="*", default=None)
    parser.add_argument("--bases", nargs="*", default=BASES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    modules = options.modules if options.modules == "all" else int(options.modules)
    log = options.out.with_suffix(".jsonl")
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    known = {(entry["base"], entry["task"], entry["seed"], entry["variant"]) for entry in done}
    log.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for name in options.bases:
            base = load_base(name, options.size)
            chosen = variants(base, modules)
            for task_name in options.only or SETS:
                task = development_split(load_task(task_name, None, None), options.most, seed)
                for variant, method in chosen.items():
                    key = (name, task_name, seed, variant)
                    if key in known or (options.variants is not None and variant not in options.variants):
                        continue
                    done.append(measured(base, task, method, seed, options.epochs, key))
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(done[-1]) + "\n")
                    print(done[-1], flush=True)
        write_results(options, done, modules)


def measured(
    base: dp.Base, task: TaskData, method: Method, seed: int, epochs: int, key: tuple[str, str, int, str]
) -> dict[str, Any]:
    """One fit: accuracy after its last epoch (the best one would be chosen on the images that judge)."""
    config = FitConfig(epochs=epochs, patience=None, seed=seed)
    started = time.perf_counter()
    result = fit_task(base, task, method, config, progress=False)
    spent = cost(base, method)
    return {
        **dict(zip(("base", "task", "seed", "variant"), key, strict=True)),
        "accuracy": 100 * (result.history[-1].validation_accuracy or 0),
        "head": 100 * result.head_only.info.figures["validation/accuracy"],
        "epoch_seconds": statistics.median(epoch.seconds for epoch in result.history),
        "seconds": time.perf_counter() - started,
        "parameters": spent.parameters,
        "multiply_adds": spent.share,
    }


def write_results(options: Any, done: list[dict[str, Any]], modules: int | str) -> None:
    """One row a variant: accuracy on each base and set, parameters, multiply-adds and step time."""
    places = sorted({(entry["base"], entry["task"]) for entry in done})
    order = list(dict.fromkeys(entry["variant"] for entry in done))
    published = {(e["base"], e["task"], e["seed"]): e for e in done if e["variant"] == "published"}
    rows = [
        row(variant, [e for e in done if e["variant"] == variant], places, published) for variant in order
    ]
    heads = [[e["head"] for e in published.values() if (e["base"], e["task"]) == place] for place in places]
    mean_head = statistics.mean(statistics.mean(h) for h in heads)
    rows.append(["head alone", *[spread(h) for h in heads], f"{mean_head:.1f}", "", "", "", "", ""])
    columns = [
        "Δ-module",
        *[f"{base} → {task}" for base, task in places],
        "mean",
        "against published",
        "better / worse / tie",
        "parameters, of published",
        "multiply-adds, of the base",
        "epoch time, of published",
    ]
    title = f"Δ-modules, modules={modules}: held-out training images, {options.epochs} epochs"
    write_table(options.out, title, columns, rows)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def row(
    variant: str,
    entries: list[dict[str, Any]],
    places: list[tuple[str, str]],
    published: dict[tuple[str, str, int], dict[str, Any]],
) -> list[str]:
    cells: list[str] = []
    gains: list[float] = []
    means: list[float] = []
    signs = {"better": 0, "worse": 0, "tie": 0}
    for place in places:
        here = [e for e in entries if (e["base"], e["task"]) == place]
        values = [e["accuracy"] for e in here]
        cells.append(spread(values) if values else "–")
        pairs = [(e, published.get((e["base"], e["task"], e["seed"]))) for e in here]
        differences = [e["accuracy"] - p["accuracy"] for e, p in pairs if p is not None]
        if values and differences:
            means.append(statistics.mean(values))
            gains.append(statistics.mean(differences))
            # Beyond the noise: all seeds agree on the sign.
            all_up, all_down = min(differences) > 0, max(differences) < 0
            signs["better" if all_up else "worse" if all_down else "tie"] += 1
    against = f"{statistics.mean(gains):+.2f} ± {statistics.stdev(gains) / math.sqrt(len(gains)):.2f}"
    pairs = [(e, published[(e["base"], e["task"], e["seed"])]) for e in entries]
    parameters = statistics.mean(e["parameters"] / p["parameters"] for e, p in pairs)
    seconds = statistics.median(e["epoch_seconds"] / p["epoch_seconds"] for e, p in pairs)
    shares = sorted({e["base"]: e["multiply_adds"] for e in entries}.items())
    return [
        variant,
        *cells,
        f"{statistics.mean(means):.1f}",
        against,
        " / ".join(str(count) for count in signs.values()),
        f"{parameters:.3f}",
        ", ".join(f"{base} {100 * share:.2f} %" for base, share in shares),
        f"{seconds:.2f}",
    ]


if __name__ == "__main__":
    main()
