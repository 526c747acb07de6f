import jax
import jax.numpy as jnp

from navit_jax import paths


def test_the_table_of_parameters_counts_in_whole_numbers():
    shapes = {"kernel": (2000, 3), "scale": (), "half": (5,)}
    dtypes = {"half": jnp.bfloat16}
    tree = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32))
        for name, shape in shapes.items()
    }
    *lines, last = paths.tabulate(tree).splitlines()
    assert last == "Total: 6,006 -- 24,014 bytes"
    for name, shape in shapes.items():
        (line,) = [line for line in lines if f"| {name} " in line]
        assert str(shape) in line
