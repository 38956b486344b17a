"""MDLM (Sahoo et al., arXiv 2406.07524): masked diffusion, such as kuleshov-group/mdlm-owt."""

from sedd.pretrained.dit import TransformersDiT


class Mdlm(TransformersDiT):
    """Its SUBS parametrisation is `denoiser`; the mask is the last token of its vocabulary."""

    name, title = "mdlm", "MDLM, masked diffusion"
    process, masks, conditioned = "absorbing", 1, False
