"""The peers, from the libraries that have them."""
