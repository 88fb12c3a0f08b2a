"""Experiments, one file each: `get_config(arg)` returns the config of `--config=FILE:ARG`.

FILE:smoke is a tiny version of the experiment, which tests the installation within a minute.
"""
