"""A stored run as a page to look at: what is said comes from the same judges as the tests. No torch."""
