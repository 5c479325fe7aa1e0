"""Studies: many trainings, several seeds, one table."""
