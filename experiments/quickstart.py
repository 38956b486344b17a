r"""The quickstart: names of Unicode's characters, absorbing process, 1.6 M parameters.

Data       builtin:names, 26,540 names, 724 kB; every Python installation carries them.
Commands   sedd prepare --source=builtin:names --tokenizer=sentencepiece:1280 --out=data/names
           sedd train --config=experiments/quickstart.py --workdir=runs/quickstart
           sedd eval --model=runs/quickstart
           (`sedd quickstart` runs all of them, then samples and infills)
Launch     python tpu_launch/launch.py up --name=quickstart --zone=us-central1-a --type=v5litepod-4 --spot \
               --push=data/names -- sedd train --config=experiments/quickstart.py \
               --workdir=gs://BUCKET/runs/quickstart
           (the smallest slice, larger than needed: a rehearsal)
Hardware   two CPU cores.
Time       three to four and a half minutes for everything, measured.
Result     a bound of 1.321 ± 0.016 bits per byte of the test split (36,253 bytes), as `sedd quickstart` printed it; the
           bigram's entropy of the same tokens is 1.330, xz given the training text takes 1.411.
"""

from sedd import config as configs


def get_config():
    """Returns the default config, which is for this experiment. It accepts any vocabulary, for users' own text."""
    return configs.default()
