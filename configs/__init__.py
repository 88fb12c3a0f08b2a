"""Experiments, one file each: `get_config(arg)` returns the config for `--config=FILE:ARG`."""
