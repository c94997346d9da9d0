"""The report of one run or of several: one page with its figures and tables. No torch."""
