"""What compiled loops share: how they are compiled and kept, vector lanes, products, threads."""
