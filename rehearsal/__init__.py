"""Compiles programs for absent accelerators to estimate their time and memory."""
