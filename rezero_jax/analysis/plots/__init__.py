"""Figures of runs and of what is measured in networks."""
