"""The six axes of a method: allocator, initialiser, parametrisation, update, schedule, base store."""
