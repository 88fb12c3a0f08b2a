"""Transformer layers, stacks of them, the language model and generation."""
