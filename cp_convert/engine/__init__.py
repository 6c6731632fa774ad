"""From a proven program to engines. The only place, with ``converters``, that meets TensorRT."""
