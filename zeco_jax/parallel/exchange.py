"""All-Scan as the exchange of linear attention: this is ZeCO (arXiv 2507.01004, section 3)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zeco_jax.attention import Summary
from zeco_jax.collectives import AllScanOptions, all_scan, axis_index, take_turns


@dataclass(frozen=True)
class AllScanExchange:
    """Brings the entering state by an All-Scan, and its cotangent by a reverse one with the same decays.

    Attributes:
        options: where the All-Scan runs and how. With the schedule "serial", ranks work one after the other (LASP-1,
            arXiv 2404.02882): each receives the state before its own work and sends it after.
    """

    options: AllScanOptions

    @property
    def takes_turns(self) -> bool:
        """Whether ranks work one after the other."""
        return self.options.schedule == "serial"

    def take_turns[Results](
        self, work: Callable[[jax.Array], tuple[Results, jax.Array]], first: jax.Array, *, reverse: bool
    ) -> tuple[Results, jax.Array]:
        """Runs `entering state -> (results, leaving state)` rank by rank; returns the results and what entered."""
        return take_turns(work, first, self.options.axis_name, reverse=reverse)

    def _scan(self, summary: Summary, options: AllScanOptions, initial_state: jax.Array | None) -> jax.Array:
        return all_scan(
            summary.state,
            summary.decay,
            options.axis_name,
            schedule=options.schedule,
            blocks=options.blocks,
            reverse=options.reverse,
            initial_state=initial_state,
        )

    def forward(self, summary: Summary, initial_state: jax.Array) -> jax.Array:
        """The state that enters this rank."""
        return self._scan(summary, self.options, initial_state)

    def reverse(self, summary: Summary) -> jax.Array:
        """The cotangent that the ranks after this one put on the state that leaves it."""
        return self._scan(summary, self.options.backwards(), None)

    def into_initial(self, dstate_in: jax.Array) -> jax.Array:
        """The first rank's cotangent is the initial state's; the other ranks have none."""
        return jnp.where(axis_index(self.options.axis_name) == 0, dstate_in, 0)
