"""Kernel: every gradient, for a decay per key channel, each chunk on its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from zeco_jax.attention.hopper import tile
from zeco_jax.attention.hopper.launch import (
    COMPUTING_REGISTERS,
    PRODUCER_REGISTERS,
    bfloat16,
    float32,
    hidden_zero,
    launch,
    stage_of,
)
from zeco_jax.attention.hopper.passes import Passes
from zeco_jax.attention.hopper.runs import walk_runs
from zeco_jax.attention.hopper.tile import CHUNK, COMPUTING, FACTORED_LIMIT, HALF, PRODUCER, TILE, Ref
from zeco_jax.attention.hopper.walk import Walk

# Halves of a tile of the values, with states and cotangents for them, in flight.
_SLOTS = 2
_FLIPPED = (1, 0)
_SQUARE = (CHUNK, CHUNK)
# What the passes over strong chunks find, in device memory: the scores, gradients of queries, keys and gates.
_FOUND = 4
# With it what waits there in the meantime, as the passes need the registers.
_WAITING = 2


def chunk_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    dout: jax.Array,
    totals: jax.Array,
    strong: jax.Array,
    weakest: jax.Array,
    states: jax.Array,
    leaving: jax.Array,
    *,
    walk: Walk,
    scale: float,
    paired: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    r"""The gradients of queries, keys, values and gates, one tile of the keys at a time.

    With b the gates' sums since the chunk began, S the state that enters the chunk and D the cotangent of the state
    that leaves it, :math:`P_{ij}` the scores and :math:`E_{ij} = do_i \cdot v_j` for :math:`j \le i`:

    .. math::
        dq_i &= \text{scale}\; e^{b_i} \odot \Big(S do_i + \sum_j E_{ij} e^{-b_j} \odot k_j\Big) \\
        dk_j &= e^{b_C - b_j} \odot D v_j + \text{scale} \sum_i E_{ij} e^{b_i - b_j} \odot q_i \\
        dv_j &= \sum_i P_{ij} do_i + D^\top (e^{b_C - b_j} \odot k_j) \\
        dg_t &= \sum_{s \ge t} (q \odot dq - k \odot dk^{intra})_s + \sum_{s < t} (k \odot dk^{state})_s
                + e^{b_C} \odot (S \odot D) 1

    The gate's gradient is summed from factors that are rounded once and shared with the products, so that what cancels
    cancels exactly; nothing is summed over more than a chunk.

    Args:
        q: [B, T, H, K] bfloat16, T a multiple of CHUNK, K of TILE.
        k: [B, T, H, K] bfloat16.
        v: [B, T, H, V] bfloat16, V a multiple of TILE.
        gates: [B, T, H, K] float32.
        dout: [B, T, H, V] bfloat16.
        totals: [B, H, chunks, K] float32, the gates' sums over each chunk.
        strong: [B, H, chunks, K / HALF] int32, which of them are too strong for exponents of both signs.
        weakest: [B, H, stretches, K] float32, the least of the sums in each stretch.
        states: [B, H, chunks, K, V] bfloat16, the state that enters each chunk.
        leaving: [B, H, chunks, K, V] bfloat16, D; with states of one tile as `states.chunk_states` writes it.
        walk: which chunks a block of threads takes.
        scale: factor on the outputs.
        paired: see `tile.own_head`; states and D are [B, 2 H, chunks, HALF, HALF].
        interpret: simulate the kernel.

    Returns:
        dq and dk [B, T, H, K] bfloat16; with states of one tile dv [B, T, H, V] bfloat16, else nothing in its place;
        and dgates [B, T, H, K] float32.
    """
    batch, _, heads, width = q.shape
    halves = tile.bf16_tile(COMPUTING, CHUNK, HALF)
    pairs = tile.bf16_tile(COMPUTING, 2, CHUNK, HALF)
    # Tiles [HALF, HALF] of states for each half of the values, and how many warpgroups use these.
    borders = 1 if paired else COMPUTING
    *gradients, _ = launch(
        partial(_gradients, walk=walk, scale=scale, paired=paired),
        (q, k, v, gates, dout, totals, strong, weakest, states, leaving),
        (
            bfloat16(*q.shape),
            bfloat16(*k.shape),
            *([bfloat16(*v.shape)] if max(width, v.shape[-1]) == TILE else []),
            float32(*gates.shape),
            float32(batch, heads, walk.stretches, width // TILE, COMPUTING, _FOUND + _WAITING, *_SQUARE),
        ),
        {
            "q_tile": halves,
            "k_tile": halves,
            # The outputs' cotangents and the values.
            "values_tile": tile.bf16_tile(_SLOTS, 2, CHUNK, HALF),
            "leaving_tile": tile.bf16_tile(_SLOTS, borders, HALF, HALF),
            # Where they have been read, the two parts of what is summed over tokens take their place: each warpgroup's
            # in its own, as only its own warps are waited for.
            "gates_work": plgpu.RefUnion(tile.fp32_tile(COMPUTING, CHUNK, HALF), pairs),
            "state_work": plgpu.RefUnion(tile.bf16_tile(COMPUTING, _SLOTS, HALF, HALF), pairs),
            # On the way to device memory, and again parts of sums.
            "staged": pairs,
            # The products of outputs' cotangents and values, and the same flipped: one pair for each head of the tile.
            "weights_tile": tile.bf16_tile(2 * COMPUTING // borders, *_SQUARE),
            # Ones up to and including the diagonal, and below it.
            "triangles": tile.bf16_tile(2, *_SQUARE),
            # The gates' sums over the chunk, and in their place what crosses it; what `Passes` keeps.
            "vectors": plgpu.SMEM((2, TILE), jnp.float32),
            "fetched": plgpu.Barrier(num_arrivals=2 * COMPUTING + 1),
            "used": plgpu.Barrier(num_arrivals=COMPUTING),
            "gates_fetched": plgpu.Barrier(num_arrivals=COMPUTING),
            "gates_used": plgpu.Barrier(num_arrivals=COMPUTING),
            "values_fetched": plgpu.Barrier(num_arrivals=2 + borders, num_barriers=_SLOTS),
            "values_used": plgpu.Barrier(num_arrivals=borders, num_barriers=_SLOTS),
            "state_fetched": plgpu.Barrier(num_arrivals=borders, num_barriers=_SLOTS),
            "state_used": plgpu.Barrier(num_arrivals=borders, num_barriers=_SLOTS),
            "prepared": plgpu.Barrier(num_arrivals=COMPUTING),
            "weighed": plgpu.Barrier(num_arrivals=COMPUTING),
        },
        name="chunk_gradients",
        stretches=walk.stretches,
        # A block of threads goes through all tiles of the values.
        state=(batch, heads, width, TILE),
        interpret=interpret,
    )
    return tuple(gradients)


def _gradients(
    q: Ref,
    k: Ref,
    v: Ref,
    gates: Ref,
    dout: Ref,
    totals: Ref,
    strong: Ref,
    weakest: Ref,
    states: Ref,
    leaving: Ref,
    nothing: Ref,
    dq: Ref,
    dk: Ref,
    *others: Ref,
    walk: Walk,
    scale: float,
    paired: bool,
    q_tile: Ref,
    k_tile: Ref,
    values_tile: Ref,
    leaving_tile: Ref,
    gates_work: Ref,
    state_work: Ref,
    staged: Ref,
    weights_tile: Ref,
    triangles: Ref,
    vectors: Ref,
    fetched: Ref,
    used: Ref,
    gates_fetched: Ref,
    gates_used: Ref,
    values_fetched: Ref,
    values_used: Ref,
    state_fetched: Ref,
    state_used: Ref,
    prepared: Ref,
    weighed: Ref,
    staging: Ref | None,
) -> None:
    batch, head, stretch, key_tile = (lax.axis_index(name) for name in ("batch", "head", "stretch", "key_tile"))
    warpgroup = lax.axis_index("warpgroup")
    *dvs, dgates, exact = others
    steps = walk.steps(stretch)
    value_halves = v.shape[-1] // HALF
    gates_tile, gates_pairs = gates_work
    state_tile, state_pairs = state_work
    vector, numbers = (vectors.at[i] for i in range(2))
    all_keys = pl.ds(key_tile * TILE, TILE)
    key_halves = [pl.ds(key_tile * TILE + i * HALF, HALF) for i in range(COMPUTING)]

    @pl.when(warpgroup == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

        @pl.loop(0, steps)
        def _step(step: jax.Array) -> None:
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            again = step >= 1

            def fetch_values(half: int | jax.Array, slot: int | jax.Array) -> None:
                of_values, full = pl.ds(half * HALF, HALF), values_fetched.at[slot]
                for i, source in enumerate((dout, v)):
                    place = source.at[batch, tokens, head, of_values]
                    plgpu.copy_gmem_to_smem(place, values_tile.at[slot, i], full)
                for i, place in enumerate(parts(leaving, half)):
                    plgpu.copy_gmem_to_smem(place, leaving_tile.at[slot, i], full)

            def fetch_state(half: int | jax.Array, slot: int | jax.Array) -> None:
                for i, place in enumerate(parts(states, half)):
                    plgpu.copy_gmem_to_smem(place, state_tile.at[slot if paired else i, slot], state_fetched.at[slot])

            def parts(of_chunks: Ref, half: int | jax.Array) -> list[Ref]:
                """What half of the values meets, by halves of the keys; with paired heads all of one head."""
                if paired:
                    return [of_chunks.at[batch, tile.own_head(head, half, paired=paired), chunk]]
                of_values = pl.ds(half * HALF, HALF)
                return [of_chunks.at[batch, head, chunk, of_keys, of_values] for of_keys in key_halves]

            pl.when(again)(lambda: plgpu.barrier_wait(gates_used))
            for i, of_keys in enumerate(key_halves):
                plgpu.copy_gmem_to_smem(gates.at[batch, tokens, head, of_keys], gates_tile.at[i], gates_fetched)
            for slot in range(_SLOTS):
                pl.when(again)(partial(plgpu.barrier_wait, values_used.at[slot]))
                fetch_values(slot, slot)
            pl.when(again)(lambda: plgpu.barrier_wait(used))
            for source, target in ((q, q_tile), (k, k_tile)):
                for i, of_keys in enumerate(key_halves):
                    plgpu.copy_gmem_to_smem(source.at[batch, tokens, head, of_keys], target.at[i], fetched)
            plgpu.copy_gmem_to_smem(totals.at[batch, head, chunk, all_keys], vector, fetched)
            for slot in range(_SLOTS):
                pl.when(again)(partial(plgpu.barrier_wait, state_used.at[slot]))
                fetch_state(slot, slot)

            @pl.loop(_SLOTS, value_halves)
            def _value_half(half: jax.Array) -> None:
                slot = lax.rem(half, _SLOTS)
                plgpu.barrier_wait(values_used.at[slot])
                fetch_values(half, slot)
                plgpu.barrier_wait(state_used.at[slot])
                fetch_state(half, slot)

        # A barrier may not go while somebody has still to pass it.
        for barrier in (gates_used, used, *(x.at[slot] for x in (values_used, state_used) for slot in range(_SLOTS))):
            plgpu.barrier_wait(barrier)

    @pl.when(warpgroup < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        stage = stage_of(staging, warpgroup)
        product, products = partial(tile.product, staging=stage), partial(tile.products, staging=stage)
        rows, columns = tile.indices()
        # Kept in shared memory, as are masks: in registers the compiler would keep them through the loop.
        tile.write(triangles.at[warpgroup], tile.ones_where(columns - rows + warpgroup <= 0))
        plgpu.barrier_arrive(weighed)
        plgpu.barrier_wait(weighed)

        def meet(barrier: Ref) -> None:
            """Both warpgroups have come here; with paired heads neither needs the other."""
            if not paired:
                plgpu.barrier_arrive(barrier)
                plgpu.barrier_wait(barrier)

        own_keys = pl.ds(key_tile * TILE + warpgroup * HALF, HALF)

        def strong_halves(chunk: jax.Array) -> list[jax.Array]:
            return [strong[batch, head, chunk, key_tile * COMPUTING + i] for i in range(COMPUTING)]

        def is_strong(step: jax.Array) -> jax.Array:
            first, second = strong_halves(walk.chunk(stretch, step))
            return (first | second) != 0

        def step_body(step: jax.Array, _: tuple[()], *, some_strong: bool) -> tuple[jax.Array, tuple[()]]:
            # Asked for before it is needed: it comes from device memory.
            next_strong = is_strong(jnp.minimum(step + 1, steps - 1))
            chunk = walk.chunk(stretch, step)
            tokens = pl.ds(chunk * CHUNK, CHUNK)
            zero = hidden_zero(step)
            mine = warpgroup + zero
            own_q, own_k = q_tile.at[mine], k_tile.at[mine]
            lower, below = triangles.at[zero], triangles.at[1 + zero]
            pair, late_pair, own_staged = gates_pairs.at[mine], state_pairs.at[mine], staged.at[mine]
            found = exact.at[batch, head, stretch, key_tile]
            own_strong = strong[batch, head, chunk, key_tile * COMPUTING + mine] != 0
            own_vector = vector.at[tile.half(mine)]
            # With paired heads each half of the values is a warpgroup's.
            own_slots = [mine] if paired else [slot + zero for slot in range(_SLOTS)]

            plgpu.barrier_wait(gates_fetched)
            gate = jnp.maximum(tile.load(gates_tile.at[mine]), tile.WEAKEST_GATE)
            # Everybody has read what is about to be written over.
            plgpu.commit_smem()
            tile.write_split(pair, gate)
            plgpu.commit_smem()

            def exponents() -> tuple[jax.Array, jax.Array]:
                """Of the decays of queries and keys."""
                sums = tile.summed(lower, pair, staging=stage)
                if not some_strong:
                    return sums, -sums
                to_end = tile.summed(below.transpose(_FLIPPED), pair, staging=stage)
                total = tile.load_global(totals.at[batch, head, chunk, own_keys], layout=tile.COLUMN)
                return sums, jnp.where(tile.along_columns(total, CHUNK) < FACTORED_LIMIT, to_end, -sums)

            if some_strong:
                plgpu.barrier_wait(fetched)
                over = Passes.of(pair, numbers.at[tile.half(mine)], staging=stage)
                if dvs:
                    finding = partial(_find_scores, own_q, own_k, over, pair, own_staged, scale, stage)
                    pl.when(own_strong)(partial(finding, found.at[mine, 0]))
                of_queries, of_keys = exponents()
            else:
                of_queries, of_keys = exponents()
                plgpu.barrier_arrive(gates_used)
                plgpu.barrier_wait(fetched)
            own_q[...] = (tile.load(own_q) * tile.scaled_exp(of_queries, scale)).astype(jnp.bfloat16)
            own_k[...] = (tile.load(own_k) * jnp.exp(of_keys)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            meet(prepared)

            def score() -> tuple[jax.Array, jax.Array]:
                """The scores, tokens of keys first, in two parts."""
                halves = [mine] if paired else [i + zero for i in range(COMPUTING)]
                terms = [(k_tile.at[i], q_tile.at[i].transpose(_FLIPPED)) for i in halves]
                if some_strong:
                    of_halves = [own_strong] if paired else [half != 0 for half in strong_halves(chunk)]
                    scores = sum(
                        lax.cond(
                            half_strong,
                            lambda _, i=i: tile.load_global(found.at[i, 0]),
                            lambda x: x,
                            product(_SQUARE, term),
                        )
                        for i, half_strong, term in zip(halves, of_halves, terms, strict=True)
                    )
                else:
                    scores = product(_SQUARE, *terms)
                return tile.split(scores - scores * tile.load(below))

            scores = score() if dvs else ()

            def write_weights(weights: jax.Array, side: jax.Array) -> None:
                flipped = side.astype(jnp.float32)
                # Up to and including the diagonal; flipped, from it on.
                counts = flipped + (1.0 - 2.0 * flipped) * tile.load(triangles.at[side])
                own_weights = weights_tile.at[2 * mine + side if paired else side]
                own_weights[...] = (weights * counts).astype(jnp.bfloat16)

            def diagonal(x: jax.Array) -> jax.Array:
                return jnp.sum(x * (tile.load(lower) - tile.load(below)), axis=1)

            def factors(slot: jax.Array, zero: jax.Array) -> tuple[tile.Factors, ...]:
                """Of the weights, the gradients of queries and keys, and what crosses, from half a tile of values."""
                mine = warpgroup + zero
                values, own_state = values_tile.at[slot], state_tile.at[mine, slot]
                own_leaving = leaving_tile.at[slot, zero if paired else mine].transpose(_FLIPPED)
                plgpu.barrier_wait(values_fetched.at[slot])
                plgpu.barrier_wait(state_fetched.at[slot])
                sides = (zero, 1 + zero) if paired else (mine,)
                return (
                    *((values.at[side], values.at[1 - side].transpose(_FLIPPED)) for side in sides),
                    (values.at[zero], own_state.transpose(_FLIPPED)),
                    (values.at[1 + zero], own_leaving),
                    # The diagonal of a product is cheaper than products of numbers, which would have to be read first.
                    (own_state, own_leaving),
                )

            def pass_values(half: jax.Array, passed: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot = lax.rem(half, _SLOTS)
                jobs = ([term] for term in factors(slot, hidden_zero(step + half)))
                passed = tile.added_products(*zip(passed, jobs, strict=True), staging=stage)
                plgpu.barrier_arrive(values_used.at[slot])
                # The last states' places are needed.
                pl.when(half < value_halves - _SLOTS)(partial(plgpu.barrier_arrive, state_used.at[slot]))
                return passed

            if dvs:
                (dv,) = dvs
                jobs = zip(*(factors(slot, zero) for slot in own_slots), strict=True)
                *of_weights, of_queries_gradient, of_keys_gradient, of_crossing = jobs
                # Not at once: the registers hold no more.
                for i, terms in enumerate(of_weights):
                    write_weights(product(_SQUARE, *terms), i + zero if paired else mine)
                dq_state, dk_state = products((_SQUARE, of_queries_gradient), (_SQUARE, of_keys_gradient))
                crossing = diagonal(product(_SQUARE, *of_crossing))
                own = tile.half(mine)
                dv_own = product(
                    _SQUARE,
                    *((part, values_tile.at[mine, zero]) for part in scores),
                    *(
                        [(own_k, leaving_tile.at[mine, zero])]
                        if paired
                        else [(k_tile.at[i + zero], leaving_tile.at[mine, i + zero]) for i in range(COMPUTING)]
                    ),
                )
                for slot in own_slots:
                    plgpu.barrier_arrive(values_used.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                own_staged.at[0][...] = dv_own.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_staged.at[0], dv.at[batch, tokens, head, own])
            else:
                # Sums over many tiles of the values leave no registers for the exponents.
                stashed = own_staged.at[1], weights_tile.at[mine]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for target, part in zip(stashed, tile.split(of_queries), strict=True):
                    target[...] = part
                passed = tuple(tile.zeros(*_SQUARE) for _ in range(4))
                weights, dq_state, dk_state, crossing = lax.fori_loop(0, value_halves, pass_values, passed)
                of_queries = sum(tile.load(part) for part in stashed)
                of_keys = -of_queries
                total = plgpu.load(own_vector, layout=tile.COLUMN)
                if some_strong:
                    total = jnp.where(total < FACTORED_LIMIT, 0.0, total)
                dk_state *= tile.along_columns(jnp.exp(total), CHUNK)
                crossing = diagonal(crossing) * jnp.exp(tile.load_global(own_vector, layout=tile.ROW))
                write_weights(weights, mine)
                # Every warp has read the state, which the pair displaces; above, the barriers around dv see to it.
                plgpu.commit_smem()
            tile.write_split(late_pair, tile.load(own_k) * dk_state)
            if some_strong and dvs:
                total = tile.load_global(own_vector, layout=tile.ROW)
                crossing *= jnp.exp(jnp.where(total < FACTORED_LIMIT, total, 0.0))
            # Every warp has read the sums.
            plgpu.commit_smem()
            own_vector[...] = crossing
            plgpu.commit_smem()
            meet(weighed)

            first = 2 * mine if paired else zero
            de, de_flipped = weights_tile.at[first], weights_tile.at[first + 1]
            de_left, de_flipped_left = de, de_flipped
            if some_strong:
                for i, x in enumerate((dq_state, dk_state), start=_FOUND):
                    found[mine, i] = x
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                places = (x.at[batch, tokens, head, own_keys] for x in (q, k))
                finding = partial(_find_gradients, *places, de, de_flipped, over, pair, own_staged, scale, stage)
                pl.when(own_strong)(partial(finding, found.at[mine]))
                dq_state, dk_state = (tile.load_global(found.at[mine, i]) for i in range(_FOUND, _FOUND + _WAITING))
                # The passes have done what is within the chunk.
                factored = 1.0 - own_strong.astype(jnp.float32)
                de_left, de_flipped_left = ((tile.load(x) * factored).astype(jnp.bfloat16) for x in (de, de_flipped))
            # Pallas's `run_state` takes no constants as indices.
            late = [(below, late_pair.at[i + zero]) for i in range(2)]
            dk_own, dq_own, dgate = tile.added_products(
                (tile.zeros(*_SQUARE), [(de_flipped_left, own_q)]),
                (dq_state, [(de_left, own_k)]),
                (tile.zeros(*_SQUARE), late),
                staging=stage,
            )
            dgate += tile.along_columns(plgpu.load(own_vector, layout=tile.COLUMN), CHUNK)
            moved = tile.load(own_q) * dq_own - tile.load(own_k) * dk_own
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile.write_split(own_staged, moved)
            for slot in own_slots:
                plgpu.barrier_arrive(state_used.at[slot])
            plgpu.barrier_arrive(used)
            if some_strong:
                of_queries, of_keys = exponents()
                plgpu.barrier_arrive(gates_used)
            else:
                # Unknown to the compiler the same as before: it would keep the exponentials until now.
                again = lax.shift_right_logical(step, 25).astype(jnp.float32)
                of_queries += again
                of_keys = -of_queries
            dq_own *= tile.scaled_exp(of_queries, scale)
            dk_own = (dk_own + dk_state) * jnp.exp(of_keys)
            if some_strong:
                dq_own, dk_own, dgate = (
                    lax.cond(own_strong, lambda x, i=i: x + tile.load_global(found.at[mine, i]), lambda x: x, x)
                    for i, x in enumerate((dq_own, dk_own, dgate), start=1)
                )
            plgpu.commit_smem()
            terms = [(lower.transpose(_FLIPPED), own_staged.at[i + zero]) for i in range(2)]
            (dgate,) = tile.added_products((dgate, terms), staging=stage)
            dgates[batch, tokens, head, own_keys] = dgate
            plgpu.commit_smem()
            own_staged[0], own_staged[1] = dq_own.astype(jnp.bfloat16), dk_own.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for i, target in enumerate((dq, dk)):
                plgpu.copy_smem_to_gmem(own_staged.at[i], target.at[batch, tokens, head, own_keys])
            return next_strong, ()

        walk_runs(
            steps + nothing[0],
            is_strong(jnp.int32(0)),
            step_body,
            tuple,
            lambda _: None,
            lambda _: None,
            tuple,
            some_strong=(
                tile.least(weakest.at[batch, head, stretch, all_keys], numbers.at[tile.half(warpgroup)])
                < FACTORED_LIMIT
            ),
        )
        plgpu.wait_smem_to_gmem(0)


def _find_scores(
    q: Ref, k: Ref, over: Passes, gates: Ref, work: Ref, scale: float, staging: Ref | None, found: Ref
) -> None:
    """Scores of a chunk with strong gates, tokens of keys first, pass by pass, into device memory."""
    pass_q, pass_k = work.at[0], work.at[1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def add_pass(which: jax.Array, scores: jax.Array) -> jax.Array:
        of_queries, of_keys = over.decays(which, gates, staging=staging)
        # No warp may still be reading what is about to be written.
        plgpu.commit_smem()
        pass_q[...] = (tile.load(q) * of_queries * scale).astype(jnp.bfloat16)
        pass_k[...] = (tile.load(k) * of_keys).astype(jnp.bfloat16)
        plgpu.commit_smem()
        scored = tile.product(_SQUARE, (pass_k, pass_q.transpose(_FLIPPED)), staging=staging)
        return scores + jnp.where(over.parted(which, flipped=True), scored, 0.0)

    found[...] = lax.fori_loop(over.first, over.end, add_pass, tile.zeros(*_SQUARE))


def _find_gradients(
    q: Ref,
    k: Ref,
    de: Ref,
    de_flipped: Ref,
    over: Passes,
    gates: Ref,
    work: Ref,
    scale: float,
    staging: Ref | None,
    found: Ref,
) -> None:
    """Gradients within a chunk with strong gates, pass by pass, into device memory."""
    pass_q, pass_k = work.at[0], work.at[1]

    def add(index: int, x: jax.Array) -> None:
        """Adds to what waits in device memory."""
        found[index] = tile.load_global(found.at[index]) + x

    def weigh(weights: Ref, parted: jax.Array) -> jax.Array:
        return (tile.load(weights) * parted.astype(jnp.float32)).astype(jnp.bfloat16)

    for index in range(1, _FOUND):
        found[index] = tile.zeros(*_SQUARE)

    @pl.loop(over.first, over.end)
    def _pass(which: jax.Array) -> None:
        of_queries, of_keys = over.decays(which, gates, staging=staging)
        # No warp may still be reading what is about to be written.
        plgpu.commit_smem()
        pass_q[...] = (tile.load_global(q).astype(jnp.float32) * of_queries * scale).astype(jnp.bfloat16)
        pass_k[...] = (tile.load_global(k).astype(jnp.float32) * of_keys).astype(jnp.bfloat16)
        plgpu.commit_smem()
        dqs = tile.product(_SQUARE, (weigh(de, over.parted(which)), pass_k), staging=staging)
        add(1, dqs * of_queries * scale)
        moved = tile.load(pass_q) * dqs
        dks = tile.product(_SQUARE, (weigh(de_flipped, over.parted(which, flipped=True)), pass_q), staging=staging)
        add(2, dks * of_keys)
        moved += tile.load(pass_k) * dks * over.sign(which)
        plgpu.commit_smem()
        tile.write_split(work, moved)
        plgpu.commit_smem()
        weights = tile.ones_where(over.reached(which, flipped=True))
        add(3, tile.summed(weights, work, staging=staging))

    # The place is needed for what follows.
    plgpu.commit_smem()
