"""Kills and damages that training must survive; `python -m tests.faults.campaign --help`."""
