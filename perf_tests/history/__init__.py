"""What every night said, kept in one SQLite file that the JSON results can make again. No torch."""
