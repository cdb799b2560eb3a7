"""The command line: finds the verb, runs it, and reports errors in one line."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from hpm.commands.verbs import ABOUT, GROUPS, VERBS, Verb
from hpm.core.errors import UserError, nearest, why
from hpm.core.parser import HelpWanted
from hpm.core.signals import Interrupted
from hpm.core.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, 2 for a mistake of the user, 128 + n on signal n."""
    try:
        run, options = understand(list(sys.argv[1:] if arguments is None else arguments))
        run(options)
        return 0
    except HelpWanted as wanted:
        print(str(wanted), end="")
        return 0
    except UserError as error:
        _complain(str(error))
        return 2
    except PermissionError as error:
        _complain(f"{error.filename}: {why(error)}" if error.filename else why(error))
        return 2
    except Interrupted as stopped:
        if _rank() == 0:
            print(f"hpm: {stopped}", file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported here
            _complain(_out_of_memory(error))
            return 2
        if _reports_error():
            raise
        return 1  # another process has failed first and says why


def understand(arguments: Sequence[str]) -> tuple[Callable[[Any], None], Any]:
    """What to run, and its options. Raises UserError, or HelpWanted for --help."""
    if arguments and arguments[0].startswith("--import"):
        from hpm.core.plugins import import_named

        arguments = import_named(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        raise HelpWanted(_usage())
    name, *rest = arguments
    if name == "__complete":  # asked by the shell: see hpm/commands/completion.py
        from hpm.commands.completion import complete

        raise HelpWanted("".join(f"{word}\n" for word in complete(rest)))
    if name == "--version":
        raise HelpWanted(f"{__version__}\n")
    if name in GROUPS:
        return _understand_kind(name, rest)
    if name not in VERBS:
        known = [*VERBS, *GROUPS]
        raise UserError(f"no verb '{name}'{nearest(name, known)} (hpm --help lists them)")
    verb = VERBS[name]
    return verb.run, verb.command(f"hpm {name}").parse(rest)


def _understand_kind(group: str, arguments: Sequence[str]) -> tuple[Callable[[Any], None], Any]:
    """The same for a verb of several kinds: `hpm eval knn`, `hpm bench step`."""
    noun, find = GROUPS[group]
    if not arguments:
        raise UserError(f"name {noun}: hpm {group} {'|'.join(find())} (see hpm {group} --help)")
    name, *rest = arguments
    if name in ("-h", "--help"):
        raise HelpWanted(_group_usage(group, find()))
    kinds = find(name)
    if name not in kinds:
        word = noun.partition(" ")[2]
        known = f"hpm {group} {'|'.join(kinds)}"
        raise UserError(f"no {word} '{name}'{nearest(name, kinds)} ({known})")
    return kinds[name].run, kinds[name].command(f"hpm {group} {name}").parse(rest)


def _group_usage(group: str, kinds: dict[str, Verb]) -> str:
    head = f"usage: hpm {group} KIND ...   (hpm {group} KIND --help for its options)"
    listing = _listing({kind: verb.about for kind, verb in kinds.items()})
    return "\n".join([head, "", *listing, ""])


def _usage() -> str:
    head = "usage: hpm VERB ...   (hpm VERB --help for its options)"
    options = {
        "--import MODULE": "before the verb: import a module of yours that a run needs",
        "--version": "print the version",
    }
    return "\n".join([head, "", *_listing(ABOUT), "", *_listing(options), ""])


def _listing(entries: dict[str, str]) -> list[str]:
    """Names and descriptions in two columns, as wide as the terminal."""
    width = min(100, shutil.get_terminal_size().columns)
    indent = max(map(len, entries)) + 4
    lines = []
    for name, about in entries.items():
        first = f"  {name}".ljust(indent)
        lines += textwrap.wrap(about, width, initial_indent=first, subsequent_indent=" " * indent)
    return lines


def _out_of_memory(error: Exception) -> str:
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    more = f" ({wanted[1]} more were wanted)" if wanted else ""
    return (
        f"the GPU's memory is full{more}: pass --accumulate 2 (4, ...), --checkpoint-activations "
        "or a smaller --batch-size, as far as the verb has them"
    )


def _complain(text: str) -> None:
    """Report an error once, whichever process it happened on."""
    if _reports_error():
        rank = _rank()
        print(f"hpm: error: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr)


def _distributed() -> Any:
    """`hpm.core.distributed`, once PyTorch is imported: before, nothing joins other processes."""
    if "torch" not in sys.modules:
        return None
    from hpm.core import distributed

    return distributed


def _rank() -> int:
    distributed = _distributed()
    return distributed.rank() if distributed else int(os.environ.get("RANK", 0))


def _reports_error() -> bool:
    distributed = _distributed()
    if distributed:
        return distributed.reports_error()
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0
