"""The language model, its named configurations, and sampling."""

from zeco_jax.models.config import ModelConfig, named_config
from zeco_jax.models.language_model import LinearAttentionLM, count_parameters
from zeco_jax.models.sampling import sample
from zeco_jax.models.vocabulary import to_logits

__all__ = ["LinearAttentionLM", "ModelConfig", "count_parameters", "named_config", "sample", "to_logits"]
