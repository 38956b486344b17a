"""Duo (Sahoo et al., arXiv 2506.10892): uniform diffusion, such as s-sahoo/duo."""

from sedd.pretrained.dit import TransformersDiT


class Duo(TransformersDiT):
    """The output is the distribution of a token given all others, `denoiser`, and is not converted."""

    name, title = "duo", "Duo, uniform diffusion"
    process = "uniform"
    fixed = (("causal", False),)
