r"""E2E restaurant descriptions, one document per row, for infilling: the quickstart's network on short texts.

Data       github.com/tuetschek/e2e-dataset (Novikova et al., arXiv 1706.09254), CC BY-SA 4.0, in data/raw/e2e:
           trainset.csv (42,061 descriptions), devset.csv (4,672; 1,161,305 bytes) and testset_w_refs.csv (4,693;
           1,310,822 bytes), with the columns mr (meaning representation) and ref (a description of it), of which ref
           is used. SHA-256 of the last two: fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9 and
           edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd.
Commands   sedd prepare --train=csv:data/raw/e2e/trainset.csv:ref --validation=csv:data/raw/e2e/devset.csv:ref \
               --test=csv:data/raw/e2e/testset_w_refs.csv:ref --tokenizer=sentencepiece:1000 \
               --mode=padded --padding=ignored --out=data/e2e
           sedd train --config=experiments/e2e.py --workdir=runs/e2e
           sedd eval --model=runs/e2e --split=test
           sedd infill --model=runs/e2e --num_samples=4 "The Punter is a<blank:6> near<blank:4>."
           sedd sample --model=runs/e2e --num_samples=4 --top_p=0.9
Launch     python tpu_launch/launch.py up --name=e2e --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/e2e -- sedd train --config=experiments/e2e.py \
               --workdir=gs://BUCKET/runs/e2e
Hardware   two CPU cores.
Time       a quarter of an hour, estimated from 278 measured steps at 0.9 seconds of CPU time each.
Result     no published number is comparable: those on this data are of texts generated from a given meaning.
"""

from sedd import config as configs


def get_config():
    """Returns the default network and recipe on rows of 64 tokens; a longer description takes two rows."""
    config = configs.default()
    config.data.update(corpus="data/e2e", block_length=64, vocab_size=1001)
    config.training.steps = 2000
    config.optimizer.clip_norm = 64.0
    return config
