"""Fault injection: jobs killed at random points, and an audit that nothing was lost."""
