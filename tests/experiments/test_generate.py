import dataclasses

import pytest

from experiments.generate import main
from tests.training.runs import small_run
from zeco_jax.training import Checkpoints, compile_program, identity, make_mesh


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output directory of a run that was saved after no step at all, which is enough to sample from."""
    config = small_run(tmp_path_factory.mktemp("generate"))
    program = compile_program(config, make_mesh(config.mesh))
    with Checkpoints(config.output, config.checkpoint, identity(config, 0), dataclasses.asdict(program.model)) as saved:
        saved.save(program.create(), {})
    return config.output


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/0"])
def test_the_prompt_is_continued(output, capsys, place):
    assert main([str(output / place), "--prompt", "line ", "--steps", "8", "--top-k", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("line ")
    assert len(printed) > len("line \n")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param(("--prompt", ""), "prompt", id="empty-prompt"),
        pytest.param(("--temperature", "-1"), "temperature", id="negative-temperature"),
        pytest.param(("--top-k", "0"), "top_k", id="top-k-of-none"),
    ],
)
def test_a_mistake_is_named(output, capsys, options, named):
    assert main([str(output), *options]) == 2
    assert named in capsys.readouterr().err


def test_a_directory_without_checkpoint_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_the_seed_decides(output, capsys):
    def text(seed):
        main([str(output), "--steps", "8", "--seed", seed, "--temperature", "1"])
        return capsys.readouterr().out

    assert text("1") == text("1")
    assert text("1") != text("2")
