r"""ROCStories, five-sentence stories, TEncDM as published: BERT's states, its network size, objectives and optimiser.

Data       as in roc_diffusion_lm.py; BERT is a folder with config.json, model.safetensors and tokenizer.json of
           google-bert/bert-base-cased.
Commands   sedd prepare --train=lines:data/raw/roc/train.txt --validation=lines:data/raw/roc/valid.txt \
               --test=lines:data/raw/roc/valid.txt --tokenizer=huggingface:data/bert-base-cased/tokenizer.json \
               --mode=padded --padding=scored --out=data/roc_bert
           sedd train --config=experiments/tencdm_roc.py --workdir=runs/tencdm_roc
           sedd eval --model=runs/tencdm_roc --split=validation
           sedd sample --model=runs/tencdm_roc --num_samples=4 --steps=50 --sampler=tencdm
Launch     python tpu_launch/launch.py up --name=tencdm-roc --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=data/roc_bert --push=data/bert-base-cased -- \
               sedd train --config=experiments/tencdm_roc.py \
               --workdir=gs://BUCKET/runs/tencdm_roc
Hardware   eight devices of 24 GB.
Time       not run here.
Result     to compare with (Shabalin et al., arXiv 2402.19097, tables 1 to 4): MAUVE .762, GPT-2 perplexity 29.1,
           diversity .295, memorization .453; with static embeddings (`--config.codec.static=True`) .600, 48.9, .324,
           .371. The paper reports no bound. The network here is this project's trunk, with adaLN and rotary positions,
           and takes its last answer in front of each layer and the paper's long skips; its BERT layers are post-LN.
"""

from sedd import config as configs


def get_config():
    """Returns the published recipe (sections 4 and 5) on rows of 64 tokens."""
    config = configs.default()
    config.process.name = "gaussian"
    config.codec.update(name="encoder", encoder="data/bert-base-cased")
    config.network.update(width=768, layers=12, heads=12, dropout=0.1, dtype="bfloat16")
    config.network.update(long_skips=True, estimate_layers=True)
    config.data.update(corpus="data/roc_bert", block_length=64, vocab_size=28_996)
    config.training.update(steps=200_000, batch_size=512, ema_decay=0.9999, min_time=1e-5)
    config.optimizer.update(name="adamw", learning_rate=2e-4, b2=0.98, weight_decay=0.01, warmup_steps=5000)
    config.optimizer.update(decay="constant", clip_norm=64.0)
    return config
