"""Score-entropy discrete diffusion for text: train, evaluate, sample, and fill in any positions.

    model = sedd.load("runs/quickstart")
    model.infill("GREEK SMALL LETTER <blank:4> WITH TONOS").texts

Importing sedd loads no dataset or checkpoint library, initialises no device and parses no flags.
"""

from sedd.data.corpus import Corpus, open_corpus
from sedd.data.prepare import prepare
from sedd.diffusion.denoiser import Denoiser, Latent, MeanDenoiser, mean_from
from sedd.diffusion.discrete.correctors import Barker, Gibbs, Renoise
from sedd.diffusion.discrete.loss import count_loss, cross_entropy_loss, denoising_loss
from sedd.diffusion.discrete.pickers import Entropy, EntropyBounded, Margin
from sedd.diffusion.discrete.process import Absorbing, Jump, Process, Uniform
from sedd.diffusion.discrete.samplers import Euler, TokenSampler, Trapezoidal, Tweedie
from sedd.diffusion.discrete.score import PosteriorFn, ScoreStats, StatsFn, posterior_from, score_stats, stats_from
from sedd.diffusion.discrete.unmasking import Adaptive, Counts, FirstHitting, FixedCounts
from sedd.diffusion.discrete.unmasking_schedules import UnmaskingPlan, cosine_unmasking, plan_unmasking
from sedd.diffusion.gaussian.guidance import GradientSteps, classifier_free, guided, rounded
from sedd.diffusion.gaussian.process import Gaussian
from sedd.diffusion.gaussian.samplers import DDIM, EulerMaruyama, Renoised
from sedd.diffusion.sampling import Corrected, Sampler, sample
from sedd.diffusion.schedule import Cosine, Geometric, LinearBeta, LogLinear, LogSNR, Power, Schedule, Sqrt, Tan
from sedd.errors import UserError
from sedd.evaluation.conditional import LogLikelihood
from sedd.evaluation.report import Comparison, Report
from sedd.generation.generate import Samples
from sedd.loading import load, train
from sedd.model import Model
from sedd.runtime.processes import initialize
from sedd.version import __version__

__all__ = [
    "DDIM",
    "Absorbing",
    "Adaptive",
    "Barker",
    "Comparison",
    "Corpus",
    "Corrected",
    "Cosine",
    "Counts",
    "Denoiser",
    "Entropy",
    "EntropyBounded",
    "Euler",
    "EulerMaruyama",
    "FirstHitting",
    "FixedCounts",
    "Gaussian",
    "Geometric",
    "Gibbs",
    "GradientSteps",
    "Jump",
    "Latent",
    "LinearBeta",
    "LogLikelihood",
    "LogLinear",
    "LogSNR",
    "Margin",
    "MeanDenoiser",
    "Model",
    "PosteriorFn",
    "Power",
    "Process",
    "Renoise",
    "Renoised",
    "Report",
    "Sampler",
    "Samples",
    "Schedule",
    "ScoreStats",
    "Sqrt",
    "StatsFn",
    "Tan",
    "TokenSampler",
    "Trapezoidal",
    "Tweedie",
    "Uniform",
    "UnmaskingPlan",
    "UserError",
    "__version__",
    "classifier_free",
    "cosine_unmasking",
    "count_loss",
    "cross_entropy_loss",
    "denoising_loss",
    "guided",
    "initialize",
    "load",
    "mean_from",
    "open_corpus",
    "plan_unmasking",
    "posterior_from",
    "prepare",
    "rounded",
    "sample",
    "score_stats",
    "stats_from",
    "train",
]
