"""UDLM (Schiff et al., arXiv 2412.10193): uniform diffusion, such as kuleshov-group/udlm-lm1b."""

from sedd.pretrained.dit import TransformersDiT


class Udlm(TransformersDiT):
    """The output is the distribution of a token given all others, `denoiser`, and is not converted."""

    name, title = "udlm", "UDLM, uniform diffusion"
    tokenizers = ("google-bert/bert-base-uncased", "bert-base-uncased")
    process = "uniform"
    fixed = (("cfg", False),)
