"""Answers to questions about recordings, with their evidence."""
