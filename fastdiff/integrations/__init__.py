"""Other libraries' habits on the tables and fused ops of this one, a module a library. None of them
is imported by ``import fastdiff``, and only ``diffusers`` needs its library to be installed."""
