"""Filling a store: extract, index, encoders and their weights."""
