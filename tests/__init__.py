"""The tests; `typechecker` is what the option --jaxtyping-packages of pyproject.toml names."""

from tests import typechecker as typechecker
