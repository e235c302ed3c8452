"""The options of a training, and the functions that read them from YAML files and the command line."""

from sdpnet.config.load import dump_config, load_config
from sdpnet.config.options import Config

__all__ = [
    "Config",
    "dump_config",
    "key_reference",
    "length",
    "load",
    "load_config",
    "names",
    "options",
    "renamed_keys",
    "resolution",
    "setting",
    "yaml_text",
]
