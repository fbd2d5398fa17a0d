"""What clients speak: one file for each family of endpoints."""
