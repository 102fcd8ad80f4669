"""What a budget costs: accuracy against visual tokens kept, through the real server."""
