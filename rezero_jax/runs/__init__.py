"""The folder of a run: written while it trains, read by everything that plots or compares."""
