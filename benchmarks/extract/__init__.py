"""Whole extractions beside a loop, Daft and Pixeltable."""
