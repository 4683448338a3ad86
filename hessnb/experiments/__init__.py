"""What to compute, and what is there: specifications, the store, the grid of artefacts, execution, the record."""
