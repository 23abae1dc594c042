"""The configuration of a run: sections and presets (`schema`), reading and errors (`loading`)."""

from sam3jax.config.schema import (
    PRESETS,
    ClicksConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    dump_config,
    load_config,
    parse_config,
)

__all__ = [
    "PRESETS", "ClicksConfig", "Config", "ConfigError", "DataConfig", "EvalConfig", "LoraConfig", "LossConfig", "ModelConfig",
    "OptimConfig", "dump_config", "load_config", "parse_config",
]  # fmt: skip
