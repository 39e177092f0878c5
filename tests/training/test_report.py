import dataclasses

import jax
import pytest
from flax import nnx

from zeco_jax.models import LinearAttentionLM, ModelConfig
from zeco_jax.training import MetricsFile, Summary, continue_text, draw_loss_curve


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocabulary_size=256, hidden_size=16, num_layers=1, num_heads=2)
    return LinearAttentionLM(config, rngs=nnx.Rngs(0))


def test_the_curve_is_drawn_from_the_files(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", 0) as metrics:
        for step in range(1, 41):
            metrics.write({"step": step, "loss": 5.0 / step})
    with MetricsFile(tmp_path / "validation.jsonl", 0) as metrics:
        metrics.write({"step": 40, "bits_per_byte": 1.0})
    assert draw_loss_curve(tmp_path).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def summary():
    return Summary(
        steps=3,
        parameters=10,
        devices="1 x 8",
        platform="cpu",
        tokens=30,
        training_seconds=1.5,
        tokens_per_second=20.0,
        model_flops_utilization=0.4123,
        training_bits_per_byte=2.0,
        validation_bits_per_byte=2.5,
        sample="def f",
    )


def test_a_summary_comes_back_as_it_was(tmp_path, summary):
    assert Summary.read(tmp_path) is None
    summary.write(tmp_path)
    assert Summary.read(tmp_path) == summary


@pytest.mark.parametrize(("share", "shown"), [(0.4123, ["41.2 %"]), (None, [])])
def test_the_table_shows_the_utilisation_where_the_peak_is_known(summary, share, shown):
    table = dataclasses.replace(summary, model_flops_utilization=share).table()
    figures = dict(zip(*(column.cells for column in table.columns), strict=True))
    assert [value for name, value in figures.items() if name == "model FLOPs utilisation"] == shown


def test_a_continuation_is_repeatable(model):
    def continuation(seed, temperature):
        return continue_text(model, "ab", length=12, key=jax.random.key(seed), temperature=temperature)

    assert continuation(0, 1.0) == continuation(0, 1.0)
    assert continuation(0, 0.0) == continuation(1, 0.0)


def test_nothing_to_continue_is_refused(model):
    with pytest.raises(ValueError, match="prompt"):
        continue_text(model, "", length=3, key=jax.random.key(0), temperature=1.0)


def test_a_continuation_may_be_empty(model):
    assert continue_text(model, "ab", length=0, key=jax.random.key(0), temperature=1.0) == ""
