"""What people run: `python -m experiments.X`."""
