"""The `sedd` command: its flags and its error messages. The commands themselves are in `sedd.commands`."""

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
from sedd.generation.options import FLAGS
from sedd.generation.samplers import PLANNED, SAMPLERS
from sedd.runtime import faults, processes, streams
from sedd.version import __version__

_SAMPLERS = f"{', '.join(SAMPLERS)} or {PLANNED}"
QUICK = ("builtin:names", "builtin:functions")  # corpora of the quickstart


class _Parser(argparse.ArgumentParser):
    """Prints an invalid argument as one line, and exits with status 2."""

    def error(self, message):
        if match := re.fullmatch(r"argument (--\w+): expected one argument", message):
            message += f"; a value that begins with - is written {match[1]}=-..."
        self.exit(2, f"{self.prog}: error: {message}\n")


class _Once(argparse.Action):
    """Stores a value. A flag that is given twice with different values is an error, so that neither is dropped."""

    def __call__(self, parser, namespace, value, option=None):
        if getattr(namespace, self.dest, None) not in (None, value):
            raise argparse.ArgumentError(self, f"given twice, as {getattr(namespace, self.dest)} and {value}")
        setattr(namespace, self.dest, value)


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 2 for an invalid argument or input, 130 for Ctrl-C.

    With several processes each of them runs the command, process 0 prints, and an error in one ends all.
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
            print("sedd: stopped; finished parts are kept, and the same command continues", file=sys.stderr)
        processes.abort_job(130, "Ctrl-C")
        return 130
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else faults.message_for(error, args.command)
        if line is None:
            raise
        print(f"sedd: error: {line}", file=sys.stderr)
        processes.abort_job(2, line)
        return 2
    return 0


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of a command, and the config overrides, such as "training.steps=100".

    Flags and templates come in any order; all arguments after `--` are templates. `sedd help COMMAND` is
    `sedd COMMAND --help`. SystemExit for an invalid argument.
    """
    parser, parsers = _parsers()
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    name = argv[0] if argv else ""
    if name not in parsers:
        command = next((word for word in argv if word in parsers), None)
        if command is not None and name.startswith("-") and name not in ("-h", "--help", "--version"):
            parser.error(f"the command comes first, as in sedd {command} {shlex.quote(name)}")
        parser.parse_args(argv)  # prints the help, the version or the error, and exits
        parser.error("the following arguments are required: COMMAND")
    end = argv.index("--") if "--" in argv else len(argv)
    args, rest = parsers[name].parse_known_intermixed_args(argv[1:end])
    if hasattr(args, "template"):
        args.template += map(_utf8, argv[end + 1 :])
    else:
        rest += argv[end:]
    settings = [word for word in rest if args.takes_config and _SETTING.match(word)]
    first_unknown = next((number for number, word in enumerate(rest) if word not in settings), None)
    if first_unknown is not None:
        parser.error(_unknown_argument(parsers[name], args, rest[first_unknown:]))
    return args, [word.removeprefix("--config.") for word in settings]


_SETTING = re.compile(r"--config\.[^=]+=.")


def _unknown_argument(parser: argparse.ArgumentParser, args: argparse.Namespace, words: list[str]) -> str:
    """Returns the error message for an unknown argument. words: that argument, and those after it."""
    word, *following = words
    flag = word.partition("=")[0]
    if args.takes_config and flag.startswith("--config."):
        value = next((shlex.quote(other.lstrip("=")) for other in following if other != "="), "VALUE")
        return f"{flag} has no value; write {flag}={'VALUE' if value.startswith('--') else value}"
    line = f"sedd {args.command} does not accept {word}"
    flags = _flags(parser, args)
    nearest = difflib.get_close_matches("--" + flag.lstrip("-").replace("-", "_"), flags, n=1, cutoff=0.75)
    if nearest and (word.startswith("-") or "=" in word):
        line += f"; the nearest is {flags[nearest[0]]}"
    elif hasattr(args, "template"):
        line += "; a template that begins with - comes after --"
    return f"{line}; see sedd {args.command} --help"


def _flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """Returns the flags of a command by spelling, config keys also without `config.` or their group."""
    flags = {flag: flag for flag in re.findall(r"--\w+", parser.format_usage())}
    if args.takes_config:
        from sedd import config as configs

        keys = [f"{group}.{name}" for group, members in configs.default().items() for name in members]
        short = {f"--{key.partition('.')[2]}": f"--config.{key}" for key in reversed(keys)}
        flags = short | {f"--{key}": f"--config.{key}" for key in keys} | flags
        flags |= {f"--config.{key}": f"--config.{key}" for key in keys}
    return flags


def _integer(text: str) -> int:
    """Parses an integer, also one such as 1e3."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if (number := float(text)).is_integer():
            return int(number)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not an integer")


def _utf8(text: str) -> str:
    """Decodes text of the command line as UTF-8, in any locale."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Returns the parser of `sedd`, and those of its commands by name."""
    about = "Score-entropy discrete diffusion for text."
    parser = _Parser(prog="sedd", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sedd {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, takes_config=False):
        overrides = " Any key of the config can be set, as in --config.training.steps=100." if takes_config else ""
        subparser = parsers.add_parser(name, help=text, description=text + overrides, allow_abbrev=False)
        subparser.set_defaults(run=run, command=name, takes_config=takes_config)
        return subparser

    quick = command(
        "quickstart", commands.quickstart, "Train a small model on a built-in corpus; evaluate, sample, infill.", True
    )
    quick.add_argument("--workdir", default="runs/quickstart", help="run directory (%(default)s)")
    quick.add_argument("--source", default=QUICK[0], choices=QUICK, help="built-in corpus (%(default)s)")

    prep = command("prepare", commands.prepare, "Tokenize text into a corpus directory.")
    prep.add_argument("--source", action=_Once, help=f"text to split: {', '.join(sources.FORMS)}")
    for split in SPLITS:
        text = f"instead of --source: text of the {split} split"
        prep.add_argument(f"--{split}", action=_Once, metavar="SOURCE", help=text)
    rules = "documents:0.9,0.05,0.05, position:90,5,5 or last:100000 (documents, or position for few documents)"
    prep.add_argument("--split", metavar="RULE", help=rules)
    prep.add_argument("--tokenizer", default="sentencepiece:8000", help=f"{', '.join(tokenizers.FORMS)} (%(default)s)")
    prep.add_argument("--out", action=_Once, required=True, help="corpus directory to write")
    modes = "packed: blocks cut from one stream; padded: a document per row (%(default)s)"
    prep.add_argument("--mode", default="packed", help=modes)
    prep.add_argument("--padding", help="with --mode=padded: scored or ignored padding (ignored)")
    prep.add_argument(
        "--seed", type=_integer, default=0, help="seed of the split and of the document order (%(default)s)"
    )
    prep.add_argument("--workers", type=_integer, help="threads (one per core); the corpus is the same for any number")

    train = command("train", commands.train, "Train a model, or resume the run in --workdir.", True)
    text = "Python file with get_config(), such as experiments/quickstart.py (the default config)"
    train.add_argument("--config", action=_Once, help=text)
    train.add_argument("--workdir", action=_Once, help="run directory; required unless --dry_run")
    text = "initialise a new run from the weights of this model; without --config also its network"
    train.add_argument("--init_from", action=_Once, metavar="MODEL", help=text)
    train.add_argument("--dry_run", action="store_true", help="print parameters, memory and FLOPs without training")

    evaluate = command(
        "eval", commands.evaluate, "Report the NLL bound (negative ELBO) of text, or the quality of samples."
    )
    _add_model(evaluate, required=False)
    text = "second model, scored on the same noise: prints the difference and its standard error"
    evaluate.add_argument("--against", action=_Once, metavar="MODEL", help=text)
    evaluate.add_argument("--data", action=_Once, help="corpus directory (the training corpus)")
    text = "instead of --data: a source of `sedd prepare`, such as wikitext:wiki.test.raw"
    evaluate.add_argument("--source", action=_Once, help=text)
    evaluate.add_argument("--split", help="train, validation or test (the split of the protocol, else test)")
    evaluate.add_argument("--protocol", help=f"{', '.join(PROTOCOLS)}, or a comma-separated list (clean)")
    evaluate.add_argument(
        "--draws", type=_integer, help="noise levels per block (that of the protocol, else of the config)"
    )
    text = "of Gaussian noise: the sigma at which the bound passes to the tokens (that of the config)"
    evaluate.add_argument("--low", type=float, help=text)
    text = "of an absorbing model: the bound on sampling in this number of steps (continuous time)"
    evaluate.add_argument("--steps", type=_integer, help=text)
    evaluate.add_argument("--seed", type=_integer, help="seed of the noise (0)")
    evaluate.add_argument(
        "--batch_size", type=_integer, help="blocks per batch over all devices; does not change the result"
    )
    text = "folder for the report and the scores so far, from which an interrupted evaluation resumes"
    evaluate.add_argument("--out", action=_Once, help=text)
    text = "instead of text: output of `sedd sample --json`, to measure sample quality"
    evaluate.add_argument("--samples", action=_Once, metavar="FILE", help=text)
    text = "with --samples: folder or hub name of the scoring language model, for generative perplexity"
    evaluate.add_argument("--judge", action=_Once, help=text)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    sample = command("sample", commands.sample, "Sample texts.")
    _add_model(sample)
    _add_sampling_and_output(sample)

    compare = command("sweep", commands.sweep, "Measure sample quality against network calls for several samplers.")
    _add_model(compare)
    compare.add_argument(
        "--samplers", default="tweedie,euler", help=f"comma-separated list of {_SAMPLERS} (%(default)s)"
    )
    compare.add_argument("--steps", default="8,16,32,64,128", help="comma-separated numbers of steps (%(default)s)")
    compare.add_argument(
        "--num_samples", type=_integer, default=64, help="samples per sampler and number of steps (%(default)s)"
    )
    compare.add_argument(
        "--judge",
        action=_Once,
        help="folder or hub name of the scoring language model (the model itself, by its NLL bound)",
    )
    compare.add_argument("--out", action=_Once, help="folder for sweep.json and sweep.png")
    _add_length(compare)
    _add_sampling_options(compare, "temperature", "top_p", "seed", "batch_size")

    infill = command("infill", commands.infill, "Fill in the blanks of texts, conditioned on the rest.")
    _add_model(infill)
    _add_sampling_and_output(infill)
    text = r"text with blanks of n tokens, <blank:n>, as in 'A <blank:8> sat.'; \<blank is literal text"
    infill.add_argument("template", nargs="*", type=_utf8, help=text)
    infill.add_argument("--prefix", type=_utf8, help="instead of a template: text before the blank")
    infill.add_argument("--suffix", type=_utf8, help="instead of a template: text after the blank")

    convert = command("convert", commands.convert, "Write a model in a published format, which other code reads.")
    _add_model(convert)
    formats = "sedd, mdlm, duo, udlm, radd, bd3lm, masked_lm; or export, that of this project"
    convert.add_argument("--to", action=_Once, required=True, metavar="FORMAT", help=formats)
    convert.add_argument("--out", action=_Once, required=True, help="folder to write")

    inspect = command("info", commands.info, "Describe a run, an exported model, a published checkpoint or a corpus.")
    inspect.add_argument("path", metavar="PATH", help="folder; RUN/checkpoints/STEP is that checkpoint of a run")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    return parser, parsers.choices


def _add_model(parser, required=True):
    text = (
        "run directory, exported model or published checkpoint: a folder, a PyTorch file, or "
        "ORGANISATION/NAME[@REVISION] of the Hugging Face Hub"
    )
    parser.add_argument("--model", action=_Once, required=required, help=text)
    parser.add_argument("--tokenizer", help="for a model without one: gpt2:FOLDER or another of `sedd prepare`")
    text = "folder or hub name of a model's frozen encoder (where it was when the model was trained)"
    parser.add_argument("--encoder", action=_Once, metavar="FOLDER", help=text)


def _add_sampling_and_output(parser):
    parser.add_argument("--num_samples", type=_integer, default=1, help="number of samples, per template (%(default)s)")
    _add_length(parser)
    _add_sampling_options(parser, *FLAGS)
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    parser.add_argument("--watch", action="store_true", help="show each step of sampling in the terminal")
    text = "write an HTML page that plays the steps of sampling"
    parser.add_argument("--html", action=_Once, metavar="FILE", help=text)


def _add_length(parser):
    text = "length in tokens (the block length); longer texts are sampled semi-autoregressively"
    parser.add_argument("--length", type=_integer, help=text)


def _add_sampling_options(parser, *names: str):
    """Adds the flags of these `SamplingOptions`."""
    for name in names:
        field = FLAGS[name]
        kind = _integer if field.metadata["kind"] is int else field.metadata["kind"]
        text = f"the sampler: {_SAMPLERS}" if name == "sampler" else field.metadata["help"]
        default = "" if field.default is None else " (%(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=field.default, help=f"{text}{default}")


if __name__ == "__main__":
    sys.exit(main())
