"""Which patch method for these images: all of them compared, or one of them chosen."""

from .budget import Budget
from .comparison import compare
from .contenders import Contender, parse_contenders
from .halving import Choice, choose_method
from .job import Job
from .ledger import Row
from .planning import ComparisonConfig
from .result import Comparison
from .running import run_job

__all__ = [
    "Budget",
    "Choice",
    "Comparison",
    "ComparisonConfig",
    "Contender",
    "Job",
    "Row",
    "choose_method",
    "compare",
    "parse_contenders",
    "run_job",
]
