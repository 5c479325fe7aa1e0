"""Stages from videos to rows of the store, and from rows to batches."""
