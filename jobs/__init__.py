"""What one starts: extract, index, train, evaluate, answer, report, re-index."""
