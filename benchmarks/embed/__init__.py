"""The towers beside the machine's limit and others."""
