"""Which process of how many this one is, as flags, environment and clusters say it."""

import os
import re

import pytest

from navit_jax import joining
from navit_jax.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "8195",
    "SLURM_STEP_NODELIST": "node[03-05],other1",
    "SLURM_NTASKS": "12",
    "SLURM_PROCID": "7",
    "SLURM_LOCALID": "3",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """Nothing of a cluster in the environment."""
    for name in list(os.environ):
        if joining.TELLING.match(name):
            monkeypatch.delenv(name)


def enter(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_where_nothing_says_so_there_is_one_process():
    assert joining.find() is None


def test_flags_come_before_the_environment_and_that_before_a_cluster(monkeypatch):
    enter(monkeypatch, SLURM)
    own = {"COORDINATOR_ADDRESS": "here:1", "NUM_PROCESSES": "3", "PROCESS_ID": "2"}
    enter(monkeypatch, {f"JAX_{name}": value for name, value in own.items()})
    assert joining.find() == ("here:1", 3, 2, None, "flags")
    given = ("there:2", None, "0")
    assert joining.find(given) == ("there:2", 3, 0, None, "flags")


def test_a_slurm_step_gives_each_process_its_own_device(monkeypatch):
    enter(monkeypatch, SLURM)
    # As JAX has it: the port is 61440 + job mod 4096.
    assert joining.find() == ("node03:61443", 12, 7, (3,), "slurm")
    assert joining.find(port=8476)[0] == "node03:8476"
    assert joining.find(devices=["all"]).devices is None
    assert joining.find(devices=["0", "2"]).devices == (0, 2)
    assert joining.find(cluster="none") is None
    # A step of one task has the node.
    enter(monkeypatch, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert joining.find().devices is None


def test_a_batch_script_without_srun_is_no_step(monkeypatch):
    enter(monkeypatch, {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"})
    assert joining.find() is None
    with pytest.raises(ConfigError, match=r"slurm: not there; .*SLURM_JOB_ID=8195"):
        joining.find(cluster="slurm")


def test_open_mpi_is_found(monkeypatch):
    enter(monkeypatch, OMPI)
    port = 61440 + 1531576320 // 4096 % 4096
    assert joining.find() == (f"10.96.0.1:{port}", 4, 2, (0,), "ompi")


@pytest.mark.parametrize("slices", [1, 3])
def test_a_gke_pod_slice_is_found_and_keeps_all_its_devices(slices, monkeypatch):
    own = {"TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "1"}
    several = {
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
    }
    # Else JAX asks the metadata server for them.
    enter(monkeypatch, own | (several if slices > 1 else dict.fromkeys(several, "")))
    known = joining.clusters.cloud_tpu_cluster
    monkeypatch.setattr(known, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(known.GceTpuCluster, "is_env_present", lambda: False)
    process_id = 1 if slices == 1 else 2 * 4 + 1
    place = ("localhost:8482", 4 * slices, process_id, None, "gketpu")
    assert joining.find() == place
    assert joining.find(port=8476)[0] == "localhost:8476"


@pytest.mark.parametrize(
    "given, match",
    [
        (("here:1", None, None), r"--num_processes \(or JAX_NUM_PROCESSES\)"),
        (("here", "2", "0"), "--coordinator=here: give HOST:PORT"),
        ((":80", "2", "0"), "--coordinator=:80: give HOST:PORT"),
        (("here:1", "2", "2"), "--process_id=2: there are 2 processes"),
        (("here:1", "two", "0"), "--num_processes=two: give a whole number"),
        (("here:1", "0", "0"), "there are 0 processes"),
    ],
)
def test_what_can_not_be_is_refused(given, match):
    with pytest.raises(ConfigError, match=match):
        joining.find(given)


def test_an_unknown_cluster_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"--cluster=lsf: give auto, none, .*slurm"):
        joining.find(cluster="lsf")


def test_a_cluster_that_can_not_be_read_is_named_with_the_remedy(monkeypatch):
    enter(monkeypatch, SLURM | {"SLURM_NTASKS": "many"})
    with pytest.raises(
        ConfigError, match=r"slurm can not be read.*give all of"
    ) as told:
        joining.find()
    assert re.search(r"SLURM_NTASKS=many", str(told.value))
