"""Models over the states of a frozen encoder, from statistics and training to samples and bounds."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from small import ADAMW, ENCODERS, encoder_config, encoder_corpus, parts, shaken, small_corpus

import sedd
from sedd import config as configs
from sedd.codecs.decoder import CORRUPTIONS
from sedd.codecs.frozen import Statistics
from sedd.data.batches import Batch, batch
from sedd.diffusion import keyed_random
from sedd.training.encoder import read_for
from sedd.training.fit import fit
from sedd.training.objectives import make_objective
from sedd.training.optimizer import make_optimizer
from sedd.training.step import make_step

STATE = 8  # coordinates of the small encoders


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return encoder_corpus(tmp_path_factory.mktemp("encoder"))


def config_of(corpus, *settings, **encoder):
    """A network of one layer, which compiles in half of the time."""
    return encoder_config(corpus, "network.layers=1", *settings, **encoder)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """The folder of a run of six steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    fit(config_of(corpus, "training.ema_decay=0.9"), folder)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return sedd.load(run)


def train_rows(corpus, length=16, count=64):
    return batch(corpus, length, count, 0, 0).tokens


def latents(model, tokens):
    return np.asarray(jax.jit(model.network.clean)(model.all_params, tokens))


def test_ordinary_tokens_have_unit_variance(corpus, model):
    """Over the corpus, whose statistics it keeps. The first end of text has norm sqrt(D), the padding after it is 0."""
    tokens = train_rows(corpus, count=80)
    z0, end = latents(model, tokens), corpus.tokenizer.end_of_text
    ordinary, ends = tokens != end, np.cumsum(tokens == end, axis=1)
    np.testing.assert_allclose(z0[ordinary].mean(0), 0, atol=0.15)
    np.testing.assert_allclose(z0[ordinary].std(0), 1, atol=0.1)
    np.testing.assert_allclose(np.sum(z0[ends == 1] ** 2, axis=-1), STATE, rtol=1e-5)
    assert np.any(ends > 1) and np.all(z0[ends > 1] == 0)
    assert [file.name for file in corpus.path.glob("encoder-*.npz")] == [f"encoder-{model.config.codec.digest}-16.npz"]


def test_latents_do_not_depend_on_padding(corpus, model):
    """Those of a text in a longer block, or before others than its valid tokens, are the same. Control: those after
    another token are not."""
    tokens, end = train_rows(corpus, count=8), corpus.tokenizer.end_of_text
    longer = np.pad(tokens, ((0, 0), (0, 9)), constant_values=end)
    np.testing.assert_allclose(latents(model, longer)[:, :16], latents(model, tokens), atol=1e-5)
    clean = jax.jit(model.network.clean)
    short = clean(model.all_params, np.where(np.arange(16) < 3, tokens, 7), np.full(8, 3))
    np.testing.assert_allclose(short[:, :3], clean(model.all_params, tokens[:, :3]), atol=1e-5)
    assert np.all(short[:, 3:] == 0)
    changed = tokens.copy()
    changed[:, 0] = np.where(tokens[:, 0] == 21, 22, 21)
    assert np.abs(latents(model, changed) - latents(model, tokens))[:, 1].max() > 0.1


def test_static_latents_are_those_of_the_token_alone(corpus, model):
    """The published ablation. Control: the states of an encoder differ by context."""
    tokens = train_rows(corpus)
    for static in (True, False):
        codec = dataclasses.replace(model.network.codec, static=static)
        states, *_ = jax.jit(codec.states)(model.all_params["codec"], tokens)
        assert (np.ptp(states[tokens == 5], axis=0).max() < 1e-5) == static


def test_coordinates_without_variance_are_zero():
    """They are never divided by. Components are uncorrelated, of unit variance, those of most variance first."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(5000, 3)) @ rng.normal(size=(3, 6)) * 10.0 ** np.arange(-3, 3)
    states[:, 4] = 7.0
    statistics = Statistics(states.mean(0), np.cov(states.T, bias=True) - 1e-18 * np.eye(6))
    centred = states - statistics.mean
    whole = centred @ statistics.basis(6)
    assert np.all(whole[:, 4] == 0)
    np.testing.assert_allclose(whole.std(0)[[0, 1, 2, 3, 5]], 1, rtol=1e-5)
    np.testing.assert_allclose(np.cov((centred @ statistics.basis(3)).T, bias=True), np.eye(3), atol=1e-4)
    assert np.all((centred @ statistics.basis(4))[:, 3] == 0)  # of rank three


def objective_of(corpus, *settings):
    config = config_of(corpus, *settings)
    read_for(config := configs.validate(config), corpus)
    _, schedule, network = configs.build(config, corpus.vocab_size)
    return make_objective(config, network, schedule)


def losses_of(objective, model, tokens, rows, step=0):
    trained = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf + 0.05, model.params))
    return jax.jit(objective)(trained.all_params, Batch(tokens[rows], None), jnp.arange(8)[rows], jax.random.key(step))


@pytest.mark.slow
def test_losses_of_a_row_are_the_same_in_any_microbatch(corpus, model):
    """Those of the network and of the decoder, with and without memory."""
    objective, tokens = objective_of(corpus), train_rows(corpus, count=8)
    for step in (0, 1, 2):
        whole = losses_of(objective, model, tokens, slice(None), step)
        parts = [losses_of(objective, model, tokens, slice(start, start + 4), step) for start in (0, 4)]
        assert whole.terms.keys() == {"squares", "decoder"} and np.all(whole.count == 16)
        np.testing.assert_allclose(np.concatenate([part.loss for part in parts]), whole.loss, rtol=2e-4)


@pytest.mark.slow
def test_the_parts_of_the_loss_have_no_parameter_in_common(corpus, model):
    """Control: with both each part has a gradient."""
    tokens, trained = train_rows(corpus, count=8), jax.tree.map(lambda leaf: leaf + 0.05, model.params)

    def gradient(kind):
        """Which of the parts have one."""
        objective = objective_of(corpus, f"training.loss={kind}")

        def total(params):
            both = dataclasses.replace(model, params=params).all_params
            return jnp.sum(objective(both, Batch(tokens, None), jnp.arange(8), jax.random.key(1)).loss)

        found = jax.jit(jax.grad(total))(trained)
        return {part for part in found if any(np.any(leaf) for leaf in jax.tree.leaves(found[part]))}

    assert gradient("denoising") == {"trunk", "head"} and gradient("decoder") == {"codec"}
    assert gradient("regression") == {"trunk", "head", "codec"}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_decoder_is_trained_on_corrupted_latents(model, name):
    process, schedule = model.process, model.schedule
    keys = keyed_random.row_keys(jax.random.key(0), jnp.arange(500))
    z = CORRUPTIONS[name](process, schedule, keys, jnp.full((500, 4, STATE), 2.0), jnp.full(500, 0.1))
    alpha = float(schedule.alpha(0.1))
    mean, variance = {"noise": (2 * alpha**0.5, 1 - alpha), "additive": (2.0, 0.04), "none": (2.0, 0.0)}[name]
    np.testing.assert_allclose((z.mean(), z.var()), (mean, variance), atol=0.03)


def test_the_decoder_is_clipped_by_itself():
    """A large gradient of one does not shrink the update of the other. Control: within each it does."""
    group = configs.default().optimizer
    group.update(name="adamw", learning_rate=1.0, warmup_steps=1, clip_norm=1.0, decay="constant")
    group.b1 = group.b2 = 0.0
    params = {
        "codec": {"decoder": {"out": {"kernel": jnp.ones(2)}}},
        "trunk": {"a": jnp.ones(2), "b": jnp.ones(2)},
    }
    clip = make_optimizer(group, 10)

    def clipped(scale):
        gradient = jax.tree.map(jnp.copy, params)
        gradient["codec"]["decoder"]["out"]["kernel"] *= scale
        chain = optax.chain(clip, optax.identity())
        state = chain.init(params)
        # The clipping alone: AdamW without memory divides by the size of the gradient, so look at its second moment.
        _, state = chain.update(gradient, state, params)
        moment = next(
            leaf for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: hasattr(leaf, "nu")) if hasattr(leaf, "nu")
        )
        return jax.tree.map(lambda leaf: float(jnp.sum(leaf)), moment.nu)

    small, large = clipped(1.0), clipped(100.0)
    assert small["trunk"] == large["trunk"] and small["trunk"]["a"] == pytest.approx(0.5)
    assert large["codec"]["decoder"]["out"]["kernel"] == pytest.approx(1.0)


def test_a_run_keeps_no_weights_of_its_encoder(run, model, tmp_path):
    """Neither its checkpoints nor an export; both keep how states are normalised, and the digest."""
    manifest = next((run / "checkpoints").glob("*/manifest/metadata"))
    model.save(tmp_path / "export")
    for names in (
        json.loads(manifest.read_text())["arrays"],
        load_file(tmp_path / "export/weights.safetensors"),
    ):
        assert not [name for name in names if "encoder" in name] and any("codec/decoder/" in name for name in names)
    config = json.loads((run / "config.json").read_text())["config"]["codec"]
    assert config["encoder"] == str(ENCODERS / "bert") and len(config["digest"]) == 16 and config["width"] == STATE
    loaded = sedd.load(tmp_path / "export")
    np.testing.assert_array_equal(loaded.frozen["codec"]["basis"], model.frozen["codec"]["basis"])
    assert np.array_equal(loaded.sample(4, steps=3).tokens, model.sample(4, steps=3).tokens)


@pytest.mark.slow
def test_samples_do_not_depend_on_batches(model):
    model = shaken(model)
    out = model.sample(6, steps=4, trace=True)
    assert out.tokens.shape == (6, 16) and out.network_calls == 4 and np.array_equal(out.trace[-1], out.tokens)
    assert np.array_equal(model.sample(6, steps=4, batch_size=4).tokens, out.tokens)
    assert not np.array_equal(model.sample(6, steps=4, sampler="euler").tokens, out.tokens)


@pytest.mark.slow
def test_the_bound_has_three_terms_and_starts_where_it_is_asked_to(corpus, model):
    """In any batches. At more noise the tokens cost more and the latents less."""
    settings = dict(split="validation", draws=4, progress=False)
    report = model.perplexity(corpus, **settings)
    assert report.nats_per_token == pytest.approx(report.prior + report.diffusion + report.reconstruction)
    again = model.perplexity(corpus, batch_size=8, **settings)
    assert again.nats_per_token == pytest.approx(report.nats_per_token, rel=1e-5)
    less, more = (model.perplexity(corpus, low=low, **settings) for low in (0.01, 3.0))
    assert less.diffusion > report.diffusion > more.diffusion and "to 3," in more.likelihood_of
    for low in (0.0, 18.0):
        with pytest.raises(sedd.UserError, match="low must be a sigma from 0.001 to below"):
            model.perplexity(corpus, low=low, **settings)


@pytest.mark.slow
def test_a_decoder_of_an_earlier_run_is_taken_over(corpus, tmp_path):
    """Trained alone, then kept by a run of the network alone."""
    sedd.train(config_of(corpus, "training.loss=decoder"), tmp_path / "decoder")
    config = config_of(corpus, "training.loss=denoising", "training.steps=2", "optimizer.weight_decay=0.1")
    after = sedd.train(config, tmp_path / "run", init_from=tmp_path / "decoder").params
    before = sedd.load(tmp_path / "decoder").params
    jax.tree.map(np.testing.assert_array_equal, after["codec"], before["codec"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), after["trunk"], before["trunk"])
    assert any(jax.tree.leaves(changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("codec.decoder=mlp", "network.long_skips=true", "network.estimate_layers=true", "codec.width=5"),
        ("network.prediction=v", "network.self_conditioning=false", "codec.corruption=additive", "schedule.name=sqrt"),
        ("optimizer.name=muon", "optimizer.learning_rate=0.02", "network.estimate_layers=true"),
    ],
    ids=str,
)
def test_every_setting_trains(corpus, tmp_path, settings):
    """Both losses fall, on the same noise; the model samples and scores."""
    settings = ("network.layers=2", *settings, "training.steps=60", "optimizer.decay=constant")
    settings = (*settings, "evaluation.every=60", "evaluation.draws=2")
    model = sedd.train(config_of(corpus, *settings), tmp_path / "run")
    objective, tokens = make_objective(model.config, model.network, model.schedule), train_rows(corpus, count=8)
    losses = jax.jit(lambda params, key: objective(params, Batch(tokens, None), jnp.arange(8), key).terms)
    start = dataclasses.replace(model, params=jax.jit(model.network.init)(keyed_random.root_key(0)))
    keys = [jax.random.key(number) for number in range(8)]
    before, after = ([losses(one.all_params, key) for key in keys] for one in (start, model))
    for name, share in {"squares": 0.97, "decoder": 0.8}.items():
        first, last = (np.mean([terms[name] for terms in all_terms]) for all_terms in (before, after))
        assert last < share * first, (name, first, last)
    assert np.isfinite(
        json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])["validation_nats_per_token"]
    )
    assert model.sample(2, steps=2).tokens.shape == (2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "t5"])
def test_other_encoders_train_too(tmp_path, name):
    corpus = encoder_corpus(tmp_path, name)
    model = sedd.train(config_of(corpus, "training.steps=2", name=name), tmp_path / "run")
    assert ("start" in model.frozen["codec"]) == (name == "roberta")
    assert model.sample(2, steps=2).tokens.shape == (2, 16)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(corpus, tmp_path):
    """With memory and its decoder; stopped after three of six steps, where the corpus has lost its statistics."""
    settings = ("checkpoint.every=3", "optimizer.decay=constant")
    fit(config_of(corpus, *settings), tmp_path / "whole")
    fit(config_of(corpus, *settings, "training.steps=3"), tmp_path / "parts")
    for file in corpus.path.glob("encoder-*.npz"):
        file.unlink()
    fit(config_of(corpus, *settings), tmp_path / "parts")
    whole, parts = (sedd.load(tmp_path / name).params for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert not list(corpus.path.glob("encoder-*.npz"))


def test_another_encoder_is_refused(corpus, run, model, tmp_path):
    """A run does not resume with it, and a model does not load; one that moved is found where it is said to be."""
    other = tmp_path / "bert"
    shutil.copytree(ENCODERS / "bert", other)
    moved = config_of(corpus, f"codec.encoder={other}", *ADAMW, "training.ema_decay=0.9")
    fit(moved, run)  # the same files elsewhere
    assert np.array_equal(sedd.load(run).sample(2, steps=2).tokens, model.sample(2, steps=2).tokens)
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.endswith("word_embeddings.weight"))
    save_file({**tensors, name: tensors[name] + 1e-3}, other / "model.safetensors")
    with pytest.raises(sedd.UserError, match="codec.digest"):
        fit(moved, run)
    with pytest.raises(sedd.UserError, match="the model needs .* a file was changed; restore it"):
        sedd.load(run)
    shutil.rmtree(other)
    with pytest.raises(
        sedd.UserError, match=r"needs the encoder .*there is no folder .*--encoder=FOLDER beside --model"
    ):
        sedd.load(run)
    loaded = sedd.load(run, encoder=str(ENCODERS / "bert"))
    assert np.array_equal(loaded.sample(2, steps=2).tokens, model.sample(2, steps=2).tokens)


def test_invalid_use_is_one_line(corpus, model, tmp_path):
    characters = small_corpus(tmp_path)
    digest = config_of(corpus, f"codec.digest={'a' * 16}")
    (tmp_path / "roberta").mkdir()
    for call, message in (
        (lambda: fit(config_of(characters), tmp_path / "run"), "prepare it with the encoder's tokenizer.json"),
        (
            lambda: fit(config_of(corpus, name="roberta"), tmp_path / "run"),
            "lacks .* tokens of the corpus, such as",
        ),
        (lambda: fit(config_of(corpus, "data.block_length=512"), tmp_path / "run"), "choose at most 511"),
        (lambda: fit(config_of(corpus, "codec.width=9"), tmp_path / "run"), "more than the encoder's 8"),
        (lambda: fit(config_of(corpus, "training.loss=denoising"), tmp_path / "run"), "give that as --init_from"),
        (lambda: fit(digest, tmp_path / "run"), "the model needs aaaaaaaaaaaaaaaa"),
        (lambda: model.infill("the <blank:2> cat"), "cannot fill in text"),
        (lambda: model.denoiser(*[np.ones((1, 16), int)] * 2), "leave out tokens and given"),
        (lambda: model.sample(1, length=12, round_below=1.0), "trained with network.self_conditioning"),
        (lambda: model.sample(1, steps=2, temperature=0.5), "no temperature or top_p"),
        (lambda: model.log_likelihood("cat", given="the "), "this model has no likelihood given a context"),
        (lambda: sedd.load(ENCODERS / "nothing", encoder="x"), "there is no folder"),
    ):
        with pytest.raises(sedd.UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_training_is_the_same_on_any_number_of_devices(corpus, model):
    """Two updates on one device and on eight."""
    config, tokens = configs.validate(config_of(corpus)), train_rows(corpus, count=8)
    read_for(config, corpus)
    frozen, ends = jax.device_get(model.frozen), []
    for devices in (1, 8):
        objective, optimizer, mesh = parts(config, corpus, devices)
        init, step, _ = make_step(config, objective, optimizer, mesh)
        state, metrics = init(), []
        for _ in range(2):
            state, metric = step(state, Batch(tokens, None), frozen)
            metrics.append([float(metric["loss"]), float(metric["gradient_norm"])])
        ends.append((metrics, jax.device_get(state.params)))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ends[0][1], ends[1][1])
