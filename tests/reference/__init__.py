"""Reference numbers from PyTorch, and the scripts that made them."""
