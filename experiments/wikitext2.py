r"""WikiText-2, absorbing process, for one GPU, or half a day on a CPU: a network of 10 M parameters.

Data       wikitext-2-v1.zip (Merity et al., arXiv 1609.07843), unpacked to data/raw/wikitext-2: wiki.train.tokens (some
           10.8 MB), wiki.valid.tokens (1,121,681 bytes) and wiki.test.tokens (1,256,449 bytes), with SHA-1
           863f29c46ef9d167fff4940ec821195882fe29d1, 0418625c8b4da6e4b5c7a0b9e78d4ae8f7ee5422 and
           c7b8ce0aa086fb34dab808c5c49224211eb2b172. Words are split at spaces, rare ones are <unk>.
Commands   sedd prepare --train=text:data/raw/wikitext-2/wiki.train.tokens \
               --validation=text:data/raw/wikitext-2/wiki.valid.tokens \
               --test=text:data/raw/wikitext-2/wiki.test.tokens --tokenizer=sentencepiece:8000 --out=data/wikitext2
           sedd train --config=experiments/wikitext2.py --workdir=runs/wikitext2
           sedd eval --model=runs/wikitext2 --split=test
Launch     python tpu_launch/launch.py up --name=wikitext2 --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/wikitext2 -- sedd train --config=experiments/wikitext2.py \
               --workdir=gs://BUCKET/runs/wikitext2
Hardware   one GPU of 8 GB or less, or two CPU cores: --dry_run estimates 2 GiB.
Time       not run here. 3.0e15 FLOPs, as --dry_run counts them: minutes on a GPU; on two CPU cores half a day at
           7e10 a second, about what the quickstart reaches there.
Result     no published number is comparable: those of diffusion models on this text are of models trained on
           OpenWebText, not on these two million words.
"""

from sedd import config as configs


def get_config():
    """Returns the default recipe for a wider and deeper network with dropout: thirty epochs of a small text."""
    config = configs.default()
    config.data.update(corpus="data/wikitext2", block_length=128, vocab_size=8000)
    config.network.update(width=256, layers=6, dropout=0.1)
    config.training.steps = 10_000
    config.optimizer.update(adam_learning_rate=0.01, warmup_steps=200, clip_norm=128.0)
    config.checkpoint.every = config.evaluation.every = 1000
    return config
