r"""OpenWebText, Duo as published but for its curriculum: uniform, a denoiser conditioned on sigma.

Data       as in openwebtext_small_absorb.py, with another tokenizer: tokenizer.json is that of gpt2 with one more
           special token, [PAD], which Duo's code adds, so that its network has 50,258 states. The package tokenizers
           writes it: Tokenizer.from_file, add_special_tokens(["[PAD]"]), save. Zero-shot: the sources of
           mdlm_openwebtext.py.
Commands   sedd prepare --source='parquet:data/raw/openwebtext/*.parquet:text' --split=last:100000 --workers=16 \
               --tokenizer=huggingface:data/raw/gpt2_pad/tokenizer.json --out=data/openwebtext_pad
           sedd train --config=experiments/duo_openwebtext.py --workdir=runs/duo_openwebtext
           sedd eval --model=runs/duo_openwebtext --split=validation --protocol=clean,mdlm
           sedd sample --model=runs/duo_openwebtext --num_samples=4 --steps=1000 --sampler=tweedie
Published  sedd eval --model=s-sahoo/duo --tokenizer=huggingface:data/raw/gpt2_pad/tokenizer.json --protocol=mdlm \
               --data=data/openwebtext_pad --split=validation
           sedd eval --model=s-sahoo/duo --tokenizer=huggingface:data/raw/gpt2_pad/tokenizer.json --protocol=duo \
               --source=wikitext:data/raw/wiki.valid.raw
Launch     python tpu_launch/launch.py up --name=duo-owt --zone=us-central1-a --type=v5litepod-64 --spot \
               --push=gs://BUCKET/data/openwebtext_pad -- sedd train --config=experiments/duo_openwebtext.py \
               --workdir=gs://BUCKET/runs/duo_openwebtext
Hardware   8 devices of 80 GB: --dry_run estimates 36 GiB each. On others set --config.training.accumulation=8, 2, ...
Time       not run here, nor are the commands on the published checkpoint. 4.5e20 FLOPs, as --dry_run counts them: 125
           hours at 1e15 a second, 40% of the peak of 8 A100s.
Differs    Curriculum: there, in the first 500,000 steps, the network takes the softmax of Gaussian latents of the
           one-hot tokens at temperature .001, whose log noise-to-signal ratio grows from -3.55 to -1.85 linearly in
           time; the loss is that of their argmax at its corruption probability (the paper's equation 10). The last
           500,000 steps are as here. This is the recipe without it: algo=duo_base of the authors' code.
           Rows: here one stream of documents with an end of text after each, cut at 1,024; there 1,000 documents at a
           time, the rest dropped, and an end of text before and after each 1,022 tokens, which is scored too.
           Head: here float32; there bfloat16, as is the loss by default.
           optimizer.clip_norm: here of the loss summed over 1,024 positions; there 1.0 of its mean, which is the same.
           Distillation (DCD) and the greedy last step of sampling are not built.
Result     to compare with, under --protocol=mdlm (in its OpenWebText script an end of text follows each document): a
           validation perplexity of at most 25.2 with the curriculum, after a million steps, and of at most 27.4 for
           UDLM, which has none (Duo, arXiv 2506.10892, table 1). Zero-shot, under --protocol=duo (table 2): at most
           33.57 on Wikitext, 89.35 on PTB, 73.86 on LM1B, 49.78 on LAMBADA, 67.81 on AG News, 44.48 on PubMed and 40.39
           on arXiv. On LM1B in packed rows the curriculum improves 35.0 to 33.7 (table 3).
"""

from sedd import config as configs


def get_config():
    """Returns the recipe of the authors' configs, of which the part without the curriculum."""
    config = configs.paper()
    config.process.name = "uniform"
    config.network.prediction = "denoiser"
    config.data.update(corpus="data/openwebtext_pad", vocab_size=50258)
    config.training.update(steps=1_000_000, accumulation=4)  # in microbatches to reduce memory
    config.optimizer.clip_norm = 1024.0
    config.evaluation.draws = 1  # per row: there are a hundred thousand rows
    return config
