"""Plans for machines that are not here: compiled by their own compilers, without running."""
