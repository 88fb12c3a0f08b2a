"""The tests; the option --jaxtyping-packages of the Makefile names `typechecker`."""

from tests import typechecker as typechecker
