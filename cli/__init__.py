"""What main.py adds to LightningCLI: one folder for a run, settings of callbacks by name, one line for a mistake."""
