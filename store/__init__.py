"""What a datum is, where it rests, and who may write: tables in Lance, snapshots, search."""
