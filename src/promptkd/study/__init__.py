"""Methods x seeds, from one file to one table."""
