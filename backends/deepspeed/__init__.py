"""The spec, declared to DeepSpeed: a ds_config, an engine, and the state by parameter name."""

from .backend import DeepSpeedBackend

backend = DeepSpeedBackend()
