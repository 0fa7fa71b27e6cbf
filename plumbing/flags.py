"""The command line: a flag for each field of a dataclass, and how every script ends."""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from os.path import expanduser
from pathlib import Path
from typing import Literal, get_args, get_origin


def fields_of(cls):
    """[(group, field, help)]: the group is the `# --- title ---` above a field, the help is its comment."""
    group, rows, fields = cls.__name__, [], {f.name: f for f in dataclasses.fields(cls)}
    for text in inspect.getsource(cls).splitlines():
        if title := re.match(r"    # --- (.+) ---$", text):
            group = title[1]
        elif (match := re.match(r"    (\w+): .+?  # (.+)$", text)) and match[1] in fields:
            rows.append((group, fields[match[1]], match[2]))
    return rows


def add_flags(parser, *configs, skip=()):
    """Add a flag for every field of these dataclasses, in groups. One that is not given leaves no trace."""
    groups = {}
    for title, f, comment in (row for cls in configs for row in fields_of(cls) if row[1].name not in skip):
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = (get_args(f.type) or (f.type,))[0]  # int | None: int
        if get_origin(f.type) is Literal:
            options = {"choices": get_args(f.type)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        else:
            options = {"metavar": {int: "N", float: "X", str: "NAME"}[kind],
                       "type": None if kind is str else kind}
        default = ("off", "on")[f.default] if type(f.default) is bool else f.default
        shown = comment if default is None else f"{comment} [{default}]"
        groups[title].add_argument(f"--{f.name}", help=shown, default=argparse.SUPPRESS, **options)


def utf8(text):
    """The type of a flag whose text stays as it is. ValueError for a byte that is not UTF-8."""
    return text.encode().decode()


# Flags that there are not, or no more: what to say instead, where the letters do not lead to it.
INSTEAD = dict.fromkeys(("--samples", "--num_samples"), "--seed=1, and --seed=2 for the next text") | {
    "--lr": "--learning_rate"}


def named(text):
    """The type of a flag that is a name or a path; a shell leaves the ~ of --out=~/run as it is."""
    if not text:  # else --ckpt="$RUN" would be the newest run, and --out="$RUN" this folder
        raise argparse.ArgumentTypeError("the value is empty: leave the flag out, or set the shell variable")
    return expanduser(text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that knows ~ and whose errors name a way out."""

    def __init__(self, **options):
        super().__init__(**options)
        self.register("type", None, named)
        self.register("type", Path, lambda text: Path(named(text)))

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            name, known = unknown[1], self._option_string_actions
            near = [INSTEAD[name]] if name in INSTEAD else difflib.get_close_matches(name, known, 1)
            message += f": did you mean {near[0]}?" if near else ": --help shows flags and presets"
        switch = r"argument (\S+): ignored explicit argument"
        super().error(re.sub(switch, r"say \1, without the value", message))


def parser_of(doc, name, usage, presets=None):
    """A Parser that shows a script's docstring, wrapped to a terminal, and takes no shortened flags.

    presets: {name: {field: value}}, for a flag --preset and the end of the help.
    """
    text = (doc or "").partition("Reading order")[0].strip()  # python -OO drops docstrings
    # Commands are indented, and stay as they are; prose is wrapped.
    parts = [part if part[:1] == " " else textwrap.fill(part, 78) for part in text.split("\n\n")]
    parser = Parser(
        prog=name, usage=f"{name} {usage}", description="\n\n".join(parts), allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30))
    if presets:
        parser.epilog = "presets:"
        for preset, values in presets.items():
            table = " ".join(f"{field}={value}" for field, value in values.items())
            parser.epilog += "\n" + textwrap.fill(table, 78, initial_indent=f"  {preset:<8}",
                                                  subsequent_indent=" " * 10)
        parser.add_argument("--preset", choices=list(presets), default=argparse.SUPPRESS,
                            help="a table of values, see below [laptop; gpu where there is CUDA]")
    return parser


IDLE = dict.fromkeys(("gate_kind", "gate_shared", "gate_act", "gate_op", "gate_input"), ("gate", "none")) | {
    "n_expert_active": ("n_expert", 0), "min_lr_ratio": ("schedule", "constant"), "overwrite": ("out", None)}


def refuse_idle(flags, *configs):
    """ValueError for a flag that was given and does nothing, because of another field of the configs."""
    values = {name: value for config in configs for name, value in vars(config).items()}
    for flag, (other, off) in IDLE.items():
        if flag in flags and values[other] == off:
            raise ValueError(f"--{flag} does nothing with {other}={off}: leave it out, or change --{other}")


ROOT = Path(__file__).resolve().parents[1]


def command(script, *words):
    """How to run a script of ours from where the user stands, as this system's shell wants it quoted."""
    try:
        path = os.path.relpath(ROOT / script)
    except ValueError:  # another drive of Windows
        path = str(ROOT / script)
    words = ["python", path, *map(str, words)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


FULL_MEMORY = "out of memory|allocate memory|(multiplication|calculation) overflow"  # in torch's words


def run_main(main):
    """Run a script's main(). A mistake that the user can fix ends in one sentence and status 2."""
    name = os.path.basename(sys.argv[0])

    def end(status, text):
        print(f"{name}: {text}", file=sys.stderr)
        sys.exit(status)

    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that lacks a character shows ? instead; a log file has each line at once.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain kill ends like Ctrl-C
    try:
        main()
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        where = getattr(error, "filename", None)  # of an error of the system, which has no sentence
        end(2, f"{where} cannot be used ({error.strerror})" if where and error.strerror else error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(FULL_MEMORY, str(error)):
            raise
        end(2, "the memory is full: try a smaller batch, window or model, or less text")
    except KeyboardInterrupt as interrupt:
        end(130, str(interrupt) or "interrupted")
