r"""ROCStories, five-sentence stories, Diffusion-LM as published: its network size, objective and optimiser.

Data       cs.rochester.edu/nlp/rocstories (Mostafazadeh et al., arXiv 1604.01696), 98,161 stories, on request; in
           data/raw/roc/ as roc_train.json and roc_valid.json of Diffusion-LM's authors, a list of one story per line:
           jq -r '.[0]' data/raw/roc/roc_train.json > data/raw/roc/train.txt, and so for valid.
Commands   sedd prepare --train=lines:data/raw/roc/train.txt --validation=lines:data/raw/roc/valid.txt \
               --test=lines:data/raw/roc/valid.txt --tokenizer=sentencepiece:11040 \
               --mode=padded --padding=scored --out=data/roc
           sedd train --config=experiments/roc_diffusion_lm.py --workdir=runs/roc_diffusion_lm
           sedd eval --model=runs/roc_diffusion_lm --split=validation
           sedd sample --model=runs/roc_diffusion_lm --num_samples=4 --steps=2000 --round_below=inf
Launch     python tpu_launch/launch.py up --name=roc-diffusion-lm --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/roc -- sedd train --config=experiments/roc_diffusion_lm.py \
               --workdir=gs://BUCKET/runs/roc_diffusion_lm
Hardware   one device of 24 GB.
Time       not run here; four times the updates of e2e_diffusion_lm.py.
Result     to compare with (Li et al., arXiv 2205.14217): an NLL bound of 3.88 nats a word, of another variant of the
           model (table 8); Shabalin et al. (arXiv 2402.19097) measure a MAUVE of .043 for it. The network here is this
           project's trunk, not the paper's BERT encoder; tokens are SentencePiece's, not 11,043 words.
"""

from sedd import config as configs


def get_config():
    """Returns the published recipe (section 6 and appendix D) on rows of 64 tokens with 128 coordinates each."""
    config = configs.default()
    config.process.name, config.schedule.name = "gaussian", "sqrt"
    config.codec.update(width=128, normalised=False, rounding="head")
    config.network.update(prediction="x0", conditioning="sigma", soft_tokens=False, self_conditioning=False)
    config.network.update(width=768, layers=12, heads=12, dropout=0.1)
    config.data.update(corpus="data/roc", block_length=64, vocab_size=11_041)
    config.training.update(loss="regression", steps=800_000, batch_size=64, ema_decay=0.9999, min_time=1e-5)
    config.optimizer.update(name="adamw", learning_rate=1e-4, b2=0.999, warmup_steps=1, clip_norm=1e6)
    return config
