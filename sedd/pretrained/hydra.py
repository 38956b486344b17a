"""The config of a training checkpoint of PyTorch: a config.json beside it, or the .hydra/config.yaml of its run.

SEDD and RADD publish the config of their runs as it is; MDLM, Duo and UDLM publish another one, which is made of it.
"""

import re
from pathlib import Path
from typing import Any

from sedd.codecs import torch_files
from sedd.codecs.huggingface import CONFIG, read_json
from sedd.errors import UserError

HYDRA = ".hydra/config.yaml"
_EMBEDDING = "backbone.vocab_embed.embedding"
# The model_type of config.json by algo.name of Duo, and by diffusion and parameterization of MDLM and UDLM.
_TYPES = {
    "duo_base": "duo",
    "distillation": "duo",
    "absorbing_state subs": "mdlm",
    "uniform d3pm": "udlm",
}
_SIZES = {  # of the group model, by their names in config.json
    "hidden_dim": "hidden_size",
    "model_length": "length",
    **{name: name for name in ("cond_dim", "n_blocks", "n_heads", "dropout")},
}


def description(file: Path) -> dict[str, Any]:
    """Returns what describes a training checkpoint, as the config.json of published ones does.

    UserError if there is no config, if it is damaged, or if the training is of a kind that is not supported.
    """
    if (file.parent / CONFIG).is_file():
        return read_json(file.parent, CONFIG)
    config = next((one for one in (file.parent / HYDRA, file.parent.parent / HYDRA) if one.is_file()), None)
    if config is None:
        raise UserError(
            f"there is no config beside {file}; copy that of its run to {file.parent / HYDRA}, or put the {CONFIG} of "
            "its published format there"
        )
    contents = read_yaml(config)
    if not {"algo", "parameterization"} & contents.keys():
        return contents
    try:
        return _described(contents, config, file)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config} is no config of MDLM, Duo or UDLM: it lacks {error}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the contents of a YAML file, in which ${a.b} is the value of another key. UserError if it is damaged.

    Other interpolations, which call functions of the authors' code, stay text.
    """
    import yaml

    try:
        contents = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError):
        contents = None
    if not isinstance(contents, dict):
        raise UserError(f"{file} is damaged: it is no YAML of keys and values; copy it again")
    return _interpolated(contents, contents)


def _interpolated(node: Any, root: dict[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _interpolated(value, root) for key, value in node.items()}
    reference = re.fullmatch(r"\$\{([\w.]+)\}", node) if isinstance(node, str) else None
    if reference is None:
        return node
    found: Any = root
    for key in reference[1].split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return node if found is None else found


def _described(contents: dict[str, Any], config: Path, file: Path) -> dict[str, Any]:
    """Returns the config.json for the config of a run of MDLM, Duo or UDLM. The vocabulary is that of the weights."""
    algorithm = contents.get("algo", contents)  # a group of Duo's; MDLM and UDLM have its keys at the top
    kind = algorithm["name"] if "algo" in contents else f"{contents['diffusion']} {contents['parameterization']}"
    name, tokenizer = _TYPES.get(kind, kind), contents["data"]["tokenizer_name_or_path"]
    for key, value, known in (
        ("backbone", algorithm["backbone"], ("dit",)),
        ("noise.type", contents["noise"]["type"], ("loglinear", "log-linear")),
    ):
        if value not in known:
            raise UserError(f"{config}: {key}={value} is not supported, only {known[0]}")
    if name == "mdlm" and "gpt2" not in tokenizer:
        raise UserError(
            f"{config}: the mask is a token of {tokenizer}'s own, and only one after the last token is supported, as "
            "with gpt2"
        )
    weights = torch_files.shapes(file)
    if _EMBEDDING not in weights:
        raise UserError(f"{file}: the checkpoint lacks {_EMBEDDING}")
    return {
        "model_type": name,
        "vocab_size": weights[_EMBEDDING][0],
        "time_conditioning": algorithm["time_conditioning"],
        "causal": algorithm.get("causal_attention", False),
        "cfg": contents["training"].get("guidance") is not None,
        **{ours: contents["model"][theirs] for ours, theirs in _SIZES.items()},
    }
