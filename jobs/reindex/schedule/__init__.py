"""Running jobs at their times, here or by another scheduler."""
