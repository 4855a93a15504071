"""The jobs of a comparison, in the order in which they are done: what matters most comes first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from ...errors import DeltapatchError
from ...fitting.config import FitConfig
from ...method import Method
from .contenders import Contender, describe
from .job import BaseOptions, DataSource, Job, ProtocolName, Selection
from .ledger import Row


@dataclass(frozen=True)
class ComparisonConfig:
    """What is compared.

    Attributes:
        seeds: how many fits of each method, with the seeds from 0.
        protocols: what is done with the tasks: "single" fits each one alone, "joint" all of them as one,
            "sequential" one after the other, "parallel" each from the base and then all together.
        shares: per cent of the training images; each is a table of its own. Left out: all of them, unless
            ``few_shot`` is given.
        few_shot: so many training images a class are a table of their own.
        selection: which images choose epoch and variant: "validation", or "test" as the source papers did.
    """

    seeds: int = 5
    protocols: tuple[ProtocolName, ...] = ("single",)
    shares: tuple[int, ...] = ()
    few_shot: int | None = None
    selection: Selection = "validation"

    def __post_init__(self) -> None:
        wrong = [share for share in self.shares if not 1 <= share <= 100]
        if wrong:
            raise DeltapatchError(f"a share of {wrong[0]} % of the training images cannot be; give 1 to 100")
        if self.seeds < 1:
            raise DeltapatchError(f"{self.seeds} seeds cannot be; give 1 or more")
        if self.few_shot is not None and self.few_shot < 1:
            raise DeltapatchError(f"{self.few_shot} training images a class cannot be; give 1 or more")
        if not self.protocols:
            raise DeltapatchError("there is no protocol; give single, joint, sequential or parallel")

    @property
    def amounts(self) -> tuple[tuple[int, int | None], ...]:
        """(share, images a class) of each amount of training images."""
        shares = self.shares or ((100,) if self.few_shot is None else ())
        few = () if self.few_shot is None else ((100, self.few_shot),)
        return (*((share, None) for share in dict.fromkeys(shares)), *few)


@dataclass(frozen=True)
class Planned:
    """A job and whose it is.

    Attributes:
        job: what to do.
        contender: whose line of the table it is for.
        variant: which of the contender's configurations it fits.
        tasks: the names of its tasks.
        is_first: whether it is the first seed of the first variant, which no budget drops.
    """

    job: Job
    contender: str
    variant: Method
    tasks: tuple[str, ...]
    is_first: bool

    @property
    def setting(self) -> tuple[str, str]:
        """Protocol and amount of training images: what makes a table of its own."""
        return self.job.protocol, self.job.amount

    def __str__(self) -> str:
        job = self.job
        return f"{describe(self.variant)} on {', '.join(self.tasks)}, {job.amount}, seed {job.fit.seed}"


def plan(
    base: BaseOptions,
    tasks: Mapping[str, DataSource],
    contenders: Sequence[Contender],
    fit: FitConfig,
    config: ComparisonConfig,
    supporting: DataSource | None = None,
) -> tuple[Planned, ...]:
    """Every job: the first seed of every contender's first variant on every task, then the other variants,
    then the same for the next seed.

    Raises:
        DeltapatchError: a protocol needs more tasks than there are.
    """
    together = [protocol for protocol in config.protocols if protocol != "single"]
    if together and len(tasks) < 2:
        raise DeltapatchError(
            f"the protocol '{together[0]}' needs two or more sets of images; give more data"
        )
    most_variants = max(len(contender.variants) for contender in contenders)
    planned: list[Planned] = []
    for seed in range(config.seeds):
        for number in range(most_variants):
            for protocol in dict.fromkeys(config.protocols):
                groups = [(name,) for name in tasks] if protocol == "single" else [tuple(tasks)]
                for share, few_shot in config.amounts:
                    for names in groups:
                        for contender in contenders:
                            if number >= len(contender.variants):
                                continue
                            variant = contender.variants[number]
                            job = Job(
                                base=base,
                                data=tuple(tasks[name] for name in names),
                                method=variant.name,
                                options=tuple(variant.configuration().items()),
                                fit=replace(fit, seed=seed),
                                protocol=protocol,
                                selection=config.selection,
                                share=share,
                                few_shot=few_shot,
                                supporting=supporting,
                            )
                            first = seed == number == 0
                            planned.append(Planned(job, contender.name, variant, names, first))
    return tuple(planned)


def expected_seconds(ahead: Planned, done: Sequence[tuple[Planned, Row]]) -> float:
    """How long a job will take: as long as those that are most like it took."""
    likenesses = (
        lambda one: (one.setting, one.tasks, one.contender, one.variant),
        lambda one: (one.setting, one.tasks, one.contender),
        lambda one: one.contender,
        lambda one: None,
    )
    for likeness in likenesses:
        seconds = [row.job_seconds for one, row in done if likeness(one) == likeness(ahead)]
        if seconds:
            return mean(seconds)
    return 0.0
