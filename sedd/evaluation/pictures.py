"""Figures: quality against network calls, and the information profile of a bound.

Each has a function that returns the figure and one that saves it. No display is needed.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from sedd.errors import UserError
from sedd.evaluation.sweep import Point
from sedd.runtime import disk, storage

# The colour-blind-safe palette of Okabe and Ito without the yellow. There is one marker more than colours, so that
# more lines than colours still differ in one or the other.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"


def plot_sweep(points: Sequence[Point], path: str | Path) -> None:
    """Saves the figure of a sweep, in the format of the suffix of `path`. UserError without matplotlib or points."""
    _save(sweep_figure(points), path)


def plot_profile(profile: Sequence[Mapping], path: str | Path, noise: str = "masked") -> None:
    """Saves the figure of an information profile, in the format of the suffix of `path`.

    profile: bins {"low", "high", "nats_per_token", "error"} of the corruption probability, in order, as from
    `statistics.profile`; noise: the name of corrupted tokens, "masked" or "random", or of latents "noisy". UserError
    without matplotlib, or where every bin is empty.
    """
    _save(profile_figure(profile, noise), path)


def sweep_figure(points: Sequence[Point]):
    """Panels of nats per token, where a scorer measured them, and of entropy; one line for each sampler."""
    if not points:
        raise UserError("there are no points to plot; run a sweep first")
    scorer = points[0].quality.scorer
    figure = _figure(10 if scorer else 5.4)
    figure.get_layout_engine().set(wspace=0.06)
    axes = figure.subplots(1, 2 if scorer else 1, squeeze=False)[0]
    if scorer:
        _curves(axes[0], points, "nats_per_token", "standard_error", "nats per token of the scoring model")
        figure.suptitle(f"scored by {scorer}", fontsize="medium", parse_math=False)
    _curves(axes[-1], points, "unigram_entropy", "unigram_entropy_error", "unigram entropy of a sample, nats")
    axes[0].legend(frameon=False)
    return figure


def profile_figure(profile: Sequence[Mapping], noise: str = "masked"):
    """Nats per token against the corruption probability.

    The area is the bound's diffusion term, which for an absorbing model is the whole bound.
    """
    known = [part for part in profile if part["nats_per_token"] is not None]
    if not known:
        raise UserError("the profile holds no measurement; there is nothing to plot")
    figure = _figure(5.4)
    axes = figure.subplots()
    low, high, nats = (np.array([part[key] for part in known], float) for key in ("low", "high", "nats_per_token"))
    area = float(np.sum((high - low) * nats))
    complete = np.isclose(np.sum(high - low), 1.0)
    meaning = "the bound's diffusion term" if complete else "over the measured noise levels"
    label = f"area: {area:.3f} nats per token,\n{meaning}"
    axes.bar(low, nats, high - low, align="edge", color=COLOURS[0], alpha=0.25, linewidth=0, label=label)
    axes.hlines(nats, low, high, color=COLOURS[0])
    errors = _errors(part["error"] for part in known)
    axes.errorbar((low + high) / 2, nats, errors, fmt="none", color=COLOURS[0], capsize=2)
    axes.set(
        xlim=(0, 1),
        xlabel=f"fraction of {'each latent' if noise == 'noisy' else 'tokens'} {noise}",
        ylabel="nats per token",
    )
    axes.set_ylim(bottom=min(0.0, np.min(nats - errors)))
    axes.legend(frameon=False, loc="upper left")
    return figure


def _curves(axes, points: Sequence[Point], field: str, error: str, label: str) -> None:
    """A line with error bars for each sampler."""
    from matplotlib.ticker import NullLocator

    calls = sorted({point.network_calls for point in points})
    for number, sampler in enumerate(dict.fromkeys(point.sampler for point in points)):
        of = sorted((point for point in points if point.sampler == sampler), key=lambda point: point.network_calls)
        axes.errorbar(
            [point.network_calls for point in of],
            [getattr(point.quality, field) for point in of],
            _errors(getattr(point.quality, error) for point in of),
            label=sampler,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            capsize=2,
        )
    axes.set(xlabel="network calls a sample", ylabel=label)
    axes.set_xscale("log", base=2)
    if calls[-1] < 4 * calls[0]:  # too narrow for ticks at powers of two
        axes.set_xticks(calls)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())


def _errors(values) -> np.ndarray:
    """Error bars, of length 0 where the error is unknown."""
    return np.array([0.0 if value is None else value for value in values])


def _figure(width: float):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'sedd[plots]'") from None
    return Figure(figsize=(width, 3.8), layout="constrained")


def _save(figure, path: str | Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file, picture = epath.Path(disk.absolute(path)), io.BytesIO()
    if not file.parent.is_dir():
        raise UserError(f"the figure cannot be written to {file}: there is no folder {file.parent}; make it first")
    try:
        figure.savefig(picture, dpi=150, format=file.suffix.removeprefix(".") or None)
    except ValueError as error:
        raise UserError(f"the figure cannot be written to {file}: {error}") from None
    with storage.user_errors(file):
        file.write_bytes(picture.getvalue())
