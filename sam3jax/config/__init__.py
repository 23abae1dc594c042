"""The configuration of a run: the sections (`schema`, `model`, `loss`), reading them (`loading`), and the
list of all settings (`settings`)."""

from sam3jax.config.clicks import ClicksConfig
from sam3jax.config.clips import ClipsConfig
from sam3jax.config.data import DataConfig
from sam3jax.config.learning import EvalConfig, OptimConfig
from sam3jax.config.loading import (
    check_config,
    dump_config,
    explain,
    load_config,
    parse_config,
    read_settings,
    with_settings,
)
from sam3jax.config.loss import LossConfig
from sam3jax.config.model import DESTINATIONS, PRESETS, LoraConfig, ModelConfig
from sam3jax.config.schema import Config
from sam3jax.config.section import ConfigError

__all__ = [
    "DESTINATIONS", "PRESETS", "ClicksConfig", "ClipsConfig", "Config", "ConfigError", "DataConfig", "EvalConfig", "LoraConfig", "LossConfig", "ModelConfig",
    "OptimConfig", "check_config", "dump_config", "explain", "load_config", "parse_config", "read_settings", "with_settings",
]  # fmt: skip
