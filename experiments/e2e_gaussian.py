r"""E2E restaurant descriptions, Gaussian diffusion over learned embeddings: a model for two cores and ten minutes.

Data       as in e2e.py.
Commands   sedd prepare --train=csv:data/raw/e2e/trainset.csv:ref --validation=csv:data/raw/e2e/devset.csv:ref \
               --test=csv:data/raw/e2e/testset_w_refs.csv:ref --tokenizer=sentencepiece:1000 \
               --mode=padded --padding=ignored --out=data/e2e
           sedd train --config=experiments/e2e_gaussian.py --workdir=runs/e2e_gaussian
           sedd eval --model=runs/e2e_gaussian --split=test
           sedd infill --model=runs/e2e_gaussian --num_samples=4 "The Punter is a<blank:6> near<blank:4>."
           sedd sample --model=runs/e2e_gaussian --num_samples=4 --temperature=0.8
Launch     python tpu_launch/launch.py up --name=e2e-gaussian --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/e2e -- sedd train --config=experiments/e2e_gaussian.py \
               --workdir=gs://BUCKET/runs/e2e_gaussian
Hardware   two CPU cores.
Time       ten minutes: 577 seconds, measured on the two smaller files of the data.
Result     2.108 ± .048 nats per token on held-out text of those two files; no published number is comparable. What the
           process learns beside the others is in docs/continuous.md.
"""

from sedd import config as configs


def get_config():
    """Returns the Gaussian recipe on rows of 64 tokens, conditioned on given tokens so that infilling is exact."""
    config = configs.default()
    config.process.name = "gaussian"
    config.data.update(corpus="data/e2e", block_length=64, vocab_size=1001)
    config.network.given_embedding = True
    config.training.update(steps=1400, batch_size=32)
    config.optimizer.clip_norm = 64.0
    return config
