"""What a run found out, for machines, for a model hub, for people."""
