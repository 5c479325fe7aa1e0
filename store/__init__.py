"""The feature store: tables in Lance, commits, snapshots, the writer's lease, search."""
