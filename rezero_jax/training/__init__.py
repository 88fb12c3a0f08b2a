"""Training: one pytree of state, one jitted step, one loop."""
