"""The n-gram entropies of the text that runs were trained on, for the plots of language models."""

from functools import cache

from etils import epath
from ml_collections import ConfigDict

from rezero_jax.analysis.statistics import ngram_entropies
from rezero_jax.data.text import TEXT_NAMES, read_text
from rezero_jax.runs.folder import read_config
from rezero_jax.runs.reader import Run


def of_run(run: Run) -> dict[str, float]:
    """Unigram, bigram and trigram entropy (bits per byte) of the run's training text.

    Raises:
      UserError: the text no longer exists.
    """
    return _of_folder(run.folder)


@cache
def _of_folder(folder: epath.Path) -> dict[str, float]:
    return of_data(read_config(folder).data)


def of_data(config: ConfigDict) -> dict[str, float]:
    """The entropies for a config's `data`; empty if the data set is not a text."""
    return ngram_entropies(read_text(config)[0]) if config.name in TEXT_NAMES else {}
