"""One job each: parse arguments, call lib, print."""
