"""The report of a run, or several, on one page."""
