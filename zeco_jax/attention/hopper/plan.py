"""How many stretches a sequence is cut into."""

# Multiprocessors of an H100 or H200 (SXM).
MULTIPROCESSORS = 132
# Beyond this many the states of the stretches, and the scan over them, cost more than idle multiprocessors.
MOST_STRETCHES = 64
# What a block of threads takes to start and to write its state, in chunks (measured: 2 to 3 microseconds of 4).
_START = 1.5


def stretches(blocks: int, chunks: int) -> int:
    """As many stretches as give the shortest time on a machine that runs one block of threads per multiprocessor.

    Blocks run in waves; a wave takes as long as a stretch has chunks.

    Args:
        blocks: of threads for each stretch: batch x heads x tiles of the state.
        chunks: of the sequence.

    Returns:
        The number of stretches.

    Example:
        >>> from zeco_jax.attention.hopper.plan import stretches
        >>> stretches(16, 256), stretches(128, 64)
        (8, 1)
    """

    def time(count: int) -> float:
        waves = -(-blocks * count // MULTIPROCESSORS)
        return waves * (-(-chunks // count) + _START)

    return min(range(1, min(chunks, MOST_STRETCHES) + 1), key=time)
