"""The command line: one file a command, no logic."""

from __future__ import annotations

import sys

import typer

from llmopt.cli import (
    bench,
    chat,
    convert,
    demo,
    eval,
    generate,
    imatrix,
    inspect,
    quantize,
    recipes,
    serve,
)
from llmopt.cli.console import errors
from llmopt.errors import AlreadyConcludedError, ExitCode, LlmoptError
from llmopt_evals.errors import EvaluationError

app = typer.Typer(
    name="llmopt",
    help="Quantize a language model, and publish it only when it is still a good one.\n\n"
    "Exit codes: 0 passed, 2 bad input, 3 refused by the gate, 4 inconclusive.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    quantize.quantize,
    convert.convert,
    eval.evaluate,
    inspect.inspect,
    imatrix.imatrix,
    recipes.recipes,
    generate.generate,
    chat.chat,
    demo.demo,
):
    app.command(name="eval" if command is eval.evaluate else None)(command)
app.command(context_settings=serve.SETTINGS)(serve.serve)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; an error a user can mend is printed without a traceback."""
    try:
        app()
    except AlreadyConcludedError as done:
        errors.print(done.what, markup=False, highlight=False, soft_wrap=True)
        sys.exit(int(done.exit_code))
    except LlmoptError as error:
        _fail(error.what, error.remedy, error.exit_code)
    except EvaluationError as error:
        _fail(error.what, error.remedy, ExitCode.BAD_INPUT)


def _fail(what: str, remedy: str, code: ExitCode) -> None:
    errors.print("[bold red]error:[/] ", end="")
    errors.print(what, markup=False, highlight=False, soft_wrap=True)
    errors.print("[bold]what to do:[/] ", end="")
    errors.print(remedy, markup=False, highlight=False, soft_wrap=True)
    sys.exit(int(code))
