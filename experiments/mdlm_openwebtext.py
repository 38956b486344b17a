r"""OpenWebText, MDLM as published: absorbing, a denoiser (SUBS) not conditioned on the noise, 169,627,218 parameters.

Data       as in openwebtext_small_absorb.py. For the zero-shot table --source= is each of docs/data.md, "Benchmarks":
           wikitext:data/raw/wiki.valid.raw, ptb:data/raw/ptb.valid.txt, lambada:data/raw/lambada_test.jsonl,
           'lm1b:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-*',
           ag_news:data/raw/ag_news/test.csv, scientific_papers:data/raw/pubmed/val.txt and
           scientific_papers:data/raw/arxiv/val.txt.
Commands   sedd prepare --source='parquet:data/raw/openwebtext/*.parquet:text' --tokenizer=gpt2:data/raw/gpt2 \
               --split=last:100000 --workers=16 --out=data/openwebtext
           sedd train --config=experiments/mdlm_openwebtext.py --workdir=runs/mdlm_openwebtext
           sedd eval --model=runs/mdlm_openwebtext --split=validation --protocol=clean,mdlm
           sedd sample --model=runs/mdlm_openwebtext --num_samples=4 --steps=1000 --sampler=counts
Published  sedd eval --model=kuleshov-group/mdlm-owt --tokenizer=gpt2:data/raw/gpt2 --protocol=mdlm \
               --data=data/openwebtext --split=validation
           sedd eval --model=kuleshov-group/mdlm-owt --tokenizer=gpt2:data/raw/gpt2 --protocol=duo,mdlm \
               --source=wikitext:data/raw/wiki.valid.raw
Launch     python tpu_launch/launch.py up --name=mdlm-owt --zone=us-central1-a --type=v5litepod-64 --spot \
               --push=gs://BUCKET/data/openwebtext -- sedd train --config=experiments/mdlm_openwebtext.py \
               --workdir=gs://BUCKET/runs/mdlm_openwebtext
Hardware   8 devices of 80 GB: --dry_run estimates 36 GiB each. On others set --config.training.accumulation=8, 2, ...
Time       not run here, nor are the commands on the published checkpoint. 4.5e20 FLOPs, as --dry_run counts them: 125
           hours at 1e15 a second, 40% of the peak of 8 A100s. An author names about 5 days on a node of A100s
           (github.com/kuleshov-group/mdlm, issue 19).
Differs    Rows: here one stream of documents with an end of text after each, cut at 1,024; there 1,000 documents at a
           time, the rest dropped, and an end of text before and after each 1,022 tokens, which is scored too.
           Times: here stratified over the batch; there over the rows of one device. Head: here float32; there bfloat16.
           optimizer.clip_norm: here of the loss summed over 1,024 positions; there 1.0 of its mean, which is the same.
Result     to compare with, under --protocol=mdlm: a validation perplexity of at most 23.21 after a million steps (MDLM,
           arXiv 2406.07524; 23.2 in Duo, arXiv 2506.10892, table 1). Zero-shot (MDLM, table 3; Duo, table 2), on
           validation splits but for LM1B, LAMBADA and AG News: at most 32.83 on Wikitext, 95.26 on PTB, 67.01 on LM1B,
           47.52 on LAMBADA, 61.15 on AG News, 41.89 on PubMed and 37.37 on arXiv. Duo's script for these,
           zero_shot_mdlm.sh, puts no end of text after documents, as --protocol=duo; MDLM's own code does. Both drop
           text by the number of CPU cores, most of all of PTB. With the authors' weights and code others measured 22.95
           on OpenWebText (github.com/s-sahoo/duo, issue 12), and with MDLM's code 36.90 on Wikitext and 83.82 on PTB
           (github.com/kuleshov-group/mdlm, issue 29).
"""

from sedd import config as configs


def get_config():
    """Returns the recipe of the authors' configs; it differs from SEDD's in the network's output and conditioning."""
    config = configs.paper()
    config.network.update(prediction="denoiser", conditioning="constant")
    config.data.update(corpus="data/openwebtext", vocab_size=50257)
    config.training.update(steps=1_000_000, accumulation=4)  # in microbatches to reduce memory
    config.optimizer.clip_norm = 1024.0
    config.evaluation.draws = 1  # per row: there are a hundred thousand rows
    return config
