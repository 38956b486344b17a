r"""One Billion Words, one sentence per row, uniform process: the paper's small network.

Data       as in lm1b_absorb.py.
Commands   sedd prepare --train='lines:data/raw/lm1b/training-monolingual.tokenized.shuffled/news.en-*' \
               --validation='lines:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-0000?-*' \
               --test='lines:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-000[1-4]?-*' \
               --tokenizer=huggingface:data/raw/bert-base-uncased/tokenizer.json \
               --mode=padded --padding=ignored --out=data/lm1b
           sedd train --config=experiments/lm1b_uniform.py --workdir=runs/lm1b_uniform
           sedd eval --model=runs/lm1b_uniform --split=test
Launch     python tpu_launch/launch.py up --name=lm1b-uniform --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=gs://BUCKET/data/lm1b -- sedd train --config=experiments/lm1b_uniform.py \
               --workdir=gs://BUCKET/runs/lm1b_uniform
Hardware   8 devices of 24 GB: --dry_run estimates 9 GiB each. On fewer, --config.training.accumulation=2, 4, ...
Time       not run here. 4.4e19 FLOPs with the padding, as --dry_run counts them: 12 hours at 1e15 a second, which
           is 40% of the peak of 8 A100s.
Result     to compare with, though the protocol may differ (see lm1b_absorb.py): a perplexity of at most 40.25
           (SEDD, arXiv 2310.16834, table 3).
           The recipe is the paper's. At small size two parts of it, the bound as loss and the geometric schedule, cost
           .17 and .42 nats a token (docs/measurements.md, "The uniform process"); at this size nothing was compared.
           The settings of the recipe that process.name=uniform has by default: network.prediction=posterior,
           network.conditioning=log_snr, training.loss=cross_entropy and schedule.name=loglinear, all four together.
"""

from sedd import config as configs


def get_config():
    """Returns the paper's recipe on sentences in rows of 128 tokens."""
    config = configs.paper()
    config.process.name, config.schedule.name = "uniform", "geometric"
    config.data.update(corpus="data/lm1b", block_length=128, vocab_size=30522)
    config.training.steps = 1_000_000
    config.evaluation.draws = 1  # per row: there are tens of thousands of rows
    return config
