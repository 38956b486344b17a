r"""OpenWebText, the autoregressive baseline of the tables of SEDD, MDLM, Duo and BD3-LM: the same transformer, causal.

Data       as in mdlm_openwebtext.py.
Commands   sedd prepare --source='parquet:data/raw/openwebtext/*.parquet:text' --tokenizer=gpt2:data/raw/gpt2 \
               --split=last:100000 --workers=16 --out=data/openwebtext
           sedd train --config=experiments/autoregressive_openwebtext.py --workdir=runs/autoregressive_openwebtext
           sedd eval --model=runs/autoregressive_openwebtext --split=validation --protocol=clean,bd3lm
           sedd sample --model=runs/autoregressive_openwebtext --num_samples=4 --length=1024
           sedd infill --model=runs/autoregressive_openwebtext --prefix='The capital of France is' --length=64
Launch     python tpu_launch/launch.py up --name=autoregressive-owt --zone=us-central1-a --type=v5litepod-64 --spot \
               --push=gs://BUCKET/data/openwebtext -- sedd train --config=experiments/autoregressive_openwebtext.py \
               --workdir=gs://BUCKET/runs/autoregressive_openwebtext
Hardware   8 devices of 80 GB: --dry_run estimates 36 GiB each. On others set --config.training.accumulation=8, 2, ...
Time       not run here. 2.2e20 FLOPs, as --dry_run counts them.
Differs    The first token of a row: here predicted from a start token, and scored under the protocol clean; there
           given. Norms: here with biases. Rows: as in mdlm_openwebtext.py.
Result     to compare with: a validation perplexity of 17.54 after half a million steps (MDLM, arXiv 2406.07524, table
           2; 17.5 in Duo, arXiv 2506.10892, table 1), of rows with an end of text at both ends, the first given.
           Zero-shot, under --protocol=bd3lm with --source= each of mdlm_openwebtext.py (BD3-LM, arXiv 2503.09573, table
           5): 25.32 on Wikitext, 81.07 on PTB, 51.14 on LM1B, 52.13 on LAMBADA, 52.11 on AG News, 48.59 on PubMed and
           41.22 on arXiv; in MDLM's table 3, with an end of text after documents, 25.75, 82.05, 51.25, 51.28, 52.09,
           49.01 and 41.73.
"""

from sedd import config as configs


def get_config():
    """Returns the recipe of the authors' configs: blocks of one token, and no modulation."""
    config = configs.paper()
    config.network.update(prediction="denoiser", conditioning="constant", block_size=1, cond_dim=0)
    config.data.update(corpus="data/openwebtext", vocab_size=50257)
    config.training.update(steps=500_000, accumulation=4, noise_sampling="mask_count")
    config.optimizer.clip_norm = 1024.0
    config.evaluation.draws = 1  # all draws are equal
    return config
