"""Running jobs on their schedule, here or with another scheduler."""
