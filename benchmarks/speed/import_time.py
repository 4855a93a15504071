"""How long `import deltapatch` takes beyond `import torch, timm`, in fresh interpreters.

The target is 0.1 s. Public names are imported when they are first used; a row of its own counts them in.

    python benchmarks/speed/import_time.py
"""

import os
import statistics
import subprocess
import sys
from functools import partial

from common import arguments, interleaved, machine, write_table

FIRST = "import torch, timm"
STATEMENTS = {
    "deltapatch": "import deltapatch",
    "deltapatch and all of its public names": "from deltapatch import *",
    "peft": "import peft",
}
TARGETS = {"deltapatch": "≤ 0.1 s"}
PROGRAM = """
import time
started = time.perf_counter()
import torch, timm
between = time.perf_counter()
{statement}
print(between - started, time.perf_counter() - between)
"""

Seconds = tuple[float, float]


def import_seconds(statement: str, threads: int) -> Seconds | None:
    """Seconds of torch and timm, and of a statement after them, in a new interpreter; None where what it
    imports is not installed.
    """
    program = PROGRAM.format(statement=statement)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    if "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(f"'{statement}' failed:\n{done.stderr}")
    before, after = done.stdout.split()
    return float(before), float(after)


def main() -> None:
    options = arguments(__doc__, "import_time", rounds=9).parse_args()
    contestants = {
        name: partial(import_seconds, statement, options.threads)
        for name, statement in STATEMENTS.items()
        # The first run of each fills the file system's cache, and tells whether it can be imported.
        if import_seconds(statement, options.threads) is not None
    }
    measured = {
        name: [seconds for seconds in found if seconds is not None]
        for name, found in interleaved(contestants, options.rounds).items()
    }
    before = [first for found in measured.values() for first, _ in found]
    rows = [[FIRST, f"{statistics.median(before):.2f} s", ""]]
    for name in STATEMENTS:
        beyond = [after for _, after in measured.get(name, [])]
        cell = f"{statistics.median(beyond):.3f} s" if beyond else "not installed"
        rows.append([f"{name}, beyond that", cell, TARGETS.get(name, "")])
    note = f"{machine(options.threads)} Medians of {options.rounds} interleaved rounds of fresh interpreters."
    write_table(options.out, "Import time", [note], ["import", "median", "target"], rows)


if __name__ == "__main__":
    main()
