"""Gradients of a sequence that doesn't fit: chunk by chunk, with a memory that is carried over (SeCO, SpaCO)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

type Tree = Any
type Chunk = Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]

LARGEST_COMPENSATION = 2.0


def choose_chunks(key: jax.Array, chunks: int, chosen: int) -> jax.Array:
    """Draws chunks to backpropagate through, all equally likely, none twice.

    Args:
        key: random key.
        chunks: how many there are, n.
        chosen: how many to draw, t.

    Returns:
        Their indices [t], in ascending order.

    Raises:
        ValueError: t isn't in 1..n.

    Example:
        >>> import jax
        >>> from zeco_jax.training import choose_chunks
        >>> choose_chunks(jax.random.key(0), 4, 4).tolist()
        [0, 1, 2, 3]
    """
    if not 1 <= chosen <= chunks:
        raise ValueError(f"chosen must be from 1 to chunks = {chunks}, got {chosen}")
    return jnp.sort(jax.random.permutation(key, chunks)[:chosen])


def sum_over_chunks(
    chunk: Chunk,
    parameters: Tree,
    memory: Tree,
    inputs: Tree,
    *,
    chosen: jax.Array | None = None,
    largest_compensation: float = LARGEST_COMPENSATION,
) -> jax.Array:
    r"""The sum of the chunks' losses, differentiable with the activations of one chunk at a time.

    .. math:: L = \sum_{i=1}^{n} \ell_i, \qquad (\ell_i, m_i) = \mathrm{chunk}(\theta, m_{i-1}, x_i)

    Forward, chunk by chunk, nothing is kept but the memory that enters each. Backward, from the last chunk to the
    first, each is computed again, differentiated, and hands the gradient of its entering memory to the one before:

    .. math:: (\bar\theta_i, \bar m_{i-1}) = \mathrm{vjp}_i(\bar\ell, \bar m_i), \qquad
        \bar\theta = \sum_i \bar\theta_i

    That is SeCO (Li et al., "Training Long-Context LLMs Efficiently via Chunk-wise Optimization", arXiv 2505.16710,
    section 3): exact, at the price of one more forward pass.

    With `chosen`, t of the n chunks drawn at random, it is SpaCO (section 4 there): forward through all, backward
    through the chosen ones alone. Their losses' gradients count n / t times. A chosen chunk takes over the memory's
    gradient if its neighbour was chosen too; then the gradient has survived two draws instead of one and is scaled by
    :math:`s = (n - 1) / (t - 1)`, the inverse of the neighbour's chance (n / t in the paper, the same for many chunks),
    over p neighbours by :math:`s^p`, of which no more than `largest_compensation` is kept. Without that limit the
    expected gradient is exact for what reaches from a chunk to itself and its neighbour and nearly so beyond, but few
    draws carry all of it; with it, what passes between chunks is underestimated and varies less.

    Nothing passes through a chunk that wasn't chosen. A softmax layer's memory, keys and values, is read by every later
    chunk at first hand. A linear-attention state reaches a later chunk only through those between, whose derivative
    with respect to it is the decay of the whole chunk plus what goes through the layers above; the one is next to
    nothing for a gate that forgets within a chunk, the other costs the recomputation that was to be saved. So the
    chain ends there, and the scale makes up for it as it does for losses.

    Args:
        chunk: `chunk(parameters, memory, x) -> (loss, memory)`: a scalar and a memory of the same shapes. It must be
            a function of its arguments alone, without traced values from outside.
        parameters: float arrays.
        memory: what enters the first chunk; leaves that aren't floats are carried without a gradient.
        inputs: arrays with a leading axis of n chunks; no gradient flows into them.
        chosen: indices [t], ascending, see `choose_chunks`; None: all chunks.
        largest_compensation: most that a memory's gradient is scaled by, 2 in the paper.

    Returns:
        The sum over all n chunks, whatever was chosen; differentiable in `parameters` and `memory`.

    Raises:
        ValueError: `inputs` without arrays or of different numbers of chunks, more indices than chunks, or a
            `largest_compensation` below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from zeco_jax.training import sum_over_chunks
        >>> def chunk(decay, memory, x):
        ...     memory = decay * memory + x
        ...     return memory**2, memory
        >>> def loss(decay):
        ...     return sum_over_chunks(chunk, decay, jnp.zeros(()), jnp.array([1.0, 2.0, 3.0]))
        >>> float(loss(0.5)), float(jax.grad(loss)(0.5))  # memories 1, 2.5, 4.25
        (25.3125, 30.5)
    """
    lengths = sorted({np.shape(leaf)[0] for leaf in jax.tree.leaves(inputs)})
    if len(lengths) != 1:
        raise ValueError(f"inputs must be arrays with one number of chunks as their first dimension, got {lengths}")
    if chosen is None:
        chosen = jnp.arange(lengths[0])
    if not 1 <= chosen.shape[0] <= lengths[0]:
        raise ValueError(f"chosen must have from 1 to {lengths[0]} indices, one per chunk, got {chosen.shape[0]}")
    if largest_compensation < 1:
        raise ValueError(f"largest_compensation must be at least 1, got {largest_compensation}")
    return _total(chunk, largest_compensation, parameters, memory, inputs, chosen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    chunk: Chunk, largest_compensation: float, parameters: Tree, memory: Tree, inputs: Tree, chosen: jax.Array
) -> jax.Array:
    return _forward(chunk, largest_compensation, parameters, memory, inputs, chosen)[0]


def _forward(
    chunk: Chunk, largest_compensation: float, parameters: Tree, memory: Tree, inputs: Tree, chosen: jax.Array
) -> tuple[jax.Array, tuple[Tree, ...]]:
    def step(memory: Tree, x: Tree) -> tuple[Tree, tuple[jax.Array, Tree]]:
        loss, leaving = chunk(parameters, memory, x)
        return leaving, (loss, memory)

    _, (losses, entering) = jax.lax.scan(step, memory, inputs)
    return losses.sum(), (parameters, entering, inputs, chosen)


def _backward(
    chunk: Chunk, largest_compensation: float, residuals: tuple[Tree, ...], dtotal: jax.Array
) -> tuple[Tree, Tree, None, None]:
    parameters, entering, inputs, chosen = residuals
    chunks, drawn = jax.tree.leaves(inputs)[0].shape[0], chosen.shape[0]
    weight, per_neighbour = chunks / drawn, (chunks - 1) / max(drawn - 1, 1)

    def step(carry: tuple[Tree, ...], index: jax.Array) -> tuple[tuple[Tree, ...], None]:
        gradient, dleaving, following, scale = carry
        memory, x = jax.tree.map(lambda leaf: leaf[index], (entering, inputs))
        floats, join = _split(memory)

        def differentiable(parameters: Tree, floats: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
            loss, leaving = chunk(parameters, join(floats), x)
            return loss, _split(leaving)[0]

        neighbours = following == index + 1
        scale_here = jnp.where(neighbours, jnp.minimum(scale * per_neighbour, largest_compensation), 1.0)
        factor = scale_here / scale
        dleaving = [jnp.where(neighbours, leaf * factor.astype(leaf.dtype), 0) for leaf in dleaving]
        _, pull_back = jax.vjp(differentiable, parameters, floats)
        dparameters, dentering = pull_back((weight * dtotal, dleaving))
        return (jax.tree.map(jnp.add, gradient, dparameters), dentering, index, scale_here), None

    nothing = [jnp.zeros_like(leaf[0]) for leaf in _split(entering)[0]]
    # No chunk follows the last one.
    start = jax.tree.map(jnp.zeros_like, parameters), nothing, jnp.full_like(chosen[0], -1), jnp.ones(())
    (gradient, dmemory, first, _), _ = jax.lax.scan(step, start, chosen, reverse=True)
    _, join = _split(entering, others=False)
    return gradient, join([jnp.where(first == 0, leaf, 0) for leaf in dmemory]), None, None


_total.defvjp(_forward, _backward)


def _split(memory: Tree, others: bool = True) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Tree]]:
    """The float leaves, and what puts such leaves back beside the others, or beside None."""
    leaves, structure = jax.tree.flatten(memory)
    floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def join(floats: list[jax.Array]) -> Tree:
        remaining = iter(floats)
        rest = leaves if others else [None] * len(leaves)
        return structure.unflatten(
            [next(remaining) if is_float else leaf for is_float, leaf in zip(floating, rest, strict=True)]
        )

    return [leaf for is_float, leaf in zip(floating, leaves, strict=True) if is_float], join
