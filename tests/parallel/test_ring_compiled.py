"""ring_attention compiled for TPUs that aren't there: what travels does so while a block is computed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import zeco_jax
from zeco_jax.pods import Rates, Wires, open_slice, timeline

slice_ = open_slice("v5e:2x4")
mesh, spec = slice_.mesh("data", "seq"), PartitionSpec(None, "seq")
attend = partial(zeco_jax.ring_attention, axis_name="seq", backend="xla")
struct = jax.ShapeDtypeStruct((1, 8 * 4096, 8, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
run = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec))
text = run.lower(struct, struct, struct).compile().as_text()
found = timeline(text, Rates(slice_.chip).compiler_seconds, Wires(slice_.link, slice_.torus))
waits = [(wait.collective.asynchronous, wait.wire, wait.hidden_by) for wait in found.waits]
print(json.dumps({"work": found.work, "exposed": found.exposed, "waits": waits}))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu to compile for TPUs")
def test_messages_hide_behind_blocks():
    """In a process of its own: libtpu wants the environment."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exposed"] < 0.01 * found["work"]
    # Keys and values of four rounds, the queries of three, and what was computed for these.
    assert len(found["waits"]) == 4 * 2 + 3 + 3 * 2
    assert all(asynchronous for asynchronous, *_ in found["waits"])
