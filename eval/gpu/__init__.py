"""`python -m eval.gpu`: what a GPU does with SmartKV, in nine minutes, with random weights and on a bare machine."""
