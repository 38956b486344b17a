r"""One Billion Words, one sentence per row, MDLM as published: absorbing, a denoiser not conditioned on the noise.

Data       as in lm1b_absorb.py, detokenised.
Commands   sedd prepare --train='lm1b:data/raw/lm1b/training-monolingual.tokenized.shuffled/news.en-*' \
               --validation='lm1b:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-0000?-*' \
               --test='lm1b:data/raw/lm1b/heldout-monolingual.tokenized.shuffled/news.en.heldout-000[1-4]?-*' \
               --tokenizer=huggingface:data/raw/bert-base-uncased/tokenizer.json \
               --mode=padded --padding=ignored --out=data/lm1b_detokenised
           sedd train --config=experiments/mdlm_lm1b.py --workdir=runs/mdlm_lm1b
           sedd eval --model=runs/mdlm_lm1b --split=test
Launch     python tpu_launch/launch.py up --name=mdlm-lm1b --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=gs://BUCKET/data/lm1b_detokenised -- sedd train --config=experiments/mdlm_lm1b.py \
               --workdir=gs://BUCKET/runs/mdlm_lm1b
Hardware   8 devices of 24 GB: --dry_run estimates 9 GiB each. On fewer, --config.training.accumulation=2, 4, ...
Time       not run here. 4.4e19 FLOPs with the padding, as --dry_run counts them: 12 hours at 1e15 a second, which
           is 40% of the peak of 8 A100s.
Differs    Rows: here a sentence and [SEP], a longer one in several rows; there [CLS], the sentence, [SEP], cut at 128.
           Padding: here neither corrupted, attended to nor scored, so that the length is given; there [PAD] is
           corrupted and attended to, but not scored. Mask: here an id after the 30,522; there [MASK], one of them.
           Times: here stratified over the batch; there over the rows of one device. Head: here float32; there bfloat16.
           optimizer.clip_norm: here of the loss summed over a row, of about 30 tokens; there 1.0 of its mean.
Result     to compare with, though the protocol differs: a test perplexity of at most 27.04 after a million steps, which
           the authors count as 33 billion tokens, and of at most 23.00 after ten million (MDLM, arXiv 2406.07524).
           Duo (arXiv 2506.10892, table 1) lists 27.0 not packed, as here, and 31.8 in packed rows, which have no
           padding that tells the length. Of these models no checkpoint is on the Hugging Face Hub.
"""

from sedd import config as configs


def get_config():
    """Returns the recipe of the authors' configs on sentences in rows of 128 tokens."""
    config = configs.paper()
    config.network.update(prediction="denoiser", conditioning="constant")
    config.data.update(corpus="data/lm1b_detokenised", block_length=128, vocab_size=30522)
    config.training.steps = 1_000_000
    config.optimizer.clip_norm = 30.0
    config.evaluation.draws = 1  # per row: there are tens of thousands of rows
    return config
