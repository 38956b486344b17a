r"""OpenWebText, BD3-LM as published: blocks of 4, 8 or 16 tokens, generated from left to right; 169,627,218 parameters.

Data       as in mdlm_openwebtext.py.
Commands   sedd prepare --source='parquet:data/raw/openwebtext/*.parquet:text' --tokenizer=gpt2:data/raw/gpt2 \
               --split=last:100000 --workers=16 --out=data/openwebtext
           sedd train --config=experiments/bd3lm_openwebtext.py --config.network.block_size=16 \
               --init_from=kuleshov-group/bd3lm-owt-block_size1024-pretrain --workdir=runs/bd3lm_openwebtext
           sedd eval --model=runs/bd3lm_openwebtext --split=validation --protocol=clean
           sedd sample --model=runs/bd3lm_openwebtext --num_samples=4 --length=2048 --sampler=first_hitting --top_p=0.9
Published  sedd eval --model=kuleshov-group/bd3lm-owt-block_size16 --tokenizer=gpt2:data/raw/gpt2 --protocol=clean \
               --draws=4 --data=data/openwebtext --split=validation
           sedd eval --model=kuleshov-group/bd3lm-owt-block_size16 --tokenizer=gpt2:data/raw/gpt2 --protocol=bd3lm \
               --source=wikitext:data/raw/wiki.valid.raw
Launch     python tpu_launch/launch.py up --name=bd3lm-owt --zone=us-central1-a --type=v5litepod-64 --spot \
               --push=gs://BUCKET/data/openwebtext -- sedd train --config=experiments/bd3lm_openwebtext.py \
               --config.network.block_size=16 --init_from=kuleshov-group/bd3lm-owt-block_size1024-pretrain \
               --workdir=gs://BUCKET/runs/bd3lm_openwebtext
Hardware   8 devices of 80 GB: --dry_run estimates 58 GiB each, since the trunk runs on 2,048 positions for 1,024
           tokens.
Time       not run here, nor are the commands on the published checkpoints. 1.3e20 FLOPs, as --dry_run counts them.
Differs    Noise: here stratified mask counts of each block; there times within limits that a search keeps adjusting,
           [.001, .999] at first, and blocks with another share of masks are drawn again. The first token: here scored,
           there given. Attention: here dense with a mask, there kernels of sparse blocks (flex). Else as in
           mdlm_openwebtext.py.
Result     to compare with: a validation perplexity of at most 22.27, 21.68 and 20.73 with blocks of 16, 8 and 4
           (BD3-LM, arXiv 2503.09573, table 4), of rows without an end of text at their ends and the first token given,
           after 850,000 steps of MDLM and 150,000 of these. In the same table 17.54 for the autoregressive model, and
           at most 22.98 for MDLM.
"""

from sedd import config as configs


def get_config():
    """Returns the recipe of the authors' scripts, the second stage of training, with blocks of 4 tokens."""
    config = configs.paper()
    config.network.update(prediction="denoiser", conditioning="constant", block_size=4)
    config.data.update(corpus="data/openwebtext", vocab_size=50257)
    config.training.update(steps=150_000, accumulation=8, noise_sampling="mask_count")
    config.optimizer.clip_norm = 1024.0
    config.evaluation.draws = 4  # per row: there are a hundred thousand rows
    return config
