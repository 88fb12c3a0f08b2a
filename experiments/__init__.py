"""Every figure and table of the paper, one file each: `python -m experiments NAME`."""
