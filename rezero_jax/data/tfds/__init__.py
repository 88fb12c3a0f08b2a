"""Data sets of TensorFlow Datasets, downloaded, prepared and read without TensorFlow."""
