"""The `sedd` command: its flags, and what it says of mistakes. What the commands do is in `sedd.commands`."""

import argparse
import difflib
import os
import re
import shlex
import sys

from sedd import commands
from sedd.data import sources, tokenizers
from sedd.data.splits import SPLITS
from sedd.errors import UserError
from sedd.evaluation.protocols import PROTOCOLS
from sedd.runtime import faults, processes, streams
from sedd.samplers import PLANNED, SAMPLERS
from sedd.version import __version__

_SAMPLERS = f"{', '.join(SAMPLERS)} or {PLANNED}"
QUICK = ("builtin:names", "builtin:functions")  # what the quickstart can train on


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        if found := re.fullmatch(r"argument (--\w+): expected one argument", message):
            message += f"; one that begins with - is written {found[1]}=-..."
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Once(argparse.Action):
    """Stores a value; an error where the flag is there twice, since one of the two would be dropped silently."""

    def __call__(self, parser, namespace, value, option=None):
        if getattr(namespace, self.dest, None) not in (None, value):
            raise argparse.ArgumentError(self, f"given twice, as {getattr(namespace, self.dest)} and {value}")
        setattr(namespace, self.dest, value)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for a mistake of the user's.

    With several processes every one of them runs it, process 0 prints, and a mistake of one ends all.
    """
    return streams.run(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> int:
    args, settings = parse(argv)
    from sedd.training.fit import Interrupted

    try:
        args.run(args, settings)
    except Interrupted as stopped:
        print(f"sedd: {stopped}", file=sys.stderr)
    except KeyboardInterrupt:
        if args.command == "prepare":
            print("sedd: stopped; what is done is kept, and the same command continues", file=sys.stderr)
        processes.abort_job(130, "Ctrl-C")
        return 130
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else faults.fault(error, args.command)
        if line is None:
            raise
        print(f"sedd: error: {line}", file=sys.stderr)
        processes.abort_job(2, line)
        return 2
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a command, and the settings of the config, such as "training.steps=100". SystemExit for a mistake.

    Flags and templates come in any order; all after `--` is templates. `sedd help COMMAND` is `sedd COMMAND --help`.
    """
    parser, commands = _parsers()
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    name = argv[0] if argv else None
    if name not in commands:
        later = next((word for word in argv if word in commands), None)
        if later is not None and name.startswith("-") and name not in ("-h", "--help", "--version"):
            parser.error(f"the command comes first, as in sedd {later} {shlex.quote(name)}")
        parser.parse_args(argv)  # prints the help or the version, or says what is wrong
        parser.error("the following arguments are required: COMMAND")
    cut = argv.index("--") if "--" in argv else len(argv)
    args, rest = commands[name].parse_known_intermixed_args(argv[1:cut])
    if hasattr(args, "template"):
        args.template += map(_text, argv[cut + 1 :])
    else:
        rest += argv[cut:]
    settings = [word for word in rest if args.takes_config and _SETTING.match(word)]
    wrong = next((number for number, word in enumerate(rest) if word not in settings), None)
    if wrong is not None:
        parser.error(_unknown(commands[name], args, rest[wrong:]))
    return args, [word.removeprefix("--config.") for word in settings]


_SETTING = re.compile(r"--config\.[^=]+=.")


def _unknown(parser: argparse.ArgumentParser, args: argparse.Namespace, words: list[str]) -> str:
    """What to say of words of which the first is no flag of a command."""
    word, *after = words
    flag = word.partition("=")[0]
    if args.takes_config and flag.startswith("--config."):
        value = next((shlex.quote(other.lstrip("=")) for other in after if other != "="), "VALUE")
        return f"{flag} has no value; write {flag}={'VALUE' if value.startswith('--') else value}"
    line = f"sedd {args.command} takes no {word}"
    flags = _flags(parser, args)
    near = difflib.get_close_matches("--" + flag.lstrip("-").replace("-", "_"), flags, n=1, cutoff=0.75)
    if near and (word.startswith("-") or "=" in word):
        line += f"; the nearest is {flags[near[0]]}"
    elif hasattr(args, "template"):
        line += "; a template that begins with - comes after --"
    return f"{line}; see sedd {args.command} --help"


def _flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """The flags of a command by what people may write instead of them: keys of the config without their group."""
    found = {flag: flag for flag in re.findall(r"--\w+", parser.format_usage())}
    if args.takes_config:
        from sedd import config as configs

        keys = [f"{group}.{name}" for group, members in configs.default().items() for name in members]
        short = {f"--{key.partition('.')[2]}": f"--config.{key}" for key in reversed(keys)}
        found = short | {f"--{key}": f"--config.{key}" for key in keys} | found
        found |= {f"--config.{key}": f"--config.{key}" for key in keys}
    return found


def _whole(text: str) -> int:
    """A whole number, also one such as 1e3."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if (number := float(text)).is_integer():
            return int(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number")


def _text(text: str) -> str:
    """Text of the command line, which is UTF-8 whatever the locale."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """That of `sedd` alone, and those of its commands by their names."""
    about = "Score-entropy discrete diffusion for text."
    parser = _Parser(prog="sedd", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sedd {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, takes_config=False):
        more = " Any key of the config can be set, as in --config.training.steps=100." if takes_config else ""
        made = parsers.add_parser(name, help=text, description=text + more, allow_abbrev=False)
        made.set_defaults(run=run, command=name, takes_config=takes_config)
        return made

    quick = command("quickstart", commands.quickstart, "Train on a built-in corpus, evaluate, sample and infill.", True)
    quick.add_argument("--workdir", default="runs/quickstart", help="where the run goes (%(default)s)")
    quick.add_argument("--source", default=QUICK[0], choices=QUICK, help="(%(default)s)")

    prep = command("prepare", commands.prepare, "Tokenise a source once, into a corpus directory.")
    prep.add_argument("--source", action=_Once, help=f"the text, to be split: {', '.join(sources.FORMS)}")
    for split in SPLITS:
        text = f"instead of --source: the text of the {split} split"
        prep.add_argument(f"--{split}", action=_Once, metavar="SOURCE", help=text)
    rules = "documents:0.9,0.05,0.05, position:90,5,5 or last:100000 (documents; position where they are few)"
    prep.add_argument("--split", metavar="RULE", help=rules)
    prep.add_argument("--tokenizer", default="sentencepiece:8000", help=f"{', '.join(tokenizers.FORMS)} (%(default)s)")
    prep.add_argument("--out", action=_Once, required=True, help="the corpus directory to make")
    modes = "packed, one stream of text, or padded, documents in rows of their own (%(default)s)"
    prep.add_argument("--mode", default="packed", help=modes)
    prep.add_argument("--padding", help="of padded documents: scored, or ignored (the default)")
    prep.add_argument("--seed", type=_whole, default=0, help="draws the held-out documents, and their order")
    prep.add_argument("--workers", type=_whole, help="threads (one a core); the corpus does not depend on them")

    train = command("train", commands.train, "Train, or continue the run that is in --workdir.", True)
    text = "a file with get_config(), such as experiments/quickstart.py; else the default"
    train.add_argument("--config", action=_Once, help=text)
    train.add_argument("--workdir", action=_Once, help="where the run goes; required, but for a dry run")
    text = "a model whose weights a new run starts from"
    train.add_argument("--init_from", action=_Once, metavar="MODEL", help=text)
    train.add_argument("--dry_run", action="store_true", help="print sizes, memory and operations; train nothing")

    evaluate = command(
        "eval", commands.evaluate, "Bound the negative log-likelihood of text, or measure the quality of samples."
    )
    _add_model(evaluate, required=False)
    text = "another, on the same noise: the difference and its error"
    evaluate.add_argument("--against", action=_Once, metavar="MODEL", help=text)
    evaluate.add_argument("--data", action=_Once, help="a corpus directory (the one the model was trained on)")
    text = "instead of --data: text as `sedd prepare` takes it, wikitext:wiki.test.raw"
    evaluate.add_argument("--source", action=_Once, help=text)
    evaluate.add_argument("--split", help="train, validation or test (what the protocol has; test)")
    evaluate.add_argument("--protocol", help=f"{', '.join(PROTOCOLS)}, or several (clean)")
    evaluate.add_argument("--draws", type=_whole, help="noise levels a block (the protocol's; the config's)")
    evaluate.add_argument("--seed", type=_whole, help="of the noise (0)")
    evaluate.add_argument("--batch_size", type=_whole, help="blocks at a time over all devices; changes no number")
    text = "a folder for the report, and for what is scored, so that a job can go on"
    evaluate.add_argument("--out", action=_Once, help=text)
    text = "instead of text: what `sedd sample --json` printed"
    evaluate.add_argument("--samples", action=_Once, metavar="FILE", help=text)
    text = "with --samples: a folder of a language model, for generative perplexity"
    evaluate.add_argument("--judge", action=_Once, help=text)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    sample = command("sample", commands.sample, "Draw texts.")
    _add_model(sample)
    _add_sampling(sample)

    compare = command(
        "sweep", commands.sweep, "Measure the quality of samples against network calls, for several samplers."
    )
    _add_model(compare)
    compare.add_argument("--samplers", default="tweedie,euler", help=f"of {_SAMPLERS} (%(default)s)")
    compare.add_argument("--steps", default="8,16,32,64,128", help="of each sampler (%(default)s)")
    compare.add_argument("--num_samples", type=_whole, default=64, help="at each point (%(default)s)")
    compare.add_argument("--judge", action=_Once, help="a folder of a language model (the model itself, by its bound)")
    compare.add_argument("--out", action=_Once, help="a folder for sweep.json and sweep.png")
    _add_drawing(compare)

    infill = command("infill", commands.infill, "Fill in the blanks of texts.")
    _add_model(infill)
    _add_sampling(infill)
    text = r"text with blanks, <blank:n> for n tokens, as in 'A <blank:8> sat.'; \<blank is literal text"
    infill.add_argument("template", nargs="*", type=_text, help=text)
    infill.add_argument("--prefix", type=_text, help="instead of a template: what comes before the blank")
    infill.add_argument("--suffix", type=_text, help="instead of a template: what comes after the blank")
    return parser, parsers.choices


def _add_model(parser, required=True):
    text = "a run, an exported model or a published SEDD checkpoint"
    parser.add_argument("--model", action=_Once, required=required, help=text)
    parser.add_argument("--tokenizer", help="of a model that has none: gpt2:FOLDER, and what else `sedd prepare` takes")


def _add_sampling(parser):
    parser.add_argument("--num_samples", type=_whole, default=1, help="how many, of each template (%(default)s)")
    parser.add_argument("--steps", type=_whole, default=128, help="of the sampler (%(default)s)")
    _add_drawing(parser)
    parser.add_argument("--sampler", default="tweedie", help=f"{_SAMPLERS} (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    parser.add_argument("--watch", action="store_true", help="show the texts emerging, in the terminal")
    text = "write a page that plays back how the texts emerged"
    parser.add_argument("--html", action=_Once, metavar="FILE", help=text)


def _add_drawing(parser):
    parser.add_argument(
        "--length", type=_whole, help="tokens in all (the model's block); longer texts are drawn block after block"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the law over clean tokens (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens of this mass (%(default)s)")
    parser.add_argument("--seed", type=_whole, default=0)
    parser.add_argument("--batch_size", type=_whole, help="rows at a time; changes no sample")


if __name__ == "__main__":
    sys.exit(main())
