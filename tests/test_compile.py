import chex
import jax
import tiny

from navit_jax import compile, experiment, initialise, paths, sharding


def test_parameters_of_another_run_begin_the_running_mean_too(monkeypatch):
    loaded = []

    def from_run(params, *, workdir):
        loaded.append(jax.tree.map(lambda x: x + 1, params))
        return loaded[0]

    monkeypatch.setattr(initialise, "from_run", from_run)
    config = tiny.config(train__ema=0.9, model__init={"workdir": "another"})
    stream, mesh = experiment.build_stream(config), sharding.make_mesh()
    with jax.set_mesh(mesh):
        task = experiment.build_task(config, stream.num_classes)
        program = compile.Program(config, task, stream.example(), mesh)
        state = program.first_state()
    chex.assert_trees_all_equal(state.params, loaded[0])
    chex.assert_trees_all_equal(state.ema, loaded[0])
    # The first step donates both: no buffer may be shared.
    shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards]
    assert len({s.data.unsafe_buffer_pointer() for s in shards}) == len(shards)


def test_a_seed_may_be_any_that_a_key_may():
    config = tiny.config(seed=3_000_000_000)
    stream = experiment.build_stream(config)
    task = experiment.build_task(config, stream.num_classes)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = compile.Program(config, task, stream.example(), mesh)
    assert program.abstract.params


def test_the_running_mean_has_no_copy_of_what_is_frozen():
    frozen = (("encoder/blocks/mlp/.*", True), ("encoder/blocks/.*", "1:"))
    config = tiny.config(train__ema=0.9, optim__freeze=frozen)
    stream, mesh = experiment.build_stream(config), sharding.make_mesh()
    task = experiment.build_task(config, stream.num_classes)
    state = compile.Program(config, task, stream.example(), mesh).abstract
    params, means = (
        {n: (x.shape, x.sharding) for n, x in paths.flatten(part).items()}
        for part in (state.params, state.ema)
    )
    still = {name for name in params if name.startswith("encoder/blocks/mlp/")}
    assert still
    assert means == {n: leaf for n, leaf in params.items() if n not in still}


def test_the_first_call_of_the_step_says_that_it_compiles_and_how_long(caplog):
    caplog.set_level("INFO", "absl")
    step = compile.tell(lambda x: x + len(caplog.messages))
    # It is said before: so far there is one line.
    assert (step(1), caplog.messages) == (
        2, ["compiling the training step", "compiled in 0 s"]
    )  # fmt: skip
    assert step(1) == 3
    assert len(caplog.messages) == 2
