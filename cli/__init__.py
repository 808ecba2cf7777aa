"""What main.py adds to LightningCLI: a run's folder, callbacks by name, one line for a mistake; and `make_gates`."""
