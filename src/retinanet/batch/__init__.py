"""Detection on large image collections with Ray."""
