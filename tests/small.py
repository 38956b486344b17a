"""A corpus and a network small enough to be trained inside a test."""

from sedd import config as configs
from sedd.data.prepare import prepare

NETWORK = ("network.width=16", "network.layers=2", "network.heads=2", "network.condition=8")
ADAMW = ("optimizer.name=adamw", "optimizer.learning_rate=0.01", "optimizer.warmup_steps=2")  # compiles twice as fast
SETTINGS = (*NETWORK, *ADAMW, "data.block_length=16", "training.batch_size=8", "training.steps=6")
MUON = ("optimizer.name=muon", "optimizer.learning_rate=0.02")  # as in the default


def small_corpus(folder, tokenizer="characters"):
    """Sixty short documents in files, prepared."""
    (folder / "texts").mkdir(parents=True)
    for number in range(60):
        text = f"the {number} times table: " + ", ".join(str(number * factor) for factor in range(1, 10)) + ".\n"
        (folder / "texts" / f"{number:02}.txt").write_text(text)
    return prepare(f"text:{folder}/texts/*.txt", tokenizer, folder / "corpus")


def small_config(corpus, *settings):
    """The default config on that corpus, small; then the settings told."""
    return configs.override(configs.default(), [f"data.corpus={corpus.path}", *SETTINGS, *settings])
