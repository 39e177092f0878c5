"""The TPU kernels, compiled for TPUs that aren't there; not run."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from zeco_jax.attention import attend
from zeco_jax.attention.tpu import TpuBackend

def compiled(topology, decay, dtype, tokens, heads, key_width, value_width, options):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    keys, values = (mesh.size, tokens, heads, key_width), (mesh.size, tokens, heads, value_width)
    gates = {"none": None, "token": keys[:3], "channel": keys}[decay]
    state = (mesh.size, heads, key_width, value_width)
    shapes = [(keys, dtype), (keys, dtype), (values, dtype), (gates, "float32"), (state, "float32"), (values, dtype)]
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    structs = [shape and jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for shape, kind in shapes]
    backend = TpuBackend(scale=key_width**-0.5, **options)

    def gradients(q, k, v, log_decay, state, dout):
        def run(q, k, v, log_decay, state):
            return attend(q, k, v, log_decay, backend=backend, initial_state=state)
        (out, final_state), pullback = jax.vjp(run, q, k, v, log_decay, state)
        summary = backend.summarize(k, v, jnp.zeros((1, *k.shape[1:3], 1)))
        return out, pullback((dout, final_state)), summary

    spec = PartitionSpec("data")
    run = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=spec, out_specs=spec))
    try:
        text = run.lower(*structs).compile().as_text()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return text.count('custom_call_target="tpu_custom_call"')

print(json.dumps({name: compiled(**case) for name, case in json.loads(sys.argv[1]).items()}))
"""

TOPOLOGIES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1")
USUAL = {"tokens": 1024, "heads": 8, "key_width": 128, "value_width": 128, "dtype": "bfloat16", "options": {}}
WIDE = {"heads": 2, "key_width": 256, "value_width": 512}
CASES = {
    f"{topology}-{decay}": {"topology": topology, "decay": decay, **USUAL}
    for topology in TOPOLOGIES
    for decay in ("token", "channel")
}
CASES |= {
    "v4-channel": {"topology": "v4:2x2x1", "decay": "channel", **USUAL, "heads": 2},
    "v5e-token-float32": {"topology": "v5e:2x4", "decay": "token", **USUAL, "dtype": "float32", "heads": 2},
    "v5p-channel-float32": {"topology": "v5p:2x2x1", "decay": "channel", **USUAL, "dtype": "float32", "heads": 1},
    "v6e-none-wide": {
        "topology": "v6e:2x4",
        "decay": "none",
        **USUAL,
        "heads": 2,
        "key_width": 256,
        "value_width": 512,
    },
    "v5e-token-odd-shape": {
        "topology": "v5e:2x4",
        "decay": "token",
        **USUAL,
        "tokens": 77,
        "heads": 3,
        "key_width": 24,
        "value_width": 200,
    },
    "v5e-token-long-chunks": {"topology": "v5e:2x4", "decay": "token", **USUAL, "options": {"chunk_size": 256}},
}


@pytest.fixture(scope="module")
def kernels():
    """How many kernels each case compiled to, or the error; in a process of its own: libtpu wants the environment."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu to compile for TPUs")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    command = [sys.executable, "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_compiles_for_tpus(kernels, case):
    """One kernel forward, two backward, and one that was asked for as such."""
    assert kernels[case] == 4
