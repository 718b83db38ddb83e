"""What crosses an op's boundary as one argument, and what such an argument is made of."""
