"""Plots and measurements of models and run folders."""
