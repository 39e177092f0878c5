"""What a language model is: one frozen dataclass, and the sizes that have a name."""

import dataclasses
import math

from zeco_jax.layers import DECAYS
from zeco_jax.layers.heads import head_width

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a `LinearAttentionLM` and how it is computed; the defaults are the 1b model.

    Attributes:
        vocabulary_size: Number of different tokens.
        hidden_size: Width D of the residual stream.
        num_layers: Number of blocks.
        num_heads: Query heads H.
        num_kv_heads: Heads with keys, values and gates; None: as many as `num_heads`.
        expand_k: Key width of all query heads together, as a fraction of `hidden_size`.
        expand_v: The same for values.
        decay: "channel", "token", "head" or "none", see `zeco_jax.layers.DecayGate`.
        gate_rank: Rank of the gate's projection.
        gate_normalizer: Divides the log decay.
        conv_width: Taps of the short convolution over q, k and v; 0 for none.
        mlp_ratio: Width of the feed-forward layer before the two-thirds rule, as a multiple of `hidden_size`.
        mlp_multiple: The width after that rule is rounded up to a multiple of this.
        tie_embeddings: Whether the embedding also turns hidden states into logits.
        norm_eps: Added to the mean square in every norm.
        dtype: Compute dtype, "float32" or "bfloat16". Parameters, gates, states and logits are float32.
        remat: Whether each block is computed again in the backward pass instead of kept.
        scan_unroll: How many blocks one step of the scan over layers holds; more compile longer and may run faster.
        schedule: How states travel between ranks, see `zeco_jax.all_scan`.
        backend: See `zeco_jax.linear_attention`.
        chunk_size: See `zeco_jax.linear_attention`.

    Raises:
        ValueError: A field out of range, or sizes that don't divide; the message names the field.

    Example:
        >>> from zeco_jax.models import ModelConfig
        >>> ModelConfig(hidden_size=256, num_heads=2, num_layers=2).mlp_size
        768
    """

    vocabulary_size: int = 32000
    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    decay: str = "channel"
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    conv_width: int = 0
    mlp_ratio: float = 4.0
    mlp_multiple: int = 256
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: bool = False
    scan_unroll: int = 1
    schedule: str = "auto"
    backend: str | None = None
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        positive = (
            "vocabulary_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "expand_k",
            "expand_v",
            "gate_rank",
            "gate_normalizer",
            "mlp_ratio",
            "mlp_multiple",
            "norm_eps",
            "scan_unroll",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.conv_width < 0:
            raise ValueError(f"conv_width must be at least 0, got {self.conv_width}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}; got {self.decay!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")
        for name in ("expand_k", "expand_v"):
            head_width(self.hidden_size, getattr(self, name), self.num_heads, name)

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layer: two thirds of `mlp_ratio * hidden_size`, rounded up."""
        return self.mlp_multiple * math.ceil(int(self.hidden_size * self.mlp_ratio * 2 / 3) / self.mlp_multiple)


_NAMED = {
    "tiny": ModelConfig(
        vocabulary_size=256,
        hidden_size=128,
        num_layers=4,
        conv_width=4,
        mlp_multiple=64,
        tie_embeddings=True,
    ),
    "340m": ModelConfig(hidden_size=1024, tie_embeddings=True),
    "1b": ModelConfig(),
}


def named_config(name: str) -> ModelConfig:
    """The configuration that goes by a name.

    | name | parameters | hidden | layers | heads | vocabulary | |
    |------|-----------:|-------:|-------:|------:|-----------:|---|
    | tiny |      0.9 M |    128 |      4 |     4 |  256 bytes | short convolution, tied embeddings |
    | 340m |    341.7 M |   1024 |     24 |     4 |      32000 | tied embeddings |
    | 1b   |   1365.5 M |   2048 |     24 |     4 |      32000 | |

    All have `expand_k` 0.5, `expand_v` 1, gates of rank 16 with normaliser 16 and SwiGLU 4x: the sizes of Yang et al.,
    "Gated Linear Attention Transformers" (arXiv 2312.06635), section 5.

    Args:
        name: "tiny", "340m" or "1b".

    Returns:
        The configuration; change it with `dataclasses.replace`.

    Raises:
        ValueError: No configuration has that name.

    Example:
        >>> import dataclasses
        >>> from zeco_jax.models import named_config
        >>> dataclasses.replace(named_config("340m"), dtype="bfloat16").mlp_size
        2816
    """
    if name not in _NAMED:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(_NAMED)}")
    return _NAMED[name]
