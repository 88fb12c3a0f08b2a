"""Models: they know residual rules and stacks, and nothing of training."""
