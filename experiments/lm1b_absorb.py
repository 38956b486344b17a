r"""One Billion Words, one sentence per row, absorbing process: the paper's small network.

Data       1-billion-word-language-modeling-benchmark-r13output.tar.gz (1,792,209,805 bytes) of statmt.org/lm-benchmark,
           unpacked to data/raw/lm1b without its top folder: 99 shards for training (30,301,028 sentences) and 50
           held-out ones (306,688), text that is already split at punctuation. Ten of the held-out shards are for
           validation, 40 for the test; published numbers use all 50. tokenizer.json is that of bert-base-uncased:
           30,522 tokens, lower case.
Commands   sedd prepare --train='lines:data/raw/lm1b/training-monolingual.tokenized.shuffled/news.en-*' \
               --validation='lines:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-0000?-*' \
               --test='lines:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-000[1-4]?-*' \
               --tokenizer=huggingface:data/raw/bert-base-uncased/tokenizer.json \
               --mode=padded --padding=ignored --out=data/lm1b
           sedd train --config=experiments/lm1b_absorb.py --workdir=runs/lm1b_absorb
           sedd eval --model=runs/lm1b_absorb --split=test
Launch     python tpu_launch/launch.py up --name=lm1b-absorb --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=gs://BUCKET/data/lm1b -- sedd train --config=experiments/lm1b_absorb.py \
               --workdir=gs://BUCKET/runs/lm1b_absorb
Hardware   8 devices of 24 GB: --dry_run estimates 9 GiB each. On fewer, --config.training.accumulation=2, 4, ...
Time       not run here. 4.4e19 FLOPs with the padding, as --dry_run counts them: 12 hours at 1e15 a second, which
           is 40% of the peak of 8 A100s.
Result     to compare with, though the protocol may differ: a perplexity of at most 32.79 (SEDD, arXiv 2310.16834,
           table 3). Its section 5.1 says that blocks are packed with sentences, while Duo (arXiv 2506.10892, table 1)
           lists a retrained 32.7 as not packed; for the same method the two protocols differ by 0.5 to 5.4 there. Here
           padding is neither attended to nor scored. A million steps is Duo's and D3PM's number; the paper gives none.
"""

from sedd import config as configs


def get_config():
    """Returns the paper's recipe on sentences in rows of 128 tokens."""
    config = configs.paper()
    config.data.update(corpus="data/lm1b", block_length=128, vocab_size=30522)
    config.training.steps = 1_000_000
    config.evaluation.draws = 1  # per row: there are tens of thousands of rows
    return config
