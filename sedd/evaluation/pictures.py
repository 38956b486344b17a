"""Pictures of measurements: quality against network calls, and where in the noise the nats of a bound are.

Each picture has a function that makes the figure and one that saves it. No display is needed, and none is touched.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from etils import epath

from sedd.errors import UserError
from sedd.evaluation.sweep import Point
from sedd.runtime import disk, storage

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow; one marker more, so that lines
# differ in one or the other.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"


def plot_sweep(points: Sequence[Point], path: str | Path) -> None:
    """Writes the picture of a sweep, its kind by the ending of `path`. UserError without matplotlib or points."""
    _save(sweep_figure(points), path)


def plot_profile(profile: Sequence[Mapping], path: str | Path, noise: str = "masked") -> None:
    """Writes the picture of an information profile, its kind by the ending of `path`.

    profile: {"low", "high", "nats_per_token", "error"} of each range of the fraction of tokens that are touched, in
    order; the last two None where nothing was drawn, or nothing is known of the error. noise: what touched tokens are
    called. UserError without matplotlib, or where nothing was measured.
    """
    _save(profile_figure(profile, noise), path)


def sweep_figure(points: Sequence[Point]):
    """A panel of nats per token under the judge, where there is one, and a panel of entropy; a line each sampler."""
    if not points:
        raise UserError("there are no points to draw; a sweep makes them")
    judge = points[0].quality.judge
    figure = _figure(10 if judge else 5.4)
    figure.get_layout_engine().set(wspace=0.06)
    axes = figure.subplots(1, 2 if judge else 1, squeeze=False)[0]
    if judge:
        _curves(axes[0], points, "nats_per_token", "standard_error", "nats per token of the judge")
        figure.suptitle(f"judge: {judge}", fontsize="medium", parse_math=False)
    _curves(axes[-1], points, "unigram_entropy", "unigram_entropy_error", "unigram entropy of a sample, nats")
    axes[0].legend(frameon=False)
    return figure


def profile_figure(profile: Sequence[Mapping], noise: str = "masked"):
    """Nats per token against the fraction of tokens touched.

    The area under them is the bound's diffusion term, which of a masked model is all of it.
    """
    known = [part for part in profile if part["nats_per_token"] is not None]
    if not known:
        raise UserError("the profile holds no measurement; there is nothing to draw")
    figure = _figure(5.4)
    axes = figure.subplots()
    low, high, nats = (np.array([part[key] for part in known], float) for key in ("low", "high", "nats_per_token"))
    area = float(np.sum((high - low) * nats))
    whole = np.isclose(np.sum(high - low), 1.0)
    said = "the bound's diffusion term" if whole else "of the levels measured"
    label = f"area: {area:.3f} nats per token,\n{said}"
    axes.bar(low, nats, high - low, align="edge", color=COLOURS[0], alpha=0.25, linewidth=0, label=label)
    axes.hlines(nats, low, high, color=COLOURS[0])
    errors = _errors(part["error"] for part in known)
    axes.errorbar((low + high) / 2, nats, errors, fmt="none", color=COLOURS[0], capsize=2)
    axes.set(xlim=(0, 1), xlabel=f"fraction of tokens {noise}", ylabel="nats per token")
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
    if calls[-1] < 4 * calls[0]:  # hardly a power of two between them
        axes.set_xticks(calls)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())


def _errors(values) -> np.ndarray:
    """Bars of no length where the error is unknown."""
    return np.array([0.0 if value is None else value for value in values])


def _figure(width: float):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'sedd[plots]'") from None
    return Figure(figsize=(width, 3.8), layout="constrained")


def _save(figure, path: str | Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path, picture = epath.Path(disk.absolute(path)), io.BytesIO()
    if not path.parent.is_dir():
        raise UserError(f"the picture cannot be written to {path}: there is no folder {path.parent}; make it first")
    try:
        figure.savefig(picture, dpi=150, format=path.suffix.removeprefix(".") or None)
    except ValueError as error:
        raise UserError(f"the picture cannot be written to {path}: {error}") from None
    with storage.written(path):
        path.write_bytes(picture.getvalue())
