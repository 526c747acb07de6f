"""What full-size configs take on TPU pods, compiled for them on this machine.

`python benchmarks/pods.py > docs/pods.md` writes the page; it takes the extra `tpu`.
Sets that are not here are stood in for by drawings: memory and what is sent do not
depend on them; padding and images a row do.
"""

import os

# libtpu ends a process with flags of another backend.
os.environ.update(XLA_FLAGS="", JAX_PLATFORMS="cpu")

import pathlib
import sys

from absl import app, flags
from ml_collections.config_flags import config_flags

from navit_jax import config as config_lib
from navit_jax import experiment, plan, pods
from navit_jax.errors import ConfigError
from navit_jax.topology import open_topology

ONLY = flags.DEFINE_string("only", "", "Of the configs, those with this in the name")
TOPOLOGIES = flags.DEFINE_list("on", ["v5e:16x16", "v6e:8x8"], "Topologies")
ROOT = pathlib.Path(__file__).parent.parent
# A config, its argument, classes of its own sources.
CONFIGS = (
    ("navit_classification", "", 1000),
    ("navit_classification", "variant=L/16", 1000),
    ("navit_contrastive", "", 0),
    ("sparseformer_imagenet", "", 1000),
    ("sparseformer_bootstrap", "", 1000),
    ("segmentation_ade20k", "", 150),
)
HEADER = (
    "config", "on", "mesh", "rows x tokens", "GiB a chip", "FLOPs a step", "sent, MiB",
    "products s", "compiler s", "network s", "images/s", "MFU", "days",
)  # fmt: skip


def load(name: str, argument: str):
    """A config of the folder, resolved, on drawings."""
    parser = config_flags.ConfigFileFlagParser(name="config", lock_config=False)
    path = f"{ROOT / 'configs' / name}.py"
    config = parser.parse(f"{path}:{argument}" if argument else path)
    resolved = config_lib.resolve(config)
    experiment.check_sections(resolved)
    return pods.stand_in(resolved)


def main(_):
    """Prints the page."""
    print(TITLE)
    print(f"| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
    for name, argument, classes in CONFIGS:
        if ONLY.value not in name:
            continue
        for text in TOPOLOGIES.value:
            called = f"{name}:{argument}" if argument else name
            print(f"{called} on {text}", file=sys.stderr)
            config = load(name, argument)
            stream = experiment.build_stream(config)
            try:
                num = classes or stream.num_classes
                found = plan.plan_on(config, stream, open_topology(text), num)
            except ConfigError as error:
                print(f"| {called} | {text} | {str(error).replace(chr(10), '; ')} |")
                continue
            print(f"| {called} | {' | '.join(show(found))} |", flush=True)


def show(found):
    """The cells of a row."""
    seconds, mesh = found["seconds"], found["mesh"]
    memory = found["memory"]
    return [
        found["topology"],
        " x ".join(map(str, mesh.values())),
        f"{found['rows']:,} x {found['tokens']}",
        f"{memory['total'] / 2**30:.2f} of {memory['device'] / 2**30:.0f}",
        f"{found['flops']:.2e}",
        f"{sum(each['bytes'] for each in found['sent'].values()) / 2**20:,.0f}",
        f"{seconds['products at the peak']:.3f}",
        f"{seconds['compiler']:.3f}",
        f"{seconds['network']:.3f}",
        f"{found['images_per_second']:,.0f}",
        f"{found['mfu']:.1%}",
        f"{found['days']:.2f}",
    ]


TITLE = """# What full-size configs take on pods

Written by `python benchmarks/pods.py > docs/pods.md` (extra `tpu`): the training step of each config, compiled for the topology on a CPU. Memory and what is sent are the compiler's; **times are estimates**, nobody ran them: "products" are this package's FLOPs at the chip's peak, "compiler" the cycles that the TPU's compiler expects of its own operations (with attention's kernels at the peak), "network" all collectives one after the other over one axis of the torus; images/s, MFU and days are of the slower of the first two plus the third. Constants: `navit_jax/topology.py`. Sets are stood in for by the embedded drawings, so images a row are not those of the real ones.
"""  # noqa: E501

if __name__ == "__main__":
    app.run(main)
