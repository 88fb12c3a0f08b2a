"""Experiments, one file each: `get_config(arg)` returns the config of `--config=FILE:ARG`."""
