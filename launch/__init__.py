"""What starts and stops processes."""
