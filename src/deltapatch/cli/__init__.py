"""The command line. Each file of this folder that has a function ``command`` is one command, named like
the file.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import cast

import typer

from ..errors import DeltapatchError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# Recent releases of typer carry their own copy of click: its base of all usage errors is found through a
# public one.
_UsageProblem = cast(type[typer.BadParameter], typer.BadParameter.__mro__[2])


def make_app() -> typer.Typer:
    """The application with every command that is found."""
    app = typer.Typer(
        help="Patch a frozen vision model to new tasks; its own answers stay bit-identical.",
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    @app.callback()
    def options(debug: bool = typer.Option(False, "--debug", help="Show a traceback with errors.")) -> None:
        """Patch a frozen vision model to new tasks; its own answers stay bit-identical."""

    del options
    for name, module in _commands().items():
        app.command(name, epilog=f"Example: [bold]{module.EXAMPLE}[/bold]")(module.command)
    return app


def _commands() -> dict[str, ModuleType]:
    modules = {found.name: import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)}
    return {name: module for name, module in modules.items() if hasattr(module, "command")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; ends with exit code 0, 2 after an error in one clear line, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    try:
        # Typer makes an exit code of Ctrl-C; commands themselves return nothing.
        code: int | None = make_app()(arguments, standalone_mode=False)
    except _UsageProblem as error:
        command = next((f" {name}" for name in arguments[:1] if name in _commands()), "")
        _fail(f"{error.format_message().rstrip('.')} (see deltapatch{command} -h)", debug)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has seen enough (`deltapatch inspect ... | head`).
        sys.stderr.close()
    except DeltapatchError as error:
        _fail(str(error), debug)
    except Exception as error:
        _fail(
            f"{type(error).__name__}: {str(error) or 'no message'} (run again with --debug to see where)",
            debug,
        )
    else:
        if code:
            sys.exit(code)


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    lines = (line.strip() for line in message.splitlines())
    print(f"error: {' '.join(line for line in lines if line)}", file=sys.stderr)
    sys.exit(EXIT_ERROR)
