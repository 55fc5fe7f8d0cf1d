"""Speed measurements, one module per part of the codec; each is a function that returns numbers."""
