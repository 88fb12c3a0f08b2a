"""The folder of a run, written while the run trains and read by all that plots or compares."""
