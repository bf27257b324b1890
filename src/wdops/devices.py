"""On which devices the ops run, and where TensorFlow computes what the host has to know of a step."""

import contextlib
from contextlib import AbstractContextManager

import tensorflow as tf
from tensorflow.python.framework import kernels
from tensorflow.python.ops import control_flow_util


def in_xla() -> bool:
    """Whether what is traced here is compiled."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def is_gpu(device: str) -> bool:
    return tf.DeviceSpec.from_string(device).device_type == "GPU"


def has_kernels(device: str) -> bool:
    """Whether the ops have kernels of their own there."""
    known = kernels.get_registered_kernels_for_op("Wdops>Norms").kernel
    return tf.DeviceSpec.from_string(device).device_type in {kernel.device_type for kernel in known}


def on_host() -> AbstractContextManager:
    """Where hyperparameters are computed, which an op takes from the host's memory.

    Left alone, TensorFlow computes them on a GPU, which then has to come to the end of all that it was given before
    the host can give it more.
    """
    return tf.device("CPU:0") if tf.config.list_logical_devices("GPU") and not in_xla() else contextlib.nullcontext()
