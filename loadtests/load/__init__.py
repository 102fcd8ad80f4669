"""`make load`: what a budget of visual tokens buys at a given load."""
