"""Names of weights in the layouts of others, one table for each family and layout."""
