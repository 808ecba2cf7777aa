"""Commands that measure answers: needle, RULER, LongBench, reasoning."""
