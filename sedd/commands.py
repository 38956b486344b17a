"""The commands of `sedd`: results go to stdout, progress and errors to stderr.

Each public function takes the parsed flags, and the config overrides, such as "training.steps=100".
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
from sedd.runtime import disk, folders, processes, storage


def prepare(args, _):
    """Tokenizes a source into a corpus directory, and prints the size of its splits."""
    from sedd.data.prepare import prepare

    given = {split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None}
    if (args.source is None) == (not given):
        raise UserError("give either --source, or --train with --validation and --test")
    rules = dict(split=args.split, mode=args.mode, padding=args.padding, workers=args.workers)
    corpus = prepare(args.source or given, args.tokenizer, args.out, args.seed, **rules)
    for split, counts in corpus.meta["splits"].items():
        sizes = f"{counts['documents']:12,} documents {counts['tokens']:15,} tokens {counts['bytes']:15,} bytes"
        copies = counts.get("also_in_train")  # absent for train, and in corpora of earlier versions
        print(f"{split:11}{sizes}" + (f"; {copies['documents']:,} documents also in train" if copies else ""))
    print(f"vocabulary {corpus.vocab_size:,} tokens, {corpus.layout.name}; corpus in {args.out}")


def train(args, settings):
    """Trains or resumes a run, or with --dry_run prints an estimate of its sizes, memory and FLOPs."""
    from sedd import config as configs
    from sedd.config_file import load_config
    from sedd.loading import load
    from sedd.recipes import ENCODER, kind_of
    from sedd.training.fit import fit

    if args.workdir is None and not args.dry_run:
        raise UserError("train needs a --workdir, the run directory")
    config = load_config(args.config) if args.config else configs.default()
    if args.config or not args.init_from:  # else the settings are those of the model, which is read first
        config = configs.override(config, settings)
    if not args.dry_run:
        _join()
    model = load(args.init_from) if args.init_from else None
    if model is not None and args.config is None:
        config = configs.override(configs.start_from(model.config), settings)
    if args.dry_run:
        print(_estimate(config))
        return
    summary = fit(config, args.workdir, model and model.params, args.init_from, model and model.tokenizer)
    print(f"{summary}\nthe run is in {args.workdir}; next:")
    model = f"--model={shlex.quote(args.workdir)}"
    print(f"  sedd eval   {model}\n  sedd sample {model} --num_samples=4")
    if kind_of(config) != ENCODER:
        prompt = "--prefix='some text'" if config.network.block_size else "'some text <blank:8> more text'"
        print(f"  sedd infill {model} {prompt}")


def _join():
    """Joins the processes of a distributed job, in which only process 0 prints results."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)  # the collectives library prints to stdout
    try:
        processes.initialize()
    finally:
        if not processes.are_many():
            os.dup2(results, 1)
            os.close(results)
    if processes.are_many():  # sys.stdout is the guarded stream of `sedd.runtime.streams`
        sys.stdout.stream = os.fdopen(results if processes.is_first() else os.open(os.devnull, os.O_WRONLY), "w")


def _estimate(config):
    """Returns an estimate of a run. Needs no run directory, and no corpus if data.vocab_size is set."""
    import jax

    from sedd.data.corpus import open_corpus
    from sedd.training.estimate import estimate

    vocab_size = config.data.vocab_size or open_corpus(config.data.corpus).vocab_size
    return estimate(config, vocab_size, jax.device_count())


def evaluate(args, _):
    """Scores text with one model or two, or measures the quality of samples."""
    from sedd.loading import load_all

    if (args.model is None) == (args.samples is None):
        raise UserError("eval needs either --model or --samples")
    if args.samples:
        _eval_samples(args)
        return
    if args.judge:
        raise UserError("--judge goes with --samples; the bound of a model needs none")
    if args.data and args.source:
        raise UserError("give either --data or --source")
    names = ["clean"] if args.protocol is None else args.protocol.split(",")
    protocols = [get_protocol(name.strip()).name for name in names]
    if args.against and len(protocols) > 1:
        raise UserError("--against takes one protocol")
    _join()
    models = load_all([path for path in (args.model, args.against) if path], args.tokenizer, args.encoder)
    text = sources.open_source(args.source) if args.source else _corpus(args, models[0])
    settings = {name: getattr(args, name) for name in ("split", "draws", "low", "steps", "batch_size")} | {
        "seed": args.seed or 0
    }
    if args.against:
        comparison = models[0].compare(models[1], text, protocol=protocols[0], out=args.out, **settings)
        print(comparison.to_json() if args.json else comparison)
    else:
        _eval_protocols(args, models[0], text, protocols, settings)


def _corpus(args, model):
    """Opens the corpus of --data, by default the one that the model was trained on."""
    from sedd.data.corpus import open_corpus

    if args.data is not None:
        return open_corpus(args.data)
    try:
        return open_corpus(model.config.data.corpus)
    except UserError as error:
        raise UserError(
            f"{args.model} was trained on a corpus that cannot be opened ({error}); give its folder as --data=FOLDER"
        ) from None


def _eval_protocols(args, model, text, protocols, settings):
    """Prints the report of the model under one protocol, or a table of several."""
    from sedd.evaluation.pictures import plot_profile
    from sedd.evaluation.report import table

    reports, several = [], len(protocols) > 1
    folder = None if args.out is None else storage.folder_of(args.out)
    with folders.locked_by_first(folder if several else None):
        for name in protocols:
            out = folder / name if folder and several else folder
            try:
                reports.append(model.perplexity(text, protocol=name, out=out, **settings))
            except Exception:
                if reports:  # so that finished protocols are printed
                    print(table(reports))
                raise
            if out and processes.is_first():
                _plot(plot_profile, reports[-1].profile, out / "profile.png", reports[-1].noise)
    if len(reports) == 1:
        print(reports[0].to_json() if args.json else reports[0])
    else:
        print("[" + ",\n".join(report.to_json() for report in reports) + "]" if args.json else table(reports))


def _eval_samples(args):
    """Prints the quality of the samples in a file."""
    from sedd.evaluation.quality import quality, read_samples

    of_model = ("against", "data", "source", "split", "protocol", "draws", "low", "steps", "seed", "batch_size", "out")
    for name in of_model:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} goes with --model; the samples in a file need only --judge and --tokenizer")
    tokenizer = args.tokenizer and tokenizers.pretrained_tokenizer(args.tokenizer)
    texts, tokens = read_samples(args.samples, tokenizer)
    measured = quality(texts, tokens, args.judge and _scorer(args.judge))
    print(measured.to_json() if args.json else measured)


def _scorer(path):
    """Opens a scoring model: a causal language model of a folder or the hub, or a model of sedd, by its NLL bound."""
    from sedd.codecs.hub import absolute_spec, folder_of
    from sedd.evaluation.scorers import holds_language_model, open_scorer
    from sedd.loading import load

    folder, spec = Path(folder_of(path)), absolute_spec(path)
    if holds_language_model(folder):
        return open_scorer(folder, None if os.path.isabs(spec) else spec)
    return _bound_scorer(load(path), path)


def _bound_scorer(model, name):
    """Returns a Scorer that scores texts by the NLL bound of a model of sedd."""
    if model.tokenizer is None:
        raise UserError(f"the scoring model {name} has no tokenizer, so it cannot score text; give another --judge")
    scorer = functools.partial(model.score_texts)
    scorer.name = f"{name}, a bound"
    return scorer


def sweep(args, _):
    """Measures sample quality for several samplers and numbers of steps."""
    from sedd.evaluation.pictures import plot_sweep
    from sedd.evaluation.sweep import sweep, table, to_json
    from sedd.generation.options import SamplingOptions
    from sedd.loading import load

    try:
        steps = [int(number) for number in args.steps.split(",")]
    except ValueError:
        raise UserError(f"--steps takes numbers, as in 8,16,32, not {args.steps!r}") from None
    _join()
    model = load(args.model, args.tokenizer, args.encoder)
    scorer = _scorer(args.judge) if args.judge else model.tokenizer and _bound_scorer(model, args.model)
    samplers = [name.strip() for name in args.samplers.split(",")]
    options = SamplingOptions(**{name: getattr(args, name) for name in ("temperature", "top_p", "seed", "batch_size")})
    folder = None if args.out is None else storage.folder_of(args.out)
    with folders.locked_by_first(folder):
        points = sweep(model, samplers, steps, args.num_samples, scorer, args.length, options)
        print(table(points))
        if folder and processes.is_first():
            with storage.user_errors(folder):
                disk.write_text_atomic(folder / "sweep.json", to_json(points) + "\n")
            _plot(plot_sweep, points, folder / "sweep.png")


def _plot(plot, values, path, *options):
    """Plots if matplotlib is installed; else prints why not. The values are saved in either case."""
    try:
        plot(values, path, *options)
    except UserError as missing:
        print(f"sedd: no {path}: {missing}", file=sys.stderr)


def sample(args, _):
    """Samples texts."""
    _generate(args, lambda model: model.sample, 1)


def infill(args, _):
    """Fills in the blanks of texts."""
    sides = dict(prefix=args.prefix, suffix=args.suffix)
    num_templates = len(args.template) or 1
    _generate(args, lambda model: functools.partial(model.infill, args.template or None, **sides), num_templates)


def _generate(args, method, num_templates: int):
    """Generates texts and prints them, with --watch each step too. method: maps a Model to its sample or infill."""
    from sedd.generation.options import FLAGS
    from sedd.generation.playback import Terminal, page
    from sedd.loading import load

    html = None if args.html is None else Path(disk.absolute(args.html))
    if html and (html.is_dir() or not html.parent.is_dir() or not os.access(html.parent, os.W_OK)):
        raise UserError(f"--html={args.html} cannot be written; name a file in an existing folder")
    _join()
    model = load(args.model, args.tokenizer, args.encoder)
    vocabulary = model.tokenizer, model.process.mask_id
    names = ("num_samples", "length", *FLAGS)
    settings = {name: getattr(args, name) for name in names} | {"trace": html is not None}
    if args.watch and processes.is_first():
        with Terminal(*vocabulary, args.num_samples * num_templates) as terminal:
            samples = method(model)(**settings, watch=terminal)
    else:
        samples = method(model)(**settings)
    _print_texts(samples, args)
    if html and processes.is_first():
        about = {name: getattr(args, name) for name in ("model", "sampler", "steps", "temperature", "top_p", "seed")}
        about["network calls"] = samples.network_calls
        with disk.user_errors(html):
            html.write_text(page(samples.trace, samples.given, *vocabulary, about), encoding="utf-8")
        print(f"wrote {args.html}; open it in a browser", file=sys.stderr)


def _print_texts(samples, args):
    """Prints the texts, or with --json an object each; network calls and unigram entropy go to stderr."""
    from sedd.evaluation.quality import quality

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
    nonempty = [tokens[:length] for tokens, length in zip(samples.tokens, samples.lengths) if length]
    if nonempty:
        entropy = quality(None, nonempty).unigram_entropy
        print(f"{samples.network_calls} network calls; unigram entropy {entropy:.3f} nats per token", file=sys.stderr)


def convert(args, _):
    """Writes a model in a published format, or as an export."""
    from sedd.loading import load

    _join()
    load(args.model, args.tokenizer, args.encoder).save(args.out, args.to)
    print(f"{args.model} is in {args.out}, in the format {args.to}")


def info(args, _):
    """Prints what a folder is. UserError, after that, if its arrays do not verify."""
    import jax

    from sedd.info import describe, to_text

    jax.config.update("jax_platforms", "cpu")  # an accelerator may be in use by the run that is described
    facts = describe(args.path)
    print(json.dumps(facts, indent=2) if args.json else to_text(facts))
    if facts["verified"] is False:
        raise UserError(f"{args.path} does not verify: {facts['problem']}")


def quickstart(args, settings):
    """Trains on a built-in corpus, evaluates, samples and infills."""
    import jax

    from sedd.quickstart import quickstart

    if jax.default_backend() == "cpu":  # a CPU is enough: an accelerator that JAX does not see is no error here
        jax.config.update("jax_platforms", "cpu")
    quickstart(args.source, args.workdir, settings)
