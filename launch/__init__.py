"""Helpers of the entry points: flags, signals, and processes on one machine or on clusters."""
