"""`python -m fluxfast bench`: levels measured into one table, one plot and their images. No torch."""
