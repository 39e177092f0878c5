"""Trains a language model: `python -m experiments.train`, or `--help` for everything that can be changed.

    python -m experiments.train                                   the tiny model over 8 virtual CPU devices
    python -m experiments.train --data DIRECTORY --steps 1000     on your own text
    python -m experiments.train --config 340m-gpu                 340m parameters in bfloat16 on one GPU
    python -m experiments.train --config 1b-gpu                   1b parameters on one GPU of 80 GB
    python -m experiments.train --chunk-tokens 256                with the memory of one chunk: SeCO
    python -m experiments.train --chunk-tokens 64 --backprop-chunks 4    backward through 4 drawn chunks: SpaCO

The same command again goes on where the last one was stopped. Several processes (one per host, say) each get the same
command and --coordinator HOST:PORT --num-processes N --process-id I; all must see the output directory.
"""

import argparse
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.markup import escape

from experiments.configs import RunConfig, named_run, run_names
from zeco_jax.training import prepare_devices, train


def parse(arguments: Sequence[str]) -> RunConfig:
    """Reads the command line: a ready-made run, and changes to it.

    Args:
        arguments: Without the program's name.

    Returns:
        The run.

    Raises:
        SystemExit: The arguments are wrong, or help was asked for.
        ValueError: A value is impossible.
    """
    names = run_names()
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--config", choices=names, default=names[0])
    chosen, rest = chooser.parse_known_args(arguments)
    description = f"{__doc__}\n--config {{{','.join(names)}}} chooses the defaults below (now: {chosen.config})."
    return tyro.cli(
        RunConfig,
        prog="python -m experiments.train",
        description=description,
        default=named_run(chosen.config),
        args=rest,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, and prints the summary.

    Args:
        arguments: Command line without the program's name. None: that of this process.

    Returns:
        Exit status: 0; 2 if the run cannot be done as asked; 130 if it was stopped from the keyboard.
    """
    console = Console()
    try:
        run = parse(sys.argv[1:] if arguments is None else arguments)
        prepare_devices(run.devices)
        summary = train(run.training, console=console)
    except (ValueError, FloatingPointError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on after the last checkpoint", file=sys.stderr)
        return 130
    if summary is not None:
        console.print(summary.table())
        console.print(f"sample: [dim]{escape(summary.sample)}[/dim]")
        console.print(f"checkpoints, metrics and loss.png are in {run.training.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
