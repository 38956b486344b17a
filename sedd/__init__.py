"""Score-entropy discrete diffusion for text: train, evaluate, sample, and fill in any positions.

    model = sedd.load("runs/quickstart")
    model.infill("GREEK SMALL LETTER <blank:4> WITH TONOS").texts

Importing this loads no data set or checkpoint library, initialises no device and parses no flags.
"""

from sedd.data.corpus import Corpus, open_corpus
from sedd.data.prepare import prepare
from sedd.diffusion.loss import count_loss, denoising_loss
from sedd.diffusion.process import Absorbing, Jump, Process, Uniform
from sedd.diffusion.samplers import Euler, Sampler, Tweedie, sample
from sedd.diffusion.schedule import Geometric, LogLinear, Schedule
from sedd.diffusion.score import Denoiser, ScoreStats, StatsFn, score_stats, stats_from
from sedd.errors import UserError
from sedd.evaluation.conditional import LogLikelihood
from sedd.evaluation.report import Comparison, Report
from sedd.generation import Samples
from sedd.loading import load, train
from sedd.model import Model
from sedd.version import __version__

__all__ = [
    "Absorbing",
    "Comparison",
    "Corpus",
    "Denoiser",
    "Euler",
    "Geometric",
    "Jump",
    "LogLikelihood",
    "LogLinear",
    "Model",
    "Process",
    "Report",
    "Sampler",
    "Samples",
    "Schedule",
    "ScoreStats",
    "StatsFn",
    "Tweedie",
    "Uniform",
    "UserError",
    "__version__",
    "count_loss",
    "denoising_loss",
    "load",
    "open_corpus",
    "prepare",
    "sample",
    "score_stats",
    "stats_from",
    "train",
]
