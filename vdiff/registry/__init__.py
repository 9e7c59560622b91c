"""Classes by name, and objects from config trees. The only room that reads YAML."""

from vdiff.registry.base import (
    Entry,
    Registered,
    RegistryError,
    RegistryMeta,
    contract,
    did_you_mean,
    entries,
    isolated,
    kinds,
    lookup,
    register,
)
from vdiff.registry.build import ConfigError, Plan, build, check, kind_of, signature
from vdiff.registry.config import Config, ConfigFileError, load_config, save_config

__all__ = [
    "Config",
    "ConfigError",
    "ConfigFileError",
    "Entry",
    "Plan",
    "Registered",
    "RegistryError",
    "RegistryMeta",
    "build",
    "check",
    "contract",
    "did_you_mean",
    "entries",
    "isolated",
    "kind_of",
    "kinds",
    "load_config",
    "lookup",
    "register",
    "save_config",
    "signature",
]
