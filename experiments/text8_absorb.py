r"""text8, characters, absorbing process: the paper's small network.

Data       http://mattmahoney.net/dc/text8.zip (31,344,016 bytes) holds one file, text8: 100,000,000 bytes, a to z and
           the space, MD5 3bea1919949baf155f99411df5fada7e. Unpack it to data/raw/text8. The first 90,000,000 characters
           are for training, then 5,000,000 and 5,000,000, the usual split.
Commands   sedd prepare --source=text:data/raw/text8 --tokenizer=characters --split=position:90,5,5 --out=data/text8
           sedd train --config=experiments/text8_absorb.py --workdir=runs/text8_absorb
           sedd eval --model=runs/text8_absorb --split=test
Launch     python tpu_launch/launch.py up --name=text8-absorb --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=data/text8 -- sedd train --config=experiments/text8_absorb.py \
               --workdir=gs://BUCKET/runs/text8_absorb
Hardware   8 devices of 40 GB: --dry_run estimates 17 GiB each. On fewer, --config.training.accumulation=2, 4, ...
Time       not run here. 7.1e19 FLOPs, as --dry_run counts them: 20 hours at 1e15 a second, which is 40% of the
           peak of 8 A100s.
Result     to compare with: at most 1.39 bits per character (SEDD, arXiv 2310.16834, table 2); MD4's at most 1.37
           (arXiv 2406.04329, table 2). Here bits per byte are bits per character. The paper gives neither schedule nor
           steps for text8: it recommends log-linear, and a million steps is D3PM's number (arXiv 2107.03006, appendix
           B.2), whose network and split it uses.
"""

from sedd import config as configs


def get_config():
    """Returns the paper's recipe on 27 characters in blocks of 256."""
    config = configs.paper()
    config.data.update(corpus="data/text8", block_length=256, vocab_size=27)
    config.training.steps = 1_000_000
    return config
