r"""English Wikipedia, texts of 128 tokens, TEncDM as published: BERT's states, its network size and optimiser.

Data       wikimedia/wikipedia on the Hugging Face Hub, 20231101.en, in data/raw/wikipedia/; BERT as in tencdm_roc.py.
Commands   sedd prepare --source='parquet:data/raw/wikipedia/*.parquet:text' --split=last:5000 \
               --tokenizer=huggingface:data/bert-base-cased/tokenizer.json --out=data/wikipedia_bert
           sedd train --config=experiments/tencdm_wikipedia.py --workdir=runs/tencdm_wikipedia
           sedd eval --model=runs/tencdm_wikipedia --split=validation
           sedd sample --model=runs/tencdm_wikipedia --num_samples=4 --steps=50 --sampler=tencdm
Launch     python tpu_launch/launch.py up --name=tencdm-wikipedia --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=data/wikipedia_bert --push=data/bert-base-cased -- \
               sedd train --config=experiments/tencdm_wikipedia.py \
               --workdir=gs://BUCKET/runs/tencdm_wikipedia
Hardware   eight devices of 24 GB.
Time       not run here; twice the tokens of tencdm_roc.py in each update.
Result     to compare with (Shabalin et al., arXiv 2402.19097, table 1): MAUVE .874, GPT-2 perplexity 104.4, diversity
           .504, memorization .286; with static embeddings .378, 156.1, .517, .263. Texts here are blocks of a stream of
           articles, and end where a block ends. The network as in tencdm_roc.py.
"""

from sedd import config as configs


def get_config():
    """Returns the published recipe (sections 4 and 5) on blocks of 128 tokens."""
    config = configs.default()
    config.process.name = "gaussian"
    config.codec.update(name="encoder", encoder="data/bert-base-cased")
    config.network.update(width=768, layers=12, heads=12, dropout=0.1, dtype="bfloat16")
    config.network.update(long_skips=True, estimate_layers=True)
    config.data.update(corpus="data/wikipedia_bert", block_length=128, vocab_size=28_996)
    config.training.update(steps=200_000, batch_size=512, ema_decay=0.9999, min_time=1e-5)
    config.optimizer.update(name="adamw", learning_rate=2e-4, b2=0.98, weight_decay=0.01, warmup_steps=5000)
    config.optimizer.update(decay="constant", clip_norm=128.0)
    return config
