"""Training: data, loss, optimizer step, checkpoints, and the loop that joins them."""

from zeco_jax.training.checkpoints import Checkpoints, Restored, load_model
from zeco_jax.training.chunkwise import choose_chunks, sum_over_chunks
from zeco_jax.training.configuration import (
    Architecture,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    identity,
    model_config,
    to_json,
)
from zeco_jax.training.corpus import Corpus, Document, read_documents, split_documents
from zeco_jax.training.data import Batch, place, training_batches, validation_batches, window
from zeco_jax.training.devices import DeviceConfig, make_mesh, prepare_devices
from zeco_jax.training.logs import MetricsFile, RunLogs, read_metrics
from zeco_jax.training.loop import train
from zeco_jax.training.loss import LossSum, bits_per_byte, cross_entropy, cross_entropy_of_hidden
from zeco_jax.training.objective import make_objective
from zeco_jax.training.optimizer import learning_rate_schedule, make_optimizer
from zeco_jax.training.parameters import Parameters, Skeleton
from zeco_jax.training.report import Summary, continue_text, draw_loss_curve
from zeco_jax.training.step import Metrics, Program, TrainState, compile_program, single_device_model
from zeco_jax.training.utilization import model_flops_per_token, model_flops_utilization

__all__ = [
    "Architecture",
    "Batch",
    "CheckpointConfig",
    "Checkpoints",
    "Corpus",
    "DataConfig",
    "DeviceConfig",
    "Document",
    "EvaluationConfig",
    "LoggingConfig",
    "LossSum",
    "MeshConfig",
    "Metrics",
    "MetricsFile",
    "OptimizerConfig",
    "Parameters",
    "Program",
    "Restored",
    "RunLogs",
    "Skeleton",
    "Summary",
    "TrainConfig",
    "TrainState",
    "bits_per_byte",
    "choose_chunks",
    "compile_program",
    "continue_text",
    "cross_entropy",
    "cross_entropy_of_hidden",
    "draw_loss_curve",
    "identity",
    "learning_rate_schedule",
    "load_model",
    "make_mesh",
    "make_objective",
    "make_optimizer",
    "model_config",
    "model_flops_per_token",
    "model_flops_utilization",
    "place",
    "prepare_devices",
    "read_documents",
    "read_metrics",
    "single_device_model",
    "split_documents",
    "sum_over_chunks",
    "to_json",
    "train",
    "training_batches",
    "validation_batches",
    "window",
]
