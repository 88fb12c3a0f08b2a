"""Checks annotations, jaxtyping's shapes among them, at every call while the tests run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, too
