"""Trees of arrays: paths of leaves, trees that do not fit another, hashes of their content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sedd.errors import UserError
from sedd.runtime import parallel, trees

TREE = {
    "b": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.arange(3)},
    "a": [jnp.bfloat16(1.5), jnp.array([True, False])],
}


def test_leaves_have_paths_types_and_shapes():
    assert list(trees.named(TREE)) == ["a/0", "a/1", "b/bias", "b/kernel"]
    assert trees.types(TREE) == {
        "a/0": "bfloat16[]",
        "a/1": "bool[2]",
        "b/bias": "int32[3]",
        "b/kernel": "float32[4, 3]",
    }


def test_a_fitting_tree_gets_the_structure_of_the_other():
    """It may be a dict by path, in any order."""
    like = jax.eval_shape(lambda: TREE)
    by_path = dict(reversed(trees.named(TREE).items()))
    jax.tree.map(np.testing.assert_array_equal, trees.fitted(by_path, like, "the file"), TREE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"b/bias": None}, "b/bias is missing there, int32[3] in the config's network"),
        ({"c": np.zeros(2, np.float32)}, "c is float32[2] there, missing in the config's network"),
        ({"a/1": np.zeros(2), "b/bias": None}, "a/1 is float64[2] there, bool[2] in the config's network"),
    ],
)
def test_the_first_leaf_that_does_not_fit_is_named(changes, message):
    leaves = {name: leaf for name, leaf in {**trees.named(TREE), **changes}.items() if leaf is not None}
    with pytest.raises(UserError) as caught:
        trees.fitted(leaves, TREE, "the file does not fit")
    assert str(caught.value) == f"the file does not fit: {message}"


def test_hashes_of_saved_files_are_unchanged():
    """Manifests of checkpoints hold digests, and folders of evaluations the fingerprint of a model."""
    assert trees.fingerprint(TREE) == "e2dcc1c6ab2e1cee59ef198b434df05b"
    assert trees.digests(TREE) == {
        "a/0": "da89fcbcbf1db346",
        "a/1": "813d854626be5f6f",
        "b/bias": "04424ae05ceee313",
        "b/kernel": "226600a28a16b74d",
    }


def test_digest_depends_on_the_values_only():
    """It is the same on any devices, and changes with any single bit, two exchanged values, or the type."""
    mesh = parallel.data_mesh()
    x = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    (digest,) = trees.digests([jnp.asarray(x)]).values()
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert trees.digests([split]) == {"0": digest}
    bits = x.copy().view(np.uint32)
    distinct = {digest}
    for bit in range(0, 32, 5):
        for index in ((0, 0), (7, 3), (15, 5)):
            changed = bits.copy()
            changed[index] ^= np.uint32(1 << bit)
            distinct |= set(trees.digests([jnp.asarray(changed.view(np.float32))]).values())
    exchanged = x.copy()
    exchanged[[0, 1]] = exchanged[[1, 0]]
    distinct |= set(
        trees.digests([jnp.asarray(exchanged), jnp.asarray(x.T), jnp.asarray(x).astype(jnp.bfloat16)]).values()
    )
    assert len(distinct) == 1 + 7 * 3 + 3
