"""The `sedd` command: the only file that knows flags. Results go to stdout, progress and errors to stderr."""

import argparse
import functools
import json
import sys
from pathlib import Path

from sedd.data import sources, tokenizers
from sedd.data.splits import SPLITS
from sedd.errors import UserError
from sedd.evaluation.protocols import PROTOCOLS, get_protocol
from sedd.generation import SAMPLERS
from sedd.version import __version__

QUICK = ("builtin:names", "builtin:functions")  # what the quickstart can train on


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, or 2 for a mistake of the user's."""
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
        return 2
    except Interrupted as stopped:
        print(f"sedd: {stopped}", file=sys.stderr)
    except KeyboardInterrupt:
        if args.command == "prepare":
            print("sedd: stopped; what is done is kept, and the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, such as head, has had enough
        sys.stderr.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    about = "Score-entropy discrete diffusion for text."
    parser = _Parser(prog="sedd", description=about, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sedd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, takes_config=False):
        more = " Any key of the config can be set, as in --config.training.steps=100." if takes_config else ""
        made = commands.add_parser(name, help=text, description=text + more, allow_abbrev=False)
        made.set_defaults(run=run, takes_config=takes_config)
        return made

    quick = command("quickstart", _quickstart, "Train on a built-in corpus, evaluate, sample and infill.", True)
    quick.add_argument("--workdir", default="runs/quickstart", help="where the run goes (%(default)s)")
    quick.add_argument("--source", default=QUICK[0], choices=QUICK, help="(%(default)s)")

    prep = command("prepare", _prepare, "Tokenise a source once, into a corpus directory.")
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

    train = command("train", _train, "Train, or continue the run that is in --workdir.", True)
    train.add_argument("--config", help="a file with get_config(), such as experiments/quickstart.py; else the default")
    train.add_argument("--workdir", help="where the run goes; required, but for a dry run")
    train.add_argument("--init_from", metavar="MODEL", help="a model whose weights a new run starts from")
    train.add_argument("--dry_run", action="store_true", help="print sizes, memory and operations; train nothing")

    evaluate = command("eval", _eval, "Bound the negative log-likelihood of text, or measure the quality of samples.")
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

    sample = command("sample", _sample, "Draw texts.")
    _add_model(sample)
    _add_sampling(sample)

    compare = command("sweep", _sweep, "Measure the quality of samples against network calls, for several samplers.")
    _add_model(compare)
    compare.add_argument("--samplers", default="tweedie,euler", help=f"of {', '.join(SAMPLERS)} (%(default)s)")
    compare.add_argument("--steps", default="8,16,32,64,128", help="of each sampler (%(default)s)")
    compare.add_argument("--num_samples", type=int, default=64, help="at each point (%(default)s)")
    compare.add_argument("--judge", help="a folder of a language model (the model itself, by its bound)")
    compare.add_argument("--out", help="a folder for sweep.json and sweep.png")
    _add_drawing(compare)

    infill = command("infill", _infill, "Fill in the blanks of texts.")
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
    parser.add_argument("--sampler", default="tweedie", help=f"{', '.join(SAMPLERS)} (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")


def _add_drawing(parser):
    parser.add_argument("--length", type=int, help="tokens in all (the model's block)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the law over clean tokens (%(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens of this mass (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, help="rows at a time; changes no sample")


def _prepare(args, _):
    from sedd.data.prepare import prepare

    given = {split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None}
    if (args.source is None) == (not given):
        raise UserError("give either --source, or --train with --validation and --test")
    rules = dict(split=args.split, mode=args.mode, padding=args.padding, workers=args.workers)
    corpus = prepare(args.source or given, args.tokenizer, args.out, args.seed, **rules)
    for split, counts in corpus.meta["splits"].items():
        print(
            f"{split:11}{counts['documents']:12,} documents {counts['tokens']:15,} tokens {counts['bytes']:15,} bytes"
        )
    print(f"vocabulary {corpus.vocab_size:,} tokens, {corpus.layout.name}; corpus in {args.out}")


def _train(args, settings):
    from sedd import config as configs
    from sedd.loading import load
    from sedd.training.fit import fit

    config = configs.load_config(args.config) if args.config else configs.default()
    config = configs.override(config, settings)
    if args.dry_run:
        print(_estimate(config))
        return
    if args.workdir is None:
        raise UserError("train needs a --workdir, the folder where the run goes")
    weights = load(args.init_from).params if args.init_from else None
    summary = fit(config, args.workdir, weights, args.init_from)
    print(f"{summary}\nthe run is in {args.workdir}; next:")
    for line in (
        f"sedd eval   --model={args.workdir}",
        f"sedd sample --model={args.workdir} --num_samples=4",
        f"sedd infill --model={args.workdir} 'some text <blank:8> more text'",
    ):
        print(f"  {line}")


def _estimate(config):
    """What a run would take. Neither the corpus nor the folder of the run need be there."""
    import jax

    from sedd.data.corpus import open_corpus
    from sedd.training.estimate import estimate

    vocab_size = config.data.vocab_size or open_corpus(config.data.corpus).vocab_size
    return estimate(config, vocab_size, jax.device_count())


def _eval(args, _):
    from sedd.data.corpus import open_corpus
    from sedd.loading import load, with_tokenizer

    if (args.model is None) == (args.samples is None):
        raise UserError("eval needs either a --model, or --samples to measure the quality of")
    if args.samples:
        _eval_samples(args)
        return
    if args.judge:
        raise UserError("--judge goes with --samples; a model's own number needs none")
    if args.data and args.source:
        raise UserError("give either --data or --source")
    protocols = [get_protocol(name.strip()).name for name in args.protocol.split(",")]
    if args.against and len(protocols) > 1:
        raise UserError("--against takes one protocol")
    models = [load(path) for path in (args.model, args.against) if path]
    if args.tokenizer:
        lacking = [model for model in models if model.tokenizer is None] or models
        models = [with_tokenizer(model, args.tokenizer) if model in lacking else model for model in models]
    corpus = args.data or models[0].config.data.corpus
    text = sources.open_source(args.source) if args.source else open_corpus(corpus)
    settings = {name: getattr(args, name) for name in ("split", "draws", "seed", "batch_size")}
    if args.against:
        found = models[0].compare(models[1], text, protocol=args.protocol, out=args.out, **settings)
        print(found.to_json() if args.json else found)
    else:
        _eval_protocols(args, models[0], text, protocols, settings)


def _eval_protocols(args, model, text, protocols, settings):
    """The model's number under one protocol, or a table of several."""
    from sedd.evaluation.pictures import plot_profile
    from sedd.evaluation.report import table

    reports = []
    for name in protocols:
        out = args.out and Path(args.out) / (name if len(protocols) > 1 else "")
        try:
            reports.append(model.perplexity(text, protocol=name, out=out, **settings))
        except UserError:
            if reports:  # what is done is not lost
                print(table(reports))
            raise
        if out:
            _picture(plot_profile, reports[-1].profile, out / "profile.png", reports[-1].noise)
    if len(reports) == 1:
        print(reports[0].to_json() if args.json else reports[0])
    else:
        print("[" + ",\n".join(report.to_json() for report in reports) + "]" if args.json else table(reports))


def _eval_samples(args):
    """The quality of samples that were drawn before."""
    from sedd.evaluation.quality import quality, read_samples

    for name in ("against", "data", "source", "split", "draws", "batch_size", "out"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --model; the samples in a file need only --judge and --tokenizer")
    tokenizer = args.tokenizer and tokenizers.given_tokenizer(args.tokenizer)
    texts, tokens = read_samples(args.samples, tokenizer)
    found = quality(texts, tokens, args.judge and _judge(args.judge))
    print(found.to_json() if args.json else found)


def _judge(path):
    """A causal language model in a local folder, or one of this package's models, whose nats are a bound."""
    from sedd.evaluation.judges import holds_language_model, open_judge
    from sedd.loading import load

    if holds_language_model(Path(path).expanduser()):
        return open_judge(path)
    return _own(load(path), path)


def _own(model, name):
    """A model of this package as a judge."""
    if model.tokenizer is None:
        raise UserError(f"the judge {name} has no tokenizer, so it reads no text; give another --judge")
    judge = functools.partial(model.judge)
    judge.name = f"{name}, a bound"
    return judge


def _sweep(args, _):
    from sedd.evaluation.pictures import plot_sweep
    from sedd.evaluation.scoring import out_folder
    from sedd.evaluation.sweep import sweep, table, to_json
    from sedd.loading import load

    try:
        steps = [int(number) for number in args.steps.split(",")]
    except ValueError:
        raise UserError(f"--steps takes numbers, as in 8,16,32, not {args.steps!r}") from None
    model = load(args.model, args.tokenizer)
    judge = _judge(args.judge) if args.judge else model.tokenizer and _own(model, args.model)
    if args.out:
        out_folder(args.out)
    samplers = [name.strip() for name in args.samplers.split(",")]
    drawing = {name: getattr(args, name) for name in ("length", "temperature", "top_p", "batch_size")}
    points = sweep(model.generator, samplers, steps, args.num_samples, judge, args.seed, **drawing)
    print(table(points))
    if args.out:
        (Path(args.out) / "sweep.json").write_text(to_json(points) + "\n", encoding="utf-8")
        _picture(plot_sweep, points, Path(args.out) / "sweep.png")


def _picture(plot, what, path, *more):
    """Draws, where there is a library to draw with; the numbers are saved without it."""
    try:
        plot(what, path, *more)
    except UserError as missing:
        print(f"sedd: no {path}: {missing}", file=sys.stderr)


def _sample(args, _):
    from sedd.loading import load

    _print_texts(load(args.model, args.tokenizer).sample(**_sampling(args)), args)


def _infill(args, _):
    from sedd.loading import load

    where = dict(prefix=args.prefix, suffix=args.suffix)
    _print_texts(load(args.model, args.tokenizer).infill(args.template or None, **where, **_sampling(args)), args)


def _sampling(args) -> dict:
    names = ("num_samples", "length", "steps", "sampler", "temperature", "top_p", "seed", "batch_size")
    return {name: getattr(args, name) for name in names}


def _print_texts(samples, args):
    texts = [None] * len(samples.tokens) if samples.texts is None else samples.texts
    for number, (text, tokens, length) in enumerate(zip(texts, samples.tokens, samples.lengths)):
        ids = tokens[tokens >= 0].tolist()
        if args.json:
            settings = {name: getattr(args, name) for name in ("seed", "sampler", "steps")}
            record = {"text": text, "tokens": ids, "length": int(length), **settings}
            print(json.dumps(record | {"network_calls": samples.network_calls}))
        else:
            print(f"--- {number + 1} of {len(texts)}" if len(texts) > 1 else "---")
            print(ids if text is None else text)


def _quickstart(args, settings):
    from sedd.quickstart import quickstart

    quickstart(args.source, args.workdir, settings)


if __name__ == "__main__":
    sys.exit(main())
