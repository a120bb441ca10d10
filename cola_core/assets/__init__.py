"""Where models and files come from: references, wheels, hubs, a cache by hash, and the base they become."""
