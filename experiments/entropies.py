"""The n-gram entropies of the text that runs were trained on, for the plots of bits per byte."""

from functools import cache

from etils import epath

from rezero_jax.analysis.entropy import ngram_entropies
from rezero_jax.data.text import read_text
from rezero_jax.runs.folder import read_config
from rezero_jax.runs.reader import Run


def of_run(run: Run) -> dict[str, float]:
    """Unigram, bigram and trigram entropy (bits per byte) of the run's training text.

    Raises:
      UserError: the text is no longer there.
    """
    return _of_folder(run.folder)


@cache
def _of_folder(folder: epath.Path) -> dict[str, float]:
    return ngram_entropies(read_text(read_config(folder).data)[0])
