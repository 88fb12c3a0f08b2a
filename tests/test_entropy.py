"""N-gram entropies of texts whose entropies are known."""

import math

import numpy as np
import pytest
from etils import epath

from experiments import entropies
from rezero_jax.analysis.entropy import ngram_entropies, ngram_entropy
from rezero_jax.errors import UserError
from rezero_jax.runs.files import write_json
from rezero_jax.runs.reader import Run


def text(string):
    return np.frombuffer(string.encode(), np.uint8)


def test_by_hand():
    # a b a a: singles 3/4, 1/4; pairs ab, ba, aa; triples aba, baa.
    found = ngram_entropies(text("abaa"))
    single = 0.75 * math.log2(4 / 3) + 0.25 * 2
    assert found["unigram"] == pytest.approx(single)
    # Of the pairs' first bytes, a b a, two are a.
    assert found["bigram"] == pytest.approx(math.log2(3) - (math.log2(3) - 2 / 3))
    assert found["trigram"] == pytest.approx(1 - 1)


def test_a_period_of_two_needs_one_byte_of_context():
    found = ngram_entropies(text("ab" * 5000))
    assert found["unigram"] == pytest.approx(1)
    assert found["bigram"] == pytest.approx(0, abs=1e-9)


def test_random_bytes_have_eight_bits_whatever_the_context():
    bytes_ = np.random.default_rng(0).integers(0, 256, 2_000_000, dtype=np.uint8)
    assert ngram_entropy(bytes_, 1) == pytest.approx(8, abs=1e-3)
    assert ngram_entropy(bytes_, 2) == pytest.approx(8, abs=0.03)


def test_it_is_the_loss_of_the_table_of_frequencies():
    """The cross entropy of a bigram model with the text's own conditional frequencies."""
    letters = np.random.default_rng(1).integers(0, 3, 400, dtype=np.uint8)
    counts = np.zeros((3, 3))
    np.add.at(counts, (letters[:-1], letters[1:]), 1)
    model = counts / counts.sum(1, keepdims=True)
    loss = -np.log2(model[letters[:-1], letters[1:]]).mean()
    assert ngram_entropy(letters, 2) == pytest.approx(loss)


@pytest.mark.parametrize(("n", "sentence"), [(4, "n=4 is not 1, 2 or 3"), (2, "has no 2 in a row")])
def test_mistakes_are_told(n, sentence):
    with pytest.raises(UserError, match=sentence):
        ngram_entropy(text("a"), n)


def test_those_of_a_run_are_of_its_training_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("ab" * 900 + "zzzz" * 50)  # the last tenth is not trained on
    write_json(tmp_path / "config.json", {"data": {"name": "text", "path": str(path)}})
    found = entropies.of_run(Run(epath.Path(tmp_path), {}, []))
    assert found["unigram"] == pytest.approx(1)
    assert found["bigram"] == pytest.approx(0, abs=1e-9)
