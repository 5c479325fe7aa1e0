"""From a video file to frames and a waveform: ffmpeg, held in bounds."""
