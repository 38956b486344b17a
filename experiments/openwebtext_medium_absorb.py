r"""OpenWebText, absorbing process: the paper's medium network, 424,477,010 parameters.

Data       as in openwebtext_small_absorb.py.
Commands   sedd prepare --source='parquet:data/raw/openwebtext/*.parquet:text' --tokenizer=gpt2:data/raw/gpt2 \
               --split=last:100000 --workers=16 --out=data/openwebtext
           sedd train --config=experiments/openwebtext_medium_absorb.py --workdir=runs/openwebtext_medium_absorb
           sedd eval --model=runs/openwebtext_medium_absorb --split=validation
Launch     python tpu_launch/launch.py up --name=owt-medium-absorb --zone=us-central1-a --type=v5litepod-64 --spot \
               --push=gs://BUCKET/data/openwebtext -- sedd train --config=experiments/openwebtext_medium_absorb.py \
               --config.mesh.fsdp=8 --workdir=gs://BUCKET/runs/openwebtext_medium_absorb
Hardware   8 devices of 80 GB: --dry_run estimates 52 GiB each. The paper has 8 A100s of 80 GB, or 16 of 40 GB. On
           more devices, --config.mesh.fsdp=2, 4, ... splits the parameters too.
Time       not run here. 5.1e20 FLOPs, as --dry_run counts them: 6 days at 1e15 a second, which is 40% of the peak
           of 8 A100s.
Result     to compare with: a perplexity of at most 42.77 on LAMBADA, 31.04 on WikiText2 and 29.98 on WikiText103
           (SEDD, arXiv 2310.16834, table 1).
"""

from sedd import config as configs


def get_config():
    """Returns the paper's recipe with the sizes of GPT-2 medium; layers are scanned, which compiles faster."""
    config = configs.paper()
    config.data.update(corpus="data/openwebtext", vocab_size=50257)
    config.network.update(width=1024, layers=24, heads=16, embedding_std=1024**-0.5 / 3**0.5, scan=True)
    config.training.accumulation = 8
    config.evaluation.draws = 1  # per row: there are a hundred thousand rows
    return config
