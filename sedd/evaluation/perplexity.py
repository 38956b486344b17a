"""The perplexity job: from rows of text to a report, over all devices, resuming after an interruption.

For Absorbing the bound is by mask counts: it covers all noise levels, prior and reconstruction are 0, and the network
is conditioned on the noise level of the mask ratio, clipped to the range it was trained on. For Uniform sigma runs from
the schedule's sigma(0) to max(sigma(1), 12), and both terms are added. Noise levels are stratified within each block.

With Absorbing a text shorter than the block is scored in a full block whose other positions stay masked: that is the
model's exact marginal, and better than at its own length by .12 nats a token at 4 tokens, .01 at 32, on a model of
blocks of 128 (docs/measurements.md). A network that was trained on padded documents gets their lengths instead.
"""

import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from sedd.data.layout import Layout
from sedd.evaluation.protocols import CLEAN, Protocol
from sedd.evaluation.report import Report, Terms, make_report, terms_from_draws
from sedd.evaluation.resumable_draws import KEPT, ResumableDraws
from sedd.evaluation.scoring import levels_of, record_shape, score
from sedd.evaluation.statistics import ratio
from sedd.evaluation.text import ScoringRows
from sedd.runtime import disk, parallel, processes, storage
from sedd.runtime.settings import jax_defaults
from sedd.seeds import check_seed
from sedd.trained import Trained
from sedd.version import __version__

REFRESH_SECONDS = 0.5  # between running estimates in the progress bar


@jax_defaults()
def perplexity(
    trained: Trained,
    scored: ScoringRows,
    protocol: Protocol = CLEAN,
    num_draws: int = 16,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    folder: epath.Path | None = None,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    on_batch: Callable[[], None] | None = None,
) -> tuple[Report, Terms]:
    """Scores all rows, each with `num_draws` draws. The number depends on the seed, not on devices or batch sizes.

    about: identifies model and tokenizer, for the report; folder: keeps the draws (`ResumableDraws`), from which a job
    resumes, and the final report.json; mesh: by default over all devices, with replicated parameters; batch_size: rows
    at a time over all devices; on_batch: called after each batch, may raise to stop the job.

    Returns the report, and the terms of each row. UserError for an invalid seed, or if the folder holds another job.
    """
    seed, about = check_seed(seed), {**(about or {}), "data": scored.data}
    network, bound = trained.network, protocol.bound(trained)
    job = {} if folder is None else _job(trained, scored, about, protocol, num_draws, seed)
    if mesh is None:
        mesh = parallel.data_mesh()
        params = trained.all_params
        trained = trained.placed(parallel.put(params, parallel.shardings(mesh, params)))
    levels = functools.partial(levels_of, bound, num_draws, scored.tokens.shape[1], seed)
    with (
        ResumableDraws(folder, job, record_shape(network, num_draws), len(scored.tokens), levels) as record,
        _Bar(scored, protocol.tightened, progress and processes.is_first()) as bar,
    ):
        bar.update(record.records())
        for records in score(trained, bound, scored, num_draws, seed, mesh, batch_size, start=len(record)):
            record.append(records)
            bar.update(records)
            if on_batch is not None:
                on_batch()
        report, terms = _report(trained, bound, scored, record.records(), protocol, num_draws, seed, about)
        if folder is not None and processes.is_first():
            with storage.user_errors(folder, KEPT):
                disk.write_text_atomic(folder / "report.json", report.to_json() + "\n")
    return report, terms


def _report(trained, bound, scored, records, protocol, num_draws, seed, about) -> tuple[Report, Terms]:
    """The report of all records, and the terms of each row."""
    terms = terms_from_draws(records, scored, protocol.tightened)
    other = None
    if trained.network.has_unnormalised_scores:
        other = terms_from_draws(records, scored, not protocol.tightened)
    report = make_report(
        terms,
        other,
        scored,
        protocol.tightened,
        draws=num_draws,
        seed=seed,
        protocol=protocol.name,
        noise=_noise_in_words(trained),
        likelihood_of=bound.likelihood_of,
        lengths=_lengths_in_words(trained, scored.layout),
        about={**about, "versions": versions()},
    )
    return report, terms


def _job(trained, scored, about, protocol, num_draws, seed) -> dict[str, Any]:
    """Everything that the draws depend on, for job.json."""
    return {
        "model": about.get("model"),
        "tokenizer": about.get("tokenizer"),
        "network": repr(trained.network),
        "schedule": repr(trained.schedule),
        "text": scored.hash,
        "protocol": protocol.name,
        "draws": num_draws,
        "seed": seed,
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that its numbers depend on."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    others = {name: importlib.metadata.version(name) for name in packages}
    return {"sedd": __version__, "python": platform.python_version(), **others}


class _Bar:
    """A progress bar over rows, with the running estimate and its standard error."""

    def __init__(self, scored: ScoringRows, tightened: bool, shown: bool):
        self._scored, self._tightened = scored, tightened
        self._nats: list[np.ndarray] = []
        self._refreshed = 0.0
        self._bar = tqdm(desc="scoring", unit="block", total=len(scored.tokens), delay=2, disable=not shown)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def update(self, records: np.ndarray):
        """Adds the records of the next rows, Float32[n M K]."""
        if self._bar.disable or not len(records):
            return
        terms = terms_from_draws(records, self._scored, self._tightened, start=self._bar.n)
        self._nats.append(terms.rows)
        done = self._bar.n + len(records)
        if time.monotonic() - self._refreshed > REFRESH_SECONDS or done == self._bar.total:
            estimate = ratio(np.concatenate(self._nats), self._scored.counts[:done], self._scored.clusters[:done])
            self._bar.set_postfix_str(f"{estimate} nats per token", refresh=False)
            self._refreshed = time.monotonic()
        self._bar.update(len(records))


def _noise_in_words(trained: Trained) -> str:
    """Says what a corrupted token is, for the report's profile."""
    if trained.process.over_latents:
        return "noisy"
    return "random" if trained.process.mask_id is None else "masked"


def _lengths_in_words(trained: Trained, layout: Layout) -> str:
    """Says how text shorter than a block was scored. layout: of the rows."""
    if layout.padding is not None:
        return "with its padding, as a full block" if layout.padding == "scored" else "given its length"
    return "at its own length" if trained.uses_lengths else "in a block whose other positions stay masked"
