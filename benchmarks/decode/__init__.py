"""Decoding compared with ffmpeg's own ceiling, PyAV and others."""
