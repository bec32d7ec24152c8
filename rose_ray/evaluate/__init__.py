"""What selections are worth: fine-tuning a model on them, measures on held-out data, judges, tables and curves."""
