"""64-bit seeds: all bits are used, and an invalid seed gives a one-line error in every function with a seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_corpus, untrained_model

import sedd
from sedd import config as configs
from sedd import data
from sedd.diffusion import keyed_random
from sedd.seeds import DOCUMENT_ORDER, HELD_OUT_DOCUMENTS, SAMPLE_LENGTHS, philox

INVALID_SEEDS = (-1, 2**64, 1.5, "7", None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return small_corpus(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def model(corpus):
    return untrained_model(corpus)


def test_a_key_depends_on_all_bits_of_its_seed():
    """For a seed below 2**32, the key equals that of `jax.random.key`."""
    for seed in (0, 7, 2**31, 2**32 - 1, np.int64(5)):
        expected = jax.random.key(seed, impl="threefry2x32")
        np.testing.assert_array_equal(jax.random.key_data(keyed_random.root_key(seed)), jax.random.key_data(expected))
    seeds = [7, 7 + 2**32, 7 + 2**63, 2**64 - 1, 2**32 - 1]
    assert len({keyed_random.uniform(keyed_random.root_key(seed)).item() for seed in seeds}) == len(seeds)


def test_the_random_streams_of_data_are_unchanged():
    """Corpora and runs that exist depend on them; each purpose has a stream of its own."""
    purposes = (HELD_OUT_DOCUMENTS, DOCUMENT_ORDER, SAMPLE_LENGTHS, 3)
    numbers = [philox(2**63 + 7, purpose).integers(2**32) for purpose in purposes]
    assert numbers == [689774521, 2147372342, 1825421329, 4239009689]


def test_training_batches_depend_on_all_bits_of_the_seed(corpus):
    seeds = (7, 7 + 2**32, 7 + 2**63)
    assert len({data.batch(corpus, 16, 8, seed, 0).tokens.tobytes() for seed in seeds}) == len(seeds)
    for seed in (2**32 + 7, 2**64 - 1):
        assert configs.override(configs.default(), [f"training.seed={seed}"]).training.seed == seed


@pytest.mark.parametrize("seed", INVALID_SEEDS)
def test_an_invalid_seed_gives_a_one_line_error(model, corpus, tmp_path, seed):
    """It is raised before anything is drawn, compiled or written."""
    for call in (
        lambda: model.sample(seed=seed),
        lambda: model.infill("the <blank:3>", seed=seed),
        lambda: model.perplexity(corpus, seed=seed, out=tmp_path / "out"),
        lambda: model.compare(model, corpus, seed=seed),
        lambda: model.log_likelihood("a", seed=seed),
        lambda: data.batch(corpus, 16, 8, seed, 0),
        lambda: sedd.prepare(f"text:{corpus.path.parent}/texts/*.txt", "characters", tmp_path / "prepared", seed),
        lambda: keyed_random.root_key(seed),
    ):
        with pytest.raises(sedd.UserError, match="^seed must be a whole number from 0 to 2..64 - 1") as error:
            call()
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_config_refuses_invalid_seeds_and_steps():
    for seed in (-1, 2**64):
        with pytest.raises(sedd.UserError, match="config: training.seed must be a whole number from 0"):
            configs.override(configs.default(), [f"training.seed={seed}"])
    with pytest.raises(sedd.UserError, match="config: training.steps must be less than 2..31"):
        configs.override(configs.default(), [f"training.steps={2**31}"])


def test_row_indices_beyond_31_bits_have_different_noise():
    """Rows are keyed by 32-bit numbers; later blocks of long texts have numbers from 2**31 on."""
    rows = jnp.array([5, 2**31 - 1, 2**31, 2**31 + 5, 2**32 - 1], jnp.uint32)
    assert len(np.unique(keyed_random.uniform(keyed_random.row_keys(keyed_random.root_key(0), rows)))) == len(rows)
