"""What an operator deals with: the command, its settings, what start-up prints, the metrics."""
