"""Decoding beside ffmpeg's own ceiling, PyAV and others."""
