"""Data sets of TensorFlow Datasets (TFDS), downloaded, prepared and read without TensorFlow."""
