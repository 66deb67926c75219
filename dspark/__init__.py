"""DSpark Serving: drafting and verification as separate services that scale apart."""

__version__ = "0.1.0"
