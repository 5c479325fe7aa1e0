"""Nearest and farthest clips of each clip, kept up to date."""
