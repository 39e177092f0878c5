"""All-Scan as the exchange of linear attention: this is ZeCO (arXiv 2507.01004, section 3)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from zeco_jax.attention import Summary
from zeco_jax.collectives import AllScanOptions, all_scan, axis_index


@dataclass(frozen=True)
class AllScanExchange:
    """Brings the entering state by an All-Scan, and its cotangent by a reverse one with the same decays.

    Attributes:
        options: where the All-Scan runs and how.
    """

    options: AllScanOptions

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
