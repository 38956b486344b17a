"""Score-entropy discrete diffusion for text: train, evaluate, sample, and fill in any positions.

    model = sedd.load("runs/quickstart")
    model.infill("GREEK SMALL LETTER <blank:4> WITH TONOS").texts

Importing sedd loads no dataset or checkpoint library, initialises no device and parses no flags.
"""

from sedd.data.corpus import Corpus, open_corpus
from sedd.data.prepare import prepare
from sedd.diffusion.denoiser import Denoiser
from sedd.diffusion.discrete.correctors import Barker, Gibbs, Renoise
from sedd.diffusion.discrete.loss import count_loss, cross_entropy_loss, denoising_loss
from sedd.diffusion.discrete.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.discrete.process import Absorbing, Jump, Process, Uniform
from sedd.diffusion.discrete.samplers import Euler, TokenSampler, Trapezoidal, Tweedie
from sedd.diffusion.discrete.score import PosteriorFn, ScoreStats, StatsFn, posterior_from, score_stats, stats_from
from sedd.diffusion.discrete.unmasking import Adaptive, Counts, FirstHitting, FixedCounts
from sedd.diffusion.discrete.unmasking_schedules import UnmaskingPlan, cosine_unmasking, plan_unmasking
from sedd.diffusion.sampling import Corrected, Sampler, sample
from sedd.diffusion.schedule import Geometric, LogLinear, Schedule
from sedd.errors import UserError
from sedd.evaluation.conditional import LogLikelihood
from sedd.evaluation.report import Comparison, Report
from sedd.generation.generate import Samples
from sedd.loading import load, train
from sedd.model import Model
from sedd.runtime.processes import initialize
from sedd.version import __version__

__all__ = [
    "Absorbing",
    "Adaptive",
    "Barker",
    "Comparison",
    "Corpus",
    "Corrected",
    "Counts",
    "Denoiser",
    "Entropy",
    "EntropyBounded",
    "Euler",
    "FirstHitting",
    "FixedCounts",
    "Geometric",
    "Gibbs",
    "Jump",
    "LogLikelihood",
    "LogLinear",
    "Margin",
    "Model",
    "PosteriorFn",
    "Process",
    "Renoise",
    "Report",
    "Sampler",
    "Samples",
    "Schedule",
    "ScoreStats",
    "StatsFn",
    "TokenSampler",
    "Trapezoidal",
    "Tweedie",
    "Uniform",
    "UnmaskingPlan",
    "UserError",
    "__version__",
    "cosine_unmasking",
    "count_loss",
    "cross_entropy_loss",
    "denoising_loss",
    "initialize",
    "load",
    "open_corpus",
    "plan_unmasking",
    "posterior_from",
    "prepare",
    "sample",
    "score_stats",
    "stats_from",
    "train",
]
