"""What is measured and how: each module prints a table and writes a record to `results/`."""
