"""The `sedd` command: its flags, and what it says of mistakes. What the commands do is in `sedd.commands`."""

import argparse
import sys

from sedd import commands, processes
from sedd.data import sources, tokenizers
from sedd.data.splits import SPLITS
from sedd.errors import UserError
from sedd.evaluation.protocols import PROTOCOLS
from sedd.samplers import PLANNED, SAMPLERS
from sedd.version import __version__

_SAMPLERS = f"{', '.join(SAMPLERS)} or {PLANNED}"
QUICK = ("builtin:names", "builtin:functions")  # what the quickstart can train on


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for a mistake of the user's.

    With several processes every one of them runs it, process 0 prints, and a mistake of one ends all.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    settings = [text.removeprefix("--config.") for text in rest if text.startswith("--config.")]
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown or (settings and not args.takes_config):
        parser.error(f"sedd {args.command} takes no {(unknown or rest)[0]}; see sedd {args.command} --help")
    from sedd.training.fit import Interrupted

    try:
        args.run(args, settings)
    except UserError as error:
        print(f"sedd: error: {error}", file=sys.stderr)
        processes.leave_others(2, str(error))
        return 2
    except Interrupted as stopped:
        print(f"sedd: {stopped}", file=sys.stderr)
    except KeyboardInterrupt:
        if args.command == "prepare":
            print("sedd: stopped; what is done is kept, and the same command continues", file=sys.stderr)
        processes.leave_others(130, "Ctrl-C")
        return 130
    except BrokenPipeError:  # the reader of stdout, such as head, has had enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Score-entropy discrete diffusion for text."
    parser = _Parser(prog="sedd", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sedd {__version__}")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, takes_config=False):
        more = " Any key of the config can be set, as in --config.training.steps=100." if takes_config else ""
        made = parsers.add_parser(name, help=text, description=text + more, allow_abbrev=False)
        made.set_defaults(run=run, takes_config=takes_config)
        return made

    quick = command("quickstart", commands.quickstart, "Train on a built-in corpus, evaluate, sample and infill.", True)
    quick.add_argument("--workdir", default="runs/quickstart", help="where the run goes (%(default)s)")
    quick.add_argument("--source", default=QUICK[0], choices=QUICK, help="(%(default)s)")

    prep = command("prepare", commands.prepare, "Tokenise a source once, into a corpus directory.")
    prep.add_argument("--source", help=f"the text, to be split: {', '.join(sources.FORMS)}")
    for split in SPLITS:
        prep.add_argument(f"--{split}", metavar="SOURCE", help=f"instead of --source: the text of the {split} split")
    rules = "documents:0.9,0.05,0.05, position:90,5,5 or last:100000 (documents; position where they are few)"
    prep.add_argument("--split", metavar="RULE", help=rules)
    prep.add_argument("--tokenizer", default="sentencepiece:8000", help=f"{', '.join(tokenizers.FORMS)} (%(default)s)")
    prep.add_argument("--out", required=True, help="the corpus directory to make")
    modes = "packed, one stream of text, or padded, documents in rows of their own (%(default)s)"
    prep.add_argument("--mode", default="packed", help=modes)
    prep.add_argument("--padding", help="of padded documents: scored, or ignored (the default)")
    prep.add_argument("--seed", type=int, default=0, help="draws the held-out documents, and their order")
    prep.add_argument("--workers", type=int, help="threads (one a core); the corpus does not depend on them")

    train = command("train", commands.train, "Train, or continue the run that is in --workdir.", True)
    train.add_argument("--config", help="a file with get_config(), such as experiments/quickstart.py; else the default")
    train.add_argument("--workdir", help="where the run goes; required, but for a dry run")
    train.add_argument("--init_from", metavar="MODEL", help="a model whose weights a new run starts from")
    train.add_argument("--dry_run", action="store_true", help="print sizes, memory and operations; train nothing")

    evaluate = command(
        "eval", commands.evaluate, "Bound the negative log-likelihood of text, or measure the quality of samples."
    )
    _add_model(evaluate, required=False)
    evaluate.add_argument("--against", metavar="MODEL", help="another, on the same noise: the difference and its error")
    evaluate.add_argument("--data", help="a corpus directory (the one the model was trained on)")
    evaluate.add_argument("--source", help="instead of --data: text as `sedd prepare` takes it, wikitext:wiki.test.raw")
    evaluate.add_argument("--split", help="train, validation or test (what the protocol has; test)")
    evaluate.add_argument("--protocol", default="clean", help=f"{', '.join(PROTOCOLS)}, or several (%(default)s)")
    evaluate.add_argument("--draws", type=int, help="noise levels a block (the protocol's; the config's)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--batch_size", type=int, help="blocks at a time over all devices; changes no number")
    evaluate.add_argument("--out", help="a folder for the report, and for what is scored, so that a job can go on")
    evaluate.add_argument("--samples", metavar="FILE", help="instead of text: what `sedd sample --json` printed")
    evaluate.add_argument("--judge", help="with --samples: a folder of a language model, for generative perplexity")
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
    compare.add_argument("--num_samples", type=int, default=64, help="at each point (%(default)s)")
    compare.add_argument("--judge", help="a folder of a language model (the model itself, by its bound)")
    compare.add_argument("--out", help="a folder for sweep.json and sweep.png")
    _add_drawing(compare)

    infill = command("infill", commands.infill, "Fill in the blanks of texts.")
    _add_model(infill)
    _add_sampling(infill)
    infill.add_argument("template", nargs="*", help="text with blanks of so many tokens, such as 'A <blank:8> sat.'")
    infill.add_argument("--prefix", help="instead of a template: what comes before the blank")
    infill.add_argument("--suffix", help="instead of a template: what comes after the blank")
    return parser


def _add_model(parser, required=True):
    parser.add_argument("--model", required=required, help="a run, an exported model or a published SEDD checkpoint")
    parser.add_argument("--tokenizer", help="of a model that has none: gpt2:FOLDER, and what else `sedd prepare` takes")


def _add_sampling(parser):
    parser.add_argument("--num_samples", type=int, default=1, help="how many, of each template (%(default)s)")
    parser.add_argument("--steps", type=int, default=128, help="of the sampler (%(default)s)")
    _add_drawing(parser)
    parser.add_argument("--sampler", default="tweedie", help=f"{_SAMPLERS} (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    parser.add_argument("--watch", action="store_true", help="show the texts emerging, in the terminal")
    parser.add_argument("--html", metavar="FILE", help="write a page that plays back how the texts emerged")


def _add_drawing(parser):
    parser.add_argument(
        "--length", type=int, help="tokens in all (the model's block); longer goes on block after block"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the law over clean tokens (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens of this mass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, help="rows at a time; changes no sample")


if __name__ == "__main__":
    sys.exit(main())
