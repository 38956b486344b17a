r"""E2E restaurant descriptions, Diffusion-LM as published: its network size, objective and optimiser.

Data       as in e2e.py; the paper uses words that occur more than ten times, 821 with START, END, UNK and PAD.
Commands   sedd prepare --train=csv:data/raw/e2e/trainset.csv:ref --validation=csv:data/raw/e2e/devset.csv:ref \
               --test=csv:data/raw/e2e/testset_w_refs.csv:ref --tokenizer=sentencepiece:820 \
               --mode=padded --padding=scored --out=data/e2e_820
           sedd train --config=experiments/e2e_diffusion_lm.py --workdir=runs/e2e_diffusion_lm
           sedd eval --model=runs/e2e_diffusion_lm --split=test
           sedd sample --model=runs/e2e_diffusion_lm --num_samples=4 --steps=200 --round_below=inf
Launch     python tpu_launch/launch.py up --name=e2e-diffusion-lm --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/e2e_820 -- sedd train --config=experiments/e2e_diffusion_lm.py \
               --workdir=gs://BUCKET/runs/e2e_diffusion_lm
Hardware   one device of 24 GB.
Time       not run here. The paper's 200,000 steps took about 5 hours on an A100.
Result     to compare with (Li et al., arXiv 2205.14217): an NLL bound of 2.28 nats a word, of another variant of the
           model (table 8), and lm-scores of 2.5 to 3.7 under control (table 2). The network here is this project's
           trunk, with adaLN and rotary positions, not the paper's BERT encoder; tokens are SentencePiece's, not words.
           This objective learns more slowly than the default one: docs/continuous.md.
"""

from sedd import config as configs


def get_config():
    """Returns the published recipe (section 6 and appendix D) on rows of 64 tokens with 16 coordinates each."""
    config = configs.default()
    config.process.name, config.schedule.name = "gaussian", "sqrt"
    config.codec.update(width=16, normalised=False, rounding="head")
    config.network.update(prediction="x0", conditioning="sigma", soft_tokens=False, self_conditioning=False)
    config.network.update(width=768, layers=12, heads=12, dropout=0.1)
    config.data.update(corpus="data/e2e_820", block_length=64, vocab_size=821)
    config.training.update(loss="regression", steps=200_000, batch_size=64, ema_decay=0.9999, min_time=1e-5)
    config.optimizer.update(name="adamw", learning_rate=1e-4, b2=0.999, warmup_steps=1, clip_norm=1e6)
    return config
