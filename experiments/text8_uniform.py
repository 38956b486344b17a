r"""text8, characters, uniform process: the paper's small network.

Data       text8, as in text8_absorb.py.
Commands   sedd prepare --source=text:data/raw/text8 --tokenizer=characters --split=position:90,5,5 --out=data/text8
           sedd train --config=experiments/text8_uniform.py --workdir=runs/text8_uniform
           sedd eval --model=runs/text8_uniform --split=test
Launch     python tpu_launch/launch.py up --name=text8-uniform --zone=us-central1-a --type=v5litepod-16 --spot \
               --push=data/text8 -- sedd train --config=experiments/text8_uniform.py \
               --workdir=gs://BUCKET/runs/text8_uniform
Hardware   8 devices of 40 GB: --dry_run estimates 17 GiB each. On fewer, --config.training.accumulation=2, 4, ...
Time       not run here. 7.1e19 FLOPs, as --dry_run counts them: 20 hours at 1e15 a second, which is 40% of the
           peak of 8 A100s.
Result     to compare with: at most 1.47 bits per character (SEDD, arXiv 2310.16834, table 2). The geometric schedule
           runs from 1e-4 to 20, as in the authors' released settings; the paper prints 1e-5 to 20.
           The recipe is the paper's. At small size two parts of it, the bound as loss and the geometric schedule, cost
           .17 and .42 nats a token (docs/measurements.md, "The uniform process"); at this size nothing was compared.
           The settings of the recipe that process.name=uniform has by default: network.prediction=posterior,
           network.conditioning=log_snr, training.loss=cross_entropy and schedule.name=loglinear, all four together.
"""

from sedd import config as configs


def get_config():
    """Returns the paper's recipe on 27 characters in blocks of 256."""
    config = configs.paper()
    config.process.name, config.schedule.name = "uniform", "geometric"
    config.data.update(corpus="data/text8", block_length=256, vocab_size=27)
    config.training.steps = 1_000_000
    return config
