from unittest import mock

import pytest
import tiny
from etils import epath

from navit_jax import run_folder, train
from navit_jax.data.tokenizer import Tokenizer
from navit_jax.errors import ConfigError


def test_classes_are_kept_and_others_under_the_same_numbers_are_refused(tmp_path):
    workdir = epath.Path(tmp_path)
    (workdir / "metrics.jsonl").write_text("{}\n")
    run_folder.store_class_names(workdir, ("ant", "bee", "cat"))
    run_folder.store_class_names(workdir, ("ant", "bee", "cat"))
    with pytest.raises(ConfigError, match="3 then, 3 now; 'ant' -> 'bee', 'bee' -> "):
        run_folder.store_class_names(workdir, ("bee", "cat", "zebra"))
    with pytest.raises(ConfigError, match="3 then, 4 now"):
        run_folder.store_class_names(workdir, ("ant", "bee", "cat", "dog"))
    assert run_folder.read_class_names(workdir) == ["ant", "bee", "cat"]
    (workdir / "classes.json").unlink()
    with pytest.raises(ConfigError, match=r"classes\.json is missing"):
        run_folder.read_class_names(workdir)


def test_what_a_run_is_rebuilt_from_is_never_cut(tmp_path, full_at):
    workdir = epath.Path(tmp_path)
    run_folder.store_config(workdir, {"seed": 1}, False)
    run_folder.store_class_names(workdir, ("ant", "bee"))
    full_at(5)
    for store, value in (
        (run_folder.store_config, ({"seed": 1}, False)),
        (run_folder.store_class_names, (("ant", "bee"),)),
    ):
        with pytest.raises(OSError, match="File too large"):
            store(workdir, *value)
    full_at(-1)
    assert run_folder.read_config(workdir) == {"seed": 1}
    assert run_folder.read_class_names(workdir) == ["ant", "bee"]


def test_a_vocabulary_may_move_and_its_length_may_not(tmp_path):
    workdir = epath.Path(tmp_path)
    config = {"data": {"text": {"vocabulary": "/old/mine.model", "length": 24}}}
    (workdir / "metrics.jsonl").write_text("{}\n")
    run_folder.store_config(workdir, config, False)
    assert run_folder.use_own_vocabulary(workdir, config) == config
    (workdir / "vocabulary").write_bytes(b"its bytes")
    own = {"vocabulary": str(workdir / "vocabulary"), "length": 24}
    found = run_folder.use_own_vocabulary(workdir, config)
    assert found == {"data": {"text": own}}
    assert run_folder.use_own_vocabulary(workdir, {"data": {}}) == {"data": {}}
    run_folder.store_config(workdir, found, False)
    longer = {"data": {"text": {**own, "length": 32}}}
    with pytest.raises(ConfigError, match=r"text\.length: 24 -> 32"):
        run_folder.store_config(workdir, longer, False)


def test_a_config_is_refused_for_what_may_not_change_alone(tmp_path, caplog):
    workdir = epath.Path(tmp_path)
    (workdir / "metrics.jsonl").write_text("{}\n")
    config = {"seed": 1, "evals": {"v": {"sides": [64]}}, "data": {"rows": 8}}
    run_folder.store_config(workdir, config, False)
    changed = {"seed": 2, "evals": {"v": {"sides": [32]}}, "data": {"rows": 8}}
    with pytest.raises(ConfigError) as refused:
        run_folder.store_config(workdir, changed, False)
    assert "\n  seed: 1 -> 2\n" in str(refused.value)
    assert "evals" not in str(refused.value)
    with caplog.at_level("WARNING", logger="absl"):
        run_folder.store_config(workdir, changed, True)
    assert "evals.v.sides: [64] -> [32]\n  seed: 1 -> 2" in caplog.text


def test_a_stored_config_keeps_its_order_for_what_reads_the_first_of_a_section(
    tmp_path,
):
    workdir = epath.Path(tmp_path)
    evals = {"validation": {"sides": [64]}, "padded": {"sides": [64]}}
    run_folder.store_config(workdir, {"evals": evals}, False)
    assert list(run_folder.read_config(workdir)["evals"]) == ["validation", "padded"]


@pytest.mark.parametrize("cut", [b'["ant', b'{"seed": "\xc3'])
def test_a_file_that_was_cut_is_named_with_the_remedy(tmp_path, cut):
    workdir = epath.Path(tmp_path)
    for name in ("config.json", "classes.json"):
        (workdir / name).write_bytes(cut)
    (workdir / "metrics.jsonl").write_text("{}\n")
    for read, name in (
        (lambda: run_folder.read_config(workdir), "config"),
        (lambda: run_folder.store_config(workdir, {"seed": 1}, False), "config"),
        (lambda: run_folder.read_class_names(workdir), "classes"),
        (lambda: run_folder.store_class_names(workdir, ("ant",)), "classes"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}\.json is damaged.*delete it"):
            read()


@pytest.mark.parametrize("begun", ["metrics.jsonl", "checkpoints/3/state"])
def test_a_run_that_never_began_leaves_the_folder_to_another(tmp_path, begun):
    workdir = epath.Path(tmp_path)
    words = [
        mock.Mock(spec=Tokenizer, vocabulary=mock.Mock(contents=contents))
        for contents in (b"one", b"two")
    ]
    for seed, names, tokenizer in ((1, ("ant",), words[0]), (2, ("bee",), words[1])):
        run_folder.store_config(workdir, {"seed": seed}, False)
        run_folder.store_class_names(workdir, names)
        run_folder.store_vocabulary(workdir, tokenizer)
    assert run_folder.read_config(workdir) == {"seed": 2}
    assert run_folder.read_class_names(workdir) == ["bee"]
    assert (workdir / "vocabulary").read_bytes() == b"two"
    # What a start that failed in compiling leaves, and one that was killed in saving.
    (workdir / "metrics.jsonl").write_text("")
    (workdir / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir(parents=True)
    for seed in (1, 2):
        run_folder.store_config(workdir, {"seed": seed}, False)
    (workdir / begun).parent.mkdir(parents=True, exist_ok=True)
    (workdir / begun).write_text("{}\n")
    with pytest.raises(ConfigError, match="seed: 2 -> 3"):
        run_folder.store_config(workdir, {"seed": 3}, False)
    with pytest.raises(ConfigError, match="1 then, 1 now"):
        run_folder.store_class_names(workdir, ("ant",))
    with pytest.raises(ConfigError, match="with which the run has begun"):
        run_folder.store_vocabulary(workdir, words[0])


def test_a_folder_that_another_host_tries_at_the_same_time_can_be_written(
    tmp_path, monkeypatch
):
    """A host of the same process number has removed the file that both wrote."""
    workdir = epath.Path(tmp_path / "run")
    write = type(workdir).write_text

    def write_and_lose(path, text, *others, **named):
        write(path, text, *others, **named)
        path.unlink()

    monkeypatch.setattr(type(workdir), "write_text", write_and_lose)
    run_folder.check_writable(workdir, "--workdir")
    assert not list(workdir.iterdir())


def test_a_start_that_failed_does_not_bind_the_folder_to_its_config(tmp_path):
    with pytest.raises(Exception, match="float33"):
        train.train(tiny.config(model__dtype="float33"), tmp_path)
    assert (tmp_path / "checkpoints").is_dir()
    run_folder.store_config(epath.Path(tmp_path), tiny.config(), False)
