"""The command line: ``fxshare COMMAND``, or ``python -m fxshare COMMAND``.

Results go to stdout; messages, warnings and progress to stderr. Each command is a function that
returns a :class:`~fxshare.cli.output.Result`; what is slow to import is imported inside of it, and
errors are written ``fxshare.errors.X``, since their module brings torch: ``--help`` must not wait.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import fxshare
from fxshare.cli.bench import bench_app
from fxshare.cli.compile import compile_model
from fxshare.cli.demo import demo
from fxshare.cli.estimate import estimate_model
from fxshare.cli.eval import evaluate_model
from fxshare.cli.export import export_model
from fxshare.cli.init import init_config
from fxshare.cli.inspect import inspect_model
from fxshare.cli.output import reports, show_error
from fxshare.cli.plan import plan_model
from fxshare.cli.ranks import speaks_of
from fxshare.cli.refine import refine_model
from fxshare.cli.report import report_model
from fxshare.cli.schema import schema
from fxshare.cli.validate import validate
from fxshare.cli.verify import verify_model

OK, KNOWN_ERROR, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

# typer 0.12 imports click, later versions carry their own: this is UsageError of either.
_UsageError: type = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (``sys.argv[1:]`` where None); returns the exit code.

    0: done. 1: an error. 2: a wrong command line or configuration. 3: a numerical check failed.
    130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("FXSHARE_DEBUG", "0") not in ("", "0")
    try:
        code = _command()(arguments, prog_name="fxshare", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return KNOWN_ERROR
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _failed(error, debug)
    if code == INTERRUPTED:  # some versions of typer raise, others return it
        show_error("interrupted")
    return code if isinstance(code, int) else OK


def _failed(error: Exception, debug: bool) -> int:
    show = show_error if speaks_of(error) else _say_nothing
    if isinstance(error, _UsageError):
        show(error.format_message(), hint=_usage(error))  # type: ignore[attr-defined]
        return USAGE
    if isinstance(error, fxshare.errors.FxShareError):
        show(str(error))
        if isinstance(error, fxshare.errors.ConfigError):
            return USAGE
        return CHECK_FAILED if isinstance(error, fxshare.errors.CheckFailed) else KNOWN_ERROR
    if isinstance(error, OSError):
        show(f"{error.filename or 'input or output'}: {error.strerror or error}")
        return KNOWN_ERROR
    hint = None if debug else "--debug shows where; please report it if it is not your model's code"
    show(f"unexpected {type(error).__name__}: {error}", hint=hint)
    return KNOWN_ERROR


def _say_nothing(message: str, *, hint: str | None = None) -> None:
    del message, hint


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    command = "fxshare" if context is None else context.command_path
    return f"'{command} --help' shows what it takes"


@functools.cache  # typer reads the annotations of every command, which takes longer than some do
def _command() -> Callable[..., Any]:
    return typer.main.get_command(make_app())


def make_app() -> typer.Typer:
    """The commands, in the order in which ``--help`` lists them."""
    app = typer.Typer(
        name="fxshare",
        no_args_is_help=False,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command("demo")(reports(demo))
    app.command("init")(reports(init_config))
    app.command("validate")(reports(validate))
    app.command("plan")(reports(plan_model))
    app.command("estimate")(reports(estimate_model))
    app.command("compile")(reports(compile_model))
    app.command("refine")(reports(refine_model))
    app.command("verify")(reports(verify_model))
    app.command("inspect")(reports(inspect_model))
    app.command("report")(reports(report_model))
    app.command("eval")(reports(evaluate_model))
    app.command("export")(reports(export_model))
    app.command("schema")(reports(schema))
    app.add_typer(bench_app())
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from fxshare import __version__

        print(f"fxshare {__version__}")
        raise typer.Exit()


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Make transformers smaller and faster by cross-layer basis sharing.

    \b
    fxshare demo                                    a tour, nothing to download
    fxshare init MODEL -o model.yaml                write a configuration for a model
    fxshare validate MODEL -c gpt2.yaml             what does the configuration match?
    fxshare compile MODEL -c gpt2.yaml -o out/      rewrite, check, report, save
    fxshare eval out/ --against MODEL --data x.txt  perplexity side by side

    A MODEL is a folder that fxshare saved, a transformers folder, package.module:factory,
    'embedded', or owner/name on the Hugging Face hub, the only name that is downloaded. Exit codes:
    0 done, 1 error, 2 wrong command line or configuration, 3 a numerical check failed,
    130 interrupted.
    """
    del version


__all__ = ["main", "make_app"]
