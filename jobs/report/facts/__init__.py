"""What a report is about, as plain data."""
