"""The command `acc`: finds the verb's file, runs it, and turns whatever goes wrong into one line and an exit code."""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

USAGE, ENVIRONMENT, MISSED = 2, 1, 3


def verbs() -> dict[str, str]:
    """`{verb: first line of its help}`: every file here that defines a function of its own name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == path.stem and node.name != "main":
                found[path.stem] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def main() -> None:
    """The entry point of the command."""
    arguments = sys.argv[1:]
    known = verbs()
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _overview(known)
        sys.exit(0)
    if arguments[0] == "--version":
        from .. import __version__

        print(f"acc {__version__}")
        sys.exit(0)
    verb, *rest = arguments
    if verb not in known:
        near = difflib.get_close_matches(verb, known, n=3) or list(known)
        _fail(f"there is no verb {verb!r}; there is {', '.join(near)}", USAGE)
    sys.exit(run(verb, rest))


def run(verb: str, arguments: list[str]) -> int:
    """Runs a verb; returns its exit code. `--debug` lets exceptions through with their traceback."""
    import typer

    from .ui import Missed, quiet

    wrong_usage: Any = typer.BadParameter.__bases__[0]  # click's, which typer carries under a private name
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not debug:
        sys.excepthook = _bug
    quiet()
    module = importlib.import_module(f".{verb}", __package__)
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    settings = {"help_option_names": ["-h", "--help"]}
    app.command(cls=getattr(module, "COMMAND", None), context_settings=settings)(getattr(module, verb))
    command = typer.main.get_command(app)
    try:
        with command.make_context(f"acc {verb}", arguments) as context:  # not `main`, which swallows Ctrl-C
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except wrong_usage as error:
        unknown = getattr(error, "option_name", None)
        if unknown is None:
            return _say(f"{' '.join(error.format_message().split())} (see acc {verb} --help)", USAGE)
        near = difflib.get_close_matches(unknown, _options(command), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; see acc {verb} --help and acc show METHOD"
        return _say(f"there is no option {unknown}{hint}", USAGE)
    except Missed as error:
        return _say(str(error), MISSED)
    except KeyboardInterrupt as error:
        return _say(f"stopped{': ' + str(error) if str(error) else ''}", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ENVIRONMENT
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if debug:
            raise
        return _say(_one_line(error), USAGE if isinstance(error, ValueError) else ENVIRONMENT)
    except RuntimeError as error:  # torch's own for a full GPU; any other is a bug
        if "out of memory" not in str(error):
            raise
        return _say(_one_line(error), ENVIRONMENT)
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last resort: what nobody foresaw, in one line."""
    if issubclass(kind, KeyboardInterrupt):
        _say("stopped", 130)
    else:
        _say(f"{kind.__name__}: {_one_line(error)[:300]}; this is a bug in acc, --debug shows where", ENVIRONMENT)


def _options(command: object) -> list[str]:
    own = [name for parameter in getattr(command, "params", []) for name in parameter.opts]
    return list(dict.fromkeys([*own, *getattr(command, "method_options", ())]))


def _overview(known: dict[str, str]) -> None:
    print("acc: calibrate and compress language models, and say what it cost\n")
    print("Usage: acc VERB MODEL [options]      acc VERB --help\n")
    for name, line in known.items():
        print(f"  {name:<10}{line}")
    print("\nMODEL is a hub id (org/name[@revision]), a local folder, a .gguf file, or `demo`, the small")
    print("mixture-of-experts model that comes with acc. Every verb takes --json;")
    print("--debug shows where an error comes from.")
    print("Exit codes: 0 done, 1 the machine, 2 usage or input, 3 a bound was missed, 130 stopped.")
    print("\nFirst steps:  acc quantize demo --bits 3")


def _say(text: str, code: int) -> int:
    print(f"acc: {text}", file=sys.stderr)
    return code


def _fail(text: str, code: int) -> None:
    sys.exit(_say(text, code))
