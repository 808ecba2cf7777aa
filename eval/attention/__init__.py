"""Commands that look at a model's own attention: calibrate, anchors."""
