"""Tables of measured numbers in the pages, generated from the records in benchmarks/results/."""
