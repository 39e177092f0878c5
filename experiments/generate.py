"""Continues a text with a trained model: `python -m experiments.generate runs/tiny --prompt "def main("`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from zeco_jax.training import continue_text, load_model


@dataclass(frozen=True)
class GenerateConfig:
    """What to sample.

    Attributes:
        checkpoint: Output directory of a training run, or one checkpoint in it.
        prompt: Text to continue.
        steps: Bytes to sample.
        temperature: 0 takes the likeliest byte; larger is more varied.
        top_k: Sample among so many of the likeliest bytes only. None: among all.
        seed: Seed of the sampling.
    """

    checkpoint: tyro.conf.Positional[Path]
    prompt: str = "def "
    steps: int = 300
    temperature: float = 0.7
    top_k: int | None = None
    seed: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the prompt and its continuation.

    Args:
        arguments: Command line without the program's name. None: that of this process.

    Returns:
        Exit status: 0, or 2 if the text cannot be made as asked.
    """
    config = tyro.cli(GenerateConfig, prog="python -m experiments.generate", description=__doc__, args=arguments)
    try:
        text = continue_text(
            load_model(config.checkpoint),
            config.prompt,
            length=config.steps,
            key=jax.random.key(config.seed),
            temperature=config.temperature,
            top_k=config.top_k,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(config.prompt + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
