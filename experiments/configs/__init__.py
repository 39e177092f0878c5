"""Ready-made runs for `python -m experiments.train --config NAME`; every value can be changed on the command line."""

from experiments.configs.run import RunConfig
from experiments.configs.runs import named_run, run_names

__all__ = ["RunConfig", "named_run", "run_names"]
