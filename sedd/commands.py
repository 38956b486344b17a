"""What each command of `sedd` does, given its flags: results go to stdout, progress and errors to stderr.

The public functions take the parsed flags, and the settings of the config that were set.
"""

import functools
import json
import os
import shlex
import sys
from pathlib import Path

from sedd.data import sources, tokenizers
from sedd.data.splits import SPLITS
from sedd.errors import UserError
from sedd.evaluation.protocols import get_protocol
from sedd.runtime import disk, processes, storage


def prepare(args, _):
    """Tokenises a source into a corpus directory, and says what is in it."""
    from sedd.data.prepare import prepare

    given = {split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None}
    if (args.source is None) == (not given):
        raise UserError("give either --source, or --train with --validation and --test")
    rules = dict(split=args.split, mode=args.mode, padding=args.padding, workers=args.workers)
    corpus = prepare(args.source or given, args.tokenizer, args.out, args.seed, **rules)
    for split, counts in corpus.meta["splits"].items():
        sizes = f"{counts['documents']:12,} documents {counts['tokens']:15,} tokens {counts['bytes']:15,} bytes"
        copies = counts.get("also_in_train")  # not of train, nor in corpora of before
        print(f"{split:11}{sizes}" + (f"; {copies['documents']:,} documents also in train" if copies else ""))
    print(f"vocabulary {corpus.vocab_size:,} tokens, {corpus.layout.name}; corpus in {args.out}")


def train(args, settings):
    """Trains, or goes on with a run; or estimates what a run would take."""
    from sedd import config as configs
    from sedd.config_file import load_config
    from sedd.loading import load
    from sedd.training.fit import fit

    config = configs.default() if args.config is None else load_config(args.config)
    config = configs.override(config, settings)
    if args.dry_run:
        print(_estimate(config))
        return
    if args.workdir is None:
        raise UserError("train needs a --workdir, the folder where the run goes")
    _join()
    weights = load(args.init_from).params if args.init_from else None
    summary = fit(config, args.workdir, weights, args.init_from)
    print(f"{summary}\nthe run is in {args.workdir}; next:")
    model = f"--model={shlex.quote(args.workdir)}"
    for line in (
        f"sedd eval   {model}",
        f"sedd sample {model} --num_samples=4",
        f"sedd infill {model} 'some text <blank:8> more text'",
    ):
        print(f"  {line}")


def _join():
    """Joins the other processes of the job, of which process 0 alone prints results."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)  # what the library of the collectives prints is no result
    try:
        processes.initialize()
    finally:
        if not processes.are_many():
            os.dup2(results, 1)
            os.close(results)
    if processes.are_many():  # of the guarded stream that `sedd.runtime.streams` has put there
        sys.stdout.stream = os.fdopen(results if processes.is_first() else os.open(os.devnull, os.O_WRONLY), "w")


def _estimate(config):
    """What a run would take. Neither the corpus nor the folder of the run need be there."""
    import jax

    from sedd.data.corpus import open_corpus
    from sedd.training.estimate import estimate

    vocab_size = config.data.vocab_size or open_corpus(config.data.corpus).vocab_size
    return estimate(config, vocab_size, jax.device_count())


def evaluate(args, _):
    """Scores text with a model, or two, or measures samples."""
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
    names = ["clean"] if args.protocol is None else args.protocol.split(",")
    protocols = [get_protocol(name.strip()).name for name in names]
    if args.against and len(protocols) > 1:
        raise UserError("--against takes one protocol")
    _join()
    models = [load(path) for path in (args.model, args.against) if path]
    if args.tokenizer:
        lacking = [model for model in models if model.tokenizer is None] or models
        models = [with_tokenizer(model, args.tokenizer) if model in lacking else model for model in models]
    text = sources.open_source(args.source) if args.source else _corpus(args, models[0])
    settings = {name: getattr(args, name) for name in ("split", "draws", "batch_size")} | {"seed": args.seed or 0}
    if args.against:
        found = models[0].compare(models[1], text, protocol=protocols[0], out=args.out, **settings)
        print(found.to_json() if args.json else found)
    else:
        _eval_protocols(args, models[0], text, protocols, settings)


def _corpus(args, model):
    """The corpus that is given, or the one that the model was trained on."""
    from sedd.data.corpus import open_corpus

    if args.data is not None:
        return open_corpus(args.data)
    try:
        return open_corpus(model.config.data.corpus)
    except UserError as error:
        raise UserError(
            f"{args.model} was trained on a corpus that cannot be opened here ({error}); say where it is with --data="
        ) from None


def _eval_protocols(args, model, text, protocols, settings):
    """The model's number under one protocol, or a table of several."""
    from sedd.evaluation.pictures import plot_profile
    from sedd.evaluation.report import table

    reports, several = [], len(protocols) > 1
    folder = None if args.out is None else storage.folder_of(args.out)
    with storage.held(folder if several else None):
        for name in protocols:
            out = folder / name if folder and several else folder
            try:
                reports.append(model.perplexity(text, protocol=name, out=out, **settings))
            except Exception:
                if reports:  # what is done is not lost
                    print(table(reports))
                raise
            if out and processes.is_first():
                _picture(plot_profile, reports[-1].profile, out / "profile.png", reports[-1].noise)
    if len(reports) == 1:
        print(reports[0].to_json() if args.json else reports[0])
    else:
        print("[" + ",\n".join(report.to_json() for report in reports) + "]" if args.json else table(reports))


def _eval_samples(args):
    """The quality of samples that were drawn before."""
    from sedd.evaluation.quality import quality, read_samples

    for name in ("against", "data", "source", "split", "protocol", "draws", "seed", "batch_size", "out"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --model; the samples in a file need only --judge and --tokenizer")
    tokenizer = args.tokenizer and tokenizers.given_tokenizer(args.tokenizer)
    texts, tokens = read_samples(args.samples, tokenizer)
    found = quality(texts, tokens, args.judge and _judge(args.judge))
    print(found.to_json() if args.json else found)


def _judge(path):
    """A causal language model in a local folder, or one of this package's models, whose nats are a bound."""
    from sedd.evaluation.scorers import holds_language_model, open_scorer
    from sedd.loading import load

    if holds_language_model(Path(disk.absolute(path))):
        return open_scorer(path)
    return _own(load(path), path)


def _own(model, name):
    """A model of this package as a judge."""
    if model.tokenizer is None:
        raise UserError(f"the judge {name} has no tokenizer, so it reads no text; give another --judge")
    judge = functools.partial(model.judge)
    judge.name = f"{name}, a bound"
    return judge


def sweep(args, _):
    """Measures samples by several samplers in several numbers of steps."""
    from sedd.evaluation.pictures import plot_sweep
    from sedd.evaluation.sweep import sweep, table, to_json
    from sedd.loading import load

    try:
        steps = [int(number) for number in args.steps.split(",")]
    except ValueError:
        raise UserError(f"--steps takes numbers, as in 8,16,32, not {args.steps!r}") from None
    _join()
    model = load(args.model, args.tokenizer)
    judge = _judge(args.judge) if args.judge else model.tokenizer and _own(model, args.model)
    samplers = [name.strip() for name in args.samplers.split(",")]
    drawing = {name: getattr(args, name) for name in ("length", "temperature", "top_p", "batch_size")}
    folder = None if args.out is None else storage.folder_of(args.out)
    with storage.held(folder):
        points = sweep(model.generator, samplers, steps, args.num_samples, judge, args.seed, **drawing)
        print(table(points))
        if folder and processes.is_first():
            with storage.written(folder):
                disk.write_json_atomic(folder / "sweep.json", to_json(points) + "\n")
            _picture(plot_sweep, points, folder / "sweep.png")


def _picture(plot, what, path, *more):
    """Draws, where there is a library to draw with; the numbers are saved without it."""
    try:
        plot(what, path, *more)
    except UserError as missing:
        print(f"sedd: no {path}: {missing}", file=sys.stderr)


def sample(args, _):
    """Draws texts."""
    _draw(args, lambda model: model.sample, 1)


def infill(args, _):
    """Fills in the blanks of texts."""
    where = dict(prefix=args.prefix, suffix=args.suffix)
    _draw(args, lambda model: functools.partial(model.infill, args.template or None, **where), len(args.template) or 1)


def _draw(args, method, templates: int):
    """Draws texts, shown as they emerge where that is wanted, and prints them."""
    from sedd.loading import load
    from sedd.playback import Terminal, page

    html = None if args.html is None else Path(disk.absolute(args.html))
    if html and (html.is_dir() or not html.parent.is_dir() or not os.access(html.parent, os.W_OK)):
        raise UserError(f"--html={args.html} cannot be written; name a file in a folder that is there")
    _join()
    model = load(args.model, args.tokenizer)
    shown = model.tokenizer, getattr(model.process, "mask", None)
    names = ("num_samples", "length", "steps", "sampler", "temperature", "top_p", "seed", "batch_size")
    settings = {name: getattr(args, name) for name in names} | {"trace": html is not None}
    if args.watch and processes.is_first():
        with Terminal(*shown, args.num_samples * templates) as terminal:
            drawn = method(model)(**settings, watch=terminal)
    else:
        drawn = method(model)(**settings)
    _print_texts(drawn, args)
    if html and processes.is_first():
        about = {name: getattr(args, name) for name in ("model", "sampler", "steps", "temperature", "top_p", "seed")}
        about["network calls"] = drawn.network_calls
        with disk.faults(html):
            html.write_text(page(drawn.trace, drawn.given, *shown, about), encoding="utf-8")
        print(f"wrote {args.html}, which any browser plays", file=sys.stderr)


def _print_texts(drawn, args):
    """The texts, or with --json an object each; how varied they are goes to stderr."""
    from sedd.evaluation.quality import quality

    texts = [None] * len(drawn.tokens) if drawn.texts is None else drawn.texts
    for number, (text, tokens, length) in enumerate(zip(texts, drawn.tokens, drawn.lengths)):
        ids = tokens[tokens >= 0].tolist()
        if args.json:
            settings = {name: getattr(args, name) for name in ("seed", "sampler", "steps")}
            record = {"text": text, "tokens": ids, "length": int(length), **settings}
            print(json.dumps(record | {"network_calls": drawn.network_calls}))
        else:
            print(f"--- {number + 1} of {len(texts)}" if len(texts) > 1 else "---")
            print(ids if text is None else text)
    made = [tokens[:length] for tokens, length in zip(drawn.tokens, drawn.lengths) if length]
    if made:
        entropy = quality(None, made).unigram_entropy
        print(f"{drawn.network_calls} network calls; unigram entropy {entropy:.3f} nats a token", file=sys.stderr)


def quickstart(args, settings):
    """Trains, evaluates, samples and infills, from nothing."""
    import jax

    from sedd.quickstart import quickstart

    if jax.default_backend() == "cpu":  # that is enough here, whatever the machine has that JAX does not see
        jax.config.update("jax_platforms", "cpu")
    quickstart(args.source, args.workdir, settings)
