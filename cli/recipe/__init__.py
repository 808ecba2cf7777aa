"""The steps of `python -m cli.make_gates`: look, harvest, lifespans, distillation, report."""
